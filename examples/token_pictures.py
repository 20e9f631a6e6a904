"""Which tokens each block of a transformer computes: all, or some by ``drop``, ``skip`` or ``skip`` by layer.

    python examples/token_pictures.py --out docs/figures      (needs matplotlib; writes tokens.png)

The counts are those of the transformed models. Which tokens are left out is drawn anew in every step; the picture
shows one draw.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import fx_approx
from fx_approx.analysis import TokenAnalysis, token_axis
from fx_approx.analysis.token_drawing import draw_stacks
from fx_approx.policies import Tokens

WIDTH, TOKENS, BLOCKS = 32, 15, 6

POLICIES = {
    "exact": None,
    'Tokens(0.5, mode="drop")': Tokens(0.5, mode="drop"),
    'Tokens(0.5, mode="skip")': Tokens(0.5, mode="skip"),
    'mode="skip", per_layer=True': Tokens(0.5, mode="skip", per_layer=True),
}


class Block(nn.Module):
    """A block with its norms before attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, tokens, width]``."""
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class Transformer(nn.Module):
    """Blocks on patches behind a class token, which the head reads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first = nn.Linear(8, WIDTH), nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.block = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, patches: Tensor) -> Tensor:
        """``[N, tokens, 8]`` to ``[N, 10]``."""
        x = self.embed(patches)
        x = self.block(torch.cat([self.first.expand(x.shape[0], -1, -1), x], dim=1))
        result: Tensor = self.head(x[:, 0])
        return result


def analyses() -> dict[str, TokenAnalysis]:
    """By title, what the model computes under each policy."""
    model, patches = Transformer(), torch.randn(2, TOKENS, 8)
    return {
        title: token_axis(model, patches) if policy is None else token_axis(fx_approx.transform(model, policy, patches))
        for title, policy in POLICIES.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the analyses and draws the picture."""
    parser = argparse.ArgumentParser(description="Which tokens each block of a transformer computes.")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for tokens.png")
    options = parser.parse_args(arguments)
    found = analyses()
    for title, one in found.items():
        print(f"== {title}\n{one}\n")
    options.out.mkdir(parents=True, exist_ok=True)
    panels = [(title, one.rows(one.stacks[0])) for title, one in found.items()]
    draw_stacks(panels, "token_pictures.py", options.out / "tokens.png")


if __name__ == "__main__":
    main()
