"""Which layers read hidden units, on networks where one can tell by their names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fx_approx
from fx_approx.core.plan import Plan
from fx_approx.policies import Exact, FlopBudget, HiddenUnits, Override, Tokens, Uniform


class Block(nn.Module):
    """Pre-norm attention and MLP on a residual stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        size = (*x.shape[:2], 3, 4, 8)
        q, k, v = self.qkv(self.norm1(x)).reshape(size).permute(2, 0, 3, 1, 4).unbind(0)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        hidden = self.fc1(self.norm2(x))
        return x + self.fc2(hidden * torch.sigmoid(hidden + 0.1 * hidden**3))  # an addition to itself


class Bottleneck(nn.Module):
    """Two residual blocks; a stem before, a head behind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.a1, self.a2 = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 3, padding=1)
        self.b1, self.b2 = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.a2(torch.relu(self.a1(x)))
        x = x + self.b2(torch.relu(self.b1(x)))
        return self.head(x.mean((2, 3)))


def transformer() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(8, 32), Block(32), Block(32), nn.Linear(32, 4)), torch.randn(2, 6, 8)


def plain() -> tuple[nn.Module, Tensor]:
    layers = [nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)]
    return nn.Sequential(*layers), torch.randn(2, 32)


HIDDEN = {
    transformer: ["1.out", "1.fc2", "2.out", "2.fc2"],
    plain: ["2", "4"],
    lambda: (Bottleneck(), torch.randn(2, 3, 8, 8)): ["a2", "b2"],
}


def plan_of(made: tuple[nn.Module, Tensor], policy: object) -> Plan:
    return fx_approx.explain(made[0], policy, made[1]).plan  # type: ignore[arg-type]


@pytest.mark.parametrize("build", HIDDEN)
def test_layers_that_read_hidden_units_are_sampled(build: object) -> None:
    made = build()  # type: ignore[operator]
    plan = plan_of(made, HiddenUnits(Uniform(0.5)))
    assert [one.name for one in plan if one.roles] == HIDDEN[build]  # type: ignore[index]
    for one in plan:
        if not one.roles and one.source == "HiddenUnits":
            assert "residual stream" in one.reason or "no layer before it" in one.reason
    alone = plan_of(made, Override(dict.fromkeys(HIDDEN[build], Uniform(0.5)), Exact()))  # type: ignore[index]
    assert {one.name: one.roles for one in plan} == {one.name: one.roles for one in alone}


def test_the_reason_tells_what_is_read_instead() -> None:
    plan = plan_of((Bottleneck(), torch.randn(2, 3, 8, 8)), HiddenUnits(Uniform(0.5)))
    assert "no layer before it" in plan["stem"].reason
    assert "residual stream" in plan["b1"].reason and "residual stream" in plan["head"].reason


def test_it_goes_with_the_other_policies() -> None:
    made = transformer()
    whole = HIDDEN[transformer]
    budget = plan_of(made, HiddenUnits(FlopBudget(0.8, min_k=1, round_to=1)))
    assert {one.name for one in budget if one.roles} <= set(whole) and budget.sampled
    some = plan_of(made, Override({"1.*": Exact()}, HiddenUnits(Uniform(0.5))))
    assert [one.name for one in some if one.roles] == whole[2:]
    tokens = plan_of(made, Tokens(0.5, mode="skip", first=0, last=0, layers=HiddenUnits(Uniform(0.5))))
    assert [one.name for one in tokens if one.roles] == whole and tokens.tokens is not None


def test_what_it_refuses() -> None:
    with pytest.raises(TypeError, match="layers: expected a policy"):
        HiddenUnits(0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layers: expected a policy that decides about layers"):
        HiddenUnits(Tokens(0.5))
    with pytest.raises(fx_approx.errors.ShapesRequiredError):
        fx_approx.explain(transformer()[0], HiddenUnits())
