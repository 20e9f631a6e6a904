"""Links between the pages lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])
LINK = re.compile(r"(?<!\\)\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Names of the headings of a page; the second of the same name is told by a number."""
    found: set[str] = set()
    for title in re.findall(r"^#+ (.+)$", without_code(page.read_text(encoding="utf-8")), re.MULTILINE):
        name = base = re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
        number = 0
        while name in found:
            number += 1
            name = f"{base}-{number}"
        found.add(name)
    return found


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def broken(page: Path) -> list[str]:
    """Links of a page to what is not there."""
    found = []
    prose = re.sub(r"`[^`\n]*`", "", without_code(page.read_text(encoding="utf-8")))
    for link in LINK.findall(prose):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One, *two*\n\n## x\n\n## x\n")
    page = tmp_path / "page.md"
    page.write_text("# Page\n[a](other.md#one-two) [b](other.md#x-1) [c](#page) [d](https://x.y/z) `[e](f)`\n")
    assert broken(page) == []
    page.write_text("[a](other.md#three) [b](gone.md) [c](#page)\n")
    assert broken(page) == ["other.md#three", "gone.md", "#page"]


OLD = """
the-demo operations-saved-on-known-networks many-architectures-and-whether-they-are-right time-of-the-transform
demand-driven-sampling-a-whole-training-step through-both-frontends what-choosing-costs rules-side-by-side
single-products-where-sampling-pays on-a-gpu policies predicted-and-measured-times
budgets-against-one-ratio-for-all auto
demand-driven-sampling-accuracy experiments-on-real-data the-learning-rate fine-tuning-by-phases a-gpt-from-scratch
tokens-and-examples-that-are-drawn what-brings-sampling-closer-to-the-front data-parallel-training-over-a-network
sampled-gradients-of-one-layer-time sampled-gradients-memory
"""


def test_addresses_in_the_list_of_results_stay() -> None:
    """Other pages, and other people's, link to them."""
    assert set(OLD.split()) <= anchors(REPOSITORY / "docs" / "results.md")
