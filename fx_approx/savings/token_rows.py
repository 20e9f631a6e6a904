"""The token axis in a savings report: how many tokens each block computes, and why."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from fx_approx.core.plan_effects import PlanEffects
from fx_approx.core.token_axis import short_names


@dataclasses.dataclass(frozen=True)
class TokenRow:
    """The tokens of one block of a transformer.

    Attributes:
        block: The module that it is.
        computed: Tokens that it computes.
        tokens: All there are.
        reason: Why it computes as many.
    """

    block: str
    computed: int
    tokens: int
    reason: str


def token_rows(effects: PlanEffects, ratios: Sequence[float] | None = None) -> tuple[TokenRow, ...]:
    """The blocks of a model whose plan samples tokens, in order.

    Args:
        effects: What the plan does.
        ratios: Of each stretch of blocks the share of the tokens that it keeps now; None for those of the plan.
    """
    rows = []
    for block in effects.blocks:
        computed = of = block.tokens
        reason = block.reason
        if block.stretch >= 0:
            share = effects.tokens[block.stretch]
            computed, of = share.kept(share.sampling.ratio if ratios is None else ratios[block.stretch])
            reason = "none is left out now" if computed == of else reason
        rows.append(TokenRow(block.name, computed, of, reason))
    return tuple(rows)


def token_lines(rows: Sequence[TokenRow], notes: Sequence[str]) -> list[str]:
    """The lines of a report: neighbours that do the same together, and why there are no more blocks."""
    if not rows and not notes:
        return []
    some, of = (sum(getattr(row, name) for row in rows) for name in ("computed", "tokens"))
    lines = [
        f"Tokens that the blocks compute, {some} of {of} in all:" if rows else "Tokens: no block computes some only."
    ]
    for (computed, tokens, reason), same in itertools.groupby(rows, lambda row: (row.computed, row.tokens, row.reason)):
        names = [row.block for row in same]
        last = short_names(names)[1][-1]
        where = names[0] if len(names) == 1 else f"{names[0]} to {last}"
        count = f"all {tokens}" if computed == tokens else f"{computed} of {tokens}"
        lines.append(f"  {where}: {count}, {reason}")
    return [*lines, *(f"  {note}" for note in notes)]
