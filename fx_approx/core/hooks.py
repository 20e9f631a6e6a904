"""Hooks of modules: whether a call of a module runs any, and how many."""

from __future__ import annotations

from torch import nn

from fx_approx._compat import HOOKS


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module runs a user's hook."""
    return any(getattr(module, name, None) for name in HOOKS)


def hook_count(module: nn.Module) -> int:
    """Hooks that calling the module runs."""
    return sum([len(getattr(module, name, None) or ()) for name in HOOKS])
