"""Activation checkpoints in the Dynamo frontend: sampled, and recomputed with the selections of the forward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import fx_approx
from fx_approx.policies import Uniform
from fx_approx.runtime.checkpoints import CHECKPOINT_KEY, Checkpoint, outlined

VALUE = Uniform(0.5)
POLICIES = {
    "value": VALUE,
    "online": Uniform(0.5, scores="online"),
    "random": Uniform(0.5, "systematic", scores="uniform", scope="layer"),
    "ema": Uniform(0.5, scores="ema"),
}
NAMES = ["first", "middle", "second", "head"]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


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


class Net(nn.Module):
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
    model = Net(outer, inner).double()
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


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("call", CALLS)
def test_gradients_are_those_without_a_checkpoint(policy: str, call: str) -> None:
    expected, _ = trained(_whole, _whole, POLICIES[policy], "eager")
    found, sampling = trained(CALLS[call], _whole, POLICIES[policy], "eager")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert [row.name for row in sampling.report().rows if row.samples] == NAMES


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
