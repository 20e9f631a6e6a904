"""The benchmarks of steps, memory, policies and single products, in small: they run, and are checked."""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.slow

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
    options = "--models wrn_10_2 --minimal-k 4 --batch 2 --runs 2 --warmup 1 --memory --profile --json"
    train_step.main([*options.split(), str(path)])
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


@pytest.mark.slow
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


@pytest.mark.slow
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


# ---- memory


def test_memory_is_that_of_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The script checks the report's bytes against those that autograd saves; rows chosen in forward save memory."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    try:
        memory = importlib.import_module("memory")
        sizes = ["--depth", "1", "--dim", "32", "--heads", "2", "--tokens", "17", "--batch", "32"]
        memory.main([*sizes, "--json", str(tmp_path / "memory.json")])
        with pytest.raises(SystemExit):
            memory.main(["--heads", "5"])
        monkeypatch.setattr(memory, "saved_for_backward", lambda model, x: (0, 0))
        with pytest.raises(AssertionError, match="the report says"):
            memory.main(sizes)
    finally:
        for name in ("_header", "_peak", "memory"):
            sys.modules.pop(name, None)
    exact, weight, both, late = json.loads((tmp_path / "memory.json").read_text(encoding="utf-8"))["results"]
    assert "rows chosen in forward" in capsys.readouterr().out
    assert max(weight["layers"], both["layers"]) <= 0.40 * exact["layers"]
    assert max(weight["step"], both["step"]) <= 0.85 * exact["step"]
    assert late["layers"] >= exact["layers"]
    assert late["step"] >= exact["step"]
    assert max(weight["peak"], both["peak"]) < exact["peak"]


# ---- policies


MODULES = ("_header", "_models", "predictions", "budgets", "auto")


@pytest.fixture
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    try:
        yield importlib.import_module(request.param)
    finally:
        torch.set_num_threads(threads)
        for name in MODULES:
            sys.modules.pop(name, None)


def results(script: ModuleType, path: Path, arguments: list[str]) -> Any:
    script.main([*arguments, "--json", str(path)])
    return json.loads(path.read_text(encoding="utf-8"))["results"]


@pytest.mark.parametrize("script", ["budgets"], indirect=True)
def test_budgets(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = results(script, tmp_path / "found.json", ["--models", "mlp_4", "--steps", "3", "--batch", "8"])
    assert 0.3 < found["budget"] < 1
    for label in ("predicted", "measured"):
        assert 0.98 * found["budget"] <= found[label]["flops"] <= found["budget"]
        assert found[label]["error"] > 0
    assert "less error than uniform on" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["predictions"], indirect=True)
