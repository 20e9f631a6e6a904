"""Whatever a forward does with the state of its model, at ratio 1.0 it is the model, and the user's is untouched."""

from __future__ import annotations

import os
import random
import warnings
from typing import Any

import hypothesis
import numpy
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import fx_approx
from fx_approx.policies import Uniform
from tests.capture.state_forwards import (
    CHANGES,
    READS,
    WIDTH,
    WRITES,
    State,
    copied,
    everything,
    generators,
    tensors_of,
)

MENU = [*(f"read {name}" for name in READS), *(f"write {name}" for name in WRITES)]
steps = st.lists(st.sampled_from(MENU), min_size=1, max_size=5)
MANY = int(os.environ.get("FX_APPROX_STATE_EXAMPLES", "2000"))


def built(outer: list[str], inner: list[str] | None, seed: int) -> State:
    def named(names: list[str]) -> list[Any]:
        return [{"read": READS, "write": WRITES}[name.partition(" ")[0]][name.partition(" ")[2]] for name in names]

    torch.manual_seed(seed)
    return State(named(outer), None if inner is None else State(named(inner)))


def stepped(model: nn.Module, x: Tensor, seed: int) -> Any:
    """One step of plain SGD: the output, or the kind of error that the model raises."""
    torch.manual_seed(seed), random.seed(seed), numpy.random.seed(seed)
    learnt = [t for t in tensors_of(model).values() if t.is_leaf and t.requires_grad]
    for tensor in learnt:
        tensor.grad = None
    try:
        output = model(x)
        output.square().mean().backward()
    except Exception as error:
        return type(error)
    with torch.no_grad():
        for tensor in learnt:
            if tensor.grad is not None:
                tensor -= 0.01 * tensor.grad
    return output.detach().numpy().tobytes()


def transformed(model: nn.Module, x: Tensor, scores: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_approx.errors.CaptureWarning)
        scope = "layer" if scores == "online" else "value"
        fx_approx.explain(model, Uniform(0.5, scores=scores, scope=scope), x)
        return fx_approx.transform(model, Uniform(1.0, scores=scores, scope=scope), x)


def assert_is_the_model(
    outer: list[str], inner: list[str] | None, change: str, modes: list[bool], scores: str, seed: int
) -> None:
    model = built(outer, inner, seed).train(modes[0])
    exact, x = copied(model), torch.randn(5, WIDTH)
    random.seed(seed), numpy.random.seed(seed)
    state, drawn = everything(model), generators()
    versions = {place: t._version for place, t in tensors_of(model).items()}
    approx = transformed(model, x, scores)
    assert everything(model) == state, "the user's model has changed"
    assert {place: t._version for place, t in tensors_of(model).items()} == versions
    assert generators() == drawn
    assert list(approx.state_dict()) == list(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_approx.errors.CaptureWarning)
        for number, mode in enumerate(modes):
            approx.train(mode), exact.train(mode)
            expected = stepped(exact, x, number)
            assert stepped(approx, x, number) == expected, f"output of step {number}"
            if isinstance(expected, type):
                return
            ours, theirs = everything(approx), everything(exact)
            assert {k: ours.get(k) for k in theirs} == theirs, f"state after step {number}"
            if number == 0:
                CHANGES[change](approx), CHANGES[change](exact)


given = hypothesis.given(
    outer=steps,
    inner=st.one_of(st.none(), steps),
    change=st.sampled_from(list(CHANGES)),
    modes=st.lists(st.booleans(), min_size=3, max_size=3),
    scores=st.sampled_from(["weight", "online"]),
    seed=st.integers(0, 1000),
)


@hypothesis.settings(max_examples=40)
@given
def test_at_ratio_one_it_is_the_model(**case: Any) -> None:
    assert_is_the_model(**case)


@pytest.mark.slow
@hypothesis.settings(max_examples=MANY, suppress_health_check=list(hypothesis.HealthCheck))
@given
def test_at_ratio_one_it_is_the_model_many_times(**case: Any) -> None:
    assert_is_the_model(**case)


