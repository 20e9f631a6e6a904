"""Modes under everything that stands between a model and its gradients.

Mixed precision, activation checkpoints, torch.func, second derivatives, the dispatcher's checks, torch.compile.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import fx_approx
from fx_approx import SamplerConfig
from fx_approx.policies import GradientSampling
from fx_approx.runtime.rng import new_state
from fx_approx.sampling import Sampler, Selection
from tests.helpers.models import Attention, CalledTwice, Checkpointed, WithDataDependent, loss_of, mlp, same, tensors
from tests.helpers.modes import BACKENDS, MODES
from tests.helpers.modules import made_of
from tests.helpers.quick import quick

modes = pytest.mark.parametrize("mode", MODES)
alternating = pytest.mark.parametrize(("mode", "reentrant"), list(zip(MODES, itertools.cycle([True, False]))))


class Mixed(nn.Module):
    """A convolution, a grouped one, a product of activations, an einsum and a linear layer; no dead units."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.grouped = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, groups=2)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.conv(x).tanh()).tanh().flatten(2)
        return self.fc((torch.einsum("bct,bdt->bcd", x, x).tanh() @ x).mean(-1))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (mlp, lambda: torch.randn(6, 12)),
    "mixed": (Mixed, lambda: torch.randn(6, 2, 5, 5)),
    "attention": (Attention, lambda: torch.randn(3, 5, 8)),
    "called_twice": (CalledTwice, lambda: torch.randn(6, 16)),
    "untraced_part": (WithDataDependent, lambda: torch.randn(6, 12)),
}
# Every mode with four models, every pair of a model and a kind of checkpoint.
each_once = pytest.mark.parametrize(
    ("mode", "name", "reentrant"),
    list(zip([*MODES, *MODES], itertools.cycle(MODELS), itertools.cycle([True, True, False]))),
)


def transformed(model: nn.Module, policy: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_approx.errors.CaptureWarning)
        return fx_approx.transform(model, policy, **options)


def gradients(model: nn.Module, x: Tensor, call: Callable[..., Any] | None = None, seed: int = 1) -> Any:
    """Output and gradients (of the parameters and of the input) of one step; ``call`` stands for the model."""
    model.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)
    output = (model if call is None else call)(x)
    loss_of(output).backward()
    return output.detach(), {"input": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


def even(policy: GradientSampling) -> GradientSampling:
    """The same with uniform scores: rounding cannot change a sample."""
    roles = {role.value: spec.replace(scores="uniform") for role, spec in policy.roles.items()}
    return GradientSampling(**roles, straight_through=policy.straight_through)


@pytest.mark.parametrize(
    ("mode", "name", "dtype"),
    list(
        zip(
            [*MODES, *MODES],
            itertools.cycle(["mlp", "mixed", "attention", "untraced_part"]),
            itertools.cycle([torch.bfloat16, torch.bfloat16, torch.float16]),
        )
    ),
)
def test_autocast_and_gradient_scaling(mode: str, name: str, dtype: torch.dtype) -> None:
    build, inputs = MODELS[name]
    model, x = build(), inputs()
    approx = transformed(model, even(MODES[mode](0.5)))
    with fx_approx.reuse_selection(approx):
        wanted = {key: grad.clone() for key, grad in gradients(approx, x)[1].items() if grad is not None}
        approx.zero_grad(set_to_none=True)
        scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=4.0), torch.optim.SGD(approx.parameters(), 1e-3)
        with torch.autocast("cpu", dtype):
            output = approx(x)
            assert output.dtype == dtype
            loss = loss_of(output)
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    largest = max(grad.abs().max() for grad in wanted.values())
    for key, parameter in approx.named_parameters():
        if key not in wanted:
            continue
        assert parameter.grad is not None and parameter.grad.dtype == parameter.dtype == torch.float32
        assert (parameter.grad - wanted[key]).abs().max() <= 0.1 * largest, key
    before = [p.detach().clone() for p in approx.parameters()]
    scaler.step(optimizer)
    scaler.update()
    assert not same(before, [p.detach() for p in approx.parameters()])


