"""The selections of the step that comes next, made without making the step."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Iterator, Sequence

import torch

from fx_approx.capture.module_snapshot import kept_training_flags
from fx_approx.errors import UnsupportedError
from fx_approx.runtime.approx_module import ApproxModule
from fx_approx.runtime.graph_runtime import Runtime, selector_target
from fx_approx.runtime.rng import INCREMENT, SELECTION_INTERVAL, STEP, Draw
from fx_approx.runtime.selector import Selector
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
    resample.note_known()
    with _sampling(runtime):
        result: tuple[Selection | None, ...] = resample(_drawn(runtime), *weights)
    return result


def further_selectors(approx: ApproxModule) -> tuple[dict[str, Selector], dict[str, Selector]]:
    """The selectors of the output that are asked one by one, of what can be said before a step.

    Returns:
        By path, those of layers that Python calls, outside of all graphs; by target of their node, those of a graph,
        which are of products of two values of the step.
    """
    runtime = approx._fx_approx
    graph = runtime.program.graph
    called = set() if graph is None else {str(node.target) for node in graph.nodes if node.op == "call_module"}
    paths = {id(module): path for path, module in approx.named_modules()}
    outside, inside = {}, {}
    for one in runtime.selectors.values():
        if one.shared:
            continue
        if selector_target(one) not in called:
            outside[paths[id(one.owner[0])]] = one
        elif one.ahead and not one.spec.per_batch and one.pairs:
            inside[selector_target(one)] = one
    return outside, inside


def further_selections(approx: ApproxModule) -> list[Selection | None]:
    """The selections that these make in the next training step, layers that are called several times in the first call.

    Raises:
        UnsupportedError: One is no selection of the output that is made ahead, or its scores read values of the step.
    """
    found: list[Selection | None] = []
    outside, inside = further_selectors(approx)
    runtime = approx._fx_approx
    with _sampling(runtime):
        drawn = _drawn(runtime)
        for path, selector in outside.items():
            if not selector.ahead:
                raise UnsupportedError(
                    f"model: {path}: its selection follows the activations or gradients of the step, so that no fixed "
                    "network computes the same; expected scores weight, ema or uniform, of the output"
                )
            made = selector(None, selector.owner[0].weight, drawn)
            found.append(made if isinstance(made, Selection) else None)
        _check_blind(runtime, inside.values())
        found += [selector.blind(drawn) for selector in inside.values()]
    return found


def _check_blind(runtime: Runtime, selectors: Iterable[Selector]) -> None:
    """UnsupportedError if one scores what only the step computes: an activation, or a weight made of parameters."""
    names = {id(selector): name for (name, _), selector in runtime.selectors.items()}
    reading = [names[id(one)] for one in selectors if one.active and not one.exact and one.score.reads]
    if reading:
        more = f" and {len(reading) - 1} more" if len(reading) > 1 else ""
        raise UnsupportedError(
            f"model: {reading[0]}{more}: its selection follows the activations of the step, or a weight that the step "
            "computes, so that no fixed network computes the same; expected Exact() or scores uniform for products of "
            "two values of the step, and for weights that are no parameters"
        )


@contextlib.contextmanager
def _sampling(runtime: Runtime) -> Iterator[None]:
    """Layers are in training, where they sample."""
    owners = {selector.owner[0] for selector in runtime.selectors.values()}
    with torch.no_grad(), kept_training_flags(owners):
        for owner in owners:
            owner.training = True
        yield


def _drawn(runtime: Runtime) -> Draw | None:
    """The randomness of the next step, or that under which selections are kept."""
    resample, draws = runtime.resample, runtime.randomness
    if resample is not None and resample.held and bool(resample.held_key[0] >= 0):
        return draws.of(resample.held_key.clone())
    return draws.upcoming(runtime.state)


def use_up(approx: ApproxModule, chosen: Sequence[Selection | None], steps: int | None = None) -> bool:
    """Counts training steps that were taken in the place of ``approx``: its selection is used up, as by its own steps.

    Nothing changes where one selection is reused (:func:`fx_approx.reuse_selection`).

    Args:
        approx: The model.
        chosen: The selections of these steps, those that are made ahead together first; scores ``ema`` look for what
            was not chosen for long.
        steps: How many; None: as many as are left of the present selection.

    Returns:
        Whether the next selections are made anew, and are not those that were kept.
    """
    runtime = approx._fx_approx
    state, resample = runtime.state, runtime.resample
    if int(state[INCREMENT]) == 0 or (resample is None and not runtime.draws):
        return False
    interval, step = int(state[SELECTION_INTERVAL]), int(state[STEP])
    following = (step // interval + 1) * interval if steps is None else step + steps
    for one, selection in zip(() if resample is None else resample.each(), chosen, strict=False):
        if one.age is not None and selection is not None:
            starts = torch.arange(one.groups, device=one.age.device).unsqueeze(1) * one.pairs
            one.age.add_(following - step).index_fill_(0, (selection.indices + starts).flatten(), 0)
    if not runtime.draws:
        return True
    state[STEP] = following
    if resample is None:
        return True
    over = int(resample.held_key[1]) != following // interval
    if over:
        resample.held_key.fill_(-1)
    return over
