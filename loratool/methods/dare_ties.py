"""PEFT's combination_type="dare_ties"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratool.combining import Density, Pair, Seed, Sign, method

if TYPE_CHECKING:
    import torch


@method("factors", rank="all", one_rank=True)
def dare_ties(
    pairs: Sequence[Pair],
    *,
    density: Density = 0.5,
    sign: Sign = "total",
    seed: Seed = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's `dare_ties`: drop, rescale and elect signs in A and in B one by one; of the deltas: dare_ties_svd."""
    import torch

    from loratool.algebra import factorwise, sparse

    generator = torch.Generator().manual_seed(seed)
    return factorwise.by_factor(
        pairs, lambda ts, ws: sparse.disjoint_mean([sparse.dropped(t, density, generator) for t in ts], ws, sign)
    )
