"""What experiments and sweeps found, from records made by hand: summaries, tables, fronts and figures."""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from policy_sweep.result import SweepResult, SweepRun, SweepTime

EXPERIMENTS = Path(__file__).resolve().parents[2] / "examples" / "experiments"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module; forgotten afterwards."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    try:
        yield importlib.import_module("tables")
    finally:
        for name in ("tables", "pictures", "records", "summaries"):
            sys.modules.pop(name, None)


@pytest.fixture
def summaries(tables: ModuleType) -> ModuleType:
    """The module that it has its figures from."""
    return sys.modules["summaries"]


def record(variant: str, seed: int, values: Sequence[float], share: float, seconds: float, **options: Any) -> Any:
    """A run of two epochs; its exact training takes 1000 operations."""
    epochs = [
        {
            "step": place + 1,
            "accuracy": value,
            "seconds": seconds * (place + 1) / 2,
            "flops": 500.0 * share * (place + 1),
        }
        for place, value in enumerate(values)
    ]
    plain = {
        "policy": {},
        "tail": 0.0,
        "by": "",
        "to": "",
        "equal": "",
        "epochs": 1.0,
        "width": 1.0,
        "frozen": [],
        "rate": 1.0,
    }
    return {
        "config": "x",
        "setting": "s",
        "title": "X",
        "variant": variant,
        "seed": seed,
        "options": {**plain, **{key: value for key, value in options.items() if key in plain}},
        "diverged": False,
        "epochs": epochs,
        "final": {"accuracy": values[-1], **options.get("final", {})},
        "flops": 1000.0 * share,
        "exact_flops": 1000.0,
        "recalibration_flops": 50.0,
        "seconds": seconds,
        "step_ms": options.get("step_ms", {}),
        "phases": options.get("phases", {"exact": 2}),
        "peak_memory": None,
        "common": {"compile": False, "autocast": "", "training": {"batch": 1, "epochs": 2.0}},
        "clock": "wall",
        "environment": {"accelerator": "G", "processor": "P", "threads": 1, "torch": "2", "date": "2026-01-01 00:00"},
        "full_steps": 2,
        "examples": 2,
    }


def by_hand() -> list[Any]:
    policy = {"kind": "paper"}
    turns = {"exact": [9, 10.0, 11], "sampled": [3, 4.0, 5]}
    return [
        record("tail", 0, (80, 91), 0.5, 6.0, policy=policy, tail=0.2, step_ms=turns, final={"recalibrated": 10.0}),
        record("tail", 1, (82, 92), 0.5, 4.0, policy=policy, tail=0.2, final={"recalibrated": 10.0}),
        record("sampled", 0, (50, 60), 0.25, 5.0, policy=policy, final={"recalibrated": 70.0}),
        record("exact", 0, (90, 90), 1.0, 10.0),
        record("exact", 1, (88, 92), 1.0, 10.0),
        record("fewer", 0, (70, 88), 0.5, 5.0, equal="flops", by="epochs", to="tail"),
        record("fewer", 1, (70, 90), 0.5, 5.0, equal="flops", by="epochs", to="tail"),
        record("narrow", 0, (70, 85), 0.6, 7.0, equal="time", by="width", to="tail"),
    ]


def test_summaries_of_runs(summaries: ModuleType) -> None:
    results = summaries.summarised(by_hand())
    exact, tail, sampled, fewer, narrow = results.found.itertuples()
    assert results.found.kind.tolist() == ["exact", "sampled", "sampled", "epochs", "width"]
    assert (exact.accuracy, tail.accuracy, fewer.accuracy) == (91, 91.5, 89)
    assert tail.deviation == pytest.approx(0.5**0.5) and math.isnan(narrow.deviation)
    assert accuracies(results, "tail") == {0: 91, 1: 92}
    assert (tail.runs, tail.flops, tail.seconds, tail.speedup) == (2, 0.5, 5.0, 2.5)
    # It ends sampled: the accuracy after re-estimating statistics, and what that takes.
    assert (sampled.accuracy, sampled.trained) == (70, 60) and sampled.flops == pytest.approx(0.3)
    assert results.curves.loc["tail"].to_numpy().tolist() == [[0.25, 2.5, 81], [0.5, 5.0, 91.5]]
    assert results.curves.accuracy["sampled"].iloc[-1] == 70
    assert summaries.time_to(results, "tail", 91) == 5.0 and summaries.time_to(results, "tail", 81) == 2.5
    assert math.isnan(summaries.time_to(results, "fewer", 91))


