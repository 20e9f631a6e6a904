"""Examples, the rows one step earlier: an epoch reads those that count, with weights that keep the loss unbiased."""

from fx_approx.data.importance import ImportanceSampler
from fx_approx.data.indexed import Indexed

__all__ = ["ImportanceSampler", "Indexed"]
