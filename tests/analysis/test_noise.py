"""gradient_noise against enumerated samples, hand computation, and training steps that are really taken."""

from __future__ import annotations

import copy
import itertools
import math
import random
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_approx
from fx_approx import SamplerConfig
from fx_approx.analysis import NoiseReport, gradient_noise
from fx_approx.core.candidates import Role
from fx_approx.core.plan import Policy
from fx_approx.policies import Exact, GradientSampling, Override, Uniform
from tests.helpers.models import ZOO, Checkpointed, Counting, loss_of, mlp, same, train_step
from tests.helpers.modules import made_of
from tests.helpers.quick import thinned

PAIRS, KEPT = 6, 3


def transform(model: nn.Module, policy: Policy, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_approx.errors.CaptureWarning)
        warnings.simplefilter("ignore", fx_approx.errors.NoEffectWarning)
        return fx_approx.transform(model.double(), policy, **options)


def doubled(value: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, value)


class Linear:
    """One linear layer in a linear loss: its operands, and the gradient that comes in."""

    def __init__(self, leading: int = 1) -> None:
        torch.manual_seed(3)
        self.x = torch.randn(4, PAIRS, dtype=torch.float64)
        self.layer = nn.Linear(PAIRS, 5).double()
        self.grad = torch.randn(4, 5, dtype=torch.float64)
        self.weight = self.layer.weight.detach()
        self.scores = self.x.norm(dim=0) * self.weight.norm(dim=0)
        # The identity in front makes autograd compute the gradient of the layer's input.
        self.model = nn.Sequential(*[nn.PReLU(init=1.0) for _ in range(leading)], self.layer).double()
        self.name = f"{leading}"

    def measured(self, policy: Policy, draws: int) -> NoiseReport:
        return gradient_noise(transform(self.model, policy), self.x, lambda y: (y * self.grad).sum(), draws=draws)

    def products(self, factors: Tensor) -> dict[Role, Tensor]:
        """Output and gradients where column-row pair j counts ``factors[j]`` times."""
        return {
            Role.OUTPUT: (self.x * factors) @ self.weight.T,
            Role.GRAD_INPUT: (self.grad @ self.weight) * factors,
            Role.GRAD_WEIGHT: (self.grad.T @ self.x) * factors,
        }


def outcomes(sampler: str, scores: Tensor) -> list[tuple[float, Tensor]]:
    """All samples of KEPT of PAIRS pairs without mixing: probability, and how often each pair counts."""
    total = scores.sum()
    found = []
    if sampler == "bernoulli":
        included = KEPT * scores / total
        assert included.max() < 1, "the formula is for probabilities below the cap"
        for chosen in itertools.product((0.0, 1.0), repeat=PAIRS):
            mask = torch.tensor(chosen, dtype=torch.float64)
            found.append((float((mask * included + (1 - mask) * (1 - included)).prod()), mask / included))
    else:
        drawn = scores / total
        for indices in itertools.product(range(PAIRS), repeat=KEPT):
            counts = torch.bincount(torch.tensor(indices), minlength=PAIRS).double()
            found.append((float(drawn[list(indices)].prod()), counts / (KEPT * drawn)))
    return found