def accuracies(results: Any, variant: str) -> dict[int, float]:
    """By seed, of the runs that did not diverge."""
    return results.accuracies[variant].dropna().to_dict()


def test_a_run_that_diverged_is_counted_and_has_no_accuracy(tables: ModuleType, summaries: ModuleType) -> None:
    runs = by_hand()
    for run in (runs[1], runs[2]):  # one of two, and the only one
        run.update(diverged=True, final={"accuracy": None, "test_loss": None}, seconds=0.5)
    results = summaries.summarised(runs)
    tail, sampled = results.found.loc["tail"], results.found.loc["sampled"]
    assert (tail.runs, tail.diverged, tail.accuracy, tail.seconds) == (1, 1, 91, 6.0)
    assert (sampled.runs, sampled.diverged, sampled.flops) == (0, 1, 0.25) and "sampled" not in results.curves.index
    cells = {line.split()[0]: line.split()[1:] for line in lines_of(tables.table(summaries.evaluated(runs), 0.5))}
    assert cells["tail"][:4] == ["1_(1_diverged)", "91.00_(one_seed)", "+0.00", "91.00"]
    assert cells["sampled"][:5] == ["0_(1_diverged)", "diverged", "–", "diverged", "25.0"]


def test_runs_of_an_earlier_configuration_do_not_count(summaries: ModuleType) -> None:
    runs = [record("a", seed, (80.0, 90.0), 0.5, 2.0, tail=0.1) for seed in (0, 1)]
    runs.append(record("a", 0, (85.0, 95.0), 0.5, 2.0, tail=0.2))
    results = summaries.summarised(runs)
    assert len(results.found) == 1 and accuracies(results, "a") == {0: 95.0}


def test_times_of_two_machines_are_told_by_exact_training_on_each(tables: ModuleType, summaries: ModuleType) -> None:
    part = {"policy": {"kind": "paper"}, "tail": 0.2}
    slow = [record("exact", 1, (88, 92), 1.0, 30.0), record("tail", 1, (82, 92), 0.5, 15.0, **part)]
    unknown = record("tail", 2, (82, 92), 0.5, 8.0, **part)
    for run, place in ((slow[0], "Q"), (slow[1], "Q"), (unknown, "R")):
        run["environment"] = {**run["environment"], "accelerator": None, "processor": place}
    fast = [record("exact", 0, (90, 90), 1.0, 10.0), record("tail", 0, (80, 91), 0.5, 4.0, **part)]
    both = summaries.summarised([*fast, *slow])
    assert both.found.seconds.to_dict() == pytest.approx({"exact": 10.0, "tail": (4.0 + 5.0) / 2})
    assert both.curves.seconds["tail", 0] == pytest.approx((4.0 + 5.0) / 4)
    # A machine without an exact run has times that nothing can be compared with.
    mixed, alone = (summaries.evaluated([*runs, unknown]) for runs in (fast, fast[:1]))
    assert mixed.found.timed["tail"] and mixed.found.seconds["tail"] == 4.0 and mixed.curves.seconds["tail", 0] == 2.0
    assert accuracies(mixed, "tail").keys() == {0, 2} and accuracies(alone, "tail") == {2: 92}
    assert not alone.found.timed["tail"] and math.isnan(summaries.time_to(alone, "tail", 80))
    (row,) = [line for line in tables.table(alone, 0.5).splitlines() if "tail" in line]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "tail",
        "1",
        "92.00 (one seed)",
        "+2.00",
        "92.00",
        "50.0",
        "–",
        "–",
        "–",
    ]


