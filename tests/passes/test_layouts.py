"""Where channels lie, which values hold the same, and where demand stops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor, fx, nn

import fx_approx
from fx_approx.compiler.transform import _prepare
from fx_approx.core.plan_effects import FULL
from fx_approx.passes.channel_spaces import Layout, Restart, Segment, Spaces, regroup, stretch
from fx_approx.passes.share_selections import coupling_graph
from fx_approx.policies import Uniform
from tests.helpers.demand_nets import NETS
from tests.helpers.hoisting import Layers
from tests.sandwich import Fn

REGROUPED = [
    ((2, 8, 3, 3), (2, 72), [([0], [0]), ([1, 2, 3], [1])]),
    ((2, 72), (2, 8, 9), [([0], [0]), ([1], [1, 2])]),
    ((2, 5, 12), (2, 5, 3, 4), [([0], [0]), ([1], [1]), ([2], [2, 3])]),
    ((2, 3, 4), (6, 4), [([0, 1], [0]), ([2], [1])]),
    ((4, 6), (6, 4), [([0, 1], [0, 1])]),
    ((2, 8, 1, 1), (2, 8), [([0], [0]), ([1, 2, 3], [1])]),
    ((2, 8), (2, 8, 1, 1), [([0], [0]), ([1], [1, 2, 3])]),
    ((2, 8, 1), (2, 1, 8), [([0], [0, 1]), ([1, 2], [2])]),
    ((1, 8), (8,), [([0, 1], [0])]),
]


def test_regroup_pairs_runs_of_equal_length() -> None:
    for before, after, expected in REGROUPED:
        assert [(list(old), list(new)) for old, new in regroup(before, after)] == expected
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        factors = torch.randint(1, 4, (6,), generator=generator).tolist()
        cuts = [sorted({0, 6, *torch.randint(0, 7, (3,), generator=generator).tolist()}) for _ in range(2)]
        before, after = (tuple(math.prod(factors[a:b]) for a, b in itertools.pairwise(one)) for one in cuts)
        found = list(regroup(before, after))
        assert [axis for old, _ in found for axis in old] == list(range(len(before)))
        assert [axis for _, new in found for axis in new] == list(range(len(after)))
        for old, new in found:
            assert math.prod(before[axis] for axis in old) == math.prod(after[axis] for axis in new)


def node(name: str) -> fx.Node:
    return fx.Graph().placeholder(name)


def test_a_cut_is_there_after_the_restart() -> None:
    spaces, x = Spaces(), node("x")
    layout = spaces.new(x, 1, 8)
    assert layout == Layout(1, (Segment(0, 8, 1),))
    with pytest.raises(Restart):
        spaces.cut(layout.segments[0], 3)
    spaces.begin()
    assert [s.count for s in spaces.new(x, 1, 8).segments] == [3, 5]
    assert stretch(spaces, (Segment(0, 3, 1), Segment(1, 5, 1)), 3, 8) == (1, 2)


def test_coarser_units_are_there_after_the_restart() -> None:
    spaces, x = Spaces(), node("x")
    (segment,) = spaces.new(x, 1, 12).segments
    assert spaces.coarsen(segment, 1)
    assert not spaces.coarsen(segment, 5)
    with pytest.raises(Restart):
        spaces.coarsen(segment, 4)
    spaces.begin()
    assert spaces.new(x, 1, 12).segments == (Segment(0, 3, 4),)
    assert spaces.new(x, 1, 10) is None  # not whole units


def test_a_cut_reaches_every_value_of_the_space() -> None:
    spaces, x, y = Spaces(), node("x"), node("y")
    one, other = spaces.new(x, 1, 6), spaces.new(y, 1, 6)
    assert spaces.align(one.segments, other.segments)
    spaces.merge(one.segments, other.segments)
    assert spaces.find(one.segments[0].space) == spaces.find(other.segments[0].space)
    with pytest.raises(Restart):
        spaces.cut(other.segments[0], 2)
    assert spaces.cuts == {x: {2}, y: {2}}


def test_align_cuts_and_coarsens_the_other_side() -> None:
    spaces, x, y = Spaces(), node("x"), node("y")
    one, other = spaces.new(x, 1, 6), (Segment(0, 2, 1), Segment(0, 4, 1))
    with pytest.raises(Restart):
        spaces.align(one.segments, other)
    assert spaces.cuts == {x: {2}}
    spaces = Spaces()
    one, other = spaces.new(x, 1, 6), spaces.new(y, 1, 6)
    with pytest.raises(Restart):
        spaces.align(one.segments, (Segment(other.segments[0].space, 2, 3),))
    assert spaces.unit == {x: 3}
    assert not spaces.align(one.segments, (Segment(1, 5, 1),))


def test_strata_are_common_multiples_and_must_divide() -> None:
    spaces = Spaces()
    one, other = (spaces.new(node(name), 1, 12) for name in "xy")
    assert spaces.stratify(one.segments[0], 2)
    assert spaces.stratify(one.segments[0], 3)
    assert not spaces.stratify(one.segments[0], 5)
    assert spaces.stratify(other.segments[0], 4)
    spaces.couple(node("add"), one.segments, other.segments)
    coupled = spaces.groups()
    assert len(set(coupled.values())) == 1
    assert spaces.strata_of(coupled) == dict.fromkeys(coupled, 12)


# ---- facts of whole graphs


def analysis_of(model: nn.Module, policy: Layers, x: Tensor) -> Any:
    return fx_approx.transform(model, policy, x)._fx_approx.record.analysis


def flow_of(model: nn.Module, x: Tensor) -> Any:
    return _prepare(model, x).flow


def built(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape = NETS[name]
    return build(), torch.randn(shape)


def test_the_coupling_graph_of_a_residual_network() -> None:
    """Two stages; the edges of each are its additions."""
    graph = coupling_graph(flow_of(*built("post-activation")), {})
    stages = sorted(sorted(part) for part in nx.connected_components(graph) if len(part) > 1)
    assert stages == [["_0", "_4_conv2", "iadd"], ["_5_conv2", "_5_shortcut_0", "_6_conv2", "iadd_1", "iadd_2"]]
    assert {data["by"] for *_, data in graph.edges(data=True)} == {"iadd", "iadd_1", "iadd_2"}
    assert graph.nodes["_0"]["units"] == 8
    assert graph.nodes["_0"]["readers"] == ["_4_conv1"]
    assert graph.nodes["iadd_1"]["readers"] == ["_6_conv1"]
    assert graph.nodes["iadd_2"]["readers"] == ["_9"]


def test_groups_that_do_not_fit_together_are_noted() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(3, 12, 1)
            self.three, self.eight = nn.Conv2d(12, 6, 1, groups=3), nn.Conv2d(12, 8, 1, groups=4)
            self.last = nn.Conv2d(12, 10, 1, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.a(x), self.b(x)
            return torch.cat([self.three(a), self.eight(b), self.last(a + b)], 1)

    found = analysis_of(Apart(), Layers(scope="group"), torch.randn(2, 3, 4, 4))
    # 12 channels in 12 stretches: one each, so all are kept; nothing is refused.
    assert {one.groups for one in found.sharing.classes if one.known} >= {12}


def test_a_stream_that_is_needed_whole_is_not_shared_over() -> None:
    model, x = built("fused-heads")
    found = analysis_of(model, Layers(scope="group"), x)
    assert all(len(one.readings) == 1 for one in found.sharing.classes)


def test_why_demand_stops() -> None:
    class Stops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8)
            self.left, self.right = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.norm(self.a(x)))
            return self.left(y) + self.right(y)

    found = analysis_of(Stops(), Layers(scope="layer"), torch.randn(3, 6)).demand
    stops = {node.name: [(str(user), what) for user, what in stops] for node, stops in found.stops.items()}
    assert ("norm", "reads all of it") in stops["a"]
    assert any(what == "reads other channels of it" for _, what in stops["b"])
    have = {node.name: places for node, places in found.have.items()}
    assert have["a"] == have["b"] == (FULL,)


def test_in_place_changes_of_what_others_read_are_told() -> None:
    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x) + 0.0
            y = x * 2.0
            return self.b(x.relu_()) + self.c(y)

    flow = flow_of(Changed(), torch.randn(3, 6))
    assert list(flow.stopped.values()) == ["relu behind a changes in place what others read"]
    changed = next(n for n in flow.graph.nodes if n.name == "add")
    assert flow.layout(changed) is None


RESHAPES: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    # What stands between two layers of 16 channels, and whether the first may compute some of them only.
    "an Unflatten that names the channels": (lambda: nn.Unflatten(1, (16, 1, 1)), False),
    "unflatten that names the channels": (lambda: Fn(lambda x: x.unflatten(1, (16, 1, 1))), False),
    "unflatten that does not": (lambda: Fn(lambda x: x.unflatten(1, (-1, 1, 1))), True),
    "heads": (lambda: nn.Sequential(nn.Unflatten(1, (-1, 4)), nn.ReLU(), nn.Flatten()), True),
    "flatten": (lambda: nn.Flatten(), True),
}


@pytest.mark.parametrize("name", RESHAPES)
def test_an_unflatten_that_names_the_number_of_channels_keeps_them_all(name: str) -> None:
    make, narrowed = RESHAPES[name]
    last = nn.Linear(16, 4) if name in ("heads", "flatten") else nn.Conv2d(16, 4, 1)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), make(), last).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    approx = fx_approx.transform(model, Uniform(0.5), x)
    have = {node.name: classes for node, classes in approx._fx_approx.record.analysis.demand.have.items()}
    assert (FULL not in have["_0"]) == narrowed
    assert approx(x).isfinite().all() and fx_approx.analysis.verify(approx, x).passed
