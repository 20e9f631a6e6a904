"""Graphs at which demand could go wrong, each small, and random ones; the oracle is the graph without demand."""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fx_approx
from tests.helpers.hoisting import Layers, assert_hoisting_changes_nothing, narrow_producers, perturbed
from tests.helpers.modules import made_of
from tests.helpers.quick import thinned

CHANNELS = 8


class Between(nn.Module):
    """A function between two convolutions; what it needs of its own are parameters here."""

    def __init__(self, function: Callable[[Between, Tensor], Tensor], outputs: int = CHANNELS) -> None:
        super().__init__()
        self.function = function
        self.first, self.second = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.Conv2d(outputs, 4, 3, padding=1)
        self.other, self.gate = nn.Conv2d(CHANNELS, 5, 1), nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.bound = nn.Parameter(torch.rand(CHANNELS, 1, 1) + 0.5)
        self.bn, self.prelu = nn.BatchNorm2d(CHANNELS), nn.PReLU(CHANNELS)
        self.identity, self.dropout = nn.Identity(), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self, self.first(x)))


def seen_elsewhere(view: Callable[[Between, Tensor], Tensor]) -> Callable[[Between, Tensor], Tensor]:
    """Changes a value in place through ``view``; the value itself is read again later."""

    def function(net: Between, x: Tensor) -> Tensor:
        x = x + 0.0
        y = F.relu(view(net, x), inplace=True)
        return net.other(x).mean() * y

    return function


def read_between(change: Callable[[Between, Tensor], object]) -> Callable[[Between, Tensor], Tensor]:
    """Two readers of a value, and in between something that changes it."""

    def function(net: Between, x: Tensor) -> Tensor:
        x = x + 0.0
        before = x - 1.0  # saves nothing: autograd forbids what it saved to change
        change(net, x)
        return before * net.other(x).mean() + x

    return function


def divide_in_place(net: Between, x: Tensor) -> Tensor:
    x /= net.bound
    return x


def gated_behind_a_change(net: Between, x: Tensor) -> Tensor:
    """The gate is read in part, and so is x, which another name has changed before."""
    gate = torch.sigmoid(net.gate(x.mean((2, 3), keepdim=True)))
    x.contiguous().mul_(0.5)
    return x * gate


def doubled(net: Between, x: Tensor) -> Tensor:
    a, b = torch.cat([x, x], 1).chunk(2, 1)
    return torch.cat([net.other(a), net.other(b.relu())], 1).mean(1, keepdim=True) * x