def test_costs_of_steps_belong_to_a_variant_as_it_was_trained(tables: ModuleType, summaries: ModuleType) -> None:
    def cost(speedup: float, peak: int, gradients: int) -> Any:
        return {"speedup": [speedup - 0.1, speedup, speedup + 0.2], "peak_bytes": peak, "gradient_bytes": gradients}

    policy = {"kind": "uniform"}
    runs = [
        record("tail", 0, (80, 91), 0.5, 6.0, policy=policy, tail=0.5, phases={"sampled": 1, "exact": 1}),
        record("moving", 0, (80, 91), 0.5, 6.0, policy=policy, phases={"0.25": 1, "0.5": 1}),
        record("changed", 0, (80, 91), 0.5, 6.0, policy=policy),
        record("narrow", 0, (70, 85), 0.6, 7.0, equal="time", by="width", to="tail", phases={"exact": 2}),
    ]
    measured = {
        **{key: runs[0][key] for key in ("config", "setting")},
        "options": {one["variant"]: one["options"] for one in runs},
        "costs": {
            "exact training": {"exact": cost(1.0, 1000, 100)},
            "tail": {"sampled": cost(2.0, 600, 30)},
            "moving": {"0.25": cost(3.0, 500, 10), "0.5": cost(2.5, 700, 30)},
            "changed": {"sampled": cost(2.0, 600, 30)},
            "narrow": {"exact": cost(1.5, 800, 60)},
        },
    }
    measured["options"]["changed"] = {**runs[2]["options"], "tail": 0.25}
    elsewhere = {**measured, "setting": "eager"}
    assert summaries.sections([*runs, elsewhere]) == {"x": runs}
    (records,) = summaries.sections([*runs, measured]).values()
    assert summaries.trained(records) == runs
    found = summaries.costs_of([measured], summaries.summarised(runs).found)
    assert found.peak.to_dict() == {"tail": 0.6, "moving": 0.7, "narrow": 0.8}
    shares = {"tail": 0.5 * 0.3 + 0.5, "moving": 0.5 * 0.1 + 0.5 * 0.3, "narrow": 0.6}
    assert found.traffic.to_dict() == pytest.approx(shares)
    assert found.time.to_dict() == pytest.approx({"tail": 0.5 / 2 + 0.5, "moving": 0.5 / 3 + 0.2, "narrow": 1 / 1.5})
    exact = record("exact", 0, (80, 90), 1.0, 8.0)
    timed = summaries.evaluated([*runs, exact, measured])
    seconds = timed.found.seconds.to_dict()
    assert seconds["tail"] == pytest.approx(0.75 * 8) and seconds["changed"] == 6.0
    assert timed.curves.seconds["tail"].tolist() == pytest.approx([3.0, 6.0])
    assert seconds["narrow"] == pytest.approx(8 / 1.5) and seconds["exact"] == 8.0
    assert tables.quicker(found.quicker["moving"], math.nan) == "3.00 [2.90, 3.20]; 2.50 [2.40, 2.70]"
    assert tables.quicker(math.nan, 1.234) == "1.23" and tables.quicker(math.nan, math.nan) == "–"


