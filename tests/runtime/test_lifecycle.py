"""A transformed model in a training script: copies, checkpoints, dtypes, DDP, EMA, surgery, inputs of a wrong width."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fx_approx
from fx_approx._compat import FakeTensor
from fx_approx.policies import Uniform
from tests.helpers.models import ZOO, Cnn, Tied, loss_of, mlp, same, tensors, train_step
from tests.helpers.modules import made_of
from tests.helpers.quick import thinned

RANDOM = Uniform(0.5, "systematic", scores="online")
every_model = pytest.mark.parametrize("name", ZOO)


def transformed(model: nn.Module, policy: Any = RANDOM, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_approx.errors.CaptureWarning)
        return fx_approx.transform(model, policy, **options)


def quiet_eval(model: Any) -> Any:
    """``model.eval()``; BatchNorm statistics do not matter here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_approx.errors.BatchNormWarning)
        return model.eval()


def saved(value: Any, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def check_equal_and_independent(original: Any, twin: Any, x: Any) -> None:
    assert type(twin).__mro__[1:] == type(original).__mro__[1:]
    assert list(twin.state_dict()) == list(original.state_dict())
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in original.parameters()}
    assert fx_approx.sampler_state_dict(twin) == fx_approx.sampler_state_dict(original)
    for _ in range(2):
        assert same(train_step(twin, x), train_step(original, x))
    before = copy.deepcopy(original.state_dict())
    state = fx_approx.sampler_state_dict(original)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    twin(x)
    fx_approx.set_sampling(twin, 0.25)
    assert same(dict(original.state_dict()), dict(before))
    assert fx_approx.sampler_state_dict(original) == state
    selectors = original._fx_approx.selectors.values()
    assert {selector.spec.ratio for selector in selectors} == {0.5}
    quiet_eval(twin)  # pickling and copying lose no connection to the own training flags
    assert not any(selector.active for selector in twin._fx_approx.selectors.values())


def by_pickle(model: nn.Module) -> nn.Module:
    """Through a file, since torch refuses to pickle parametrised modules: those are copied."""
    if any(torch.nn.utils.parametrize.is_parametrized(module) for module in model.modules()):
        return copy.deepcopy(model)
    return saved(model, weights_only=False)


@pytest.mark.parametrize("name", thinned(ZOO))
def test_copies_and_pickles_are_equal_and_independent(name: str) -> None:
    build, inputs = ZOO[name]
    approx, x = transformed(build(), seed=7, selection_interval=2), inputs()
    train_step(approx, x)
    approx.zero_grad()
    twin = by_pickle(approx)
    check_equal_and_independent(approx, copy.deepcopy(approx), x)
    check_equal_and_independent(twin, by_pickle(twin), x)


def test_pickling_keeps_ratios_switches_and_flags() -> None:
    approx = fx_approx.transform(mlp(), RANDOM)
    fx_approx.set_sampling(approx, {"0": 0.25})
    fx_approx.set_sampling(approx, enabled={"2": False})
    approx[4].eval()
    twin = pickle.loads(pickle.dumps(approx))
    x = torch.randn(6, 12)
    assert same(train_step(twin, x), train_step(approx, x))
    assert fx_approx.report(twin)["0"].sample().ratio == 0.25
    assert fx_approx.report(twin)["2"].reason == "switched off"


def test_copies_share_what_the_passes_found_and_a_pickled_part_leaves_it_behind() -> None:
    approx = fx_approx.transform(mlp(), Uniform(0.5, scores="weight"), torch.randn(6, 12))
    found = approx._fx_approx.record.analysis
    assert found is not None and copy.deepcopy(approx)._fx_approx.record.analysis is found
    layer = pickle.loads(pickle.dumps(approx[0]))
    assert layer.site.source.record.analysis is None


@every_model
def test_state_dicts_load_in_both_directions(name: str) -> None:
    build, _ = ZOO[name]
    model, other = build(), build()
    approx = transformed(other)
    for source, target in ((model, approx), (approx, build())):
        state = saved(source.state_dict(), weights_only=True)
        assert target.load_state_dict(state, strict=True) == nn.modules.module._IncompatibleKeys([], [])
        assert same(dict(target.state_dict()), dict(source.state_dict()))


