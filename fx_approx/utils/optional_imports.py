"""Packages that this one does not install."""

from __future__ import annotations

import importlib
from typing import Any


def load_matplotlib(module: str, what: str) -> Any:
    """The module ``matplotlib.<module>``.

    Raises:
        ImportError: matplotlib is not installed; says that ``what`` needs it and how to get it.
    """
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise ImportError(f"{absent(what, 'matplotlib')}, or 'fx_approx[plot]'") from error


def absent(what: str, package: str) -> str:
    """Says that ``what`` needs a package that is not installed, and how to get it."""
    return f"{what} needs {package}, which fx_approx does not install by itself: pip install {package}"