def test_what_is_compared_has_the_same_learning_rate(tables: ModuleType, summaries: ModuleType) -> None:
    policy = {"kind": "paper"}
    fewer = {"equal": "flops", "by": "epochs", "to": "tail"}
    runs = [
        record("exact", 0, (80, 90), 1.0, 10.0),
        record("exact, fast", 0, (85, 93), 1.0, 12.0, rate=4.0),
        record("tail", 0, (70, 88), 0.5, 5.0, policy=policy, tail=0.2),
        record("tail, fast", 0, (75, 92), 0.5, 6.0, policy=policy, tail=0.2, rate=4.0),
        record("tail, fast", 1, (75, 91), 0.5, 6.0, policy=policy, tail=0.2, rate=4.0),
        record("tail, slow", 0, (50, 60), 0.5, 5.0, policy=policy, tail=0.2, rate=0.5),
        record("fewer", 0, (60, 80), 0.5, 5.0, **fewer),
        record("fewer, fast", 0, (60, 87), 0.5, 5.0, **fewer, rate=4.0),
        record("fewer, faster", 0, (60, 86), 0.5, 5.0, **fewer, rate=8.0),
    ]
    step = {"speedup": [1.9, 2.0, 2.1], "peak_bytes": 60, "gradient_bytes": 50}
    exact = {"speedup": [1, 1, 1], "peak_bytes": 100, "gradient_bytes": 100}
    cost = {
        "options": {one["variant"]: one["options"] for one in runs if one["variant"] in ("exact", "tail")},
        "costs": {
            "exact training": {"exact": exact},
            "exact": {"exact": exact},
            "tail": {"exact": exact, **{"sampled": step}},
        },
    }
    for run in runs:
        if run["options"]["policy"]:
            run["phases"] = {"sampled": 2}
    results = summaries.evaluated([*runs, cost])
    found = results.found
    assert [line.split() for line in lines_of(tables.rivals(results))] == [
        ["tail", "88.00_(one_seed)", "exact,_fewer_epochs", "FLOPs", "80.00_(one_seed)", "8.00_(one_seed)"],
        ["tail,_fast", "91.50_±_0.71", "exact,_fewer_epochs", "FLOPs", "87.00_(one_seed)", "5.00_(one_seed)"],
    ]
    # Exact training takes as long at each rate, and so does what was measured at one of them.
    assert found.quicker.notna()[["tail", "tail, fast", "tail, slow"]].all() and found.timed.all()
    assert found.seconds[found.kind != "epochs"].to_dict() == {
        "exact": 10.0,
        "exact, fast": 10.0,
        "tail": 5.0,
        "tail, fast": 5.0,
        "tail, slow": 5.0,
    }
    differences = {line.split()[0]: line.split()[3] for line in lines_of(tables.table(results, 0.5))}
    assert differences["tail"] == "-2.00" and differences["tail,_fast"] == "-1.50"
    assert differences["tail,_slow"] == "-30.00" and differences["fewer,_faster"] == "-4.00"
    assert [line.split() for line in lines_of(tables.rates(results))] == [
        ["exact", "100.0", "–", "90.00_(1)", "93.00_(1)", "–"],
        ["tail,_slow", "50.0", "60.00_(1)", "88.00_(1)", "91.50_±_0.71_(2)", "–"],
        ["fewer", "50.0", "–", "80.00_(1)", "87.00_(1)", "86.00_(1)"],
    ]
    assert tables.rates(summaries.summarised(by_hand())) == ""


def test_tries_stand_beside_what_the_best_of_them_reached(tables: ModuleType, summaries: ModuleType) -> None:
    policy = {"kind": "paper"}

    def held_out(variant: str, seed: int, value: float, rate: float, **options: Any) -> Any:
        run = record(variant, seed, (value,), 1.0, 8.0, rate=rate, **options)
        return {**run, "validation": 5000, "tried": {"rate": rate}}

    runs = [
        {
            **record("tail", 0, (80, 91), 0.5, 6.0, policy=policy, tail=0.2, rate=2.0),
            "tries": 3,
            "chosen": {"rate": 2.0},
        },
        record("exact", 0, (90, 92), 1.0, 10.0),
        {**record("fewer", 0, (80, 85), 0.5, 5.0, equal="flops", by="epochs", to="tail", rate=4.0), "tries": 2},
    ]
    tried = [
        held_out("tail", 100, 70.0, 1.0, policy=policy, tail=0.2),
        held_out("tail", 100, 60.0, 2.0, policy=policy, tail=0.2),  # made again below
        held_out("tail", 100, 80.0, 2.0, policy=policy, tail=0.2),
        held_out("tail", 101, 82.0, 2.0, policy=policy, tail=0.2),
        {**held_out("tail", 100, 0.0, 4.0, policy=policy, tail=0.2), "diverged": True},
    ]
    assert summaries.sections(tried) == {}  # nothing was tested
    (own,) = summaries.sections([*tried, *runs]).values()
    assert summaries.trained(own) == runs
    results = summaries.evaluated(own)
    assert results.found.loc["tail"].accuracy == 91 and set(results.accuracies.index) == {0}
    cells = {line.split()[0]: line.split()[1:3] for line in lines_of(tables.table(results, 0.5))}
    assert cells == {"exact": ["1", "1"], "tail": ["1", "3"], "fewer": ["1", "2"]}
    # Each at the rate that is best for it.
    (rival,) = lines_of(tables.rivals(results))
    assert rival.split()[:2] == ["tail", "91.00_(one_seed)"] and rival.split()[-1] == "6.00_(one_seed)"
    assert tables.rates(results) == ""
    assert [line.split() for line in lines_of(tables.choices(results))] == [
        ["tail", "rate_=_1.0", "5,000", "1", "70.00_(one_seed)"],
        ["tail", "rate_=_2.0", "5,000", "2", "81.00_±_1.41", "taken"],
        ["tail", "rate_=_4.0", "5,000", "0_(1_diverged)", "diverged"],
    ]
    text = tables.page({"x": own}, {"x": results}, 0.5, "c", {})
    assert tables.choices(results) in text and "**" not in text  # no seed alone in bold
    without = summaries.evaluated(by_hand())
    assert tables.choices(without) == "" and "tries" not in tables.table(without, 0.5)


