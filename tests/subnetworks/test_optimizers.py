"""Optimisers move to a subnetwork and back: as the full optimiser with all else held."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fx_approx
from fx_approx.errors import UnsupportedError
from fx_approx.policies import Uniform
from fx_approx.runtime.approx_module import find
from fx_approx.sampling import Selection
from fx_approx.subnetworks import extract, merge, narrow_optimizer, record_of, reselect, widen_optimizer
from tests.helpers.hoisting import loss_of
from tests.helpers.quick import in_turn, quick, thinned
from tests.subnetworks.nets import X, hidden, largest, placed, steps, transformed


class Lion(Optimizer):
    """Of a user: one moment, and the sign of what is between it and the gradient."""

    def __init__(self, parameters: Any, lr: float = 1e-3, name: str = "exp_avg") -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": 0.01})
        self.name = name

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                moment = self.state[p].setdefault(self.name, torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_((0.9 * moment + 0.1 * p.grad).sign(), alpha=-group["lr"])
                moment.mul_(0.99).add_(p.grad, alpha=0.01)


def counterparts(sub: nn.Module, approx: nn.Module) -> list[nn.Parameter]:
    """The parameters of ``sub`` in the order of those of ``approx``."""
    return [sub.get_parameter(name) for name, _ in approx.named_parameters()]


Make = Callable[[Any], Optimizer]
ENTRY_BY_ENTRY: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9, nesterov=True, foreach=True),
    "Adam": lambda p: torch.optim.Adam(p, 1e-3, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-3, amsgrad=True),
    "foreach": lambda p: torch.optim.AdamW(p, 1e-3, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, 1e-3, fused=True),
    "NAdam": lambda p: torch.optim.NAdam(p, 1e-3),
    "RAdam": lambda p: torch.optim.RAdam(p, 1e-3),
    "Adamax": lambda p: torch.optim.Adamax(p, 1e-3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.5, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 1e-3, initial_accumulator_value=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, 1e-1),
    "ASGD": lambda p: torch.optim.ASGD(p, 1e-3, t0=3),
    "Rprop": lambda p: torch.optim.Rprop(p, 1e-3),
    "Lion": lambda p: Lion(p),
}


def held_steps(full: Optimizer, model: nn.Module, masks: list[Tensor], x: Tensor, count: int) -> None:
    """The full optimiser under one selection, with all that is not in ``masks`` put back after each step."""
    parameters = list(model.parameters())
    with fx_approx.reuse_selection(model):
        for _ in range(count):
            kept = [p.detach().clone() for p in parameters]
            states = [{k: copy.deepcopy(v) for k, v in full.state[p].items()} for p in parameters]
            steps(model, full, x, 1)
            with torch.no_grad():
                for p, mask, old, state in zip(parameters, masks, kept, states, strict=True):
                    p.copy_(torch.where(mask, p, old))
                    for key, value in full.state[p].items():
                        if isinstance(value, Tensor) and value.shape == p.shape and key in state:
                            value.copy_(torch.where(mask, value, state[key]))


def assert_same_state(
    one: Optimizer, model: nn.Module, other: Optimizer, its: nn.Module, tolerance: float = 1e-12
) -> None:
    for p, q in zip(model.parameters(), its.parameters(), strict=True):
        assert one.state[p].keys() == other.state[q].keys()
        for key, value in one.state[p].items():
            its_own = torch.as_tensor(other.state[q][key]).double()
            assert torch.allclose(torch.as_tensor(value).double(), its_own, atol=1e-12), key


@pytest.mark.parametrize(
    ("kind", "name"),
    quick(
        itertools.product(ENTRY_BY_ENTRY, ["post-activation", "fused-heads"]),
        lambda kind, name: name == "fused-heads" or kind in ("SGD", "AdamW"),
    ),
)
def test_as_the_full_optimiser_with_all_else_held(kind: str, name: str) -> None:
    approx, x = transformed(name)
    make = ENTRY_BY_ENTRY[kind]
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
    for _ in range(4):  # each on the same random numbers
        steps(sub, optimizer, x, 1)
    held_steps(full, held, masks, x, 4)
    merge(sub, approx)
    widen_optimizer(optimizer, sub)
    assert largest(approx, held) < (1e-9 if kind == "NAdam" else 1e-12)
    assert_same_state(optimizer, approx, full, held)


@pytest.mark.parametrize(("kind", "rest"), in_turn(["AdamW", "Adagrad", "ASGD", "Rprop"], ["cpu", "keep", "drop"]))
def test_the_rest_waits_or_begins_as_in_a_new_optimiser(kind: str, rest: Any) -> None:
    approx = hidden()
    optimizer = ENTRY_BY_ENTRY[kind](approx.parameters())
    steps(approx, optimizer, X, 2)
    before = [{k: copy.deepcopy(v) for k, v in optimizer.state[p].items()} for p in approx.parameters()]
    sub = extract(approx)
    masks = [placed(sub, n, p) for n, p in approx.named_parameters()]
    narrow_optimizer(optimizer, sub, approx, rest=rest)
    steps(sub, optimizer, X, 2)
    merge(sub, approx)
    widen_optimizer(optimizer, sub)
    begins = {"sum": lambda p: 0.1, "step_size": lambda p: 1e-3, "ax": lambda p: p.detach()}
    for p, mask, old in zip(approx.parameters(), masks, before, strict=True):
        for key, value in optimizer.state[p].items():
            if isinstance(value, Tensor) and value.shape == p.shape:
                expected = old[key] if rest != "drop" else torch.zeros_like(p) + begins.get(key, lambda p: 0.0)(p)
                assert torch.equal(value[~mask], expected[~mask]), key
                assert p.dim() < 2 or not torch.equal(value[mask], old[key][mask]), key
    steps(approx, optimizer, X, 1)


@pytest.mark.parametrize("rest", ["keep", "drop"])
def test_moments_that_a_subnetwork_made_first_come_back_with_the_start_of_a_new_optimiser(rest: Any) -> None:
    approx = hidden()
    optimizer = torch.optim.Rprop(approx.parameters(), 1e-3)
    sub = extract(approx)
    narrow_optimizer(optimizer, sub, approx, rest=rest)
    steps(sub, optimizer, X, 2)
    mask = placed(sub, "3.weight", approx[3].weight)
    widen_optimizer(optimizer, sub)
    size = optimizer.state[approx[3].weight]["step_size"]
    assert torch.all(size[~mask] == 1e-3) and not torch.all(size[mask] == 1e-3)


# ---- the scale of an unbiased sampler


def scaled(name: str = "post-activation") -> tuple[nn.Module, nn.Module, Tensor]:
    approx, x = transformed(name, sampler="systematic")
    sub = extract(approx)
    assert any(cut.scaled for cut in record_of(sub).cuts.values())
    return approx, sub, x


def product(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The outer product of a random vector for each axis."""
    result = torch.ones(shape, dtype=dtype)
    for axis, size in enumerate(shape):
        result = result * torch.randn(size, dtype=dtype).view(-1, *(1,) * (len(shape) - 1 - axis))
    return result


