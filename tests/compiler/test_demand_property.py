"""Random graphs of what the demand pass knows, and of what it must stop at: hoisting changes no number."""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fx_approx
from tests.helpers.hoisting import Layers, assert_hoisting_changes_nothing, perturbed

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


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
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
