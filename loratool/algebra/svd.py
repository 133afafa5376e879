"""Truncated SVD of a delta that is dense: the update that a full fine-tune made. And how good it is.

A block Krylov basis (loratool.algebra.krylov) grows until it holds a rank that satisfies the caller and its excess
over the best possible error is estimated to be small. Where the basis would come near min(m, n), the eigenvectors of
the smaller Gram in fp64 are cheaper, and exact.

The residual is exact, and free: the kept part is Q_k Q_k^T D, so |D|^2 = kept^2 + residual^2. Where that difference
loses its digits the residual is measured.

The excess can only be estimated. Let c_j be the energy that rank k captures at check j of the growing basis, and
g_j = c_j - c_(j-1) the last gain. On every spectrum measured the gains shrink by a ratio that stays put (flat spectra,
noise) or falls (decaying ones), so what is still missing is the geometric series g_j rho / (1 - rho), where
rho = g_j / g_(j-1). rho is taken to be at least 2^-sqrt(b / k) for blocks of b <= k columns, the ratio of flat
spectra, as before a jump of the spectrum is resolved the gains shrink faster than after; and the sum is doubled for
safety. So the estimate is never below twice the last gain. Tests compare it with the true excess.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import inf, sqrt
from typing import NamedTuple

import torch

from loratool.algebra.krylov import Basis, from_one_side, orthonormal
from loratool.algebra.lowrank import Factored, fix_signs
from loratool.algebra.panels import Panels

__all__ = ["QUALITIES", "Panels", "Truncation", "orthonormal", "squared_error", "truncate", "truncated"]

QUALITIES = {"fast": 0.02, "balanced": 0.005, "exact": 0.0}  # the largest estimated excess to stop at
SAFETY = 2.0
_DIGITS = 1e-8  # of the total energy: what sums of products in fp32 resolve
_NOTHING = 5e-7  # of sigma_1: singular values below it are rounding of fp32 products
_BLOCK = 64  # columns a pass: fewer run below the speed of the machine, more need more passes

# From the singular values known so far (descending, fp64) and the squared energy of those that are not (None: there
# are no others) to a rank; more than len(sigma) says that not enough is known. The rules of algebra.rank are such.
Choose = Callable[[torch.Tensor, float | None], int]


class Truncation(NamedTuple):
    """A truncated SVD of D and how good it is; errors are Frobenius norms.

    `factors` has the rank that was chosen; `total` is |D|^2 and `residual` the squared error that is left. The best
    possible error is at least sqrt(residual) / (1 + excess): estimated, and 0 where the factors are the optimum.
    `sigma` holds all singular values that were found on the way, descending: those beyond the rank are lower bounds,
    unless the excess is 0.
    """

    factors: Factored
    total: float
    residual: float
    excess: float
    sigma: torch.Tensor


def truncate(
    D: Panels,
    choose: Choose | int,
    seed: int,
    *,
    quality: str = "balanced",
    cap: int | None = None,
    total: float | None = None,
) -> Truncation:
    """Return the SVD of D (m, n), truncated at the rank that `choose` finds, or is, and at `cap` at the latest.

    The rank is less where D has no more. `total` is |D|^2 if known: it saves a pass. The seed makes the result
    the same in every run; the device is that of D's panels. Rules that need the whole spectrum want "exact".
    """
    total = D.squared_norm() if total is None else total
    limit = min(*D.shape, cap or min(D.shape))
    if isinstance(choose, int):
        rank = min(choose, limit)
        return _truncate(_Task(D, lambda *_: rank, rank, seed, total), quality, start=2 * rank)
    return _truncate(_Task(D, choose, limit, seed, total), quality, start=0)


def truncated(D: Panels, rank: int, seed: int, *, quality: str = "fast") -> Factored:
    """Return the leading `rank` singular triplets of D (m, n), in fp64 around fp32 products.

    `rank` is capped at min(m, n); triplets that D has not have sigma 0.
    """
    rank = min(rank, *D.shape)
    return _padded(truncate(D, rank, seed, quality=quality).factors, rank)


def squared_error(D: Panels, up: torch.Tensor, down: torch.Tensor, total: float) -> float:
    """Return |D - up @ down|^2 of any factors (m, k) and (k, n), by one pass: |D|^2 - 2 <D, M> + |M|^2.

    Where that loses its digits the difference is formed and measured, which takes longer.
    """
    up, down = up.double(), down.double()
    cross = float((D.transposed_times(up).double() * down.T).sum())
    own = float(((up.T @ up) * (down @ down.T)).sum())
    error = total - 2 * cross + own
    return error if error > 1e-5 * total else _measured(D, up, down, total)


class _Task(NamedTuple):
    """What is to be factorised, and how far."""

    D: Panels
    choose: Choose
    cap: int
    seed: int
    total: float


def _truncate(task: _Task, quality: str, start: int) -> Truncation:
    """Grow a basis until its rank and its excess are good enough; give way to the Gram where that is cheaper.

    `start` is the size of the basis before which no check is worth it: twice the rank, where that is known.
    """
    D, choose, cap, seed, total = task
    smaller = min(D.shape)
    if total == 0:
        return Truncation(_nothing(D), 0.0, 0.0, 0.0, torch.zeros(1, dtype=torch.float64))
    if quality == "exact" or 4 * (max(start // 2, 16) + 48) >= smaller:  # measured: where the costs cross
        return _by_gram(task)
    basis = Basis(D, min(max(cap, _BLOCK // 2), _BLOCK), seed)
    history: list[torch.Tensor] = []  # at each check, the energies that rank 1, 2, ... captures
    while basis.grow():
        if basis.size < max(start, 9 / 8 * len(history[-1]) if history else 0):  # a check costs d^3
            continue
        sigma = basis.squares().sqrt()
        history.append(sigma.square().cumsum(0))
        rank = min(choose(sigma, _beyond(sigma, total)), cap)
        excess = _excess(history, rank, total)
        if excess <= QUALITIES[quality]:
            return _finished(task, basis, rank, excess)
        if basis.size > 0.6 * smaller:
            return _by_gram(task)
    sigma = basis.squares().sqrt()  # of all that D has, above its own rounding
    return _finished(task, basis, min(choose(sigma, _beyond(sigma, total)), cap), 0.0)


def _beyond(sigma: torch.Tensor, total: float) -> float:
    """Return the squared energy that is not in sigma; what the digits of the difference cannot exclude counts."""
    return max(total - float(sigma.square().sum()), _DIGITS * total)


def _excess(history: list[torch.Tensor], rank: int, total: float) -> float:
    """Estimate the excess of rank `rank` over the optimum from the gains of the last checks; inf where too few."""
    if len(history) < 2 or len(history[-2]) < rank:
        return inf
    captured = [float(c[rank - 1]) for c in history[-3:] if len(c) >= rank]
    gains = [two - one for one, two in pairwise(captured)]
    if gains[-1] <= _DIGITS * total:
        return 0.0
    block = len(history[-1]) - len(history[-2])
    ratio = 0.5 ** sqrt(min(block / rank, 1))
    # the first gain of a basis no larger than the rank says nothing about the later ones
    if len(gains) == 2 and len(history[-3]) >= rank + block and gains[0] > 0:
        ratio = min(max(gains[1] / gains[0], ratio), 0.95)
    missing = SAFETY * gains[-1] * ratio / (1 - ratio)
    residual = total - captured[-1]
    return sqrt(residual / (residual - missing)) - 1 if missing < residual else inf


def _finished(task: _Task, basis: Basis, rank: int, excess: float) -> Truncation:
    sigma = basis.squares().sqrt()
    factors = basis.triplets(_substantial(sigma, rank))
    return Truncation(factors, task.total, _residual(task, factors), excess, sigma)


def _by_gram(task: _Task) -> Truncation:
    """Return the optimum, from the eigenvectors of the smaller Gram in fp64."""
    gram, rows = task.D.gram()
    squares, vectors = torch.linalg.eigh(gram.cpu() if len(gram) <= 1024 else gram)
    sigma = squares.flip(0).clamp_min(0).sqrt().cpu()
    rank = _substantial(sigma, min(task.choose(sigma, None), task.cap))
    basis = vectors.flip(1)[:, :rank].to(gram.device)  # (min(m, n), rank)
    tall = (task.D.transposed_times(basis) if rows else task.D.times(basis)).double()  # the other side, times sigma
    factors = from_one_side(basis, tall, flipped=not rows)
    return Truncation(factors, task.total, _residual(task, factors), 0.0, sigma)


def _substantial(sigma: torch.Tensor, rank: int) -> int:
    return max(1, min(rank, int((sigma > _NOTHING * sigma[0]).sum())))


def _residual(task: _Task, factors: Factored) -> float:
    """Return the squared error: what was not captured, or measured where few digits of that difference are left."""
    D, _, _, _, total = task
    residual = total - float(factors.sigma.square().sum())
    return residual if residual > 1e-5 * total else _measured(D, *factors.balanced(len(factors.sigma)), total)


def _measured(D: Panels, up: torch.Tensor, down: torch.Tensor, total: float) -> float:
    """Form D - up @ down and return its squared norm; in fp64 only where fp32 would show its own rounding."""
    residual = D.residual(up.float(), down.float())
    return residual if residual > 1e-9 * total else D.residual(up, down)


def _nothing(D: Panels) -> Factored:
    """A triplet of a matrix of zeros."""
    (m, n), one = D.shape, torch.ones(1, dtype=torch.float64)
    return Factored(torch.eye(m, 1, dtype=torch.float64), 0 * one, torch.eye(1, n, dtype=torch.float64))


def _padded(factors: Factored, rank: int) -> Factored:
    """Return `rank` triplets: those that are missing have sigma 0 and any directions that complete the bases."""
    k = len(factors.sigma)
    if k == rank:
        return factors
    generator = torch.Generator().manual_seed(0)

    def complete(side: torch.Tensor) -> torch.Tensor:  # (m, k) -> (m, rank)
        more = torch.randn(len(side), rank - k, generator=generator, dtype=side.dtype).to(side.device)
        return torch.cat([side, torch.linalg.qr(torch.cat([side, more], dim=1))[0][:, k:]], dim=1)

    sigma = torch.cat([factors.sigma, factors.sigma.new_zeros(rank - k)])
    return fix_signs(complete(factors.left), sigma, complete(factors.right.T).T)
