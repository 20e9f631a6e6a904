"""The claims of examples/theory: formulas against every outcome, in float64; z-tests where there are too many.

A z-test here raises a false alarm once in 10,000 runs with other seeds; with the seeds given it always ends the same.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_approx
from fx_approx.ops import OPS, conv2d, linear
from fx_approx.policies import Uniform
from fx_approx.sampling import Selection, get_score

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = ("linear_regression", "conv_error", "topk_mse", "convergence", "dropout")
FALSE_ALARM = 1e-4
Theory = dict[str, ModuleType]


@pytest.fixture
def theory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Theory]:
    """The examples by name, imported as when one of them is run; forgotten afterwards."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples" / "theory"))
    names = ("_shared", *NAMES)
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        for name in names:
            sys.modules.pop(name, None)


def same(actual: Tensor | float | list[float], expected: Tensor | float | list[float]) -> bool:
    pair = [torch.as_tensor(each, dtype=torch.float64) for each in (actual, expected)]
    return bool(torch.allclose(*pair, rtol=1e-10, atol=1e-10))


def critical(values: int = 1, two_sided: bool = True) -> float:
    """How many standard errors one of so many means may be off (Bonferroni)."""
    tail = FALSE_ALARM / values / (2 if two_sided else 1)
    return statistics.NormalDist().inv_cdf(1 - tail)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


# ---- linear regression


@pytest.mark.parametrize(("method", "seed"), [("bernoulli", 0), ("crs", 1)])
def test_sampling_a_regression_adds_a_penalty(theory: Theory, method: str, seed: int) -> None:
    example = theory["linear_regression"]
    x, w, y = example.problem(seed)
    outcomes = getattr(theory["_shared"], f"{method}_outcomes")(example.scores(x, w), example.DRAWS, example.EPSILON)
    assert same(outcomes.probability.sum(), 1.0)
    loss, gradient = example.enumerated(x, w, y, outcomes)
    formula, slope = example.predicted(method, x, w, y)
    assert same(loss, formula)
    assert same(gradient, slope)
    assert loss > 1.2 * float((y - x @ w).square().sum())  # there is something to tell apart


def test_only_the_penalty_of_bernoulli_is_a_sum_over_rows(theory: Theory) -> None:
    example = theory["linear_regression"]
    x, w, _ = example.problem()
    coupled = {}
    for method in ("bernoulli", "crs"):
        p = example.probabilities(method, example.scores(x, w))
        penalty = lambda v, method=method, p=p: example.penalty(method, x, v, p)  # noqa: E731
        hessian = torch.autograd.functional.hessian(penalty, w)  # [K, n, K, n]
        rows = hessian.abs().sum((1, 3))
        coupled[method] = float((rows - rows.diag().diag()).max() / rows.max())
    assert coupled["bernoulli"] == 0
    assert coupled["crs"] > 0.02


def test_best_probabilities_need_not_be_held_fixed(theory: Theory) -> None:
    example = theory["linear_regression"]
    x, w, _ = example.problem()
    k, slopes = example.DRAWS, []
    for fixed in (True, False):
        v = w.clone().requires_grad_()
        s = example.scores(x, v)
        p = k * s / s.sum()
        assert p.max() < 1  # none is capped, so these are the best
        assert same(p.detach(), example.probabilities("bernoulli", s, 0.0))
        penalty = example.penalty("bernoulli", x, v, p.detach() if fixed else p)
        assert same(penalty.detach(), s.sum().square().detach() / k - s.square().sum().detach())
        penalty.backward()
        slopes.append(v.grad)
    assert same(*slopes)


@pytest.mark.parametrize("method", ["bernoulli", "crs"])
def test_sampled_training_follows_the_regularised_loss(theory: Theory, method: str) -> None:
    train = theory["linear_regression"].train
    sampled = train(method, True, uniform=True, runs=400, steps=60)[-1]
    regularised, exact = (train(each, False, uniform=True, steps=60)[-1, 0] for each in (method, "exact"))
    error = sampled.std(0) / len(sampled) ** 0.5
    limit = critical(error.numel())
    assert ((sampled.mean(0) - regularised).abs() / error).max() < limit
    assert ((sampled.mean(0) - exact).abs() / error).max() > 3 * limit
    assert sampled.mean(0).norm() < 0.9 * exact.norm()


# ---- convolution


