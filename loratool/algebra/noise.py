"""The noise of a checkpoint's own rounding: how large it is, and the singular values that stand out of it.

Rounding to a floating-point dtype is noise of variance ulp(w)^2 / 12 in each element. It is not of one size: rows and
columns of large weights have more of it, and a matrix of such noise has larger singular values than one of the same
energy spread evenly. So the edge is that of a product profile, variance r_i c_j / sum(r), from the sums over rows and
columns (Marchenko and Pastur 1967 where they are equal; Hachem, Loubaton and Najim 2007 for the general equations).
"""

from __future__ import annotations

from collections.abc import Callable
from math import exp, log, sqrt

import torch

_HALVINGS, _CUTS = 40, 32


def rounding_variance(W: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the mean square error that rounding to `dtype` makes in each element of W (m, n): ulp(w)^2 / 12, fp64."""
    info = torch.finfo(dtype)
    exact = dtype == torch.float64
    wide, bits, exponent = (W.double(), torch.int64, 0x7FF << 52) if exact else (W.float(), torch.int32, 0xFF << 23)
    power = (wide.view(bits) & exponent).view(wide.dtype).clamp_min_(info.tiny)  # 2^floor(log2 |w|); frexp is slow
    return power.double().square_().mul_(info.eps**2 / 12)


def edge(rows: torch.Tensor, columns: torch.Tensor) -> float:
    """Return the largest singular value of pure noise: `rows` (m,) and `columns` (n,) are the sums of its variances.

    With a_i = r_i and b_j = c_j / sum(c), sigma^2 is the least of s / (p q), where sum_i p a_i / (1 - p a_i) = s =
    sum_j q b_j / (1 - q b_j). For one variance v everywhere that is v (sqrt(m) + sqrt(n))^2, at s = sqrt(m n).
    """
    a, b = rows.double(), columns.double() / float(columns.double().sum())

    def squared(logarithm: float) -> float:
        s = exp(logarithm)
        return log(s) - log(_inverse(a, s)) - log(_inverse(b, s))

    return exp(_least(squared, log(1e-3), log(10.0 * (len(a) + len(b)))) / 2)


def _inverse(x: torch.Tensor, s: float) -> float:
    """Return p with sum p x / (1 - p x) = s, of which the left side grows from 0 without end as p x_1 goes to 1."""
    largest = float(x.max())
    x = x / largest
    low, high = 0.0, s / (1 + s)  # the largest alone reaches s there
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        terms = middle * x
        low, high = (middle, high) if float((terms / (1 - terms)).sum()) < s else (low, middle)
    return high / largest


def _least(function: Callable[[float], float], low: float, high: float) -> float:
    """Return the least value of a function that has one minimum, by golden sections."""
    share = (sqrt(5) - 1) / 2
    left, right = high - share * (high - low), low + share * (high - low)
    at_left, at_right = function(left), function(right)
    for _ in range(_CUTS):
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - share * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + share * (high - low)
            at_right = function(right)
    return min(at_left, at_right)


def worth(m: int, n: int) -> float:
    """Return how far above the edge of noise (m, n) a singular value begins to tell more than it blurs: 1.15 to 1.41.

    A smaller one is kept at a greater error than it is left out at (Gavish and Donoho 2014, arXiv 1305.5870: the
    optimal hard threshold, 4 / sqrt(3) for square matrices, where the edge is 2).
    """
    beta = min(m, n) / max(m, n)
    best = sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + sqrt(beta**2 + 14 * beta + 1)))
    return best / (1 + sqrt(beta))


def outstanding(sigma: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, beyond: float | None = None) -> int:
    """Return how many singular values stand out of noise of at most these variances (`edge`), and are worth keeping.

    For the delta of two checkpoints the variances are the sums of both of their `rounding_variance`s. One that was
    trained from the rounded base has only one of them, which shows: noise cannot have more energy than is left beside
    the signal. `beyond` and the answer are as for the rules in loratool.algebra.rank.

    Measured on bf16 and fp16 pairs with a rank-4 update (weights Gaussian, uniform, scaled by rows and columns; with
    tails so heavy that single weights stand out, 4 or 5): 4 wherever the update is larger than the steps of most
    weights that it changes. One below these steps survives as a pattern of single steps, which is no independent noise
    and truly has a higher rank: there more are kept. What is below the noise of two roundings is lost: one rank stays.
    """
    m, n = len(rows), len(columns)
    squares = torch.cat([sigma.double() ** 2, sigma.new_tensor([beyond or 0.0], dtype=torch.float64)])
    lost = squares.flip(0).cumsum(0).flip(0)
    floor, variance = worth(m, n) * edge(rows, columns), float(rows.double().sum()) / (m * n)
    count, share = -1, 1.0
    while (more := int((sigma > floor * sqrt(share)).sum())) > count:
        count = more
        share = min(share, float(lost[count]) / max((m - count) * (n - count), 1) / variance)
    return max(1, min(count + (count == len(sigma)), len(sigma) + (beyond is not None)))
