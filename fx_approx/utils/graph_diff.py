"""A model's graph after each pass, in words and as code, with what each pass changed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from torch import fx

_FREED = re.compile(r";  .*")
_OURS = (
    "slice_weights|positions|narrow|tapped_relu|tapped|remaining|resize|split_parts|spread|sliced|take_parts|pad_parts|"
    "whole_size"
)
_PREFIX = re.compile(rf"fx_approx_ops_\w+?_(?=(?:{_OURS}))")


def code_of(graph: fx.Graph) -> list[str]:
    """The graph as lines of Python, without what frees values."""
    lines = graph.python_code("self").src.splitlines()
    body = [_PREFIX.sub("", _FREED.sub("", line)).rstrip() for line in lines if line.strip()]
    return [line for line in body if " = None" not in line or "=" in line.split(" = None")[0]]


def passes_text(stages: list[tuple[str, fx.Graph]], whole: bool = False) -> str:
    """Each stage's graph: the first in full, the others as what was taken out (-) and put in (+).

    Args:
        stages: Name and graph of each, as :attr:`fx_approx.runtime.graph_program.GraphProgram.stages`.
        whole: Show the lines that stay, too.
    """
    parts = []
    before: list[str] | None = None
    for name, graph in stages:
        lines = code_of(graph)
        count = f"{len(list(graph.nodes))} nodes"
        if before is None:
            parts += [f"== {name} ({count})", *lines]
        else:
            gone, new = 0, 0
            shown = []
            for line in _changes(before, lines, whole):
                gone, new = gone + line.startswith("-"), new + line.startswith("+")
                shown.append(line)
            parts += [f"== {name} ({count}; {gone} lines out, {new} in)", *shown]
        parts.append("")
        before = lines
    return "\n".join(parts)


def _changes(before: list[str], after: list[str], whole: bool) -> Iterator[str]:
    for line in difflib.ndiff(before, after):
        if line[0] in "+-" or (whole and line[0] == " "):
            yield line
