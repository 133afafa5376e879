"""What is in a tensor, number by number: how many are NaN or infinite, how large they are, whether they vary at all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import inf, isfinite
from typing import Any

import torch

#: Below this no training arrives in a 32-bit exponent: such numbers are other data, read as floats.
FAINT = 1e-30


@dataclass
class Tally:
    """Counts of a tensor's numbers; `low` and `high` bound the finite ones, `faint` are not zero and below FAINT."""

    count: int = 0
    nan: int = 0
    infinite: int = 0
    faint: int = 0
    zero: int = 0
    low: float = inf
    high: float = -inf

    def add(self, tensor: torch.Tensor) -> None:
        """Count the numbers of one more piece."""
        values = tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32).flatten()
        self.count += values.numel()
        low, high = (float(bound) for bound in values.aminmax())
        if not (isfinite(low) and isfinite(high)):  # NaN is both
            self.nan += int(values.isnan().sum())
            self.infinite += int(values.isinf().sum())
            values = values[values.isfinite()]
            if not values.numel():
                return
            low, high = (float(bound) for bound in values.aminmax())
        self.low, self.high = min(self.low, low), max(self.high, high)
        zero = values.numel() - int(values.count_nonzero())
        self.zero += zero
        self.faint += int((values.abs() < FAINT).sum()) - zero


def tally(pieces: Iterable[torch.Tensor]) -> dict[str, Any]:
    """Return the counts over all pieces of a tensor, as JSON values: bounds are 0 where no number is finite."""
    found = Tally()
    for piece in pieces:
        if piece.numel():
            found.add(piece)
    if found.low > found.high:
        found.low = found.high = 0.0
    return asdict(found)
