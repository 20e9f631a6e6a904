"""The graph of a Dynamo backend as a captured model: layers at their paths again, on the same parameters.

Dynamo writes a layer as the function that it calls, with its parameters among the graph's inputs. The passes know
layers. So a skeleton of bare modules holds the parameters and buffers at their paths; a call that is exactly what a
layer there does becomes a call of that layer, and what is left stays a function on a parameter.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
import re
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from fx_approx._compat import (
    BatchNormBase,
    ConvolutionBase,
    HigherOrderOperator,
    children_of,
    has_one_projection,
    is_checkpoint,
    parameters_of,
    take_apart,
)
from fx_approx.capture.records import CallForm, Capture
from fx_approx.core.hooks import is_hooked
from fx_approx.core.layer_types import layer_type
from fx_approx.dynamo.frame import Frame, Root
from fx_approx.ops.base import find_op
from fx_approx.runtime.checkpoints import CHECKPOINT_KEY, Checkpoint, checkpoint_of

_LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
_CONVOLUTIONS: dict[Any, type[nn.Module]] = {
    torch.conv1d: nn.Conv1d,
    torch.conv2d: nn.Conv2d,
    torch.conv3d: nn.Conv3d,
}
_NORMALISATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Lifted(nn.Module):
    """The root of the skeleton; only its graph runs."""

    def forward(self, *values: Any) -> Any:
        raise AssertionError("the graph of a Dynamo frame runs, not this")


@dataclasses.dataclass(frozen=True)
class LayerRecovery:
    """A captured graph of a frame.

    Attributes:
        root: The skeleton.
        captured: The graph; its inputs are those of Dynamo's graph that are no parameters or buffers.
        inputs: Their positions among Dynamo's inputs.
        parameters: Position among Dynamo's inputs, and path, of the parameters and buffers.
        dynamic: Position among Dynamo's inputs, and dimension, of the sizes that are not fixed.
        scalars: Position among Dynamo's inputs of the tensors that stand for a Python number.
        turned: Paths of the weights that are transposed in their layers: a product with one that is stored
            ``[inputs, outputs]``, as in ``Conv1D`` of Hugging Face, is a linear layer on its transpose.
        higher_order: Names of the operators in the graph that hold graphs themselves, or transform functions.
        frame: The frame.
    """

    root: Lifted
    captured: Capture
    inputs: tuple[int, ...]
    parameters: tuple[tuple[int, str], ...]
    dynamic: tuple[tuple[int, int], ...]
    scalars: frozenset[int]
    turned: frozenset[str]
    higher_order: frozenset[str]
    frame: Frame


def prefix_of(frame: Frame, root: Root) -> str:
    """Where a root stands in the skeleton: at its path if that is known, at the top if it is the only one."""
    if root.path or len(frame.roots) == 1:
        return root.path
    name = re.sub(r"\W+", "_", root.name.removeprefix("L")).strip("_")
    earlier = {prefix_of(frame, one) for one in frame.roots[: frame.roots.index(root)]}
    while hasattr(nn.Module, name) or name in earlier:  # a module cannot be called as its own methods are
        name += "_"
    return name


def place_of(frame: Frame, path: str) -> tuple[Root, str] | None:
    """The root that a path of the skeleton is in, and the path there; None for a place outside all roots."""
    for root in frame.roots:
        prefix = prefix_of(frame, root)
        if not prefix or path == prefix or path.startswith(prefix + "."):
            return root, path[len(prefix) :].removeprefix(".")
    return None


def lift(gm: fx.GraphModule, frame: Frame) -> LayerRecovery:
    """Puts the layers of a frame's modules back into its graph."""
    return _Lifter(gm, frame).run()


