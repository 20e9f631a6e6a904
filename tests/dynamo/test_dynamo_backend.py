"""The Dynamo frontend: the samples of the transform, guards on modules and modes, graph breaks, lifetimes."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fx_approx
from fx_approx import SamplerConfig
from fx_approx._compat import retraces_autocast
from fx_approx.policies import GradientSampling, Override, Paper, Uniform
from tests.helpers.modules import made_of
from tests.helpers.quick import thinned

VALUE = Uniform(0.5)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


@made_of(lambda: {"fc1": nn.Linear(32, 64), "fc2": nn.Linear(64, 64), "fc3": nn.Linear(64, 32)})
def Block(self: Any, x: Tensor) -> Tensor:
    return self.fc3(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(16), nn.BatchNorm2d(24)
        self.conv = nn.Conv2d(16, 24, 3, stride=2)
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.stem(x)))
        x = torch.relu(self.bn2(self.conv(x)))
        result: Tensor = self.fc(x.mean((2, 3)))
        return result


def gradients(model: nn.Module, call: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
    model.zero_grad()
    call(*inputs).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def sampled_inputs(layer: nn.Linear) -> int:
    """How many input features the gradient of a layer's weight has reached."""
    assert layer.weight.grad is not None
    return int((layer.weight.grad != 0).any(0).sum())


@pytest.mark.parametrize(
    "policy", [Uniform(0.5, "systematic", scope="group"), pytest.param(Paper(0.5), marks=pytest.mark.slow)]
)
def test_samples_gradients_and_statistics_are_those_of_the_transform(policy: Any) -> None:
    model = ConvNet()
    twin = copy.deepcopy(model)
    x = torch.randn(4, 3, 12, 12)
    compiled = torch.compile(model, backend=fx_approx.backend(policy, inner="aot_eager", seed=5), fullgraph=True)
    approx = fx_approx.transform(twin, policy, x, seed=5)
    for _ in range(3):
        ours, theirs = gradients(model, compiled, x), gradients(approx, approx, x)
        torch.testing.assert_close(ours, theirs)
        assert [(g == 0).tolist() for g in ours] == [(g == 0).tolist() for g in theirs]
    torch.testing.assert_close(dict(model.state_dict()), dict(approx.state_dict()))


def test_the_report_is_that_of_the_transform() -> None:
    model, x = ConvNet(), torch.randn(4, 3, 12, 12)
    approx = fx_approx.transform(copy.deepcopy(model), VALUE, x)
    backend = fx_approx.backend(VALUE, inner="eager")
    with pytest.raises(ValueError, match="run a training step first"):
        backend.report()
    explained = backend.explain(model, x)
    gradients(model, torch.compile(model, backend=backend), x)
    report, expected = backend.report(), fx_approx.report(approx)
    assert report.model == "ConvNet"
    assert [row.name for row in report.rows] == ["stem", "conv", "fc"]
    assert report.totals == expected.totals == explained.report.totals
    assert "conv" in str(report)


def test_explaining_changes_nothing() -> None:
    model, x = ConvNet(), torch.randn(4, 3, 12, 12)
    model.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    plan = fx_approx.backend(VALUE).explain(model, x).plan
    assert [decision.name for decision in plan.sampled] == ["stem", "conv", "fc"]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training and not model.conv.training


