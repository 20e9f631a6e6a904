"""The selections of the step that comes next, made without making the step."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch

from fx_approx.capture.module_snapshot import kept_training_flags
from fx_approx.runtime.approx_module import ApproxModule
from fx_approx.runtime.rng import INCREMENT, SELECTION_INTERVAL, STEP
from fx_approx.sampling.base import Selection


def next_selections(approx: ApproxModule) -> tuple[Selection | None, ...]:
    """The selections that the next training step of ``approx`` makes ahead, or those that are kept.

    Nothing changes: the step that follows makes the same.
    """
    runtime = approx._fx_approx
    resample, graph = runtime.resample, runtime.program.graph
    if resample is None or graph is None:
        return ()
    node = next(node for node in graph.nodes if node.op == "call_module" and str(node.target).endswith(".resample"))
    weights = [operator.attrgetter(str(argument.target))(approx) for argument in node.args[1:]]
    kept = resample.held and bool(resample.held_key[0] >= 0)
    resample.note_known()
    owners = {selector.owner[0] for selector in runtime.selectors.values()}
    with torch.no_grad(), kept_training_flags(owners):
        for owner in owners:  # layers as in training, where they sample
            owner.training = True
        draws = runtime.randomness
        drawn = draws.of(resample.held_key.clone()) if kept else draws.upcoming(runtime.state)
        result: tuple[Selection | None, ...] = resample(drawn, *weights)
    return result


def use_up(approx: ApproxModule, chosen: Sequence[Selection | None], steps: int | None = None) -> bool:
    """Counts training steps that were taken in the place of ``approx``: its selection is used up, as by its own steps.

    Nothing changes where one selection is reused (:func:`fx_approx.reuse_selection`).

    Args:
        approx: The model.
        chosen: The selections of these steps; scores ``ema`` look for what was not chosen for long.
        steps: How many; None: as many as are left of the present selection.

    Returns:
        Whether the next selections are made anew, and are not those that were kept.
    """
    runtime = approx._fx_approx
    state, resample = runtime.state, runtime.resample
    if resample is None or int(state[INCREMENT]) == 0:
        return False
    interval, step = int(state[SELECTION_INTERVAL]), int(state[STEP])
    following = (step // interval + 1) * interval if steps is None else step + steps
    for one, selection in zip(resample.each(), chosen, strict=True):
        if one.age is not None and selection is not None:
            starts = torch.arange(one.groups, device=one.age.device).unsqueeze(1) * one.pairs
            one.age.add_(following - step).index_fill_(0, (selection.indices + starts).flatten(), 0)
    if not runtime.draws:
        return True
    state[STEP] = following
    over = int(resample.held_key[1]) != following // interval
    if over:
        resample.held_key.fill_(-1)
    return over
