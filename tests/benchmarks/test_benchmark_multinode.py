"""The benchmark over a network: its model on paper against hand calculation, its bytes, and a short run of it all."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MODULES = (
    *("_device", "_header", "_models", "_namespaces"),
    *("_network_model", "_replay", "_multinode_report", "multinode"),
)


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scripts are imported as when they are run, and forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def paper() -> ModuleType:
    return importlib.import_module("_network_model")


def test_an_all_reduce_by_hand(paper: ModuleType) -> None:
    link = paper.Link(alpha=0.001, beta=100.0)
    # ring over 4: 6 messages, and 1.5 times 400 bytes at 100 bytes a second
    assert paper.all_reduce_seconds(400, 4, link, "ring") == pytest.approx(6 * 0.001 + 6.0)
    assert paper.all_reduce_seconds(400, 4, link, "halving-doubling") == pytest.approx(4 * 0.001 + 6.0)
    assert paper.all_reduce_seconds(400, 1, link, "ring") == 0
    assert paper.messages(1024, "ring") == 2046 and paper.messages(1024, "halving-doubling") == 20
    assert paper.messages(5, "halving-doubling") == 6


def test_a_step_by_hand(paper: ModuleType) -> None:
    link, two = paper.Link(alpha=0.0, beta=100.0), 2
    early, late = paper.Bucket(1.0, 100), paper.Bucket(2.0, 50)
    # over two workers the factor is 1: the first is through at 2.0, the second at 2.5; computing ends at 2.2
    assert paper.step_seconds(2.2, [early, late], two, link, "ring") == pytest.approx(2.5)
    # the second waits for the first
    assert paper.step_seconds(2.2, [paper.Bucket(1.0, 300), late], two, link, "ring") == pytest.approx(4.5)
    # all is hidden behind computing
    assert paper.step_seconds(9.0, [early, late], two, link, "ring") == pytest.approx(9.0)
    # 0.3 s of packing, two thirds of it before the first bucket: at 1.2 to 2.2, then at 2.3 to 2.8, and unpacked
    costs = paper.Costs(pack=0.3, unpack=0.1)
    assert paper.step_seconds(2.2, [early, late], two, link, "ring", costs) == pytest.approx(2.9)
    # alpha 0.01: two messages for a call, two calls in the first bucket, one in the second, three small ones
    slow, twice = paper.Link(alpha=0.01, beta=100.0), paper.Bucket(1.0, 100, calls=2)
    found = paper.step_seconds(2.2, [twice, late], two, slow, "ring", paper.Costs(small=3))
    assert found == pytest.approx(max(2.0 + 0.04, 2.0) + 0.5 + 0.02 + 0.06)


def test_buckets_are_ready_when_their_last_layer_is(paper: ModuleType) -> None:
    layers = [(10.0, 1.0), (20.0, 2.0), (30.0, 4.0)]
    assert paper.ready_times([10, 50], layers, 5.0) == [6.0, 12.0]
    assert paper.ready_times([30, 30], layers, 0.0) == [3.0, 7.0]
    assert paper.ready_times([15, 45], layers, 0.0) == [3.0, 7.0]


def test_wrong_links_and_algorithms_are_refused(paper: ModuleType) -> None:
    with pytest.raises(ValueError, match="alpha, beta"):
        paper.Link(0.0, 0.0)
    with pytest.raises(ValueError, match="algorithm"):
        paper.messages(4, "tree")
    with pytest.raises(ValueError, match="workers"):
        paper.messages(0, "ring")


# ---- what stands for a network


def test_replayed_steps_give_the_recorded_gradients_back() -> None:
    replay = importlib.import_module("_replay")
    torch.manual_seed(0)
    model = replay.NETWORKS["wrn_10_2"].build()
    layers = replay.layers_of(model, 16)
    assert sum(one.nbytes for one in layers) == sum(p.nbytes for p in model.parameters())
    assert sum(replay.seconds_of(layers)) == pytest.approx(1 - replay.FORWARD)
    recording = replay.record(model, torch.randn(2, 3, 16, 16))
    replayed = replay.Replay(model, recording, layers)
    replayed(torch.zeros((), requires_grad=True)).backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, recording.gradients[name])


def test_a_recording_knows_what_was_selected() -> None:
    replay = importlib.import_module("_replay")
    torch.manual_seed(0)
    model = replay.sampled(replay.NETWORKS["wrn_10_2"].build(), 0.5, 16, "value", "ema", 4)
    recording = replay.record(model, torch.randn(2, 3, 16, 16))
    assert 0.4 < recording.chosen.float().mean() < 0.6
    assert 0.2 < (recording.gradients["2.conv2.weight"] != 0).float().mean() < 0.3
    assert model._fx_approx.resample.published is None


def test_operations_of_a_layer_by_hand() -> None:
    replay = importlib.import_module("_replay")
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 16, 5))
    layers = replay.layers_of(model, 4)
    assert [(one.name, one.macs) for one in layers] == [("0", 16 * 8 * 27), ("1", 0), ("3", 5 * 128)]


# ---- bytes


def test_bytes_of_hosts_are_merged_and_compared(scripts: None) -> None:
    report = importlib.import_module("_multinode_report")
    row = {"variant": "dense", "run": 0, "nbytes": 1000, "cpu": 1.0, "pack": 0.0, "unpack": 0.0}
    found = report._merged_step([{**row, "seconds": 1.0, "counted": 1510}, {**row, "seconds": 3.0, "counted": 1530}], 4)
    assert found["seconds"] == 3.0 and found["counted"] == 1520 and found["expected"] == 1500
    with pytest.raises(ValueError, match="rows"):
        report._merged_step([{**row, "seconds": 1, "counted": 1}, {**row, "nbytes": 9, "seconds": 1, "counted": 1}], 2)


def test_planned_bytes_need_no_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    multinode = importlib.import_module("multinode")
    path = tmp_path / "bytes.json"
    options = ["--bytes-only", "--networks", "wrn_10_2", "--ratios", "0.5", "--minimal-k", "4", "--json", str(path)]
    multinode.main(options)
    found = {one["scope"]: one for one in json.loads(path.read_text())["results"]}
    dropped = {key: 1 - one["sent of sliced"] / one["dense of sliced"] for key, one in found.items()}
    assert dropped["not demanded"] == pytest.approx(0.5, abs=0.01)
    assert 0.6 < dropped["value"] <= dropped["group"] < 0.76
    assert "less of sliced weights" in capsys.readouterr().out


# ---- options, and what the machine must allow


def test_variants_and_step_times_follow_from_the_options() -> None:
    multinode = importlib.import_module("multinode")
    options = multinode.parse(["--networks", "wrn_28_10", "--ratios", "0.5", "--rates", "1000", "50"])
    assert options.stretch == [1.0, 1.0]
    names = [one["name"] for one in multinode.variants_of(options, "wrn_28_10")]
    assert names[:3] == ["dense", "dense, fp16", "PowerSGD, rank 4"] and "ours 0.5, fp16" in names
    assert names[-1] == "ours 0.5, computes 2.43 x faster"
    # the cited throughput: 64 images of ResNet-50 at 367 a second
    assert multinode.seconds_of("resnet50", options) == pytest.approx(64 / 367, rel=1e-6)
    assert multinode.seconds_of("wrn_28_10", multinode.parse(["--step-seconds", "0.2"])) == 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hosts", "5"], "--hosts"),
        (["--rates", "100", "--stretch", "1", "2"], "--stretch"),
        (["--rates", "-1"], "--rates"),
        (["--warmup", "1"], "--warmup"),
        (["--ratios", "1.5"], "--ratios"),
    ],
)
def test_wrong_options_are_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    multinode = importlib.import_module("multinode")
    with pytest.raises(SystemExit):
        multinode.parse(options)
    assert message in capsys.readouterr().err


def test_links_are_limited_by_a_token_bucket_and_delayed_where_asked() -> None:
    namespaces = importlib.import_module("_namespaces")
    (bucket,) = namespaces.shaper(1000.0)
    assert bucket[:6] == ["tc", "qdisc", "replace", "dev", "eth0", "root"]
    assert "1000mbit" in bucket and "250000b" in bucket  # 2 ms of 125 MB/s
    assert "65600b" in namespaces.shaper(10.0)[0]
    assert namespaces.shaper(100.0, 2.0)[1][-2:] == ["delay", "2ms"]


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    namespaces = importlib.import_module("_namespaces")
    multinode = importlib.import_module("multinode")
    monkeypatch.setattr(namespaces.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(namespaces.os, "geteuid", lambda: 1000)
    with pytest.raises(SystemExit, match="network namespaces need root"):
        multinode.main([])
    monkeypatch.setattr(namespaces.shutil, "which", lambda tool: None)
    with pytest.raises(SystemExit, match="ip is not installed"):
        multinode.main([])


@pytest.mark.slow
def test_all_of_it_between_two_namespaces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespaces, multinode = importlib.import_module("_namespaces"), importlib.import_module("multinode")
    try:
        namespaces.check()
    except namespaces.UnavailableError as error:
        pytest.skip(str(error))
    path = tmp_path / "steps.json"
    options = (
        "--networks wrn_10_2 --hosts 2 --rates 100 --stretch 1 --ratios 0.5 --minimal-k 4 --runs 2 --step-seconds 0.02"
    )
    multinode.main([*options.split(), "--json", str(path)])
    (found,) = json.loads(path.read_text())["results"]
    assert found["trained"] == 0 and found["difference"] < 1e-5
    steps = {one["variant"]: one for one in found["measured"][0]["steps"]}
    assert steps["ours 0.5"]["expected"] < 0.4 * steps["dense"]["expected"]
    for one in steps.values():
        # headers of each packet, those of acknowledgements, gloo's own, and two barriers
        assert one["expected"] < one["counted"] < 1.1 * one["expected"] + 20_000
    assert "On paper" in capsys.readouterr().out
    assert f"fxmn{os.getpid()}" not in namespaces.run("ip", "netns", "list") + namespaces.run("ip", "link", "show")
