"""The random numbers of a step by Triton: the same bits as those of the tensor operations."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fx_approx.sampling import derive_key, site_uniforms
from fx_approx.sampling.device_uniforms import uniforms


@pytest.mark.parametrize(
    ("seed", "step"),
    [(0, 0), (1, 3), (-7, 2**32 + 9), (2**31 + 5, 0), (-(2**62) - 3, 3), (2**63 - 1, 2**32 + 9), (0, 2**32 + 9)],
)
def test_the_same_bits(seed: int, step: int) -> None:
    pytest.importorskip("triton")
    from fx_approx.sampling import triton_uniforms

    key, sites = torch.tensor([seed, step]), torch.tensor([0, 12, 2**40 + 1])
    places = torch.cat([torch.full((count,), place) for place, count in enumerate((1, 700, 30))])
    elements = torch.cat([torch.arange(count) for count in (1, 700, 30)])
    expected = site_uniforms(derive_key(key[0], key[1]), sites, places, elements)
    assert len(expected.unique()) > 700
    assert torch.equal(triton_uniforms.uniforms(key, sites, places, elements), expected)
    assert torch.equal(uniforms(key, sites, places, elements), expected)
    alone = uniforms(key, sites[2:], None, elements[701:])
    assert torch.equal(alone, expected[701:])


def test_no_numbers() -> None:
    pytest.importorskip("triton")
    from fx_approx.sampling import triton_uniforms

    key, none = torch.tensor([1, 2]), torch.empty(0, dtype=torch.int64)
    assert triton_uniforms.uniforms(key, torch.tensor([4]), none, none).shape == (0,)


def test_the_kernel_compiles_for_gpus(tmp_path: Path) -> None:
    """As a GPU would have it, which CI has not; in a process of its own: here Triton interprets for good."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    program = Path(__file__).with_name("uninterpreted.py")
    command = [sys.executable, "-W", "error::UserWarning", str(program)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "[80, 90]"
