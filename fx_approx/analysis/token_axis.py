"""The token axis of a model, as text and picture: where it lies, where tokens mix, which blocks may do with some."""

from __future__ import annotations

import dataclasses
import os
import textwrap
from collections.abc import Iterator
from typing import Any

from tabulate import tabulate
from torch import nn

from fx_approx.analysis.token_drawing import BlockRow, draw_stacks
from fx_approx.compiler.compilation import Compilation
from fx_approx.compiler.transform import analysed, analysed_again
from fx_approx.core.plan import Plan
from fx_approx.core.token_axis import TokenBlock, TokenStack, short_names
from fx_approx.runtime.approx_module import ApproxModule
from fx_approx.runtime.handle import GraphHandle

_WIDTH = 100


@dataclasses.dataclass(frozen=True)
class TokenAnalysis:
    """What :func:`token_axis` found; ``str()`` is a table.

    Attributes:
        model: Class name of the model.
        stacks: The stacks of blocks whose tokens can be followed, in the order in which the model runs.
        notes: Why there are no more.
        shares: Of each stretch of blocks that samples tokens now, how many of which; see ``stretch`` of the blocks.
        mode: How the model's policy leaves tokens out: ``drop`` or ``skip`` by stretch; empty where it samples none.
    """

    model: str
    stacks: tuple[TokenStack, ...]
    notes: tuple[str, ...] = ()
    shares: tuple[tuple[int, int], ...] = ()
    modes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The text for a terminal."""
        return self.to_text()

    def to_text(self, width: int = _WIDTH) -> str:
        """The text for a terminal: each stack block by block, in the words of modules, and why there is no more.

        Args:
            width: Of a line, as far as names allow.
        """
        parts = [self._stack_text(number, stack, width) for number, stack in enumerate(self.stacks, start=1)]
        head = f"Tokens of {self.model}"
        if not self.stacks:
            parts = [f"{head}: no blocks whose tokens could be sampled."]
        else:
            parts[0] = f"{head}\n\n{parts[0]}"
        notes = [_filled(f"Not followed: {note}", width) for note in self.notes]
        return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "model": self.model,
            "stacks": [stack.to_dict() for stack in self.stacks],
            "notes": list(self.notes),
            "shares": [list(share) for share in self.shares],
            "modes": list(self.modes),
        }

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draws each stack from the first block above to the last below: which tokens each block computes.

        Which ones are left out is drawn by lot in the picture, as in a step; where there are many tokens, a cell
        stands for several.

        Args:
            path: A file whose suffix says the format (``.png``, ``.svg``, ``.pdf``); None draws and writes nothing.

        Returns:
            The ``matplotlib.figure.Figure``.

        Raises:
            ValueError: There is nothing to draw.
            ImportError: matplotlib is not installed; says how to get it.
        """
        if not self.stacks:
            raise ValueError(f"no block of {self.model} has tokens that could be drawn; str() says why")
        panels = [(f"{self.model}: {stack.begins}", self.rows(stack)) for stack in self.stacks]
        return draw_stacks(panels, "TokenAnalysis.plot", path)

    def rows(self, stack: TokenStack) -> list[BlockRow]:
        """The blocks of a stack as they are drawn."""
        _, names = short_names([block.name for block in stack.blocks])
        return [
            BlockRow(name, stack.kept, *self._computed(block), block.stretch, self._mode(block), bool(block.stops))
            for name, block in zip(names, stack.blocks, strict=True)
        ]

    def _mode(self, block: TokenBlock) -> str:
        return "" if block.stretch < 0 else self.modes[block.stretch]

    def _computed(self, block: TokenBlock) -> tuple[int, int]:
        return (block.tokens, block.tokens) if block.stretch < 0 else self.shares[block.stretch]

    def _stack_text(self, number: int, stack: TokenStack, width: int) -> str:
        planned = any(block.reason for block in stack.blocks)
        shared, names = short_names([block.name for block in stack.blocks])
        lines = [f"stack {number}: {stack.tokens} tokens, which begin along axis {stack.dim} of {stack.begins}"]
        lines += [f"blocks of {shared}"] if shared else []
        if stack.kept:
            lines.append(f"{stack.kept} of them {'is' if stack.kept == 1 else 'are'} always kept")
        headers = ["block", "tokens mix in", "and in", "may", *(["computes", "why"] if planned else [])]
        rows = []
        for place, (name, block) in enumerate(zip(names, stack.blocks, strict=True)):
            row = [name, ", ".join(block.inner_names[0]) or name, "; ".join(block.stops) or "nothing else"]
            row.append(self._ways(stack, place, block))
            if planned:
                some, of = self._computed(block)
                row += [f"{some} of {of}", block.reason]
            rows.append(row)
        most = [24, 16, 20, 10, 10, 20] if planned else [26, 24, 30, 10]
        table = tabulate(rows, headers, disable_numparse=True, maxcolwidths=most)
        lines = [_filled(line, width) for line in lines]
        return "\n".join([*lines, table, *(_filled(line, width) for line in self._below(stack, names))])

    def _ways(self, stack: TokenStack, place: int, block: TokenBlock) -> str:
        """By which modes a block may compute some tokens."""
        dropping = stack.drop is not None and place >= stack.drop
        ways = [name for name, able in (("drop", dropping), ("skip", not block.skip)) if able]
        return ", ".join(ways) or "none"

    def _below(self, stack: TokenStack, names: list[str]) -> Iterator[str]:
        """What stands below the table of the blocks."""
        alike: dict[tuple[str, ...], list[str]] = {}
        for name, block in zip(names, stack.blocks, strict=True):
            alike.setdefault(block.inner_names[1], []).append(name)
        for layers, of in alike.items():
            where = of[0] if len(of) == 1 else f"{of[0]} and {len(of) - 1} more"
            yield f"row by row in {where}: {', '.join(layers) or 'no layer'}"
        if stack.behind:
            yield f"row by row behind the blocks: {', '.join(stack.behind)}"
        if stack.drop is None:
            yield f"drop: no, since {stack.whole}"
        else:
            yield f"drop: from {names[stack.drop]} on; nothing behind the blocks needs all positions"
        for name, block in zip(names, stack.blocks, strict=True):
            if block.skip and not block.stops:
                yield f"skip: not of {name}, since {block.skip}"


