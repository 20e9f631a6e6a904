"""What each name of ``fx_approx._compat`` is relied on for: where torch has changed it, the test of that name fails."""

from __future__ import annotations

import ast
import copy
import inspect
import logging
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fx_approx import _compat

from . import test_compat_dynamo


def names_of_torch() -> set[str]:
    """What the module defines, and what it imports from torch's private parts."""
    found = set()
    for node in ast.parse(inspect.getsource(_compat)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.ImportFrom) and "._" in f"{node.module}.{'.'.join(a.name for a in node.names)}":
            found |= {alias.asname or alias.name for alias in node.names}
    return {name for name in found if not name.startswith("_")}


def test_every_name_has_a_test() -> None:
    tested = {name.removeprefix("test_") for name in {*globals(), *vars(test_compat_dynamo)}}
    assert names_of_torch() - tested == set()
    assert names_of_torch() - set(_compat.__all__) == set()


# ---- values in nested containers


def test_tree_leaves() -> None:
    assert _compat.tree_leaves(({"b": 1, "a": [2, None]}, (), 3)) == [1, 2, None, 3]


def test_tree_map() -> None:
    found = _compat.tree_map(len, {"a": ["xx"], "b": ("y",)}, is_leaf=lambda one: isinstance(one, tuple))
    assert found == {"a": [2], "b": 1}


def test_tree_map_only() -> None:
    assert _compat.tree_map_only(int, lambda n: n + 1, {"a": [1, "x"], "b": (2.5,)}) == {"a": [2, "x"], "b": (2.5,)}


# ---- modules


def test_HOOKS() -> None:
    layer = nn.Linear(2, 2)
    register = {
        "_forward_hooks": layer.register_forward_hook,
        "_forward_pre_hooks": layer.register_forward_pre_hook,
        "_backward_hooks": layer.register_full_backward_hook,
        "_backward_pre_hooks": layer.register_full_backward_pre_hook,
    }
    assert set(_compat.HOOKS) == set(register)
    for name in _compat.HOOKS:
        assert not getattr(layer, name), f"{name}: not empty before a hook is registered"
        handle = register[name](lambda *_: None)
        assert len(getattr(layer, name)) == 1, f"{name}: a hook was registered elsewhere"
        handle.remove()


def test_MEMBERS() -> None:
    model = nn.Module()
    model.inner = nn.Linear(1, 1)
    model.register_buffer("count", torch.zeros(1))
    assert [list(vars(model)[name]) for name in _compat.MEMBERS] == [[], ["count"], ["inner"]]
    assert set(vars(nn.Linear(1, 1))["_parameters"]) == {"weight", "bias"}


def test_TENSOR_STATE() -> None:
    missing = [name for name in _compat.TENSOR_STATE if not hasattr(torch.ones(1), name)]
    assert missing == []


