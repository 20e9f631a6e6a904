"""Counting: operations by role, the selection's own overhead, and bytes kept for backward.

A multiply-add is two operations (as torch counts). A training step of a candidate is OUTPUT + GRAD_INPUT +
GRAD_WEIGHT; a role that autograd does not run (the first layer's GRAD_INPUT, a frozen weight's GRAD_WEIGHT) is 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

from fx_approx._compat import fused_attention, tree_leaves
from fx_approx.core.candidates import Candidate, GemmShape, ProductFacts, Role, RoleFlops
from fx_approx.sampling.base import get_sampler
from fx_approx.sampling.scores import get_score
from fx_approx.sampling.spec import SamplerConfig

_INDEX_BYTES = 8
_SCALE_BYTES = 4
_UNIFORM_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Kept:
    """How many pairs of each of a candidate's products are computed; None where the product is exact.

    Attributes:
        output: Of the output's pairs, per group.
        grad_input: Of the output features or channels, per group.
        grad_weight: Of the rows or examples (single positions of a convolution, if ``positions``).
        straight_through: The gradients are not those of the sampled output.
        positions: See ``grad_weight``.
        columns: Output features or channels per group that the output is computed for; None for all of them. Without
            sampled gradients all three products have no others.
        share: Numerator and denominator: so much is computed of a product that falls apart into equal ones, such as a
            depthwise convolution (of its groups) or attention (of its heads).
        tokens: Tokens that are computed, and all.
        mixes: Each of them is multiplied with each.
    """

    output: int | None = None
    grad_input: int | None = None
    grad_weight: int | None = None
    straight_through: bool = False
    positions: bool = False
    columns: int | None = None
    share: tuple[int, int] = (1, 1)
    tokens: tuple[int, int] = (1, 1)
    mixes: bool = False

    @property
    def undemanded(self) -> Kept:
        """The same of a product of which the whole output is computed."""
        return dataclasses.replace(self, columns=None, share=(1, 1))

    def of(self, role: Role) -> int | None:
        """How many pairs are kept of the product ``role``."""
        return {Role.OUTPUT: self.output, Role.GRAD_INPUT: self.grad_input, Role.GRAD_WEIGHT: self.grad_weight}[role]


def role_flops(shape: GemmShape, grad_input: bool, grad_weight: bool, kept: Kept | None = None) -> RoleFlops:
    """Operations of the three roles, those of a role that autograd does not run 0.

    In forward mode gradients flow through the sampled entries only, so all three roles shrink alike; a gradient that is
    sampled itself shrinks once more.
    """
    kept = Kept() if kept is None else kept
    pairs = None if kept.straight_through else kept.output
    rows = kept.grad_weight
    if rows is not None and not kept.positions:
        rows *= shape.row_block
    columns = kept.columns
    flops = RoleFlops(
        shape.flops(kept.output, n=columns),
        shape.flops(pairs, n=columns if kept.grad_input is None else kept.grad_input) if grad_input else 0,
        shape.flops(pairs, m=rows, n=columns) if grad_weight else 0,
    )
    return _shared_out(flops, kept)


def _shared_out(flops: RoleFlops, kept: Kept) -> RoleFlops:
    (share, of_all), (tokens, all_tokens), power = kept.share, kept.tokens, 1 + kept.mixes
    some, of = share * tokens**power, of_all * all_tokens**power
    return RoleFlops(flops.output * some // of, flops.grad_input * some // of, flops.grad_weight * some // of)


def executed_flops(facts: ProductFacts, kept: Kept) -> RoleFlops:
    """Operations of ``facts`` with so many pairs computed."""
    if kept == Kept() or facts.shape is None:
        return _shared_out(facts.flops, kept)
    return role_flops(facts.shape, facts.flops.grad_input > 0, facts.flops.grad_weight > 0, kept)


def role_pairs(candidate: Candidate, role: Role, spec: SamplerConfig) -> int | None:
    """What a sampler of ``role`` chooses from, per group; None where shapes are not known."""
    shape = candidate.facts.shape if candidate.facts is not None else None
    if shape is None:
        return candidate.pairs if role is Role.OUTPUT else None
    return shape.role_pairs(role, spec.positions)


def kept_pairs(candidate: Candidate, roles: Mapping[Role, SamplerConfig], straight_through: bool = False) -> Kept:
    """How many pairs samplers of ``roles`` keep; None for those that keep all, and where shapes are not known."""
    counts: dict[Role, int | None] = {}
    for role, spec in roles.items():
        pairs = role_pairs(candidate, role, spec)
        k = None if pairs is None else spec.count(pairs)
        counts[role] = None if k == pairs else k
    rows = roles.get(Role.GRAD_WEIGHT)
    positions = rows is not None and rows.positions
    return Kept(
        counts.get(Role.OUTPUT),
        counts.get(Role.GRAD_INPUT),
        counts.get(Role.GRAD_WEIGHT),
        straight_through and counts.get(Role.OUTPUT) is not None,
        positions,
    )


def selection_flops(candidate: Candidate, role: Role, spec: SamplerConfig) -> int:
    """Operations spent on the scores: one multiply-add per entry of each operand whose norms are read.

    The sampler itself (a sort and a cumulative sum over the pairs) is not counted: it multiplies nothing.
    """
    facts = candidate.facts
    if facts is None or facts.shape is None or not _runs(facts, role):
        return 0
    shape, kind = facts.shape, get_score(spec.scores)
    itemsize = _itemsize(facts.dtype)
    entries = {
        "input": facts.lhs_bytes // itemsize,
        "weight": facts.rhs_bytes // itemsize,
        "gradient": shape.batch * shape.groups * shape.m * shape.n,
    }
    operands = {Role.OUTPUT: ("input", "weight"), Role.GRAD_INPUT: ("gradient", "weight")}
    read = [name for name in operands.get(role, ("gradient", "input")) if name in kind.reads]
    if spec.positions and "input" in read:
        entries["input"] += shape.m * shape.block  # the squares of a patch are added up
    if kind.learns:
        read.append("gradient")  # for the steps to come
    groups = 1 if role is Role.GRAD_WEIGHT else shape.groups
    products = shape.role_pairs(role, spec.positions) * groups * shape.batch if len(read) == 2 else 0
    return 2 * sum(entries[name] for name in read) + products


def _runs(facts: ProductFacts, role: Role) -> bool:
    flops = facts.flops
    return role is Role.OUTPUT or (flops.grad_input if role is Role.GRAD_INPUT else flops.grad_weight) > 0


def kept_bytes(facts: ProductFacts, kept: Kept, roles: Mapping[Role, SamplerConfig]) -> int:
    """Bytes this product alone keeps for backward, parameters not counted.

    Exact, it keeps its left operand where the right one needs a gradient, and its right operand where the left one
    does. With a sampled output it keeps the chosen part of both: the slice of a weight is new memory, unlike the
    weight. Where the rows for the weight gradient are chosen in the forward pass, it keeps only those of the left
    operand. The producer of the left operand may keep the whole of it for itself; that is not this product's. Operands
    count as they are, though torch writes out a broadcast batch, and ``einsum`` may copy an operand or sum it up first.

    Args:
        facts: Of the candidate.
        kept: How many pairs are computed.
        roles: The samplers.
    """
    shape = facts.shape
    if shape is None:
        return 0
    backward = {
        role: spec
        for role, spec in roles.items()
        if role is not Role.OUTPUT and kept.of(role) is not None and _runs(facts, role)
    }
    apart = bool(backward) or kept.straight_through
    lhs, rhs = facts.lhs_kept * facts.lhs_bytes, facts.rhs_kept * facts.rhs_bytes
    new_rhs = not facts.rhs_is_parameter
    if apart:
        lhs *= facts.flops.grad_weight > 0
    patch = shape.k * shape.groups * _itemsize(facts.dtype)  # what an output position of a convolution reads
    total, scale = 0, max(_SCALE_BYTES, _itemsize(facts.dtype))
    some, of = kept.share
    if some < of:
        lhs, rhs, new_rhs = lhs * some // of, rhs * some // of, True
    if kept.columns is not None:
        rhs, new_rhs = rhs * kept.columns // shape.n, True
    if kept.output is not None and not kept.straight_through:
        lhs, rhs = lhs * kept.output // shape.pairs, rhs * kept.output // shape.pairs
        new_rhs, patch = True, patch * kept.output // shape.pairs
        # Indices lead the gradients back to their places; the scale multiplies that of the weight.
        index = _INDEX_BYTES * (facts.lhs_kept or facts.rhs_kept)
        scaled = get_sampler(roles[Role.OUTPUT].name).unbiased and facts.flops.grad_weight > 0
        total += _groups(shape, Role.OUTPUT, roles[Role.OUTPUT]) * kept.output * (index + scale * scaled)
    for role, spec in backward.items():
        k, pairs = kept.of(role) or 0, shape.role_pairs(role, spec.positions)
        sampler, groups = get_sampler(spec.name), _groups(shape, role, spec)
        if not get_score(spec.scores).early:
            total += groups * sampler.uniforms(pairs, k) * _UNIFORM_BYTES * sampler.random
            continue
        total += groups * k * (_INDEX_BYTES + scale * sampler.unbiased)
        if role is Role.GRAD_WEIGHT:
            lhs = min(lhs, k * patch) if spec.positions else lhs * k // pairs
    there, of_all = kept.tokens
    lhs = lhs * there // of_all
    if not facts.rhs_is_parameter:
        rhs = rhs * there // of_all
    return total + lhs + rhs * new_rhs


def sliced_bytes(facts: ProductFacts, kept: Kept) -> int:
    """Bytes of the slice of its weight that a product reads; 0 where it reads the whole, or multiplies activations."""
    shape, (some, of) = facts.shape, kept.share
    whole = kept.output is None and kept.columns is None and some == of
    if shape is None or whole or not facts.rhs_is_parameter:
        return 0
    pairs = shape.pairs if kept.output is None else kept.output
    columns = shape.n if kept.columns is None else kept.columns
    return facts.rhs_bytes * pairs * columns * some // (shape.pairs * shape.n * of)


def slicing_bytes(facts: ProductFacts, kept: Kept) -> int:
    """Bytes that a step moves for the slice: read and written forward, the whole gradient written backward."""
    found = sliced_bytes(facts, kept)
    backward = found > 0 and facts.flops.grad_weight > 0 and not kept.straight_through
    return 2 * found + facts.rhs_bytes * backward


def _groups(shape: GemmShape, role: Role, spec: SamplerConfig) -> int:
    """Selections of one product: one for each group of a convolution, or for each product of a batch if asked."""
    return (1 if role is Role.GRAD_WEIGHT else shape.groups) * (shape.batch if spec.per_batch else 1)


def attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Operations of the forward pass of fused attention, as torch counts them: QKᵀ and PV, causal ones in full.

    Args:
        query: Shape ``[B, heads, T, d]``.
        key: ``[B, heads, S, d]``; there may be fewer heads than of the queries, each of which reads one all the same.
        value: ``[B, heads, S, e]``.
        args: The operator's other arguments, which do not matter.
        out_shape: Of the result.
        kwargs: As ``args``.
    """
    scores = 2 * math.prod(query[:-1]) * key[-2]
    return scores * (query[-1] + value[-1])


