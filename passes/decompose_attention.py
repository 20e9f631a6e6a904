"""Unfuse: multi-head attention as its parts, on the same parameters, so that its projections can be sampled.

Graph to graph, once, behind the capture. The parts do what ``F.multi_head_attention_forward`` does where no attention
weights are asked for, in the same order, so that an exact training step gives the same numbers. In evaluation torch has
another, faster way; so the graph then serves training only, and everything else runs the model's own Python.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from fx_approx._compat import ONE_PROJECTION, has_one_projection
from fx_approx.capture.records import SECTION, Capture
from fx_approx.core.hooks import is_hooked
from fx_approx.core.layer_types import layer_type
from fx_approx.passes.find_candidates import FUSED_KEY, why_not

_SIGNATURE = inspect.signature(nn.MultiheadAttention.forward)
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_FROZEN = (
    *("embed_dim", "num_heads", "batch_first", "add_zero_attn", "bias_k", "bias_v", ONE_PROJECTION),
    "out_proj",  # the graph calls it, while the layer itself reads its parameters only
)
"""What the parts of an attention depend on; its dropout and its parameters are read at every call."""


def decompose(root: nn.Module, captured: Capture) -> Capture:
    """Takes every ``nn.MultiheadAttention`` of the graph apart that can be; the others are told why they stay whole.

    Args:
        root: The model; it is not changed.
        captured: Its capture, whose graph is changed in place.

    Returns:
        The capture, which serves training only if something was taken apart.
    """
    graph = captured.graph
    taken: dict[str, nn.MultiheadAttention] = {}
    inside: dict[int, list[str]] = {}
    for node in list(graph.nodes) if graph is not None else ():
        module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, nn.MultiheadAttention):
            continue
        call = _bound(node)
        reason = _module_problem(module) or _call_problem(module, node, call)
        if reason is not None:
            node.meta[FUSED_KEY] = f"fused multi-head attention: {reason}"
            continue
        _Parts(module, node, call).replace()
        taken[str(node.target)] = module
        if SECTION in node.meta:
            inside.setdefault(node.meta[SECTION], []).append(str(node.target))
    if not taken:
        return captured
    if not captured.sections:
        return _training_only(captured, taken)
    each = [
        _training_only(own, {path: taken[path] for path in inside.get(number, ())}, section.path)
        for number, (own, section) in enumerate(zip(captured.each, captured.sections, strict=True))
    ]
    return dataclasses.replace(captured, each=tuple(each))


def _training_only(captured: Capture, taken: Mapping[str, nn.MultiheadAttention], path: str = "") -> Capture:
    """``captured``, of the forward at ``path``, with what a graph depends on in which these were taken apart."""
    if not taken:
        return captured
    # Without readers, the flag of the module itself says whether a graph for training only can serve.
    readers = captured.readers or ((path,) if captured.branching else ())
    return dataclasses.replace(
        captured,
        branching=tuple(sorted({*captured.branching, *taken})),
        readers=tuple(dict.fromkeys((*readers, *taken))),
        frozen=(*captured.frozen, *(fact for path, module in taken.items() for fact in _facts(path, module))),
    )


def _bound(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name, defaults included."""
    bound = _SIGNATURE.bind(None, *node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments


def _facts(path: str, module: nn.MultiheadAttention) -> list[tuple[str, str, Any]]:
    names = _FROZEN if module.in_proj_bias is not None else (*_FROZEN, "in_proj_bias")
    return [(path, name, getattr(module, name)) for name in names]


def _module_problem(module: nn.MultiheadAttention) -> str | None:
    """Why a layer must stay whole however it is called, or None."""
    if parametrize.is_parametrized(module):
        return "parametrised: its weights are computed at every access"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if is_hooked(module):
        return "has hooks, which would see other arguments"
    if layer_type(module) is not nn.MultiheadAttention:
        return f"{type(module).__name__} is a subclass that may compute something else"
    if module.add_zero_attn or module.bias_k is not None or module.bias_v is not None:
        return "attends to a key of its own (add_bias_kv or add_zero_attn)"
    names = ("in_proj_weight",) if has_one_projection(module) else _SEPARATE
    if not all(isinstance(getattr(module, name), nn.Parameter) for name in names):
        return "a weight of it is no parameter"
    problem = why_not(module.out_proj, "out_proj")
    return None if problem is None else f"out_proj: {problem}"


def _call_problem(module: nn.MultiheadAttention, node: fx.Node, call: Mapping[str, Any]) -> str | None:
    """Why this call must stay one, or None."""
    if call["need_weights"] is not False:
        return f"returns its weights (need_weights={call['need_weights']})"
    inputs = [call[name] for name in ("query", "key", "value")]
    if not all(isinstance(one, fx.Node) for one in inputs):
        return "an input is no tensor of the graph"
    if has_one_projection(module) and any(one is not inputs[0] for one in inputs):
        return "query, key and value differ, and one parameter projects all three"
    mask, causal = call["attn_mask"], call["is_causal"]
    masks = (mask, call["key_padding_mask"])
    if not isinstance(causal, bool) or not all(one is None or isinstance(one, fx.Node) for one in masks):
        return "a mask or is_causal is chosen at run time"
    if causal and mask is None:
        return "is_causal without attn_mask, which torch refuses"
    if not all(user.target is operator.getitem and user.args[1] in (0, 1) for user in node.users):
        return "its pair of results is used as a whole"
    return None


def _forget(user: fx.Node, value: fx.Node) -> None:
    """Gives ``user`` None in place of ``value``."""
    user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), lambda node: None if node is value else node)


