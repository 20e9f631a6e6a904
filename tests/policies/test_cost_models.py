"""Cost models: against sums by hand, and against a clock that is made up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fx_approx
from fx_approx import SamplerConfig
from fx_approx.compiler.transform import view_of
from fx_approx.policies import Exact, FlopModel, MeasuredModel, RooflineModel, Uniform, calibrate
from fx_approx.policies import cost_measured as measured
from fx_approx.policies import cost_roofline as roofline
from fx_approx.policies.cost_roofline import Device
from fx_approx.utils import timing
from fx_approx.utils.timing import Timing, time_calls
from tests.helpers.demand_nets import post_activation
from tests.helpers.models import Attention, Cnn

DEVICE = Device("made up", "torch.float32", 1e9, 1e8, 1e8, 1e-5, 0.5, 0.25, 0.2, 0.1)
VALUE = Uniform(0.5)


def works(model: nn.Module, policy: Any, x: Any) -> tuple[Any, Any, Any]:
    view, plan = view_of(model, policy, x)
    return view, view.work({}), view.work({decision.name: decision for decision in plan.sampled})


def two_layers(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


def test_a_roofline_by_hand() -> None:
    """Products at half of 1 GFLOP/s, the ReLU's output five times at 100 MB/s, launches at 10 us."""
    width, rows = 512, 256
    view, exact, _ = works(two_layers(width), Exact(), torch.randn(rows, width))
    cost = RooflineModel(compiled=False, device=DEVICE).step(exact, view)
    flops = (2 + 3) * 2 * rows * width * width  # the first layer has no gradient of its input
    moved = 5 * rows * width * 4
    launches = 2 * 3 + 3
    assert cost.flops == flops and cost.bytes == moved and cost.launches == launches
    assert cost.seconds == pytest.approx(flops / 0.5e9 + moved / 1e8 + launches * 1e-5)
    compiled = RooflineModel(compiled=True, device=DEVICE).step(exact, view)
    assert compiled.seconds == pytest.approx(flops / 0.5e9 + 0.6 * moved / 1e8 + 7e-5)


def test_few_rows_are_bound_by_the_weights() -> None:
    """One row: the bytes of the weight, and not the operations, take the time."""
    width = 512
    _, exact, _ = works(two_layers(width), Exact(), torch.randn(1, width))
    product = exact.products[1]
    weight = width * width * 4
    assert RooflineModel(device=DEVICE).product(product, DEVICE) == pytest.approx(3 * (weight + 2 * width * 4) / 1e8)


def test_a_decision_changes_what_its_neighbours_cost() -> None:
    """Sampling the second layer makes the first one cheaper, in all models."""
    view, plan = view_of(two_layers(512), Exact(), torch.randn(256, 512))
    spec = SamplerConfig("topk", 0.5, scores="weight")
    sampled = view.work({"2": dataclasses.replace(plan["2"], roles={"output": spec}, scope="value")})
    assert sampled.products[0].flops == view.work({}).products[0].flops // 2
    model = RooflineModel(device=DEVICE)
    now, before = (model.product(one.products[0], DEVICE) for one in (sampled, view.work({})))
    assert now == pytest.approx(before / 2)


def test_flops_of_the_whole() -> None:
    view, exact, sampled = works(post_activation(), VALUE, torch.randn(2, 3, 8, 8))
    assert FlopModel().step(exact, view).flops == exact.flops_exact
    assert FlopModel().step(sampled, view).flops == sampled.flops + sampled.selection_flops
    assert FlopModel().step(sampled, view).seconds is None


def test_kinds_of_convolutions_and_what_each_model_leaves_out() -> None:
    layers = {
        "conv": nn.Conv2d(8, 8, 3, groups=2),
        "pointwise": nn.Conv2d(8, 8, 1),
        "depthwise": nn.Conv2d(8, 8, 3, groups=8),
    }
    for kind, layer in layers.items():
        view, *_ = works(nn.Sequential(layer), Exact(), torch.randn(2, 8, 5, 5))
        assert roofline._kind(view.candidates[0]) == kind
    assert all(len(model.omits) > 10 for model in (FlopModel(), RooflineModel(), MeasuredModel()))