# What ``tests/sandwich_rows.py`` does not have.
# Name -> (function, whether conv ``first`` must be narrowed at scope value; None: as it may be)
CASES: dict[str, tuple[Callable[[Between, Tensor], Tensor], bool | None]] = {
    "plain": (lambda net, x: x.relu(), True),
    "with-itself": (lambda net, x: x + x, True),
    "squeeze-all": (lambda net, x: x.mean((2, 3), keepdim=True).squeeze()[:, :, None, None] * x, None),
    "squeeze-named": (lambda net, x: x.mean(3, keepdim=True).squeeze(3).unsqueeze(-1) * x, True),
    "unflatten": (lambda net, x: x.flatten(1).unflatten(1, (CHANNELS, 6, 6)), None),
    "unflatten-by-method": (lambda net, x: x.unflatten(1, (CHANNELS, 1)).squeeze(2), None),
    "view-by-channels": (lambda net, x: x.view(x.size(0), CHANNELS, -1).view(-1, CHANNELS, 6, 6), None),
    "view-by-size": (lambda net, x: x.reshape(x.shape[0], x.shape[1], -1).view(x.shape), None),
    "transposed-twice": (lambda net, x: x.transpose(1, 3).flip(1).transpose(1, 3), None),
    "index-channels": (lambda net, x: torch.cat([x[:, 4:], x[:, :4]], 1), None),
    "index-new-axis": (lambda net, x: x[:, None, ..., :3][:, 0], True),
    "parts-turned": (lambda net, x: torch.cat([*map(x.split([3, 5], 1).__getitem__, (1, 0))], 1), True),
    "parts-split-twice": (lambda net, x: torch.cat([x.split([3, 5], 1)[1], x.split([3, 5], 1)[0]], 1), None),
    "cat-with-itself": (doubled, None),
    "cat-rows": (lambda net, x: torch.cat([x, x.relu()], 0), True),
    "softmax-over-positions": (lambda net, x: x.flatten(2).softmax(-1).view(-1, CHANNELS, 6, 6), None),
    "mean-negative-axes": (lambda net, x: x * x.mean((-1, -2), keepdim=True), True),
    "number-of-channels": (lambda net, x: x / x.size(1), True),
    "number-of-channels-in-shape": (lambda net, x: x * (1.0 / x.shape[-3]), True),
    "number-of-positions": (lambda net, x: x / x.shape[2] + x.size(-1), True),
    "pad-channels": (lambda net, x: F.pad(x, (0, 0, 0, 0, 1, 0))[:, 1:], None),
    "pool-over-channels": (lambda net, x: F.avg_pool2d(x.flatten(2), 3, 1, 1).view(-1, CHANNELS, 6, 6), None),
    "max-pool-over-channels": (
        lambda net, x: nn.functional.max_pool2d(x.mean(3), 3, 1, 1).unsqueeze(-1) * net.bound,
        None,
    ),
    "in-place-by-position": (lambda net, x: F.relu(x, True), True),
    "in-place-method": (lambda net, x: x.mul_(2).relu_(), True),
    "in-place-division": (divide_in_place, None),
    "gated-behind-a-change": (gated_behind_a_change, None),
    "in-place-then-read": (read_between(lambda net, x: x.relu_()), None),
    "in-place-position-then-read": (read_between(lambda net, x: F.relu(x, True)), None),
    "in-place-view-then-read": (read_between(lambda net, x: x.view(-1).mul_(0.5)), None),
    "in-place-part-then-read": (read_between(lambda net, x: x[:, :3].add_(1.0)), None),
    "division-then-read": (read_between(divide_in_place), None),
    "through-contiguous": (seen_elsewhere(lambda net, x: x.contiguous()), None),
    "through-positive": (seen_elsewhere(lambda net, x: x.positive()), None),
    "through-plus": (seen_elsewhere(lambda net, x: +x), None),
    "through-cpu": (seen_elsewhere(lambda net, x: x.cpu()), None),
    "through-real": (seen_elsewhere(lambda net, x: torch.real(x)), None),
    "through-ravel": (seen_elsewhere(lambda net, x: torch.ravel(x).view(x.shape)), None),
    "through-identity": (seen_elsewhere(lambda net, x: net.identity(x)), None),
    "through-to": (seen_elsewhere(lambda net, x: x.to(x.dtype)), None),
    "through-view": (seen_elsewhere(lambda net, x: x.view(x.shape)), None),
    "through-contiguous-view": (seen_elsewhere(lambda net, x: x.flatten(1).contiguous().view(x.shape)), None),
    "type-as": (lambda net, x: x.relu().type_as(x), None),
}


def net(name: str) -> tuple[Between, Tensor]:
    torch.manual_seed(1)
    model = perturbed(Between(CASES[name][0])).double()
    return model, torch.randn(2, 3, 6, 6, dtype=torch.float64)


@pytest.mark.parametrize("name", thinned(CASES, 4))
def test_between_two_convolutions(name: str) -> None:
    for scope, sampler, ratio in (("layer", "topk", 0.5), ("value", "systematic", 0.4), ("group", "topk", 0.01)):
        model, x = net(name)
        hoisted = assert_hoisting_changes_nothing(model, Layers(sampler, ratio, "weight", scope), x, steps=1)
        expected = CASES[name][1]
        if scope == "value" and expected is not None:
            assert ("first" in narrow_producers(hoisted)) == expected


class Heads(nn.Module):
    """Attention with a mask that has one entry for each head."""

    def __init__(self, positional: bool, heads: int = 4) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.mask, self.positional, self.heads = nn.Parameter(torch.randn(heads, 5, 5)), positional, heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.positional:
            y = F.scaled_dot_product_attention(q, k, v, self.mask)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("positional", [True, False])