def test_ratio_one_gives_the_inner_backend_the_very_graph() -> None:
    model, x = ConvNet(), torch.randn(4, 3, 12, 12)
    twin = copy.deepcopy(model)
    graphs: list[list[tuple[str, str]]] = []

    def inner(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append([(node.op, str(node.target)) for node in gm.graph.nodes if node.op != "placeholder"])
        compiled: Callable[..., Any] = torch._dynamo.lookup_backend("aot_eager")(gm, example_inputs)
        return compiled

    compiled = torch.compile(model, backend=fx_approx.backend(Uniform(1.0, scores="online"), inner=inner))
    exact = torch.compile(twin, backend=inner)
    assert all(map(torch.equal, gradients(model, compiled, x), gradients(twin, exact, x)))
    assert len(graphs) == 2 and graphs[0] == graphs[1]


def test_evaluation_is_exact_and_each_mode_compiles_once() -> None:
    model, x = Block(), torch.randn(4, 32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=fx_approx.backend(VALUE, inner=counter))
    counts = []
    for mode in (True, False, True, False):
        model.train(mode)
        for _ in range(2):
            gradients(model, compiled, x)
        assert sampled_inputs(model.fc3) == (32 if mode else 64)
        counts.append(counter.frame_count)
        if not mode:
            assert torch.equal(compiled(x), model(x))
    assert counts == [1, 2, 2, 2]


def test_a_layer_in_evaluation_mode_is_exact() -> None:
    model, x = Block(), torch.randn(16, 32)
    backend = fx_approx.backend(Uniform(0.5, scope="layer"), inner="eager")
    compiled = torch.compile(model, backend=backend)
    gradients(model, compiled, x)
    assert (sampled_inputs(model.fc2), sampled_inputs(model.fc3)) == (32, 32)
    model.fc2.eval()
    gradients(model, compiled, x)
    assert sampled_inputs(model.fc3) == 32 < sampled_inputs(model.fc2)


@torch._dynamo.config.patch(recompile_limit=2)
def test_more_instances_of_a_class_than_the_recompile_limit_are_each_sampled_by_themselves() -> None:
    blocks = [Block() for _ in range(4)]
    backend = fx_approx.backend(Uniform(0.5, "systematic", scores="uniform", scope="layer"), inner="eager")
    for block in blocks:
        block.compile(backend=backend)
    x = torch.randn(4, 32)
    chosen = set()
    for _ in range(2):
        for block in blocks:
            gradients(block, block, x)
            assert block.fc1.weight.grad is not None
            assert sampled_inputs(block.fc1) == 16
            chosen.add(tuple((block.fc1.weight.grad != 0).any(0).tolist()))
    assert len(backend.pieces) == len(blocks)
    assert len(chosen) == 2 * len(blocks), "blocks share samples"


@made_of(lambda: {"first": Block(), "second": Block()})
def Broken(self: Any, x: Tensor) -> Tensor:
    x = self.first(x)
    torch._dynamo.graph_break()
    return self.second(x)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # Dynamo, of what it resumes with
def test_each_graph_of_a_broken_model_is_rewritten_and_demand_stops_between() -> None:
    model, x = Broken(), torch.randn(4, 32)
    backend = fx_approx.backend(VALUE, inner="eager")
    explained = backend.explain(model, x)
    ours = gradients(model, torch.compile(model, backend=backend), x)
    assert len(backend.pieces) == 2
    report = backend.report()
    names = [f"{part}.{layer}" for part in ("first", "second") for layer in ("fc1", "fc2", "fc3")]
    assert [row.name for row in report.rows] == names == [decision.name for decision in explained.plan]
    assert report["first.fc2"].demanded > 0 and report["first.fc3"].demanded == 0
    # A plan for the whole serves both.
    torch._dynamo.reset()
    again = fx_approx.backend(explained.plan.edit("second.fc2", None), inner="eager")
    theirs = gradients(model, torch.compile(model, backend=again), x)
    assert [row.name for row in again.report().rows if not row.samples] == ["second.fc2"]
    assert not all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.slow)])
def test_batches_of_any_size_share_one_graph(dynamic: bool | None) -> None:
    model, twin = Block(), Block()
    twin.load_state_dict(model.state_dict())
    policy = Uniform(0.5, "systematic", scores="uniform")
    backend = fx_approx.backend(policy, inner="aot_eager" if dynamic else "eager")
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    approx = fx_approx.transform(twin, policy, torch.randn(4, 32))
    for size in (4, 8, 5):
        x = torch.randn(size, 32)
        torch.testing.assert_close(gradients(model, compiled, x), gradients(approx, approx, x))
    assert len(backend.pieces) == (1 if dynamic else 2)


EMA_FORWARD = Uniform(0.5, scores="ema")
EMA_BACKWARD = GradientSampling(grad_weight=SamplerConfig("topk", 0.5, scores="ema"))


@pytest.mark.parametrize(("policy", "inner"), thinned([(EMA_FORWARD, "eager"), (EMA_BACKWARD, "aot_eager")]))
def test_scores_that_learn_begin_with_a_step_that_is_not_compiled(policy: Any, inner: str) -> None:
    model, twin = Block(), Block()
    twin.load_state_dict(model.state_dict())
    counter = CompileCounterWithBackend(inner)
    backend = fx_approx.backend(policy, inner=counter)
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(8, 32)
    approx = fx_approx.transform(twin, policy, x)
    for number in range(3):
        torch.testing.assert_close(gradients(model, compiled, x), gradients(approx, approx, x))
        assert (counter.frame_count > 0) == (number > 0)
    x = torch.randn(4, 32)  # another shape goes on with what was learnt
    torch.testing.assert_close(gradients(model, compiled, x), gradients(approx, approx, x))
    assert len(backend.pieces) == 2


