"""Gradients: the memory that sampled ones save, that they are unbiased, and those that a forward asks for."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_approx
from fx_approx import SamplerConfig
from fx_approx.core.plan import Policy
from fx_approx.policies import Exact, GradientSampling, Override, Uniform
from fx_approx.sampling import SAMPLERS
from tests.helpers.quick import in_turn, thinned


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 16),
        nn.Tanh(),
        nn.Linear(16, 4),
    ).double()


class Block(nn.Module):
    """A ViT-like block: fused qkv, scaled dot-product attention, MLP."""

    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = torch.softmax(q @ k.transpose(-2, -1) / (dim // self.heads) ** 0.5, -1) @ v
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, tokens, dim))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def images(batch: int = 8) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def step(model: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    (run or model)(x).square().mean().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def saved_by_linears(model: nn.Module, x: Tensor) -> int:
    """Bytes that the calls of linear layers save for backward, each piece of memory once, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    pieces: dict[int, Tensor] = {}
    inside = 0

    def pack(tensor: Tensor) -> Tensor:
        if inside and tensor.untyped_storage().data_ptr() not in parameters:
            pieces[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def enter(*_: object) -> None:
        nonlocal inside
        inside += 1

    def leave(*_: object) -> None:
        nonlocal inside
        inside -= 1

    handles = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    for handle in handles:
        handle.remove()
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in pieces.values())


def test_a_sampled_weight_gradient_keeps_the_sampled_rows_only() -> None:
    """GRAD_WEIGHT 0.3 on a ViT-like block at batch 32: at most 0.40 of the bytes of the exact layers."""
    torch.manual_seed(0)
    model, x = Block(), torch.randn(32, 17, 32)
    exact = saved_by_linears(model, x)
    approx = fx_approx.transform(model, Override({"matmul*": Exact()}, GradientSampling.weight_gradient(0.3)), x)
    report = fx_approx.report(approx)
    linears = [report[name] for name in ("qkv", "proj", "fc1", "fc2")]
    assert exact == sum(row.kept_exact for row in linears)
    assert sum(row.kept for row in linears) <= 0.40 * exact
    sampled = saved_by_linears_of_graph(approx, x, model)
    assert sampled == sum(row.kept for row in linears)
    late = fx_approx.transform(model, GradientSampling(grad_weight=SamplerConfig("systematic", 0.3)), x)
    assert sum(fx_approx.report(late)[row.name].kept for row in linears) > exact, (
        "rows chosen in backward: all are kept"
    )


def saved_by_linears_of_graph(approx: nn.Module, x: Tensor, model: nn.Module) -> int:
    """As :func:`saved_by_linears`, told by the node that saves, since a graph does not serve hooked layers."""
    pieces: dict[int, Tensor] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    output, seen = approx(x), set()
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "_Product" in type(node).__name__:
            for tensor in node.saved_tensors:
                if tensor is not None and tensor.untyped_storage().data_ptr() not in parameters:
                    pieces[tensor.untyped_storage().data_ptr()] = tensor
        waiting += [following for following, _ in node.next_functions]
    return sum(tensor.untyped_storage().nbytes() for tensor in pieces.values())


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": lambda: (
        nn.Sequential(*itertools.chain(*((nn.Linear(8, 8), nn.Tanh()) for _ in range(8)))).double(),
        torch.randn(6, 8, dtype=torch.float64),
    ),
    "cnn": lambda: (cnn(), images(4)),
    "transformer": lambda: (
        nn.Sequential(Block(8, 2), Block(8, 2)).double(),
        torch.randn(2, 5, 8, dtype=torch.float64),
    ),
}


# The others where time is no matter: some hundred steps each.
QUICK = {("mlp", "bernoulli")}


def projections(network: str, policy: Policy, steps: int) -> Tensor:
    """z-values of the mean gradient against the exact one: along the exact gradient and 9 random directions."""
    torch.manual_seed(5)
    model, x = NETWORKS[network]()
    exact = torch.cat([g.flatten() for g in step(model, x)])
    approx = fx_approx.transform(model, policy, seed=11)
    directions = torch.cat([exact.unsqueeze(0), torch.randn(9, exact.numel(), dtype=torch.float64)])
    errors = torch.stack(
        [directions @ (torch.cat([g.flatten() for g in step(approx, x)]) - exact) for _ in range(steps)]
    )
    return errors.mean(0) / (errors.std(0) / steps**0.5).clamp(min=1e-300)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "sampler"),
    [
        pytest.param(network, name, marks=() if (network, name) in QUICK else pytest.mark.slow)
        for network in NETWORKS
        for name in sorted(SAMPLERS)
        if SAMPLERS[name].unbiased
    ],
)
def test_backward_mode_is_unbiased_through_a_network(network: str, sampler: str) -> None:
    """|z| < 5 in 10 directions: false alarms below 1e-5 for each case, if means of 200 steps are normal."""
    assert projections(network, GradientSampling.backward(0.5, sampler), 200).abs().max() < 5


