"""From a transformed model back to the exact one."""

from __future__ import annotations

from torch import nn

from fx_approx.capture.trace import skeleton
from fx_approx.runtime.approx_module import ApproxModule
from fx_approx.runtime.layers import unswap


def exact_copy(approx: ApproxModule) -> nn.Module:
    """The original structure with exact layers, on the same parameters."""
    # The runtime of a graph for other shapes of the same layers holds layers of the graph before it.
    root = skeleton(approx, without=approx._fx_approx)
    root.__dict__.pop("_fx_approx", None)
    root.__class__ = approx.exact_class
    for module in root.modules():
        unswap(module)
    return root
