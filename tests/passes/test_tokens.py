"""Tokens: some blocks compute some tokens only; the oracles are the same models, with the tokens left out by hand."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fx_approx
from fx_approx.core.plan import Plan
from fx_approx.errors import NoEffectWarning
from fx_approx.policies import Exact, Override, Tokens, Uniform
from fx_approx.runtime.approx_module import find
from fx_approx.runtime.step_gradient import sampled_gradient
from fx_approx.schedules import Constant, ExactTail, Linear, RatioScheduler
from tests.helpers.quick import quick

WIDTH, HEADS, TOKENS = 16, 2, 10


class Attention(nn.Module):
    """Self-attention with what ``how`` says: rotary positions, a mask, a causal flag."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, table: Tensor | None, mask: Tensor | None) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        if table is not None:
            q, k = q * table, k * table
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.how == "causal")
        result: Tensor = self.out(x.transpose(1, 2).reshape(batch, tokens, width))
        return result


class Rows(nn.Module):
    """A linear layer over examples and tokens as rows, as GPT-2 of transformers has it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        size = (*x.size()[:-1], WIDTH)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


class Block(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), Attention(how)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.rows = Rows() if how == "rows" else nn.Identity()

    def forward(self, x: Tensor, table: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm(x), table, mask)
        result: Tensor = x + self.rows(self.down(F.gelu(self.up(x))))
        return result


class Stack(nn.Module):
    """Four blocks; ``chosen`` leaves tokens out by hand, from the second block on."""

    def __init__(self, how: str, head: str) -> None:
        super().__init__()
        self.how, self.head = how, head
        self.embed, self.position = nn.Linear(5, WIDTH), nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.first = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.blocks = nn.ModuleList(Block(how) for _ in range(4))
        self.norm, self.classes = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)
        self.register_buffer("table", torch.randn(TOKENS, WIDTH // HEADS))

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        x = self.embed(x) + self.position
        table, mask = self.table if self.how == "rotary" else None, None
        if self.how == "bias":
            mask = self.table @ self.table.T
        if padding is not None:
            mask = padding[:, None, None, :]
        if self.head == "class":
            x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x, table, mask)
        return self.read(x)

    def read(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x = {"class": lambda: x[:, 0], "mean": lambda: x.mean(1), "all": lambda: x}[self.head]()
        result: Tensor = self.classes(x)
        return result

    def by_hand(self, x: Tensor, chosen: list[Tensor], skip: bool, padding: Tensor | None = None) -> Tensor:
        x = self.embed(x) + self.position
        table, mask = self.table if self.how == "rotary" else None, None
        if self.how == "bias":
            mask = self.table @ self.table.T
        if padding is not None:
            mask = padding[:, None, None, :]
        if self.head == "class":
            x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.blocks[0](x, table, mask)
        for number, index in enumerate(chosen):
            narrow_table = None if table is None else table[index]
            narrow_mask = mask
            if mask is not None:
                narrow_mask = mask[..., index] if mask.shape[-2] == 1 else mask[..., index, :][..., index]
            part = x[:, index]
            blocks = self.blocks[1 + number : 2 + number] if len(chosen) > 1 else self.blocks[1 : 3 if skip else 4]
            for block in blocks:
                part = block(part, narrow_table, narrow_mask)
            x = x.index_copy(1, index, part) if skip else part
        return self.read(self.blocks[3](x, table, mask) if skip else x)


def stack(how: str = "plain", head: str = "class") -> tuple[Stack, Tensor]:
    torch.manual_seed(0)
    return Stack(how, head).double(), torch.randn(3, TOKENS, 5).double()


def chosen_by(model: nn.Module) -> list[Tensor]:
    """What the next forward chooses of each stretch, with the tokens that are always kept."""
    found: list[Tensor] = []
    for one in find(model)._fx_approx.tokens:

        def note(module: Any, args: Any, chosen: Any) -> None:
            index = chosen.indices[0]
            found.append(torch.cat([torch.arange(module.others), index + module.others]))

        one.register_forward_hook(note)
    return found


def gradients(model: nn.Module, output: Tensor) -> list[Tensor]:
    named = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(output.square().sum(), named, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(named, grads, strict=True)]


def families(by_hand: list[tuple[str, bool, Tokens]]) -> list[Any]:
    """Each kind of attention with some of these, plain attention with all; one of ``rows``, whose sizes are known.

    With a class token there are no tables of the sequence, which would be those of the tokens without it, and no causal
    attention, in which the first token sees no other.
    """
    hows = ("plain", "causal", "rotary", "bias", "rows")
    cases = [(how, *one) for how in hows for one in by_hand if one[0] != "class" or how in ("plain", "rows")]
    turns = {how: by_hand[-1 - place :: -3] for place, how in enumerate(hows)}
    turns |= {"plain": by_hand, "rows": by_hand[-1:]}
    return quick(cases, lambda how, *one: one in turns[how])


@pytest.mark.parametrize(
    ("how", "head", "skip", "policy"),
    families(
        [
            ("class", False, Tokens(0.5)),
            ("mean", False, Tokens(0.5, keep=2)),
            ("mean", True, Tokens(0.5, mode="skip")),
            ("all", True, Tokens(0.5)),
            ("all", True, Tokens(0.5, per_layer=True, scores="norm")),
        ]
    ),
)
def test_values_and_gradients_are_those_of_the_model_written_by_hand(
    how: str, head: str, skip: bool, policy: Tokens
) -> None:
    model, x = stack(how, head)
    approx = fx_approx.transform(model, policy, x)
    chosen = chosen_by(approx)
    output = approx(x)
    index = [one for one in chosen]
    assert len(index) == (2 if policy.per_layer else 1)
    assert all(len(one) - policy.keep in (5, 6, 4) and (one.diff() > 0).all() for one in index)
    expected = model.by_hand(x, index, skip)
    assert torch.allclose(output, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(gradients(approx, output), gradients(model, expected), strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(output, model(x)), "something was left out"


def test_a_padding_mask_goes_along() -> None:
    model, x = stack("plain", "mean")
    padding = torch.ones(3, TOKENS, dtype=torch.bool)
    padding[0, 6:] = False
    approx = fx_approx.transform(model, Tokens(0.8, per_example=False), (x, padding))
    chosen = chosen_by(approx)
    output = approx(x, padding)
    assert torch.allclose(output, model.by_hand(x, chosen, False, padding), rtol=1e-12)


@pytest.mark.parametrize("head", ["class", "all"])
def test_exact_in_evaluation_at_ratio_one_and_switched_off(head: str) -> None:
    model, x = stack("plain", head)
    approx = fx_approx.transform(model, Tokens(0.5), x)
    assert not torch.equal(approx(x), model(x))
    with torch.no_grad():
        assert torch.equal(approx.eval()(x), model.eval()(x))
    approx.train(), model.train()
    assert torch.equal(fx_approx.transform(model, Tokens(1.0), x)(x), model(x))
    fx_approx.set_sampling(approx, enabled=False)
    assert torch.equal(approx(x), model(x))
    fx_approx.set_sampling(approx, enabled=True)
    fx_approx.set_sampling(approx, tokens=1.0)
    assert torch.equal(approx(x), model(x))
    fx_approx.set_sampling(approx, tokens=0.3)
    approx(x)
    assert find(approx)._fx_approx.tokens[0].last_count == 3


def test_another_length_has_the_share_of_its_own_tokens() -> None:
    class Plain(Stack):
        def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
            x = self.embed(x)
            for block in self.blocks:
                x = block(x)
            return self.read(x)

    torch.manual_seed(0)
    model = Plain("plain", "all").double()
    approx = fx_approx.transform(model, Tokens(0.5), torch.randn(3, TOKENS, 5).double())
    longer = torch.randn(2, 24, 5).double()
    assert approx(longer).shape == (2, 24, 3)
    assert find(approx)._fx_approx.tokens[0].last_count == 12


def test_every_forward_draws_anew_and_a_seed_says_it_all() -> None:
    model, x = stack()
    one, other = (fx_approx.transform(model, Tokens(0.5), x, seed=7) for _ in range(2))
    first, second = one(x), one(x)
    assert not torch.equal(first, second)
    assert torch.equal(other(x), first) and torch.equal(other(x), second)
    with fx_approx.reuse_selection(one):
        assert torch.equal(one(x), one(x))
    resumed = fx_approx.transform(model, Tokens(0.5), x)
    fx_approx.load_sampler_state_dict(resumed, fx_approx.sampler_state_dict(other))
    assert torch.equal(resumed(x), other(x))


def test_every_token_is_as_likely() -> None:
    model, x = stack("plain", "mean")
    approx = fx_approx.transform(model, Tokens(0.5), x)
    chosen = chosen_by(approx)
    with torch.no_grad():
        for _ in range(300):
            approx(x)
    counts = torch.cat(chosen).bincount(minlength=TOKENS).double() / 300
    assert (counts - 0.5).abs().max() < 4.5 * (0.25 / 300) ** 0.5


def test_a_checkpoint_recomputes_the_same_tokens() -> None:
    model, x = stack()
    plain, kept = (fx_approx.transform(model, Tokens(0.5), x) for _ in range(2))
    x.requires_grad_()
    expected = torch.autograd.grad(plain(x).square().sum(), x)[0]
    found = torch.autograd.grad(checkpoint(kept, x, use_reentrant=False).square().sum(), x)[0]
    assert torch.equal(found, expected)


@pytest.mark.slow
def test_compiled_as_one_graph() -> None:
    model, x = stack("causal", "all")
    eager = fx_approx.transform(model, Tokens(0.5), x)
    compiled = torch.compile(copy.deepcopy(eager), backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert torch.allclose(compiled(x), eager(x), rtol=1e-12)
    copied = copy.deepcopy(eager)
    assert torch.equal(copied(x), eager(x))


def by_policy(hand: nn.Module, layers: Any, x: Tensor) -> nn.Module:
    """``hand`` transformed by the policy of the layers of its ``model``."""
    rules = {f"model.{pattern}": policy for pattern, policy in layers.rules.items()} if "rules" in vars(layers) else {}
    return fx_approx.transform(hand, Override(rules, layers.base) if rules else layers, x)


@pytest.mark.parametrize(
    "layers",
    [
        Override({"*.down": Uniform(0.5)}, Exact()),
        Uniform(0.5),
        Uniform(0.5, scope="group"),
        Uniform(0.5, scope="layer"),
    ],
    ids=["hidden", "value", "group", "layer"],
)
def test_channels_of_the_layers_are_sampled_on_the_tokens_that_are_there(layers: Any) -> None:
    """The oracle: the model written by hand, itself transformed by the policy of the layers."""
    model, x = stack("plain", "mean")
    approx = fx_approx.transform(model, Tokens(0.5, layers=layers), x)
    chosen = chosen_by(approx)
    output = approx(x)

    class ByHand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.register_buffer("index", chosen[0])

        def forward(self, x: Tensor) -> Tensor:
            return self.model.by_hand(x, [self.index], False)

    hand = by_policy(ByHand(), layers, x)
    expected = hand(x)
    assert torch.allclose(output, expected, rtol=1e-12)
    for one, other in zip(gradients(approx, output), gradients(hand, expected), strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


def test_attention_of_torch_and_one_token_at_a_time() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(5, WIDTH)
            layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True)
            self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for layer in self.layers:
                x = layer(x)
            return x[:, -1]

    torch.manual_seed(0)
    model, x = Encoder().double(), torch.randn(3, TOKENS, 5).double()
    approx = fx_approx.transform(model, Tokens(0.5), x)
    found: list[Tensor] = []
    find(approx)._fx_approx.tokens[0].register_forward_hook(lambda m, a, out: found.append(out.indices[0]))
    output = approx(x)
    hand = model.layers[0](model.embed(x))[:, torch.cat([found[0], torch.tensor([TOKENS - 1])])]
    for layer in model.layers[1:]:
        hand = layer(hand)
    assert torch.allclose(output, hand[:, -1], rtol=1e-12)


# ---- where it stops, and what is refused


class Mixing(nn.Module):
    """A convolution over the sequence in its third block."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = stack("plain", "all")[0].float()
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stack.embed(x)
        for number, block in enumerate(self.stack.blocks):
            x = block(x)
            if number == 2:
                x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        return self.stack.read(x)


