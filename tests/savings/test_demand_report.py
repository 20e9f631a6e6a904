"""The report after demand: operations, memory and reasons, against the running model."""

from __future__ import annotations

import copy
import csv
import io
import itertools
import json
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fx_approx
from fx_approx.core.candidates import Role, RoleFlops
from fx_approx.core.plan_effects import entries
from fx_approx.core.values import nbytes
from fx_approx.policies import Exact, Override, Uniform
from fx_approx.savings.rows import Demanded
from tests.helpers.demand_nets import NETS
from tests.helpers.hoisting import Layers
from tests.helpers.models import loss_of
from tests.helpers.quick import thinned
from tests.helpers.torchvision_compat import import_torchvision
from tests.ops.counting import Keeping

# ---- larger networks


MODELS = import_torchvision().models


class TransformerBlock(nn.Module):
    """Pre-norm, with a linear layer each for query, key and value."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        shape = x.shape[0], x.shape[1], self.heads, -1
        q, k, v = (layer(y).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(y)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def image(batch: int = 2, size: int = 32) -> Callable[[], Tensor]:
    return lambda: torch.randn(batch, 3, size, size)


def vgg() -> nn.Module:
    """vgg11_bn with a small classifier, flattened from 2 by 2 positions."""
    model = MODELS.vgg11_bn(num_classes=10)
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    model.classifier = nn.Sequential(nn.Linear(512 * 4, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10))
    return model


def wide(width: int = 16) -> nn.Module:
    """A wide residual network of two blocks a stage."""
    blocks: list[nn.Module] = []
    before = width
    for stage in range(2):
        for block in range(2):
            after = width * 2**stage
            blocks.append(_Wide(before, after, 2 if stage and not block else 1))
            before = after
    head = nn.BatchNorm2d(before), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10)
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), *blocks, *head)


class _Wide(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(before), nn.BatchNorm2d(after)
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False) if before != after or stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(F.relu(self.bn2(self.conv1(y)))) + shortcut


def zoo(name: str) -> tuple[nn.Module, Tensor]:
    """A network of either table, always the same, with an input."""
    torch.manual_seed(0)
    if name in LARGE:
        build, inputs = LARGE[name]
        return build(), inputs()
    small, shape = NETS[name]
    return small(), torch.randn(shape)


LARGE: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "resnet18": (lambda: MODELS.resnet18(num_classes=10), image()),
    "vgg11_bn": (vgg, image()),
    "densenet121": (lambda: MODELS.densenet121(num_classes=10), image()),
    "mobilenet_v2": (lambda: MODELS.mobilenet_v2(num_classes=10), image()),
    "transformer": (
        lambda: nn.Sequential(TransformerBlock(), TransformerBlock()),
        lambda: torch.randn(2, 7, 32, requires_grad=True),
    ),
    "wide": (wide, image(4)),
}


# ---- what the report says of them


SCOPES = ("layer", "value", "group")


def policy(scope: str, ratio: float = 0.5, scores: str = "weight") -> Layers:
    return Layers("systematic", ratio, scores, scope)


def convolution_backward(grad: Any, x: Any, weight: Any, _bias: Any, *how: Any, out_shape: Any = None, **_: Any) -> int:
    """Two per multiply-add of each gradient that is asked for; torch 2.13 forgets the groups of the weight's."""
    wanted = how[-1]
    return 2 * torch.Size(grad).numel() * torch.Size(weight[1:]).numel() * (int(wanted[0]) + int(wanted[1]))


def counted(model: nn.Module, x: Tensor, groups: bool) -> int:
    model.zero_grad()
    own = {torch.ops.aten.convolution_backward: convolution_backward} if groups else None
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        loss_of(model(x)).backward()
    return int(counter.get_total_flops())


def has_groups(model: nn.Module) -> bool:
    return any(getattr(module, "groups", 1) > 1 for module in model.modules())


def kept(model: nn.Module, x: Tensor) -> int:
    with Keeping([*model.parameters(), *model.buffers()]) as measured:
        output = model(x)
    del output
    return measured.bytes


def cases() -> list[Any]:
    """Half of the small networks and a transformer in one scope each; the others with ``-m slow``."""
    quick = {*zip([*NETS][::2], itertools.cycle(SCOPES)), ("transformer", SCOPES[0])}
    pairs = itertools.product([*LARGE, *NETS], SCOPES)
    return [pair if pair in quick else pytest.param(*pair, marks=pytest.mark.slow) for pair in pairs]


