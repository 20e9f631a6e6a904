"""Whatever a forward does with the state of its model, at ratio 1.0 it is the model, and the user's is untouched."""

from __future__ import annotations

import copy
import os
import random
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import hypothesis
import numpy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, parametrizations

import fx_approx
from fx_approx.policies import Uniform
from tests.helpers.quick import thinned

# ---- random forwards that read, write and iterate over the state of their model


WIDTH = 6
OUTSIDE = torch.full((WIDTH,), 0.25)

Step = Callable[[Any, Tensor], Tensor]


def _reads() -> dict[str, Step]:
    return {
        "layer": lambda s, x: s.l(x).relu(),
        "norm": lambda s, x: s.bn(x),
        "dropout": lambda s, x: F.dropout(x, 0.5, s.training),
        "child": lambda s, x: s.child(x),
        "spectral": lambda s, x: s.sn(x) + s.sn.weight.mean(),
        "penalty": lambda s, x: x + torch.cat([p.flatten() for p in s.parameters()]).mean(),
        "vector": lambda s, x: x + parameters_to_vector(s.l.parameters()).square().sum(),
        "named": lambda s, x: x + sum(p.square().mean() for n, p in s.named_parameters() if "weight" in n),
        "matrices": lambda s, x: x + sum(p.abs().mean() for p in s.parameters() if p.dim() > 1 and p.requires_grad),
        "other than": lambda s, x: x + sum(p.sum() for p in s.parameters() if p is not s.l.weight),
        "buffers": lambda s, x: x + sum(b.float().mean() for b in s.buffers()),
        "named buffers": lambda s, x: x + dict(s.named_buffers())["ema"] * 2,
        "state dict": lambda s, x: x + s.state_dict()["l.weight"].mean() + s.state_dict()["ema"],
        "modules": lambda s, x: x + sum(m.weight.norm() for m in s.modules() if isinstance(m, nn.Linear)),
        "children": lambda s, x: x + sum(p.mean() for m in s.children() for p in m._parameters.values()),
        "own parameters": lambda s, x: x * s._parameters["gain"].exp(),
        "vars": lambda s, x: x + vars(s)["_buffers"]["ema"].cos() + vars(s)["alphas"].sum(),
        "list": lambda s, x: x + sum(p * (i + 1) for i, p in enumerate(s.several)),
        "dict": lambda s, x: x + sum(p.tanh() for p in s.named.values()) + s.named["a"],
        "attribute": lambda s, x: x / s.temp,
        "of attribute": lambda s, x: x / s.temp.clamp(min=0.01) + s.temp * 2,
        "alphas": lambda s, x: x * s.alphas.softmax(0),
        "another name": lambda s, x: x * (s.same + 1),
        "held": lambda s, x: x + s.held[0].sin(),
        "paired": lambda s, x: x + s.pair[1],
        "in an object": lambda s, x: x + s.box.value * 2,
        "outside": lambda s, x: x + OUTSIDE.exp(),
        "array": lambda s, x: x * float(s.array[1]) + torch.from_numpy(s.array[1:]).float().mean(),
        "item": lambda s, x: x * s.ema.mean().item(),
        "float": lambda s, x: x * float(s.temp),
        "branch": lambda s, x: x.relu() if s.ema.sum() > 0 else x.tanh(),
        "numbers": lambda s, x: x + s.ema.tolist()[0],
        "numpy": lambda s, x: x + float(s.ema.numpy()[0]),
        "numpy of x": lambda s, x: x + torch.from_numpy(numpy.cos(x.detach().numpy())),
        "equal": lambda s, x: x + 1 if torch.equal(s.ema, s.ema.round()) else x,
        "data": lambda s, x: x * s.l.weight.data.norm() + s.gain.detach().mean(),
        "gradient": lambda s, x: x if s.l.weight.grad is None else x + s.l.weight.grad.norm(),
        "history": lambda s, x: x * 2 if x.grad_fn is None else x,
        "shape": lambda s, x: x * s.l.weight.shape[0] + len(s.several[0]) + s.ema.numel(),
        "rows": lambda s, x: x + sum(row.mean() for row in s.l.weight),
        "wanted": lambda s, x: x * 2 if s.l.weight.requires_grad else x,
        "kind": lambda s, x: x.to(s.gain.dtype) if isinstance(s.temp, Tensor) else x * 3,
        "alike": lambda s, x: x + torch.ones_like(s.ema) + s.ema.new_zeros(WIDTH),
        "made": lambda s, x: x + _filled(s),
        "changed": lambda s, x: _changed(x),
        "last": lambda s, x: x if s.last is None else x + s.last.mean(),
        "functional": lambda s, x: F.linear(x, s.l.weight * s.temp, s.l.bias).tanh(),
        "merged": lambda s, x: torch.func.functional_call(s.l, {k: v * 2 for k, v in s.l.named_parameters()}, x),
    }


