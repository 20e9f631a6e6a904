"""Measures of a transformed model: the time of choosing, predictions, scalars, sensitivities, verification."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fx_approx
from fx_approx.analysis import ScalarLogger
from fx_approx.compiler.transform import view_of
from fx_approx.policies import Exact, FlopBudget, FlopModel, GradientSampling, Override, RooflineModel, Uniform
from fx_approx.policies.cost_roofline import Device
from tests.helpers.modules import made_of
from tests.policies.test_budget import IMAGES, network
from tests.schedules.test_scheduler import Writer, transformed

# ---- the measured cost of choosing


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4)
    )


X = torch.randn(4, 3, 8, 8)
POLICIES = {
    "ahead": Uniform(0.5, scores="ema"),
    "online": Uniform(0.5, "systematic", scores="online"),
    "gradients": GradientSampling.backward(0.5, scores="uniform"),
}


WAIT = 0.03
"""Seconds, far more than a selection of these layers takes on a busy machine."""


def wait(*_: Any) -> None:
    time.sleep(WAIT)


@pytest.mark.parametrize("name", ["ahead", "online", pytest.param("gradients", marks=pytest.mark.slow)])
def test_what_makes_selections_is_timed_and_the_rest_is_not(name: str) -> None:
    approx = fx_approx.transform(net(), POLICIES[name], X)
    runtime = approx._fx_approx
    makers = [runtime.resample] if name == "ahead" else list(runtime.selectors.values())
    plain = fx_approx.analysis.selection_time(approx, X, repeats=2)
    assert plain.seconds > 0 and plain.step > 0
    handles = [maker.register_forward_hook(wait) for maker in makers]
    slow = fx_approx.analysis.selection_time(approx, X, repeats=2)
    for handle in handles:
        handle.remove()
    assert WAIT * len(makers) < slow.seconds and WAIT * len(makers) < slow.step
    approx[2].register_forward_hook(wait)  # a ReLU chooses nothing
    other = fx_approx.analysis.selection_time(approx, X, repeats=2)
    assert other.step > WAIT > other.seconds
    assert 0 < other.quartiles[0] <= other.quartiles[1]


@pytest.mark.parametrize("name", POLICIES)
def test_the_model_is_as_before(name: str) -> None:
    approx = fx_approx.transform(net(), POLICIES[name], X)
    approx(X).sum().backward()
    before = {key: value.clone() for key, value in approx.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in approx.parameters()]
    sampler, numbers = fx_approx.sampler_state_dict(approx), torch.get_rng_state()
    fx_approx.analysis.selection_time(approx, X, repeats=1)
    assert all(torch.equal(value, before[key]) for key, value in approx.state_dict().items())
    assert fx_approx.sampler_state_dict(approx) == sampler
    assert torch.equal(torch.get_rng_state(), numbers)
    for p, grad in zip(approx.parameters(), grads, strict=True):
        assert (p.grad is None) == (grad is None) and (grad is None or torch.equal(p.grad, grad))


def test_the_report_shows_it() -> None:
    approx = fx_approx.transform(net(), POLICIES["ahead"], X)
    assert "Selections take" not in str(fx_approx.report(approx))
    assert json.loads(fx_approx.report(approx).to_json())["selection_time"] is None
    found = fx_approx.analysis.selection_time(approx, X, repeats=2)
    report = fx_approx.report(approx)
    assert report.selection_time == found
    assert f"Selections take {100 * found.share:.1f} % of a training step" in str(report)
    assert json.loads(report.to_json())["selection_time"]["repeats"] == 2


def test_bad_calls() -> None:
    approx = fx_approx.transform(net(), POLICIES["ahead"], X)
    with pytest.raises(ValueError, match="repeats: expected an integer of at least 1, got 0"):
        fx_approx.analysis.selection_time(approx, X, repeats=0)
    with pytest.raises(ValueError, match="batch: expected"):
        fx_approx.analysis.selection_time(approx, None)
    with pytest.raises(ValueError, match="not a transformed model"):
        fx_approx.analysis.selection_time(net(), X)
    fx_approx.set_sampling(approx, enabled=False)
    with pytest.raises(ValueError, match="nothing is selected"):
        fx_approx.analysis.selection_time(approx, X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_approx.errors.BatchNormWarning)
        approx.eval()
    with pytest.raises(ValueError, match="expected training mode"):
        fx_approx.analysis.selection_time(approx, X)


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_compiled_models_time_compiled_selections(name: str) -> None:
    approx = fx_approx.transform(net(), POLICIES[name], X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fx_approx.analysis.selection_time(torch.compile(approx), X, repeats=2)
    assert found.compiled and found.seconds > 0 and found.step > 0


# ---- what the cost model says of the plan, and the clock beside it


COST = RooflineModel(device=Device("made up", "torch.float32", 1e11, 1e10, 1e10, 1e-6, 0.8, 0.7, 0.5, 0.1))
VALUE = Uniform(0.5)


def test_a_prediction_is_the_cost_of_both_steps() -> None:
    found = fx_approx.analysis.estimate_step_time(network(), VALUE, IMAGES, cost=COST)
    view, plan = view_of(network(), VALUE, IMAGES)
    work = view.work({decision.name: decision for decision in plan.sampled})
    assert (found.exact, found.now) == (COST.step(work.exact, view), COST.step(work, view))
    assert found.speedup is not None and found.speedup > 1.2 and found.measured is None
    assert f"{found.speedup:.2f} times as fast, predicted" in str(found) and COST.omits in str(found)


def test_a_plan_and_the_exact_policy() -> None:
    plan = fx_approx.explain(network(), VALUE, IMAGES).plan
    assert fx_approx.analysis.estimate_step_time(
        network(), plan, IMAGES, cost=COST
    ) == fx_approx.analysis.estimate_step_time(network(), VALUE, IMAGES, cost=COST)
    assert fx_approx.analysis.estimate_step_time(network(), Exact(), IMAGES, cost=COST).speedup == 1


def test_the_clock_beside_it() -> None:
    found = fx_approx.analysis.estimate_step_time(network(), VALUE, IMAGES, cost=COST, check=True, repeats=3)
    assert found.measured is not None and f"measured {found.measured.speedup[1]:.2f}" in str(found)


def test_operations_have_no_speedup() -> None:
    found = fx_approx.analysis.estimate_step_time(network(), VALUE, IMAGES, cost=FlopModel())
    assert found.speedup is None and "operations exact" in str(found)


def test_demand_can_be_left_out() -> None:
    with_demand, without = (
        fx_approx.analysis.estimate_step_time(network(), VALUE, IMAGES, cost=FlopModel(), prune_unread=demand).now.flops
        for demand in (True, False)
    )
    assert with_demand is not None and without is not None and with_demand < without


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="repeats: expected an integer of at least 1, got 0"):
        fx_approx.analysis.estimate_step_time(network(), VALUE, IMAGES, repeats=0)
    with pytest.raises(ValueError, match="example_inputs: expected a training batch"):
        fx_approx.analysis.estimate_step_time(network(), VALUE, None)


# ---- scalars: tags, values, and what is refused


def test_savings_are_those_of_the_report() -> None:
    writer, model = Writer(), transformed()
    report = fx_approx.report(model)
    ScalarLogger(writer, "run").savings(report, 7)
    found = {tag: value for tag, value, step in writer.written if step == 7}
    assert found["run/saved_flops"] == report.totals.saved_net
    assert found["run/saved_memory"] == pytest.approx(1 - report.totals.memory / report.totals.memory_exact)
    assert found["run/saved/3.conv1"] == report["3.conv1"].saved
    assert not any("coverage" in tag or "selection" in tag for tag in found)  # neither is known here


def test_errors_are_those_of_the_noise_report() -> None:
    writer, model = Writer(), transformed()
    report = fx_approx.analysis.gradient_noise(model, IMAGES, lambda output: output.square().mean())
    ScalarLogger(writer).noise(report, 3)
    found = {tag: value for tag, value, _ in writer.written}
    assert found["fx_approx/error/gradient"] == report.step.error > 0
    assert found["fx_approx/error/3.conv1"] == report["3.conv1"].output.error


def test_scalars_bad_input() -> None:
    with pytest.raises(TypeError, match=r"writer: expected add_scalar\(tag, value, step\)"):
        ScalarLogger(print)
    with pytest.raises(TypeError, match="prefix: expected text"):
        ScalarLogger(Writer(), 3)  # type: ignore[arg-type]


# ---- sensitivities against gradients computed by hand


OPTIONS: dict[str, Any] = {"min_k": 4, "round_to": 4}
SPEC: dict[str, Any] = {"min_k": 4, "round_to": 4, "scores": "weight", "scope": "value"}


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(4, 3, 16, 16), torch.randint(5, (4,))) for _ in range(count)]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def gradient(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    parameters = list(model.parameters())
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss(model, batch), parameters)])


def test_errors_are_those_of_one_selection_alone() -> None:
    model, data = network(), batches(2)
    found = fx_approx.analysis.sensitivity(model, data, loss, data[0][0], ratio=0.5, **OPTIONS)
    for name, rule in (("3.conv1", "3.conv1"), ("4.shortcut.0", "4.[cs][oh]*1*")):
        names = ["4.conv1", "4.shortcut.0"] if name.startswith("4") else [name]
        policy = Override(dict.fromkeys(names, Uniform(0.5, **SPEC)), Exact())
        shares = []
        for batch in data:
            exact, alone = gradient(model, batch), gradient(fx_approx.transform(model, policy, batch[0]), batch)
            shares.append(float((alone - exact).square().sum() / exact.square().sum()))
        assert found.errors[name] == pytest.approx(sum(shares) / 2, rel=1e-3), rule
    assert found.errors["4.conv1"] == found.errors["4.shortcut.0"]
    assert set(found.errors) == {"3.conv1", "3.conv2", "4.conv1", "4.shortcut.0", "4.conv2", "5.conv1", "5.conv2"}


def test_noise_of_the_batches() -> None:
    model, data = network(), batches(3)
    found = fx_approx.analysis.sensitivity(model, data, loss, data[0][0], **OPTIONS)
    grads = torch.stack([gradient(model, batch) for batch in data])
    expected = grads.var(0).sum() / grads.square().sum(1).mean()
    assert found.sgd_noise == pytest.approx(float(expected), rel=1e-3)
    assert fx_approx.analysis.sensitivity(model, data[:1], loss, data[0][0], **OPTIONS).sgd_noise is None


def test_nothing_of_the_model_changes() -> None:
    model, data = network().eval(), batches(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    fx_approx.analysis.sensitivity(model, data, loss, data[0][0], sampler="systematic", draws=2, **OPTIONS)
    assert torch.equal(state, torch.get_rng_state()) and not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_parameter_that_nothing_reads_changes_no_error() -> None:
    model, data = network(), batches(2)
    before = fx_approx.analysis.sensitivity(model, data, loss, data[0][0], **OPTIONS)
    model.register_parameter("spare", nn.Parameter(torch.ones(7)))
    after = fx_approx.analysis.sensitivity(model, data, loss, data[0][0], **OPTIONS)
    assert after.errors == pytest.approx(before.errors, rel=1e-5)


def test_draws_differ() -> None:
    model, data = network(), batches(1)
    one, two = (
        fx_approx.analysis.sensitivity(model, data, loss, data[0][0], sampler="systematic", draws=draws, **OPTIONS)
        for draws in (1, 2)
    )
    assert one.errors != two.errors
    again = fx_approx.analysis.sensitivity(model, data, loss, data[0][0], sampler="systematic", draws=2, **OPTIONS)
    assert two == again


def test_it_serves_a_budget() -> None:
    model, data = network(), batches(2)
    found = fx_approx.analysis.sensitivity(model, data, loss, data[0][0], **OPTIONS)
    plan = fx_approx.explain(model, FlopBudget(0.5, sensitivity=found, **OPTIONS), data[0][0]).plan
    assert plan.sampled


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batches": []}, ValueError, "batches: expected a sequence of at least one batch"),
        ({"loss": None}, TypeError, "loss: expected a function of a model and a batch"),
        ({"loss": lambda model, batch: model(batch[0])}, ValueError, "loss: expected it to return a scalar tensor"),
        ({"ratio": 1.0}, ValueError, r"ratio: expected a number in \(0, 1\)"),
        ({"draws": 0}, ValueError, "draws: expected at least 1"),
        ({"draws": 1.5}, TypeError, "draws: expected an integer"),
        ({"colour": "red"}, TypeError, "colour"),
        ({"scores": "online"}, ValueError, "scores: expected weight"),
    ],
)
def test_sensitivity_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    data = batches(1)
    given = {"batches": data, "loss": loss, **OPTIONS, **change}
    with pytest.raises(error, match=message):
        fx_approx.analysis.sensitivity(network(), given.pop("batches"), given.pop("loss"), data[0][0], **given)


# ---- verification of models that draw random numbers, and of graphs that give None for a tensor


class Between(nn.Module):
    """Something random between two layers that are sampled."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 3)
        self.between, self.calls = between, 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self, self.a(x).relu())
        return self.c(self.b(x).relu())


