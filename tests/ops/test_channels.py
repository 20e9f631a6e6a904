"""What a hoisted graph calls, against plain indexing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fx_approx import ops
from fx_approx.ops import channel_slices as channels
from fx_approx.ops.gather import gather
from fx_approx.sampling import Selection


def chosen(*rows: list[int], scale: list[list[float]] | None = None) -> Selection:
    factors = None if scale is None else torch.tensor(scale, dtype=torch.float64)
    return Selection(torch.tensor(rows), factors)


def flat(selection: Selection | None) -> list[int] | None:
    return None if selection is None else selection.indices.flatten().tolist()


def entries(parts: list[channels.Part]) -> list[int]:
    """The positions that are there, by counting."""
    found, offset = [], 0
    for selection, count, block in parts:
        groups = 1 if selection is None else selection.indices.shape[0]
        units = range(count)
        if selection is not None:
            units = [g * (count // groups) + i for g, row in enumerate(selection.indices.tolist()) for i in row]
        found += [offset + unit * block + entry for unit in units for entry in range(block)]
        offset += count * block
    return found


PARTS: dict[str, list[channels.Part]] = {
    "channels": [(chosen([1, 3]), 5, 1)],
    "heads": [(chosen([0, 2]), 3, 4)],
    "groups": [(chosen([0, 2], [1, 2]), 6, 1)],
    "groups-of-blocks": [(chosen([0], [1], [1]), 6, 2)],
    "two": [(chosen([2]), 3, 1), (chosen([0, 3]), 4, 2)],
    "whole-first": [(None, 3, 2), (chosen([1]), 2, 1)],
    "whole-last": [(chosen([1]), 2, 3), (None, 4, 1)],
    "one-twice": [(chosen([0, 1]), 3, 2), (chosen([0, 1]), 3, 2)],
}


@pytest.mark.parametrize("name", PARTS)
def test_positions_and_what_is_narrowed_to_them(name: str) -> None:
    parts = PARTS[name]
    found = channels.positions(parts)
    assert found is not None
    assert found.indices.shape == (1, len(entries(parts)))
    assert flat(found) == entries(parts)
    assert found.scale is None
    assert channels.width(parts) == len(entries(parts))
    size = sum(count * block for _, count, block in parts)
    for dim in (0, 1, -1):
        shape = [3, 4, 5]
        shape[dim] = size
        x = torch.randn(shape)
        assert torch.equal(channels.narrow(x, dim, found), x.index_select(dim, torch.tensor(entries(parts))))
        assert channels.narrow(x, dim, None) is x


def test_positions_by_hand() -> None:
    whole: list[channels.Part] = [(None, 3, 1), (None, 2, 4)]
    assert channels.positions(whole) is None
    assert channels.width(whole) == 11
    # They carry the scale of their unit.
    parts = [(None, 2, 1), (chosen([0, 2], scale=[[2.0, 3.0]]), 3, 2), (chosen([1]), 2, 1)]
    found = channels.positions(parts)
    assert flat(found) == [0, 1, 2, 3, 6, 7, 9]
    assert found.scale.tolist() == [[1, 1, 2, 2, 3, 3, 1]]
    assert found.scale.dtype == torch.float64
    # For a grouped reader they count within each group; strata may be finer than the groups.
    parts = [(chosen([0, 2], [1, 2], scale=[[1.0, 2.0], [3.0, 4.0]]), 6, 2)]
    found = channels.positions(parts, groups=2)
    assert found.indices.tolist() == [[0, 1, 4, 5], [2, 3, 4, 5]]
    assert found.scale.tolist() == [[1, 1, 2, 2], [3, 3, 4, 4]]
    finer = channels.positions([(chosen([0], [1], [1], [0]), 8, 1)], groups=2)
    assert finer.indices.tolist() == [[0, 3], [1, 2]]
    assert channels.spread(None, 4) is None
    found = channels.spread(chosen([0, 2], [1, 3]), 4)
    assert found.indices.tolist() == [[0, 2, 5, 7]]
    assert found.scale is None
    assert channels.spread(chosen([1, 2]), 4).indices.tolist() == [[1, 2]]
    first, second = [(chosen([0, 2]), 3, 2)], [(None, 2, 1), (chosen([1]), 4, 1)]
    x = torch.randn(2, 4 + 3)
    left, right = channels.split_parts(x, [first, second], 1)
    assert torch.equal(left, x[:, :4])
    assert torch.equal(right, x[:, 4:])


def test_narrow_keeps_channels_last_and_its_gradient_is_zero_elsewhere() -> None:
    x = torch.randn(2, 6, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    result = channels.narrow(x, 1, chosen([1, 4]))
    assert result.is_contiguous(memory_format=torch.channels_last)
    result.square().sum().backward()
    expected = torch.zeros_like(x)
    expected[:, [1, 4]] = 2 * x.detach()[:, [1, 4]]
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize(("shape", "dim", "index"), [((2, 6, 3, 3), 1, [4, 1]), ((2, 5, 3), -2, [[1, 3], [4, 0]])])
def test_compiled_as_for_a_gpu_a_gradient_is_zero_elsewhere(
    shape: tuple[int, ...], dim: int, index: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There a gather is not a call of its own, and every entry fetches its gradient."""
    monkeypatch.setitem(gather.__globals__, "is_opaque", lambda tensor: False)
    places = torch.tensor(index)
    step = torch.compile(lambda x: gather(x, dim, places).sin(), backend="aot_eager", fullgraph=True)
    form = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    x = torch.randn(shape).contiguous(memory_format=form).requires_grad_()
    step(x).sum().backward()
    there = torch.zeros(shape, dtype=torch.bool)
    there[(slice(None), places) if places.dim() == 1 else (torch.arange(2).unsqueeze(1), places)] = True
    torch.testing.assert_close(x.grad, torch.where(there, x.detach().cos(), 0.0))


