"""The benchmarks of subnetworks, in small: times, memory against hand calculation, and the coverage table."""

from __future__ import annotations

import collections
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.quick import thinned

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PREFIXES = ("_coverage", "_subnetwork", "_zoo", "subnetwork")
NAMES = ("_device", "_header", "_models", "_narrow", "_peak", "minilm", "config")


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scripts are imported as when they are run, and forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for name in [name for name in sys.modules if name.startswith(PREFIXES) or name in NAMES]:
        sys.modules.pop(name)


# ---- times


def test_steps_are_checked_timed_stored_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subnetworks = importlib.import_module("subnetworks")
    numbers, page = tmp_path / "steps.json", tmp_path / "steps.md"
    files = ["--json", str(numbers), "--markdown", str(page)]
    small = ["--no-compile", "--optimizers", "sgd", "--runs", "2", "--warmup", "1"]
    for model in ("wrn_10_4", "mlp"):
        subnetworks.main(["--models", model, "--batch", "4", *small, *files])
    rows = json.loads(numbers.read_text(encoding="utf-8"))["results"]
    assert [one["model"] for one in rows] == ["mlp"] * 4 + ["wrn_10_4"] * 4
    counts = {(one["model"], one["variant"]): one["parameters"] for one in rows}
    assert counts["mlp", "narrow"] == counts["mlp", "subnetwork"] == 785 * 256 + 257 * 256 + 257 * 10
    assert counts["mlp", "kept"] == counts["mlp", "exact"] == 785 * 512 + 513 * 512 + 513 * 10
    assert all(one["own_forward"] for one in rows) and all(len(one["seconds"]) == 2 for one in rows)
    assert all("threads" in one["measured"] for one in rows)
    text = page.read_text(encoding="utf-8")
    assert "## mlp, hidden units" in text and "## wrn_10_4, group" in text and "of the model's own class" in text
    assert "subnetwork / narrow" in capsys.readouterr().out


def test_ratios_and_aims_follow_from_the_times() -> None:
    page, results = (importlib.import_module(name) for name in ("_subnetwork_page", "_subnetwork_results"))

    def timed(variant: str, seconds: float, compiled: bool = False) -> Any:
        return results.Timed("mlp", "hidden units", "sgd", variant, compiled, [seconds] * 3, 1, True, "")

    times = {"exact": 4.0, "kept": 2.2, "subnetwork": 2.0, "narrow": 1.8}
    eager = [timed(name, seconds) for name, seconds in times.items()]
    (own,) = page.groups(eager)
    assert own["subnetwork"].over(own["exact"])[1] == 2.0
    assert page.aims(own) == "1.9 met, 1.12 of kept missed, 0.95 of narrow missed"
    compiled = [timed(name, seconds / 1.25, True) for name, seconds in times.items()]
    text = page.markdown([*eager, *compiled], {"cores": 2})
    assert "0.80 [0.80, 0.80]" in text.split("## Eager against compiled")[1]


@pytest.mark.parametrize("name", thinned(["wrn_16_4, value", "wrn_16_4, group", "vit_b_block, value"]))
def test_networks_written_by_hand_have_the_parameters_of_the_subnetworks(name: str) -> None:
    subnetworks, cases = (importlib.import_module(one) for one in ("subnetworks", "_subnetwork_cases"))
    torch.manual_seed(0)
    case = cases.case_of(name)
    exact, inputs = case.build()
    sub = subnetworks.extract(subnetworks.fx_approx.transform(exact, case.policy(0.5, 16), inputs[:1]))
    shapes = [collections.Counter(tuple(p.shape) for p in model.parameters()) for model in (sub, case.narrow())]
    assert shapes[0] == shapes[1]
    assert case.narrow()(inputs[:1]).shape == sub(inputs[:1]).shape


def test_another_narrow_network_stops_the_benchmark() -> None:
    subnetworks, cases = (importlib.import_module(one) for one in ("subnetworks", "_subnetwork_cases"))
    wrong = subnetworks.dataclasses.replace(cases.case_of("mlp, hidden units"), narrow=lambda: cases.perceptron(255))
    with pytest.raises(AssertionError, match="other parameters"):
        subnetworks.variants(wrong, 0.5, 16)


# ---- memory


def test_peak_memory_of_a_known_step() -> None:
    memory = importlib.import_module("subnetwork_memory")
    layer, inputs = nn.Linear(256, 512, bias=False), torch.randn(1024, 256)
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-4)
    resting = [torch.zeros(1000), layer.weight]
    standing, rests, step = memory.measure_step(layer, optimizer, inputs, resting)
    weight, output = 4 * 256 * 512, 4 * 1024 * 512
    # Weight, two moments, one counter, the batch; what rests is counted once.
    assert rests == 4000
    assert standing == 3 * weight + 4 + inputs.nbytes + 4000
    # In backward at least the output, its gradient and that of the weight; the square's derivative takes three more.
    assert 2 * output + weight <= step <= 5 * output + weight


