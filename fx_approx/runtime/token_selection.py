"""Chooses the tokens that a stretch of blocks computes, in each forward anew."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fx_approx.core.token_sampling import TokenSampling, check_ratio
from fx_approx.runtime.rng import Draw, draw
from fx_approx.sampling.base import Selection

TOKENS = "tokens"
"""The name of the tokens among the layers."""


class TokenSelection(nn.Module):
    """One selection of the tokens of one stretch.

    Like a selector it has no parameters, and is a module since the graph calls it.

    Attributes:
        sampling: What the policy asked for.
        ratio: Share of the tokens to keep at the moment.
        dim: Their axis in the value that the stretch reads.
        start: Where those begin that may be left out.
        others: How many are always kept.
        tokens: Those that may be left out, in the example.
        site: Its number among all that draws.
        count: Uniforms that a forward draws for it beforehand, at ``offset`` of ``Draw.numbers``.
        enabled: False keeps all.
        last_count: Tokens chosen in the last eager call, the kept ones left out.
        spec: Its ratio, as what compiled code depends on.
    """

    def __init__(
        self, sampling: TokenSampling, dim: int, start: int, others: int, tokens: int, site: int, owner: nn.Module
    ) -> None:
        super().__init__()
        self.sampling, self.ratio = sampling, float(sampling.ratio)
        self.dim, self.start, self.others, self.tokens, self.site = dim, start, others, tokens, site
        self.owner = (owner,)  # in a tuple: not a submodule
        self.enabled, self.offset = True, 0
        self.last_count: int | None = None
        self._guard_epoch = 0  # Dynamo guards on the integer: compiled code sees that the ratio was changed

    def set_ratio(self, ratio: float) -> None:
        """Keeps another share from the next forward on."""
        check_ratio(ratio)
        self.ratio = float(ratio)
        self._guard_epoch += 1

    @property
    def spec(self) -> TokenSampling:
        return TokenSampling(**{**self.sampling.to_dict(), "ratio": self.ratio})

    @property
    def random(self) -> bool:
        """Whether it draws."""
        return self.sampling.scores == "uniform"

    @property
    def k(self) -> int:
        """Tokens kept of those of the example."""
        return self.sampling.count(self.tokens, self.ratio)

    @property
    def count(self) -> int:
        return self.tokens if self.random and self.k < self.tokens else 0

    @property
    def active(self) -> bool:
        """Whether the next forward leaves tokens out: enabled, and the model is in training mode."""
        return self.enabled and self.owner[0].training and self.ratio < 1

    def forward(self, given: Draw | None, value: Tensor) -> Selection | None:
        """The chosen tokens, counted from :attr:`start`, in order; None if all are kept.

        Args:
            given: The randomness of this forward.
            value: What the stretch reads.

        Returns:
            Indices ``[1, k]``, without a scale: attention, norms and means work on as many tokens as there are.
        """
        if not self.active:
            return None
        tokens = value.shape[self.dim] - self.others
        k = self.sampling.count(tokens, self.ratio)
        if k >= tokens:
            return None
        with torch.no_grad():
            scores = self._numbers(given, tokens) if self.random else self._norms(value, tokens)
            indices = scores.topk(k).indices.sort().values
        if not torch.compiler.is_compiling():
            self.last_count = k
        return Selection(indices.unsqueeze(0), None)

    def _numbers(self, given: Draw | None, tokens: int) -> Tensor:
        assert given is not None
        if tokens == self.count:
            numbers: Tensor = given.numbers[self.offset : self.offset + tokens]
            return numbers
        drawn: Tensor = draw(given.key, [self.site], [tokens])
        return drawn

    def _norms(self, value: Tensor, tokens: int) -> Tensor:
        rows = value.detach().narrow(self.dim, self.start, tokens).movedim(self.dim, 0)
        norms: Tensor = rows.reshape(tokens, -1).float().square().sum(1)
        return norms
