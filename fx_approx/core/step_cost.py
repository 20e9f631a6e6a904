"""The work of a whole training step under a plan: what cost models read, and what policies that see the graph ask."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fx_approx.core.candidates import Candidate, Role
from fx_approx.core.flops import Kept, executed_flops, selection_flops
from fx_approx.core.plan import Cost, Decision, Plan, Policy
from fx_approx.core.plan_effects import TokenShare
from fx_approx.core.token_sampling import TokenSampling
from fx_approx.sampling.spec import SamplerConfig


@dataclasses.dataclass(frozen=True)
class ProductWork:
    """One product as it is computed under a plan.

    Attributes:
        candidate: The product.
        kept: How much of it is computed: its own sample, and the outputs that anyone reads.
        roles: The samplers at work.
        hoisted: Its selection is known before its input is made, which holds the selected channels only, and its weight
            is a slice made at the head of the graph, or is itself narrow in a subnetwork.
    """

    candidate: Candidate
    kept: Kept
    roles: Mapping[Role, SamplerConfig]
    hoisted: bool = False

    @property
    def flops(self) -> int:
        """Operations of a training step, without the scores; 0 where shapes are not known."""
        facts = self.candidate.facts
        return 0 if facts is None else executed_flops(facts, self.kept).total

    @property
    def selection_flops(self) -> int:
        """Operations for the scores."""
        return sum(selection_flops(self.candidate, role, spec) for role, spec in self.roles.items())


MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
"""Makes an optimiser of parameters, as its class does: ``torch.optim.AdamW``."""


def at_rest(make: MakeOptimizer, parameters: list[nn.Parameter]) -> Optimizer:
    """An optimiser with the rate 0, which works as any other and changes nothing."""
    optimizer = make(parameters)
    for group in optimizer.param_groups:
        if "lr" in group:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
    return optimizer


@dataclasses.dataclass(frozen=True)
class Update:
    """What an optimiser does in a step: it goes over all trained parameters.

    Attributes:
        optimizer: Makes it.
        tensors: Trained parameters.
        bytes_exact: Bytes of those of the exact model.
        bytes: The same under the plan, which makes them smaller in a subnetwork.
        dtype: Data type of most of them, such as ``"torch.float32"``.
        device: Of most of them.
    """

    optimizer: MakeOptimizer
    tensors: int
    bytes_exact: int
    bytes: int
    dtype: str
    device: str


@dataclasses.dataclass(frozen=True)
class StepWorkload:
    """A training step of a whole model; all numbers are of one step.

    Attributes:
        products: The candidates, in the order in which the model runs.
        moved_exact: Bytes that operations which multiply nothing (element-wise, normalisation, pooling, copies) put out
            in a forward of the exact model.
        moved: The same under the plan.
        gathered: Bytes of activations copied in a forward to take out selected channels and tokens.
        slicing: Bytes moved to slice weights.
        resliced: Bytes moved to slice weights of hoisted linear layers again in the backward pass.
        memory_exact: Bytes that the exact step keeps for backward, parameters and buffers left out.
        memory: The same under the plan.
        operations: Nodes of the graph that compute something.
        update: The optimiser's part of the step; None without one.
    """

    products: tuple[ProductWork, ...]
    moved_exact: int = 0
    moved: int = 0
    gathered: int = 0
    slicing: int = 0
    resliced: int = 0
    memory_exact: int = 0
    memory: int = 0
    operations: int = 0
    update: Update | None = None

    @property
    def flops_exact(self) -> int:
        """Operations of the products of the exact step."""
        return sum(p.candidate.facts.flops.total for p in self.products if p.candidate.facts is not None)

    @property
    def flops(self) -> int:
        """Operations of the products under the plan, without the scores."""
        return sum(product.flops for product in self.products)

    @property
    def selection_flops(self) -> int:
        """Operations for the scores."""
        return sum(product.selection_flops for product in self.products)

    @property
    def exact(self) -> StepWorkload:
        """The workload of the exact step of the same model."""
        products = tuple(ProductWork(product.candidate, Kept(), {}) for product in self.products)
        moved, memory = self.moved_exact, self.memory_exact
        update = None if self.update is None else dataclasses.replace(self.update, bytes=self.update.bytes_exact)
        return StepWorkload(
            *(products, moved, moved), memory_exact=memory, memory=memory, operations=self.operations, update=update
        )


@dataclasses.dataclass(frozen=True)
class StepTime:
    """A measured training step.

    Attributes:
        seconds: Median.
        speedup: Exact / this by neighbouring steps: lower quartile, median, upper quartile.
    """

    seconds: float
    speedup: tuple[float, float, float]

    def __str__(self) -> str:
        """The speed-up, median and quartiles."""
        low, middle, high = self.speedup
        return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


@dataclasses.dataclass(frozen=True)
class StepTimeEstimate:
    """A training step, exact and under a plan.

    Attributes:
        exact: Predicted cost of the exact step.
        now: Predicted cost under the plan.
        omits: What the cost model leaves out.
        measured: The step under the plan as it was timed; None if it was not.
    """

    exact: Cost
    now: Cost
    omits: str
    measured: StepTime | None = None

    @property
    def speedup(self) -> float | None:
        """Predicted: exact / now; None if the cost model has no times."""
        if self.exact.seconds is None or not self.now.seconds:
            return None
        return self.exact.seconds / self.now.seconds

    def __str__(self) -> str:
        if self.exact.seconds is None or self.now.seconds is None:
            text = f"{self.exact.flops:.4g} operations exact, {self.now.flops:.4g} now, predicted"
        else:
            times = f"{1000 * self.exact.seconds:.1f} ms exact, {1000 * self.now.seconds:.1f} ms now"
            text = f"{self.speedup:.2f} times as fast, predicted ({times})"
        if self.measured is not None:
            taken = f"{1000 * self.measured.seconds:.1f} ms now"
            text += f"; measured {self.measured} times as fast, median and quartiles of steps in turn ({taken})"
        return f"{text}. Left out: {self.omits}."


class Model(Protocol):
    """What a policy that sees the whole graph can ask of it."""

    @property
    def candidates(self) -> Sequence[Candidate]:
        """All of them, in the order in which the model runs."""
        ...

    @property
    def fingerprint(self) -> str:
        """The same for models whose exact steps take the same time on one device: graph, shapes, dtypes."""
        ...

    @property
    def runs(self) -> bool:
        """Whether there are example inputs to run, see :meth:`time`."""
        ...

    def realized(self, subnetwork: bool = False, optimizer: MakeOptimizer | None = None) -> Model:
        """The same graph, with another step: how plans are run, and what else is in it.

        Args:
            subnetwork: A plan's selections are kept, as a subnetwork (docs/subnetworks.md): its layers cost what plain
                narrow ones do, with one ``index_select`` where a part of a wide value is read. Otherwise they are
                selected in the graph, in each step.
            optimizer: Its update is part of the step.

        Raises:
            UnsupportedError: The graph has no subnetworks.
        """
        ...

    def with_tokens(self, tokens: TokenSampling | None) -> Model:
        """The same graph, whose blocks compute some tokens only, in every plan; None: all tokens.

        Raises:
            UnsupportedError: The step is one of a subnetwork.
        """
        ...

    def token_shares(self, tokens: TokenSampling) -> tuple[tuple[TokenShare, ...], tuple[str, ...]]:
        """The stretches of blocks that would compute some tokens only, and why there are no more."""
        ...

    def work(self, decisions: Mapping[str, Decision], memory: bool = True) -> StepWorkload:
        """The step under ``decisions``, by name; a candidate without one is exact.

        Sharing and demand are found anew for other layers, scopes or scores, and once for all ratios: that is cheap.
        ``memory`` can be left out, with the bytes moved: then only ``products`` and slices of weights are known.

        Raises:
            UnsupportedError: The step is one of a subnetwork, and a selection follows activations or gradients.
        """
        ...

    def tied(self, decisions: Mapping[str, Decision]) -> list[tuple[str, ...]]:
        """The sampled candidates, those together whose selections are one, so that the largest ratio decides."""
        ...

    def coupled(self) -> frozenset[str]:
        """The candidates that read channels which an addition couples with others, as those of a residual stream."""
        ...

    def module(self, name: str) -> nn.Module | None:
        """The user's own layer that a candidate is, or the module in whose forward it stands; None if not known."""
        ...

    def weight_norms(self, name: str) -> Tensor | None:
        """Norms of the weight of a candidate by column-row pair, ``[groups, pairs]``; None without a weight."""
        ...

    def time(
        self,
        plans: Sequence[Mapping[str, Decision]],
        *,
        tokens: Sequence[TokenSampling | None] | None = None,
        compiled: bool = False,
        repeats: int = 7,
    ) -> list[StepTime]:
        """Times training steps under ``plans`` in turn with the one without a plan, which comes first in the result.

        ``tokens`` are those of each plan; where it is None, and in the first step, those of all (:meth:`with_tokens`).
        The example inputs are the batch, the mean of the squares of the outputs is the loss; nothing of the model
        changes (an optimiser has the rate 0).

        Raises:
            ValueError: There are no example inputs to run.
            UnsupportedError: A plan was to be run as a subnetwork, and has none.
        """
        ...


@runtime_checkable
class WholePolicy(Policy, Protocol):
    """A policy that decides about the graph as a whole, since a decision changes what its neighbours cost."""

    def decide_whole(self, model: Model) -> Sequence[Decision] | Plan:
        """One decision per candidate, in the same order; a plan where it decides about tokens, too."""
        ...


def is_whole(policy: Policy) -> TypeGuard[WholePolicy]:
    """Whether ``policy`` decides about the graph as a whole."""
    return isinstance(policy, WholePolicy)


class WholeCostModel(Protocol):
    """Estimates what a training step of a whole model costs."""

    @property
    def omits(self) -> str:
        """What it does not model."""
        ...

    def step(self, work: StepWorkload, model: Model) -> Cost:
        """The cost of the step; fields that it does not estimate are None."""
        ...
