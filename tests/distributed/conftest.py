"""Ranks are started once: those scenarios run that the tests of this folder that were collected ask for."""

from __future__ import annotations

from pathlib import Path

import pytest
from filelock import FileLock

from tests.distributed.ranks import run

LAST = "killed"
"""Ends with the death of a rank."""


@pytest.fixture(scope="session")
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left, for all files and all workers."""
    modules = dict.fromkeys(item.module for item in request.session.items if "two" in getattr(item, "fixturenames", ()))
    names = [name for module in modules for name in module.SCENARIOS]
    place = tmp_path_factory.getbasetemp()
    folder = (place.parent if hasattr(request.config, "workerinput") else place) / "two-ranks"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            run(folder, 2, sorted(names, key=LAST.__eq__))
    return folder
