"""Sampled layers: what stands in a transformed model in place of an exact layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fx_approx._compat import convolve, padding_of
from fx_approx.core.candidates import Role
from fx_approx.core.layer_types import EXACT_CLASS, HELD, layer_type, with_forward
from fx_approx.ops.base import op_kwargs_of
from fx_approx.ops.channel_slices import Slices, check_width
from fx_approx.ops.conv_gradients import sampled_convolution
from fx_approx.ops.gather import has_channels, select_channels
from fx_approx.ops.gradient_selection import ProductSampling
from fx_approx.ops.linear import linear
from fx_approx.ops.sliced_linear import sliced_linear
from fx_approx.runtime.selector import Site


class SampledLayer(nn.Module):
    """What all sampled layers share: called with selections by the graph, or making their own elsewhere.

    ``site`` is for calls without selections: in a part of the model that could not be traced, or when the layer is
    called directly.
    """

    site: Site | None = None
    weight: Tensor

    def how(self, input: Tensor, given: tuple[Any, ...]) -> ProductSampling:
        """What the graph gives (leading fields of :class:`ProductSampling`), or else the layer's own selections."""
        if given:
            return ProductSampling(*given)
        if self.site is None:
            return ProductSampling()
        chosen: dict[Role, Any] = {}
        for role, selector in self.site.selectors.items():
            if selector.active and not selector.exact:
                lhs = None if selector.ahead else input
                chosen[role] = selector(lhs, self.weight, self.site.source.draw_for(selector, [input]))
        roles = chosen.get(Role.OUTPUT), chosen.get(Role.GRAD_INPUT), chosen.get(Role.GRAD_WEIGHT)
        return ProductSampling(*roles, self.site.straight_through)


class SampledLinear(SampledLayer, nn.Linear):
    """``nn.Linear`` with sampled products; the same parameters, exact without a selection."""

    def forward(self, input: Tensor, *given: Any) -> Tensor:
        """``input`` is ``[..., in_features]``; ``given`` as :meth:`SampledLayer.how` takes it.

        With :class:`fx_approx.ops.Slices` only what they hold is computed, from an input of as many features.
        """
        if given and isinstance(given[0], Slices):
            return sliced_linear(input, self.weight, self.bias, given[0])
        selection, grad_input, grad_weight, straight_through = self.how(input, given)
        return linear(
            input,
            self.weight,
            self.bias,
            selection=selection,
            grad_input=grad_input,
            grad_weight=grad_weight,
            straight_through=straight_through,
        )


class SampledOutProj(SampledLinear, nn.modules.linear.NonDynamicallyQuantizableLinear):
    """The output projection of ``nn.MultiheadAttention``, likewise."""


class _SampledConv(SampledLayer):
    kind: str
    groups: int
    bias: Tensor | None
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]

    def forward(self, input: Tensor, *given: Any) -> Tensor:
        """``input`` is ``[N, C, ...]``; ``given`` as :meth:`SampledLayer.how` takes it.

        With :class:`fx_approx.ops.Slices` only what they hold is computed, from an input of as many channels.
        """
        if given and isinstance(given[0], Slices):
            return self._sliced(input, given[0])
        how = self.how(input, given)
        weight = self.weight
        if not has_channels(input, weight, self.groups):
            how = ProductSampling()  # the exact call tells what is wrong
        if how.gradients_apart:
            input, op_kwargs = self._padded(input)
            return sampled_convolution(input, weight, self.bias, op_kwargs, how)
        if how.selection is not None:
            input, weight = select_channels(input, weight, self.groups, how.selection)
        # The layer's own call, since it knows its padding mode.
        return convolve(self, input, weight, self.bias)

    def _padded(self, input: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The input and the plain arguments of a convolution that pads with zeros only."""
        op_kwargs = op_kwargs_of(self, self.kind)
        if self.padding_mode != "zeros":
            input = F.pad(input, padding_of(self), mode=self.padding_mode)
            op_kwargs["padding"] = 0
        return input, op_kwargs

    def _sliced(self, input: Tensor, slices: Slices) -> Tensor:
        check_width(input, 1 - self.weight.dim(), slices.weight.shape[1] * slices.groups)
        input, op_kwargs = self._padded(input)
        exact: Callable[..., Tensor] = getattr(F, self.kind)
        return exact(input, slices.weight, slices.bias, **{**op_kwargs, "groups": slices.groups})


class SampledConv1d(_SampledConv, nn.Conv1d):
    """``nn.Conv1d`` with sampled products; the same parameters, exact without a selection."""

    kind = "conv1d"


class SampledConv2d(_SampledConv, nn.Conv2d):
    """``nn.Conv2d`` with sampled products; the same parameters, exact without a selection."""

    kind = "conv2d"


class SampledConv3d(_SampledConv, nn.Conv3d):
    """``nn.Conv3d`` with sampled products; the same parameters, exact without a selection."""

    kind = "conv3d"


_SAMPLED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: SampledLinear,
    nn.modules.linear.NonDynamicallyQuantizableLinear: SampledOutProj,
    nn.Conv1d: SampledConv1d,
    nn.Conv2d: SampledConv2d,
    nn.Conv3d: SampledConv3d,
}
"""The subclass that stands in for each of ``PRODUCT_LAYERS``."""


def swap(module: nn.Module, site: Site) -> None:
    """Makes an exact layer its sampled subclass in place: same object, parameters, hooks and path."""
    if not isinstance(module, SampledLayer):
        become_sampled(module)
        module.__dict__["site"] = site


def become_sampled(module: nn.Module) -> None:
    """Makes an exact layer its sampled subclass in place, which samples where a call hands it selections."""
    exact = layer_type(module)
    assert exact is not None
    become(module, _SAMPLED[exact])


def become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Gives ``module`` the forward of ``cls``, a subclass of the layer that it is; :func:`unswap` takes that back.

    It stays an instance of its own class.
    """
    module.__dict__[EXACT_CLASS] = type(module)
    module.__class__ = with_forward(cls, type(module))


def is_swapped(module: nn.Module | None) -> bool:
    """Whether ``module`` has become something else."""
    return module is not None and EXACT_CLASS in module.__dict__


def unswap(module: nn.Module) -> None:
    """The inverse of :func:`swap` and :func:`become`, and of all that gives a module another class."""
    if is_swapped(module):
        for name in ("site", HELD):
            module.__dict__.pop(name, None)
        module.__class__ = module.__dict__.pop(EXACT_CLASS)
