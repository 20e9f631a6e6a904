"""Measures which layers the gradient is sensitive to, for policies that weigh layers against each other."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fx_approx.compiler.transform import transform
from fx_approx.core.plan import Decision
from fx_approx.core.step_cost import Model
from fx_approx.errors import NoEffectWarning
from fx_approx.policies.graph_policy import GraphPolicy
from fx_approx.policies.sensitivity import Sensitivity
from fx_approx.runtime.step_gradient import sampled_gradient
from fx_approx.runtime.validation import check_model


@dataclasses.dataclass(frozen=True)
class _Groups(GraphPolicy):
    """All layers that may be sampled, at one ratio; writes down which share a selection."""

    ratio: float
    found: list[tuple[str, ...]]

    def decide_whole(self, model: Model) -> Sequence[Decision]:
        groups, refused = self.groups(model, self.ratio)
        self.found.extend(groups)
        return self.final(model, groups, [self.ratio] * len(groups), refused, {}, {})


def sensitivity(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    example_inputs: Any,
    *,
    ratio: float = 0.5,
    draws: int = 1,
    **options: Any,
) -> Sensitivity:
    """What sampling each selection alone does to the gradient of the whole step, and how much batches differ.

    For each of the layers that a :class:`fx_approx.policies.FlopBudget` with the same ``options`` would choose from,
    those together that share a selection: the squared error of the gradient by all parameters when only they are
    sampled, as a share of its squared size, averaged over batches and draws. Dropout is switched off meanwhile. Nothing
    of ``model`` changes.

    It costs ``len(batches) * (1 + draws * selections)`` training steps.

    Args:
        model: The exact model, on its device, as it is trained (some steps in, rather than at its initialisation).
        batches: Training batches, as ``loss`` takes them. Two or more tell the noise of the gradient over batches, too.
        loss: Called with a model and a batch, returns a scalar.
        example_inputs: As in :func:`fx_approx.transform`.
        ratio: At which each is sampled, in (0, 1).
        draws: How often, for random samplers.
        **options: ``sampler``, ``scores``, ``share``, ``min_k``, ``round_to``, ``keep_first``, ``keep_last`` of
            the policy.

    Returns:
        To be given to ``FlopBudget(..., sensitivity=...)`` and alike.

    Raises:
        TypeError: An argument of the wrong type, or an unknown option.
        ValueError: No batch, ``ratio`` or ``draws`` out of range, or a loss that is no scalar.
    """
    check_model(model)
    if not isinstance(batches, Sequence) or isinstance(batches, (str, bytes)) or not batches:
        raise ValueError(f"batches: expected a sequence of at least one batch, got {batches!r:.100}")
    if not callable(loss):
        raise TypeError(f"loss: expected a function of a model and a batch, got {loss!r}")
    if isinstance(draws, bool) or not isinstance(draws, int):
        raise TypeError(f"draws: expected an integer, got {draws!r}")
    if draws < 1:
        raise ValueError(f"draws: expected at least 1, got {draws}")
    if not 0 < ratio < 1:
        raise ValueError(f"ratio: expected a number in (0, 1), got {ratio!r}")
    groups: list[tuple[str, ...]] = []
    policy = _Groups(ratio, groups, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        approx: Any = transform(model, policy, example_inputs)
    approx.train()
    exact = [sampled_gradient(approx, batch, loss, (), 0) for batch in batches]
    errors: dict[str, float] = {}
    for names in groups:
        shares = [
            float((sampled_gradient(approx, batch, loss, names, number) - whole).square().sum() / whole.square().sum())
            for batch, whole in zip(batches, exact, strict=True)
            for number in range(draws)
        ]
        errors.update(dict.fromkeys(names, sum(shares) / len(shares)))
    return Sensitivity(ratio, errors, _noise(exact))


def _noise(gradients: Sequence[Tensor]) -> float | None:
    """Variance over batches as a share of the mean squared size; None of one batch."""
    if len(gradients) < 2:
        return None
    together = torch.stack(tuple(gradients))
    spread = (together - together.mean(0)).square().sum() / (len(gradients) - 1)
    return float(spread / together.square().sum(1).mean())
