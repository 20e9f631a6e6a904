"""The page of examples: what they printed, their pictures and their sources, of the records in docs/gallery."""

from __future__ import annotations

import json
from pathlib import Path

from record import SCRIPTS, Script

HEAD = """# Gallery

Each script of `examples/` with what it printed when it was run. The outputs are recorded by
`python docs/_site/record.py`. Times are those of the machine that is named below each, with what else it did. In
commands FOLDER is an empty folder, and PICTURES that of the pictures.
"""


def gallery(repository: Path) -> str:
    """The page."""
    return "\n".join([HEAD, *(_part(repository, script) for script in SCRIPTS)])


def _part(repository: Path, script: Script) -> str:
    stored = json.loads((repository / "docs" / "gallery" / f"{script.name}.json").read_text(encoding="utf-8"))
    lines = [f"## {script.title}", ""]
    if script.source is not None:
        first = (repository / script.source).read_text(encoding="utf-8").removeprefix('"""').split("\n\n")[0]
        lines += [" ".join(first.removesuffix('"""').split()), ""]
    lines += ["```text", f"$ {stored['command']}", stored["output"], "```", ""]
    lines += [f"![{script.title}](gallery/{name})\n" for name in script.pictures]
    lines += [f"*{stored['machine']}; {stored['versions']}; {stored['seconds']} s; {stored['date']}.*", ""]
    if script.source is not None:
        source = (repository / script.source).read_text(encoding="utf-8").rstrip()
        lines += [f'??? example "{script.source}"', "", "    ````python"]
        lines += [f"    {line}".rstrip() for line in source.splitlines()]
        lines += ["    ````", ""]
    return "\n".join(lines)
