"""The benchmark over a network: its model on paper against hand calculation, its bytes, and a short run of it all."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
MODULES = ("_header", "_models", "_namespaces", "_network_model", "_replay", "_multinode_rank", "multinode")


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scripts are imported as when they are run, and forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def paper() -> ModuleType:
    return importlib.import_module("_network_model")


def test_an_all_reduce_by_hand(paper: ModuleType) -> None:
    link = paper.Link(alpha=0.001, beta=100.0)
    # ring over 4: 6 messages, and 1.5 times 400 bytes at 100 bytes a second
    assert paper.all_reduce_seconds(400, 4, link, "ring") == pytest.approx(6 * 0.001 + 6.0)
    assert paper.all_reduce_seconds(400, 4, link, "halving-doubling") == pytest.approx(4 * 0.001 + 6.0)
    assert paper.all_reduce_seconds(400, 1, link, "ring") == 0
    assert paper.messages(1024, "ring") == 2046 and paper.messages(1024, "halving-doubling") == 20
    assert paper.messages(5, "halving-doubling") == 6


def test_a_step_by_hand(paper: ModuleType) -> None:
    link, two = paper.Link(alpha=0.0, beta=100.0), 2
    early, late = paper.Bucket(1.0, 100), paper.Bucket(2.0, 50)
    # over two workers the factor is 1: the first is through at 2.0, the second at 2.5; computing ends at 2.2
    assert paper.step_seconds(2.2, [early, late], two, link, "ring") == pytest.approx(2.5)
    # the second waits for the first
    assert paper.step_seconds(2.2, [paper.Bucket(1.0, 300), late], two, link, "ring") == pytest.approx(4.5)
    # all is hidden behind computing
    assert paper.step_seconds(9.0, [early, late], two, link, "ring") == pytest.approx(9.0)
    # 0.3 s of packing, two thirds of it before the first bucket: at 1.2 to 2.2, then at 2.3 to 2.8, and unpacked
    costs = paper.Costs(pack=0.3, unpack=0.1)
    assert paper.step_seconds(2.2, [early, late], two, link, "ring", costs) == pytest.approx(2.9)
    # alpha 0.01: two messages for a call, two calls in the first bucket, one in the second, three small ones
    slow, twice = paper.Link(alpha=0.01, beta=100.0), paper.Bucket(1.0, 100, calls=2)
    found = paper.step_seconds(2.2, [twice, late], two, slow, "ring", paper.Costs(small=3))
    assert found == pytest.approx(max(2.0 + 0.04, 2.0) + 0.5 + 0.02 + 0.06)


def test_buckets_are_ready_when_their_last_layer_is(paper: ModuleType) -> None:
    layers = [(10.0, 1.0), (20.0, 2.0), (30.0, 4.0)]
    assert paper.ready_times([10, 50], layers, 5.0) == [6.0, 12.0]
    assert paper.ready_times([30, 30], layers, 0.0) == [3.0, 7.0]
    assert paper.ready_times([15, 45], layers, 0.0) == [3.0, 7.0]


def test_wrong_links_and_algorithms_are_refused(paper: ModuleType) -> None:
    with pytest.raises(ValueError, match="alpha, beta"):
        paper.Link(0.0, 0.0)
    with pytest.raises(ValueError, match="algorithm"):
        paper.messages(4, "tree")
    with pytest.raises(ValueError, match="workers"):
        paper.messages(0, "ring")