class _Lifter:
    def __init__(self, gm: fx.GraphModule, frame: Frame) -> None:
        self.gm, self.frame = gm, frame
        self.root = Lifted()
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, Any] = {}
        self.checkpoints: tuple[Checkpoint, ...] = ()
        self.constants: dict[str, Tensor] = {}
        self.counts: dict[fx.Node, fx.Node] = {}
        self.inputs: list[int] = []
        self.sizes: list[fx.Node] = []
        self.names: dict[int, str] = {}
        self.readers: dict[str, int] = {}
        self.turned: set[str] = set()
        for root in frame.roots:
            prefix = prefix_of(frame, root)
            for path, tensor in (*root.module.named_parameters(prefix), *root.module.named_buffers(prefix)):
                self.names.setdefault(id(tensor), path)
        self.top = prefix_of(frame, frame.roots[0]) if len(frame.roots) == 1 else ""
        self.root.training = len(frame.roots) == 1 and frame.roots[0].module.training

    def run(self) -> LayerRecovery:
        """Copies the graph node by node."""
        nodes = list(self.gm.graph.nodes)
        given = [node for node in nodes if node.op == "placeholder"]
        parameters = {position: path for position, node in enumerate(given) if (path := self._path(node))}
        sizes = {position: node for position, node in enumerate(given) if _symbol(node.meta.get("example_value"))}
        for position, node in enumerate(given):
            if position not in parameters and position not in sizes:
                self._take(position, node)
        dynamic = [
            (position, dim, _symbol(size))
            for position in self.inputs
            for dim, size in enumerate(getattr(given[position].meta.get("example_value"), "shape", ()))
            if isinstance(size, torch.SymInt)
        ]
        places = {symbol: (position, dim) for position, dim, symbol in reversed(dynamic)}
        for position, node in sizes.items():
            if _symbol(node.meta["example_value"]) not in places:
                self._take(position, node)
        for position, path in parameters.items():
            self._hold(path, self.frame.tensors[given[position].name])
            self.copies[given[position]] = self.graph.create_node("get_attr", path)
            self.readers[path] = self.readers.get(path, 0) + len(given[position].users)
        for node in sizes.values():
            if node not in self.copies:
                place, dim = places[_symbol(node.meta["example_value"])]
                self.copies[node] = self.graph.call_method("size", (self.copies[given[place]], dim))
                self.sizes.append(self.copies[node])
        for node in nodes:
            if node.op != "placeholder":
                self._add(node, self.gm)
        self._sweep()
        names = tuple(str(node.target) for node in self.graph.find_nodes(op="placeholder"))
        captured = Capture(self.graph, CallForm(names, names, {}, {}), (), (), self.constants)
        marks = tuple((position, dim) for position, dim, _ in dynamic)
        held = tuple(parameters.items())
        scalars = frozenset(position for position in self.inputs if _is_number(given[position]))
        turned, special = frozenset(self.turned), higher_order(self.gm)
        return LayerRecovery(self.root, captured, tuple(self.inputs), held, marks, scalars, turned, special, self.frame)

    def _path(self, node: fx.Node) -> str | None:
        """Where the parameter or buffer that an input stands for is in the skeleton; None for another input."""
        tensor = self.frame.tensors.get(node.name)
        return None if tensor is None else self.names.get(id(tensor))

    def _take(self, position: int, node: fx.Node) -> None:
        self.inputs.append(position)
        self.copies[node] = self.graph.placeholder(node.name)

    def _hold(self, path: str, tensor: Tensor | None) -> None:
        """Registers a tensor in the skeleton."""
        holder, _, name = path.rpartition(".")
        module = self._module(holder)
        if name in parameters_of(module):  # of a copied layer: functional_call puts plain tensors there
            parameters_of(module)[name] = tensor
        elif isinstance(tensor, nn.Parameter):
            module.register_parameter(name, tensor)
        else:
            module.register_buffer(name, tensor)

    def _module(self, path: str) -> nn.Module:
        """The module of the skeleton at ``path``, made if it is not there; a copy of a layer, else a bare one."""
        here: nn.Module = self.root
        walked = ""
        for part in path.split(".") if path else ():
            walked = f"{walked}.{part}" if walked else part
            if part not in children_of(here):
                here.add_module(part, self._bare(walked))
            child = children_of(here)[part]
            assert child is not None
            here = child
        return here

    def _bare(self, path: str) -> nn.Module:
        """A module for ``path``: a copy of the user's layer on the same parameters, or one without a forward."""
        made = nn.Module()
        found = place_of(self.frame, path)
        real = None if found is None else found[0].find(found[1])
        made.training = False
        if real is not None:
            made.training = real.training
            if _is_plain_layer(real):
                made = type(real).__new__(type(real))
                made.__dict__.update(vars(real))
                take_apart(made, real)
                if isinstance(made, nn.MultiheadAttention):
                    made.batch_first = False  # the function takes positions first, and what is before sees to it
        return made

    def _add(self, node: fx.Node, gm: fx.GraphModule) -> None:
        """Copies one node of ``gm``, of a checkpoint all that is in it."""
        held = getattr(gm, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(held, fx.GraphModule):
            return
        if is_checkpoint(node.target):
            self._open(node, gm)
            return
        source = node.args[0] if node.target is operator.getitem else None
        results = self.copies[source] if isinstance(source, fx.Node) else None
        if isinstance(results, (tuple, list)):
            self.copies[node] = results[cast(int, node.args[1])]
        else:
            self.copies[node] = self._copy(node)
            if isinstance(held, Tensor):
                # Graphs in a graph count their constants for themselves.
                name = str(node.target)
                while name in self.constants and self.constants[name] is not held:
                    name += "_"
                self.constants[name], self.copies[node].target = held, name

    def _open(self, node: fx.Node, gm: fx.GraphModule) -> None:
        """Copies the graph of a checkpoint, each node marked with it."""
        body, *given = node.args
        assert isinstance(body, fx.Node)
        inner: fx.GraphModule = getattr(gm, str(body.target))
        taken = iter(fx.map_arg(tuple(given), lambda other: self.copies[other]))
        around = self.checkpoints
        self.checkpoints = (*around, checkpoint_of(node, inner))
        for one in inner.graph.nodes:
            if one.op == "placeholder":
                self.copies[one] = next(taken)
            elif one.op == "output":
                self.copies[node] = fx.map_arg(one.args[0], lambda other: self.copies[other])
            else:
                self._add(one, inner)
        self.checkpoints = around

    def _copy(self, node: fx.Node) -> fx.Node:
        number = node.args[0] if node.op == "call_method" and node.target == "item" else None
        if isinstance(number, fx.Node) and _is_number(number):
            return cast(fx.Node, self.copies[number])
        copy = self.graph.node_copy(node, lambda other: self.copies[other])
        copy.meta = {CHECKPOINT_KEY: self.checkpoints} if self.checkpoints else {}
        stack: dict[str, tuple[str, Any]] = {}
        if self.top:
            stack[self.top] = (self.top, type(self.frame.roots[0].module))
        for key, (name, kind) in (node.meta.get("nn_module_stack") or {}).items():
            found = self.frame.place_of(key, name)
            if found is not None:
                path = ".".join(filter(None, (prefix_of(self.frame, found[0]), found[1])))
                stack[path] = (path, kind)
        copy.meta["nn_module_stack"] = stack
        owner = next(reversed(stack), "")
        self._module(owner)
        if node.op == "call_method" and node.target == "add_" and isinstance(copy.args[0], fx.Node):
            self.counts[copy.args[0]] = copy
        call = self._layer_call(copy, owner) or self._turned_call(node, copy, owner)
        if call is None:
            return copy
        with self.graph.inserting_after(copy):
            made = self.graph.call_module(owner, *call)
        made.meta = copy.meta
        copy.replace_all_uses_with(made)
        self.graph.erase_node(copy)
        return made

    def _layer_call(self, node: fx.Node, owner: str) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """What the layer at ``owner`` is called with, if ``node`` is exactly its call."""
        module = self._module(owner)
        if node.op != "call_function" or type(module) is nn.Module:
            return None
        for function, signature, fits in _CALLS:
            if node.target is not function or len(node.args) > len(signature):
                continue
            given = {**dict(zip(signature, node.args, strict=False)), **node.kwargs}
            if not fits(self, module, given):
                return None
            if function is F.multi_head_attention_forward:
                return tuple(given[name] for name in _ATTENTION[:3]), {name: given.get(name) for name in _ATTENDING}
            return (given["input"],), {}
        return None

    def _turned_call(self, node: fx.Node, copy: fx.Node, owner: str) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """What ``owner`` is called with as a linear layer, if ``copy`` multiplies by its weight ``[inputs, outputs]``.

        Only if nothing else reads that weight: in the skeleton it stands transposed.
        """
        if node.target is not torch.addmm or len(node.args) != 3 or node.kwargs or not owner:
            return None
        bias, input, weight = copy.args
        bare, source = self._module(owner), node.args[2]
        stored = parameters_of(bare).get("weight")
        fits = (
            type(bare) is nn.Module
            and not children_of(bare)
            and self._is(weight, bare, "weight")
            and self._is(bias, bare, "bias")
            and self.readers.get(f"{owner}.weight") == 1
            and isinstance(source, fx.Node)
            and len(source.users) == 1
        )
        if not fits or stored is None or stored.dim() != 2:
            return None
        layer = nn.Linear.__new__(nn.Linear)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = stored.shape
        layer.training = bare.training
        with torch.enable_grad():
            parameters_of(layer).update(weight=stored.t(), bias=parameters_of(bare)["bias"])
        self.root.set_submodule(owner, layer)
        self.turned.add(f"{owner}.weight")
        return (input,), {}

    def is_linear(self, module: nn.Module, given: dict[str, Any]) -> bool:
        """Whether ``F.linear`` with ``given`` is the call of ``module``."""
        return layer_type(module) in _LINEAR and self._own(module, given, weight="weight", bias="bias")

    def is_convolution(self, module: nn.Module, given: dict[str, Any]) -> bool:
        """Whether a convolution with ``given`` is the call of ``module``."""
        plain = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, **given}
        return (
            isinstance(module, ConvolutionBase)
            and layer_type(module) in _CONVOLUTIONS.values()
            and module.padding_mode == "zeros"
            and all(plain[name] == getattr(module, name) for name in ("stride", "padding", "dilation", "groups"))
            and self._own(module, given, weight="weight", bias="bias")
        )

    def is_normalisation(self, module: nn.Module, given: dict[str, Any]) -> bool:
        """Whether ``F.batch_norm`` with ``given`` is the call of ``module``, with the count of its batches before."""
        if layer_type(module) not in _NORMALISATIONS or not isinstance(module, BatchNormBase):
            return False
        training = given.get("training", False)
        owned = self._own(
            module, given, running_mean="running_mean", running_var="running_var", weight="weight", bias="bias"
        )
        fits = (
            owned
            and module.track_running_stats
            and module.momentum is not None
            and (training, given.get("momentum", 0.1), given.get("eps", 1e-5))
            == (module.training, module.momentum, module.eps)
        )
        if not fits or not training:
            return fits
        # The layer counts the batch itself.
        read = next((read for read in self.counts if self._is(read, module, "num_batches_tracked")), None)
        count = None if read is None else self.counts[read]
        if read is None or count is None or count.args[1:] != (1,) or count.kwargs or count.users:
            return False
        self.graph.erase_node(self.counts.pop(read))
        return True

    def is_attention(self, module: nn.Module, given: dict[str, Any]) -> bool:
        """Whether ``F.multi_head_attention_forward`` with ``given`` is the call of ``module`` in training."""
        if layer_type(module) is not nn.MultiheadAttention or not module.training:
            return False
        assert isinstance(module, nn.MultiheadAttention)
        weights = _SEPARATE if given.get("use_separate_proj_weight") else ("in_proj_weight",)
        numbers = [given.get(name) for name in ("embed_dim_to_check", "num_heads", "dropout_p", "training")]
        return (
            numbers == [module.embed_dim, module.num_heads, module.dropout, True]
            and not given.get("add_zero_attn")
            and all(given.get(name) is None for name in ("bias_k", "bias_v", "static_k", "static_v"))
            and has_one_projection(module) == (weights is not _SEPARATE)
            and self._own(module, given, in_proj_bias="in_proj_bias", **dict(zip(weights, weights, strict=True)))
            and self._is(given.get("out_proj_weight"), module.out_proj, "weight")
            and self._is(given.get("out_proj_bias"), module.out_proj, "bias")
        )

    def _own(self, module: nn.Module, given: dict[str, Any], **names: str) -> bool:
        return all(self._is(given.get(argument), module, name) for argument, name in names.items())

    def _is(self, value: Any, module: nn.Module, name: str) -> bool:
        """Whether ``value`` reads the module's own tensor of that name (or is None where that is None)."""
        own = getattr(module, name, None)
        if own is None or value is None:
            return own is value
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            return False
        holder, _, attribute = str(value.target).rpartition(".")
        return getattr(self._module(holder), attribute, None) is own

    def _sweep(self) -> None:
        """Drops reads of parameters that only the layers themselves need now, and of sizes that no one needs."""
        for node in [*self.graph.find_nodes(op="get_attr"), *self.sizes]:
            if not node.users:
                self.graph.erase_node(node)


