"""Token map: what was found of the tokens, and what a plan makes of it, block by block and in the words of modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from torch import fx, nn

from fx_approx.capture.records import META_KEY, owner
from fx_approx.core.token_axis import TokenBlock, TokenStack
from fx_approx.core.token_sampling import TokenSampling
from fx_approx.passes.channel_flow import Flow
from fx_approx.passes.node_words import place
from fx_approx.passes.sample_tokens import TokenStretch, choose_stretches, drop, sampled_space, unfit
from fx_approx.passes.token_flow import Block, TokenStream, attends_itself

_NOTHING = (nn.Identity, nn.Dropout)


def map_tokens(
    streams: Iterable[TokenStream], stretches: Sequence[TokenStretch], sampling: TokenSampling | None
) -> tuple[TokenStack, ...]:
    """Each stack of blocks as plain data.

    Args:
        streams: What was found.
        stretches: Blocks that compute some tokens only, by their numbers.
        sampling: What the plan asks for; None for a plan without tokens.
    """
    return tuple(_stack(stream, stretches, sampling) for stream in streams)


def _stack(stream: TokenStream, stretches: Sequence[TokenStretch], sampling: TokenSampling | None) -> TokenStack:
    flow = stream.flow
    layout, origin = flow.layout(stream.blocks[0].start), flow.layout(stream.origin)
    assert layout is not None and origin is not None
    first, whole = _droppable(stream)
    space = sampled_space(stream, frozenset().union(*(block.inside for block in stream.blocks), stream.tail))
    blocks = []
    for number, block in enumerate(stream.blocks):
        made = _block(flow, block, layout.size)
        if sampling is not None:
            stretch = next((at for at, one in enumerate(stretches) if _is_in(block, stream, one)), -1)
            reason = _why(stream, number, None if stretch < 0 else stretches[stretch], sampling)
            made = dataclasses.replace(made, stretch=stretch, reason=reason)
        blocks.append(made)
    return TokenStack(
        begins=place(stream.origin),
        dim=origin.dim,
        tokens=layout.size,
        kept=layout.size - (0 if space is None else flow.spaces.counts[space]),
        blocks=tuple(blocks),
        behind=tuple(_layers(flow, stream.tail)),
        drop=first,
        whole=whole,
    )


def _block(flow: Flow, block: Block, tokens: int) -> TokenBlock:
    attention = (node for node in flow.graph.nodes if node in block.inside and attends_itself(flow, node))
    return TokenBlock(
        name=block.name,
        tokens=tokens,
        attention=tuple(dict.fromkeys(owner(node) or "the model" for node in attention)),
        row_wise=tuple(_layers(flow, block.inside)),
        stops=block.stops,
        skip=unfit(flow, block),
    )


def _layers(flow: Flow, inside: frozenset[fx.Node]) -> Iterator[str]:
    """Layers, and products of functions, that work on each token by itself, in order."""
    for node in flow.graph.nodes:
        if node not in inside or flow.layout(node) is None or attends_itself(flow, node):
            continue
        module = flow.module(node)
        if (module is not None and not isinstance(module, _NOTHING)) or (module is None and META_KEY in node.meta):
            yield place(node)


def _droppable(stream: TokenStream) -> tuple[int | None, str]:
    """The first block from which tokens may be dropped, or why they may not."""
    why = ""
    for first in range(len(stream.blocks)):
        found, why = drop(stream, TokenSampling(mode="drop", first=first))
        if found is not None:
            return first, ""
    return None, why.split(": ", 2)[-1]


def _is_in(block: Block, stream: TokenStream, stretch: TokenStretch) -> bool:
    return stretch.stream is stream and block.inside <= stretch.inside


def _why(stream: TokenStream, number: int, stretch: TokenStretch | None, sampling: TokenSampling) -> str:
    """Why a block computes as many tokens as it does under the plan."""
    if stretch is not None:
        return "others are dropped" if stretch.end is None else "others pass it by"
    blocks, dropping = stream.blocks, sampling.mode == "drop"
    if number < sampling.first:
        return f"whole by first={sampling.first}"
    if not dropping and number >= len(blocks) - sampling.last:
        return f"whole by last={sampling.last}"
    why = "" if dropping else unfit(stream.flow, blocks[number])
    if why:
        return why
    made, reasons = choose_stretches([stream], sampling)
    return (
        reasons[0].partition(": ")[2] if not made and reasons else "its tokens are combined with those of another stack"
    )
