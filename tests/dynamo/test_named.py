"""``backend="fx_approx"`` by the entry point that Dynamo looks up, with the policy of a call or of the environment."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

import fx_approx
from fx_approx.dynamo.named import compile_graph
from fx_approx.policies import Uniform

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = """
import torch
from torch import nn
model = lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
torch.compile(model(), backend="fx_approx")(torch.randn(8, 64)).sum().backward()
rows = lambda: {row.name: row.samples[0].ratio for row in sampling.report().rows if row.samples}
from fx_approx.dynamo import named  # nothing before this imports the package: torch does
sampling = named._current[0]
print(rows()["2"])
import fx_approx
sampling = fx_approx.set_default_policy(fx_approx.policies.Uniform(0.5, scores="online"))
torch.compile(model(), backend="fx_approx")(torch.randn(8, 64))
print(rows()["2"])
"""


def test_torch_finds_it_by_its_name(tmp_path: Path) -> None:
    """In a new process, where a folder beside the sources says what an installation would."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = tmp_path / "fx_approx_named-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fx_approx_named\nVersion: 1\n", encoding="utf-8")
    lines = [f"{name} = {place}" for name, place in project["entry-points"]["torch_dynamo_backends"].items()]
    (info / "entry_points.txt").write_text("\n".join(["[torch_dynamo_backends]", *lines]), encoding="utf-8")
    places = os.pathsep.join([str(tmp_path), str(Path(fx_approx.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": places, "FX_APPROX_POLICY": "topk:0.25:online"}
    inner = "import fx_approx.dynamo.backend as b, functools; b.backend.__kwdefaults__['inner'] = 'eager'\n"
    program = PROGRAM.replace("import torch\n", f"import torch\n{inner}", 1)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0.25", "0.5"]


@pytest.fixture
def policy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr("fx_approx.dynamo.named._current", [])
    return monkeypatch


def test_a_policy_that_is_set_comes_before_the_environment(policy_of_the_environment: pytest.MonkeyPatch) -> None:
    policy_of_the_environment.setenv("FX_APPROX_POLICY", "topk:0.25")
    assert fx_approx.set_default_policy().policy == Uniform(0.25)
    assert fx_approx.set_default_policy(Uniform(0.75)).policy == Uniform(0.75)
    policy_of_the_environment.delenv("FX_APPROX_POLICY")
    assert fx_approx.set_default_policy().policy == fx_approx.policies.DEFAULT_POLICY


def test_what_is_wrong_is_named(policy_of_the_environment: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="policy: expected a policy such as"):
        fx_approx.set_default_policy(0.5)  # type: ignore[arg-type]
    policy_of_the_environment.setenv("FX_APPROX_POLICY", "best:0.5")
    with pytest.raises(ValueError, match=r"FX_APPROX_POLICY: policy: expected exact, .* got 'best:0.5'"):
        compile_graph(torch.fx.symbolic_trace(nn.Linear(2, 2)), [])
