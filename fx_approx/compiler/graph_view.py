"""The graph as a policy sees it: the work of a step under any plan, and its time."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import importlib
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fx_approx.capture.containers import mean_square
from fx_approx.capture.trace import kept_random_state
from fx_approx.compiler.compilation import Compilation
from fx_approx.compiler.extractors import extractors
from fx_approx.core.candidates import Candidate, Role
from fx_approx.core.flops import sliced_bytes, slicing_bytes
from fx_approx.core.plan import Decision, Plan, make_plan
from fx_approx.core.plan_effects import PlanEffects, TokenShare, tied
from fx_approx.core.step_cost import (
    MakeOptimizer,
    ProductWork,
    StepTime,
    StepTimeEstimate,
    StepWorkload,
    Update,
    WholeCostModel,
    at_rest,
)
from fx_approx.core.token_sampling import TokenSampling
from fx_approx.errors import UnsupportedError
from fx_approx.ops.base import OPS
from fx_approx.sampling.scores import get_score
from fx_approx.sampling.spec import SamplerConfig
from fx_approx.savings.memory_model import Counts, Product, memory, trained_bytes
from fx_approx.utils.timing import in_turn

_NO_OPERATION = ("placeholder", "output", "get_attr")


class GraphView:
    """A captured model, for policies that decide about the graph as a whole.

    It is a :class:`fx_approx.core.step_cost.Model`.
    """

    def __init__(
        self,
        compilation: Compilation,
        prune_unread: bool = True,
        build: Callable[[Plan], nn.Module] | None = None,
        inputs: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None,
        find: Callable[[str], nn.Module | None] | None = None,
    ) -> None:
        """A view of ``compilation``.

        Args:
            compilation: A captured model with shapes.
            prune_unread: Channels that no one reads are not computed.
            build: Makes the model transformed by a plan, for :meth:`time`, which runs it, so on tensors of its own.
            inputs: Example inputs with values, positional and by keyword.
            find: The user's own module at a path; None takes those of the compilation.
        """
        self._compilation, self._prune_unread = compilation, prune_unread
        self._build, self._inputs = build, inputs
        self._find_module = compilation.root.get_submodule if find is None else find
        self._subnetwork = False
        self._optimizer: MakeOptimizer | None = None
        self._tokens: TokenSampling | None = None
        self._effects: dict[Any, PlanEffects] = {}
        self._found = {one.candidate.name: one for one in compilation.sites}

    @property
    def candidates(self) -> Sequence[Candidate]:
        """All candidates of the model."""
        return self._compilation.candidates

    @property
    def fingerprint(self) -> str:
        """A hash of the graph with all shapes and dtypes, the key of measurements."""
        graph = self._compilation.captured.graph
        facts = [(one.name, one.kind, repr(one.facts)) for one in self.candidates]
        text = "" if graph is None else str(graph)
        return hashlib.sha256(repr((type(self._compilation.root).__qualname__, text, facts)).encode()).hexdigest()[:24]

    @property
    def runs(self) -> bool:
        """Whether there are example inputs to run."""
        return self._build is not None and self._inputs is not None

    def realized(self, subnetwork: bool = False, optimizer: MakeOptimizer | None = None) -> GraphView:
        """The same graph with another step; see :meth:`fx_approx.core.step_cost.Model.realized`."""
        captured = self._compilation.captured
        if subnetwork and (captured.graph is None or captured.sections):
            raise UnsupportedError("subnetwork: the model's forward could not be traced as one graph; expected False")
        other = copy.copy(self)
        other._subnetwork, other._optimizer = subnetwork, optimizer
        return other.with_tokens(self._tokens)

    def with_tokens(self, tokens: TokenSampling | None) -> GraphView:
        """The same graph with some tokens; see :meth:`fx_approx.core.step_cost.Model.with_tokens`."""
        if self._subnetwork and tokens is not None:
            raise UnsupportedError("subnetwork: a model that samples tokens has none; expected False, or all tokens")
        other = copy.copy(self)
        other._tokens = tokens
        return other

    def token_shares(self, tokens: TokenSampling) -> tuple[tuple[TokenShare, ...], tuple[str, ...]]:
        """Stretches of blocks, and why there are no more."""
        stretches, why = self._compilation.token_stretches(tokens)
        return tuple(stretch.share(tokens) for stretch in stretches), why

    def estimate(self, plan: Plan, cost: WholeCostModel) -> StepTimeEstimate:
        """What ``cost`` says of the exact step, and of that under ``plan``."""
        some = self.with_tokens(plan.tokens)
        decisions = {decision.name: decision for decision in plan.sampled}
        exact, now = cost.step(self.work({}), self), cost.step(some.work(decisions), some)
        return StepTimeEstimate(exact, now, cost.omits)

    def work(self, decisions: Mapping[str, Decision], memory: bool = True) -> StepWorkload:
        """The step under ``decisions``; see :meth:`fx_approx.core.step_cost.Model.work`."""
        if self._subnetwork:
            _check_kept(decisions)
        effects = self._effects_of(decisions)
        specs = {name: spec for name, one in decisions.items() if (spec := one.spec) is not None}
        ratios = [] if self._tokens is None else [self._tokens.ratio] * len(effects.tokens)
        counts = Counts(effects, self.candidates, specs, {}, ratios)
        products = {one.name: _product(one, decisions.get(one.name), counts) for one in self.candidates}
        update = self._update(trained_bytes(effects, counts, products) if self._subnetwork else {})
        moved = _moved(effects, counts, products, self._subnetwork) if memory else {}
        operations, copies = self._operations, moved.pop("copies", 0)
        if self._subnetwork:  # exact layers at narrow sizes: nothing is chosen, and no weight is sliced
            narrow = tuple(ProductWork(one.candidate, one.kept, {}, hoisted=True) for one in products.values())
            return StepWorkload(narrow, operations=operations + copies, update=update, **moved)
        work = tuple(
            ProductWork(one.candidate, one.kept, one.roles, effects.hoisted and _hoisted(one, effects))
            for one in products.values()
        )
        known = [(one, facts) for one in work if (facts := one.candidate.facts) is not None]
        slicing = sum(slicing_bytes(facts, one.kept) for one, facts in known)
        again = sum(
            2 * sliced_bytes(facts, one.kept) for one, facts in known if one.hoisted and one.candidate.kind == "linear"
        )
        return StepWorkload(work, slicing=slicing, resliced=again, operations=operations, update=update, **moved)

    def _update(self, narrow: Mapping[str, int]) -> Update | None:
        """What the optimiser does where parameters have the bytes ``narrow``, the others all of theirs."""
        if self._optimizer is None:
            return None
        trained = {name: p for name, p in self._compilation.root.named_parameters() if p.requires_grad}
        if not trained:
            return None
        whole = {name: p.numel() * p.itemsize for name, p in trained.items()}
        largest = max(trained.values(), key=lambda p: p.numel())
        return Update(
            *(self._optimizer, len(trained), sum(whole.values()), sum({**whole, **narrow}.values())),
            *(str(largest.dtype), str(largest.device)),
        )

    def tied(self, decisions: Mapping[str, Decision]) -> list[tuple[str, ...]]:
        """The sampled candidates, those together whose selections are one."""
        return tied(self._effects_of(decisions), [name for name, decision in decisions.items() if decision.roles])

    def coupled(self) -> frozenset[str]:
        """Candidates whose channels are added to others; see :meth:`fx_approx.core.step_cost.Model.coupled`."""
        if self._compilation.flow is None:
            return frozenset()
        graph = self._compilation.analysis(self._plan({}, None)).sharing.coupling
        with_others = [space for space in graph if any(other != space for other in graph[space])]
        return frozenset(name for space in with_others for name in graph.nodes[space]["readers"])

    def module(self, name: str) -> nn.Module | None:
        """The user's own module of a candidate; see :meth:`fx_approx.core.step_cost.Model.module`."""
        return self._find_module(self._found[name].owner)

    def weight_norms(self, name: str) -> Tensor | None:
        """``[groups, pairs]``, or None without a weight."""
        found = self._found[name]
        if found.op is None or found.weight is None:
            return None
        owner, _, attribute = found.weight.rpartition(".")
        weight = getattr(self._compilation.root.get_submodule(owner), attribute, None)
        if not isinstance(weight, Tensor):
            return None
        with torch.no_grad():
            norms: Tensor = OPS[found.candidate.kind].scores(None, weight, get_score("weight"), found.op_kwargs)
            return norms.float().cpu()

    def time(
        self,
        plans: Sequence[Mapping[str, Decision]],
        *,
        tokens: Sequence[TokenSampling | None] | None = None,
        compiled: bool = False,
        repeats: int = 7,
    ) -> list[StepTime]:
        """Times training steps; see :meth:`fx_approx.core.step_cost.Model.time`."""
        if self._build is None or self._inputs is None:
            raise ValueError("example_inputs: none were given, so no step can be timed")
        args, kwargs = self._inputs
        with kept_random_state(), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pairs = zip(({}, *plans), (None, *([None] * len(plans) if tokens is None else tokens)), strict=True)
            models = [self._made(self._build, self._plan(plan, own or self._tokens)).train() for plan, own in pairs]
            calls = [torch.compile(model, dynamic=False) if compiled else model for model in models]
            times = _step_seconds(calls, models, args, kwargs, repeats, self._optimizer)
        exact = times[0]
        return [StepTime(statistics.median(own), speedup_quartiles(exact, own)) for own in times]

    def _plan(self, decisions: Mapping[str, Decision], tokens: TokenSampling | None) -> Plan:
        candidates = self.candidates
        return make_plan(candidates, [decisions.get(one.name, Decision(one.name)) for one in candidates], tokens)

    def _made(self, build: Callable[[Plan], nn.Module], plan: Plan) -> nn.Module:
        """The model that is timed under ``plan``."""
        made = build(plan)
        if not self._subnetwork or not plan.sampled:
            return made
        assert self._inputs is not None
        args, kwargs = self._inputs
        if not extractors:
            importlib.import_module("fx_approx.subnetworks.extract")
        return extractors[0](made, kwargs or args)

    @property
    def _operations(self) -> int:
        graph = self._compilation.captured.graph
        return 0 if graph is None else sum(node.op not in _NO_OPERATION for node in graph.nodes)

    def _effects_of(self, decisions: Mapping[str, Decision]) -> PlanEffects:
        """Sharing and demand under ``decisions``, which depend on ratios only where readers of one value differ."""
        sampled = {name: decision for name, decision in decisions.items() if decision.roles}
        own = tuple((name, _unrated(one.roles), one.scope, one.straight_through) for name, one in sampled.items())
        stretches, _ = self._compilation.token_stretches(self._tokens)
        key = own, tuple((stretch.start, stretch.end) for stretch in stretches)
        found = self._effects.get(key)
        if found is None:
            found = self._effects[key] = self._find({name: _alike(one) for name, one in sampled.items()})
        for one in found.classes:
            if len({sampled[reading.name].spec for reading in one.readings}) > 1:
                return self._find(sampled)
        return found

    def _find(self, decisions: Mapping[str, Decision]) -> PlanEffects:
        plan, compilation = self._plan(decisions, self._tokens), self._compilation
        return compilation.effects(plan, compilation.analysis(plan), self._prune_unread)


