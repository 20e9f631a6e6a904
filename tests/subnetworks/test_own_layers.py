"""Layers in a class of the user's own, whose forward calls a function: narrow, counted, exported, copied, pickled."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_approx
from fx_approx.errors import BatchNormWarning
from fx_approx.runtime.approx_module import find
from fx_approx.subnetworks import extract, load, merge, record_of, reselect, restore, save
from tests.helpers.hoisting import Layers, perturbed
from tests.helpers.quick import in_turn
from tests.subnetworks.nets import largest, other_selections, same, steps

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
WIDE = Layers("topk", 0.5, "weight", "value")


class NormAct(nn.BatchNorm2d):
    """As ``BatchNormAct2d`` of timm: it counts batches in training only, and has an activation of its own."""

    def __init__(self, channels: int, act: bool = True) -> None:
        super().__init__(channels)
        self.act = nn.SiLU() if act else nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        mean, var = self.running_mean, self.running_var
        made = F.batch_norm(input, mean, var, self.weight, self.bias, self.training, self.momentum or 0.0, self.eps)
        result: Tensor = self.act(made)
        return result


class Block(nn.Module):
    """A residual block, as of a RegNet."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), NormAct(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), NormAct(outputs, act=False)
        self.down, self.bn3 = nn.Conv2d(inputs, outputs, 1, bias=False), NormAct(outputs, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))) + self.bn3(self.down(x)))