_Fits = Callable[[_Lifter, nn.Module, dict[str, Any]], bool]
_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_NORMALISATION = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_ATTENTION = tuple(inspect.signature(F.multi_head_attention_forward).parameters)
_ATTENDING = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
_CALLS: tuple[tuple[Any, tuple[str, ...], _Fits], ...] = (
    (F.linear, ("input", "weight", "bias"), _Lifter.is_linear),
    *((function, _CONVOLUTION, _Lifter.is_convolution) for function in _CONVOLUTIONS),
    (F.batch_norm, _NORMALISATION, _Lifter.is_normalisation),
    (F.multi_head_attention_forward, _ATTENTION, _Lifter.is_attention),
)


def higher_order(gm: fx.GraphModule) -> frozenset[str]:
    """Names of the operators in a graph that hold graphs or transform functions (torch.func); not of checkpoints."""
    operators, calls = set[str](), set[str]()
    for node in gm.graph.nodes:
        if is_checkpoint(node.target):
            operators |= higher_order(getattr(gm, str(node.args[0].target)))
        elif isinstance(node.target, HigherOrderOperator):
            operators.add(node.target.name())
        elif node.op == "call_function" and "functorch" in str(getattr(node.target, "__module__", "")):
            calls.add(str(getattr(node.target, "__name__", node.target)))
    # A transform is several calls; what begins it has its name.
    transforms = {begun[1] for name in calls if (begun := re.fullmatch(r"_(\w+)_increment_nesting", name))}
    return frozenset(operators | (transforms or calls))