def test_the_meter_sees_what_is_alive_at_one_time() -> None:
    peak = importlib.import_module("_peak")
    kept = torch.zeros(1000)

    def work() -> None:
        first, second = torch.zeros(250_000), torch.zeros(500_000)
        del first
        third = torch.zeros(750_000)
        kept.add_(second[0] + third[0])

    assert 5_000_000 <= peak.peak_bytes(work, "cpu") <= 5_000_200


def test_memory_is_measured_and_stored(tmp_path: Path) -> None:
    memory = importlib.import_module("subnetwork_memory")
    numbers, page = tmp_path / "memory.json", tmp_path / "memory.md"
    memory.main(["--models", "mlp", "--json", str(numbers), "--markdown", str(page)])
    rows = {one["variant"]: one for one in json.loads(numbers.read_text(encoding="utf-8"))["results"]}
    full, batch = 4 * (785 * 512 + 513 * 512 + 513 * 10), 4 * 64 * 784
    narrow = 4 * (785 * 256 + 257 * 256 + 257 * 10)
    counters = 4 * 6
    assert rows["exact"]["standing"] == 3 * full + counters + batch and rows["exact"]["resting"] == 0
    for variant in (memory.FRESH, memory.DROP):
        assert rows[variant]["resting"] == full
        assert rows[variant]["standing"] == 3 * narrow + counters + batch + full
    assert rows[memory.KEEP]["resting"] == 3 * full + counters
    assert rows["narrow, written by hand"]["standing"] == 3 * narrow + counters + batch
    assert "## mlp, hidden units, batch 64 x 784" in page.read_text(encoding="utf-8")


# ---- coverage


class Uncut(nn.Module):
    """Its subnetworks train; Torch-Pruning is not needed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


def entry(name: str, make: Any) -> Any:
    return importlib.import_module("_coverage_models").Entry(name, "nets", make)


def test_a_model_is_extracted_trained_counted_and_exported() -> None:
    models, run = (importlib.import_module(name) for name in ("_coverage_models", "_coverage_run"))
    result = run.examine(entry("uncut", lambda: models.Built(Uncut(), torch.randn(2, 32), 10)))
    assert not result.failure and not result.exports
    assert result.parameters == 33 * 64 + 65 * 10
    own = result.outcomes["group"]
    assert own.works and not own.exports and own.same is not None and own.same < 1e-5
    # 16 of 32 inputs, 32 of 64 hidden units, at each of which a bias
    assert own.parameters == pytest.approx((17 * 32 + 33 * 10) / result.parameters)


def test_what_does_not_learn_is_told() -> None:
    run = importlib.import_module("_coverage_run")
    model = Uncut()
    assert run.train(model, torch.zeros(2, 32), {"last.bias"}) == ""
    assert run.train(model, torch.zeros(2, 32), {"first.weight", "last.bias"}).startswith("1 of 2 parameters")


@pytest.mark.slow
def test_the_command_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    coverage, models = (importlib.import_module(name) for name in ("subnetwork_coverage", "_coverage_models"))

    def broken() -> Any:
        raise RuntimeError("no such layer")

    def hangs() -> Any:
        import time

        time.sleep(60)

    made = [entry("uncut", lambda: models.Built(Uncut(), torch.randn(2, 32), 10)), entry("broken", broken)]
    monkeypatch.setattr(coverage, "entries", lambda: [*made, entry("hangs", hangs)])
    lines, page = tmp_path / "lines.jsonl", tmp_path / "page.md"
    options = ["--json", str(lines), "--markdown", str(page)]
    assert coverage.main(["--models", "uncut", *options]) == 0
    assert "**1 of 3 models so far**" in page.read_text(encoding="utf-8")
    assert coverage.main(["--seconds", "2", *options]) == 1
    said = capsys.readouterr().out
    assert said.count("uncut") == 1 and "not done within 2 s" in said
    assert [json.loads(line)["name"] for line in lines.read_text(encoding="utf-8").splitlines()] == [
        *("uncut", "broken", "hangs")
    ]
    text = page.read_text(encoding="utf-8")
    assert "| subnetwork, group | 1 of 1" in text and "no such layer" in text and "so far" not in text


def test_every_model_of_the_table_has_a_name_of_its_own() -> None:
    found = importlib.import_module("_coverage_models").entries()
    names = [one.name for one in found]
    families = collections.Counter(one.family for one in found)
    assert families["torchvision"] >= 80 and families["segmentation"] >= 6 and families["timm"] == 25
    assert {one.name for one in found if one.family == "detection"} >= {"yolo"}
    assert len(set(names)) == len(names)
