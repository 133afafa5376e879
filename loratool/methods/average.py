"""The mean of the deltas."""

from __future__ import annotations

from collections.abc import Sequence

from loratool.combining import Share, method


@method("weights")
def average(shares: Sequence[Share]) -> list[float]:
    """The mean of the deltas, each times its weight (model soups, arXiv 2203.05482): one that is absent counts as 0."""
    return [share.weight / len(shares) for share in shares]
