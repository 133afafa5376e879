"""PEFT's combination_type="ties"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratool.combining import Density, Pair, Sign, method

if TYPE_CHECKING:
    import torch


@method("factors", rank="all", one_rank=True)
def ties(
    pairs: Sequence[Pair],
    *,
    density: Density = 0.5,
    sign: Sign = "total",
) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's `ties`: trim and elect signs in A and in B one by one; for TIES of the deltas take ties_svd."""
    from loratool.algebra import factorwise, sparse

    return factorwise.by_factor(
        pairs, lambda ts, ws: sparse.disjoint_mean([sparse.trimmed(t, density) for t in ts], ws, sign)
    )
