"""Models of which a run on fake tensors shows a part only: the rest is sampled without sharing."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_approx
from fx_approx import Plan
from fx_approx.core.plan import Policy
from fx_approx.policies import Exact, FlopBudget, MemoryBudget, Override, Paper, Uniform
from tests.helpers.modules import made_of

pytestmark = pytest.mark.filterwarnings("ignore::fx_approx.errors.CaptureWarning")

VALUE = Uniform(0.5)
X = torch.randn(8, 16)


@made_of(lambda: {"first": nn.Linear(32, 32), "second": nn.Linear(32, 32)})
def Branching(self: Any, x: Tensor) -> Tensor:
    """Python goes another way for some values."""
    if torch.isinf(x).any():
        x = x.nan_to_num()
    return self.second(self.first(x).relu())


@made_of(lambda: {"layers": nn.ModuleList(nn.Linear(32, 32) for _ in range(3))})
def Dropping(self: Any, x: Tensor) -> Tensor:
    """LayerDrop: each layer runs or not, by chance."""
    for layer in self.layers:
        if not self.training or torch.rand(()) > 0.3:
            x = layer(x).relu()
    return x


class Routed(nn.Module):
    """Each row goes to the expert that the gate names."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        chosen, out = self.gate(x).argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().squeeze(-1)
            out = out.index_add(0, rows, expert(x[rows]))
        return out


@made_of(lambda: {"a": nn.Linear(16, 64), "b": nn.Linear(64, 64), "c": nn.Linear(64, 32)})
def Body(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    kept = self.a(x).relu()
    return self.c(self.b(kept).relu()), kept


class Around(nn.Module):
    """A part that stops the run, with layers behind it that read what was made before it."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.body, self.part = Body(), part
        self.tail, self.skip = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 5)), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        out, kept = self.body(x)
        return self.tail(self.part(out)) + self.skip(kept)


class BodyAlone(nn.Module):
    def __init__(self, whole: Around) -> None:
        super().__init__()
        self.body = whole.body

    def forward(self, x: Tensor) -> Tensor:
        out, kept = self.body(x)
        return out.sum() + kept.sum()


@made_of(
    lambda: {"a": nn.Linear(16, 32), "b": nn.Linear(32, 16), "pooler": nn.Linear(16, 16), "tied": nn.Linear(16, 4)}
)
def Uncalled(self: Any, x: Tensor) -> Tensor:
    """A pooler that the forward leaves out, and a layer of which only the weight is read, beside untraced Python."""
    rows = [self.b(self.a(row).relu()) @ self.tied.weight.T for row in x]
    return torch.stack(rows)


@made_of(lambda: {"enter": nn.Linear(16, 16), "t": nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)})
def Translate(self: Any, x: Tensor) -> Tensor:
    """``nn.Transformer``, whose decoder asks whether the values of the mask are those of a causal one."""
    x = self.enter(x[None])
    return self.t(x, x, tgt_mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1]))  # type: ignore[no-any-return]


PARTS = [Branching, Dropping, Routed]
UNKNOWN = "not shared: its shapes are not known"


@pytest.mark.parametrize(("part", "scope"), [(Branching, "value"), (Dropping, "group"), (Routed, "value")])
def test_what_is_known_is_shared_as_without_the_rest(part: type[nn.Module], scope: str) -> None:
    torch.manual_seed(0)
    model = Around(part())
    policy = Uniform(0.5, scope=scope)
    approx = fx_approx.transform(model, policy, X)
    report = fx_approx.report(approx)
    alone = fx_approx.report(fx_approx.transform(BodyAlone(model), policy, X))
    for name in ("body.a", "body.b", "body.c"):
        assert (report[name].exact, report[name].samples) == (alone[name].exact, alone[name].samples)
        assert UNKNOWN not in report[name].reason
    # Of the first value another layer, behind the part, reads other channels; the next has one reader.
    assert not report["body.a"].demand and report["body.b"].demand
    for row in report.rows:
        if not row.name.startswith("body"):
            assert row.exact is not None or UNKNOWN in row.reason
    assert report.totals.memory is None and any("without shapes" in note for note in report.notes)
    assert fx_approx.analysis.verify(approx, X).hoisted


@pytest.mark.parametrize("part", PARTS)
def test_the_numbers_are_those_of_the_same_selections_without_demand(part: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = Around(part()).double()
    x, found = X.double(), []
    for demand in (True, False):
        approx = fx_approx.transform(model, VALUE, x, prune_unread=demand)
        torch.manual_seed(1)
        loss = approx(x).square().sum()
        grads = torch.autograd.grad(loss, list(approx.parameters()), allow_unused=True)
        found.append((loss.detach(), *grads))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("model", "policy"),
    [
        (Branching, Paper(0.5, scores="ema", scope="group")),
        *((Uncalled, VALUE), (Uncalled, Override({"*": VALUE}, Exact()))),
        pytest.param(Translate, VALUE, marks=pytest.mark.slow),
    ],
)
def test_no_layer_refuses_the_model(model: type[nn.Module], policy: Policy) -> None:
    x = torch.randn(4, 32) if model is Branching else torch.randn(4, 16)
    made = model()
    explained = fx_approx.explain(made, policy, x)
    approx = fx_approx.transform(made, policy, x)
    unknown = [row for row in explained.report.rows if row.exact is None]
    sampled = [row for row in unknown if row.samples]
    # Of a transformer the parts behind the question have graphs of their own, and shapes.
    assert (sampled or model is Translate) and all(row.reason.endswith(UNKNOWN) for row in sampled)
    assert all(explained.plan[row.name].scope == "layer" for row in sampled)
    out = approx(x)
    (out if isinstance(out, Tensor) else out[0]).sum().backward()
    again = Plan.from_dict(json.loads(explained.plan.to_json()))
    assert fx_approx.transform(made, again, x) is not None


@pytest.mark.parametrize(("policy", "part"), [(FlopBudget(0.7), Routed), (MemoryBudget(0.8), Dropping)])
def test_budgets_decide_about_what_is_known(policy: Policy, part: type[nn.Module]) -> None:
    torch.manual_seed(0)
    report = fx_approx.report(fx_approx.transform(Around(part()), policy, X))
    assert any(row.samples for row in report.rows if row.exact is not None)
    assert all(row.reason == "its shapes are not known" for row in report.rows if row.exact is None)


def test_without_any_example_inputs_sharing_is_still_refused() -> None:
    for policy in (VALUE, fx_approx.explain(Around(Branching()), VALUE, X).plan):
        with pytest.raises(fx_approx.errors.ShapesRequiredError, match="give example_inputs"):
            fx_approx.transform(Around(Branching()), policy)