def lines_of(table: str) -> list[str]:
    """The rows below the head, cells without inner blanks."""
    rows = [[cell.strip().replace(" ", "_") for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [" ".join(row) for row in rows[2:]]


def test_sampled_gradients_leave_the_statistics_exact(summaries: ModuleType) -> None:
    runs = [
        record(kind, 0, (50, 60), 0.7, 5.0, policy={"kind": kind}, final={"recalibrated": 70.0})
        for kind in ("backward", "weight_gradient", "straight")
    ]
    for run in runs:
        run["epochs"][0]["recalibrated"] = 55.0
    results = summaries.summarised(runs)
    assert results.found.accuracy.to_dict() == {"backward": 60, "weight_gradient": 60, "straight": 70}
    assert [results.curves.accuracy[kind, 0] for kind in ("backward", "straight")] == [50, 55]
    assert results.found.flops.to_dict() == pytest.approx({"backward": 0.7, "weight_gradient": 0.7, "straight": 0.75})


def test_a_training_too_short_to_learn_has_its_losses_in_the_table_and_no_figures(
    tables: ModuleType, tmp_path: Path
) -> None:
    run = record("exact", 0, (10,), 1.0, 10.0)
    run["epochs"][0].update(first_loss=7.25, last_loss=6.5)
    run["warm_seconds"] = 31.6
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "x.jsonl").write_text(json.dumps(run) + "\n")
    tables.main([str(tmp_path), "--to", str(tmp_path / "to")])
    text = (tmp_path / "to" / "tables.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| exact")]
    assert row.split()[-4:-1] == ["7.25", "to", "6.50"] and " 32 " in row
    assert "to exact's accuracy" not in text.partition("| variant")[2]
    assert not list((tmp_path / "to").glob("*.png"))


def test_the_front_of_points(summaries: ModuleType) -> None:
    points = {
        "a": (1.0, 90.0),
        "b": (0.5, 89.0),
        "c": (0.6, 88.0),
        "d": (0.5, 85.0),
        "e": (0.2, 50.0),
        "f": (1.0, 90.0),
    }
    assert summaries.front(points) == ["e", "b", "a", "f"]


def test_tables_and_figures(tables: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(one) + "\n" for one in by_hand()))
    tables.main([str(tmp_path), "--to", str(tmp_path / "to"), "--within", "3"])
    text = (tmp_path / "to" / "tables.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    cells = {row[0]: row[1:] for row in rows[2:7]}
    # runs, accuracy, to exact, as trained, FLOPs, time, step, time to 91, time to 88
    assert cells["tail"] == ["2", "91.50 ± 0.71", "+0.50", "91.50 ± 0.71", "50.0", "0.50", "2.50", "0.50", "0.50"]
    assert cells["exact"] == ["2", "91.00 ± 1.41", "+0.00", "91.00 ± 1.41", "100.0", "1.00", "–", "1.00", "0.50"]
    assert cells["sampled"] == ["1", "70.00 (one seed)", "-21.00", "60.00", "30.0", "0.50", "–", "–", "–"]
    assert cells["fewer"] == ["2", "89.00 ± 1.41", "-2.00", "89.00 ± 1.41", "50.0", "0.50", "–", "–", "0.50"]
    rivals = rows[9:]
    assert rivals[0] == ["tail", "91.50 ± 0.71", "exact, fewer epochs", "FLOPs", "89.00 ± 1.41", "2.50 ± 0.71"]
    assert rivals[1] == ["tail", "91.50 ± 0.71", "exact, narrower", "time", "85.00 (one seed)", "6.00 (one seed)"]
    assert capsys.readouterr().out.strip() == text.strip()
    assert sorted(path.name for path in (tmp_path / "to").glob("*.png")) == [
        "x-curves.png",
        "x-flops.png",
        "x-time.png",
    ]


def test_figures_without_matplotlib_are_a_message(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps(by_hand()[0]) + "\n")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "pictures", raising=False)
    with pytest.raises(SystemExit) as stopped:
        tables.main([str(tmp_path), "--to", str(tmp_path / "to")])
    assert stopped.value.code == 2
    assert "figures need matplotlib: pip install matplotlib, or --no-figures (" in capsys.readouterr().err


