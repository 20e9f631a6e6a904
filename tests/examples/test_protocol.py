"""The protocol of the experiments: what is chosen is chosen on held-out examples, and the test set is seen once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.examples.conftest import SMALL_MLP

TINY = f"""
title = "tiny"
seeds = [0]
validation = 30
{SMALL_MLP}
[variants.exact]
tries = {{ rate = [0.5, 2] }}

[variants."fewer"]
equal = "flops"
to = "half"
by = "epochs"
tries = {{ rate = [1, 2] }}

[variants.half]
policy = {{ kind = "uniform", sampler = "topk", ratio = 0.5, scores = "weight", scope = "value" }}
exact = ["classifier"]
tail = 0.25
tries = {{ "policy.ratio" = [0.5, 0.25], rate = [1, 2] }}

[variants."as written"]
rate = 3.0
"""

PHASES = """
[variants.phases]
policy = { kind = "uniform", sampler = "topk", ratio = 0.5, scores = "weight", scope = "value" }
exact = ["classifier"]
tail = 0.25
subnetwork = true
every = 0

[variants."fewer, time of phases"]
equal = "time"
to = "phases"
by = "epochs"
"""

Runner = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def runner(scripts: SimpleNamespace, data: Path, tmp_path: Path) -> Runner:
    """Runs the configuration with some options; returns the records of its file, or of that of its choices."""

    def run(*more: str, only: Sequence[str] = (), text: str = TINY, of: str = "tiny") -> list[dict[str, Any]]:
        path = tmp_path / "tiny.toml"
        path.write_text(text)
        arguments = [str(path), "--data", str(data), "--out", str(tmp_path / "out"), "--quiet", "--probe", "0"]
        scripts.run.main([*arguments, *more, *(["--only", *only] if only else [])])
        return list(scripts.records.read(tmp_path / "out" / f"{of}.jsonl"))

    return run


def reached(monkeypatch: pytest.MonkeyPatch, scripts: SimpleNamespace, by_rate: dict[float, float]) -> list[Any]:
    """Has evaluations answer by the factor on the rate; returns the runs that were evaluated."""
    seen: list[Any] = []

    def evaluate(run: Any) -> dict[str, float]:
        seen.append(run)
        return {"accuracy": by_rate[run.variant.rate], "test_loss": 1.0}

    monkeypatch.setattr(scripts.training.Run, "evaluate", evaluate)
    return seen


def rows(batches: Any) -> set[bytes]:
    """The examples of all batches."""
    return {one.numpy().tobytes() for x, _ in batches for one in x.contiguous()}


# ---- what is held out


def test_what_is_held_out_is_in_no_batch_of_the_training(
    scripts: SimpleNamespace, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Any] = []
    tested: list[Any] = []
    plain, evaluate = scripts.training.Run.step, scripts.training.Run.evaluate

    def step(run: Any, x: torch.Tensor, y: torch.Tensor, *rest: Any) -> Any:
        trained.append((x, y))
        return plain(run, x, y, *rest)

    def evaluated(run: Any) -> Any:
        tested.append(rows(run.source.test()))
        return evaluate(run)

    monkeypatch.setattr(scripts.training.Run, "step", step)
    monkeypatch.setattr(scripts.training.Run, "evaluate", evaluated)
    runner("--choose", "--set", "training.epochs=20", only=["exact"])
    held, used = tested[0], rows(trained)
    assert all(one == held for one in tested) and len(held) == 30  # the same for each try
    # Images of random pixels are all different; 20 epochs of 64 of 66 examples see all of them.
    assert len(used) == 66 and not used & held
    trained.clear()
    tested.clear()
    runner("--set", "training.epochs=20", "--choose", only=["exact"])
    assert not trained  # recorded already
    runner("--set", "training.epochs=20", only=["as written"])
    test = tested[0]
    assert rows(trained) == used | held and len(test) == 40 and not test & (used | held)


def test_texts_are_held_out_at_the_end_and_files_without_crops(scripts: SimpleNamespace, tmp_path: Path) -> None:
    Data, cpu = scripts.config.Data, torch.device("cpu")
    letters = "".join(chr(48 + place % 70) for place in range(1000))
    text = scripts.texts.Characters(letters, Data(kind="characters", folder="x", length=10), cpu)
    part = text.held_out(20)
    assert text.size == 89 and part.size == 69 and part.classes == text.classes
    # 900 characters are for training; the last 201 of them are the end of what is held out.
    places = torch.cat([x for x, _ in part.test()]).flatten() + 48
    assert "".join(map(chr, places.tolist())) == letters[699:899]
    ends = [torch.cat([x.max(1).values for x, _ in part.epoch(0, number, 8)]) for number in range(3)]
    assert len(part._train) == 699 and all(len(end) == 64 for end in ends)
    data = Data(kind="labelled", folder="x", length=4)
    pairs = [("ab"[place % 2], f"{place:04}") for place in range(50)]
    labelled = scripts.texts.Labelled("x", pairs, data, cpu, scripts.texts.characters_of)
    part = labelled.held_out(10)
    whole, kept, out = rows(labelled.epoch(0, 0, 40)), rows(part.epoch(0, 0, 30)), rows(part.test())
    assert part.size == len(kept) == 30 and len(out) == 10 and kept | out == whole and not kept & out
    pytest.importorskip("torchvision")
    image = pytest.importorskip("PIL.Image")
    for place in range(12):
        for split in ("train", "val"):
            folder = tmp_path / split / "ab"[place % 2]
            folder.mkdir(parents=True, exist_ok=True)
            image.fromarray(np.full((8, 8, 3), 20 * place, np.uint8)).save(folder / f"{place}.png")
    files = scripts.images.Folder(tmp_path, Data(kind="folder", folder="x", workers=0), cpu, small=8)
    part = files.held_out(4)
    grey = [{round(float(one.mean()), 2) for x, _ in one.epoch(0, 0, 1) for one in x} for one in (files, part)]
    out = {round(float(one.mean()), 2) for x, _ in part.test() for one in x}
    assert part.size == 8 and (len(grey[1]), len(out)) == (8, 4) and grey[1] | out == grey[0]


def test_the_test_set_is_not_touched_by_choices_and_once_by_each_run(
    scripts: SimpleNamespace, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, calls = scripts.images.Images.__init__, []

    def without_test(source: Any, *given: Any) -> None:
        opened(source, *given)
        source._test = source._test_labels = None  # to touch it is an error

    monkeypatch.setattr(scripts.images.Images, "__init__", without_test)
    found = runner("--choose", of="tiny-choice")
    assert len(found) == 2 + 4 + 2 and all(one["validation"] == 30 for one in found)
    assert all("accuracy" in epoch for one in found for epoch in one["epochs"])  # curves of what is held out
    monkeypatch.setattr(scripts.images.Images, "__init__", opened)
    test = scripts.images.Images.test

    def counted(source: Any) -> Any:
        calls.append(source.size)
        return test(source)

    monkeypatch.setattr(scripts.images.Images, "test", counted)
    runs = runner()
    assert calls == [96] * len(runs) and len(runs) == 4
    assert [["accuracy" in epoch for epoch in one["epochs"]] for one in runs] == [
        [False] * (len(one["epochs"]) - 1) + [True] for one in runs
    ]


# ---- what is chosen


def test_the_best_try_is_taken_and_the_first_of_equals(
    scripts: SimpleNamespace, runner: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reached(monkeypatch, scripts, {0.5: 50.0, 1.0: 60.0, 2.0: 70.0, 3.0: 0.0})
    with pytest.raises(SystemExit) as ended:
        runner(only=["half"])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "tiny.toml: variants.'half'.tries: expected a run of each with 30 examples held out, got none of" in message
    assert "policy.ratio = 0.5, rate = 1, seed 100, in" in message and "--choose --only 'half'" in message
    with pytest.raises(SystemExit):
        runner("--choose", only=["fewer"])  # its cost is not known
    assert "variants.'half'.tries: expected a run of each" in capsys.readouterr().err
    tried = runner("--choose", of="tiny-choice")
    said = capsys.readouterr().out.splitlines()
    assert "tiny: half: takes policy.ratio = 0.5, rate = 2, 70.00 % on held-out examples, of 4 tries" in said
    assert [(one["variant"], one["tried"]) for one in tried] == [
        ("exact", {"rate": 0.5}),
        ("exact", {"rate": 2}),
        *(("half", {"policy.ratio": ratio, "rate": rate}) for ratio in (0.5, 0.25) for rate in (1, 2)),
        ("fewer", {"rate": 1}),
        ("fewer", {"rate": 2}),
    ]
    assert all(one["seed"] == 100 and one["examples"] == 66 for one in tried)
    assert all("tries" not in one["options"] for one in tried) and len({one["run"] for one in tried}) == 8
    runs = {one["variant"]: one for one in runner()}
    assert (runs["exact"]["chosen"], runs["exact"]["tries"]) == ({"rate": 2}, 2) and "tries" not in runs["as written"]
    assert runs["exact"]["options"]["rate"] == 2.0 and runs["exact"]["examples"] == 96
    assert runs["half"]["options"]["policy"]["ratio"] == 0.5 and runs["half"]["chosen"]["rate"] == 2
    assert runs["exact"]["setting"] == tried[0]["setting"]  # they belong together
    capsys.readouterr()
    runner("--list")
    listed = capsys.readouterr().out.splitlines()
    assert "tiny: exact, rate = 0.5, seed 100, held out: 50.00 %" in listed
    assert "tiny: exact: takes rate = 2, 70.00 % on held-out examples, of 2 tries" in listed
    assert "tiny: fewer, seed 0: recorded" in listed
    runner("--list", "--set", "variants.half.tries.tail=[0.5]")
    listed = capsys.readouterr().out.splitlines()
    assert any("variants.'half'.tries: expected a run of each" in line for line in listed)
    assert "tiny: half, seed 0: missing, and so is its choice" in listed
    assert "tiny: fewer, seed 0: missing, and so is its choice" in listed and "tiny: exact, seed 0: recorded" in listed


def test_a_run_is_known_by_what_was_chosen(scripts: SimpleNamespace, runner: Runner, monkeypatch: Any) -> None:
    """One that is written without tries is the same run; a baseline knows the choice of what it is compared with."""
    reached(monkeypatch, scripts, {0.5: 50.0, 1.0: 60.0, 2.0: 40.0, 3.0: 0.0})
    runner("--choose")
    settled = [one["run"] for one in runner()]
    plain = TINY.replace('tries = { "policy.ratio" = [0.5, 0.25], rate = [1, 2] }', "")
    plain = plain.replace("tries = { rate = [0.5, 2] }", "rate = 0.5").replace("tries = { rate = [1, 2] }", "")
    plain = plain.replace("validation = 30", "")
    assert "tries" not in plain
    assert [one["run"] for one in runner(text=plain)] == settled  # all were recorded
    assert len(settled) == 4


def test_baselines_cost_what_the_chosen_try_does(
    scripts: SimpleNamespace, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached(monkeypatch, scripts, {0.5: 50.0, 1.0: 60.0, 2.0: 40.0, 3.0: 0.0})

    def prefers(run: Any) -> dict[str, float]:
        return {"accuracy": 90.0 - 100 * run.variant.policy.get("ratio", 0), "test_loss": 1.0}

    monkeypatch.setattr(scripts.training.Run, "evaluate", prefers)
    tried = runner("--choose", of="tiny-choice")
    flops = {(one["variant"], *one["tried"].values()): one["flops"] for one in tried}
    assert flops["half", 0.25, 1] < 0.8 * flops["half", 0.5, 1]
    assert all(one["budget"]["target"] == flops["half", 0.25, 1] for one in tried if one["variant"] == "fewer")
    runs = {one["variant"]: one for one in runner()}
    assert runs["half"]["chosen"] == {"policy.ratio": 0.25, "rate": 1}
    assert runs["fewer"]["budget"]["target"] == runs["half"]["flops"]
    # Of as many steps as are in all of the training examples, and not in what was left of them.
    assert runs["half"]["budget"]["steps"] == 12 and tried[2]["budget"]["steps"] == 8


def test_tries_that_diverge_are_not_taken(
    scripts: SimpleNamespace, runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    endless = "variants.exact.tries.rate=[1e30, 1]"
    runner("--choose", "--set", endless, only=["exact"])
    assert "tiny: exact: takes rate = 1, " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        runner("--choose", "--set", "variants.exact.tries.rate=[1e30]", only=["exact"])
    assert "'exact'.tries: expected values of which some do not diverge, got rate = [1e+30]" in capsys.readouterr().err


def test_the_mean_over_the_choice_seeds_counts(
    scripts: SimpleNamespace, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {(0.5, 7): 50.0, (0.5, 8): 60.0, (2.0, 7): 90.0, (2.0, 8): 10.0, (0.5, 0): 1.0}

    def evaluate(run: Any) -> dict[str, float]:
        return {"accuracy": table[run.variant.rate, run.seed], "test_loss": 1.0}

    monkeypatch.setattr(scripts.training.Run, "evaluate", evaluate)
    seeds = "choice_seeds=[7, 8]"
    runner("--choose", "--set", seeds, only=["exact"])
    (run,) = runner("--set", seeds, only=["exact"])
    assert run["chosen"] == {"rate": 0.5}


def test_a_choice_that_another_process_is_at_is_waited_for(
    scripts: SimpleNamespace, runner: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reached(monkeypatch, scripts, {0.5: 50.0, 2.0: 70.0})
    runner("--choose", only=["exact"])
    path = tmp_path / "out" / "tiny-choice.jsonl"
    first, last = path.read_text().splitlines()
    path.write_text(first + "\n")
    claim = scripts.records.Records.claim

    @contextlib.contextmanager
    def ends_meanwhile(records: Any, run: str, wait: bool = False) -> Iterator[bool]:
        if wait:
            path.write_text(f"{first}\n{last}\n")
        with claim(records, run, wait) as mine:
            yield mine

    monkeypatch.setattr(scripts.records.Records, "claim", ends_meanwhile)
    (run,) = runner(only=["exact"])
    assert run["chosen"] == {"rate": 2}


# ---- equal time beside a narrow network


def test_a_baseline_takes_the_time_of_a_narrow_network(
    scripts: SimpleNamespace, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {16: 4.0, 8: 1.0}
    widths: list[int] = []
    clock = [0.0]
    plain = scripts.training.Run.step

    def step(run: Any, *given: Any) -> Any:
        width = run.ratios.model.fc2.in_features
        widths.append(width)
        clock[0] += times[width]
        return plain(run, *given)

    monkeypatch.setattr(scripts.training.Run, "step", step)
    monkeypatch.setattr(scripts.training.Settings, "now", lambda _: clock[0])
    run = runner(only=["fewer, time of phases"], text=TINY + PHASES)[0]
    # 9 steps of a quarter of the time and 3 exact ones, of 12.
    assert run["budget"]["target"] == 9 * 1.0 + 3 * 4.0 and run["budget"]["steps"] == 5
    assert 8 in widths and widths[-5:] == [16] * 5


# ---- configuration


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("variants.exact.tries.rat=[1]", "variants.'exact'.tries.rat: expected one of policy, exact, warmup"),
        ("variants.exact.tries.to=['half']", "variants.'exact'.tries.to: expected one of policy, exact"),
        ("variants.exact.tries.rate=[]", "'exact'.tries.rate: expected a list of one or more different values, got []"),
        ("variants.exact.tries.rate=[1, 1]", "tries.rate: expected a list of one or more different values, got [1, 1]"),
        ("variants.exact.tries.rate=2", "tries.rate: expected a list of one or more different values, got 2"),
        ("variants.exact.tries={policy={}}", "'exact'.tries: expected lists of values by the names of fields, got"),
        ("variants.exact.tries.rate=[1, -2]", "variants.'exact'.tries: rate: expected greater than 0, got -2"),
        ("variants.half.tries.tail=[0.2, 2.0]", "variants.'half'.tries: tail: expected less than 1, got 2.0"),
        ("variants.exact.tries.tail=[0.2]", "'exact'.tries: policy: expected one beside exact, tail, warmup,"),
        ("variants.exact.tries.policy.ratio=[1]", "tries.policy.ratio: expected a table that the variant has, got"),
        (
            "variants.half.tries.policy.ratio=[0.5, 3]",
            "'half'.policy: ratio: expected a number in (0, 1], got 3, in the try policy.ratio = 3, rate = 1",
        ),
        ("variants.half.tries.policy.colour=[1]", "variants.'half'.policy: "),
        ("variants.fewer.tries.epochs=[0.5]", "'fewer'.tries: epochs: expected none beside equal and by = 'epochs'"),
        (
            "variants.half.tries={examples=[{rule='infobatch'}], policy=[{}], tail=[0], exact=[[]]}",
            "variants.'fewer'.to: expected a variant whose steps are known before, got 'half'",
        ),
        ("validation=0", "validation: expected 1 or more examples, for the tries of variants.'exact', got 0"),
        ("validation=80", "validation: expected at most 79 of 96 training examples, so that a batch is left, got 80"),
        ("choice_seeds=[]", "choice_seeds: expected one or more different integers, got []"),
    ],
)
def test_a_bad_try_is_named(runner: Runner, capsys: pytest.CaptureFixture[str], change: str, message: str) -> None:
    with pytest.raises(SystemExit) as ended:
        runner("--choose", "--set", change)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_options_that_do_not_go_with_a_choice_are_named(runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    for more, only, message in (
        (["--seeds", "1"], [], "--seeds: expected none beside --choose, which has choice_seeds, got [1]"),
        ([], ["as written"], "--only: expected some of exact, fewer, half with tries, beside --choose, got"),
        (["--report"], [], "not allowed with argument"),
    ):
        with pytest.raises(SystemExit):
            runner("--choose", *more, only=only)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        runner("--choose", text=TINY.partition("tries")[0])
    assert "--choose: expected variants with tries in tiny.toml, got none" in capsys.readouterr().err


def test_costs_and_reports_are_of_what_was_chosen(
    scripts: SimpleNamespace, runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        runner("--report", only=["half"])
    assert "--choose --only 'half'" in capsys.readouterr().err
    runner("--choose", "--set", "variants.half.tries={policy.ratio=[0.25]}", only=["half"])
    runner("--report", "--set", "variants.half.tries={policy.ratio=[0.25]}", only=["half"])
    assert "16 of 64" in capsys.readouterr().out
