"""The one table of samplers x ops x dtypes that every contract test walks.

A new op or sampler is one row here; ``tests/ops/test_table.py`` fails until it has one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from fx_approx.sampling import SAMPLERS, SamplerConfig
from tests.op_case import (
    LAYOUTS,
    OpCase,
    Operands,
    added_case,
    conv_case,
    einsum_case,
    gradients,
    linear_case,
    product_case,
    upstream,
)

__all__ = [
    "DTYPES",
    "GRADIENT_CASES",
    "LAYOUTS",
    "OP_CASES",
    "SAMPLER_CASES",
    "OpCase",
    "Operands",
    "SamplerCase",
    "gradients",
    "upstream",
]

OP_CASES: dict[str, OpCase] = {
    case.name: case
    for case in (
        linear_case("linear", (3, 6), (4, 6), bias=True),
        linear_case("linear-no-bias-4d", (2, 1, 3, 5), (4, 5), bias=False),
        linear_case("linear-1d", (6,), (4, 6), bias=True, vector=True),
        conv_case("conv1d", (2, 5, 7), (4, 5, 3), stride=2, padding=1),
        conv_case("conv1d-unbatched-grouped", (6, 8), (4, 3, 3), groups=2, dilation=2),
        conv_case("conv2d", (2, 5, 5, 4), (3, 5, 3, 2)),
        conv_case("conv2d-1x1", (2, 6, 3, 3), (4, 6, 1, 1), bias=False),
        conv_case("conv2d-same", (2, 4, 5, 4), (3, 4, 3, 3), padding="same", dilation=(1, 2)),
        conv_case("conv2d-grouped", (2, 8, 5, 5), (4, 4, 3, 3), groups=2, stride=(2, 1), padding=(1, 0)),
        conv_case("conv2d-unbatched", (4, 5, 4), (3, 4, 2, 3), stride=2, padding=1, dilation=(2, 1)),
        conv_case("conv3d", (1, 4, 4, 3, 4), (2, 4, 2, 3, 1), padding="valid", stride=(1, 1, 2)),
        conv_case("conv3d-grouped", (2, 6, 3, 3, 3), (4, 3, 2, 2, 2), bias=False, groups=2, padding=1, stride=2),
        product_case("matmul", (3, 6), (6, 2)),
        product_case("matmul", (2, 3, 5), (5, 4), "matmul-folded"),
        product_case("matmul", (2, 1, 3, 5), (4, 5, 2), "matmul-broadcast"),
        product_case("mm", (3, 6), (6, 2)),
        product_case("bmm", (3, 2, 5), (3, 5, 4), input=0, mat2=0),
        added_case("addmm", (3, 2), (3, 5), (5, 2), "addmm", {"input": 0, "mat1": 0}, beta=0.5, alpha=-1.5),
        added_case("addmm", (2,), (3, 5), (5, 2), "addmm-bias", {"mat1": 0}),
        added_case(
            "baddbmm",
            (2, 3, 2),
            (2, 3, 5),
            (2, 5, 2),
            "baddbmm",
            {"input": 0, "batch1": 0, "batch2": 0},
            beta=-0.5,
            alpha=2.0,
        ),
        einsum_case("einsum-linear", "bti,oi->bto", "bti oi bto", "i", {"b": 2, "t": 3, "i": 5, "o": 4}, "b"),
        einsum_case(
            "einsum-batch",
            "bhqd,bhkd->bhqk",
            "bhqd bhkd bhqk",
            "d",
            {"b": 2, "h": 2, "q": 3, "k": 2, "d": 5},
            "b",
        ),
        einsum_case(
            "einsum-two-contracted",
            "bhd,hdo->bo",
            "bhd hdo bo",
            "h",
            {"b": 3, "h": 5, "d": 2, "o": 4},
            "b",
            proxy=True,
        ),
        einsum_case("einsum-implicit-turned", "ki, jk", "ki jk ij", "k", {"k": 6, "i": 3, "j": 2}, "i"),
        einsum_case(
            "einsum-row-summed",
            "bik,kj->jb",
            "bik kj jb",
            "k",
            {"b": 3, "i": 2, "k": 5, "j": 2},
            "b",
            proxy=True,
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class SamplerCase:
    """One way to sample, with the share of the pairs left to the test."""

    name: str
    sampler: str
    scores: str = "online"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def unbiased(self) -> bool:
        return SAMPLERS[self.sampler].unbiased

    def spec(self, ratio: float = 0.5) -> SamplerConfig:
        return SamplerConfig(self.sampler, ratio, scores=self.scores, **self.options)


SAMPLER_CASES: dict[str, SamplerCase] = {
    case.name: case
    for case in (
        SamplerCase("crs", "crs"),
        SamplerCase("crs-uniform", "crs", scores="uniform"),
        SamplerCase("bernoulli", "bernoulli"),
        SamplerCase("bernoulli-input", "bernoulli", scores="input"),
        SamplerCase("systematic", "systematic"),
        SamplerCase("systematic-weight", "systematic", scores="weight"),
        SamplerCase("wta", "wta"),
        SamplerCase("wta-unique", "wta_unique"),
        SamplerCase("topk", "topk"),
    )
}

#: Those that only gradients have; every row above whose scores a gradient has applies to it too.
GRADIENT_CASES: dict[str, SamplerCase] = {
    case.name: case
    for case in (
        SamplerCase("wta-gradient", "wta", scores="gradient"),
        SamplerCase("systematic-stale", "systematic", scores="ema"),
    )
}

#: Dtype -> the largest error allowed, as a share of the largest entry: a few roundings of that dtype.
DTYPES: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 6e-3,
    torch.bfloat16: 5e-2,
}