@pytest.mark.parametrize("kind", thinned(["Adafactor", *ENTRY_BY_ENTRY], 3))
def test_under_a_scale_moments_are_those_of_the_scaled_weight(kind: str) -> None:
    """The oracle: an optimiser that has trained the scaled weights from the beginning, on gradients that fit."""
    approx, sub, _ = scaled()
    make = ENTRY_BY_ENTRY.get(kind, lambda p: torch.optim.Adafactor(p, 1e-3))
    optimizer, direct = make(approx.parameters()), make(sub.parameters())
    for group in (*optimizer.param_groups, *direct.param_groups):
        group.update({"weight_decay": 0.0} if "weight_decay" in group else {})
        group.update({"eps": 1e-300} if isinstance(group.get("eps"), float) else {})
    cuts = [record_of(sub).cut_of(name) for name, _ in approx.named_parameters()]
    rows = list(zip(approx.parameters(), counterparts(sub, approx), cuts, strict=True))
    gradients = [product(p.shape, p.dtype) * (kind != "ASGD") for p in approx.parameters()]  # it averages the weights
    for step in range(4):
        for (p, q, cut), gradient in zip(rows, gradients, strict=True):
            p.grad = gradient * (1.0, -0.5, 2.0, 0.7)[step]
            q.grad = cut.taken(p.grad) / cut.scale(p)
        optimizer.step()
        direct.step()
        if step == 0:  # what does not begin at zero begins as the scaled weight would have it
            for p, q, cut in rows:
                for key, order in (("step_size", -1), ("sum", 2), ("square_avg", 2), ("acc_delta", -2)):
                    if key in direct.state[q] and kind in ("Rprop", "Adagrad", "Adadelta"):
                        optimizer.state[p][key].fill_(0.5)
                        direct.state[q][key] = 0.5 / cut.scale(p) ** order
    full = [{k: copy.deepcopy(v) for k, v in optimizer.state[p].items()} for p in approx.parameters()]
    optimizer.zero_grad()
    direct.zero_grad()
    narrow_optimizer(optimizer, sub, approx)
    for q, state in direct.state.items():
        assert optimizer.state[q].keys() == state.keys()
        for key, value in state.items():
            assert torch.allclose(torch.as_tensor(optimizer.state[q][key]), torch.as_tensor(value), rtol=1e-9), key
    widen_optimizer(optimizer, sub)
    for p, old in zip(approx.parameters(), full, strict=True):
        for key, value in old.items():
            assert torch.allclose(torch.as_tensor(optimizer.state[p][key]), torch.as_tensor(value), rtol=1e-9), key


