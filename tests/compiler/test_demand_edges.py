"""Operations at which a hoisted graph could go wrong: each net is small, and its oracle the graph without demand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_approx
from tests.helpers.hoisting import Layers, assert_hoisting_changes_nothing, narrow_producers, perturbed

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


def plus_equals(net: Between, x: Tensor) -> Tensor:
    x += net.bound
    return x


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


# name -> (function, whether conv ``first`` must be narrowed at scope value; None: as it may be)
CASES: dict[str, tuple[Callable[[Between, Tensor], Tensor], bool | None]] = {
    "plain": (lambda net, x: x.relu(), True),
    "power-of-parameter": (lambda net, x: x.abs() ** net.bound, None),
    "pow-method": (lambda net, x: (x.abs() + 0.1).pow(net.bound), None),
    "clamp-by-parameter": (lambda net, x: torch.clamp(x, max=net.bound), None),
    "clamp-method": (lambda net, x: x.clamp(-0.5, 0.5), True),
    "square": (lambda net, x: x**2, True),
    "scalars": (lambda net, x: 1.0 - (2 * x + 1) / 3, True),
    "layer-scale": (lambda net, x: net.bound * x, True),
    "layer-scale-behind": (lambda net, x: x - net.bound, True),
    "divided-by-parameter": (lambda net, x: x / net.bound, True),
    "norm-and-prelu": (lambda net, x: net.prelu(net.bn(x)), True),
    "prelu-function": (lambda net, x: F.prelu(x, net.bound.flatten()), None),
    "add-alpha": (lambda net, x: torch.add(x, x.relu(), alpha=0.5), True),
    "with-itself": (lambda net, x: x + x, True),
    "times-itself": (lambda net, x: x * x, True),
    "squeeze-all": (lambda net, x: x.mean((2, 3), keepdim=True).squeeze()[:, :, None, None] * x, None),
    "squeeze-named": (lambda net, x: x.mean(3, keepdim=True).squeeze(3).unsqueeze(-1) * x, True),
    "unflatten": (lambda net, x: x.flatten(1).unflatten(1, (CHANNELS, 6, 6)), None),
    "unflatten-by-method": (lambda net, x: x.unflatten(1, (CHANNELS, 1)).squeeze(2), None),
    "view-by-channels": (lambda net, x: x.view(x.size(0), CHANNELS, -1).view(-1, CHANNELS, 6, 6), None),
    "view-by-size": (lambda net, x: x.reshape(x.shape[0], x.shape[1], -1).view(x.shape), None),
    "permute-and-back": (lambda net, x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), True),
    "transposed-twice": (lambda net, x: x.transpose(1, 3).flip(1).transpose(1, 3), None),
    "movedim": (lambda net, x: torch.movedim(x, 1, -1).movedim(-1, 1), True),
    "roll": (lambda net, x: torch.roll(x, (1, 2), (2, 3)), True),
    "roll-channels": (lambda net, x: torch.roll(x, 1, 1), False),
    "index-positions": (lambda net, x: x[:, :, ::2, 1:], True),
    "index-channels": (lambda net, x: torch.cat([x[:, 4:], x[:, :4]], 1), None),
    "index-new-axis": (lambda net, x: x[:, None, ..., :3][:, 0], True),
    "parts-turned": (lambda net, x: torch.cat([*map(x.split([3, 5], 1).__getitem__, (1, 0))], 1), True),
    "parts-split-twice": (lambda net, x: torch.cat([x.split([3, 5], 1)[1], x.split([3, 5], 1)[0]], 1), None),
    "cat-with-itself": (doubled, None),
    "cat-rows": (lambda net, x: torch.cat([x, x.relu()], 0), True),
    "cat-positions": (lambda net, x: torch.cat([x, x.relu()], 2), True),
    "softmax-over-positions": (lambda net, x: x.flatten(2).softmax(-1).view(-1, CHANNELS, 6, 6), None),
    "softmax-over-channels": (lambda net, x: x.softmax(1), False),
    "softmax-negative-axis": (lambda net, x: x.softmax(-3), False),
    "normalize-channels": (lambda net, x: F.normalize(x), False),
    "normalize-rows": (lambda net, x: F.normalize(x, dim=-1), True),
    "mean-of-channels": (lambda net, x: x * x.mean(1, keepdim=True), False),
    "mean-negative-axes": (lambda net, x: x * x.mean((-1, -2), keepdim=True), True),
    "number-of-channels": (lambda net, x: x / x.size(1), True),
    "number-of-channels-in-shape": (lambda net, x: x * (1.0 / x.shape[-3]), True),
    "number-of-positions": (lambda net, x: x / x.shape[2] + x.size(-1), True),
    "pad": (lambda net, x: F.pad(x, (1, 0, 2, 1)), True),
    "pad-channels": (lambda net, x: F.pad(x, (0, 0, 0, 0, 1, 0))[:, 1:], None),
    "pool-over-channels": (lambda net, x: F.avg_pool2d(x.flatten(2), 3, 1, 1).view(-1, CHANNELS, 6, 6), None),
    "max-pool-over-channels": (
        lambda net, x: nn.functional.max_pool2d(x.mean(3), 3, 1, 1).unsqueeze(-1) * net.bound,
        None,
    ),
    "interpolate": (lambda net, x: F.interpolate(x, scale_factor=2.0), True),
    "in-place": (lambda net, x: F.relu(x, inplace=True), True),
    "in-place-by-position": (lambda net, x: F.relu(x, True), True),
    "in-place-method": (lambda net, x: x.mul_(2).relu_(), True),
    "in-place-add": (plus_equals, True),
    "in-place-division": (divide_in_place, None),
    "gated-behind-a-change": (gated_behind_a_change, None),
    "in-place-then-read": (read_between(lambda net, x: x.relu_()), None),
    "in-place-position-then-read": (read_between(lambda net, x: F.relu(x, True)), None),
    "in-place-view-then-read": (read_between(lambda net, x: x.view(-1).mul_(0.5)), None),
    "in-place-part-then-read": (read_between(lambda net, x: x[:, :3].add_(1.0)), None),
    "division-then-read": (read_between(divide_in_place), None),
    "through-contiguous": (seen_elsewhere(lambda net, x: x.contiguous()), None),
    "through-identity": (seen_elsewhere(lambda net, x: net.identity(x)), None),
    "through-to": (seen_elsewhere(lambda net, x: x.to(x.dtype)), None),
    "through-view": (seen_elsewhere(lambda net, x: x.view(x.shape)), None),
    "through-contiguous-view": (seen_elsewhere(lambda net, x: x.flatten(1).contiguous().view(x.shape)), None),
    "type-as": (lambda net, x: x.relu().type_as(x), None),
    "maximum": (lambda net, x: torch.maximum(x, net.bn(x)), True),
    "minimum-with-parameter": (lambda net, x: torch.minimum(x, net.bound), True),
}


def net(name: str) -> tuple[Between, Tensor]:
    torch.manual_seed(1)
    model = perturbed(Between(CASES[name][0])).double()
    return model, torch.randn(2, 3, 6, 6, dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_between_two_convolutions(name: str) -> None:
    for scope in ("layer", "value", "group"):
        for sampler, ratio in (("topk", 0.5), ("systematic", 0.4), ("topk", 0.01)):
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
    [
        lambda: (nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(8, 4, 1)),
        lambda: (nn.Conv3d(3, 8, 1), nn.BatchNorm3d(8), nn.GELU(), nn.AvgPool3d(1), nn.Conv3d(8, 4, 1)),
        lambda: (padded("reflect"), nn.SiLU(), padded("circular", 8), nn.Tanh(), nn.Conv2d(8, 4, 1)),
        lambda: (nn.Conv2d(3, 8, 1), padded("replicate", 8, groups=8), nn.Conv2d(16, 4, 1)),
        lambda: (nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, groups=4), nn.Tanh(), nn.Conv2d(16, 6, 1, groups=2)),
        lambda: (nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 1, groups=4), nn.Conv2d(12, 9, 1, groups=3), nn.Conv2d(9, 4, 1)),
        lambda: (nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, affine=False), nn.PReLU(), nn.Conv2d(8, 4, 1)),
        lambda: (nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, track_running_stats=False), nn.PReLU(8), nn.Conv2d(8, 4, 1)),
        lambda: (nn.Conv2d(3, 8, 1), nn.InstanceNorm2d(8, affine=True), nn.Conv2d(8, 4, 1)),
        lambda: (nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)),
        lambda: (nn.Conv2d(3, 8, 1), nn.PixelShuffle(2), nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)),
        lambda: (nn.Conv2d(3, 8, 1), nn.Dropout2d(0.0), nn.Upsample(None, 2), nn.ZeroPad2d(1), nn.Conv2d(8, 4, 3)),
    ],
    ids=lambda layers: str(layers.__code__.co_firstlineno),
)
def test_layers_in_a_row(layers: Callable[[], tuple[nn.Module, ...]]) -> None:
    for scope in ("layer", "value", "group"):
        torch.manual_seed(2)
        model = sequence(*layers())
        dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[type(model[0])]
        x = torch.randn(2, 3, *[6] * dims, dtype=torch.float64)
        for sampler in ("topk", "systematic"):
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
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
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


class ChangedCopy(nn.Module):
    """Changes in place a value whose channels no one can follow, by one whose channels are demanded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = (nn.Conv2d(8, 8, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
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
