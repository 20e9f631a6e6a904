"""Layers that read some channels of a wide value, or write some: narrow layers in a class of the user's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fx_approx._compat import ONE_PROJECTION, convolve, has_one_projection
from fx_approx.core.layer_types import with_forward
from fx_approx.errors import UnsupportedError
from fx_approx.passes.decompose_attention import attention_mask
from fx_approx.sampling.base import Selection
from fx_approx.subnetworks.parts import put_part, take_part


class PartLayer(nn.Module):
    """In front of a layer: it is called with all channels, or its result has all.

    Attributes:
        reads: Which entries of the input the layer reads, ``[k]``; None for all.
        writes: Which entries of the result it makes, ``[k]``; the others are zero, and never read. None for all.
        made: Entries of the result, where ``writes`` is given.
        columns: Which inputs of its weight it reads, ``[groups, k]``, where others read all of it; None for all.
        column_scale: Their scale, or None.
    """

    reads: Tensor | None
    writes: Tensor | None
    columns: Tensor | None
    column_scale: Tensor | None
    made: int

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the layer, with its channels on axis 1, of a linear layer on the last."""
        dim = channel_axis(self)
        if self.reads is not None:
            input = take_part(input, dim, self.reads)
        result: Tensor = super().forward(input, *args, **kwargs) if self.columns is None else self._sliced(input)
        if self.writes is None:
            return result
        return put_part(result, dim, self.writes, self.made)

    def _sliced(self, input: Tensor) -> Tensor:
        own: Any = self
        weight = take_columns(own.weight, own.columns, own.column_scale)
        return (
            F.linear(input, weight, own.bias)
            if isinstance(self, nn.Linear)
            else convolve(self, input, weight, own.bias)
        )


class HeadsAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with fewer heads than its values have room for.

    Attributes:
        reads: Which entries of the query the layer reads, ``[k]``; None for all.
        one_projection: One parameter projects query, key and value.
    """

    reads: Tensor | None
    one_projection: bool

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """As ``nn.MultiheadAttention``, without the weights of the attention.

        Raises:
            UnsupportedError: They are asked for, or one projection gets three values.
        """
        if need_weights:
            raise UnsupportedError(
                "attention with fewer heads: expected need_weights=False, as the model was called when it was "
                "transformed"
            )
        if self.one_projection and not (query is key and key is value):
            raise UnsupportedError(
                "attention with fewer heads: expected one value as query, key and value, as the model was called when "
                "it was transformed"
            )
        axis = -2 if self.batch_first else 0
        given = [one.movedim(axis, 0) for one in (query, key, value)]
        q, k, v = (one.unflatten(-1, (-1, self.head_dim)).movedim(0, -2) for one in self._projected(given))
        dropout = self.dropout if self.training else 0.0
        if key_padding_mask is not None:
            attn_mask = attention_mask(attn_mask, query.dim(), q.shape[-3], query.dtype, key_padding_mask)
            is_causal = False
        made = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None if is_causal else attn_mask, dropout_p=dropout, is_causal=is_causal
        )
        result: Tensor = self.out_proj(made.movedim(-2, 0).flatten(-2).contiguous())
        return result.movedim(0, axis), None

    def _projected(self, given: list[Tensor]) -> tuple[Tensor, ...]:
        if self.one_projection:
            input = given[0] if self.reads is None else take_part(given[0], -1, self.reads)
            return F.linear(input, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        return tuple(F.linear(x, w, b) for x, w, b in zip(given, weights, biases, strict=True))


def channel_axis(layer: nn.Module) -> int:
    """The axis of a layer's input that has its channels."""
    weight: Any = getattr(layer, "weight", None)
    return -1 if isinstance(weight, Tensor) and weight.dim() == 2 else 1


def make_part_layer(
    layer: nn.Module,
    reads: Tensor | None = None,
    writes: Tensor | None = None,
    made: int = 0,
    columns: Selection | None = None,
) -> None:
    """Has ``layer`` read a part of its input, or write a part of its result; in place, same object and parameters.

    ``columns`` says which inputs of its weight it reads where that stays whole.
    """
    layer.__class__ = with_forward(PartLayer, type(layer))
    layer.register_buffer("reads", reads)
    layer.register_buffer("writes", writes)
    layer.register_buffer("columns", None if columns is None else columns.indices.clone())
    scale = None if columns is None or columns.scale is None else columns.scale.clone()
    layer.register_buffer("column_scale", scale)
    layer.__dict__["made"] = made


def take_columns(weight: Tensor, index: Tensor, scale: Tensor | None = None) -> Tensor:
    """The chosen inputs of a weight, with their scale.

    Args:
        weight: ``[O, I, ...]``, I inputs in each group.
        index: ``[groups, k]``.
        scale: ``[groups, k]`` or None.

    Returns:
        ``[O, k, ...]``.
    """
    groups, count = index.shape
    rest = [1] * (weight.dim() - 2)
    by_group = weight.unflatten(0, (groups, -1))
    taken = torch.take_along_dim(by_group, index.view(groups, 1, count, *rest), 2)
    if scale is not None:
        taken = taken * scale.to(weight.dtype).view(groups, 1, count, *rest)
    return taken.flatten(0, 1)


def make_heads_attention(layer: nn.MultiheadAttention, reads: Tensor | None) -> None:
    """Has an attention of which heads were cut off run on those that are left; in place."""
    width = layer.out_proj.in_features
    layer.one_projection = has_one_projection(layer)  # type: ignore[assignment]
    layer.num_heads = width // layer.head_dim
    vars(layer)[ONE_PROJECTION] = False  # the fused way of torch would take sizes from the query
    cls: Any = with_forward(HeadsAttention, type(layer))
    layer.__class__ = cls
    layer.register_buffer("reads", reads)
