"""Runs the scripts of examples/ and records what they print, and their pictures, in docs/gallery.

    python docs/_site/record.py                  # all, some minutes on 2 cores
    python docs/_site/record.py quickstart demo  # these

Needs the extra ``test``. The page of the gallery is made of the records when the site is built.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
GALLERY = REPOSITORY / "docs" / "gallery"


@dataclasses.dataclass(frozen=True)
class Script:
    """One script of the gallery.

    Attributes:
        name: Of its record.
        title: Its heading.
        command: What is run; FOLDER is an empty folder, PICTURES that of the pictures.
        source: The file to show, if there is one.
        pictures: Files that it writes into PICTURES.
    """

    name: str
    title: str
    command: str
    source: str | None = None
    pictures: tuple[str, ...] = ()


def _example(name: str, title: str, arguments: str = "", pictures: Sequence[str] = ()) -> Script:
    path = f"examples/{name}.py"
    return Script(name.rpartition("/")[2], title, f"python {path} {arguments}".strip(), path, tuple(pictures))


def _theory(name: str, title: str) -> Script:
    return _example(f"theory/{name}", title, "--out PICTURES", [f"theory_{name}.png"])


SCRIPTS = (
    Script("demo", "The demo", "python -m fx_approx demo --html FOLDER/demo.html"),
    _example("quickstart", "Quickstart"),
    _example("recipe_trainer", "A recipe in the Trainer of Hugging Face", "FOLDER"),
    _example("recipe_lightning", "A recipe in Lightning", "FOLDER"),
    _example("recipe_accelerate", "A recipe with accelerate", "FOLDER"),
    _example("recipe_peft", "A recipe and LoRA"),
    _example("recipe_timm", "A recipe beside timm's training pieces"),
    _example("token_pictures", "Which tokens are computed", "--out PICTURES", ["tokens.png"]),
    Script(
        "ddp_train",
        "Data-parallel training",
        "torchrun --nproc-per-node 2 examples/ddp_train.py --epochs 2",
        "examples/ddp_train.py",
    ),
    _example("sweep", "A sweep over policies", "--seeds 0 --figure PICTURES/sweep.png", ["sweep.png"]),
    _example("importance_trainer", "Examples drawn by their losses, in the Trainer", "FOLDER"),
    _example("importance_lightning", "Examples drawn by their losses, in Lightning", "FOLDER"),
    _theory("linear_regression", "Theory: sampling is a penalty"),
    _theory("conv_error", "Theory: what the proxy of a convolution loses"),
    _theory("topk_mse", "Theory: when TopK is best"),
    _theory("convergence", "Theory: the rate of convergence"),
    _theory("dropout", "Theory: sampling and dropout"),
)


def record(script: Script, setup: Path | None) -> None:
    """Runs one, and writes its record; an error if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        filled = script.command.replace("FOLDER", f"{folder}/run").replace("PICTURES", str(GALLERY))
        begun, load = time.perf_counter(), os.getloadavg()[0]
        if "demo.html" in filled:
            os.mkdir(f"{folder}/run")
        done = subprocess.run(
            _interpreted(filled.split(), setup),
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "100", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{script.command}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
        seconds = time.perf_counter() - begun
        printed = done.stdout.replace(f"{folder}/run", "FOLDER").replace(f"{GALLERY}{os.sep}", "PICTURES/")
    threads = f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}"
    stored = {
        "command": script.command,
        "output": _shown(printed),
        "seconds": round(seconds),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {threads}, load {load:.1f} when it began",
        "versions": f"Python {sys.version.split()[0]}, torch {importlib.metadata.version('torch')}",
        "date": datetime.date.today().isoformat(),
    }
    path = GALLERY / f"{script.name}.json"
    path.write_text(json.dumps(stored, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{path.relative_to(REPOSITORY)}: {seconds:.0f} s", flush=True)


_SET_UP = """
import runpy, sys
setup, *command = sys.argv[1:]
runpy.run_path(setup, run_name="__main__")
if command[0] == "-m":
    sys.argv, sys.path[0] = command[1:], ""
    runpy.run_module(command[1], run_name="__main__", alter_sys=True)
else:
    sys.argv, sys.path[0] = command, command[0].rpartition("/")[0]
    runpy.run_path(command[0], run_name="__main__")
"""


def _interpreted(command: list[str], setup: Path | None) -> list[str]:
    if command[0] == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", *command[1:]]
    if setup is not None:
        return [sys.executable, "-c", _SET_UP, str(setup), *command[1:]]
    return [sys.executable, *command[1:]]


def _shown(text: str) -> str:
    """What a terminal shows in the end: of a bar that overwrites itself the last state."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
    return "\n".join(line.rpartition("\r")[2].rstrip() for line in text.replace("\r\n", "\n").splitlines()).strip("\n")


def _processor() -> str:
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1].strip() if found else "unknown processor"


def main(arguments: Sequence[str] | None = None) -> None:
    """Records the scripts that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [script.name for script in SCRIPTS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--setup", type=Path, metavar="FILE", help="a Python file to run before each script")
    given = parser.parse_args(arguments)
    if unknown := set(given.names) - set(names):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected some of {', '.join(names)}")
    GALLERY.mkdir(exist_ok=True)
    for script in SCRIPTS:
        if script.name in (given.names or names):
            record(script, given.setup)


if __name__ == "__main__":
    main()
