"""Which layer of torch a module is: subclasses that change nothing of what a layer computes are that layer."""

from __future__ import annotations

import copyreg
from typing import Any

from torch import nn

from fx_approx._compat import CALLS, buffers_of, parameters_of

EXACT_CLASS = "_fx_approx_exact_class"
"""Where a layer that stands in place of an exact one keeps the class of that."""

HELD = "_fx_approx_section"
"""Where a module with a graph of its own keeps the transformed model that it belongs to, and its section."""

PRODUCT_LAYERS: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.modules.linear.NonDynamicallyQuantizableLinear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
}
"""Layers of torch whose product can be sampled, and the kind of the op that computes it."""

FUSED_LAYERS = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
"""Modules of torch that compute several products in one call."""

CHANNEL_LAYERS: tuple[type[nn.Module], ...] = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm, nn.PReLU),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
"""Layers of torch with parameters or statistics for each channel, which can work on some channels only."""

_TORCH = ("torch.nn.", "torch.ao.")
_CALLED = frozenset(("forward", "__call__", *CALLS, "__getattr__", "__getattribute__"))
_AT_REST = frozenset(("extra_repr", "reset_parameters", "reset_running_stats"))

_parts: dict[type[nn.Module], tuple[frozenset[str], frozenset[str]]] = {}
_made: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def layer_type(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch that computes what a call of ``module`` gives.

    That is its own class, or the nearest of torch above it, of which neither a subclass nor the object itself overrides
    ``forward`` or what ``forward`` reads: a method such as ``_conv_forward``, a parameter that has become a property.
    Methods and attributes that the layer of torch does not have may be added.
    Of a layer that stands in place of an exact one, the class of that.

    Returns:
        None for a module that is no layer of torch, or that may compute something else.
    """
    own: type[nn.Module] = vars(module).get(EXACT_CLASS, type(module))
    for place, cls in enumerate(own.__mro__):
        if cls is nn.Module:
            return None
        if cls.__module__.startswith(_TORCH):
            methods, values = _parts_of(cls)
            read = {*values, *parameters_of(module), *buffers_of(module)}
            changed = any(name in methods or name in read for above in own.__mro__[:place] for name in vars(above))
            return None if changed or not methods.isdisjoint(vars(module)) else cls
    return None


def _parts_of(cls: type[nn.Module]) -> tuple[frozenset[str], frozenset[str]]:
    """What a call of a layer runs, without what is run to construct, initialise or print it; and what it declares."""
    if cls not in _parts:
        above = cls.__mro__[: cls.__mro__.index(nn.Module)]
        methods = {
            name
            for one in above
            for name, value in vars(one).items()
            if callable(getattr(value, "__func__", value)) and not name.startswith(("__", "_load_", "_save_"))
        }
        declared = {name for one in above for name in vars(one).get("__annotations__", ()) if name[:2] != "__"}
        _parts[cls] = _CALLED | (methods - _AT_REST), frozenset(declared)
    return _parts[cls]


def with_forward(cls: type[nn.Module], own: type[nn.Module]) -> type[nn.Module]:
    """A class of which the forward is that of ``cls``, and everything that ``own`` adds is there as well.

    Args:
        cls: A subclass of a layer of torch.
        own: That layer, or a subclass of it that :func:`layer_type` takes for it.
    """
    if issubclass(cls, own):
        return cls
    if (cls, own) not in _made:
        _made[cls, own] = _both(cls, own)
    return _made[cls, own]


def _both(cls: type[nn.Module], own: type[nn.Module]) -> type[nn.Module]:
    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        made, arguments, *state = super(both, self).__reduce_ex__(protocol)
        # Pickle finds classes by name, and this one exists in this process only.
        return (_new, (cls, own), *state) if made is vars(copyreg)["__newobj__"] else (made, arguments, *state)

    names = {"__module__": own.__module__, "__doc__": own.__doc__, "__reduce_ex__": reduce}
    both: Any = type(cls.__name__, (cls, own), names)
    return both  # type: ignore[no-any-return]


def _new(cls: type[nn.Module], own: type[nn.Module]) -> nn.Module:
    made = with_forward(cls, own)
    return made.__new__(made)


def channels_of(module: Any) -> int:
    """How many channels a layer of :data:`CHANNEL_LAYERS` has parameters or statistics for."""
    names = ("num_features", "num_channels", "num_parameters", "in_channels")
    return int(next(getattr(module, name) for name in names if hasattr(module, name)))
