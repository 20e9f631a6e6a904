"""The experiments in ``examples/experiments``: runs, resuming, equal cost, phases, configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fx_approx
from tests.examples.conftest import EXPERIMENTS

TINY = """
title = "tiny"
seeds = [0]

[data]
kind = "images"
folder = "mnist"

[network]
kind = "{network}"
{options}

[training]
batch = 16
epochs = 4
rate = 0.05
schedule = "onecycle"

[variants.exact]

[variants."value, tail"]
policy = {{ kind = "uniform", sampler = "topk", ratio = 0.5, scores = "ema", scope = "value" }}
exact = ["{last}"]
tail = 0.25
preserve = true
every = 0

[variants."phases"]
policy = {{ kind = "uniform", sampler = "topk", ratio = 0.5, scores = "ema", scope = "value" }}
exact = ["{last}"]
warmup = 0.25
tail = 0.25
preserve = true
every = 5
subnetwork = true

[variants."moving"]
policy = {{ kind = "uniform", sampler = "systematic", ratio = 0.25, scores = "ema", scope = "value" }}
end_ratio = 0.75
warmup = 0.25
interleave = 3
distill = 0.5

[variants."fewer"]
equal = "flops"
to = "value, tail"
by = "epochs"

[variants."narrower"]
equal = "flops"
to = "value, tail"
by = "width"

[variants."fewer seconds"]
equal = "time"
to = "value, tail"
by = "epochs"

