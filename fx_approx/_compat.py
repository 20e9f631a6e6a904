"""All that fx_approx uses of torch beyond its public interface, each under a name of its own.

What torch marks as private may change with every release. It is used here and nowhere else, and tests/test_compat.py
tells by name what has changed on a torch that is new. Attributes and methods of torch's objects are private names as
well, such as the dictionaries in which a module holds its parameters. Releases 2.11 to 2.14 are supported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, ModuleType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._C._nn import pad as native_pad
from torch._dynamo import trace_rules as _trace_rules
from torch._dynamo.eval_frame import OptimizedModule as _OptimizedModule
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import AttrSource, DictGetItemSource, UnspecializedNNModuleSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.autograd import forward_ad
from torch.autograd import profiler as _profiler
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY as _KEPT
from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
from torch.nn.modules.conv import _ConvNd as ConvolutionBase
from torch.nn.modules.conv import _ConvTransposeNd as TransposedBase
from torch.nn.modules.dropout import _DropoutNd as DropoutBase
from torch.nn.modules.instancenorm import _InstanceNorm as InstanceNormBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

# ---- values in nested containers

# tree_leaves: the elements of nested tuples, lists and dicts, in order.
# tree_map: the same containers with other elements; is_leaf says which containers stay whole.
# tree_map_only: the same where only elements of one type change.

# ---- modules

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Attributes of a module with the hooks that a call of it runs; some kinds of modules lack some."""

MEMBERS = ("_parameters", "_buffers", "_modules")
"""Attributes of a module with the dictionaries of its parameters, its buffers and its children."""

TENSOR_STATE = ("_grad", "_grad_fn", "_version", "_base", "_backward_hooks")
"""Attributes of a tensor about its gradient, its history and its memory."""

# TorchDispatchMode: sees each operation that runs while it is on, below autograd.

TENSOR_CONSTANT = "_tensor_constant"
"""How the names begin under which torch.fx puts tensors that a forward makes into the root."""

ONE_PROJECTION = "_qkv_same_embed_dim"
"""Attribute of ``nn.MultiheadAttention``, see :func:`has_one_projection`."""

CALLS = ("_call_impl", "_wrapped_call_impl")
"""Methods of a module that its call goes through, before ``forward``."""

# BatchNormBase, InstanceNormBase, ConvolutionBase, TransposedBase, DropoutBase: the classes that torch's layers of the
# kind have in common.


_FUSED_ATTENTION = ("efficient_attention", "flash_attention", "cudnn_attention", "fused_attention_overrideable")


def fused_attention() -> tuple[list[Any], list[Any]]:
    """The operators that ``F.scaled_dot_product_attention`` becomes on some device, and those of its backward pass.

    The first arguments of the former are query, key and value; of the latter the output's gradient and those three.
    """
    names = [f"_scaled_dot_product_{name}" for name in (*_FUSED_ATTENTION, "flash_attention_for_cpu")]
    forward = [getattr(torch.ops.aten, name) for name in names if hasattr(torch.ops.aten, name)]
    names = [f"{name}_backward" for name in names]
    return forward, [getattr(torch.ops.aten, name) for name in names if hasattr(torch.ops.aten, name)]


def parameters_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The dictionary in which ``module`` holds its own parameters, to be read and changed."""
    return cast(dict[str, Tensor | None], module._parameters)


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The dictionary in which ``module`` holds its own buffers, to be read and changed."""
    return module._buffers


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The dictionary in which ``module`` holds its children, to be read and changed."""
    return module._modules


def set_parameters(module: nn.Module, parameters: Mapping[str, Tensor | None]) -> None:
    """Gives ``module`` a dictionary of parameters of its own; plain tensors may stand in it."""
    vars(module)["_parameters"] = dict(parameters)


def take_apart(module: nn.Module, model: nn.Module) -> None:
    """Gives ``module``, whose attributes are those of ``model``, dictionaries of its own, and no children."""
    vars(module).update(_parameters=dict(model._parameters), _buffers=dict(model._buffers), _modules={})


class Moved(nn.Module):
    """A module that says itself what ``to``, ``half``, ``cuda`` and alike do to it."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Moved:
        self._fx_approx_move(fn, lambda: super(Moved, self)._apply(fn, recurse))  # type: ignore[no-untyped-call]
        return self

    def _fx_approx_move(self, fn: Callable[[Tensor], Tensor], usual: Callable[[], object]) -> None:
        """What a move does; the user's class stands behind this one, so the name must be none of its own.

        Args:
            fn: The tensor in its new place or data type.
            usual: Does what torch does with any module.
        """
        usual()