def test_parameters_put_in_later_are_used() -> None:
    model, x = Block(), torch.randn(4, 32)
    compiled = torch.compile(model, backend=fx_approx.backend(VALUE, inner="eager"))
    gradients(model, compiled, x)
    model.fc2.weight = nn.Parameter(torch.randn(64, 64))
    approx = fx_approx.transform(copy.deepcopy(model), VALUE, x)
    torch.testing.assert_close(gradients(model, compiled, x), gradients(approx, approx, x))


class Stored(nn.Module):
    """A layer that stores its weight ``[inputs, outputs]``."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(layer.weight.detach().t().contiguous()), nn.Parameter(layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


@pytest.mark.parametrize("inner", thinned(["eager", "aot_eager"]))
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_weight_stored_transposed_is_that_of_a_linear_layer(inner: str) -> None:
    twin, x = Block(), torch.randn(4, 32)
    model = copy.deepcopy(twin)
    for name, layer in twin.named_children():
        setattr(model, name, Stored(layer))
    backend = fx_approx.backend(VALUE, inner=inner)
    compiled, approx = torch.compile(model, backend=backend), fx_approx.transform(twin, VALUE, x)
    for _ in range(3):
        ours, theirs = gradients(model, compiled, x), gradients(approx, approx, x)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other.t() if other.dim() == 2 else other)
        with torch.no_grad():
            for one, other in zip(model.parameters(), approx.parameters(), strict=True):
                step = torch.randn_like(other)
                other.add_(step)
                one.add_(step.t() if step.dim() == 2 else step)
    assert backend.report()["fc2"].demanded == fx_approx.report(approx)["fc2"].demanded > 0
    model.fc2.weight = nn.Parameter(approx.fc2.weight.detach().flip(0).t().contiguous())
    with torch.no_grad():
        approx.fc2.weight.copy_(approx.fc2.weight.flip(0))
    torch.testing.assert_close(gradients(model, compiled, x)[2], gradients(approx, approx, x)[2].t())


def test_a_stored_weight_that_is_read_twice_stays_as_it_is() -> None:
    class Decayed(Stored):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.weight.square().sum()

    model, x = Decayed(nn.Linear(32, 8)), torch.randn(4, 32)
    backend = fx_approx.backend(VALUE, inner="eager")
    gradients(model, torch.compile(model, backend=backend), x)
    assert backend.report()["addmm"].samples


def test_nothing_is_kept_of_a_model_that_is_gone() -> None:
    backend = fx_approx.backend(VALUE, inner="eager")

    def step() -> weakref.ref[Tensor]:
        model = Block()
        gradients(model, torch.compile(model, backend=backend), torch.randn(4, 32))
        return weakref.ref(model.fc1.weight)

    parameter = step()
    gc.collect()
    assert parameter() is None
    assert backend.pieces == ()


def test_switches_take_the_pieces() -> None:
    model, x = Block(), torch.randn(4, 32)
    backend = fx_approx.backend(VALUE, inner="eager", seed=3)
    compiled = torch.compile(model, backend=backend)
    gradients(model, compiled, x)
    (piece,) = backend.pieces
    fx_approx.set_sampling(piece, 0.25)
    gradients(model, compiled, x)
    assert sampled_inputs(model.fc3) == 16
    assert fx_approx.sampler_state_dict(piece)["seed"] == 3
    with pytest.raises(TypeError, match="cannot be pickled"):
        copy.copy(piece).__reduce_ex__(2)


def test_a_function_of_two_modules_names_both_and_leaves_its_own_products_exact() -> None:
    body, head = Block(), nn.Linear(32, 8)
    backend = fx_approx.backend(VALUE, inner="eager")

    @torch.compile(backend=backend, fullgraph=True)
    def loss(body: nn.Module, head: nn.Module, x: Tensor) -> Tensor:
        y = head(body(x))
        return (y @ y.T).sum()

    loss(body, head, torch.randn(4, 32)).backward()
    report = backend.report()
    assert [row.name for row in report.rows] == ["body.fc1", "body.fc2", "body.fc3", "head", "matmul"]
    assert "outside any module" in report["matmul"].reason
    assert sampled_inputs(head) == 16


@made_of(lambda: {"low": Block(), "high": Block(), "seen": None})
def Switching(self: Any, x: Tensor) -> Tensor:
    """Autocast and no_grad inside the forward, which Dynamo writes as calls that switch the mode."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = self.low(x)
    with torch.no_grad():
        size = y.float().abs().amax(1, keepdim=True)
    return self.high(y.float() / size)


