"""Deltas as matrices: from loaded factors of any kind to up (out, r) and down (r, in x kernel), and back."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch


def as_matrices(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (up (out, r), down (r, in x kernel)) of linear or convolution factors: fp32, or fp64 where either is.

    For a convolution, up.flatten(1) @ down.flatten(1) is the update of weight.flatten(1) exactly: a kernel-sized
    convolution followed by a 1x1 one (Cui et al., LoCon; PEFT's Conv layers).
    """
    wide = torch.float64 if torch.float64 in (up.dtype, down.dtype) else torch.float32
    return up.flatten(1).to(wide), down.flatten(1).to(wide)


def as_factors(
    up: torch.Tensor, down: torch.Tensor, down_shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return matrices in the shapes of a layer's factors: down (r, *down_shape[1:]), up (out, r, 1, ...)."""
    rank = down.shape[0]
    ones = (1,) * (len(down_shape) - 2)
    return up.to(dtype).reshape(-1, rank, *ones), down.to(dtype).reshape(rank, *down_shape[1:])


def spread(up: torch.Tensor, rows: Sequence[range], out: int) -> torch.Tensor:
    """Return up (n, r) as (out, r): its rows at the places that `rows` lists in order, zeros elsewhere."""
    result = up.new_zeros(out, up.shape[1])
    at = 0
    for r in rows:
        result[r.start : r.stop : r.step] = up[at : at + len(r)]
        at += len(r)
    return result


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite. The sum is one pass; only a suspicious sum is looked into."""
    return isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())