def is_profiling() -> bool:
    """Whether a profiler of torch records; as cheap as reading an attribute."""
    return bool(_profiler._is_profiler_enabled)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module`` came from ``torch.compile`` or was compiled in place (``module.compile()``)."""
    return isinstance(module, _OptimizedModule) or module._compiled_call_impl is not None


def forget_compiled(module: nn.Module) -> None:
    """Undoes ``module.compile()``: it runs its own Python again."""
    module._compiled_call_impl = None


def uncompiled(module: nn.Module) -> nn.Module | None:
    """The module in what ``torch.compile`` returned; None where ``module`` is something else."""
    if not isinstance(module, _OptimizedModule):
        return None
    inner: nn.Module = module._orig_mod
    return inner


def has_one_projection(module: nn.MultiheadAttention) -> bool:
    """Whether one parameter projects query, key and value; where their widths differ, each has its own."""
    return bool(module._qkv_same_embed_dim)


def check_input_dim(layer: BatchNormBase | InstanceNormBase, input: Tensor) -> None:
    """Raises the error of a normalisation layer for an input of a wrong number of dimensions."""
    layer._check_input_dim(input)  # type: ignore[no-untyped-call]


def convolve(layer: nn.Module, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The forward of a convolution layer with another weight: its own padding, stride and groups."""
    forward: Callable[[Tensor, Tensor, Tensor | None], Tensor] = cast(Any, layer)._conv_forward
    return forward(input, weight, bias)


def padding_of(layer: nn.Module) -> list[int]:
    """What a convolution that does not pad with zeros gives to ``F.pad``: last dimension first, both sides."""
    sides: list[int] = cast(Any, layer)._reversed_padding_repeated_twice
    return sides


# ---- tensors

# native_pad: what F.pad calls, with the same arguments; Dynamo writes it in the place of F.pad.


def version_of(tensor: Tensor) -> int:
    """How often ``tensor`` was changed in place; an error for an inference tensor, which does not count."""
    return tensor._version


def storage_key(storage: torch.UntypedStorage) -> int:
    """A number that tensors on the same memory share, fake ones too; valid while ``storage`` lives."""
    return int(storage._cdata)


