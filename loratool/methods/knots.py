"""KnOTS (Stoica et al. 2024, arXiv 2410.19735): merge the adapters in a basis that they share.

The deltas side by side, [D_1 ... D_n] (out, n in), have the SVD U S [V_1 ... V_n]: U S is common to all, so that only
the V_i are merged, by TIES or DARE. All in factor space: with up_i = Q L_i for one orthonormal Q (out, R) the SVD is
that of [L_1 down_1 ... L_n down_n] (R, n in), and of that the R x R matrix left of an LQ decomposition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from loratool.combining import Density, Pair, Seed, Sign, method

if TYPE_CHECKING:
    import torch


@method("factors", rank="all")
def knots(
    pairs: Sequence[Pair],
    *,
    merge: Annotated[Literal["ties", "dare_ties", "dare_linear", "linear"], "what merges V"] = "ties",
    density: Density = 0.3,
    sign: Sign = "total",
    seed: Seed = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """TIES or DARE in the shared basis of all deltas: their SVD side by side, in which only V is merged."""
    import torch

    from loratool.algebra import sparse

    present = [p for p in pairs if p.up.shape[1]]
    left, sigma, rights = stacked_svd(present)
    weights = [p.weight for p in present]
    generator = torch.Generator().manual_seed(seed)
    if merge == "linear":
        merged = sparse.weighted_sum(rights, weights)
    elif merge == "dare_linear":
        merged = sparse.weighted_sum([sparse.dropped(V, density, generator) for V in rights], weights)
    else:
        thin = [
            sparse.trimmed(V, density) if merge == "ties" else sparse.dropped(V, density, generator) for V in rights
        ]
        merged = sparse.disjoint_mean(thin, weights, sign)
    return left * sigma, merged


def stacked_svd(pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Return U (out, k), sigma (k,), and the V_i (k, in) with scaling_i up_i @ down_i = U diag(sigma) V_i; fp64.

    k is the rank of the deltas side by side, up to rounding.
    """
    import torch

    from loratool.algebra import lowrank

    ups = torch.cat([p.up.double() * p.scaling for p in pairs], dim=1)  # (out, R)
    Q, L = torch.linalg.qr(ups)  # (out, r), (r, R)
    cuts = torch.split(L, [p.up.shape[1] for p in pairs], dim=1)
    stacked = torch.cat([cut @ p.down.double() for cut, p in zip(cuts, pairs, strict=True)], dim=1)  # (r, n in)
    Qa, Ra = torch.linalg.qr(stacked.T)
    U, sigma, Vh = lowrank.small_svd(Ra.T)  # (r, r)
    kept = max(1, int((sigma > 1e-12 * sigma[0]).sum()))
    left, sigma, right = lowrank.fix_signs(Q @ U[:, :kept], sigma[:kept], Vh[:kept] @ Qa.T)
    return left, sigma, list(torch.split(right, [p.down.shape[1] for p in pairs], dim=1))
