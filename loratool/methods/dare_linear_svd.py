"""DARE of the deltas (Yu et al. 2023, arXiv 2311.03099), PEFT's combination_type="dare_linear_svd"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratool.combining import Density, Matrix, Seed, method

if TYPE_CHECKING:
    import torch


@method("dense")
def dare_linear_svd(
    matrices: Sequence[Matrix],
    *,
    density: Density = 0.5,
    seed: Seed = 0,
) -> torch.Tensor:
    """DARE: entries of every delta dropped at random, the others rescaled, and the weighted sum."""
    import torch

    from loratool.algebra import sparse

    generator = torch.Generator().manual_seed(seed)
    thin = [sparse.dropped(m.delta, density, generator) for m in matrices]
    return sparse.weighted_sum(thin, [m.weight for m in matrices])
