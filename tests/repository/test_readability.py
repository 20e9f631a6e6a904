"""The README, the guides, recipes and trainers are readable: their sentences are short.

    python tests/repository/test_readability.py [PAGES]

prints the mean of the words of a sentence, page by page.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
TOP = ("index.md", "get-started.md", "recipes.md", "integrations.md")
READ = [REPOSITORY / "README.md", *(DOCS / name for name in TOP), *sorted((DOCS / "guides").glob("*.md"))]
LIMIT = 20
"""Words of a sentence, on average over a page."""


def sentences(text: str) -> list[str]:
    """The sentences of a page without code, tables, headings and markup; an item of a list ends as a sentence does."""
    text = re.sub(r"^ *(```|````).*?^ *\1$", "\n\n", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<[^>]+>", " ", text)
    kept = [line for line in text.splitlines() if not re.match(r"\s*(\||#|!!!|\?\?\?|!\[|:::)", line)]
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", "\n".join(kept))
    text = re.sub(r"`[^`]*`", "CODE", text)  # one word, and its dots end no sentence
    found: list[str] = []
    for part in re.split(r"\n\s*\n|^\s*(?:[-*]|\d+\.)\s", text, flags=re.MULTILINE):
        found += re.split(r"(?<=[.!?])[\"'*)_]*\s+(?=[\W_]*[A-Z0-9])", " ".join(part.split()))
    return [one for one in found if words(one)]


def words(sentence: str) -> int:
    return len([one for one in sentence.split() if re.search(r"\w", one)])


def mean_length(text: str) -> float:
    lengths = [words(one) for one in sentences(text)]
    return sum(lengths) / max(1, len(lengths))


@pytest.mark.parametrize("page", READ, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_sentences_are_short(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(sentences(text)) > 2
    assert mean_length(text) <= LIMIT


def test_sentences_are_told_apart() -> None:
    text = """# A heading of many many words

One two *three*. Four `code.with dots` five (see [six seven](page.md#x)). Version 2.13 is one. **Eight.** Nine

- ten eleven
- twelve

| a | table |
|---|---|

```python
x = 1
```
"""
    assert [words(one) for one in sentences(text)] == [3, 6, 4, 1, 1, 2, 1]
    assert mean_length("One two. A " + "word " * 28 + "end.") == 16


if __name__ == "__main__":  # the means of the pages that are asked for, or of all
    for path in [Path(one) for one in sys.argv[1:]] or READ:
        print(f"{mean_length(path.read_text(encoding='utf-8')):5.1f}  {os.path.relpath(path, REPOSITORY)}")