def test_what_is_not_known_to_follow_a_scale_is_refused_before_anything_is_changed() -> None:
    approx, sub, x = scaled()
    optimizer = Lion(approx.parameters(), name="velocity")
    steps(approx, optimizer, x, 1)
    sub = extract(approx)
    parameters, state = list(optimizer.param_groups[0]["params"]), dict(optimizer.state)
    with pytest.raises(
        UnsupportedError, match="Lion keeps 'velocity', of which it is not known how it follows the scale"
    ):
        narrow_optimizer(optimizer, sub, approx)
    assert all(p is q for p, q in zip(optimizer.param_groups[0]["params"], parameters, strict=True))
    assert optimizer.state == state
    fresh = Lion(approx.parameters(), name="velocity")  # nothing to cut yet; so it is seen on the way back only
    narrow_optimizer(fresh, sub, approx)
    steps(sub, fresh, x, 1)
    with pytest.raises(UnsupportedError, match="Lion keeps 'velocity'"):
        widen_optimizer(fresh, sub)
    assert set(fresh.param_groups[0]["params"]) == set(sub.parameters()) and len(fresh.state) == len(state)
    fresh.state.clear()
    widen_optimizer(fresh, sub)


# ---- states that are not of single entries


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.dim() == 2]


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 3), (6, 8, 3, 3)])
def test_adafactor_has_the_means_of_the_part_of_its_second_moment(shape: tuple[int, ...]) -> None:
    """The oracle: of gradients that are products, Adafactor on the part alone has learnt the same."""
    from fx_approx.subnetworks.cuts import Cut
    from fx_approx.subnetworks.moments import cut_moments, put_moments

    cut = Cut("w", Selection(torch.tensor([[1, 4, 6]]), None), Selection(torch.tensor([[0, 2, 3, 5]]), None))
    full = nn.Parameter(torch.randn(shape))
    part = nn.Parameter(cut.of(full))
    whole, alone = (torch.optim.Adafactor([p], 1e-2) for p in (full, part))
    gradient = torch.randn(shape[0], *(1,) * (len(shape) - 1)) * torch.randn(1, *shape[1:-1], 1)
    gradient = gradient * torch.randn(*(1,) * (len(shape) - 1), shape[-1])
    for _ in range(3):
        full.grad, part.grad = gradient.clone(), cut.of(gradient)
        whole.step(), alone.step()
    found = cut_moments(whole, whole.state[full], cut)
    for key, value in alone.state[part].items():
        torch.testing.assert_close(found[key], value, msg=key)
    back = put_moments(whole, found, cut, dict(whole.state[full]), full, {})
    for key, value in whole.state[full].items():
        torch.testing.assert_close(back[key], value, msg=key)


def test_adafactor_goes_along_and_comes_back() -> None:
    approx = hidden()
    optimizer = torch.optim.Adafactor(approx.parameters(), 1e-2)
    steps(approx, optimizer, X, 2)
    sub = extract(approx)
    narrow_optimizer(optimizer, sub, approx)
    assert optimizer.state[sub.get_parameter("3.weight")]["row_var"].shape == (32, 1)
    steps(sub, optimizer, X, 2)
    merge(sub, approx)
    widen_optimizer(optimizer, sub)
    assert optimizer.state[approx[3].weight]["col_var"].shape == (1, 64)
    steps(approx, optimizer, X, 1)


