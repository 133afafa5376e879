"""TIES of the deltas (Yadav et al. 2023, arXiv 2306.01708), PEFT's combination_type="ties_svd"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratool.combining import Density, Matrix, Sign, method

if TYPE_CHECKING:
    import torch


@method("dense")
def ties_svd(
    matrices: Sequence[Matrix],
    *,
    density: Density = 0.5,
    sign: Sign = "total",
) -> torch.Tensor:
    """TIES: of every delta the largest entries, and their mean over the adapters that agree on the elected sign."""
    from loratool.algebra import sparse

    thin = [sparse.trimmed(m.delta, density) for m in matrices]
    return sparse.disjoint_mean(thin, [m.weight for m in matrices], sign)