def test_an_overflow_skips_the_step_and_leaves_the_running_norms() -> None:
    """Gradient scaling tries scales that are too large; the infinite gradients of that step teach nothing."""
    approx, x = fx_approx.transform(mlp(), MODES["ema"](0.5)), torch.randn(6, 12)
    gradients(approx, x)
    norms = fx_approx.sampler_state_dict(approx)["running"]
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1e38), torch.optim.SGD(approx.parameters(), 1e-3)
    before = [p.detach().clone() for p in approx.parameters()]
    approx.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = 100 * loss_of(approx(x)).float()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == pytest.approx(0.5e38)
    assert same(before, [p.detach() for p in approx.parameters()])
    assert fx_approx.sampler_state_dict(approx)["running"] == norms


@each_once
def test_a_checkpoint_around_the_model_changes_nothing(mode: str, name: str, reentrant: bool) -> None:
    build, inputs = MODELS[name]
    approx = transformed(build(), MODES[mode](0.5))
    twin, x = copy.deepcopy(approx), inputs()
    for _ in range(2):
        found = gradients(approx, x, lambda x: checkpoint(approx, x, use_reentrant=reentrant))
        assert same(found, gradients(twin, x))
    assert fx_approx.sampler_state_dict(approx) == fx_approx.sampler_state_dict(twin)


@alternating
def test_a_checkpoint_inside_the_model_changes_nothing(mode: str, reentrant: bool) -> None:
    model, x = Checkpointed(reentrant), torch.randn(6, 12)
    plain = copy.deepcopy(model)
    plain.mode = None
    approx, twin = (transformed(one, MODES[mode](0.5)) for one in (model, plain))
    for _ in range(2):
        assert same(gradients(approx, x), gradients(twin, x))
    assert len(approx.block.calls) == 2 * len(twin.block.calls), "it does recompute"


@alternating
def test_checkpointed_forwards_may_wait_for_their_backward(mode: str, reentrant: bool) -> None:
    """The running norms of ``ema`` move between a forward and its recomputation; a random count may too."""
    approx = fx_approx.transform(mlp(), MODES[mode](0.5))
    twin, batches = copy.deepcopy(approx), [torch.randn(6, 12).requires_grad_() for _ in range(2)]
    results = []
    for model in (approx, twin):
        losses = [
            loss_of(checkpoint(model, x, use_reentrant=reentrant) if model is approx else model(x)) for x in batches
        ]
        for loss in losses:
            loss.backward()
        results.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*results)


@each_once
def test_torch_func_gives_the_gradients_of_autograd(mode: str, name: str, reentrant: bool) -> None:
    build, inputs = MODELS[name]
    approx, x = transformed(build(), MODES[mode](0.5)), inputs()
    twin = copy.deepcopy(approx)
    parameters = {key: value.detach() for key, value in approx.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss_of(functional_call(approx, parameters, (x,)))

    for _ in range(2):
        by_parameter, by_input = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
        _, wanted = gradients(twin, x)
        assert same({"input": by_input, **by_parameter}, wanted)


TRANSFORMS: dict[str, Callable[[Any, Tensor], Any]] = {
    "vmap": lambda model, x: torch.func.vmap(model)(x.unsqueeze(1)),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (torch.ones_like(x),)),
    "jacfwd": lambda model, x: torch.func.jacfwd(model)(x),
    "hessian": lambda model, x: torch.func.hessian(lambda x: model(x).square().sum())(x),
    "dual numbers": lambda model, x: dual(model, x),
}


def dual(model: nn.Module, x: Tensor) -> Any:
    with torch.autograd.forward_ad.dual_level():
        made = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        return tuple(torch.autograd.forward_ad.unpack_dual(model(made)))


@pytest.mark.parametrize(
    ("mode", "sampler", "transform"),
    list(zip([*MODES, *MODES], itertools.cycle(["systematic", "topk"]), itertools.cycle(TRANSFORMS))),
)
def test_what_is_not_supported_while_sampling_says_so(mode: str, sampler: str, transform: str) -> None:
    policy = MODES[mode](0.5)
    roles = {role.value: spec.replace(name=sampler) for role, spec in policy.roles.items()}
    approx = fx_approx.transform(mlp(), GradientSampling(**roles, straight_through=policy.straight_through))
    exact, x = copy.deepcopy(approx), torch.randn(4, 12)
    word = "vmap" if transform == "vmap" else "vmap|forward-mode"
    with pytest.raises(fx_approx.errors.UnsupportedError, match=rf"(?s)({word}).*model\.eval\(\)"):
        TRANSFORMS[transform](approx, x)
    approx.eval()
    found = TRANSFORMS[transform](approx, x)
    torch.testing.assert_close(found, TRANSFORMS[transform](fx_approx.restore(exact), x))
    approx.train()
    assert gradients(approx, x)[0].isfinite().all(), "it works as before"