@pytest.mark.parametrize("sampler", thinned(["crs", "bernoulli"]))
def test_errors_of_a_product_are_those_of_all_its_samples(sampler: str) -> None:
    """|z| < 4.5 for mean squared error and mean cosine of 150 draws: false alarms below 1e-4, and the seed is fixed."""
    case, draws = Linear(), 150
    row = case.measured(Uniform(0.5, sampler, epsilon=0.0, scores="online"), draws)[case.name]
    samples = outcomes(sampler, case.scores)
    probabilities = torch.tensor([p for p, _ in samples], dtype=torch.float64)
    exact = case.products(torch.ones(PAIRS, dtype=torch.float64))
    for role, wanted in exact.items():
        noise = row.of(role)
        estimates = [case.products(factors)[role] for _, factors in samples]
        errors = torch.stack([(estimate - wanted).square().sum() for estimate in estimates])
        cosines = torch.stack([(e * wanted).sum() / (e.norm() * wanted.norm()).clamp(min=1e-300) for e in estimates])
        assert noise.draws == draws and noise.norm == pytest.approx(float(wanted.norm()))
        for found, values in ((noise.error**2 * noise.norm**2, errors), (noise.cosine, cosines)):
            mean = float(probabilities @ values)
            deviation = math.sqrt(float(probabilities @ (values - mean).square()) / draws)
            assert abs(found - mean) < 4.5 * deviation
        assert noise.snr == pytest.approx(1 / noise.error**2) and not noise.biased
        assert noise.floor == pytest.approx(noise.error / math.sqrt(draws), rel=0.02)
    # The closed forms that the literature gives for the output.
    if sampler == "bernoulli":
        p = KEPT * case.scores / case.scores.sum()
        formula = ((1 - p) / p * case.scores.square()).sum()
    else:
        formula = (case.scores.sum() ** 2 - exact[Role.OUTPUT].square().sum()) / KEPT
    assert row.output.error == pytest.approx(math.sqrt(float(formula)) / row.output.norm, rel=0.15)


def test_topk_is_one_draw_and_all_bias() -> None:
    case = Linear()
    report = case.measured(Uniform(0.5, scores="online"), 16)
    row = report[case.name]
    kept = torch.zeros(PAIRS, dtype=torch.float64).index_fill(0, case.scores.topk(KEPT).indices, 1.0)
    exact, estimates = case.products(torch.ones(PAIRS, dtype=torch.float64)), case.products(kept)
    for role, wanted in exact.items():
        noise = row.of(role)
        error = float((estimates[role] - wanted).norm() / wanted.norm())
        assert (noise.draws, noise.biased, noise.cosine_spread) == (1, True, 0.0)
        assert noise.error == pytest.approx(error) and noise.bias == pytest.approx(error)
        assert noise.snr_db == pytest.approx(-20 * math.log10(error))
        cosine = float((estimates[role] * wanted).sum() / (estimates[role].norm() * wanted.norm()))
        assert noise.cosine == pytest.approx(cosine)
    weight = report.parameters[f"{case.name}.weight"]
    assert weight.error == pytest.approx(row.grad_weight.error), "the loss is linear, so the step is the product's"
    assert "bias only*" in str(report) and "Nothing here is random" in str(report) and row.sampled == "topk/online 0.5"


def test_gradients_that_autograd_does_not_run_are_none() -> None:
    case = Linear(leading=0)
    assert case.measured(GradientSampling.backward(0.5), 2)["0"].grad_input is None
    case = Linear()
    case.layer.weight.requires_grad_(False)
    row = case.measured(Uniform(0.5, "systematic", scores="online"), 2)[case.name]
    assert row.grad_weight is None and row.grad_input is not None


@pytest.mark.parametrize("how", ["ratio", "switched off", "plan"])
def test_without_sampling_nothing_differs(how: str) -> None:
    approx = transform(mlp(), Exact() if how == "plan" else GradientSampling.backward(0.5))
    if how == "ratio":
        fx_approx.set_sampling(approx, 1.0)
    elif how == "switched off":
        fx_approx.set_sampling(approx, enabled=False)
    report = gradient_noise(approx, torch.randn(6, 12).double(), loss_of)
    assert len(report.rows) == (0 if how == "plan" else 3)
    noises = [row.of(role) for row in report.rows for role in Role] + [report.step, *report.parameters.values()]
    assert all(n is None or (n.error, n.bias, n.biased, n.cosine) == (0, 0, False, 1) for n in noises)
    assert all(row.sampled == "exact" for row in report.rows) and "Nothing is sampled at present." in str(report)


