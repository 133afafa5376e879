"""Algebra of matrices that are known as factors, M = up @ down with up (m, R) and down (R, n); M is never built.

The singular values of M are those of an R x R core. With up = Qb Lb^T and down = La Qa^T (Q orthonormal, L triangular)

    M = Qb (Lb^T La) Qa^T          so          svd(Lb^T La) = U S V^T     gives     svd(M) = (Qb U) S (V^T Qa^T).

Lb and La are Cholesky factors of the two Grams, in fp64; where a Gram is numerically singular (dependent or zero
columns, R > min(m, n)) Householder QR takes over. At any rank the truncated product is within 1e-6 of the best.

Other ways of writing an update are products of factors as well, exactly: Hadamard products (LoHa), Kronecker products
(LoKr), a convolution with a core (Tucker).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Condition c makes a basis orthonormal to 1e-16 c^2 only, and no singular value better than that relatively: a Cholesky
# factor with a diagonal below this (c beyond 1e4) would eat the digits that the reader is promised.
LEAST = 1e-4


class Factored(NamedTuple):
    """An SVD of a product of factors: sigma (k,) descending, fp64; left (m, k) and right (k, n) orthonormal, fp64.

    Where only leading triplets were asked for, left and right are theirs, and sigma may still hold all.
    """

    left: torch.Tensor
    sigma: torch.Tensor
    right: torch.Tensor

    def balanced(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (up (m, rank), down (rank, n)) with sqrt(sigma) on both sides: the best range in half precision."""
        root = self.sigma[:rank].sqrt()  # (rank,)
        return self.left[:, :rank] * root, root[:, None] * self.right[:rank]


