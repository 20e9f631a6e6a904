"""Every op and product for fixed selections: values, derivatives, and what is exact.

Ops, ways to sample each of their three products, and what may come in meet pairwise.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fx_approx.core.candidates import Role
from fx_approx.ops import ForwardDrawn, gather, linear
from fx_approx.sampling import Selection
from tests.families import DTYPES, LAYOUTS, OP_CASES, OpCase, gradients, pairwise, upstream
from tests.ops.roles import EVEN, ROWS, Way, name_of, way_of, ways

pytestmark = pytest.mark.filterwarnings(EVEN)
FIRST = list({case.kind: case for case in reversed(OP_CASES.values())}.values())
cases = pytest.mark.parametrize("case", OP_CASES.values(), ids=OP_CASES)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal up to a few roundings of ``dtype``, as a share of the largest entry."""
    actual, expected = actual.detach().double(), expected.detach()
    error = (actual - expected).abs().max()
    assert float(error) <= DTYPES[dtype] * max(1.0, float(expected.abs().max()))


def way_from(row: dict[str, Any]) -> Way:
    names = {role: row[key] for role, key in zip(Role, ("output", "grad_input", "grad_weight"), strict=True)}
    return way_of(row["case"], names, row.get("scaled", True), row.get("k", "half"))


class Recorder(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


ATOMICS = {"index_add", "index_add_", "scatter_add", "scatter_add_", "index_put", "index_put_", "_index_put_impl_"}
TABLE = ways(
    list(ROWS.values()),
    scaled=(True, False),
    k=("half", "one", "all"),
    layout=(*LAYOUTS, "stride zero"),
    of_gradient=(*LAYOUTS, "stride zero"),
    needs=("all", "lhs", "rhs", "the others"),
)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """Stride 0: all rows are one row in memory, as ``expand`` makes them and ``sum().backward()`` sends them."""
    if layout == "stride zero":
        return values.narrow(0, 0, 1).expand_as(values) if values.dim() else values
    return LAYOUTS[layout](values)


@pytest.mark.parametrize("row", TABLE, ids=name_of)
def test_output_gradients_and_second_derivatives_are_those_of_the_definition(row: dict[str, Any]) -> None:
    """Zero outside the selection, the same every time without atomics, for any part that needs a gradient."""
    way, case = way_from(row), row["case"]
    sides = {"lhs": case.op.lhs, "rhs": case.op.rhs}
    needing = {"all": case.shapes, "the others": set(case.shapes) - set(sides.values())}.get(row["needs"])
    needing = {sides[row["needs"]]} if needing is None else needing
    operands = {name: laid_out(value, row["layout"]) for name, value in case.operands().items()}
    plain = {name: value.contiguous() for name, value in operands.items()}
    for name in needing:
        operands[name].requires_grad_()
        plain[name].requires_grad_()
    output, (expected, source) = way.call(operands), way.oracle(plain)
    close(output, expected)
    assert output.requires_grad == bool(needing)
    with torch.no_grad():
        again = way.call(operands)
    close(again, expected)
    assert not again.requires_grad
    if not needing:
        return
    towards, given = (laid_out(upstream(output), row["of_gradient"]).detach() for _ in range(2))
    plainly = towards.contiguous().requires_grad_()
    found = gradients(output, operands, given.requires_grad_(), create_graph=True)
    wanted = way.gradients(source, plain, plainly, create_graph=True)
    assert tuple(found) == tuple(wanted)
    for name, value in found.items():
        close(value, wanted[name])
        assert bool((value[wanted[name] == 0] == 0).all()), "a gradient outside the selection"
    # A penalty on the gradients, as of a Lipschitz bound, moves operands and gradient as the formula says.
    moved, expected_moves = (
        torch.autograd.grad(
            sum(value.square().sum() for value in of.values()), [*leaves, towards], allow_unused=True, retain_graph=True
        )
        for of, leaves, towards in (
            (found, [operands[name] for name in needing], given),
            (wanted, [plain[name] for name in needing], plainly),
        )
    )
    for one, other in zip(moved, expected_moves, strict=True):
        close(*(torch.zeros((), dtype=torch.float64) if v is None else v for v in (one, other)), tolerance=1e-10)
    with deterministic_algorithms(), Recorder() as recorder:
        first, second = (gradients(way.call(operands), operands, towards) for _ in range(2))
    for name, value in first.items():
        close(value, wanted[name])
        assert torch.equal(value, second[name])
    assert not recorder.names & ATOMICS
    if any(one.operand in needing or one.role is Role.OUTPUT for one, _ in way.samples):
        assert recorder.names & {"index_select", "index", "gather"}, "nothing was recorded"


PRECISE = {"autocast-float32": torch.float32, "autocast-bfloat16": torch.bfloat16, "autocast-mixed": torch.float32}
PRECISIONS = (*DTYPES, *PRECISE)


@pytest.mark.parametrize("row", ways(FIRST, precision=PRECISIONS), ids=name_of)
def test_dtypes_and_autocast(row: dict[str, Any]) -> None:
    """Mixed: a bfloat16 activation meets float32 parameters, as behind another autocast layer."""
    case, precision = row["case"], row["precision"]
    dtype = PRECISE.get(precision, precision)
    operands, autocast = case.operands(dtype=dtype, grad=True), precision in PRECISE
    if precision == "autocast-mixed":
        operands[case.op.lhs] = operands[case.op.lhs].detach().bfloat16().requires_grad_()
    way = way_from(row)
    wide = torch.promote_types(dtype, torch.float32)  # as samplers give the scale
    way = Way(case, tuple((o, s._replace(scale=s.scale.to(wide))) for o, s in way.samples), way.straight_through)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output, exact = way.call(operands), case.exact(operands)
        assert case.sampled(operands).dtype == output.dtype == exact.dtype
    reference = {name: value.detach().double().requires_grad_() for name, value in operands.items()}
    expected, source = way.oracle(reference)
    roundings = torch.bfloat16 if autocast else dtype
    near(output, expected, roundings)
    found, wanted = gradients(output, operands), way.gradients(source, reference, upstream(output).double())
    for name, value in operands.items():
        assert found[name].dtype == value.dtype
        near(found[name], wanted[name], roundings)


SLOW = [
    ("linear", ("shared", "shared", "shared")),
    ("bmm", ("each", "shared", "each")),
    ("einsum-two-contracted", ("shared", "shared", "exact")),
    ("conv1d-same-even", ("exact", "exact", "shared")),
    ("conv2d-depthwise", ("exact", "shared", "exact")),
    ("conv1d-unbatched-grouped", ("shared", "shared", "positions")),
]


@pytest.mark.parametrize("name, names", SLOW)
def test_derivatives_are_those_of_finite_differences(name: str, names: tuple[str, str, str]) -> None:
    """Entry by entry: all gradients, as functions of all operands and of the gradient of the output."""
    case = ROWS[name]
    operands, way = case.operands(grad=True), way_of(case, dict(zip(Role, names, strict=True)))
    arguments, towards = list(operands), upstream(case.exact(operands)).requires_grad_()

    def function(grad: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        found = way.call(dict(zip(arguments, values, strict=True)))
        return torch.autograd.grad(found, values, grad, create_graph=True)

    assert torch.autograd.gradcheck(function, (towards, *operands.values()))


def exact_calls(case: OpCase) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    for target in case.op.targets:
        if target is operator.matmul:
            yield "@", lambda lhs, rhs: lhs @ rhs
        else:
            yield str(target), target
    for method in case.op.methods:
        yield method, lambda self, *args, method=method, **kwargs: getattr(self, method)(*args, **kwargs)


@pytest.mark.parametrize(
    "row",
    pairwise(
        case=list(OP_CASES.values()),
        dtype=(torch.float32, torch.float64, torch.bfloat16),
        straight_through=(False, True),
    ),
    ids=name_of,
)
def test_no_selection_is_bitwise_every_exact_call(row: dict[str, Any]) -> None:
    case = row["case"]
    operands = case.operands(dtype=row["dtype"], grad=True)
    actual = case.sampled(operands, None, straight_through=row["straight_through"])
    found = gradients(actual, operands)
    for name, call in exact_calls(case):
        expected = case.call(call, operands)
        assert torch.equal(actual, expected), name
        for argument, gradient in gradients(expected, operands).items():
            assert torch.equal(found[argument], gradient), (name, argument)


def test_layouts_are_what_they_say() -> None:
    values = torch.randn(2, 3, 4, 5)
    assert not LAYOUTS["turned"](values).is_contiguous()
    assert not LAYOUTS["spaced"](values).is_contiguous()
    assert LAYOUTS["channels_last"](values).is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(layout(values), values) for layout in LAYOUTS.values())


def formats(value: Tensor) -> tuple[bool, bool]:
    channels_last = torch.channels_last if value.dim() == 4 else torch.channels_last_3d
    return value.is_contiguous(), value.is_contiguous(memory_format=channels_last)


def test_gather_keeps_channels_last() -> None:
    index = torch.tensor([0, 1])
    for row in pairwise(shape=((2, 6, 3, 4), (2, 6, 3, 4, 2)), dim=(0, 1, 2, -1), layout=("plain", "channels_last")):
        source, dim = LAYOUTS[row["layout"]](torch.randn(row["shape"])).requires_grad_(), row["dim"]
        output = gather(source, dim, index)
        assert torch.equal(output, source.index_select(dim, index))
        assert formats(output) == formats(source)
        # Backward: the layout of the incoming gradient is kept as well.
        (gradient,) = torch.autograd.grad(output, source, torch.ones_like(output))
        assert formats(gradient) == formats(source)
        assert torch.equal(gradient.sum(), torch.tensor(float(output.numel())))


@pytest.mark.parametrize(
    "row",
    # An unbatched image has no memory format, and one channel that is left has both.
    ways(
        [case for case in ROWS.values() if case.kind in ("conv2d", "conv3d") and case.batch and case.pairs > 2],
        layout=("plain", "channels_last"),
    ),
    ids=name_of,
)
def test_sampled_convolutions_keep_the_memory_format_of_the_exact_one(row: dict[str, Any]) -> None:
    case, way = row["case"], way_from(row)
    operands = case.operands(dtype=torch.float32, layout=row["layout"], grad=True)
    output, exact = way.call(operands), case.exact(operands)
    assert formats(output) == formats(exact)
    # The gradient of a layer behind has the format of the output.
    towards = LAYOUTS[row["layout"]](upstream(output))
    found, wanted = (torch.autograd.grad(of, operands["input"], towards)[0] for of in (output, exact))
    assert formats(found) == formats(wanted)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3), (1, 2, 1, 3), (2, 0, 3)], ids=str)
