"""What choosing costs: the selections of a forward, timed beside the whole training step."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fx_approx._compat import tree_leaves, tree_map_only
from fx_approx.capture.containers import mean_square
from fx_approx.runtime.approx_module import ApproxModule, find
from fx_approx.runtime.snapshot import undone
from fx_approx.runtime.validation import check_inputs
from fx_approx.savings.rows import SelectionTime
from fx_approx.utils.timing import in_turn

_WARM = 3


def selection_time(
    model: nn.Module, batch: Any, loss: Callable[[Any], Tensor] | None = None, *, repeats: int = 20
) -> SelectionTime:
    """Times the selections of a forward and the whole training step in turn; the report shows the result from then on.

    All that makes selections is run by itself, on what it was given in a forward: random numbers, scores, samplers, and
    the copies that ``reuse_selection``, ``selection_interval`` and learnt scores keep. Where ``model`` is compiled, the
    selections are compiled apart from the rest with Inductor; inside the whole they may be fused with more, and scores
    that read activations then cost less than here. Not counted: slicing weights (see the report), and samples drawn in
    the backward pass.

    The model is as before afterwards, its gradients too.

    Args:
        model: A transformed model, or ``torch.compile`` of one, on its device, in training mode.
        batch: A batch as the model is called with it: a tensor, a tuple of arguments or a dict of keywords.
        loss: Makes a scalar of the model's output; by default the mean of the squares of all its tensors.
        repeats: How often both are timed.

    Returns:
        Medians, with quartiles of the share.

    Raises:
        ValueError: ``model`` is not transformed or in evaluation mode or selects nothing, ``batch`` does not fit, or
            ``repeats`` is less than 1.
    """
    approx = find(model)
    if not approx.training:
        raise ValueError("model: expected training mode, since nothing is sampled in evaluation; call model.train()")
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"repeats: expected an integer of at least 1, got {repeats!r}")
    args, kwargs = check_inputs(approx, batch)
    if args is None:
        raise ValueError("batch: expected a tensor, a tuple of arguments or a dict of keyword arguments, got None")
    compiled = model is not approx
    wanted = [p for p in approx.parameters() if p.requires_grad]

    def step() -> None:
        result = model(*args, **kwargs)
        torch.autograd.grad((mean_square if loss is None else loss)(result), wanted, allow_unused=True)

    with undone(approx):
        calls = _calls(approx, args, dict(kwargs))

        def select() -> list[Any]:
            return [module(*given) for module, given in calls]

        choose = torch.compile(select, fullgraph=True, dynamic=False) if compiled else select
        device = approx._fx_approx.state.device
        times = in_turn([step, choose], device, repeats, warmup=_WARM)
    shares = [choice / whole for whole, choice in zip(*times, strict=True)]
    low, _, high = statistics.quantiles(shares, n=4) if repeats > 1 else shares * 3
    whole, choice = (statistics.median(values) for values in times)
    found = approx._fx_approx.record.selection_time = SelectionTime(choice, whole, (low, high), compiled, repeats)
    return found


def _calls(approx: ApproxModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[nn.Module, Any]]:
    """What makes the selections of a forward, with what it is given there."""
    runtime = approx._fx_approx
    makers = [runtime, *(() if runtime.resample is None else (runtime.resample,)), *runtime.selectors.values()]
    if runtime.resample is not None and not runtime.resample.known:
        approx(*args, **kwargs)  # the first step of learnt scores is exact
    found: list[tuple[nn.Module, Any]] = []

    def detached(tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_(tensor.requires_grad)

    def record(module: nn.Module, given: Any, chosen: Any) -> None:
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(chosen)):  # else the layers stay exact now
            found.append((module, tree_map_only(Tensor, detached, given)))

    handles = [maker.register_forward_hook(record) for maker in makers]
    try:
        approx(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    if not any(module is not runtime for module, _ in found):
        raise ValueError("model: nothing is selected in its forward, so there is nothing to time")
    return found
