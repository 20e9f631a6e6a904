"""Gradients that a forward asks for, of its input or of a value inside: those of the sampled function."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_approx
from fx_approx.policies import Uniform

Ask = Callable[[Tensor, Tensor], Tensor]


def _grad(energy: Tensor, value: Tensor) -> Tensor:
    return torch.autograd.grad(energy, value, create_graph=True)[0]


def _lenient(energy: Tensor, value: Tensor) -> Tensor:
    return torch.autograd.grad([energy], [value], create_graph=True, allow_unused=True, materialize_grads=True)[0]


ASKS: dict[str, Ask] = {"grad": _grad, "lenient": _lenient}


class Dense(nn.Module):
    """An energy with its gradient at the input, or at a hidden value that two layers read, moved by ``delta``."""

    features = 6

    def __init__(self, inside: bool, mark: str, ask: str) -> None:
        super().__init__()
        self.first, self.second, self.aside = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.last = nn.Linear(16, 1)
        self.inside, self.mark, self.ask = inside, mark, ask

    def marked(self, value: Tensor) -> Tensor:
        """``value``, of which a gradient can be asked for."""
        if self.mark == "new name":
            return value.detach().requires_grad_(True)
        if self.mark == "same name":
            value = value.detach()
            value.requires_grad_()
            return value
        if self.mark == "retained":
            value.retain_grad()
        return value

    def forward(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        if not self.inside:
            x = value = self.marked(x + delta)
        hidden = self.first(x).tanh()
        if self.inside:
            hidden = value = self.marked(F.relu(hidden) + delta)
        hidden = self.second(hidden).tanh() + self.aside(hidden)
        energy = self.last(hidden).sum()
        return energy, ASKS[self.ask](energy, value)


class Convolved(Dense):
    """The same with convolutions, normalisation, and a value that is read whole and in part."""

    features = 4

    def __init__(self, inside: bool, mark: str, ask: str) -> None:
        super().__init__(inside, mark, ask)
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.aside, self.last = nn.Conv2d(8, 8, 1), nn.Linear(8, 1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        if not self.inside:
            x = value = self.marked(x + delta)
        hidden = self.norm(self.first(x)).relu()
        if self.inside:
            hidden = value = self.marked(hidden + delta)
        hidden = self.second(hidden).tanh() + self.aside(hidden) + hidden
        energy = self.last(hidden.mean((2, 3))).square().sum()
        return energy, ASKS[self.ask](energy, value)


def energies(model: nn.Module, x: Tensor, delta: Tensor, direction: Tensor) -> tuple[float, float]:
    """How the energy moves along ``direction`` under one sample, by differences and by the gradient."""
    step = 1e-6
    with fx_approx.reuse_selection(model):
        up, down = (model(x, delta + sign * step * direction)[0].item() for sign in (1, -1))
        gradient = model(x, delta)[1]
    return (up - down) / (2 * step), (gradient * direction).sum().item()


def prepared(kind: type[Dense], inside: bool, mark: str, ask: str) -> tuple[Dense, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    model = kind(inside, mark, ask).double()
    size = (5, 5) if kind is Convolved else ()
    x = torch.randn(3, kind.features, *size, dtype=torch.float64)
    width = kind.features if not inside else 16 if kind is Dense else 8
    delta = torch.randn(3, width, *size, dtype=torch.float64)
    return model, x, delta, torch.randn_like(delta)


@pytest.mark.parametrize("kind", [Dense, Convolved])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("scope", ["layer", "value", "group"])
def test_the_gradient_is_that_of_the_sampled_function(kind: type[Dense], inside: bool, scope: str) -> None:
    for mark, ask, demand in itertools.product(("new name", "same name", "retained"), ASKS, (True, False)):
        model, x, delta, direction = prepared(kind, inside, mark, ask)
        delta.requires_grad_(mark == "retained")
        policy = Uniform(0.5, scope=scope)
        approx = fx_approx.transform(model, policy, (x, delta), prune_unread=demand)
        moved, predicted = energies(approx, x, delta, direction)
        assert predicted == pytest.approx(moved, rel=1e-5, abs=1e-7), (mark, ask, demand)
        exact = model(x, delta)[1]
        assert not torch.allclose(approx(x, delta)[1], exact)


@pytest.mark.parametrize("kind", [Dense, Convolved])
@pytest.mark.parametrize("inside", [False, True])
def test_second_derivatives_are_those_of_the_sampled_function(kind: type[Dense], inside: bool) -> None:
    """A loss of the gradient moves with the parameters as its gradient says."""
    model, x, delta, _ = prepared(kind, inside, "new name", "grad")
    approx = fx_approx.transform(model, Uniform(0.5, scores="uniform", scope="group"), (x, delta))
    weight = approx.second.weight
    direction, step = torch.randn_like(weight), 1e-6
    with fx_approx.reuse_selection(approx):
        (gradient,) = torch.autograd.grad(approx(x, delta)[1].square().sum(), weight)
        losses = []
        for sign in (1, -2):
            with torch.no_grad():
                weight.add_(direction, alpha=sign * step)
            losses.append(approx(x, delta)[1].square().sum().item())
    assert (gradient * direction).sum().item() == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-4)


class Handing(nn.Module):
    """Gives a hidden value away that its own layers read as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.first(x).relu()
        return self.last(self.second(hidden).relu() + hidden), hidden.contiguous()


@pytest.mark.parametrize("scope", ["layer", "value", "group"])
def test_the_gradient_of_an_output_that_is_read_on(scope: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    found = []
    for demand in (True, False):
        policy = Uniform(0.5, scope=scope)
        torch.manual_seed(1)
        approx = fx_approx.transform(Handing(), policy, x, prune_unread=demand)
        output, hidden = approx(x)
        found.append(torch.autograd.grad(output.square().sum(), hidden)[0])
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[0], found[1])


class Watched(Handing):
    """Keeps what a hook tells of a gradient."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.first(x).relu()
        hidden.register_hook(lambda gradient: 2 * gradient)
        return self.last(self.second(hidden) + hidden), hidden


def test_a_hook_inside_changes_the_whole_gradient() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    found = []
    for demand in (True, False):
        torch.manual_seed(1)
        policy = Uniform(0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fx_approx.errors.CaptureWarning)
            approx = fx_approx.transform(Watched(), policy, x, prune_unread=demand)
        found.append(torch.autograd.grad(approx(x)[0].square().sum(), approx.first.weight)[0])
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[0], found[1])


class Functional(nn.Module):
    """Asks for the gradient by ``torch.func``."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.last, self.how = nn.Linear(6, 16), nn.Linear(16, 1), how

    def energy(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh()).sum()

    def forward(self, x: Tensor, delta: Tensor) -> Any:
        x = x + delta
        if self.how == "grad":
            return self.energy(x), torch.func.grad(self.energy)(x)
        energy, pull = torch.func.vjp(self.energy, x)
        return energy, pull(torch.ones_like(energy))[0]


@pytest.mark.parametrize("how", ["grad", "vjp"])
def test_functional_gradients_stay_untraced_with_a_warning(how: str) -> None:
    torch.manual_seed(0)
    model = Functional(how).double()
    x, delta, direction = (torch.randn(3, 6, dtype=torch.float64) for _ in range(3))
    with pytest.warns(fx_approx.errors.CaptureWarning):
        approx = fx_approx.transform(model, Uniform(0.5), (x, delta))
    moved, predicted = energies(approx, x, delta, direction)
    assert predicted == pytest.approx(moved, rel=1e-5)
