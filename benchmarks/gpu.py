"""Every figure that needs a GPU, in order of worth, in ten minutes.

    python benchmarks/gpu.py --out results
    python benchmarks/gpu.py --out results --only correctness wrn-28-10 --minutes 5
    python benchmarks/gpu.py --out results --small        # small models on the CPU: whether it runs, no figures

Each measurement is a script of this folder, in a process of its own and within its own time box; first of all the tests
that need a GPU run. A script checks that the numbers of the variants are right before it times anything, and takes the
steps of all variants in turn. What is measured is written as it comes: DIR/NAME.json, the output beside it in
DIR/NAME.txt, and DIR/summary.json, which says of each measurement whether it was done, failed, ran out of its time or
was left out. A measurement begins only where its time box is left. The exit code is 1 where one was not done in time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from _header import environment, header

FOLDER = Path(__file__).parent
_BF16 = ("--device", "cuda", "--autocast", "bfloat16")
_STEPS = (*_BF16, "--compiled-only", "--runs", "11")


@dataclasses.dataclass(frozen=True)
class Box:
    """One measurement.

    Attributes:
        name: Of its files.
        script: Of this folder; ``pytest`` for tests.
        arguments: On a GPU.
        small: In their place with ``--small``.
        seconds: After which it is ended.
    """

    name: str
    script: str
    arguments: tuple[str, ...]
    small: tuple[str, ...]
    seconds: int

    def command(self, small: bool, out: Path) -> list[str]:
        """What is run."""
        arguments = self.small if small else self.arguments
        if self.script == "pytest":
            return [sys.executable, "-m", "pytest", *arguments]
        return [sys.executable, str(FOLDER / self.script), *arguments, "--json", str(out / f"{self.name}.json")]

    def __str__(self) -> str:
        what = "-m pytest" if self.script == "pytest" else f"benchmarks/{self.script}"
        return f"python {what} {' '.join(self.arguments)}"


_TESTS = "tests/compiler/test_cuda.py"
_SMALL_STEP = (
    "--device",
    "cpu",
    "--models",
    "wrn_10_2",
    "--scopes",
    "value",
    "--no-swap",
    "--runs",
    "2",
    "--warmup",
    "1",
)
_SMALL_SUB = ("--device", "cpu", "--models", "wrn_10_4", "--optimizers", "sgd", "--no-compile", "--runs", "2")
_SMALL_TOKENS = ("--device", "cpu", "--models", "small", "--optimizers", "sgd", "--runs", "2")

BOXES = (
    Box("correctness", "pytest", ("-q", "-n0", _TESTS), ("-q", "-n0", "--collect-only", _TESTS), 120),
    Box(
        "wrn-28-10",
        "train_step.py",
        ("--models", "wrn_28_10", "--batch", "256", "--channels-last", "--no-swap", "--memory", *_STEPS),
        _SMALL_STEP,
        90,
    ),
    Box(
        "resnet50-subnetworks",
        "subnetworks.py",
        ("--models", "resnet50", "--batch", "128", "--optimizers", "sgd", *_STEPS),
        _SMALL_SUB,
        90,
    ),
    Box(
        "vit-b-16-tokens",
        "tokens.py",
        ("--models", "vit_b_16", "--batch", "128", "--optimizers", "adamw", *_STEPS),
        _SMALL_TOKENS,
        75,
    ),
    Box(
        "vit-b-16",
        "train_step.py",
        ("--models", "vit_b_16", "--batch", "256", "--no-swap", "--scopes", "value", "--memory", *_STEPS),
        _SMALL_STEP,
        60,
    ),
    Box(
        "wrn-16-4-subnetworks",
        "subnetworks.py",
        ("--models", "wrn_16_4", "--batch", "512", "--optimizers", "sgd", *_STEPS),
        _SMALL_SUB,
        60,
    ),
    Box(
        "gated-mlp",
        "train_step.py",
        (
            *(
                "--models",
                "gated_mlp",
                "--batch",
                "16384",
                "--dtype",
                "bfloat16",
                "--device",
                "cuda",
                "--compiled-only",
            ),
            *("--no-swap", "--scopes", "value", "--memory", "--runs", "11"),
        ),
        _SMALL_STEP,
        45,
    ),
    Box("gpt-tokens", "tokens.py", ("--models", "gpt", "--batch", "32", *_STEPS), _SMALL_TOKENS, 60),
    Box(
        "wrn-28-10-cuda-graphs",
        "train_step.py",
        ("--models", "wrn_28_10", "--batch", "256", "--channels-last", "--no-swap", "--cuda-graphs", *_STEPS),
        _SMALL_STEP,
        90,
    ),
    Box(
        "packing",
        "packing.py",
        ("--models", "wrn_28_10", "resnet50", "--device", "cuda"),
        ("--models", "wrn_10_2", "--device", "cpu", "--runs", "2"),
        30,
    ),
)


def run(box: Box, small: bool, out: Path) -> tuple[str, float]:
    """How a measurement ended, and how long it took."""
    start = time.monotonic()
    with (out / f"{box.name}.txt").open("w", encoding="utf-8") as said:
        try:
            done = subprocess.run(
                box.command(small, out.resolve()),
                cwd=FOLDER.parent,
                stdout=said,
                stderr=subprocess.STDOUT,
                timeout=box.seconds,
                check=False,
            )
            ended = "done" if done.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            ended = "out of time"
    return ended, time.monotonic() - start


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs them; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [box.name for box in BOXES]
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results are written")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these measurements")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all together (10)")
    parser.add_argument("--small", action="store_true", help="small models on the CPU, whose times mean nothing")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes: expected more than 0, got {options.minutes:g}")
    options.out.mkdir(parents=True, exist_ok=True)
    print(header("What needs a GPU"), flush=True)
    end = time.monotonic() + 60 * options.minutes
    found: dict[str, dict[str, object]] = {}
    for box in BOXES:
        if box.name not in options.only:
            continue
        fits = end - time.monotonic() >= box.seconds
        ended, taken = run(box, options.small, options.out) if fits else ("left out", 0.0)
        found[box.name] = {"ended": ended, "seconds": round(taken, 1), "command": str(box)}
        print(f"{box.name:24} {ended:12} {taken:6.0f} s", flush=True)
        content = {"environment": environment(), "small": options.small, "results": found}
        (options.out / "summary.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return int(any(one["ended"] in ("failed", "out of time") for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
