"""``torch.compile(model, backend="fx_approx")``: the backend by its name, for code that takes no object.

An installed package says the name to torch by the entry point ``torch_dynamo_backends`` in ``pyproject.toml``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from fx_approx.core.plan import Policy
from fx_approx.dynamo.backend import Backend, backend
from fx_approx.policies.parse import parse_policy

VARIABLE = "FX_APPROX_POLICY"
"""The environment variable that has the policy as text, where none was set."""

_current: list[Backend] = []


def set_default_policy(policy: Policy | None = None) -> Backend:
    """Sets what ``torch.compile(model, backend="fx_approx")`` samples.

    Graphs that are compiled from now on follow it, those of all models; what was compiled before stays as it is.

    Args:
        policy: As in :func:`fx_approx.backend`. None takes the environment variable ``FX_APPROX_POLICY``, a policy as
            text (:func:`fx_approx.policies.parse_policy`), and where that is not set the default policy.

    Returns:
        The backend that the name stands for now, for :func:`fx_approx.report`, :func:`fx_approx.set_sampling` and all
        that takes one.

    Raises:
        TypeError: ``policy`` is none.
        ValueError: ``FX_APPROX_POLICY`` is no policy.
    """
    _current[:] = [backend(_from_environment() if policy is None else policy)]
    return _current[0]


def compile_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], **how: Any) -> Callable[..., Any]:
    """Compiles one graph by the backend that the name stands for; called by Dynamo, see :class:`Backend`."""
    current = _current[0] if _current else set_default_policy()
    return current(gm, example_inputs, **how)


def _from_environment() -> Policy | None:
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    try:
        return parse_policy(text)
    except ValueError as error:
        raise ValueError(f"{VARIABLE}: {error}") from error