@pytest.mark.parametrize(("stride", "ideal"), [(1, False), (2, True)])
def test_error_of_a_sampled_convolution(theory: Theory, stride: int, ideal: bool) -> None:
    example = theory["conv_error"]
    x, weight, k = numbers(2, 4, 5, 5).cumsum(-1), numbers(3, 4, 3, 3, seed=1) + 0.5, 2
    terms, s = example.parts(x, weight, stride), example.proxy(x, weight)
    exact = F.conv2d(x, weight, stride=stride, padding=1)
    assert same(terms.sum(0), exact)
    assert same(s, OPS["conv2d"].scores(x, weight, get_score("online"), {"groups": 1})[0])
    scores = example.norms(terms) if ideal else s
    outcomes = theory["_shared"].crs_outcomes(scores, k)
    mean, error = torch.zeros_like(exact), 0.0
    for selection, chance in outcomes:
        product = conv2d(x, weight, stride=stride, padding=1, selection=selection)
        mean += chance * product
        error += float(chance * (product - exact).square().sum())
    p = scores / scores.sum()
    assert same(mean, exact)
    assert same(error, example.crs_error(terms, p, k))
    with_proxy = float(((s.square() / p).sum() - exact.square().sum()) / k)
    assert abs(with_proxy / error - 1) > 0.05
    best = example.crs_error(terms, example.norms(terms) / example.norms(terms).sum(), k)
    others = torch.rand(200, 4, dtype=torch.float64)
    assert all(example.crs_error(terms, other / other.sum(), k) >= best for other in (*others, p))


def test_proxy_of_a_channel_is_no_bound(theory: Theory) -> None:
    example = theory["conv_error"]
    for size, stride in itertools.product((1, 3, 5), (1, 2)):
        x, weight = torch.rand(2, 3, 30, 30, dtype=torch.float64), torch.rand(4, 3, size, size, dtype=torch.float64)
        t, s = example.norms(example.parts(x, weight, stride)), example.proxy(x, weight)
        assert (t <= size * s * (1 + 1e-12)).all()  # sqrt(taps)
        if stride == 1:
            assert same(t, s) if size == 1 else (t > 1.5 * s).all()


def test_what_the_proxy_loses(theory: Theory) -> None:
    pytest.importorskip("PIL")
    example = theory["conv_error"]
    found = example.inputs()
    for x in found.values():
        assert example.excess(x, example.kernels(1))[0] == 0
    lost = {name: example.excess(x, example.kernels(3, differences=True))[0] for name, x in found.items()}
    assert lost["noise"] < 0.1
    assert 0.1 < lost["shuffled"] < 0.5 * lost["photographs"]
    assert lost["photographs"] > 10
    assert 0.1 < example.excess(found["photographs"], example.kernels(3))[0] < 5


# ---- TopK


def subsets(pairs: int, k: int) -> Tensor:
    chosen = [row for row in itertools.product((0.0, 1.0), repeat=pairs) if sum(row) == k]
    return torch.tensor(chosen, dtype=torch.float64)


def test_topk_is_the_best_fixed_subset(theory: Theory) -> None:
    example = theory["topk_mse"]
    for found in (example.symmetric(), example.skewed(example.SIZES)):
        assert same(found.probability.sum(), 1.0)
        assert same(found.mean(found.values), torch.zeros(len(example.SIZES)))
        errors = [example.mse(found, kept) for kept in subsets(len(example.SIZES), example.KEPT)]
        formula = [example.left_out(found, kept) for kept in subsets(len(example.SIZES), example.KEPT)]
        assert same(errors, formula)
        best = example.mse(found, example.fixed_topk(found, example.KEPT))
        assert same(best, min(errors))
        assert sorted(errors)[1] > 1.1 * best


def test_topk_of_realised_scores_is_the_best_rule_that_sees_sizes(theory: Theory) -> None:
    example = theory["topk_mse"]
    found = example.symmetric()
    error = example.mse(found, kept := example.topk(found.values.abs(), example.KEPT))
    assert same(error, example.left_out(found, kept))
    assert error < 0.5 * example.mse(found, example.fixed_topk(found, example.KEPT))
    # The best subset for each outcome of the sizes, over the signs that are left to chance.
    left = 1 - subsets(len(example.SIZES), example.KEPT)
    errors = (left @ found.values.T).square() * found.probability
    _, place = torch.unique(found.values.abs(), dim=0, return_inverse=True)
    by_sizes = torch.zeros(len(errors), int(place.max()) + 1, dtype=torch.float64).index_add(1, place, errors)
    assert by_sizes.shape[1] == 2 ** len(example.SIZES)
    assert same(error, by_sizes.min(0).values.sum())


