"""What is kept on disk, and what happens where that fails."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

import platformdirs
import pytest

from fx_approx.errors import CacheWarning
from fx_approx.utils import disk_cache
from fx_approx.utils.disk_cache import DiskCache, cache_folder

KEY = {"what": "test", "size": [1, 2]}


@pytest.fixture(autouse=True)
def _forget_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_cache, "_warned", set())


def unreachable() -> float:
    raise AssertionError("it was made again")


def test_a_value_is_made_once_for_all_processes(tmp_path: Path) -> None:
    first = DiskCache(tmp_path)
    assert first.get(KEY, lambda: 1.5) == 1.5 == first.get(KEY, unreachable)
    assert DiskCache(tmp_path).get(dict(reversed(KEY.items())), unreachable) == 1.5
    assert DiskCache(tmp_path).get({**KEY, "size": [1, 3]}, lambda: 2.5) == 2.5
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"] * 2


def test_again_replaces_it(tmp_path: Path) -> None:
    DiskCache(tmp_path).get(KEY, lambda: 1)
    assert DiskCache(tmp_path).get(KEY, lambda: 2, again=True) == 2 == DiskCache(tmp_path).get(KEY, unreachable)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": "another", "value": 3}', '{"value": 3}', "\udcff"])
def test_a_corrupt_file_is_made_anew_with_one_warning(tmp_path: Path, text: str) -> None:
    DiskCache(tmp_path).get(KEY, lambda: 1)
    (path,) = tmp_path.iterdir()
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.warns(CacheWarning, match="made anew") as caught:
        assert DiskCache(tmp_path).get(KEY, lambda: 2) == 2
    assert len(caught) == 1
    assert json.loads(path.read_text(encoding="utf-8"))["value"] == 2


def test_a_folder_that_cannot_be_made_is_done_without_and_told_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = DiskCache(tmp_path / "file" / "folder")
    with pytest.warns(CacheWarning, match="cannot be") as caught:
        assert cache.get(KEY, lambda: 1) == 1
    assert all("not kept" in str(one.message) or "made anew" in str(one.message) for one in caught)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.get({"other": 1}, lambda: 2) == 2
        assert cache.get(KEY, unreachable) == 1


def test_a_value_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="made again"):
        DiskCache(tmp_path).get(KEY, unreachable)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_processes_at_the_same_time(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; from fx_approx.utils.disk_cache import DiskCache\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "for number in range(300):\n"
        "    place = number % 3\n"
        "    assert DiskCache(folder).get({'number': place}, lambda: [place] * 1000) == [place] * 1000\n"
        "    DiskCache(folder).get({'number': place}, lambda: [place] * 1000, again=True)\n"
        "    (folder / 'begun').touch()\n"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path)]
    other = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    while other.poll() is None:  # this process is the second
        for place in range(3) if (tmp_path / "begun").exists() else ():
            assert DiskCache(tmp_path).get({"number": place}, lambda p=place: [p] * 1000) == [place] * 1000
            DiskCache(tmp_path).get({"number": place}, lambda p=place: [p] * 1000, again=True)
        time.sleep(0 if (tmp_path / "begun").exists() else 0.05)
    errors = other.communicate()[1]
    assert other.returncode == 0, errors
    assert len(list(tmp_path.glob("*.json"))) == 3 and not list(tmp_path.glob("*.tmp"))


def test_a_value_that_json_cannot_hold_leaves_no_draft(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        DiskCache(tmp_path).get(KEY, lambda: {1, 2})
    assert list(tmp_path.iterdir()) == []


def test_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FX_APPROX_CACHE", raising=False)
    assert cache_folder() == platformdirs.user_cache_path("fx_approx", appauthor=False)
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cache_folder() == tmp_path / "fx_approx"
    monkeypatch.setenv("FX_APPROX_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.setenv("FX_APPROX_CACHE", "")
    assert cache_folder() is None
    assert DiskCache(None).get(KEY, lambda: 1) == 1


def test_without_a_home_there_is_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(*_: object, **__: object) -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("FX_APPROX_CACHE", raising=False)
    monkeypatch.setattr(platformdirs, "user_cache_path", homeless)
    assert cache_folder() is None
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda *_, **__: Path("~/.cache/fx_approx"))
    assert cache_folder() is None
