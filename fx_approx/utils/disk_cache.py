"""Measurements kept on disk between processes: one small JSON file for each key, under the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import platformdirs

from fx_approx.errors import CacheWarning

VARIABLE = "FX_APPROX_CACHE"
"""Environment variable with another folder; empty: nothing is kept."""

_warned: set[str] = set()


def cache_folder() -> Path | None:
    """Where measurements are kept: ``$FX_APPROX_CACHE``, else ``fx_approx`` in the user's cache folder."""
    chosen = os.environ.get(VARIABLE)
    if chosen is not None:
        return Path(chosen) if chosen else None
    try:
        found = platformdirs.user_cache_path("fx_approx", appauthor=False)
    except RuntimeError:  # no home
        return None
    return found if found.is_absolute() else None


class DiskCache:
    """Values by key, in memory and on disk.

    Files are replaced whole, so that processes at the same time can at worst measure the same thing twice. A file that
    cannot be read, or holds something else, counts as missing; a folder that cannot be written to is done without. Both
    are warned of once.

    Attributes:
        folder: Where; None for memory only.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._known: dict[str, Any] = {}

    def get(self, key: Mapping[str, Any], make: Callable[[], Any], *, again: bool = False) -> Any:
        """The value of ``key``, made and kept if it is not there.

        Args:
            key: All that the value depends on, plain values.
            make: Makes the value, of plain values for JSON.
            again: Make it anew, even if it is there.
        """
        text = json.dumps(key, sort_keys=True, default=str)
        name = hashlib.sha256(text.encode()).hexdigest()[:32]
        if again or name not in self._known:
            found = None if again else self._read(name, text)
            if found is None:
                found = {"key": text, "value": make()}
                self._write(name, found)
            self._known[name] = found["value"]
        return self._known[name]

    def _read(self, name: str, text: str) -> dict[str, Any] | None:
        if self.folder is None:
            return None
        path = self.folder / f"{name}.json"
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if found["key"] != text or "value" not in found:
                raise ValueError("it holds something else")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            _warn("read", f"cache: {path} cannot be read and is made anew ({error!r})")
            return None
        return found

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder, suffix=".tmp") as drafts:
                draft = Path(drafts, name)
                draft.write_text(json.dumps(value), encoding="utf-8")
                os.replace(draft, self.folder / f"{name}.json")
        except OSError as error:
            _warn("write", f"cache: {self.folder} cannot be written to, so measurements are not kept ({error})")


def _warn(what: str, message: str) -> None:
    if what not in _warned:
        _warned.add(what)
        warnings.warn(message, CacheWarning, stacklevel=6)
