"""The benchmark of training steps and the one of their accuracy, on a small network."""

from __future__ import annotations

import gzip
import importlib
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scripts are imported as when they are run, and forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in ("_device", "_header", "_models", "_peak", "_profile", "_steps", "train_step", "demand_accuracy"):
        sys.modules.pop(name, None)


def test_steps_are_checked_timed_and_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_step = importlib.import_module("train_step")
    path = tmp_path / "steps.json"
    options = [
        "--models",
        "wrn_10_2",
        "--minimal-k",
        "4",
        "--runs",
        "2",
        "--warmup",
        "1",
        "--memory",
        "--profile",
        "--json",
    ]
    train_step.main([*options, str(path)])
    found = {one["variant"]: one for one in json.loads(path.read_text())["results"]}
    assert list(found) == ["exact", "narrow", "swap, online TopK 0.5", "demand, value 0.5", "demand, group 0.5"]
    assert found["exact"]["flops"] == 1
    # Half of every product; a quarter of nearly all, here in both scopes, since every stage is one block.
    assert 1.5 < found["swap, online TopK 0.5"]["flops"] < 2
    assert 3.5 < found["demand, value 0.5"]["flops"] <= found["demand, group 0.5"]["flops"] < 4
    assert found["demand, value 0.5"]["peak"] < 0.8 * found["exact"]["peak"]
    assert found["exact"]["profile"]["products"] > 0 and found["demand, value 0.5"]["profile"]["products"] > 0
    assert found["demand, value 0.5"]["profile"]["gathers"] > found["exact"]["profile"]["gathers"] == 0
    assert "demand, group 0.5" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_both_frontends_are_timed(tmp_path: Path) -> None:
    train_step = importlib.import_module("train_step")
    path = tmp_path / "steps.json"
    small = ["--models", "wrn_10_2", "--runs", "2", "--warmup", "1", "--no-swap", "--no-narrow", "--scopes", "value"]
    train_step.main([*small, "--compile", "--dynamo", "--json", str(path)])
    found = {(one["variant"], one["compiled"]): one for one in json.loads(path.read_text())["results"]}
    assert ("Dynamo, value 0.5", True) in found and ("Dynamo, value 0.5", False) not in found
    assert found["Dynamo, value 0.5", True]["of_compiled"][1] > 0


def test_other_numbers_stop_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    train_step = importlib.import_module("train_step")
    monkeypatch.setattr(
        train_step.fx_approx.analysis.verify, "__kwdefaults__", {"tolerance": -1.0}
    )  # nothing is equal enough
    with pytest.raises(AssertionError, match="DIFFERENT"):
        train_step.main(["--models", "wrn_10_2", "--minimal-k", "4", "--scopes", "value", "--runs", "2", "--no-swap"])


def test_steps_under_autocast_and_in_another_layout(tmp_path: Path) -> None:
    train_step, steps = (importlib.import_module(name) for name in ("train_step", "_steps"))
    seen = []

    def remember(name: str, models: dict[str, torch.nn.Module], inputs: torch.Tensor, *how: object) -> list[object]:
        seen.append((models["exact"], inputs))
        return steps.measure(name, models, inputs, *how)

    train_step.measure_all = remember
    path = tmp_path / "steps.json"
    small = ["--models", "wrn_10_2", "--minimal-k", "4", "--scopes", "value", "--batch", "2", "--runs", "2"]
    train_step.main([*small, "--autocast", "bfloat16", "--channels-last", "--json", str(path)])
    (model, inputs), *_ = seen
    assert inputs.is_contiguous(memory_format=torch.channels_last) and not inputs.is_contiguous()
    assert model[1].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert inputs.dtype == model[1].conv1.weight.dtype == torch.float32
    found = {one["variant"]: one for one in json.loads(path.read_text())["results"]}
    assert found["demand, value 0.5"]["flops"] > 3.5
    dtypes: set[torch.dtype] = set()
    model[1].conv1.register_forward_hook(lambda module, given, output: dtypes.add(output.dtype))
    steps.Step(model, inputs, False, "bfloat16")()
    assert dtypes == {torch.bfloat16}


def test_precision_is_put_back() -> None:
    device = importlib.import_module("_device")
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    for tf32 in (True, False):
        with device.precision(tf32):
            assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is tf32
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


WRONG = [
    *(["--runs", "1"], ["--ratios", "1.5"], ["--models", "none"], ["--batch", "0"], ["--tf32", "--device", "cpu"]),
    *(["--autocast", "float32"], ["--autocast", "bfloat16", "--dtype", "float16"], ["--device", "abacus"]),
]


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_options_are_refused(wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        importlib.import_module("train_step").main(wrong)


def write_idx(path: Path, values: torch.Tensor) -> None:
    header = struct.pack(f">HBB{values.dim()}I", 0, 8, values.dim(), *values.shape)
    path.write_bytes(gzip.compress(header + bytes(values.flatten().tolist())))


def test_accuracy_of_all_settings_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train", 64), ("t10k", 500)):
        labels = torch.randint(0, 10, (count,), generator=generator)
        images = (labels.view(-1, 1, 1) * 20 + torch.randint(0, 40, (count, 28, 28), generator=generator)).clamp(0, 255)
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", labels)
    accuracy = importlib.import_module("demand_accuracy")
    lines = tmp_path / "runs.jsonl"
    options = ["--data", str(tmp_path), "--epochs", "3", "--seeds", "2", "--width", "1", "--json-lines", str(lines)]
    accuracy.main([*options, "--settings", "exact", "value, stale, tail"])
    runs = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [(run["setting"], run["seed"]) for run in runs] == [
        (name, seed) for seed in (0, 1) for name in ("exact", "value, stale, tail")
    ]
    assert all(0 <= run[figure] <= 100 for run in runs for figure in ("trained", "recalibrated"))
    accuracy.main([*options, "--settings", "exact", "value, stale, tail", "group, stale"])
    assert len(lines.read_text().splitlines()) == 6
    assert "group, stale" in capsys.readouterr().out
