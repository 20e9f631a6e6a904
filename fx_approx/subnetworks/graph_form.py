"""A subnetwork, or a part of one, whose forward is a specialised graph."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any, cast

from torch import Tensor, fx, nn
from torch.fx.graph_module import reduce_graph_module

from fx_approx._compat import buffers_of, children_of, parameters_of
from fx_approx.capture.records import CallForm
from fx_approx.capture.size_guards import SizeGuard
from fx_approx.capture.trace import add_in_training_, select_by_mode
from fx_approx.core.layer_types import with_forward
from fx_approx.ops.channel_slices import whole_size
from fx_approx.subnetworks.part_layers import take_columns
from fx_approx.subnetworks.parts import take_part
from fx_approx.subnetworks.record import RECORD
from fx_approx.subnetworks.training_only import check_training, refuse_evaluation

_SERVES = "_fx_approx_serves"
"""Where a graph keeps which calls it serves."""

_CODE = "_fx_approx_code"
"""Where a module whose forward is a graph keeps the code of that."""


@dataclasses.dataclass(frozen=True)
class Serves:
    """Which calls a graph serves: a hook that gives it its inputs.

    Attributes:
        form: How the captured forward is called.
        guard: What the inputs must share with those of the capture.
        training_only: The model's Python does something else in evaluation.
    """

    form: CallForm
    guard: SizeGuard | None
    training_only: bool

    def problem(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """Why the graph does not serve a call; empty if it does."""
        values = self.form.bind(args, kwargs)
        if values is None:
            return f"it is called in another way than it was captured ({', '.join(self.form.dynamic)})"
        misfit = None if self.guard is None else self.guard.misfit(values, next(module.parameters(), None))
        return misfit or ""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The inputs of the graph for a call.

        Raises:
            RuntimeError: The graph does not serve it.
        """
        if self.training_only:
            check_training(module.training)
        problem = self.problem(module, args, kwargs)
        if problem:
            raise RuntimeError(f"sub: its graph does not serve this call: {problem}")
        return tuple(self.form.bind(args, kwargs) or ()), {}


class GraphForward(nn.Module):
    """In front of the class of a module: its forward is a specialised graph, and all else is as it was."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module, for the calls that the graph serves."""
        own = vars(self)
        values, _ = own[_SERVES](self, args, kwargs)
        return own[_CODE](self, *values)


class Code:
    """The Python code of a graph, called with the module that has its tensors, and its inputs; copies share it."""

    def __init__(self, source: str, names: Mapping[str, Any]) -> None:
        self.source, self.names = source, dict(names)
        namespace = dict(names)
        exec(compile(source, "<fx_approx subnetwork>", "exec"), namespace)
        self.function = namespace["forward"]

    def __call__(self, *given: Any) -> Any:
        return self.function(*given)

    def __deepcopy__(self, memo: dict[int, Any]) -> Code:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        modules = {name: one.__name__ for name, one in self.names.items() if isinstance(one, ModuleType)}
        return _code, (self.source, {k: v for k, v in self.names.items() if k not in modules}, modules)


def _code(source: str, names: Mapping[str, Any], modules: Mapping[str, str]) -> Code:
    return Code(source, {**names, **{name: importlib.import_module(one) for name, one in modules.items()}})


def run_by_graph(module: nn.Module, graph: fx.Graph, tensors: Mapping[str, Tensor], serves: Serves) -> None:
    """Gives ``module``, in place, the forward of ``graph``; it stays an instance of its class, with its methods.

    Args:
        module: Targets of the graph are paths in it, or names of ``tensors``.
        graph: What it runs.
        tensors: Indices and constants; constants are no part of its state.
        serves: Which calls it serves.
    """
    code = graph.python_code("self")
    vars(module).update({_SERVES: serves, _CODE: Code(code.src, code.globals)})
    _register(module, tensors)
    module.__class__ = with_forward(GraphForward, type(module))


