"""Tokens that are computed but not seen: what the graph calls that :func:`fx_approx.analysis.verify` compares with.

A *part* of an axis of tokens is ``(sampled, count, block)``: units of ``block`` entries each, ``count`` of them in the
example, which may be left out or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fx_approx.sampling.base import Selection

TokenPart = tuple[bool, int, int]

_OPERANDS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def there(parts: Sequence[TokenPart], size: int, chosen: Selection) -> Tensor:
    """Which entries of an axis of ``size`` are chosen or always there: ``[1, size]``, or ``[examples, size]``."""
    examples, device = chosen.indices.shape[0], chosen.indices.device
    others = sum(count * block for sampled, count, block in parts if not sampled)
    tokens = (size - others) // max(1, sum(block for sampled, _, block in parts if sampled))
    some = torch.zeros(examples, tokens, dtype=torch.bool, device=device).scatter(1, chosen.indices, True)
    every = torch.ones(examples, size, dtype=torch.bool, device=device)
    pieces = [
        some.repeat_interleave(block, 1) if sampled else every[:, : count * block] for sampled, count, block in parts
    ]
    return torch.cat(pieces, 1)


def masked_attention(
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    queries: Sequence[TokenPart] | None,
    keys: Sequence[TokenPart] | None,
    chosen: Selection | None,
) -> Tensor:
    """``F.scaled_dot_product_attention`` in which no one sees the tokens that are left out.

    These themselves see all, so that what they make is finite; no one reads it.

    Args:
        args: Of the attention.
        kwargs: The same, by name.
        queries: The axis of the queries' tokens; None if they are others.
        keys: That of the keys'.
        chosen: None if all are there.
    """
    given = {**dict(zip(_OPERANDS, args, strict=False)), **kwargs}
    if chosen is None:
        return F.scaled_dot_product_attention(**given)
    query, key = given["query"], given["key"]
    mask = given.pop("attn_mask", None)
    if given.pop("is_causal", False):
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if mask is None:
        mask = torch.ones(1, key.shape[-2], dtype=torch.bool, device=query.device)
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    if keys is not None:
        seen = _beside(there(keys, key.shape[-2], chosen), query)
        mask = mask.masked_fill(~seen.unsqueeze(-2), -torch.inf)
    if queries is not None:
        own = _beside(there(queries, query.shape[-2], chosen), query)
        mask = torch.where(own.unsqueeze(-1), mask, 0.0)
    return F.scaled_dot_product_attention(**given, attn_mask=mask)


def _beside(mask: Tensor, value: Tensor) -> Tensor:
    """``[examples, size]`` with an axis for each of ``value`` before the last two: its first has the examples."""
    examples = mask.shape[0]
    if examples > 1 and value.shape[0] != examples:  # heads beside examples
        mask = mask.repeat_interleave(value.shape[0] // examples, 0)
    return mask.reshape(mask.shape[0], *[1] * (value.dim() - 3), mask.shape[1])


def passed_by(start: Tensor, end: Tensor, dim: int, parts: Sequence[TokenPart], chosen: Selection | None) -> Tensor:
    """``end`` for the tokens that are chosen, and ``start`` for the others.

    Args:
        start: What a stretch of blocks reads.
        end: What it makes, of all tokens.
        dim: Their axis.
        parts: What stands along it.
        chosen: None if all are there.
    """
    if chosen is None:
        return end
    mask = there(parts, end.shape[dim], chosen)
    sizes = [1] * end.dim()
    sizes[dim], sizes[_examples(dim)] = mask.shape[1], mask.shape[0]
    mask = (mask if dim > _examples(dim) else mask.T).reshape(sizes)
    return torch.where(mask, end, start.to(end.dtype))


def those_there(value: Tensor, dim: int, parts: Sequence[TokenPart], chosen: Selection | None) -> Tensor:
    """``value`` without the tokens that are left out, for what pools over tokens.

    Args:
        value: Any shape.
        dim: The axis of the tokens.
        parts: What stands along it.
        chosen: None if all are there.
    """
    if chosen is None:
        return value
    masks, axis = there(parts, value.shape[dim], chosen), _examples(dim)
    if len(masks) == 1:
        return value.index_select(dim, masks[0].nonzero().flatten())
    each = value.expand(
        *(len(masks) if place == axis and size == 1 else size for place, size in enumerate(value.shape))
    )
    own = [
        part.index_select(dim, mask.nonzero().flatten()) for part, mask in zip(each.split(1, axis), masks, strict=True)
    ]
    return torch.cat(own, axis)


def _examples(dim: int) -> int:
    """The axis of the examples of a value with the tokens along ``dim``."""
    return 0 if dim else 1
