"""A block Krylov basis of a large matrix D (m, n), grown two passes at a time, with the singular values seen so far.

The columns of Q (m, d) span D G, (D D^T) D G, (D D^T)^2 D G, ... for a random block G (n, b). No method of as many
products is much better: the excess falls with the square of the passes whatever the spectrum, and exponentially where
singular values decay (Musco and Musco 2015, arXiv 1504.05477). Nothing computed is ever thrown away, so that the
basis serves a rank that is found on the way as well as one that is given (Yu, Gu and Li 2018 do so with other blocks).

With Z = D^T Q (n, d), which the recurrence leaves behind, the core Z^T Z = Q^T D D^T Q (d, d) has the squares of the
approximate singular values as eigenvalues. Products are in D's precision, blocks are orthonormalised through their
Grams in fp64 (Stathopoulos and Wu 2002: a direction without substance is dropped, so rank deficiency is harmless),
cores are in fp64 on the CPU.
"""

from __future__ import annotations

import torch

from loratool.algebra.lowrank import Factored, fix_signs, small_svd
from loratool.algebra.panels import Panels, sum_of


class Basis:
    """An orthonormal basis Q (m, d) of leading left directions of D, m <= n (a wider D is taken transposed)."""

    def __init__(self, D: Panels, block: int, seed: int) -> None:
        self.flipped = D.shape[0] > D.shape[1]
        self.D = D.T if self.flipped else D
        self._block = block
        self._generator = torch.Generator().manual_seed(seed)
        self._Q: torch.Tensor | None = None  # (m, d)
        self._Z: list[torch.Tensor] = []  # D^T Q in blocks (n, b)
        self.core = torch.zeros(0, 0, dtype=torch.float64)  # Q^T D D^T Q (d, d)

    @property
    def size(self) -> int:
        """The number of directions, d."""
        return len(self.core)

    def grow(self) -> bool:
        """Add a block, by two passes over D; False where D has no further direction above its own rounding."""
        Y = self._new(whiten(self._Z[-1]) if self._Z else self._random())  # (m, b)
        if self._Z and Y.shape[1] < self._block // 2:  # equal singular values hide others: those take another start
            Y = torch.cat([Y, self._new(self._random(), Y)], dim=1)
        if not Y.shape[1]:
            return False
        Z = self.D.transposed_times(Y)  # (n, b)
        self._Q = Y if self._Q is None else torch.cat([self._Q, Y], dim=1)
        self._Z.append(Z)
        new = torch.cat([block.double().T @ Z.double() for block in self._Z]).cpu()  # (d, b): the core's last columns
        above = new[: self.size]
        self.core = torch.cat([torch.cat([self.core, above], dim=1), new.T])
        return True

    def _random(self) -> torch.Tensor:
        return whiten(torch.randn(self.D.shape[1], self._block, generator=self._generator))  # G (n, b)

    def _new(self, X: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        """Return an orthonormal basis of what D X, X (n, b), adds to Q and others: no noise below D's rounding."""
        Y = self.D.times(X)
        norm = float(self.core.diagonal().max()) ** 0.5 if self.size else 0.0  # of D, nearly
        known = [Q for Q in (self._Q, *others) if Q is not None]
        return orthonormal(Y, torch.cat(known, dim=1) if known else None, 16 * torch.finfo(Y.dtype).eps * norm)

    def squares(self) -> torch.Tensor:
        """Return the squares of all d approximate singular values, descending, fp64. Each is below the true one."""
        ascending: torch.Tensor = torch.linalg.eigvalsh(self.core)
        return ascending.flip(0).clamp_min(0)

    def triplets(self, rank: int) -> Factored:
        """Return the leading `rank` singular triplets of Q Q^T D: the best that this basis has of D."""
        assert self._Q is not None
        E = torch.linalg.eigh(self.core)[1].flip(1)[:, :rank].to(self._Q.device)  # (d, k)
        left = self._Q.double() @ E  # (m, k)
        parts = torch.split(E, [block.shape[1] for block in self._Z])
        tall = sum_of(Z.double() @ part for Z, part in zip(self._Z, parts, strict=True))  # D^T left (n, k)
        return from_one_side(left, tall, flipped=self.flipped)


def from_one_side(left: torch.Tensor, tall: torch.Tensor, *, flipped: bool = False) -> Factored:
    """Return the SVD of left @ tall^T, left (m, k) orthonormal and tall (n, k); or of its transpose, where flipped.

    The columns of `tall` are orthogonal and descend, but for the rounding that D^T left was made with. A small core
    cleans that; for many columns it would cost more than all the rest, and the product is the same without.
    """
    if tall.shape[1] <= 256:
        V, R = torch.linalg.qr(tall)  # (n, k), (k, k): nearly diagonal
        W, sigma, Uh = small_svd(R)
        one, two = left @ Uh.T, V @ W
    else:
        sigma, order = tall.norm(dim=0).sort(descending=True, stable=True)
        one, two = left[:, order], tall[:, order] / sigma.clamp_min(1e-300)
    return fix_signs(two, sigma, one.T) if flipped else fix_signs(one, sigma, two.T)


def orthonormal(Y: torch.Tensor, Q: torch.Tensor | None = None, floor: float = 0.0) -> torch.Tensor:
    """Return an orthonormal basis (m, <= b) of the columns of Y (m, b) outside those of Q (m, d), by two rounds.

    Directions along which less than `floor` is left are dropped, and such as the precision cannot tell from others.
    """
    for least in (floor, 0.0):
        if Q is not None:
            Y = Y - Q @ (Q.T @ Y)
        Y = whiten(Y, least)
    return Y


def whiten(Y: torch.Tensor, floor: float = 0.0) -> torch.Tensor:
    """Return Y (m, b) with its columns mixed so that they are orthonormal, up to Y's condition in fp64."""
    if not Y.shape[1]:
        return Y
    wide = Y.double()
    squares, E = torch.linalg.eigh((wide.T @ wide).cpu())  # ascending
    keep = squares > max(floor**2, 1e-14 * float(squares[-1]), 1e-300)
    mixed: torch.Tensor = wide @ (E[:, keep] * squares[keep].rsqrt()).to(wide.device)
    return mixed.to(Y.dtype)
