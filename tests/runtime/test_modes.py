"""Modes on whole models: forward, straight-through, backward, weight gradient only, and any mixture of them."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fx_approx
from fx_approx import Plan, SamplerConfig
from fx_approx.core.candidates import Role
from fx_approx.policies import Exact, GradientSampling, Override, Uniform
from tests.helpers.models import ZOO, Attention, CalledTwice, Tied, loss_of, mlp, same, tensors, train_step
from tests.helpers.modes import EXACT_FORWARD, MODES, steps, transformed
from tests.helpers.modules import made_of
from tests.helpers.quick import thinned

modes = pytest.mark.parametrize("mode", MODES)
some_modes = pytest.mark.parametrize("mode", thinned(MODES))


class Transformer(nn.Module):
    """One block with its own qkv layer: products of parameters and of activations."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2, self.head = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = torch.matmul((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1), v)
        x = x + self.proj(mixed.transpose(1, 2).flatten(-2))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(x.mean(1))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, groups=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 4),
    )


NETWORKS: dict[str, tuple[Any, Any]] = {
    "cnn": (cnn, lambda: torch.randn(16, 3, 8, 8)),
    "mlp": (mlp, lambda: torch.randn(16, 12)),
    "transformer": (Transformer, lambda: torch.randn(16, 5, 16)),
}


@pytest.mark.parametrize(("network", "mode"), thinned(zip(itertools.cycle(NETWORKS), MODES, strict=False)))
def test_a_few_steps_of_training_lower_the_loss(network: str, mode: str) -> None:
    build, inputs = NETWORKS[network]
    model, x, labels = build(), inputs(), torch.randint(4, (16,))
    approx = transformed(model, MODES[mode](0.5))
    optimizer = torch.optim.Adam(approx.parameters(), 2e-2)
    fx_approx.set_sampling(approx, enabled=False)
    before = F.cross_entropy(approx(x), labels).item()
    fx_approx.set_sampling(approx, enabled=True)
    for _ in range(15):
        optimizer.zero_grad()
        F.cross_entropy(approx(x), labels).backward()
        optimizer.step()
    fx_approx.set_sampling(approx, enabled=False)
    assert F.cross_entropy(approx(x), labels).item() < 0.85 * before


@pytest.mark.parametrize(
    ("name", "mode"),
    thinned(
        dict.fromkeys(
            [*zip(ZOO, itertools.cycle(MODES)), *(("cnn", mode) for mode in MODES), *(("tied", mode) for mode in MODES)]
        )
    ),
)
def test_what_a_mode_leaves_exact(name: str, mode: str) -> None:
    """All at ratio 1, and evaluation; the output of a training step where only gradients are sampled."""
    build, inputs = ZOO[name]
    model, x = build(), inputs()
    approx = transformed(copy.deepcopy(model), MODES[mode](1.0))
    assert same(train_step(approx, x), train_step(model, x))
    fx_approx.set_sampling(approx, 0.4)
    model.eval(), approx.eval()
    assert same(train_step(approx, x), train_step(model, x))
    model.train(), approx.train()
    (ours, grads), (theirs, exact) = train_step(approx, x), train_step(model, x)
    assert same(ours, theirs) == (mode in EXACT_FORWARD)
    assert not same(grads, exact), "the mode does something"
    assert [name for name, grad in grads.items() if grad is None] == [n for n, grad in exact.items() if grad is None]


class Unrolled(nn.Module):
    def __init__(self, model: CalledTwice) -> None:
        super().__init__()
        self.a, self.b, self.head = copy.deepcopy(model.fc), copy.deepcopy(model.fc), copy.deepcopy(model.head)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).relu()).relu())


