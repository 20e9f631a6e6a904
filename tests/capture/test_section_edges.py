"""Sections at their edges: what makes no section, several calls and backward passes, checkpoints, copies of a part."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fx_approx
from fx_approx.policies import Uniform
from tests.capture.test_sections import AHEAD, RANDOM, gradients, sections
from tests.helpers.models import same
from tests.helpers.modules import made_of

pytestmark = pytest.mark.filterwarnings("ignore:not traced:fx_approx.errors.CaptureWarning")


class Base(nn.Module):
    """Python that cannot be traced, around a module that can be."""

    def __init__(self) -> None:
        super().__init__()
        self.block = self.make()
        self.end = nn.Linear(8, 4)

    def make(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))

    def run(self, x: Tensor) -> Tensor:
        return self.block(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.run(x)) if float(x.sum()) == float(x.sum()) else x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(8, 16), nn.Linear(16, 8), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x))) * self.scale


EXACT = Uniform(1.0)


def exactly(model: nn.Module, x: Tensor, found: list[str]) -> nn.Module:
    """At ratio 1.0, in the sections that are expected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_approx.errors.NoEffectWarning)
        warnings.simplefilter("ignore", fx_approx.errors.CaptureWarning)
        approx = fx_approx.transform(model, EXACT, x)
    assert sections(approx) == found
    return approx


def test_a_call_that_does_more_than_its_forward_is_no_section() -> None:
    class Doubled(Block):
        def __call__(self, x: Tensor) -> Tensor:
            return 2 * super().__call__(x)

    class Registered(Block):
        def __init_subclass__(cls, *, name: str) -> None:
            super().__init_subclass__()

    for kind in (Doubled, Registered):
        model, x = Base(), torch.randn(4, 8)
        model.block = kind()
        assert torch.equal(exactly(model, x, [])(x), model(x))
    model = Base()
    model.block.forward = lambda x: x + 1
    assert torch.equal(exactly(model, x, [])(x), model(x))


def test_what_a_section_took_for_granted_is_guarded_wherever_it_is() -> None:
    class SharedSelection(Base):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Sequential(self.block, nn.Linear(8, 8), nn.Linear(8, 8))

        def make(self) -> nn.Module:
            return Block()

        def run(self, x: Tensor) -> Tensor:
            return self.other(x) + self.block(x)

    model, x = SharedSelection(), torch.randn(4, 8)
    approx = exactly(model, x, ["other", "block"])
    assert torch.equal(approx(x), model(x))
    approx.block.scale = model.block.scale = 3.0
    assert torch.equal(approx(x), model(x))
    sampled = fx_approx.transform(model, AHEAD, x)
    sampled.block.scale = 4.0
    with pytest.warns(fx_approx.errors.CaptureWarning, match="attribute scale of a Block was changed"):
        sampled(x)


