"""An error of a user's forward in one line, with the place in his code."""

from __future__ import annotations

import os
import traceback

from torch import nn

from fx_approx.capture.side_effects import TORCH_FILES, DroppedError

_OWN_FILES = os.path.dirname(os.path.dirname(__file__)) + os.sep
_LAYER_FILES = os.path.dirname(nn.__file__) + os.sep


def describe(error: BaseException) -> str:
    """The error in one line, with the line of the user's code where it arose, or else of a layer of torch."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_OWN_FILES)]
    users = [f for f in frames if not f.filename.startswith(TORCH_FILES)]
    users = users or [f for f in frames if f.filename.startswith(_LAYER_FILES)]
    message = str(error).strip().split("\n")[0]
    where = f" at {users[-1].filename}:{users[-1].lineno} in {users[-1].name}" if users else ""
    if isinstance(error, DroppedError):
        return message if error.placed else message + where
    return f"{type(error).__name__}: {message}{where}"
