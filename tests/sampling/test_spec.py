"""SamplerConfig, the registries, and the score kinds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fx_approx.sampling import SAMPLERS, SCORES, Crs, SamplerConfig, TopK, get_sampler, get_score, register_sampler


def test_defaults_and_round_trips() -> None:
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
    for one in (spec, SamplerConfig("crs", 0.25, 3, "weight", 8, 0.2)):
        assert SamplerConfig.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    assert SamplerConfig.from_dict({"ratio": 0.25}) == SamplerConfig(ratio=0.25)
    assert spec.replace(ratio=0.1, name="crs") == SamplerConfig("crs", 0.1)


WRONG: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    # Field: values that are out of range, and values of a wrong type.
    "ratio": ((0, -0.1, 1.0001, float("nan"), float("inf")), (True, "0.5", None, 1j)),
    "min_k": ((0, -3), (2.0, True)),
    "round_to": ((0,), ("8", False)),
    "epsilon": ((-0.1, 1.0, float("nan")), (True, "0.1")),
    "name": (("top-k",), (None,)),
    "scores": (("norms",), (3,)),
}


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_value_is_an_error_that_names_it(field: str) -> None:
    base = SamplerConfig(name="crs")
    for error, values in zip((ValueError, TypeError), WRONG[field], strict=True):
        for value in values:
            with pytest.raises(error) as caught:
                base.replace(**{field: value})
            message = str(caught.value)
            assert repr(value) in message
            assert field in message or (field == "name" and "sampler" in message)
            # What would be right: a range, a type, or the list of known names.
            assert any(word in message for word in ("expected", "known: "))


MESSAGES: list[tuple[Callable[[], Any], str]] = [
    (lambda: SamplerConfig(name="magic"), f"known: {', '.join(sorted(SAMPLERS))}$"),
    (lambda: SamplerConfig(scores="magic"), "ema, gradient, input, online, uniform, weight"),
    (lambda: get_score("ema?"), "ema, gradient, input, online, uniform, weight"),
    (lambda: SamplerConfig(epsilon=0.1), r"epsilon: topk .* got 0\.1"),
    (lambda: SamplerConfig("crs", epsilon=0.1).replace(name="topk"), "epsilon"),
    (lambda: SamplerConfig().count(-1), "pairs"),
    (lambda: SamplerConfig.from_dict({"ration": 0.5}), r"ration.*known: name, ratio"),
    (lambda: SamplerConfig().replace(ration=0.5), "ration"),
    (lambda: register_sampler(Crs), r"'crs' exists already"),
]


def test_messages() -> None:
    for call, message in MESSAGES:
        with pytest.raises(ValueError, match=message):
            call()


def test_effective_epsilon() -> None:
    for name in SAMPLERS:
        assert SamplerConfig(name=name).effective_epsilon == (0.0 if name == "topk" else 0.1)
    for name, epsilon in (("topk", 0.0), ("crs", 0.0), ("systematic", 0.25)):
        assert SamplerConfig(name=name, epsilon=epsilon).effective_epsilon == epsilon


# Ratio, min_k, round_to, pairs: the count.
COUNTS = [
    ((0.5, 1, 1, 10), 5),
    ((0.5, 1, 1, 5), 3),  # a half rounds up
    ((0.3, 1, 1, 10), 3),
    ((0.1, 1, 1, 10), 1),
    ((0.29, 1, 1, 50), 15),  # 14.5, which floating point makes 14.499999999999998
    ((0.57, 1, 1, 50), 29),
    ((1 / 6, 1, 1, 9), 2),
    ((0.14, 1, 1, 10), 1),
    ((0.15, 1, 1, 10), 2),
    ((0.01, 1, 1, 10), 1),  # never fewer than min_k
    ((0.01, 4, 1, 10), 4),
    ((0.01, 40, 1, 10), 10),  # never more than K
    ((0.5, 1, 16, 100), 48),  # 50 -> 48
    ((0.5, 1, 16, 112), 64),  # 56 is half way -> the upper multiple
    ((0.01, 1, 16, 100), 16),  # at least one multiple
    ((0.5, 1, 16, 10), 10),
    ((0.99, 1, 64, 100), 100),  # 99 -> 128 -> K
    ((0.5, 50, 16, 100), 50),
    ((1.0, 1, 16, 100), 100),  # not 96
    ((1, 1, 7, 3), 3),
    ((0.5, 1, 1, 1), 1),
    ((0.5, 1, 1, 0), 0),
]


def test_count() -> None:
    for (ratio, min_k, round_to, pairs), k in COUNTS:
        assert SamplerConfig(ratio=ratio, min_k=min_k, round_to=round_to).count(pairs) == k, (ratio, round_to, pairs)


@given(st.integers(1, 1000), st.integers(1, 1000), st.integers(1, 5000))
def test_count_follows_the_decimal_fraction_exactly(numerator: int, denominator: int, pairs: int) -> None:
    exact = Fraction(min(numerator, denominator), max(numerator, denominator))
    k = max(1, min(pairs, (exact * pairs + Fraction(1, 2)).__floor__()))
    assert SamplerConfig(ratio=float(exact)).count(pairs) == k


def test_sampler_registry() -> None:
    for name, sampler in SAMPLERS.items():
        assert get_sampler(name) is sampler and sampler.name == name
        assert sampler.random == (sampler.uniforms(9, 4) > 0)
    count = {"bernoulli": 9, "crs": 4, "systematic": 10, "topk": 0, "wta": 4, "wta_unique": 10}
    for name, uniforms in count.items():
        assert SAMPLERS[name].uniforms(9, 4) == uniforms
        assert SAMPLERS[name].unbiased == (name != "topk")
        assert SAMPLERS[name].fixed_size == (name != "bernoulli")
    with pytest.raises(TypeError):
        SAMPLERS["mine"] = TopK()  # type: ignore[index]


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