@pytest.mark.parametrize(("name", "scope"), cases())
def test_totals_equal_what_torch_counts(name: str, scope: str) -> None:
    """And explain predicts all of it."""
    model, x = zoo(name)
    with sdpa_kernel(SDPBackend.MATH):  # torch's counter does not see the fused attention of CPUs
        predicted = fx_approx.explain(model, policy(scope), x).report
        approx = fx_approx.transform(model, policy(scope), x)
        report = fx_approx.report(approx)
        assert report == predicted
        assert report.totals.executed.total == counted(approx, x, has_groups(model))
        assert report.totals.exact.total == counted(model, x, has_groups(model))
        assert report.totals.demanded == sum(row.demanded for row in report.rows) > 0
        assert all(row.demanded == 0 for row in report.rows if not row.demand)
        plain = fx_approx.transform(model, policy(scope), x, prune_unread=False)
        whole = fx_approx.report(plain)
        assert whole == fx_approx.explain(model, policy(scope), x, prune_unread=False).report
        assert whole.totals.executed.total == counted(plain, x, has_groups(model))
        assert whole.totals.executed.total - report.totals.executed.total == report.totals.demanded
        assert whole.totals.demanded == 0 and not any(row.demand for row in whole.rows)


@pytest.mark.parametrize("scope", thinned(["exact", *SCOPES], 3))
@pytest.mark.parametrize(
    "name",
    [
        "transformer",
        "wide",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("resnet18", "vgg11_bn", "mobilenet_v2")),
    ],
)
def test_memory_is_predicted(name: str, scope: str) -> None:
    model, x = zoo(name)
    totals = fx_approx.explain(model, Exact() if scope == "exact" else policy(scope), x).report.totals
    assert totals.memory_exact == kept(model, x)
    if scope == "exact":
        assert totals.memory == totals.memory_exact
    else:
        assert totals.memory == pytest.approx(kept(fx_approx.transform(model, policy(scope), x), x), rel=0.1)


def test_memory_falls_where_activations_outweigh_weights() -> None:
    model, x = wide(), torch.randn(16, 3, 32, 32)
    totals = fx_approx.explain(model, policy("group"), x).report.totals
    assert totals.memory_exact is not None and totals.memory is not None
    assert totals.memory < 0.65 * totals.memory_exact
    assert totals.memory == pytest.approx(kept(fx_approx.transform(model, policy("group"), x), x), rel=0.02)


