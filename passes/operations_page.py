"""The page of docs on what each operation does to channels, made from the registry.

``python -m fx_approx.passes.operations_page`` prints it; ``docs/operations.md`` is what it prints.
"""

from __future__ import annotations

from collections.abc import Iterator

from fx_approx.passes.operations import RULES, labels

_HEAD = """\
# Operations and demand

Where a layer reads some channels of its input only, the operations before it need not compute the others
(docs/how-it-works.md). Each operation does one of three things to such a demand:

- it **passes**: what is demanded of its result is demanded of its operands;
- demand **begins** at it, seen from the input: it computes the demanded outputs and reads what it likes;
- it **stops** demand: it needs all channels of its operands. Stopping is always safe, and what is not in this table
  stops.

Layers are met as modules and as functions on the parameters of the model, in a traced graph and in that of Dynamo. A
module with hooks or parametrisations stops; so does an operation in place on memory that others read. The size of a
value is that of the whole wherever it is asked for. Every row is tried between two layers against a model whose unread
weight columns are zero: `tests/passes/test_sandwich.py`.

This page is the output of `python -m fx_approx.passes.operations_page`, made from the registry in
`passes/operations.py`.

| operation | passes | begins | stops |
|---|---|---|---|
"""

_NAMES = """\
## The names of each

Functions count wherever torch has them (`torch`, `torch.nn.functional`, `torch.special`, `torch.linalg`, as methods and
in place).
"""


def page() -> str:
    """The page as Markdown."""
    lines = [f"| {rule.name} | {_cell(rule.passes)} | {_cell(rule.begins)} | {_cell(rule.stops)} |" for rule in RULES]
    return "\n".join([_HEAD + "\n".join(lines), "", _NAMES, *_names(), ""])


def _cell(words: str) -> str:
    return words.replace("|", "\\|") or "–"


def _names() -> Iterator[str]:
    """One list item for each rule."""
    for rule in RULES:
        names = ", ".join(f"`{label}`" for label in labels(rule))
        yield f"- **{rule.name}**: {names}"


if __name__ == "__main__":
    print(page(), end="")
