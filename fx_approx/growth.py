"""From a sampled network to a wider one without a jump: what was not read begins again from zero."""

from __future__ import annotations

import fnmatch
import warnings

import torch
from torch import Tensor, nn

from fx_approx.approx import ApproxModule, find
from fx_approx.candidate import Candidate, Role
from fx_approx.distributed.slices import weight_uses
from fx_approx.errors import NoEffectWarning
from fx_approx.passes.demand import FULL
from fx_approx.passes.effects import Axis
from fx_approx.sampling import Selection
from fx_approx.shards import is_shard


def preserve_function(model: nn.Module, layers: str = "*") -> dict[str, int]:
    """Sets the weights to zero that the selections leave out: the exact network computes what the sampled one did.

    Call it where sampling ends, or its ratio rises, before ``set_enabled``, ``set_ratio`` or the exact step: what was
    trained goes on as it is, and the channels that were left out come in with outgoing weights of zero and learn from
    there. Without it, they come in as they were initialised, or were left when they were last chosen, and what was
    trained is to be found again. Network growth does the same when it adds channels (Net2Net, Chen et al. 2016;
    GradMax, Evci et al. 2022). :class:`fx_approx.RatioScheduler` does it by itself with ``preserve=True``.

    What is left out is what the next sampled step would leave out. With scores ``weight`` the former selection is a
    part of every larger one afterwards, since the others score zero. Gradients, optimiser state and BatchNorm
    statistics are left alone.

    Args:
        model: A transformed model in training mode, or what holds it; in data-parallel training by all ranks alike.
        layers: Glob on the names of sampled layers, the others keep their weights.

    Returns:
        By layer, how many of its input channels were set to zero.

    Raises:
        ValueError: ``model`` is not transformed, in evaluation mode, or sharded; ``layers`` matches no sampled layer;
            or a sampler scales what it reads (it is unbiased), so that no exact network computes the same. Nothing is
            changed then.

    Warns:
        NoEffectWarning: The selection of some sampled layers is not made ahead, or is of no weight, or the weight is
            used elsewhere, too: they compute something else when exact.
    """
    approx = find(model)
    if not approx.training:
        raise ValueError("model: expected training mode (model.train()), nothing is sampled in evaluation mode")
    chosen = _sampled(approx, layers)
    known = dict(approx.named_parameters(remove_duplicate=False))
    axes = {name: (known[path], axis) for name, (path, axis) in _weights(approx, chosen).items()}
    if any(is_shard(weight) for weight in known.values()):
        raise ValueError("model: expected whole parameters, got those of fully_shard: a rank has a part of them only")
    masks = _masks(approx)
    found = {}
    with torch.no_grad():
        for name, (weight, axis) in axes.items():
            flags = torch.cat([_flags(masks, stretch.place, stretch.count, stretch.block) for stretch in axis])
            groups = chosen[name].groups
            kept = flags.view(groups, -1).repeat_interleave(weight.shape[0] // groups, 0).to(weight.device)
            weight.masked_fill_(~kept.view(*kept.shape, *(1,) * (weight.dim() - 2)), 0.0)
            found[name] = int((~flags).sum())
    missing = [name for name in chosen if name not in found]
    if missing:
        warnings.warn(
            f"the selection of {len(missing)} sampled layers is not made ahead, or is of no weight of their own, such "
            f"as {missing[0]}: they compute something else when exact",
            NoEffectWarning,
            stacklevel=2,
        )
    return found


def _sampled(approx: ApproxModule, layers: str) -> dict[str, Candidate]:
    """Those of the matching layers that are sampled now."""
    runtime = approx._fx_approx
    candidates = {one.name: one for one in runtime.candidates}
    names = [name for name, role in runtime.selectors if role is Role.OUTPUT]
    matching = [n for n in names if fnmatch.fnmatchcase(n, layers) or fnmatch.fnmatchcase(candidates[n].fqn, layers)]
    if not matching:
        there = ", ".join(names) or "none"
        raise ValueError(f"layers: expected a glob on the names of sampled layers, got {layers!r}; there are: {there}")
    found = {}
    for name in matching:
        selector = runtime.selectors[name, Role.OUTPUT]
        if not selector.active or selector.exact:
            continue
        if selector.sampler.unbiased:
            raise ValueError(
                f"model: {name} is sampled by {selector.sampler.name}, which scales what it reads, so that no exact "
                "network computes the same; expected a sampler without scaling, such as topk"
            )
        found[name] = candidates[name]
    return found


def _weights(approx: ApproxModule, chosen: dict[str, Candidate]) -> dict[str, tuple[str, Axis]]:
    """Path of the weight and the axis that it contracts over, of the layers whose selection is made ahead."""
    effects = approx._fx_approx.effects
    ahead = {reading.name for one in effects.classes for reading in one.readings}
    uses = weight_uses(approx)
    by_path: dict[str, list[str]] = {}
    for operation in effects.operations:
        if operation.candidate in chosen and operation.candidate in ahead and operation.weight is not None:
            by_path.setdefault(operation.weight, []).append(operation.candidate)
    found = {}
    for path, names in by_path.items():
        axes = {effects.reads[name] for name in names}
        if len(axes) == 1 and len(names) == uses[approx.get_parameter(path)]:  # all its uses read the same of it
            found.update(dict.fromkeys(names, (path, axes.pop())))
    return found


def _masks(approx: ApproxModule) -> list[Tensor | None]:
    """Which units each selection of the next sampled step has; None where it is exact."""
    runtime = approx._fx_approx
    resample, graph = runtime.resample, runtime.graph
    if resample is None or graph is None:
        return []
    node = next(node for node in graph.nodes if node.op == "call_module" and str(node.target).endswith(".resample"))
    weights = [approx.get_parameter(str(argument.target)) for argument in node.args[1:]]
    with torch.no_grad():
        chosen = resample(runtime.upcoming(), *weights)
    return [None if one is None else _mask(one, own.pairs) for one, own in zip(chosen, resample.each(), strict=True)]


def _mask(selection: Selection, pairs: int) -> Tensor:
    groups = selection.indices.shape[0]
    mask = torch.zeros(groups, pairs, dtype=torch.bool, device=selection.indices.device)
    return mask.scatter_(1, selection.indices, True).flatten()


def _flags(masks: list[Tensor | None], place: int, count: int, block: int) -> Tensor:
    mask = None if place == FULL else masks[place]
    if mask is None:
        return torch.ones(count * block, dtype=torch.bool)
    return mask.cpu().repeat_interleave(block)
