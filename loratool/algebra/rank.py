"""Rank rules: from a spectrum to a rank. One function each; all take singular values in descending order.

A zero spectrum keeps rank 1: formats have no rank 0.
"""

from __future__ import annotations

import torch


def fixed(sigma: torch.Tensor, rank: int) -> int:
    """`rank`, or as many singular values as there are."""
    return max(1, min(rank, len(sigma)))


def energy(sigma: torch.Tensor, share: float) -> int:
    """Return the smallest rank that keeps at least `share` (0 < share <= 1) of the sum of squared singular values."""
    kept = torch.cumsum(sigma.double() ** 2, 0)
    # relative slack of a few ulp: a share of 1.0 must not keep noise that the sum itself cannot resolve
    wanted = share * float(kept[-1]) * (1 - 1e-15)
    return fixed(sigma, int(torch.searchsorted(kept, torch.tensor(wanted, dtype=kept.dtype))) + 1)