BIASED: dict[str, Policy] = {
    "topk": GradientSampling(grad_input=SamplerConfig("topk", 0.5), grad_weight=SamplerConfig("crs", 0.5)),
    "forward mode": Uniform(0.5, "systematic", scores="online", scope="layer"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "kind", "steps"),
    [
        ("mlp", "topk", 200),
        *(pytest.param(one, kind, 700, marks=pytest.mark.slow) for one in NETWORKS for kind in BIASED),
    ],
)
def test_the_test_of_unbiasedness_finds_a_bias(network: str, kind: str, steps: int) -> None:
    """TopK of the input gradients; unbiased products in forward mode, through a non-linearity."""
    assert projections(network, BIASED[kind], steps).abs().max() > 5


def test_a_selection_shared_along_a_chain_is_biased() -> None:
    """E[D J D] = E[D] J E[D] for independent D, but not for the same one twice: all subsets of two of four units."""
    torch.manual_seed(0)
    weights = [torch.randn(4, 4, dtype=torch.float64) for _ in range(2)]
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    samples = [
        fx_approx.sampling.Selection(torch.tensor([pair]), torch.full((1, 2), 2.0))
        for pair in itertools.combinations(range(4), 2)
    ]

    def gradient(one: fx_approx.sampling.Selection | None, two: fx_approx.sampling.Selection | None) -> Tensor:
        hidden = fx_approx.ops.linear(x, weights[0], grad_input=one)
        output = fx_approx.ops.linear(hidden, weights[1], grad_input=two)
        return torch.autograd.grad(output.square().sum(), x)[0]

    exact = gradient(None, None)
    independent = torch.stack([gradient(one, two) for one in samples for two in samples]).mean(0)
    shared = torch.stack([gradient(both, both) for both in samples]).mean(0)
    torch.testing.assert_close(independent, exact, rtol=1e-10, atol=1e-10)
    assert (shared - exact).norm() > 0.05 * exact.norm()


# ---- gradients that a forward asks for, of its input or of a value inside: those of the sampled function


Ask = Callable[[Tensor, Tensor], Tensor]


def _grad(energy: Tensor, value: Tensor) -> Tensor:
    return torch.autograd.grad(energy, value, create_graph=True)[0]


def _lenient(energy: Tensor, value: Tensor) -> Tensor:
    return torch.autograd.grad([energy], [value], create_graph=True, allow_unused=True, materialize_grads=True)[0]


ASKS: dict[str, Ask] = {"grad": _grad, "lenient": _lenient}