def test_linear_takes_any_number_of_leading_dimensions(leading: tuple[int, ...]) -> None:
    case = OP_CASES["linear"]
    operands, selection = case.operands(), case.selection(True)
    operands["input"] = torch.randn(*leading, case.pairs, dtype=torch.float64, requires_grad=True)
    output = case.sampled(operands, selection)
    assert output.shape == (*leading, 4)
    close(output, case.oracle(operands, selection))
    (gradient,) = torch.autograd.grad(output.sum(), operands["input"])
    assert gradient.shape == operands["input"].shape


def test_a_weight_that_is_read_twice_collects_both_gradients() -> None:
    """Two calls with different selections, as two heads with tied weights; of the output, and of the gradient."""
    case, operands = OP_CASES["linear"], OP_CASES["linear"].operands(grad=True)
    for name in ("selection", "grad_weight"):
        role = Role.OUTPUT if name == "selection" else Role.GRAD_WEIGHT
        both = [way_of(case, {role: "shared"}, scaled, k) for scaled, k in ((True, "half"), (False, "one"))]
        output = both[0].call(operands) + both[1].call(operands)
        towards = upstream(output)
        found = gradients(output, operands, towards)
        apart = [way.gradients(way.oracle(operands)[1], operands, towards) for way in both]
        for argument, value in found.items():
            close(value, apart[0][argument] + apart[1][argument])


