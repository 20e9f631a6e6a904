"""gradient_noise in use: its arguments, wrappers, mixed precision; the report as table, numbers and figure."""

from __future__ import annotations

import copy
import functools
import json
import math
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fx_approx
from fx_approx.analysis import NoiseReport, gradient_noise
from fx_approx.core.candidates import Role
from fx_approx.core.plan import Policy
from fx_approx.policies import GradientSampling, Override, Uniform
from tests.helpers.models import Checkpointed, Cnn, WithDataDependent, loss_of, mlp, same
from tests.helpers.modules import made_of


def transform(model: nn.Module, policy: Policy) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_approx.errors.CaptureWarning)
        return fx_approx.transform(model.double(), policy)


class Output(nn.Module):
    """Returns its loss as libraries do."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.fc, self.form = nn.Linear(6, 3), form

    def forward(self, x: Tensor) -> Any:
        y = self.fc(x)
        loss = y.square().sum()
        return {"scalar": loss, "entry": {"loss": loss}, "one": loss.view(1), "logits": y, "none": {"y": y}}[self.form]


def output(form: str) -> nn.Module:
    torch.manual_seed(0)
    return transform(Output(form), GradientSampling.backward(0.5))


def test_loss_and_batch_come_in_several_forms() -> None:
    x = torch.randn(4, 6).double()
    reports = [gradient_noise(output(form), x) for form in ("scalar", "entry", "one")]
    reports += [gradient_noise(output("logits"), batch, lambda y: y.square().sum()) for batch in ((x,), [x], {"x": x})]
    assert len({report.to_json() for report in reports}) == 1


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "draws 0": (
        lambda: gradient_noise(output("one"), torch.ones(1), draws=0),
        ValueError,
        "draws: .* at least 1, got 0",
    ),
    "draws True": (lambda: gradient_noise(output("one"), torch.ones(1), draws=True), TypeError, "integer, got True"),
    "draws 1.5": (lambda: gradient_noise(output("one"), torch.ones(1), draws=1.5), TypeError, "integer, got 1.5"),
    "loss": (lambda: gradient_noise(output("one"), torch.ones(1), "mse"), TypeError, "loss: expected a func.*'mse'"),
    "model": (lambda: gradient_noise(mlp(), torch.ones(1, 12)), ValueError, "Sequential is not a transformed model"),
    "eval": (lambda: gradient_noise(output("one").eval(), torch.ones(1, 6)), ValueError, r"Output is in eval\(\)"),
    "frozen": (
        lambda: gradient_noise(output("one").requires_grad_(False), torch.ones(1, 6)),
        ValueError,
        "no parameter of Output requires a gradient",
    ),
    "no scalar": (
        lambda: gradient_noise(output("logits"), ones()),
        ValueError,
        r"output is a tensor of shape \(2, 3\)",
    ),
    "no loss": (
        lambda: gradient_noise(output("none"), ones()),
        ValueError,
        "output is dict without a scalar loss; give",
    ),
    "bad loss": (
        lambda: gradient_noise(output("logits"), ones(), lambda y: y),
        ValueError,
        r"it to return .* \(2, 3\)",
    ),
    "no tensor": (lambda: gradient_noise(output("logits"), ones(), lambda y: 1.5), ValueError, "tensor, got float"),
    "detached": (
        lambda: gradient_noise(output("logits"), ones(), lambda y: y.detach().sum()),
        ValueError,
        "loss: it depends on no parameter",
    ),
    "input only": (
        lambda: gradient_noise(output("logits"), ones(), lambda y: torch.ones((), requires_grad=True) * 2),
        ValueError,
        "loss: it depends on no parameter",
    ),
    "reentrant": (
        lambda: gradient_noise(
            transform(Checkpointed(True), GradientSampling.backward(0.5)), torch.ones(2, 12).double(), loss_of
        ),
        RuntimeError,
        "use_reentrant=True",
    ),
}


def ones() -> Tensor:
    return torch.ones(2, 6, dtype=torch.float64)


@pytest.mark.parametrize("case", BAD)
def test_errors_say_what_would_be_right(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


class Wrapper(nn.Module):
    """A user's module around a transformed one."""

    def __init__(self, model: nn.Module, checkpointed: bool) -> None:
        super().__init__()
        self.model, self.checkpointed = model, checkpointed

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.model, x, use_reentrant=False) if self.checkpointed else self.model(x)


