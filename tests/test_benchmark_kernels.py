"""The benchmark of the Triton kernels, on one small shape and by the interpreter."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("kernels")
    for name in ("_device", "_header", "kernels"):
        sys.modules.pop(name, None)


def test_all_products_are_checked_timed_and_stored(kernels: ModuleType, tmp_path: Path) -> None:
    kernels.main(["--quick", "--device", "cpu", "--json", str(tmp_path / "kernels.json")])
    found = json.loads((tmp_path / "kernels.json").read_text())["results"]
    assert {one["product"] for one in found} == {"output", "grad_weight", "norms"}
    assert {one["variant"] for one in found} == {"exact", "reference"}  # the interpreter's times say nothing
    assert all(one["seconds"] > 0 for one in found)


def test_a_wrong_kernel_stops_the_benchmark(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.kernels.gathered_rows_matmul

    def wrong(*args: torch.Tensor, kernel: str = "reference") -> torch.Tensor:
        result: torch.Tensor = right(*args, kernel=kernel)
        return result if kernel == "reference" else result + 1

    monkeypatch.setattr(kernels.kernels, "gathered_rows_matmul", wrong)
    with pytest.raises(AssertionError, match=r"grad_weight .* triton: .* off"):
        kernels.main(["--quick", "--device", "cpu"])


@pytest.mark.parametrize(
    "wrong",
    [["--sizes", "1024"], ["--runs", "1"], ["--ratios", "2"], ["--device", "abacus"], ["--tf32", "--device", "cpu"]],
)
def test_wrong_options_are_refused(kernels: ModuleType, wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        kernels.main(wrong)


def test_the_share_of_selections_is_timed_and_stored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    selection = importlib.import_module("selection")
    path = tmp_path / "selection.json"
    selection.main(
        ["--models", "wrn_10_2", "--scores", "weight", "--repeats", "1", "--no-compile", "--json", str(path)]
    )
    (found,) = json.loads(path.read_text())["results"]
    assert 0 < found["seconds"] < found["step"] and not found["compiled"]
    with pytest.raises(SystemExit):
        selection.main(["--repeats", "0"])
    for name in ("_header", "_models", "selection"):
        sys.modules.pop(name, None)
