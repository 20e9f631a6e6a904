"""A clone works as it lies, with the dependencies installed and the package itself not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources at another place than the environment knows."""
    place = tmp_path_factory.mktemp("clone")
    for folder in ("fx_approx", "passes", "policies", "tests", "examples"):
        shutil.copytree(REPOSITORY / folder, place / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", place)
    return place


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", "import fx_approx, fx_approx.passes as p; print(fx_approx.__file__, p.__file__)"],
        ["-m", "fx_approx", "explain", "tests.helpers.models:mlp", "--input", "2x12"],
        ["examples/quickstart.py"],
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/utils/test_disk_cache.py"],
    ],
    ids=["import", "explain", "quickstart", "pytest"],
)
def test_a_source_checkout_works_as_it_lies(checkout: Path, arguments: list[str]) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FX_APPROX_TEST_INSTALLED")}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if arguments[0] == "-c":
        assert all(Path(place).is_relative_to(checkout) for place in done.stdout.split())
