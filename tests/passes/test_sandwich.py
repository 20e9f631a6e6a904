"""Single operations between two layers: what the registry says of them is what happens, and the numbers are right."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fx_approx
from fx_approx.passes.operations import RULES, Rule
from fx_approx.passes.operations_page import page
from tests.helpers.hoisting import narrow_producers
from tests.repository.test_repository import REPOSITORY
from tests.sandwich import AHEAD, WIDTH, Compiled, Row, built, outcome, sandwiched
from tests.sandwich_rows import NETWORKS, ROWS

TOLERANCE = 1e-10
BY_NAME = {row.name: row for row in (*ROWS, *NETWORKS)}
COMPILED = (
    *("PReLU of a slope for each channel", "F.prelu", "torch.where(c, a, b)", "InstanceNorm2d with statistics"),
    *("GroupNorm", "F.batch_norm with statistics", "F.group_norm", "F.pad of channels with zeros", "F.conv2d"),
    *("a slice of channels", "depthwise F.conv2d", "depthwise ConvTranspose2d", "squeeze-excite by view(b, c)"),
    *("std over positions", "reshape as another", "grouped F.conv2d", "C2f", "SPPF"),
)


def passes(row: Row) -> bool:
    return row.goes in ("passes", "blocks")


def test_the_table_is_long_and_has_no_name_twice() -> None:
    assert len(BY_NAME) == len(ROWS) + len(NETWORKS) and len(ROWS) >= 145
    assert sum(map(passes, ROWS)) >= 80


@pytest.mark.parametrize("row", (*ROWS, *NETWORKS), ids=lambda row: row.name)
def test_an_operation_between_two_layers(row: Row) -> None:
    """Where it passes, the first layer computes what the last one reads; the oracle knows nothing of demand."""
    found = sandwiched(row)
    assert found.error <= TOLERANCE
    assert 0 < found.read <= row.reads // 2
    assert (found.computed < WIDTH) == passes(row)


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("frontend", ["dynamo", "transform"])
def test_compiled(name: str, frontend: str) -> None:
    """The Dynamo backend meets layers as functions on parameters; a transformed model is compiled as it is."""
    row = BY_NAME[name]
    model, x = built(row)
    torch._dynamo.reset()
    if frontend == "dynamo":
        approx = copy.deepcopy(model)
        compiled = Compiled(approx, lambda inner: fx_approx.backend(AHEAD, inner=inner))
    else:
        approx = fx_approx.transform(copy.deepcopy(model), AHEAD, x)
        compiled = Compiled(approx)
    found = outcome(model, approx, x, compiled)
    assert found.error <= TOLERANCE
    assert found.computed < WIDTH


def test_the_layers_inside_compute_less_too() -> None:
    """By hand from who reads what: every convolution but those whose result someone reads whole."""
    expected = {
        "C2f": {"first", "operation.enter", "operation.inner.0.a", "operation.inner.1.a", "operation.inner.1.b"},
        "SPPF": {"first", "operation.enter"},
        "U-Net": {"first", "operation.down", "operation.deep", "operation.up"},
    }
    for name, layers in expected.items():
        model, x = built(BY_NAME[name])
        assert narrow_producers(fx_approx.transform(model, AHEAD, x)) == layers, name


@pytest.mark.parametrize("mode", ["frozen", "exact"])
def test_other_modes(mode: str) -> None:
    """Normalisations by fixed statistics, and a layer in ``eval()``, which is exact."""
    for name in ("BatchNorm2d", "InstanceNorm2d with statistics", "GroupNorm"):
        model, x = built(BY_NAME[name])
        approx = fx_approx.transform(copy.deepcopy(model), AHEAD, x)
        if mode == "exact":
            assert torch.equal(approx.eval()(x), model.eval()(x))
            continue
        outcome(model, approx, x)
        for one in (model, approx):
            one.operation.eval()
        model.load_state_dict(approx.state_dict())
        found = outcome(model, approx, x)
        assert found.error <= TOLERANCE and found.computed < WIDTH


def _calls(rule: Rule, kind: type[nn.Module] | None, target: object) -> bool:
    return kind in rule.modules if kind is not None else any(target is call or target == call for call in rule.calls)


def test_every_family_of_the_registry_is_tried() -> None:
    """A rule without a row is a claim that no one has checked."""
    used: set[str] = set()
    for row in ROWS:
        model, x = built(row)
        for node in fx_approx.transform(copy.deepcopy(model), AHEAD, x)._fx_approx.program.stages[0][1].nodes:
            kind = type(model.get_submodule(node.target)) if node.op == "call_module" else None
            target = node.target if node.op in ("call_function", "call_method") else None
            used |= {rule.name for rule in RULES if _calls(rule, kind, target)}
    assert {rule.name for rule in RULES} - used == {"stochastic depth"}  # torchvision's own function


def test_the_page_is_what_the_registry_says() -> None:
    written = (REPOSITORY / "docs" / "operations.md").read_text(encoding="utf-8")
    assert written == page(), "docs/operations.md is not the output of fx_approx.passes.operations_page"
