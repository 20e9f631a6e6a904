"""Models and policies whose subnetworks are measured, each with the narrow network that is the limit."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _header import add_json_option, environment
from _models import MODELS, wide_resnet
from _narrow import HalfReadingBlock, half_reading_resnet50, half_reading_wide_resnet, narrow_minilm, narrow_resnet50
from torch import Tensor, nn

from fx_approx.policies import Exact, Override, Uniform

MINILM = {
    **{"vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12},
    **{"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12, "num_hidden_layers": 6},
}
"""The sizes of all-MiniLM-L6-v2."""

_KEPT_WHOLE = ("classifier", "*scaled_dot*", "*query", "*key", "*value", "*fc1")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model at one scope.

    Attributes:
        model: Its name.
        what: The scope, or what is sampled.
        build: Makes the exact model and a batch.
        narrow: Makes the network written by hand that has the subnetwork's parameters.
        exact: Patterns of layers that stay exact.
        scope: Of the selections.
        eager: The least exact / subnetwork that issue and plan ask for in eager mode; None for none.
        compiled: The same compiled.
        memory: The largest share of the exact step's memory.
    """

    model: str
    what: str
    build: Callable[[], tuple[nn.Module, Tensor]]
    narrow: Callable[[], nn.Module]
    exact: tuple[str, ...] = ()
    scope: str = "value"
    eager: float | None = None
    compiled: float | None = None
    memory: float | None = None

    @property
    def name(self) -> str:
        """Model and what is sampled."""
        return f"{self.model}, {self.what}"

    def policy(self, ratio: float, min_k: int) -> Any:
        """The policy at a ratio."""
        uniform = Uniform(ratio, scope=self.scope, min_k=min_k)
        return Override(dict.fromkeys(self.exact, Exact()), uniform) if self.exact else uniform


def perceptron(width: int = 512) -> nn.Module:
    """784-width-width-10."""
    hidden = nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
    return nn.Sequential(*hidden, nn.Linear(width, 10))


def minilm(**sizes: int) -> Any:
    """The encoder of ``examples/experiments/minilm.py`` with random weights and a classifier of ten classes."""
    with _experiments():
        made = importlib.import_module("minilm").Classifier({**MINILM, **sizes}, 10)
    return made


@contextlib.contextmanager
def _experiments() -> Iterator[None]:
    """The scripts of the experiments can be imported inside."""
    folder = str(Path(__file__).parents[1] / "examples" / "experiments")
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _known(name: str) -> Callable[[], tuple[nn.Module, Tensor]]:
    def build() -> tuple[nn.Module, Tensor]:
        exact, inputs, _ = MODELS[name]()
        return exact, inputs

    return build


def _last(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: make().to(memory_format=torch.channels_last)


def _ids(batch: int, length: int, **sizes: int) -> tuple[nn.Module, Tensor]:
    return minilm(**sizes), torch.randint(1, 1000, (batch, length))


CASES = (
    Case(
        *("mlp", "hidden units", lambda: (perceptron(), torch.randn(64, 784)), functools.partial(perceptron, 256)),
        exact=("0",),
        eager=1.9,
    ),
    Case(
        *("wrn_16_4", "value", _known("wrn_16_4"), _last(lambda: half_reading_wide_resnet(16, 4))),
        eager=2.7,
        compiled=2.7,
    ),
    Case(
        *("wrn_16_4", "group", _known("wrn_16_4"), _last(lambda: wide_resnet(16, 2))),
        scope="group",
        eager=3.3,
        compiled=3.3,
        memory=0.42,
    ),
    Case(*("resnet50", "value", _known("resnet50"), _last(half_reading_resnet50)), eager=2.4, compiled=2.4),
    Case(*("resnet50", "group", _known("resnet50"), _last(narrow_resnet50)), scope="group", eager=3.2, compiled=3.2),
    Case(*("vit_b_block", "value", _known("vit_b_block"), HalfReadingBlock), eager=2.2, compiled=2.2, memory=0.5),
    Case(
        *("minilm", "hidden units and values", lambda: _ids(32, 32), lambda: narrow_minilm(minilm())),
        exact=_KEPT_WHOLE,
        eager=1.45,
        compiled=1.45,
        memory=0.5,
    ),
    Case(
        *("wrn_10_4", "group", lambda: (wide_resnet(10, 4), torch.randn(4, 3, 16, 16)), lambda: wide_resnet(10, 2)),
        scope="group",
    ),
)
"""All of them; the last is for tests of the scripts."""

DEFAULT = tuple(case.name for case in CASES[:-1])


def case_of(name: str) -> Case:
    """The case of that name, as in ``"wrn_16_4, group"``."""
    return next(one for one in CASES if one.name == name)


def add_case_options(parser: argparse.ArgumentParser, batch: str) -> None:
    """The options of all benchmarks of these cases; ``batch`` says what that one does."""
    known = list(dict.fromkeys(one.model for one in CASES))
    parser.add_argument("--models", nargs="+", choices=known, help="only these")
    parser.add_argument("--ratio", type=float, default=0.5, help="sample ratio (0.5)")
    parser.add_argument(
        "--minimal-k", dest="min_k", type=int, default=16, help="layers with fewer pairs stay exact (16)"
    )
    parser.add_argument("--batch", type=int, help=batch)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the page there")
    add_json_option(parser)


def write(options: argparse.Namespace, found: Sequence[Any], page: Callable[[Any, Mapping[str, Any]], str]) -> None:
    """Writes results where ``--json`` and ``--markdown`` say."""
    if options.json is not None:
        content = {"environment": environment(), "results": [dataclasses.asdict(one) for one in found]}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if options.markdown is not None:
        options.markdown.write_text(page(found, environment()), encoding="utf-8")