class Shapes(fx.Interpreter):
    """Sizes of all values of a run."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, graph=model._fx_approx.program.graph)
        self.sizes: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.sizes[n.name] = result.nbytes
        return result


@pytest.mark.parametrize(
    "name",
    [*thinned(["transformer", *NETS, "wide"]), *thinned(["resnet18", "mobilenet_v2"])[1:]],
)
def test_sizes_of_values_are_those_of_the_running_graph(name: str) -> None:
    model, x = zoo(name)
    approx: Any = fx_approx.transform(model, policy("group"), x)
    run = Shapes(approx)
    run.run(x)
    effects = approx._fx_approx.record.effects
    specs = {key[0]: selector.spec for key, selector in approx._fx_approx.selectors.items()}
    groups = {candidate.name: candidate.groups for candidate in approx._fx_approx.record.candidates}
    units = [one.kept(specs, groups) for one in effects.classes]
    smaller = checked = 0
    for one in effects.operations:
        size = nbytes(effects.values, one.name)
        if one.name not in run.sizes or not one.axis or not size:
            continue
        checked += 1
        now, whole = entries(one.axis, units), entries(one.axis)
        smaller += now < whole
        assert run.sizes[one.name] == size * now // whole, one.name
    assert checked >= smaller > 0
    moves = {one.name: one for one in effects.operations if one.moves}
    totals = fx_approx.report(approx).totals
    assert totals.moved_exact == sum(nbytes(effects.values, name) for name in moves)
    if moves.keys() <= run.sizes.keys():
        assert totals.moved == sum(run.sizes[name] for name in moves)
    assert totals.moved is not None and totals.moved_exact is not None and totals.moved < totals.moved_exact


def test_a_producer_pays_twice_and_says_for_whom() -> None:
    """Conv -> bn -> relu -> conv at half the channels: half of the inputs times half of the outputs."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
    )
    x = torch.randn(2, 4, 5, 5)
    rules = Override({"0": Exact(), "7": Exact()}, Uniform(0.5, "systematic", scores="uniform"))
    report = fx_approx.report(fx_approx.transform(model, rules, x))
    positions = 2 * 5 * 5
    first, row, reader = report["0"], report["1"], report["4"]
    one = 2 * positions * 8 * 4 * 9
    assert first.executed == RoleFlops(one // 2, 0, one // 2), "exact, but half of its outputs"
    assert first.demand == (Demanded(("1",), 4, 8),) and first.demanded == one
    one = 2 * positions * 8 * 8 * 9
    assert row.executed == RoleFlops(one // 4, one // 4, one // 4)
    assert row.demand == (Demanded(("4",), 4, 8),) and str(row.demand[0]) == "4 4 of 8"
    assert row.demanded == 3 * one // 4
    assert row.saved == 0.75 and (row.sample().k, row.pairs) == (4, 8)
    weight = 4 * 8 * 8 * 9
    assert row.slicing == 2 * weight // 4 + weight, "slice read and written, gradient of the whole written"
    assert first.slicing == 2 * (4 * 8 * 4 * 9) // 2 + 4 * 8 * 4 * 9
    assert reader.demand == () and reader.demanded == 0 and reader.executed == RoleFlops(*[positions * 8 * 6] * 3)
    assert report.totals.slicing == sum(one.slicing for one in report.rows)
    assert (report["7"].slicing, report["7"].saved) == (0, 0.0)


def test_heads_are_the_units_of_attention() -> None:
    model, x = zoo("transformer")
    with sdpa_kernel(SDPBackend.MATH):
        report = fx_approx.report(fx_approx.transform(model, policy("value"), x))
    sample = report["0.proj"].sample()
    assert (sample.k, sample.pairs, sample.unit) == (2, 4, 8)
    assert "2 of 4 units of 8" in str(report)
    for name in ("0.q", "0.k", "0.v"):
        assert report[name].demand == (Demanded(("0.proj",), 2, 4, 8),)
        assert report[name].saved == 0.75 and report[name].sample().unit == 1
    attention = report["0.scaled_dot_product_attention"]
    assert attention.saved == 0.5 and attention.demanded == attention.executed.total
    assert attention.demand == (Demanded(("0.proj",), 2, 4),)


def test_ratios_and_switches_are_those_of_now() -> None:
    model, x = zoo("resnet18")
    approx = fx_approx.transform(model, policy("value"), x)
    before = fx_approx.report(approx)

    def told() -> fx_approx.analysis.SavingsReport:
        report = fx_approx.report(approx)
        assert report.totals.executed.total == counted(approx, x, False)
        assert report.totals.memory == pytest.approx(kept(approx, x), rel=0.1)
        return report

    fx_approx.set_sampling(approx, {"layer1.0.conv2": 0.25})
    report = told()
    assert report["layer1.0.conv1"].demand == (Demanded(("layer1.0.conv2",), 16, 64),)
    assert report["layer1.0.conv1"].saved == 0.875
    fx_approx.set_sampling(approx, enabled={"layer1.0.conv2": False})
    report = told()
    assert report["layer1.0.conv1"].demand == () and report["layer1.0.conv1"].demanded == 0
    assert (report["layer1.0.conv1"].saved, report["layer1.0.conv2"].reason) == (0.5, "switched off")
    fx_approx.set_sampling(approx, enabled={"layer2.0.conv1": False})
    report = told()
    assert report["layer2.0.downsample.0"].samples == ()
    assert "shares its selection with layer2.0.conv1, which is switched off" in report["layer2.0.downsample.0"].reason
    assert report["layer1.1.conv2"].demand == ()
    fx_approx.set_sampling(approx, enabled=True)
    approx.layer3[1].conv2.eval()
    report = told()
    assert report["layer3.1.conv1"].demand == () and report["layer3.1.conv2"].reason == "in eval()"
    approx.train()
    # The largest ratio decides for all that share.
    fx_approx.set_sampling(approx, {"layer2.0.conv1": 1.0, "layer1.0.conv2": 0.5})
    report = told()
    assert "layer2.0.conv1, whose ratio is 1" in report["layer2.0.downsample.0"].reason
    fx_approx.set_sampling(approx, 1.0)
    totals = told().totals
    assert totals.executed == totals.exact and totals.demanded == totals.slicing == totals.gathered == 0
    assert (totals.memory, totals.moved) == (totals.memory_exact, totals.moved_exact)
    fx_approx.set_sampling(approx, 0.5)
    assert told() == before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_approx.errors.BatchNormWarning)
        approx.eval()
    assert fx_approx.report(approx) == before, "what it is in training"


def test_stops_name_the_value_and_the_reason() -> None:
    model, x = zoo("resnet18")
    report = fx_approx.report(fx_approx.transform(model, policy("value"), x))
    first = "maxpool: the addition in layer1.0 reads all of it"
    assert first in report.stops
    assert "layer2.0.relu: the addition in layer2.1 reads other channels of it" in report.stops
    assert not any("bn" in stop.partition(":")[0] for stop in report.stops), "nothing stops inside a block"
    whole = "Computed whole although a reader wants a part"
    said = f"{whole}: maxpool (the addition in layer1.0 reads all of it) and {len(report.stops) - 1} others"
    assert said in " ".join(str(report).split())
    assert f"- {first}" in report.to_markdown().splitlines() and first in report.to_html()
    group = fx_approx.report(fx_approx.transform(model, policy("group"), x))
    assert group.stops == () and whole not in str(group)
    split = Override({"layer1.1.conv1": Exact()}, policy("group"))
    stops = fx_approx.report(fx_approx.transform(model, split, x)).stops
    assert any("not shared over additions, since their result is needed whole" in stop for stop in stops)


def test_many_stops_are_cut_short_in_the_text_only() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(TransformerBlock(8, 2) for _ in range(12)))
    report = fx_approx.explain(model, policy("layer"), torch.randn(2, 3, 8)).report
    assert sum(stop in str(report) for stop in report.stops) == 0 and len(report.stops) > 12
    assert report.to_dict()["stops"] == list(report.stops)
    assert all(f"- {stop}" in report.to_markdown().splitlines() for stop in report.stops)
    norms = [stop for stop in report.stops if "norm" in stop]
    assert norms and all("made by what computes all channels" in stop or "reads" in stop for stop in norms)