def test_weights_are_read_when_the_section_runs() -> None:
    class Teacher(Base):
        def run(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.block[0].weight.mul_(3)
                self.block[2].weight.mul_(0.5)
            return self.block(x)

    torch.manual_seed(0)
    model, x = Teacher().double(), torch.randn(4, 8, dtype=torch.float64)
    approx = fx_approx.transform(copy.deepcopy(model), AHEAD, x)
    found, grads = gradients(approx, approx, (x,))
    leaves = dict(model.named_parameters())
    with torch.no_grad():
        model.block[0].weight.mul_(3)
        model.block[2].weight.mul_(0.5)
    zeroed = {n: p * (grads[n] != 0).any(0) if p.dim() > 1 else p for n, p in leaves.items()}
    expected = torch.func.functional_call(
        nn.Sequential(model.block, model.end),
        {name.replace("block", "0").replace("end", "1"): value for name, value in zeroed.items()},
        (x,),
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("policy", [AHEAD, RANDOM])
def test_several_backward_passes_and_inner_gradients(policy: Any) -> None:
    class Pair(Base):
        def run(self, x: Tensor) -> Tensor:
            y = self.block(x)
            first, second = y.square().sum(), self.block(y.detach()).square().sum()
            inner = torch.autograd.grad(first, list(self.block.parameters()))
            outer = torch.autograd.grad(second, list(self.block.parameters()))
            return self.block(x) + sum(one.mean() for one in (*inner, *outer))

    x = torch.randn(4, 8)
    approx = fx_approx.transform(Pair(), policy, x)
    approx(x).sum().backward()
    with torch.no_grad():
        assert torch.isfinite(fx_approx.transform(Inner(), policy, x)(x)).all()


class Inner(Base):
    def run(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            y = self.block(x)
            found = torch.autograd.grad(y.sum(), list(self.block.parameters()), allow_unused=True)
        assert all(one is not None for one in found)
        return y


class Repeats(Base):
    times = 2

    def run(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = checkpoint(self.block, x, use_reentrant=False)
        return x


def test_a_checkpoint_of_an_earlier_forward_knows_how_often_it_called() -> None:
    x = torch.randn(4, 8)
    approx = fx_approx.transform(Repeats(), RANDOM, x)
    first = approx(x)
    approx.times = 1
    second = approx(2 * x)
    with pytest.raises(fx_approx.errors.RecomputationError, match="several times"):
        (first.square().sum() + second.square().sum()).backward()


@pytest.mark.parametrize(("policy", "demand"), [(AHEAD, True), (RANDOM, False), (RANDOM, True)])
def test_a_direct_call_is_recomputed_with_its_own_selections(policy: Any, demand: bool) -> None:
    torch.manual_seed(0)
    x, z = torch.randn(4, 8), torch.randn(3, 8)
    results = []
    for on in (True, False):
        torch.manual_seed(1)
        approx = fx_approx.transform(Base(), policy, x, prune_unread=demand, seed=1)
        u = checkpoint(approx.block, z, use_reentrant=False) if on else approx.block(z)
        y = approx(x)
        results.append(torch.autograd.grad(u.square().sum() + y.square().sum(), list(approx.parameters())))
    assert same(*results)


def test_a_forward_that_failed_leaves_nothing_behind() -> None:
    class Fails(Base):
        bad = False

        def run(self, x: Tensor) -> Tensor:
            y = self.block(x)
            if self.bad:
                raise RuntimeError("no")
            return y

    x = torch.randn(4, 8)
    approx = fx_approx.transform(Fails(), RANDOM, x)
    approx.bad = True
    with pytest.raises(RuntimeError, match="no"):
        approx(x)
    assert approx._fx_approx.randomness.head is None and approx._fx_approx.randomness.drawn is None


def test_a_copy_of_a_module_alone_computes_with_its_own_parameters() -> None:
    model, x = Base(), torch.randn(4, 8)
    approx = exactly(model, x, ["block"])
    twin = copy.copy(approx.block)
    twin._modules = {name: copy.deepcopy(child) for name, child in twin._modules.items()}
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    expected = nn.Sequential(*fx_approx.restore(approx).block)
    with torch.no_grad():
        expected = copy.deepcopy(expected)
        for parameter in expected.parameters():
            parameter.add_(1)
    assert torch.equal(twin(x), expected(x))


@pytest.mark.parametrize("traced", [True, False])
def test_a_part_is_pickled_by_itself(traced: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    model = nn.Sequential(Block(), nn.Linear(8, 4)) if traced else Base()
    approx = fx_approx.transform(model, RANDOM, x)
    part = approx[0] if traced else approx.block
    stored = pickle.loads(pickle.dumps(part))
    assert type(stored) is type(model[0] if traced else model.block)
    assert same(stored.eval()(x), part.eval()(x)) and not same(stored.train()(x), stored(x))


def test_scores_that_learn_sample_from_the_second_step_on() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    approx = fx_approx.transform(Base(), Uniform(0.5, scores="ema"), x)
    first, second = (gradients(approx, approx, (x,))[1]["block.2.weight"] for _ in range(2))
    assert (first != 0).any(0).sum() == 16 and (second != 0).any(0).sum() == 8


def test_the_order_of_further_arguments_counts() -> None:
    @made_of(lambda: {"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 4)})
    def Ordered(self: Any, x: Tensor, **more: Tensor) -> Tensor:
        for one in more.values():
            x = self.a(x) * one + self.b(one)
        return self.c(x)

    model, x, p, q = Ordered(), *(torch.randn(4, 8) for _ in range(3))
    approx = exactly(model, {"x": x, "p": p, "q": q}, [])  # type: ignore[arg-type]
    assert torch.equal(approx(x, p=p, q=q), model(x, p=p, q=q))
    assert torch.equal(approx(x, q=q, p=p), model(x, q=q, p=p))