def attention_mask(
    mask: Tensor | None, dims: int, heads: int, dtype: torch.dtype, padding: Tensor | None = None
) -> Tensor | None:
    """The masks of ``nn.MultiheadAttention`` as one that ``F.scaled_dot_product_attention`` takes.

    Args:
        mask: ``[L, S]``, or ``[N * heads, L, S]`` (``[heads, L, S]`` without batches); floating-point, or boolean with
            True for what is not attended to.
        dims: Of the query: 3 with batches.
        heads: Number of heads.
        dtype: Of the result, for a boolean mask.
        padding: The ``key_padding_mask``, ``[N, S]`` (``[S]`` without batches); of the same kinds.
    """
    if mask is not None:
        mask = _added(mask, "attn_mask", dtype)
        mask = mask.unflatten(0, (-1, heads)) if mask.dim() == 3 and dims == 3 else mask
    if padding is None:
        return mask
    padding = _added(padding, "key_padding_mask", dtype)[..., None, None, :]
    return padding if mask is None else mask + padding


def _added(mask: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to scores."""
    if mask.is_floating_point():
        return mask
    if mask.dtype is not torch.bool:
        raise ValueError(f"{name}: expected a boolean or floating-point tensor, got {mask.dtype}")
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


class _Parts:
    """One call that is taken apart.

    Values are ``[L, N, E]``, or ``[L, E]`` without batches: all steps count axes so that both work.
    """

    def __init__(self, module: nn.MultiheadAttention, node: fx.Node, call: Mapping[str, Any]) -> None:
        self.module, self.node, self.call, self.path = module, node, call, str(node.target)
        self.graph = node.graph

    def replace(self) -> None:
        """Puts the parts in place of the node."""
        with self.graph.inserting_before(self.node):
            result = self._output(self._attention(*self._projected()))
        for item in list(self.node.users):
            if item.args[1] == 0:
                item.replace_all_uses_with(result)
            for user in list(item.users):
                _forget(user, item)
            self.graph.erase_node(item)
        self.graph.erase_node(self.node)

    def _make(self, op: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = self.graph.create_node(op, target, args, kwargs)
        made.meta = dict(self.node.meta)
        return made

    def _read(self, name: str) -> fx.Node:
        return self._make("get_attr", f"{self.path}.{name}")

    def _method(self, name: str, *args: Any) -> fx.Node:
        return self._make("call_method", name, *args)

    def _thirds(self, value: fx.Node) -> list[fx.Node]:
        parts = self._make("call_function", torch.chunk, value, 3, -1)
        return [self._make("call_function", operator.getitem, parts, place) for place in range(3)]

    def _input(self, name: str) -> fx.Node:
        """An input, position first."""
        value: fx.Node = self.call[name]
        return self._method("movedim", value, -2, 0) if self.module.batch_first else value

    def _projected(self) -> list[fx.Node]:
        """Query, key and value, ``[L, N, E]``."""
        bias = self._read("in_proj_bias") if self.module.in_proj_bias is not None else None
        if has_one_projection(self.module):
            given = (self._input("query"), self._read("in_proj_weight"), *(() if bias is None else (bias,)))
            return self._thirds(self._make("call_function", F.linear, *given))
        projected = []
        biases = [None] * 3 if bias is None else self._thirds(bias)
        for name, weight, part in zip(("query", "key", "value"), _SEPARATE, biases, strict=True):
            value = self._make("call_function", F.linear, self._input(name), self._read(weight))
            # Added apart: a third of a bias is no parameter, so that the layer could not be made to compute less.
            projected.append(value if part is None else self._make("call_function", operator.add, value, part))
        return projected

    def _attention(self, *projected: fx.Node) -> fx.Node:
        """``[N, heads, L, E / heads]``."""
        each = self.module.embed_dim // self.module.num_heads
        # The number of heads is not said: it may become fewer.
        parts = [self._method("movedim", self._method("unflatten", p, -1, (-1, each)), 0, -2) for p in projected]
        causal = self.call["is_causal"] and self.call["key_padding_mask"] is None
        how = {"attn_mask": None if causal else self._mask(), "dropout_p": self._read("dropout"), "is_causal": causal}
        return self._make("call_function", F.scaled_dot_product_attention, *parts, **how)

    def _mask(self) -> fx.Node | None:
        mask, query, padding = (self.call[name] for name in ("attn_mask", "query", "key_padding_mask"))
        if mask is None and padding is None:
            return None
        dtype = self._make("call_function", getattr, query, "dtype")
        dims = self._method("dim", query)
        return self._make("call_function", attention_mask, mask, dims, self.module.num_heads, dtype, padding)

    def _output(self, attended: fx.Node) -> fx.Node:
        merged = self._method("flatten", self._method("movedim", attended, -2, 0), -2)
        # In one piece, as there: otherwise the layer adds its bias in a step of its own, and rounds differently.
        merged = self._method("contiguous", merged)
        target = f"{self.path}.out_proj"
        result = self._make("call_module", target, merged)
        stack = dict(self.node.meta.get("nn_module_stack") or {})
        result.meta["nn_module_stack"] = {**stack, target: (target, type(self.module.out_proj))}
        return self._method("movedim", result, 0, -2) if self.module.batch_first else result