def add(terms: list[tuple[torch.Tensor, torch.Tensor, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors of `sum w_i up_i @ down_i` by concatenation: exact, ranks add up. Weights go into up."""
    ups = [up if weight == 1 else up * weight for up, _, weight in terms]
    if len(terms) == 1:
        return ups[0], terms[0][1]
    return torch.cat(ups, dim=1), torch.cat([down for _, down, _ in terms], dim=0)


def compress(up: torch.Tensor, down: torch.Tensor, rank: int | None = None) -> Factored:
    """Return the exact SVD of up @ down, (m, R) by (R, n), at a cost of O((m + n) R^2).

    sigma holds all singular values; `rank` is how many triplets are formed.
    """
    up, down = up.double(), down.double()
    left, right = _cholesky_basis(up), _cholesky_basis(down.T)
    if left is None or right is None:
        Qb, Rb = torch.linalg.qr(up)  # (m, p), (p, R)
        Qa, Ra = torch.linalg.qr(down.T)  # (n, q), (q, R)
        U, S, Vh = small_svd(Rb @ Ra.T)  # core (p, q)
        return fix_signs(Qb @ U[:, :rank], S, Vh[:rank] @ Qa.T)
    (Lb, Eb), (La, Ea) = left, right  # up E = Qb Lb^T: E equilibrates, so that scale differences cost no accuracy
    core = (Lb.T * (1 / (Eb * Ea))) @ La  # (R, R)
    U, S, Vh = small_svd(core)
    U, V = U[:, :rank], Vh[:rank].T  # (R, k) each
    Qb_U = up @ (Eb[:, None] * torch.linalg.solve_triangular(Lb.T, U, upper=True))  # (m, k)
    Vh_Qa = (torch.linalg.solve_triangular(La.T, V, upper=True).T * Ea) @ down  # (k, n)
    return fix_signs(Qb_U, S, Vh_Qa)


def hadamard_factors(
    up1: torch.Tensor, down1: torch.Tensor, up2: torch.Tensor, down2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors (m, r1 r2) and (r1 r2, n) of the elementwise product (up1 @ down1) * (up2 @ down2): LoHa.

    Row i of up is the Kronecker product of the rows i of up1 and up2, column j of down that of the columns j (Khatri
    and Rao 1968; FedPara, arXiv 2108.06098, for the rank).
    """
    up = up1[:, :, None] * up2[:, None, :]  # (m, r1, r2)
    down = down1[:, None, :] * down2[None, :, :]  # (r1, r2, n)
    return up.flatten(1), down.flatten(0, 1)


def kronecker(one: torch.Tensor | Factored, two: torch.Tensor | Factored, rank: int | None = None) -> Factored:
    """Return the exact SVD of kron(one, two): LoKr. (p, q) and (s, t) make (p s, q t), of rank rank1 * rank2.

    Its singular values are the products of those of both, its vectors their Kronecker products (Van Loan 2000). A
    matrix that is large and of low rank is better given as `compress` returns it. `rank` is how many triplets are
    formed; a kernel behind t is flattened into it.
    """
    (U1, S1, V1), (U2, S2, V2) = (
        small_svd(M.flatten(1).double()) if isinstance(M, torch.Tensor) else M for M in (one, two)
    )
    products = (S1[:, None] * S2).flatten()  # (r1 r2,)
    order = products.argsort(descending=True, stable=True)[:rank]
    i, j = order // len(S2), order % len(S2)
    left = (U1[:, None, i] * U2[None, :, j]).flatten(0, 1)  # (p s, k)
    right = (V1[i, :, None] * V2[j, None, :]).flatten(1)  # (k, q t)
    return fix_signs(left, products[order], right)


def kronecker_factors(
    one: torch.Tensor | Factored, two: torch.Tensor | Factored, rank: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors (p s, k) and (k, q t) of kron(one, two) of least rank k, or the best of rank `rank`."""
    svd = kronecker(one, two, rank)
    return svd.balanced(max(1, int((svd.sigma > 1e-14 * svd.sigma[0]).sum())))


def tucker_factors(up: torch.Tensor, mid: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors (m, r) and (r, n x kernel) of a convolution's update with a core `mid` (r, r2, *kernel).

    The update of weight[i, j] is the sum over a and b of up[i, a] mid[a, b] down[b, j]: up (m, r), down (r2, n), with
    or without kernels of one element. `mid` and `down` fold into one factor, so the rank is r.
    """
    core = mid.flatten(2)  # (r, r2, k)
    return up.flatten(1), torch.einsum("abk,bj->ajk", core, down.flatten(1)).flatten(1)


def singular_values(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Return the singular values of up @ down, descending, fp64, accurate down to eps times the largest."""
    Rb = torch.linalg.qr(up.double(), mode="r")[1]
    Ra = torch.linalg.qr(down.double().T, mode="r")[1]
    sigma: torch.Tensor = torch.linalg.svdvals((Rb @ Ra.T).cpu())
    return sigma


def inner(up1: torch.Tensor, down1: torch.Tensor, up2: torch.Tensor, down2: torch.Tensor) -> float:
    """Return the Frobenius inner product <up1 @ down1, up2 @ down2>, in fp64."""
    return float(((up1.double().T @ up2.double()) * (down1.double() @ down2.double().T)).sum())


def squared_norm(up: torch.Tensor, down: torch.Tensor) -> float:
    """Return the squared Frobenius norm of up @ down, in fp64."""
    return max(inner(up, down, up, down), 0.0)


def squared_distance(one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Return |up1 @ down1 - up2 @ down2|^2, in fp64: from Grams, and by QR where those would lose its digits."""
    up, down = (side.double() for side in add([(*one, 1.0), (*other, -1.0)]))
    left, right = up.T @ up, down @ down.T
    square = float((left * right).sum())
    largest = float((left.diagonal() * right.diagonal()).sqrt().sum()) ** 2  # what may have cancelled in the sum
    return square if square > 1e-9 * largest else float(singular_values(up, down).square().sum())


def fix_signs(left: torch.Tensor, sigma: torch.Tensor, right: torch.Tensor) -> Factored:
    """Make the entry of largest magnitude of each left vector positive, in place: equal results on every machine."""
    low, high = left.amin(dim=0), left.amax(dim=0)  # (k,) each; three times as fast as aminmax
    sign = torch.where(-low > high, -1.0, 1.0).to(left.dtype)
    return Factored(left.mul_(sign), sigma, right.mul_(sign[:, None]))


def small_svd(M: torch.Tensor) -> Factored:
    """Return the SVD of a core (or of a stack), by the CPU: a GPU is slower at small ones. Signs are as they come."""
    U, sigma, Vh = torch.linalg.svd(M.cpu(), full_matrices=False)
    return Factored(U.to(M.device), sigma.to(M.device), Vh.to(M.device))


def _cholesky_basis(M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return (L, e) with (M e)^T (M e) = L L^T for M (m, R), columns scaled to norm 1 by e; None where singular."""
    if M.shape[1] > M.shape[0]:
        return None
    gram = M.T @ M
    norms = gram.diagonal().sqrt()
    if not bool((norms > 0).all()):
        return None
    L, info = torch.linalg.cholesky_ex(gram / norms / norms[:, None])
    if int(info) or float(L.diagonal().min()) < LEAST:
        return None
    return L, 1 / norms