def _filled(s: Any) -> Tensor:
    made = torch.zeros(WIDTH)
    made += s.gain
    made[1:] = s.ema[1:]
    return made * 2


def _changed(x: Tensor) -> Tensor:
    made = torch.zeros(x.shape[0], WIDTH) if not isinstance(x.shape[0], int) else torch.zeros(5, WIDTH)
    made.add_(x)
    return made * 2 + made[0]


def _write(change: Callable[[Any, Tensor], Any]) -> Step:
    def run(s: Any, x: Tensor) -> Tensor:
        change(s, x)
        return x

    return run


@torch.no_grad()
def _averaged(s: Any, x: Tensor) -> None:
    s.ema.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)


def _decayed(s: Any, x: Tensor) -> None:
    for buffer in s.buffers():
        if buffer.is_floating_point():
            buffer.mul_(0.9)


def _shrunk(s: Any, x: Tensor) -> None:
    for parameter in s.parameters():
        parameter.data.mul_(0.99)


@torch.no_grad()
def _kept(s: Any, x: Tensor) -> None:
    for own, other in zip(s.several, s.named.values(), strict=False):
        own.lerp_(other, 0.1)


def _writes() -> dict[str, Step]:
    return {
        "count": _write(lambda s, x: s.count.add_(1)),
        "count in place": _write(lambda s, x: setattr(s, "count", s.count.__iadd__(1))),
        "average": _write(_averaged),
        "average in the graph": _write(lambda s, x: s.ema.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)),
        "element": _write(lambda s, x: s.ema.__setitem__(0, x.detach().mean())),
        "decay": _write(_decayed),
        "by state dict": _write(lambda s, x: s.state_dict()["ema"].add_(0.125)),
        "parameters": _write(_shrunk),
        "parameters kept": _write(_kept),
        "data": _write(lambda s, x: setattr(s.gain, "data", s.gain.data * 0.5)),
        "clamp": _write(lambda s, x: s.l.weight.data.clamp_(-0.3, 0.3)),
        "attribute": _write(lambda s, x: s.temp.mul_(0.99)),
        "attribute anew": _write(lambda s, x: setattr(s, "temp", s.temp * 0.99)),
        "held": _write(lambda s, x: s.held[0].add_(0.5)),
        "array": _write(lambda s, x: s.array.__setitem__(1, s.array[1] + 1)),
        "number": _write(lambda s, x: setattr(s, "calls", s.calls + 1)),
        "last": _write(lambda s, x: setattr(s, "last", x.detach())),
        "of a tensor": _write(lambda s, x: setattr(s.l.weight, "mark", x.detach().mean())),
        "outside numbers": _write(lambda s, x: setattr(s, "drawn", random.random() + float(numpy.random.rand()))),
        "noise": _write(lambda s, x: s.ema.add_(torch.rand(WIDTH))),
        "foreach": _write(lambda s, x: torch._foreach_mul_([s.ema, s.temp], 0.75)),
    }


READS, WRITES = _reads(), _writes()


