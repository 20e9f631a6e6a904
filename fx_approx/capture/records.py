"""Records of a capture: the graph, how it is called, and what it takes for granted of the model."""

from __future__ import annotations

import dataclasses
import inspect
import keyword
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from fx_approx._compat import tree_leaves
from fx_approx.capture.side_effects import Fact, Members, members
from fx_approx.capture.size_guards import SizeGuard, TensorSpec

META_KEY = "fx_approx"
"""Where a node of a graph has the names of the products that it computes."""

SECTION = "fx_approx_section"
"""Where a node of several graphs in one says to which section it belongs, by number."""


@dataclasses.dataclass(frozen=True)
class Opaque:
    """A module that stays a leaf although it is not a layer of torch: why, and where tracing stopped.

    Attributes:
        path: Of the module.
        reason: Why, and where.
        elsewhere: Another frontend may well capture what its forward does.
        sections: Paths of the modules in it that have graphs of their own.
    """

    path: str
    reason: str
    elsewhere: bool = False
    sections: tuple[str, ...] = ()

    @property
    def served(self) -> str:
        """What runs the module instead of the graph, in words."""
        if not self.sections:
            return "module swap"
        more = f" and {len(self.sections) - 3} more" if len(self.sections) > 3 else ""
        return f"graphs of {', '.join(self.sections[:3])}{more}, and by module swap"

    def __str__(self) -> str:
        """One line for warnings and reports."""
        return f"{self.path or 'the model'}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class CallForm:
    """How the captured forward is called.

    Attributes:
        names: Parameter names of ``forward``, in order; those of ``*args`` are numbered, those of ``**kwargs`` last.
        dynamic: Those that are inputs of the graph.
        constants: Values of the others, fixed at capture; a call with another value is not the captured one.
        defaults: Default values, for calls that leave arguments out.
        by_name: Those of ``names`` that are given by name only.
        numbered: Those that are given by position only.
        further: Those of ``**kwargs``, in the order in which Python sees them.
    """

    names: tuple[str, ...]
    dynamic: tuple[str, ...]
    constants: Mapping[str, Any]
    defaults: Mapping[str, Any]
    by_name: tuple[str, ...] = ()
    numbered: tuple[str, ...] = ()
    further: tuple[str, ...] = ()

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any] | None:
        """The graph's inputs for a call, or None if the call is not of this form. Plain Python: it traces."""
        if len(args) > len(self.names) - len(self.by_name):
            return None
        for name in kwargs:
            if name not in self.names or name in self.numbered:
                return None
        if self.further and [name for name in kwargs if name in self.further] != list(self.further):
            return None
        values = []
        for position, name in enumerate(self.names):
            if position < len(args):
                value = args[position]
            elif name in kwargs:
                value = kwargs[name]
            elif name in self.defaults:
                value = self.defaults[name]
            else:
                return None
            if name in self.dynamic:
                if value is None:
                    return None
                values.append(value)
            elif value is not self.constants[name]:
                constant = self.constants[name]
                if isinstance(value, torch.Tensor) or type(value) is not type(constant) or value != constant:
                    return None
        return values


@dataclasses.dataclass(frozen=True)
class Granted:
    """What a graph takes for granted of tensors and modules, whose paths it has.

    Attributes:
        facts: Path of a module, name of a tensor in it, and what is known of that.
        tied: Two places, each a path and a name, that hold one tensor, which the graph reads at the first.
        members: Path of a module, the name of its dict of parameters, buffers or children, and what that holds.
    """

    facts: tuple[tuple[str, str, Fact], ...] = ()
    tied: tuple[tuple[str, str, str, str], ...] = ()
    members: tuple[tuple[str, str, Members], ...] = ()

    def of(self, root: nn.Module) -> Held:
        """The same for one model, with its modules."""
        at = root.get_submodule
        return Held(
            tuple((at(path), name, fact) for path, name, fact in self.facts),
            tuple((at(path), name, at(other), its) for path, name, other, its in self.tied),
            tuple((at(path), name, held) for path, name, held in self.members),
        )


@dataclasses.dataclass(frozen=True)
class Held:
    """What the graph of one model takes for granted, see :class:`Granted`."""

    facts: tuple[tuple[nn.Module, str, Fact], ...] = ()
    tied: tuple[tuple[nn.Module, str, nn.Module, str], ...] = ()
    members: tuple[tuple[nn.Module, str, Members], ...] = ()

    def changed(self) -> str | None:
        """What of the tensors holds no more, if anything; plain Python, which ``torch.compile`` traces."""
        for module, name, fact in self.facts:
            if not fact.holds(getattr(module, name, None)):
                what = f"{fact.query} of " if fact.query else ""
                return f"{what}attribute {name} of a {type(module).__name__} was changed"
        return None

    def rearranged(self) -> str | None:
        """What of the places of tensors and modules holds no more, if anything."""
        for module, name, other, its in self.tied:
            if getattr(module, name, None) is not getattr(other, its, None):
                return f"{its} of a {type(other).__name__} is no longer {name} of a {type(module).__name__}"
        for module, name, held in self.members:
            if members(getattr(module, name)) != held:
                return f"{name.strip('_')} of a {type(module).__name__} were added or removed"
        return None


class UnfitGraphError(Exception):
    """The graph does not run on inputs on which the model's own forward does."""