@some_modes
def test_a_layer_called_twice_has_the_gradients_of_both_calls(mode: str) -> None:
    model, x = CalledTwice(), torch.randn(6, 16)
    unrolled = transformed(Unrolled(model), MODES[mode](0.5))
    approx = transformed(model, MODES[mode](0.5))
    (ours, grads), (theirs, apart) = train_step(approx, x), train_step(unrolled, x)
    assert same(ours, theirs)
    for name in ("weight", "bias"):
        torch.testing.assert_close(grads[f"fc.{name}"], apart[f"a.{name}"] + apart[f"b.{name}"])
        assert same(grads[f"head.{name}"], apart[f"head.{name}"])


@some_modes
def test_tied_weights_have_the_gradients_of_both_uses(mode: str) -> None:
    model, x = Tied(), torch.randint(10, (6, 3))
    loose = copy.deepcopy(model)
    loose.decoder.weight = nn.Parameter(model.embedding.weight.detach().clone())
    approx, apart = (transformed(one, MODES[mode](0.5)) for one in (model, loose))
    assert approx.decoder.weight is approx.embedding.weight
    (ours, grads), (theirs, split) = train_step(approx, x), train_step(apart, x)
    assert same(ours, theirs)
    torch.testing.assert_close(grads["embedding.weight"], split["embedding.weight"] + split["decoder.weight"])


OWN = GradientSampling(
    SamplerConfig("topk", 0.5, min_k=2),
    SamplerConfig("crs", 0.25, min_k=3, scores="weight"),
    SamplerConfig("systematic", 0.75, min_k=5, scores="input"),
)


def samples(model: nn.Module, name: str) -> dict[str, tuple[str, int | None, int | None]]:
    return {s.role.value: (s.sampler, s.k, s.pairs) for s in fx_approx.report(model)[name].samples}


def test_each_product_has_a_sampler_a_ratio_and_a_least_count_of_its_own() -> None:
    approx = fx_approx.transform(mlp(), OWN, torch.randn(6, 12))
    assert samples(approx, "2") == {
        "output": ("topk", 8, 16),
        "grad_input": ("crs", 4, 16),
        "grad_weight": ("systematic", 5, 6),
    }
    assert samples(approx, "0") == {"output": ("topk", 6, 12), "grad_weight": ("systematic", 5, 6)}
    assert samples(approx, "4")["grad_input"] == ("crs", 3, 4)


@pytest.mark.parametrize(
    ("mode", "network"),
    [
        *zip([mode for mode in MODES if not mode.startswith("combined")], itertools.cycle(NETWORKS)),
        *(("positions", "cnn"), ("per_batch", "transformer"), ("ema", "cnn")),
    ],
)
def test_the_report_counts_what_torch_counts(mode: str, network: str) -> None:
    build, inputs = NETWORKS[network]
    if network == "cnn":
        build = lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2), nn.Flatten())  # noqa: E731
    x = inputs()
    approx = transformed(build(), MODES[mode](0.5), x)
    totals = fx_approx.report(approx).totals
    with FlopCounterMode(display=False) as counter:
        loss_of(approx(x)).backward()
    # Adding up the squares of the patch that a position reads is a convolution too; the report has it as selection.
    patches = 2 * 16 * (6 * 6 + 2 * 2) * 9 if (network, mode) == ("cnn", "positions") else 0
    assert counter.get_total_flops() - patches == totals.executed.total < totals.exact.total
    assert patches <= totals.selection


@pytest.mark.parametrize("role", Role)
def test_the_ratio_of_one_product_is_set_alone(role: Role) -> None:
    model, x = mlp(), torch.randn(6, 12)
    approx = fx_approx.transform(copy.deepcopy(model), OWN, x)
    fx_approx.set_sampling(approx, {"2": 0.9}, role=role)
    changed = OWN.roles[role].replace(ratio=0.9)
    policy = Override(
        {"2": GradientSampling(**{r.value: changed if r is role else s for r, s in OWN.roles.items()})}, OWN
    )
    wanted = fx_approx.transform(copy.deepcopy(model), policy, x)
    assert samples(approx, "2") == samples(wanted, "2") != samples(approx, "0")
    assert same(steps(approx, 2, x), steps(wanted, 2, x))


