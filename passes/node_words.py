"""Nodes of a graph in the words of modules: where a value is made, for those who know the model and not its graph."""

from __future__ import annotations

from torch import fx

from fx_approx.capture.records import META_KEY, owner

_WORDS = {
    **dict.fromkeys(("add", "iadd", "radd"), "the addition"),
    **dict.fromkeys(("sub", "isub", "rsub"), "the subtraction"),
    **dict.fromkeys(("mul", "imul", "rmul"), "the multiplication"),
    **dict.fromkeys(("truediv", "itruediv", "div"), "the division"),
    **dict.fromkeys(("cat", "concat", "concatenate"), "the concatenation"),
    "getitem": "an index",
    "getattr": "an attribute",
}


def place(node: fx.Node) -> str:
    """A layer by its path, a functional product as reports name it, anything else by what it is and where it stands."""
    if node.op == "placeholder":
        return f"the input {node.name}"
    if node.op == "output":
        return "the output of the model"
    if node.op in ("call_module", "get_attr"):
        return str(node.target)
    known = node.meta.get(META_KEY, ())
    if len(known) == 1:
        return str(known[0])
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    name, where = _WORDS.get(name.strip("_"), name.strip("_")), owner(node)
    return f"{name} in {where}" if where else f"{name}{_behind(node)}"


def _behind(node: fx.Node) -> str:
    """Of a call in the model's own forward, the last layer or input before it, seen along first arguments."""
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
        if node.op in ("call_module", "placeholder") or owner(node):
            return f" behind {place(node) if node.op in ('call_module', 'placeholder') else owner(node)}"
    return ""