def test_a_mask_for_each_head(positional: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    for scope in ("layer", "value"):
        assert_hoisting_changes_nothing(Heads(positional).double(), Layers(scope=scope), x, steps=1)


def sequence(*layers: nn.Module) -> nn.Module:
    return perturbed(nn.Sequential(*layers)).double()


def padded(mode: str, inputs: int = 3, groups: int = 1) -> nn.Module:
    return nn.Conv2d(inputs, 8 if groups == 1 else 16, 3, padding=1, groups=groups, padding_mode=mode)


@pytest.mark.parametrize(
    "layers",
    thinned(
        [
            lambda: (nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(8, 4, 1)),
            lambda: (nn.Conv3d(3, 8, 1), nn.BatchNorm3d(8), nn.GELU(), nn.AvgPool3d(1), nn.Conv3d(8, 4, 1)),
            lambda: (padded("reflect"), nn.SiLU(), padded("circular", 8), nn.Tanh(), nn.Conv2d(8, 4, 1)),
            lambda: (nn.Conv2d(3, 8, 1), padded("replicate", 8, groups=8), nn.Conv2d(16, 4, 1)),
            lambda: (nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, groups=4), nn.Tanh(), nn.Conv2d(16, 6, 1, groups=2)),
            lambda: (
                nn.Conv2d(3, 8, 1),
                nn.Conv2d(8, 12, 1, groups=4),
                nn.Conv2d(12, 9, 1, groups=3),
                nn.Conv2d(9, 4, 1),
            ),
            lambda: (nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, affine=False), nn.PReLU(), nn.Conv2d(8, 4, 1)),
            lambda: (nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, track_running_stats=False), nn.PReLU(8), nn.Conv2d(8, 4, 1)),
            lambda: (nn.Conv2d(3, 8, 1), nn.InstanceNorm2d(8, affine=True), nn.Conv2d(8, 4, 1)),
            lambda: (nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)),
            lambda: (nn.Conv2d(3, 8, 1), nn.PixelShuffle(2), nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)),
            lambda: (nn.Conv2d(3, 8, 1), nn.Dropout2d(0.0), nn.Upsample(None, 2), nn.ZeroPad2d(1), nn.Conv2d(8, 4, 3)),
        ]
    ),
    ids=lambda layers: str(layers.__code__.co_firstlineno),
)
def test_layers_in_a_row(layers: Callable[[], tuple[nn.Module, ...]]) -> None:
    for scope, sampler in (("layer", "topk"), ("value", "topk"), ("group", "systematic")):
        torch.manual_seed(2)
        model = sequence(*layers())
        dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[type(model[0])]
        x = torch.randn(2, 3, *[6] * dims, dtype=torch.float64)
        assert_hoisting_changes_nothing(model, Layers(sampler, scope=scope), x, steps=1)


def test_a_hooked_layer_sees_all_channels() -> None:
    torch.manual_seed(0)
    model = sequence(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    seen = []
    model[2].register_forward_hook(lambda module, args, output: seen.append((args[0].shape[1], output.shape[1])))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    hoisted = assert_hoisting_changes_nothing(model, Layers(scope="group"), x, steps=1)
    assert set(seen) == {(8, 8)}
    assert not narrow_producers(hoisted)


def test_outputs_are_whole() -> None:
    @made_of(lambda: {"a": nn.Linear(6, 8), "b": nn.Linear(8, 4)})
    def Both(self: Any, x: Tensor) -> dict[str, Tensor]:
        hidden = self.a(x).relu()
        return {"out": self.b(hidden), "features": hidden}

    x = torch.randn(3, 6, dtype=torch.float64)
    hoisted = assert_hoisting_changes_nothing(Both().double(), Layers(scope="group"), x)
    assert hoisted(x)["features"].shape == (3, 8)
    assert not narrow_producers(hoisted)


def test_a_model_named_like_a_method() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.view, self.a, self.b = nn.Flatten(), nn.Conv2d(3, 8, 1), nn.Linear(8, 4)
            self.pool = nn.AdaptiveAvgPool2d(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.view(self.pool(self.a(x))))

    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    hoisted = assert_hoisting_changes_nothing(Named().double(), Layers(scope="value"), x)
    assert narrow_producers(hoisted) == {"a"}


def test_straight_through_and_gradient_roles_stay_whole() -> None:
    """Their gradients read channels that the output does not."""
    torch.manual_seed(0)
    model = sequence(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    spec = fx_approx.SamplerConfig("topk", 0.5, scores="weight")
    plan = fx_approx.explain(model, Layers(scope="value"), x).plan
    through = plan.edit("2", spec, straight_through=True, scope="value")
    hoisted = assert_hoisting_changes_nothing(model, through, x, steps=1)
    assert narrow_producers(hoisted) == set()  # layer 2 reads all, and computes all for its gradients
    roles = plan.edit("2", {"output": spec, "grad_weight": fx_approx.SamplerConfig("systematic", 0.5)})
    assert_hoisting_changes_nothing(model, roles, x, steps=1)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [4, 1])
def test_an_activation_in_place_behind_a_layer_that_stays_whole(size: int, memory_format: torch.memory_format) -> None:
    """A part of a value, once gathered, is not to be changed in place: autograd forbids it."""
    torch.manual_seed(0)
    model = sequence(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1))
    model = model.to(memory_format=memory_format)
    x = torch.randn(2, 3, size, size, dtype=torch.float64).to(memory_format=memory_format)
    plan = fx_approx.explain(model, Layers(scope="value"), x).plan
    spec = fx_approx.SamplerConfig("topk", 0.5, scores="weight")
    plan = plan.edit("1", spec, straight_through=True, scope="value")
    assert_hoisting_changes_nothing(model, plan, x, steps=1)


