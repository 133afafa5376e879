"""Truncated SVD of a delta that is dense: the update that a full fine-tune made.

Randomised subspace iteration (Halko, Martinsson, Tropp 2011, arXiv 0909.4061, algorithm 4.4): a random block of
l = 1.5 r columns is pushed q = 2 times through D D^T, so that it turns into the leading left subspace; a small SVD of
Q^T D then finishes. Six passes over D; the residual is within 1 % of the optimum on every spectrum measured
(docs/performance.md). The matrix is only ever multiplied, so it may be streamed in panels.

Where l would come near min(m, n) the eigenvectors of the smaller Gram in fp64 are cheaper, and exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from loratool.algebra.lowrank import Factored, fix_signs

_TILE = 1 << 20  # elements of a residual that are formed at once


class Panels:
    """A matrix D (m, n) that is multiplied panel by panel, so that it may be streamed from disk.

    `panels()` yields (start, stop, rows start to stop) in fp32, anew for every product; `stored` is the shape of what
    they add up to. With `transposed`, D is the transpose of that.
    """

    def __init__(
        self,
        panels: Callable[[], Iterable[tuple[int, int, torch.Tensor]]],
        stored: tuple[int, int],
        *,
        transposed: bool = False,
    ) -> None:
        self.panels, self.stored, self.transposed = panels, stored, transposed
        self.shape = stored[::-1] if transposed else stored

    @classmethod
    def of(cls, D: torch.Tensor) -> Panels:
        """Return a matrix in memory, as one panel."""
        return cls(lambda: [(0, D.shape[0], D)], (D.shape[0], D.shape[1]))

    def times(self, X: torch.Tensor) -> torch.Tensor:
        """D @ X, (m, n) by (n, l)."""
        return self._down(X) if self.transposed else self._across(X)

    def transposed_times(self, Y: torch.Tensor) -> torch.Tensor:
        """D^T @ Y, (n, m) by (m, l)."""
        return self._across(Y) if self.transposed else self._down(Y)

    def gram(self) -> tuple[torch.Tensor, bool]:
        """Return the smaller Gram in fp64: D D^T (and True), or D^T D (and False)."""
        if self.stored[1] <= self.stored[0]:
            step = max(64, _TILE // self.stored[1])
            chunks = (chunk.double() for _, _, panel in self.panels() for chunk in torch.split(panel, step))
            return sum_of(chunk.T @ chunk for chunk in chunks), self.transposed
        rows = [[one.double() @ two.double().T for _, _, two in self.panels()] for _, _, one in self.panels()]
        return torch.cat([torch.cat(row, dim=1) for row in rows]), not self.transposed

    def squared_norm(self) -> float:
        """Return the squared Frobenius norm, accumulated in fp64."""
        return sum(float(torch.linalg.vector_norm(p, dtype=torch.float64)) ** 2 for _, _, p in self.panels())

    def residual(self, up: torch.Tensor, down: torch.Tensor) -> float:
        """Return the squared Frobenius norm of D - up @ down, measured: one pass, in the precision of the factors."""
        left, right = (down.T, up.T) if self.transposed else (up, down)
        step = max(64, _TILE // self.stored[1])  # a product in fp64 of the whole panel would be twice its size
        total = 0.0
        for start, stop, panel in self.panels():
            for low in range(start, stop, step):
                high = min(low + step, stop)
                rows = panel[low - start : high - start].to(left.dtype)
                total += float((rows - left[low:high] @ right).square().sum())
        return total

    def _across(self, X: torch.Tensor) -> torch.Tensor:
        parts = [panel @ X.to(panel) for _, _, panel in self.panels()]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _down(self, Y: torch.Tensor) -> torch.Tensor:
        return sum_of(panel.T @ Y[start:stop].to(panel) for start, stop, panel in self.panels())


def sum_of(terms: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the sum of equally shaped tensors, accumulated in the first."""
    total: torch.Tensor | None = None
    for term in terms:
        total = term if total is None else total.add_(term)
    assert total is not None
    return total


def truncated(D: Panels, rank: int, seed: int) -> Factored:
    """Return the leading `rank` singular triplets of D (m, n), in fp64 around fp32 products.

    `rank` is capped at min(m, n). The seed makes the result the same in every run; device: that of the products.
    """
    m, n = D.shape
    rank = min(rank, m, n)
    block = rank + rank // 2 + 8
    if 3 * block >= min(m, n):
        return _by_gram(D, rank)
    generator = torch.Generator().manual_seed(seed)
    Y = D.times(torch.randn(n, block, generator=generator))  # (m, l)
    for _ in range(2):
        Z = D.transposed_times(orthonormal(Y))  # (n, l)
        Y = D.times(orthonormal(Z))
    Q = orthonormal(orthonormal(Y))  # twice: orthonormal to working precision whatever the spectrum
    B = D.transposed_times(Q).double().T  # (l, n) = Q^T D
    U, S, Vh = _thin_svd(B)
    return fix_signs(Q.double() @ U[:, :rank], S[:rank], Vh[:rank])


def orthonormal(Y: torch.Tensor) -> torch.Tensor:
    """Return an orthonormal basis (m, l) of the columns of Y: Cholesky QR in fp64, Householder where that fails."""
    wide = Y.double()
    L, info = torch.linalg.cholesky_ex(wide.T @ wide)
    if int(info) or float(L.diagonal().min()) < 1e-6 * float(L.diagonal().max()):
        Q: torch.Tensor = torch.linalg.qr(wide)[0]
    else:
        Q = torch.linalg.solve_triangular(L.T, wide, upper=True, left=False)
    return Q.to(Y.dtype)


def _by_gram(D: Panels, rank: int) -> Factored:
    gram, rows = D.gram()
    _, vectors = torch.linalg.eigh(gram)
    basis = vectors.flip(1)[:, :rank]  # (min(m, n), rank), descending
    other = D.transposed_times(basis) if rows else D.times(basis)  # the other side, times sigma
    Q, R = torch.linalg.qr(other.double())
    U, S, Vh = torch.linalg.svd(R)  # R is diagonal but for rounding; this orders and cleans it
    if rows:
        return fix_signs(basis @ Vh.T, S, (Q @ U).T)
    return fix_signs(Q @ U, S, (basis @ Vh.T).T)


def _thin_svd(B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """SVD of a wide block (l, n) through the QR of its transpose: the SVD itself is l x l."""
    Q, R = torch.linalg.qr(B.T)  # (n, l), (l, l)
    U, S, Vh = torch.linalg.svd(R.T)
    return U, S, Vh @ Q.T
