"""What the Dynamo frontend could get wrong, most of it findings of a review, and activation checkpoints."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import fx_approx
from fx_approx.policies import Override, Uniform
from fx_approx.runtime.checkpoints import CHECKPOINT_KEY, Checkpoint, outlined
from tests.helpers.modules import made_of
from tests.helpers.quick import thinned

VALUE = Uniform(0.5)
EXACT = Uniform(1.0, scope="layer")
X = torch.randn(6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


class Net(nn.Module):
    """``function`` stands between the second layer and the third."""

    def __init__(self, function: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16, dtype=torch.float64) for _ in range(3))
        self.function = function

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        result: Tensor = self.c(self.function(self.b(torch.tanh(self.a(x * factor)))))
        return result


def compiled(model: Any, policy: Any = VALUE, inner: str = "eager", **options: Any) -> tuple[Any, Any]:
    backend = fx_approx.backend(policy, inner=inner, **options)
    return torch.compile(model, backend=backend), backend


def step(model: nn.Module, call: Callable[..., Tensor], *inputs: Any) -> list[Tensor]:
    model.zero_grad()
    output = call(*inputs)
    output.square().mean().backward()
    return [output.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters())]


def without_gradient(change: Callable[[Tensor], object]) -> Callable[[Tensor], Tensor]:
    def function(h: Tensor) -> Tensor:
        with torch.no_grad():
            change(h)
        return h

    return function


def on_another_name(h: Tensor) -> Tensor:
    F.elu_(h.detach())
    return h


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "another-name": on_another_name,
    "elu_": without_gradient(F.elu_),
    "foreach": without_gradient(lambda h: torch._foreach_mul_([h], 2.0)),
    "out": without_gradient(lambda h: torch.clamp(h, -0.1, 0.1, out=h)),
    "imul": without_gradient(lambda h: h.__imul__(0.5)),
    "setitem": without_gradient(lambda h: h.__setitem__(slice(0, 2), 0.5)),
    "elu_, with gradients": F.elu_,
    "relu_, with gradients": F.relu_,
    "threshold, with gradients": lambda h: F.threshold(h, 0.1, 0.2, inplace=True),
    "imul, with gradients": lambda h: h.__imul__(2.0),
}


@pytest.mark.parametrize(
    ("name", "shape", "inner"),
    thinned(zip(CHANGES, itertools.cycle([(6, 16), (2, 3, 16)]), itertools.cycle(["eager", "aot_eager"]))),
)
def test_changes_in_place_between_hoisted_layers(name: str, shape: tuple[int, ...], inner: str) -> None:
    model = Net(CHANGES[name])
    found = []
    for demand in (True, False):
        torch._dynamo.reset()
        found.append(step(model, compiled(model, inner=inner, prune_unread=demand)[0], X.view(shape)))
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


def test_parameters_that_change_places() -> None:
    model = Net()
    call, _ = compiled(model)
    step(model, call, X)
    model.a.weight, model.b.weight = model.b.weight, model.a.weight
    found = step(model, call, X)
    torch._dynamo.reset()
    torch.testing.assert_close(found, step(model, compiled(model)[0], X))


@pytest.mark.parametrize("kind", ["off", "ratio"])
def test_settings_outlive_another_shape(kind: str) -> None:
    model = Net()
    call, backend = compiled(model)
    step(model, call, X)
    if kind == "off":
        fx_approx.set_sampling(backend.pieces[0], enabled=False)
    else:
        fx_approx.set_sampling(backend.pieces[0], 0.25)
    step(model, call, X[:4])
    assert model.c.weight.grad is not None
    assert int((model.c.weight.grad != 0).any(0).sum()) == (16 if kind == "off" else 4)


def test_more_ratios_than_torch_compiles_go_on_uncompiled() -> None:
    model = Net()
    call, backend = compiled(model, inner="aot_eager")
    limit = 2
    with torch._dynamo.config.patch(recompile_limit=limit), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for kept in range(1, limit + 3):
            fx_approx.set_sampling(backend.pieces[0], kept / 16) if backend.pieces else None
            step(model, call, X)
            if kept > 1:
                assert int((model.c.weight.grad != 0).any(0).sum()) == kept  # type: ignore[union-attr]
    assert any("runs uncompiled now" in str(one.message) for one in caught)


class Head(nn.Module):
    """The graph break comes while the head waits on the stack, so that the second graph knows nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 16).double(), nn.Linear(16, 8).double()

    def features(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return torch.tanh(self.body(x))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.features(x))
        return result


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_layer_behind_a_graph_break_keeps_its_name_and_rules_find_it() -> None:
    model = Head()
    call, backend = compiled(model, Override({"head": EXACT}, VALUE))
    step(model, call, X)
    rows = backend.report().rows
    assert [(row.name, bool(row.samples)) for row in rows] == [("body", True), ("head", False)]
    assert [decision.name for decision in fx_approx.backend(VALUE).explain(model, X).plan] == ["body", "head"]


