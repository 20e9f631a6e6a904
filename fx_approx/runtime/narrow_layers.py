"""Layers that treat each channel apart, on the demanded channels only; what the demand pass puts in their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fx_approx._compat import (
    BatchNormBase,
    InstanceNormBase,
    TransposedBase,
    buffers_of,
    check_input_dim,
    parameters_of,
)
from fx_approx.core.layer_types import layer_type
from fx_approx.ops.channel_slices import tapped_relu
from fx_approx.ops.gather import gather
from fx_approx.ops.narrow_calls import NARROW_CALLS
from fx_approx.runtime.layers import become, is_swapped
from fx_approx.sampling.base import Selection


class _NarrowBatchNorm(BatchNormBase):
    """Normalises the channels that are there; the running statistics of the others stay as they are.

    The momentum is that of the exact layer. Without one (``momentum=None``, a plain average over all batches) the
    weight of a batch is one over all batches seen, those without this channel too.
    """

    def forward(self, input: Tensor, chosen: Selection | None = None) -> Tensor:
        """``input`` is ``[N, k, ...]``; ``chosen`` ``[1, k]`` of the layer's channels, None for all."""
        if chosen is None:
            return super().forward(input)
        check_input_dim(self, input)
        index = chosen.indices[0]
        weight, bias = (None if t is None else gather(t, 0, index) for t in (self.weight, self.bias))
        mean, variance = self.running_mean, self.running_var
        if mean is None or variance is None:
            return F.batch_norm(input, None, None, weight, bias, True, 0.0, self.eps)
        own_mean, own_variance = mean.index_select(0, index), variance.index_select(0, index)
        if not self.training:
            return F.batch_norm(input, own_mean, own_variance, weight, bias, False, 0.0, self.eps)
        result = F.batch_norm(input, own_mean, own_variance, weight, bias, True, self._next_factor(), self.eps)
        with torch.no_grad():
            mean.index_copy_(0, index, own_mean)
            variance.index_copy_(0, index, own_variance)
        return result

    def _next_factor(self) -> float:
        """The share of this batch in the running statistics; counts the batch."""
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                return 1.0 / float(self.num_batches_tracked)
        return 0.0 if self.momentum is None else self.momentum


