"""Dropout as a rival of sampling: where it is, and the rates at which both have the same noise."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fx_approx.sampling import SamplerConfig, get_sampler
from tests.examples.conftest import SMALL_MLP

CONFIG = f"""
title = "Tiny"
seeds = [0]
{SMALL_MLP}
[variants.exact]

[variants."Bernoulli 0.5"]
policy = {{ kind = "paper", ratio = 0.5, sampler = "bernoulli" }}

[variants.TopK]
policy = {{ kind = "paper", ratio = 0.5 }}

[variants.dropout]
dropout = {{ fc1 = 0.4, "fc[2-9]" = 0.2 }}
"""


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    return {"fc1": nn.Linear(8, 6), "relu": nn.ReLU(), "fc2": nn.Linear(6, 4)}


def made() -> nn.Sequential:
    model = nn.Sequential()
    for name, layer in layers().items():
        model.add_module(name, layer)
    return model


def test_what_the_layers_read_is_dropped_in_training_alone(scripts: SimpleNamespace) -> None:
    model, x = made(), torch.randn(5, 8)
    one, relu, two = layers().values()
    scripts.training.drop_inputs(model, {"fc1": 0.4, "fc2": 0.2})
    torch.manual_seed(2)
    found = model(x)
    torch.manual_seed(2)
    wanted = two(F.dropout(relu(one(F.dropout(x, 0.4))), 0.2))
    assert torch.equal(found, wanted) and not torch.equal(found, two(relu(one(x))))
    assert torch.equal(model.eval()(x), two(relu(one(x))))


def test_it_trains_as_long_as_exact_training_and_is_told_apart(
    scripts: SimpleNamespace, data: Path, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(CONFIG)
    arguments = [str(path), "--data", str(data), "--out", str(tmp_path / "out"), "--quiet", "--probe", "0"]
    scripts.run.main([*arguments, "--only", "exact", "dropout"])
    exact, dropped = scripts.records.read(tmp_path / "out" / "tiny.jsonl")
    assert dropped["options"]["dropout"] == {"fc1": 0.4, "fc[2-9]": 0.2} and "dropout" not in exact["options"]
    assert dropped["flops"] == exact["flops"] and dropped["full_steps"] == exact["full_steps"]
    assert dropped["epochs"][-1]["loss"] != exact["epochs"][-1]["loss"]
    pytest.importorskip("pandas")
    import summaries  # type: ignore[import-not-found]  # on the path of the scripts

    try:
        kinds = summaries.evaluated([exact, dropped]).found.kind
        assert dict(kinds) == {"exact": "exact", "dropout": "dropout"}
    finally:
        sys.modules.pop("summaries", None)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.75])
def test_at_the_equal_rate_a_layer_has_the_same_expected_error(scripts: SimpleNamespace, ratio: float) -> None:
    """Both by drawing: of 20,000 draws each the mean squared error is known to a per cent or two."""
    draws, x, layer = 20_000, torch.randn(3, 12).double(), nn.Linear(12, 5).double().requires_grad_(False)
    x = x * torch.logspace(-1, 0.5, 12).double()
    spec = SamplerConfig("bernoulli", ratio)
    found = scripts.equal_noise.error_ratio(x, layer.weight, spec)
    rate = found / (1 + found)
    exact = layer(x)
    scores = x.norm(dim=0) * layer.weight.norm(dim=0)
    uniforms = torch.rand(draws, 12, dtype=torch.float64)
    indices, scale = get_sampler("bernoulli").draw(
        scores.expand(draws, -1), spec.count(12), uniforms, epsilon=spec.effective_epsilon
    )
    assert scale is not None
    factors = x.new_zeros(draws, 1, 12).scatter(2, indices[:, None], scale[:, None])
    sampled = (layer(x * factors) - exact).square().sum() / draws
    dropped = (layer(F.dropout(x.expand(draws, -1, -1), rate)) - exact).square().sum() / draws
    assert float(sampled) == pytest.approx(float(dropped), rel=0.05)


def test_the_command_prints_a_rate_for_each_sampled_layer(
    scripts: SimpleNamespace, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(CONFIG)
    scripts.equal_noise.main([str(path), "--data", str(data), "--every", "1"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("fc")]
    assert [row[0] for row in rows] == ["fc1", "fc2"]  # not the classifier, which is exact
    for _, mean, first, last, rate in rows:
        assert float(rate) == pytest.approx(float(mean) / (1 + float(mean)), abs=2e-3)
        assert float(mean) > 0 and float(first) != float(last)
    other = {"TopK": "expected bernoulli and online scores of linear layers", "exact": "expected one that samples"}
    for variant, message in other.items():
        with pytest.raises(SystemExit):
            scripts.equal_noise.main([str(path), "--data", str(data), "--variant", variant])
        assert message in capsys.readouterr().err