def test_a_narrow_network_that_is_shipped_stands_beside_the_full_one(tables: ModuleType, summaries: ModuleType) -> None:
    def ships(accuracy: float, full: float, sub: float) -> Any:
        latency = {"full": [0.0, full, 9.0], "sub": [0.0, sub, 9.0], "speedup": [full / sub - 0.5, full / sub, 9.0]}
        return {"accuracy": accuracy, "parameters": {"full": 200, "sub": 50}, "latency": {"1": latency, "64": latency}}

    narrow = [
        record("phases", seed, (80, 88 + seed), 0.4, 4.0, policy={"kind": "uniform"}, final={"recalibrated": 10.0})
        for seed in (0, 2)
    ]
    for run, found in zip(narrow, (ships(85.0, 8.0, 2.0), ships(87.0, 4.0, 2.0)), strict=True):
        run["options"]["subnetwork"] = True
        run.update(shipped=found, wall_seconds=11.0)
    for run in narrow:
        del run["epochs"][0]["accuracy"]  # evaluated at the end alone
    results = summaries.evaluated([record("exact", 0, (80, 90), 1.0, 10.0), *narrow])
    phases = results.found.loc["phases"]
    # The statistics of its BatchNorms are its own: nothing was re-estimated, and nothing of that counts.
    assert (phases.accuracy, phases.flops, phases.wall) == (89, 0.4, 11.0)
    assert math.isnan(summaries.time_to(results, "phases", 80)) and summaries.time_to(results, "exact", 80) == 5.0
    (row,) = lines_of(tables.shipped(results))
    times = "6.0_/_2.0_=_3.00_[2.50,_9.00]"
    assert row.split() == ["phases", "2", "86.00_±_1.41", "89.00_±_1.41", "25.0", times, times]
    assert tables.shipped(summaries.evaluated(by_hand())) == ""
    assert "its wall clock, s" in tables.table(results, 0.5) and "wall clock" not in tables.table(
        summaries.evaluated(by_hand()), 0.5
    )


def test_a_frozen_network_is_a_rival_and_not_what_all_are_compared_with(
    tables: ModuleType, summaries: ModuleType
) -> None:
    frozen = record("head alone", 0, [40, 50], 0.4, 4.0, frozen=["0.*"])
    results = summaries.evaluated([frozen, record("exact", 0, [60, 70], 1.0, 10.0)])
    assert list(results.found.kind.items()) == [("exact", "exact"), ("head alone", "frozen")]
    (row,) = [line for line in tables.table(results, 0.5).splitlines() if "head alone" in line]
    assert "-20.00" in row