def test_topk_of_realised_scores_fails_without_symmetry(theory: Theory) -> None:
    example = theory["topk_mse"]
    found = example.skewed((1.0,) * 4)
    kept = example.topk(found.values.abs(), 2)
    assert same(example.mse(found, kept), 104 / 27)  # 3.85
    assert same(example.left_out(found, kept), 64 / 27)  # 2.37
    unequal = example.skewed(example.SIZES)
    realised = example.mse(unequal, example.topk(unequal.values.abs(), example.KEPT))
    assert realised > example.mse(unequal, example.fixed_topk(unequal, example.KEPT))


def test_bernoulli_overtakes_topk_where_pairs_have_a_mean(theory: Theory) -> None:
    example = theory["topk_mse"]
    for mean in (0.0, example.MEAN):
        found = example.symmetric(mean)
        enumerated, formula = example.bernoulli_mse(found, example.KEPT)
        assert same(enumerated, formula)
        product = float(found.mean(found.values.sum(1).square()))
        fixed = example.mse(found, example.fixed_topk(found, example.KEPT))
        assert same(list(example.with_mean(1, mean)), [fixed, formula, product])
    topk, bernoulli, product = example.with_mean(100, example.MEAN)
    assert bernoulli < 0.2 * topk
    assert topk > 0.05 * product
    topk, bernoulli, _ = example.with_mean(100, 0.0)
    assert topk < bernoulli


# ---- convergence


@pytest.mark.parametrize(("p", "q"), [(1.0, 1.0), (0.5, 1.0), (0.5, 0.5)])
def test_second_moment_of_the_sampled_gradient(theory: Theory, p: float, q: float) -> None:
    example, shared = theory["convergence"], theory["_shared"]
    given = example.problem(n=3, d=2, h=2, o=4, batch=2)
    w = given.w_best + numbers(2, 2, seed=5)
    exact = given.v.T @ ((given.x @ (given.v @ w).T - given.y).T @ given.x) / len(given.x)

    def every(scope: float, pairs: int) -> list[tuple]:
        ones = torch.ones(pairs, dtype=torch.float64)
        return [(None, 1.0)] if scope == 1 else list(shared.bernoulli_outcomes(ones, round(scope * pairs)))

    mean, second, batches = torch.zeros_like(w), 0.0, list(itertools.product(range(3), repeat=2))
    for batch, (rows, a), (outs, b) in itertools.product(batches, every(p, 2), every(q, 4)):
        x, y = given.x[list(batch)], given.y[list(batch)]
        found = example.gradient(w, x, y, given.v, rows, outs)
        mean += a * b * found / len(batches)
        second += float(a * b * found.square().sum()) / len(batches)
    assert same(mean, exact)
    assert same(second, example.second_moment(given, w, p, q))


@pytest.mark.parametrize("longer", [1, 8])
def test_bound_of_one_step(theory: Theory, longer: int) -> None:
    example = theory["convergence"]
    for seed, (p, q) in itertools.product(range(20), example.MODES.values()):
        given = example.problem(seed % 3)
        offset = numbers(*given.w_best.shape, seed=seed) * 10 ** (seed % 5 - 2)
        w, rate = given.w_best + offset, longer * float(given.rates(1))
        slope = given.v.T @ given.v @ offset @ (given.x.T @ given.x) / len(given.x)  # the exact gradient
        step = offset.square().sum() - 2 * rate * (offset * slope).sum()
        step += rate**2 * example.second_moment(given, w, p, q)
        factor, added = given.contraction(p, q, rate)
        limit = factor * offset.square().sum() + added
        assert 0.3 * limit < step <= limit  # a bound, and no idle one
        assert longer > 1 or 0 < factor < 1  # the first and longest step of all contracts


def test_sampled_sgd_stays_below_its_bound_and_keeps_the_rate(theory: Theory) -> None:
    example = theory["convergence"]
    given, runs, steps = example.problem(), 6, 40
    bounds, measured = {}, {}
    for name, (p, q) in example.MODES.items():
        bounds[name] = example.bound(given, p, q, steps)
        measured[name] = torch.stack([example.train(given, p, q, steps, seed) for seed in range(runs)])[:, -1]
        error = measured[name].std() / runs**0.5
        assert measured[name].mean() - critical(two_sided=False) * error < bounds[name][-1]
        assert measured[name].mean() > 0.2 * bounds[name][-1]
        long = example.bound(given, p, q, 2000)
        assert abs(example.slope(long) + 1) < 0.03
    assert measured["backward"].mean() > 1.2 * bounds["exact"][-1]  # so a bound can be exceeded