def optimizers() -> dict[str, Any]:
    return {
        "adam": lambda model: torch.optim.Adam(model.parameters(), 1e-2),
        "sgd": lambda model: torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9),
    }


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        torch.manual_seed(step)
        loss = loss_of(model(torch.randn(4, 3, 8, 8)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("kind", "to_approx"), [("adam", True), ("sgd", False)])
def test_an_optimizer_checkpoint_loads_across(kind: str, to_approx: bool) -> None:
    """Optimiser state is positional: with another order of parameters it would be assigned to the wrong ones."""
    make = optimizers()[kind]
    exact, approx = Cnn(), fx_approx.transform(Cnn(), Uniform(1.0, scores="online"))
    source, target = (exact, approx) if to_approx else (approx, exact)
    optimizer = make(source)
    train(source, optimizer, range(3))
    checkpoint = saved({"model": source.state_dict(), "optimizer": optimizer.state_dict()}, weights_only=True)
    loaded = make(target)
    target.load_state_dict(checkpoint["model"])
    loaded.load_state_dict(checkpoint["optimizer"])
    for (name, ours), (_, theirs) in zip(target.named_parameters(), source.named_parameters(), strict=True):
        assert same(dict(loaded.state.get(ours, {})), dict(optimizer.state.get(theirs, {}))), name
    assert train(target, loaded, range(3, 6)) == train(source, optimizer, range(3, 6))


@pytest.mark.parametrize(("use_buffers", "ema"), [(False, True), (True, False)])
def test_averaged_models(use_buffers: bool, ema: bool) -> None:
    model = Cnn()
    approx = fx_approx.transform(model, RANDOM, seed=3)
    optimizer = torch.optim.SGD(approx.parameters(), 1e-2)
    function = get_ema_multi_avg_fn(0.5) if ema else None
    averaged = AveragedModel(approx, multi_avg_fn=function, use_buffers=use_buffers)
    plain = AveragedModel(model, multi_avg_fn=function, use_buffers=use_buffers)
    for step in range(3):
        train(approx, optimizer, range(step, step + 1))
        averaged.update_parameters(approx)
        plain.update_parameters(approx)
    assert same(dict(averaged.state_dict()), dict(plain.state_dict()))
    assert fx_approx.sampler_state_dict(averaged) == {"step": 0, "selection_interval": 1, "seed": 3}
    assert fx_approx.sampler_state_dict(approx)["step"] == 3
    x = torch.randn(4, 3, 8, 8)
    quiet_eval(averaged.module)
    assert same(tensors(averaged(x)), tensors(plain.eval()(x)))


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_data_parallel_training() -> None:
    approx = fx_approx.transform(Cnn(), RANDOM)
    alone = copy.deepcopy(approx)
    wrapped = DistributedDataParallel(approx, find_unused_parameters=True)
    assert [name for name, _ in wrapped.module.named_buffers()] == [name for name, _ in alone.named_buffers()]
    first, second = (torch.optim.SGD(model.parameters(), 1e-2) for model in (wrapped, alone))
    assert train(wrapped, first, range(3)) == train(alone, second, range(3))
    assert fx_approx.sampler_state_dict(wrapped) == fx_approx.sampler_state_dict(alone)
    assert same(dict(wrapped.module.state_dict()), dict(alone.state_dict()))
    assert fx_approx.report(wrapped).totals.saved > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_changes_keep_the_random_state(dtype: torch.dtype) -> None:
    approx = fx_approx.transform(mlp(), RANDOM, seed=2**62 + 1)
    x = torch.randn(6, 12)
    approx(x)
    state = fx_approx.sampler_state_dict(approx)
    approx.to(dtype)
    assert fx_approx.sampler_state_dict(approx) == state
    output = approx(x.to(dtype))
    assert output.dtype == dtype
    loss_of(output).backward()
    assert fx_approx.sampler_state_dict(approx) == {**state, "step": 2}
    approx.half().double().float().to("cpu")
    assert fx_approx.sampler_state_dict(approx)["seed"] == 2**62 + 1
    assert approx(x).dtype == torch.float32


def test_converting_a_copy_is_what_converting_the_model_is() -> None:
    model, x = mlp(), torch.randn(6, 12, dtype=torch.float64)
    late = fx_approx.transform(copy.deepcopy(model), RANDOM).double()
    early = fx_approx.transform(model.double(), RANDOM)
    assert same(train_step(late, x), train_step(early, x))


def test_a_half_cast_of_a_model_that_counts_steps() -> None:
    approx = fx_approx.transform(Cnn(), RANDOM)
    fx_approx.load_sampler_state_dict(approx, {"step": 123_457, "selection_interval": 1, "seed": 0})
    approx.half()
    assert fx_approx.sampler_state_dict(approx)["step"] == 123_457, "float16 would give 65504 or inf"


def test_share_memory_and_type_and_zero_grad_work() -> None:
    approx = fx_approx.transform(mlp(), RANDOM)
    approx.share_memory()
    approx.type(torch.float64)
    approx.requires_grad_(False)
    approx.zero_grad()
    assert not approx(torch.randn(6, 12, dtype=torch.float64)).requires_grad


def test_loading_with_assign_keeps_sampling() -> None:
    approx = fx_approx.transform(mlp(), Uniform(0.5, scores="online"))
    x = torch.randn(6, 12)
    fresh = mlp()
    approx.load_state_dict(fresh.state_dict(), assign=True)
    assert torch.equal(approx(x), fx_approx.transform(fresh, Uniform(0.5, scores="online"))(x))


def test_tied_weights_survive_training_and_checkpoints() -> None:
    model = Tied()
    approx = fx_approx.transform(model, RANDOM)
    optimizer = torch.optim.Adam(approx.parameters(), 1e-2)
    tokens = torch.randint(10, (6, 3))
    train_step(approx, tokens)
    optimizer.step()
    twin = saved(approx, weights_only=False)
    assert twin.decoder.weight is twin.embedding.weight
    assert torch.equal(twin.decoder.weight, model.embedding.weight)


def test_training_reaches_the_users_model() -> None:
    model = mlp()
    approx = fx_approx.transform(model, RANDOM)
    before: list[Tensor] = [p.detach().clone() for p in model.parameters()]
    train_step(approx, torch.randn(6, 12))
    torch.optim.SGD(approx.parameters(), 1e-2).step()
    assert not same(before, list(model.parameters()))


# ---- changes after the transform, fused roots, user hooks and overlapping globs


HALF = Uniform(0.5, scores="online")


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8))