def test_remaining() -> None:
    here, other = chosen([1, 3]), chosen([0, 2])
    # Of an axis that is whole: the wanted positions.
    assert flat(channels.remaining([(None, 5, 2)], [(here, 5, 2)])) == [2, 3, 6, 7]
    # What is there already stays, and counts as few as are there.
    assert flat(channels.remaining([(here, 5, 2), (None, 3, 1)], [(here, 5, 2), (other, 3, 1)])) == [0, 1, 2, 3, 4, 6]
    assert flat(channels.remaining([(None, 3, 1), (here, 5, 2)], [(other, 3, 1), (here, 5, 2)])) == [0, 2, 3, 4, 5, 6]
    # Nothing is left out.
    assert channels.remaining([(here, 5, 2), (None, 3, 1)], [(here, 5, 2), (None, 3, 1)]) is None


@pytest.mark.parametrize("bias", [True, False])
def test_slices_of_a_linear_layer(bias: bool) -> None:
    weight = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    offset = torch.randn(6, dtype=torch.float64, requires_grad=True)
    given = offset if bias else None
    inputs, outputs = chosen([0, 2, 3], scale=[[2.0, 1.0, 4.0]]), chosen([1, 5])
    found = ops.slice_weights(weight, given, inputs, outputs)
    expected = weight[[1, 5]][:, [0, 2, 3]] * torch.tensor([2.0, 1.0, 4.0])
    torch.testing.assert_close(found.weight, expected)
    assert (found.bias is None) == (not bias)
    assert not bias or torch.equal(found.bias, offset[[1, 5]])
    assert found.groups == 1
    assert ops.slice_weights(weight, given, None, None) is None
    assert torch.equal(ops.slice_weights(weight, given, None, outputs).weight, weight[[1, 5]])
    whole = ops.slice_weights(weight, given, inputs, None)
    assert whole.weight.shape == (6, 3)
    assert whole.bias is given
    # Gradients are zero elsewhere.
    (found.weight.sum() + (found.bias.sum() if bias else 0)).backward()
    wanted = torch.zeros(6, 5, dtype=torch.float64)
    wanted[[1, 1, 1, 5, 5, 5], [0, 2, 3] * 2] = torch.tensor([2.0, 1.0, 4.0] * 2, dtype=torch.float64)
    assert torch.equal(weight.grad, wanted)
    assert not bias or offset.grad.tolist() == [0, 1, 0, 0, 0, 1]


def test_slices_of_a_grouped_convolution() -> None:
    weight, bias = torch.randn(6, 4, 3, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    inputs = chosen([0, 2], [1, 3], scale=[[2.0, 3.0], [4.0, 5.0]])
    outputs = chosen([1, 2, 3, 5])  # two of each group's three
    found = channels.slice_weights(weight, bias, inputs, outputs, groups=2)
    assert found.weight.shape == (4, 2, 3, 3)
    assert found.groups == 2
    read = [0, 2, 5, 7]
    result = F.conv2d(x[:, read], found.weight, found.bias, groups=found.groups)
    masked = torch.zeros_like(x)  # all other channels zero: the sampled product by definition
    masked[:, read] = x[:, read] * torch.tensor([2.0, 3.0, 4.0, 5.0]).view(-1, 1, 1)
    torch.testing.assert_close(result, F.conv2d(masked, weight, bias, groups=2)[:, [1, 2, 3, 5]])


@pytest.mark.parametrize("times", [1, 2])
def test_slices_of_a_depthwise_convolution(times: int) -> None:
    weight, bias = torch.randn(5 * times, 1, 3, 3), torch.randn(5 * times)
    x, units = torch.randn(2, 5, 4, 4), [0, 3]
    outputs = channels.positions([(chosen(units), 5, times)])
    found = channels.slice_weights(weight, bias, None, outputs, groups=5, depthwise=True)
    assert found.groups == 2
    result = F.conv2d(x[:, units], found.weight, found.bias, groups=found.groups)
    torch.testing.assert_close(result, F.conv2d(x, weight, bias, groups=5)[:, outputs.indices[0]])
