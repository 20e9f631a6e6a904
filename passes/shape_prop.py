"""Shapes: runs the captured graph on fake tensors and writes down the facts of every product."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fx_approx._compat import storage_key, tree_leaves, tree_map_only
from fx_approx.capture.asserts import only_checks
from fx_approx.capture.fake_model import UNKNOWABLE, FakeModel, NoValuesError, fake_model
from fx_approx.capture.records import META_KEY, SECTION, Capture, UnfitGraphError
from fx_approx.core.candidates import CallShapes, GemmShape, ProductFacts, RoleFlops
from fx_approx.core.flops import measured_flops, role_flops
from fx_approx.core.values import Values
from fx_approx.ops.base import Unsupported
from fx_approx.passes.find_candidates import CandidateSite

_DIFFERS = "its graph does not compute what its Python does"


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a run on fake tensors told.

    Attributes:
        facts: By candidate name.
        blocked: Reasons that only shapes show.
        stopped: What stopped the propagation, if anything.
        values: Of the values of the graph, up to where the run stopped; None without a graph.
    """

    facts: dict[str, ProductFacts]
    blocked: dict[str, str]
    stopped: str | None = None
    values: Values | None = None


def propagate(
    root: nn.Module, captured: Capture, found: list[CandidateSite], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Shapes:
    """The facts of all candidates that a call with these inputs reaches.

    Nothing of ``root`` is touched: a fake copy runs, so that BatchNorm counts nothing and no random number is drawn.

    Args:
        root: The model.
        captured: Its capture.
        found: Its candidates.
        args: Positional example inputs; tensors or :class:`TensorSpec`.
        kwargs: Keyword example inputs.

    Raises:
        UnfitGraphError: Its graph does not run on these inputs, but its own forward does.
        ValueError: The model does not run on these inputs; names the place.
    """
    recorder = _Recorder({one.candidate.name: one for one in found})
    with fake_model(root, captured.constants) as fake:
        recorder.storages.ignore([*fake.module.parameters(), *fake.module.buffers()])
        if captured.sections:
            _run_sections(fake, captured, recorder)
            return recorder.shapes()
        recorder.watch(fake.module)
        return recorder.shapes(_stopped(fake, captured, recorder, fake.own(args), fake.own(dict(kwargs))))


def _stopped(
    fake: FakeModel, captured: Capture, recorder: _Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """Runs the model, and says what stopped it."""
    try:
        _run(fake.module, captured, recorder, args, kwargs)
    except UNKNOWABLE as error:
        kind = "" if isinstance(error, NoValuesError) else f"{type(error).__name__}: "
        return kind + _first_line(error)
    except ValueError as error:
        if not fake.silenced:
            raise
        return f"without the hooks of {', '.join(fake.silenced)} it does not run: {error}"
    return None


def _run_sections(fake: FakeModel, captured: Capture, recorder: _Recorder) -> None:
    """Runs each section of the graph, and each layer outside, as the example called it."""
    assert captured.graph is not None
    for number, section in enumerate(captured.sections):
        for args, kwargs in reversed(section.called.calls):  # the first call last, so that its values stay
            values = section.form.bind(fake.inner(args), fake.inner(kwargs))
            if values is None:
                continue
            try:
                _Interpreter(fake.module, captured.graph, recorder).run_section(number, values)
            except UNKNOWABLE:
                continue
            except Exception as error:  # whatever an operator says of inputs that do not fit
                raise UnfitGraphError(f"{_DIFFERS}: {recorder.told(error, section.path)}") from error
    for one in recorder.found.values():
        if one.module in captured.strays and one.module is not None and not one.candidate.node:
            for args, kwargs in captured.strays[one.module].calls:
                recorder.layer(one, fake.module.get_submodule(one.module), fake.inner(args), fake.inner(kwargs))


def _run(
    fake: nn.Module, captured: Capture, recorder: _Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    values = captured.form.bind(args, kwargs)
    try:
        if captured.graph is None or values is None:
            fake(*args, **kwargs)
        else:
            _Interpreter(fake, captured.graph, recorder).run(*values)
    except UNKNOWABLE:
        raise
    except Exception as error:  # whatever an operator says of inputs that do not fit
        told = recorder.told(error, type(fake).__name__)
        if captured.graph is not None and values is not None and _runs_itself(fake, args, kwargs):
            raise UnfitGraphError(f"{_DIFFERS}: {told}") from error
        raise ValueError(f"example_inputs: the model does not run on them: {told}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _runs_itself(fake: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        fake(*args, **kwargs)
    except UNKNOWABLE:
        return True
    except Exception:
        return False
    return True


class _Interpreter(fx.Interpreter):
    def __init__(self, root: nn.Module, graph: fx.Graph, recorder: _Recorder) -> None:
        super().__init__(root, graph=graph)
        self.recorder = recorder

    def run_node(self, n: fx.Node) -> Any:
        if only_checks(n.target):  # of values that are not known here
            return None
        self.recorder.place = str(n.target) if n.op == "call_module" else n.name
        one = self.recorder.at(n)
        if one is not None:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            if n.op == "call_module":
                self.recorder.layer(one, self.fetch_attr(str(n.target)), args, kwargs)
            else:
                self.recorder.call(one, self._function(n), args, kwargs)
        with self.recorder.storages.watching(n.name):
            result = super().run_node(n)
        self.recorder.value(n, result)
        return result

    def run_section(self, number: int, values: list[Any]) -> None:
        """Runs the nodes of one section."""
        self.args_iter = iter(values)
        for node in self.graph.nodes:
            if node.meta.get(SECTION) == number:
                self.env[node] = self.run_node(node)

    @staticmethod
    def _function(node: fx.Node) -> Callable[..., Any]:
        if node.op == "call_method":
            return lambda receiver, *args, **kwargs: getattr(receiver, str(node.target))(*args, **kwargs)
        assert callable(node.target)
        return node.target


class _Storages:
    """Numbers the pieces of memory that values lie in, and notes which of them autograd keeps for which node."""

    def __init__(self) -> None:
        self.saved: dict[str, tuple[int, ...]] = {}
        self.bytes: dict[int, int] = {}
        self._numbers: dict[int, int] = {}
        self._alive: list[torch.UntypedStorage] = []  # so that no other takes its place
        self._ignored: set[int] = set()

    def number(self, tensor: Tensor) -> int | None:
        """Of a tensor's memory; None for that of a parameter, and for what is not strided."""
        if tensor.layout is not torch.strided:
            return None
        storage = tensor.untyped_storage()
        place = storage_key(storage)
        if place not in self._numbers:
            self._numbers[place] = len(self._alive)
            self._alive.append(storage)
            self.bytes[self._numbers[place]] = storage.nbytes()
        number = self._numbers[place]
        return None if number in self._ignored else number

    def ignore(self, tensors: list[Tensor]) -> None:
        """Leaves the memory of these tensors out of the counts: it is there in every step."""
        self._ignored |= {number for tensor in tensors if (number := self.number(tensor)) is not None}

    @contextlib.contextmanager
    def watching(self, name: str) -> Iterator[None]:
        """Notes what autograd keeps of the operations inside."""
        kept: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            number = self.number(tensor)
            if number is not None:
                kept.append(number)
            return tensor.detach()  # itself, a result that its own backward keeps would never be freed

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
        self.saved[name] = tuple(dict.fromkeys(kept))


class _Recorder:
    def __init__(self, found: dict[str, CandidateSite]) -> None:
        self.found = found
        self.storages = _Storages()
        self.facts: dict[str, ProductFacts] = {}
        self.blocked: dict[str, str] = {}
        self.place = ""
        self._shapes: dict[str, Any] = {}
        self._bytes: dict[str, int] = {}
        self._places: dict[str, tuple[int, ...]] = {}

    def value(self, node: fx.Node, result: Any) -> None:
        """Records what a node gave."""
        if isinstance(result, Tensor):
            self._shapes[node.name], self._bytes[node.name] = tuple(result.shape), result.itemsize
        elif isinstance(result, (tuple, list)) and result and all(isinstance(part, Tensor) for part in result):
            self._shapes[node.name] = [tuple(part.shape) for part in result]
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        places = [place for leaf in leaves if (place := self.storages.number(leaf)) is not None]
        self._places[node.name] = tuple(dict.fromkeys(places))

    def shapes(self, stopped: str | None = None) -> Shapes:
        """All that was recorded, up to where the run ``stopped``."""
        found, values = self.storages, None
        if self._shapes:
            values = Values(self._shapes, self._bytes, self._places, found.saved, found.bytes, stopped is None)
        return Shapes(self.facts, self.blocked, stopped, values)

    def told(self, error: Exception, otherwise: str) -> str:
        """What an error says, and where the run was; ``otherwise`` where it had not begun."""
        return f"at {self.place or otherwise}: {_first_line(error)}"

    def at(self, node: fx.Node) -> CandidateSite | None:
        """The candidate that ``node`` itself is (a part that is not traced holds several, and is none)."""
        for name in node.meta.get(META_KEY, ()):
            one = self.found[name]
            if one.candidate.node == node.name:
                return one
        return None

    def watch(self, root: nn.Module) -> None:
        """Records the layers inside parts that are not traced when those parts call them."""
        for one in self.found.values():
            if one.module is None or one.candidate.node:
                continue

            def record(module: nn.Module, args: Any, kwargs: Any, one: CandidateSite = one) -> None:
                self.layer(one, module, args, kwargs)

            root.get_submodule(one.module).register_forward_pre_hook(record, with_kwargs=True)

    def layer(self, one: CandidateSite, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Records a layer that is called with ``args``."""
        if one.op is None:
            weights: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
            self._measure(one, module.forward, args, kwargs, weights, module)
        else:
            lhs = args[0] if args else next(iter(kwargs.values()))
            weight = module.weight
            assert isinstance(weight, Tensor)
            self._product(one, lhs, weight, one.op_kwargs)

    def call(
        self, one: CandidateSite, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Records a functional call."""
        if one.op is not None:
            try:
                bound = one.op.bind(args, kwargs)
                op_kwargs = {name: bound[name] for name in one.op.kwarg_names}
                one.op.check(op_kwargs)
                self._product(one, bound[one.op.lhs], bound[one.op.rhs], op_kwargs)
                return
            except Unsupported as error:
                self.blocked[one.candidate.name] = str(error)
        self._measure(one, function, args, kwargs, [])

    def _product(self, one: CandidateSite, lhs: Tensor, rhs: Tensor, op_kwargs: Mapping[str, Any]) -> None:
        assert one.op is not None
        shape = one.op.geometry(lhs.shape, rhs.shape, op_kwargs)
        name = one.candidate.name
        if not lhs.is_floating_point() or not rhs.is_floating_point():
            self.blocked[name] = f"{lhs.dtype}: only real floating-point products are sampled"
        elif shape.pairs == 1:
            self.blocked[name] = "one column-row pair, nothing to choose from"
        facts = ProductFacts(
            shape=shape,
            flops=role_flops(shape, lhs.requires_grad, rhs.requires_grad),
            dtype=str(lhs.dtype),
            device=str(lhs.device),
            lhs_bytes=lhs.numel() * lhs.itemsize,
            rhs_bytes=rhs.numel() * rhs.itemsize,
            lhs_kept=rhs.requires_grad or (one.op.keeps_both and lhs.requires_grad),
            rhs_kept=lhs.requires_grad or (one.op.keeps_both and rhs.requires_grad),
            rhs_is_parameter=isinstance(rhs, nn.Parameter),
            call=CallShapes(
                tuple(lhs.shape), tuple(rhs.shape), tuple(sorted(op_kwargs.items())), _is_channels_last(lhs)
            ),
        )
        before = self.facts.get(name)
        self.facts[name] = facts if before is None else _summed(before, facts)

    def _measure(
        self,
        one: CandidateSite,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        weights: list[Tensor],
        module: nn.Module | None = None,
    ) -> None:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # On copies, so that the graph behind the inputs is not walked.
        copies = {id(t): t.detach().requires_grad_(t.requires_grad) for t in inputs}
        args, kwargs = tree_map_only(Tensor, lambda t: copies[id(t)], (args, kwargs))
        flops = measured_flops(lambda: function(*args, **kwargs), list(copies.values()), weights)
        if flops.total == 0 and isinstance(module, nn.RNNBase):
            flops = _recurrent(module, inputs[0])
        reference = inputs[0] if inputs else torch.empty(0)
        facts = ProductFacts(None, flops, str(reference.dtype), str(reference.device))
        before = self.facts.get(one.candidate.name)
        self.facts[one.candidate.name] = facts if before is None else _summed(before, facts)


def _recurrent(module: nn.RNNBase, input: Tensor) -> RoleFlops:
    """Every weight matrix of a recurrent layer multiplies once per time step and example, in each role.

    No gradient goes to the state before the first step, and to the input of the first layer only if it needs one. As
    in measured counts, the way back through time belongs to the weights where the input needs no gradient. The counter
    does not see torch's fused float32 LSTM on CPUs, so it cannot be measured there.

    Args:
        module: The layer.
        input: ``[T, B, size]``, ``[B, T, size]`` if batch_first, ``[T, size]``, or the rows of a packed sequence, which
            count as one example.
    """
    rows = input.numel() // module.input_size
    examples = 1 if input.dim() == 2 else input.shape[0 if module.batch_first else 1]
    sizes = {name: p.numel() for name, p in module.named_parameters() if p.dim() > 1}
    recurrent = sum(size for name, size in sizes.items() if "_hh_" in name)
    first = sum(size for name, size in sizes.items() if name.startswith("weight_ih_l0"))
    total = 2 * rows * sum(sizes.values())
    back = total - 2 * examples * recurrent - (0 if input.requires_grad else 2 * rows * first)
    if input.requires_grad:
        return RoleFlops(total, back, total)
    return RoleFlops(total, 0, total + back)


def _summed(one: ProductFacts, other: ProductFacts) -> ProductFacts:
    """Two calls of one layer inside a part that is not traced: more rows of the same product."""
    shape: GemmShape | None = None
    if one.shape is not None and other.shape is not None:
        shape = dataclasses.replace(one.shape, m=one.shape.m + other.shape.m)
    flops: RoleFlops = one.flops + other.flops
    return dataclasses.replace(one, shape=shape, flops=flops, lhs_bytes=one.lhs_bytes + other.lhs_bytes, call=None)


def _is_channels_last(tensor: Tensor) -> bool:
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    return form is not None and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=form)
