"""Sections: where a forward cannot be traced, the largest modules inside it that can be, each with a graph of its own.

Detection models are like that: what they do between backbone, heads and losses depends on values. The example inputs
are run through the model once, to see what its modules are called with. That is done on fake tensors. Where values are
asked for, which these do not have, a copy of the model runs on the example itself. The graphs then lie one behind the
other in one graph, for all passes; :mod:`fx_approx.capture.split_sections` parts them again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fx_approx._compat import (
    CALLS,
    TorchDispatchMode,
    children_of,
    parameters_of,
    storage_key,
    tree_leaves,
    written,
)
from fx_approx.capture.containers import copied, tensors
from fx_approx.capture.error_text import describe
from fx_approx.capture.fake_model import UNKNOWABLE, fake_model
from fx_approx.capture.known_values import without_user_hooks
from fx_approx.capture.records import SECTION, Called, Calls, Capture, Opaque, Section, call_form
from fx_approx.capture.size_guards import TensorSpec, described
from fx_approx.capture.trace import capture, kept_random_state, skeleton
from fx_approx.core.layer_types import FUSED_LAYERS, PRODUCT_LAYERS
from fx_approx.errors import CaptureError, CaptureWarning

Example = tuple[tuple[Any, ...], dict[str, Any]]

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_LAYERS = (*PRODUCT_LAYERS, *FUSED_LAYERS)


def with_sections(root: nn.Module, captured: Capture, called: tuple[Any, Any], example: Example | None) -> Capture:
    """``captured`` with graphs of the modules inside what could not be traced; unchanged if there are none.

    Args:
        root: The model (a :func:`fx_approx.capture.trace.skeleton`).
        captured: Its capture.
        called: Example inputs, see :func:`fx_approx.capture.size_guards.described`.
        example: The inputs themselves, which a copy of the model runs on if fake tensors do not get through.
    """
    outside = [part.path for part in captured.opaque if _is_worthwhile(root.get_submodule(part.path))]
    if not outside:
        return captured
    record = _recorded(root, outside, called, example)
    found: dict[str, tuple[Section, Capture]] = {}
    queue = [path for part in outside for path in record.nearest(root, part)]
    for path in queue:
        made = _section(root, path, record.called(path))
        if made is None:
            queue += record.nearest(root, path)
        else:
            found[path] = made
    ordered = [found[path] for path in record.calls if path in found]
    layers = {path: record.called(path) for path in record.calls if _is_layer(root.get_submodule(path))}
    return _joined(captured, called, ordered, layers)


def with_these(
    root: nn.Module, captured: Capture, called: tuple[Any, Any], known: Sequence[Section], strays: Mapping[str, Called]
) -> Capture:
    """The same with sections that are known from an earlier capture of the model, and the calls of layers outside."""
    made = []
    for section in known:
        again = _section(root, section.path, section.called) if section.path else None
        if again is not None:
            made.append(again)
    return _joined(captured, called, made, strays)


def _is_worthwhile(module: nn.Module) -> bool:
    """Whether several layers inside ``module`` could be sampled: one alone needs no graph."""
    layers = [one for one in module.modules() if isinstance(one, _LAYERS)]
    return len(layers) > 1 and not isinstance(module, _LAYERS)


def _runs_its_forward(module: nn.Module) -> bool:
    """Whether a call runs the ``forward`` of the class and nothing else, and the class can have a subclass."""
    above = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
    odd = {"__call__", "__init_subclass__", *CALLS}
    return "forward" not in vars(module) and odd.isdisjoint(name for cls in above for name in vars(cls))


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, FUSED_LAYERS) or (not list(module.children()) and bool(parameters_of(module)))


class _Record:
    """What modules are called with in a run of the model.

    Attributes:
        calls: By path, in the order of the first calls.
        fed: Paths of modules that read what was computed with parameters.
    """

    def __init__(self) -> None:
        self.calls: dict[str, Calls] = {}
        self.fed: set[str] = set()
        self._read: dict[int, set[str]] = {}
        self._made: dict[str, set[int]] = {}
        self._alive: list[Tensor] = []  # so that no other takes its number

    @contextlib.contextmanager
    def of(self, model: nn.Module, outside: Sequence[str]) -> Iterator[None]:
        """Records the calls of modules below ``outside``."""
        handles = []
        for path, module in model.named_modules():
            if any(path != above and (not above or path.startswith(f"{above}.")) for above in outside):
                enter, leave = self._hooks(path)
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, path: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = tensors((args, kwargs))
            if any(tensor.requires_grad for tensor in given):
                self.fed.add(path)
            for tensor in given:
                self._read.setdefault(id(tensor), set()).add(path)
            self._alive += given
            self.calls[path] = (*self.calls.get(path, ()), (described(args), described(kwargs)))

        def leave(module: nn.Module, args: Any, result: Any) -> None:
            made = tensors(result)
            self._made.setdefault(path, set()).update(map(id, made))
            self._alive += made

        return enter, leave

    def called(self, path: str) -> Called:
        """How the module was called; another that reads what it returned is one outside of it."""
        readers = {reader for one in self._made.get(path, ()) for reader in self._read.get(one, ())}
        feeds = any(reader != path and not reader.startswith(f"{path}.") for reader in readers)
        return Called(self.calls[path], path in self.fed, feeds)

    def nearest(self, root: nn.Module, path: str) -> list[str]:
        """The first modules below ``path`` that were called and hold several layers."""
        found = []
        for name, child in children_of(root.get_submodule(path)).items():
            below = f"{path}.{name}" if path else name
            if child is None or not _is_worthwhile(child):
                continue
            found += [below] if below in self.calls else self.nearest(root, below)
        return found


def _recorded(root: nn.Module, outside: Sequence[str], called: tuple[Any, Any], example: Example | None) -> _Record:
    fakes, refused = _Record(), False
    with fake_model(root) as fake, fakes.of(fake.module, outside):
        try:
            fake.module(*fake.own(called[0]), **fake.own(dict(called[1])))
            return fakes
        except UNKNOWABLE:
            pass
        except Exception:  # whatever a model says of fake tensors, or of inputs that do not fit
            refused = True
    try:
        model = None if example is None else skeleton(root, shared=False).train()
    except CaptureError:
        model = None
    if model is None or example is None:
        return _Record() if refused else fakes
    silenced = without_user_hooks(model)
    real, inputs = _Record(), copied(example)
    attributes = tensors([list(vars(module).values()) for module in model.modules()])
    memory = _OwnMemory([*model.parameters(), *model.buffers(), *attributes, *tensors(inputs)])
    with kept_random_state(), torch.enable_grad(), warnings.catch_warnings(), real.of(model, outside):
        warnings.simplefilter("ignore")  # training says it
        try:
            with memory:
                model(*inputs[0], **inputs[1])
            return real
        except Exception as error:  # whatever a model says of inputs that do not fit
            problem = error
    if not silenced and not isinstance(problem, (_ForeignError, torch.OutOfMemoryError)):
        raise ValueError(f"example_inputs: the model does not run on them: {describe(problem)}") from problem
    text = f"a copy of the model does not run on the example inputs: {describe(problem)}"
    warnings.warn(text, CaptureWarning, stacklevel=5)
    return real if len(real.calls) > len(fakes.calls) else fakes


class _ForeignError(RuntimeError):
    """A run would write to a tensor that is neither of the copy that runs, nor made by it."""


class _OwnMemory(TorchDispatchMode):
    """Lets operators write to these tensors, and to what they have made themselves."""

    def __init__(self, own: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages = set(map(_storage, own))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Runs ``func``, unless it would write elsewhere."""
        kwargs = kwargs or {}
        for tensor in written(func, args, kwargs):
            if _storage(tensor) not in self._storages:
                raise _ForeignError("it changes a tensor in place that is no attribute of a module")
        result = func(*args, **kwargs)
        self._storages.update(map(_storage, tensors(result)))
        return result


