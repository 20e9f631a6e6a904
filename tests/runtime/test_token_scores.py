"""Scores that tokens are chosen by: how often each is kept, what is learnt, and what becomes of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fx_approx
from fx_approx.core.token_sampling import SAMPLERS, TokenSampling
from fx_approx.errors import NoEffectWarning
from fx_approx.ops.token_scores import attended, learn, learn_positions
from fx_approx.policies import Tokens, Uniform
from fx_approx.runtime.approx_module import find
from fx_approx.runtime.rng import Draw, draw
from fx_approx.runtime.token_selection import TokenSelection
from fx_approx.sampling.base import get_sampler
from fx_approx.sampling.probabilities import inclusion_probabilities
from fx_approx.schedules import Constant, PiecewiseConstant, RatioScheduler, note_token_losses
from tests.passes.test_token_checks import Model, examples
from tests.passes.test_token_examples import chosen_of, padding_of
from tests.passes.test_tokens import TOKENS, stack

DRAWS = 400


def drawn(selection: TokenSelection, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """How often each example keeps each token, ``[examples, tokens]``, in :data:`DRAWS` forwards."""
    kept = torch.zeros(selection.examples, selection.tokens, dtype=torch.float64)
    for step in range(DRAWS):
        key = torch.tensor([5, step])
        chosen = selection(Draw(key, draw(key, [selection.site], [selection.count])), value, mask)
        kept.scatter_add_(1, chosen.indices, torch.ones_like(chosen.indices, dtype=torch.float64))
    return kept / DRAWS


@pytest.mark.parametrize("scores", ["uniform", "norm"])
def test_a_token_is_kept_as_often_as_its_score_says_and_padding_only_where_there_is_room(scores: str) -> None:
    torch.manual_seed(0)
    value, there = torch.randn(3, TOKENS, 4) * torch.rand(3, TOKENS, 1), padding_of((4, TOKENS, 7))
    owner = nn.Linear(2, 2)
    sampling = TokenSampling(0.5, scores=scores)
    selection = TokenSelection(sampling, 1, 0, 0, TOKENS, -1, owner, batch=0, examples=3, mask=(-4, 0))
    found = drawn(selection, value, there[:, None, None, :])
    norms = torch.ones(3, TOKENS).double() if scores == "uniform" else value.double().norm(dim=2)
    mixed = 0.9 * norms / norms.mean(1, keepdim=True) + 0.1 if scores == "norm" else norms
    expected = inclusion_probabilities(torch.where(there, mixed, 0), 5, 0.0)
    assert torch.allclose(expected.sum(1), torch.full((3,), 5.0).double())
    assert torch.equal(found[0, :4], torch.ones(4).double()), "all real ones of an example that has four"
    assert not found[2, 7:].any(), "no padding where there are real ones enough"
    deviation = (expected * (1 - expected) / DRAWS).clamp(min=1e-12).sqrt()
    assert ((found - expected) / deviation).abs().max() < 4.5
    assert scores == "uniform" or (expected[1] - 0.5).abs().max() > 0.1, "not all alike"


def test_examples_draw_by_themselves_and_no_sampler_keeps_a_token_twice() -> None:
    owner, value = nn.Linear(2, 2), torch.randn(64, TOKENS, 4)
    for sampler in SAMPLERS:
        assert get_sampler(sampler).fixed_size
        sampling = TokenSampling(0.5, scores="norm", sampler=sampler)
        selection = TokenSelection(sampling, 1, 0, 0, TOKENS, -1, owner, batch=0, examples=64)
        key = torch.tensor([5, 0])
        chosen = selection(Draw(key, draw(key, [-1], [selection.count])), value).indices
        assert chosen.shape == (64, 5) and (chosen.diff() > 0).all()
        if sampler == "topk":
            assert torch.equal(chosen, value.norm(dim=2).topk(5).indices.sort().values)
        assert len({tuple(row) for row in chosen.tolist()}) > 20


@pytest.mark.parametrize(
    "mask",
    [
        lambda there: there[:, None, None, :],
        lambda there: there[:, None, None, :].expand(-1, 4, TOKENS, -1),
        lambda there: there[:, None, None, :] & torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(),
        lambda there: torch.where(there, 0.0, float("-inf")).repeat_interleave(4, 0)[:, None, :],
        lambda there: torch.where(there[:, None, None, :], torch.randn(TOKENS, TOKENS), torch.finfo(torch.half).min),
        lambda there: (1 - there[:, None, None, :].float()) * -10000.0,
    ],
    ids=["keep", "expanded", "causal", "heads", "bias", "old"],
)
def test_what_no_query_may_attend_to_is_padding(mask: Callable[[Tensor], Tensor]) -> None:
    there = padding_of((4, TOKENS, 7))
    made = mask(there)
    assert torch.equal(attended(made, -made.dim(), 3), there)


def rest(model: Model, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The stretch by hand, from its own input on: what it reads, and its result."""
    model.index = None
    start = model.blocks[0](model.embed(x))
    part = start.gather(1, index.expand(len(x), -1).unsqueeze(2).expand(-1, -1, start.shape[2])).detach()
    value = part.requires_grad_()
    result = value
    for block in list(model.blocks)[1:]:
        result = block(result)
    return value, result.mean(1)


