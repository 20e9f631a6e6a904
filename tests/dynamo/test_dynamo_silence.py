"""The Dynamo frontend never does nothing in silence, and its backend answers what a transformed model answers."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fx_approx
from fx_approx import analysis
from fx_approx._compat import compiles_in_place
from fx_approx.policies import Exact, Paper, Uniform
from fx_approx.runtime.approx_module import find
from fx_approx.schedules import Constant, ExactTail, ExactWarmup, NoiseController, PlanRatios, RatioScheduler
from tests.helpers.modules import made_of

# Dynamo looks at it on the tensors that it resumes with.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

VALUE = Uniform(0.5)
X = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


class Pair(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(torch.relu(self.up(x)))
        return result


class Delegating(nn.Module):
    """As wrappers of adapters do: what it lacks, what it holds has."""

    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.held = held

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("held"), name)

    def forward(self, x: Tensor) -> Any:
        return self.held(x)


class Mapped(Pair):
    """A product inside of vmap, and one outside."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(torch.vmap(lambda row: torch.relu(self.up(row)))(x))
        return result


class Eager(nn.Module):
    """One layer, one function and one fused layer run as Python, the rest is captured in two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Pair(), Pair()
        self.aside, self.recurrent, self.unused = nn.Linear(12, 12), nn.LSTM(12, 12), nn.Linear(12, 12)

    @torch.compiler.disable
    def python(self, x: Tensor) -> Tensor:
        return self.aside(x) @ torch.ones(12, 12)

    @torch.compiler.disable
    def fused(self, x: Tensor) -> Tensor:
        result: Tensor = self.recurrent(x)[0]
        return result

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.fused(self.python(self.first(x))))
        return result


class Branching(nn.Module):
    """A branch on values: a graph break, and nothing that fake tensors can run through."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other = nn.Linear(12, 12), nn.Linear(12, 12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.normalisation, self.dropout = nn.BatchNorm1d(12), nn.Dropout(0.3)

    @torch.compiler.disable
    def choose(self, x: Tensor) -> Tensor:
        result: Tensor = self.other(x) if bool((x > -1e9).all()) else x
        result = self.dropout(self.normalisation(result))
        attended: Tensor = self.attention(result[None], result[None], result[None], need_weights=False)[0][0]
        return attended

    def forward(self, x: Tensor) -> Tensor:
        return self.choose(self.first(x))


def compiled(call: Any, policy: Any = VALUE) -> tuple[Any, Any]:
    sampling = fx_approx.backend(policy, inner="eager")
    return torch.compile(call, backend=sampling), sampling


