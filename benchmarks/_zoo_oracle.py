"""An independent oracle: the original model, run by plain torch, in which what was not read counts nothing.

Every product of the original model is met as the function that it calls. A product that was sampled multiplies the
columns of its right operand by the factors of :mod:`_zoo_selections`: 0 where a pair was not read. Nothing is narrowed,
rewritten or traced, so the outputs and all gradients of this step are those that a transformed model must have.
"""

from __future__ import annotations

import collections
import contextlib
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from _zoo_selections import Factors
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_LAYERS: dict[str, tuple[type[nn.Module], ...]] = {
    "linear": (nn.Linear,),
    "conv1d": (nn.Conv1d,),
    "conv2d": (nn.Conv2d,),
    "conv3d": (nn.Conv3d,),
}
_KINDS: dict[Any, str] = {
    F.linear: "linear",
    torch.conv1d: "conv1d",
    torch.conv2d: "conv2d",
    torch.conv3d: "conv3d",
    torch.matmul: "matmul",
    torch.linalg.matmul: "matmul",
    operator.matmul: "matmul",
    Tensor.matmul: "matmul",
    Tensor.__matmul__: "matmul",
    torch.mm: "mm",
    Tensor.mm: "mm",
    torch.bmm: "bmm",
    Tensor.bmm: "bmm",
    torch.addmm: "addmm",
    Tensor.addmm: "addmm",
    torch.baddbmm: "baddbmm",
    Tensor.baddbmm: "baddbmm",
    torch.einsum: "einsum",
}
_ATTENTION = inspect.signature(F.multi_head_attention_forward)


class MismatchError(Exception):
    """The calls of the original model are not those of which selections are known."""


