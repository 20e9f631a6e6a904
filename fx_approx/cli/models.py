"""The model that a command line names, and inputs of the shapes that it gives."""

from __future__ import annotations

import difflib
import importlib
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fx_approx._compat import FakeTensorMode
from fx_approx.cli.arguments import MODEL, Input, WrongArgumentError

_TORCHVISION = (
    ". This torchvision was built for another torch (its usual wheel belongs to CUDA builds): install the two "
    "together for one platform, or give --setup FILE with a Python file that defines the missing operators"
)


def example(model: nn.Module, inputs: Sequence[Input]) -> tuple[Tensor, ...] | None:
    """Inputs on the model's device that take no memory, however large; None for none."""
    try:
        with FakeTensorMode():
            return (
                tuple(torch.empty(shape, dtype=_dtype(name), device=_device(model)) for shape, name in inputs) or None
            )
    except (RuntimeError, OverflowError) as error:
        raise WrongArgumentError(f"argument --input: {error}") from None


def random_inputs(model: nn.Module, inputs: Sequence[Input]) -> tuple[Tensor, ...]:
    """Inputs on the model's device with random values, the same in every run: normal, or 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for shape, name in inputs:
        dtype = _dtype(name)
        try:
            if dtype.is_floating_point or dtype.is_complex:
                made = torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
            else:
                made = torch.randint(2, shape, generator=generator).to(dtype)
            found.append(made.to(_device(model)))
        except (RuntimeError, OverflowError) as error:
            raise WrongArgumentError(f"argument --input: {described(error)}") from None
    return tuple(found)


def _dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def run_setup(path: Path) -> None:
    """Runs a Python script before the model is imported."""
    if not path.is_file():
        raise WrongArgumentError(f"argument --setup: {path} is no file")
    try:
        runpy.run_path(str(path), run_name="__main__")
    except Exception as error:
        raise WrongArgumentError(f"argument --setup: {path} failed: {described(error)}") from None


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # an import runs anything
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{name}.".startswith(f"{missing}."):
            raise WrongArgumentError(f"{MODEL}: there is no module {missing!r} (is it installed here?)") from None
        hint = _TORCHVISION if "torchvision::" in str(error) else ""
        raise WrongArgumentError(f"{MODEL}: import {name} failed: {described(error)}{hint}") from None


def build(module: str, path: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """The model that a callable returns, or that stands there already."""
    found, parent = _import(module), module
    for part in path.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found))
            close = f"; it has {', '.join(near)}" if near else ""
            raise WrongArgumentError(f"{MODEL}: {parent} has no {part!r}{close}")
        found, parent = getattr(found, part), f"{parent}.{part}"
    if not callable(found):
        raise WrongArgumentError(f"{MODEL}: {parent} is not callable, it is a {type(found).__name__}")
    if isinstance(found, nn.Module):
        if kwargs:
            raise WrongArgumentError(f"argument --kwarg: {parent} is a model already, there is nothing to call")
        return found
    call = f"{parent}({', '.join(f'{name}={value!r}' for name, value in kwargs.items())})"
    try:
        model = found(**kwargs)
    except Exception as error:  # the user's own code
        raise WrongArgumentError(f"{MODEL}: {call} failed: {described(error)}") from None
    if not isinstance(model, nn.Module):
        raise WrongArgumentError(f"{MODEL}: {call} returned a {type(model).__name__}, expected a torch.nn.Module")
    return model


def described(error: BaseException) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