Calls = tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]
"""Arguments of the calls of a module, with a :class:`fx_approx.capture.size_guards.TensorSpec` for every tensor."""


@dataclasses.dataclass(frozen=True)
class Called:
    """How the example called a module.

    Attributes:
        calls: The arguments of each call, the first call first.
        fed: What it reads was computed with parameters.
        feeds: Another module reads what it returns.
    """

    calls: Calls
    fed: bool = False
    feeds: bool = False


@dataclasses.dataclass(frozen=True)
class Section:
    """A module with a graph of its own, in a model, or below a part of one, whose forward cannot be traced.

    Attributes:
        path: Of the module; "" for the model itself, where only parts of it cannot be traced.
        form: How it is called.
        called: What the example called it with.
        guard: What the inputs of a call must share with the first one; None if nothing was relied upon.
    """

    path: str
    form: CallForm
    called: Called
    guard: SizeGuard | None = None


@dataclasses.dataclass
class Capture:
    """A captured model.

    With ``sections``, what their graphs take for granted stands in ``each`` alone: ``branching``, ``readers``,
    ``frozen``, ``granted`` and ``guard`` are empty.

    Attributes:
        graph: The traced graph, whose targets are paths in the skeleton; None if the forward itself cannot be traced.
            With ``sections`` it holds their graphs, one behind the other: the inputs of all, and one output for each.
        form: How it is called.
        opaque: Parts kept as Python, with the reason.
        branching: Paths of modules whose Python branches on ``training``: the graph serves training only.
        constants: Tensors made while tracing, by target name.
        readers: Paths of modules whose ``training`` flag the forward reads: the graph serves calls in which they agree.
        frozen: Path, name and value of module attributes that are in the graph as they were.
        granted: What else it takes for granted of the model.
        guard: What the inputs of a call must share with the example inputs; None if nothing was relied upon.
        sections: Modules with graphs of their own, where the forward around them cannot be traced; else empty.
        each: What the graph of each section takes for granted, as its own capture, without the graph.
        strays: How the example called the layers outside ``sections``, by path.
    """

    graph: fx.Graph | None
    form: CallForm
    opaque: tuple[Opaque, ...]
    branching: tuple[str, ...]
    constants: dict[str, torch.Tensor]
    readers: tuple[str, ...] = ()
    frozen: tuple[tuple[str, str, Any], ...] = ()
    granted: Granted = Granted()
    guard: SizeGuard | None = None
    sections: tuple[Section, ...] = ()
    each: tuple[Capture, ...] = ()
    strays: Mapping[str, Called] = dataclasses.field(default_factory=dict)


def call_form(model: nn.Module, args: tuple[Any, ...] | None, kwargs: Mapping[str, Any]) -> CallForm:
    """How ``model`` will be called: as in the example, or with its required arguments only.

    Raises:
        ValueError: The example inputs do not fit the signature of ``forward``.
    """
    parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
    plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    defaults = {p.name: p.default for p in plain if p.default is not p.empty}
    names = tuple(p.name for p in plain)
    by_name = tuple(p.name for p in plain if p.kind is p.KEYWORD_ONLY)
    if args is None:
        dynamic = tuple(name for name in names if name not in defaults)
        return CallForm(names, dynamic, defaults, defaults, by_name)
    try:
        bound = inspect.signature(type(model).forward).bind(model, *args, **kwargs)
    except TypeError as error:
        received = ", ".join([*(type(one).__name__ for one in args), *(f"{name}=" for name in kwargs)])
        raise ValueError(
            f"example_inputs: expected what {type(model).__name__}.forward({', '.join(names)}) is called with, without "
            f"labels that it does not take, got ({received}): {error}"
        ) from None
    given = {name: bound.arguments[name] for name in names if name in bound.arguments}
    numbered: tuple[str, ...] = ()
    further: tuple[str, ...] = ()
    for parameter in parameters:
        more = bound.arguments.get(parameter.name)
        if parameter.kind is parameter.VAR_POSITIONAL and more:
            listed = {_unused(f"{parameter.name}_{number}", {*names, *kwargs}): one for number, one in enumerate(more)}
            numbered = tuple(listed)
            places = [name for name in names if name not in by_name]
            names, given = (*places, *numbered, *by_name), {**given, **listed}
        elif parameter.kind is parameter.VAR_KEYWORD and more:
            odd = [name for name in more if not name.isidentifier() or keyword.iskeyword(name)]
            if odd:
                raise ValueError(f"example_inputs: expected names of arguments, got {odd[0]!r}")
            further = tuple(more)
            names, by_name, given = (*names, *further), (*by_name, *further), {**given, **more}
    dynamic = tuple(name for name in names if name in given and _has_tensor(given[name]))
    constants = {name: value for name, value in {**defaults, **given}.items() if name not in dynamic}
    return CallForm(names, dynamic, constants, defaults, by_name, numbered, further)


def _unused(name: str, taken: set[str]) -> str:
    return name if name not in taken else _unused(f"{name}_", taken)


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, (torch.Tensor, TensorSpec)) for leaf in tree_leaves(value))


def owner(node: fx.Node) -> str:
    """Path of the module whose forward made the node ("" for the root)."""
    stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    if node.op == "call_module":
        stack = stack[:-1]
    return stack[-1] if stack else ""