class Oracle(TorchFunctionMode):
    """A mode in which the products of ``model`` leave out what was not read.

    Attributes:
        counts: How often each layer or function was called, by its name.
        lower: Some value was of a shorter type than float64, so that the model itself rounds more.
    """

    def __init__(self, model: nn.Module, factors: Mapping[str, Factors]) -> None:
        super().__init__()
        self.model, self.factors = model, factors
        self.counts: collections.Counter[str] = collections.Counter()
        self.lower = False
        self._stack: list[str] = [""]

    @contextlib.contextmanager
    def following(self) -> Iterator[Oracle]:
        """Applies the factors to the forwards inside, and knows which module each function is called in."""
        handles = []
        for path, module in self.model.named_modules():
            enter, leave = self._entering(path)
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
        try:
            with self:
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, path: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(*_: Any) -> None:
            self._stack.append(path)

        def leave(*_: Any) -> None:
            self._stack.pop()

        return enter, leave

    def check(self) -> None:
        """Says if calls and factors do not belong to each other.

        Raises:
            MismatchError: A layer was called more or less often than selections are known of.
        """
        for name, known in self.factors.items():
            if any(one is not None for one in known.calls) and self.counts[name] != len(known.calls):
                raise MismatchError(f"{name}: called {self.counts[name]} times, selections of {len(known.calls)} calls")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch with each of its functions."""
        kwargs = kwargs or {}
        kind = _KINDS.get(func) if isinstance(func, collections.abc.Hashable) else None
        if func is F.multi_head_attention_forward:
            made = self._attention(args, kwargs)
        elif kind is None:
            made = func(*args, **kwargs)
        else:
            factor = self._next(kind)
            made = func(*args, **kwargs) if factor is None else _KEPT[kind](func, factor, args, kwargs)
        if isinstance(made, Tensor) and made.dtype in (torch.float32, torch.bfloat16, torch.float16):
            self.lower = self.lower or any(isinstance(one, Tensor) and one.dtype == torch.float64 for one in args)
        return made

    def _next(self, kind: str, inside: str = "") -> Tensor | None:
        """The factor of the next call of a function in the module that is running, or in one below it."""
        path = ".".join(filter(None, (self._stack[-1], inside)))
        name = f"{path}.{kind}" if path else kind
        # A layer that multiplies by a weight stored transposed, as those of GPT-2, is a linear one by its own name.
        own = kind == "addmm" and path in self.factors
        if (own or isinstance(self.model.get_submodule(path), _LAYERS.get(kind, ()))) and name not in self.factors:
            name = path
        place = self.counts[name]
        self.counts[name] += 1
        known = self.factors.get(name)
        if known is None:
            return None
        return known.calls[place] if place < len(known.calls) else None

    def _attention(self, args: Any, kwargs: Any) -> Any:
        """Multi-head attention by its definition, if a product of it was sampled."""
        name = ".".join(filter(None, (self._stack[-1], "linear")))
        if name not in self.factors:
            return F.multi_head_attention_forward(*args, **kwargs)
        bound = _ATTENTION.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        inputs = [given[one] for one in ("query", "key", "value")]
        if given["use_separate_proj_weight"]:
            weights = [given[one] for one in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
            biases = [None] * 3 if given["in_proj_bias"] is None else given["in_proj_bias"].chunk(3)
            factors = [self._next("linear") for _ in range(3)]
        else:
            weights = list(given["in_proj_weight"].chunk(3))
            biases = [None] * 3 if given["in_proj_bias"] is None else list(given["in_proj_bias"].chunk(3))
            factors = [self._next("linear")] * 3
        query, key, value = (
            F.linear(one, weight if factor is None else weight * factor, bias)
            for one, weight, bias, factor in zip(inputs, weights, biases, factors, strict=True)
        )
        heads = given["num_heads"]
        split = [one.unflatten(-1, (heads, -1)).movedim(0, -2) for one in (query, key, value)]
        scores = split[0] @ split[1].mT / split[0].shape[-1] ** 0.5
        if given["attn_mask"] is not None:
            scores = scores + given["attn_mask"]
        attended = (scores.softmax(-1) @ split[2]).movedim(-2, 0).flatten(-2)
        factor = self._next("linear", "out_proj")
        weight = given["out_proj_weight"]
        return F.linear(attended, weight if factor is None else weight * factor, given["out_proj_bias"]), None


def _linear(func: Any, factor: Tensor, args: Any, kwargs: Any) -> Tensor:
    given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
    weight = given.pop("weight")
    return torch.nn.functional.linear(weight=weight * factor.to(weight.dtype), **given)


def _convolution(func: Any, factor: Tensor, args: Any, kwargs: Any) -> Tensor:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    weight, groups = given.pop("weight"), given.get("groups", 1)
    columns = factor.to(weight.dtype).view(groups, 1, weight.shape[1]).expand(-1, weight.shape[0] // groups, -1)
    columns = columns.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))
    made: Tensor = func(weight=weight * columns, **given)
    return made


def _right(place: int) -> Callable[..., Tensor]:
    """A product of matrices whose left operand is argument ``place`` and whose right operand is the next."""
    names = (("input", "other"), ("mat1", "mat2"), ("batch1", "batch2"))

    def multiply(func: Any, factor: Tensor, args: Any, kwargs: Any) -> Tensor:
        given, named = list(args), dict(kwargs)
        if len(given) > place + 1:
            given[place + 1] = given[place + 1] * factor.to(given[place + 1].dtype).unsqueeze(-1)
        else:
            name = next(right for _, right in names if right in named)
            named[name] = named[name] * factor.to(named[name].dtype).unsqueeze(-1)
        made: Tensor = func(*given, **named)
        return made

    return multiply


def _einsum(func: Any, factor: Tensor, args: Any, kwargs: Any) -> Tensor:
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    inputs, _, output = equation.replace(" ", "").partition("->")
    left, right = inputs.split(",")
    label = next(one for one in left if one in right and one not in output)
    axis = right.index(label)
    shape = [-1 if place == axis else 1 for place in range(len(right))]
    return torch.einsum(equation, operands[0], operands[1] * factor.to(operands[1].dtype).view(shape))


_KEPT: dict[str, Callable[..., Tensor]] = {
    "linear": _linear,
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "matmul": _right(0),
    "mm": _right(0),
    "bmm": _right(0),
    "addmm": _right(1),
    "baddbmm": _right(1),
    "einsum": _einsum,
}
