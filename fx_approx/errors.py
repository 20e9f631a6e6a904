"""Errors and warnings of fx_approx, each raised before anything is changed."""

from __future__ import annotations


class CaptureError(RuntimeError):
    """The model cannot be captured at all (not merely not traced: that falls back to module swap)."""


class AlreadyTransformedError(ValueError):
    """The model, or a part of it, is already the result of a transform."""


class PlanMismatchError(ValueError):
    """A plan was made for another model; the message names what differs."""


class ShapesNeededError(ValueError):
    """A policy needs GEMM shapes to decide, and no example inputs were given."""


class RecomputationError(RuntimeError):
    """An activation checkpoint recomputes a forward whose sample cannot be told for certain.

    Going on would give wrong gradients silently, so this is an error.
    """


class DisagreementError(RuntimeError):
    """Ranks of data-parallel training do not hold the same plan, seed, step or selections.

    Adding up gradients by different selections would mix channels silently, so this is an error, on every rank.
    """


class UnsupportedTransformError(RuntimeError):
    """A function transform of torch.func that sampling does not support, such as vmap over a model in training."""


class WidthError(RuntimeError):
    """A value has another number of channels than its reader; the layers themselves tell it in torch's own words."""


class NoEffectWarning(UserWarning):
    """A call changed nothing, for example a transform that sampled no layer."""


class StaleStatisticsWarning(UserWarning):
    """BatchNorm statistics gathered while sampling are about to be used by an exact evaluation."""


class CaptureWarning(UserWarning):
    """A part of the model could not be traced and is served by module swap; names module and line."""


class RecompilationWarning(UserWarning):
    """``torch.compile`` is about to give up on a model because it was compiled too often."""


class CacheWarning(UserWarning):
    """Measurements cannot be read from, or kept in, the user's cache folder; they are made anew."""