@made_of(lambda: {**{name: nn.Conv2d(8, 8, 1) for name in ("stem", "one", "two")}})
def ChangedCopy(self: Any, x: Tensor) -> Tensor:
    """Changes in place a value whose channels no one can follow, by one whose channels are demanded."""
    copy = self.stem(x) * 1.0
    copy += self.one(x)
    return self.two(copy)


def test_what_is_changed_in_place_is_not_a_part_of_what_is_always_whole() -> None:
    """A layer with hooks computes all, and so its copy is whole: autograd forbids adding to a gathered part of it."""
    torch.manual_seed(0)
    model, x = ChangedCopy().double(), torch.randn(2, 8, 3, 3, dtype=torch.float64)
    model.stem.register_forward_hook(lambda module, args, output: None)
    hoisted = assert_hoisting_changes_nothing(model, Layers(scope="value"), x, steps=1)
    assert narrow_producers(hoisted) == set()


class PartReadTwice(nn.Module):
    """Takes one part of a split twice, by two numbers, for readers that choose differently."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(8, 16, 1)
        self.one, self.two, self.three = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.stem(x), 8, 1)
        blended = self.three(x) + parts[1]
        return self.one(blended.relu()) + self.two(parts[-1].relu()) + self.one(parts[0].relu())


def test_a_part_of_a_split_that_is_taken_twice() -> None:
    torch.manual_seed(0)
    model, x = PartReadTwice().double(), torch.randn(2, 8, 3, 3, dtype=torch.float64)
    for scope in ("layer", "value", "group"):
        assert_hoisting_changes_nothing(model, Layers(scope=scope), x, steps=1)


# ---- random graphs of what the pass knows, and of what it must stop at


SIZE = 4  # of maps, which no operation changes, so that any two values can be added
WIDTHS = (2, 4, 6, 8)


class Step(nn.Module):
    """One operation: reads values of ``env`` by number, and gives another."""

    layer: nn.Module

    def __init__(self, make: Callable[..., Tensor], reads: tuple[int, ...], **modules: nn.Module) -> None:
        super().__init__()
        self.make, self.reads = make, reads
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, env: list[Tensor]) -> Tensor:
        return self.make(self, *(env[place] for place in self.reads))


def _call(step: Step, x: Tensor) -> Tensor:
    return step.layer(x)


class Program(nn.Module):
    """Interprets a list of operations, so that torch.fx sees them one by one."""

    def __init__(self, steps: list[Step], outputs: tuple[int, ...], head: nn.Module, hooked: int | None) -> None:
        super().__init__()
        self.steps, self.head, self.outputs = nn.ModuleList(steps), head, outputs
        if hooked is not None and hooked < len(steps):
            layers = [m for m in steps[hooked].children() if not list(m.children())]
            for layer in layers[:1]:
                layer.register_forward_hook(_look)

    def forward(self, x: Tensor) -> Tensor:
        env = [x]
        for step in self.steps:
            env.append(step(env))
        return self.head(torch.cat([env[place] for place in self.outputs], 1).flatten(1))


def _look(module: nn.Module, args: object, output: object) -> None:
    return None


def _conv(draw: st.DrawFn, width: int, read: int) -> tuple[Step, int]:
    outputs = draw(st.sampled_from(WIDTHS))
    groups = draw(st.sampled_from([g for g in (1, 2, 4) if width % g == 0 and outputs % g == 0]))
    kernel = draw(st.sampled_from([1, 3]))
    layer = nn.Conv2d(width, outputs, kernel, padding=kernel // 2, groups=groups, bias=draw(st.booleans()))
    return Step(_call, (read,), layer=layer), outputs


def _depthwise(draw: st.DrawFn, width: int, read: int) -> tuple[Step, int]:
    times = draw(st.sampled_from([1, 2])) if width <= 4 else 1
    layer = nn.Conv2d(width, times * width, 3, padding=1, groups=width)
    return Step(_call, (read,), layer=layer), times * width


def _layer(draw: st.DrawFn, width: int, read: int) -> tuple[Step, int]:
    layer = draw(
        st.sampled_from(
            [
                *(nn.BatchNorm2d(width), nn.BatchNorm2d(width, affine=False), nn.PReLU(width), nn.PReLU()),
                *(nn.GroupNorm(1, width), nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.Identity(), nn.Dropout(0.0)),
                *(nn.ReLU(), nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.Softmax(1), nn.Softmax(-1), nn.GELU()),
            ]
        )
    )
    return Step(_call, (read,), layer=layer), width


def _squeeze(draw: st.DrawFn, width: int, read: int) -> tuple[Step, int]:
    def make(step: Step, x: Tensor) -> Tensor:
        return x * step.up(step.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()

    return Step(make, (read,), down=nn.Conv2d(width, 3, 1), up=nn.Conv2d(3, width, 1)), width


def _positions(draw: st.DrawFn, width: int, read: int) -> tuple[Step, int]:
    """Channels last, a linear layer or a normalisation, and back."""
    outputs = draw(st.sampled_from(WIDTHS))
    linear = nn.Linear(width, outputs)
    norm = draw(st.sampled_from([nn.Identity(), nn.LayerNorm(width)]))
    back = draw(st.booleans())

    def make(step: Step, x: Tensor) -> Tensor:
        x = step.linear(step.norm(x.permute(0, 2, 3, 1)))
        return x.permute(0, 3, 1, 2) if back else x.transpose(1, 3).transpose(2, 3)

    return Step(make, (read,), linear=linear, norm=norm), outputs


class Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.rand(width, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


SIMPLE: dict[str, Callable[..., Tensor]] = {
    "scalars": lambda step, x: 1.0 - 0.5 * x,
    "channels": lambda step, x: x / x.size(1),
    "positions": lambda step, x: x * (1.0 / x.shape[-1]),
    "view": lambda step, x: x.view(x.size(0), -1, SIZE * SIZE).reshape(x.shape[0], -1, SIZE, SIZE),
    "pad": lambda step, x: F.pad(x, (1, 0, 0, 1))[:, :, 1:, :-1],
    "in-place": lambda step, x: F.relu(x, inplace=True),
    "in-place-by-position": lambda step, x: F.leaky_relu(x, 0.1, True),
    "in-place-through-a-view": lambda step, x: x.contiguous().mul_(0.5),
    "mean": lambda step, x: x - x.mean(1, keepdim=True),
    "power": lambda step, x: x**2 * 0.1,
    "twice": lambda step, x: x + x.tanh(),
    "last-half-first": lambda step, x: torch.cat(_turned(x), 1),
}


def _turned(x: Tensor) -> tuple[Tensor, Tensor]:
    halves = x.chunk(2, 1)
    return halves[1], halves[0]


BINARY: dict[str, Callable[..., Tensor]] = {
    "add": lambda step, x, y: x + y,
    "sub": lambda step, x, y: x - y,
    "mul": lambda step, x, y: x * y.sigmoid(),
    "iadd": lambda step, x, y: operator.iadd(x * 1.0, y),
    "add_": lambda step, x, y: x.add_(y),
    "maximum": lambda step, x, y: torch.maximum(x, y),
}


@st.composite
def programs(draw: st.DrawFn) -> Program:
    torch.manual_seed(draw(st.integers(0, 100)))
    widths, steps = [3], []

    def read() -> int:
        # Mostly what was made last, so that chains come of it.
        return draw(st.sampled_from([len(widths) - 1] * 3 + list(range(len(widths)))))

    for _ in range(draw(st.integers(3, 9))):
        place = read()
        kind = draw(st.sampled_from(["conv", "conv", "layer", "simple", "binary", "other"]))
        same = [other for other, width in enumerate(widths) if width == widths[place] and other]
        if kind == "binary" and same:
            make = BINARY[draw(st.sampled_from(sorted(BINARY)))]
            made = Step(make, (place, draw(st.sampled_from(same)))), widths[place]
        elif kind == "binary":
            other = read()
            made = Step(lambda step, x, y: torch.cat([x, y], 1), (place, other)), widths[place] + widths[other]
        elif kind == "simple" and place:
            made = Step(SIMPLE[draw(st.sampled_from(sorted(SIMPLE)))], (place,)), widths[place]
        elif kind == "layer" and place:
            made = _layer(draw, widths[place], place)
        elif kind == "other":
            made = draw(st.sampled_from([_depthwise, _squeeze, _positions, _glu, _scale]))(draw, widths[place], place)
        else:
            made = _conv(draw, widths[place], place)
        steps.append(made[0])
        widths.append(made[1])
    outputs = tuple({len(widths) - 1, read()})
    head = nn.Linear(sum(widths[place] for place in outputs) * SIZE * SIZE, 3)
    return Program(steps, outputs, head, draw(st.sampled_from([None, None, 0, 1, 2])))


def _glu(draw: st.DrawFn, width: int, read: int) -> tuple[Step, int]:
    layer = nn.Conv2d(width, 8, 1)
    if draw(st.booleans()):
        return Step(lambda step, x: F.glu(step.layer(x), 1), (read,), layer=layer), 4

    def make(step: Step, x: Tensor) -> Tensor:
        gate, value = step.layer(x).chunk(2, 1)
        return gate.sigmoid() * value

    return Step(make, (read,), layer=layer), 4


def _scale(draw: st.DrawFn, width: int, read: int) -> tuple[Step, int]:
    layer = Scale(width)
    return Step(_call, (read,), layer=layer), width


POLICIES = st.builds(
    Layers,
    sampler=st.sampled_from(["topk", "systematic", "bernoulli"]),
    ratio=st.sampled_from([0.1, 0.3, 0.5, 0.8]),
    scores=st.sampled_from(["weight", "ema", "uniform"]),
    scope=st.sampled_from(["layer", "value", "group"]),
)


def check(program: Program, policy: Layers, seed: int) -> None:
    model = perturbed(program).double()
    x = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    try:  # some programs change what autograd needs, or view what has other strides
        copy.deepcopy(model)(x.clone()).sum().backward()
    except RuntimeError as error:
        assert any(words in str(error) for words in ("inplace", "in-place", "view size is not compatible")), error
        return
    exact = copy.deepcopy(model).eval()
    hoisted = assert_hoisting_changes_nothing(model, policy, x, steps=1 + (policy.scores == "ema"), seed=seed)
    exact.load_state_dict(hoisted.state_dict())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_approx.errors.BatchNormWarning)
        assert torch.equal(hoisted.eval()(x.clone()), exact(x.clone()))


@settings(max_examples=8, suppress_health_check=list(HealthCheck))
@given(programs(), POLICIES, st.integers(0, 3))
def test_random_graphs(program: Program, policy: Layers, seed: int) -> None:
    check(program, policy, seed)


@pytest.mark.slow
@settings(max_examples=1000, suppress_health_check=list(HealthCheck))
@given(programs(), POLICIES, st.integers(0, 3))
def test_many_random_graphs(program: Program, policy: Layers, seed: int) -> None:
    check(program, policy, seed)


def test_the_programs_hoist() -> None:
    """A property that never applies would hold: most programs of convolutions leave something out."""
    torch.manual_seed(0)
    first, norm, second = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
    steps = [Step(_call, (0,), layer=first), Step(_call, (1,), layer=norm), Step(_call, (2,), layer=second)]
    model = Program(steps, (3,), nn.Linear(4 * SIZE * SIZE, 3), None)
    approx = fx_approx.transform(model, Layers(scope="value"), torch.randn(2, 3, SIZE, SIZE))
    assert [name for name, _ in approx._fx_approx.program.stages] == ["capture", "share", "demand"]
