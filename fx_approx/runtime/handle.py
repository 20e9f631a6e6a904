"""A handle on transformed graphs that appear while a model runs, so that both frontends answer the same calls."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from fx_approx.core.candidates import Role
from fx_approx.runtime.approx_module import ApproxModule, find

Follower = Callable[[ApproxModule, bool], None]
"""Called with a graph that has appeared, and whether it is new, and not one for other shapes of the same layers."""

Settings = Mapping[str, Any]
"""By glob on the names of layers, a ratio or a switch."""


class GraphHandle(abc.ABC):
    """What stands for all transformed graphs of a model that a backend of ``torch.compile`` makes.

    The functions that take a transformed model take it, too, before the first step as well: what is set is applied to
    each graph when it appears.

    Attributes:
        settings: Ratios and switches that were set, the last of each kind, in order: by globs, product, and whether
            they are ratios or switches.
        states: Sampler states that wait for their graphs.
        uncompiled: While it is set, graphs run node by node inside of these contexts, and not as they were compiled.
        stand_in: While it is set, what it returns for a graph is called in the place of that graph.
    """

    def __init__(self) -> None:
        self.settings: dict[tuple[tuple[str, ...], Role | None, str], Settings] = {}
        self.states: list[Mapping[str, Any]] = []
        self.uncompiled: Callable[[], contextlib.AbstractContextManager[Any]] | None = None
        self.stand_in: Callable[[ApproxModule], Callable[..., Any]] | None = None
        self._followers: list[Follower] = []

    @property
    @abc.abstractmethod
    def pieces(self) -> tuple[ApproxModule, ...]:
        """The transformed graphs so far, in the order of their compilation."""

    @property
    @abc.abstractmethod
    def models(self) -> tuple[nn.Module, ...]:
        """The user's own modules that were compiled, of those inside another only that other."""

    @abc.abstractmethod
    def report(self) -> Any:
        """The savings report over all graphs so far, see :func:`fx_approx.report`."""

    @abc.abstractmethod
    def compiled(self, model: nn.Module) -> nn.Module:
        """One of ``models``, so that a call of it runs through the graphs."""

    def model(self, purpose: str) -> nn.Module:
        """The one module that was compiled.

        Raises:
            ValueError: There is none yet, or more than one.
        """
        models = self.models
        if len(models) != 1:
            what = ", ".join(type(one).__name__ for one in models) or "none yet; run a training step first"
            raise ValueError(f"model: {purpose} needs the one model that this backend has compiled, it has {what}")
        return models[0]

    def follow(self, follower: Follower) -> None:
        """Has ``follower`` told of each graph that appears from now on."""
        self._followers.append(follower)

    def leave(self, follower: Follower) -> None:
        """No longer tells ``follower`` of new graphs."""
        self._followers.remove(follower)

    def appeared(self, approx: ApproxModule, new: bool) -> None:
        """Tells all followers of a graph; called by the frontend."""
        for follower in list(self._followers):
            follower(approx, new)

    @contextlib.contextmanager
    def running_uncompiled(self, inside: Callable[[], contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
        """Graphs run node by node meanwhile, each inside of ``inside()``."""
        before, self.uncompiled = self.uncompiled, inside
        try:
            yield
        finally:
            self.uncompiled = before

    @contextlib.contextmanager
    def replaced(self, stand_in: Callable[[ApproxModule], Callable[..., Any]]) -> Iterator[None]:
        """What ``stand_in`` returns for a graph is called in its place meanwhile."""
        before, self.stand_in = self.stand_in, stand_in
        try:
            yield
        finally:
            self.stand_in = before


def pieces_of(model: nn.Module | GraphHandle) -> tuple[ApproxModule, ...]:
    """The transformed model, or the graphs of a backend.

    Raises:
        TypeError: ``model`` is neither.
        ValueError: It is not transformed, or holds more than one transformed model.
    """
    return model.pieces if isinstance(model, GraphHandle) else (find(model),)
