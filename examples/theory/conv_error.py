"""The error of a sampled convolution, and what the cheap score of a channel loses.

P_j = X_j ∗ W_j is the part of input channel j (X_j all images of it, W_j its kernels to all outputs), t_j = ‖P_j‖.
CRS with k draws has the expected squared error (Σ t_j²/p_j − ‖Σ P_j‖²)/k, least for p ∝ t_j. But t_j costs the
convolution itself, so the paper draws by the proxy s_j = ‖X_j‖‖W_j‖, as the library does. The product stays unbiased;
its error is that of p ∝ s_j, and no formula with s_j in the place of t_j gives it: s_j is neither t_j nor a bound of
it. (√taps · s_j is one, for a kernel of so many taps: Young's and Cauchy's inequalities.)

Where they differ: t_j follows the *sum* of a kernel on smooth images, and its norm on white noise. So the proxy is
exact for 1 x 1 kernels at stride 1 and good on noise; it loses where images are smooth and the channels are read by
kernels of different kinds, some averaging and some taking differences. With many kernels of one kind to a channel the
differences cancel. The table gives the excess of the error over that of p ∝ t_j, and in brackets that of p = 1/K, for
the input of a second layer: ReLU of 16 random filters on two photographs; the same with pixels shuffled (the mean of a
channel survives, and that is smooth); noise of the same norms. Below it, a small CNN on handwritten digits.

Source: Adelman et al., NeurIPS 2021 (arXiv 1805.08079), convolutions; docs/estimators.md.

    python examples/theory/conv_error.py --out docs/figures      (needs scikit-learn and Pillow)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from _shared import COLOURS, options, save_figure
from tabulate import tabulate
from torch import Tensor, nn

CHANNELS, OUT, SIDE = 16, 16, 56
KERNELS = (1, 3, 5, 7)
STEPS = 200
"""Of training on digits."""
SHOWN = "{:.1f} ({:.1f})"


def parts(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """``P_j`` for every channel, ``[C, ...]``: the convolution of that channel alone."""
    arguments = {"stride": stride, "padding": weight.shape[-1] // 2}
    return torch.stack([F.conv2d(x[:, j : j + 1], weight[:, j : j + 1], **arguments) for j in range(x.shape[1])])


def norms(terms: Tensor) -> Tensor:
    """``t_j`` of ``P_j``: ``[C]``."""
    return terms.flatten(1).norm(dim=1)


def proxy(x: Tensor, weight: Tensor) -> Tensor:
    """``s_j = ‖X_j‖‖W_j‖``: ``[C]``."""
    return norms(x.transpose(0, 1)) * norms(weight.transpose(0, 1))


def crs_error(terms: Tensor, p: Tensor, k: int) -> float:
    """Expected squared error of ``k`` draws with probabilities ``p``."""
    return float(((norms(terms).square() / p).sum() - terms.sum(0).square().sum()) / k)


def excess(x: Tensor, weight: Tensor, stride: int = 1) -> tuple[float, float]:
    """By how much the errors of p ∝ s_j and of p = 1/K exceed that of p ∝ t_j, in percent; the same for every k."""
    terms, s = parts(x, weight, stride), proxy(x, weight)
    best, cheap, uniform = (crs_error(terms, p / p.sum(), 1) for p in (norms(terms), s, torch.ones_like(s)))
    return round(100 * (cheap / best - 1), 9) + 0.0, round(100 * (uniform / best - 1), 9) + 0.0  # no "-0.0"


def inputs(seed: int = 0) -> dict[str, Tensor]:
    """Three inputs ``[2, 16, SIDE, SIDE]`` whose channels have the same norms."""
    from sklearn.datasets import load_sample_images

    generator = torch.Generator().manual_seed(seed)
    images = torch.stack([torch.tensor(each) for each in load_sample_images().images]).permute(0, 3, 1, 2)
    images = F.interpolate(images.double() / 255 - 0.5, scale_factor=0.25, mode="area")[..., :SIDE, 40 : 40 + SIDE]
    photos = F.conv2d(images, torch.randn(CHANNELS, 3, 3, 3, generator=generator).double(), padding=1).relu()
    shuffled = photos.flatten(2)[:, :, torch.randperm(SIDE * SIDE, generator=generator)].view_as(photos)
    noise = torch.randn(photos.shape, generator=generator).double()
    noise = noise * (norms(photos.transpose(0, 1)) / norms(noise.transpose(0, 1)))[:, None, None]
    return {"photographs": photos, "shuffled": shuffled, "noise": noise}


def kernels(size: int, differences: bool = False, seed: int = 1) -> Tensor:
    """Random kernels ``[16, 16, size, size]``; with ``differences`` those of every second channel sum to zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, CHANNELS, size, size, generator=generator).double()
    if differences and size > 1:
        weight[:, ::2] -= weight[:, ::2].mean((2, 3), keepdim=True)
    return weight


