"""Other ways to approximate A @ B, to compare with; each is written as its source has it, none is part of the package.

All take operations as ``flops`` counts them: multiplications and additions, and one per comparison where a method
searches or sorts. Random numbers and moves in memory count nothing, which favours the rivals.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from _products import Product
from torch import Tensor

SVD_ITERATIONS = 1
"""Power iterations of ``torch.svd_lowrank``: on most products 0 and 2 (its default) err more at equal operations."""
FILL_PASSES = 6
"""Passes over a matrix to find the factor of its element-wise probabilities."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to approximate A @ B with one number that trades error for operations.

    Attributes:
        name: For tables and figures.
        unbiased: Whether the expectation is A @ B.
        limit: Largest size that makes sense; where ``exact_at_limit``, it gives A @ B.
        flops: Expected operations at a size, growing with it.
        estimate: ``(product, size, prepared) -> [m, n]``. Torch's own generator is seeded before every call.
        exact_at_limit: Whether the largest size gives A @ B.
        package: Whether it is one of the package's samplers.
        most: Largest budget in operations at which it is measured; beyond, a single draw takes too long.
        variant: Of a method in several variants, which one.
        prepare: ``(product, size, seed) -> prepared``, which is not timed; by default the seed.
    """

    name: str
    unbiased: bool
    limit: Callable[[Product], int]
    flops: Callable[[Product, int], float]
    estimate: Callable[[Product, int, Any], Tensor]
    exact_at_limit: bool = False
    package: bool = False
    most: float = math.inf
    variant: str = ""
    prepare: Callable[[Product, int, int], Any] = lambda product, size, seed: seed

    @property
    def label(self) -> str:
        """Name and variant."""
        return f"{self.name}, {self.variant}" if self.variant else self.name

    def size_for(self, product: Product, flops: float) -> int | None:
        """The largest size whose operations stay within ``flops``; None if there is none, or it takes too long."""
        if flops > self.most:
            return None
        low, high = 0, self.limit(product)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.flops(product, middle) <= flops else (low, middle - 1)
        return low or None

    def draw(self, product: Product, size: int, seed: int) -> tuple[Tensor, float]:
        """One estimate, a function of the arguments, and the seconds it took."""
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a millisecond
        prepared = self.prepare(product, size, seed)
        start = time.perf_counter()
        result = self.estimate(product, size, prepared)
        return result, time.perf_counter() - start


# ---- random projection: A Ωᵀ Ω B with E ΩᵀΩ = 1, Ω [k, K]


def project(lhs: Tensor, rhs: Tensor, omega: Tensor) -> Tensor:
    """``(A Ωᵀ)(Ω B)``."""
    return (lhs @ omega.T) @ (omega @ rhs)


def gaussian(product: Product, k: int, seed: int) -> Tensor:
    """Entries of Ω from N(0, 1/k)."""
    return project(product.lhs, product.rhs, torch.randn(k, product.sizes[1]) / math.sqrt(k))


def sign(product: Product, k: int, seed: int) -> Tensor:
    """Entries of Ω are ±1/√k. Source: D. Achlioptas, "Database-friendly random projections", 2003."""
    signs = torch.randint(2, (k, product.sizes[1])).float() * 2 - 1
    return project(product.lhs, product.rhs, signs / math.sqrt(k))


def dense_projection_flops(product: Product, k: int) -> float:
    """Two projections and the product of the results."""
    m, pairs, n = product.sizes
    return 2.0 * k * (m * pairs + pairs * n + m * n)


def sparse_projection(product: Product, k: int, seed: int) -> Tensor:
    """A share 1/√K of Ω is not zero; scikit-learn's.

    Source: P. Li, T. Hastie, K. Church, "Very sparse random projections", KDD 2006.
    """
    from sklearn.random_projection import SparseRandomProjection  # only this rival needs it

    shape_only = torch.zeros(1, product.sizes[1]).numpy()
    omega = SparseRandomProjection(k, density="auto", random_state=seed).fit(shape_only).components_.astype("float32")
    left, right = omega @ product.lhs.T.numpy(), omega @ product.rhs.numpy()
    return torch.from_numpy(left).T @ torch.from_numpy(right)


def sparse_projection_flops(product: Product, k: int) -> float:
    """In expectation Ω has k √K entries, each a multiply-add for every row of A and column of B."""
    m, pairs, n = product.sizes
    return 2.0 * k * (math.sqrt(pairs) * (m + n) + m * n)


# ---- count sketch of the contracted axis


def count_sketch(lhs: Tensor, rhs: Tensor, bucket: Tensor, signs: Tensor, k: int) -> Tensor:
    """``(A Ωᵀ)(Ω B)`` where Ω has one entry, a sign, in each of its K columns, in the row ``bucket``."""
    left = lhs.new_zeros(lhs.shape[0], k).index_add_(1, bucket, lhs * signs)
    right = rhs.new_zeros(k, rhs.shape[1]).index_add_(0, bucket, rhs * signs[:, None])
    return left @ right


def count_sketched(product: Product, k: int, seed: int) -> Tensor:
    """Sources: Charikar, Chen, Farach-Colton 2002; for products Clarkson and Woodruff, STOC 2013."""
    pairs = product.sizes[1]
    return count_sketch(product.lhs, product.rhs, torch.randint(k, (pairs,)), torch.randint(2, (pairs,)) * 2.0 - 1, k)


def count_sketch_flops(product: Product, k: int) -> float:
    """A sign and an addition for every entry, and the product of k buckets."""
    m, pairs, n = product.sizes
    return 2.0 * (m * pairs + pairs * n + m * k * n)


# ---- compressed matrix multiplication: a count sketch of the *result*


def compress(
    lhs: Tensor, rhs: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor], size: int
) -> Tensor:
    """Every entry (i, l) of the product goes, with its sign, into the bucket h(i) + g(l) of ``size``.

    The sketch of an outer product is the circular convolution of the sketches of its factors: a product of FFTs.
    Read back from one repetition, without a median, which keeps it unbiased. (Sketching the contracted axis instead,
    as above, needs a product of the sketches but no reading back, and shares its error among all entries.)

    Args:
        lhs: ``[m, K]``.
        rhs: ``[K, n]``.
        rows: Bucket and sign of every row of ``lhs``.
        columns: Those of every column of ``rhs``.
        size: Number of buckets.
    """
    left = lhs.new_zeros(lhs.shape[1], size).index_add_(1, rows[0], lhs.T * rows[1])
    right = rhs.new_zeros(rhs.shape[0], size).index_add_(1, columns[0], rhs * columns[1])
    sketch = torch.fft.irfft((torch.fft.rfft(left) * torch.fft.rfft(right)).sum(0), n=size)
    return sketch[(rows[0][:, None] + columns[0]) % size] * rows[1][:, None] * columns[1]


def compressed(product: Product, size: int, seed: int) -> Tensor:
    """Source: R. Pagh, "Compressed matrix multiplication", ACM Transactions on Computation Theory, 2013."""
    m, _, n = product.sizes
    rows, columns = ((torch.randint(size, (length,)), torch.randint(2, (length,)) * 2.0 - 1) for length in (m, n))
    return compress(product.lhs, product.rhs, rows, columns, size)


def compressed_flops(product: Product, buckets: int) -> float:
    """2 K + 1 real FFTs of 5/2 b log2 b, a complex multiply-add for half of the frequencies, and reading back."""
    m, pairs, n = product.sizes
    transforms = (2 * pairs + 1) * 2.5 * buckets * math.log2(max(2, buckets))
    return 2.0 * (m + n) * pairs + transforms + pairs * (buckets // 2 + 1) * 8 + 2.0 * m * n


# ---- element-wise sampling


def element_probabilities(matrix: Tensor, share: float) -> Tensor:
    """``min(1, c a²)``, summing to ``share`` of the entries that are not zero (or to slightly less).

    c comes from a few fixed-point steps; whatever it is, the estimate is unbiased.
    """
    squares = matrix.square()
    wanted = share * float(squares.count_nonzero())
    factor = wanted / float(squares.sum().clamp(min=1e-30))
    for _ in range(FILL_PASSES - 1):
        p = (squares * factor).clamp_(max=1.0)
        capped = p >= 1
        free = float(p.masked_fill(capped, 0.0).sum())
        if free == 0 or wanted <= int(capped.sum()):
            break
        factor *= (wanted - int(capped.sum())) / free
    return (squares * factor).clamp_(max=1.0) if share < 1 else (squares > 0).float()


def keep_elements(matrix: Tensor, p: Tensor, uniforms: Tensor) -> Tensor:
    """Each entry with its probability, divided by it; 0 else."""
    return torch.where(uniforms < p, matrix / p, 0.0)


def elementwise(product: Product, per_mille: int, seed: int) -> Tensor:
    """Entries of A and B kept independently, p ∝ a² up to 1, and a sparse product (scipy's, one thread).

    Source: the second algorithm of Drineas, Kannan, Mahoney, "Fast Monte Carlo algorithms for matrices I", 2006, after
    Achlioptas and McSherry 2001; without its other rule for very small entries.
    """
    import scipy.sparse  # only this rival needs it

    kept = []
    for matrix in (product.lhs, product.rhs):
        p = element_probabilities(matrix, per_mille / 1000)
        kept.append(scipy.sparse.csr_matrix(keep_elements(matrix, p, torch.rand(matrix.shape)).numpy()))
    return torch.from_numpy((kept[0] @ kept[1]).toarray())


def elementwise_flops(product: Product, per_mille: int) -> float:
    """Squares, passes and draws over both matrices, and in expectation two for every pair of kept entries that meet."""
    m, pairs, n = product.sizes
    left = element_probabilities(product.lhs, per_mille / 1000).sum(0)
    right = element_probabilities(product.rhs, per_mille / 1000).sum(1)
    return (2.0 * FILL_PASSES + 3) * (m * pairs + pairs * n) + 2.0 * float(left @ right)


# ---- random walks


def walk_rows(lhs: Tensor, rhs: Tensor, walks: int) -> Tensor:
    """``walks`` walks from every row of A over a pair to a column of B; each adds its sign to the entry it ends in.

    A walk takes the path i - j - l with probability |A_ij||B_jl| / W_i, where W_i sums all paths from i.
    """
    weights, onward = lhs.abs(), rhs.abs()
    out = onward.sum(1)
    paths = (weights * out).cumsum(1)
    total = paths[:, -1:]
    # Sorted uniforms, as normalised sums of exponentials: searches for neighbours find their way in the cache.
    order = torch.empty(len(lhs), walks + 1).exponential_().cumsum(1)
    first = torch.searchsorted(paths, order[:, :-1] / order[:, -1:] * total).clamp_(max=lhs.shape[1] - 1)
    # The second steps of all walks are one search: row j of B owns the interval (j, j + 1] of one long table.
    table = (onward.double().cumsum(1) / out.double().clamp(min=1e-300)[:, None]).clamp_(max=1.0)
    table += torch.arange(len(rhs), dtype=torch.float64)[:, None]
    second = torch.searchsorted(table.flatten(), first + torch.rand(first.shape, dtype=torch.float64))
    second = (second - first * rhs.shape[1]).clamp_(0, rhs.shape[1] - 1)
    signs = lhs.sign().gather(1, first) * rhs.sign()[first, second]
    counts = lhs.new_zeros(len(lhs), rhs.shape[1]).scatter_add_(1, second, signs)
    return counts * (total / walks)


def random_walks(product: Product, walks: int, seed: int) -> Tensor:
    """Source: E. Cohen and D. D. Lewis, "Approximating matrix multiplication for pattern recognition tasks", 1999.

    Theirs is for non-negative matrices; with signs, walks score the sign of their path and cancel.
    """
    rows = max(1, 2_000_000 // walks)  # the walks of all rows at once would not fit into memory
    return torch.cat([walk_rows(part, product.rhs, walks) for part in product.lhs.split(rows)])


def walk_flops(product: Product, walks: int) -> float:
    """Tables (W, cumulative sums) and, for every walk, two binary searches and an addition."""
    m, pairs, n = product.sizes
    searches = math.ceil(math.log2(max(2, pairs))) + math.ceil(math.log2(max(2, n)))
    return 2.0 * (m * pairs + pairs * n) + m * pairs + walks * m * (searches + 1) + m * n


# ---- truncated singular values


def low_rank(product: Product, rank: int, seed: int, of: str) -> Tensor:
    """``U (S Vᵀ B)`` for A, or ``(A U S) Vᵀ`` for B, from ``torch.svd_lowrank``: Halko, Martinsson, Tropp 2009."""
    if of == "A":
        u, s, v = torch.svd_lowrank(product.lhs, rank, SVD_ITERATIONS)
        return (u * s) @ (v.T @ product.rhs)
    u, s, v = torch.svd_lowrank(product.rhs, rank, SVD_ITERATIONS)
    return (product.lhs @ (u * s)) @ v.T


def low_rank_flops(product: Product, rank: int, of: str) -> float:
    """Dense products, QRs of 4 (rows) q², the small SVD (14 (columns) q² + 8 q³), and the scale.

    The operations of QR and SVD are LAPACK's leading terms (Golub and Van Loan, table 8.6.1, with both factors).
    """
    m, pairs, n = product.sizes
    long, short = max(m, pairs) if of == "A" else max(pairs, n), min(m, pairs) if of == "A" else min(pairs, n)
    factors = 4.0 * rank**2 * ((1 + SVD_ITERATIONS) * long + SVD_ITERATIONS * short)
    small = 14.0 * short * rank**2 + 8.0 * rank**3
    return low_rank_products(product, rank, of) + factors + small + rank * (m if of == "A" else pairs)


def low_rank_products(product: Product, rank: int, of: str) -> float:
    """The dense products among :func:`low_rank_flops`: those inside ``svd_lowrank`` and the last two."""
    m, pairs, n = product.sizes
    rows, columns = (m, pairs) if of == "A" else (pairs, n)
    inside = 2.0 * rank * rows * columns * (2 + 2 * SVD_ITERATIONS) + 2.0 * max(rows, columns) * rank**2
    return inside + 2.0 * rank * (pairs * n + m * n if of == "A" else m * pairs + m * n)


def _low_rank_method(of: str) -> Method:
    return Method(
        "truncated SVD",
        unbiased=False,
        limit=lambda p: min(p.sizes[:2]) if of == "A" else min(p.sizes[1:]),
        flops=lambda p, rank: low_rank_flops(p, rank, of),
        estimate=lambda p, rank, seed: low_rank(p, rank, seed, of),
        exact_at_limit=True,
        variant=f"of {of}",
    )


def _pairs(product: Product) -> int:
    return product.sizes[1]


RIVALS = [
    Method("Gaussian projection", True, _pairs, dense_projection_flops, gaussian),
    Method("sign projection", True, _pairs, dense_projection_flops, sign),
    Method("sparse projection", True, _pairs, sparse_projection_flops, sparse_projection),
    Method("count sketch", True, _pairs, count_sketch_flops, count_sketched),
    Method("compressed (FFT)", True, lambda p: p.sizes[0] * p.sizes[2], compressed_flops, compressed, most=8e7),
    Method("element-wise", True, lambda p: 1000, elementwise_flops, elementwise, exact_at_limit=True, most=8e7),
    Method("random walks", True, lambda p: 10**7, walk_flops, random_walks, most=4e7),
    _low_rank_method("A"),
    _low_rank_method("B"),
]