@contextlib.contextmanager
def messages() -> Iterator[list[str]]:
    """What fx_approx warns of inside."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [str(one.message) for one in caught if type(one.message).__module__.startswith("fx_approx")]


def counted(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter:
        model(X).sum().backward()
    return int(counter.get_total_flops())


WRAPPERS: dict[str, Callable[[], nn.Module]] = {
    "one": lambda: Delegating(Pair()),
    "two": lambda: Delegating(Delegating(Pair())),
    "around a container": lambda: Delegating(nn.Sequential(Pair(), Delegating(nn.Linear(12, 12)))),
    "inside a container": lambda: nn.Sequential(Pair(), Delegating(nn.ModuleList([Pair()])[0])),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_wrappers_with_getattr_are_sampled_by_their_paths(kind: str) -> None:
    model = WRAPPERS[kind]()
    call, sampling = compiled(model)
    call(X).sum().backward()
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert [row.name for row in sampling.report().rows if row.samples] == layers
    model.eval()
    torch.testing.assert_close(call(X), model(X))


def test_a_wrapper_takes_the_samples_of_what_it_holds() -> None:
    held = Pair()
    found = []
    for model in (held, Delegating(held)):
        torch._dynamo.reset()
        held.zero_grad()
        compiled(model)[0](X).sum().backward()
        found.append([p.grad.clone() for p in held.parameters() if p.grad is not None])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_one_module_at_two_paths_is_one_layer() -> None:
    model = Pair()
    model.add_module("again", model.down)
    call, sampling = compiled(lambda x: model.again(model(x) @ torch.ones(12, 20)))
    call(X).sum().backward()
    assert [row.name for row in sampling.report().rows if row.op == "linear"] == ["up", "down", "down#2"]


@pytest.mark.filterwarnings("ignore::fx_approx.errors.CaptureWarning")
def test_a_graph_with_vmap_warns_once_and_its_report_is_of_the_whole_step() -> None:
    model = Mapped()
    call, sampling = compiled(model)
    with messages() as found:
        for rows in (5, 4, 3):
            call(X[:rows]).sum().backward()
    assert found == ["a graph stays exact: it contains vmap"]
    report = sampling.report()
    assert [(row.name, row.samples) for row in report.rows] == [("up", ()), ("down", ())]
    assert all("vmap" in row.reason for row in report.rows)
    assert any("vmap" in note for note in report.notes)
    assert report.totals.exact.total == report.totals.executed.total == counted(model)


def test_an_explanation_tells_of_exact_graphs() -> None:
    with pytest.raises(ValueError, match=r"no graph that Dynamo captures of Mapped can be sampled.*it contains vmap"):
        fx_approx.backend(VALUE).explain(Mapped(), X)


def test_a_report_outlives_the_model() -> None:
    with messages():
        sampling = fx_approx.backend(VALUE, inner="eager")
        torch.compile(Mapped(), backend=sampling)(X).sum().backward()
    report = sampling.report()
    assert [row.name for row in report.rows] == ["down", "up"] or [row.name for row in report.rows] == ["up", "down"]
    assert "it contains vmap" in str(report)


def test_a_policy_that_samples_nothing_warns() -> None:
    call, sampling = compiled(Pair(), Exact())
    with pytest.warns(fx_approx.errors.NoEffectWarning, match="a graph stays exact: asked for"):
        call(X).sum().backward()
    assert [row.reason for row in sampling.report().rows] == ["asked for", "asked for"]
    torch._dynamo.reset()
    call, _ = compiled(nn.Sequential(nn.Linear(12, 3)), Paper())
    with pytest.warns(fx_approx.errors.NoEffectWarning, match="classifier"):
        call(X).sum().backward()


def test_layers_in_evaluation_mode_warn_in_a_training_step_only() -> None:
    model = Pair()
    call, sampling = compiled(model)
    model.eval()
    with messages() as found:
        call(X).sum().backward()
    assert found == []
    with pytest.raises(ValueError, match="run a training step first"):
        sampling.report()
    model.training = True
    with messages() as found:
        call(X).sum().backward()
    assert found == ["a graph stays exact: its layers are in evaluation mode"]
    assert [row.exact is not None for row in sampling.report().rows] == [True, True]


def test_what_runs_as_python_has_rows_and_is_in_the_totals() -> None:
    model = Eager()
    call, sampling = compiled(model)
    call(X).sum().backward()
    report = sampling.report()
    exact = {row.name: row for row in report.rows if not row.samples}
    assert set(exact) == {"aside", "matmul", "recurrent"}
    assert all("in no graph" in row.reason for row in exact.values())
    assert exact["aside"].exact is not None and exact["aside"].exact.total == 3 * 2 * 5 * 12 * 12
    # The counter does not see the fused recurrent layer, so the report cannot count it and says so.
    assert exact["recurrent"].exact is None and any("1 row" in note for note in report.notes)
    assert report.totals.exact.total == counted(model)
    sampled = sum(row.executed.total for row in report.rows if row.samples and row.executed is not None)
    assert report.totals.executed.total == sampled + 3 * 2 * 5 * 12 * 12 + 2 * 2 * 5 * 12 * 12


def test_counting_the_step_changes_nothing() -> None:
    model = Branching()
    call, sampling = compiled(model)
    call(X).sum().backward()
    state, random = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    sampling.report()
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_branch_on_values_is_counted_on_a_real_copy() -> None:
    model = Branching()
    call, sampling = compiled(model)
    call(X).sum().backward()
    report = sampling.report()
    assert [row.name for row in report.rows] == ["first", "other", "attention"]
    assert report.totals.exact.total == counted(model)


def test_a_step_that_cannot_be_counted_is_a_note() -> None:
    class Options:
        """No value that can be written down."""

    class Called(Eager):
        def forward(self, x: Tensor, options: Options | None = None) -> Tensor:
            result: Tensor = self.last(self.python(self.first(x)))
            return result

    call, sampling = compiled(Called())
    call(X, Options()).sum().backward()
    report = sampling.report()
    unknown = [row.name for row in report.rows if row.exact is None]
    assert set(unknown) == {"aside", "recurrent", "unused"}
    assert any("The totals are those of the captured graphs" in note for note in report.notes)


def test_compiling_a_container_of_torch_in_place_samples_or_says_that_it_does_nothing() -> None:
    sampling = fx_approx.backend(VALUE, inner="eager")
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))
    if compiles_in_place(model):  # torch 2.14
        model.compile(backend=sampling)
        model(X).sum().backward()
        assert len(sampling.pieces) == 1 and all(row.samples for row in sampling.report().rows)
        return
    with pytest.warns(
        fx_approx.errors.CaptureWarning, match=r"Sequential\.compile\(\) compiles nothing.*torch\.compile\(model"
    ):
        model.compile(backend=sampling)
    model(X).sum().backward()
    with pytest.raises(ValueError, match=r"run a training step first.*torch\.compile\(model, backend"):
        sampling.report()


def test_what_torch_does_not_skip_is_compiled_in_place_without_a_word() -> None:
    sampling = fx_approx.backend(VALUE, inner="eager")
    model = Pair()
    model.compile(backend=sampling)
    model(X).sum().backward()
    assert len(sampling.pieces) == 1
    torch._dynamo.reset()
    again = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))
    sampling = fx_approx.backend(VALUE, inner="eager")
    torch.compile(again, backend=sampling)(X).sum().backward()
    assert len(sampling.pieces) == 1


# ---- a backend answers the same calls as a transformed model, before its first step and after it


INPUT, Y = torch.randn(16, 32, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 10


@made_of(lambda: {"a": nn.Linear(32, 64), "norm": nn.BatchNorm1d(64), "b": nn.Linear(64, 64), "c": nn.Linear(64, 10)})
def Net(self: Any, x: Tensor) -> Tensor:
    return self.c(F.dropout(F.relu(self.b(F.relu(self.norm(self.a(x))))), 0.1, self.training))


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor] = (INPUT, Y)) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def both() -> tuple[tuple[nn.Module, Any], tuple[nn.Module, Any]]:
    """The same network, transformed, and compiled in place by a backend: what is called, and what is set."""
    torch.manual_seed(0)
    exact = Net()
    approx, backend = (fx_approx.transform(copy.deepcopy(exact), VALUE, INPUT), fx_approx.backend(VALUE, inner="eager"))
    exact.compile(backend=backend)
    return (approx, approx), (exact, backend)


def trained(model: nn.Module, scheduler: RatioScheduler | None = None, steps: int = 6) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)  # the same dropout masks
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if scheduler is not None:
            scheduler.step()
    return losses


def ratios(handle: Any) -> list[tuple[float, bool]]:
    pieces = handle.pieces if isinstance(handle, fx_approx.runtime.handle.GraphHandle) else (find(handle),)
    return [(s.spec.ratio, s.enabled) for piece in pieces for s in piece._fx_approx.selectors.values()]


def test_what_is_set_before_the_first_step_holds_from_it_on() -> None:
    results = []
    for model, handle in both():
        if handle is not model:
            fx_approx.set_sampling(handle, 0.9)  # overridden
        fx_approx.set_sampling(handle, {"c": 0.25, "*": 0.75})
        fx_approx.set_sampling(handle, enabled={"a": False})
        results.append((trained(model), ratios(handle)))
    assert results[0] == results[1]
    assert results[0][1] == [(0.75, False), (0.75, True), (0.25, True)]


def test_a_glob_that_matches_no_graph_is_told_by_the_report() -> None:
    (_, _), (model, backend) = both()
    fx_approx.set_sampling(backend, {"a": 0.5, "no*": 0.25})
    fx_approx.set_sampling(backend, {"b": 0.5}, role="grad_weight")
    trained(model, steps=1)
    rules = [note for note in backend.report().notes if "matches the rule" in note]
    assert rules == [f"No layer of any graph so far matches the rule {rule!r}." for rule in ("no*", "b")]


def test_what_takes_no_backend_says_so() -> None:
    backend = fx_approx.backend(VALUE, inner="eager")
    assert repr(backend) == f"fx_approx.backend({VALUE!r})"
    for verb in (fx_approx.restore, analysis.gradient_noise, fx_approx.distributed.estimate_traffic):
        with pytest.raises(TypeError, match=r"got fx_approx.backend\(.*; this takes no backend"):
            verb(backend, *([INPUT] if verb is analysis.gradient_noise else []))
    with pytest.raises(ValueError, match="graphs: expected the layers and the state"):
        fx_approx.load_sampler_state_dict(backend, {"graphs": [{"layers": ["a"], "state": 3}]})


@pytest.mark.parametrize("compiled_before", [False, True])
def test_the_recommended_recipe(compiled_before: bool) -> None:
    """Exact warm-up, sampling, an exact tail that preserves: losses and weights as those of the transformed model."""
    results = []
    for model, handle in both():
        if compiled_before:
            trained(model, steps=2)
        schedule = ExactTail(ExactWarmup(PlanRatios(), 1), total=6, steps=2)
        with pytest.warns(fx_approx.errors.BatchNormWarning, match="too short"):
            scheduler = RatioScheduler(handle, schedule, preserve=True)
            losses = trained(model, scheduler)
        weights = [p.detach().clone() for p in model.parameters()]
        results.append((losses, scheduler.get_last_ratio(), scheduler.state_dict(), weights))
    (one, rates, state, weights), (other, others, other_state, other_weights) = results
    assert one == pytest.approx(other, rel=1e-6)
    assert rates == others == {"a": 1.0, "b": 1.0, "c": 1.0} and state == other_state
    assert all(torch.allclose(w, v, atol=1e-6) for w, v in zip(weights, other_weights, strict=True))


def test_one_selection_for_all_forwards_inside() -> None:
    for model, handle in both():
        with fx_approx.reuse_selection(handle):
            trained(model, steps=3)
            inside = fx_approx.sampler_state_dict(handle)
        after = fx_approx.sampler_state_dict(handle)
        if handle is not model:
            inside, after = (state["graphs"][0]["state"] for state in (inside, after))
        assert (inside["step"], after["step"]) == (0, 1)


def test_the_state_of_a_backend_goes_on_in_another_process_before_its_first_step() -> None:
    torch.manual_seed(0)
    policy = Uniform(0.5, "systematic")
    model = Net()
    first = fx_approx.backend(policy, inner="eager", seed=7)
    trained(torch.compile(model, backend=first), steps=3)
    state, weights = fx_approx.sampler_state_dict(first), copy.deepcopy(model.state_dict())
    expected = trained(torch.compile(model, backend=first), steps=3)
    model.load_state_dict(weights)
    torch._dynamo.reset()
    second = fx_approx.backend(policy, inner="eager")
    fx_approx.load_sampler_state_dict(second, state)
    assert trained(torch.compile(model, backend=second), steps=3) == expected
    with pytest.raises(ValueError, match="expected what sampler_state_dict gives of a backend"):
        fx_approx.load_sampler_state_dict(second, {"step": 1})


def test_graphs_for_other_shapes_follow() -> None:
    torch.manual_seed(0)
    model = Net()
    backend = fx_approx.backend(Uniform(0.5, scores="ema"), inner="eager")
    scheduler = RatioScheduler(backend, Constant(0.5))
    compiled = torch.compile(model, backend=backend, dynamic=False)
    loss_of(compiled).backward()
    scheduler.schedules = {"*": Constant(0.25)}
    scheduler.step()
    loss_of(compiled, (INPUT[:8], Y[:8])).backward()
    assert len(backend.pieces) == 2 and {ratio for ratio, _ in ratios(backend)} == {0.25}
    one, other = (piece._fx_approx.resample for piece in backend.pieces)
    for left, right in zip(one.each(), other.each(), strict=True):
        assert left.running is right.running and left.age is right.age
    assert one.held_indices is other.held_indices


def test_reports_verification_noise_and_statistics() -> None:
    found = []
    for model, handle in both():
        trained(model, steps=2)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        verification = analysis.verify(handle, INPUT, lambda result: F.cross_entropy(result, Y))
        assert verification.passed and verification.hoisted
        totals = fx_approx.report(handle).totals  # before graphs of half a batch, of which the last one counts
        controller = NoiseController(handle, loss_of, every=2, overhead=2.0)
        assert controller.step((INPUT, Y)) is None
        record = controller.step((INPUT, Y))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert record is not None and record.moved_to == controller.position
        assert fx_approx.recalibrate_batchnorm(handle, [INPUT + shift for shift in range(5)]) == 5
        found.append((totals, record, model.norm.running_mean.clone(), ratios(handle)[:3]))
    (totals, record, mean, rates), (others, other_record, other_mean, other_rates) = found
    assert totals == others and rates == other_rates
    assert record.sgd == pytest.approx(other_record.sgd, rel=1e-3)
    assert record.sampling == pytest.approx(other_record.sampling, rel=1e-3)
    assert torch.allclose(mean, other_mean, atol=1e-5)


def test_a_wrong_demand_is_found_through_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    (_, _), (model, backend) = both()
    trained(model, steps=1)
    (piece,) = backend.pieces
    run = piece._fx_approx.program.function
    monkeypatch.setattr(piece._fx_approx.program, "function", lambda *args: tuple(1.01 * value for value in run(*args)))
    assert not analysis.verify(backend, INPUT).passed


def test_a_controller_begins_with_the_first_step() -> None:
    (_, _), (model, backend) = both()
    controller = NoiseController(backend, loss_of, every=2, overhead=2.0)
    trained(model, steps=1)
    assert controller.step((INPUT, Y)) is None and controller.last == 3 * 7
    state = controller.state_dict()
    other = NoiseController(fx_approx.backend(VALUE, inner="eager"), loss_of, every=2, overhead=2.0)
    other.load_state_dict(state)  # waits for the layers
    assert other.step.__self__ is other


def test_passes_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    (_, _), (model, backend) = both()
    trained(model, steps=1)
    backend.print_passes()
    assert "== demand" in capsys.readouterr().out


def test_what_cannot_be_answered_says_so() -> None:
    backend = fx_approx.backend(VALUE, inner="eager")
    with pytest.raises(ValueError, match="needs the one model that this backend has compiled, it has none yet"):
        analysis.verify(backend, INPUT)
    with pytest.raises(ValueError, match="nothing was compiled"):
        fx_approx.report(backend)
    with pytest.raises(ValueError, match="ratio"):
        fx_approx.set_sampling(backend, 1.5)
    trained(torch.compile(Net(), backend=backend), steps=1)
    with pytest.raises(ValueError, match="no sampled layer matches 'd'"):
        fx_approx.set_sampling(backend, {"d": 0.5})
    with pytest.raises(TypeError, match=r"expected what fx_approx\.transform returned"):
        fx_approx.restore(backend)  # type: ignore[arg-type]