def _register(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        module.register_buffer(key, tensor, persistent=not key.startswith("_constant"))


_OWN_CALLS = (take_part, take_columns, check_training, whole_size, select_by_mode, add_in_training_)
_FLAG = "training"


class PartTracer(fx.Tracer):
    """Rebuilds a graph from its code, with calls of our own as they are, and training flags that are read in each."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=_OWN_CALLS)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """As ``fx.Tracer``, which would make constants of the flags."""
        flags = {path: (one, one.training) for path, one in root.named_modules() if _FLAG in vars(one)}
        for path, (module, _) in flags.items():
            del vars(module)[_FLAG]  # what stands among the buffers is asked for by getattr
            cast(dict[str, Any], buffers_of(module))[_FLAG] = _Flag(f"{path}.{_FLAG}" if path else _FLAG)
        try:
            return super().trace(root, concrete_args)
        finally:
            for module, flag in flags.values():
                del buffers_of(module)[_FLAG]
                vars(module)[_FLAG] = flag

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """As ``fx.Tracer``; a flag is a node that reads it."""
        if isinstance(attr_val, _Flag):
            return self.create_proxy("get_attr", attr_val.path, (), {})
        return super().getattr(attr, attr_val, parameter_proxy_cache)


@dataclasses.dataclass(frozen=True)
class _Flag:
    """In the place of the training flag at ``path``."""

    path: str


class SubnetworkGraph(fx.GraphModule):
    """A ``torch.fx.GraphModule`` that has all of the model's modules, and whose copies serve the same calls."""

    def __deepcopy__(self, memo: dict[int, Any]) -> SubnetworkGraph:
        new = cast(SubnetworkGraph, super().__deepcopy__(memo))
        kept = {name: copy.deepcopy(vars(self)[name], memo) for name in (_SERVES, RECORD) if name in vars(self)}
        return _dressed(new, kept)

    def __reduce__(self) -> tuple[Any, ...]:
        _, given = super().__reduce__()
        kept = {name: vars(self)[name] for name in (_SERVES, RECORD) if name in vars(self)}
        return _rebuilt, (*given, type(self).__name__, kept)


def graph_module(
    owner: nn.Module, graph: fx.Graph, name: str, tensors: Mapping[str, Tensor], serves: Serves | None
) -> SubnetworkGraph:
    """``graph`` as a module with the tensors and modules of ``owner``.

    Args:
        owner: Targets of the graph are paths in it, or names of ``tensors``.
        graph: What it runs.
        name: Of its class, as it is printed.
        tensors: Indices and constants; constants are no part of its state.
        serves: Which calls it serves; None where its inputs are those of the model.
    """
    made = SubnetworkGraph(nn.Module(), fx.Graph(), name)
    children_of(made).update(children_of(owner))
    parameters_of(made).update(parameters_of(owner))
    buffers_of(made).update(buffers_of(owner))
    _register(made, tensors)
    made.training = owner.training
    for node in graph.find_nodes(op="get_attr"):  # tensors that are plain attributes
        plain = vars(owner).get(str(node.target))
        if isinstance(plain, Tensor):
            vars(made)[str(node.target)] = plain
    made.graph = graph
    vars(made)["_tracer_cls"] = PartTracer
    return _dressed(made, {} if serves is None else {_SERVES: serves})


def _dressed(module: SubnetworkGraph, kept: Mapping[str, Any]) -> SubnetworkGraph:
    vars(module).update(kept)
    if _SERVES in kept:
        module.register_forward_pre_hook(_given, with_kwargs=True)
    return module


def _given(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return vars(module)[_SERVES](module, args, kwargs)


def serve_training_only(module: nn.Module) -> None:
    """Has a module whose forward is a graph refuse to run in evaluation."""
    vars(module)[_SERVES] = dataclasses.replace(vars(module)[_SERVES], training_only=True)
    if isinstance(module, SubnetworkGraph):
        refuse_evaluation(module)


def _rebuilt(body: dict[str, Any], imports: str, name: str, kept: Mapping[str, Any]) -> SubnetworkGraph:
    module = cast(fx.GraphModule, reduce_graph_module(body, imports))
    made = graph_module(module, module.graph, name, {}, None)
    return _dressed(made, kept)
