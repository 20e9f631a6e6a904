"""A subnetwork trains as the transformed model does under one kept selection, and is written back to its places."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_approx
from fx_approx.errors import UnsupportedError
from fx_approx.policies import Exact, GradientSampling, Override, Uniform
from fx_approx.runtime.approx_module import find
from fx_approx.sampling import Selection
from fx_approx.schedules import ExactTail, ExactWarmup, PlanRatios
from fx_approx.subnetworks import (
    Phases,
    extract,
    merge,
    narrow_optimizer,
    record_of,
    reselect,
    widen_optimizer,
)
from tests.helpers.demand_nets import NETS
from tests.helpers.hoisting import Layers, loss_of, perturbed

TWICE = "plain-residual"  # a layer that is called with two selections
BY_NUMBER = ("fused-heads", "written-attention", "stacked-heads")  # their Python names numbers of channels


def transformed(name: str, scope: str = "value", sampler: str = "topk") -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape = NETS[name]
    x = torch.randn(*shape).double()
    return fx_approx.transform(perturbed(build().double()), Layers(sampler, 0.5, "weight", scope), x), x


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, count: int = 5) -> None:
    for step in range(count):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step()


def largest(one: nn.Module, other: nn.Module) -> float:
    pairs = zip((*one.parameters(), *one.buffers()), (*other.parameters(), *other.buffers()), strict=True)
    return max(float((a.detach() - b.detach()).abs().nan_to_num().max()) for a, b in pairs)


# ---- the same training


@pytest.mark.parametrize("scope", ["value", "group"])
@pytest.mark.parametrize("name", NETS)
def test_plain_sgd_is_that_of_the_model_under_one_selection(name: str, scope: str) -> None:
    approx, x = transformed(name, scope)
    kept, before = copy.deepcopy(approx), copy.deepcopy(approx.state_dict())
    sub = extract(approx, example_inputs=x)
    assert sum(p.numel() for p in sub.parameters()) < (0.75 if name == TWICE else 0.55) * sum(
        p.numel() for p in approx.parameters()
    )
    assert name in (TWICE, *BY_NUMBER) or type(sub) is type(NETS[name][0]())
    assert not any(isinstance(module, type(find(approx))) for module in sub.modules())
    with fx_approx.reuse_selection(kept):
        steps(kept, torch.optim.SGD(kept.parameters(), 1e-3), x)
    steps(sub, torch.optim.SGD(sub.parameters(), 1e-3), x)
    assert all(torch.equal(value, before[name]) for name, value in approx.state_dict().items()), "not yet"
    merge(sub, approx)
    moved = max(float((p.detach() - before[n]).abs().max()) for n, p in kept.named_parameters())
    assert moved > 0 and largest(approx, kept) <= 1e-10 * moved


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.AdamW(p, 1e-3, amsgrad=True),
        lambda p: torch.optim.AdamW(p, 1e-3, foreach=True),
        lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.5, centered=True),
    ],
    ids=["SGD", "AdamW", "foreach", "RMSprop"],
)
@pytest.mark.parametrize("name", ["post-activation", "fused-heads"])
def test_moments_go_along_and_come_back(name: str, make: Callable[[Any], torch.optim.Optimizer]) -> None:
    """The oracle: the full optimiser, with all else held where it was."""
    approx, x = transformed(name)
    optimizer = make(approx.parameters())
    steps(approx, optimizer, x, 2)
    held = copy.deepcopy(approx)
    full = make(held.parameters())
    full.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    sub = extract(approx)
    masks = [placed(sub, n, p) for n, p in held.named_parameters()]
    groups = optimizer.param_groups
    narrow_optimizer(optimizer, sub, approx)
    assert optimizer.param_groups is groups and set(groups[0]["params"]) == set(sub.parameters())
    with fx_approx.reuse_selection(held):
        for step in range(4):
            steps(sub, optimizer, x, 1)
            kept = [p.detach().clone() for p in held.parameters()]
            states = [{k: copy.deepcopy(v) for k, v in full.state[p].items()} for p in held.parameters()]
            steps(held, full, x, 1)
            with torch.no_grad():
                for p, mask, old, state in zip(held.parameters(), masks, kept, states, strict=True):
                    p.copy_(torch.where(mask, p, old))
                    for key, value in full.state[p].items():
                        if isinstance(value, Tensor) and value.shape == p.shape:
                            value.copy_(torch.where(mask, value, state[key]))
            assert step >= 0
    merge(sub, approx)
    widen_optimizer(optimizer, sub)
    assert largest(approx, held) < 1e-12
    for p, q in zip(approx.parameters(), held.parameters(), strict=True):
        assert optimizer.state[p].keys() == full.state[q].keys()
        for key, value in optimizer.state[p].items():
            assert torch.allclose(torch.as_tensor(value), torch.as_tensor(full.state[q][key]), atol=1e-12), key


def placed(sub: nn.Module, name: str, parameter: Tensor) -> Tensor:
    mask = torch.zeros(parameter.numel(), dtype=torch.bool)
    mask[record_of(sub).cut_of(name).places(parameter).flatten()] = True
    return mask.view(parameter.shape)


def test_an_unbiased_sampler_has_its_scale_in_the_weights_and_out_of_them_again() -> None:
    approx, x = transformed("post-activation", sampler="systematic")
    kept, before = copy.deepcopy(approx), [p.detach().clone() for p in approx.parameters()]
    sub = extract(approx)
    with fx_approx.reuse_selection(kept):
        assert torch.allclose(sub(x), kept(x), atol=1e-12)
    merge(sub, approx)
    assert all(torch.allclose(p, q, rtol=1e-14, atol=0) for p, q in zip(approx.parameters(), before, strict=True))


# ---- what it is


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)
    )


HIDDEN = Override({"0": Exact()}, Uniform(0.5))
X, Y = torch.randn(32, 20, generator=torch.Generator().manual_seed(1)).double(), torch.arange(32) % 5


def hidden() -> nn.Module:
    torch.manual_seed(0)
    return fx_approx.transform(mlp().double(), HIDDEN, X)


def test_where_the_forward_allows_it_is_the_users_own_class_of_ordinary_layers() -> None:
    approx = hidden()
    sub = extract(approx, example_inputs=X)
    assert type(sub) is nn.Sequential and record_of(sub).own_forward
    assert [type(module) for module in sub] == [type(module) for module in mlp()]
    assert [(m.in_features, m.out_features) for m in sub if isinstance(m, nn.Linear)] == [(20, 32), (32, 32), (32, 5)]
    assert sub[1].num_features == 32 and len(sub[1].running_mean) == 32
    graph = extract(hidden())
    assert isinstance(graph, torch.fx.GraphModule) and "no example_inputs" in record_of(graph).reason
    assert torch.allclose(sub(X), graph(X))


def test_exported_compiled_and_pickled() -> None:
    sub = extract(hidden(), example_inputs=X).eval()
    expected = sub(X)
    assert torch.allclose(torch.export.export(sub, (X,)).module()(X), expected)
    assert torch.allclose(torch.compile(sub, backend="aot_eager", fullgraph=True)(X), expected)
    stream = io.BytesIO()
    torch.save(sub, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=False)(X), expected)


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up, self.down = nn.Embedding(30, 16), nn.Linear(16, 64), nn.Linear(64, 16)
            self.head = nn.Linear(16, 30, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            result: Tensor = self.head(x + self.down(F.relu(self.up(x))))
            return result

    tokens = torch.arange(24).view(4, 6)
    approx = fx_approx.transform(Tied(), Override({"down": Uniform(0.5)}, Exact()), tokens)
    sub = extract(approx, example_inputs=tokens)
    assert sub.head.weight is sub.embed.weight and sub.up.out_features == sub.down.in_features == 32
    sub.embed.weight.data.add_(1.0)
    merge(sub, approx)
    assert torch.equal(approx.head.weight, sub.head.weight) and approx.head.weight is approx.embed.weight


# ---- back, and again


def test_preserved_the_exact_model_computes_what_the_subnetwork_does() -> None:
    approx = hidden()
    sub = extract(approx)
    steps(sub, torch.optim.SGD(sub.parameters(), 0.01), X)
    merge(sub, approx, preserve=True)
    assert torch.allclose(approx.eval()(X), sub.eval()(X), atol=1e-12)


def test_other_selections_come_into_the_same_tensors() -> None:
    approx = hidden()
    sub = extract(approx)
    objects = {id(t) for t in (*sub.parameters(), *sub.buffers())}
    first = [None if one is None else one.indices.clone() for one in record_of(sub).selections]
    merge(sub, approx)
    with torch.no_grad():
        approx[3].weight.copy_(approx[3].weight.flip(1))  # other columns are the largest now
    chosen = reselect(sub, approx)
    assert {id(t) for t in (*sub.parameters(), *sub.buffers())} == objects
    assert any(one is not None and not torch.equal(one.indices, old) for one, old in zip(chosen, first, strict=True))
    fresh = extract(approx)
    assert torch.equal(sub(X), fresh(X))


def test_given_selections() -> None:
    approx = hidden()
    shared = list(find(approx)._fx_approx.resample.each())
    chosen = [Selection(torch.arange(5, 5 + one.k).view(1, -1), None) for one in shared]
    sub = extract(approx, chosen)
    assert torch.equal(sub.get_submodule("3").weight, approx[3].weight[5:37, 5:37])


# ---- phases


def run(stop: int = 12, resume: dict[str, Any] | None = None) -> tuple[list[tuple[str, float]], Any, nn.Module]:
    approx = hidden()
    optimizer = torch.optim.AdamW(approx.parameters(), 1e-2)
    schedule = ExactTail(ExactWarmup(PlanRatios(), 2), total=12, steps=3)
    phases = Phases(approx, optimizer, schedule, interval=3, example_inputs=X)
    if resume is not None:
        approx.load_state_dict(resume["model"])
        fx_approx.load_sampler_state_dict(approx, resume["sampler"])
        phases.load_state_dict(resume["phases"])
        optimizer.load_state_dict(resume["optimizer"])
    losses = []
    while phases.last_step < stop:
        loss = F.cross_entropy(phases.model(X), Y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append((type(phases.model).__name__, loss.item()))
        phases.step()
    state = {
        "model": approx.state_dict(),
        "sampler": fx_approx.sampler_state_dict(approx),
        "phases": phases.state_dict(),
    }
    return losses, copy.deepcopy({**state, "optimizer": optimizer.state_dict()}), approx


def test_one_loop_trains_full_model_and_subnetworks_and_resumes_bitwise() -> None:
    losses, _, whole = run()
    assert [name for name, _ in losses] == ["ApproxSequential"] * 2 + ["Sequential"] * 7 + ["ApproxSequential"] * 3
    assert losses[9][1] < losses[8][1], "no jump where the full model takes over"
    first, state, _ = run(stop=7)  # in the middle of the second selection
    second, _, again = run(resume=state)
    assert first + second == losses and largest(whole, again) == 0


# ---- what is refused


def test_what_cannot_be_cut_out_says_why() -> None:
    with pytest.raises(UnsupportedError, match="follows the activations"):
        model = fx_approx.transform(mlp(), Override({"3": Uniform(0.5)}, Uniform(0.5, scores="online")), X.float())
        extract(model)
    with pytest.raises(ValueError, match="no selection is made ahead"):
        extract(fx_approx.transform(mlp(), GradientSampling.backward(0.5)))
    with pytest.raises(ValueError, match="is not a transformed model"):
        extract(mlp())
    approx = hidden()
    count = len(list(find(approx)._fx_approx.resample.each()))
    for wrong, message in (
        ([], f"expected {count}, one for each"),
        ([Selection(torch.tensor([[0, 0]]), None)] * count, "units once each"),
        ([Selection(torch.tensor([[0, 64]]), None)] * count, "below 64"),
    ):
        with pytest.raises(ValueError, match=message):
            extract(approx, wrong)


def test_nothing_is_half_written() -> None:
    approx, other = hidden(), fx_approx.transform(nn.Sequential(mlp()), Uniform(0.5), X.float())
    sub = extract(approx)
    before = copy.deepcopy(approx.state_dict())
    with pytest.raises(ValueError, match="cut out of another model"):
        merge(sub, other)
    with pytest.raises(ValueError, match=r"expected what fx_approx\.subnetworks\.extract returned"):
        merge(mlp(), approx)
    with pytest.raises(ValueError, match=r"call fx_approx.subnetworks.merge\(sub, model\) first"):
        reselect(sub, approx)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(3))], 0.1)
    with pytest.raises(ValueError, match=r"a parameter of shape \(3,\) is none of model"):
        narrow_optimizer(optimizer, sub, approx)
    adafactor = torch.optim.Adafactor(approx.parameters())
    steps(approx, adafactor, X, 1)
    sub = extract(approx)
    before = copy.deepcopy(approx.state_dict())
    with pytest.raises(UnsupportedError, match="Adafactor keeps 'row_var'"):
        narrow_optimizer(adafactor, sub, approx)
    assert adafactor.param_groups[0]["params"][0] is next(approx.parameters())
    with torch.no_grad():
        approx[5].bias.add_(1.0)
    with pytest.raises(ValueError, match=r"5\.bias was changed since"):
        merge(sub, approx)
    before["5.bias"] += 1.0
    assert all(torch.equal(value, before[name]) for name, value in approx.state_dict().items())
    sub = extract(approx)
    merge(sub, approx)
    with pytest.raises(ValueError, match="was written back before"):
        merge(sub, approx)
    fx_approx.set_sampling(approx, 0.25)
    with pytest.raises(ValueError, match="another ratio needs another subnetwork"):
        reselect(sub, approx)