@pytest.mark.parametrize("name", MENU)
@pytest.mark.parametrize("training", [True, False])
def test_each_step_alone(name: str, training: bool) -> None:
    assert_is_the_model(["read layer", name], None, "fill", [training] * 3, "weight", 0)


def test_a_policy_that_times_steps_leaves_the_model_alone() -> None:
    """It runs the forward, on tensors of its own."""
    names = ["read layer", "write average", "write attribute", "write parameters", "write held"]
    model = built(names, None, 0)
    random.seed(0), numpy.random.seed(0)
    state, drawn = everything(model), generators()
    versions = {place: t._version for place, t in tensors_of(model).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        view, _ = fx_approx.compiler.transform.view_of(model, Uniform(0.5, scores="online"), torch.ones(5, WIDTH))
        view.time([{}], repeats=1)
    assert (everything(model), generators()) == (state, drawn)
    assert {place: t._version for place, t in tensors_of(model).items()} == versions


def test_an_error_leaves_the_model_alone() -> None:
    model = built(["read penalty", "write average in the graph", "write number", "read spectral"], None, 0)
    x = torch.randn(5, WIDTH + 1)
    state, drawn = everything(model), generators()
    with pytest.raises(ValueError, match="does not run on them"):
        transformed(model, x, "weight")
    assert (everything(model), generators()) == (state, drawn)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["read numpy"], r"the value of ema as Python sees it \(numpy\), which tracing would freeze"),
        (["read numpy of x"], r"\.numpy of a value that depends on an input"),
        (["read gradient"], r"the value of l\.weight as Python sees it \(\.grad\)"),
        (["read array"], r"the values of the NumPy array self\.array"),
        (["read in an object"], r"a tensor of shape \(6,\) that is neither an attribute of a module nor made here"),
        (["write clamp"], r"a change in place of l\.weight"),
        (["write of a tensor"], r"an assignment to an attribute of l\.weight"),
    ],
)
def test_what_is_not_traced_says_why(names: list[str], reason: str) -> None:
    with pytest.warns(fx_approx.errors.CaptureWarning, match=reason):
        fx_approx.transform(built(["read layer", *names], None, 0), Uniform(0.5, scores="online"))


@pytest.mark.parametrize(
    "name",
    [
        *(
            "penalty",
            "vector",
            "named",
            "matrices",
            "other than",
            "buffers",
            "state dict",
            "modules",
            "children",
            "list",
        ),
        *("dict", "of attribute", "alphas", "another name", "shape", "rows", "wanted", "kind", "made", "functional"),
    ],
)
def test_what_can_be_traced_is(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fx_approx.transform(built(["read layer", f"read {name}"], None, 0), Uniform(0.5, scores="online"))


@pytest.mark.parametrize("change", ["grow", "freeze", "replace"])
def test_what_the_graph_takes_for_granted_is_checked(change: str) -> None:
    names = {"grow": "read penalty", "freeze": "read wanted", "replace": "read shape"}
    approx = fx_approx.transform(built([names[change]], None, 0), Uniform(0.5, scores="online"))
    CHANGES[change](approx)
    if change == "replace":
        approx.l.weight = nn.Parameter(torch.randn(WIDTH + 1, WIDTH))
        approx.l.bias = None
    with pytest.warns(fx_approx.errors.CaptureWarning, match="the graph of State cannot serve this call"):
        approx(torch.randn(5, WIDTH))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("trace", [torch.jit.script, torch.fx.symbolic_trace])
def test_scripting_and_tracing_a_transformed_model_say_what_to_do(trace: Any) -> None:
    approx = fx_approx.transform(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), Uniform(0.5, scores="online"))
    for model in (approx, nn.Sequential(approx)):
        with pytest.raises(fx_approx.errors.CaptureError, match=r"fx_approx\.restore\(model\)"):
            trace(model)
    trace(fx_approx.restore(approx))