def test_a_layer_replaced_after_restore_and_transformed_again_is_sampled() -> None:
    model = fx_approx.restore(fx_approx.transform(chain(), HALF))
    model[1][0] = nn.Linear(8, 8)
    again = fx_approx.transform(model, HALF)
    again(torch.randn(2, 8)).sum().backward()
    assert (model[1][0].weight.grad.abs().sum(0) == 0).sum() == 4


def test_a_type_error_of_the_users_own_is_not_hidden() -> None:
    approx = fx_approx.transform(chain(), HALF)
    with pytest.raises(TypeError, match="linear"):
        approx.eval()("no tensor")


@pytest.mark.parametrize(
    ("layer", "needs_grad"),
    [
        (nn.LSTM(16, 32, 2, bidirectional=True), False),
        (nn.LSTM(16, 32, 2, batch_first=True), True),
        (nn.GRU(16, 32), True),
    ],
)
def test_a_recurrent_layer_alone_is_reported_with_its_operations(layer: nn.RNNBase, needs_grad: bool) -> None:
    """Torch's counter sees them all in float64, but not the LSTM in float32."""
    counts = []
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(5, 3, 16, dtype=dtype, requires_grad=needs_grad)
        (row,) = fx_approx.explain(layer.to(dtype), HALF, x).report.rows
        assert "recurrent" in row.reason
        counts.append(row.exact)
    weights = sum(p.numel() for p in layer.parameters() if p.dim() > 1)
    assert counts[0] == counts[1] and counts[0].output == 2 * 5 * 3 * weights


def test_shape_propagation_runs_no_hook_of_the_user() -> None:
    seen: list[torch.Tensor] = []
    model = chain()
    model[1].register_forward_hook(lambda module, args, output: seen.append(output))
    with pytest.warns(fx_approx.errors.CaptureWarning, match="has hooks"):
        approx = fx_approx.transform(model, HALF, torch.randn(2, 8))
    assert seen == []
    assert fx_approx.report(approx)["1.0"].exact is not None
    approx(torch.randn(2, 8))
    assert len(seen) == 1