@pytest.mark.parametrize("build", [mlp, WithDataDependent])
@pytest.mark.parametrize(
    "policy", [Uniform(0.5, "systematic", scores="online"), GradientSampling.weight_gradient(scores="ema")]
)
def test_wrappers_and_checkpoints_change_no_number(build: Callable[[], nn.Module], policy: Policy) -> None:
    approx, x = transform(build(), policy), torch.randn(6, 12).double()
    plain = gradient_noise(approx, x, loss_of, draws=3)
    for wrapped in (Wrapper(approx, True), Wrapper(approx, False)):
        report = gradient_noise(wrapped, x, loss_of, draws=3)
        assert report.rows == plain.rows and report.step == plain.step
        assert list(report.parameters) == [f"model.{name}" for name in plain.parameters]


def test_compiled_models_run_eagerly() -> None:
    approx, x = transform(mlp(), Uniform(0.5, "systematic", scores="online")), torch.randn(6, 12).double()
    plain = gradient_noise(approx, x, loss_of, draws=3)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(approx, backend=counter)
    assert gradient_noise(compiled, x, loss_of, draws=3) == plain
    assert gradient_noise(Wrapper(compiled, False), x, loss_of, draws=3).rows == plain.rows
    assert counter.frame_count == 0
    compiled(x)
    assert counter.frame_count == 1


def test_a_model_that_got_hooks_is_measured_as_it_trains() -> None:
    """Its graph does not serve it then: the module frontend does, from the model's own Python."""
    seen: list[int] = []
    approx, x = transform(nn.Sequential(mlp(), nn.Tanh()), GradientSampling.backward(0.5)), torch.randn(6, 12).double()
    plain = gradient_noise(approx, x, loss_of, draws=3)
    approx[0].register_forward_hook(lambda *_: seen.append(1))
    hooked = gradient_noise(approx, x, loss_of, draws=3)
    assert seen == [1] * 4 and hooked.rows == plain.rows and hooked.step == plain.step
    with pytest.warns(fx_approx.errors.CaptureWarning, match="got hooks"):
        approx(x)


