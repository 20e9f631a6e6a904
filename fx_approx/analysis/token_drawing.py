"""Pictures of stacks of blocks: a row of cells for each block, a cell for each token that it computes."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Sequence
from typing import Any

from fx_approx.utils.optional_imports import load_matplotlib

_CELLS = 24
"""Most cells in a row; where there are more tokens, a cell stands for several."""

_COLUMNS = 2
"""Most panels side by side."""

_KEPT, _COMPUTED, _PASSED = "#f59e0b", "#2563eb", "#cbd5e1"


@dataclasses.dataclass(frozen=True)
class BlockRow:
    """A block as it is drawn.

    Attributes:
        name: Of the block.
        kept: Tokens that are always kept.
        computed: Tokens that it computes.
        tokens: All there are.
        stretch: Number of the stretch that chooses for it; -1 for none.
        mode: ``drop`` or ``skip``; empty for a block that computes all.
        mixes: Something in it beside attention mixes tokens.
    """

    name: str
    kept: int
    computed: int
    tokens: int
    stretch: int = -1
    mode: str = ""
    mixes: bool = False


def draw_stacks(
    panels: Sequence[tuple[str, Sequence[BlockRow]]], what: str, path: str | os.PathLike[str] | None = None
) -> Any:
    """Draws stacks of blocks beside each other, each with its title, the first block above.

    Args:
        panels: Title and blocks of each.
        what: Who draws, for the error without matplotlib.
        path: A file whose suffix says the format; None writes none.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        ImportError: Without matplotlib.
    """
    figures, patches = (load_matplotlib(module, what) for module in ("figure", "patches"))
    columns = min(len(panels), _COLUMNS)
    lines = -(-len(panels) // columns)
    size = (3.7 * columns, lines * (0.36 * max(len(rows) for _, rows in panels) + 0.4) + 0.4)
    figure = figures.Figure(figsize=size, layout="constrained")
    for number, (title, rows) in enumerate(panels, start=1):
        axes = figure.add_subplot(lines, columns, number)
        _draw(axes, patches, rows)
        axes.set_title(title, fontsize=8, loc="left")
    kinds = ((_KEPT, "always kept"), (_COMPUTED, "computed"), (_PASSED, "passes by unchanged"))
    handles = [patches.Patch(color=colour, label=label) for colour, label in kinds]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _draw(axes: Any, patches: Any, rows: Sequence[BlockRow]) -> None:
    left = 0.0
    for place, row in enumerate(rows):
        cells, kept, chosen = _cells(row)
        left = max(left, float(cells))
        for cell in range(cells):
            there = cell < kept or cell in chosen
            if there:
                colour = _KEPT if cell < kept else _COMPUTED
                axes.add_patch(patches.Rectangle((cell + 0.1, place - 0.35), 0.8, 0.7, color=colour, linewidth=0))
            elif row.mode == "skip":
                axes.plot([cell + 0.5, cell + 0.5], [place - 0.5, place + 0.5], color=_PASSED, linewidth=2)
        axes.add_patch(
            patches.Rectangle((-0.15, place - 0.45), cells + 0.3, 0.9, fill=False, edgecolor="0.6", linewidth=0.6)
        )
        said = f"{row.name}\n{row.computed} of {row.tokens}{', mixes beside attention' if row.mixes else ''}"
        axes.text(-0.5, place, said, ha="right", va="center", fontsize=6.5)
    axes.set(xlim=(-0.5, left + 0.3), ylim=(len(rows) - 0.4, -0.6))
    axes.set_axis_off()


def _cells(row: BlockRow) -> tuple[int, int, set[int]]:
    """Cells of a row, those always kept, and the others that are computed: by lot, the same in all of a stretch."""
    each = -(-row.tokens // _CELLS)
    cells, kept = -(-row.tokens // each), -(-row.kept // each)
    some = round((row.computed - row.kept) / max(row.tokens - row.kept, 1) * (cells - kept))
    return cells, kept, set(random.Random(row.stretch).sample(range(kept, cells), some))