@pytest.mark.parametrize("rows", [1, 3], ids=["few-rows", "more-rows"])
@pytest.mark.parametrize("name", ["selection", "grad_input", "grad_weight"])
def test_a_large_scale_does_not_overflow_before_the_product(name: str, rows: int) -> None:
    """The product of scale and factor is taken in float32 and rounded once: 1e5 itself is no float16."""
    x, w = (torch.full((n, 2), 1e-3).half().requires_grad_() for n in (rows, 3))
    output = linear(x, w, **{name: Selection(torch.tensor([[0]]), torch.tensor([[1e5]]))})
    found = output
    if name != "selection":
        operand = x if name == "grad_input" else w
        (found,) = torch.autograd.grad(output, operand, torch.full_like(output, 1e-3))
    torch.testing.assert_close(found, torch.full_like(found, 0.1), rtol=1e-2, atol=0)


def test_sampled_gradients_of_a_linear_layer_by_hand() -> None:
    """G is the gradient of the output: G[:, o]·s @ W[o, :] for features o, and G[r, :]ᵀ @ (s·X[r, :]) for rows r."""
    generator = torch.Generator().manual_seed(0)
    x, w, b, g = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 3, 5), (4, 5), (4,), (2, 3, 4))
    )
    leaves = [x.requires_grad_(), w.requires_grad_(), b.requires_grad_()]
    features = Selection(torch.tensor([[0, 3]]), torch.tensor([[2.0, 0.5]]))
    rows = Selection(torch.tensor([[1, 2, 5]]), torch.tensor([[1.0, 3.0, 0.0]]))
    output = linear(x, w, b, grad_input=features, grad_weight=ForwardDrawn(rows))
    grad_x, grad_w, grad_b = torch.autograd.grad(output, leaves, g)
    close(grad_x, 2.0 * g[..., 0, None] * w[0] + 0.5 * g[..., 3, None] * w[3])
    # Rows 1 and 2 are [0, 1] and [0, 2]; row 5 has scale 0.
    close(grad_w, g[0, 1][:, None] * x[0, 1] + 3.0 * g[0, 2][:, None] * x[0, 2])
    close(grad_b, g.sum((0, 1)))
