"""What holds for every test: one source of the package, one thread a worker, a fixed seed, torchvision works."""

from __future__ import annotations

import gc
import importlib.util
import os
import site
import sysconfig
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.helpers.torchvision_compat import define_missing_schemas

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    _require_one_source()
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
    define_missing_schemas()
    if "FX_APPROX_TEST_DEVICE" in os.environ:  # tests/ops run on it as they are
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


def pytest_collection_finish() -> None:
    # A tenth of the time would go to looking for garbage among what was imported.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.manual_seed(0)  # no test depends on those before it


def _require_one_source() -> None:
    """Stops unless the tests see the installed package or, where an installed one is not asked for, this checkout."""
    found = importlib.util.find_spec("fx_approx")
    location = Path(found.origin).resolve() if found and found.origin else None
    wanted = [Path(root).resolve() for root in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))]
    if not os.environ.get("FX_APPROX_TEST_INSTALLED"):
        wanted += [Path(site.getusersitepackages()).resolve(), REPOSITORY / "fx_approx"]
    if location is None or not any(location.is_relative_to(root) for root in wanted):
        raise pytest.UsageError(f"the tests would import fx_approx from {location}, not from {wanted}; use `make test`")
