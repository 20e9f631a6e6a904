"""What can be checked of the Triton kernels without a GPU and without the interpreter: a program that a test runs.

``trace`` takes sampled layers through Dynamo and AOTAutograd, forward and backward, up to the graphs that Inductor
would get; ``build`` compiles the kernels for GPUs that need not be there.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fx_approx import kernels, ops
from fx_approx.kernels import table, triton_ops, triton_uniforms
from fx_approx.ops.base import norm
from fx_approx.sampling import Selection

CHOSEN = Selection(torch.tensor([[3, 0, 5]]), torch.tensor([[2.0, 1.5, 3.0]]))
PRODUCTS = [("*fp16", "ieee"), ("*bf16", "tf32"), ("*fp32", "ieee"), ("*fp32", "tf32")]
CAPABILITIES = (80, 90)


class Driver:
    """Names a GPU to torch, which has Triton compile a kernel to see which arguments it writes to."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def output(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return ops.linear(x, w, bias, selection=CHOSEN)


def grad_weight(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return ops.linear(x, w, bias, grad_weight=CHOSEN)


def norms(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return norm(x.detach(), (0,)) * w + bias.unsqueeze(1)


def launches(layer: Callable[..., Tensor], dynamic: bool) -> list[int]:
    """How many launches there are in the forward and in the backward graph; an error if there are more graphs."""
    seen: list[int] = []

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        seen.append(sum("triton_kernel_wrapper" in str(node.target) for node in graph.graph.nodes))
        (last,) = graph.graph.find_nodes(op="output")
        values = [node.meta["val"] if isinstance(node, torch.fx.Node) else node for node in last.args[0]]
        shapes = [[int(n) for n in v.shape] if isinstance(v, Tensor) else v for v in values]

        def zeros(*_: Any) -> list[Any]:
            """Nothing is launched: what comes back has the right shapes only."""
            return [torch.zeros(v) if isinstance(v, list) else None if v is None else int(v) for v in shapes]

        return make_boxed_func(zeros)

    compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=compiler), fullgraph=True, dynamic=dynamic)
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((9, 6), (4, 6), (4,))]
    torch.autograd.grad(compiled(*leaves).sum(), leaves, allow_unused=True)
    torch._dynamo.reset()
    return seen


def trace() -> dict[str, list[int]]:
    triton.runtime.driver.set_active(Driver())
    assert kernels.prefer("triton")
    table._interpreted = True  # or else operands on a CPU are left to the reference
    return {
        f"{layer.__name__}{' dynamic' * dynamic}": launches(layer, dynamic)
        for layer, dynamic in itertools.product((output, grad_weight, norms), (False, True))
    }


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int, **options: Any) -> Any:
    """A kernel for a GPU; what has no type is an integer that 16 divides."""
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind != "constexpr"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def build() -> dict[str, bool]:
    """Whether the code of each product uses the tensor cores, and that of the norms fused multiply-adds."""
    found = {}
    layouts = {"columns": ("stride_ar", "stride_br"), "rows": ("stride_am", "stride_bn")}
    configuration = triton_ops._CONFIGURATIONS[-1]
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    for (dtype, precision), (layout, units) in itertools.product(PRODUCTS, layouts.items()):
        extras = precision == "tf32"
        types = {**dict.fromkeys(("a", "b", "out", "bias"), dtype), "scale": "*fp32", "index": "*i64", "count": "*i32"}
        constants = {
            **dict.fromkeys((*units, "stride_on"), 1),
            **{"HAS_SCALE": extras, "HAS_BIAS": layout == "columns", "HAS_COUNT": extras},
            **{"KEPT": layout == "rows" and not extras, "PRECISION": precision, "WIDEN": False},
            **configuration.kwargs,
        }
        code = compiled(triton_ops._gathered, types, constants, CAPABILITIES[extras], **options).asm["ptx"]
        found[f"{layout} {dtype[1:]} {precision}"] = "mma.sync" in code or "wgmma" in code
    constants = {"stride_k": 1, "BLOCK_M": 64, "BLOCK_K": 64}
    code = compiled(triton_ops._squares, {"x": "*bf16", "out": "*fp32"}, constants, 90).asm["ptx"]
    found["norms"] = "fma.rn.f32" in code
    types = {**dict.fromkeys(("key", "sites", "places", "elements"), "*i64"), "out": "*fp32"}
    code = compiled(triton_uniforms._uniforms, types, {"BLOCK": 512}, 90).asm["ptx"]
    found["uniforms"] = "shr.u32" in code
    return found


if __name__ == "__main__":
    print(json.dumps({"trace": trace, "build": build}[sys.argv[1]]()))
