"""SamplerConfig, the registries, and the score kinds."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fx_approx.sampling import SAMPLERS, SCORES, Crs, SamplerConfig, TopK, get_sampler, get_score, register_sampler


def test_defaults() -> None:
    spec = SamplerConfig()
    assert spec.to_dict() == {
        "name": "topk",
        "ratio": 0.5,
        "min_k": 1,
        "scores": "online",
        "round_to": 1,
        "epsilon": None,
        "positions": False,
        "per_batch": False,
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.ratio = 0.1  # type: ignore[misc]
    assert hash(spec) == hash(SamplerConfig())


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("ratio", 0, ValueError),
        ("ratio", -0.1, ValueError),
        ("ratio", 1.0001, ValueError),
        ("ratio", float("nan"), ValueError),
        ("ratio", float("inf"), ValueError),
        ("ratio", True, TypeError),
        ("ratio", "0.5", TypeError),
        ("ratio", None, TypeError),
        ("ratio", 1j, TypeError),
        ("min_k", 0, ValueError),
        ("min_k", -3, ValueError),
        ("min_k", 2.0, TypeError),
        ("min_k", True, TypeError),
        ("round_to", 0, ValueError),
        ("round_to", "8", TypeError),
        ("round_to", False, TypeError),
        ("epsilon", -0.1, ValueError),
        ("epsilon", 1.0, ValueError),
        ("epsilon", float("nan"), ValueError),
        ("epsilon", True, TypeError),
        ("epsilon", "0.1", TypeError),
        ("name", "top-k", ValueError),
        ("name", None, TypeError),
        ("scores", "norms", ValueError),
        ("scores", 3, TypeError),
    ],
)
def test_a_wrong_value_is_an_error_that_names_it(field: str, value: Any, error: type[Exception]) -> None:
    base = SamplerConfig(name="crs")
    with pytest.raises(error) as caught:
        base.replace(**{field: value})
    message = str(caught.value)
    assert repr(value) in message
    assert field in message or (field == "name" and "sampler" in message)
    # What would be right: a range, a type, or the list of known names.
    assert any(word in message for word in ("expected", "known: "))


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match="bernoulli, crs, systematic, topk"):
        SamplerConfig(name="magic")
    with pytest.raises(ValueError, match="ema, gradient, input, online, uniform, weight"):
        SamplerConfig(scores="magic")


def test_topk_takes_no_epsilon() -> None:
    with pytest.raises(ValueError, match=r"epsilon: topk .* got 0\.1"):
        SamplerConfig(epsilon=0.1)
    assert SamplerConfig(epsilon=0.0).effective_epsilon == 0.0


@pytest.mark.parametrize(
    ("name", "epsilon", "effective"),
    [
        ("topk", None, 0.0),
        ("crs", None, 0.1),
        ("bernoulli", None, 0.1),
        ("systematic", None, 0.1),
        ("wta", None, 0.1),
        ("wta_unique", None, 0.1),
        ("crs", 0.0, 0.0),
        ("systematic", 0.25, 0.25),
    ],
)
def test_effective_epsilon(name: str, epsilon: float | None, effective: float) -> None:
    assert SamplerConfig(name=name, epsilon=epsilon).effective_epsilon == effective


@pytest.mark.parametrize(
    ("ratio", "min_k", "round_to", "pairs", "k"),
    [
        (0.5, 1, 1, 10, 5),
        (0.5, 1, 1, 5, 3),  # a half rounds up
        (0.3, 1, 1, 10, 3),
        (0.1, 1, 1, 10, 1),
        (0.29, 1, 1, 50, 15),  # 14.5, which floating point makes 14.499999999999998
        (0.57, 1, 1, 50, 29),
        (1 / 6, 1, 1, 9, 2),
        (0.14, 1, 1, 10, 1),
        (0.15, 1, 1, 10, 2),
        (0.01, 1, 1, 10, 1),  # never fewer than min_k
        (0.01, 4, 1, 10, 4),
        (0.01, 40, 1, 10, 10),  # never more than K
        (0.5, 1, 16, 100, 48),  # 50 -> 48
        (0.5, 1, 16, 112, 64),  # 56 is half way -> the upper multiple
        (0.01, 1, 16, 100, 16),  # at least one multiple
        (0.5, 1, 16, 10, 10),
        (0.99, 1, 64, 100, 100),  # 99 -> 128 -> K
        (0.5, 50, 16, 100, 50),
        (1.0, 1, 16, 100, 100),  # not 96
        (1, 1, 7, 3, 3),
        (0.5, 1, 1, 1, 1),
        (0.5, 1, 1, 0, 0),
    ],
)
def test_count(ratio: float, min_k: int, round_to: int, pairs: int, k: int) -> None:
    spec = SamplerConfig(ratio=ratio, min_k=min_k, round_to=round_to)
    assert spec.count(pairs) == k


@given(st.integers(1, 1000), st.integers(1, 1000), st.integers(1, 5000))
def test_count_follows_the_decimal_fraction_exactly(numerator: int, denominator: int, pairs: int) -> None:
    exact = Fraction(min(numerator, denominator), max(numerator, denominator))
    k = max(1, min(pairs, (exact * pairs + Fraction(1, 2)).__floor__()))
    assert SamplerConfig(ratio=float(exact)).count(pairs) == k


def test_negative_pairs() -> None:
    with pytest.raises(ValueError, match="pairs"):
        SamplerConfig().count(-1)


@pytest.mark.parametrize("spec", [SamplerConfig(), SamplerConfig("crs", 0.25, 3, "weight", 8, 0.2)])
def test_round_trip(spec: SamplerConfig) -> None:
    assert SamplerConfig.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_unknown_fields() -> None:
    with pytest.raises(ValueError, match=r"ration.*known: name, ratio"):
        SamplerConfig.from_dict({"ration": 0.5})
    with pytest.raises(ValueError, match="ration"):
        SamplerConfig().replace(ration=0.5)
    assert SamplerConfig.from_dict({"ratio": 0.25}) == SamplerConfig(ratio=0.25)


def test_replace_checks_again() -> None:
    assert SamplerConfig().replace(ratio=0.1, name="crs") == SamplerConfig("crs", 0.1)
    with pytest.raises(ValueError, match="epsilon"):
        SamplerConfig("crs", epsilon=0.1).replace(name="topk")


def test_sampler_registry() -> None:
    assert sorted(SAMPLERS) == ["bernoulli", "crs", "systematic", "topk", "wta", "wta_unique"]
    for name, sampler in SAMPLERS.items():
        assert get_sampler(name) is sampler and sampler.name == name
        assert sampler.random == (sampler.uniforms(9, 4) > 0)
    assert [name for name in SAMPLERS if not SAMPLERS[name].unbiased] == ["topk"]
    assert [name for name in SAMPLERS if not SAMPLERS[name].fixed_size] == ["bernoulli"]
    assert {name: SAMPLERS[name].uniforms(9, 4) for name in SAMPLERS} == {
        "bernoulli": 9,
        "crs": 4,
        "systematic": 10,
        "topk": 0,
        "wta": 4,
        "wta_unique": 10,
    }
    with pytest.raises(TypeError):
        SAMPLERS["mine"] = TopK()  # type: ignore[index]
    with pytest.raises(ValueError, match=r"'crs' exists already"):
        register_sampler(Crs)


def test_score_kinds() -> None:
    assert {name: set(kind.reads) for name, kind in SCORES.items()} == {
        "online": {"input", "weight", "gradient"},
        "weight": {"weight"},
        "input": {"input"},
        "gradient": {"gradient"},
        "ema": {"input"},
        "uniform": set(),
    }
    assert {name for name, kind in SCORES.items() if kind.ahead} == {"weight", "ema", "uniform"}
    assert {name for name, kind in SCORES.items() if kind.early} == {"weight", "input", "ema", "uniform"}
    of_output = {name for name, kind in SCORES.items() if "output" in kind.products}
    assert of_output == {"online", "weight", "input", "ema", "uniform"}
    assert {name for name, kind in SCORES.items() if kind.learns} == {"ema"}
    assert get_score("weight") is SCORES["weight"]
    with pytest.raises(ValueError, match="ema, gradient, input, online, uniform, weight"):
        get_score("ema?")
