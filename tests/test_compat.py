"""What each name of ``fx_approx._compat`` is relied on for: where torch has changed it, the test of that name fails."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fx_approx import _compat


@pytest.fixture
def compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return x * 2 if self.training else x


def in_frame(read: Callable[[Any], object], model: nn.Module | None = None) -> list[object]:
    """What ``read`` finds in each translator of a frame that Dynamo compiles, as a backend is called."""
    found: list[object] = []

    def backend(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        found.append(read(_compat.InstructionTranslator.current_tx()))
        return graph.forward

    torch.compile(Layer() if model is None else model, backend=backend)(torch.randn(2, 3))
    return found


def test_every_name_has_a_test() -> None:
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert set(_compat.__all__) - tested == set()
    assert [name for name in _compat.__all__ if not hasattr(_compat, name)] == []


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


def test_is_compiled() -> None:
    layer = nn.Linear(2, 2)
    assert not _compat.is_compiled(layer)
    assert _compat.is_compiled(torch.compile(layer, backend="eager"))
    layer.compile(backend="eager")
    assert _compat.is_compiled(layer), "module.compile() leaves another mark"


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


# ---- autograd and function transforms


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


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # by torch's own jvp
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


# ---- Dynamo and Inductor


@pytest.mark.usefixtures("compiler")
def test_HigherOrderOperator() -> None:
    found: list[object] = []

    def backend(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        found.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def checkpointed(x: Tensor) -> Any:
        return checkpoint(torch.sin, x, use_reentrant=False)

    torch.compile(checkpointed, backend=backend)(torch.ones(2, requires_grad=True))
    holding = [target for target in found if isinstance(target, _compat.HigherOrderOperator)]
    assert len(holding) == 1 and isinstance(holding[0].name(), str)
    assert not isinstance(torch.sin, _compat.HigherOrderOperator)


@pytest.mark.usefixtures("compiler")
def test_InstructionTranslator() -> None:
    model = Layer()

    def read(translator: Any) -> object:
        output = translator.output
        inputs = {
            node.name: node.meta["grapharg"].source for node in output.graph.find_nodes(op="placeholder") if node.meta
        }
        names = sorted(str(s.name() if callable(s.name) else s.name) for s in inputs.values() if s is not None)
        assert any("inner" in name and "weight" in name for name in names), names
        assert output.root_tx.f_locals["self"] is model and isinstance(output.root_tx.f_globals, dict)
        return output.root_tx.f_code

    assert in_frame(read, model) == [Layer.forward.__code__]
    with pytest.raises(AttributeError):  # how a call outside of a compilation shows
        _compat.InstructionTranslator.current_tx().output  # noqa: B018


def guarded(condition: Callable[[Any], None]) -> tuple[Callable[..., Any], Layer, list[int]]:
    """A compiled function of a layer whose graph is bound to ``condition``, the layer, and its compilations."""
    compiled: list[int] = []

    def backend(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compiled.append(1)
        sources = [node.meta["grapharg"].source for node in graph.graph.find_nodes(op="placeholder")]
        condition(next(source for source in sources if "inner" in str(source)))
        return graph.forward

    model = Layer()
    return torch.compile(model, backend=backend), model, compiled


def outermost(source: Any) -> Any:
    """Of a parameter's source, that of the frame's own module."""
    while getattr(source, "base", None) is not None:
        source = source.base
    return source


@pytest.mark.usefixtures("compiler")
def test_install_guard() -> None:
    def bound(source: Any) -> None:
        _compat.install_guard(outermost(source).make_guard(_compat.GuardBuilder.ID_MATCH))

    run, _, compiled = guarded(bound)
    run(torch.randn(2, 3))
    run(torch.randn(2, 3))
    assert compiled == [1]


@pytest.mark.usefixtures("compiler")
def test_GuardBuilder() -> None:
    def bound(source: Any) -> None:
        flag = _compat.AttrSource(outermost(source), "bound")
        _compat.install_guard(flag.make_guard(_compat.GuardBuilder.CONSTANT_MATCH))

    run, model, compiled = guarded(bound)
    model.bound = 1
    run(torch.randn(2, 3))
    run(torch.randn(2, 3))
    assert compiled == [1]
    model.bound = 2
    run(torch.randn(2, 3))
    assert compiled == [1, 1], "a guard on a constant does not hold the code to its value"


@pytest.mark.usefixtures("compiler")
def test_AttrSource() -> None:
    names: list[object] = []
    run, _, _ = guarded(lambda source: names.append(_compat.AttrSource(outermost(source), "training")))
    run(torch.randn(2, 3))
    assert evaluated(names[0], Layer()) is True


@pytest.mark.usefixtures("compiler")
def test_DictGetItemSource() -> None:
    names: list[object] = []

    def noted(source: Any) -> None:
        children = _compat.AttrSource(outermost(source), _compat.CHILDREN_ATTRIBUTE)
        names.append(_compat.DictGetItemSource(children, "inner"))

    run, model, _ = guarded(noted)
    run(torch.randn(2, 3))
    assert evaluated(names[0], model) is model.inner


@pytest.mark.usefixtures("compiler")
def test_UnspecializedNNModuleSource() -> None:
    seen: list[object] = []

    def bound(source: Any) -> None:
        children = _compat.AttrSource(outermost(source), _compat.CHILDREN_ATTRIBUTE)
        inner = _compat.UnspecializedNNModuleSource(_compat.DictGetItemSource(children, "inner"))
        seen.append(inner.base is not None)
        _compat.install_guard(_compat.AttrSource(inner, "training").make_guard(_compat.GuardBuilder.CONSTANT_MATCH))

    run, model, compiled = guarded(bound)
    run(torch.randn(2, 3))
    model.inner.eval()
    run(torch.randn(2, 3))
    assert seen == [True, True] and compiled == [1, 1]


def test_CHILDREN_ATTRIBUTE() -> None:
    model = Layer()
    assert getattr(model, _compat.CHILDREN_ATTRIBUTE)["inner"] is model.inner


def evaluated(source: Any, model: nn.Module) -> object:
    """The value of a source's name in a frame whose ``self`` is ``model``."""
    return eval(str(source.name() if callable(source.name) else source.name), {"L": {"self": model}})


