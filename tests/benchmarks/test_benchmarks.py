"""The comparison of estimators: rivals against closed forms and enumerations, counted operations, captured products."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fx_approx.ops import conv2d
from fx_approx.sampling import get_sampler, inclusion_probabilities
from tests.helpers.quick import thinned

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MODULES = ("_header", "_products", "_rivals", "estimators", "_estimator_figures")


@pytest.fixture
def estimators(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script, imported as when it is run; it and what it imports are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    try:
        yield importlib.import_module("estimators")
    finally:
        torch.set_num_threads(threads)
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture
def rivals(estimators: ModuleType) -> ModuleType:
    return importlib.import_module("_rivals")


@pytest.fixture
def methods(estimators: ModuleType, rivals: ModuleType) -> dict[str, Any]:
    return {method.label: method for method in [*estimators.package_methods(), *rivals.RIVALS]}


@pytest.fixture
def products(estimators: ModuleType) -> ModuleType:
    return importlib.import_module("_products")


def matrices(m: int, pairs: int, n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Two matrices of different norms, one entry of each zero."""
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(m, pairs, generator=generator, dtype=dtype) * torch.linspace(0.3, 2.0, pairs, dtype=dtype)
    b = torch.randn(pairs, n, generator=generator, dtype=dtype)
    a[0, 0] = b[-1, -1] = 0.0
    return a, b


# ---- expectation and expected squared error


def expected_error(label: str, product: Any, size: int, rivals: ModuleType) -> float:
    """E‖AB − Ĉ‖² in closed form, derived apart from the code; sketches are fully independent hashes."""
    a, b = product.lhs.double(), product.rhs.double()
    exact = (a @ b).square().sum()
    norms = a.square().sum() * b.square().sum()
    squares = a.square().sum(0) * b.square().sum(1)
    pairs = squares.sum()
    if label == "crs, uniform":
        return float((len(squares) * pairs - exact) / size)
    if label == "crs, ε = 0":
        return float((squares.sqrt().sum() ** 2 - exact) / size)
    if label == "bernoulli, ε = 0":
        p = inclusion_probabilities(squares.sqrt()[None], size, 0.0)[0]
        return float(((1 - p) / p * squares).sum())
    if label == "Gaussian projection":
        return float((norms + exact) / size)
    if label in ("sign projection", "count sketch"):
        return float((norms + exact - 2 * pairs) / size)
    if label == "sparse projection":  # a fourth moment of 1 / density instead of 1
        return float((norms + exact + (math.sqrt(a.shape[1]) - 3) * pairs) / size)
    if label == "compressed (FFT)":
        return float((exact.new_tensor(a.shape[0] * b.shape[1]) - 1) * exact / size)
    if label == "random walks":
        paths = (a.abs() @ b.abs()).sum(1)
        return float((paths.square().sum() - exact) / size)
    assert label == "element-wise"
    p, q = (rivals.element_probabilities(matrix, size / 1000).double() for matrix in (product.lhs, product.rhs))
    left = torch.where(p > 0, a.square() / p, 0.0).sum(0)
    right = torch.where(q > 0, b.square() / q, 0.0).sum(1)
    return float(left @ right - pairs)


FIVE = ["crs, uniform", "crs, ε = 0", "bernoulli, ε = 0", "count sketch"]
FIVE += [f"{kind} projection" for kind in ("Gaussian", "sign", "sparse")]
SIZES = [*((label, 5) for label in FIVE), ("compressed (FFT)", 32), ("element-wise", 800), ("random walks", 20)]


