"""The command line: formats, wrong arguments, nothing but the report on stdout."""

from __future__ import annotations

import csv
import importlib.machinery
import importlib.util
import inspect
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fx_approx
from fx_approx import recipes
from fx_approx.__main__ import main
from fx_approx.core.policy_names import POLICIES, SAMPLERS, form
from tests.helpers import torchvision_compat

COMPAT = Path(torchvision_compat.__file__)
MODELS = """
import torch
from torch import nn

print("imported")
ready = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
number = 3


class Nets:
    @staticmethod
    def small(width=8, name="x"):
        print("built", name)
        return nn.Sequential(nn.Linear(8, width), nn.Linear(width, 2))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.fc = nn.Embedding(10, 8), nn.Linear(8, 6)

    def forward(self, tokens, bias):
        return self.fc(self.table(tokens)) + bias


class Loops(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Branch()

    def forward(self, x):
        return self.inner(x)


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else x


def broken():
    raise RuntimeError("out of luck")
"""


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "climodels.py").write_text(MODELS)
    (tmp_path / "cliloaded.py").write_text("import a_missing_dependency\n")
    (tmp_path / "clivision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("climodels", "cliloaded", "clivision"):
        sys.modules.pop(name, None)


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["explain", "climodels:Nets.small", "--input", "4x8", "--policy", "topk:0.5"]
    assert main([*arguments, "--kwarg", "width=16", "--kwarg", "name=it is"]) == 0
    said = capsys.readouterr()
    assert "8 of 16" in said.out
    assert "2 of 2 multiplies sampled" in said.out
    assert "imported" not in said.out
    assert said.err == "imported\nbuilt it is\n"


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "climodels:ready", "--input", "4x8", "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in report["rows"]] == ["0", "1"]
    assert report["totals"]["exact"]["output"] == 2 * 4 * (8 * 4 + 4 * 2)


def test_csv(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "climodels:ready", "--input", "4x8", "--policy", "topk", "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["output_k"] for row in rows] == ["4", "2"]


@pytest.mark.parametrize(("form", "begin"), [("md", "| layer"), ("html", "<!DOCTYPE html>")])
def test_columns(form: str, begin: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "climodels:ready", "--input", "4x8", "--format", form, "--columns", "layer,k,why"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(begin)
    assert "sampler" not in said
    assert "k of K" in said


def test_several_inputs_with_types(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["explain", "climodels:Two", "--input", "3x5:int64", "--input", "6", "--format", "json"]
    assert main(arguments) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["shape"] == "(15, 6, 8)"


def test_inputs_take_no_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "climodels:ready", "--input", "1000000000000x8", "--columns", "layer,shape"]) == 0
    assert "1000000000000" in capsys.readouterr().out


def test_what_is_not_traced_is_a_warning_or_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "climodels:Loops", "--input", "4x8"]) == 0
    said = capsys.readouterr()
    assert "inner" in said.out
    assert "Traceback" not in said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["explian"], "argument COMMAND: invalid choice: 'explian'"),
        (["explain"], "the following arguments are required: MODULE:CALLABLE"),
        (["explain", "climodels"], "expected module:callable such as torchvision.models:resnet50"),
        (["explain", "climodels:"], "expected module:callable"),
        (["explain", "no_such_thing.inner:net"], "there is no module 'no_such_thing'"),
        (["explain", "climodels:Nest"], "climodels has no 'Nest'; it has Nets"),
        (["explain", "climodels:Nets.large"], "climodels.Nets has no 'large'"),
        (["explain", "climodels:number"], "climodels.number is not callable, it is a int"),
        (["explain", "builtins:dict"], "builtins.dict() returned a dict, expected a torch.nn.Module"),
        (["explain", "climodels:broken"], "climodels.broken() failed: RuntimeError: out of luck"),
        (["explain", "climodels:Nets.small", "--kwarg", "depth=3"], "climodels.Nets.small(depth=3) failed: TypeError"),
        (["explain", "climodels:ready", "--kwarg", "x=1"], "argument --kwarg: climodels.ready is a model already"),
        (["explain", "climodels:ready", "--kwarg", "x"], "argument --kwarg: expected NAME=VALUE"),
        (["explain", "climodels:ready", "--input", "4x"], "argument --input: expected positive sizes"),
        (["explain", "climodels:ready", "--input", "0x8"], "argument --input: expected positive sizes"),
        (["explain", "climodels:ready", "--input", "4x8:float33"], "argument --input: expected a dtype of torch"),
        (["explain", "climodels:ready", "--input", "4x8:nn"], "argument --input: expected a dtype of torch"),
        (["explain", "climodels:ready", "--input", "9999999999x9999999999x8"], "argument --input: "),
        (["explain", "climodels:ready", "--input", "4x9"], "argument --input: the model does not run on them: at 0"),
        (["explain", "climodels:ready", "--input", "4x8", "--input", "4"], "argument --input: "),
        (["explain", "climodels:ready", "--policy", "best:0.5"], "argument --policy: expected exact, paper, backward,"),
        (["explain", "climodels:ready", "--policy", "topk:2"], "argument --policy: ratio: expected a number in (0, 1]"),
        (["explain", "climodels:ready", "--policy", "topk:0.5:best"], "argument --policy: "),
        (["explain", "climodels:ready", "--format", "yaml"], "argument --format: invalid choice: 'yaml'"),
        (["explain", "climodels:ready", "--columns", "layer,K"], "argument --columns: expected names from layer"),
        (["explain", "climodels:ready", "--columns", "k", "--format", "csv"], "argument --columns: only for"),
        (["explain", "climodels:ready", "--rows", "all", "--format", "md"], "argument --rows: only for --format text"),
        (["explain", "climodels:ready", "--rows", "some"], "argument --rows: invalid choice: 'some'"),
        (["explain", "climodels:ready", "--policy", "topk:0.5:online", "--time"], "argument --input: example_inputs: "),
        (["explain", "climodels:ready"], "argument --input: "),
        (
            ["explain", "climodels:ready", "--input", "4x8", "--policy", "flops:0.01"],
            "argument --policy: budget: 0.01 of the exact step cannot be met",
        ),
        (["predict", "climodels:ready"], "argument --input: predict needs the shapes of one training batch, such as"),
        (["verify", "climodels:ready"], "argument --input: verify needs the shapes of one training batch, such as"),
        (["predict", "climodels:ready", "--input", "4x9"], "argument --input: the model does not run on them: at 0"),
        (["verify", "climodels:ready", "--input", "4x9"], "argument --input: the model does not run on them: at 0"),
        (["recipe", "best", "climodels:ready"], "argument recipe: invalid choice: 'best'"),
        (["recipe", "finetune", "climodels:ready"], "argument --input: recipe needs the shapes of one training batch"),
        (["recipe", "finetune", "climodels:ready", "--input", "4x9"], "argument --input: the model does not run on"),
        (
            ["recipe", "pretrain", "climodels:ready", "--input", "4x8", "--ratio", "2"],
            "argument --ratio: expected a number in (0, 1]",
        ),
        (
            ["recipe", "pretrain", "climodels:ready", "--input", "4x8", "--steps", "0"],
            "argument --steps: expected an integer of at least 1, got 0",
        ),
        (["explain", "climodels:ready", "--setup", "nowhere.py"], "argument --setup: nowhere.py is no file"),
        (["explain", "torch.nn:LazyLinear", "--kwarg", "out_features=3"], "MODULE:CALLABLE: torch.nn:LazyLinear: "),
    ],
)
def test_wrong_argument(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    said = capfd.readouterr()
    assert said.out == ""
    lines = [line for line in said.err.splitlines() if line != "imported"]
    assert len(lines) == 1
    assert lines[0].startswith("fx_approx: error: ")
    assert message in lines[0]


def test_an_import_that_fails_inside(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "cliloaded:net"]) == 2
    assert "import cliloaded failed: ModuleNotFoundError: No module named 'a_missing" in capsys.readouterr().err


