"""DARE, then TIES' election, of the deltas, PEFT's combination_type="dare_ties_svd"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratool.combining import Density, Matrix, Seed, Sign, method

if TYPE_CHECKING:
    import torch


@method("dense")
def dare_ties_svd(
    matrices: Sequence[Matrix],
    *,
    density: Density = 0.5,
    sign: Sign = "total",
    seed: Seed = 0,
) -> torch.Tensor:
    """DARE, and the mean over the adapters that agree on the elected sign."""
    import torch

    from loratool.algebra import sparse

    generator = torch.Generator().manual_seed(seed)
    thin = [sparse.dropped(m.delta, density, generator) for m in matrices]
    return sparse.disjoint_mean(thin, [m.weight for m in matrices], sign)
