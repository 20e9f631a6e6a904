"""Losses by position, which only the user knows, as scores that tokens are chosen by."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fx_approx.ops.token_scores import learn
from fx_approx.runtime.handle import GraphHandle, pieces_of


def note_token_losses(model: nn.Module | GraphHandle, losses: Tensor) -> None:
    """Tells ``scores="loss"`` of :class:`fx_approx.policies.Tokens` what the tokens lose; to be called after a step.

    What is kept is a running mean by position. A position that no loss was told of yet counts as much as the one that
    loses most, so that it is looked at soon. Ranks have to average what they tell, or call
    :func:`fx_approx.distributed.synchronize_scores`, if they are to choose the same tokens.

    Args:
        model: A transformed model, what wraps it, or a backend, after its first step.
        losses: ``[..., positions]``, floating-point: a loss for each token of each example, from the first token on.
            NaN, as for padding, says nothing; what is negative counts as zero.

    Raises:
        TypeError: ``losses`` is no floating-point tensor.
        ValueError: It has no axis, or no token is chosen by its loss.
    """
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        raise TypeError(f"losses: expected a floating-point tensor [..., positions], got {losses!r}")
    if losses.dim() == 0:
        raise ValueError("losses: expected [..., positions], a loss for each token, got a single number")
    selections = [one for approx in pieces_of(model) for one in approx._fx_approx.tokens]
    told = [one for one in selections if one.running is not None and not one.follows_gradient]
    if not told:
        raise ValueError("model: no token is chosen by its loss; transform it with Tokens(..., scores='loss')")
    rows = losses.detach().float().reshape(-1, losses.shape[-1])
    known = ~rows.isnan()
    means = torch.where(known, rows.clamp(min=0), 0).sum(0) / known.sum(0).clamp(min=1)
    running = {one.running.data_ptr(): (one.running, one.start) for one in told if one.running is not None}
    for scores, start in running.values():
        own, there = means[start:][: len(scores)], known.any(0)[start:][: len(scores)]
        learn(scores[: len(own)], own.to(scores.device), there.to(scores.device))