def test_CALLS() -> None:
    names: list[str] = []

    class Watched(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            frame = inspect.currentframe()
            while frame is not None and frame.f_code is not test_CALLS.__code__:
                names.append(frame.f_code.co_name)
                frame = frame.f_back
            return input

    Watched(1, 1)(torch.ones(1))
    assert names[0] == "forward" and set(names[1:]) == set(_compat.CALLS)


def test_TorchDispatchMode() -> None:
    seen: list[object] = []

    class Noting(_compat.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Noting():
        nn.functional.linear(torch.ones(1, 2), torch.ones(3, 2, requires_grad=True), torch.ones(3))
    assert torch.ops.aten.addmm.default in seen, seen


def test_TENSOR_CONSTANT() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.ones(3)

    root = Constant()
    tracer = fx.Tracer()
    tracer.trace(root)
    names = [name for name, value in vars(root).items() if isinstance(value, Tensor)]
    assert len(names) == 1 and names[0].startswith(_compat.TENSOR_CONSTANT)


def test_parameters_of() -> None:
    layer = nn.Linear(2, 3)
    own = _compat.parameters_of(layer)
    assert list(own) == ["weight", "bias"] and own["weight"] is layer.weight
    own["weight"] = plain = torch.zeros(3, 2)
    assert layer.weight is plain, "a tensor in the dictionary is not what the attribute gives"
    assert _compat.parameters_of(nn.Linear(2, 3, bias=False))["bias"] is None


def test_buffers_of() -> None:
    layer = nn.BatchNorm1d(3)
    own = _compat.buffers_of(layer)
    assert list(own) == ["running_mean", "running_var", "num_batches_tracked"]
    own["running_mean"] = other = torch.ones(3)
    assert layer.running_mean is other
    assert _compat.buffers_of(nn.BatchNorm1d(3, track_running_stats=False))["running_mean"] is None


def test_children_of() -> None:
    model = nn.Sequential(nn.ReLU())
    own = _compat.children_of(model)
    own["0"] = other = nn.Tanh()
    assert model[0] is other
    model.register_module("1", None)
    assert own == {"0": other, "1": None}


def test_set_parameters() -> None:
    layer = nn.Linear(2, 2)
    twin = copy.copy(layer)
    _compat.set_parameters(twin, {"weight": torch.zeros(2, 2), "bias": None})
    assert twin(torch.ones(1, 2)).tolist() == [[0.0, 0.0]]
    assert isinstance(layer.weight, nn.Parameter) and layer.bias is not None


def test_take_apart() -> None:
    model = nn.BatchNorm1d(2)
    model.add_module("child", nn.ReLU())
    twin = type(model).__new__(type(model))
    vars(twin).update(vars(model))
    _compat.take_apart(twin, model)
    assert list(twin.parameters()) == list(model.parameters()) and not list(twin.children())
    twin.register_parameter("weight", None)
    twin.register_buffer("running_mean", None)
    assert model.weight is not None and model.running_mean is not None and model.child is not None


def test_Moved() -> None:
    calls: list[torch.dtype] = []

    class Told(_compat.Moved):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def _fx_approx_move(self, fn: Callable[[Tensor], Tensor], usual: Callable[[], object]) -> None:
            calls.append(fn(torch.zeros(1)).dtype)
            usual()

    told = Told()
    outer = nn.Sequential(told)
    assert outer.double() is outer and told.half() is told and calls == [torch.float64, torch.float16]
    assert told.inner.weight.dtype == torch.float16
    assert _compat.Moved().to(torch.float64).training


def test_is_profiling() -> None:
    assert not _compat.is_profiling()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert _compat.is_profiling()
    with torch.autograd.profiler.profile():
        assert _compat.is_profiling()
    assert not _compat.is_profiling()


def test_is_compiled() -> None:
    layer = nn.Linear(2, 2)
    assert not _compat.is_compiled(layer)
    assert _compat.is_compiled(torch.compile(layer, backend="eager"))
    layer.compile(backend="eager")
    assert _compat.is_compiled(layer), "module.compile() leaves another mark"


def test_forget_compiled() -> None:
    layer = nn.Linear(2, 2)
    layer.compile(backend="eager")
    _compat.forget_compiled(layer)
    assert not _compat.is_compiled(layer)


def test_uncompiled() -> None:
    layer = nn.Linear(2, 2)
    assert _compat.uncompiled(torch.compile(layer, backend="eager")) is layer
    assert _compat.uncompiled(layer) is None


def test_ONE_PROJECTION() -> None:
    assert vars(nn.MultiheadAttention(4, 2))[_compat.ONE_PROJECTION] is True


def test_has_one_projection() -> None:
    one, three = nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2, kdim=3)
    assert _compat.has_one_projection(one) and one.in_proj_weight is not None
    assert not _compat.has_one_projection(three) and three.in_proj_weight is None


def test_check_input_dim() -> None:
    _compat.check_input_dim(nn.BatchNorm2d(3), torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match="expected 4D input"):
        _compat.check_input_dim(nn.BatchNorm2d(3), torch.zeros(1, 3, 2))


def test_BatchNormBase() -> None:
    for layer in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        assert issubclass(layer, _compat.BatchNormBase), layer
    assert not issubclass(nn.InstanceNorm2d, _compat.BatchNormBase)


def test_InstanceNormBase() -> None:
    for layer in (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d):
        assert issubclass(layer, _compat.InstanceNormBase), layer


def test_TransposedBase() -> None:
    for layer in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
        assert issubclass(layer, _compat.TransposedBase), layer
    assert not issubclass(nn.Conv2d, _compat.TransposedBase)


def test_fused_attention() -> None:
    forward, backward = _compat.fused_attention()
    assert len(forward) >= 4 and len(backward) >= 4
    for operator, names in ((forward, ["query", "key", "value"]), (backward, ["query", "key", "value"])):
        for packet in operator:
            arguments = [one.name for one in packet.default._schema.arguments]
            first = 0 if operator is forward else 1
            assert arguments[first : first + 3] == names, packet


def test_ConvolutionBase() -> None:
    for layer in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        assert issubclass(layer, _compat.ConvolutionBase), layer


def test_DropoutBase() -> None:
    for layer in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout):
        assert issubclass(layer, _compat.DropoutBase), layer


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_convolve(mode: Any) -> None:
    layer = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2, padding_mode=mode)
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(_compat.convolve(layer, x, layer.weight, layer.bias), layer(x))
    assert torch.equal(_compat.convolve(layer, x, layer.weight * 0, None), torch.zeros(1, 4, 3, 3))


