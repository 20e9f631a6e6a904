"""What the names of ``fx_approx._compat`` that concern Dynamo and Inductor are relied on for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
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


@pytest.mark.usefixtures("compiler")
def test_assert_true() -> None:
    def positive(x: Tensor) -> Tensor:
        _compat.assert_true((x > 0).all(), "not positive")
        return x * 2

    run = torch.compile(positive, backend="aot_eager", fullgraph=True)
    for function in (positive, run):
        assert function(torch.ones(1)).item() == 2
        with pytest.raises((AssertionError, RuntimeError), match="not positive"):
            function(-torch.ones(1))


@pytest.mark.usefixtures("compiler")
def test_is_checkpoint() -> None:
    targets = [node.target for node in checkpoint_graph().graph.nodes if node.op == "call_function"]
    assert [_compat.is_checkpoint(target) for target in targets].count(True) == 1
    assert not _compat.is_checkpoint(torch.sin)


@pytest.mark.usefixtures("compiler")
def test_CHECKPOINT_CONTEXT() -> None:
    graph = checkpoint_graph(context_fn=contexts)
    metas = [module.meta for module in graph.modules() if isinstance(module, fx.GraphModule)]
    metas += [node.meta for node in graph.graph.nodes]
    found = [meta[_compat.CHECKPOINT_CONTEXT] for meta in metas if _compat.CHECKPOINT_CONTEXT in meta]
    assert contexts in found, [sorted(meta) for meta in metas]


def contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    return contextlib.nullcontext(), contextlib.nullcontext()


def checkpoint_graph(**how: Any) -> fx.GraphModule:
    """Dynamo's graph of a checkpoint."""
    found: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        found.append(graph)
        return graph.forward

    def checkpointed(x: Tensor) -> Any:
        return checkpoint(torch.sin, x, use_reentrant=False, **how)

    torch.compile(checkpointed, backend=backend)(torch.ones(2, requires_grad=True))
    assert len(found) == 1
    return found[0]


@pytest.mark.usefixtures("compiler")
def test_RESUMED() -> None:
    names: list[str] = []

    def backend(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        names.append(_compat.InstructionTranslator.current_tx().output.root_tx.f_code.co_name)
        return graph.forward

    def broken(x: Tensor) -> Tensor:
        x = x * 2
        torch._dynamo.graph_break()
        return x + 1

    torch.compile(broken, backend=backend)(torch.ones(1))
    assert [name.startswith(_compat.RESUMED) for name in names] == [False, True], names


def test_is_skipped_code() -> None:
    assert _compat.is_skipped_code(nn.Sequential(nn.ReLU()).forward)
    assert not _compat.is_skipped_code(Layer().forward)


@pytest.mark.usefixtures("compiler")
def test_HigherOrderOperator() -> None:
    found = [node.target for node in checkpoint_graph().graph.nodes if node.op == "call_function"]
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


@pytest.mark.usefixtures("compiler")
def test_native_pad() -> None:
    targets = []

    def backend(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        targets.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    x = torch.ones(1, 2)
    padded = torch.compile(lambda x: nn.functional.pad(x, (1, 0), value=2.0), backend=backend)(x)
    assert torch.equal(padded, _compat.native_pad(x, (1, 0), "constant", 2.0))
    assert _compat.native_pad in targets


def with_autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = x @ x
    return y.float() * x


def graphs_of(function: Callable[..., Any], *inputs: Tensor) -> list[fx.GraphModule]:
    """What Dynamo writes for a function."""
    found: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
        found.append(graph)
        return graph.forward

    torch.compile(function, backend=keep)(*inputs)
    return found


@pytest.mark.usefixtures("compiler")
def test_switches_autocast() -> None:
    assert [_compat.switches_autocast(one.graph) for one in graphs_of(with_autocast, torch.ones(2, 2))] == [True]
    assert [_compat.switches_autocast(one.graph) for one in graphs_of(torch.relu, torch.ones(2, 2))] == [False]


@pytest.mark.usefixtures("compiler")
def test_retraces_autocast() -> None:
    """As generated code of a graph calls it."""
    (graph,) = graphs_of(with_autocast, torch.ones(2, 2))
    code = graph.graph.python_code("self")
    namespace: dict[str, Any] = dict(code.globals)
    exec(code.src, namespace)
    torch._dynamo.reset()
    try:
        torch.compile(namespace["forward"], backend="aot_eager", fullgraph=True)(graph, torch.ones(2, 2))
        again = True
    except Exception:
        again = False
        torch.set_autocast_enabled("cpu", False)  # the failure leaves it on
    assert _compat.retraces_autocast() == again


@pytest.mark.usefixtures("compiler")
def test_compiles_in_place() -> None:
    graphs = []

    def backend(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    model = nn.Sequential(nn.Linear(2, 2))
    model.compile(backend=backend)
    model(torch.ones(1, 2))
    assert _compat.compiles_in_place(nn.Sequential(nn.Linear(2, 2))) == bool(graphs)
