"""Truth values of traced values whose one branch raises an error: ``assert`` and ``if ...: raise``."""

from __future__ import annotations

import bisect
import builtins
import dataclasses
import dis
import functools
import linecache
import types
from collections.abc import Callable
from typing import Any

import torch

from fx_approx._compat import CHECKS, assert_true

_LASTING = ("RERAISE", "YIELD_VALUE", "FOR_ITER", "SEND", "IMPORT_NAME")
_FAR = 1000
"""Instructions that are followed to see whether a branch can only raise."""


@dataclasses.dataclass(frozen=True)
class Requirement:
    """What a truth value must be, or else ``error`` is raised.

    Attributes:
        expected: The truth value with which the forward goes on.
        error: Class of what is raised otherwise.
        message: The line of the source.
    """

    expected: bool
    error: type[Exception]
    message: str


@functools.lru_cache(maxsize=256)
def _instructions(code: types.CodeType) -> tuple[dis.Instruction, ...]:
    return tuple(one for one in dis.get_instructions(code) if one.opname != "EXTENDED_ARG")


def _position(frame: types.FrameType) -> tuple[tuple[dis.Instruction, ...], int]:
    listed = _instructions(frame.f_code)
    return listed, next(number for number, one in enumerate(listed) if one.offset == frame.f_lasti)


def unpacked(frame: types.FrameType) -> int | None:
    """How many names ``frame`` unpacks the value into that it iterates over now; None if it does something else."""
    listed, here = _position(frame)
    return int(listed[here].argval) if listed[here].opname == "UNPACK_SEQUENCE" else None


def requirement(frame: types.FrameType) -> Requirement | None:
    """What the value must be whose truth ``frame`` asks for now, if all that can follow otherwise is an error."""
    listed, here = _position(frame)
    asked, negated = here, False
    if listed[here].opname == "TO_BOOL":
        here += 1
    if listed[here].opname == "UNARY_NOT":  # as pytest writes an assertion: the negation gets a name first
        here, negated = here + 1, True
        store, load = listed[here : here + 2]
        if store.opname == "STORE_FAST" and load.opname == "LOAD_FAST" and store.argval == load.argval:
            here += 2
    jump = listed[here]
    if "POP_JUMP" not in jump.opname or not jump.opname.endswith(("IF_TRUE", "IF_FALSE")):
        return None
    code = _Code(frame, listed)
    jumps_if = jump.opname.endswith("IF_TRUE") is not negated
    for start, expected in ((here + 1, jumps_if), (code.at(jump.argval), not jumps_if)):
        error = code.raised(start)
        if error is not None and not code.is_caught(listed[asked].offset):
            file, line = frame.f_code.co_filename, frame.f_lineno
            return Requirement(expected, error, f"{linecache.getline(file, line).strip()} ({file}:{line})")
    return None


class _Code:
    """The instructions of one function, and what may follow them."""

    def __init__(self, frame: types.FrameType, listed: tuple[dis.Instruction, ...]) -> None:
        self.frame, self.listed = frame, listed

    def at(self, offset: int) -> int:
        """The number of the instruction at ``offset``, or of that which is prefixed there."""
        return bisect.bisect_left(self.listed, offset, key=lambda one: one.offset)

    def is_caught(self, offset: int) -> bool:
        """Whether an error at ``offset`` is handled in the same function."""
        entries: Any = dis.Bytecode(self.frame.f_code).exception_entries  # type: ignore[attr-defined]
        return any(entry.start <= offset < entry.end for entry in entries)

    def raised(self, start: int) -> type[Exception] | None:
        """The one class of error that all ways from ``start`` on end with, which do nothing that lasts."""
        waiting, seen, errors = [start], set[int](), set[type[Exception]]()
        while waiting:
            here = waiting.pop()
            value: Any = None
            while here not in seen:
                if here >= len(self.listed) or len(seen) > _FAR:
                    return None
                seen.add(here)
                one = self.listed[here]
                value = self._loaded(one, value)
                if isinstance(value, type) and issubclass(value, Exception):
                    errors.add(value)
                if one.opname == "RAISE_VARARGS":
                    if one.arg != 1:
                        return None
                    break
                lasts = one.opname in _LASTING or one.opname.startswith(("STORE_", "DELETE_", "RETURN_"))
                if lasts and one.opname != "STORE_FAST":
                    return None
                if "JUMP" in one.opname:
                    if "BACKWARD" in one.opname:
                        return None
                    waiting.append(self.at(one.argval))
                    if one.opname in ("JUMP_FORWARD", "JUMP"):
                        break
                here += 1
        return errors.pop() if len(errors) == 1 else None

    def _loaded(self, one: dis.Instruction, before: Any) -> Any:
        if one.opname == "LOAD_ASSERTION_ERROR":
            return AssertionError
        if one.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            return self.frame.f_globals.get(one.argval, getattr(builtins, str(one.argval), None))
        if one.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            return getattr(before, str(one.argval), None) if isinstance(before, types.ModuleType) else None
        return None


@functools.lru_cache(maxsize=64)
def required(error: type[Exception]) -> Callable[[Any, bool, str], None]:
    """A function for graphs that raises ``error`` unless a condition is as expected."""

    def require(condition: Any, expected: bool, message: str) -> None:
        if bool(condition) is not expected:
            raise error(message)

    def require_assertion(condition: Any, expected: bool, message: str) -> None:
        if not expected:
            condition = condition.logical_not() if isinstance(condition, torch.Tensor) else not condition
        assert_true(condition, message)

    made = require_assertion if error is AssertionError else require
    _CHECKS.add(made)
    return made


_CHECKS: set[Any] = {*CHECKS}


def only_checks(target: Any) -> bool:
    """Whether a function of a graph computes nothing, and raises an error at the most."""
    return callable(target) and target in _CHECKS