@pytest.mark.slow
def test_figures_of_many_variants_name_those_on_the_fronts_and_have_room_for_the_names(
    tables: ModuleType, summaries: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    pictures = importlib.import_module("pictures")
    policy = {"kind": "paper"}
    long = "best of its operations, of a name that takes two lines"
    best = [record(f"{long}, {n}", 0, [10, 60 + n], 0.3 + n / 50, 3 + n / 9) for n in range(20)]
    worse = [record(f"worse {n}", 0, [10, 20 + n], 0.9, 12.0, policy=policy) for n in range(18)]
    fewer = record("fewer", 0, [10, 30], 0.9, 12.0, by="epochs", equal="flops", to="worse 1")
    results = summaries.summarised([record("exact", 0, [50, 90], 1.0, 10.0), *best, *worse, fewer])
    drawn: list[Any] = []
    monkeypatch.setattr(plt, "close", drawn.append)
    pictures.draw(results, "X", tmp_path, "x")
    monkeypatch.undo()
    assert len(drawn) == 3
    for figure in drawn:
        legend = figure.axes[0].get_legend()
        names = [text.get_text().replace("\n", " ") for text in legend.get_texts()]
        named = {"exact", *(one["variant"] for one in best), "others, sampled", "others, exact, fewer epochs"}
        assert named == set(names) - {"front", "front without sampling"}
        assert len(names) == len(set(names))
        figure.canvas.draw()
        box = legend.get_window_extent()
        assert box.y0 >= 0 and box.y1 <= figure.bbox.y1 and box.x1 <= figure.bbox.x1 + 1
        plt.close(figure)


# ---- a sweep of policies


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


def result(points: dict[str, tuple[float | None, float]], second: dict[str, float | None] | None = None) -> SweepResult:
    """Policies with accuracy (None: diverged) and speed-up; ``second``: the accuracies of another seed."""
    seeds = [{name: accuracy for name, (accuracy, _) in points.items()}, second or {}]
    runs = [
        SweepRun(name, seed, accuracy, None if accuracy is None else 1.0 + seed, accuracy is None)
        for seed, of in enumerate(seeds)
        for name, accuracy in of.items()
    ]
    times = [SweepTime(name, 0.1 / fast, (fast, fast, fast), 0.5, 1) for name, (_, fast) in points.items()]
    return SweepResult(tuple(runs), tuple(times))


def test_the_front() -> None:
    points = {
        "exact": (90.0, 1.0),
        "a": (89.0, 2.0),
        "b": (88.0, 1.5),
        "c": (80.0, 3.0),
        "d": (None, 9.0),
        "e": (89.0, 1.9),
    }
    assert result(points).front() == ["exact", "a", "c"]
    assert result({"exact": (1.0, 1.0), "same": (1.0, 1.0)}).front() == ["exact", "same"]
    twice = {name: 90.0 if name == "b" else accuracy for name, (accuracy, _) in points.items()}
    assert result(points, {**twice, "a": 86.0}).front() == ["exact", "e", "a", "c"]  # e as good as b
    assert result(points, {"c": None}).front() == ["exact", "a"]  # a run of c diverged
    with pytest.raises(KeyError, match="no policy 'z'; there are: exact, a"):
        result(points).accuracy("z")


def test_csv_json_and_table() -> None:
    found = result({"exact": (90.0, 1.0), "half": (89.0, 2.0)}, second={"exact": 92.0, "half": None})
    assert SweepResult.from_json(found.to_json()) == found
    with pytest.raises(ValueError, match="format: expected"):
        SweepResult.from_json("{}")
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [(row["policy"], int(row["seed"]), float(row["accuracy"])) for row in rows[:3]] == [
        (run.policy, run.seed, run.accuracy) for run in found.runs[:3]
    ]
    last = {**rows[3]}
    assert (last["policy"], last["accuracy"], last["loss"], last["diverged"]) == ("half", "", "", "True")
    assert [float(last[name]) for name in ("seconds", "speedup_low", "speedup", "speedup_high")] == [0.05, 2, 2, 2]
    lines = [[cell.strip() for cell in line.split("  ") if cell] for line in str(found).splitlines()]
    assert lines[2] == ["exact *", "91 ± 1.4", "1.5", "100.00", "1.00 [1.00, 1.00]", "50.0", "1"]
    assert lines[3] == ["half", "89 ± 0 (1 of 2 diverged)", "1", "50.00", "2.00 [2.00, 2.00]", "50.0", "1"]


def test_the_figure_has_every_policy(tmp_path: Path) -> None:
    figure = result({"exact": (90.0, 1.0), "a": (89.0, 2.0), "lost": (None, 3.0)}).plot(tmp_path / "front.png")
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert [list(data) for data in lines["front"].get_data()] == [[1.0, 2.0], [90.0, 89.0]]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert set(labels) == {"exact", "a", "front"} and (tmp_path / "front.png").stat().st_size > 1000
