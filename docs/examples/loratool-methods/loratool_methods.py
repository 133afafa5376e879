"""A loratool plugin: two more methods of combining adapters, DELLA and Iso-C."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from loratool import Bounds, Matrix, Method, Pair, hookimpl, method

if TYPE_CHECKING:
    import torch


@method("dense")
def della(
    matrices: Sequence[Matrix],
    *,
    density: Annotated[float, "mean share of the entries that is kept", Bounds(0, 1, open_low=True)] = 0.5,
    epsilon: Annotated[float, "how far large entries are above the mean, and small ones below", Bounds(0, 1)] = 0.2,
    seed: Annotated[int, "of the masks"] = 0,
) -> torch.Tensor:
    """DELLA (Deep et al. 2024, arXiv 2406.11617): small entries of a row are dropped more often; then as TIES."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    thin = []
    for matrix in matrices:
        ranks = matrix.delta.abs().argsort(dim=1).argsort(dim=1)  # 0 is the smallest of its row
        share = ranks / max(matrix.delta.shape[1] - 1, 1)
        keep = (density - epsilon + 2 * epsilon * share).clamp(1e-3, 1.0).cpu()
        mask = torch.bernoulli(keep, generator=generator)
        thin.append(matrix.delta * (mask / keep).to(matrix.delta.device))
    stacked = torch.stack(thin)
    weights = torch.tensor([m.weight for m in matrices], dtype=stacked.dtype, device=stacked.device)
    elected = torch.where(stacked.sum(0) >= 0, 1, -1)
    agrees = stacked.sign() == elected
    return (weights[:, None, None] * stacked * agrees).sum(0) / agrees.sum(0).clamp(min=1)


@method("factors", rank="all")
def iso_c(pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
    """Iso-C (Marczak et al. 2025, arXiv 2502.04959): the weighted sum with every singular value at their mean."""
    import torch

    up = torch.cat([p.up.double() * (p.weight * p.scaling) for p in pairs], dim=1)
    down = torch.cat([p.down.double() for p in pairs])
    left, right = torch.linalg.qr(up), torch.linalg.qr(down.T)  # up = left.Q left.R, down = right.R^T right.Q^T
    rotation, sigma, other = torch.linalg.svd(left.R @ right.R.T)  # a core of the size of the ranks
    rank = int((sigma > 1e-9 * sigma[0]).sum())
    return sigma[:rank].mean() * left.Q @ rotation[:, :rank], other[:rank] @ right.Q.T


@hookimpl
def register_methods() -> list[Method]:
    """Both."""
    return [della, iso_c]
