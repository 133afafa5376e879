"""The weighted sum of the deltas at the rank that they have."""

from __future__ import annotations

from collections.abc import Sequence

from loratool.combining import Share, method


@method("weights")
def linear(shares: Sequence[Share]) -> list[float]:
    """The weighted sum of the deltas at their own rank: what PEFT's `linear` means, without its cross terms."""
    return [share.weight for share in shares]
