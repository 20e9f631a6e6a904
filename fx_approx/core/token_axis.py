"""The token axis of a model in the words of its modules: stacks of blocks, as plain data that holds no graph."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class TokenBlock:
    """An attention with what follows it, up to the next one.

    Attributes:
        name: The module that it is.
        tokens: How many it computes where none is left out.
        attention: Modules in which tokens mix; a sample of them serves there.
        row_wise: Layers that work on each token by itself.
        stops: What else mixes tokens or needs all of them, and why, so that the block computes all.
        skip: Why tokens cannot pass it by; empty if they can.
        stretch: Number of the stretch of blocks, under the plan, of which it computes some tokens; -1 for all tokens.
        reason: Why it computes as many as it does under the plan; empty without a plan for tokens.
    """

    name: str
    tokens: int
    attention: tuple[str, ...]
    row_wise: tuple[str, ...]
    stops: tuple[str, ...] = ()
    skip: str = ""
    stretch: int = -1
    reason: str = ""

    @property
    def inner_names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """``attention`` and ``row_wise`` as the block calls them."""
        start = f"{self.name}."
        attention, row_wise = (
            tuple(dict.fromkeys(name.removeprefix(start) for name in names if name != self.name))
            for names in (self.attention, self.row_wise)
        )
        return attention, row_wise


@dataclasses.dataclass(frozen=True)
class TokenStack:
    """Blocks with the same tokens, such as an encoder's.

    Attributes:
        begins: The layer, or what else, whose value is the first that holds the tokens that mix in the blocks.
        dim: The axis of that value along which they lie.
        tokens: How many the first block reads, those that are joined to them before it included.
        kept: Of these, tokens that are always kept: a class token, and what is read by its number.
        blocks: In order.
        behind: Layers behind the last block that work on each token by itself.
        drop: The first block from which tokens may be dropped, by its number; None if they may not.
        whole: Why they may not; empty if they may.
    """

    begins: str
    dim: int
    tokens: int
    kept: int
    blocks: tuple[TokenBlock, ...]
    behind: tuple[str, ...] = ()
    drop: int | None = None
    whole: str = ""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def short_names(names: list[str]) -> tuple[str, list[str]]:
    """What all of ``names`` begin with, up to a dot, and the rest of each, which is no mere number."""
    parts = [name.split(".") for name in names]
    shared = 0
    while all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    if shared and any(part[shared].isdigit() for part in parts):
        shared -= 1
    return ".".join(parts[0][:shared]) if parts else "", [".".join(part[shared:]) for part in parts]