def test_backward_mode_has_exact_outputs_and_no_bias() -> None:
    report = gradient_noise(
        transform(mlp(), GradientSampling.backward(0.5)), torch.randn(6, 12).double(), loss_of, draws=32
    )
    for row in report.rows:
        assert (row.output.draws, row.output.error, row.output.norm > 0) == (0, 0, True)
        assert row.grad_weight.error > 0.1 and not row.grad_weight.biased
    assert report["2"].grad_input.error > 0.1 and not report["2"].grad_input.biased
    assert not report.step.biased and 0 < report.step.cosine < 1
    assert report["2"].sampled == "dX dW systematic/online 0.5"


def test_straight_through_has_exact_gradients() -> None:
    row = Linear().measured(GradientSampling.straight(0.5), 4)["1"]
    assert row.output.error > 0 and row.grad_input.error == row.grad_weight.error == 0


def test_a_gradient_sampled_beside_a_straight_through_output_has_its_own_error_only() -> None:
    spec = SamplerConfig("topk", 0.5)
    alone = Linear().measured(GradientSampling(grad_weight=spec), 1)["1"]
    row = Linear().measured(GradientSampling(spec, grad_weight=spec, straight_through=True), 1)["1"]
    assert row.output.error > 0 == row.grad_input.error
    assert row.grad_weight.error == pytest.approx(alone.grad_weight.error) != 0


def steps_taken(model: nn.Module, x: Any, draws: int) -> list[dict[str, Tensor]]:
    """Gradients of ``draws`` training steps, all with the same dropout masks."""
    return [{k: g for k, g in train_step(model, x)[1].items() if g is not None} for _ in range(draws)]


def check_step(report: NoiseReport, exact: dict[str, Tensor], taken: list[dict[str, Tensor]]) -> None:
    """Compares with the definitions in the docs of :class:`Noise`, for each parameter and for all together."""
    assert list(report.parameters) == list(exact)
    for names, noise in [([name], report.parameters[name]) for name in exact] + [(list(exact), report.step)]:
        wanted = torch.cat([exact[name].flatten() for name in names])
        found = torch.stack([torch.cat([step[name].flatten() for name in names]) for step in taken])
        if wanted.norm() < 1e-12:  # a bias in front of a BatchNorm: rounding errors only
            continue
        errors, count = found - wanted, len(taken)
        close = {"rel": 1e-6, "abs": 1e-9}
        assert noise.norm == pytest.approx(float(wanted.norm()))
        assert noise.error == pytest.approx(float(errors.square().sum(1).mean().sqrt() / wanted.norm()), **close)
        assert noise.bias == pytest.approx(float(errors.mean(0).norm() / wanted.norm()), **close)
        deviation = float(found.var(0).sum().sqrt()) / math.sqrt(count)
        assert noise.floor == pytest.approx(deviation / float(wanted.norm()), **close)
        cosines = torch.cosine_similarity(found, wanted.unsqueeze(0), eps=1e-300)
        assert noise.cosine == pytest.approx(float(cosines.mean()), **close)
        assert noise.cosine_spread == pytest.approx(float(cosines.std()), **close)


TRAINABLE = [name for name in ZOO if name != "checkpointed_reentrant"]