def test_predictions(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fx_approx.policies import cost_roofline as roofline
    from fx_approx.policies.cost_roofline import Device

    device = Device("made up", "torch.float32", 1e11, 1e10, 1e10, 1e-6, 0.8, 0.7, 0.5, 0.1)
    monkeypatch.setattr(roofline, "calibrate", lambda *args: device)
    monkeypatch.setattr(script, "calibrate", lambda *args: device)
    arguments = ["--models", "wrn_10_2", "--ratios", "0.5", "--runs", "2", "--minimal-k", "8"]
    (found,) = results(script, tmp_path / "found.json", arguments)
    roofline._devices.clear()
    assert found["roofline"] > 1 and found["measured"] > 0 and len(found["clock"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("script", ["auto"], indirect=True)
def test_auto(script: ModuleType, tmp_path: Path) -> None:
    arguments = ["--models", "squeezenet1_1", "--batches", "2", "--runs", "3", "--sweep"]
    (found,) = results(script, tmp_path / "found.json", arguments)
    assert found["layers"] == 26 and set(found["speedup"]) == {
        "auto",
        *(f"{s} {r}" for s in ("layer", "value", "group") for r in (0.5, 0.75)),
    }


@pytest.mark.parametrize("script", ["predictions", "budgets", "auto"], indirect=True)
def test_bad_options(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--models", "nothing"], ["--ratio", "2"], ["--runs", "0"], ["--ratios", "0"]):
        with pytest.raises(SystemExit):
            script.main(arguments)
    assert "error:" in capsys.readouterr().err


# ---- single products and their roofline


@pytest.fixture(autouse=True)
def scripts_ops(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scripts are imported as when they are run, and forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in ("_device", "_float8", "_header", "_layers", "_models", "_roofline", "ops"):
        sys.modules.pop(name, None)


@pytest.fixture
def ops() -> ModuleType:
    return importlib.import_module("ops")


@pytest.fixture
def layers(ops: ModuleType) -> ModuleType:
    return importlib.import_module("_layers")


SMALL = ["--quick", "--sizes", "64", "--networks"]


def test_quick_run(ops: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ops.json"
    ops.main(["--quick", "--json", str(path), "--figure", str(tmp_path / "first.png")])
    said = capsys.readouterr().out
    assert "GB/s in copies" in said and "left out: " in said and "conv 3x3 64>64 on 2x32x32" in said
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert {"processor", "threads", "torch", "fx_approx"} <= set(stored["environment"])
    results = stored["results"]
    assert results["peaks"]["flops"] > 0 and results["peaks"]["bytes"] > 0 and results["dtype"] == "float32"
    found = {(one["role"], one["variant"]): one for one in results["ops"] if one["network"] == "square"}
    assert len(found) == 8
    limits = {role: one["limit"] for (role, variant), one in found.items() if variant == "sampled"}
    assert limits == {"OUTPUT": 2, "GRAD_INPUT": 2, "GRAD_WEIGHT": 2, "hoisted": 4}
    for one in found.values():
        assert one["flops"] * one["limit"] == 2 * 256**3
        assert one["tflops"] == pytest.approx(one["flops"] / one["seconds"] / 1e12)
        assert one["of_limit"] == pytest.approx(one["speedup"][1] / one["limit"])
    # An exact square product of float32 reads and writes 3 n^2 entries of 4 bytes.
    assert found["OUTPUT", "exact"]["intensity"] == pytest.approx(2 * 256 / 12)
    assert found["OUTPUT", "sampled"]["intensity"] == pytest.approx(256 / 8)
    assert found["hoisted", "sampled"]["intensity"] == pytest.approx(256**3 / 2 / (4 * 256**2 * (0.5 + 0.25 + 0.5)))
    ops.main(["--from", str(path), "--figure", str(tmp_path / "second.png")])
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert len(list(tmp_path.glob("*.png"))) == (2 if drawn else 0)


@pytest.mark.slow
def test_compiled_beside_float8(ops: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a stand-in for torchao, which changes nothing."""
    monkeypatch.setattr(ops, "float8_missing", lambda device: None)
    monkeypatch.setattr(ops, "float8", lambda model: model)
    path = tmp_path / "ops.json"
    ops.main([*SMALL, "--roles", "OUTPUT", "--dtype", "bfloat16", "--compile", "--json", str(path)])
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    assert results["float8"] == "measured"
    kinds = [(one["variant"], one["compiled"]) for one in results["ops"]]
    assert kinds == [("exact", False), ("sampled", False), ("exact", True), ("sampled", True), ("float8", True)]
    monkeypatch.setattr(ops, "float8", lambda model: torch.nn.Sequential(model, torch.nn.Hardtanh()))
    with pytest.raises(AssertionError, match=r"linear 64x64x64, OUTPUT, float8: .* from the product in float64"):
        ops.main([*SMALL, "--roles", "OUTPUT", "--compile"])


@pytest.mark.parametrize("role", ["OUTPUT", "GRAD_INPUT", "GRAD_WEIGHT", "hoisted"])
@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("ratio", [None, 0.25])
def test_counted_operations_and_wrong_results(layers: ModuleType, role: str, conv: bool, ratio: float | None) -> None:
    layer = layers.Layer("", (40, 24), (36, 24))
    if conv:
        layer = layers.Layer("", (4, 16, 9, 9), (20, 16, 3, 3), (2, 2), (1, 1))
    x, w, grad = layers.operands(layer, "cpu", torch.float32, channels_last=True)
    one = layers.work(layer, role, ratio, x, w, grad)
    layers.check("", one.function, one, 1e-4)
    with FlopCounterMode(display=False) as counter:
        one.function(*one.arguments)
    assert counter.get_total_flops() == one.flops
    assert layer.flops / one.flops == (1 if ratio is None else 16 if role == "hoisted" else 4)
    for wrong in (lambda *given: 1.01 * one.function(*given), lambda *given: one.function(*given) * torch.nan):
        with pytest.raises(AssertionError, match=r"a layer: .* from the product in float64, more than 0.0001"):
            layers.check("a layer", wrong, one, 1e-4)


def test_layers_of_the_networks(layers: ModuleType) -> None:
    resnet = layers.network_layers("resnet50", 2)
    assert len(resnet) == len(set(resnet)) == 22
    assert all(layer.is_conv and layer.weight[1] >= 16 for layer in resnet)
    assert layers.Layer("resnet50", (2, 64, 56, 56), (64, 64, 3, 3), (1, 1), (1, 1)) in resnet
    convnext = [layer.label for layer in layers.network_layers("convnext_tiny", 2)]
    assert "linear 6272x96x384" in convnext and "conv 2x2/2 96>192 on 2x56x56" in convnext
    assert not any("7x7" in label for label in convnext)  # depthwise
    assert len(layers.network_layers("wrn_28_10", 1)) == 9


def test_long_products_are_left_out(ops: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    ops.main([*SMALL, "--most-seconds", "1e-12"])
    assert "left out: linear 64x64x64 of square, more than 1e-12 s a product" in capsys.readouterr().out


def test_why_there_is_no_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("_float8")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert module.float8_missing("cuda") == "torchao is not installed"
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    assert "need a CUDA device" in module.float8_missing("cpu")
    for capability, missing in (((8, 0), True), ((9, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert (module.float8_missing("cuda") is not None) is missing


WRONG_OPS = [
    *(["--runs", "1"], ["--ratios", "1"], ["--batch", "0"], ["--sizes", "1"], ["--sizes", "--networks"]),
    *(["--roles", "INPUT"], ["--tf32", "--device", "cpu"], ["--from", "ops.json"], ["--device", "abacus"]),
]


@pytest.mark.parametrize("wrong", WRONG_OPS)
def test_ops_wrong_options_are_refused(ops: ModuleType, wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        ops.main(["--quick", *wrong])