@pytest.mark.parametrize(("label", "size"), thinned([SIZES[1], SIZES[0], SIZES[3], SIZES[2], *SIZES[4:]]))
def test_method_has_its_mean_and_its_error(
    label: str, size: int, methods: dict[str, Any], rivals: ModuleType, products: ModuleType
) -> None:
    product = products.Product("", *(0.7 + each for each in matrices(6, 9, 5)))  # most terms add up
    method = methods[label]
    assert method.unbiased
    draws = torch.stack([method.draw(product, size, seed)[0].double() for seed in range(200)])
    exact = product.lhs.double() @ product.rhs.double()
    # Each entry of the mean lies within 5 of its standard errors: 2e-4 false alarms for 30 entries and 10 methods.
    spread = draws.std(0) / math.sqrt(len(draws))
    assert bool(((draws.mean(0) - exact).abs() < 5 * spread + 1e-6).all())
    along = (draws * exact).sum((1, 2)) / exact.square().sum()  # a wrong scale shows best along the product
    assert abs(float(along.mean()) - 1) < 4.5 * float(along.std()) / math.sqrt(len(along)) < 0.22
    errors = (draws - exact).square().sum((1, 2))
    wanted, chance = expected_error(label, product, size, rivals), float(errors.std()) / math.sqrt(len(errors))
    assert chance < 0.15 * wanted  # otherwise the next line says little
    assert abs(float(errors.mean()) - wanted) < 4.5 * chance


def test_walks_with_no_way_out(rivals: ModuleType) -> None:
    a, b = matrices(4, 3, 4)
    a[1], b[2] = 0.0, 0.0  # no step from row 1, none from pair 2
    found = rivals.walk_rows(a, b, 2000)
    assert bool(found.isfinite().all())
    assert bool((found[1] == 0).all())
    torch.testing.assert_close(found, a @ b, rtol=0.2, atol=0.5)
    # Without signs to cancel, a row of walks ends with the right sum, whatever the walks.
    rows = rivals.walk_rows(a.abs(), b.abs(), 7).sum(1)
    torch.testing.assert_close(rows, (a.abs() @ b.abs()).sum(1))


@pytest.mark.parametrize("of", ["A", "B"])
def test_low_rank_is_exact_where_the_rank_is_low(of: str, methods: dict[str, Any], products: ModuleType) -> None:
    a, b = matrices(8, 12, 10)
    low, other = (a, b) if of == "A" else (b, a)
    low = low[:, :3] @ matrices(3, 3, low.shape[1])[1]
    product = products.Product("", *((low, other) if of == "A" else (other, low)))
    draws = [methods[f"truncated SVD, of {of}"].draw(product, rank, 0)[0] for rank in (2, 3)]
    errors = [float((each - product.exact).norm() / product.exact.norm()) for each in draws]
    assert errors[0] > 0.01
    assert errors[1] < 1e-5


# ---- operations


@pytest.mark.parametrize("shape", [(40, 24, 16), (16, 40, 24)])
def test_counted_operations(shape: tuple[int, int, int], methods: dict[str, Any], products: ModuleType) -> None:
    product = products.Product("", *matrices(*shape))
    m, pairs, n = shape
    norms, k = 2 * (m * pairs + pairs * n), 6
    dense, sort = 2 * m * k * n, pairs * math.ceil(math.log2(pairs))
    wanted = {  # the dense products, which torch counts, and the rest of the formula
        "topk": (dense, norms + pairs + sort),
        "topk, norms of B": (dense, 2 * pairs * n + sort),
        "systematic, ε = 0": (dense, norms + pairs + sort + k * n),
        "systematic, norms of B": (dense, 2 * pairs * n + sort + k * n),
        "crs, uniform": (dense, sort + k * n),
        "Gaussian projection": (2 * k * (m * pairs + pairs * n + m * n), 0),
        "count sketch": (dense, norms),
    }
    for label, (torch_counts, rest) in wanted.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            methods[label].draw(product, k, 0)
        assert counter.get_total_flops() == torch_counts, label
        assert methods[label].flops(product, k) == torch_counts + rest, label


@pytest.mark.parametrize("of", ["A", "B"])
@pytest.mark.parametrize("shape", [(40, 24, 16), (16, 40, 24)])
def test_counted_operations_of_low_rank(
    of: str, shape: tuple[int, int, int], methods: dict[str, Any], rivals: ModuleType, products: ModuleType
) -> None:
    product = products.Product("", *matrices(*shape))
    with FlopCounterMode(display=False) as counter:
        methods[f"truncated SVD, of {of}"].draw(product, 5, 0)
    assert counter.get_total_flops() == rivals.low_rank_products(product, 5, of)
    assert rivals.low_rank_flops(product, 5, of) > counter.get_total_flops()  # torch counts no QR and no SVD


