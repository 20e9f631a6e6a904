"""matplotlib, which the package does not install."""

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
        raise ImportError(
            f"{what} needs matplotlib, which fx_approx does not install by itself: pip install matplotlib, or "
            "'fx_approx[figures]'"
        ) from error