@pytest.mark.parametrize("role", Role)
def test_one_product_is_switched_off_alone(role: Role) -> None:
    model, x = mlp(), torch.randn(6, 12)
    approx = fx_approx.transform(copy.deepcopy(model), OWN, x)
    fx_approx.set_sampling(approx, enabled=False, role=role)
    without = GradientSampling(**{r.value: spec for r, spec in OWN.roles.items() if r is not role})
    wanted = fx_approx.transform(copy.deepcopy(model), without, x)
    assert role.value not in samples(approx, "2") and samples(approx, "2") == samples(wanted, "2")
    assert same(steps(approx, 2, x), steps(wanted, 2, x))
    fx_approx.set_sampling(approx, enabled={"2": True}, role=role)
    assert role.value in samples(approx, "2") and role.value not in samples(approx, "0")


def test_switches_of_a_product_that_is_not_sampled_are_an_error() -> None:
    approx = fx_approx.transform(mlp(), GradientSampling.weight_gradient())
    for given in ({"ratio": 0.5}, {"enabled": False}):
        with pytest.raises(ValueError, match="no sampled layer matches"):
            fx_approx.set_sampling(approx, **given, role="grad_input")
        with pytest.raises(ValueError, match=r"role: expected one of 'output'.* got 'sideways'"):
            fx_approx.set_sampling(approx, **given, role="sideways")
    assert fx_approx.report(approx)["2"].sample("grad_weight").ratio == 0.3


@some_modes
def test_a_plan_goes_to_json_and_back(mode: str) -> None:
    model, x = Attention(), torch.randn(3, 5, 8)
    plan = fx_approx.explain(model, MODES[mode](0.5), x).plan
    again = Plan.from_json(plan.to_json())
    assert again == plan and again.to_json() == plan.to_json()
    assert same(
        steps(transformed(copy.deepcopy(model), again), 2, x),
        steps(transformed(copy.deepcopy(model), MODES[mode](0.5)), 2, x),
    )


def test_plans_are_edited_by_role() -> None:
    model, x = mlp(), torch.randn(6, 12)
    spec = SamplerConfig("crs", 0.5)
    plan = fx_approx.explain(model, GradientSampling.backward(0.5), x).plan
    edited = plan.edit("0", None).edit("2", {Role.GRAD_WEIGHT: spec}).edit("4", spec, straight_through=True)
    assert [dict(decision.roles) for decision in edited] == [{}, {Role.GRAD_WEIGHT: spec}, {Role.OUTPUT: spec}]
    policy = Override(
        {"0": Exact(), "2": GradientSampling(grad_weight=spec)}, GradientSampling(output=spec, straight_through=True)
    )
    approx, wanted = (fx_approx.transform(copy.deepcopy(model), one) for one in (edited, policy))
    assert same(steps(approx, 2, x), steps(wanted, 2, x))
    assert plan["0"].roles, "the plan itself is as it was"
    with pytest.raises(ValueError, match="straight_through"):
        plan.edit("2", {Role.GRAD_WEIGHT: spec}, straight_through=True)
    with pytest.raises(ValueError, match="grad_weight: scores 'weight' say nothing of it; expected one of"):
        GradientSampling(grad_weight=SamplerConfig(scores="weight"))
    with pytest.raises(ValueError, match="'bias'"):
        plan.edit("2", {"bias": spec})


def test_other_modes_for_some_layers() -> None:
    rules = {"0": GradientSampling.weight_gradient(0.5), "2": Uniform(0.25, scores="online")}
    model, x = mlp(), torch.randn(6, 12)
    approx = fx_approx.transform(copy.deepcopy(model), Override(rules, GradientSampling.straight(0.5)), x)
    rows = fx_approx.report(approx).rows
    assert [[sample.role.value for sample in row.samples] for row in rows] == [["grad_weight"], ["output"], ["output"]]
    assert [row.straight_through for row in rows] == [False, False, True]
    _, grads = train_step(approx, x)
    reached = {name: int(grad.any(0).sum()) for name, grad in grads.items() if grad is not None and grad.dim() > 1}
    assert reached["0.weight"] == 12 and reached["2.weight"] == 4
    assert reached["4.weight"] > 8, "straight through: more than the pairs of the output"


