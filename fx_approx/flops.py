"""Counting: operations by role, the selection's own overhead, and bytes kept for backward.

A multiply-add is two operations (as torch counts). A training step of a candidate is OUTPUT + GRAD_INPUT +
GRAD_WEIGHT; a role that autograd does not run (the first layer's GRAD_INPUT, a frozen weight's GRAD_WEIGHT) is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fx_approx.candidate import Candidate, GemmShape, ProductFacts, RoleFlops
from fx_approx.sampling import get_score

_INDEX_BYTES = 8
_SCALE_BYTES = 4


def role_flops(shape: GemmShape, grad_input: bool, grad_weight: bool, pairs: int | None = None) -> RoleFlops:
    """Operations of the three roles in forward mode, with ``pairs`` pairs per group computed (default: all).

    In forward mode gradients flow through the sampled entries only, so all three roles shrink alike.
    """
    flops = shape.flops(pairs)
    return RoleFlops(flops, flops if grad_input else 0, flops if grad_weight else 0)


def executed_flops(facts: ProductFacts, pairs: int | None) -> RoleFlops:
    """Operations of ``facts`` when ``pairs`` pairs per group are sampled (None: exact)."""
    if pairs is None or facts.shape is None:
        return facts.flops
    return role_flops(facts.shape, facts.flops.grad_input > 0, facts.flops.grad_weight > 0, pairs)


def selection_flops(candidate: Candidate, scores: str) -> int:
    """Operations spent on the scores: one multiply-add per entry of each operand whose norms are read.

    The sampler itself (a sort and a cumulative sum over the pairs) is not counted: it multiplies nothing.
    """
    facts = candidate.facts
    if facts is None or facts.shape is None:
        return 0
    shape, kind = facts.shape, get_score(scores)
    itemsize = _itemsize(facts.dtype)
    lhs, rhs = facts.lhs_bytes // itemsize, facts.rhs_bytes // itemsize
    products = shape.pairs * shape.groups * shape.batch if kind.reads_lhs and kind.reads_rhs else 0
    return 2 * (lhs * kind.reads_lhs + rhs * kind.reads_rhs) + products


def kept_bytes(facts: ProductFacts, pairs: int | None, scaled: bool) -> int:
    """Bytes this product alone keeps for backward, parameters not counted.

    Exact, it keeps its left operand where the right one needs a gradient, and its right operand where the left one
    does. Sampled, it keeps the chosen part of both: the slice of a weight is new memory, unlike the weight. The
    producer of the left operand may keep the whole of it for itself; that is not this product's. Operands
    count as they are, though torch writes out a broadcast batch, and ``einsum`` may copy an operand or sum it up first.
    """
    if facts.shape is None:
        return 0
    if pairs is None:
        return facts.lhs_kept * facts.lhs_bytes + (facts.rhs_kept and not facts.rhs_is_parameter) * facts.rhs_bytes
    total = facts.shape.pairs
    kept = facts.lhs_kept * facts.lhs_bytes * pairs // total + facts.rhs_kept * facts.rhs_bytes * pairs // total
    # Indices lead the gradients back to their places; the scale, in float32 or float64, multiplies that of the weight.
    index = _INDEX_BYTES * (facts.lhs_kept or facts.rhs_kept)
    scale = max(_SCALE_BYTES, _itemsize(facts.dtype)) * (scaled and facts.flops.grad_weight > 0)
    return kept + facts.shape.groups * pairs * (index + scale)


def measured_flops(function: Callable[..., Any], inputs: list[torch.Tensor], weights: list[torch.Tensor]) -> RoleFlops:
    """Operations of a multiply that is no single GEMM, as ``FlopCounterMode`` counts them on fake tensors.

    Args:
        function: Called without arguments; its tensor outputs are differentiated.
        inputs: Activations; the backward pass towards those that need a gradient counts as ``grad_input``.
        weights: Parameters; the rest of the backward pass counts as ``grad_weight``.
    """
    with torch.enable_grad():
        counter = FlopCounterMode(display=False)
        with counter:
            result = function()
        forward = counter.get_total_flops()
        outputs = [t for t in _tensors(result) if t.requires_grad]
        seeds = [torch.ones_like(t) for t in outputs]
        inputs = [t for t in inputs if t.requires_grad]
        weights = [t for t in weights if t.requires_grad]

        def backward(targets: list[torch.Tensor]) -> int:
            if not targets or not outputs:
                return 0
            with FlopCounterMode(display=False) as counter:
                torch.autograd.grad(outputs, targets, seeds, retain_graph=True, allow_unused=True)
            return int(counter.get_total_flops())

        to_inputs, total = backward(inputs), backward(inputs + weights)
    return RoleFlops(forward, to_inputs, total - to_inputs)


def _itemsize(dtype: str) -> int:
    found = getattr(torch, dtype.removeprefix("torch."))
    assert isinstance(found, torch.dtype)
    return found.itemsize


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