@pytest.mark.parametrize("inner", thinned(["eager", "aot_eager"]))
def test_modes_inside_the_forward_are_kept(inner: str) -> None:
    model, x = Switching(), torch.randn(4, 32)
    found = []
    if inner != "eager" and not retraces_autocast():
        backend = fx_approx.backend(VALUE, inner=inner)
        with pytest.warns(fx_approx.errors.CaptureWarning, match="stays exact: autocast inside the forward"):
            exact = gradients(model, torch.compile(model, backend=backend, fullgraph=True), x)
        torch.testing.assert_close(exact, gradients(model, model, x), rtol=0.02, atol=1e-3)
        return
    for demand in (True, False):
        torch._dynamo.reset()
        backend = fx_approx.backend(VALUE, inner=inner, prune_unread=demand)
        found.append(gradients(model, torch.compile(model, backend=backend, fullgraph=True), x))
        assert sampled_inputs(model.low.fc2) == sampled_inputs(model.high.fc2) == 32
    torch.testing.assert_close(*found, rtol=0.02, atol=1e-3)


class Attending(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=batch_first)
        self.cross = nn.MultiheadAttention(32, 4, kdim=16, vdim=16, batch_first=batch_first)
        self.last = nn.Linear(32, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        attended, _ = self.cross(self.layer(x), y, y, need_weights=False)
        result: Tensor = self.last(attended)
        return result


@pytest.mark.parametrize("batch_first", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_attention_of_torch_is_taken_apart_and_whole_heads_are_left_out(batch_first: bool) -> None:
    model = Attending(batch_first).double()
    x, y = torch.randn(3, 5, 32).double(), torch.randn(3, 5, 16).double()
    found = []
    for demand in (False, True):
        torch._dynamo.reset()
        backend = fx_approx.backend(VALUE, inner="eager", prune_unread=demand)
        found.append(gradients(model, torch.compile(model, backend=backend, fullgraph=True), x, y))
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)
    report = backend.report()
    assert report["layer.self_attn.linear"].demanded > 0
    assert report["cross.out_proj"].samples[0].unit == 8
    # With all heads kept the parts are the exact layer.
    torch._dynamo.reset()
    ratio = fx_approx.backend(Override({"last": VALUE}, Uniform(1.0, scores="online")), inner="eager")
    compiled = torch.compile(model, backend=ratio)
    model.last.eval()
    found = [gradients(model, compiled, x, y), gradients(model, model, x, y)]
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


# ---- what is refused, and when


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"inner": "inductr"}, ValueError, "inner: no backend 'inductr'; there are: .*inductor"),
        ({"inner": 3}, TypeError, "inner: expected the name of a backend or a callable, got 3"),
        ({"policy": 0.5}, TypeError, "policy: expected a policy such as"),
        ({"prune_unread": "yes"}, TypeError, "prune_unread: expected True or False, got 'yes'"),
        ({"seed": 0.5}, TypeError, "seed: expected an integer"),
        ({"selection_interval": 0}, ValueError, "selection_interval: expected an integer from 1"),
        ({"mode": "fastest"}, RuntimeError, "mode"),
    ],
)
def test_bad_arguments_are_refused_at_construction(arguments: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        fx_approx.backend(**arguments)


def test_a_call_by_hand_is_a_clear_error() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    gm.graph.call_function(torch.nn.functional.linear)
    with pytest.raises(
        fx_approx.errors.CaptureError, match=r"torch\.compile\(model, backend=fx_approx\.backend\(policy\)\)"
    ):
        fx_approx.backend(VALUE)(gm, [])


def test_a_rule_may_be_a_function_of_name_and_module() -> None:
    model, seen = Block(), {}

    def square(name: str, module: nn.Module) -> bool:
        seen[name] = module
        return module.in_features == module.out_features

    def never(name: str, module: nn.Module) -> bool:
        return False

    rules = {square: Uniform(0.25, scores="online"), never: VALUE}
    backend = fx_approx.backend(Override(rules, Uniform(0.5, scores="online")), inner="eager")
    torch.compile(model, backend=backend)(torch.randn(4, 32))
    assert seen == {"fc1": model.fc1, "fc2": model.fc2, "fc3": model.fc3}
    report = backend.report()
    assert [row.samples[0].k for row in report.rows] == [16, 16, 32]
    assert any("matches the rule" in note and "never" in note for note in report.notes)


def test_a_rule_that_no_graph_has_a_layer_for_is_in_the_report() -> None:
    model = Block()
    backend = fx_approx.backend(
        Override({"nowhere": VALUE, "fc2": Uniform(0.25, scores="online")}, VALUE), inner="eager"
    )
    torch.compile(model, backend=backend)(torch.randn(4, 32))
    notes = backend.report().notes
    assert any("'nowhere'" in note for note in notes) and not any("'fc2'" in note for note in notes)