def test_counted_operations_of_kept_elements(rivals: ModuleType, products: ModuleType) -> None:
    product = products.Product("", *matrices(40, 60, 50))
    met = []
    for seed in range(20):
        torch.manual_seed(seed)
        kept = [
            rivals.keep_elements(matrix, rivals.element_probabilities(matrix, 0.3), torch.rand(matrix.shape))
            for matrix in (product.lhs, product.rhs)
        ]
        met.append(2.0 * float(kept[0].count_nonzero(dim=0).double() @ kept[1].count_nonzero(dim=1).double()))
    passes = (2 * rivals.FILL_PASSES + 3) * (40 * 60 + 60 * 50)
    assert abs(sum(met) / 20 / (rivals.elementwise_flops(product, 300) - passes) - 1) < 0.03


def test_sizes_fill_their_budget(methods: dict[str, Any], products: ModuleType) -> None:
    product = products.Product("", *matrices(120, 80, 100))
    budget = product.flops / 3
    for method in methods.values():
        size = method.size_for(product, budget)
        assert size >= 1, method.label
        assert method.flops(product, size) <= budget, method.label
        assert size == method.limit(product) or method.flops(product, size + 1) > budget, method.label
        assert method.size_for(product, 1.0) is None, method.label
    assert methods["random walks"].size_for(product, 1e9) is None  # would take too long


# ---- measuring


def test_a_wrong_method_fails_its_check(estimators: ModuleType, rivals: ModuleType, methods: dict[str, Any]) -> None:
    right = methods["element-wise"]
    estimators.check(right)
    wrong = {
        "it should be unbiased": lambda *call: 1.3 * right.estimate(*call),
        "at full size": lambda *call: right.estimate(*call) + 0.01,
    }
    for message, estimate in wrong.items():
        broken = {"exact_at_limit": message == "at full size", "unbiased": True, "estimate": estimate}
        method = rivals.Method("broken", limit=right.limit, flops=right.flops, **broken)
        with pytest.raises(RuntimeError, match=message):
            estimators.check(method)


def test_tally(estimators: ModuleType) -> None:
    exact = torch.tensor([[3.0, 4.0]])
    tally = estimators.Tally(exact)
    for sign in (1, -1, 1, -1):
        tally.add(exact + sign * torch.tensor([[0.0, 2.0]]))
    assert tally.errors == [0.4] * 4
    assert tally.bias == 0
    assert tally.standard_error == pytest.approx(math.sqrt(4 * 0.16 / 3 / 4))
    always = estimators.Tally(exact)
    for _ in range(3):
        always.add(0.5 * exact)
    assert (always.bias, always.bias_over_error) == (pytest.approx(0.5), math.inf)


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_captured_products_are_those_of_the_step(kind: str, products: ModuleType) -> None:
    first: nn.Module = nn.Conv2d(2, 3, 3) if kind == "conv" else nn.Linear(8, 3)
    layer: nn.Module = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False) if kind == "conv" else nn.Linear(3, 4, False)
    last = nn.Sequential(nn.Flatten(), nn.LazyLinear(5))
    model = nn.Sequential(first, layer, last)
    x = torch.randn(6, 2, 7, 7) if kind == "conv" else torch.randn(6, 8)
    model(x)
    hidden = first(x).detach().requires_grad_()
    output = layer(hidden)
    y = torch.arange(6) % 5
    F.cross_entropy(last(output), y).backward()
    wanted_weight, wanted_input = layer.weight.grad.flatten(1).clone(), hidden.grad
    model.zero_grad()
    operand, weight, gradient = products._capture(model, layer, x, y)
    found_output, found_input = operand @ weight.T, gradient @ weight
    if kind == "conv":
        found_output = found_output.unflatten(0, (6, -1)).mT.reshape(output.shape)
        columns = found_input.unflatten(0, (6, -1)).mT
        found_input = F.fold(columns, hidden.shape[-2:], layer.kernel_size, padding=1, stride=2)
    torch.testing.assert_close(found_output, output)
    torch.testing.assert_close(found_input, wanted_input)
    torch.testing.assert_close(gradient.T @ operand, wanted_weight)


