"""Memory of a training step with sampled gradients of the weights, against the exact step.

    python benchmarks/memory.py
    python benchmarks/memory.py --depth 12 --ratio 0.1 --json memory.json

Transformer blocks of a ViT-B (768 features, 12 heads, 197 tokens) with LayerNorm, fused qkv, scaled dot-product
attention and GELU. "Layers" is what the sampled linear layers keep for backward by the report; it is checked against
the measurement: all that autograd saves must shrink by the same number of bytes, if activations that two operations
save count twice. "Step" counts them once: attention keeps its own output, so that the layer behind it saves nothing by
keeping a part of it. "Peak" is the most memory allocated during forward, loss and backward, above what stood before.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from _header import add_json_option, header, store
from _peak import peak_bytes
from tabulate import tabulate
from torch import Tensor, nn

import fx_approx
from fx_approx import SamplerConfig
from fx_approx.core.plan import Policy
from fx_approx.policies import GradientSampling


class Block(nn.Module):
    """A pre-norm transformer block; input and output ``[batch, tokens, dim]``."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` is ``[batch, tokens, dim]``."""
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, tokens, dim))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


@dataclasses.dataclass(frozen=True)
class Measured:
    """Bytes of one variant; ``layers`` is the report's, the others are measured."""

    variant: str
    layers: int
    step: int
    peak: int


def variants(ratio: float) -> dict[str, Policy]:
    """What is measured beside the exact model."""
    return {
        f"weight gradient {ratio:g}, wta, rows chosen in forward": GradientSampling.weight_gradient(ratio),
        f"both gradients {ratio:g}, rows chosen in forward": GradientSampling(
            grad_input=SamplerConfig("systematic", ratio), grad_weight=SamplerConfig("wta", ratio, scores="input")
        ),
        f"both gradients {ratio:g}, rows chosen in backward": GradientSampling.backward(ratio),
    }


def saved_for_backward(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Bytes that autograd saves in a forward pass, without parameters: each memory once, and each saving of floats."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, Tensor] = {}
    every = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal every
        place = tensor.untyped_storage().data_ptr()
        if place not in parameters:
            every += tensor.nbytes if tensor.is_floating_point() or place not in found else 0
            found[place] = tensor
        return tensor.detach()  # itself, a result that its own backward keeps would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values()), every


def peak(model: nn.Module, x: Tensor) -> int:
    """Most bytes allocated in forward, loss and backward, above what stood before; the gradients are among them."""
    model.zero_grad(set_to_none=True)
    return peak_bytes(lambda: model(x).square().mean().backward(), x.device.type)


def measure(model: nn.Module, x: Tensor, ratio: float) -> list[Measured]:
    """All variants of ``model``; AssertionError if the report's bytes are not the measured ones."""
    (exact_step, exact_every), exact_peak = saved_for_backward(model, x), peak(model, x)
    found: list[Measured] = []
    for variant, policy in variants(ratio).items():
        approx = fx_approx.transform(model, policy, x)
        rows = [row for row in fx_approx.report(approx).rows if row.samples]
        exact, kept = (sum(row.kept_exact or 0 for row in rows), sum(row.kept or 0 for row in rows))
        if not found:
            found.append(Measured("exact", exact, exact_step, exact_peak))
        step, every = saved_for_backward(approx, x)
        if exact_every - every != exact - kept:
            raise AssertionError(f"{variant}: the report says {exact - kept:,} bytes, measured {exact_every - every:,}")
        found.append(Measured(variant, kept, step, peak(approx, x)))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description="Memory of a training step with sampled gradients.")
    for name, default, text in (
        ("depth", 4, "blocks"),
        ("dim", 768, "features"),
        ("heads", 12, "heads"),
        ("tokens", 197, "tokens of an example"),
        ("batch", 32, "examples"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    parser.add_argument("--ratio", type=float, default=0.3, help="sample ratio (0.3)")
    add_json_option(parser)
    options = parser.parse_args(arguments)
    sizes = options.depth, options.dim, options.heads, options.tokens, options.batch
    if min(sizes) < 1 or options.dim % options.heads or not 0 < options.ratio < 1:
        parser.error("expected sizes of 1 or more, --dim a multiple of --heads, --ratio in (0, 1)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(options.dim, options.heads) for _ in range(options.depth))).to(device)
    x = torch.randn(options.batch, options.tokens, options.dim, device=device)
    print(header(f"Memory of a step: {options.depth} blocks, {options.batch} x {options.tokens} x {options.dim}"))
    found = measure(model, x, options.ratio)
    table = [[one.variant, *(cell(getattr(one, what), getattr(found[0], what)) for what in COLUMNS)] for one in found]
    print(f"\n{tabulate(table, ['variant', *COLUMNS.values()], disable_numparse=True)}")
    store(options.json, [dataclasses.asdict(one) for one in found])


COLUMNS = {"layers": "layers keep, MB (share)", "step": "step saves, MB (share)", "peak": "peak, MB (share)"}


def cell(bytes_: int, exact: int) -> str:
    """Megabytes and the share of the exact model's."""
    return f"{bytes_ / 1e6:,.1f} ({bytes_ / exact:.2f})"


if __name__ == "__main__":
    main()
