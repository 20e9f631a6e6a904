"""Some of a graph's candidates, the others decided: what a policy in an Override is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from fx_approx.core.candidates import Candidate
from fx_approx.core.plan import Decision
from fx_approx.core.plan_effects import TokenShare
from fx_approx.core.step_cost import MakeOptimizer, Model, StepTime, StepWorkload
from fx_approx.core.token_sampling import TokenSampling


class PartialView:
    """The graph of ``model`` with ``candidates`` still to decide about; see :class:`fx_approx.core.step_cost.Model`."""

    def __init__(self, model: Model, candidates: Sequence[Candidate], decided: Mapping[str, Decision]) -> None:
        """A view.

        Args:
            model: The whole graph.
            candidates: Those to decide about.
            decided: Decisions about others, by name.
        """
        self._model, self._candidates = model, tuple(candidates)
        self._decided = {name: decision for name, decision in decided.items() if decision.roles}

    @property
    def candidates(self) -> Sequence[Candidate]:
        """The candidates that are still to be decided about."""
        return self._candidates

    @property
    def fingerprint(self) -> str:
        """The hash of the whole graph."""
        return self._model.fingerprint

    @property
    def runs(self) -> bool:
        """Whether there are example inputs to run."""
        return self._model.runs

    def realized(self, subnetwork: bool = False, optimizer: MakeOptimizer | None = None) -> PartialView:
        """The whole graph with another step, what was decided before included."""
        return PartialView(self._model.realized(subnetwork, optimizer), self._candidates, self._decided)

    def with_tokens(self, tokens: TokenSampling | None) -> PartialView:
        """The whole graph with some tokens."""
        return PartialView(self._model.with_tokens(tokens), self._candidates, self._decided)

    def token_shares(self, tokens: TokenSampling) -> tuple[tuple[TokenShare, ...], tuple[str, ...]]:
        """Of the whole graph."""
        return self._model.token_shares(tokens)

    def work(self, decisions: Mapping[str, Decision], memory: bool = True) -> StepWorkload:
        """Of the whole graph, with what was decided before."""
        return self._model.work({**self._decided, **decisions}, memory)

    def tied(self, decisions: Mapping[str, Decision]) -> list[tuple[str, ...]]:
        """Of ``decisions`` only; one that shares with a layer decided before is by itself."""
        groups = self._model.tied({**self._decided, **decisions})
        return [own for names in groups if (own := tuple(name for name in names if name in decisions))]

    def coupled(self) -> frozenset[str]:
        """Those of the whole model."""
        return self._model.coupled()

    def module(self, name: str) -> nn.Module | None:
        """Of the whole graph's candidate ``name``."""
        return self._model.module(name)

    def weight_norms(self, name: str) -> Tensor | None:
        """Of the whole graph's layer ``name``."""
        return self._model.weight_norms(name)

    def time(
        self,
        plans: Sequence[Mapping[str, Decision]],
        *,
        tokens: Sequence[TokenSampling | None] | None = None,
        compiled: bool = False,
        repeats: int = 7,
    ) -> list[StepTime]:
        """Steps of the whole graph, with what was decided before."""
        whole = [{**self._decided, **plan} for plan in plans]
        return self._model.time(whole, tokens=tokens, compiled=compiled, repeats=repeats)
