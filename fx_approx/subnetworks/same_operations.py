"""Whether two forwards compute the same by the same operations, so that they agree on other values, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fx_approx._compat import TorchDispatchMode, storage_key, tree_leaves, written
from fx_approx.capture.containers import copied, leaves
from fx_approx.capture.module_snapshot import kept_training_flags, kept_values
from fx_approx.capture.trace import kept_random_state

_SAME_VALUE = ("aten::clone", "aten::alias", "aten::detach", "aten::lift_fresh", "aten::lift_fresh_copy")
_LONGEST = 4096
"""Entries of a constant that is compared by its values."""


class _UntoldError(Exception):
    """What a forward does cannot be told by its operations."""


class _Operations(TorchDispatchMode):
    """Numbers the values that a forward computes: those computed alike have one number.

    Attributes:
        numbers: By operation and numbers of its operands; one table for all forwards that are compared.
    """

    def __init__(self, numbers: dict[Any, int], known: Sequence[tuple[Tensor, Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers = numbers
        self._of: dict[int, int] = {}
        self._held: dict[int, Tensor] = {}
        self._sharing: dict[int, set[int]] = {}
        for tensor, what in known:
            self._note(tensor, self._number(what), -1)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The operation itself, noted."""
        given = dict(kwargs or {})
        name, changed = str(func), written(func, args, given)
        base = name.rpartition(".")[0].replace(".", "::")
        if changed and not (base.endswith("_") and len(changed) == 1 and changed[0] is args[0]):
            raise _UntoldError(name)
        key = (name.replace("_.", ".") if changed else name, self.key(args), self.key(given))
        if changed and len(self._sharing[self._memory(args[0])]) > 1:
            raise _UntoldError(name)  # in place, of what others may read
        result = func(*args, **given)
        made = [(place, one) for place, one in enumerate(tree_leaves(result)) if isinstance(one, Tensor)]
        if not made and result is not None:
            raise _UntoldError(name)  # a number that depends on values
        for place, one in made:
            number = self.of(args[0]) if base in _SAME_VALUE else self._number((key, place))
            self._note(one, number)
            if changed:
                self._of[id(args[0])] = number
        return result

    def _note(self, tensor: Tensor, number: int, *others: int) -> None:
        self._of[id(tensor)], self._held[id(tensor)] = number, tensor
        self._sharing.setdefault(self._memory(tensor), set()).update((id(tensor), *others))

    def of(self, tensor: Tensor) -> int:
        """The number of a value; of one that no operation made, by what it holds."""
        if id(tensor) not in self._of:
            if tensor.numel() > _LONGEST:
                raise _UntoldError("a constant")
            self._note(tensor, self._number((tensor.dtype, tuple(tensor.shape), repr(tensor.tolist()))), -1)
        return self._of[id(tensor)]

    def key(self, value: Any) -> Any:
        """What an operation, or a caller, is given."""
        if isinstance(value, Tensor):
            return "tensor", self.of(value)
        if isinstance(value, (tuple, list)):
            return tuple(self.key(one) for one in value)
        if isinstance(value, Mapping):
            return tuple((name, self.key(one)) for name, one in value.items())
        return type(value).__name__, repr(value)

    def _number(self, what: Any) -> int:
        return self.numbers.setdefault(what, len(self.numbers))

    @staticmethod
    def _memory(tensor: Tensor) -> int:
        return storage_key(tensor.untyped_storage())


def evaluate_alike(one: nn.Module, other: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> bool:
    """Whether two modules on the same parameters and buffers return the same in evaluation, by the same operations.

    Nothing of them changes. Of what they compute, the order of operations and those that are not read do not matter;
    False where it cannot be told, as where an operation writes into memory that others may read.
    """
    numbers: dict[Any, int] = {}
    own = [(tensor, ("model", place)) for place, tensor in enumerate((*one.parameters(), *one.buffers()))]
    made = []
    for module in (one, other):
        args, kwargs = copied(call)
        inputs = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = [*own, *((leaf, ("input", place)) for place, leaf in enumerate(inputs))]
        with kept_random_state(), kept_values(module), kept_training_flags(module.modules()), torch.no_grad():
            module.train(False)
            operations = _Operations(numbers, known)
            try:
                with operations:
                    result = module(*args, **kwargs)
                made.append([operations.key(leaf) for leaf in leaves(result)])
            except Exception:  # whatever a forward says in evaluation, as one that is called in another way there
                return False
    return made[0] == made[1]


def all_alike(one: nn.Module, other: nn.Module, calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> bool:
    """:func:`evaluate_alike` for several calls."""
    return bool(calls) and all(evaluate_alike(one, other, call) for call in calls)