def test_torchvision_for_another_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "clivision:net"]) == 2
    said = capsys.readouterr().err
    assert "built for another torch" in said
    assert "--setup FILE" in said


def test_setup_runs_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup = tmp_path / "setup_first.py"
    setup.write_text("import sys, types\nif __name__ == '__main__':\n    sys.modules['a_missing_dependency'] = sys\n")
    try:
        assert main(["explain", "cliloaded:net", "--setup", str(setup)]) == 2
    finally:
        sys.modules.pop("a_missing_dependency")
    assert "cliloaded has no 'net'" in capsys.readouterr().err


def test_setup_that_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.py").write_text("1 / 0\n")
    assert main(["explain", "climodels:ready", "--setup", str(tmp_path / "bad.py")]) == 2
    assert "bad.py failed: ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.slow
def test_as_a_command(tmp_path: Path) -> None:
    # In a fresh process torchvision may need its schemas.
    arguments = ["explain", "torchvision.models:resnet18", "--input", "2x3x32x32", "--policy", "topk:0.5"]
    command = [sys.executable, "-m", "fx_approx", *arguments, "--setup", str(COMPAT)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert "21 of 21 multiplies sampled" in ended.stdout
    assert "layer4.0.conv2" in ended.stdout


# ---- what is not explain


def test_predict(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    device = fx_approx.policies.Device("made up", "torch.float32", 1e9, 1e9, 1e9, 1e-6, 1.0, 1.0, 1.0, 1.0)
    monkeypatch.setattr("fx_approx.policies.cost_roofline._calibrated", lambda *_: device)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["predict", "climodels:Nets.small", "--kwarg", "width=64", "--input", "4x8", "--policy", "topk"]) == 0
    said = capsys.readouterr().out
    model, x = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 2)), torch.empty(4, 8)
    found = fx_approx.analysis.estimate_step_time(model, fx_approx.policies.Uniform(0.5), x)
    assert said.startswith("Sequential under topk:\n")
    assert str(found) in " ".join(said.split()) and max(map(len, said.splitlines())) <= 80
    assert main(["explain", "climodels:ready", "--input", "4x8", "--time"]) == 0
    assert "Time, predicted: " in capsys.readouterr().out