def rows(model: nn.Module, x: Tensor) -> Tensor:
    """The Jacobian, row by row, under one sample."""
    found = []
    with fx_approx.reuse_selection(model):
        for j in range(model(x).numel()):
            x = x.detach().requires_grad_()
            found.append(torch.autograd.grad(model(x).flatten()[j], x)[0])
    return torch.stack(found)


@pytest.mark.parametrize(("mode", "how"), list(zip(MODES, itertools.cycle(["torch.func.jacrev", "is_grads_batched"]))))
def test_a_vectorised_backward_is_right_or_says_that_it_is_not_supported(mode: str, how: str) -> None:
    approx, x = fx_approx.transform(mlp(), MODES[mode](0.5)), torch.randn(4, 12)
    wanted = rows(copy.deepcopy(approx), x)
    try:
        if how == "torch.func.jacrev":
            found = torch.func.jacrev(approx)(x)
        else:
            x = x.requires_grad_()
            output = approx(x)
            units = torch.eye(output.numel()).view(-1, *output.shape)
            (found,) = torch.autograd.grad(output, x, units, is_grads_batched=True)
    except fx_approx.errors.UnsupportedError as error:
        assert "vmap" in str(error)
    else:
        torch.testing.assert_close(found.reshape(wanted.shape), wanted)


