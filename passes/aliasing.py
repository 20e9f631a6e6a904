"""Operations that change a value in place, and who else reads the memory that they change."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fx_approx._compat import DropoutBase, tree_leaves
from fx_approx.core.layer_types import layer_type
from fx_approx.passes.channel_flow import Flow, argument, first
from fx_approx.passes.reshape_rules import RESHAPES

_IN_PLACE = (
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow),
    *(operator.iand, operator.ior, operator.ixor, operator.setitem, F.relu_, torch.relu_),
)

_PURE = (operator.and_, operator.or_, operator.not_, operator.is_)
"""Functions whose names end as those of what changes its operand, and which do not."""

_MUTATING_METHODS = (
    *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")),
    *("__ilshift__", "__irshift__", "__setitem__"),
)

_VIEWS = (
    *("contiguous", "float", "half", "double", "bfloat16", "to", "type", "type_as", "detach", "requires_grad_"),
    *("positive", operator.pos, torch.positive, "cpu", "cuda", "to_dense", "dequantize", torch.dequantize),
    *("conj", "conj_physical", "resolve_conj", "resolve_neg", torch.conj, torch.conj_physical, torch.resolve_conj),
    *(torch.resolve_neg, torch.real, torch.imag, torch.ravel, "adjoint", torch.adjoint, "as_strided", torch.as_strided),
    *("select", "diagonal", "unfold", "broadcast_to", torch.broadcast_to, torch.select, torch.diagonal, torch.detach),
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
    *(torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout),
    *RESHAPES,
)
"""What may give its operand, or a view of it."""
_SAME = (nn.Identity, DropoutBase, nn.Flatten, nn.Unflatten)
_FACTS = ("shape", "dtype", "device", "ndim", "is_cuda")
_SIZES = ("size", "dim", "ndimension", "numel", "stride")


def changes_in_place(flow: Flow, node: fx.Node) -> bool:
    """Whether ``node`` changes its first operand."""
    if node.op == "call_module":
        return bool(getattr(flow.module(node), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, str):
        return _is_mutator(node.target) or node.target in _MUTATING_METHODS
    if any(node.target is one for one in _IN_PLACE) or _is_mutating_function(node):
        return True
    code = getattr(node.target, "__code__", None)
    names = () if code is None else code.co_varnames[: code.co_argcount]
    given = argument(node, names.index("inplace"), "inplace") if "inplace" in names else node.kwargs.get("inplace")
    return given is True


def _is_mutating_function(node: fx.Node) -> bool:
    """By its name, without the overload of an ATen operator."""
    if any(node.target is one for one in _PURE):
        return False
    return _is_mutator(str(getattr(node.target, "__name__", "")).partition(".")[0])


def _is_mutator(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__") and name != "requires_grad_"


def _elsewhere(node: fx.Node) -> list[fx.Node]:
    """What ``node`` changes that is not its first operand: ``out=``, and the tensors of a list."""
    changed = [node.kwargs.get("out")]
    if (
        node.op == "call_function"
        and _is_mutating_function(node)
        and node.args
        and isinstance(node.args[0], (list, tuple))
    ):
        changed.append(node.args[0])
    return [leaf for leaf in tree_leaves(changed) if isinstance(leaf, fx.Node)]


def is_changed(flow: Flow, node: fx.Node) -> bool:
    """Whether one that reads the value of ``node``, or a view of it, changes it in place."""
    waiting = [node]
    while waiting:
        found = waiting.pop()
        readers = [user for user in found.users if first(user) is found]
        if any(changes_in_place(flow, user) for user in readers) or any(found in _elsewhere(u) for u in found.users):
            return True
        waiting += [user for user in readers if _may_be_view(flow, user)]
    return False


def changed_for_others(flow: Flow, node: fx.Node) -> set[fx.Node]:
    """What lies in the memory that ``node`` changes, if not only ``node`` reads it; else nothing."""
    if elsewhere := _elsewhere(node):
        return {found for changed in elsewhere for found in same_memory(flow, changed)}
    source: Any = first(node)
    if not isinstance(source, fx.Node) or not changes_in_place(flow, node) or not _is_seen(flow, source):
        return set()
    return set(same_memory(flow, source))


def _may_be_view(flow: Flow, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(flow.module(node), _SAME)
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target is getattr:
        return node.args[1] not in _FACTS
    name = getattr(node.target, "__name__", "")
    return name == "stochastic_depth" or any(node.target is one or node.target == one for one in _VIEWS)


def _shares(flow: Flow, node: fx.Node) -> bool:
    return _may_be_view(flow, node) or changes_in_place(flow, node)


def _readers(node: fx.Node) -> list[fx.Node]:
    """Users that look at more than sizes."""
    return [
        user
        for user in node.users
        if not (user.op == "call_method" and user.target in _SIZES)
        and not (user.target is getattr and user.args[1] in _FACTS)
    ]


def _is_seen(flow: Flow, source: fx.Node) -> bool:
    """Whether something else than its one user reads the memory of ``source``."""
    node: Any = source
    while isinstance(node, fx.Node):
        if len(_readers(node)) > 1 or node.op in ("placeholder", "get_attr") or node.target in _RESHAPED:
            return True
        if not _shares(flow, node):
            return False
        node = first(node)
    return False


_RESHAPED = tuple(RESHAPES)


def same_memory(flow: Flow, node: fx.Node) -> Iterator[fx.Node]:
    """All values that may lie where ``node`` does."""
    while _shares(flow, node) and isinstance(above := first(node), fx.Node):
        node = above
    waiting = [node]
    while waiting:
        found = waiting.pop()
        yield found
        waiting += [user for user in found.users if first(user) is found and _shares(flow, user)]


def can_tap_relu(flow: Flow, node: fx.Node) -> bool:
    """Whether ``node`` is a ReLU whose value is read only: then it can give parts of it as well."""
    module = flow.module(node)
    is_relu = node.target in (F.relu, torch.relu, "relu") if module is None else layer_type(module) is nn.ReLU
    return is_relu and not is_changed(flow, node)
