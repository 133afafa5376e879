"""PEFT's combination_type="dare_linear"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratool.combining import Density, Pair, Seed, method

if TYPE_CHECKING:
    import torch


@method("factors", rank="all", one_rank=True)
def dare_linear(
    pairs: Sequence[Pair],
    *,
    density: Density = 0.5,
    seed: Seed = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's `dare_linear`: drop and rescale entries of A and of B one by one; of the deltas: dare_linear_svd."""
    import torch

    from loratool.algebra import factorwise, sparse

    generator = torch.Generator().manual_seed(seed)
    return factorwise.by_factor(
        pairs, lambda ts, ws: sparse.weighted_sum([sparse.dropped(t, density, generator) for t in ts], ws)
    )