def clock(monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[int]:
    """Every product takes ``seconds``; the list counts how many were timed together."""
    asked: list[int] = []

    def fake(calls: Sequence[Callable[[], Any]], device: torch.device) -> list[Timing]:
        asked.append(len(calls))
        for call in calls:
            call()
        return [Timing(seconds, 0.0) for _ in calls]

    monkeypatch.setattr(measured, "time_calls", fake)
    return asked


class Stub:
    """A graph whose exact step takes a second."""

    fingerprint, runs = "stub", True

    def __init__(self, candidates: Any) -> None:
        self.candidates, self.timed = candidates, 0

    def with_tokens(self, tokens: Any) -> Stub:
        return self

    def time(self, plans: Any, *, compiled: bool, repeats: int = 7) -> list[Any]:
        self.timed += 1
        return [fx_approx.core.step_cost.StepTime(1.0, (1.0, 1.0, 1.0))]


def test_measured_products_and_the_rest_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """All products take 10 ms whatever their size, so what is left of the second shrinks with the bytes moved."""
    monkeypatch.setattr(roofline, "calibrate", lambda *args: DEVICE)
    roofline._devices.clear()
    clock(monkeypatch, 0.01)
    view, exact, sampled = works(post_activation(), VALUE, torch.randn(2, 3, 8, 8))
    model, stub = MeasuredModel(compiled=False), Stub(view.candidates)
    count = len(exact.products)
    assert model.step(exact, stub).seconds == pytest.approx(1.0)
    now = model.step(sampled, stub).seconds
    chosen = sum(bool(product.roles) for product in sampled.products)
    extra = (4 * sampled.gathered + 2 * sampled.selection_flops) / 1e8 + chosen * 6e-5
    extra += roofline.slicing_seconds(sampled, DEVICE)
    rest = (1.0 - 0.01 * count) * sampled.moved / sampled.moved_exact
    assert now == pytest.approx(0.01 * count + rest + extra)
    assert stub.timed == 1
    roofline._devices.clear()


def test_each_product_is_timed_once_for_all_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FX_APPROX_CACHE", str(tmp_path))
    monkeypatch.setattr(roofline, "calibrate", lambda *args: DEVICE)
    asked = clock(monkeypatch, 0.01)
    view, _, sampled = works(post_activation(), VALUE, torch.randn(2, 3, 8, 8))
    first = MeasuredModel(compiled=False).step(sampled, Stub(view.candidates))
    assert asked
    asked.clear()
    again = MeasuredModel(compiled=False)
    assert again.step(sampled, Stub(view.candidates)) == first and not asked
    wider, _, other = works(post_activation(), VALUE, torch.randn(2, 3, 10, 10))
    again.step(other, Stub(wider.candidates))
    assert asked  # changed shapes are measured anew
    roofline._devices.clear()


@pytest.mark.parametrize(
    ("make", "policy", "x", "compiled"),
    [
        (post_activation, VALUE, torch.randn(2, 3, 8, 8), True),
        (post_activation, Uniform(0.5, "systematic", scores="online"), torch.randn(2, 3, 8, 8), False),
        (Cnn, Uniform(0.5, scope="group"), torch.randn(2, 3, 8, 8), False),
        (Attention, Uniform(0.5, scores="online"), torch.randn(2, 5, 8), False),
        (lambda: two_layers(16), Uniform(0.5, scores="online"), torch.randn(4, 16), True),
    ],
)
def test_all_kinds_of_products_can_be_run(
    make: Callable[[], nn.Module], policy: Any, x: Any, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline, "calibrate", lambda *args: DEVICE)
    clock(monkeypatch, 0.01)
    view, _, sampled = works(make(), policy, x)
    assert MeasuredModel(compiled).step(sampled, Stub(view.candidates)).seconds > 0
    roofline._devices.clear()


def test_the_sliced_product_has_the_operations_of_the_report() -> None:
    """What is timed for a hoisted layer is the product that the layer is left with."""
    from torch.utils.flop_counter import FlopCounterMode

    _, _, sampled = works(post_activation(), VALUE, torch.randn(2, 3, 8, 8))
    for product in sampled.products:
        call = measured._training(product, False)
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == product.flops, product.candidate.name


def test_calibration_is_kept_and_printed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FX_APPROX_CACHE", str(tmp_path))
    made: list[torch.dtype] = []

    def fake(device: torch.device, dtype: torch.dtype, name: str) -> Device:
        made.append(dtype)
        return dataclasses.replace(DEVICE, dtype=str(dtype))

    monkeypatch.setattr(roofline, "_measure", fake)
    assert calibrate() == calibrate("cpu", torch.float32) and made == [torch.float32]
    assert calibrate(dtype=torch.bfloat16).dtype == "torch.bfloat16"
    calibrate(again=True)
    assert made == [torch.float32, torch.bfloat16, torch.float32]
    assert "0.001 TFLOP/s, 0.1 GB/s, 0.1 GB/s in slices of weights, 10 us a launch" in str(
        calibrate()
    ) and "linear 50 %" in str(calibrate())


@pytest.mark.slow
def test_a_calibration() -> None:
    found = calibrate()
    assert found.peak > 1e9 and found.bandwidth > 1e8 and 0 < found.launch < 1e-3
    assert all(0 < share < 1.5 for share in (found.linear, found.conv, found.pointwise, found.depthwise))


def test_timing_goes_on_until_the_clock_is_sure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise is repeated 25 times, a quiet clock 5 times; the spread is told."""
    values = iter([1.0] * 2 + [1.0, 2.0] * 13)
    monkeypatch.setattr(timing, "seconds", lambda call, device, count=1, *_: next(values))
    (noisy,) = time_calls([lambda: None], torch.device("cpu"))
    assert noisy.spread > 0.3 and len(list(values)) == 1
    taken: list[int] = []
    monkeypatch.setattr(timing, "seconds", lambda call, device, count=1, *_: taken.append(count) or 1e-3)
    (quiet,) = time_calls([lambda: None], torch.device("cpu"))
    assert quiet == Timing(1e-3, 0.0) and taken == [1, 1, *[2] * 5]


def test_what_a_time_depends_on() -> None:
    key = timing.device_key(torch.device("cpu"))
    assert key["threads"] == torch.get_num_threads() and key["torch"] == torch.__version__ and key["name"]


def test_slices_of_linear_layers_are_taken_twice() -> None:
    """Forward and, where the layer is hoisted, backward again: three times the slice, and the whole gradient."""
    view, plan = view_of(two_layers(64), Exact(), torch.randn(8, 64))
    spec = SamplerConfig("topk", 0.5, scores="weight")
    work = view.work({"2": dataclasses.replace(plan["2"], roles={"output": spec}, scope="value")})
    whole, half = 64 * 64 * 4, 64 * 32 * 4
    assert work.slicing == 2 * (2 * half + whole)
    assert roofline.slicing_seconds(work, DEVICE) == pytest.approx(2 * (4 * half + whole) / 1e8)
