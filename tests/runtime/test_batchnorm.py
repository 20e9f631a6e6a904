"""BatchNorm: statistics gathered while sampling are re-estimated, and a model that was not warns once."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_approx
from fx_approx.policies import Uniform
from tests.helpers.models import Cnn, mlp, same, train_step

HALF = Uniform(0.5, scores="online")


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn, self.drop, self.fc2 = (
            nn.Linear(12, 16),
            nn.BatchNorm1d(16),
            nn.Dropout(0.5),
            nn.Linear(16, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(self.bn(self.fc1(x))))


def batches(count: int = 5) -> list[Tensor]:
    return [torch.randn(8, 12) + i for i in range(count)]


def trained(steps: int = 3) -> Any:
    approx = fx_approx.transform(Normed(), HALF)
    for _ in range(steps):
        train_step(approx, torch.randn(8, 12))
    return approx


def test_the_statistics_are_the_average_over_exact_batches() -> None:
    approx, data = trained(), batches()
    assert fx_approx.recalibrate_batchnorm(approx, data) == 5
    hidden = [torch.nn.functional.linear(x, approx.fc1.weight, approx.fc1.bias).detach() for x in data]
    torch.testing.assert_close(approx.bn.running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0))
    torch.testing.assert_close(approx.bn.running_var, torch.stack([h.var(0) for h in hidden]).mean(0))


@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "dict", "generator"])
def test_forms_of_batches(form: str) -> None:
    approx, data = trained(), batches()
    twin = copy.deepcopy(approx)
    fx_approx.recalibrate_batchnorm(twin, data)
    labels = torch.zeros(8)
    given: Any = {
        "tensor": data,
        "tuple": [(x, labels) for x in data],
        "list": [[x, labels] for x in data],
        "dict": [{"x": x} for x in data],
        "generator": (x for x in data),
    }[form]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_approx.errors.CaptureWarning)
        fx_approx.recalibrate_batchnorm(approx, given)
    assert same(dict(approx.state_dict()), dict(twin.state_dict()))


def test_flags_momenta_switches_gradients_and_randomness_are_as_before() -> None:
    approx = fx_approx.transform(Normed(), Uniform(0.5, "systematic", scores="online"))
    train_step(approx, torch.randn(8, 12))
    approx.fc2.eval()
    approx.bn.momentum = 0.03
    flags = {name: module.training for name, module in approx.named_modules()}
    state, generator = fx_approx.sampler_state_dict(approx), torch.get_rng_state()
    grads = [p.grad for p in approx.parameters()]
    data = batches()
    torch.set_rng_state(generator)
    fx_approx.recalibrate_batchnorm(approx, data)
    assert {name: module.training for name, module in approx.named_modules()} == flags
    assert approx.bn.momentum == 0.03
    assert fx_approx.sampler_state_dict(approx) == state
    assert torch.equal(torch.get_rng_state(), generator), "dropout is off"
    assert same([p.grad for p in approx.parameters()], grads)


def test_without_batches_the_statistics_stay() -> None:
    approx = trained()
    before = copy.deepcopy(approx.state_dict())
    with pytest.raises(ValueError, match="batches: expected at least one"):
        fx_approx.recalibrate_batchnorm(approx, [])
    assert same(dict(approx.state_dict()), dict(before))


def test_after_an_error_in_a_batch_everything_is_as_before() -> None:
    approx = trained()
    before = copy.deepcopy(approx.state_dict())
    with pytest.raises(RuntimeError):
        fx_approx.recalibrate_batchnorm(approx, [torch.randn(8, 12), torch.randn(8, 13)])
    assert same(dict(approx.state_dict()), dict(before))
    assert approx.training and approx.bn.momentum == 0.1
    with pytest.warns(fx_approx.errors.BatchNormWarning):
        approx.eval()


def test_recalibrating_any_other_model() -> None:
    model, data = Normed(), batches()
    twin = fx_approx.transform(copy.deepcopy(model), HALF)
    fx_approx.recalibrate_batchnorm(model, data)
    fx_approx.recalibrate_batchnorm(twin, data)
    assert same(dict(model.state_dict()), dict(twin.state_dict()))


def test_recalibrating_a_cnn_makes_evaluation_equal_the_exact_model() -> None:
    model = Cnn()
    approx = fx_approx.transform(model, HALF)
    x = torch.randn(8, 3, 8, 8)
    train_step(approx, x)
    fx_approx.recalibrate_batchnorm(approx, [x])
    assert int(model.bn1.num_batches_tracked) == 1  # type: ignore[arg-type]
    assert torch.equal(approx.eval()(x), model.eval()(x))


def test_a_model_that_sampled_warns_once() -> None:
    approx = trained()
    with pytest.warns(fx_approx.errors.BatchNormWarning, match="recalibrate_batchnorm") as seen:
        approx.eval()
        approx.train()
        approx.eval()
    assert len(seen) == 1 and seen[0].filename == __file__


def test_no_warning_before_any_training_step() -> None:
    fx_approx.transform(Normed(), HALF).eval()


def test_no_warning_without_batchnorm() -> None:
    approx = fx_approx.transform(mlp(), HALF)
    train_step(approx, torch.randn(6, 12))
    approx.eval()


def test_no_warning_for_statistics_that_are_not_tracked() -> None:
    model = Normed()
    model.bn = nn.BatchNorm1d(16, track_running_stats=False)
    approx = fx_approx.transform(model, HALF)
    train_step(approx, torch.randn(6, 12))
    approx.eval()


def test_no_warning_for_an_exact_model() -> None:
    approx = fx_approx.transform(Normed(), Uniform(1.0, scores="online"))
    train_step(approx, torch.randn(6, 12))
    approx.eval()


def test_no_warning_for_statistics_of_exact_training_before_the_transform() -> None:
    """Fine-tuning: a pretrained model is transformed and evaluated at once."""
    model = Normed()
    train_step(model, torch.randn(6, 12))
    fx_approx.transform(model, HALF).eval()


def test_no_warning_after_recalibration_until_the_next_sampled_step() -> None:
    approx = trained()
    fx_approx.recalibrate_batchnorm(approx, batches())
    approx.eval()
    approx.train()
    train_step(approx, torch.randn(6, 12))
    with pytest.warns(fx_approx.errors.BatchNormWarning):
        approx.eval()


@pytest.mark.parametrize("exact_steps, warned", [(19, True), (20, False)])
def test_an_exact_tail_of_20_batches_mends_the_statistics(exact_steps: int, warned: bool) -> None:
    approx = trained()
    fx_approx.set_sampling(approx, enabled=False)
    for _ in range(exact_steps):
        train_step(approx, torch.randn(6, 12))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        approx.eval()
    assert [w.category for w in seen] == [fx_approx.errors.BatchNormWarning] * warned


def test_sampling_again_after_an_exact_tail_warns() -> None:
    approx = trained()
    fx_approx.set_sampling(approx, enabled=False)
    for _ in range(20):
        train_step(approx, torch.randn(6, 12))
    fx_approx.set_sampling(approx, enabled=True)
    train_step(approx, torch.randn(6, 12))
    with pytest.warns(fx_approx.errors.BatchNormWarning):
        approx.eval()


def test_ratio_one_for_the_tail_counts_as_exact() -> None:
    approx = trained()
    fx_approx.set_sampling(approx, 1.0)
    for _ in range(20):
        train_step(approx, torch.randn(6, 12))
    approx.eval()


@pytest.mark.parametrize("how", ["enabled", "ratio"])
def test_switching_to_exact_alone_mends_nothing(how: str) -> None:
    approx = trained()
    if how == "enabled":
        fx_approx.set_sampling(approx, enabled=False)
    else:
        fx_approx.set_sampling(approx, 1.0)
    with pytest.warns(fx_approx.errors.BatchNormWarning):
        approx.eval()


def test_a_short_exact_spell_does_not_hide_the_sampled_steps_before_it() -> None:
    approx = trained()
    fx_approx.set_sampling(approx, enabled=False)
    fx_approx.set_sampling(approx, enabled=True)
    with pytest.warns(fx_approx.errors.BatchNormWarning):
        approx.eval()


def test_a_warm_up_of_exact_steps_does_not_warn() -> None:
    approx = fx_approx.transform(Normed(), HALF)
    fx_approx.set_sampling(approx, enabled=False)
    for _ in range(3):
        train_step(approx, torch.randn(6, 12))
    approx.eval()
    approx.train()
    fx_approx.set_sampling(approx, enabled=True)
    approx.eval()
    approx.train()
    train_step(approx, torch.randn(6, 12))
    with pytest.warns(fx_approx.errors.BatchNormWarning):
        approx.eval()


def test_the_warning_comes_also_through_a_wrapper() -> None:
    approx = trained()
    wrapper = nn.Sequential(approx)
    with pytest.warns(fx_approx.errors.BatchNormWarning):
        wrapper.eval()


def test_frozen_batchnorm_does_not_warn() -> None:
    """Fine-tuning with BatchNorm in eval(): the statistics are those of the pretraining."""
    model = Normed()
    train_step(model, torch.randn(6, 12))
    approx = fx_approx.transform(model, HALF)
    approx.bn.eval()
    train_step(approx, torch.randn(6, 12))
    approx.eval()
