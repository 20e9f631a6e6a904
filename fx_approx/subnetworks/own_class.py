"""A narrow instance of the model's own class: compact tensors, sizes in attributes, and a check that it serves."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fx_approx._compat import buffers_of, parameters_of
from fx_approx.ops.gather import flat_indices
from fx_approx.subnetworks.cuts import Cut
from fx_approx.subnetworks.own_config import fit_config, has_config
from fx_approx.subnetworks.part_layers import channel_axis, make_part_layer
from fx_approx.subnetworks.parts import take_part
from fx_approx.subnetworks.record import tensors_of

Check = Callable[[nn.Module], str]
"""Why the forward of a module does not compute what it should; empty if it does."""

Change = tuple[nn.Module, str, int]
"""A module, an attribute of it, and a value."""

Options = dict[tuple[type[nn.Module], str], list[Change]]
"""By class and what is changed in it."""

_TRIES = 48
_TOGETHER = 3
_NORMALISED = ("num_features", "num_channels", "num_parameters")
_UNFIT_CONFIG = "no config of its class describes it, so that save_pretrained writes what from_pretrained cannot load"


def narrow_tensors(root: nn.Module, full: nn.Module, cuts: Mapping[str, Cut]) -> None:
    """Puts compact tensors in the place of those of a copy, and their sizes into its layers.

    Args:
        root: A copy of ``full`` with tensors of its own; changed in place. What is one tensor under several names stays
            one.
        full: The model.
        cuts: By the first name of each tensor of ``full`` that is cut, how.
    """
    first: dict[int, str] = {}
    made: dict[int, Tensor] = {}
    holders: dict[str, int] = {}
    for name, tensor in tensors_of(full).items():
        cut = cuts.get(first.setdefault(id(tensor), name))
        if cut is None:
            continue
        if id(tensor) not in made:
            compact = cut.of(tensor)
            trains = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(compact, tensor.requires_grad) if trains else compact
        holder, _, attribute = name.rpartition(".")
        module = root.get_submodule(holder)
        own = parameters_of(module) if attribute in parameters_of(module) else buffers_of(module)
        own[attribute] = made[id(tensor)]
        groups = made[id(tensor)].shape[0] if cut.depthwise else cut.groups
        holders[holder] = max(groups, holders.get(holder, 1))
    for holder, groups in holders.items():
        fit_sizes(root.get_submodule(holder), groups)


def fit_own_class(
    root: nn.Module, full: nn.Module, cuts: Mapping[str, Cut], check: Check
) -> tuple[str, tuple[str, ...]]:
    """Makes the own forward of a narrow copy serve, as far as that can be done.

    A layer that is given all of a value of which it reads a part takes that out first. Attributes that name narrowed
    sizes, those of the model's config too, follow where a config makes exactly this model; else as few of them as make
    the forward serve. Nothing is believed: ``check`` has the last word.

    Args:
        root: A copy of ``full`` after :func:`narrow_tensors`; changed in place.
        full: The model.
        cuts: By the first name of each tensor of ``full`` that is cut, how.
        check: Runs a module.

    Returns:
        Why it does not serve, empty if it does; and what its user should know.
    """
    fitted = fit_config(root, full)
    with _reading_parts(root, full, cuts) as readers:
        reason = check(root)
        if reason and fitted is not None:
            fitted.undo()
            fitted = None
        if fitted is None:
            reason = fit_attributes(root, full, reason, check)
    if reason:
        return reason, ()
    wide = [reader for reader in readers if reader.wide]
    if wide:
        for reader in wide:
            reader.settle()
        if fitted is not None:
            fitted.undo()
            fitted = None
        reason = check(root)
    return reason, (_UNFIT_CONFIG,) if fitted is None and has_config(full) else ()


def inputs_read(cut: Cut, full: Tensor) -> Tensor:
    """Which inputs of its layer a weight reads, as a flat index; ``full`` is all of the weight."""
    assert cut.inputs is not None
    return flat_indices(cut.inputs.indices, cut.inputs_of(full))


# ---- layers


def fit_sizes(layer: Any, groups: int) -> None:
    """Sets the attributes of a layer that name the sizes of its tensors; nothing where it has none."""
    weight = parameters_of(layer).get("weight")
    if weight is None:
        return
    if hasattr(layer, "in_features"):
        layer.out_features, layer.in_features = weight.shape
    elif hasattr(layer, "in_channels"):
        layer.groups, layer.out_channels, layer.in_channels = groups, weight.shape[0], weight.shape[1] * groups
    elif hasattr(layer, "nx") and hasattr(layer, "nf"):  # Conv1D of Hugging Face
        layer.nx, layer.nf = weight.shape
    if isinstance(layer, nn.GroupNorm):
        layer.num_groups = weight.shape[0] * layer.num_groups // layer.num_channels
    for name in _NORMALISED:
        if hasattr(layer, name):
            setattr(layer, name, weight.shape[0])


class _Reader:
    """A hook that sees whether a layer is given all of the value of which it reads a part."""

    def __init__(self, layer: nn.Module, index: Tensor, whole: int) -> None:
        self.layer, self.index, self.whole, self.wide = layer, index, whole, False

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> Any:
        """Takes out the part, and notes that."""
        axis = channel_axis(layer)
        if not args or not isinstance(args[0], Tensor) or args[0].shape[axis] != self.whole:
            return None
        self.wide = True
        return take_part(args[0], axis, self.index), *args[1:]

    def settle(self) -> None:
        """Has the layer do that from now on."""
        make_part_layer(self.layer, self.index.clone())


@contextlib.contextmanager
def _reading_parts(root: nn.Module, full: nn.Module, cuts: Mapping[str, Cut]) -> Iterator[list[_Reader]]:
    """Layers may be given all of the values that they read a part of, meanwhile."""
    tensors = tensors_of(full)
    readers: list[_Reader] = []
    for name, cut in cuts.items():
        holder, _, attribute = name.rpartition(".")
        if cut.inputs is None or attribute != "weight":
            continue
        index, whole = inputs_read(cut, tensors[name]), cut.inputs_of(tensors[name]) * cut.groups
        if index.numel() < whole:
            readers.append(_Reader(root.get_submodule(holder), index, whole))
    hooks = [reader.layer.register_forward_pre_hook(reader) for reader in readers]
    try:
        yield readers
    finally:
        for hook in hooks:
            hook.remove()


# ---- attributes of the user's modules


def fit_attributes(root: nn.Module, full: nn.Module, reason: str, check: Check) -> str:
    """Sets as few attributes as make the forward serve; and numbers of heads, where it serves with them as well.

    Returns:
        Why it does not serve; nothing is changed then.
    """
    options = _options(root, full)
    if reason:
        for changes in itertools.islice(_ways(options, _following(root, full)), _TRIES):
            undo = _set(changes)
            if not check(root):
                reason = ""
                break
            _set(undo)
    if not reason:
        heads = [change for kind, changes in options.items() if kind[1].endswith("heads") for change in changes]
        undo = _set(heads)
        if heads and check(root):
            _set(undo)
    return reason


def _ways(options: Options, following: Options) -> Iterator[list[Change]]:
    """One option, what follows one size, and some options, the fewest first."""
    yield from options.values()
    yield from following.values()
    for count in range(2, min(_TOGETHER, len(options)) + 1):
        for some in itertools.combinations(options.values(), count):
            yield [change for changes in some for change in changes]


def _set(changes: Sequence[Change]) -> list[Change]:
    """Sets attributes; returns what puts them back."""
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, value)
    return before[::-1]


def _options(root: nn.Module, full: nn.Module) -> Options:
    """By class and name of an attribute, what it would be if it named a size that has been narrowed.

    That is a size of a layer directly in the module, a part of it (as of query, key and value made by one layer), or
    into how many units of neighbouring channels it falls.
    """
    found: Options = {}
    for module, own, sizes in _narrowed(root, full):
        for name, value in _counts_in(module):
            fitting = [(old != value, new * value // old) for old, new in set(sizes.values()) if _fits(value, old, new)]
            if fitting:
                found.setdefault((type(module), name), []).append((own, name, min(fitting)[1]))
    return found


def _following(root: nn.Module, full: nn.Module) -> Options:
    """By class and size of a layer in it, what all attributes would be that name it or a part of it, if several do.

    As numbers of heads and channels of an attention, which follow what its last layer reads.
    """
    found: Options = {}
    for module, own, sizes in _narrowed(root, full):
        for size, (old, new) in sizes.items():
            fitting = [(own, name, new * value // old) for name, value in _counts_in(module) if _fits(value, old, new)]
            if len(fitting) > 1:
                found.setdefault((type(module), size), []).extend(fitting)
    return found


def _narrowed(root: nn.Module, full: nn.Module) -> Iterator[tuple[nn.Module, nn.Module, dict[str, tuple[int, int]]]]:
    """Modules, their narrow copies, and by name the sizes of layers directly in them that differ."""
    for path, module in full.named_modules():
        own = root.get_submodule(path)
        yield (
            module,
            own,
            {
                f"{name}.{key}.{axis}": sizes
                for name, child in module.named_children()
                for key, tensor in parameters_of(child).items()
                if tensor is not None
                for axis, sizes in _changed(tensor, parameters_of(own.get_submodule(name))[key])
            },
        )


def _counts_in(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Attributes that may name a size."""
    for name, value in vars(module).items():
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            yield name, value


def _changed(before: Tensor, now: Tensor | None) -> list[tuple[int, tuple[int, int]]]:
    assert now is not None
    sizes = enumerate(zip(before.shape, now.shape, strict=True))
    return [(axis, (old, new)) for axis, (old, new) in sizes if old != new]


def _fits(value: int, old: int, new: int) -> bool:
    return old % value == 0 and new * value % old == 0
