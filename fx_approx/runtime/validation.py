"""What is refused before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fx_approx._compat import buffers_of, is_compiled, parameters_of, tree_leaves
from fx_approx.capture.size_guards import NESTED, holds_nested
from fx_approx.errors import AlreadyTransformedError, CaptureError
from fx_approx.runtime.approx_module import ApproxModule
from fx_approx.runtime.layers import SampledLayer
from fx_approx.runtime.sharding import is_sharded

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


def check_model(model: Any) -> None:
    """Refuses what cannot be captured.

    Raises:
        TypeError: Not a module.
        AlreadyTransformedError: Transformed, or holding a transformed part.
        CaptureError: Scripted, compiled, wrapped, lazy or on the meta device; says what to do instead.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    name = type(model).__name__
    for path, module in model.named_modules():
        where = f" (at {path})" if path else ""
        if isinstance(module, (ApproxModule, SampledLayer)):
            raise AlreadyTransformedError(
                f"model: {name}{where} is already transformed; transform the original, or fx_approx.restore it first"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(f"model: {name}{where} is scripted; transform the Python module")
        if is_compiled(module):
            raise CaptureError(f"model: {name}{where} is compiled; transform first, then torch.compile")
        if type(module).__name__ in _WRAPPERS:
            raise CaptureError(f"model: {name}{where} is wrapped for parallel training; transform first, then wrap")
        if is_sharded(module):
            raise CaptureError(f"model: {name}{where} is sharded; transform first, then fully_shard")
        if _uninitialised(module):
            raise CaptureError(f"model: {name}{where} is a lazy module not yet materialised; run it once first")
    if "forward" in vars(model):
        raise CaptureError(f"model: the forward of this {name} instance was replaced; transform before replacing it")
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise CaptureError(f"model: {path} is on the meta device; materialise the model first")


def _uninitialised(module: nn.Module) -> bool:
    own = [t for t in (*parameters_of(module).values(), *buffers_of(module).values()) if t is not None]
    return any(nn.parameter.is_lazy(tensor) for tensor in own)


def check_inputs(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...] | None, Mapping[str, Any]]:
    """Positional and keyword arguments of an example call; None if there is no example.

    Raises:
        TypeError: Not a tensor, tuple, list or dict.
        ValueError: A tensor on another device than the model, on the meta device or nested; or a PackedSequence.
    """
    if example_inputs is None:
        return None, {}
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}
    if isinstance(example_inputs, Tensor):
        args = (example_inputs,)
    elif isinstance(example_inputs, (tuple, list)):
        args = tuple(example_inputs)
    elif isinstance(example_inputs, Mapping):
        kwargs = example_inputs
    else:
        raise TypeError(
            "example_inputs: expected a tensor, a tuple of positional arguments or a dict of keyword arguments, got "
            f"{type(example_inputs).__name__}"
        )
    if any(isinstance(one, PackedSequence) for one in (example_inputs, *args, *kwargs.values())):
        raise ValueError(
            "example_inputs: a PackedSequence is not traced; pack inside the forward and give a padded batch, or leave "
            "example_inputs out, then the layers alone are sampled"
        )
    devices = {parameter.device for parameter in model.parameters()}
    for leaf in tree_leaves((args, dict(kwargs))):
        if holds_nested(leaf):
            raise ValueError(f"example_inputs: {NESTED}")
        if isinstance(leaf, Tensor) and len(devices) == 1 and leaf.device not in devices:
            raise ValueError(f"example_inputs: a tensor is on {leaf.device}, the model on {next(iter(devices))}")
    return args, kwargs


def check_seed(seed: Any, selection_interval: Any, step: Any = 0) -> None:
    """Refuses a seed, period or step that is no integer in range."""
    for name, value, least in (
        ("seed", seed, -(2**63)),
        ("selection_interval", selection_interval, 1),
        ("step", step, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an integer, got {value!r}")
        if not least <= value < 2**63:
            raise ValueError(f"{name}: expected an integer from {least} to 2**63 - 1, got {value}")
