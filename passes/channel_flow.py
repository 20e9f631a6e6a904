"""Flow: which values hold the same channels, found by one walk over the graph (again wherever a space turns out finer).

Facts only: nothing is decided and nothing is rewritten. What an operation does to its channels is said by the tables of
``elementwise_rules.py``, ``layer_rules.py`` and ``reshape_rules.py``; an operation in no table mixes channels as far as
anyone knows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from fx_approx.core.candidates import Shape
from fx_approx.core.values import Values
from fx_approx.passes.channel_spaces import Layout, Restart, Spaces, stretch

_MANY = 10_000


@dataclasses.dataclass(frozen=True)
class Link:
    """``count`` segments of ``source``, from ``start`` on, are those of the node's own axis from ``place`` on."""

    source: fx.Node
    start: int
    place: int
    count: int


@dataclasses.dataclass(frozen=True)
class Step:
    """What a node does to the channels.

    Attributes:
        layout: Of its value; of the parts of a tuple, one behind the other; None if it has no channels.
        links: Which channels of which operands it needs for which of its own.
        follow: Operands without channels of their own that have one entry for each of the node's, with the axis.
        action: How it is made to work on some channels only: ``plain`` (it does by itself), ``layer`` (takes the
            selection), ``produce`` (a linear or convolution layer), ``depthwise``, ``resize``, ``split``, ``take`` (a
            stretch of the channels), ``pad`` (channels around them); ``given`` for a value that is always whole.
        axis: Of ``resize``, position in the new shape.
        sections: Of ``split``, the segments of each part, first and last; of ``pad``, those of the operand.
        groups: Of a convolution.
        also: Another axis with the same, as that of the keys where each token is multiplied with each.
    """

    layout: Layout | None = None
    links: tuple[Link, ...] = ()
    follow: tuple[tuple[fx.Node, int], ...] = ()
    action: str = "given"
    axis: int = 0
    sections: tuple[tuple[int, int], ...] = ()
    groups: int = 1
    also: int | None = None


Handler = Callable[["Flow", fx.Node], "Step | None"]


class Flow:
    """The facts of one graph.

    Attributes:
        steps: What each node does to the channels.
        readers: Linear and convolution layers, with the axis of their input that they contract over and its layout.
        stopped: Why the channels of a node's value cannot be followed through it, where that is worth telling.
        constants: Nodes that depend on no input.
        spaces: See there.
    """

    def __init__(
        self, root: nn.Module, graph: fx.Graph, values: Values, handle: Callable[[Flow, fx.Node], Step | None]
    ) -> None:
        self.root, self.graph, self.values = root, graph, values
        self.modules = dict(root.named_modules())
        self.spaces = Spaces()
        self.constants = _constants(graph)
        self.steps: dict[fx.Node, Step] = {}
        self.readers: dict[fx.Node, tuple[fx.Node, Layout]] = {}
        self.stopped: dict[fx.Node, str] = {}
        for _ in range(_MANY):
            try:
                self._walk(handle)
                return
            except Restart:
                continue
        raise AssertionError("the spaces of the graph do not settle")

    def _walk(self, handle: Callable[[Flow, fx.Node], Step | None]) -> None:
        self.spaces.begin()
        self.steps, self.readers, self.stopped = {}, {}, {}
        for node in self.graph.nodes:
            self.steps[node] = handle(self, node) or Step()

    def layout(self, node: Any) -> Layout | None:
        """The layout of a node that was walked over; None for anything else."""
        return self.steps[node].layout if isinstance(node, fx.Node) and node in self.steps else None

    def shape(self, node: Any) -> Shape | None:
        """The shape of a tensor, None for anything else."""
        return self.values.of(node)

    def ensure(self, node: Any, dim: int) -> Layout | None:
        """The layout of an operand along ``dim``: a value of unknown making begins spaces, and is always whole."""
        shape = self.shape(node)
        if shape is None or not -len(shape) <= dim < len(shape):
            return None
        dim %= len(shape)
        found = self.layout(node)
        if found is not None:
            return found if found.dim == dim and found.size == shape[dim] else None
        if self.steps[node].layout is None and not self.steps[node].links and node not in self.constants:
            made = self.spaces.new(node, dim, shape[dim])
            if made is not None:
                self.steps[node] = dataclasses.replace(self.steps[node], layout=made, action="given")
            return made
        return None

    def module(self, node: fx.Node) -> nn.Module | None:
        """The layer that a node calls."""
        return self.modules.get(str(node.target)) if node.op == "call_module" else None


def first(node: fx.Node) -> Any:
    """The first argument of a call, however it is given."""
    return node.args[0] if node.args else next(iter(node.kwargs.values()), None)


def _constants(graph: fx.Graph) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr" or (
            node.op in ("call_function", "call_method")
            and node.all_input_nodes
            and all(source in found for source in node.all_input_nodes)
        ):
            found.add(node)
    return found


def reads_shape_only(user: fx.Node, node: fx.Node) -> bool:
    """Whether ``user`` asks ``node`` for what is the same for all selections, or for sizes.

    Sizes are those of the whole value wherever it is narrowed, see :func:`fx_approx.ops.channel_slices.whole_size`.
    """
    if user.op == "call_method" and user.target in ("dim", "ndimension"):
        return True
    if user.op == "call_function" and user.target is getattr:
        return user.args[1] in ("shape", "dtype", "device", "ndim", "is_cuda")
    if user.op == "call_method" and user.target in AS_ANOTHER:
        return user.args[0] is not node
    return asks_sizes(user)


def asks_sizes(user: fx.Node) -> bool:
    """Whether ``user`` is ``x.size()``, ``x.size(1)`` or ``x.shape``."""
    if user.op == "call_function":
        return user.target is getattr and user.args[1] == "shape"
    plain = not user.kwargs and all(isinstance(place, int) for place in user.args[1:])
    return user.op == "call_method" and user.target == "size" and plain


AS_ANOTHER = ("view_as", "reshape_as", "expand_as")
"""Methods that take the sizes of another tensor."""


def argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    """An argument of a call, however it is given."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def through(source: fx.Node, layout: Layout, dim: int | None = None, **extra: Any) -> Step:
    """All channels of ``source``, one to one, perhaps along another axis."""
    count = len(layout.segments)
    moved = Layout(layout.dim if dim is None else dim, layout.segments)
    return Step(moved, (Link(source, 0, 0, count),), **{"action": "plain", **extra})


def fold(flow: Flow, source: fx.Node, layout: Layout, times: int, dim: int, **extra: Any) -> Step | None:
    """The axis is ``times`` stretches of the same channels, of which one is left, along ``dim``."""
    parts = []
    for part in range(times):
        ends = stretch(flow.spaces, layout.segments, part * layout.size // times, (part + 1) * layout.size // times)
        if ends is None:
            return None
        parts.append(ends)
    lead = layout.segments[slice(*parts[0])]
    for start, end in parts[1:]:
        if not flow.spaces.align(lead, layout.segments[start:end]):
            return None
        flow.spaces.merge(lead, layout.segments[start:end])
    links = tuple(Link(source, start, 0, end - start) for start, end in parts)
    return Step(Layout(dim, lead), links, **{"action": "plain", **extra})