def written(operator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among the arguments of an operator, as a dispatch mode sees it, that a call writes to."""
    schema = getattr(operator, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    found: list[Tensor] = []
    for number, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return found


# FakeTensor: what they are.
# FakeTensorMode: inside, tensors have shapes and data types and no values.
# FakeCopyMode: inside, copy.deepcopy of a module makes fake parameters.
# DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException: what cannot be known of
# fake tensors: a result or a shape that depends on values, and an operator without a rule.

FAKE_TENSOR_LOGGER = "torch._subclasses.fake_tensor"
"""The logger that writes a traceback for each operator that fails on fake tensors."""

# ---- checks

CHECKS: tuple[Callable[..., None], ...] = (torch._check, torch._check_index, torch._check_value, torch._assert)
"""Functions that compute nothing, and raise an error where a condition does not hold."""


def assert_true(condition: Any, message: str) -> None:
    """An assertion that ``torch.compile`` keeps in its graph, of a tensor too."""
    if isinstance(condition, Tensor) and torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not condition:
        raise AssertionError(message)


# ---- torch.fx


def is_erased(node: fx.Node) -> bool:
    """Whether ``node`` was taken out of its graph."""
    return node._erased


@contextlib.contextmanager
def checks_replaced(by: Callable[[Callable[..., None]], Callable[..., None]]) -> Iterator[None]:
    """Puts ``by(check)`` in the place of each of :data:`CHECKS` that has no ``__torch_function__``."""
    own = CHECKS[:3]
    for check in own:
        setattr(torch, check.__name__, by(check))
    try:
        yield
    finally:
        for check in own:
            setattr(torch, check.__name__, check)


def wrap_functions(tracer: fx.Tracer, module: ModuleType) -> None:
    """Makes calls of the tracer's ``autowrap_functions`` nodes where they are called as attributes of ``module``."""
    tracer._autowrap_search.append(module)


def keep_in_copies(module: fx.GraphModule, name: str) -> None:
    """Has ``copy.deepcopy`` copy an attribute of ``module``, too; it copies what the graph names, and little else."""
    module.meta.setdefault(_KEPT, {})[name] = vars(module)[name]


# ---- autograd and function transforms


def in_backward() -> bool:
    """Whether this thread is inside a backward pass, so that a forward is a recomputation."""
    return bool(torch._C._current_graph_task_id() != -1)


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Calls ``callback`` once the backward pass that is running has ended."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def transforms_in_progress() -> list[str]:
    """Function transforms that are running, outermost first: ``Vmap``, ``Jvp``, ``Grad`` and others."""
    kinds = [interpreter.key().name for interpreter in torch._C._functorch.get_interpreter_stack() or ()]
    if forward_ad._current_level >= 0:  # torch.autograd.forward_ad, which is none of torch.func's
        kinds.append("Jvp")
    return kinds


def is_batched(tensor: Tensor) -> bool:
    """Whether vmap, that of ``torch.func`` or that of ``is_grads_batched``, runs over ``tensor``."""
    functorch = torch._C._functorch
    return bool(functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor))


def is_transformed(tensor: Tensor) -> bool:
    """Whether ``tensor`` is wrapped by some function transform: :func:`is_batched`, or one of another kind."""
    functorch = torch._C._functorch
    return bool(functorch.is_functorch_wrapped_tensor(tensor) or functorch.is_legacy_batchedtensor(tensor))


# ---- Dynamo and Inductor

# HigherOrderOperator: the type of graph targets that hold graphs themselves.
# FailOnRecompileLimitHit: raised under fullgraph=True for one compilation too many.
# Unsupported: raised under fullgraph=True for what Dynamo cannot compile.
# InstructionTranslator: its current_tx() tells of the frame that Dynamo compiles.
# install_guard, GuardBuilder: bind compiled code to a condition.
# AttrSource, DictGetItemSource, UnspecializedNNModuleSource: how a frame reaches a value.

CHILDREN_ATTRIBUTE = "_modules"
"""How Dynamo reaches a child of a module: an item of this attribute."""

CHECKPOINT_CONTEXT = "_checkpoint_context_fn"
"""Where the graph of a checkpoint has the ``context_fn`` that it was called with."""

RESUMED = "torch_dynamo_resume"
"""How the names of functions begin that Dynamo makes of the rest of a frame behind a graph break."""

RECOMPILE_LIMIT = "torch._dynamo.config.recompile_limit"
"""What a user sets for :func:`recompile_limit`."""


def recompile_limit() -> int:
    """How often ``torch.compile`` compiles one function."""
    return int(torch._dynamo.config.recompile_limit)


def compilations_of(code: CodeType) -> int:
    """How often ``torch.compile`` has compiled the function of this code."""
    return len(_debug_get_cache_entry_list(code))


def is_skipped_code(function: Callable[..., Any]) -> bool:
    """Whether Dynamo leaves a call of ``function`` from Python to Python."""
    return bool(_trace_rules.check(function))