@some_modes
def test_copies_go_on_as_the_original_does(mode: str) -> None:
    x = torch.randn(6, 16)
    approx = transformed(CalledTwice(), MODES[mode](0.5), seed=3)
    steps(approx, 2, x)
    fx_approx.set_sampling(approx, {"head": 0.25})
    models = [copy.deepcopy(approx), pickle.loads(pickle.dumps(approx)), approx]
    results = [(fx_approx.sampler_state_dict(model), steps(model, 2, x)) for model in models]
    ends = [(fx_approx.sampler_state_dict(model), fx_approx.report(model)) for model in models]
    assert results[0][0] == results[1][0] == results[2][0] and ends[0] == ends[1] == ends[2]
    assert same(results[0][1], results[2][1]) and same(results[1][1], results[2][1])


@some_modes
def test_training_resumes_exactly(mode: str) -> None:
    model, x = Transformer(), torch.randn(6, 5, 16)
    approx = transformed(model, MODES[mode](0.5), seed=5)
    optimizer = torch.optim.Adam(approx.parameters(), 1e-3)
    steps(approx, 3, x, optimizer)
    weights, momenta = copy.deepcopy(approx.state_dict()), copy.deepcopy(optimizer.state_dict())
    stored = json.loads(json.dumps(fx_approx.sampler_state_dict(approx)))
    assert bool(stored.get("running")) == (mode == "ema")
    expected = steps(approx, 3, x, optimizer)
    fresh = transformed(Transformer(), MODES[mode](0.5))
    fresh.load_state_dict(weights)
    resumed = torch.optim.Adam(fresh.parameters(), 1e-3)
    resumed.load_state_dict(momenta)
    fx_approx.load_sampler_state_dict(fresh, stored)
    assert same(steps(fresh, 3, x, resumed), expected)
    assert fx_approx.sampler_state_dict(fresh) == fx_approx.sampler_state_dict(approx)


def test_running_norms_matter_for_what_is_drawn() -> None:
    approx = fx_approx.transform(mlp(), GradientSampling.weight_gradient(0.5, "systematic", "ema"))
    x = torch.randn(6, 5, 12)
    steps(approx, 1, x)
    state = fx_approx.sampler_state_dict(approx)
    assert set(state["running"]) == {"0/grad_weight", "2/grad_weight", "4/grad_weight"}
    norms = state["running"]["2/grad_weight"]
    assert len(norms) == 5 and all(norm > 0 for norm in norms)
    other = {**state, "running": {site: [1.0, 100.0, 1.0, 1.0, 1.0] for site in state["running"]}}
    first = train_step(copy.deepcopy(approx), x)
    fx_approx.load_sampler_state_dict(approx, other)
    assert not same(train_step(approx, x), first)
    with pytest.raises(ValueError, match="no running norms are kept at 9/grad_weight"):
        fx_approx.load_sampler_state_dict(approx, {**state, "running": {"9/grad_weight": [1.0]}})


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "ema"])
def test_hold_keeps_the_sample(mode: str) -> None:
    """Under ``ema`` the numbers are kept, but the norms they are compared with move with every backward pass."""
    approx, x = transformed(Attention(), MODES[mode](0.5)), torch.randn(3, 5, 8)
    with fx_approx.reuse_selection(approx):
        first, second = train_step(approx, x), train_step(approx, x)
    assert same(first, second) and not same(train_step(approx, x)[1], first[1])