def test_predict_checks_on_random_inputs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def estimate(model: nn.Module, policy: Any, inputs: Any, **how: Any) -> str:
        seen.extend((inputs, how))
        return "an estimate"

    monkeypatch.setattr("fx_approx.cli.commands.estimate_step_time", estimate)
    arguments = ["predict", "climodels:Two", "--input", "3x5:int64", "--input", "6", "--check", "--compiled"]
    assert main(arguments) == 0 and main(arguments) == 0
    (tokens, bias), how, again, _ = seen
    assert tokens.dtype == torch.int64 and set(tokens.flatten().tolist()) == {0, 1} and bias.shape == (6,)
    assert torch.equal(bias, again[1]) and bias.std() > 0, "the same in every run"
    assert how == {"check": True, "compiled": True} and "an estimate" in capsys.readouterr().out


def test_verify(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["verify", "climodels:Nets.small", "--kwarg", "width=64", "--input", "4x8"]) == 0
    said = capsys.readouterr().out
    assert "With and without demand: the same numbers" in said and "gradient" in said
    wrong = SimpleNamespace(passed=False)
    monkeypatch.setattr("fx_approx.cli.commands.verify", lambda model, inputs: wrong)
    assert main(["verify", "climodels:Nets.small", "--input", "4x8"]) == 1


ALL = [name for name in recipes.__all__ if inspect.isfunction(getattr(recipes, name))]


def test_recipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    plain = recipes.finetune

    def finetune(model: nn.Module, batch: Any, steps: int, **options: Any) -> recipes.Recipe:
        given.extend((batch, steps, options, {id(p) for p in model.parameters()}))
        return plain(model, batch, steps, check=False, **options)

    monkeypatch.setattr(recipes, "finetune", finetune)
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ["recipe", "finetune", "climodels:Nets.small", "--kwarg", "width=64", "--input", "4x8"]
    assert main([*arguments, "--steps", "300", "--ratio", "0.25"]) == 0
    (batch,), steps, options, parameters = given
    assert batch.shape == (4, 8) and (steps, options["ratio"], options["compile"]) == (300, 0.25, False)
    assert {id(p) for p in options["optimizer"].param_groups[0]["params"]} == parameters, "a narrow network trains"
    said = capsys.readouterr().out
    assert said.startswith("finetune: 300 steps of Sequential\n  0.25 of the hidden units, kept: ")
    assert "16 of 64" in said and max(map(len, said.splitlines())) <= 80


