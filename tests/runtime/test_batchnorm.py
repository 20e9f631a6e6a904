"""BatchNorm: statistics gathered while sampling are re-estimated, and a model that was not warns once."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

import fx_approx
from fx_approx.policies import GradientSampling, Uniform
from fx_approx.runtime.narrow_layers import NarrowBatchNorm1d
from fx_approx.sampling import Selection
from fx_approx.schedules import Constant, ExactTail, ExactWarmup, PlanRatios, Schedule
from tests.helpers.models import Cnn, mlp, same, train_step
from tests.helpers.modules import made_of

HALF = Uniform(0.5, scores="online")


@made_of(lambda: {"fc1": nn.Linear(12, 16), "bn": nn.BatchNorm1d(16), "drop": nn.Dropout(0.5), "fc2": nn.Linear(16, 4)})
def Normed(self: Any, x: Tensor) -> Tensor:
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


# What happened: so many training steps, a switch, a ratio, an evaluation or a recalibration; whether eval() then warns.
LIVES: list[tuple[tuple[Any, ...], bool]] = [
    ((), False),
    ((3,), True),
    ((3, "recalibrated"), False),
    ((3, "recalibrated", "evaluated", 1), True),
    ((3, False, 19), True),
    ((3, False, 20), False),  # an exact tail mends the statistics
    ((3, False, 20, True, 1), True),
    ((3, 1.0, 20), False),
    ((3, False), True),  # to switch to exact alone mends nothing
    ((3, 1.0), True),
    ((3, False, True), True),
    ((False, 3, "evaluated", True, "evaluated"), False),
    ((False, 3, "evaluated", True, "evaluated", 1), True),
]


@pytest.mark.parametrize(("life", "warned"), LIVES)
def test_it_warns_of_statistics_that_were_gathered_while_sampling(life: tuple[Any, ...], warned: bool) -> None:
    approx = fx_approx.transform(Normed(), HALF)
    for part in life:
        if isinstance(part, bool):
            fx_approx.set_sampling(approx, enabled=part)
        elif isinstance(part, int):
            for _ in range(part):
                train_step(approx, torch.randn(6, 12))
        elif isinstance(part, float):
            fx_approx.set_sampling(approx, part)
        elif part == "evaluated":
            approx.eval()
            approx.train()
        else:
            fx_approx.recalibrate_batchnorm(approx, batches())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        approx.eval()
    assert [w.category for w in seen] == [fx_approx.errors.BatchNormWarning] * warned


def untracked() -> nn.Module:
    model = Normed()
    model.bn = nn.BatchNorm1d(16, track_running_stats=False)
    return model


@pytest.mark.parametrize(
    ("build", "policy"), [(mlp, HALF), (untracked, HALF), (Normed, Uniform(1.0, scores="online", scope="layer"))]
)
def test_no_warning_where_sampling_reaches_no_statistics(build: Callable[[], nn.Module], policy: Uniform) -> None:
    approx = fx_approx.transform(build(), policy)
    train_step(approx, torch.randn(6, 12))
    approx.eval()


def test_no_warning_for_statistics_of_exact_training_before_the_transform() -> None:
    """Fine-tuning: a pretrained model is transformed and evaluated at once."""
    model = Normed()
    train_step(model, torch.randn(6, 12))
    fx_approx.transform(model, HALF).eval()


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


# ---- torch's ``update_bn`` of a transformed model, and tails long enough for the statistics


BATCHES = [torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(i)) for i in range(4)]
VALUE = Uniform(0.5)
POLICIES = {
    "value": VALUE,
    "online": Uniform(0.5, scores="online"),
    "learnt": Uniform(0.5, "systematic", scores="ema", scope="group"),
}


class Net(nn.Module):
    def __init__(self, momentum: float | None = 0.1, rows: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 4)
        self.n, self.m = nn.BatchNorm2d(16, momentum=momentum), nn.BatchNorm2d(16, momentum=momentum)
        self.drop, self.rows = nn.Dropout(0.2), rows

    def forward(self, x: Tensor) -> Tensor:
        if self.rows:  # not traced
            x = torch.stack([row for row in x])
        x = self.drop(self.n(self.a(x)).relu())
        return self.c(self.m(self.b(x)).relu().mean((2, 3)))


def step(model: nn.Module, x: Tensor) -> None:
    model(x).square().sum().backward()


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_buffers())


@pytest.mark.filterwarnings("ignore::fx_approx.errors.CaptureWarning")
@pytest.mark.parametrize(("policy", "rows"), [("value", False), ("online", True), ("learnt", False)])
def test_update_bn_of_an_averaged_model_gives_the_statistics_of_the_plain_one(policy: str, rows: bool) -> None:
    torch.manual_seed(0)
    approx = fx_approx.transform(Net(rows=rows), POLICIES[policy], BATCHES[0])
    averaged = AveragedModel(approx)
    for x in BATCHES:
        step(approx, x)
        averaged.update_parameters(approx)
    plain = Net()
    plain.load_state_dict(averaged.module.state_dict())
    before = fx_approx.sampler_state_dict(averaged)
    for model in (averaged, plain):
        torch.manual_seed(1)  # dropout is on, as in update_bn of any model
        update_bn(BATCHES, model)
    assert same(statistics(averaged.module), statistics(plain))
    assert fx_approx.sampler_state_dict(averaged) == before
    averaged.eval()  # and no warning
    averaged.train()
    averaged(BATCHES[1])  # the first step of learnt scores is exact
    torch.manual_seed(2)
    sampled = averaged(BATCHES[0])
    torch.manual_seed(2)
    assert not torch.allclose(sampled, plain(BATCHES[0])), "training goes on sampled"
    with pytest.warns(fx_approx.errors.BatchNormWarning):
        averaged.eval()


def test_forwards_without_gradients_are_sampled_all_the_same() -> None:
    """A reentrant checkpoint runs its forward without gradients, and recomputes it with the same sample."""
    torch.manual_seed(0)
    net = Net()
    net.drop.p = 0.0
    approx = fx_approx.transform(net, VALUE, BATCHES[0])
    other = copy.deepcopy(approx)
    x, y = (BATCHES[0].clone().requires_grad_() for _ in range(2))
    result = checkpoint(approx, x, use_reentrant=True)
    expected = other(y)
    assert torch.equal(result, expected) and not torch.equal(result, copy.deepcopy(net)(x))
    result.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    with torch.no_grad():
        assert not torch.allclose(approx(BATCHES[1]), copy.deepcopy(fx_approx.restore(approx))(BATCHES[1]))


def test_a_narrowed_layer_without_a_momentum_averages_plainly() -> None:
    narrow, whole = NarrowBatchNorm1d(6, momentum=None), nn.BatchNorm1d(6, momentum=None)
    some = [1, 4]
    for x in torch.randn(3, 8, 6):
        narrow(x[:, some], Selection(torch.tensor([some]), None))
        whole(x)
    assert narrow.num_batches_tracked == 3
    torch.testing.assert_close(narrow.running_mean[some], whole.running_mean[some])
    torch.testing.assert_close(narrow.running_var[some], whole.running_var[some])


def test_layers_that_average_plainly_from_the_start_tell_nothing() -> None:
    approx = fx_approx.transform(Net(momentum=None), VALUE, BATCHES[0])
    step(approx, BATCHES[0])
    update_bn(BATCHES, approx)
    with pytest.warns(fx_approx.errors.BatchNormWarning, match=r"recalibrate_batchnorm\(model, batches\) first"):
        approx.eval()
    approx.train()
    fx_approx.recalibrate_batchnorm(approx, BATCHES)
    approx.eval()


@pytest.mark.filterwarnings("ignore:.*Graph break from .Tensor.item:UserWarning")
def test_update_bn_under_the_backend() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = Net()
    net.drop.p = 0.0
    compiled: Any = torch.compile(net, backend=fx_approx.backend(VALUE, inner="eager"))
    step(compiled, BATCHES[0])
    with torch.no_grad():
        sampled = compiled(BATCHES[0])
    plain = copy.deepcopy(net)
    assert not torch.allclose(sampled, plain(BATCHES[0]))
    plain.load_state_dict(net.state_dict())
    for model in (compiled, plain):
        update_bn(BATCHES, model)
    assert same(statistics(net), statistics(plain))
    with torch.no_grad():
        assert not torch.allclose(compiled(BATCHES[0]), plain(BATCHES[0])), "sampled again"


def share_of_exact(momentum: float, steps: int) -> float:
    """How much of a running average comes from the last ``steps`` batches, by running it."""
    layer = nn.BatchNorm1d(1, momentum=momentum)
    layer.running_mean = torch.zeros(1)
    for _ in range(steps):
        layer(torch.ones(4, 1))
    assert layer.running_mean is not None
    return float(layer.running_mean)


@pytest.mark.parametrize("momentum", [0.5, 0.1, 0.01])
def test_a_tail_that_is_too_short_warns_with_the_number_that_would_do(momentum: float) -> None:
    approx = fx_approx.transform(Net(momentum), VALUE, BATCHES[0])
    with pytest.warns(fx_approx.errors.BatchNormWarning, match=r"steps=1 is too short") as seen:
        fx_approx.schedules.RatioScheduler(approx, ExactTail(PlanRatios(), 1000, 1))
    enough = int(str(seen[0].message).partition("so with a step for each batch steps=")[2].split()[0])
    assert share_of_exact(momentum, enough) > 0.87 and share_of_exact(momentum, enough - 2) < 0.88
    assert seen[0].filename == __file__
    fx_approx.schedules.RatioScheduler(approx, ExactTail(PlanRatios(), 1000, enough))
    with pytest.warns(fx_approx.errors.BatchNormWarning):
        fx_approx.schedules.RatioScheduler(approx, {"*": ExactWarmup(ExactTail(PlanRatios(), 1000, enough - 1), 5)})


def test_the_default_momentum_needs_20() -> None:
    approx = fx_approx.transform(Net(), VALUE, BATCHES[0])
    with pytest.warns(fx_approx.errors.BatchNormWarning, match="need 20 exact batches.*steps=20 would do"):
        fx_approx.schedules.RatioScheduler(approx, ExactTail(PlanRatios(), 224, 224 // 50), preserve=True)
    with pytest.warns(fx_approx.errors.BatchNormWarning, match="no tail is long enough.*recalibrate_batchnorm"):
        fx_approx.schedules.RatioScheduler(
            fx_approx.transform(Net(None), VALUE, BATCHES[0]), ExactTail(PlanRatios(), 99, 50)
        )
    assert round(math.log(0.12) / math.log(0.9)) == 20


@pytest.mark.parametrize(
    "schedule", [PlanRatios(), Constant(0.25), ExactWarmup(PlanRatios(), 3), ExactTail(PlanRatios(), 50, 20)]
)
def test_no_warning_of_other_schedules(schedule: Schedule) -> None:
    fx_approx.schedules.RatioScheduler(fx_approx.transform(Net(), VALUE, BATCHES[0]), schedule)


def test_no_warning_where_the_statistics_are_exact_or_frozen() -> None:
    short = ExactTail(PlanRatios(), 50, 2)
    fx_approx.schedules.RatioScheduler(fx_approx.transform(Net(), GradientSampling.backward(0.5), BATCHES[0]), short)
    frozen = fx_approx.transform(Net(), VALUE, BATCHES[0])
    for layer in (frozen.n, frozen.m):
        layer.eval()
    fx_approx.schedules.RatioScheduler(frozen, short)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fx_approx.schedules.RatioScheduler(
            fx_approx.transform(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2)), Uniform(scores="online")), short
        )