def test_channels_are_chosen_as_the_package_chooses_them(methods: dict[str, Any], products: ModuleType) -> None:
    x, weight, k = torch.randn(3, 6, 5, 5), torch.randn(4, 6, 3, 3), 2
    columns = F.unfold(x, 3).mT.flatten(0, 1)
    product = products.Product("x", columns, weight.flatten(1).T, block=9)
    method = methods["systematic, norms of B"]
    assert method.limit(product) == 6
    scores = torch.linalg.vector_norm(weight, dim=(0, 2, 3)).unsqueeze(0)
    drawn = method.prepare(product, k, 7)
    chosen = get_sampler("systematic").draw(scores, k, drawn, epsilon=0.1)
    wanted = conv2d(x, weight, selection=chosen).flatten(2).mT.flatten(0, 1)
    torch.testing.assert_close(method.draw(product, k, 7)[0], wanted, rtol=1e-4, atol=1e-4)
    with FlopCounterMode(display=False) as counter:
        method.draw(product, k, 7)
    assert counter.get_total_flops() == 2 * 27 * 18 * 4
    rest = 2 * 54 * 4 + 6 * 3 + 18 * 4  # norms, sort, scale
    assert method.flops(product, k) == counter.get_total_flops() + rest


def test_centring_changes_no_weight_gradient_before_batchnorm(products: ModuleType) -> None:
    found = {product.name: product for product in products.captured_products(quick=True)}
    one, other = (found[f"cnn block3 GRAD_WEIGHT{end}"] for end in ("", ", centred"))
    assert not torch.allclose(one.rhs, other.rhs, atol=0.01)
    torch.testing.assert_close(one.exact, other.exact, rtol=1e-3, atol=1e-4 * float(one.exact.norm()))


def test_product_of_shapes_that_do_not_fit(products: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"x: shapes \(2, 3\), \(2, 3\) do not multiply"):
        products.Product("x", torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="x: 6 columns are no blocks of 4"):
        products.Product("x", torch.ones(2, 6), torch.ones(6, 2), block=4)


@pytest.mark.slow
def test_quick_run(
    estimators: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(estimators, "DRAWS", 3)
    monkeypatch.setattr(estimators, "CHECK_DRAWS", 20)
    path = tmp_path / "results" / "estimators.json"
    estimators.main(["--quick", "--out", str(tmp_path / "new"), "--json", str(path)])
    said = capsys.readouterr()
    assert "All 22 methods are exact at full size or unbiased" in said.out
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert {"processor", "cores", "torch", "fx_approx"} <= set(stored["environment"])
    assert stored["environment"]["threads"] == 1
    names = {"gaussian", "cnn block3 OUTPUT", "cnn block3 GRAD_INPUT", "mlp fc2 GRAD_WEIGHT"}
    assert names <= set(stored["results"]["products"])
    blocks = {
        each["method"] for each in stored["results"]["measured"] if each["product"] == "cnn block3 OUTPUT, channels"
    }
    assert blocks == {method.label for method in estimators.package_methods()}
    measured = [each for each in stored["results"]["measured"] if each["product"] == "cnn block3 OUTPUT"]
    assert {"topk", "bernoulli, ε = 0.1", "wta_unique, ε = 0.1", "count sketch"} <= {e["method"] for e in measured}
    assert all(each["flops"] <= 0.25 and each["draws"] == 3 and each["error"] > 0 for each in measured)
    (topk,) = [each for each in measured if each["method"] == "topk"]
    assert topk["error_spread"] == pytest.approx(0, abs=1e-9)
    assert topk["bias"] == pytest.approx(topk["error"], rel=1e-5)
    figures = {path.name for path in (tmp_path / "new").glob("*.png")}
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert figures == ({f"estimators_{name}.png" for name in ("samplers", "rivals", "time")} if drawn else set())
    assert ("no figures" in said.err) != drawn
