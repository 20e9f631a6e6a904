"""A backend answers the same calls as a transformed model, before its first step and after it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_approx
from fx_approx import analysis
from fx_approx.policies import Uniform
from fx_approx.runtime.approx_module import find
from fx_approx.schedules import Constant, ExactTail, ExactWarmup, NoiseController, PlanRatios, RatioScheduler

VALUE = Uniform(0.5)
X, Y = torch.randn(16, 32, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 10


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.c = nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.c(F.dropout(F.relu(self.b(F.relu(self.norm(self.a(x))))), 0.1, self.training))
        return result


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor] = (X, Y)) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def both() -> tuple[tuple[nn.Module, Any], tuple[nn.Module, Any]]:
    """The same network, transformed, and compiled in place by a backend: what is called, and what is set."""
    torch.manual_seed(0)
    exact = Net()
    approx, backend = fx_approx.transform(copy.deepcopy(exact), VALUE, X), fx_approx.backend(VALUE, inner="eager")
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
    loss_of(compiled, (X[:8], Y[:8])).backward()
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
        verification = analysis.verify(handle, X, lambda result: F.cross_entropy(result, Y))
        assert verification.passed and verification.hoisted
        controller = NoiseController(handle, loss_of, every=2, overhead=2.0)
        assert controller.step((X, Y)) is None
        record = controller.step((X, Y))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert record is not None and record.moved_to == controller.position
        assert fx_approx.recalibrate_batchnorm(handle, [X + shift for shift in range(5)]) == 5
        found.append((fx_approx.report(handle).totals, record, model.norm.running_mean.clone(), ratios(handle)[:3]))
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
    assert not analysis.verify(backend, X).passed


def test_a_controller_begins_with_the_first_step() -> None:
    (_, _), (model, backend) = both()
    controller = NoiseController(backend, loss_of, every=2, overhead=2.0)
    trained(model, steps=1)
    assert controller.step((X, Y)) is None and controller.last == 3 * 7
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
        analysis.verify(backend, X)
    with pytest.raises(ValueError, match="nothing was compiled"):
        fx_approx.report(backend)
    with pytest.raises(ValueError, match="ratio"):
        fx_approx.set_sampling(backend, 1.5)
    trained(torch.compile(Net(), backend=backend), steps=1)
    with pytest.raises(ValueError, match="no sampled layer matches 'd'"):
        fx_approx.set_sampling(backend, {"d": 0.5})
    with pytest.raises(TypeError, match=r"expected what fx_approx\.transform returned"):
        fx_approx.restore(backend)  # type: ignore[arg-type]
