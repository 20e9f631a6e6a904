"""The pages of results, made from the records in docs/results; nothing is measured.

    python benchmarks/pages.py
    python benchmarks/pages.py --check

The first writes docs/results.md and what it lists; the second writes nothing, and ends with 1 where a page is not what
its records make. What a section is made of stands in _page_contents.py. The tables of the experiments, of subnetworks
and of the model zoo are pages by scripts of their own, and are made anew here from the same records, without figures.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import _page_training as training
from _page_contents import OWN, PAGES, WRITTEN
from _page_parts import REPOSITORY, RESULTS, anchor, from_docs

COMMAND = "python benchmarks/pages.py"

_LEAD = f"""# Results

What was found is told in [findings](findings.md). This page lists all measurements, and is made by `{COMMAND}`. Each
table stands beside its command, the machine and the versions that made it, the number of runs and their spread; it is
made from the records that it names. Where there is **one seed**, or one run, it says so, and a difference of a point
means little. [Notes](results/notes.md) have the methods and what was seen on the way;
[older measurements](results/older.md) are those that left no records. Both are written by hand."""


def index() -> str:
    """docs/results.md."""
    parts = [_LEAD]
    for page in PAGES:
        parts += [f"## {page.title}", f"[The whole page](results/{page.file}). {from_docs(page.lead)}"]
        for one in page.sections:
            if one.title != page.title:
                parts.append(f"### {one.title}")
            parts.append(f"[{one.title}](results/{page.file}#{anchor(one.title)}): {from_docs(one.brief or one.how)}")
    parts.append("## Pages by scripts of their own")
    parts += [f"### {title}\n\n{from_docs(f'[{title}]({file})')}: {told}" for title, (file, told) in OWN.items()]
    parts.append("## Older measurements, without records")
    parts += [f"### {title}\n\n[{title}](results/older.md#{anchor(title)})" for title in WRITTEN]
    return "\n\n".join(parts) + "\n"


def tables_of_experiments() -> str:
    """docs/results/experiments/tables.md, with the figures that are there."""
    tables, _ = training.scripts()
    parts, results = training.found()
    folder = RESULTS / "experiments"
    figures = {
        name: [f"{name}-{kind}.png" for kind in ("flops", "time", "curves") if (folder / f"{name}-{kind}.png").exists()]
        for name in parts
    }
    place = folder.relative_to(REPOSITORY).as_posix()
    command = f"python examples/experiments/tables.py {place} --to {place}"
    text: str = tables.page(parts, results, 0.5, command, figures)
    return text


def own_pages() -> Iterator[tuple[str, str]]:
    """Pages whose scripts keep all that is on them in the records: file in docs/results, and what it should be."""
    import _subnetwork_page
    import _zoo_table
    import subnetwork_memory
    from _subnetwork_results import Timed
    from _zoo_run import Result

    yield "experiments/tables.md", tables_of_experiments()
    timed = json.loads((RESULTS / "subnetworks.json").read_text(encoding="utf-8"))
    yield "subnetworks.md", _subnetwork_page.markdown([Timed(**one) for one in timed["results"]], timed["environment"])
    about = json.loads((RESULTS / "subnetwork-memory.json").read_text(encoding="utf-8"))["environment"]
    yield (
        "subnetwork-memory.md",
        subnetwork_memory.markdown(subnetwork_memory.stored(RESULTS / "subnetwork-memory.json"), about),
    )
    zoo = json.loads((RESULTS / "model-zoo.json").read_text(encoding="utf-8"))
    yield "model-zoo.md", _zoo_table.markdown([Result(**one) for one in zoo["results"]], zoo["environment"])
    yield "subnetwork-coverage.md", _coverage(RESULTS / "subnetwork-coverage.md")


def _coverage(page: Path) -> str:
    """The machine of the last run is on the page alone, and stays."""
    import _coverage_page
    import subnetwork_coverage

    results = list(subnetwork_coverage.stored(page.with_suffix(".jsonl")).values())
    last = re.compile(r"^The last of the runs: .*$", re.MULTILINE)
    machine = last.search(page.read_text(encoding="utf-8"))
    text: str = _coverage_page.markdown(results, {}, len(results))
    return text if machine is None else last.sub(lambda _: machine[0], text)


def pages() -> Iterator[tuple[Path, str]]:
    """All of them, with what they should be."""
    yield RESULTS.parent / "results.md", index()
    for page in PAGES:
        yield RESULTS / page.file, page.text(COMMAND)
    for file, text in own_pages():
        yield RESULTS / file, text


def stale(page: Path, text: str) -> bool:
    """Whether a page is not what its records make."""
    return not page.exists() or page.read_text(encoding="utf-8") != text


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the pages, or looks whether they are up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where a page is stale")
    options = parser.parse_args(arguments)
    old = [(path, text) for path, text in pages() if stale(path, text)]
    for path, text in old:
        print(f"{path.relative_to(REPOSITORY)}: {'stale' if options.check else 'written'}")
        if not options.check:
            path.write_text(text, encoding="utf-8")
    return int(options.check and bool(old))


if __name__ == "__main__":
    sys.exit(main())