def switches_autocast(graph: fx.Graph) -> bool:
    """Whether a graph of Dynamo's begins and ends autocast by itself."""
    return any(node.target is torch.amp.autocast_mode._enter_autocast for node in graph.nodes)


def retraces_autocast() -> bool:
    """Whether Dynamo traces a second time what it writes for autocast in a forward: torch 2.11 does not."""
    traced = _trace_rules.lookup(torch.amp.autocast_mode._enter_autocast)
    return traced is not None and "InGraph" not in traced.__name__


def compiles_in_place(module: nn.Module) -> bool:
    """Whether ``module.compile()`` compiles a forward that Dynamo leaves to Python otherwise: from torch 2.14 on."""
    wraps = getattr(_OptimizedModule, "_should_wrap_module_call_impl", None)
    return wraps is not None and bool(wraps(module._call_impl))


def is_checkpoint(target: Any) -> bool:
    """Whether a node's target is the operator that Dynamo writes for ``torch.utils.checkpoint.checkpoint``."""
    return target is torch.ops.higher_order.tag_activation_checkpoint


def backend_names() -> list[str]:
    """Names that ``torch.compile(backend=...)`` knows, experimental ones too."""
    return torch._dynamo.list_backends(exclude_tags=())


def backend_named(name: str | Callable[..., Any]) -> Callable[..., Any]:
    """The backend of that name, a function of a graph and example inputs; a function stands for itself."""
    return cast(Callable[..., Any], torch._dynamo.lookup_backend(name))


def inductor(mode: str | None, options: Mapping[str, Any] | None) -> Callable[..., Any]:
    """Inductor as a backend, set up as ``torch.compile`` does; a RuntimeError names a mode or option unknown to it."""
    return cast(Callable[..., Any], torch._TorchCompileInductorWrapper(mode, options, None))


def mark_dynamic(tensor: Tensor, dim: int) -> None:
    """Tells Dynamo that the size of ``tensor`` along ``dim`` varies, where nothing fixes it."""
    torch._dynamo.maybe_mark_dynamic(tensor, dim)


__all__ = [
    "CALLS",
    "CHECKPOINT_CONTEXT",
    "CHECKS",
    "CHILDREN_ATTRIBUTE",
    "FAKE_TENSOR_LOGGER",
    "HOOKS",
    "MEMBERS",
    "ONE_PROJECTION",
    "RECOMPILE_LIMIT",
    "RESUMED",
    "TENSOR_CONSTANT",
    "TENSOR_STATE",
    "AttrSource",
    "BatchNormBase",
    "ConvolutionBase",
    "DataDependentOutputException",
    "DictGetItemSource",
    "DropoutBase",
    "DynamicOutputShapeException",
    "FailOnRecompileLimitHit",
    "FakeCopyMode",
    "FakeTensor",
    "FakeTensorMode",
    "GuardBuilder",
    "HigherOrderOperator",
    "InstanceNormBase",
    "InstructionTranslator",
    "Moved",
    "TorchDispatchMode",
    "TransposedBase",
    "UnspecializedNNModuleSource",
    "Unsupported",
    "UnsupportedOperatorException",
    "assert_true",
    "at_end_of_backward",
    "backend_named",
    "backend_names",
    "buffers_of",
    "check_input_dim",
    "checks_replaced",
    "children_of",
    "compilations_of",
    "compiles_in_place",
    "convolve",
    "forget_compiled",
    "fused_attention",
    "has_one_projection",
    "in_backward",
    "inductor",
    "install_guard",
    "is_batched",
    "is_checkpoint",
    "is_compiled",
    "is_erased",
    "is_profiling",
    "is_skipped_code",
    "is_transformed",
    "keep_in_copies",
    "mark_dynamic",
    "native_pad",
    "padding_of",
    "parameters_of",
    "recompile_limit",
    "retraces_autocast",
    "set_parameters",
    "storage_key",
    "switches_autocast",
    "take_apart",
    "transforms_in_progress",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "uncompiled",
    "version_of",
    "wrap_functions",
    "written",
]
