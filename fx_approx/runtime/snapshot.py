"""What a trial step may change of a transformed model, put back when it is over."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from fx_approx._compat import DropoutBase
from fx_approx.capture.trace import kept_random_state
from fx_approx.runtime.approx_module import ApproxModule
from fx_approx.runtime.controls import load_sampler_state_dict, sampler_state_dict

_PLAIN = (bool, int, float, str, type(None))


@contextlib.contextmanager
def undone(approx: ApproxModule) -> Iterator[None]:
    """Puts buffers, plain attributes, sampler state, random state, dropout and the graph back."""
    runtime = approx._fx_approx
    buffers = [(buffer, buffer.clone()) for buffer in approx.buffers()]
    state, function, pieces = sampler_state_dict(approx), runtime.function, runtime.pieces
    modules = list(approx.modules())
    dropouts: list[tuple[nn.Module, str, float]] = [(m, "p", m.p) for m in modules if isinstance(m, DropoutBase)]
    dropouts += [(m, "dropout", m.dropout) for m in modules if isinstance(m, (nn.MultiheadAttention, nn.RNNBase))]
    plain = [(m, {name: value for name, value in vars(m).items() if isinstance(value, _PLAIN)}) for m in modules]
    with kept_random_state():
        try:
            for module, name, _ in dropouts:
                setattr(module, name, 0.0)
            yield
        finally:
            runtime.function, runtime.pieces = function, pieces
            for module, name, share in dropouts:
                setattr(module, name, share)
            for module, attributes in plain:  # such as a count of calls
                vars(module).update(attributes)
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            load_sampler_state_dict(approx, state)
