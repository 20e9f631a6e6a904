"""Grouped-query attention: a head of the keys is left out with all heads of the queries that read it, or none is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.hoisting import Layers, assert_hoisting_changes_nothing, narrow_producers

EACH = 4
QUERIES = 6


class Grouped(nn.Module):
    def __init__(self, heads: int, gqa: int = True, masks: int = 0, cached: int = False, repeat: int = False) -> None:
        super().__init__()
        self.heads, self.gqa, self.cached, self.repeat = heads, gqa, cached, repeat
        self.q, self.out = nn.Linear(8, QUERIES * EACH), nn.Linear(QUERIES * EACH, 8)
        self.k, self.v = nn.Linear(8, heads * EACH), nn.Linear(8, heads * EACH)
        self.mask = nn.Parameter(torch.randn(masks, 5, 5)) if masks else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, EACH)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.cached:
            k, v = (torch.cat([torch.tensor([], dtype=x.dtype), value], -2) for value in (k, v))
        if self.repeat:
            sizes = x.shape[0], self.heads, QUERIES // self.heads, x.shape[1], EACH
            k, v = (value[:, :, None].expand(*sizes).reshape(x.shape[0], QUERIES, -1, EACH) for value in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, enable_gqa=bool(self.gqa))
        result: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return result


@pytest.mark.parametrize(
    ("heads", "options", "narrowed"),
    [
        (2, {}, {"q", "k", "v"}),
        (3, {"cached": True}, {"q", "k", "v"}),
        (6, {}, {"q", "k", "v"}),
        (3, {"repeat": True}, {"q", "k", "v"}),
        (2, {"repeat": True, "masks": QUERIES}, {"q", "k", "v"}),
        # One head that all queries read is needed whichever of them are left.
        (1, {}, {"q"}),
        (1, {"gqa": False}, {"q"}),
        # A mask with an entry for each head of the queries: what it would need is not worked out.
        (2, {"masks": QUERIES}, set()),
        (2, {"masks": 1}, {"q", "k", "v"}),
    ],
)
@pytest.mark.parametrize("sampler", ["topk", "systematic"])
def test_hoisted_equals_whole(heads: int, options: dict[str, int], narrowed: set[str], sampler: str) -> None:
    torch.manual_seed(0)
    model = Grouped(heads, **options).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    for seed in range(3):
        policy = Layers(scope="value", sampler=sampler, ratio=0.34 if heads == 3 else 0.5)
        hoisted = assert_hoisting_changes_nothing(model, policy, x, seed=seed)
        assert narrow_producers(hoisted) == narrowed
