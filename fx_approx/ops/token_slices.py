"""Working on some tokens only: what a graph calls where tokens are sampled.

Where no token is left out, each does what the model does by itself, whatever the length of the sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fx_approx.errors import WidthError
from fx_approx.ops.channel_slices import Part, width
from fx_approx.sampling.base import Selection


def put_back(whole: Tensor, part: Tensor, dim: int, chosen: Selection | None) -> Tensor:
    """``whole`` with ``part`` in the places of the chosen tokens; the others pass unchanged.

    Args:
        whole: Any shape; what a stretch of blocks read.
        part: The same with the chosen tokens only along ``dim``; what the stretch made of them.
        dim: The axis of the tokens.
        chosen: ``[1, k]``; None if all were there, so that ``part`` is the result.
    """
    if chosen is None:
        return part
    return whole.to(part.dtype).index_copy(dim, chosen.indices[0], part)


def sampled_count(value: Tensor, dim: int, others: int) -> int:
    """Tokens along ``dim`` of what a stretch reads, without ``others`` that are always kept."""
    return value.shape[dim] - others


def entries(parts: Sequence[Part]) -> int:
    """Entries of an axis where all tokens are there."""
    return sum(count * block for _, count, block in parts)


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
        sizes[axis] = sizes[axis] * width(parts) // entries(parts)
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
    part = input.narrow(dim, width(before), width(taken))
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
    return torch.split(input, [width(section) for section in sections], dim)


def _is_less(parts: Sequence[Part]) -> bool:
    return any(chosen is not None for chosen, _, _ in parts)
