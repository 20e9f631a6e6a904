"""torchvision beside a torch build for which its compiled library was not made.

The torchvision wheel is built against CUDA torch. Beside a CPU-only torch its library does not load, and
``import torchvision`` ends with "operator torchvision::nms does not exist". With the schemas of the two
operators that its Python code names at import, all its classification models work.

Tests import :func:`import_torchvision` from here. Examples and benchmarks, run as scripts, load it by path::

    import runpy
    from pathlib import Path

    compat = runpy.run_path(str(Path(__file__).parents[1] / "tests" / "helpers" / "torchvision_compat.py"))
    torchvision = compat["import_torchvision"]()

Run as a script it only defines the schemas, which is what the command line's ``--setup`` is for::

    python -m fx_approx explain torchvision.models:resnet50 --setup tests/helpers/torchvision_compat.py
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
from pathlib import Path
from types import ModuleType

import torch

_SUFFIXES = {".so", ".pyd", ".dylib"}
_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def import_torchvision() -> ModuleType:
    """Return torchvision, whose models work even where its compiled library does not load.

    Raises:
        ModuleNotFoundError: If torchvision is not installed.
    """
    define_missing_schemas()
    return importlib.import_module("torchvision")


def define_missing_schemas() -> None:
    """Make a plain ``import torchvision`` work; does nothing where torchvision is missing or its library loads."""
    package = importlib.util.find_spec("torchvision")
    if package is None:
        return
    # Which of its libraries has the operators depends on the release. A schema that is defined here and then by the
    # library as well would abort the process, so each is given its chance first.
    for path in _libraries(package):
        if _are_defined():
            break
        with contextlib.suppress(OSError):
            torch.ops.load_library(str(path))
    if not _are_defined():
        # Schemas live as long as the object that defines them, so torch keeps it.
        library = torch.ops.torchvision.fx_approx_schemas = torch.library.Library("torchvision", "DEF")
        for name, signature in _SCHEMAS.items():
            library.define(name + signature)


def _libraries(package: importlib.machinery.ModuleSpec) -> list[Path]:
    """The compiled libraries in the package's own folder."""
    folders = package.submodule_search_locations or ()
    return sorted(path for folder in folders for path in Path(folder).iterdir() if path.suffix in _SUFFIXES)


def _are_defined() -> bool:
    return hasattr(torch.ops.torchvision, "nms")


if __name__ == "__main__":
    define_missing_schemas()
