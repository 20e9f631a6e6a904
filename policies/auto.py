"""The policy to begin with: sample where it pays, and nothing where it does not."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping, Sequence

from fx_approx.core.plan import SCOPES, Plan, make_plan
from fx_approx.core.step_cost import Model, WholeCostModel
from fx_approx.policies.auto_search import Draft, drafts, first_of_the_fastest, worth_trying
from fx_approx.policies.cost_roofline import RooflineModel
from fx_approx.policies.graph_policy import GraphPolicy
from fx_approx.policies.tokens import Tokens, check_tokens

_FASTEST = ("value", "group")


@dataclasses.dataclass(frozen=True)
class Auto(GraphPolicy):
    """Samples the layers for which the whole step gets faster, all at one ratio, and finds out which those are.

    For each scope it drafts two plans by a cost model: all layers that may be sampled, and what is left of them after
    leaving out, one after the other, the selections without which the step is predicted to be no slower (each changes
    what its neighbours save). The drafts that are predicted to be the fastest are timed in turn with the exact step, on
    the example inputs, unless ``check`` is off. The fastest becomes the plan; if others are within 3 per cent of it,
    the one of least error: scope ``value`` before ``group``, the last layer exact, fewer layers. Where its lower
    quartile gains less than ``margin``, all layers stay exact.

    Attributes:
        ratio: Sample ratio, in (0, 1).
        cost: The cost model that drafts; by default :class:`RooflineModel`.
        compiled: The model is to be compiled. Timed as such, the exact step and each draft take a compilation.
        check: Time the drafts. Needs example inputs with values, which the Dynamo frontend does not have.
        margin: The least speed-up.
        repeats: Steps that are timed, of each.
        tries: Drafts that are timed, at most.
        scope: ``fastest``: ``value`` or ``group``, whichever is faster; otherwise one scope, see :class:`GraphPolicy`.
        keep_last: True: layers with no layer after them stay exact. None: unless the step is faster otherwise, as it
            can be at scope ``group``, where a classifier that reads all channels keeps all of them alive.
        tokens: How tokens may be left out: by themselves, or together with channels, whichever is faster. None: all
            are computed.
    """

    ratio: float = 0.5
    cost: WholeCostModel | None = None
    compiled: bool = False
    check: bool = True
    margin: float = 1.02
    repeats: int = 9
    tries: int = 4
    scope: str = dataclasses.field(default="fastest", kw_only=True)
    keep_last: bool | None = dataclasses.field(default=None, kw_only=True)
    tokens: Tokens | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.scope != "fastest" and self.scope not in SCOPES:
            raise ValueError(f"scope: expected fastest or one of {', '.join(SCOPES)}, got {self.scope!r}")
        if self.scope == "fastest" or self.keep_last is None:
            self._variants()
            return
        super().__post_init__()
        check_tokens(self.tokens, self.subnetwork)
        if self.mode != "forward":
            raise ValueError(f"mode: expected forward, where the steps of neighbours shrink too, got {self.mode!r}")
        if not 0 < self.spec(self.ratio).ratio < 1:
            raise ValueError(f"ratio: expected a number in (0, 1), got {self.ratio!r}")
        for name in ("compiled", "check"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if isinstance(self.margin, bool) or not isinstance(self.margin, numbers.Real) or not self.margin >= 1:
            raise ValueError(f"margin: expected a number of at least 1, got {self.margin!r}")
        for name, least in (("repeats", 3), ("tries", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")

    def _variants(self) -> list[Auto]:
        """This policy at one scope, with one rule for the last layer; those of less error first."""
        scopes = _FASTEST if self.scope == "fastest" else (self.scope,)
        lasts = (True, False) if self.keep_last is None else (self.keep_last,)
        return [dataclasses.replace(self, scope=scope, keep_last=last) for scope in scopes for last in lasts]

    def decide_whole(self, model: Model) -> Plan:
        """The plan, with numbers in its reasons."""
        model = self.seen(model)
        cost = RooflineModel(self.compiled) if self.cost is None else self.cost
        asked = None if self.tokens is None else self.tokens.tokens
        stretches, none = ((), ()) if asked is None else model.token_shares(asked)
        kinds = [None, asked] if stretches else [None]
        scopes = [drafts(variant, variant.ratio, model, cost, own) for own in kinds for variant in self._variants()]
        tried = worth_trying(scopes, self.tries)
        if not tried or not self.check or not model.runs:
            found = [one for own in scopes for one in own]
            best = first_of_the_fastest(found, [one.speedup for one in found])
            return self._final(model, best, "", none, enough=not best.samples or best.speedup >= self.margin)
        plans, tokens = [one.decisions for one in tried], [one.tokens for one in tried]
        times = model.time(plans, tokens=tokens, compiled=self.compiled, repeats=self.repeats)[1:]
        best = first_of_the_fastest(tried, [time.speedup[1] for time in times])
        measured = times[tried.index(best)]
        return self._final(model, best, f"measured {measured}", none, enough=measured.speedup[0] >= self.margin)

    def _final(self, model: Model, best: Draft, measured: str, none: Sequence[str], *, enough: bool) -> Plan:
        """The draft as a plan, or exact if it does not save ``enough``; ``none`` is why tokens cannot be sampled."""
        realized = " as a subnetwork" if self.subnetwork else ""
        step = f"the step{realized} {best.speedup:.2f} times as fast, predicted"
        saves = {name: f"saves {100 * gain:.1f} % of the step" for names, gain in best.gains.items() for name in names}
        sampled = {name: f"{own}; {step}{measured and ', ' + measured}" for name, own in saves.items()}
        left: Mapping[str, str] = {name: f"{own}, predicted" for name, own in saves.items()}
        ratios = best.ratios
        if not enough:
            why = f"{step}, but {measured}" if measured else step
            left, ratios = dict.fromkeys(saves, f"{why}, below {self.margin:g}"), [1.0] * len(best.groups)
        decisions = best.policy.final(model, best.groups, ratios, best.refused, sampled, left)
        if self.tokens is None:
            return make_plan(model.candidates, decisions)
        said = f"{step}{measured and ', ' + measured}"
        if best.tokens is None:
            said = f"all are computed: {'; '.join(none) or 'no faster with fewer'}"
        elif not enough:
            said = f"all are computed: {said}, below {self.margin:g}"
        else:
            said = f"{best.tokens.ratio:g} of them are computed: {said}"
        return make_plan(model.candidates, decisions, best.tokens if enough else None, said)
