"""A tapped ReLU against a ReLU and a gather."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fx_approx.ops.tapped_relu import pack_signs, tap_relu, unpack_signs
from tests.helpers.modes import BACKENDS

SHAPES: list[tuple[tuple[int, ...], int]] = [((2, 16, 3, 5), 1), ((4, 7), 1), ((3, 5, 9), -1), ((1, 8, 2, 2, 2), 1)]
shapes = pytest.mark.parametrize(("shape", "dim"), SHAPES)


def layouts(shape: tuple[int, ...]) -> list[Tensor]:
    """Contiguous, channels_last and strided values of one shape."""
    torch.manual_seed(0)
    made = [torch.randn(shape), torch.randn(*shape, 2)[..., 0]]
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape))
    return made if form is None else [*made, torch.randn(shape).contiguous(memory_format=form)]


def reference(source: Tensor, dim: int, index: Tensor) -> tuple[Tensor, Tensor]:
    whole = torch.relu(source)
    return whole, whole.index_select(dim, index)


def run(function: Any, source: Tensor, dim: int, index: Tensor, which: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both results, and the gradient of those that are used."""
    source = source.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    torch.manual_seed(1)
    results = function(source, dim, index)
    used = [result for name, result in zip("wp", results, strict=True) if name in which]
    torch.stack([(result * torch.randn(result.shape)).sum() for result in used]).sum().backward()
    return (*results, source.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@shapes
def test_values_and_gradients_are_those_of_a_relu(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    index = torch.tensor([4, 1, 3])
    for source in layouts(shape):
        source = source.to(dtype)
        source[(0,) * source.dim()] = 0.0
        for which in ("w", "p", "wp"):
            ours, theirs = (run(function, source, dim, index, which) for function in (tap_relu, reference))
            assert all(map(torch.equal, ours, theirs)) and ours[2].any()


def test_an_infinite_gradient_does_not_pass_where_the_value_is_negative() -> None:
    source = torch.tensor([[-1.0, 2.0, -3.0, 0.0]], requires_grad=True)
    whole, part = tap_relu(source, 1, torch.tensor([0, 1]))
    torch.autograd.backward([whole, part], [torch.full_like(whole, torch.inf), torch.ones_like(part)])
    assert torch.equal(source.grad, torch.tensor([[0.0, torch.inf, 0.0, 0.0]]))


@shapes
def test_one_bit_is_kept_for_each_entry_and_signs_come_back(shape: tuple[int, ...], dim: int) -> None:
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        tap_relu(torch.randn(shape, requires_grad=True), dim, torch.tensor([2, 0]))
    numbers = torch.Size(shape).numel()
    assert sorted(t.nbytes for t in kept) == sorted([16, -(-numbers // 8)])
    for source in layouts(shape):
        values = torch.relu(source)
        form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape))
        order = (0, *range(2, len(shape)), 1)
        last = form is not None and not values.is_contiguous() and values.is_contiguous(memory_format=form)
        signs = pack_signs(values)
        assert signs.shape == ((values.numel() + 7) // 8,)
        assert torch.equal(unpack_signs(signs, torch.empty(shape), order if last else ()), (source > 0).float())


@pytest.mark.parametrize("given", [False, True], ids=["no gradients", "gradients"])
def test_in_place(given: bool) -> None:
    leaf = torch.randn(2, 8, 3, 3)
    index = torch.tensor([6, 1])
    results = []
    for inplace in (False, True):
        x = leaf.clone().requires_grad_(given)
        source = x * 2
        whole, part = tap_relu(source, 1, index, inplace)
        assert (whole.data_ptr() == source.data_ptr()) == inplace
        if given:
            torch.autograd.backward([whole, part], [torch.cos(leaf), torch.sin(leaf[:, :2])])
        results.append((whole, part, x.grad))
    for one, other in zip(*results, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_in_place_of_what_another_one_keeps_is_an_error() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    source = x.exp()
    whole, _ = tap_relu(source, 1, torch.tensor([1]), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        whole.sum().backward()


def test_derivatives_of_derivatives_and_batched_gradients() -> None:
    index = torch.tensor([3, 0])
    source = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    function = lambda x: tap_relu(x * x - 0.5, 1, index)  # noqa: E731
    torch.autograd.gradcheck(function, (source,), check_batched_grad=True)
    torch.autograd.gradgradcheck(function, (source,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_is_eager(backend: str) -> None:
    index = torch.tensor([5, 1, 2])
    source = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)

    def step(x: Tensor) -> Tensor:
        whole, part = tap_relu(x * 2, 1, index)
        return (whole.sin().sum() + (part * part).sum()) * 2

    grads = []
    for function in (step, torch.compile(step, backend=backend, fullgraph=True)):
        x = source.clone(memory_format=torch.preserve_format).requires_grad_()
        function(x).backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0])