def multiplying(gm: fx.GraphModule, frame: Frame) -> dict[str, str]:
    """By a name for it, the path of the owner of each multiply in a graph and in the graphs that it holds."""
    found: dict[str, str] = {}
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if node.op not in ("call_function", "call_method") or find_op(node.target) is None:
                continue
            owner = ""
            for key, (name, _) in (node.meta.get("nn_module_stack") or {}).items():
                place = frame.place_of(key, name)
                if place is not None:
                    owner = ".".join(filter(None, (prefix_of(frame, place[0]), place[1])))
            found[owner if owner and owner not in found else f"{owner}.{node.name}".strip(".")] = owner
    return found


def _is_number(node: Any) -> bool:
    """Whether an input is a tensor only because Dynamo made one of a Python number."""
    readers = list(node.users) if isinstance(node, fx.Node) and node.op == "placeholder" else []
    return bool(readers) and all(user.op == "call_method" and user.target == "item" for user in readers)


def _symbol(size: Any) -> str | None:
    """The name of a size that is not fixed."""
    return str(size.node.expr) if isinstance(size, torch.SymInt) else None


def _is_plain_layer(module: nn.Module) -> bool:
    """Whether calling ``module`` is calling torch's layer of its type, and nothing else."""
    kinds = (*_LINEAR, *_CONVOLUTIONS.values(), *_NORMALISATIONS, nn.MultiheadAttention)
    changed = is_hooked(module) or "forward" in vars(module) or parametrize.is_parametrized(module)
    return layer_type(module) in kinds and not changed