def token_axis(model: nn.Module | GraphHandle, example_inputs: Any = None) -> TokenAnalysis:
    """Where the tokens of a model lie, where they mix, and which of its blocks may compute some of them only.

    It begins at the first value from which queries, keys and values of an attention come, and follows that axis through
    the graph (docs/tokens.md). The model is not changed and does not run.

    Args:
        model: Any module; a transformed one, of which the result says what it computes now; or a backend after the
            first step.
        example_inputs: One training batch, as :func:`fx_approx.transform` takes it; not for what is transformed.

    Raises:
        TypeError: ``model`` is none of these.
        ValueError: ``example_inputs`` are missing, do not fit or are given for a transformed model; or the model was
            transformed without them and has not run since; or nothing was compiled yet.
    """
    pieces: tuple[ApproxModule, ...] = ()
    if isinstance(model, GraphHandle):
        pieces = model.pieces
        if not pieces:
            raise ValueError("model: nothing was compiled in training mode yet: run a training step first")
    elif isinstance(model, nn.Module):
        pieces = tuple(one for one in model.modules() if isinstance(one, ApproxModule) and "_fx_approx" in vars(one))
    if pieces and example_inputs is not None:
        raise ValueError("example_inputs: expected none for a transformed model or a backend, which has its own")
    if not pieces:
        made = analysed(model, example_inputs)  # type: ignore[arg-type]
        if made.called is None:
            raise ValueError(
                "example_inputs: expected one training batch, since shapes tell where tokens lie, got None"
            )
        return _found(type(model).__name__, made, Plan((), {}))
    parts = [_of_transformed(approx) for approx in pieces]
    return parts[0] if len(parts) == 1 else _joined(parts)


def _of_transformed(approx: ApproxModule) -> TokenAnalysis:
    runtime = approx._fx_approx
    if runtime.record.called is None:
        raise ValueError("model: expected one that was transformed with example_inputs, or has run a forward since")
    ratios = [one.ratio if one.enabled and one.owner[0].training else 1.0 for one in runtime.tokens]
    name = approx.exact_class.__name__
    return _found(name, analysed_again(approx), runtime.record.plan, ratios)


def _found(name: str, made: Compilation, plan: Plan, ratios: list[float] | None = None) -> TokenAnalysis:
    _, notes = made.token_streams(0 if plan.tokens is None else plan.tokens.keep)
    stretches, _ = made.token_stretches(plan.tokens)
    shares: list[tuple[int, int]] = []
    if plan.tokens is not None and ratios is not None:
        found = (stretch.share(plan.tokens) for stretch in stretches)
        shares = [share.kept(ratio) for share, ratio in zip(found, ratios, strict=True)]
    modes = tuple("drop" if stretch.end is None else "skip" for stretch in stretches)
    return TokenAnalysis(name, made.token_stacks(plan), notes, tuple(shares), modes)


def _joined(parts: list[TokenAnalysis]) -> TokenAnalysis:
    """One result of several graphs; the stretches are counted through."""
    stacks, before = [], 0
    for part in parts:
        for stack in part.stacks:
            blocks = (
                dataclasses.replace(block, stretch=block.stretch + before if block.stretch >= 0 else -1)
                for block in stack.blocks
            )
            stacks.append(dataclasses.replace(stack, blocks=tuple(blocks)))
        before += len(part.shares)
    return TokenAnalysis(
        " + ".join(dict.fromkeys(part.model for part in parts)),
        tuple(stacks),
        tuple(dict.fromkeys(note for part in parts for note in part.notes)),
        tuple(share for part in parts for share in part.shares),
        tuple(mode for part in parts for mode in part.modes),
    )


def _filled(text: str, width: int) -> str:
    return textwrap.fill(text, max(width, 40), subsequent_indent="  ", break_long_words=False)