def test_every_format_holds_what_demand_does() -> None:
    model, x = zoo("wide")
    report = fx_approx.explain(model, policy("group"), x).report
    data = json.loads(report.to_json())
    assert data == report.to_dict()
    row = report["1.conv1"]
    found = next(one for one in data["rows"] if one["name"] == "1.conv1")
    assert found["demand"] == [{"readers": list(row.demand[0].readers), "kept": 8, "units": 16, "unit": 1}]
    assert found["demanded"] == row.demanded > 0 and found["slicing"] == row.slicing > 0
    for field in ("demanded", "slicing", "moved_exact", "moved", "gathered", "memory_exact", "memory"):
        assert data["totals"][field] == getattr(report.totals, field) is not None
    flat = {one["name"]: one for one in csv.DictReader(io.StringIO(report.to_csv()))}["1.conv1"]
    assert (flat["demanded"], flat["demand"]) == (str(row.demanded), str(row.demand[0]))
    asked = ["layer", "demand"]
    for text in (report.to_text(asked), report.to_markdown(asked), report.to_html()):
        assert "outputs read by" in text and str(row.demand[0]) in text
    assert "8 of 16 outputs" in str(report)


def test_coverage_is_of_scores_that_learn() -> None:
    model, x = zoo("pre-activation")
    assert all(row.coverage is None for row in fx_approx.explain(model, policy("value"), x).report.rows)
    approx = fx_approx.transform(model, policy("value", 0.3, "ema"), x)
    assert fx_approx.report(approx) == fx_approx.explain(model, policy("value", 0.3, "ema"), x).report
    approx(x)
    report = fx_approx.report(approx)
    assert all(row.coverage == 1 for row in report.rows if row.samples)
    resample: Any = approx._fx_approx.resample
    first = next(one for one in resample.each() if not one.exact)
    first.age[: first.units // 2] = 1000
    report = fx_approx.report(approx)
    names = {reading for reading, selector in approx._fx_approx.selectors.items() if selector in first.selectors}
    for name, role in names:
        assert role is Role.OUTPUT
        assert report[name].coverage == pytest.approx(1 - (first.units // 2) / first.units)
    assert "Chosen in the last 100 steps" in str(report)


def test_shapes_that_are_learnt_later_tell_memory_too() -> None:
    model, x = zoo("wide")
    online = Uniform(0.5, scores="online")
    approx = fx_approx.transform(model, online)
    assert fx_approx.report(approx).totals.memory is None
    approx(x)
    totals = fx_approx.report(approx).totals
    assert totals.memory == pytest.approx(kept(approx, x), rel=0.02)
    assert totals == fx_approx.explain(model, online, x).report.totals


def test_a_copy_and_a_pickle_report_the_same() -> None:
    model, x = zoo("wide")
    approx = fx_approx.transform(model, policy("group"), x)
    report = fx_approx.report(approx)
    assert fx_approx.report(copy.deepcopy(approx)) == report
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert fx_approx.report(pickle.loads(pickle.dumps(approx))) == report


def test_what_is_written_in_place_moves_memory_and_views_and_products_do_not() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Unflatten(1, (2, 4)), nn.ReLU(), nn.Flatten())
    approx = fx_approx.transform(nn.Sequential(model, nn.Linear(8, 4)), Uniform(0.5), torch.randn(3, 4))
    moves = {one.name: one.moves for one in approx._fx_approx.record.effects.operations}
    assert [moves[f"_0_{number}"] for number in range(5)] == [False, True, False, True, False]