def attention_backward_flops(
    grad: Sequence[int],
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """The same of the backward pass: QKᵀ again, the gradients of P and V, and those of Q and K.

    Args:
        grad: Shape of the gradient of the output.
        query: As in :func:`attention_flops`.
        key: As there.
        value: As there.
        args: As there.
        out_shape: As there.
        kwargs: As there.
    """
    scores = 2 * math.prod(query[:-1]) * key[-2]
    return scores * (3 * query[-1] + 2 * value[-1])


def convolution_backward_flops(
    grad: Sequence[int], input: Sequence[int], weight: Sequence[int], *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Operations of the backward pass of a convolution: each gradient costs what the forward does.

    torch's own formula counts the weight gradient of a grouped convolution as if it had one group.

    Args:
        grad: Shape of the gradient of the output, ``[N, O, ...]``.
        input: ``[N, C, ...]``.
        weight: ``[O, C / groups, ...]``, of a transposed convolution ``[C, O / groups, ...]``.
        args: Sizes of the bias, stride, padding, dilation, whether it is transposed, padding of the output, groups, and
            which gradients are computed: of the input, the weight and the bias.
        out_shape: Of the gradients.
        kwargs: None.
    """
    transposed, (to_input, to_weight, _) = args[4], args[7]
    positions = math.prod((input if transposed else grad)[2:])
    return 2 * input[0] * positions * math.prod(weight) * (bool(to_input) + bool(to_weight))


_FORMULAS: dict[Any, Callable[..., int]] = {
    **dict.fromkeys(fused_attention()[0], attention_flops),
    **dict.fromkeys(fused_attention()[1], attention_backward_flops),
    torch.ops.aten.convolution_backward: convolution_backward_flops,
}
"""Of operators that torch's counter does not know on every device, or not in every release, or counts wrongly."""

# So that the report stays what the counter finds on the running model: those that it does not know at all.
for _operator in [one for one in _FORMULAS if one not in flop_registry]:
    register_flop_formula(_operator)(_FORMULAS[_operator])


def _counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=_FORMULAS)


def measured_flops(function: Callable[..., Any], inputs: list[torch.Tensor], weights: list[torch.Tensor]) -> RoleFlops:
    """Operations of a multiply that is no single GEMM, as ``FlopCounterMode`` counts them on fake tensors.

    Fused attention counts by formula, the same on every device.

    Args:
        function: Called without arguments; its tensor outputs are differentiated.
        inputs: Activations; the backward pass towards those that need a gradient counts as ``grad_input``.
        weights: Parameters; the rest of the backward pass counts as ``grad_weight``.
    """
    with torch.enable_grad():
        counter = _counter()
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
            with _counter() as counter:
                torch.autograd.grad(outputs, targets, seeds, retain_graph=True, allow_unused=True)
            return int(counter.get_total_flops())

        to_inputs, total = backward(inputs), backward(inputs + weights)
    return RoleFlops(forward, to_inputs, total - to_inputs)


def _itemsize(dtype: str) -> int:
    found = getattr(torch, dtype.removeprefix("torch."))
    assert isinstance(found, torch.dtype)
    return found.itemsize


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
