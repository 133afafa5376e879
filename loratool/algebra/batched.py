"""lowrank.compress of many modules of one size at once: what a GPU is for, where one module would leave it idle.

Grams, Cholesky factors and products are computed for stacks of matrices. The small cores go through their SVDs one
after another on the CPU, which is faster at those. Modules whose factors are numerically singular take the way that
lowrank.compress has for them.
"""

from __future__ import annotations

import torch

from loratool.algebra.lowrank import LEAST, Factored, fix_signs, small_svd
from loratool.algebra.lowrank import compress as compress_one


def compress(ups: torch.Tensor, downs: torch.Tensor, rank: int | None = None) -> list[Factored]:
    """Return the exact SVDs of ups[i] @ downs[i], (b, m, R) by (b, R, n), as lowrank.compress does of one."""
    ups, downs = ups.double(), downs.double()
    _, m, R = ups.shape
    if min(m, downs.shape[2]) < R:
        return [compress_one(up, down, rank) for up, down in zip(ups, downs, strict=True)]
    Lb, Eb, well_b = _cholesky_bases(ups)
    La, Ea, well_a = _cholesky_bases(downs.mT)
    well = well_b & well_a  # (b,)
    cores = (Lb.mT * (1 / (Eb * Ea))[:, None]) @ La  # (b, R, R)
    U, S, Vh = small_svd(torch.where(well[:, None, None], cores, torch.eye(R).to(cores)))
    U, V = U[:, :, :rank], Vh[:, :rank].mT  # (b, R, k) each
    lefts = ups @ (Eb[:, :, None] * torch.linalg.solve_triangular(Lb.mT, U, upper=True))  # (b, m, k)
    rights = (torch.linalg.solve_triangular(La.mT, V, upper=True).mT * Ea[:, None]) @ downs  # (b, k, n)
    return [
        fix_signs(lefts[i], S[i], rights[i]) if good else compress_one(ups[i], downs[i], rank)
        for i, good in enumerate(well.tolist())
    ]


def _cholesky_bases(M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return L (b, R, R), e (b, R) with (M e)^T (M e) = L L^T for M (b, m, R), and which of them are accurate (b,)."""
    gram = M.mT @ M
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    L, info = torch.linalg.cholesky_ex(gram / norms[:, None] / norms[:, :, None])
    well = (norms > 0).all(dim=-1) & (info == 0) & (L.diagonal(dim1=-2, dim2=-1).amin(dim=-1) >= LEAST)
    return L, 1 / norms, well
