"""The Python code of the README runs as it stands, and the quickstart is the same program."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
README = REPOSITORY / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[int, str]]:
    """Line and code of each ```python block."""
    text = README.read_text(encoding="utf-8")
    return [(text[: match.start()].count("\n") + 2, match[1]) for match in BLOCK.finditer(text)]


def test_there_is_code() -> None:
    assert blocks()


@pytest.mark.parametrize(("line", "code"), [pytest.param(*block, id=f"line{block[0]}") for block in blocks()])
def test_block_runs(
    line: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # Blank lines before it make the numbers in a traceback those of the README.
    program = compile("\n" * (line - 1) + code, str(README), "exec")
    exec(program, {"__name__": "__main__"})
    assert capsys.readouterr().err == ""


def statements(code: str) -> list[str]:
    """What a program does, its imports aside."""
    body = ast.parse(code).body
    program = [node for node in body if not isinstance(node, (ast.Import, ast.ImportFrom))]
    program = [node for node in program if not ast.unparse(node).startswith("sys.path.append(")]
    is_docstring = isinstance(program[0], ast.Expr) and isinstance(program[0].value, ast.Constant)
    return [ast.dump(node) for node in program[is_docstring:]]


def test_quickstart_is_the_first_block() -> None:
    quickstart = (REPOSITORY / "examples" / "quickstart.py").read_text(encoding="utf-8")
    assert statements(quickstart) == statements(blocks()[0][1])