def test_backward_sampling_is_unbiased_through_a_network() -> None:
    x, first, second, target = numbers(3, 2), numbers(3, 2, seed=1), numbers(2, 3, seed=2), numbers(3, 2, seed=3)

    def gradients(rows: tuple, outs: Selection | None) -> list[Tensor]:
        leaves = [each.clone().requires_grad_() for each in (first, second)]
        hidden = linear(x, leaves[0], grad_weight=rows[0]).tanh()
        output = linear(hidden, leaves[1], grad_input=outs, grad_weight=rows[1])
        return list(torch.autograd.grad(F.mse_loss(output, target), leaves))

    def halves(pairs: int) -> Iterator[tuple[Selection, float]]:
        for mask in itertools.product((0.0, 2.0), repeat=pairs):  # each kept with probability 1/2
            yield Selection(torch.arange(pairs)[None], torch.tensor([mask]).double()), 0.5**pairs

    means = [torch.zeros_like(first), torch.zeros_like(second)]
    for (a, chance_a), (b, chance_b), (outs, chance) in itertools.product(halves(3), halves(3), halves(2)):
        for mean, gradient in zip(means, gradients((a, b), outs), strict=True):
            mean += chance_a * chance_b * chance * gradient
    for mean, exact in zip(means, gradients((None, None), None), strict=True):
        assert same(mean, exact)


# ---- dropout


@pytest.mark.parametrize("case", range(5))
def test_sampling_and_dropout_are_unbiased_alone_and_together(theory: Theory, case: int) -> None:
    example = theory["dropout"]
    x, w, d = (each[:2] for each in example.problem(outputs=2))
    _, keep, how = example.CASES[case]
    means, errors = example.moments(x, w, d, keep, how)
    for mean, exact in zip(means, (x @ w.T, d.T @ x, d @ w), strict=True):
        assert same(mean, exact)
    scope = keep * (1.0 if how == "none" else example.KEPT / example.K)
    formula = example.output_error(x, w, scope)
    if how == "online":
        assert errors[0] < formula  # that of equal scores
    else:
        assert same(errors[0], formula)
    if (how, keep < 1) in (("none", True), ("uniform", False)):  # one of the two alone
        assert same(errors[1], example.gradient_error(x, d, scope, how == "uniform"))


def test_torch_dropout_has_the_formulas_of_a_mask_per_row(theory: Theory) -> None:
    example, draws = theory["dropout"], 4000
    x, w, d = example.problem(rows=4)
    masked = F.dropout(x.expand(draws, -1, -1), 1 - example.KEEP)
    output = (masked @ w.T - x @ w.T).square().sum((1, 2))
    gradient = (d.T @ masked - d.T @ x).square().sum((1, 2))
    one_mask, per_row = (example.gradient_error(x, d, example.KEEP, each) for each in (True, False))
    for found, formula in ((output, example.output_error(x, w, example.KEEP)), (gradient, per_row)):
        assert abs(found.mean() - formula) < critical(2) * found.std() / draws**0.5
    assert abs(gradient.mean() - one_mask) > 3 * critical() * gradient.std() / draws**0.5


def test_dropout_and_sampling_are_exact_in_evaluation() -> None:
    model = nn.Sequential(nn.Dropout(0.25), nn.Linear(8, 4))
    x = torch.randn(5, 8)
    approx = fx_approx.transform(model, Uniform(0.5, "bernoulli", scores="uniform", scope="layer"), x)
    assert not torch.equal(approx(x), model.eval()(x))
    assert torch.equal(approx.eval()(x), F.linear(x, model[1].weight, model[1].bias))


# ---- the scripts


def small(theory: Theory, name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    example = theory[name]
    if name == "convergence":
        return int(example.main(arguments, steps=20, runs=1))
    if name == "conv_error":
        pytest.importorskip("PIL")
        monkeypatch.setattr(example, "KERNELS", (1, 3))
        monkeypatch.setattr(example, "STEPS", 3)
    if name == "linear_regression":
        train = example.train
        monkeypatch.setattr(example, "train", lambda *given, **options: train(*given, **(options | {"steps": 20})))
    return int(example.main(arguments))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_script(
    theory: Theory, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        assert small(theory, name, monkeypatch) == 0
    else:
        assert small(theory, name, monkeypatch, "--out", str(tmp_path / "new")) == 0
        content = (tmp_path / "new" / f"theory_{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG")
        assert 5_000 < len(content) < 100_000
    assert "---" in capsys.readouterr().out  # the table


def test_without_matplotlib(
    theory: Theory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert theory["topk_mse"].main(["--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "TopK, fixed" in said.out
    assert "needs matplotlib" in said.err
    assert list(tmp_path.iterdir()) == []


def test_scripts_say_source_and_command(theory: Theory) -> None:
    for name in NAMES:
        text = theory[name].__doc__ or ""
        assert "Source: " in text
        assert f"python examples/theory/{name}.py --out docs/figures" in text