def test_padding_of() -> None:
    layer = nn.Conv2d(1, 1, 3, padding=(1, 2), padding_mode="reflect")
    assert list(_compat.padding_of(layer)) == [2, 2, 1, 1]


# ---- tensors


def test_version_of() -> None:
    x = torch.zeros(2)
    before = _compat.version_of(x)
    x.add_(1)
    x[:1].mul_(2)
    assert _compat.version_of(x) == before + 2
    with torch.inference_mode():
        unversioned = torch.zeros(2)
    with pytest.raises(RuntimeError, match="do not track version"):
        _compat.version_of(unversioned)


def test_storage_key() -> None:
    for mode in (torch.no_grad(), _compat.FakeTensorMode()):
        with mode:
            x, other = torch.zeros(4), torch.zeros(4)
            keys = [_compat.storage_key(t.untyped_storage()) for t in (x, x[1:].view(3, 1), other)]
            assert keys[0] == keys[1] != keys[2], mode


def test_written() -> None:
    x, y = torch.zeros(2), torch.ones(2)
    aten = torch.ops.aten
    for operator, args, kwargs, expected in (
        (aten.add.Tensor, (x, y), {}, []),
        (aten.add_.Tensor, (x, y), {}, [x]),
        (aten.add.out, (x, y), {"out": y}, [y]),
        (aten._foreach_add_.Scalar, ([x, y], 1), {}, [x, y]),
        (torch.ops.higher_order.cond, (x,), {}, []),
    ):
        found = _compat.written(operator, args, kwargs)
        assert len(found) == len(expected) and all(a is b for a, b in zip(found, expected, strict=True)), operator


def test_FakeTensor() -> None:
    with _compat.FakeTensorMode():
        assert isinstance(torch.ones(1), _compat.FakeTensor)
    assert not isinstance(torch.ones(1), _compat.FakeTensor)


def test_FakeTensorMode() -> None:
    real = torch.ones(2, 3)
    with _compat.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(real, static_shapes=True)
        product = fake @ torch.empty(3, 5)
        assert product.shape == (2, 5) and product.device.type == "cpu"
        assert (fake + real).shape == (2, 3)
        assert all(type(size) is int for size in product.shape)


def test_FakeCopyMode() -> None:
    layer = nn.Linear(2, 2)
    mode = _compat.FakeTensorMode()
    with _compat.FakeCopyMode(mode):
        twin = copy.deepcopy(layer)
    with mode:
        assert type(twin(torch.empty(1, 2))) is type(torch.empty(1))
    assert isinstance(twin.weight, nn.Parameter) and type(layer.weight) is nn.Parameter


def test_DataDependentOutputException() -> None:
    with _compat.FakeTensorMode(), pytest.raises(_compat.DataDependentOutputException):
        torch.empty(1).item()


def test_DynamicOutputShapeException() -> None:
    with _compat.FakeTensorMode(), pytest.raises(_compat.DynamicOutputShapeException):
        torch.nonzero(torch.empty(3))


def test_UnsupportedOperatorException() -> None:
    library = torch.library.Library("fx_approx_compat", "FRAGMENT")
    library.define("without_a_rule(Tensor x) -> Tensor")
    library.impl("without_a_rule", lambda x: x + 1, "CPU")
    with _compat.FakeTensorMode(), pytest.raises(_compat.UnsupportedOperatorException):
        torch.ops.fx_approx_compat.without_a_rule(torch.empty(1))


def test_FAKE_TENSOR_LOGGER(caplog: pytest.LogCaptureFixture) -> None:
    def failing() -> None:
        with _compat.FakeTensorMode(), pytest.raises(RuntimeError):
            torch.empty(2, 3) @ torch.empty(2, 3)

    with caplog.at_level(logging.DEBUG):
        failing()
        assert {record.name for record in caplog.records if record.levelno >= logging.ERROR} <= {
            _compat.FAKE_TENSOR_LOGGER
        }
        caplog.clear()
        with caplog.at_level(logging.CRITICAL, _compat.FAKE_TENSOR_LOGGER):
            failing()
        assert [record.name for record in caplog.records if record.levelno >= logging.ERROR] == []


