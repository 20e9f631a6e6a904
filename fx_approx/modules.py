"""Sampled layers and the selector: what stands in a transformed model in place of an exact layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fx_approx import ops
from fx_approx.ops import OPS
from fx_approx.sampling import SamplerSpec, Selection, get_sampler, get_score
from fx_approx.state import Draw, draw


class Selector(nn.Module):
    """Makes the :class:`Selection` of one site, or None where the product is to be exact.

    A selector has no parameters and is no submodule of the model. It is a module because integers of modules are
    compile-time constants: ``k`` is baked into the compiled graph, and one more value is one more compilation.

    Attributes:
        spec: Sampler and ratio.
        site: Number of the site; sites draw independently.
        count: Uniforms that a forward draws for it beforehand, at ``offset`` of ``Draw.numbers``.
        k: Pairs to keep per group; 0 where the number of pairs is not known before the call.
        pairs: Column-row pairs per group, where known.
        enabled: False makes the site exact.
        last_count: Pairs drawn by the last eager call.
    """

    def __init__(
        self,
        kind: str,
        static: Mapping[str, Any],
        spec: SamplerSpec,
        site: int,
        pairs: int | None,
        owner: nn.Module,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.kind, self.static, self.site = kind, dict(static), site
        self.pairs, self.groups = pairs, groups
        self.enabled = True
        self.last_count: int | None = None
        self.version = 0
        self.offset = 0
        self.owner = (owner,)  # in a tuple: not a submodule
        self.set_spec(spec)

    def set_spec(self, spec: SamplerSpec) -> None:
        """Takes another sampler or ratio from the next call on."""
        self.spec = spec
        self.sampler, self.score = get_sampler(spec.name), get_score(spec.scores)
        self.epsilon = spec.effective_epsilon
        self.k = spec.count(self.pairs) if self.pairs else 0
        self.count = self._uniforms(self.pairs, self.k) if self.k and self.pairs else 0
        # Where k is not known beforehand it is computed from the ratio, a float, which guards may reuse stale
        # (pytorch#194976); the integer makes them see the change.
        self.version += 1

    @property
    def active(self) -> bool:
        """Whether the next call samples: enabled, and the layer that owns the site is in training mode."""
        return self.enabled and self.owner[0].training

    @property
    def exact(self) -> bool:
        """Whether the ratio keeps all pairs."""
        return self.pairs is not None and self.k >= self.pairs

    def _uniforms(self, pairs: int, k: int) -> int:
        return self.groups * self.sampler.uniforms(pairs, k) if self.sampler.random and k < pairs else 0

    def _numbers(self, pairs: int, k: int, given: Draw) -> Tensor:
        """``[groups, n]`` uniforms, a slice of the forward's own where those were drawn for this count."""
        count = self._uniforms(pairs, k)
        if count == self.count and k == self.k:
            numbers = given.numbers[self.offset : self.offset + count]
        else:
            numbers = draw(given.key, [self.site], [count])
        return numbers.view(self.groups, -1)

    def forward(self, lhs: Tensor | None, rhs: Tensor, given: Draw | None) -> Selection | None:
        """The selection for operands ``lhs`` (None for scores that do not read it) and ``rhs``.

        Args:
            lhs: Left operand.
            rhs: Right operand.
            given: The randomness of this forward; None if no sampler of the model is random.
        """
        op = OPS[self.kind]
        if not self.active or not rhs.is_floating_point() or rhs.layout is not torch.strided:
            return None
        if lhs is not None and lhs.layout is not torch.strided:
            return None
        pairs = op.pairs(lhs, rhs, self.static)
        k = self.k if self.k and pairs == self.pairs else self._count(pairs)
        if k >= pairs:
            return None
        with torch.no_grad(), torch.autocast(rhs.device.type, enabled=False):
            scores = op.scores(lhs, rhs, self.score, self.static)
            numbers = None
            if self.sampler.random:
                assert given is not None
                numbers = self._numbers(pairs, k, given)
            static = torch.compiler.is_compiling()
            selection = self.sampler.draw(scores, k, numbers, epsilon=self.epsilon, static=static)
        if not static:
            self.last_count = selection.indices.shape[1]
        return selection

    def _count(self, pairs: int) -> int:
        return self.spec.count(pairs) if self.version else 0

    def extra_repr(self) -> str:
        """Kind, sampler and count."""
        return f"{self.kind}, {self.spec.name}:{self.spec.ratio:g}, scores={self.spec.scores}, k={self.k or '?'}"