@pytest.mark.parametrize(("name", "every"), thinned(zip(TRAINABLE, itertools.cycle([1, 1, 2, 2]), strict=False)))
def test_the_step_is_that_of_the_steps_that_follow(name: str, every: int) -> None:
    """On both frontends, with dropout, BatchNorm, checkpoints, tied weights, attention, another sample each step."""
    build, batch = ZOO[name]
    x = doubled(batch())
    arguments = (x,) if isinstance(x, dict) else x
    approx = transform(build(), Uniform(0.6, "bernoulli", scores="online"), selection_interval=every)
    for _ in range(3):
        train_step(approx, x)
    off = copy.deepcopy(approx)
    fx_approx.set_sampling(off, enabled=False)
    exact = steps_taken(off, x, 1)[0]
    torch.manual_seed(1)  # the dropout masks of train_step
    report = gradient_noise(approx, arguments, loss_of, draws=4)
    step = fx_approx.sampler_state_dict(approx)["step"] // every * every
    taken = []
    for number in range(4):
        fx_approx.load_sampler_state_dict(
            approx, {"step": step + number * every, "selection_interval": every, "seed": 0}
        )
        taken += steps_taken(approx, x, 1)
    check_step(report, exact, taken)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        *[("cnn", "conv2"), ("cnn", "grouped"), ("cnn", "fc"), ("attention", "out"), ("called_twice", "fc#2")],
        *[("own_parameters", "linear"), ("own_parameters", "conv2d"), ("data_dependent", "middle.fc")],
        *[("checkpointed", "block.fc2"), ("encoder_layer", "linear1")],
    ],
)
def test_a_weight_gradient_that_alone_is_sampled_is_that_of_the_step(name: str, layer: str) -> None:
    """Then nothing else differs from the exact step, so both ways to measure must agree; graph and swapped layers."""
    build, batch = ZOO[name]
    spec = SamplerConfig("systematic", 0.5)
    approx = transform(build(), Override({layer: GradientSampling(grad_weight=spec)}, Exact()))
    report = gradient_noise(approx, doubled(batch()), loss_of, draws=8)
    (row,) = report.rows
    weight = {"linear": "weight", "conv2d": "kernel", "fc#2": "fc.weight"}.get(layer, f"{layer}.weight")
    assert (row.label, row.sampled) == (layer, "dW systematic/online 0.5")
    in_step = report.parameters[weight]
    assert in_step.error * in_step.norm == pytest.approx(row.grad_weight.error * row.grad_weight.norm) != 0
    assert in_step.bias * in_step.norm == pytest.approx(row.grad_weight.bias * row.grad_weight.norm)
    assert row.output.error == 0 and (row.grad_input is None or row.grad_input.error == 0)


class Products(nn.Module):
    """A batched product of two activations and an addmm, whose first argument is no part of the product."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.w = (nn.Parameter(torch.randn(2, 4, 4)) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.bmm(x * self.a, self.b + 1)
        return torch.addmm(self.bias, hidden.flatten(0, 1), self.w[0], beta=2.0, alpha=0.5)


def test_functional_products_count_without_what_is_added() -> None:
    model, x = Products().double(), torch.randn(2, 4, 4).double()
    report = gradient_noise(transform(model, Uniform(0.5, scores="online")), x, loss_of)
    left, right = x * model.a, model.b + 1
    hidden = torch.bmm(left, right)
    assert report["bmm"].output.norm == pytest.approx(hidden.norm().item())
    product = 0.5 * hidden.flatten(0, 1) @ model.w[0]
    assert report["addmm"].output.norm == pytest.approx(product.norm().item())
    scores = (left.square().sum(1) * right.square().sum(2)).sum(0)
    left_out = scores.topk(2, largest=False).indices
    missing = left[..., left_out] @ right[:, left_out]
    assert report["bmm"].output.error == pytest.approx((missing.norm() / hidden.norm()).item())


@made_of(lambda: {"first": nn.Linear(6, 6), "frozen": nn.Linear(6, 6, bias=False).requires_grad_(False)})
def ChangesItsInput(self: Any, x: Tensor) -> Tensor:
    """A frozen layer, whose input autograd does not keep, so that it may be changed in place."""
    x = self.first(x)
    y = self.frozen(x)
    return y + x.zero_()


def test_operands_are_those_of_the_call() -> None:
    model, x = ChangesItsInput().double(), torch.randn(4, 6).double()
    row = gradient_noise(transform(model, Uniform(0.5, scores="online")), x, loss_of)["frozen"]
    assert row.output.norm == pytest.approx(model.frozen(model.first(x)).norm().item()) and row.output.error > 0


def test_every_draw_starts_from_the_same_running_norms() -> None:
    """One layer in a linear loss: the product by itself is the step."""
    approx, x = (
        transform(nn.Linear(6, 5), GradientSampling.weight_gradient(0.5, scores="ema")),
        torch.randn(4, 7, 6).double(),
    )
    train_step(approx, x.cumsum(1))
    report = gradient_noise(approx, x, lambda y: (y * x.norm(dim=-1, keepdim=True)).sum(), draws=6)
    in_step = report.parameters["weight"]
    for name in ("error", "bias", "cosine"):
        assert getattr(report.rows[0].grad_weight, name) == pytest.approx(getattr(in_step, name))


@made_of(lambda: {"fc": nn.Linear(6, 6)})
def Repeats(self: Any, x: Tensor) -> Tensor:
    """Makes the same call twice where it cannot be traced."""
    return self.fc(x) + self.fc(x) if x.sum() < 1e9 else x


def test_each_call_of_a_swapped_layer_has_a_row_and_a_sample() -> None:
    approx, x = (
        transform(Repeats(), GradientSampling(grad_weight=SamplerConfig("bernoulli", 0.5))),
        torch.randn(8, 6).double(),
    )
    report = gradient_noise(approx, x, lambda y: y.square().sum(), draws=120)
    assert [row.label for row in report.rows] == ["fc", "fc (call 2)"]
    with pytest.raises(KeyError, match=r"no sampled product 'fd'; there are: fc, fc \(call 2\)"):
        report["fd"]
    one, two, step = report["fc"].grad_weight, report["fc (call 2)"].grad_weight, report.parameters["fc.weight"]
    assert one.norm == two.norm == pytest.approx(step.norm / 2) and one.error != two.error
    assert one.error == pytest.approx(two.error, rel=0.25)
    errors = step.error * step.norm / (one.error * one.norm)
    assert errors == pytest.approx(math.sqrt(2), rel=0.15), "2 if both calls took the same sample"


class Everything(nn.Module):
    """All kinds of state: BatchNorm, dropout, a list, an attribute and a buffer that forwards write, a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.counting, self.norm, self.drop = Counting(), nn.BatchNorm1d(4), nn.Dropout(0.3)
        self.widen, self.checked = nn.Linear(4, 12), Checkpointed(False)

    def forward(self, x: Tensor) -> Tensor:
        random.random()
        return self.checked(self.widen(self.drop(self.norm(self.counting(x)))))