class NarrowBatchNorm1d(_NarrowBatchNorm, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` on the channels that are there."""


class NarrowBatchNorm2d(_NarrowBatchNorm, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` on the channels that are there."""


class NarrowBatchNorm3d(_NarrowBatchNorm, nn.BatchNorm3d):
    """``nn.BatchNorm3d`` on the channels that are there."""


class NarrowSyncBatchNorm(nn.SyncBatchNorm):
    """``nn.SyncBatchNorm`` on the channels that are there; all ranks must have chosen the same."""

    def forward(self, input: Tensor, chosen: Selection | None = None) -> Tensor:
        """As :meth:`NarrowBatchNorm2d.forward`; statistics are those of all ranks."""
        if chosen is None:
            return super().forward(input)
        index = chosen.indices[0]
        own = {name: gather(p, 0, index) for name, p in parameters_of(self).items() if p is not None}
        running = {n: b for n, b in buffers_of(self).items() if b is not None and b.dim() == 1}
        kept = {name: buffer.index_select(0, index) for name, buffer in running.items()}
        result: Tensor = torch.func.functional_call(self, {**own, **kept}, (input,))
        with torch.no_grad():
            for name, buffer in running.items():
                buffer.index_copy_(0, index, kept[name])
        return result


class _NarrowInstanceNorm(InstanceNormBase):
    """Normalises the channels that are there; the running statistics of the others stay as they are."""

    def forward(self, input: Tensor, chosen: Selection | None = None) -> Tensor:
        """``input`` is ``[N, k, ...]``; ``chosen`` ``[1, k]`` of the layer's channels, None for all."""
        if chosen is None:
            return super().forward(input)
        check_input_dim(self, input)
        running = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        own = self.training or not self.track_running_stats
        momentum = 0.0 if self.momentum is None else self.momentum
        return NARROW_CALLS[F.instance_norm](
            *(input, *running, self.weight, self.bias, own, momentum, self.eps),
            chosen=chosen,
            channels=self.num_features,
        )


class NarrowInstanceNorm1d(_NarrowInstanceNorm, nn.InstanceNorm1d):
    """``nn.InstanceNorm1d`` on the channels that are there."""


class NarrowInstanceNorm2d(_NarrowInstanceNorm, nn.InstanceNorm2d):
    """``nn.InstanceNorm2d`` on the channels that are there."""


class NarrowInstanceNorm3d(_NarrowInstanceNorm, nn.InstanceNorm3d):
    """``nn.InstanceNorm3d`` on the channels that are there."""


class NarrowGroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` on the groups of channels that are there."""

    def forward(self, input: Tensor, chosen: Selection | None = None) -> Tensor:
        """``input`` is ``[N, k, ...]``; ``chosen`` ``[1, k]`` of the layer's channels in whole groups, None for all."""
        return NARROW_CALLS[F.group_norm](
            *(input, self.num_groups, self.weight, self.bias, self.eps), chosen=chosen, channels=self.num_channels
        )


class _NarrowConvTranspose(TransposedBase):
    kind: str

    def forward(self, input: Tensor, chosen: Any = None) -> Tensor:
        """``input`` is ``[N, k, ...]``; ``chosen`` ``[1, k]`` of the layer's channels, None for all.

        Or the size of the output, as the exact layer takes it.
        """
        exact: Callable[..., Tensor] = super().forward
        if not isinstance(chosen, Selection):
            return exact(input, chosen)
        return NARROW_CALLS[getattr(F, self.kind)](
            *(input, self.weight, self.bias, self.stride, self.padding, self.output_padding, self.groups),
            dilation=self.dilation,
            chosen=chosen,
            channels=self.in_channels,
        )


class NarrowConvTranspose1d(_NarrowConvTranspose, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with one kernel for each channel, on the channels that are there."""

    kind = "conv_transpose1d"


class NarrowConvTranspose2d(_NarrowConvTranspose, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with one kernel for each channel, on the channels that are there."""

    kind = "conv_transpose2d"


class NarrowConvTranspose3d(_NarrowConvTranspose, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with one kernel for each channel, on the channels that are there."""

    kind = "conv_transpose3d"


class NarrowPReLU(nn.PReLU):
    """``nn.PReLU`` with a slope for each channel, on the channels that are there."""

    def forward(self, input: Tensor, chosen: Selection | None = None) -> Tensor:
        """``input`` is ``[N, k, ...]``; ``chosen`` ``[1, k]`` of the layer's channels, None for all."""
        if chosen is None or self.num_parameters == 1:
            return super().forward(input)
        return F.prelu(input, gather(self.weight, 0, chosen.indices[0]))


class TappedReLU(nn.ReLU):
    """``nn.ReLU`` of a value that is read whole and in part; other calls of the module are as before."""

    def forward(  # type: ignore[override]
        self, input: Tensor, dim: int | None = None, chosen: Selection | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The value; with ``dim`` also its entries ``chosen`` along that axis, all for None."""
        if dim is None:
            return super().forward(input)
        return tapped_relu(input, dim, chosen, self.inplace)


_NARROW: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: NarrowBatchNorm1d,
    nn.BatchNorm2d: NarrowBatchNorm2d,
    nn.BatchNorm3d: NarrowBatchNorm3d,
    nn.SyncBatchNorm: NarrowSyncBatchNorm,
    nn.InstanceNorm1d: NarrowInstanceNorm1d,
    nn.InstanceNorm2d: NarrowInstanceNorm2d,
    nn.InstanceNorm3d: NarrowInstanceNorm3d,
    nn.GroupNorm: NarrowGroupNorm,
    nn.PReLU: NarrowPReLU,
    nn.ConvTranspose1d: NarrowConvTranspose1d,
    nn.ConvTranspose2d: NarrowConvTranspose2d,
    nn.ConvTranspose3d: NarrowConvTranspose3d,
}
"""The subclass that takes a selection, of each of ``CHANNEL_LAYERS``."""


def swap_channelwise(module: nn.Module) -> None:
    """Makes a ReLU or a layer of ``CHANNEL_LAYERS`` its subclass in place; nothing if it is already."""
    if not is_swapped(module):
        exact = layer_type(module)
        assert exact is not None
        become(module, TappedReLU if exact is nn.ReLU else _NARROW[exact])
