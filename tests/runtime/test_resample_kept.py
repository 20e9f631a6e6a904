"""How long selections made ahead are kept, and that a recomputation takes those of its forward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fx_approx
from fx_approx.runtime.approx_module import find
from tests.helpers.ahead import batch, indices, readers, same, selections, shared, shuffle
from tests.helpers.demand_nets import NETS
from tests.helpers.hoisting import Layers, assert_same_numbers, pair, perturbed, training_step

# ---- keeping one sample


@pytest.mark.parametrize("scores", ["weight", "ema", "uniform"])
@pytest.mark.parametrize("sampler", ["topk", "systematic"])
def test_hold_keeps_a_sample_while_weights_and_norms_move(sampler: str, scores: str) -> None:
    model = readers(Layers(sampler, scores=scores, scope="value"))
    model(batch())
    model(batch())
    with fx_approx.reuse_selection(model):
        first = selections(model, batch())
        for step in range(3):
            shuffle(model)
            again = selections(model, batch(step) * 3)
            assert same(first, again)
    after = selections(model, batch())
    assert not same(first, after) or (sampler, scores) == ("topk", "uniform")


@pytest.mark.parametrize("scores", ["weight", "ema"])
@pytest.mark.parametrize("sampler", ["topk", "systematic"])
def test_every_keeps_a_sample_for_so_many_forwards(sampler: str, scores: str) -> None:
    model = readers(Layers(sampler, scores=scores, scope="value"), selection_interval=3)
    if scores == "ema":
        for _ in range(3):
            model(batch())
    for _ in range(3):
        period = []
        for step in range(3):
            shuffle(model)
            period.append(selections(model, batch(step)))
        assert same(period[0], period[1])
        assert same(period[0], period[2])
        shuffle(model)
    fresh = selections(model, batch())
    assert not same(fresh, period[0])


def test_bernoulli_keeps_its_numbers() -> None:
    for scores in ("weight", "ema"):
        model = readers(Layers("bernoulli", scores=scores, scope="value"))
        model(batch())
        with fx_approx.reuse_selection(model):
            first = selections(model, batch())
            if scores == "weight":
                assert same(first, selections(model, batch(1)))
            model(batch())


def test_hold_keeps_a_sample_while_a_reader_is_off() -> None:
    model = readers(Layers(scope="value"))
    with fx_approx.reuse_selection(model):
        first = selections(model, batch())
        model.last.eval()
        shuffle(model)
        second = selections(model, batch())
        model.last.train()
        third = selections(model, batch())
    assert second[2] is None
    assert same(first[:2], second[:2])
    assert same(first, third)


def test_a_held_sample_can_be_taken_up_by_a_layer_that_was_off() -> None:
    model = readers(Layers("systematic", scope="value"))
    model.last.eval()
    with fx_approx.reuse_selection(model):
        first = selections(model, batch())
        model.last.train()
        second = selections(model, batch())
    assert first[2] is None
    assert same(first[:2], second[:2])
    assert second[2].indices.unique().numel() == 8
    assert second[2].scale.min() >= 1


# ---- recomputation


@pytest.mark.parametrize("sampler", ["topk", "systematic"])
@pytest.mark.parametrize("scores", ["weight", "ema"])
@pytest.mark.parametrize("scope", ["value", "group"])
def test_a_checkpoint_of_the_whole_model_changes_nothing(scope: str, scores: str, sampler: str) -> None:
    build, shape = NETS["post-activation"]
    torch.manual_seed(0)
    x = torch.randn(shape).double()
    net = perturbed(build()).double()
    plain, kept = (fx_approx.transform(copy.deepcopy(net), Layers(sampler, 0.5, scores, scope), x) for _ in range(2))
    calls = [0]
    find(kept)._fx_approx.resample.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    for _ in range(3):
        expected = training_step(plain, x)
        found = training_step(_Checkpointed(kept), x)
        assert torch.equal(found.outputs[0], expected.outputs[0])
        for name, grad in expected.grads.items():
            torch.testing.assert_close(found.grads[f"model.{name}"], grad, rtol=1e-12, atol=1e-13)
    assert calls[0] == 6, "the checkpoint did not recompute"


class _Checkpointed(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.model, x, use_reentrant=False)


@pytest.mark.parametrize("sampler", ["topk", "systematic"])
@pytest.mark.parametrize("scores", ["weight", "ema"])
def test_two_forwards_wait_for_their_recomputation(scores: str, sampler: str) -> None:
    def gradients(keep: bool) -> list[Tensor]:
        model = readers(Layers(sampler, scores=scores, scope="value"))
        model(batch())
        x, y = batch(1), batch(2)
        if keep:
            first, second = (checkpoint(model, t, use_reentrant=False) for t in (x, y))
        else:
            first, second = model(x), model(y)
        wanted = list(model.parameters())
        return [
            *torch.autograd.grad(first.square().sum(), wanted),
            *torch.autograd.grad(second.square().sum(), wanted),
        ]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_recomputation_teaches_nothing() -> None:
    model, plain = (readers(Layers(scores="ema", scope="value")) for _ in range(2))
    for _ in range(3):
        checkpoint(model, batch(), use_reentrant=False).sum().backward()
        plain(batch()).sum().backward()
    for one, other in zip(shared(model), shared(plain), strict=True):
        assert torch.equal(one.running, other.running)
        assert torch.equal(one.age, other.age)


def test_a_copy_recomputes_with_its_own_selections() -> None:
    """Both are at the same step of the same seed, but have learnt different norms."""
    model = readers(Layers(scores="ema", scope="value"))
    twin = copy.deepcopy(model)
    model(batch(1))
    twin(batch(2) * torch.linspace(0.01, 9, 6))
    expected = indices(copy.deepcopy(model), batch(3)), indices(copy.deepcopy(twin), batch(3))
    assert expected[0] != expected[1]
    wanted, alone = list(model.parameters()), copy.deepcopy(model)
    x = batch(3)
    loss = checkpoint(model, x, use_reentrant=False).square().sum()
    checkpoint(twin, batch(3), use_reentrant=False)
    found = torch.autograd.grad(loss, wanted)
    right = torch.autograd.grad(alone(x).square().sum(), list(alone.parameters()))
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_hoisted_equals_whole_under_a_checkpoint() -> None:
    build, shape = NETS["squeeze-excite"]
    torch.manual_seed(0)
    x = torch.randn(shape).double()
    for hoisted, whole in [pair(perturbed(build()).double(), Layers("systematic", 0.5, "ema", "group"), x)]:
        for _ in range(2):
            one, other = training_step(_Checkpointed(hoisted), x), training_step(_Checkpointed(whole), x)
        # The statistics are updated twice, as by any checkpoint.
        assert_same_numbers(one, other, 1e-10)


def test_a_checkpoint_around_a_compiled_model_takes_the_selections_of_its_forward() -> None:
    """Running norms move in every forward, so a recomputation that chose anew would choose otherwise."""
    torch._dynamo.reset()
    model = readers(Layers("topk", scores="ema", scope="value"))
    for step in range(2):
        model(batch(step))
    state = fx_approx.sampler_state_dict(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def uneven(step: int) -> Tensor:
        return batch(step) * 1e3 ** torch.eye(6, dtype=torch.float64)[step]

    def gradients(call: object) -> list[Tensor]:
        fx_approx.load_sampler_state_dict(model, state)
        inputs = [uneven(step).requires_grad_() for step in range(5)]
        outputs = [call(x) for x in inputs]  # type: ignore[operator]
        return list(torch.autograd.grad(sum(y.square().sum() for y in outputs), [*inputs, *model.parameters()]))

    plain = gradients(compiled)
    again = gradients(lambda x: checkpoint(compiled, x, use_reentrant=False))
    chosen = [indices(model, uneven(step)) for step in range(5)]
    assert len({str(one) for one in chosen}) > 1
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