@pytest.mark.usefixtures("compiler")
def test_FailOnRecompileLimitHit() -> None:
    run = torch.compile(lambda x, n: x * n, backend="eager", fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2), pytest.raises(_compat.FailOnRecompileLimitHit):
        for n in range(4):
            run(torch.ones(1), n)


@pytest.mark.usefixtures("compiler")
def test_Unsupported() -> None:
    def broken(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x

    with pytest.raises(_compat.Unsupported):
        torch.compile(broken, backend="eager", fullgraph=True)(torch.ones(1))


@pytest.mark.usefixtures("compiler")
def test_recompile_limit() -> None:
    with torch._dynamo.config.patch(recompile_limit=3):
        assert _compat.recompile_limit() == 3


def test_RECOMPILE_LIMIT() -> None:
    assert eval(_compat.RECOMPILE_LIMIT, {"torch": torch}) == _compat.recompile_limit()


@pytest.mark.usefixtures("compiler")
def test_compilations_of() -> None:
    def scaled(x: Tensor, n: int) -> Tensor:
        return x * n

    run = torch.compile(scaled, backend="eager", dynamic=False)
    assert _compat.compilations_of(scaled.__code__) == 0
    for n in (1, 2, 2):
        run(torch.ones(1), n)
    assert _compat.compilations_of(scaled.__code__) == 2


def test_backend_names() -> None:
    assert {"inductor", "eager", "aot_eager"} <= set(_compat.backend_names())


def test_backend_named() -> None:
    graph = fx.symbolic_trace(lambda x: x + 1)
    assert _compat.backend_named("eager")(graph, [torch.ones(1)])(torch.ones(1)).item() == 2
    assert _compat.backend_named(len) is len


def test_inductor() -> None:
    assert callable(_compat.inductor(None, None)) and callable(_compat.inductor("default", {"max_autotune": False}))
    with pytest.raises(RuntimeError, match="nothing"):
        _compat.inductor("nothing", None)
    with pytest.raises(RuntimeError, match="nothing"):
        _compat.inductor(None, {"nothing": 1})


@pytest.mark.usefixtures("compiler")
def test_mark_dynamic() -> None:
    def scaled(x: Tensor) -> Tensor:
        return x * 2

    run = torch.compile(scaled, backend="eager")
    for size in (5, 6, 7):
        x = torch.ones(size, 3)
        _compat.mark_dynamic(x, 0)
        run(x)
    assert _compat.compilations_of(scaled.__code__) == 1