def test_muon_is_that_of_the_narrow_network() -> None:
    approx = hidden()
    optimizer = torch.optim.Muon(matrices(approx), 1e-2)
    steps(approx, optimizer, X, 2)
    before = {p: optimizer.state[p]["momentum_buffer"].clone() for p in matrices(approx)}
    sub = extract(approx)
    narrow_optimizer(optimizer, sub, approx)
    alone = torch.optim.Muon(matrices(copied := copy.deepcopy(sub)), 1e-2)
    for p, q in zip(matrices(copied), matrices(sub), strict=True):
        alone.state[p]["momentum_buffer"] = optimizer.state[q]["momentum_buffer"].clone()
    steps(sub, optimizer, X, 2)
    steps(copied, alone, X, 2)
    assert largest(sub, copied) == 0
    mask = placed(sub, "3.weight", approx[3].weight)
    trained = optimizer.state[sub.get_parameter("3.weight")]["momentum_buffer"]
    widen_optimizer(optimizer, sub)
    after = optimizer.state[approx[3].weight]["momentum_buffer"]
    assert torch.equal(after[~mask], before[approx[3].weight][~mask]) and torch.equal(after[mask], trained.flatten())


class Shampoo(Optimizer):
    """Keeps a matrix for the rows of each parameter."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-3})

    def step(self, closure: None = None) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["preconditioner"] = torch.eye(p.shape[0])


def test_states_that_belong_to_no_part_are_refused_by_name() -> None:
    approx = hidden()
    sub = extract(approx)
    for optimizer, message in (
        (torch.optim.LBFGS(approx.parameters()), "LBFGS keeps directions through all parameters at once"),
        (Shampoo(approx.parameters()), r"Shampoo keeps 'preconditioner' of shape \(64, 64\) for a parameter of shape"),
    ):
        if isinstance(optimizer, Shampoo):
            optimizer.step()
        with pytest.raises(UnsupportedError, match=message):
            narrow_optimizer(optimizer, sub, approx)
        assert optimizer.param_groups[0]["params"][0] is next(approx.parameters())


# ---- groups, gradients, and what stands beside


def test_groups_keep_their_settings_and_take_others_on() -> None:
    approx = hidden()
    outside = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = torch.optim.SGD(
        [
            {"params": [approx[0].weight], "lr": 1e-2, "momentum": 0.0},
            {"params": [approx[3].weight, outside], "lr": 1e-3, "weight_decay": 0.1},
        ],
        lr=1.0,
        momentum=0.9,
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    told: list[int] = []
    optimizer.register_step_post_hook(lambda one, args, kwargs: told.append(len(one.param_groups)))
    outside.grad = torch.ones_like(outside)
    steps(approx, optimizer, X, 1)
    state = optimizer.state[outside]
    sub = extract(approx)
    narrow_optimizer(optimizer, sub, approx)
    first, second = optimizer.param_groups
    assert first["params"] == [sub.get_parameter("0.weight")] and first["lr"] == 1e-2
    assert second["params"][0] is sub.get_parameter("3.weight") and second["params"][1] is outside
    assert optimizer.state[outside] is state
    optimizer.add_param_group({"params": [sub.get_parameter("5.weight")], "lr": 1e-4})
    held = [p.detach().clone() for p in sub.parameters()]
    steps(sub, optimizer, X, 1)
    scheduler.step()
    moved = [name for (name, p), old in zip(sub.named_parameters(), held, strict=True) if not torch.equal(p, old)]
    assert sorted(moved) == ["0.weight", "3.weight", "5.weight"]
    merge(sub, approx)
    widen_optimizer(optimizer, sub)
    assert [group["params"][0] for group in optimizer.param_groups] == [
        approx[0].weight,
        approx[3].weight,
        approx[5].weight,
    ]
    assert optimizer.param_groups[1]["params"][1] is outside and optimizer.param_groups[0]["lr"] == 5e-3
    assert optimizer.state[approx[5].weight]["momentum_buffer"].shape == approx[5].weight.shape
    steps(approx, optimizer, X, 1)
    assert told == [2, 3, 3]


def test_what_no_forward_reads_stays_where_it_is() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.spare = nn.Linear(20, 16), nn.Linear(16, 4), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.second(self.first(x).relu())
            return result

    approx = fx_approx.transform(Unused().double(), Uniform(0.5, min_k=1), X)
    optimizer = torch.optim.SGD(approx.parameters(), 1e-3, momentum=0.9)
    steps(approx, optimizer, X, 1)
    for example in (None, X):  # as a graph, and as the model's own class
        sub = extract(approx, example_inputs=example)
        before = approx.spare.weight.detach().clone()
        narrow_optimizer(optimizer, sub, approx)
        steps(sub, optimizer, X, 1)
        merge(sub, approx)
        widen_optimizer(optimizer, sub)
        assert list(optimizer.param_groups[0]["params"]) == list(approx.parameters())
        assert torch.equal(approx.spare.weight, before)
        reselect(sub, approx)


def test_gradients_that_wait_are_cut_and_put_back() -> None:
    """Two micro-batches, the first by the full model; and one by the subnetwork with one by the full model behind."""
    for sampler in ("topk", "systematic"):
        approx, x = transformed("post-activation", sampler=sampler)
        optimizer = torch.optim.SGD(approx.parameters(), 1e-3)
        sub = extract(approx)
        gradients = [torch.randn_like(p) for p in approx.parameters()]
        for p, gradient in zip(approx.parameters(), gradients, strict=True):
            p.grad = gradient.clone()
        narrow_optimizer(optimizer, sub, approx)
        assert all(p.grad is None for p in approx.parameters())
        record = record_of(sub)
        narrow = counterparts(sub, approx)
        for (name, _), p, gradient in zip(approx.named_parameters(), narrow, gradients, strict=True):
            cut = record.cut_of(name)
            assert p.grad is not None
            assert torch.allclose(p.grad * cut.scale(gradient), cut.taken(gradient), rtol=1e-12)
        kept = copy.deepcopy(approx)
        waiting = [p.grad.clone() for p in narrow if p.grad is not None]
        loss_of(sub(x)).backward()
        with fx_approx.reuse_selection(kept):
            loss_of(kept(x)).backward()
        widen_optimizer(optimizer, sub)
        assert all(p.grad is None for p in sub.parameters())
        for (name, p), q, old in zip(approx.named_parameters(), kept.parameters(), waiting, strict=True):
            whole, cut = torch.zeros_like(p), record.cut_of(name)
            cut.put(whole, old * cut.scale(p), scaled=False)
            assert p.grad is not None and q.grad is not None
            assert torch.allclose(p.grad - whole, q.grad, atol=1e-5 if cut.scaled or sampler != "topk" else 1e-12), name


def test_clipping_scaling_and_frozen_parameters() -> None:
    approx = hidden()
    approx[3].bias.requires_grad_(False)
    optimizer, scaler = torch.optim.AdamW(approx.parameters(), 1e-3), torch.amp.GradScaler("cpu", init_scale=8.0)
    sub = extract(approx)
    assert not sub.get_parameter("3.bias").requires_grad
    held = copy.deepcopy(approx)
    full = torch.optim.AdamW(held.parameters(), 1e-3)
    masks = [placed(sub, n, p) for n, p in held.named_parameters()]
    narrow_optimizer(optimizer, sub, approx)

    def step(model: nn.Module, one: Optimizer, by: Any) -> None:
        one.zero_grad()
        by.scale(loss_of(model(X))).backward()
        by.unscale_(one)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        by.step(one)
        by.update()

    for _ in range(2):
        step(sub, optimizer, scaler)
    assert scaler.get_scale() == 8.0
    weight = sub.get_parameter("5.weight")
    kept_value, weight.data[0, 0] = weight.detach()[0, 0].clone(), float("inf")
    step(sub, optimizer, scaler)  # an overflow: no step, and the scale falls
    assert scaler.get_scale() == 4.0
    weight.data[0, 0] = kept_value
    other = torch.amp.GradScaler("cpu", init_scale=8.0)
    with fx_approx.reuse_selection(held):
        for _ in range(2):
            kept = [p.detach().clone() for p in held.parameters()]
            step(held, full, other)
            with torch.no_grad():
                for p, mask, old in zip(held.parameters(), masks, kept, strict=True):
                    p.copy_(torch.where(mask, p, old))
    widen_optimizer(optimizer, sub)
    merge(sub, approx)
    for p, q in zip(approx.parameters(), held.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-10)
    assert approx[3].bias not in optimizer.state


def test_an_average_of_a_subnetwork_is_one_and_merges_into_a_copy() -> None:
    """As the average of the full model with all else held."""
    approx = hidden()
    held = copy.deepcopy(approx)
    sub = extract(approx)
    average = AveragedModel(sub, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=False)
    full = AveragedModel(held, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=False)
    one, other = (torch.optim.SGD(m.parameters(), 1e-3) for m in (sub, held))
    with fx_approx.reuse_selection(held):
        for _ in range(4):
            for model, optimizer, averaged in ((sub, one, average), (held, other, full)):
                steps(model, optimizer, X, 1)
                averaged.update_parameters(model)
    target = copy.deepcopy(approx)
    merge(average, target)
    for p, q in zip(target.parameters(), find(full).parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-12)
    late = copy.deepcopy(sub)
    merge(sub, approx)
    assert torch.allclose(approx[3].weight, held[3].weight, atol=1e-12)
    with pytest.raises(ValueError, match="was changed since sub was cut out"):
        merge(late, approx)  # a copy knows the model, too


# ---- what is refused


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    approx = hidden()
    sub, other = extract(approx), extract(hidden())
    optimizer = torch.optim.AdamW(approx.parameters(), 1e-3)
    with pytest.raises(ValueError, match="rest: expected 'cpu', 'keep' or 'drop', got 'gpu'"):
        narrow_optimizer(optimizer, sub, approx, rest="gpu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cut out of another model"):
        narrow_optimizer(optimizer, sub, transformed("gated")[0])
    with pytest.raises(ValueError, match=r"none of its 1 parameters is one of model, such as that of shape \(3,\)"):
        narrow_optimizer(torch.optim.SGD([nn.Parameter(torch.zeros(3))], 0.1), sub, approx)
    with pytest.raises(ValueError, match=r"expected an optimiser built on model.parameters\(\)"):
        narrow_optimizer(torch.optim.SGD(sub.parameters(), 0.1), sub, approx)
    with pytest.raises(ValueError, match="it does not work on this subnetwork; call narrow_optimizer first"):
        widen_optimizer(optimizer, sub)
    narrow_optimizer(optimizer, sub, approx)
    with pytest.raises(ValueError, match="it works on a subnetwork already; call widen_optimizer first"):
        narrow_optimizer(optimizer, sub, approx)
    with pytest.raises(ValueError, match="it does not work on this subnetwork"):
        widen_optimizer(optimizer, other)
    assert set(optimizer.param_groups[0]["params"]) == set(sub.parameters())
    widen_optimizer(optimizer, sub)
    assert optimizer.param_groups[0]["params"] == list(approx.parameters())


def test_moments_come_back_where_they_were_cut_also_after_another_selection() -> None:
    approx = hidden()
    optimizer = torch.optim.SGD(approx.parameters(), 1e-3, momentum=0.9)
    steps(approx, optimizer, X, 1)
    sub = extract(approx)
    mask = placed(sub, "3.weight", approx[3].weight)
    before = optimizer.state[approx[3].weight]["momentum_buffer"].clone()
    narrow_optimizer(optimizer, sub, approx)
    steps(sub, optimizer, X, 1)
    merge(sub, approx)
    others = [Selection(torch.arange(32).view(1, -1), None)] * len(record_of(sub).selections)
    reselect(sub, approx, others)
    widen_optimizer(optimizer, sub)
    after = optimizer.state[approx[3].weight]["momentum_buffer"]
    assert torch.equal(after[~mask], before[~mask]) and not torch.equal(after[mask], before[mask])


def test_a_sparse_gradient_that_waits_is_refused() -> None:
    approx = hidden()
    sub, optimizer = extract(approx), torch.optim.SGD(approx.parameters(), 1e-3)
    approx[3].weight.grad = torch.zeros_like(approx[3].weight).to_sparse()
    with pytest.raises(UnsupportedError, match="has a sparse gradient"):
        narrow_optimizer(optimizer, sub, approx)
    assert optimizer.param_groups[0]["params"] == list(approx.parameters())
