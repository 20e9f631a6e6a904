"""Working on some tokens only: what a graph calls where tokens are sampled.

Where no token is left out, each does what the model does by itself, whatever the length of the sequence.

A selection of tokens is ``[1, k]``, the same for all examples, or ``[examples, k]``, for each its own. A *part* is a
stretch of the axis of the tokens, as in ``channel_slices.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fx_approx.errors import WidthError
from fx_approx.ops.channel_slices import Part
from fx_approx.ops.gather import flat_indices, gather
from fx_approx.sampling.base import Selection


def token_positions(parts: Sequence[Part]) -> Selection | None:
    """The places of all tokens that are there along an axis, ``[1, n]`` or ``[examples, n]``; None if all are there."""
    given = [chosen.indices for chosen, _, _ in parts if chosen is not None]
    if not given:
        return None
    examples, device = given[0].shape[0], given[0].device
    places, offset = [], 0
    for chosen, count, block in parts:
        units = chosen.indices if chosen is not None else torch.arange(count, device=device).expand(examples, -1)
        if block > 1:
            units = (units.unsqueeze(2) * block + torch.arange(block, device=device)).flatten(1)
        places.append(units + offset)
        offset += count * block
    return Selection(torch.cat(places, dim=1), None)


def narrow_each(input: Tensor, dim: int, batch: int, rank: int, chosen: Selection | None) -> Tensor:
    """The chosen tokens of ``input``, of each example its own.

    Args:
        input: Any shape.
        dim: The axis of the tokens, counted from the end.
        batch: That of the examples, counted from the end. A value without it, or with one entry there, serves all
            examples, and becomes one with an entry for each; where an example has several entries in a row there, such
            as its heads, all take the same tokens.
        rank: How many axes the result has at least, so that it has that of the examples.
        chosen: ``[examples, k]``; None for all tokens.
    """
    if chosen is None:
        return input
    value, index = input[(None,) * (rank - input.dim())], chosen.indices
    entries = value.shape[batch]
    if entries == 1:
        sizes = list(value.shape)
        sizes[batch] = index.shape[0]
        value = value.expand(sizes)
    elif entries != index.shape[0]:
        index = index.repeat_interleave(entries // index.shape[0], dim=0)
    moved = value.movedim((batch, dim), (0, 1))
    rest = moved.shape[2:]
    part = gather(moved.reshape(*moved.shape[:2], math.prod(rest)), -2, index)
    return part.reshape(*index.shape, *rest).movedim((0, 1), (batch, dim))


def put_back(whole: Tensor, part: Tensor, dim: int, chosen: Selection | None, batch: int | None = None) -> Tensor:
    """``whole`` with ``part`` in the places of the chosen tokens; the others pass unchanged.

    Args:
        whole: Any shape; what a stretch of blocks read.
        part: The same with the chosen tokens only along ``dim``; what the stretch made of them.
        dim: The axis of the tokens.
        chosen: None if all were there, so that ``part`` is the result.
        batch: The axis of the examples, where each has tokens of its own.
    """
    if chosen is None:
        return part
    if batch is None:
        return whole.to(part.dtype).index_copy(dim, chosen.indices[0], part)
    moved, some = (value.movedim((batch, dim), (0, 1)) for value in (whole.to(part.dtype), part))
    examples, tokens = moved.shape[:2]
    rows, own = (value.reshape(value.shape[0] * value.shape[1], *value.shape[2:]) for value in (moved, some))
    rows = rows.index_copy(0, flat_indices(chosen.indices, tokens), own)
    return rows.reshape(examples, tokens, *moved.shape[2:]).movedim((0, 1), (batch, dim))


def sampled_count(value: Tensor, dim: int, others: int) -> int:
    """Tokens along ``dim`` of what a stretch reads, without ``others`` that are always kept."""
    return value.shape[dim] - others


def entries(parts: Sequence[Part]) -> int:
    """Entries of an axis where all tokens are there."""
    return sum(count * block for _, count, block in parts)


def _there(parts: Sequence[Part]) -> int:
    """Entries of an axis of which some tokens are there."""
    return sum((count if chosen is None else chosen.indices.shape[1]) * block for chosen, count, block in parts)


def told_size(size: Any, dim: int, tokens: int) -> Any:
    """The size of a value of which only some tokens are there, as if all ``tokens`` of them were."""
    return torch.Size([*size[:dim], tokens, *size[dim + 1 :]])


def fewer_tokens(shape: Any, axis: int, parts: Sequence[Part]) -> list[int]:
    """The arguments of a reshape for a value of which only some tokens are there.

    Args:
        shape: For all of them; -1 anywhere stays -1.
        axis: Which entry counts the tokens, or examples and tokens together.
        parts: What stands along that axis of the result, for one example.
    """
    sizes = [shape] if isinstance(shape, int) else list(shape)
    if sizes[axis] != -1 and _is_less(parts):
        sizes[axis] = sizes[axis] * _there(parts) // entries(parts)
    return sizes


def take_tokens(
    input: Tensor, dim: int, before: Sequence[Part], taken: Sequence[Part], places: tuple[Any, ...], at: int
) -> Tensor:
    """``input[places]``, a stretch of the tokens, as far as they are there.

    Args:
        input: Any shape.
        dim: The axis of the tokens.
        before: What stands there before the stretch.
        taken: The stretch.
        places: The index for all tokens.
        at: Which of ``places`` is that of the axis.
    """
    if not _is_less((*before, *taken)):
        return input[places]
    part = input.narrow(dim, _there(before), _there(taken))
    return part[(*places[:at], slice(None), *places[at + 1 :])]


def split_tokens(
    input: Tensor,
    sections: Sequence[Sequence[Part]],
    dim: int,
    tokens: int,
    method: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[Tensor, ...]:
    """``input.split(...)`` or alike, along tokens of which only some are there.

    Args:
        input: Any shape.
        sections: What each part consists of.
        dim: The axis of the tokens.
        tokens: How many the sections are made for.
        method: Of the tensor, where all tokens are there.
        args: Its arguments then.
        kwargs: The same, by name.

    Raises:
        WidthError: There are more or fewer tokens, so that the sections would be others.
    """
    parts = [part for section in sections for part in section]
    if not _is_less(parts):
        whole: tuple[Tensor, ...] = getattr(input, method)(*args, **kwargs)
        return whole
    if entries(parts) != tokens:
        raise WidthError(f"expected {tokens} tokens along axis {dim}, got {entries(parts)}")
    return torch.split(input, [_there(section) for section in sections], dim)


def _is_less(parts: Sequence[Part]) -> bool:
    return any(chosen is not None for chosen, _, _ in parts)
