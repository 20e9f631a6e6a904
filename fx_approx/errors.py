"""Errors and warnings of fx_approx, each raised before anything is changed."""

from __future__ import annotations


class FxApproxError(Exception):
    """What all errors of fx_approx have in common; each is also an error of Python's own."""


class FxApproxWarning(UserWarning):
    """What all warnings of fx_approx have in common."""


class CaptureError(FxApproxError, RuntimeError):
    """The model cannot be captured at all (not merely not traced: that falls back to module swap)."""


class AlreadyTransformedError(FxApproxError, ValueError):
    """The model, or a part of it, is already the result of a transform."""


class PlanMismatchError(FxApproxError, ValueError):
    """A plan was made for another model; the message names what differs."""


class ShapesRequiredError(FxApproxError, ValueError):
    """A policy needs GEMM shapes to decide, and no example inputs were given."""


class RecomputationError(FxApproxError, RuntimeError):
    """An activation checkpoint recomputes a forward whose sample cannot be told for certain.

    Going on would give wrong gradients silently, so this is an error.
    """


class DistributedMismatchError(FxApproxError, RuntimeError):
    """Ranks of data-parallel training do not hold the same plan, seed, step or selections.

    Adding up gradients by different selections would mix channels silently, so this is an error, on every rank.
    """


class UnsupportedError(FxApproxError, RuntimeError):
    """A function transform of torch.func that sampling does not support, such as vmap over a model in training."""


class WidthError(FxApproxError, RuntimeError):
    """A value has another number of channels than its reader; the layers themselves tell it in torch's own words."""


class NoEffectWarning(FxApproxWarning):
    """A call changed nothing, for example a transform that sampled no layer."""


class BatchNormWarning(FxApproxWarning):
    """BatchNorm statistics gathered while sampling are about to be used by an exact evaluation."""


class CaptureWarning(FxApproxWarning):
    """A part of the model could not be traced and is served by module swap; names module and line."""


class RecompilationWarning(FxApproxWarning):
    """``torch.compile`` is about to give up on a model because it was compiled too often."""


class CacheWarning(FxApproxWarning):
    """Measurements cannot be read from, or kept in, the user's cache folder; they are made anew."""