def test_what_mixes_positions_is_computed_whole_and_said() -> None:
    model, x = Mixing(), torch.randn(3, TOKENS, 5)
    approx = fx_approx.transform(model, Tokens(0.5, last=0), x)
    runtime = find(approx)._fx_approx
    assert len(runtime.tokens) == 2, "before and behind the block with the convolution"
    assert "mix mixes positions" in "; ".join(runtime.record.token_notes)
    assert approx(x).shape == (3, TOKENS, 3)
    assert "mix mixes positions" in str(fx_approx.report(approx))
    with pytest.warns(NoEffectWarning, match="mix mixes positions"):
        fx_approx.transform(model, Tokens(0.5, mode="drop"), x)


def test_no_attention_and_too_few_blocks() -> None:
    with pytest.warns(NoEffectWarning, match="no attention"):
        fx_approx.transform(nn.Sequential(nn.Linear(4, 4)), Tokens(0.5), torch.randn(2, 4))
    model, x = stack("plain", "all")
    with pytest.warns(NoEffectWarning, match=r"it has 4 blocks, and the first 2 and the last 2 are whole"):
        fx_approx.transform(model, Tokens(0.5, first=2, last=2), x)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Tokens(0.0), ValueError, r"ratio: expected a number in \(0, 1\], got 0.0"),
        (lambda: Tokens("half"), TypeError, "ratio: expected a number, got 'half'"),
        (lambda: Tokens(0.5, mode="skim"), ValueError, "mode: expected one of auto, drop, skip, got 'skim'"),
        (lambda: Tokens(0.5, first=-1), ValueError, "first: expected 0 or more, got -1"),
        (lambda: Tokens(0.5, last=1.5), TypeError, "last: expected an integer, got 1.5"),
        (
            lambda: Tokens(0.5, scores="best"),
            ValueError,
            "scores: expected one of uniform, norm, gradient, loss, got 'best'",
        ),
        (lambda: Tokens(0.5, mode="drop", per_layer=True), ValueError, "per_layer: True needs mode='skip'"),
        (lambda: Tokens(0.5, layers=0.5), TypeError, "layers: expected a policy"),
        (lambda: Tokens(0.5, sampler="bernoulli"), ValueError, "sampler: expected one of systematic, topk"),
        (lambda: Tokens(0.5, sampler="topk"), ValueError, "'topk' of uniform scores keeps the first tokens always"),
        (lambda: Tokens(0.5, per_example=1), TypeError, "per_example: expected True, False or None, got 1"),
        (lambda: Tokens(0.5, padding="last"), ValueError, "padding: expected one of first, ignore, got 'last'"),
        (lambda: Tokens(0.5, round_to=0), ValueError, "round_to: expected 1 or more, got 0"),
    ],
)
def test_bad_arguments_are_refused_at_construction(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_plan_keeps_what_was_asked_of_tokens() -> None:
    model, x = stack()
    plan = fx_approx.explain(model, Tokens(0.5, first=2), x).plan
    again = Plan.from_json(plan.to_json())
    assert again.tokens == plan.tokens and plan.tokens is not None and plan.tokens.first == 2
    one, other = fx_approx.transform(model, again, x), fx_approx.transform(model, Tokens(0.5, first=2), x)
    assert torch.equal(one(x), other(x))


def test_the_report_counts_the_tokens_that_are_computed() -> None:
    """The oracle: operations of the model written by hand, counted by torch."""
    model, x = stack("plain", "mean")
    approx = fx_approx.transform(model, Tokens(0.5, keep=2), x)
    chosen = chosen_by(approx)
    with FlopCounterMode(display=False) as counted:
        approx(x).sum().backward()
    with FlopCounterMode(display=False) as exact:
        model(x).sum().backward()
    report = fx_approx.report(approx)
    assert len(chosen[0]) == 6 and "6 of 10 tokens" in str(report)
    assert report.totals.executed.total == counted.get_total_flops()
    assert report.totals.exact.total == exact.get_total_flops()
    assert 0 < report.totals.memory < report.totals.memory_exact
    predicted = fx_approx.explain(model, Tokens(0.5, keep=2), x).report
    assert predicted.totals == report.totals
    fx_approx.set_sampling(approx, tokens=1.0)
    assert fx_approx.report(approx).totals.saved == 0


def test_schedules_drive_the_share_of_the_tokens() -> None:
    model, x = stack("plain", "mean")
    approx = fx_approx.transform(model, Tokens(0.5), x)
    one = find(approx)._fx_approx.tokens[0]
    scheduler = RatioScheduler(approx, ExactTail(Linear(0.3, 0.8, steps=4, levels=2), total=6, steps=2))
    counts = []
    for _ in range(6):
        approx(x)
        counts.append(one.last_count if one.enabled else TOKENS)
        scheduler.step()
    assert counts[0] == 3 and counts == sorted(counts) and counts[4:] == [TOKENS] * 2
    assert scheduler.get_last_ratio() == {"tokens": 1.0}
    state = scheduler.state_dict()
    other = RatioScheduler(fx_approx.transform(model, Tokens(0.5), x), Constant(0.4))
    other.load_state_dict(state)
    assert other.get_last_ratio() == scheduler.get_last_ratio() and other.state_dict() == state
    with pytest.raises(ValueError, match="decides about no sampled layer; there are"):
        RatioScheduler(approx, {"heads": Constant(0.5)})
    with pytest.warns(NoEffectWarning, match="no selection of channels is made ahead"):
        RatioScheduler(approx, {"tokens": Constant(0.5)}, preserve=True)


def test_pickled_with_its_share_and_exact_where_the_exact_model_is_asked_for() -> None:
    model, x = stack("plain", "mean")
    approx = fx_approx.transform(model, Tokens(0.5), x)
    fx_approx.set_sampling(approx, tokens=0.3)
    stream = io.BytesIO()
    torch.save(approx, stream)
    stream.seek(0)
    again = torch.load(stream, weights_only=False)
    assert torch.equal(again(x), approx(x))
    assert torch.equal(fx_approx.restore(approx)(x), model(x))


def test_gradient_noise_is_that_of_the_tokens_left_out() -> None:
    model, x = stack("plain", "mean")
    approx = fx_approx.transform(model, Tokens(0.5), x)
    exact = sampled_gradient(find(approx), x, lambda run, batch: run(batch).square().sum(), ())
    expected = torch.cat([g.flatten() for g in gradients(model, model(x))])
    assert torch.allclose(exact, expected, rtol=1e-12)
    sampled = sampled_gradient(find(approx), x, lambda run, batch: run(batch).square().sum(), ("tokens",))
    assert not torch.allclose(sampled, expected)
