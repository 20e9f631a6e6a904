"""What mkdocs is told beside its configuration: where the sources are, pages made of other files, formulas.

- The packages ``passes`` and ``policies`` stand at the top of the tree; the reference reads all as a wheel has them.
- CONTRIBUTING.md and CHANGELOG.md are pages; so is each file outside of docs/ that a page links to.
- The gallery is made of what ``docs/_site/record.py`` has recorded.
- Formulas become MathML, which browsers show without a script.
"""

from __future__ import annotations

import html
import posixpath
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

sys.path.insert(0, str(Path(__file__).parent))

from gallery import gallery

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = REPOSITORY / "build" / "docs-sources"
INCLUDED = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}

LINK = re.compile(r"(\[[^\]]*\])\(([^)\s]+)\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
CODE = re.compile(r"^(```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_config(config: Any) -> Any:
    """Lays the packages out as they are imported."""
    shutil.rmtree(SOURCES, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__", "*.gz")
    shutil.copytree(REPOSITORY / "fx_approx", SOURCES / "fx_approx", ignore=ignore)
    for name in ("passes", "policies"):
        shutil.copytree(REPOSITORY / name, SOURCES / "fx_approx" / name, ignore=ignore)
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are made of other files."""
    from mkdocs.structure.files import File

    def add(name: str, text: str) -> None:
        files.append(File.generated(config, name, content=text))

    for name, source in INCLUDED.items():
        add(name, _moved((REPOSITORY / source).read_text(encoding="utf-8"), source))
    add("gallery.md", gallery(REPOSITORY))
    texts = [(file.src_uri, file.content_string) for file in files.documentation_pages()]
    linked = {one for uri, text in texts for one in _outside(uri, text)}
    for name in sorted(linked - set(INCLUDED.values())):  # those are pages already
        add(_page_of(name), _listing(REPOSITORY / name, name))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Points links to files outside of docs/ to their pages, and leaves only the language to the fences of code."""
    here = page.file.src_uri

    def link(found: re.Match[str]) -> str:
        name = _target(here, found[2])
        if name is None:
            return found[0]
        return f"{found[1]}({posixpath.relpath(_page_of(name), posixpath.dirname(here) or '.')})"

    markdown = markdown.replace("```python no-run\n", "```python\n")  # what follows is for the tests of the pages
    return _in_prose(markdown, lambda text: LINK.sub(link, text))


def on_page_content(html_: str, **_: Any) -> str:
    """Makes formulas MathML."""

    def formula(found: re.Match[str]) -> str:
        display = "block" if found[2] == "[" else "inline"
        return convert(html.unescape(found[3]).strip(), display=display)

    return FORMULA.sub(formula, html_)


def _in_prose(text: str, change: Callable[[str], str]) -> str:
    """``text`` with what stands outside of code blocks changed."""
    return "".join(part if part.startswith("```") else change(part) for part in CODE.split(text))


def _target(page: str, link: str) -> str | None:
    """The file of the repository that a link of a page means, if it lies outside of docs/."""
    path = link.partition("#")[0]
    if not path or ":" in path:
        return None
    name = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), path))
    return None if name.startswith("docs/") or not (REPOSITORY / name).exists() else name


def _outside(page: str, text: str) -> set[str]:
    links = [one[2] for one in LINK.finditer(CODE.sub("", text))]
    return {name for link in links if (name := _target(page, link)) is not None}


def _page_of(name: str) -> str:
    known = {source: page for page, source in INCLUDED.items()}
    return known.get(name, f"source/{name}.md")


def _listing(path: Path, name: str) -> str:
    if path.is_dir():
        return "\n".join([f"# {name}\n", *(f"- `{one.name}`" for one in sorted(path.glob("*.py")))])
    language = {".py": "python", ".toml": "toml"}.get(path.suffix, "text")
    return f"# {name}\n\n````{language}\n{path.read_text(encoding='utf-8')}````\n"


def _moved(text: str, source: str) -> str:
    """A page from the top of the repository, whose links begin in docs/ now."""

    def link(found: re.Match[str]) -> str:
        path = found[2]
        if ":" in path or path.startswith("#"):
            return found[0]
        return f"{found[1]}({posixpath.relpath(path, 'docs')})"

    return _in_prose(text, lambda prose: LINK.sub(link, prose))