def test_a_running_score_of_zero_is_known_and_a_negative_one_is_not() -> None:
    running = torch.tensor([-1.0, 0.0, 2.0, 2.0, 2.0])
    fresh = torch.tensor([3.0, 3.0, 3.0, float("inf"), 3.0])
    learn(running, fresh, torch.tensor([True, True, True, True, False]))
    assert torch.allclose(running, torch.tensor([3.0, 0.3, 2.1, 2.0, 2.0]))


@pytest.mark.parametrize("per_example", [False, True])
def test_running_norms_are_those_of_the_gradient_at_each_position(per_example: bool) -> None:
    model = Model().double()
    approx = fx_approx.transform(model, Tokens(0.5, scores="gradient", per_example=per_example), examples())
    (one,) = find(approx)._fx_approx.tokens
    chosen = chosen_of(approx)
    expected = torch.full((TOKENS,), -1.0)
    assert torch.equal(one.running, expected)
    for _ in range(3):
        x = examples()
        approx(x).square().sum().backward()
        index = chosen[-1]
        value, result = rest(model, x, index)
        (grad,) = torch.autograd.grad(result.square().sum(), value)
        squares = grad.square().mean(2)
        for place in range(TOKENS):
            own = squares[(index.expand(3, -1) == place)]
            if len(own):
                fresh = own.mean().sqrt()
                expected[place] = fresh if expected[place] < 0 else 0.9 * expected[place] + 0.1 * fresh
    assert torch.allclose(one.running, expected.float(), rtol=1e-5)


def test_what_is_not_finite_and_what_lies_beyond_changes_nothing() -> None:
    running = torch.tensor([-1.0, 2.0, 3.0, -1.0])
    squares = torch.tensor([[4.0, float("inf"), 9.0], [0.0, 1.0, 0.0]])
    learn_positions(running, squares, torch.tensor([[0, 1, 9], [0, 2, 3]]))
    assert torch.allclose(running, torch.tensor([2.0, 2.0, 2.8, -1.0]))


def trained(approx: nn.Module, steps: int, first: int = 0) -> list[Tensor]:
    outputs = []
    for step in range(first, first + steps):
        x = torch.randn(3, TOKENS, 5, generator=torch.Generator().manual_seed(step)).double()
        outputs.append(approx(x))
        outputs[-1].square().sum().backward()
    return outputs


def test_a_resumed_run_is_bitwise_the_same() -> None:
    model = Model().double()
    make = lambda: fx_approx.transform(model, Tokens(0.5, scores="gradient"), examples(), seed=3)  # noqa: E731
    one, other = make(), make()
    trained(one, 4)
    state = json.loads(json.dumps(fx_approx.sampler_state_dict(one)))
    fx_approx.load_sampler_state_dict(other, state)
    copied = copy.deepcopy(one)
    for expected, found, again in zip(trained(one, 3, 4), trained(other, 3, 4), trained(copied, 3, 4), strict=True):
        assert torch.equal(expected, found) and torch.equal(expected, again)
    del state["tokens"]
    fx_approx.load_sampler_state_dict(other, state)
    (selection,) = find(other)._fx_approx.tokens
    assert (selection.running < 0).all()
    with pytest.raises(ValueError, match="tokens: expected the scores of 1 stretches of blocks, got 3"):
        fx_approx.load_sampler_state_dict(other, {**state, "tokens": 3})


def test_checkpoints_recompute_by_the_scores_that_their_forwards_had() -> None:
    """Two forwards wait for their backward passes, and the first of these changes the scores."""
    model = Model().double()
    policy = Tokens(0.5, scores="gradient", sampler="topk")
    plain, kept = (fx_approx.transform(model, policy, examples(), seed=3) for _ in range(2))
    for approx in (plain, kept):
        trained(approx, 2)
    x, y = examples().requires_grad_(), examples().requires_grad_()
    results = []
    for call in (plain, lambda given: checkpoint(kept, given, use_reentrant=False)):
        first, second = call(x), call(y)
        grads = torch.autograd.grad(first.square().sum(), x), torch.autograd.grad(second.square().sum(), y)
        results.append((*grads[0], *grads[1]))
    assert all(map(torch.equal, *results))


def test_one_selection_is_kept_while_the_scores_move() -> None:
    approx = fx_approx.transform(Model().double(), Tokens(0.5, scores="gradient", sampler="topk"), examples())
    trained(approx, 2)
    chosen = chosen_of(approx)
    with fx_approx.reuse_selection(approx):
        trained(approx, 3)
    assert all(torch.equal(chosen[0], other) for other in chosen)