def _storage(tensor: Tensor) -> int | None:
    """Which memory a tensor lies in; a number is used again only by what is made later, so by the run itself."""
    return storage_key(tensor.untyped_storage()) if tensor.layout is torch.strided else None


def _section(root: nn.Module, path: str, called: Called) -> tuple[Section, Capture] | None:
    """The module at ``path`` as it is called first, with its graph; None if it cannot be traced."""
    args, kwargs = called.calls[0]
    if not _runs_its_forward(root.get_submodule(path)):
        return None
    try:
        form = call_form(root.get_submodule(path), args, kwargs)
    except ValueError:  # names that are no names of Python's
        return None
    if not all(isinstance(one, _PLAIN) for value in form.constants.values() for one in tree_leaves(value)):
        return None
    inputs = form.bind(args, kwargs)
    if not inputs or not all(isinstance(one, (*_PLAIN, TensorSpec)) for one in tree_leaves(inputs)):
        return None
    own = capture(root, form, (args, kwargs), path)
    if own.graph is None or path in [part.path for part in own.opaque]:
        return None
    return Section(path, form, called, own.guard), own


def _joined(
    whole: Capture, called: tuple[Any, Any], found: Sequence[tuple[Section, Capture]], calls: Mapping[str, Called]
) -> Capture:
    """One capture with the graph of ``whole``, if there is one, and those of the sections."""
    if not found:
        return whole
    parts = list(found)
    if whole.graph is not None:
        parts.insert(0, (Section("", whole.form, Called((called,)), whole.guard), whole))
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    constants: dict[str, Tensor] = {}
    targets: set[str] = set()
    for number, (_, own) in enumerate(parts):
        for node in _nodes(own):
            if node.op == "placeholder":
                copies[node] = graph.placeholder(f"section{number}_{node.target}")
                copies[node].meta = {**node.meta, SECTION: number}
    for number, (_, own) in enumerate(parts):
        constants |= {f"{name}_{number}": value for name, value in own.constants.items()}
        for node in _nodes(own):
            if node.op in ("placeholder", "output"):
                continue
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta[SECTION] = number
            if node.op == "get_attr" and node.target in own.constants:
                copies[node].target = f"{node.target}_{number}"
            elif node.op in ("call_module", "get_attr"):
                targets.add(str(node.target))
    results = [node.args[0] for _, own in parts for node in _nodes(own) if node.op == "output"]
    graph.output(tuple(fx.map_arg(result, copies.__getitem__) for result in results))
    below = [own for _, own in found]

    def within(part: Opaque) -> Opaque:
        inside = [s.path for s, _ in found if not part.path or s.path.startswith(f"{part.path}.")]
        return dataclasses.replace(part, sections=tuple(inside))

    return Capture(
        graph,
        whole.form,
        tuple(dict.fromkeys((*map(within, whole.opaque), *(part for own in below for part in own.opaque)))),
        (),
        constants,
        sections=tuple(section for section, _ in parts),
        each=tuple(dataclasses.replace(own, graph=None) for _, own in parts),
        strays={path: own for path, own in calls.items() if path not in targets},
    )


def _nodes(captured: Capture) -> Iterator[fx.Node]:
    assert captured.graph is not None
    yield from captured.graph.nodes