def test_a_recipe_that_would_not_pay_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "transformer", "climodels:ready", "--input", "4x8"]) == 0
    said = capsys.readouterr().out
    assert "exact: no tokens can be sampled" in said and "0 of 2 multiplies sampled" in said


@pytest.mark.parametrize("name", ALL)
def test_its_help_has_the_ratios_that_recipes_take(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["recipe", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    ratio = inspect.signature(getattr(recipes, name)).parameters["ratio"].default
    assert f"{ratio:g} of {name}" in said and f"{{{','.join(ALL)}}}" in said


def test_without_shapes_it_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "climodels:ready", "--policy", "topk:0.5:online"]) == 0
    said = capsys.readouterr().out
    assert "not known without shapes" in said and "--input" in said and " 0 exact" not in said


@pytest.mark.parametrize(("columns", "most"), [(None, 100), ("80", 80), ("61", 61)])
def test_it_fits(columns: str | None, most: int, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    if columns is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", columns)
    main(["explain", "tests.savings.test_report_text:vit_alone", "--input", "2x3x32x32"])
    said = capsys.readouterr().out
    assert 40 < max(map(len, said.splitlines())) <= most


@pytest.mark.parametrize("command", [[], ["explain"], ["predict"], ["verify"]])
def test_help_names_every_policy_in_a_line(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0 and max(map(len, lines)) <= 100
    for name in (*map(form, POLICIES), *SAMPLERS):
        (line,) = (line for line in lines if line.startswith(f"  {name} "))
        assert len(line.split()) > 2


WITHOUT_TORCH = """
import contextlib, io, sys
from fx_approx.__main__ import main
for arguments in (["--help"], ["--version"], ["predict", "--help"], ["explain"], ["explain", "no_such_thing:net"],
                  ["predict", "fx_approx:net"], ["explain", "a:b", "--policy", "best"], ["expalin"]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            assert main(arguments) == 2, arguments
        except SystemExit as ended:
            assert ended.code == 0
    assert out.getvalue()
print("torch" in sys.modules)
"""


def test_help_and_wrong_arguments_need_no_torch() -> None:
    ended = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, cwd=Path.cwd())
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["False"]


# ---- the helper that makes torchvision importable


class Machine:
    """A torchvision with libraries of these names, of which ``good`` loads and has the operators."""

    def __init__(self, folder: Path, good: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
        spec = importlib.machinery.ModuleSpec("torchvision", None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        self.good, self.tried, self.defined = good, list[str](), list[str]()
        self.loaded = False
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
        monkeypatch.setattr(torch.ops, "load_library", self.load)
        monkeypatch.setattr(torch.library, "Library", lambda name, kind: self)
        monkeypatch.setattr(torchvision_compat, "_are_defined", lambda: self.loaded)
        monkeypatch.setattr(torch.ops.torchvision, "fx_approx_schemas", None, raising=False)
        for name in ("_C_renamed.so", "image.so", "extension.py"):
            (folder / name).touch()

    def load(self, path: str) -> None:
        self.tried.append(Path(path).name)
        if Path(path).name != self.good:
            raise OSError("libcudart.so: cannot open shared object file")
        self.loaded = True

    def define(self, schema: str) -> None:
        self.defined.append(schema.partition("(")[0])


def test_no_schema_beside_a_library_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path, "_C_renamed.so", monkeypatch)
    torchvision_compat.define_missing_schemas()
    assert machine.tried == ["_C_renamed.so"] and machine.defined == []


def test_schemas_where_no_library_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path, None, monkeypatch)
    torchvision_compat.define_missing_schemas()
    assert machine.tried == ["_C_renamed.so", "image.so"] and machine.defined == ["nms", "qnms"]