def test_tokens_that_lose_most_are_kept() -> None:
    approx = fx_approx.transform(Model().double(), Tokens(0.5, scores="loss", sampler="topk"), examples())
    chosen = chosen_of(approx)
    losses = torch.rand(3, TOKENS)
    losses[0, 3] = losses[:, 8] = float("nan")
    note_token_losses(approx, losses)
    approx(examples())
    (one,) = find(approx)._fx_approx.tokens
    expected = losses.nanmean(0)
    assert one.running[8] == -1 and torch.allclose(one.running[:8], expected[:8])
    assert 8 in chosen[0][0], "no loss was told of it yet"
    expected[8] = 9
    assert torch.equal(chosen[0][0], expected.topk(5).indices.sort().values)
    note_token_losses(approx, torch.full((TOKENS - 2,), 100.0))
    assert torch.allclose(one.running[:8], 0.9 * losses.nanmean(0)[:8] + 10)
    with pytest.raises(TypeError, match=r"losses: expected a floating-point tensor \[\.\.\., positions\], got 3"):
        note_token_losses(approx, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a loss for each token, got a single number"):
        note_token_losses(approx, torch.tensor(1.0))
    other = fx_approx.transform(Model().double(), Tokens(0.5), examples())
    with pytest.raises(ValueError, match="no token is chosen by its loss; transform it with Tokens"):
        note_token_losses(other, losses)


@pytest.mark.parametrize("scores", ["norm", "gradient", "loss"])
def test_exact_in_evaluation_and_at_ratio_one(scores: str) -> None:
    model, x = Model().double(), examples()
    approx = fx_approx.transform(model, Tokens(0.5, scores=scores, per_example=True), x)
    assert not torch.equal(approx(x), model(x))
    fx_approx.set_sampling(approx, tokens=1.0)
    assert torch.equal(approx(x), model(x))
    fx_approx.set_sampling(approx, tokens=0.5)
    assert torch.equal(approx.eval()(x), model.eval()(x))


def test_counts_go_by_steps_of_round_to() -> None:
    sampling = TokenSampling(0.5, round_to=8)
    assert [sampling.count(tokens) for tokens in (16, 20, 32, 37, 48)] == [8, 8, 16, 16, 24]
    assert sampling.count(16, 1.0) == 16 and sampling.count(5) == 5


def test_of_tokens_there_is_nothing_to_preserve() -> None:
    model, x = stack("plain", "mean")
    approx = fx_approx.transform(model, Tokens(0.5, layers=Uniform(0.5)), x)
    with pytest.warns(NoEffectWarning, match="preserve: the schedule drives tokens only, to which no weight belongs"):
        RatioScheduler(approx, {"tokens": Constant(0.4)}, preserve=True)


@pytest.mark.slow
@pytest.mark.parametrize("scores", ["uniform", "norm", "gradient"])
def test_compiled_once_and_as_eager(scores: str) -> None:
    model, x = stack("plain", "all")
    there = padding_of()
    eager = fx_approx.transform(model, Tokens(0.5, scores=scores), (x, there))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(copy.deepcopy(eager), backend=counter, fullgraph=True)
    for step in range(3):
        there = padding_of((4 + step, TOKENS, 7 - step))
        outputs = [call(x, there) for call in (eager, compiled)]
        assert torch.allclose(*outputs, rtol=1e-12)
        for output in outputs:
            output.square().sum().backward()
    assert counter.frame_count == 1
    if scores == "gradient":
        (one,), (other,) = find(eager)._fx_approx.tokens, find(compiled)._fx_approx.tokens
        assert torch.allclose(one.running, other.running) and one.running.max() > 0


@pytest.mark.slow
def test_a_ladder_of_shares_compiles_once_a_rung() -> None:
    model, x = stack("plain", "mean")
    approx = fx_approx.transform(model, Tokens(0.3), x)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(approx, backend=counter, fullgraph=True)
    scheduler = RatioScheduler(approx, PiecewiseConstant({0: 0.3, 2: 0.6, 4: 0.3, 6: 0.6}))
    for _ in range(8):
        compiled(x).sum().backward()
        scheduler.step()
    assert counter.frame_count == 2


@pytest.mark.slow
def test_lengths_that_change_go_on_in_one_graph_and_keep_their_share() -> None:
    model = Model().double()
    approx = fx_approx.transform(model, Tokens(0.5, round_to=4, per_example=True), examples())
    (one,) = find(approx)._fx_approx.tokens
    eager = copy.deepcopy(approx)
    chosen = chosen_of(eager)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(approx, backend=counter, fullgraph=True)
    for tokens in (10, 13, 17, 21, 30):
        x = examples(3, tokens)
        assert torch.allclose(compiled(x), eager(x), rtol=1e-12)
        assert chosen[-1].shape[1] == one.sampling.count(tokens)
    assert counter.frame_count == 2, "one for the first length, and one for all others"
