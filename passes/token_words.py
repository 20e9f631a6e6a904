"""Nodes of a graph in the words of modules, for those who read what was found of the tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch.nn.functional as F
from torch import fx, nn

from fx_approx.capture.records import owner
from fx_approx.passes.channel_flow import Flow

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_POOLING = (
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
)
_KINDS: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    (_CONVOLUTIONS, "convolution"),
    ((nn.RNNBase,), "recurrence"),
    (_POOLING, "pooling"),
    ((nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm1d), "normalisation over the sequence"),
)
_FOLDED = "they are folded with another axis, as in windows"
_CALLS = {
    **{"conv": "convolution", "pool": "pooling", "roll": "shift", "softmax": "softmax over the sequence"},
    **dict.fromkeys(("reshape", "view", "flatten"), _FOLDED),
}


def kind(flow: Flow, node: fx.Node) -> str:
    """What mixes tokens in ``node``, in brackets; empty where that is not known."""
    module, name = flow.module(node), ""
    if module is not None:
        return next((f" ({word})" for types, word in _KINDS if isinstance(module, types)), "")
    if node.op in ("call_function", "call_method"):
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return next((f" ({word})" for part, word in _CALLS.items() if part in name), "")


def paths_of(node: fx.Node) -> list[str]:
    """The modules in whose forward a node stands, the outermost first."""
    found = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return [path for path in dict.fromkeys(found) if path]


def block_names(attention: Sequence[fx.Node], inside: Sequence[Sequence[fx.Node]]) -> list[str]:
    """Of each block the outermost module that no other block stands in; numbered where one serves several.

    Args:
        attention: Of each block, the first.
        inside: Of each block, all nodes.
    """
    stacks = [paths_of(node) for node in attention]
    found = []
    for number, (stack, nodes) in enumerate(zip(stacks, inside, strict=True)):
        others = {path for place, other in enumerate(stacks) if place != number for path in other}
        own = [path for path in stack if path not in others]
        if len(stacks) == 1:
            own = _shared([*map(paths_of, nodes), stack])[-1:]
        found.append(own[0] if own else stack[-1] if stack else "block")
    taken: dict[str, int] = {}
    for number, name in enumerate(found):
        taken[name] = taken.get(name, 0) + 1
        if taken[name] > 1:
            found[number] = f"{name}#{taken[name]}"
    return found


def _shared(stacks: Sequence[Sequence[str]]) -> list[str]:
    stacks = [stack for stack in stacks if stack]
    same = itertools.takewhile(lambda paths: len(set(paths)) == 1, zip(*stacks, strict=False))
    return [paths[0] for paths in same]


def unseen_attention(graph: fx.Graph) -> str:
    """Attention in a single call that is not looked into, as in windows; empty if there is none."""
    found = {}
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if "attention" in name and node.target is not F.scaled_dot_product_attention:
            found[owner(node) or "the model"] = name
    if not found:
        return ""
    where, name = next(iter(found.items()))
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return f"attention of {where}{more} is one call of {name}, which is not looked into"
