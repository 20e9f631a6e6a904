"""Chooses the tokens that a stretch of blocks computes, in each forward anew."""

from __future__ import annotations

import collections
import copy
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fx_approx._compat import in_backward
from fx_approx.core.token_sampling import LEARNT, TokenSampling, check_ratio
from fx_approx.errors import RecomputationError
from fx_approx.ops.grad_norm_ema import UNKNOWN, new_running
from fx_approx.ops.token_scores import attended
from fx_approx.runtime.rng import Draw, draw
from fx_approx.sampling.base import Selection, get_sampler

TOKENS = "tokens"
"""The name of the tokens among the layers."""

_ALIKE = 0.1
"""Share of the score that all tokens have alike, so that none is left out for good."""
_FORWARDS = 64
_remembered: collections.deque[tuple[int, Tensor, Tensor]] = collections.deque(maxlen=_FORWARDS)
_numbers = itertools.count()


@torch.library.custom_op("fx_approx::keep_scores", mutates_args=("held_key", "held"))
def keep_scores(key: Tensor, running: Tensor, held_key: Tensor, held: Tensor, owner: int) -> Tensor:
    """Running scores as they were when ``key`` was new; in a recomputation by a checkpoint, as its forward found them.

    All of it runs on the device, without a host sync, but for a recomputation.

    Args:
        key: ``[seed, step]`` of this forward.
        running: ``[positions]``.
        held_key: The key of the last forward, changed in place.
        held: The scores of the last forward, changed in place.
        owner: Number of what chooses by them.

    Raises:
        RecomputationError: The forward is too long ago.
    """
    if in_backward():
        for whose, remembered, scores in reversed(_remembered):
            if whose == owner and torch.equal(remembered, key):
                return scores.clone()
        raise RecomputationError(
            "a checkpoint recomputes a forward whose scores of the tokens are not remembered: only those of the last "
            f"{_FORWARDS} forwards are. Run the backward passes sooner."
        )
    scores = torch.where((key == held_key).all(), held, running)
    held_key.copy_(key)
    held.copy_(scores)
    _remembered.append((owner, key.clone(), scores))
    return scores.clone()


@keep_scores.register_fake
def _(key: Tensor, running: Tensor, held_key: Tensor, held: Tensor, owner: int) -> Tensor:
    return torch.empty_like(running)


