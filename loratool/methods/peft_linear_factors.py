"""PEFT's combination_type="linear": sums of the factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratool.combining import Pair, method

if TYPE_CHECKING:
    import torch


@method("factors", rank="all", one_rank=True)
def peft_linear_factors(
    pairs: Sequence[Pair],
) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's `linear`: sums of the factors, with cross terms; for parity, for `cat` and `svd` are the true sum."""
    from loratool.algebra import factorwise, sparse

    return factorwise.by_factor(pairs, sparse.weighted_sum)