def _unrated(roles: Mapping[Role, SamplerConfig]) -> Any:
    """All of the samplers but their ratios."""
    return tuple((role, *((k, v) for k, v in spec.to_dict().items() if k != "ratio")) for role, spec in roles.items())


def _alike(decision: Decision) -> Decision:
    roles = {role: spec.replace(ratio=0.5) for role, spec in decision.roles.items()}
    return dataclasses.replace(decision, roles=roles, cost=None)


def _product(candidate: Candidate, decision: Decision | None, counts: Counts) -> Product:
    """As the report's row has it: a sampler that keeps all pairs is none."""
    roles = {} if decision is None or candidate.blocked else dict(decision.roles)
    through = decision is not None and decision.straight_through
    kept = counts.of(candidate, roles, through)
    roles = {role: spec for role, spec in roles.items() if kept.of(role) is not None}
    return Product(candidate, kept, roles)


def _hoisted(product: Product, effects: PlanEffects) -> bool:
    forward = product.kept.output is None or (
        product.candidate.name in effects.reads and set(product.roles) == {Role.OUTPUT}
    )
    return forward and not product.kept.straight_through


def _moved(effects: PlanEffects, counts: Counts, products: Mapping[str, Product], subnetwork: bool) -> dict[str, int]:
    found = memory(effects, counts, products, subnetwork)
    return {} if found is None else dataclasses.asdict(found)