@made_of(lambda: {**{name: nn.Linear(16, 16) for name in ("q", "k", "v", "o")}})
def Heads(self: Any, x: Tensor) -> Tensor:
    q, k, v = (layer(x).unflatten(-1, (4, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3)
    return self.o(y.transpose(1, 2).flatten(2))


def spatial(function: Callable[..., Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda module, x: function(x[..., None, None], 0.3, module.training).flatten(1)


DROPOUTS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "functional": lambda module, x: F.dropout(x, 0.3, module.training),
    "keywords": lambda module, x: F.dropout(x, p=0.3, training=module.training),
    "torch": lambda module, x: torch.dropout(x, 0.3, module.training),
    "alpha": lambda module, x: F.alpha_dropout(x, 0.3, module.training),
    "feature_alpha": spatial(F.feature_alpha_dropout),
    "dropout2d": spatial(F.dropout2d),
    "rrelu": lambda module, x: F.rrelu(x - 0.5, 0.1, 0.9, training=module.training),
}


def verified(model: nn.Module, x: Tensor) -> fx_approx.analysis.Verification:
    torch.manual_seed(0)
    approx = fx_approx.transform(model, VALUE, x)
    state = torch.get_rng_state()
    found = fx_approx.analysis.verify(approx, x)
    assert torch.equal(torch.get_rng_state(), state)
    return found


@pytest.mark.parametrize("kind", DROPOUTS)
def test_functional_dropout_is_off(kind: str) -> None:
    torch.manual_seed(0)
    found = verified(Between(DROPOUTS[kind]), torch.randn(8, 8))
    assert found.hoisted and found.passed, str(found)
    assert found.incomparable is None and "the same numbers" in str(found)


@pytest.mark.parametrize("model", [Heads, lambda: nn.MultiheadAttention(16, 4, 0.3, batch_first=True)])
def test_dropout_of_attention_is_off(model: Callable[[], nn.Module]) -> None:
    @made_of(lambda: {"inner": model(), "out": nn.Linear(16, 2)})
    def GraphView(self: Any, x: Tensor) -> Any:
        if isinstance(self.inner, nn.MultiheadAttention):
            return self.out(self.inner(x, x, x, need_weights=False)[0])
        return self.out(self.inner(x))

    found = verified(GraphView(), torch.randn(2, 6, 16))
    assert found.hoisted and found.passed, str(found)


def test_graphs_of_the_backend_too() -> None:
    torch._dynamo.reset()
    model, x = Between(DROPOUTS["functional"]), torch.randn(8, 8)
    backend = fx_approx.backend(VALUE, inner="eager")
    torch.compile(model, backend=backend)(x).sum().backward()
    (piece,) = backend.pieces
    inputs = [p for p in (x, *model.parameters())]
    called = piece._fx_approx.record.called[0]
    given = [next(t for t in inputs if tuple(t.shape) == tuple(spec.shape)) for spec in called]
    found = fx_approx.analysis.verify(piece, tuple(given))
    assert found.incomparable is None and found.passed, str(found)


def test_other_random_numbers_cannot_be_compared() -> None:
    """No pass makes such a graph: an operation that draws by the channel stops demand."""
    torch.manual_seed(0)
    model, x = Between(lambda module, x: x * (1 + torch.rand_like(x[0]))), torch.randn(8, 8)
    approx = fx_approx.transform(model, VALUE, x)
    graph = approx._fx_approx.program.stages[-1][1]
    draw = next(node for node in graph.nodes if node.target is torch.rand_like)
    with graph.inserting_before(draw):
        graph.call_function(torch.rand, (1,))
    approx._fx_approx.program.compile_graph(graph)
    found = fx_approx.analysis.verify(approx, x)
    assert not found.passed and found.incomparable is not None
    assert "rand_like of shape (32,) without demand, rand of (1,) with it" in found.incomparable
    assert "torch.rand_like(" in found.incomparable, "the line of the graph"
    assert "cannot be compared, since the model draws random numbers of its own" in str(found)


@pytest.mark.parametrize("noise", [torch.randn_like, torch.rand_like])
def test_noise_stops_demand_and_can_be_compared(noise: Callable[[Tensor], Tensor]) -> None:
    found = verified(Between(lambda module, x: x * (1 + noise(x))), torch.randn(8, 8))
    assert found.passed, str(found)


def test_the_same_noise_in_both_graphs_can_be_compared() -> None:
    found = verified(Between(lambda module, x: x * torch.rand_like(x[:, :1])), torch.randn(8, 8))
    assert found.hoisted and found.passed, str(found)


@pytest.mark.filterwarnings("ignore::fx_approx.errors.CaptureWarning")
def test_attributes_that_a_forward_changes_are_as_before() -> None:
    def counted(module: nn.Module, x: Tensor) -> Tensor:
        module.calls += 1  # type: ignore[operator]
        return x * module.calls  # type: ignore[operator]

    torch.manual_seed(0)
    approx = fx_approx.transform(Between(counted), VALUE, x := torch.randn(8, 8))
    before = approx.calls
    found = fx_approx.analysis.verify(approx, x)
    assert found.passed and approx.calls == before, str(found)


def without(graph: fx.Graph, what: str) -> None:
    """Makes ``graph`` give None for its second output, or leave the layer ``c`` without a gradient."""
    (output,) = graph.find_nodes(op="output")
    one, two = output.args[0]
    if what == "output":
        output.args = ((one, None),)
        return
    with graph.inserting_before(output):
        output.args = ((one, graph.call_method("detach", (two,))),)


@pytest.mark.parametrize(("what", "kind", "name"), [("output", "output", "1"), ("gradient", "gradient", "c.weight")])
@pytest.mark.parametrize("stage", ["share", "demand"])
def test_none_in_place_of_a_tensor_fails(what: str, kind: str, name: str, stage: str) -> None:
    @made_of(lambda: {"a": nn.Linear(8, 32), "b": nn.Linear(32, 3), "c": nn.Linear(32, 3)})
    def Two(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x).relu()
        return self.b(y), self.c(y)

    torch.manual_seed(0)
    approx = fx_approx.transform(Two(), VALUE, x := torch.randn(8, 8))
    runtime = approx._fx_approx
    without(dict(runtime.program.stages)[stage], what)
    if stage == "demand":
        runtime.program.compile_graph(runtime.program.stages[-1][1])
    found = fx_approx.analysis.verify(approx, x)
    worst = next(one for one in found.differences if one.missing)
    assert (worst.kind, worst.name) == (kind, name) and not found.passed
    said = "with" if stage == "demand" else "without"
    assert worst.missing == f"None {said} demand" and f"{name} (None {said} demand)" in str(found)
