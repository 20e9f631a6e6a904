"""Where the time of a step goes, by kind of work."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

KINDS: dict[str, str] = {
    "compiled loops": r"CompiledFxGraph|cpp_fused|^triton_(poi|red|per)_",
    "products": r"conv|addmm|::mm|::bmm|linear|matmul|scaled_dot|flash|attention|gemm|xmma|cutlass|nvjet|^triton_tem_",
    "gathers": r"fx_approx::(take|put|add_at)|index_select|index_copy|index_add|scatter_add|_Gather|_Tap",
    "normalisation": r"batch_norm|layer_norm|group_norm",
    "selection": r"fx_approx::(draw|keep|next_key|observe)|sort|topk|cumsum|searchsorted",
    "filling and copying": r"fill_|zero_|copy_|clone",
}
"""Kind of work -> what its operators are called; the first that fits decides. "compiled loops" are the element-wise and
reducing loops that the compiler has written, normalisations among them."""


def milliseconds_by_kind(step: Callable[[], object], runs: int = 3) -> dict[str, float]:
    """Milliseconds of one step in each of :data:`KINDS`, and ``"the rest"``, from the profiler; means of ``runs``."""
    found = dict.fromkeys([*KINDS, "the rest"], 0.0)
    for name, own, _ in _profiled(step, runs):
        kind = next((kind for kind, names in KINDS.items() if re.search(names, name)), "the rest")
        found[kind] += own
    return found


def longest(step: Callable[[], object], count: int = 20, runs: int = 3) -> list[tuple[str, float, float]]:
    """The operators (on CUDA, kernels) that take the most time: name, milliseconds and calls of one step."""
    return sorted(_profiled(step, runs), key=lambda one: one[1], reverse=True)[:count]


def _profiled(step: Callable[[], object], runs: int) -> list[tuple[str, float, float]]:
    cuda = torch.cuda.is_available()
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], acc_events=True) as profiler:
        for _ in range(runs):
            step()
        if cuda:
            torch.cuda.synchronize()

    def own(event: Any) -> float:
        return float(event.self_device_time_total if cuda else event.self_cpu_time_total)

    return [(event.key, own(event) / 1000 / runs, event.count / runs) for event in profiler.key_averages()]
