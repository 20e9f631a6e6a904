"""The benchmark of single products and its roofline, on small layers."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
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


WRONG = [
    *(["--runs", "1"], ["--ratios", "1"], ["--batch", "0"], ["--sizes", "1"], ["--sizes", "--networks"]),
    *(["--roles", "INPUT"], ["--tf32", "--device", "cpu"], ["--from", "ops.json"], ["--device", "abacus"]),
]


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_options_are_refused(ops: ModuleType, wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        ops.main(["--quick", *wrong])


def test_figures_need_matplotlib_only(
    ops: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    ops.draw(tmp_path / "roof.png", {})
    assert list(tmp_path.iterdir()) == []
    assert "no figure" in capsys.readouterr().err
