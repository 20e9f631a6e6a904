"""What a graph takes for granted of a model beside its inputs, and whether that still holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import nn

from fx_approx._compat import children_of
from fx_approx.capture.records import Held
from fx_approx.core.hooks import hook_count, is_hooked
from fx_approx.runtime.sharding import UNREGISTERED, is_sharded


@dataclasses.dataclass(frozen=True)
class GraphMatch:
    """Whether a graph may serve a call.

    Attributes:
        ok: It may.
        reason: Why not, in words for the user; None where that is nothing to warn of, such as a call in another mode.
    """

    ok: bool
    reason: str | None = None


FITS = GraphMatch(True)
NO_GRAPH = GraphMatch(False)
"""It may not, which is nothing to warn of."""


@dataclasses.dataclass(frozen=True)
class Guards:
    """What a graph takes for granted.

    Attributes:
        top: The module whose forward it stands for: that one's hooks run anyway.
        readers: Modules whose ``training`` flags it depends on.
        branching: It serves training only.
        frozen: Module, name and value of the attributes that it holds.
        held: What else it takes for granted of tensors and modules.
        structure: Modules that were traced through, and what their children must be.
    """

    top: nn.Module
    readers: tuple[nn.Module, ...] = ()
    branching: bool = False
    frozen: tuple[tuple[nn.Module, str, object], ...] = ()
    held: Held = dataclasses.field(default_factory=Held)
    structure: tuple[tuple[nn.Module, tuple[tuple[str, nn.Module | None], ...]], ...] = ()

    def check(self, sharded: Mapping[nn.Module, int]) -> GraphMatch:
        """Whether all of that still holds. Plain Python: it traces.

        Args:
            sharded: Modules that the graph calls by ``fully_shard``'s hooks, and how many hooks those are.
        """
        flags = [module.training for module in self.readers]
        if not all(flags) and (any(flags) or self.branching):
            return NO_GRAPH
        for module, name, value in self.frozen:
            now = getattr(module, name, None)
            # Identity first: NaN is not equal to itself. The type next: a tensor is not to be compared.
            if now is not value and (type(now) is not type(value) or now != value):
                return GraphMatch(False, f"attribute {name} of a {type(module).__name__} was changed")
        changed = self.held.changed()
        if changed is None and not torch.compiler.is_compiling():
            changed = self._rebuilt(sharded) or self.held.rearranged()
        return FITS if changed is None else GraphMatch(False, changed)

    def _rebuilt(self, sharded: Mapping[nn.Module, int]) -> str | None:
        """Which module has got other children or hooks, if any."""
        for module, children in self.structure:
            now = children_of(module)
            if len(now) != len(children) or any(
                [name not in now or (child is not None and now[name] is not child) for name, child in children]
            ):
                return f"a child of a {type(module).__name__} was changed"
            if is_hooked(module) and module is not self.top and hook_count(module) != sharded.get(module, 0):
                if is_sharded(module) and module not in sharded:
                    raise RuntimeError(f"a {type(module).__name__} {UNREGISTERED}")
                return f"a {type(module).__name__} got hooks"
        return None
