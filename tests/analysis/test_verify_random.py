"""Verification of models that draw random numbers of their own, and of graphs that give None in place of a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fx_approx
from fx_approx.policies import Uniform

VALUE = Uniform(0.5)


class Between(nn.Module):
    """Something random between two layers that are sampled."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 3)
        self.between, self.calls = between, 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self, self.a(x).relu())
        return self.c(self.b(x).relu())


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
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
    class GraphView(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = model(), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Any:
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
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 32), nn.Linear(32, 3), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
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
