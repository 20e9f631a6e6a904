"""The counter-based uniforms: arithmetic, range, reproducibility, and independence of the streams."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fx_approx.sampling import derive_key, mix, uniforms

# Chance of a false alarm per statistic compared with this many standard deviations: 5.7e-7.
Z = 5.0


def key_of(seed: int, step: int) -> Tensor:
    return derive_key(torch.tensor(seed), torch.tensor(step))


def stream(seed: int, step: int, site: int, count: int = 4096) -> Tensor:
    return uniforms(key_of(seed, step), site, 1, count, torch.float64)[0]


def lowbias32(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    return x ^ (x >> 16)


def test_mix_is_lowbias32_one_to_one_and_ignores_high_bits() -> None:
    values = [0, 1, 2, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, *range(12345, 2**32, 98765431)]
    assert mix(torch.tensor(values)).tolist() == [lowbias32(value) for value in values]
    x = torch.arange(2**20) * 4093
    hashed = mix(x)
    assert torch.equal(hashed, mix(x | (5 << 33)))
    assert hashed.min() >= 0 and hashed.max() < 2**32
    assert hashed.unique().numel() == x.numel()


def test_key_uses_every_bit_of_seed_and_step() -> None:
    base = key_of(0, 0)
    keys = [base]
    for bit in range(64):
        flip = 1 << bit if bit < 63 else -(2**63)
        keys += [key_of(flip, 0), key_of(0, flip)]
    both = torch.stack(keys)
    assert both.unique().numel() == 129
    assert both.min() >= 0
    # Every flip changes about half of each 31 or 32 bit lane, not only one lane.
    for word in (both & 0xFFFFFFFF, both >> 32):
        changed = torch.stack([((word[1:] ^ word[0]) >> b) & 1 for b in range(31)]).double()
        assert abs(changed.mean().item() - 0.5) < Z * 0.5 / (31 * 128) ** 0.5
        assert changed.sum(0).min() >= 3
    grid = torch.arange(200)
    assert derive_key(grid.repeat_interleave(200), grid.repeat(200)).unique().numel() == 200 * 200


def test_values_are_pinned() -> None:
    """A run resumed from an old checkpoint must draw the same samples: these numbers may never change."""
    drawn = uniforms(key_of(1234567890123456789, 42), 3, 2, 3, torch.float64)
    assert (drawn * 2**24).tolist() == [[4586209, 5801333, 8248707], [6773985, 13335301, 14797087]]


def test_open_interval_and_dtypes() -> None:
    key = key_of(1, 2)
    single, double = uniforms(key, 5, 4, 50_000), uniforms(key, 5, 4, 50_000, torch.float64)
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    assert torch.equal(single.double(), double)
    odd = double * 2**24
    assert torch.equal(odd, odd.round()) and bool((odd % 2 == 1).all())
    assert single.min() > 0 and single.max() < 1


def test_extreme_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    for word, value in ((0, 2.0**-24), (2**32 - 1, 1 - 2.0**-24)):
        monkeypatch.setitem(uniforms.__globals__, "mix", lambda x, word=word: torch.full_like(x, word))
        for dtype in (torch.float32, torch.float64):
            assert uniforms(torch.tensor(0), 0, 1, 2, dtype).tolist() == [[value, value]]
    with pytest.raises(ValueError, match="float16"):  # it would round
        uniforms(key_of(0, 0), 0, 1, 1, torch.float16)


def test_uniform_by_chi_square() -> None:
    """256 equal cells, at seeds, steps and sites that differ in low bits only; 6 sigma of chi-square."""
    for seed, step, site in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2**40, 0, 0), (-1, 7, 63)]:
        cells = torch.histc(stream(seed, step, site, 2**17), 256, 0.0, 1.0)
        expected = 2**17 / 256
        chi = ((cells - expected) ** 2 / expected).sum().item()
        assert abs(chi - 255) < 6 * (2 * 255) ** 0.5


def correlations(streams: list[Tensor]) -> Tensor:
    """All cross correlations, in standard deviations."""
    x = torch.stack(streams)
    x = (x - 0.5) * 12**0.5
    return (x @ x.T / x.shape[1] ** 0.5).fill_diagonal_(0.0)


@pytest.mark.parametrize("vary", ["seed", "step", "site", "high bits"])
def test_streams_are_independent(vary: str) -> None:
    """48 neighbouring streams, 1128 pairs: false alarm rate 1128 x 5.7e-7 = 6e-4 over all seeds."""
    arguments = {
        "seed": [(i, 0, 0) for i in range(48)],
        "step": [(0, i, 0) for i in range(48)],
        "site": [(0, 0, i) for i in range(48)],
        "high bits": [(i << 32, j << 32, k << 32) for i in range(3) for j in range(4) for k in range(4)],
    }[vary]
    streams = [stream(*one) for one in arguments]
    assert correlations(streams).abs().max() < Z
    # Nor are they copies of each other shifted by a few elements, or sharing single values.
    assert correlations([torch.roll(s, i) for i, s in enumerate(streams)]).abs().max() < Z
    collisions = torch.stack(streams).unique().numel()
    draws = 48 * 4096
    assert collisions > draws - draws**2 / 2**24 - Z * draws / 2**12


def test_successive_values_and_groups_are_independent() -> None:
    x = stream(3, 4, 5, 2**16)
    lagged = [x[lag : lag + 2**15] for lag in range(1, 17)]
    assert correlations([x[: 2**15], *lagged])[0].abs().max() < Z
    rows = uniforms(key_of(3, 4), 5, 32, 4096, torch.float64)
    assert correlations(list(rows)).abs().max() < Z


def test_uniforms_use_every_bit_of_key_and_site() -> None:
    """Flipping any one bit gives another stream, independent of the first."""
    base = uniforms(torch.tensor(0), 0, 1, 4096, torch.float64)[0]
    flips = [(1 << bit, 0) for bit in range(63)] + [(0, 1 << bit) for bit in range(63)]
    streams = [uniforms(torch.tensor(key), site, 1, 4096, torch.float64)[0] for key, site in flips]
    assert correlations([base, *streams]).abs().max() < Z


def test_pure_function_of_its_arguments() -> None:
    assert torch.equal(stream(1, 2, 3), stream(1, 2, 3))
    for other in [(2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3)]:
        assert (stream(1, 2, 3) == stream(*other)).double().mean() < 0.01