def _check_kept(decisions: Mapping[str, Decision]) -> None:
    """UnsupportedError for a decision that no fixed network follows from."""
    for name, one in decisions.items():
        if one.roles and (set(one.roles) != {Role.OUTPUT} or one.straight_through):
            raise UnsupportedError(f"subnetwork: the gradients of {name} are sampled apart; expected its output only")
        if one.spec is not None and not get_score(one.spec.scores).ahead:
            raise UnsupportedError(
                f"subnetwork: the selection of {name} follows the activations of the step; expected scores weight, "
                f"ema or uniform, got {one.spec.scores!r}"
            )


def _step_seconds(
    calls: Sequence[Any],
    models: Sequence[nn.Module],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    repeats: int,
    make: MakeOptimizer | None,
) -> list[list[float]]:
    """Seconds of a training step of each, in turn, after one round that does not count.

    Each turn has two steps, and the second counts: the first brings back what the others have driven out of caches.
    oneDNN keeps 1024 primitives; where eight variants of a DenseNet take turns, a first step is 1.4 times as long.
    """

    def step(call: Any, wanted: list[nn.Parameter], optimizer: torch.optim.Optimizer | None) -> None:
        loss = mean_square(call(*args, **kwargs))
        if optimizer is None:
            torch.autograd.grad(loss, wanted, allow_unused=True)
            return
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    device = next((p.device for p in models[0].parameters()), torch.device("cpu"))
    steps: list[Callable[[], None]] = []
    for call, model in zip(calls, models, strict=True):
        wanted = [p for p in model.parameters() if p.requires_grad]
        steps.append(functools.partial(step, call, wanted, None if make is None else at_rest(make, wanted)))
    return in_turn(steps, device, repeats, warmup=1, before=1)


def speedup_quartiles(exact: Sequence[float], own: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of exact / own, by neighbouring steps; seconds are given."""
    ratios = [one / other for one, other in zip(exact, own, strict=True)]
    if len(ratios) == 1:
        return (ratios[0],) * 3
    low, middle, high = statistics.quantiles(ratios, n=4)
    return low, middle, high
