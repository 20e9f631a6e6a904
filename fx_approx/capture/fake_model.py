"""A copy of a model on fake tensors, to be run for shapes alone: nothing of the model is touched, nothing computed."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fx_approx._compat import (
    BatchNormBase,
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
    tree_map,
    tree_map_only,
)
from fx_approx.capture.known_values import quiet, without_user_hooks
from fx_approx.capture.size_guards import TensorSpec
from fx_approx.capture.trace import kept_random_state


class NoValuesError(Exception):
    """The forward asks a fake tensor for its values."""


class _Values(TorchFunctionMode):
    """Says what is wrong where a forward asks a tensor for its values, which fake ones have not."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Runs ``func`` unless it is about values."""
        name = getattr(func, "__name__", "")
        if name in ("numpy", "__array__", "data_ptr") and args and isinstance(args[0], FakeTensor):
            raise NoValuesError(f"{name}() of a tensor, which is not run here")
        return func(*args, **(kwargs or {}))


UNKNOWABLE = (
    NoValuesError,
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
"""What ends a run on fake tensors though the model may be right."""


@dataclasses.dataclass(frozen=True)
class FakeModel:
    """A model on fake tensors, in training mode.

    Attributes:
        module: The copy.
        mode: Its fake tensors belong to this.
        silenced: Paths of modules that lost users' hooks.
    """

    module: nn.Module
    mode: FakeTensorMode
    silenced: list[str]

    def own(self, value: Any) -> Any:
        """``value`` with a fake tensor in place of each tensor or :class:`TensorSpec`."""

        def convert(leaf: Any) -> Any:
            if isinstance(leaf, TensorSpec):
                return leaf.empty()
            if isinstance(leaf, Tensor):
                return self.mode.from_tensor(leaf, static_shapes=True)
            return leaf

        return tree_map(convert, value, is_leaf=lambda leaf: isinstance(leaf, TensorSpec))

    def inner(self, value: Any) -> Any:
        """The same for values inside a model: those that need gradients were computed, and may be changed in place."""
        return tree_map_only(Tensor, lambda t: t.clone() if t.requires_grad else t, self.own(value))


@contextlib.contextmanager
def fake_model(root: nn.Module, constants: Mapping[str, Tensor] | None = None) -> Iterator[FakeModel]:
    """A fake copy of ``root``; fake tensors can be made and computed with inside.

    BatchNorm counts nothing, no random number is drawn, and hooks of the user do not run.

    Args:
        root: The model; it is not touched.
        constants: Tensors of its graph, which the copy has as attributes.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with kept_random_state(), torch.enable_grad():
        with FakeCopyMode(mode), warnings.catch_warnings():
            # The copy looks at the gradient of results that a module keeps, too.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
            fake = copy.deepcopy(root)
        for module in fake.modules():
            module.training = True
            if isinstance(module, BatchNormBase) and module.momentum is None:
                module.momentum = 0.0  # a plain average reads how many batches there were
        vars(fake).update({name: mode.from_tensor(value) for name, value in (constants or {}).items()})
        silenced = without_user_hooks(fake)
        with mode, quiet(), _Values():
            yield FakeModel(fake, mode, silenced)
