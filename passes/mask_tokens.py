"""The exact model of all tokens in which those that are left out are not seen: an oracle for a graph without them.

Nothing is gathered in it, no size changes, and masks, positions and tables are read whole. The tokens that are left out
are masked where others attend to tokens, are taken out only where something pools over tokens, and pass by the blocks
that they skip. What :mod:`fx_approx.passes.sample_tokens` makes must give the same numbers.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import fx

from fx_approx.ops.token_masks import TokenPart, masked_attention, passed_by, those_there
from fx_approx.passes.channel_flow import argument
from fx_approx.passes.channel_spaces import Layout
from fx_approx.passes.sample_tokens import TokenStretch
from fx_approx.runtime.graph_program import PROLOGUE


def can_mask(stretch: TokenStretch) -> bool:
    """Whether all attention of a stretch is a call of a function, and none is written out."""
    return all(stretch.flow.steps[node].also is None for node in stretch.inside)


def mask_tokens(
    graph: fx.Graph, copies: dict[fx.Node, fx.Node], stretch: TokenStretch, number: int, key: fx.Node
) -> None:
    """Masks the tokens that one stretch leaves out.

    Args:
        graph: A graph that computes all tokens, rewritten in place.
        copies: Captured node -> its value in ``graph``.
        stretch: The blocks.
        number: Of the stretch.
        key: The prologue's node.
    """
    flow, start = stretch.flow, copies[stretch.start]
    with graph.inserting_after(start):
        chosen = graph.call_module(f"{PROLOGUE}.t{number}", (key, start))

    def parts(layout: Layout | None) -> tuple[TokenPart, ...] | None:
        if layout is None:
            return None
        return tuple((stretch.is_sampled(s.space), s.count, s.block) for s in layout.segments)

    def take_out(reader: fx.Node, source: fx.Node, dim: int, layout: Layout | None) -> None:
        own = copies[reader]
        with graph.inserting_before(own):
            part = graph.call_function(those_there, (copies[source], dim, parts(layout), chosen))
        own.replace_input_with(copies[source], part)

    for node in flow.graph.nodes:
        own, step = copies.get(node), flow.steps[node]
        if node in stretch.inside and node.target is F.scaled_dot_product_attention and own is not None:
            layouts = [parts(flow.layout(argument(node, place, name))) for place, name in enumerate(("query", "key"))]
            with graph.inserting_before(own):
                seen = graph.call_function(masked_attention, (own.args, own.kwargs, *layouts, chosen))
            own.replace_all_uses_with(seen)
            graph.erase_node(own)
            copies[node] = seen
        elif node not in stretch.inside and step.action == "pool":
            for source in dict.fromkeys(link.source for link in step.links if link.source in stretch.inside):
                layout = flow.layout(source)
                take_out(node, source, 0 if layout is None else layout.dim, layout)
    for one in stretch.sums:
        take_out(one.node, one.rider, one.axis, flow.layout(one.reader))
    if stretch.end is not None:
        own, layout = copies[stretch.end], flow.layout(stretch.end)
        assert layout is not None
        with graph.inserting_after(own):
            whole = graph.call_function(passed_by, (start, own, layout.dim, parts(layout), chosen))
        own.replace_all_uses_with(whole, delete_user_cb=lambda user: user is not whole)
        copies[stretch.end] = whole