class TokenSelection(nn.Module):
    """One selection of the tokens of one stretch.

    Like a selector it has no parameters, and is a module since the graph calls it.

    Attributes:
        sampling: What the policy asked for.
        ratio: Share of the tokens to keep at the moment.
        keeps_all: It is 1; the ratio itself would be a guard of compiled code.
        k: Tokens kept of those of the example.
        dim: Their axis in the value that the stretch reads.
        start: Where those begin that may be left out.
        others: How many are always kept.
        tokens: Those that may be left out, in the example.
        batch: The axis of the examples, where each has tokens of its own; else None.
        examples: How many of them choose, in the example.
        mask: Of the mask of attention, the axis of the examples, from the end, and where the tokens begin that may be
            left out; None where it is not asked about padding.
        site: Its number among all that draws.
        count: Uniforms that a forward draws for it beforehand, at ``offset`` of ``Draw.numbers``.
        enabled: False keeps all.
        last_count: Tokens chosen in the last eager call, the kept ones left out.
        spec: Its ratio, as what compiled code depends on.
        running: ``[tokens]`` running scores by position, where they are learnt; negative where nothing is known.
        held_key: ``[2]``, the random key of the last forward that chose by them.
        held: The scores that it chose by, kept as long as the key stays the same.
        number: Unique in the process, of a copy another.
    """

    running: Tensor | None
    held_key: Tensor
    held: Tensor

    def __init__(
        self,
        sampling: TokenSampling,
        dim: int,
        start: int,
        others: int,
        tokens: int,
        site: int,
        owner: nn.Module,
        batch: int | None = None,
        examples: int = 1,
        mask: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.sampling, self.sampler = sampling, get_sampler(sampling.sampler)
        self.dim, self.start, self.others, self.tokens, self.site = dim, start, others, tokens, site
        self.batch, self.examples, self.mask = batch, examples, mask
        self.owner = (owner,)  # in a tuple: not a submodule
        self.enabled, self.offset, self.number = True, 0, next(_numbers)
        self.last_count: int | None = None
        self._guard_epoch = 0  # Dynamo guards on the integer: compiled code sees that the ratio was changed
        device = next((one.device for one in owner.parameters()), torch.device("cpu"))
        self.register_buffer("running", new_running(tokens, device) if self.learns else None, persistent=False)
        self.register_buffer("held_key", torch.full((2,), -1, device=device), persistent=False)
        self.register_buffer("held", new_running(tokens if self.learns else 0, device), persistent=False)
        self.set_ratio(sampling.ratio)

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenSelection:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(vars(self), memo))
        new.number = next(_numbers)
        return new

    def set_ratio(self, ratio: float) -> None:
        """Keeps another share from the next forward on."""
        check_ratio(ratio)
        self.ratio = float(ratio)
        self._counting = self.sampling.counting(ratio)
        self.keeps_all, self.k = ratio == 1, self._counting.count(self.tokens)
        self._guard_epoch += 1

    def join(self, first: TokenSelection) -> None:
        """From now on has what ``first`` learns, of the same stretch in another graph, where it is as long."""
        if self.running is not None and first.running is not None and self.running.shape == first.running.shape:
            self.running, self.held_key, self.held = first.running, first.held_key, first.held

    def state(self) -> dict[str, Any]:
        """What is learnt and kept, as plain lists; of one that learns."""
        assert self.running is not None
        kept = {"held_key": self.held_key.tolist(), "held": self.held.tolist()}
        return {"running": self.running.tolist(), **kept}

    def load_state(self, values: Mapping[str, Any] | None) -> None:
        """The inverse of :meth:`state`, as far as that goes: another graph may have more positions or fewer.

        None is as after the transform: nothing is known.
        """
        assert self.running is not None
        self.held_key.fill_(-1)
        self.running.fill_(UNKNOWN)
        if values is None:
            return
        running = torch.tensor(values["running"][: len(self.running)], device=self.running.device)
        self.running[: len(running)] = running
        if len(values["held"]) == len(self.held):
            self.held.copy_(torch.tensor(values["held"]))
            self.held_key.copy_(torch.tensor(values["held_key"]))

    @property
    def spec(self) -> TokenSampling:
        return TokenSampling(**{**self.sampling.to_dict(), "ratio": self.ratio})

    @property
    def learns(self) -> bool:
        """Whether it chooses by what earlier steps have shown."""
        return self.sampling.scores in LEARNT

    @property
    def follows_gradient(self) -> bool:
        """Whether backward passes are to refresh :attr:`running`."""
        return self.sampling.scores == "gradient"

    @property
    def needs_key(self) -> bool:
        """Whether a forward needs the randomness of its step: to draw, or to be recognised when it is recomputed."""
        return self.sampler.random or self.learns

    @property
    def count(self) -> int:
        if not self.sampler.random or self.k >= self.tokens:
            return 0
        return self.examples * self.sampler.uniforms(self.tokens, self.k)

    @property
    def active(self) -> bool:
        """Whether the next forward leaves tokens out: enabled, and the model is in training mode."""
        return self.enabled and self.owner[0].training and not self.keeps_all

    def forward(self, given: Draw | None, value: Tensor, mask: Tensor | None = None) -> Selection | None:
        """The chosen tokens, counted from :attr:`start`, in order; None if all are kept.

        Args:
            given: The randomness of this forward.
            value: What the stretch reads.
            mask: Of its first attention, where that tells padding.

        Returns:
            Indices ``[1, k]``, or ``[examples, k]`` where each has tokens of its own, without a scale: attention, norms
            and means work on as many tokens as there are.
        """
        if not self.active:
            return None
        tokens = value.shape[self.dim] - self.others
        k = self.k if tokens == self.tokens else self._count(tokens)
        if k >= tokens:
            return None
        examples = 1 if self.batch is None else value.shape[self.batch]
        with torch.no_grad(), torch.autocast(value.device.type, enabled=False):
            scores = self._scores(given, value, tokens).expand(examples, tokens)
            if mask is not None and self.mask is not None:
                axis, start = self.mask
                scores = torch.where(attended(mask, axis, examples).narrow(1, start, tokens), scores, 0)
            numbers = self._uniforms(given, examples, tokens, k) if self.sampler.random else None
            chosen = self.sampler.draw(scores, k, numbers, epsilon=0.0, fixed_shape=True)
        if not torch.compiler.is_compiling():
            self.last_count = k
        return Selection(chosen.indices, None)

    def _count(self, tokens: int) -> int:
        # As of a selector: the ratio is a float, on which guards may reuse what is stale, so the epoch is read.
        return self._counting.count(tokens) if self._guard_epoch else 0

    def _uniforms(self, given: Draw | None, examples: int, tokens: int, k: int) -> Tensor:
        assert given is not None
        count = examples * self.sampler.uniforms(tokens, k)
        if (examples, tokens) == (self.examples, self.tokens):
            numbers = given.numbers[self.offset : self.offset + count]
        else:
            numbers = draw(given.key, [self.site], [count])
        return numbers.view(examples, -1)

    def _scores(self, given: Draw | None, value: Tensor, tokens: int) -> Tensor:
        """``[1, tokens]`` or ``[examples, tokens]`` float64, positive: padding is what has none."""
        if self.running is not None:
            assert given is not None
            scores = _known(keep_scores(given.key, self.running, self.held_key, self.held, self.number), tokens)
        elif self.sampling.scores == "norm":
            scores = self._norms(value, tokens)
        else:
            return torch.ones(1, tokens, dtype=torch.float64, device=value.device)
        finite = torch.isfinite(scores)
        mean = torch.where(finite, scores, 0).mean(1, keepdim=True)
        return (1 - _ALIKE) * scores / torch.where(mean > 0, mean, 1.0) + _ALIKE

    def _norms(self, value: Tensor, tokens: int) -> Tensor:
        rows = value.detach().narrow(self.dim, self.start, tokens)
        if self.batch is None:
            rows = rows.movedim(self.dim, 0).reshape(1, tokens, -1)
        else:
            rows = rows.movedim((self.batch, self.dim), (0, 1)).reshape(rows.shape[self.batch], tokens, -1)
        norms: Tensor = torch.linalg.vector_norm(rows, dim=2, dtype=torch.float64)
        return norms


def _known(running: Tensor, tokens: int) -> Tensor:
    """``[1, tokens]``: what is not known counts as much as what is most, so that it is looked at soon."""
    known = running.double()[:tokens]
    if tokens > known.shape[0]:
        known = torch.cat([known, known.new_full((tokens - known.shape[0],), -1.0)])
    most = known.max()
    return torch.where(known < 0, torch.where(most < 0, 1.0, most), known).unsqueeze(0)
