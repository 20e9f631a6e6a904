"""What holds for every test: the installed package, one thread a worker, a fixed seed, torchvision works."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import site
import sysconfig
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest
import torch

from .torchvision_compat import define_missing_schemas, import_torchvision

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    _require_installed_package()
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
    define_missing_schemas()
    if "FX_APPROX_TEST_DEVICE" in os.environ:  # tests/kernels and tests/ops run on it as they are
        torch.set_default_device(os.environ["FX_APPROX_TEST_DEVICE"])
    os.environ["FX_APPROX_CACHE"] = ""  # tests read and leave nothing in the user's cache
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of Triton, so that kernels run on CPUs
    hypothesis.settings.register_profile(
        "fx_approx",
        deadline=None,  # the first call of anything in torch is slow
        derandomize="CI" in os.environ,
        print_blob=True,
    )
    hypothesis.settings.load_profile("fx_approx")


def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.manual_seed(0)  # no test depends on those before it


@pytest.fixture(scope="session")
def torchvision() -> ModuleType:
    return import_torchvision()


def _require_installed_package() -> None:
    """Stop unless the tests see what a user would: the package in site-packages, or an editable install.

    The source tree itself is not importable as a whole: ``fx_approx.passes`` and ``fx_approx.policies``
    get their place from the installation.
    """
    found = importlib.util.find_spec("fx_approx")
    location = Path(found.origin).resolve() if found and found.origin else None
    if location and (_in_site_packages(location) or _is_editable(location)):
        return
    raise pytest.UsageError(
        f"the tests would import fx_approx from {location}, which is no installed package; "
        "use `make test`, or `make dev` once and then .venv/bin/pytest"
    )


def _in_site_packages(location: Path) -> bool:
    roots = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()}
    return any(location.is_relative_to(Path(root).resolve()) for root in roots)


def _is_editable(location: Path) -> bool:
    # Beside the installed record there may be the build's own, in the current directory.
    records = [
        json.loads(found.read_text("direct_url.json") or "{}")
        for found in importlib.metadata.distributions(name="fx_approx")
    ]
    editable = any(record.get("dir_info", {}).get("editable") for record in records)
    return editable and location.is_relative_to(REPOSITORY)
