"""A subnetwork is exported as any module is, and the exported one computes the same numbers."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_approx
from fx_approx.policies import Exact, Override, Uniform
from fx_approx.subnetworks import extract, load, record_of, restore, save
from tests.helpers.demand_nets import NETS, BasicBlock
from tests.helpers.hoisting import Layers, perturbed
from tests.helpers.quick import in_turn


def residual() -> nn.Module:
    """As a ResNet, each block with a hidden value."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        BasicBlock(8, 8),
        BasicBlock(8, 16, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 5))


WIDE = Layers("topk", 0.5, "weight", "value")
GROUP = Layers("topk", 0.5, "weight", "group")
CASES: dict[str, tuple[Callable[[], nn.Module], Any, tuple[int, ...], bool]] = {
    "residual, own class": (residual, Override({"*.conv2": Uniform(0.5)}, Exact()), (2, 3, 12, 12), True),
    "residual, value": (residual, WIDE, (2, 3, 12, 12), False),
    "residual, group": (residual, GROUP, (2, 3, 12, 12), False),
    "MLP": (mlp, Override({"0": Exact()}, Uniform(0.5)), (6, 12), True),
    "transformer, value": (*(NETS["written-attention"][0], WIDE), NETS["written-attention"][1], False),
    "fused heads, group": (*(NETS["fused-heads"][0], GROUP), NETS["fused-heads"][1], False),
    "squeeze-excite, value": (*(NETS["squeeze-excite"][0], WIDE), NETS["squeeze-excite"][1], False),
    "gated, value": (*(NETS["gated"][0], WIDE), NETS["gated"][1], False),
}


def evaluating(name: str) -> tuple[nn.Module, Tensor]:
    build, policy, shape, own = CASES[name]
    torch.manual_seed(0)
    x = torch.randn(*shape)
    sub = extract(fx_approx.transform(perturbed(build()), policy, x), example_inputs=x if own else None).eval()
    assert record_of(sub).own_forward is own
    return sub, x


def assert_close(one: Any, other: Tensor) -> None:
    assert torch.allclose(torch.as_tensor(one), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "mode"), in_turn(CASES, ["strict", "non-strict"], step=2))
def test_torch_export(name: str, mode: str) -> None:
    sub, x = evaluating(name)
    with torch.no_grad():
        expected = sub(x)
        exported = torch.export.export(sub, (x,), strict=mode == "strict")
        stream = io.BytesIO()
        torch.export.save(exported, stream)
        stream.seek(0)
        assert_close(torch.export.load(stream).module()(x), expected)
    narrow = {tuple(tensor.shape) for tensor in exported.state_dict.values()}
    assert narrow == {tuple(tensor.shape) for tensor in sub.state_dict().values()}, "nothing of the full size is left"


def test_torch_export_for_training_and_of_any_batch() -> None:
    sub, x = evaluating("residual, value")
    sub.train()
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(sub, (x,), dynamic_shapes=({0: batch},)).module()
    more = torch.randn(5, 3, 12, 12)
    assert_close(exported(more).detach(), sub(more).detach())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("residual, value", "MLP"),
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("residual, own class", "transformer, value")),
    ],
)
def test_onnx(name: str) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    sub, x = evaluating(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own
        program = torch.onnx.export(sub, (x,), dynamo=True, verbose=False)
    stream = io.BytesIO()
    program.save(stream)
    session = runtime.InferenceSession(stream.getvalue(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert_close(result, sub(x))


class Branching(nn.Module):
    """Returns something else in evaluation, as a detection head does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = self.c(x + torch.relu(self.b(x)))
        return x if self.training else x.softmax(-1)


def test_where_the_graph_serves_training_only_the_model_of_full_size_is_shipped() -> None:
    torch.manual_seed(0)
    model, x = Branching(), torch.randn(4, 8)
    sub = extract(fx_approx.transform(model, WIDE, x))
    assert not record_of(sub).own_forward
    refused = r"serves training only, .* fx_approx\.subnetworks\.restore\(sub, model\)"
    with pytest.raises(RuntimeError, match=refused):
        sub.eval()(x)
    for strict in (True, False):
        with pytest.raises(Exception, match=refused):
            torch.export.export(sub, (x,), strict=strict)
    compiled = torch.compile(sub.train(), backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), sub(x))
    full = restore(sub, model).eval()
    exported = torch.export.export(full, (x,)).module()(x)
    assert_close(exported, sub.train()(x).softmax(-1).detach())


def test_a_loaded_one_is_exported_as_well() -> None:
    build, _, _, _ = CASES["residual, own class"]
    sub, x = evaluating("residual, own class")
    stream = io.BytesIO()
    save(sub, stream)
    stream.seek(0)
    with torch.device("meta"):
        plain = build()
    again = load(stream, plain).eval()
    with torch.no_grad():
        assert_close(torch.export.export(again, (x,)).module()(x), sub(x))


def test_the_page_runs_and_prints_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "subnetworks.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    blocks = list(re.finditer(r"^```python\n(.*?)^```\n(?:\n```\n(.*?)^```$)?", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile("\n" * (text[: block.start()].count("\n") + 1) + block[1], "subnetworks.md", "exec"), namespace)
        printed = capsys.readouterr().out
        if block[2] is not None:
            assert printed == block[2]
    assert [path.name for path in tmp_path.iterdir()] == ["narrow.pt"]