def network() -> nn.Module:
    """Its residual streams are wide at scope ``value``; what the last block makes is narrow."""
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 8, 3, padding=1), NormAct(8)
    return perturbed(
        nn.Sequential(*stem, Block(8, 12), Block(12, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    ).double()


def test_a_count_of_batches_does_not_keep_a_graph_from_evaluation() -> None:
    model = network()
    approx = fx_approx.transform(copy.deepcopy(model), WIDE, X)
    assert find(approx)._fx_approx.program.capture.branching == ()
    approx(X)
    assert int(approx[1].num_batches_tracked) == int(approx[3].bn2.num_batches_tracked) == 1
    model.load_state_dict(approx.state_dict())
    with pytest.warns(BatchNormWarning):
        assert torch.allclose(approx.eval()(X), model.eval()(X), rtol=1e-12)
    assert int(approx[1].num_batches_tracked) == 1


def test_its_graph_is_exported_for_evaluation() -> None:
    sub = extract(fx_approx.transform(network(), WIDE, X))
    sub(X)
    expected = sub.eval()(X)
    counts = [name for name in sub.state_dict() if name.endswith("num_batches_tracked")]
    assert len(counts) == 7 and all(int(sub.state_dict()[name]) == 1 for name in counts)
    assert torch.allclose(torch.export.export(sub, (X,), strict=False).module()(X), expected, rtol=1e-12)


class SameConv(nn.Conv2d):
    """As ``Conv2dSame`` of timm: pads by itself, and names its groups."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(F.pad(input, (0, 2, 0, 2)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Gated(nn.Module):
    """An inverted residual block: expanded, by channel, projected."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.expand, self.bn1 = SameConv(channels, hidden, 3), NormAct(hidden)
        self.single, self.bn2 = SameConv(hidden, hidden, 3, groups=hidden), NormAct(hidden)
        self.project, self.bn3 = SameConv(hidden, channels, 3, bias=False), NormAct(channels, act=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.single(self.bn1(self.expand(x))))
        return self.bn3(self.project(x))


class Stream(nn.Module):
    """Two such blocks on a residual stream, of which the head reads a part."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.other = SameConv(3, 8, 3), Gated(8, 16), Gated(8, 16)
        self.norm, self.head = NormAct(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.one(x)
        x = x + self.other(x)
        result: Tensor = self.head(self.norm(x).mean((2, 3)))
        return result


def stream() -> nn.Module:
    torch.manual_seed(0)
    return perturbed(Stream()).double()


@pytest.mark.parametrize(("build", "scope"), in_turn([network, stream], ["value", "group"]))
def test_its_own_class_runs_the_subnetwork(build: Callable[[], nn.Module], scope: str) -> None:
    """Where a layer gets a wide value it reads its part, though it is none of torch's."""
    approx = fx_approx.transform(build(), Layers("topk", 0.5, "weight", scope), X)
    kept = copy.deepcopy(approx)
    sub = extract(approx, example_inputs=X)
    assert record_of(sub).own_forward, record_of(sub).reason
    assert sum(p.numel() for p in sub.parameters()) < 0.7 * sum(p.numel() for p in approx.parameters())
    for name, module in sub.named_modules():
        if isinstance(module, NormAct):
            assert module.num_features == module.weight.numel(), name
        if isinstance(module, SameConv):
            assert (module.out_channels, module.in_channels // module.groups) == tuple(module.weight.shape[:2]), name
    before = {name: p.detach().clone() for name, p in kept.named_parameters()}
    steps(sub, torch.optim.SGD(sub.parameters(), 1e-3), X, 3)
    with fx_approx.reuse_selection(kept):
        steps(kept, torch.optim.SGD(kept.parameters(), 1e-3), X, 3)
    merge(sub, approx)
    moved = max(float((p.detach() - before[name]).abs().max()) for name, p in kept.named_parameters())
    assert moved > 0 and largest(approx, kept) <= 1e-10 * moved
    assert torch.allclose(torch.export.export(sub.eval(), (X,), strict=False).module()(X), sub(X), rtol=1e-12)


def test_its_own_class_is_cut_out_anew_and_stored() -> None:
    approx = fx_approx.transform(stream(), WIDE, X)
    sub = extract(approx, example_inputs=X)
    stored = io.BytesIO()
    save(sub, stored)
    stored.seek(0)
    again = load(stored, stream(), example_inputs=X)
    assert type(again) is Stream and torch.equal(again(X), sub(X))
    merge(sub, approx)
    chosen = other_selections(sub, approx, False)
    reselect(sub, approx, chosen)
    fresh = extract(approx, chosen, example_inputs=X)
    assert same(sub, fresh) and not same(sub, again)
    assert torch.equal(sub(X), fresh(X))


class Attention(nn.Module):
    """As that of timm: its forward names heads, channels of a head, and those of all heads."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = heads, channels // heads, channels
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        made = F.scaled_dot_product_attention(*qkv.unbind(0))
        result: Tensor = self.proj(made.transpose(1, 2).reshape(batch, tokens, self.attn_dim))
        return result


class Transformer(nn.Module):
    """Two blocks of attention on a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 12), nn.Linear(12, 5)
        self.blocks = nn.ModuleList(Attention(12, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        result: Tensor = self.head(x.mean(1))
        return result


def test_attributes_that_follow_one_size_are_set_together() -> None:
    """Two of three heads are kept, and half of the channels that they read."""
    torch.manual_seed(0)
    x = torch.randn(4, 7, 6).double()
    approx = fx_approx.transform(perturbed(Transformer()).double(), WIDE, x)
    sub = extract(approx, example_inputs=x)
    assert type(sub) is Transformer, record_of(sub).reason
    for block in sub.blocks:
        assert (block.num_heads, block.head_dim, block.attn_dim) == (2, 4, 8)
    with fx_approx.reuse_selection(approx):
        assert torch.allclose(sub(x), approx(x), rtol=1e-12)


class Cached(nn.Module):
    """As attention of LeViT: it keeps a value that it computes in evaluation. Its Python names channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.shift, self.cache = nn.Parameter(torch.randn(2, 4)), dict[str, Tensor]()

    def shifted(self, x: Tensor) -> Tensor:
        if self.training:
            return x + self.shift[:, 1:3].sum(1).repeat(2)
        if "shift" not in self.cache:
            self.cache["shift"] = self.shift[:, 1:3].sum(1).repeat(2)
        return x + self.cache["shift"]

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(x), inplace=True).view(-1, 16)))
        return self.shifted(self.c(x))


class Clamped(Cached):
    """It does something else in evaluation, if only to few values."""

    def shifted(self, x: Tensor) -> Tensor:
        return x if self.training else x.clamp(-1e3, 1e3)


class Counting(Cached):
    """Writes into a buffer in evaluation, and returns the same."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))

    def shifted(self, x: Tensor) -> Tensor:
        if not self.training:
            self.seen.add_(x.detach().mean(0))
        return x


@pytest.mark.parametrize(("build", "evaluates"), [(Cached, True), (Clamped, False), (Counting, False)])
def test_a_graph_evaluates_where_the_operations_are_those_of_the_model(build: type[Cached], evaluates: bool) -> None:
    """On this input all three compute in evaluation what their graphs do; of others only the operations tell."""
    torch.manual_seed(0)
    model, x = build(), torch.randn(4, 8)
    approx = fx_approx.transform(copy.deepcopy(model), WIDE, x)
    assert find(approx)._fx_approx.program.capture.branching
    sub = extract(approx, example_inputs=x)
    assert not record_of(sub).own_forward and not model.cache
    expected = sub(x)
    full = restore(sub, model).eval()(x)
    for one in (sub, copy.deepcopy(sub), pickle.loads(pickle.dumps(sub))):
        one.eval()
        if evaluates:
            assert torch.allclose(torch.export.export(one, (x,), strict=False).module()(x), full, atol=1e-5)
            assert torch.equal(one(x), expected)
            continue
        with pytest.raises(Exception, match="serves training only"):
            one(x)
        with pytest.raises(Exception, match="serves training only"):
            torch.export.export(one, (x,), strict=False)


class Dropping(nn.Module):
    """Its Python hands the flag to a function."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.relu(self.b(F.relu(self.a(x)))), 0.5, self.training)
        result: Tensor = self.c(x)
        return result


@pytest.mark.parametrize("training", [True, False])
def test_a_pickled_graph_follows_its_flag(training: bool) -> None:
    """``torch.fx`` builds it from its code, of which flags would be constants."""
    x = torch.randn(4, 8)
    for sub, given in (
        (extract(fx_approx.transform(Dropping(), WIDE, x)), x),
        (extract(fx_approx.transform(network(), WIDE, X)), X),
    ):
        again = pickle.loads(pickle.dumps(sub.train(not training)))
        assert again.training is not training
        results = []
        for one in (sub, again):
            torch.manual_seed(0)
            results.append(one.train(training)(given))
        assert torch.equal(*results)
        assert all(torch.equal(a, b) for a, b in zip(sub.buffers(), again.buffers(), strict=True))