def test_bfloat16_autocast() -> None:
    """The same products in bfloat16, and steps that are those of training under autocast."""
    torch.manual_seed(0)
    approx, x = fx_approx.transform(mlp(), GradientSampling.backward(0.5)), torch.randn(16, 12)
    plain = gradient_noise(approx, x, lambda y: y.square().sum(), draws=8)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gradient_noise(approx, x, lambda y: y.float().square().sum(), draws=8)
        assert torch.is_autocast_enabled("cpu")
    assert mixed.step.error != plain.step.error
    for role in (Role.GRAD_INPUT, Role.GRAD_WEIGHT):
        one, two = mixed["2"].of(role), plain["2"].of(role)
        assert one.error == pytest.approx(two.error, rel=0.1) and one.norm == pytest.approx(two.norm, rel=0.05)
        assert not one.biased and one.floor > two.floor / 2
    taken = []
    for model in (approx, transform_off(approx)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().square().sum()
        loss.backward()
        taken.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    with torch.autocast("cpu", torch.bfloat16):
        fx_approx.load_sampler_state_dict(approx, {"step": 0, "selection_interval": 1, "seed": 0})
        one_step = gradient_noise(approx, x, lambda y: y.float().square().sum(), draws=1).step
    assert one_step.norm == pytest.approx(taken[1].norm().item())
    assert one_step.error == pytest.approx(((taken[0] - taken[1]).norm() / taken[1].norm()).item(), rel=1e-4)
    assert one_step.cosine == pytest.approx(torch.cosine_similarity(*taken, dim=0).item(), rel=1e-4)


@made_of(lambda: {"fc1": nn.Linear(12, 12), "fc2": nn.Linear(12, 4)})
def LeavesAutocast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return self.fc2(self.fc1(x).relu())


def test_a_part_without_autocast_is_measured_without() -> None:
    torch.manual_seed(0)
    with pytest.warns(fx_approx.errors.CaptureWarning):
        approx = fx_approx.transform(LeavesAutocast(), GradientSampling.backward(0.5))
    x = torch.randn(6, 12)
    plain = gradient_noise(approx, x, lambda y: y.square().sum(), draws=3)
    with torch.autocast("cpu", torch.bfloat16):
        assert gradient_noise(approx, x, lambda y: y.square().sum(), draws=3) == plain


def transform_off(model: nn.Module) -> nn.Module:
    off = copy.deepcopy(model)
    fx_approx.set_sampling(off, enabled=False)
    return off


def test_one_random_draw_says_nothing_of_the_bias() -> None:
    report = gradient_noise(
        transform(mlp(), GradientSampling.backward(0.5)), torch.randn(6, 12).double(), loss_of, draws=1
    )
    assert report.step.floor is None and report.step.biased is None and report["2"].grad_weight.biased is None
    assert str(report).splitlines()[4].split()[-1] == "?"


def test_what_rounding_leaves_of_zero_is_not_called_biased() -> None:
    """The gradient of a bias in front of a BatchNorm is 0; in float32, some rounding errors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    for policy in (
        GradientSampling.backward(0.5),
        GradientSampling.weight_gradient(0.3),
        Uniform(0.5, "systematic", scores="online"),
    ):
        report = gradient_noise(fx_approx.transform(model, policy), torch.randn(16, 3, 8, 8), loss_of)
        assert report.parameters["0.bias"].norm < 1e-5 * report.step.norm
        assert report.parameters["0.bias"].biased is False


@functools.cache
def mixed_report() -> NoiseReport:
    """A biased and an unbiased layer; draws of both."""
    torch.manual_seed(0)
    approx = transform(Cnn(), Override({"conv2": Uniform(0.5, scores="online")}, GradientSampling.backward(0.5)))
    return gradient_noise(approx, torch.randn(8, 3, 8, 8).double(), lambda y: y.square().sum())


def test_the_table_says_what_the_numbers_say() -> None:
    report = mixed_report()
    text = report.to_text()
    assert str(report) == text and "conv2.weight" not in report.to_text(parameters=False)
    layers, parameters, summary = text.split("\n\n")
    cells = {line.split()[0]: line for line in layers.splitlines()}
    assert cells["layer"].split()[-3:] == ["out", "dX", "dW"]
    row = report["conv2"]
    wanted = [f"{row.of(role).error:.3g}" for role in Role] + [f"{row.of(role).snr_db:.1f}" for role in Role]
    assert cells["conv2"].split() == ["conv2", "topk/online", "0.5", *wanted, *["bias", "only*"] * 3]
    noise = report["fc"].grad_input
    ratio = f"{noise.bias / noise.floor:.1f}"
    assert "exact" in cells["fc"] and f"{noise.error:.3g}" in cells["fc"] and ratio in cells["fc"]
    last = parameters.splitlines()[-1].split()
    assert last[:2] == ["all", f"{report.step.norm:.3g}"] and f"{report.step.cosine:.3f}" in last
    assert "Cnn, whole step (16 draws): error" in summary and "* bias above 3 times" in summary


def test_numbers_are_plain_json() -> None:
    report = mixed_report()
    values = json.loads(report.to_json())
    assert values == report.to_dict() and same(list(values["parameters"]), list(report.parameters))
    assert values["rows"][0]["output"]["snr"] is None, "infinite: JSON has no such number"
    row = next(row for row in values["rows"] if row["name"] == "conv2")
    assert row["grad_weight"]["error"] == report["conv2"].grad_weight.error and row["output"]["biased"] is True
    assert report["conv2"].of("output") is report["conv2"].output and math.isinf(report["fc"].output.snr_db)
    with pytest.raises(ValueError, match="'weight'"):
        report["conv2"].of("weight")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:matplotlib.*", "ignore::PendingDeprecationWarning")
def test_the_figure_marks_each_error(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = mixed_report()
    path = tmp_path / "noise.png"
    figure = report.plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    (axes,) = figure.axes
    marks = sorted(float(line.get_xdata()[0]) for line in axes.get_lines())
    noises = [row.of(role) for row in report.rows for role in Role]
    assert marks == sorted(noise.error for noise in noises if noise is not None and noise.error)
    assert [label.get_text() for label in axes.get_yticklabels()] == [row.label for row in report.rows]
    hollow = [line for line in axes.get_lines() if line.get_markerfacecolor() == "white"]
    assert len(hollow) == sum(noise is not None and bool(noise.biased) for noise in noises)
    assert f"{report.step.cosine:.3f}" in figure.get_suptitle()


@pytest.mark.slow
def test_the_code_in_the_docs_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    text = (Path(__file__).resolve().parents[2] / "docs" / "noise.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, "docs/noise.md", "exec"), names)
    said = capsys.readouterr().out
    first, *_, last = said.splitlines()
    # Widths of columns follow from digits, which differ from one processor to another.
    assert first.startswith("layer    sampled") and first.split() in map(str.split, text.splitlines())
    assert "cosine" in last


def test_without_matplotlib_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    report = mixed_report()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"NoiseReport\.plot needs matplotlib.*: pip install matplotlib"):
        report.plot()
