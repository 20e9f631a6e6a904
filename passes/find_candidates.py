"""Annotate: finds every multiply of the graph, and says which can be sampled and why the others cannot."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize

from fx_approx._compat import tree_leaves
from fx_approx.capture.records import META_KEY, SECTION, Capture, owner
from fx_approx.core.candidates import Candidate, Frontend
from fx_approx.core.hooks import is_hooked
from fx_approx.core.layer_types import FUSED_LAYERS, PRODUCT_LAYERS, layer_type
from fx_approx.ops.base import OPS, ProductOp, Unsupported, find_op, op_kwargs_of

FUSED_KEY = "fx_approx_fused"
"""Where a node says why a fused call could not be taken apart."""

BLOCKED_MODULES: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.RNNBase, "recurrent: one fused call over all time steps"),
    (nn.RNNCellBase, "recurrent cell: several products in one fused call"),
    (nn.MultiheadAttention, "fused multi-head attention: several products in one call"),
    (nn.ConvTranspose1d, "transposed convolution: no sampled form"),
    (nn.ConvTranspose2d, "transposed convolution: no sampled form"),
    (nn.ConvTranspose3d, "transposed convolution: no sampled form"),
    (nn.Bilinear, "bilinear: a product of three operands"),
)

BLOCKED_CALLS: dict[Any, str] = {
    F.scaled_dot_product_attention: "fused attention: two products and a softmax in one call",
    F.multi_head_attention_forward: "fused multi-head attention: several products in one call",
    F.conv_transpose1d: "transposed convolution: no sampled form",
    F.conv_transpose2d: "transposed convolution: no sampled form",
    F.conv_transpose3d: "transposed convolution: no sampled form",
    F.bilinear: "bilinear: a product of three operands",
    torch.addbmm: "a product summed over its batch: no sampled form",
    torch.tensordot: "tensordot: no sampled form, write it as matmul or einsum",
    torch.inner: "inner product over the last axes: no sampled form, write it as matmul or einsum",
    torch.chain_matmul: "a chain of products in one call",
    torch.linalg.multi_dot: "a chain of products in one call",
    torch.mv: "a product with a vector: bound by memory, nothing to gain",
    torch.dot: "a product with a vector: bound by memory, nothing to gain",
    torch.addmv: "a product with a vector: bound by memory, nothing to gain",
    torch.sparse.mm: "sparse operand",
    "addbmm": "a product summed over its batch: no sampled form",
    "inner": "inner product over the last axes: no sampled form, write it as matmul or einsum",
    "mv": "a product with a vector: bound by memory, nothing to gain",
    "dot": "a product with a vector: bound by memory, nothing to gain",
    "addmv": "a product with a vector: bound by memory, nothing to gain",
    "addmm_": "in place: no sampled form",
    "addbmm_": "in place: no sampled form",
    "baddbmm_": "in place: no sampled form",
    "addmv_": "in place: no sampled form",
    "__rmatmul__": "a reflected matrix product: no sampled form",
}


@dataclasses.dataclass(frozen=True)
class CandidateSite:
    """What the passes know of a candidate beyond its record.

    Attributes:
        op: Its op; None for a blocked multiply without one.
        module: Path of the layer, None for a functional call.
        owner: Path of the module in whose forward the call stands (for a layer: the layer itself).
        op_kwargs: The plain arguments that the op's geometry reads.
        weight: Path of the parameter that is its right operand, None for another operand.
    """

    candidate: Candidate
    op: ProductOp | None
    module: str | None
    owner: str
    op_kwargs: dict[str, Any]
    weight: str | None = None


def find_candidates(root: nn.Module, captured: Capture) -> list[CandidateSite]:
    """All multiplies in the order in which the model runs; marks the graph's nodes with their candidates' names."""
    names: dict[str, int] = {}
    found: list[CandidateSite] = []
    modules = dict(root.named_modules())
    taken: set[str] = set()
    if captured.graph is None:
        whole = _layer("", root, names)
        return _ends([whole] if whole is not None else list(_inside("", modules, taken, names)))
    if captured.sections:  # what they call is in their graphs, and nowhere else
        taken |= _in_graph(captured.graph)
    for node in captured.graph.nodes:
        here = list(_at(node, modules, taken, names))
        if here:
            node.meta[META_KEY] = [one.candidate.name for one in here]
        found += here
    if captured.sections:
        found += _inside("", modules, taken, names)
    return _positions(captured, found)


def _in_graph(graph: fx.Graph) -> set[str]:
    """Paths of the layers that the graph calls, or whose parameters it reads."""
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    return called | {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}


def _unique(fqn: str, names: dict[str, int]) -> str:
    names[fqn] = names.get(fqn, 0) + 1
    return fqn if names[fqn] == 1 else f"{fqn}#{names[fqn]}"


def _at(
    node: fx.Node, modules: dict[str, nn.Module], taken: set[str], names: dict[str, int]
) -> Iterator[CandidateSite]:
    if node.op == "call_module":
        path = str(node.target)
        one = _layer(path, modules[path], names, node.name)
        if one is not None:
            yield _fused(one, node)
        elif not isinstance(modules[path], FUSED_LAYERS):
            yield from _inside(path, modules, taken, names)
        return
    if node.op not in ("call_function", "call_method"):
        return
    place = owner(node)
    op = find_op(node.target)
    if op is not None:
        yield _call(node, op, place, modules, names)
    elif _hashable(node.target) and node.target in BLOCKED_CALLS:
        kind = node.target if isinstance(node.target, str) else node.target.__name__
        fqn = f"{place}.{kind}" if place else kind
        candidate = Candidate(_unique(fqn, names), fqn, kind, node=node.name, blocked=BLOCKED_CALLS[node.target])
        yield CandidateSite(candidate, None, None, place, {})


def _fused(one: CandidateSite, node: fx.Node) -> CandidateSite:
    """With the reason why the decompose pass left it whole, if it is one of those."""
    reason = node.meta.get(FUSED_KEY, one.candidate.blocked)
    return dataclasses.replace(one, candidate=dataclasses.replace(one.candidate, blocked=reason))


def _hashable(target: Any) -> bool:
    try:
        hash(target)
    except TypeError:
        return False
    return True


def _layer(path: str, module: nn.Module, names: dict[str, int], node: str = "") -> CandidateSite | None:
    """The candidate of a leaf layer, or None if it multiplies nothing that is known."""
    frontend = Frontend.GRAPH if node else Frontend.SWAP
    base = next((cls for cls in PRODUCT_LAYERS if isinstance(module, cls)), None)
    if base is None:
        if type(module).__module__.startswith("torch.ao.nn.") and hasattr(module, "weight"):
            kind = type(module).__name__.lower()
            candidate = Candidate(_unique(path, names), path, kind, frontend, node, blocked="quantised layer")
            return CandidateSite(candidate, None, path, path, {})
        for cls, reason in BLOCKED_MODULES:
            if isinstance(module, cls):
                kind = type(module).__name__.lower()
                fqn = path or kind
                candidate = Candidate(_unique(fqn, names), fqn, kind, frontend, node, blocked=reason)
                return CandidateSite(candidate, None, path, path, {})
        return None
    kind = PRODUCT_LAYERS[base]
    op_kwargs = op_kwargs_of(module, kind)
    groups = op_kwargs.get("groups", 1)
    pairs = _pairs(module, groups)
    blocked = why_not(module, path) or _too_few(pairs, groups)
    candidate = Candidate(_unique(path, names), path, kind, frontend, node, pairs, groups, blocked=blocked)
    return CandidateSite(candidate, OPS[kind], path, path, op_kwargs, f"{path}.weight" if path else "weight")


def _pairs(module: Any, groups: int) -> int:
    """Column-row pairs of a layer. A parametrised weight is not computed for it: that may change the model."""
    if parametrize.is_parametrized(module):
        return int(module.in_features if isinstance(module, nn.Linear) else module.in_channels // groups)
    return int(module.weight.shape[1])


def _too_few(pairs: int, groups: int) -> str | None:
    if pairs > 1:
        return None
    if groups > 1:
        return "depthwise: one input channel per group, nothing to choose from"
    return "one column-row pair, nothing to choose from"


def why_not(module: nn.Module, path: str) -> str | None:
    """Why a linear or convolution layer must stay exact, or None."""
    if parametrize.is_parametrized(module):
        return "parametrised: its weight is computed at every access"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if is_hooked(module):
        return "has hooks, which would see other arguments"
    if layer_type(module) not in PRODUCT_LAYERS:
        return f"{type(module).__name__} is a subclass that may compute something else"
    return _weight_problem(module.weight)


def _weight_problem(weight: Any) -> str | None:
    if not isinstance(weight, torch.Tensor):
        return "its weight is no tensor (quantised?)"
    if weight.is_quantized:
        return "quantised weight"
    if weight.layout is not torch.strided:
        return f"sparse weight ({weight.layout})"
    if not weight.is_floating_point():
        return f"{weight.dtype}: only real floating-point products are sampled"
    return None


def _call(
    node: fx.Node, op: ProductOp, place: str, modules: dict[str, nn.Module], names: dict[str, int]
) -> CandidateSite:
    """The candidate of a functional call."""
    fqn = f"{place}.{op.kind}" if place else op.kind
    pairs, groups, op_kwargs, blocked = None, 1, {}, None
    parameter = None
    try:
        bound = op.bind(node.args, node.kwargs)
        op_kwargs = {name: bound[name] for name in op.kwarg_names}
        if any(isinstance(leaf, fx.Node) for leaf in tree_leaves(op_kwargs)):
            raise Unsupported("an argument of the call is computed at run time")
        op.check(op_kwargs)
        if not isinstance(bound[op.lhs], fx.Node) or not isinstance(bound[op.rhs], fx.Node):
            raise Unsupported("an operand is not a tensor of the graph")
        groups = op_kwargs.get("groups", 1)
        weight = attribute(modules[""], bound[op.rhs])
        if weight is not None:
            parameter = str(bound[op.rhs].target)
            blocked = _weight_problem(weight)
            if weight.dim() > 1:
                pairs = op.pairs(None, weight, op_kwargs)
                blocked = blocked or _too_few(pairs, groups)
    except Unsupported as error:
        blocked = str(error)
    candidate = Candidate(
        _unique(fqn, names), fqn, op.kind, node=node.name, pairs=pairs, groups=groups, blocked=blocked
    )
    return CandidateSite(candidate, op, None, place, op_kwargs, parameter)


def attribute(root: nn.Module, node: fx.Node) -> torch.Tensor | None:
    """The tensor that a get_attr node reads, or None for another node."""
    if node.op != "get_attr":
        return None
    value: Any = root
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, torch.Tensor) else None


def _inside(
    path: str, modules: dict[str, nn.Module], taken: set[str], names: dict[str, int]
) -> Iterator[CandidateSite]:
    """The layers inside a part that is not traced; each once, however often it is called."""
    skipped: tuple[str, ...] = ()
    for inner, module in modules[path].named_modules(prefix=path):
        if inner == path or inner in taken or (skipped and inner.startswith(skipped)):
            continue
        taken.add(inner)
        if isinstance(module, FUSED_LAYERS):
            skipped = (*skipped, f"{inner}.")
        one = _layer(inner, module, names)
        if one is not None:
            yield one


def _positions(captured: Capture, found: list[CandidateSite]) -> list[CandidateSite]:
    """Marks candidates that no other feeds (``first``) and that feed no other (``last``)."""
    graph = captured.graph
    assert graph is not None
    sections = {n: captured.sections[n.meta[SECTION]].called for n in graph.nodes if SECTION in n.meta}
    multiplies = {node for node in graph.nodes if META_KEY in node.meta}
    fed: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        fed[node] = node.op == "placeholder" and node in sections and sections[node].fed
        fed[node] |= any(fed[source] or source in multiplies for source in node.all_input_nodes)
    feeds: dict[fx.Node, bool] = {}
    for node in reversed(graph.nodes):
        feeds[node] = any(feeds[user] or user in multiplies for user in node.users)
        feeds[node] |= node in sections and sections[node].feeds and any(user.op == "output" for user in node.users)
    first, last = set[str](), set[str]()
    for node in multiplies:
        names = node.meta[META_KEY]
        if not fed[node]:
            first.add(names[0])
        if not feeds[node]:
            last.add(names[-1])
    for one in found:
        called = captured.strays.get(one.module or "")
        if called is not None and not one.candidate.node:
            first |= set() if called.fed else {one.candidate.name}
            last |= set() if called.feeds else {one.candidate.name}
    return [
        dataclasses.replace(
            one,
            candidate=dataclasses.replace(
                one.candidate, first=one.candidate.name in first, last=one.candidate.name in last
            ),
        )
        for one in found
    ]


def _ends(found: list[CandidateSite]) -> list[CandidateSite]:
    """Without a graph, the first and the last layer in the order of definition."""
    marked = []
    for position, one in enumerate(found):
        ends = dataclasses.replace(one.candidate, first=position == 0, last=position == len(found) - 1)
        marked.append(dataclasses.replace(one, candidate=ends))
    return marked
