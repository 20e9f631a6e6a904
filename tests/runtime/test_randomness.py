"""Randomness: one seed is one training run, samples are kept where asked, and a recomputation takes the same one."""

from __future__ import annotations

import copy
import itertools
import random
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fx_approx
from fx_approx.policies import GradientSampling, Uniform
from fx_approx.runtime import rng as state
from fx_approx.sampling import SAMPLERS
from tests.helpers.models import Attention, Checkpointed, Cnn, WithDataDependent, loss_of, mlp, same

RANDOM = Uniform(0.5, "systematic", scores="online")
RANDOM_SAMPLERS = [name for name, sampler in SAMPLERS.items() if sampler.random]
reentrant = pytest.mark.parametrize("reentrant", [False, True])


def transformed(model: nn.Module, policy: Any = RANDOM, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_approx.errors.CaptureWarning)
        return fx_approx.transform(model, policy, **options)


def test_the_seed_is_the_only_source_of_randomness() -> None:
    approx = fx_approx.transform(mlp(), RANDOM)
    twin, x = copy.deepcopy(approx), torch.randn(6, 12)
    expected = approx(x)
    torch.manual_seed(99), random.seed(99)
    before = torch.get_rng_state()
    assert torch.equal(twin(x), expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_64_bit_seed_works() -> None:
    for seed in (0, -1, -(2**63), 2**63 - 1, 2**32):
        approx = fx_approx.transform(mlp(), RANDOM, seed=seed)
        assert fx_approx.sampler_state_dict(approx)["seed"] == seed
        assert bool(approx(torch.randn(6, 12)).isfinite().all())


def test_sites_draw_differently() -> None:
    """The same layer twice on the same input, without weights in the scores."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 8), nn.Linear(32, 8)
            self.b.load_state_dict(self.a.state_dict())

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    approx = fx_approx.transform(Pair(), Uniform(0.5, "systematic", scores="uniform", scope="layer"))
    first, second = approx(torch.randn(6, 32))
    assert not torch.equal(first, second)
    approx = fx_approx.transform(Pair(), GradientSampling.weight_gradient(0.5, "systematic", scores="uniform"))
    for rows in (6, 16):  # and of another number of rows than the numbers were drawn for
        approx.zero_grad()
        sum(y.sum() for y in approx(torch.randn(rows, 32))).backward()
        assert not torch.equal(approx.a.weight.grad, approx.b.weight.grad)


def test_topk_takes_no_random_numbers() -> None:
    approx, x = fx_approx.transform(mlp(), Uniform(0.5, scores="online")), torch.randn(6, 12)
    assert torch.equal(approx(x), approx(x))
    assert fx_approx.sampler_state_dict(approx)["step"] == 0


def test_hold_counts_as_one_forward() -> None:
    approx, x = fx_approx.transform(mlp(), RANDOM), torch.randn(6, 12)
    free = [approx(x) for _ in range(2)]
    fx_approx.load_sampler_state_dict(approx, {"step": 0, "selection_interval": 1, "seed": 0})
    with fx_approx.reuse_selection(approx):
        assert torch.equal(approx(x), free[0]) and torch.equal(approx(x), free[0])
    assert torch.equal(approx(x), free[1])


def test_gradient_accumulation_under_hold_is_the_gradient_of_the_whole_batch() -> None:
    approx = fx_approx.transform(mlp(), Uniform(0.5, "systematic", scope="layer"))
    x = torch.randn(8, 12)
    with fx_approx.reuse_selection(approx):
        approx(x).sum().backward()
        whole = [p.grad.clone() for p in approx.parameters() if p.grad is not None]
        approx.zero_grad()
        for part in x.chunk(4):
            approx(part).sum().backward()
    torch.testing.assert_close([p.grad for p in approx.parameters()], whole)


def test_hold_ends_after_an_error_and_can_be_nested() -> None:
    approx, x = fx_approx.transform(mlp(), RANDOM), torch.randn(6, 12)
    with pytest.raises(RuntimeError, match="stop"), fx_approx.reuse_selection(approx):
        raise RuntimeError("stop")
    assert not torch.equal(approx(x), approx(x))
    with fx_approx.reuse_selection(approx):
        first = approx(x)
        with fx_approx.reuse_selection(approx):
            assert torch.equal(approx(x), first)
        assert torch.equal(approx(x), first)
    assert not torch.equal(approx(x), first)


def test_every_keeps_the_sample_for_so_many_forwards() -> None:
    approx, x = fx_approx.transform(mlp(), RANDOM, selection_interval=3), torch.randn(6, 12)
    outputs = [approx(x) for _ in range(6)]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[3], outputs[5]) and not torch.equal(outputs[0], outputs[3])


def test_hold_inside_a_period_of_every() -> None:
    approx, x = fx_approx.transform(mlp(), RANDOM, selection_interval=2), torch.randn(6, 12)
    first = approx(x)
    with fx_approx.reuse_selection(approx):
        assert torch.equal(approx(x), first) and torch.equal(approx(x), first)
    assert not torch.equal(approx(x), first)


def test_eval_and_switched_off_forwards_take_no_step() -> None:
    approx, x = fx_approx.transform(mlp(), RANDOM), torch.randn(6, 12)
    approx.eval()(x)
    approx.train()
    fx_approx.set_sampling(approx, enabled=False)
    approx(x)
    assert fx_approx.sampler_state_dict(approx)["step"] == 0


def test_the_state_is_no_part_of_the_model() -> None:
    approx, model = fx_approx.transform(mlp(), RANDOM), mlp()
    for listing in ("parameters", "buffers", "modules"):
        names = [name for name, _ in getattr(approx, f"named_{listing}")()]
        assert names == [name for name, _ in getattr(model, f"named_{listing}")()]
    assert list(approx.state_dict()) == list(model.state_dict())
    state = approx._fx_approx.state
    assert all(tensor is not state for tensor in (*approx.parameters(), *approx.buffers()))


def models() -> dict[str, tuple[Any, Any]]:
    return {
        "mlp": (mlp, lambda: torch.randn(6, 12)),
        "cnn": (Cnn, lambda: torch.randn(4, 3, 8, 8)),
        "attention": (Attention, lambda: torch.randn(3, 5, 8)),
        "untraced_part": (WithDataDependent, lambda: torch.randn(6, 12)),
        "checkpoint_inside": (Checkpointed, lambda: torch.randn(6, 12)),
    }


def gradients(model: nn.Module, x: Tensor) -> Any:
    """Gradients of parameters and input, then zeroed."""
    grads = [x.grad, *(p.grad for p in model.parameters())]
    model.zero_grad(set_to_none=True)
    x.grad = None
    return grads


@pytest.mark.parametrize(
    ("name", "sampler", "reentrant"),
    [
        *zip(models(), RANDOM_SAMPLERS, itertools.cycle([True, False])),
        *zip(models(), [*RANDOM_SAMPLERS[2:], *RANDOM_SAMPLERS[:2]], itertools.cycle([False, True])),
    ],
)
def test_checkpoint_around_the_model_changes_nothing(name: str, sampler: str, reentrant: bool) -> None:
    build, inputs = models()[name]
    approx = transformed(build(), Uniform(0.5, sampler, scores="online"))
    twin = copy.deepcopy(approx)
    for step in range(3):
        x = inputs().requires_grad_()
        torch.manual_seed(step)
        expected = twin(x)
        loss_of(expected).backward()
        wanted = gradients(twin, x)
        torch.manual_seed(step)
        output = checkpoint(approx, x, use_reentrant=reentrant)
        loss_of(output).backward()
        assert torch.equal(output, expected)
        assert same(gradients(approx, x), wanted)
        assert fx_approx.sampler_state_dict(approx) == fx_approx.sampler_state_dict(twin), "a recomputation is no step"


@pytest.mark.parametrize(
    ("name", "order", "reentrant"),
    [
        *(("mlp", (0, 1), False), ("mlp", (1, 0), True), ("untraced_part", (1, 0), False)),
        *(("untraced_part", (0, 1), True), ("checkpoint_inside", (0, 1), False), ("checkpoint_inside", (1, 0), True)),
    ],
)
def test_two_checkpointed_forwards_wait_for_their_backward(name: str, order: Any, reentrant: bool) -> None:
    build, inputs = models()[name]
    approx = transformed(build())
    twin = copy.deepcopy(approx)
    batches = [inputs().requires_grad_() for _ in range(2)]
    wanted = []
    for x in batches:
        loss_of(twin(x)).backward()
        wanted.append(gradients(twin, x))
    losses = [loss_of(checkpoint(approx, x, use_reentrant=reentrant)) for x in batches]
    for turn in order:
        losses[turn].backward()
        assert same(gradients(approx, batches[turn]), wanted[turn])


@pytest.mark.parametrize(("name", "reentrant"), [("mlp", False), ("untraced_part", True)])
def test_two_pending_forwards_of_one_tensor_are_an_error(name: str, reentrant: bool) -> None:
    build, inputs = models()[name]
    approx, x = transformed(build()), inputs().requires_grad_()
    losses = [loss_of(checkpoint(approx, x, use_reentrant=reentrant)) for _ in range(2)]
    with pytest.raises(fx_approx.errors.RecomputationError, match="clone"):
        losses[0].backward()


@reentrant
def test_two_pending_forwards_of_one_tensor_under_hold(reentrant: bool) -> None:
    approx = fx_approx.transform(mlp(), RANDOM)
    twin, x = copy.deepcopy(approx), torch.randn(6, 12, requires_grad=True)
    with fx_approx.reuse_selection(twin):
        (loss_of(twin(x)) + loss_of(twin(x))).backward()
    wanted = gradients(twin, x)
    with fx_approx.reuse_selection(approx):
        losses = [loss_of(checkpoint(approx, x, use_reentrant=reentrant)) for _ in range(2)]
    (losses[0] + losses[1]).backward()
    torch.testing.assert_close(gradients(approx, x), wanted)


def test_an_input_changed_in_place_before_backward_is_an_error() -> None:
    approx, x = fx_approx.transform(mlp(), RANDOM), torch.randn(6, 12)
    loss = loss_of(checkpoint(approx, x, use_reentrant=False))
    x.mul_(1)  # the same values, but torch could not know either
    with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace operation"):
        loss.backward()


@reentrant
def test_a_checkpointed_layer_called_by_itself(reentrant: bool) -> None:
    approx = transformed(Checkpointed(None))
    x = torch.randn(6, 12, requires_grad=True)
    twin = copy.deepcopy(approx)
    loss_of(twin.stem(x)).backward()
    wanted = gradients(twin, x)
    loss_of(checkpoint(approx.stem, x, use_reentrant=reentrant)).backward()
    assert same(gradients(approx, x), wanted)


@reentrant
@pytest.mark.parametrize("before", ["nothing", "forward", "step", "joint"])
def test_a_checkpointed_part_called_by_itself_is_an_error(before: str, reentrant: bool) -> None:
    """Nothing tells which sample its inner layers had; that of another forward would be silently wrong."""
    approx = transformed(Checkpointed(None if reentrant == (before in ("nothing", "step")) else False))
    x, hidden = torch.randn(6, 12), torch.randn(6, 16, requires_grad=True)
    loss = loss_of(checkpoint(approx.block, hidden, use_reentrant=reentrant))
    if before != "nothing":
        other = loss_of(approx(x))
        if before == "step":
            other.backward()
        elif before == "joint":
            loss = loss + other
    with pytest.raises(fx_approx.errors.RecomputationError, match="called by itself"):
        loss.backward()


def test_models_in_threads_keep_their_own_samples() -> None:
    one, two = (fx_approx.transform(mlp(), RANDOM, seed=seed) for seed in (1, 2))
    x = torch.randn(6, 12)
    expected = [[copied(x) for _ in range(5)] for copied in (copy.deepcopy(one), copy.deepcopy(two))]
    found: dict[int, list[Tensor]] = {}

    def work(index: int, model: nn.Module) -> None:
        found[index] = [model(x) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i, model)) for i, model in enumerate((one, two))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same([found[0], found[1]], expected)


@reentrant
def test_a_freed_input_whose_address_is_used_again_is_not_mistaken(
    reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward without checkpoint is never recomputed; a later batch at its address is another one."""
    monkeypatch.setattr(state, "fingerprint", lambda owner, inputs: (owner, "one address for all"))
    approx = fx_approx.transform(mlp(), RANDOM)
    for step in range(4):
        x = torch.randn(6, 12, requires_grad=True)
        output = approx(x) if step % 2 else checkpoint(approx, x, use_reentrant=reentrant)
        output.sum().backward()
        del x, output
