"""The transformed model: an instance of the user's own class that runs through its runtime."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from fx_approx._compat import Moved, is_compiled, uncompiled
from fx_approx.capture.records import Section
from fx_approx.core.layer_types import EXACT_CLASS, HELD
from fx_approx.errors import CaptureError
from fx_approx.runtime.graph_runtime import Runtime
from fx_approx.utils.graph_diff import passes_text

_WRAPPERS = ("DistributedDataParallel", "DataParallel")


class ApproxModule(Moved):
    """Base of a transformed model, in front of the user's own class: ``isinstance`` and methods keep working."""

    _fx_approx: Runtime
    exact_class: type[nn.Module]

    def train(self, mode: bool = True) -> ApproxModule:
        """As ``nn.Module.train``; warns once if BatchNorm statistics do not fit the exact evaluation that follows."""
        runtime = vars(self).get("_fx_approx")
        if runtime is not None:
            runtime.batchnorm.before_mode(self, mode, runtime.samples)
        super().train(mode)
        return self

    def print_passes(self, *, whole: bool = False) -> None:
        """Prints the graph after each pass: the captured one, and what each later pass took out and put in.

        Args:
            whole: Print the lines that a pass left alone, too.
        """
        print(passes_text(self._fx_approx.program.stages, whole))

    def _fx_approx_move(self, fn: Callable[[Tensor], Tensor], usual: Callable[[], object]) -> None:
        usual()
        if "_fx_approx" in vars(self):
            self._fx_approx.move(fn)

    def __prepare_scriptable__(self) -> ApproxModule:
        """What ``torch.jit.script`` calls first.

        Raises:
            CaptureError: A graph that samples is no TorchScript.
        """
        raise CaptureError(
            f"torch.jit.script: {type(self).__name__} is a transformed model, which cannot be scripted. "
            "Script the exact model: fx_approx.restore(model)"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> ApproxModule:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(vars(self), memo))
        return new


def adopt(root: nn.Module, runtime: Runtime, reduce: Callable[[ApproxModule], tuple[Any, ...]]) -> ApproxModule:
    """Makes ``root`` a transformed model: an instance of a subclass of its own class that carries ``runtime``.

    ``reduce`` pickles it: the class exists in this process only.

    The class is made anew for each model, and its ``forward`` has its own code object: Dynamo counts recompilations
    by code object, and models must not use up each other's limit.
    """
    cls = type(root)
    exact = cls.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        runtime = self.__dict__.get("_fx_approx")
        if runtime is None:  # a part of the model, such as a slice of a Sequential
            return exact(self, *args, **kwargs)
        return runtime.run(self, exact, args, kwargs)

    namespace = {
        "forward": _own(forward, exact),
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": lambda self, protocol: reduce(self),
        "exact_class": cls,
    }
    # Hugging Face writes the name of the class into what it saves.
    name = cls.__name__ if hasattr(cls, "save_pretrained") else f"Approx{cls.__name__}"
    root.__class__ = type(name, (ApproxModule, cls), namespace)
    root.__dict__["_fx_approx"] = runtime
    for section in runtime.program.capture.sections:
        if section.path:
            _adopt_section(root, section)
    runtime.batchnorm.begin(root, runtime.samples)
    return cast(ApproxModule, root)


def _own(forward: Any, exact: Callable[..., Any]) -> types.FunctionType:
    """``forward`` with a code object of its own, in the place of ``exact``."""
    own = types.FunctionType(forward.__code__.replace(), forward.__globals__, "forward", None, forward.__closure__)
    own.__wrapped__ = exact  # type: ignore[attr-defined]
    own.__doc__ = exact.__doc__
    return own


def _blank(cls: type[nn.Module]) -> nn.Module:
    return cls.__new__(cls)


def _adopt_section(root: nn.Module, section: Section) -> None:
    """Makes a module of a transformed model run through a graph of its own; ``unswap`` takes that back."""
    module = root.get_submodule(section.path)
    cls = type(module)
    exact = cls.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        held = self.__dict__.get(HELD)
        runtime = None if held is None else held[0].__dict__.get("_fx_approx")
        if runtime is None:
            return exact(self, *args, **kwargs)
        return runtime.run_section(held[0], held[1], self, exact, args, kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        """Pickled by itself, it is the module that it was: the class exists in this process only."""
        return _blank, (cls,), {name: one for name, one in vars(self).items() if name not in (EXACT_CLASS, HELD)}

    module.__dict__[EXACT_CLASS], module.__dict__[HELD] = cls, (root, section)
    names = {
        "forward": _own(forward, exact),
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
        "__qualname__": cls.__qualname__,
        "__deepcopy__": ApproxModule.__deepcopy__,
        "__reduce_ex__": reduce,
    }
    module.__class__ = type(cls.__name__, (cls,), names)


def find(model: nn.Module) -> ApproxModule:
    """The transformed model in ``model``: itself, or inside ``torch.compile``, DistributedDataParallel or alike.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: There is none, or more than one.
    """
    if not isinstance(model, nn.Module):
        hint = "; this takes no backend, whose graphs appear while the model runs" if hasattr(model, "pieces") else ""
        raise TypeError(f"model: expected what fx_approx.transform returned, got {model!r}{hint}")
    found = [module for module in model.modules() if isinstance(module, ApproxModule) and "_fx_approx" in vars(module)]
    if len(found) != 1:
        what = "is not a transformed model" if not found else f"holds {len(found)} transformed models"
        hint = ", or the backend that compiles it" if any(is_compiled(module) for module in model.modules()) else ""
        raise ValueError(f"model: {type(model).__name__} {what}; expected what fx_approx.transform returned{hint}")
    return found[0]


def unwrapped(model: nn.Module) -> nn.Module:
    """The module in ``torch.compile`` and data-parallel wrappers, which act on ``.grad`` or on compiled code."""
    while True:
        inner = uncompiled(model)
        if inner is not None:
            model = inner
        elif type(model).__name__ in _WRAPPERS and isinstance(model.module, nn.Module):
            model = model.module
        else:
            return model
