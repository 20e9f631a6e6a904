"""From a sampled network to a wider one without a jump: what was not read begins again from zero."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Collection, Set

import torch
from torch import Tensor, nn

from fx_approx.core.candidates import Role, matches
from fx_approx.core.plan_effects import Axis
from fx_approx.distributed.slices import selected, weight_uses
from fx_approx.errors import NoEffectWarning, ShapesRequiredError
from fx_approx.ops.channel_slices import keep_columns
from fx_approx.runtime.approx_module import ApproxModule
from fx_approx.runtime.handle import GraphHandle, pieces_of
from fx_approx.runtime.selection_tracker import SelectionTracker
from fx_approx.runtime.sharding import is_shard
from fx_approx.runtime.upcoming import next_selections

LEFT_WHOLE = "are left whole"
_KINDS = ("linear", "conv")  # whose weight is [outputs, inputs of a group, ...]


def zero_unread_weights(model: nn.Module | GraphHandle, layers: str = "*") -> dict[str, int]:
    """Sets the weights to zero that the selections leave out, so that the exact network computes what the sampled did.

    Call it where sampling ends, or its ratio rises, before ``set_sampling`` or the exact step: what was
    trained goes on as it is, and the channels that were left out come in with outgoing weights of zero and learn from
    there. Without it, they come in as they were initialised, or were left when they were last chosen. Network growth
    keeps the function for the same reason when it adds channels (Net2Net, Chen et al. 2016).
    :class:`fx_approx.schedules.RatioScheduler` does it by itself with ``preserve=True``.

    What is left out is what the kept selection leaves out, where one is kept (``selection_interval`` of
    :func:`fx_approx.transform`, :func:`fx_approx.reuse_selection`), and otherwise what the next sampled step would
    leave out. Scores ``ema`` look for channels that were not read for long, so that the next step may read others than
    the last one: keep one selection with them, or take scores ``weight``. Gradients, optimiser state and BatchNorm
    statistics are left alone, and so are weights that are not trained (``requires_grad`` False): nothing would bring
    back what they know.

    In data-parallel training all ranks are to call it alike, with selections that agree: scores ``weight``, or what
    :func:`fx_approx.distributed.enable_sparse_allreduce` or :func:`fx_approx.distributed.synchronize_scores` keeps
    equal.

    Args:
        model: A transformed model, or what holds it, in either mode.
        layers: Glob on the names of sampled layers. Those that share a selection with one that matches go with it.

    Returns:
        By layer, how many of its input channels were set to zero.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``model`` is not transformed, or sharded; ``layers`` matches no sampled layer; or a sampler scales
            what it reads (it is unbiased), so that no exact network computes the same. Nothing is changed then.
        ShapesRequiredError: ``transform`` got no example inputs, so that it is not known who reads what.

    Warns:
        NoEffectWarning: The selection of some sampled layers is not made ahead, or is not of a weight of a linear or
            convolution layer, or the weight is used elsewhere, too, or is not trained: they compute something else when
            exact.
    """
    pieces = pieces_of(model)
    there: list[str] = []
    matching: list[tuple[ApproxModule, set[str]]] = []
    for approx in pieces:
        check_preservable(approx)
        runtime = approx._fx_approx
        candidates = {one.name: one for one in runtime.record.candidates}
        names = [name for name, role in runtime.selectors if role is Role.OUTPUT]
        there += names
        matching.append((approx, {name for name in names if matches(layers, candidates[name])}))
    if not any(names for _, names in matching):
        known = ", ".join(there) or "none"
        raise ValueError(f"layers: expected a glob on the names of sampled layers, got {layers!r}; there are: {known}")
    found: dict[str, int] = {}
    for approx, names_here in matching:
        if names_here:
            found.update(preserve(approx, names_here))
    return found


def check_preservable(approx: ApproxModule, argument: str = "model") -> None:
    """ValueError that names ``argument`` unless an exact network can compute what ``approx`` does when sampled."""
    runtime = approx._fx_approx
    if not runtime.record.effects.operations:
        raise ShapesRequiredError(
            f"{argument}: expected a model transformed with example_inputs, they tell who reads what"
        )
    for (name, role), selector in runtime.selectors.items():
        if role is Role.OUTPUT and selector.sampler.unbiased:
            raise ValueError(
                f"{argument}: {name} is sampled by {selector.sampler.name}, which scales what it reads, so that no "
                "exact network computes the same; expected a sampler without scaling, such as topk"
            )
    if any(is_shard(parameter) for parameter in approx.parameters()):
        raise ValueError(f"{argument}: expected whole parameters, got those of fully_shard, of which a rank has a part")


def preserve(approx: ApproxModule, names: Set[str]) -> dict[str, int]:
    """Does so for the layers of these names that are sampled now, and for those that share a selection with them."""
    runtime = approx._fx_approx
    candidates = {one.name: one for one in runtime.record.candidates}
    on = {n for (n, role), s in runtime.selectors.items() if role is Role.OUTPUT and s.enabled and not s.exact}
    read = [{reading.name for reading in one.readings} for one in runtime.record.effects.classes]
    places = {place for place, readers in enumerate(read) if readers & names}
    wanted = (names | {name for place in places for name in read[place]}) & on
    weights = _weights(approx, wanted)
    parameters = dict(approx.named_parameters(remove_duplicate=False))
    frozen = {name for name, (path, _) in weights.items() if not parameters[path].requires_grad}
    weights = {name: use for name, use in weights.items() if name not in frozen}
    kept = {}
    if weights:
        published = _published(approx, places)
        mask = published.mask.cpu()
        for name, (path, axis) in weights.items():
            flags = selected(axis, mask, published.slices)
            weight: Tensor = operator.attrgetter(path)(approx)  # a view of the parameter, where it stands transposed
            kept[name] = weight, flags.view(candidates[name].groups, -1), int((~flags).sum())
    for weight, flags, _ in kept.values():
        keep_columns(weight, flags.to(weight.device))
    if frozen:
        warnings.warn(f"{left_whole(frozen)}: they compute something else when exact", NoEffectWarning, stacklevel=3)
    missing = sorted(wanted - kept.keys() - frozen)
    if missing:
        warnings.warn(
            f"the selection of {len(missing)} sampled layers is not made ahead, or is of no weight of their own, such "
            f"as {missing[0]}: they compute something else when exact",
            NoEffectWarning,
            stacklevel=3,
        )
    return {name: count for name, (_, _, count) in kept.items()}


def left_whole(names: Collection[str]) -> str:
    """Says of layers whose weights are not trained that these are not set to zero."""
    return f"weights of {len(names)} sampled layers are not trained, such as that of {min(names)}, and {LEFT_WHOLE}"


def _weights(approx: ApproxModule, wanted: Set[str]) -> dict[str, tuple[str, Axis]]:
    """Path of the weight and the axis that it contracts over, of the layers whose selection is made ahead."""
    record = approx._fx_approx.record
    effects = record.effects
    ahead = {reading.name for one in effects.classes for reading in one.readings}
    kinds = {one.name: one.kind for one in record.candidates}
    parameters = dict(approx.named_parameters(remove_duplicate=False))
    uses = weight_uses(approx)
    by_path: dict[str, list[str]] = {}
    for operation in effects.operations:
        name, path = operation.candidate, operation.weight
        if name in wanted and name in ahead and path in parameters and kinds[name].startswith(_KINDS):
            by_path.setdefault(path, []).append(name)
    found = {}
    for path, names in by_path.items():
        axes = {effects.reads[name] for name in names}
        if len(axes) == 1 and len(names) == uses[parameters[path]]:  # all its uses read the same of it
            found.update(dict.fromkeys(names, (path, axes.pop())))
    return found


def _published(approx: ApproxModule, places: Set[int]) -> SelectionTracker:
    """Which units the selections of these places have; all units of the others, and where they are exact."""
    resample = approx._fx_approx.resample
    assert resample is not None
    published = resample.tracker()
    with torch.enable_grad():
        published([one if place in places else None for place, one in enumerate(next_selections(approx))])
    return published
