"""Whether training steps have become slower since another commit, by ratios exact / this in alternating processes.

    python benchmarks/regression.py --base main~5
    python benchmarks/regression.py --base v0.1.0 --only wrn-16-4 --rounds 5 --json found.json

The other commit is checked out beside this tree, whose uncommitted changes count. Each measurement is a script of this
folder, run by turns in either tree, in a process of its own. Within a process the variants take their steps in turn
with the exact model: only ratios are compared, which a busy machine moves less than seconds. A row is slower where its
median has fallen by more than the tolerance and no round of one commit overlaps the other's; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from _header import add_json_option, header, store
from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
CASES = {
    "wrn-16-4": (
        *("benchmarks/train_step.py", "--models", "wrn_16_4", "--compiled-only", "--no-swap", "--no-narrow"),
        *("--runs", "7"),
    ),
    "vit-b-block": (
        *("benchmarks/train_step.py", "--models", "vit_b_block", "--compiled-only", "--no-swap", "--no-narrow"),
        *("--scopes", "value", "--runs", "7"),
    ),
    "bert-tokens": (
        *("benchmarks/tokens.py", "--models", "bert", "--batch", "2", "--variants", "tokens", "--optimizers", "none"),
        *("--compiled-only", "--runs", "7"),
    ),
}
Ratios = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Row:
    """A variant: exact / this in each round, of either commit."""

    case: str
    variant: str
    base: tuple[float, ...]
    this: tuple[float, ...]

    @property
    def change(self) -> float:
        """This as a share of the base, by medians; above 1 is faster."""
        return statistics.median(self.this) / statistics.median(self.base)

    def is_slower(self, tolerance: float) -> bool:
        """By more than the tolerance, in every round."""
        return self.change < 1 - tolerance and max(self.this) < min(self.base)


def ratios(tree: Path, command: Sequence[str]) -> Ratios:
    """Runs one measurement in a tree; exact / this by variant.

    Raises:
        RuntimeError: The script fails; with what it said last.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "found.json"
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        done = subprocess.run(
            [sys.executable, *command, "--json", str(target)],
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = "\n".join(done.stderr.strip().splitlines()[-3:])
            raise RuntimeError(f"{' '.join(command)} in {tree.name} ended with {done.returncode}: {last}")
        results = json.loads(target.read_text(encoding="utf-8"))["results"]
    return {one["variant"]: one["speedup"][1] for one in results if one["variant"] != "exact"}


@contextlib.contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """Another commit in a folder of its own.

    Raises:
        RuntimeError: There is no such commit, or its package is not imported from there.
    """
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        made = _git("worktree", "add", "--detach", "--quiet", str(tree), revision)
        if made.returncode:
            raise RuntimeError(f"--base: {made.stderr.strip()}")
        try:
            asked = [sys.executable, "-c", "import fx_approx; print(fx_approx.__file__)"]
            found = subprocess.run(
                asked,
                cwd=tree,
                env={**os.environ, "PYTHONPATH": str(tree)},
                capture_output=True,
                text=True,
                check=False,
            )
            if str(tree.resolve()) not in str(Path(found.stdout.strip()).resolve()):
                raise RuntimeError(f"--base: a checkout of {revision} does not work as it lies: {found.stderr.strip()}")
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def compared(case: str, trees: tuple[Path, Path], rounds: int) -> list[Row]:
    """All variants of one measurement, base and this by turns."""
    found: tuple[list[Ratios], list[Ratios]] = ([], [])
    for number in range(rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            found[which].append(ratios(trees[which], CASES[case]))
    base, this = found
    names = [name for name in this[0] if name in base[0]]
    return [Row(case, name, tuple(one[name] for one in base), tuple(one[name] for one in this)) for name in names]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="HEAD~1", metavar="COMMIT", help="what is compared with (HEAD~1)")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), help="these measurements")
    parser.add_argument("--rounds", type=int, default=2, help="processes for each commit and measurement (2)")
    parser.add_argument("--tolerance", type=float, default=0.05, help="share that does not count (0.05)")
    add_json_option(parser)
    options = parser.parse_args(arguments)
    if options.rounds < 1 or not 0 <= options.tolerance < 1:
        parser.error("--rounds: expected 1 or more; --tolerance: expected a number in [0, 1)")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints a table; returns the exit code."""
    options = parse(arguments)
    print(header(f"Training steps, {options.base} against this tree"), flush=True)
    try:
        with checkout(options.base) as tree:
            rows = [row for case in options.only for row in compared(case, (tree, ROOT), options.rounds)]
    except RuntimeError as error:
        print(f"regression.py: {error}", file=sys.stderr)
        return 2
    lines = [
        [
            *(row.case, row.variant, *(" ".join(f"{one:.2f}" for one in side) for side in (row.base, row.this))),
            f"{row.change:.2f}",
            "slower" if row.is_slower(options.tolerance) else "",
        ]
        for row in rows
    ]
    heads = ["", "variant", "base, exact / this", "this tree", "change", ""]
    print(f"\n{tabulate(lines, heads, disable_numparse=True)}")
    store(options.json, [dataclasses.asdict(row) for row in rows])
    return int(any(row.is_slower(options.tolerance) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