class State(nn.Module):
    """A module with state of every kind, whose forward is a list of steps."""

    def __init__(self, steps: Sequence[Step], child: State | None = None) -> None:
        super().__init__()
        self.l, self.bn = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)
        self.sn = parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.gain = nn.Parameter(torch.randn(WIDTH) / 8)
        self.several = nn.ParameterList([torch.randn(WIDTH) / 8 for _ in range(2)])
        self.named = nn.ParameterDict({"a": torch.randn(WIDTH) / 8, "b": torch.randn(WIDTH) / 8})
        self.register_buffer("ema", torch.randn(WIDTH) / 8)
        self.register_buffer("count", torch.zeros((), dtype=torch.long), persistent=False)
        self.temp: Any = torch.tensor(1.5)
        self.same = self.temp
        self.alphas = torch.randn(WIDTH, requires_grad=True)
        self.held, self.pair = [torch.randn(WIDTH)], (1.0, torch.randn(WIDTH))
        self.box = SimpleNamespace(value=torch.randn(WIDTH))
        self.array = numpy.array([numpy.nan, 0.5, 2.0])
        self.calls, self.drawn, self.last = 0, 0.0, None
        self.child = nn.Identity() if child is None else child
        self.steps = tuple(steps)

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(self, x)
        return self.l(x)


def _anneal(model: Any) -> None:
    model.temp = torch.tensor(0.75)


@torch.no_grad()
def _fill(model: Any) -> None:
    model.alphas.fill_(0.5), model.ema.add_(1), model.held[0].mul_(2)


def _freeze(model: Any) -> None:
    model.l.weight.requires_grad_(False)


def _grow(model: Any) -> None:
    model.several.append(torch.full((WIDTH,), 0.125))


def _replace(model: Any) -> None:
    model.gain = nn.Parameter(torch.full((WIDTH,), 0.0625))


def _unset(model: Any) -> None:
    model.last = torch.ones(WIDTH)


CHANGES: dict[str, Callable[[Any], None]] = {
    "nothing": lambda model: None, "anneal": _anneal, "fill": _fill, "freeze": _freeze, "grow": _grow,
    "replace": _replace, "unset": _unset,
}  # fmt: skip
"""What a user may do to a model between two steps."""


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of a model by place, those in containers and objects too."""
    found: dict[str, Tensor] = {}

    def visit(place: str, value: Any) -> None:
        if isinstance(value, Tensor):
            found[place] = value
            for name, inner in vars(value).items():
                visit(f"{place}.{name}", inner)
        elif isinstance(value, (list, tuple)):
            for number, inner in enumerate(value):
                visit(f"{place}[{number}]", inner)
        elif isinstance(value, SimpleNamespace):
            visit(f"{place}.value", value.value)

    for path, module in model.named_modules():
        for held in (module._parameters, module._buffers, vars(module)):
            for name, value in held.items():
                visit(f"{path}.{name}", value)
    return found


def bits(tensor: Tensor | None) -> Any:
    """A tensor's data bit by bit, so that NaN is equal to itself and -0 is not 0."""
    return None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.detach().numpy().tobytes())


def everything(model: nn.Module) -> dict[str, Any]:
    """All state of a model: of each tensor its bits, its gradient and whether it wants one; arrays and numbers."""
    state: dict[str, Any] = {
        place: (bits(t), t.requires_grad, bits(t.grad) if t.is_leaf else None) for place, t in tensors_of(model).items()
    }
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, numpy.ndarray):
                state[f"{path}.{name}"] = value.tobytes()
            elif isinstance(value, (int, float, str, type(None))):
                state[f"{path}.{name}"] = value
    return state


def generators() -> Any:
    """The states of all generators, to be compared."""
    return random.getstate(), str(numpy.random.get_state()), bits(torch.get_rng_state())


def copied(model: State) -> State:
    """A copy that shares nothing with ``model``."""
    return copy.deepcopy(model)


# ---- as they are and transformed


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


@pytest.mark.slow
@hypothesis.settings(max_examples=15)
@given
def test_at_ratio_one_it_is_the_model(**case: Any) -> None:
    assert_is_the_model(**case)


@pytest.mark.slow
@hypothesis.settings(max_examples=MANY, suppress_health_check=list(hypothesis.HealthCheck))
@given
def test_at_ratio_one_it_is_the_model_many_times(**case: Any) -> None:
    assert_is_the_model(**case)


@pytest.mark.parametrize("name", thinned(MENU, 3))
def test_each_step_alone(name: str) -> None:
    assert_is_the_model(["read layer", name], None, "fill", [True, False, True], "weight", 0)


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
