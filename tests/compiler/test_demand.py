"""Demand changes which channels are computed, and no number: every family of networks, scope, score and sampler."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_approx
from fx_approx.policies import Paper, Uniform
from tests.helpers.demand_nets import NETS
from tests.helpers.hoisting import (
    Layers,
    assert_hoisting_changes_nothing,
    narrow_producers,
    narrow_values,
    pair,
    perturbed,
    training_step,
)
from tests.helpers.quick import in_turn, quick, thinned

SCOPES = ("layer", "value", "group")
SCORES = ("weight", "ema", "uniform")
SAMPLERS = ("topk", "systematic", "bernoulli")

# A Latin square, of which each network has one of every scope; all of the cross with ``-m slow``.
SOME = [(scope, SCORES[i], SAMPLERS[(i + j) % 3]) for j, scope in enumerate(SCOPES) for i in range(3)]
REST = [case for case in itertools.product(SCOPES, SCORES, SAMPLERS) if case not in SOME]


def built(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(seed)
    build, shape = NETS[name]
    return perturbed(build()).to(dtype), torch.randn(shape).to(dtype)


def check(name: str, scope: str, scores: str, sampler: str, seed: int) -> None:
    model, x = built(name, seed)
    policy = Layers(sampler, 0.5, scores, scope)
    steps = 3 if scores == "ema" else 2  # the first is exact
    hoisted = assert_hoisting_changes_nothing(model, policy, x, steps=steps, seed=seed)
    result = fx_approx.analysis.verify(hoisted, x)
    assert result.hoisted
    assert result.passed, str(result)
    assert result.tolerance == 1e-10


@pytest.mark.parametrize(
    ("name", "scope", "scores", "sampler"),
    quick(
        [(name, *SOME[3 * j + (i + j) % 3]) for i, name in enumerate(NETS) for j in range(3)],
        lambda name, scope, scores, sampler: (list(NETS).index(name) + SCOPES.index(scope)) % 3 == 2,
    ),
)
def test_hoisting_changes_no_number(name: str, scope: str, scores: str, sampler: str) -> None:
    check(name, scope, scores, sampler, SAMPLERS.index(sampler))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("scope", "scores", "sampler"), SOME + REST)
@pytest.mark.parametrize("name", NETS)
def test_hoisting_changes_no_number_in_all_combinations(
    name: str, scope: str, scores: str, sampler: str, seed: int
) -> None:
    check(name, scope, scores, sampler, seed)


@pytest.mark.parametrize(("name", "scope"), in_turn(["written-attention", "stacked-heads", "dense", "grouped"], SCOPES))
def test_products_of_activations_sampled_too(name: str, scope: str) -> None:
    """Their selectors read activations: with fewer heads they would choose other pairs."""
    scores, sampler = {"layer": ("weight", "topk"), "value": ("weight", "systematic"), "group": ("ema", "topk")}[scope]
    model, x = built(name)
    assert_hoisting_changes_nothing(model, Uniform(0.5, sampler, scores=scores, scope=scope), x, steps=3)


@pytest.mark.parametrize("name", ["squeeze-excite", "fused-heads"])
def test_papers_policy(name: str) -> None:
    model, x = built(name)
    policy = Paper(0.4, sampler="systematic", scores="weight", scope="group")
    assert_hoisting_changes_nothing(model, policy, x, steps=1)


@pytest.mark.parametrize(
    ("name", "ratio"),
    [
        *(("post-activation", 0.05), ("grouped", 0.3), ("fused-heads", 0.05), ("dense", 0.9)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("post-activation", 0.9), ("grouped", 0.05), ("fused-heads", 0.9), ("dense", 0.3))
        ),
    ],
)
def test_other_ratios(name: str, ratio: float) -> None:
    """Down to one channel, and where the halves of a space are not equal."""
    model, x = built(name)
    scope = "group" if ratio == 0.3 else "value"
    assert_hoisting_changes_nothing(model, Layers("topk", ratio, "weight", scope), x, steps=1)


# What computes fewer outputs, by scope: by hand from who reads what.
NARROW: dict[tuple[str, str], set[str]] = {
    # Only conv2 reads conv1; the stream is read by the next block's conv1 and by the addition. In the last block
    # one reader follows: the classifier, through the pool. Block 5 has a stream of its own, read by block 6.
    ("post-activation", "layer"): {"4.conv1", "5.conv1", "6.conv1", "6.conv2"},
    # At value scope conv1 and shortcut of block 5 agree.
    ("post-activation", "value"): {"4.conv1", "4.conv2", "5.conv1", "6.conv1", "6.conv2"},
    # All of the network; the stem too, since its stream is the first stage's.
    ("post-activation", "group"): {
        *("0", "4.conv1", "4.conv2", "5.conv1", "5.conv2", "5.shortcut.0", "6.conv1", "6.conv2")
    },
    ("vgg", "layer"): {"features.0", "features.4", "classifier.0"},
    ("gated", "layer"): {"up1", "up2", "up3", "down2"},
    ("gated", "group"): {"up1", "up2", "up3", "down1", "down2"},
    ("fused-heads", "layer"): {"qkv", "up"},
    ("written-attention", "layer"): {"q", "k", "v", "out"},
    ("stacked-heads", "layer"): {"qkv"},
    ("plain-residual", "layer"): {"a", "c"},
    ("plain-residual", "group"): {"stem", "a", "b", "c"},
    ("dense", "value"): {
        *("stem", "transition.2", "layers.0.conv1", "layers.1.conv1", "layers.2.conv1"),
        *("layers.0.conv2", "layers.1.conv2", "layers.2.conv2"),
    },
    ("grouped", "group"): {
        *("0", "3.a", "3.b", "3.c", "3.shortcut", "3.squeeze.fc1", "3.squeeze.fc2"),
        *("4.a", "4.b", "4.c", "4.squeeze.fc1", "4.squeeze.fc2", "5"),
    },
    ("squeeze-excite", "group"): {
        *("0", "3.layers.0", "3.layers.3", "3.layers.6.fc1", "3.layers.6.fc2", "3.layers.7"),
        *("4.layers.0", "4.layers.3", "4.layers.6.fc1", "4.layers.6.fc2", "4.layers.7", "5"),
    },
}


@pytest.mark.parametrize(("name", "scope"), thinned(NARROW))
def test_who_computes_fewer_outputs(name: str, scope: str) -> None:
    model, x = built(name)
    approx = fx_approx.transform(model, Layers("topk", 0.5, "weight", scope), x)
    assert narrow_producers(approx) == NARROW[name, scope]


@pytest.mark.parametrize("name", thinned(NETS, 4))
def test_a_wider_scope_never_computes_more(name: str) -> None:
    model, x = built(name)
    found = [narrow_values(fx_approx.transform(model, Layers(scope=scope), x)) for scope in SCOPES]
    assert found[0] and found[0] <= found[1] and found[0] <= found[2]


@pytest.mark.parametrize("name", thinned(["conv-next", "post-activation"]))
def test_float32_within_rounding(name: str) -> None:
    model, x = built(name, dtype=torch.float32)
    hoisted = assert_hoisting_changes_nothing(model, Layers("systematic", 0.5, "weight", "group"), x, tolerance=2e-4)
    assert fx_approx.analysis.verify(hoisted, x).passed


@pytest.mark.parametrize("name", thinned(NETS, 3))
def test_evaluation_is_exact(name: str) -> None:
    model, x = built(name)
    expected = model.eval()(x)
    approx = fx_approx.transform(model, Layers(scope="group"), x).eval()
    assert torch.equal(approx(x), expected)


@pytest.mark.parametrize("name", thinned(NETS, 3))
def test_another_batch_size_than_the_examples(name: str) -> None:
    model, x = built(name)
    hoisted, whole = pair(model, Layers(scope="group"), x)
    for other in (x[:1].repeat(2, *[1] * (x.dim() - 1)), torch.cat([x, x])):
        one, two = training_step(hoisted, other).outputs[0], training_step(whole, other).outputs[0]
        assert one.shape == two.shape
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_an_example_of_one_row() -> None:
    """The batch's axis of length one must not be taken for a part of the channels."""

    class Merged(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (torch.nn.Conv2d(i, o, 1) for i, o in ((3, 8), (8, 4), (8, 4)))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.a(x).view(-1, 4, 4).softmax(-1)
            return self.b(y.relu().view(-1, 8, 4, 4)), self.c(y.tanh().view(-1, 8, 4, 4))

    torch.manual_seed(0)
    x = torch.randn(4, 3, 4, 4, dtype=torch.float64)
    for scope in SCOPES:
        hoisted, whole = pair(Merged().double(), Layers("systematic", scope=scope), x[:1])
        for one, two in zip(hoisted(x), whole(x), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_verify_finds_a_wrong_number() -> None:
    """The oracle's own check: a hoisted graph that is wrong by a hair."""
    model, x = built("post-activation")
    approx = fx_approx.transform(model, Layers(scope="group"), x)
    assert fx_approx.analysis.verify(approx, x).passed
    runtime = approx._fx_approx
    exact = runtime.program.function
    runtime.program.function = lambda root, *args: exact(root, *args) * (1 + 1e-8)
    result = fx_approx.analysis.verify(approx, x)
    assert not result.passed
    assert result.worst.kind in ("output", "loss", "gradient")
    runtime.program.function = exact


def test_verify_finds_wrong_statistics_beside_a_large_buffer() -> None:
    model, x = built("post-activation")
    model.register_buffer("mask", torch.full((2,), float("-inf")))
    approx = fx_approx.transform(model, Layers(scope="group"), x)
    runtime = approx._fx_approx
    exact = runtime.program.function

    def wrong(root: Any, *args: Any) -> Any:
        result = exact(root, *args)
        root.get_submodule("1").running_mean.mul_(1.01)
        return result

    runtime.program.function = wrong
    result = fx_approx.analysis.verify(approx, x)
    assert not result.passed
    assert result.worst.kind == "statistics"


class Labels(torch.nn.Module):
    """Gives scores, with their largest places far from zero, a mask and complex numbers beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.net(x)
        return y, y.argmax(-1) + 10**9, y > 0, torch.complex(y, -y)


def test_verify_takes_indices_masks_and_complex_numbers_for_what_they_are() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8, dtype=torch.float64)
    approx = fx_approx.transform(Labels().double(), Layers(scope="value"), x)
    result = fx_approx.analysis.verify(approx, x)
    assert result.hoisted
    assert result.passed, str(result)
    runtime = approx._fx_approx
    exact = runtime.program.function
    for place, wrong in ((0, lambda y: y * (1 + 1e-8)), (1, lambda y: y + 1), (2, torch.logical_not)):

        def other(root: Any, *args: Any, place: int = place, wrong: Any = wrong) -> Any:
            made = list(exact(root, *args))
            made[place] = wrong(made[place])
            return tuple(made)

        runtime.program.function = other
        result = fx_approx.analysis.verify(approx, x)
        assert not result.passed
        assert max(result.differences, key=lambda one: one.relative * (one.kind == "output")).name == str(place)
    runtime.program.function = exact


def test_verify_leaves_everything_as_it_was() -> None:
    model, x = built("squeeze-excite")
    approx = fx_approx.transform(model, Layers("systematic", scores="ema", scope="group"), x)
    for _ in range(2):
        training_step(approx, x)
    before = {name: t.clone() for name, t in approx.state_dict().items()}
    state, random = fx_approx.sampler_state_dict(approx), torch.get_rng_state()
    graph = approx._fx_approx.program.function
    assert fx_approx.analysis.verify(approx, x).passed
    assert all(torch.equal(t, before[name]) for name, t in approx.state_dict().items())
    assert fx_approx.sampler_state_dict(approx) == state
    assert torch.equal(torch.get_rng_state(), random)
    assert approx._fx_approx.program.function is graph
    assert all(p.grad is None for p in approx.parameters())


# ---- grouped queries: a head of the keys is left out with all heads of the queries that read it, or none is


EACH = 4
QUERIES = 6


class Grouped(nn.Module):
    def __init__(self, heads: int, gqa: int = True, masks: int = 0, cached: int = False, repeat: int = False) -> None:
        super().__init__()
        self.heads, self.gqa, self.cached, self.repeat = heads, gqa, cached, repeat
        self.q, self.out = nn.Linear(8, QUERIES * EACH), nn.Linear(QUERIES * EACH, 8)
        self.k, self.v = nn.Linear(8, heads * EACH), nn.Linear(8, heads * EACH)
        self.mask = nn.Parameter(torch.randn(masks, 5, 5)) if masks else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, EACH)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.cached:
            k, v = (torch.cat([torch.tensor([], dtype=x.dtype), value], -2) for value in (k, v))
        if self.repeat:
            sizes = x.shape[0], self.heads, QUERIES // self.heads, x.shape[1], EACH
            k, v = (value[:, :, None].expand(*sizes).reshape(x.shape[0], QUERIES, -1, EACH) for value in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, enable_gqa=bool(self.gqa))
        result: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return result


@pytest.mark.parametrize(
    ("heads", "options", "narrowed"),
    [
        (2, {}, {"q", "k", "v"}),
        (3, {"cached": True}, {"q", "k", "v"}),
        (6, {}, {"q", "k", "v"}),
        (3, {"repeat": True}, {"q", "k", "v"}),
        (2, {"repeat": True, "masks": QUERIES}, {"q", "k", "v"}),
        # One head that all queries read is needed whichever of them are left.
        (1, {}, {"q"}),
        (1, {"gqa": False}, {"q"}),
        # A mask with an entry for each head of the queries: what it would need is not worked out.
        (2, {"masks": QUERIES}, set()),
        (2, {"masks": 1}, {"q", "k", "v"}),
    ],
)
def test_hoisted_equals_whole(heads: int, options: dict[str, int], narrowed: set[str]) -> None:
    torch.manual_seed(0)
    model = Grouped(heads, **options).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    policy = Layers(scope="value", sampler="topk" if options else "systematic", ratio=0.34 if heads == 3 else 0.5)
    hoisted = assert_hoisting_changes_nothing(model, policy, x)
    assert narrow_producers(hoisted) == narrowed
