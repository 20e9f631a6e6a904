"""The page of troubleshooting has each warning that the package raises, word by word, and each class of its errors."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fx_approx import errors

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "guides" / "troubleshooting.md").read_text(encoding="utf-8")
CLASSES = sorted(name for name, value in vars(errors).items() if isinstance(value, type))
SHORTEST = 12
"""Characters of a part of a message that tells it from others."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def warned(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of each warning that a module raises; where a text is put together, its longest constant part.

    A message may be written where it is warned of, in a variable of the function, or where a function is called that
    warns of what it is given.
    """
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    functions = [node for node in ast.walk(tree) if isinstance(node, Function)]
    for function in functions:
        for call in ast.walk(function):
            if not isinstance(call, ast.Call) or ast.unparse(call.func) != "warnings.warn":
                continue
            given = call.args[0]
            if not isinstance(given, ast.Name):
                yield call.lineno, told(given)
                continue
            names = [one.arg for one in function.args.args if one.arg != "self"]
            if given.id in names:
                place = names.index(given.id)
                handed = [one for one in calls if _name(one.func) == function.name and len(one.args) > place]
                yield from ((one.lineno, told(one.args[place])) for one in handed)
            else:
                yield from ((line, text) for line, text in _assigned(function, given.id) if line < call.lineno)


def _assigned(function: Function, name: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and any(isinstance(one, ast.Name) and one.id == name for one in node.targets):
            yield node.lineno, told(node.value)


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else ast.unparse(function)


def told(message: ast.expr) -> str:
    """The longest part of a message that is the same each time."""
    parts: list[str] = []
    for node in ast.walk(message):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts += re.split(r"[{}]", node.value)
    return max((" ".join(one.split()).strip(" :;,.()") for one in parts), key=len, default="")


def all_warnings() -> list[tuple[str, int, str]]:
    found = []
    for folder in ("fx_approx", "passes", "policies"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found += [(path.relative_to(REPOSITORY).as_posix(), line, text) for line, text in sorted(set(warned(tree)))]
    return found


def entries() -> dict[str, str]:
    """Each part of the page under a heading, by the heading."""
    parts = re.split(r"^#{2,3} (.+)$", PAGE, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize(("path", "line", "text"), all_warnings())
def test_every_warning_has_its_entry(path: str, line: int, text: str) -> None:
    assert len(text) >= SHORTEST, f"{path}:{line}: what it says cannot be told from others"
    assert text in " ".join(PAGE.split()), (
        f"docs/guides/troubleshooting.md has no entry for the warning of {path}:{line}"
    )


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_has_its_entry(name: str) -> None:
    assert any(f"`{name}`" in heading for heading in entries())


def test_every_entry_has_a_remedy() -> None:
    told = [(heading, text) for heading, text in entries().items() if "```text" in text]
    assert len(told) > 15
    assert [heading for heading, text in told if "**Why.**" not in text or "**What to do.**" not in text] == []


def test_messages_are_found_wherever_they_are_written() -> None:
    source = """
def here(x):
    warnings.warn(f"the model of {x} has no effect at all", Warning)

def there(x):
    message = "one of two messages" if x else "the other message of two"
    warnings.warn(message, Warning)

class A:
    def _tell(self, kind, text):
        warnings.warn(text, kind)

    def f(self):
        self._tell(Warning, f"a message of {self}'s own")
"""
    found = [text for _, text in warned(ast.parse(source))]
    assert found == ["has no effect at all", "the other message of two", "a message of"]
