"""Working on some tokens only: what a graph calls where tokens are sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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


def told_size(size: Any, dim: int, tokens: int) -> Any:
    """The size of a value of which only some tokens are there, as if all ``tokens`` of them were."""
    return torch.Size([*size[:dim], tokens, *size[dim + 1 :]])


def fewer_tokens(shape: Any, axis: int, parts: Sequence[Part], times: int = 1) -> list[int]:
    """The arguments of a reshape for a value of which only some tokens are there.

    Args:
        shape: For all of them; -1 anywhere stays -1.
        axis: Which entry counts the tokens, or examples and tokens together.
        parts: What stands along that axis of the result.
        times: Examples that are counted with them.
    """
    sizes = [shape] if isinstance(shape, int) else list(shape)
    if sizes[axis] != -1 and any(chosen is not None for chosen, _, _ in parts):
        sizes[axis] = width(parts) * times
    return sizes