# ---- checks and torch.fx


def test_CHECKS() -> None:
    for check, error in zip(_compat.CHECKS, (RuntimeError, IndexError, ValueError, AssertionError), strict=True):
        message: Any = "wrong" if error is AssertionError else lambda: "wrong"
        check(True, message)
        with pytest.raises(error, match="wrong"):
            check(False, message)


def test_is_erased() -> None:
    graph = fx.Graph()
    node = graph.placeholder("x")
    assert not _compat.is_erased(node)
    graph.erase_node(node)
    assert _compat.is_erased(node)


def test_checks_replaced() -> None:
    seen: list[object] = []

    def noting(check: Callable[..., None]) -> Callable[..., None]:
        return lambda *args: seen.append(check)

    with _compat.checks_replaced(noting):
        torch._check(False)
        torch._check_index(False)
        torch._check_value(False)
    assert seen == list(_compat.CHECKS[:3])
    with pytest.raises(RuntimeError):
        torch._check(False)


def test_wrap_functions() -> None:
    own = types.ModuleType("own")
    own.scaled = lambda x: x * 2  # type: ignore[attr-defined]
    function = own.scaled

    class Calling(nn.Module):
        def forward(self, x: Any) -> Any:
            return own.scaled(x)

    tracer = fx.Tracer(autowrap_functions=(function,))
    _compat.wrap_functions(tracer, own)
    targets = [node.target for node in tracer.trace(Calling()).nodes if node.op == "call_function"]
    assert targets == [function] and own.scaled is function


# ---- autograd and function transforms


def test_keep_in_copies() -> None:
    module = fx.symbolic_trace(nn.Linear(2, 2))
    module.lost, module.kept = [1], [2]
    _compat.keep_in_copies(module, "kept")
    copied = copy.deepcopy(copy.deepcopy(module))
    assert copied.kept == [2] and copied.kept is not module.kept and not hasattr(copied, "lost")


def test_in_backward() -> None:
    seen = []

    def part(x: Tensor) -> Tensor:
        seen.append(_compat.in_backward())
        return x.sin()

    x = torch.ones(1, requires_grad=True)
    checkpoint(part, x, use_reentrant=False).backward()
    assert seen == [False, True] and not _compat.in_backward()


def test_at_end_of_backward() -> None:
    order: list[str] = []
    x = torch.ones(1, requires_grad=True)
    inner = x * 2
    outer = inner * 3

    def first(grad: Tensor) -> None:
        order.append("outer")
        _compat.at_end_of_backward(lambda: order.append("end"))

    outer.register_hook(first)
    inner.register_hook(lambda grad: order.append("inner"))
    outer.backward()
    assert order == ["outer", "inner", "end"]


def test_transforms_in_progress() -> None:
    seen: list[list[str]] = []

    def watched(x: Tensor) -> Tensor:
        seen.append(_compat.transforms_in_progress())
        return x.sin().sum()

    x = torch.ones(2)
    watched(x)
    torch.func.vmap(watched)(torch.ones(2, 2))
    torch.func.grad(watched)(x)
    torch.func.vmap(torch.func.grad(watched))(torch.ones(2, 2))
    torch.func.jvp(watched, (x,), (x,))
    with forward_ad.dual_level():
        watched(forward_ad.make_dual(x, x))
    assert seen[:4] == [[], ["Vmap"], ["Grad"], ["Vmap", "Grad"]]
    assert all("Jvp" in kinds for kinds in seen[4:]), seen[4:]


def test_is_batched() -> None:
    seen: list[bool] = []

    def watched(x: Tensor) -> Tensor:
        seen.append(_compat.is_batched(x))
        return x * 1

    watched(torch.ones(2))
    torch.func.vmap(watched)(torch.ones(2))
    torch.func.grad(lambda x: watched(x).sum())(torch.ones(2))
    x = torch.ones(2, requires_grad=True)
    y = x * 1
    y.register_hook(watched)
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True)
    assert seen == [False, True, False, True]


def test_is_transformed() -> None:
    seen: list[bool] = []

    def watched(x: Tensor) -> Tensor:
        seen.append(_compat.is_transformed(x))
        return x * 1

    watched(torch.ones(2))
    torch.func.vmap(watched)(torch.ones(2))
    torch.func.grad(lambda x: watched(x).sum())(torch.ones(2))
    x = torch.ones(2, requires_grad=True)
    y = x * 1
    y.register_hook(watched)
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True)
    assert seen == [False, True, True, True]