class Dense(nn.Module):
    """An energy with its gradient at the input, or at a hidden value that two layers read, moved by ``delta``."""

    features = 6

    def __init__(self, inside: bool, mark: str, ask: str) -> None:
        super().__init__()
        self.first, self.second, self.aside = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.last = nn.Linear(16, 1)
        self.inside, self.mark, self.ask = inside, mark, ask

    def marked(self, value: Tensor) -> Tensor:
        """``value``, of which a gradient can be asked for."""
        if self.mark == "new name":
            return value.detach().requires_grad_(True)
        if self.mark == "same name":
            value = value.detach()
            value.requires_grad_()
            return value
        if self.mark == "retained":
            value.retain_grad()
        return value

    def forward(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        if not self.inside:
            x = value = self.marked(x + delta)
        hidden = self.first(x).tanh()
        if self.inside:
            hidden = value = self.marked(F.relu(hidden) + delta)
        hidden = self.second(hidden).tanh() + self.aside(hidden)
        energy = self.last(hidden).sum()
        return energy, ASKS[self.ask](energy, value)


class Convolved(Dense):
    """The same with convolutions, normalisation, and a value that is read whole and in part."""

    features = 4

    def __init__(self, inside: bool, mark: str, ask: str) -> None:
        super().__init__(inside, mark, ask)
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.aside, self.last = nn.Conv2d(8, 8, 1), nn.Linear(8, 1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        if not self.inside:
            x = value = self.marked(x + delta)
        hidden = self.norm(self.first(x)).relu()
        if self.inside:
            hidden = value = self.marked(hidden + delta)
        hidden = self.second(hidden).tanh() + self.aside(hidden) + hidden
        energy = self.last(hidden.mean((2, 3))).square().sum()
        return energy, ASKS[self.ask](energy, value)


def energies(model: nn.Module, x: Tensor, delta: Tensor, direction: Tensor) -> tuple[float, float]:
    """How the energy moves along ``direction`` under one sample, by differences and by the gradient."""
    step = 1e-6
    with fx_approx.reuse_selection(model):
        up, down = (model(x, delta + sign * step * direction)[0].item() for sign in (1, -1))
        gradient = model(x, delta)[1]
    return (up - down) / (2 * step), (gradient * direction).sum().item()


def prepared(kind: type[Dense], inside: bool, mark: str, ask: str) -> tuple[Dense, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    model = kind(inside, mark, ask).double()
    size = (5, 5) if kind is Convolved else ()
    x = torch.randn(3, kind.features, *size, dtype=torch.float64)
    width = kind.features if not inside else 16 if kind is Dense else 8
    delta = torch.randn(3, width, *size, dtype=torch.float64)
    return model, x, delta, torch.randn_like(delta)


@pytest.mark.parametrize("inside", thinned([True, False]))
@pytest.mark.parametrize(("scope", "kind"), in_turn(["layer", "value", "group"], [Convolved, Dense]))
def test_the_gradient_is_that_of_the_sampled_function(kind: type[Dense], inside: bool, scope: str) -> None:
    for mark, ask, demand in (
        *(("new name", "grad", True), ("same name", "lenient", True)),
        *(("retained", "grad", False), ("retained", "lenient", True)),
    ):
        model, x, delta, direction = prepared(kind, inside, mark, ask)
        delta.requires_grad_(mark == "retained")
        policy = Uniform(0.5, scope=scope)
        approx = fx_approx.transform(model, policy, (x, delta), prune_unread=demand)
        moved, predicted = energies(approx, x, delta, direction)
        assert predicted == pytest.approx(moved, rel=1e-5, abs=1e-7), (mark, ask, demand)
        exact = model(x, delta)[1]
        assert not torch.allclose(approx(x, delta)[1], exact)


@pytest.mark.parametrize("kind", [Dense, Convolved])
@pytest.mark.parametrize("inside", [False, True])
def test_second_derivatives_are_those_of_the_sampled_function(kind: type[Dense], inside: bool) -> None:
    """A loss of the gradient moves with the parameters as its gradient says."""
    model, x, delta, _ = prepared(kind, inside, "new name", "grad")
    approx = fx_approx.transform(model, Uniform(0.5, scores="uniform", scope="group"), (x, delta))
    weight = approx.second.weight
    direction, step = torch.randn_like(weight), 1e-6
    with fx_approx.reuse_selection(approx):
        (gradient,) = torch.autograd.grad(approx(x, delta)[1].square().sum(), weight)
        losses = []
        for sign in (1, -2):
            with torch.no_grad():
                weight.add_(direction, alpha=sign * step)
            losses.append(approx(x, delta)[1].square().sum().item())
    assert (gradient * direction).sum().item() == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-4)


class Handing(nn.Module):
    """Gives a hidden value away that its own layers read as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.first(x).relu()
        return self.last(self.second(hidden).relu() + hidden), hidden.contiguous()


@pytest.mark.parametrize("scope", ["layer", "value", "group"])
def test_the_gradient_of_an_output_that_is_read_on(scope: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    found = []
    for demand in (True, False):
        policy = Uniform(0.5, scope=scope)
        torch.manual_seed(1)
        approx = fx_approx.transform(Handing(), policy, x, prune_unread=demand)
        output, hidden = approx(x)
        found.append(torch.autograd.grad(output.square().sum(), hidden)[0])
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[0], found[1])


class Watched(Handing):
    """Keeps what a hook tells of a gradient."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.first(x).relu()
        hidden.register_hook(lambda gradient: 2 * gradient)
        return self.last(self.second(hidden) + hidden), hidden


def test_a_hook_inside_changes_the_whole_gradient() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    found = []
    for demand in (True, False):
        torch.manual_seed(1)
        policy = Uniform(0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fx_approx.errors.CaptureWarning)
            approx = fx_approx.transform(Watched(), policy, x, prune_unread=demand)
        found.append(torch.autograd.grad(approx(x)[0].square().sum(), approx.first.weight)[0])
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[0], found[1])


class Functional(nn.Module):
    """Asks for the gradient by ``torch.func``."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.last, self.how = nn.Linear(6, 16), nn.Linear(16, 1), how

    def energy(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh()).sum()

    def forward(self, x: Tensor, delta: Tensor) -> Any:
        x = x + delta
        if self.how == "grad":
            return self.energy(x), torch.func.grad(self.energy)(x)
        energy, pull = torch.func.vjp(self.energy, x)
        return energy, pull(torch.ones_like(energy))[0]


@pytest.mark.parametrize("how", ["grad", "vjp"])
def test_functional_gradients_stay_untraced_with_a_warning(how: str) -> None:
    torch.manual_seed(0)
    model = Functional(how).double()
    x, delta, direction = (torch.randn(3, 6, dtype=torch.float64) for _ in range(3))
    with pytest.warns(fx_approx.errors.CaptureWarning):
        approx = fx_approx.transform(model, Uniform(0.5), (x, delta))
    moved, predicted = energies(approx, x, delta, direction)
    assert predicted == pytest.approx(moved, rel=1e-5)