def digits_layer(size: int, steps: int) -> tuple[Tensor, Tensor]:
    """Input and kernels of the second convolution of a small CNN after ``steps`` steps on handwritten digits."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images, labels = torch.from_numpy(found.images).float()[:, None] / 8 - 1, torch.from_numpy(found.target)
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(1, CHANNELS, 3, padding=1), nn.ReLU())
    second = nn.Conv2d(CHANNELS, OUT, size, padding=size // 2)
    rest = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * OUT, 10))
    model = nn.Sequential(first, second, rest)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(steps):
        batch = torch.randint(1500, (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    return first(images[1500:]).detach().double(), second.weight.detach().double()


def plot(results: dict[Any, list[tuple[float, float]]], s: Tensor, t: Tensor, left: Any, right: Any) -> None:
    """Left: excess error by kernel size; right: what the proxy says against what is so."""
    for differences, style in ((False, "-"), (True, "--")):
        for i, (name, marker) in enumerate((("photographs", "o"), ("shuffled", "s"), ("noise", "^"))):
            heights = [results[size, differences, 1][i][0] for size in KERNELS]
            label = f"{name}, half differences" if differences else f"{name}, random kernels"
            left.plot(KERNELS, heights, style, color=COLOURS[i + 1], marker=marker, label=label)
    left.set(xlabel="kernel size", ylabel="error above that of p ∝ t, %", title="What the proxy loses", xticks=KERNELS)
    left.legend(fontsize=8)
    ends = torch.tensor([0.0, float(s.max())])
    right.plot(ends, ends, color=COLOURS[0], label="t = s")
    for first, name, marker in ((1, "random", "o"), (0, "differences", "v")):
        right.plot(s[first::2], t[first::2], marker, color=COLOURS[1 + first], label=name)
    right.set(xlabel="proxy s$_j$", ylabel="true norm t$_j$", title="Photographs, 5 x 5: not even a bound")
    right.legend(fontsize=8)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    out = options(__doc__, arguments).out
    try:
        found = inputs()
    except ImportError:
        print(
            "The photographs and digits need scikit-learn and Pillow: pip install scikit-learn pillow", file=sys.stderr
        )
        return 1
    cases = [(size, differences, 1) for differences in (False, True) for size in KERNELS]
    cases += [(1, False, 2), (3, True, 2)]
    results = {case: [excess(x, kernels(*case[:2]), case[2]) for x in found.values()] for case in cases}
    print("Error above the least, in percent: p from the proxy (p uniform)\n")
    rows = []
    for (size, differences, stride), cells in results.items():
        kind = "half of them differences" if differences else "random"
        rows.append([kind, f"{size} x {size}", stride, *(SHOWN.format(*cell) for cell in cells)])
    print(tabulate(rows, ["kernels", "size", "stride", *found], disable_numparse=True))
    trained = [[f"{s} x {s}", *(SHOWN.format(*excess(*digits_layer(s, n))) for n in (0, STEPS))] for s in (3, 5)]
    print("\n" + tabulate(trained, ["digits", "untrained", f"after {STEPS} steps"], disable_numparse=True))
    x, weight = found["photographs"], kernels(5, differences=True)
    s, t = proxy(x, weight), norms(parts(x, weight))
    return save_figure(out, "conv_error", 2, lambda *axes: plot(results, s, t, *axes))


if __name__ == "__main__":
    sys.exit(main())