@some_modes
def test_the_seed_decides_the_sample(mode: str) -> None:
    model, x = Attention(), torch.randn(3, 5, 8)
    runs = [steps(transformed(copy.deepcopy(model), MODES[mode](0.5), seed=seed), 2, x) for seed in (1, 1, 2)]
    assert same(runs[0], runs[1])
    assert not same(runs[0][0][1], runs[2][0][1]) and not same(runs[0][0][1], runs[0][1][1])


@some_modes
def test_forwards_may_wait_for_their_backward(mode: str) -> None:
    """Several forwards before a backward, and two backward passes through one forward."""
    approx, x = transformed(mlp(), MODES[mode](0.5)), torch.randn(6, 12)
    losses = [loss_of(approx(x)) for _ in range(2)]
    losses[0].backward(retain_graph=True)
    once = [p.grad.clone() for p in approx.parameters()]
    losses[0].backward()
    torch.testing.assert_close([p.grad for p in approx.parameters()], [2 * grad for grad in once])
    losses[1].backward()
    assert all(grad.isfinite().all() for grad in tensors([p.grad for p in approx.parameters()]))


# ---- layers in parts that cannot be traced draw as the graph's do, and each call for itself


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.conv = nn.Linear(16, 16), nn.Linear(16, 16), nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.fc2(self.fc1(x).tanh()).tanh())


class UntracedPart(Part):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() == x.sum() else x


@pytest.mark.parametrize("mode", ["forward", "per_batch", "ema", "combined_straight"])
def test_a_part_that_is_not_traced_gives_what_the_graph_gives(mode: str) -> None:
    torch.manual_seed(0)
    untraced = nn.Sequential(nn.Linear(8, 16), UntracedPart(), nn.Linear(16, 4))
    traced = nn.Sequential(nn.Linear(8, 16), Part(), nn.Linear(16, 4))
    traced.load_state_dict(untraced.state_dict())
    x = torch.randn(6, 4, 8)
    with pytest.warns(fx_approx.errors.CaptureWarning, match="not traced"):
        swapped = fx_approx.transform(untraced, MODES[mode](0.5))
    assert same(steps(swapped, 3, x), steps(fx_approx.transform(traced, MODES[mode](0.5)), 3, x))


@made_of(lambda: {"fc": nn.Linear(32, 32)})
def Several(self: Any, *inputs: Tensor) -> list[Tensor]:
    """Calls a layer on each of several inputs, in Python that cannot be traced."""
    return [self.fc(x) for x in inputs] if inputs[0].sum() == inputs[0].sum() else []


@pytest.mark.filterwarnings("ignore::fx_approx.errors.CaptureWarning")
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_each_call_of_a_layer_that_is_not_traced_draws_for_itself(mode: str) -> None:
    """A sample shared by two calls is biased where one follows the other."""
    approx = transformed(Several(), MODES[mode](0.25), seed=3)
    x = torch.randn(4, 32)

    def run() -> list[Tensor]:
        inputs = [x.clone().requires_grad_() for _ in range(5)]
        outputs = approx(*inputs)
        sum(outputs).sum().backward()
        return list(outputs) if mode == "forward" else [one.grad for one in inputs if one.grad is not None]

    with fx_approx.reuse_selection(approx):
        found, again = run(), run()
    assert len(found) == 5 and same(found, again)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(found, 2))


def test_a_recomputed_part_that_calls_a_layer_several_times_is_refused() -> None:
    @made_of(lambda: {"inner": Several()})
    def Outer(self: Any, x: Tensor) -> Tensor:
        return sum(checkpoint(self.inner, x, x + 1, use_reentrant=False))  # type: ignore[return-value]

    with pytest.warns(fx_approx.errors.CaptureWarning, match="not traced"):
        approx = fx_approx.transform(Outer(), MODES["forward"](0.25))
    output = approx(torch.randn(4, 32))
    with pytest.raises(fx_approx.errors.RecomputationError, match="several times"):
        output.sum().backward()
