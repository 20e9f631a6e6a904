"""Scalars: tags, values, and what is refused."""

from __future__ import annotations

import pytest

import fx_approx
from fx_approx.analysis import ScalarLogger
from tests.policies.test_budget import IMAGES
from tests.schedules.test_scheduler import Writer, transformed


def test_savings_are_those_of_the_report() -> None:
    writer, model = Writer(), transformed()
    report = fx_approx.report(model)
    ScalarLogger(writer, "run").savings(report, 7)
    found = {tag: value for tag, value, step in writer.written if step == 7}
    assert found["run/saved_flops"] == report.totals.saved_net
    assert found["run/saved_memory"] == pytest.approx(1 - report.totals.memory / report.totals.memory_exact)
    assert found["run/saved/3.conv1"] == report["3.conv1"].saved
    assert not any("coverage" in tag or "selection" in tag for tag in found)  # neither is known here


def test_errors_are_those_of_the_noise_report() -> None:
    writer, model = Writer(), transformed()
    report = fx_approx.analysis.gradient_noise(model, IMAGES, lambda output: output.square().mean())
    ScalarLogger(writer).noise(report, 3)
    found = {tag: value for tag, value, _ in writer.written}
    assert found["fx_approx/error/gradient"] == report.step.error > 0
    assert found["fx_approx/error/3.conv1"] == report["3.conv1"].output.error


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"writer: expected add_scalar\(tag, value, step\)"):
        ScalarLogger(print)
    with pytest.raises(TypeError, match="prefix: expected text"):
        ScalarLogger(Writer(), 3)  # type: ignore[arg-type]
