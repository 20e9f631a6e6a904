"""Compiles the kernel of the uniforms for a GPU that need not be there, without Triton's interpreter: a program."""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fx_approx.sampling import triton_uniforms


def assembly(capability: int) -> str:
    """The code of the kernel; integers without a type are those that 16 divides."""
    kernel = triton_uniforms._uniforms
    types = {**dict.fromkeys(("key", "sites", "places", "elements"), "*i64"), "out": "*fp32", "BLOCK": "constexpr"}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind != "constexpr"}
    source = ASTSource(fn=kernel, signature=signature, constexprs={"BLOCK": 512}, attrs=attributes)
    return str(triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"])


if __name__ == "__main__":
    print([capability for capability in (80, 90) if "shr.u32" in assembly(capability)])
