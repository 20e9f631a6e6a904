"""Single operations between two layers: what the registry says of them is what happens, and the numbers are right."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

import fx_approx
from fx_approx.passes.operations import RULES, Rule
from fx_approx.passes.operations_page import page
from tests.helpers.hoisting import narrow_producers
from tests.helpers.quick import quick
from tests.repository.test_repository import REPOSITORY
from tests.sandwich import AHEAD, WIDTH, Compiled, Row, built, outcome
from tests.sandwich_rows import NETWORKS, ROWS

TOLERANCE = 1e-10
BY_NAME = {row.name: row for row in (*ROWS, *NETWORKS)}
# Operations that need more than one stage of the compiler, each met by one of the frontends.
_QUICK = {("transform", "GroupNorm")}
_COMPILED = (
    *(("transform", name) for name in ("PReLU of a slope for each channel", "InstanceNorm2d with statistics", "SPPF")),
    *(("transform", name) for name in ("GroupNorm", "F.pad of channels with zeros", "a slice of channels", "C2f")),
    *(("transform", name) for name in ("depthwise ConvTranspose2d", "std over positions", "torch.where(c, a, b)")),
    *(("dynamo", name) for name in ("F.prelu", "F.batch_norm with statistics", "F.group_norm", "F.conv2d", "SPPF")),
    *(("dynamo", name) for name in ("depthwise F.conv2d", "grouped F.conv2d", "reshape as another", "C2f")),
    *(("dynamo", name) for name in ("squeeze-excite by view(b, c)", "InstanceNorm2d with statistics")),
)
COMPILED = quick(_COMPILED, lambda *case: case in _QUICK)


def passes(row: Row) -> bool:
    return row.goes in ("passes", "blocks")


def test_the_table_is_long_and_has_no_name_twice() -> None:
    assert len(BY_NAME) == len(ROWS) + len(NETWORKS) and len(ROWS) >= 145
    assert sum(map(passes, ROWS)) >= 80


@functools.cache
def transformed(row: Row) -> tuple[nn.Module, nn.Module, Tensor]:
    """The sandwich, its transform, and an input."""
    model, x = built(row)
    return model, fx_approx.transform(copy.deepcopy(model), AHEAD, x), x


@pytest.mark.parametrize("row", (*ROWS, *NETWORKS), ids=lambda row: row.name)
def test_an_operation_between_two_layers(row: Row) -> None:
    """Where it passes, the first layer computes what the last one reads; the oracle knows nothing of demand."""
    found = outcome(*transformed(row))
    assert found.error <= TOLERANCE
    assert 0 < found.read <= row.reads // 2
    assert (found.computed < WIDTH) == passes(row)


@pytest.mark.parametrize("frontend, name", COMPILED)
def test_compiled(frontend: str, name: str) -> None:
    """The Dynamo backend meets layers as functions on parameters; a transformed model is compiled as it is."""
    model, x = built(BY_NAME[name])
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
        assert narrow_producers(transformed(BY_NAME[name])[1]) == layers, name


def test_frozen_statistics_and_evaluation() -> None:
    """Normalisations by fixed statistics, and a layer in ``eval()``, which is exact."""
    for name in ("BatchNorm2d", "InstanceNorm2d with statistics", "GroupNorm"):
        model, x = built(BY_NAME[name])
        approx = fx_approx.transform(copy.deepcopy(model), AHEAD, x)
        assert torch.equal(approx.eval()(x), model.eval()(x))
        model.train(), approx.train()
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
        model, approx, _ = transformed(row)
        for node in approx._fx_approx.program.stages[0][1].nodes:
            kind = type(model.get_submodule(node.target)) if node.op == "call_module" else None
            target = node.target if node.op in ("call_function", "call_method") else None
            used |= {rule.name for rule in RULES if _calls(rule, kind, target)}
    assert {rule.name for rule in RULES} - used == {"stochastic depth"}  # torchvision's own function


def test_the_page_is_what_the_registry_says() -> None:
    written = (REPOSITORY / "docs" / "operations.md").read_text(encoding="utf-8")
    assert written == page(), "docs/operations.md is not the output of fx_approx.passes.operations_page"
