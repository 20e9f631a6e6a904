"""How a report is laid out: columns, tables that fit a width, alike rows as one, numbers for people."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

from tabulate import MIN_PADDING, tabulate

WIDTH = 100
"""Characters of a line, unless another width is asked for."""

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "layer": ("layer",),
    "op": ("op",),
    "shape": ("batch x groups x (m, n, k)",),
    "sampler": ("sampler",),
    "ratio": ("ratio",),
    "k": ("k of K",),
    "flops": ("FLOPs",),
    "exact": ("out", "dX", "dW"),
    "executed": ("→ out", "dX", "dW"),
    "saved": ("saved %",),
    "demanded": ("not done",),
    "demand": ("outputs read by",),
    "selection": ("select",),
    "kept": ("bytes kept",),
    "why": ("why",),
}
"""Columns of a report by name, with their headers."""

FEW = ("layer", "op", "k", "saved", "why")
"""Columns that are shown where none are asked for."""

NARROWEST = 60
"""Least characters of a line."""

_LEAST = 12
_NUMBER = re.compile(r"\d+")
_MARK = "\0"

Cells = Mapping[str, Sequence[str]]
"""The cells of a row by column, as many as the column has headers."""


def few(width: int) -> Sequence[str]:
    """Columns that are shown where none are asked for, in lines of ``width`` characters."""
    return FEW if width >= 80 else [name for name in FEW if name != "op"]


def checked(columns: Sequence[str] | None, default: Sequence[str] = FEW) -> list[str]:
    """Column names, or ``default`` for None; ValueError for unknown ones."""
    if columns is None:
        return list(default)
    unknown = [name for name in columns if name not in COLUMNS]
    if unknown or not columns or isinstance(columns, str):
        raise ValueError(f"columns: expected a list of names from {', '.join(COLUMNS)}, got {columns!r}")
    return list(columns)


def table(rows: Sequence[Cells], columns: Sequence[str], form: str, width: int | None = None) -> str:
    """The cells of ``columns`` as a table in one of tabulate's forms.

    Args:
        rows: In order.
        columns: Names from :data:`COLUMNS`.
        form: Such as ``"simple"`` or ``"github"``.
        width: Wrap the layers and the last column, so that no line is longer, as far as the other columns allow; None
            for one line for each row.
    """
    headers = [header for name in columns for header in COLUMNS[name]]
    cells = [[cell for name in columns for cell in row[name]] for row in rows]
    if width is not None:
        _wrap(cells, headers, columns, width)
    return tabulate(cells, headers=headers, tablefmt=form, disable_numparse=True)


def _wrap(cells: list[list[str]], headers: Sequence[str], columns: Sequence[str], width: int) -> None:
    """Wraps the first column where it names layers, and the last, to what the others leave."""
    widths = [
        max([len(header) + MIN_PADDING, *map(len, column)]) for header, *column in zip(headers, *cells, strict=True)
    ]
    first, last = (0 if columns[0] == "layer" else -1), len(widths) - 1
    spare = width - 2 * last - sum(size for place, size in enumerate(widths) if place not in (first, last))
    if first in (-1, last):
        sizes = {last: spare}
    elif widths[first] + widths[last] <= spare:
        return
    else:
        layers, reasons = ([row[place] for row in cells] for place in (first, last))
        splits = [spare - widths[last], widths[first], *range(_LEAST, spare - _LEAST, 3)]
        possible = [split for split in splits if _LEAST <= split <= spare - _LEAST] or [max(_LEAST, spare // 2)]
        best = min(possible, key=lambda split: _height(layers, reasons, split, spare - split))
        sizes = {first: best, last: spare - best}
    for row in cells:
        for place, size in sizes.items():
            row[place] = wrapped(row[place], max(size, _LEAST))


def _height(layers: Sequence[str], reasons: Sequence[str], left: int, right: int) -> int:
    """Lines of two columns of these widths."""
    pairs = zip(layers, reasons, strict=True)
    return sum(max(wrapped(a, left).count("\n"), wrapped(b, right).count("\n")) for a, b in pairs)


def wrapped(text: str, width: int, indent: str = "  ") -> str:
    """``text`` in lines of at most ``width`` characters: broken at spaces, in paths behind dots, else anywhere."""
    if len(text) <= width:
        return text
    lines, line = [], ""
    for piece in _pieces(text, width - len(indent)):
        if line.strip() and len(line) + len(piece.rstrip()) > width:
            lines.append(line.rstrip())
            line = indent
        line += piece
    return "\n".join([*lines, line.rstrip()])


def _pieces(text: str, width: int) -> Iterator[str]:
    """Words with the spaces behind them; of words that are too long, parts."""
    parts = re.findall(r"\S+\s*|\s+", text)
    for marks in (".,/", ".,/_"):
        parts = [
            piece
            for part in parts
            for piece in (
                [part] if len(part.rstrip()) <= width else re.findall(rf"[^{marks}]+[{marks}]*|[{marks}]+", part)
            )
        ]
    for part in parts:
        yield from (part[start : start + width] for start in range(0, len(part), width))


@dataclasses.dataclass(frozen=True)
class Fold:
    """Rows that say the same of layers whose names differ in one number.

    Attributes:
        cells: Of all of them together.
        rows: Their numbers.
    """

    cells: Cells
    rows: tuple[int, ...]


_GONE = Fold({}, ())


def folded(rows: Sequence[Cells], columns: Sequence[str]) -> list[Fold]:
    """Alike rows as one, named like ``layer3.1-4.conv1``, where the first of them stands.

    Args:
        rows: In order, each with its ``layer``.
        columns: Those that must say the same, in which a row's own name counts as alike, too.
    """
    alike: dict[tuple[str, ...], dict[int, re.Match[str]]] = {}
    for place, row in enumerate(rows):
        for match in _NUMBER.finditer(row["layer"][0]):
            alike.setdefault(_key(row, match, columns), {})[place] = match
    folds = {place: Fold(row, (place,)) for place, row in enumerate(rows)}
    for members in sorted(alike.values(), key=lambda one: (-len(one), min(one), one[min(one)].start())):
        free = {place: match for place, match in members.items() if folds.get(place, _GONE).rows == (place,)}
        if len(free) < 2:
            continue
        first = min(free)
        said = _ranges([int(match[0]) for match in free.values()])
        marked = {name: _marked(rows[first], free[first], name) for name in rows[first]}
        cells = {name: [text.replace(_MARK, said) for text in texts] for name, texts in marked.items()}
        for place in free:
            folds.pop(place)
        folds[first] = Fold(cells, tuple(free))
    return [folds[place] for place in sorted(folds)]


def _key(row: Cells, match: re.Match[str], columns: Sequence[str]) -> tuple[str, ...]:
    return tuple(text for name in dict.fromkeys(("layer", *columns)) for text in _marked(row, match, name))


def _marked(row: Cells, match: re.Match[str], column: str) -> list[str]:
    """The cells of a column with a mark for the number of the layer, wherever its name up to that number stands."""
    if column == "layer":
        return [f"{match.string[: match.start()]}{_MARK}{match.string[match.end() :]}"]
    own = re.compile(rf"(?<![\w.]){re.escape(match.string[: match.end()])}(?!\d)")
    before = match.string[: match.start()]
    return [own.sub(lambda _: f"{before}{_MARK}", text) if before else text for text in row[column]]


def _ranges(numbers: Sequence[int]) -> str:
    """Such as ``0-3,5``."""
    runs = itertools.groupby(enumerate(sorted(set(numbers))), lambda pair: pair[1] - pair[0])
    spans = [[number for _, number in run] for _, run in runs]
    return ",".join(f"{span[0]}" if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans)


def human(value: int | None) -> str:
    """Three digits and a unit; ``?`` for None."""
    if value is None:
        return "?"
    number = float(value)
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 1000 or unit == "T":
            break
        number /= 1000
    return f"{number:.3g}{unit}" if unit else f"{int(number)}"


def change(before: int | None, now: int | None) -> str:
    """``before → now``, or ``?`` if it is not known."""
    return "?" if now is None else f"{human(before)} → {human(now)}"
