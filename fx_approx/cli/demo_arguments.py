"""The arguments of the demo."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

NETWORKS = ("CNN", "ViT", "MLP")
LEAST_IMAGES = 64
"""A batch."""

_DEMO = """\
Trains three small networks on images that come with the package, each twice from the same
weights, exactly and by a recipe, step by step in turn: a table, and a page with the curves
and what each layer computes. About 70 seconds on 2 cores.

  python -m fx_approx demo
  python -m fx_approx demo --data folder/with/fashion-mnist --limit 5000
"""


def add_demo(commands: Any) -> None:
    """Adds the command ``demo`` to ``commands``, the subparsers of a parser."""
    demo = commands.add_parser(
        "demo",
        help="train small networks exactly and by recipes, and compare",
        description=_DEMO,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument("--data", type=Path, metavar="DIR", help="a folder with MNIST or Fashion-MNIST as IDX files")
    demo.add_argument(
        "--limit",
        type=_whole(LEAST_IMAGES),
        default=2000,
        metavar="N",
        help="training images at most; test images of a folder, too (%(default)s)",
    )
    demo.add_argument(
        "--ratio", type=_share, default=0.5, help="share of the channels or patches to keep (%(default)s)"
    )
    demo.add_argument("--epochs", type=_whole(1), default=8, metavar="N", help="passes over the images (%(default)s)")
    demo.add_argument("--seed", type=_whole(0), default=0, metavar="N", help="of weights and batches (%(default)s)")
    demo.add_argument(
        "--width", type=_whole(1), default=64, metavar="N", help="channels of the first layers (%(default)s)"
    )
    demo.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS, help="only these")
    demo.add_argument("--compile", action="store_true", help="torch.compile all models")
    demo.add_argument("--html", type=Path, default=Path("demo.html"), metavar="FILE", help="the page (%(default)s)")
    demo.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")


def _whole(least: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} on, got {text!r}")
        return int(text)

    return convert


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text!r}")
    return value
