"""The weighted sum at a smaller rank."""

from __future__ import annotations

from collections.abc import Sequence

from loratool.combining import Share, method


@method("weights")
def svd(shares: Sequence[Share]) -> list[float]:
    """The best approximation of the weighted sum at a rank: by default the largest that the adapters have."""
    return [share.weight for share in shares]