def test_shape_propagation_leaves_no_tensor_behind() -> None:
    """Not even a result that autograd keeps for its own backward, which no garbage collection finds: that of a ReLU."""

    def alive() -> int:
        gc.collect()
        return sum(type(one) is FakeTensor for one in gc.get_objects())

    before = alive()
    fx_approx.transform(mlp(), HALF, torch.randn(2, 12))
    assert alive() <= before


def test_a_model_that_needs_its_hooks_to_run_has_unknown_shapes() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(16, 4))
    model[1].register_forward_pre_hook(lambda module, args: (torch.cat((args[0], args[0]), -1),))
    with pytest.warns(fx_approx.errors.CaptureWarning, match="without the hooks of 1"):
        approx = fx_approx.transform(model, HALF, torch.randn(2, 8))
    assert approx(torch.randn(2, 8)).shape == (2, 4)


def test_the_first_matching_glob_decides_the_ratio() -> None:
    approx = fx_approx.transform(chain(), HALF, torch.randn(2, 8))
    fx_approx.set_sampling(approx, {"0": 0.25, "*": 0.75})
    assert [row.sample().k for row in fx_approx.report(approx).rows] == [2, 6, 6]
    fx_approx.set_sampling(approx, {"*": 0.75, "0": 0.25})
    assert [row.sample().k for row in fx_approx.report(approx).rows] == [6, 6, 6]


# ---- an input of a wrong width raises what the exact model raises, in training too


@made_of(lambda: {"first": nn.Linear(6, 16), "second": nn.Linear(16, 3)})
def Functional(self: Any, x: Tensor) -> Tensor:
    hidden = F.linear(x, self.first.weight, self.first.bias).relu()
    return F.linear(hidden, self.second.weight, self.second.bias)


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...], list[tuple[int, ...]]]]:
    """Model, shape of its inputs, wrong shapes."""
    tail = (nn.ReLU(), nn.Linear(16, 3))
    last = (nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2))
    wide, deep = [(4, 9), (4, 5)], [(2, 6, 9, 9), (2, 2, 9, 9)]
    return {
        "linear": (nn.Sequential(nn.Linear(6, 16), *tail), (4, 6), wide),
        "behind an activation": (nn.Sequential(nn.Tanh(), nn.Linear(6, 16), *tail), (4, 6), wide),
        "normalised": (nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 16), *tail), (4, 6), wide),
        "functional": (Functional(), (4, 6), wide),
        "convolution": (nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), *last), (2, 4, 9, 9), deep),
        "grouped": (nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), *last), (2, 4, 9, 9), deep),
        "flattened": (
            nn.Sequential(nn.Flatten(), nn.Linear(64, 16), *tail),
            (2, 1, 8, 8),
            [(2, 1, 9, 9), (2, 1, 7, 7)],
        ),
        "features": (
            nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5)),
            (2, 4, 5, 5),
            [(2, 4, 6, 6), (2, 4, 4, 4)],
        ),
    }


@pytest.mark.parametrize("name", thinned(networks()))
def test_the_error_is_that_of_the_exact_model(name: str) -> None:
    model, right, wrong = networks()[name]
    for scores, scope, demand in (("online", "layer", True), ("weight", "layer", False), ("weight", "value", True)):
        policy = Uniform(0.5, scores=scores, scope=scope)
        approx = fx_approx.transform(model, policy, torch.randn(right), prune_unread=demand)
        for shape in wrong:
            x = torch.randn(shape)
            with pytest.raises(RuntimeError) as expected:
                model(x)
            with pytest.raises(type(expected.value)) as found:
                approx(x)
            assert str(found.value) == str(expected.value)
        assert approx(torch.randn(right)).shape == model(torch.randn(right)).shape


@pytest.mark.slow
def test_compiled_code_raises_an_error_too() -> None:
    approx = fx_approx.transform(networks()["linear"][0], Uniform(0.5), torch.randn(4, 6))
    compiled = torch.compile(approx, fullgraph=True, backend="eager")
    compiled(torch.randn(4, 6))
    for width in (9, 5):
        with pytest.raises(RuntimeError):
            compiled(torch.randn(4, width))
