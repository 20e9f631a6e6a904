"""Models with multi-head attention, and what watches them run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fx_approx
from fx_approx.policies import Uniform

HEADS, SIZE, LENGTH = 4, 16, 7
AHEAD = Uniform(0.5)
ONLINE = Uniform(0.5, scores="online")


class Block(nn.Module):
    """Attention between two linear layers; with ``kdim`` the keys are a part of the values."""

    def __init__(self, mask: Any = None, causal: bool = False, padding: Any = None, **options: Any) -> None:
        super().__init__()
        self.pre, self.post = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.attn = nn.MultiheadAttention(SIZE, HEADS, **{"batch_first": True, **options})
        if self.attn.in_proj_bias is not None:
            nn.init.normal_(self.attn.in_proj_bias)
        self.register_buffer("mask", mask)
        self.register_buffer("padding", padding)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre(x)
        key = x if self.attn.kdim == SIZE else x[..., : self.attn.kdim]
        masks = {"attn_mask": self.mask, "key_padding_mask": self.padding, "is_causal": self.causal}
        y, _ = self.attn(x, key, x, need_weights=False, **masks)
        return self.post(x + y)


class Calls(nn.Module):
    """Attention that is called in one way or another."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Any], attention: nn.Module | None = None) -> None:
        super().__init__()
        self.fc = nn.Linear(SIZE, SIZE)
        self.attn = nn.MultiheadAttention(SIZE, HEADS, batch_first=True) if attention is None else attention
        self.call = call

    def forward(self, x: Tensor) -> Any:
        x = self.fc(x)
        return self.call(self.attn, x)


class Watch(TorchFunctionMode):
    """Shapes of the first operands of attentions and linear products."""

    def __init__(self) -> None:
        super().__init__()
        self.attended: list[tuple[int, ...]] = []
        self.weights: list[tuple[int, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.attended.append(tuple(args[0].shape))
        elif func is F.linear:
            self.weights.append(tuple(args[1].shape))
        return func(*args, **(kwargs or {}))


def transformed(model: nn.Module, policy: Any = AHEAD, x: Any = None) -> Any:
    """Silent where no layer is sampled."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_approx.errors.NoEffectWarning)
        return fx_approx.transform(model, policy, x)


def names(model: Any) -> list[str]:
    return [row.name for row in fx_approx.report(model).rows]
