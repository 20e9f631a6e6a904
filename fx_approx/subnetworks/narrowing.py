"""Which part of each tensor of the full model a subnetwork has; at the end its layers are narrowed by that."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fx_approx._compat import buffers_of, parameters_of
from fx_approx.ops.gather import flat_indices
from fx_approx.runtime.layers import become_sampled
from fx_approx.runtime.narrow_layers import swap_channelwise
from fx_approx.sampling.base import Selection
from fx_approx.subnetworks.cuts import Cut, same_cut, same_selection
from fx_approx.subnetworks.part_layers import make_part_layer
from fx_approx.subnetworks.record import tensors_of

_SIZES = (
    "in_features",
    "out_features",
    "in_channels",
    "out_channels",
    "num_features",
    "num_channels",
    "num_parameters",
)


class SeveralError(Exception):
    """A tensor or a layer is read with several selections.

    Attributes:
        source: Its path.
    """

    def __init__(self, source: str) -> None:
        super().__init__(source)
        self.source = source


@dataclasses.dataclass(frozen=True)
class Narrowed:
    """A layer of which a part is left.

    Attributes:
        inputs: The channels that it reads, ``[groups, k]`` in each group; None for all.
        outputs: The channels that it makes, ``[1, k]``; None for all.
        size: How many it makes in the full model.
        change: Makes the layer what it is in the subnetwork, once its tensors are cut.
        sampled: It takes its selections in each call.
    """

    inputs: Selection | None
    outputs: Selection | None
    size: int
    change: Callable[[Any], None]
    sampled: bool = False


class Narrowing:
    """How the tensors of a model are read.

    What several readers need different parts of stays whole: ``cut_all`` and alike say so, by True, and the graph takes
    the slices.

    Attributes:
        root: A copy of the exact model with tensors of its own.
        layers: By path, the layers that are narrowed.
        sliced: In order, tensors of which calls read a part of the inputs though all of it is there, and other products
            that take a selection in each step.
    """

    def __init__(self, root: nn.Module, full: nn.Module) -> None:
        self.root, self.full = root, full
        self._tensors = {name: t for name, t in tensors_of(full).items() if not name.startswith("_fx_approx")}
        first: dict[int, str] = {}
        self._first = {name: first.setdefault(id(tensor), name) for name, tensor in self._tensors.items()}
        paths: dict[int, str] = {}
        place = {path: paths.setdefault(id(one), path) for path, one in full.named_modules(remove_duplicate=False)}
        self._place = {name: (place[name.rpartition(".")[0]], name.rpartition(".")[2]) for name in self._tensors}
        self._kept: set[str] = set()
        self.begin_anew(None)

    def begin_anew(self, whole: str | None) -> None:
        """Forgets all uses; the tensor or layer ``whole`` stays as it is from now on."""
        if whole is not None:
            self._kept.add(whole)
        self._uses: dict[str, Cut] = {}
        self._read: set[tuple[str, str]] = set()
        self._outside: dict[str, tuple[Selection, bool]] = {}
        self.sliced: dict[str, None] = {}
        self.layers: dict[str, Narrowed] = {}

    @property
    def cuts(self) -> dict[str, Cut]:
        """By path in ``root``, what each of its parameters and buffers is of the full model; only what is cut."""
        return {
            name: dataclasses.replace(self._uses[first], source=name)
            for name, first in self._first.items()
            if first in self._uses and not self._uses[first].whole
        }

    @property
    def kept(self) -> frozenset[str]:
        """Paths of the tensors that stay whole since several selections read them."""
        return frozenset(self._kept & self._first.keys())

    # ---- uses

    def has(self, path: str) -> bool:
        """Whether a tensor stands at ``path``, and not another attribute such as a training flag."""
        return path in self._first

    def use_whole(self, path: str) -> None:
        """The tensor at ``path`` is read whole; nothing for what is no tensor."""
        if path in self._first:
            self._use(Cut(path))

    def use_module(self, path: str) -> None:
        """A module is called with all of its tensors."""
        for name in self._inside(path):
            self._use(Cut(name))

    def cut_all(self, cuts: Sequence[Cut]) -> bool:
        """Tensors that one call reads are to be cut so; True if one of them stays whole, and all have to."""
        if any(self._first[cut.source] in self._kept for cut in cuts):
            for cut in cuts:
                self._use(Cut(cut.source))
                if cut.inputs is not None:
                    self.sliced[cut.source] = None
            return True
        for cut in cuts:
            self._use(cut)
        return False

    def narrow_product(self, path: str, weight: Cut, bias: Cut | None, groups: int) -> bool:
        """A linear layer or convolution has these parts of its tensors; True if it stays whole."""

        def resize(layer: Any) -> None:
            shape = layer.weight.shape
            if isinstance(layer, nn.Linear):
                layer.out_features, layer.in_features = shape
            else:
                layer.groups = groups
                layer.out_channels, layer.in_channels = shape[0], shape[1] * groups

        if self.cut_all([weight] if bias is None else [weight, bias]):
            return True
        size = int(self._tensors[weight.source].shape[0])
        inputs = weight.outputs if weight.depthwise else weight.inputs
        self.layers[path] = Narrowed(inputs, weight.outputs, size, resize)
        return False

    def narrow_outside(self, path: str, chosen: Selection) -> None:
        """A layer that Python calls, outside of all graphs, reads these channels of its input."""
        layer: Any = self.root.get_submodule(path)
        groups = getattr(layer, "groups", 1)
        bias = None if layer.bias is None else Cut(f"{path}.bias")
        whole = self.narrow_product(path, Cut(f"{path}.weight", chosen, None, groups), bias, groups)
        self._outside[path] = chosen, whole

    def check_ties(self) -> None:
        """SeveralError if a tensor that is cut is one with that of another layer, which Python may read."""
        for name, first in self._first.items():
            if first in self._uses and not self._uses[first].whole and self._place[name] not in self._read:
                raise SeveralError(first)

    def narrow_channels(self, path: str, chosen: Selection) -> bool:
        """A layer with parameters of each channel has these; True if it stays whole, and takes them in each call."""
        layer: Any = self.root.get_submodule(path)
        before, count = {name: getattr(layer, name) for name in _SIZES if hasattr(layer, name)}, chosen.indices.numel()
        own = {**parameters_of(layer), **buffers_of(layer)}
        cuts = [
            Cut(f"{path}.{name}" if path else name, None, chosen)
            for name, tensor in own.items()
            if tensor is not None and tensor.dim() and tensor.shape[0] in before.values()
        ]

        def resize(layer: Any) -> None:
            if isinstance(layer, nn.GroupNorm):
                layer.num_groups = count * layer.num_groups // layer.num_channels
            if hasattr(layer, "groups"):  # a transposed convolution with one kernel for each channel
                layer.groups = count
            for name in before:
                setattr(layer, name, count)

        if path in self._kept or self.cut_all(cuts):
            self.layers[path] = Narrowed(None, None, 0, swap_channelwise, True)
            self._kept.add(path)
            return True
        known = self.layers.get(path)
        if known is not None and not same_selection(known.outputs, chosen):
            raise SeveralError(path)
        self.layers[path] = Narrowed(chosen, chosen, max(before.values()), resize)
        return False

    def sample(self, path: str) -> None:
        """A layer is called with its selections."""
        self.use_module(path)
        self.sliced[f"{path}.weight"] = None
        self.layers[path] = Narrowed(None, None, 0, become_sampled, True)

    def _inside(self, path: str) -> list[str]:
        above = f"{path}." if path else ""
        return [name for name in self._first if name.startswith(above)]

    def _use(self, cut: Cut) -> None:
        source = self._first[cut.source]
        self._read.add(self._place[cut.source])
        known = self._uses.setdefault(source, cut)
        if source not in self._kept and not same_cut(known, cut):
            raise SeveralError(source)
        if source in self._kept:
            self._uses[source] = Cut(source)

    # ---- the layers

    def outside_indices(self) -> dict[str, Tensor]:
        """By name, the indices by which layers outside of all graphs read their input, and a whole weight."""
        found: dict[str, Tensor] = {}
        for path, (chosen, whole) in self._outside.items():
            found[f"{path}.reads"] = flat_indices(chosen.indices, self._tensors[f"{path}.weight"].shape[1])
            if whole:
                found[f"{path}.columns"] = chosen.indices
                if chosen.scale is not None:
                    found[f"{path}.column_scale"] = chosen.scale
        return found

    def apply(self) -> None:
        """Narrows the layers of ``root``: compact tensors stand where the full ones stood, under the same names."""
        made: dict[str, Tensor] = {}
        for name, cut in self.cuts.items():
            first = self._first[name]
            full = self._tensors[name]
            if first not in made:
                compact = cut.of(full)
                trains = isinstance(full, nn.Parameter)
                made[first] = nn.Parameter(compact, requires_grad=full.requires_grad) if trains else compact
            holder, _, attribute = name.rpartition(".")
            module = self.root.get_submodule(holder)
            own = parameters_of(module) if attribute in parameters_of(module) else buffers_of(module)
            own[attribute] = made[first]
        for path, one in self.layers.items():
            one.change(self.root.get_submodule(path))
        for path, (chosen, whole) in self._outside.items():
            layer: Any = self.root.get_submodule(path)
            pairs = self._tensors[f"{path}.weight"].shape[1]
            make_part_layer(layer, flat_indices(chosen.indices, pairs), columns=chosen if whole else None)
