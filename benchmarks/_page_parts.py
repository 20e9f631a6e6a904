"""What the pages of results are put together from: sections, each with its records, command, machine and table."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "docs" / "results"
ONE = "one seed"
"""What stands in the place of a spread where there is none."""

Content = Any
"""What a file of records holds: of JSON the value, of JSON lines a list of values."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A measurement on a page.

    Attributes:
        title: Its heading.
        records: Files in docs/results; the first one's ``environment`` is the section's, unless ``machine`` has it.
        command: What makes the records, a line for each command.
        how: How many runs, what the spread is, what the columns say.
        body: Makes the tables from the contents of the records.
        machine: Hardware, versions and date, where the records do not hold them in the usual place.
        notes: The heading in notes.md that has remarks, if there are any.
        picture: A figure, relative to docs/results.
        brief: What the list of all measurements says of it, instead of ``how``.
    """

    title: str
    records: Sequence[str]
    command: str | Callable[..., str]
    how: str
    body: Callable[..., str]
    machine: Callable[..., str] | None = None
    notes: str = ""
    picture: str = ""
    brief: str = ""

    def text(self) -> str:
        """The section in markdown."""
        contents = [load(name) for name in self.records]
        where = machine(contents[0]["environment"]) if self.machine is None else self.machine(*contents)
        command = self.command if isinstance(self.command, str) else self.command(*contents)
        named = f" Records: {linked(self.records)}." if self.records else ""
        parts = [f"## {self.title}", f"```\n{command}\n```", self.how, f"{where}{named}"]
        parts.append(self.body(*contents))
        if self.picture:
            parts.append(f"![{self.title}]({self.picture})")
        if self.notes:
            parts.append(f"Remarks: [{self.notes}](notes.md#{anchor(self.notes)}).")
        return "\n\n".join(parts)


@dataclasses.dataclass(frozen=True)
class Page:
    """A page of sections: its file in docs/results, its title, what stands first."""

    file: str
    title: str
    lead: str
    sections: Sequence[Section]

    def text(self, command: str) -> str:
        """The page in markdown."""
        parts = [f"# {self.title}", f"Made by `{command}` from the records that each table names. {self.lead}"]
        return "\n\n".join([*parts, *(one.text() for one in self.sections)]) + "\n"


def load(name: str) -> Content:
    """A file of records in docs/results."""
    text = (RESULTS / name).read_text(encoding="utf-8")
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in text.splitlines() if line]
    return json.loads(text)


def linked(names: Sequence[str]) -> str:
    """Files in docs/results as links from there."""
    return ", ".join(f"[{name}]({name})" for name in names)


def from_docs(text: str) -> str:
    """``text`` of a page in docs/results with its links as from docs."""
    return re.sub(r"\]\((?=[\w#])", "](results/", text).replace("](../", "](")


def anchor(title: str) -> str:
    """The name of a heading in an address."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def machine(environment: Mapping[str, Any]) -> str:
    """Hardware, versions and date, as recorded."""
    own = dict(environment)
    where = f"{own['processor']}, {own['cores']} cores, threads: {own['threads']}"
    where = f"{own['accelerator']}; {where}" if own["accelerator"] else where
    known = ("date", "processor", "cores", "threads", "load", "accelerator", "system", "python", "torch", "fx_approx")
    versions = [f"Python {own['python']}", f"torch {own['torch']}", f"fx_approx {own['fx_approx']}"]
    versions += [f"{name} {value}" for name, value in own.items() if name not in known]
    return f"{where}; {own['system']}; {', '.join(versions)}; {own['date']}, load {own['load']}."


def rows_to_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in markdown, narrow."""
    plain = tabulate(rows, heads, tablefmt="github", disable_numparse=True)
    lines = [re.sub(r"-{3,}", "---", re.sub(r" {2,}", " ", line)) for line in plain.splitlines()]
    return "\n".join(lines)


def quartiles(own: Sequence[float] | None) -> str:
    """The median, and the outer quartiles in brackets; empty if not measured."""
    return "" if own is None else "{1:.2f} [{0:.2f}, {2:.2f}]".format(*own)


def signed(value: float, digits: int = 2) -> str:
    """With its sign, and a minus of its width."""
    return f"{value:+.{digits}f}".replace("-", "−")