[variants."importance"]
examples = {{ rule = "importance", ratio = 0.5 }}
"""


Runner = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def runner(scripts: SimpleNamespace, data: Path, tmp_path: Path) -> Runner:
    """Runs variants of the tiny configuration; returns all records of the folder."""

    def run(
        *only: str,
        network: str = "mlp",
        options: str = "hidden = 16",
        out: str = "out",
        last: str = "classifier",
        more: Sequence[str] = (),
    ) -> list[dict[str, Any]]:
        path = tmp_path / "tiny.toml"
        path.write_text(TINY.format(network=network, options=options, last=last))
        arguments = [str(path), "--data", str(data), "--out", str(tmp_path / out), "--quiet", "--probe", "2"]
        scripts.run.main([*arguments, *(["--only", *only] if only else []), *more])
        return list(scripts.records.read(tmp_path / out / "tiny.jsonl"))

    return run


# ---- runs


def test_all_variants_of_a_configuration(runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    found = {one["variant"]: one for one in runner()}
    sampled = ["value, tail", "phases", "moving"]
    assert list(found) == ["exact", *sampled, "fewer", "narrower", "fewer seconds", "importance"]
    exact, tail, moving = found["exact"], found["value, tail"], found["moving"]
    # Two operations for each multiply-add: 64 x 16 in the first layer, which has no gradient of its input.
    step = 2 * 16 * (2 * 64 * 16 + 3 * 16 * 16 + 3 * 16 * 3)
    assert exact["step_flops"] == {"exact": step} and exact["flops"] == 24 * step == exact["exact_flops"]
    assert tail["phases"] == {"sampled": 18, "exact": 6} and (tail["sampled_layers"], exact["sampled_layers"]) == (2, 0)
    # Of 64 inputs 32 are read for the 8 units that the second layer reads; its outputs are all read.
    least = 2 * 16 * (2 * 32 * 8 + 3 * 8 * 16 + 3 * 16 * 3)
    assert least <= tail["step_flops"]["sampled"] < 1.15 * least  # what scores take is counted, too
    assert tail["flops"] == 18 * tail["step_flops"]["sampled"] + 6 * step
    assert set(moving["phases"]) == {"exact", "0.25", "0.5", "0.75"} and moving["phases"]["exact"] == 12
    for name in ("fewer", "narrower"):
        assert 0.6 * tail["flops"] < found[name]["flops"] <= tail["flops"] == found[name]["budget"]["target"]
        assert set(found[name]["phases"]) == {"exact"}
    assert found["fewer"]["budget"]["steps"] < 24 == found["narrower"]["budget"]["steps"]
    assert found["narrower"]["budget"]["width"] < 1
    assert all(one["final"]["accuracy"] > 60 for one in found.values() if one["variant"] != "fewer seconds")
    assert all(set(one["step_ms"]) == set(one["phases"]) for one in found.values() if one["variant"] != "phases")
    assert [one["step"] for one in exact["epochs"]] == [6, 12, 18, 24]
    # The first epoch and the last one read everything, those between half of it.
    drawn = found["importance"]
    assert [one["step"] for one in drawn["epochs"]] == [6, 9, 12, 18] and drawn["phases"] == {"exact": 18}
    assert drawn["flops"] == 18 * step and drawn["options"]["examples"] == {"rule": "importance", "ratio": 0.5}
    first = exact["epochs"][0]
    assert first["first_loss"] == pytest.approx(first["loss"])  # an epoch of six steps is both ends
    assert first["loss"] > exact["epochs"][-1]["last_loss"] > 0
    assert (tail["options"]["every"], tail["options"]["preserve"]) == (0, True) and "preserve" not in exact["options"]
    capsys.readouterr()
    runner()
    assert capsys.readouterr().out.count("recorded already") == 8


def test_tokens_are_a_policy_of_a_variant(runner: Runner) -> None:
    """16 patches of which 4, 8 or 12 go through the blocks, with half of the hidden units; a ramp, an exact tail."""
    layers = "{kind='uniform', sampler='topk', ratio=0.5, scores='weight', scope='value'}"
    tokens = f"{{kind='tokens', ratio=0.25, first=0, layers={layers}}}"
    whole = "['classifier', 'embed.*', '*scaled_dot*', '*query', '*key', '*value', '*projection', '*fc1']"
    variants = {
        "both": f"{{policy={tokens}, exact={whole}, tail=0.25}}",
        "ramp": "{policy={kind='tokens', ratio=0.25, first=0}, end_ratio=0.75, tail=0.25}",
        "fewer": "{equal='flops', to='ramp', by='epochs'}",
    }
    more = [one for name, value in variants.items() for one in ("--set", f"variants.{name}={value}")]
    more += ["--set", "training.epochs=2"]
    size = "layers = 2\nheads = 2\nsize = 8\npatch = 2"
    found = {one["variant"]: one for one in runner("exact", *variants, network="vit", options=size, more=more)}
    exact, both, ramp = (found[name] for name in ("exact", "both", "ramp"))
    assert both["phases"] == {"sampled": 9, "exact": 3} and both["sampled_layers"] == 2
    assert ramp["phases"] == {"0.25": 3, "0.5": 4, "0.75": 2, "exact": 3} and ramp["sampled_layers"] == 0
    step = exact["step_flops"]["exact"]
    shares = {phase: flops / step for phase, flops in ramp["step_flops"].items()}
    assert shares["exact"] == 1
    # Less than their share of the tokens in attention, more in the embedding, which reads all of the image.
    assert all(abs(shares[ratio] - float(ratio)) < 0.05 for ratio in ("0.25", "0.5", "0.75"))
    assert both["step_flops"]["sampled"] < 0.85 * ramp["step_flops"]["0.25"]
    assert 0.9 * ramp["flops"] < found["fewer"]["flops"] <= ramp["flops"]


def test_a_variant_by_phases_trains_a_narrow_network_and_says_what_one_ships(
    scripts: SimpleNamespace, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []
    plain = scripts.training.Run.step

    def step(run: Any, *given: Any) -> Any:
        widths.append(run.ratios.model.fc2.in_features)
        return plain(run, *given)

    monkeypatch.setattr(scripts.training.Run, "step", step)
    (run,) = runner("phases", more=["--cold"])
    # All 24 steps, and none before them: six exact ones, twelve of the network of 8 of 16 units, six exact ones.
    assert widths == [16] * 6 + [8] * 12 + [16] * 6 and run["phases"] == {"exact": 12, "sampled": 12}
    step_flops = 2 * 16 * (2 * 32 * 8 + 3 * 8 * 16 + 3 * 16 * 3)  # 32 of 64 inputs, 8 of 16 units
    assert run["step_flops"]["sampled"] == step_flops and run["flops"] == run["exact_flops"] / 2 + 12 * step_flops
    shipped, middle = run["shipped"], run["epochs"][2]  # the network ends with the third epoch
    full, sub = 64 * 16 + 16 + 16 * 16 + 16 + 16 * 3 + 3, 32 * 8 + 8 + 8 * 16 + 16 + 16 * 3 + 3
    assert shipped["parameters"] == {"full": full, "sub": sub}
    # It was merged there, and the full one computes the same.
    assert shipped["accuracy"] == middle["accuracy"] and shipped["test_loss"] == pytest.approx(middle["test_loss"])
    assert set(shipped["latency"]) == {"1", "16"} and len(shipped["latency"]["16"]["speedup"]) == 3
    assert run["final"]["accuracy"] > 60 and run["seconds"] > 0 and run["wall_seconds"] > 0
    assert "warm_seconds" not in run and run["common"]["cold"] and run["step_ms"] == {}


def test_without_a_tail_what_ships_is_what_the_full_network_ends_as(runner: Runner) -> None:
    more = ["--no-curve", "--set=variants.phases.tail=0", "--set=variants.phases.every=6"]
    (run,) = runner("phases", more=more)
    assert run["phases"] == {"exact": 6, "sampled": 18}
    assert run["shipped"]["accuracy"] == run["final"]["accuracy"]
    assert run["shipped"]["test_loss"] == pytest.approx(run["final"]["test_loss"])
    assert ["accuracy" in one for one in run["epochs"]] == [False, False, False, True]


def test_a_cold_run_learns_what_another_one_does(runner: Runner) -> None:
    cold, other = runner("value, tail", more=["--cold"])[0], runner("value, tail")[-1]
    assert cold["final"] == other["final"] and cold["setting"] != other["setting"]
    assert "warm_seconds" in other and "cold" not in other["common"]


def test_what_a_variant_saves_is_printed(runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner("exact", "value, tail", "moving", more=["--report"]) == []  # nothing is trained
    exact, rest = capsys.readouterr().out.split("tiny: value, tail")
    sampled, moving = rest.split("tiny: moving")
    assert "all layers are exact" in exact
    assert "phase sampled, 18 steps" in sampled and "32 of 64" in sampled and "phase exact" not in sampled
    # It begins with exact steps.
    assert [f"{ratio} of 64" in moving for ratio in (16, 32, 48)] == [True] * 3 and moving.count("phase 0.") == 3


def test_what_steps_cost_is_measured_beside_exact_training(
    scripts: SimpleNamespace, runner: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runner("exact", "value, tail", "narrower", more=["--costs", "4"]) == []  # nothing is trained
    (found,) = scripts.records.read(tmp_path / "out" / "tiny-costs.jsonl")
    exact, sampled = found["costs"]["exact training"]["exact"], found["costs"]["value, tail"]["sampled"]
    assert set(found["costs"]) == {"exact training", "value, tail", "narrower"}
    assert exact["speedup"] == [1.0, 1.0, 1.0] and sampled["flops"] < 0.5 * exact["flops"]
    weights = [64 * 16, 16, 16 * 16, 16, 16 * 3, 3]
    assert exact["gradient_bytes"] == 4 * sum(weights)
    # The second layer's gradient: 8 of its 16 columns; the first one's: 8 rows that are read, 32 of 64 columns.
    assert sampled["gradient_bytes"] == 4 * (sum(weights) - 64 * 16 + 8 * 32 - 16 * 16 + 16 * 8)
    narrower = found["costs"]["narrower"]["exact"]
    # At least the gradients are there at the end of a step.
    assert exact["gradient_bytes"] < exact["peak_bytes"] < 4 * exact["gradient_bytes"] and sampled["peak_bytes"] > 0
    assert narrower["gradient_bytes"] < narrower["peak_bytes"] < exact["peak_bytes"]
    (run,) = runner("exact")
    assert run["setting"] == found["setting"]  # they belong together
    with pytest.raises(SystemExit):
        runner("exact", more=["--costs", "1"])
    assert "--costs: expected 2 or more, got 1" in capsys.readouterr().err


CNN = ("cnn", "channels = [8, 8]\nkernel = 3\nhidden = 16\nnorm = true")


@pytest.mark.parametrize(
    ("network", "options", "last", "variant"),
    [
        pytest.param("mlp", "hidden = 16", "classifier", "value, tail", marks=pytest.mark.slow),
        pytest.param(*CNN, "classifier", "moving", marks=pytest.mark.slow),
        (*CNN, "classifier", "phases"),
        ("mlp", "hidden = 16", "classifier", "importance"),
        pytest.param("wrn", "depth = 10\nwiden = 1", "8", "value, tail", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    scripts: SimpleNamespace,
    runner: Runner,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    network: str,
    options: str,
    last: str,
    variant: str,
) -> None:
    how: dict[str, Any] = {"network": network, "options": options, "last": last}
    (whole,) = runner(variant, **how, out="whole")
    epoch, calls = scripts.training.Run._epoch, []

    def interrupted(self: Any, state: dict[str, Any], bar: Any) -> None:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(state["step"])
        epoch(self, state, bar)

    monkeypatch.setattr(scripts.training.Run, "_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner(variant, **how, more=["--checkpoint", "0"])
    assert not (tmp_path / "out" / "tiny.jsonl").exists()
    monkeypatch.setattr(scripts.training.Run, "_epoch", epoch)
    (resumed,) = runner(variant, **how)

    def told(record: dict[str, Any]) -> Any:
        timeless = [{key: value for key, value in one.items() if key != "seconds"} for one in record["epochs"]]
        return timeless, record["final"], record["flops"]

    assert calls == [0, 6] and told(resumed) == told(whole)
    assert not list((tmp_path / "out" / "checkpoints" / "tiny").glob("*.checkpoint.pt"))


def test_two_processes_do_not_do_one_run(scripts: SimpleNamespace, tmp_path: Path) -> None:
    first, second = (scripts.records.Records(tmp_path, "x") for _ in range(2))
    with first.claim("a") as mine, second.claim("a") as other, second.claim("b") as another:
        assert mine and not other and another
    with second.claim("a") as mine:
        assert mine
    first.path.write_text('{"run": "a"}\n{"run": "cut')
    second.append({"run": "b"})
    assert [one["run"] for one in first.all()] == ["a", "b"]


def test_fine_tuning_begins_with_the_weights_of_another_configuration(
    scripts: SimpleNamespace, runner: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "fine.toml"
    path.write_text('base = "tiny.toml"\n[start]\nconfig = "tiny.toml"\n[training]\nepochs = 1\nrate = 1e-9\n')
    (tmp_path / "tiny.toml").write_text(TINY.format(network="mlp", options="hidden = 16", last="classifier"))
    arguments = [str(path), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--quiet"]
    with pytest.raises(SystemExit):
        scripts.run.main([*arguments, "--only", "exact"])
    assert "expected the weights of 'exact', seed 0, of tiny" in capsys.readouterr().err
    # What a budget chooses depends on them, what it saves and costs likewise.
    budget = "variants.exact={policy={kind='flops', budget=0.7, min_k=4, round_to=4}}"
    with pytest.raises(SystemExit):
        scripts.run.main([*arguments, "--only", "exact", "--report", "--set", budget])
    assert capsys.readouterr().err.startswith("fine.toml: start: expected the weights of 'exact'")
    (before,) = runner("exact")
    scripts.run.main([*arguments, "--only", "exact"])
    (after,) = scripts.records.read(tmp_path / "out" / "fine.jsonl")
    assert after["final"]["accuracy"] == before["final"]["accuracy"]
    # Frozen, they stay as they are at any rate, and cost no gradient: of 64 x 16 inputs in the first layer.
    frozen = ["--set", "variants.exact.frozen=['*']", "--set", "training.rate=0.5"]
    with pytest.raises(SystemExit):
        scripts.run.main([*arguments, "--only", "exact", *frozen])
    assert "variants.'exact': frozen: expected globs that leave parameters to train" in capsys.readouterr().err
    frozen[1] = "variants.exact.frozen=['fc1.*']"
    scripts.run.main([*arguments, "--only", "exact", *frozen])
    *_, head = scripts.records.read(tmp_path / "out" / "fine.jsonl")
    assert head["options"]["frozen"] == ["fc1.*"] and "frozen" not in after["options"]
    assert after["step_flops"]["exact"] - head["step_flops"]["exact"] == 2 * 16 * (64 * 16 + 16 * 16)
    (start,) = {one["run"] for one in scripts.records.read(tmp_path / "out" / "tiny.jsonl")}
    folders = scripts.records.Records(tmp_path / "out", "tiny"), scripts.records.Records(tmp_path / "out", "fine")
    old, new = folders[0].load(start, "final"), folders[1].load(head["run"], "final")
    same = {name for name, value in old.items() if torch.equal(value, new[name])}
    assert {name for name in old if name.startswith("fc1.")} == same < set(old)


def test_the_step_after_an_exact_one_is_taught_by_it(
    scripts: SimpleNamespace, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, ...]] = []
    plain = scripts.training.Run.step

    def step(run: Any, x: torch.Tensor, y: torch.Tensor, optimizer: Any, soft: Any = None, weights: Any = None) -> Any:
        loss, output = plain(run, x, y, optimizer, soft, weights)
        seen.append((x, y, loss, output, soft))
        return loss, output

    monkeypatch.setattr(scripts.training.Run, "step", step)
    options = ("preserve=false", "interleave=4", "distill=0.25")
    (run,) = runner("value, tail", more=[f"--set=variants.value, tail.{option}" for option in options])
    assert run["phases"] == {"sampled": 14, "exact": 10}
    steps = seen[-24:]  # before them some are timed
    taught = [place for place, found in enumerate(steps) if found[4] is not None]
    # Exact are steps 3, 7, 11, 15 and, the tail, from 18 on; an epoch of six steps, begun anew, has no teacher yet.
    assert taught == [4, 8, 16]
    for place in taught:
        (x, y, _, answers, _), (again, labels, loss, output, soft) = steps[place - 1], steps[place]
        assert x is again and y is labels and torch.equal(soft, answers.softmax(-1))
        logs = output.log_softmax(-1)
        expected = -0.75 * logs[range(len(y)), y] - 0.25 * (soft * logs).sum(-1)
        torch.testing.assert_close(loss, expected.mean())


def test_errors_of_a_budget_are_measured_on_batches_of_the_run(
    scripts: SimpleNamespace, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    trained: list[torch.Tensor] = []
    measure, step, transform = fx_approx.analysis.sensitivity, scripts.training.Run.step, scripts.variants.approximate

    def measured(model: torch.nn.Module, batches: Any, *rest: Any, **options: Any) -> Any:
        before, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
        found = measure(model, batches, *rest, **options)
        assert torch.equal(torch.get_rng_state(), random)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        given.extend((batches, found))
        return found

    def approximate(model: torch.nn.Module, policy: Any, *rest: Any) -> Any:
        given.append(policy)
        return transform(model, policy, *rest)

    def trains(run: Any, x: torch.Tensor, *rest: Any) -> Any:
        trained.append(x)
        return step(run, x, *rest)

    monkeypatch.setattr(fx_approx.analysis, "sensitivity", measured)
    monkeypatch.setattr(scripts.variants, "approximate", approximate)
    monkeypatch.setattr(scripts.training.Run, "step", trains)
    policy = "{kind='flops', budget=0.7, min_k=4, round_to=4}"
    (run,) = runner("moving", more=[f"--set=variants.moving={{policy={policy}, sensitivity=2}}"])
    batches, found, chosen = given
    assert chosen.sensitivity is found and run["errors"] == found.errors and set(found.errors) == {"fc1", "fc2"}
    assert len(batches) == 2 and all(torch.equal(x, y) for (x, _), y in zip(batches, trained[-24:], strict=False))
    # Each of two batches: an exact step, and one for each of the two layers, that count like exact ones.
    assert run["prepared"]["flops"] == 2 * 3 * run["exact_flops"] / 24
    assert run["flops"] == run["prepared"]["flops"] + 24 * run["step_flops"]["sampled"]


# ---- configuration


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.rat=0.1", "training.rat: no such key, got 0.1; expected one of batch, epochs"),
        ("training.batch=0", "training.batch: expected greater than or equal to 1, got 0"),
        ("training.batch='x'", "training.batch: expected a valid integer, got 'x'"),
        ("training.batch=97", "training.batch: expected at most the 96 training examples, got 97"),
        (
            "training.schedule=up",
            "training.schedule: expected 'onecycle', 'cosine', 'stairs', 'trapezoid' or 'constant', got 'up'",
        ),
        (
            "training.schedule=trapezoid",
            "training.milestones: expected one share, not before warmup, from which a trapezoid falls, got ()",
        ),
        (
            "data.kind=sounds",
            "data.kind: expected 'images', 'folder', 'characters', 'speakers' or 'labelled', got 'sounds'",
        ),
        ("data.limit=true", "data.limit: expected a valid integer, got True"),
        ("training.milestones=0.5", "training.milestones: expected a valid list, got 0.5"),
        ("training.milestones=[0.5, 'x']", "training.milestones.1: expected a valid number, got 'x'"),
        ("variants={}", "variants: table should have at least 1 item"),
        ("data={}", "data.folder: missing"),
        ("colour=1", "tiny.toml: colour: no such key, got 1; expected one of name, title, data"),
        ("variants.exact.tial=1", "variants.'exact'.tial: no such key, got 1; expected one of policy, exact"),
        ("variants.exact.by=size", "variants.'exact'.by: expected '', 'epochs' or 'width', got 'size'"),
        ("variants.fewer.by=''", "variants.'fewer'.by: expected epochs or width beside equal, got ''"),
        ("data.folder=cifar10", "no cifar10 is there: expected cifar10/ with"),
        ("network.kind=rnn", "network.kind: expected one of mlp, cnn, wrn, torchvision, gpt, vit, minilm, got 'rnn'"),
        ("network.hidden=0", "network.hidden: expected greater than or equal to 1, got 0"),
        ("variants.moving.tail=0.9", "variants.'moving'.tail: expected less than what warmup = 0.25 leaves, got 0.9"),
        ("variants.moving.policy.kind=best", "variants.'moving'.policy: kind: expected one of paper, uniform"),
        ("variants.moving.policy.ratio=2", "variants.'moving'.policy: ratio: expected a number in (0, 1], got 2"),
        (
            "variants.fewer.to=fewer",
            "variants.'fewer'.to: expected one of exact, value, tail, phases, moving, importance, got",
        ),
        ("variants.exact.tail=0.5", "variants.'exact'.policy: expected one beside exact, tail, warmup"),
        ("variants.moving.preserve=true", "variants.'moving'.preserve: expected false beside interleave, got True"),
        (
            "variants.value, tail.policy={kind='flops', budget=0.001}",
            "variants.'value, tail': budget: 0.001 of the exact step cannot be met",
        ),
        ("variants.moving.distill=2", "variants.'moving'.distill: expected less than or equal to 1, got 2"),
        (
            "variants.exact.distill=0.5",
            "variants.'exact'.distill: expected 0 without interleave, whose exact steps teach",
        ),
        ("variants.moving.sensitivity=2", "'moving'.sensitivity: expected 0 without a budget for all layers, got 2"),
        (
            "variants.exact={policy={kind='flops', budget=0.7, min_k=4, round_to=4}, sensitivity=9}",
            "'exact': sensitivity: expected at most the 6 batches of an epoch, got 9",
        ),
        ("variants.exact.frozen=['x.*']", "variants.'exact': frozen: expected a glob on parameters such as"),
        ("variants.fewer.frozen=['fc1.*']", "variants.'fewer'.frozen: expected none beside equal, got"),
        ("variants.exact.dropout={x=0.5}", "variants.'exact': dropout: expected a glob on layers such as fc1, got 'x'"),
        ("variants.exact.dropout={fc1=1.0}", "variants.'exact'.dropout.fc1: expected less than 1, got 1.0"),
        ("variants.fewer.dropout={fc1=0.5}", "variants.'fewer'.dropout: expected none beside policy or equal, got"),
        ("variants.phases.interleave=3", "variants.'phases'.interleave: expected 0 beside subnetwork, got 3"),
        ("variants.phases.every=1", "variants.'phases'.every: expected 0 or 2 or more beside subnetwork, got 1"),
        ("variants.phases.warmup=0", "'phases'.warmup: expected more than 0 beside subnetwork, for the scores ema"),
        ("variants.exact.subnetwork=true", "'exact'.policy: expected one beside subnetwork, got {}"),
        (
            "variants.importance.examples.rule=best",
            "'importance'.examples: rule: expected one of importance, infobatch,",
        ),
        ("variants.importance.examples.ratio=2", "'importance'.examples: ratio: expected in (0, 1], got 2"),
        ("variants.importance.epochs=0.5", "'importance'.examples: expected none beside policy, equal or epochs"),
        ("training.epochs=0.5", "'importance'.examples: training.epochs: expected a whole number beside examples"),
        (
            "variants.value, tail.policy={kind='tokens', layers={kind='uniform', ratio=3}}",
            "variants.'value, tail'.policy.layers: ratio: expected a number in (0, 1], got 3",
        ),
        ("seeds=[1, 1]", "seeds: expected one or more different integers, got [1, 1]"),
        ("training", "--set training: expected KEY=VALUE"),
    ],
)
def test_a_bad_configuration_is_named(
    runner: Runner, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        runner(more=["--set", change])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_all_that_is_wrong_is_told_at_once(runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        runner(more=["--set", "training.batch=0", "--set", "seeds=[-1]"])
    assert capsys.readouterr().err.splitlines() == [
        "tiny.toml: training.batch: expected greater than or equal to 1, got 0",
        "tiny.toml: seeds.0: expected greater than or equal to 0, got -1",
    ]


def test_the_configurations_that_are_here_are_read(scripts: SimpleNamespace) -> None:
    paths = sorted((EXPERIMENTS / "configs").glob("*.toml"))
    assert len(paths) >= 10
    for path in paths:
        config = scripts.config.load(path)
        scripts.networks.network(config.network, path.name)
        assert config.name == path.stem
        for name, variant in config.variants.items():
            for _, tried in variant.alternatives():
                one = scripts.choices.put(config, name, tried)
                scripts.variants.policy_of(one, name)
                scripts.variants.schedule_of(one, name, 100)
        if config.start is not None:
            other = scripts.config.load(path.parent / config.start.config)
            assert config.start.variant in other.variants and other.network == config.network


def test_no_data_is_a_message(scripts: SimpleNamespace, tmp_path: Path) -> None:
    missing = scripts.config.ConfigError
    with pytest.raises(missing, match=r"expected imagenet/train and imagenet/val .* image-net.org"):
        scripts.images.folder_of(tmp_path, "imagenet", tmp_path)
    with pytest.raises(missing, match=r"expected tinyshakespeare/input.txt"):
        scripts.texts.read(tmp_path, "tinyshakespeare")
