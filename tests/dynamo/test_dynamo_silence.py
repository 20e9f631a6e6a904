"""The Dynamo frontend never does nothing in silence: warnings with reasons, and reports of the whole step."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fx_approx
from fx_approx._compat import compiles_in_place
from fx_approx.policies import Exact, Paper, Uniform

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
