"""torchao's float8 training, where it can be had."""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import nn


def float8_missing(device: str) -> str | None:
    """Why there is no float8 here; None if there is."""
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed"
    if device != "cuda":
        return f"float8 products need a CUDA device, not {device}"
    if torch.cuda.get_device_capability() < (8, 9):
        return "float8 products need compute capability 8.9 or more"
    return None


def float8(model: nn.Module) -> nn.Module:
    """``model``, changed in place: linear layers in float8 in all three products, with one scale for each tensor.

    Layers with a side that is no multiple of 16, which the kernels need, stay as they are.
    """
    converted: nn.Module = importlib.import_module("torchao.float8").convert_to_float8_training(
        model, module_filter_fn=lambda module, name: all(size % 16 == 0 for size in module.weight.shape)
    )
    return converted