class DrawSource(Protocol):
    """Gives a layer that is called outside the graph the randomness of its sample."""

    def draw_for(self, selector: Selector, inputs: list[Tensor]) -> Draw | None:
        """The randomness for this call, or None if the sampler needs none."""
        ...


class SampledLayer(nn.Module):
    """What all sampled layers share: called with a selection by the graph, or making their own elsewhere.

    ``site`` is the selector and source of randomness for calls without a selection: in a part of the model that could
    not be traced, or when the layer is called directly.
    """

    site: tuple[Selector, DrawSource] | None = None
    weight: Tensor

    def selection_for(self, input: Tensor, given: tuple[Selection | None, ...]) -> Selection | None:
        """The selection given by the graph, or the layer's own."""
        if given:
            return given[0]
        if self.site is None:
            return None
        selector, source = self.site
        if not selector.active or selector.exact:
            return None
        lhs = None if selector.score.ahead else input
        result: Selection | None = selector(lhs, self.weight, source.draw_for(selector, [input]))
        return result


class SampledLinear(SampledLayer, nn.Linear):
    """``nn.Linear`` over sampled in-features; the same parameters, exact without a selection."""

    def forward(self, input: Tensor, *given: Selection | None) -> Tensor:
        """``input`` is ``[..., in_features]``; ``given`` at most one selection ``[1, k]`` or None."""
        selection = self.selection_for(input, given)
        return ops.linear(input, self.weight, self.bias, selection=selection)


class _SampledConv(SampledLayer):
    groups: int
    bias: Tensor | None
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def forward(self, input: Tensor, *given: Selection | None) -> Tensor:
        """``input`` is ``[N, C, ...]``; ``given`` at most one selection ``[groups, k]`` or None."""
        selection = self.selection_for(input, given)
        weight = self.weight
        if selection is not None:
            input, weight = ops.select_channels(input, weight, self.groups, selection)
        # The layer's own call, since it knows its padding mode.
        return self._conv_forward(input, weight, self.bias)


class SampledConv1d(_SampledConv, nn.Conv1d):
    """``nn.Conv1d`` over sampled input channels; the same parameters, exact without a selection."""


class SampledConv2d(_SampledConv, nn.Conv2d):
    """``nn.Conv2d`` over sampled input channels; the same parameters, exact without a selection."""


class SampledConv3d(_SampledConv, nn.Conv3d):
    """``nn.Conv3d`` over sampled input channels; the same parameters, exact without a selection."""


SAMPLED: dict[type[nn.Module], tuple[str, type[nn.Module]]] = {
    nn.Linear: ("linear", SampledLinear),
    nn.modules.linear.NonDynamicallyQuantizableLinear: ("linear", SampledLinear),
    nn.Conv1d: ("conv1d", SampledConv1d),
    nn.Conv2d: ("conv2d", SampledConv2d),
    nn.Conv3d: ("conv3d", SampledConv3d),
}
"""Exact layer type -> op and sampled subclass."""


def static_of(module: nn.Module, kind: str) -> dict[str, Any]:
    """The plain arguments of a layer that its op's ``static`` names."""
    return {name: getattr(module, name) for name in OPS[kind].static}


def swap(module: nn.Module, site: tuple[Selector, DrawSource]) -> None:
    """Makes an exact layer its sampled subclass in place: same object, parameters, hooks and path."""
    if not isinstance(module, SampledLayer):
        module.__dict__["_fx_approx_exact_class"] = type(module)
        module.__class__ = SAMPLED[type(module)][1]
        module.__dict__["site"] = site


def unswap(module: nn.Module) -> None:
    """The inverse of :func:`swap`."""
    if isinstance(module, SampledLayer):
        del module.__dict__["site"]
        module.__class__ = module.__dict__.pop("_fx_approx_exact_class")