class Dense(torch.autograd.Function):
    """``x @ w.T`` whose gradients are masked products; torch differentiates its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, columns, rows)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w, columns, rows = ctx.saved_tensors
        return (grad * columns) @ w, (grad * rows.unsqueeze(-1)).T @ x, None, None


def weights(selection: Selection, pairs: int) -> Tensor:
    """A selection as what each pair is multiplied with."""
    scale = torch.ones_like(selection.indices, dtype=torch.float64) if selection.scale is None else selection.scale
    return torch.zeros(pairs, dtype=torch.float64).scatter(0, selection.indices[0], scale[0].double())


@pytest.mark.parametrize(
    ("sampler", "scores"),
    [("systematic", ("weight", "input")), ("bernoulli", ("uniform", "uniform")), ("topk", ("weight", "input"))],
)
def test_a_gradient_penalty_in_backward_mode(
    sampler: str, scores: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Second derivatives go through the sampled gradients; the oracle masks them with the same selections."""
    drawn: list[Selection] = []
    draw = Sampler.draw

    def recorded(self: Sampler, *args: Any, **options: Any) -> Selection:
        drawn.append(draw(self, *args, **options))
        return drawn[-1]

    monkeypatch.setattr(Sampler, "draw", recorded)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    policy = GradientSampling(
        grad_input=SamplerConfig(sampler, 0.5, scores=scores[0]),
        grad_weight=SamplerConfig(sampler, 0.5, scores=scores[1]),
    )
    approx, x = fx_approx.transform(model, policy), torch.randn(6, 4, dtype=torch.float64, requires_grad=True)

    def penalty(call: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        output = call(x)
        (slope,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        loss = output.sin().sum() + (slope.square().sum() - 1).square()
        return torch.autograd.grad(loss, [x, *model.parameters()])

    with fx_approx.reuse_selection(approx):
        found, again = penalty(approx), penalty(approx)
    torch.testing.assert_close(found, again)
    masks = iter(drawn[:6])

    def dense(x: Tensor) -> Tensor:
        for i in (0, 2, 4):
            layer = model[i]
            columns, rows = weights(next(masks), layer.out_features), weights(next(masks), 6)
            x = Dense.apply(x, layer.weight, columns, rows) + layer.bias
            x = x if i == 4 else x.tanh()
        return x

    torch.testing.assert_close(found, penalty(dense))
    exact = penalty(fx_approx.restore(approx))
    assert not torch.allclose(found[0], exact[0])


@modes
def test_a_second_derivative_runs_in_every_mode(mode: str) -> None:
    approx, x = transformed(Mixed(), MODES[mode](0.5)), torch.randn(6, 2, 5, 5, requires_grad=True)
    (slope,) = torch.autograd.grad(loss_of(approx(x)), x, create_graph=True)
    slope.square().sum().backward()
    found = tensors([p.grad for p in approx.parameters()])
    assert len(found) > 4 and all(grad.isfinite().all() for grad in found)


OPERATORS: dict[str, tuple[Any, ...]] = {
    "fx_approx::next_key": (new_state(3), [torch.randn(2, 3), torch.ones(4, dtype=torch.int64)], 10**9),
    "fx_approx::draw": (torch.tensor([3, 5]), [0, 4, 7], [3, 1, 6]),
    "fx_approx::take": (torch.randn(2, 5, 3), 1, torch.tensor([0, 3])),
    "fx_approx::put": (torch.randn(2, 2, 3), 1, torch.tensor([0, 3]), 5),
    "fx_approx::add_at": (torch.randn(2, 5, 3), 1, torch.tensor([0, 3]), torch.randn(2, 2, 3)),
    "fx_approx::take_again": (torch.randn(2, 5, 3), 1, torch.tensor([0, 3]), torch.randn(2)),
    "fx_approx::pack_signs": (torch.randn(2, 5, 3).relu(),),
    "fx_approx::unpack_signs": (torch.randint(256, (4,), dtype=torch.uint8), torch.randn(2, 5, 3), ()),
    "fx_approx::keep": (
        *(torch.tensor([3, 5]), torch.arange(3), torch.rand(2)),
        *(torch.zeros(2, dtype=torch.int64), torch.arange(3), torch.rand(2), 10**9),
    ),
    "fx_approx::observe": (torch.rand(2, 5), torch.arange(5), torch.rand(2), torch.tensor([0, 3]), 0),
    "fx_approx::refresh": (torch.tensor([-1.0, 0.5, 2.0]), torch.rand(12)),
    "fx_approx::learn_positions": (torch.tensor([-1.0, 0.5, 2.0]), torch.rand(2, 2), torch.tensor([[0, 2], [1, 3]])),
    "fx_approx::keep_scores": (torch.tensor([3, 5]), torch.rand(3), torch.tensor([3, 4]), torch.rand(3), 10**9),
}


def test_every_operator_is_checked() -> None:
    registered = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    assert {name for name in registered if name.startswith("fx_approx::")} == set(OPERATORS)


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_keep_the_rules_of_the_dispatcher(name: str) -> None:
    overload = getattr(torch.ops.fx_approx, name.partition("::")[2]).default
    results = torch.library.opcheck(overload, OPERATORS[name])
    assert set(results.values()) == {"SUCCESS"}


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@made_of(lambda: {"inner": nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 4))})
def WithCheckpoint(self: Any, x: Tensor) -> Tensor:
    return checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[no-any-return]


_MIXED = ("positions",)
_QUICK = ("forward",)
COMPILED = quick(
    [*(("mixed" if mode in _MIXED else "linear", mode) for mode in MODES), ("checkpoint", "ema")],
    lambda name, mode: name == "checkpoint" or mode in _QUICK,
)


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize(("name", "mode"), COMPILED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_model_is_one_graph_with_the_gradients_of_the_eager_one(backend: str, name: str, mode: str) -> None:
    """In float64, where rounding differently changes no sample."""
    builds = {"linear": lambda: nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)), "mixed": Mixed}
    build = builds.get(name, WithCheckpoint)
    eager = transformed(build().double(), MODES[mode](0.5), seed=3)
    approx = copy.deepcopy(eager)
    shape = (6, 2, 5, 5) if name == "mixed" else (6, 12)
    for model in (eager, approx) if mode == "ema" else ():
        gradients(model, torch.ones(shape, dtype=torch.float64))  # the norms are there before the graph
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(approx, backend=counter, fullgraph=True)
    for _ in range(4):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(gradients(approx, x, compiled), gradients(eager, x), rtol=1e-9, atol=1e-10)
    assert counter.frame_count == 1
    found, wanted = (dict(fx_approx.sampler_state_dict(model)) for model in (approx, eager))
    norms, expected = found.pop("running", {}), wanted.pop("running", {})
    assert found == wanted and norms.keys() == expected.keys()
    assert all(norms[name] == pytest.approx(expected[name]) for name in norms)
