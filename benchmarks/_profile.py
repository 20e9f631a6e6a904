"""Where the time of a step goes, by kind of work."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

KINDS: dict[str, str] = {
    "products": r"conv|addmm|::mm|::bmm|linear|matmul|scaled_dot|flash|attention",
    "gathers": r"fx_approx::(take|put|add_at)|index_select|index_copy|index_add|scatter_add|_Gather|_Tap",
    "normalisation": r"batch_norm|layer_norm|group_norm",
    "compiled loops": r"CompiledFxGraph|cpp_fused|triton_",
    "selection": r"fx_approx::(draw|keep|next_key|observe)|sort|topk|cumsum|searchsorted",
    "filling and copying": r"fill_|zero_|copy_|clone",
}
"""Kind of work -> what its operators are called; the first that fits decides. "compiled loops" are the element-wise and
reducing loops that the compiler has written, normalisations among them."""


def milliseconds_by_kind(step: Callable[[], object], runs: int = 3) -> dict[str, float]:
    """Milliseconds of one step in each of :data:`KINDS`, and ``"the rest"``, from the profiler; means of ``runs``."""
    cuda = torch.cuda.is_available()
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(runs):
            step()
    found = dict.fromkeys([*KINDS, "the rest"], 0.0)
    for event in profiler.key_averages():
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        kind = next((kind for kind, names in KINDS.items() if re.search(names, event.key)), "the rest")
        found[kind] += own / 1000 / runs
    return found
