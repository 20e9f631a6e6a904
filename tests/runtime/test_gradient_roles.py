"""Gradient roles on whole models: modes, memory, checkpoints, AMP, torch.func, compilation, unbiasedness."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fx_approx
from fx_approx import Plan, SamplerConfig
from fx_approx.core.plan import Policy
from fx_approx.policies import Exact, GradientSampling, Override, Paper, Uniform
from fx_approx.sampling import SAMPLERS
from tests.helpers.modes import BACKENDS

MODES: dict[str, Policy] = {
    "backward": GradientSampling.backward(0.5),
    "weight-gradient": GradientSampling.weight_gradient(0.3),
    "straight-through": GradientSampling.straight(0.5),
    "all": GradientSampling(
        output=SamplerConfig("systematic", 0.5, min_k=2),
        grad_input=SamplerConfig("bernoulli", 0.75, scores="weight"),
        grad_weight=SamplerConfig("wta", 0.4, scores="gradient"),
    ),
    "positions": GradientSampling(grad_weight=SamplerConfig("systematic", 0.5, positions=True)),
    "ema": GradientSampling(grad_weight=SamplerConfig("systematic", 0.5, scores="ema", positions=True)),
}
modes = pytest.mark.parametrize("mode", MODES)


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


@pytest.mark.parametrize("mode", ["backward", "weight-gradient", "positions", "ema"])
def test_gradient_modes_leave_the_forward_exact(mode: str) -> None:
    model, x = cnn(), images()
    approx = fx_approx.transform(copy.deepcopy(model), MODES[mode])
    assert torch.equal(approx(x), model(x))
    exact = step(model, x)
    sampled = step(approx, x)
    assert any(not torch.allclose(one, two) for one, two in zip(sampled, exact, strict=True))
    assert torch.allclose(sampled[-1], exact[-1]), "the bias gradient is exact"


@modes
def test_a_ratio_of_one_and_evaluation_are_bitwise_exact(mode: str) -> None:
    model, x = cnn(), images()
    approx = fx_approx.transform(copy.deepcopy(model), MODES[mode])
    fx_approx.set_sampling(approx, 1.0)
    exact = step(model, x)
    assert all(torch.equal(one, two) for one, two in zip(step(approx, x), exact, strict=True))
    fx_approx.set_sampling(approx, 0.5)
    assert torch.equal(approx.eval()(x), model.eval()(x))


@modes
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_change_nothing(mode: str, use_reentrant: bool) -> None:
    model, x = cnn(), images().requires_grad_()
    plain, checked = (fx_approx.transform(copy.deepcopy(model), MODES[mode]) for _ in range(2))
    for _ in range(2):
        wanted = step(plain, x)
        found = step(checked, x, lambda value: checkpoint(checked, value, use_reentrant=use_reentrant))
        assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))


@modes
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_steps_are_the_eager_ones_in_one_graph(backend: str, mode: str) -> None:
    model, x = cnn(), images()
    eager, compiled = (fx_approx.transform(copy.deepcopy(model), MODES[mode], x) for _ in range(2))
    for approx in (eager, compiled):
        step(approx, x)  # room for running norms
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    run = torch.compile(compiled, backend=counter, fullgraph=True)
    for _ in range(3):
        for one, two in zip(step(compiled, x, run), step(eager, x), strict=True):
            torch.testing.assert_close(one, two)
    assert counter.frame_count == 1


@modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_gradient_scaling(mode: str, dtype: torch.dtype) -> None:
    model, x = cnn().float(), images().float()
    approx = fx_approx.transform(model, MODES[mode])
    optimizer = torch.optim.SGD(approx.parameters(), 0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = F.mse_loss(approx(x).float(), torch.ones(8, 4))
        scaler.scale(loss).backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in approx.parameters())
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@modes
def test_functional_call_and_grad(mode: str) -> None:
    model, x = cnn(), images()
    one, two = (fx_approx.transform(copy.deepcopy(model), MODES[mode]) for _ in range(2))
    wanted = step(one, x)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in two.named_buffers()}
        return torch.func.functional_call(two, {**parameters, **buffers}, x).square().mean()

    found = torch.func.grad(loss)(dict(two.named_parameters()))
    for gradient, value in zip(found.values(), wanted, strict=True):
        torch.testing.assert_close(gradient, value)


@modes
def test_vmap_and_jvp_are_clear_errors_while_sampling(mode: str) -> None:
    approx, x = fx_approx.transform(cnn(), MODES[mode]), images(4)
    with pytest.raises(fx_approx.errors.UnsupportedError, match=r"vmap .*model\.eval\(\)"):
        torch.func.vmap(approx)(x.unsqueeze(1))
    with pytest.raises(fx_approx.errors.UnsupportedError, match="jvp"):
        torch.func.jvp(approx, (x,), (x,))
    approx.eval()
    torch.testing.assert_close(torch.func.vmap(approx)(x.unsqueeze(1)).squeeze(1), approx(x))


def test_a_gradient_penalty_is_differentiated_through_the_sample() -> None:
    """Finite differences of the penalty, the sample held by scores that the step does not move."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    spec = SamplerConfig("systematic", 0.5, scores="uniform")
    approx = fx_approx.transform(model, GradientSampling(grad_input=spec, grad_weight=spec))
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def penalty(weight: Tensor) -> Tensor:
        parameters = {**dict(approx.named_parameters()), "0.weight": weight}
        output = torch.func.functional_call(approx, parameters, x)
        (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        return gradient.square().sum()

    with fx_approx.reuse_selection(approx):
        assert torch.autograd.gradcheck(
            lambda g: grad_of_sample(approx, g), torch.randn(4, 3, dtype=torch.float64).requires_grad_()
        )
        weight = model[0].weight.detach().clone().requires_grad_()
        (found,) = torch.autograd.grad(penalty(weight), weight)
    assert found.isfinite().all() and found.any()


def grad_of_sample(approx: nn.Module, upstream: Tensor) -> Tensor:
    x = torch.linspace(-1, 1, 20, dtype=torch.float64).view(4, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(approx(x), x, upstream, create_graph=True)
    return gradient


def test_registered_operators_pass_opcheck() -> None:
    key, state = torch.tensor([3, 1]), torch.tensor([0, 1, 1, 3])
    ops = torch.ops.fx_approx
    torch.library.opcheck(ops.draw.default, (key, [0, 2], [3, 5]))
    torch.library.opcheck(ops.refresh.default, (torch.rand(4), torch.rand(8)))
    names = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.next_key.default, (state, [torch.rand(3)], 10**6), test_utils=names)


def test_roles_in_plans_controls_and_copies() -> None:
    model, x = cnn(), images()
    explained = fx_approx.explain(model, Override({"0": Paper()}, MODES["all"]), x)
    plan = Plan.from_json(explained.plan.to_json())
    assert plan == explained.plan and set(plan["6"].roles) == {"output", "grad_input", "grad_weight"}
    edited = plan.edit("6", {"grad_weight": SamplerConfig("wta", 0.25, scores="input")})
    approx = fx_approx.transform(model, edited, x)
    row = fx_approx.report(approx)["6"]
    assert [(s.role.value, s.k, s.pairs) for s in row.samples] == [("grad_weight", 2, 8)]
    fx_approx.set_sampling(approx, {"3": 1.0}, role="grad_input")
    fx_approx.set_sampling(approx, enabled={"3": False}, role="output")
    for twin in (approx, copy.deepcopy(approx), pickle.loads(pickle.dumps(approx))):
        assert [s.role.value for s in fx_approx.report(twin)["3"].samples] == ["grad_weight"]
    with pytest.raises(ValueError, match="straight_through"):
        plan.edit("6", {"grad_weight": SamplerConfig()}, straight_through=True)
    with pytest.raises(ValueError, match="grad_weight: scores 'weight' say nothing of it; expected one of"):
        GradientSampling(grad_weight=SamplerConfig(scores="weight"))
    with pytest.raises(ValueError, match="'bias'"):
        plan.edit("6", {"bias": SamplerConfig()})


def test_running_norms_are_part_of_an_exact_resume() -> None:
    model, x = cnn(), images()
    approx = fx_approx.transform(copy.deepcopy(model), MODES["ema"], x)
    for _ in range(3):
        step(approx, x)
    saved = fx_approx.sampler_state_dict(approx)
    assert len(saved["running"]["0/grad_weight"]) == 64
    resumed = fx_approx.transform(copy.deepcopy(model), MODES["ema"], x)
    fx_approx.load_sampler_state_dict(resumed, saved)
    resumed.load_state_dict(approx.state_dict())
    assert all(torch.equal(one, two) for one, two in zip(step(approx, x), step(resumed, x), strict=True))
    with pytest.raises(ValueError, match="no running norms are kept at 9/grad_weight"):
        fx_approx.load_sampler_state_dict(resumed, {**saved, "running": {"9/grad_weight": [1.0]}})


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


# The smallest in CI, the others where time is no matter: some hundred steps each.
networks = pytest.mark.parametrize(
    "network", ["mlp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cnn", "transformer"))]
)


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


@networks
@pytest.mark.parametrize("sampler", [name for name in sorted(SAMPLERS) if SAMPLERS[name].unbiased])
def test_backward_mode_is_unbiased_through_a_network(network: str, sampler: str) -> None:
    """|z| < 5 in 10 directions: false alarms below 1e-5 for each case, if means of 200 steps are normal."""
    assert projections(network, GradientSampling.backward(0.5, sampler), 200).abs().max() < 5


@networks
def test_the_test_of_unbiasedness_finds_a_bias(network: str) -> None:
    """TopK of the input gradients; unbiased products in forward mode, through a non-linearity."""
    spec = SamplerConfig("crs", 0.5)
    biased = GradientSampling(grad_input=SamplerConfig("topk", 0.5), grad_weight=spec)
    assert projections(network, biased, 700).abs().max() > 5
    assert projections(network, Uniform(0.5, "systematic", scores="online"), 700).abs().max() > 5


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