def state_of(model: nn.Module) -> Any:
    runtime = model._fx_approx
    modules = [*model.modules(), *runtime.modules()]
    report = str(fx_approx.report(model))  # the first one learns shapes
    return {
        "values": {name: t.clone() for name, t in model.state_dict().items()},
        "objects": [id(t) for t in (*model.parameters(), *model.buffers(), *runtime.buffers())],
        "grads": [(id(p.grad), p.grad.clone()) for p in model.parameters()],
        "random": (torch.random.get_rng_state(), random.getstate()),
        "sampler": fx_approx.sampler_state_dict(model),
        "attributes": [
            {k: copy.copy(v) if isinstance(v, (list, dict, set)) else id(v) for k, v in vars(module).items()}
            for module in modules
        ],
        "report": report,
    }


@pytest.mark.parametrize(
    "policy",
    [
        GradientSampling.backward(0.5),
        Uniform(0.5, "wta", scores="online"),
        GradientSampling.weight_gradient(scores="ema"),
    ],
)
@pytest.mark.parametrize("fails_at", thinned([3, None]))
def test_nothing_changes_even_where_it_fails(policy: Policy, fails_at: int | None) -> None:
    torch.manual_seed(0)
    model, x = transform(Everything(), policy), torch.randn(8, 12).double()
    train_step(model, x)
    twin = copy.deepcopy(model)
    calls = itertools.count(1)

    def loss(output: Tensor) -> Tensor:
        if next(calls) == fails_at:
            raise ArithmeticError("in the loss")
        return output.square().sum()

    before, kept = state_of(model), x.clone()
    for _ in range(2):
        if fails_at is None:
            first = gradient_noise(model, x, loss, draws=3).to_dict()
            assert first == gradient_noise(model, x, loss, draws=3).to_dict()
        else:
            with pytest.raises(ArithmeticError, match=r"^in the loss$"):
                gradient_noise(model, x, loss, draws=3)
            calls = itertools.count(1)
    assert same(state_of(model), before) and torch.equal(x, kept)
    assert same(train_step(model, x), train_step(twin, x))