@made_of(lambda: {"a": nn.Linear(16, 16).double()})
def Twice(self: Any, x: Tensor) -> Tensor:
    x = torch.tanh(self.a(x))
    torch._dynamo.graph_break()
    return self.a(x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_one_layer_in_two_graphs_counts_twice() -> None:
    model = Twice()
    call, backend = compiled(model)
    step(model, call, X)
    assert [row.name for row in backend.report().rows] == ["a", "a"]
    with pytest.raises(ValueError, match="several graphs multiply by a, and one plan cannot tell them apart"):
        fx_approx.backend(VALUE).explain(model, X)


def test_replaced_layers_leave_the_report() -> None:
    model = Net()
    call, backend = compiled(model)
    step(model, call, X)
    model.b = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).double()
    step(model, call, X)
    assert [row.name for row in backend.report().rows] == ["a", "b.0", "b.1", "c"]


class Hidden(nn.Module):
    """Modules that ``eval()`` does not reach."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.own = nn.Linear(16, 16).double()
        hidden = nn.Linear(16, 16).double()
        self.kind, self.blocks = kind, [hidden]
        self.named = nn.ModuleDict({"x[0]": nn.Linear(16, 16).double()})
        self.__dict__["attribute"] = hidden

    def forward(self, x: Tensor) -> Tensor:
        layer = {"list": self.blocks[0], "attribute": self.__dict__["attribute"], "key": self.named["x[0]"]}[self.kind]
        result: Tensor = self.own(torch.tanh(layer(x)))
        return result


def test_a_key_that_is_no_name_is_still_a_path() -> None:
    model = Hidden("key")
    call, backend = compiled(model, inner="eager")
    step(model, call, X)
    assert [(row.name, bool(row.samples)) for row in backend.report().rows] == [("named.x[0]", True), ("own", True)]
    model.eval()
    torch.testing.assert_close(call(X), model(X), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["list", "attribute"])
def test_modules_that_no_flag_reaches_are_exact(kind: str) -> None:
    model = Hidden(kind)
    call, backend = compiled(model)
    step(model, call, X)
    reasons = {row.name: row.reason for row in backend.report().rows if not row.samples}
    assert len(reasons) == 1 and "no registered submodule" in next(iter(reasons.values()))
    model.eval()
    torch.testing.assert_close(call(X), model(X), rtol=0, atol=1e-12)


def test_numbers_that_change_are_inputs() -> None:
    model = Net()
    call, backend = compiled(model)
    for factor in (0.5, 0.7, 0.9):
        approx = fx_approx.transform(Net(), VALUE, X)
        approx.load_state_dict(model.state_dict())
        torch.testing.assert_close(step(model, call, X, factor), step(approx, approx, X * factor))
    assert backend.report().totals.demanded > 0


@made_of(lambda: {"first": parametrizations.orthogonal(nn.Linear(16, 16).double()), "last": nn.Linear(16, 8).double()})
def Orthogonal(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    weight = self.first.weight
    return self.last(torch.tanh(F.linear(x, weight))), weight


def test_a_parametrisation_makes_its_weight_exactly() -> None:
    model = Orthogonal()
    call, backend = compiled(model)
    _, weight = call(X)
    torch.testing.assert_close(weight @ weight.T, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-12)
    assert backend.report()["last"].samples


def test_the_eager_backend_has_second_derivatives() -> None:
    model, x = Net(), X.clone().requires_grad_()
    call, _ = compiled(model, inner="eager")
    (first,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
    first.square().sum().backward()
    assert model.a.weight.grad is not None and model.a.weight.grad.abs().max() > 0


def test_functional_call() -> None:
    model = Net()
    call, _ = compiled(model)
    values = {name: p.detach() * 2 for name, p in model.named_parameters()}
    found = torch.func.functional_call(call, values, (X,))
    twin = Net()
    twin.load_state_dict(values)
    torch._dynamo.reset()
    torch.testing.assert_close(found, compiled(twin)[0](X))


class Transformed(Net):
    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        result: Tensor = torch.vmap(lambda row: super(Transformed, self).forward(row.unsqueeze(0), factor))(x)
        return result.squeeze(1)


def test_function_transforms_inside_stay_exact_and_leave_nothing_behind() -> None:
    model = Transformed()
    call, _ = compiled(model)
    with pytest.warns(fx_approx.errors.CaptureWarning, match="a graph stays exact: it contains"):
        found = step(model, call, X)
    torch.testing.assert_close(found, step(model, model, X))
    other = Net()
    call, backend = compiled(other)
    step(other, call, X)
    assert len(backend.pieces) == 1


class Data(Net):
    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        h = self.a(x)
        result: Tensor = self.c(self.b(h) + h.data.mean())
        return result


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_what_cannot_be_traced_a_second_time_runs_exactly() -> None:
    model = Data()
    call, _ = compiled(model, inner="aot_eager")
    with pytest.warns(fx_approx.errors.CaptureWarning, match="a graph stays exact"):
        found = [step(model, call, X) for _ in range(2)]
    torch.testing.assert_close(found[0], step(model, model, X))
    torch.testing.assert_close(found[1], found[0])


def test_arguments_named_like_what_modules_have() -> None:
    half, body = nn.Linear(16, 16).double(), Net()
    call, backend = compiled(lambda half, x, body: body(half(x)))
    call(half, X, body).sum().backward()
    assert [row.name for row in backend.report().rows] == ["half_", "body.a", "body.b", "body.c"]


# ---- checkpoints: sampled, and recomputed with the selections of the forward


POLICIES = {
    "value": VALUE,
    "online": Uniform(0.5, scores="online"),
    "random": Uniform(0.5, "systematic", scores="uniform", scope="layer"),
    "ema": Uniform(0.5, scores="ema"),
}
NAMES = ["first", "middle", "second", "head"]


def _keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op is torch.ops.aten.mm.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _whole(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


def _selective(function: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    context = functools.partial(create_selective_checkpoint_contexts, _keep_products)
    return checkpoint(function, x, use_reentrant=False, context_fn=context)


CALLS: dict[str, Callable[..., Any]] = {
    "plain": functools.partial(checkpoint, use_reentrant=False),
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "selective": _selective,
}


class Residual(nn.Module):
    """A residual block inside of ``outer`` and ``inner``, which call a function, checkpointed or not."""

    def __init__(self, outer: Callable[..., Any] = _whole, inner: Callable[..., Any] = _whole) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(16, 24), nn.Linear(24, 24)
        self.second, self.head = nn.Linear(24, 16), nn.Linear(16, 4)
        self.dropout = nn.Dropout(0.0)
        self.outer, self.inner = outer, inner

    def narrow(self, x: Tensor) -> Tensor:
        result: Tensor = self.dropout(torch.tanh(self.middle(torch.relu(x))))
        return result

    def block(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.second(self.inner(self.narrow, self.first(x)))
        return result

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.tanh(self.outer(self.block, torch.tanh(x))))
        return result


def trained(
    outer: Any, inner: Any, policy: Any, backend: str, dropout: float = 0.0, steps: int = 2
) -> tuple[list[Tensor], Any]:
    """Gradients of some steps, and the backend."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Residual(outer, inner).double()
    model.dropout.p = dropout
    sampling = fx_approx.backend(policy, inner=backend, seed=3)
    compiled = torch.compile(model, backend=sampling, fullgraph=True)
    inputs = torch.randn(5, 16, dtype=torch.float64)
    found = []
    for _ in range(steps):
        model.zero_grad()
        x = inputs.clone().requires_grad_()
        compiled(x).square().sum().backward()
        found += [x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    return found, sampling


@pytest.mark.parametrize(
    ("policy", "call"),
    [("value", "plain"), ("online", "reentrant"), ("random", "selective"), ("ema", "plain"), ("ema", "reentrant")],
)
def test_gradients_are_those_without_a_checkpoint(policy: str, call: str) -> None:
    expected, _ = trained(_whole, _whole, POLICIES[policy], "eager")
    found, sampling = trained(CALLS[call], _whole, POLICIES[policy], "eager")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert [row.name for row in sampling.report().rows if row.samples] == NAMES


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("policy", ["value", pytest.param("online", marks=pytest.mark.slow)])
def test_compiled_gradients_are_those_without_a_checkpoint(inner: str, policy: str) -> None:
    expected, _ = trained(_whole, _whole, POLICIES[policy], inner, steps=1)
    found, _ = trained(CALLS["plain"], _whole, POLICIES[policy], inner, steps=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_checkpoints_in_checkpoints_and_dropout() -> None:
    expected, _ = trained(_whole, _whole, VALUE, "eager", 0.4)
    found, sampling = trained(CALLS["plain"], CALLS["plain"], VALUE, "eager", 0.4)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert [row.name for row in sampling.report().rows if row.samples] == NAMES


def test_the_body_is_computed_again_at_its_sampled_size() -> None:
    counts = {}
    for name, outer in (("whole", _whole), ("checkpointed", CALLS["plain"])):
        _, sampling = trained(outer, _whole, VALUE, "eager", steps=1)
        (piece,) = sampling.pieces
        with FlopCounterMode(display=False) as counter:
            (output,) = piece(torch.randn(5, 16, dtype=torch.float64))
            output.sum().backward()
        counts[name] = counter.get_total_flops()
    # Half of the inputs of each; the first two compute what is read of them only. The last need not be computed again.
    again = 2 * 5 * (8 * 12 + 12 * 12)
    assert again <= counts["checkpointed"] - counts["whole"] <= again + 2 * 5 * 12 * 16


def test_what_passes_put_between_goes_into_the_body_and_what_only_reads_it_stays_behind() -> None:
    graph, one = fx.Graph(), Checkpoint({})
    x = graph.placeholder("x")
    inside = graph.call_function(torch.tanh, (x,))
    between = graph.call_function(torch.neg, (inside,))
    watching = graph.call_function(torch.abs, (inside,))
    last = graph.call_function(torch.sin, (between,))
    inside.meta[CHECKPOINT_KEY] = last.meta[CHECKPOINT_KEY] = (one,)
    graph.output((last, watching))
    bodies: list[list[Any]] = []

    def compiled(body: fx.Graph) -> Callable[..., Any]:
        bodies.append([node.target for node in body.nodes if node.op == "call_function"])
        function: Callable[..., Any] = fx.GraphModule(nn.Module(), body).forward
        return lambda model, *inputs: function(*inputs)

    made = outlined(graph, compiled)
    assert bodies == [[torch.tanh, torch.neg, torch.sin]]
    value = torch.randn(3, requires_grad=True)
    found = fx.GraphModule(nn.Module(), made)(None, value)
    torch.testing.assert_close(found, (torch.sin(-torch.tanh(value)), torch.tanh(value).abs()))
    found[0].sum().backward()
    expected = -torch.cos(torch.tanh(value)) * (1 - torch.tanh(value) ** 2)
    torch.testing.assert_close(value.grad, expected.detach())
