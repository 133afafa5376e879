"""Checks that run with a merge: what is assumed to be equal must be."""

from __future__ import annotations

from dataclasses import dataclass

from loratool.errors import MismatchError
from loratool.operations.panels import TILE
from loratool.plan import Emit, Facts, Load, Out
from loratool.tensors import TensorRef


@dataclass(frozen=True)
class SameValues:
    """A check that two tensors hold the same values: a base weight that an adapter carries along, or one of a pair.

    With `tolerance` they may differ by that much of their norm, as two roundings of one weight do.
    """

    source: str
    copy: TensorRef
    weight: TensorRef
    what: str
    hint: str
    tolerance: float = 0.0
    outs: tuple[Out, ...] = ()

    @property
    def key(self) -> str:
        """The file and both tensors' names."""
        return f"check:{self.source}:{self.copy.name}:{self.weight.name}"

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """Both."""
        return self.copy, self.weight

    @property
    def scratch(self) -> int:
        """Two tiles and their comparison."""
        return 32 * TILE + sum(ref.held for ref in self.reads if ref.view)

    def run(self, load: Load, emit: Emit) -> Facts:
        """Compare the values tile by tile."""
        from loratool.algebra.merging import squared

        error = total = 0.0
        if self.copy.shape == self.weight.shape:
            for start, stop in self.weight.panels(TILE):
                one, two = load(self.copy.rows(start, stop)), load(self.weight.rows(start, stop))
                error += squared(one.double() - two.double())
                total += squared(two)
        else:
            error = float("inf")
        if not error <= self.tolerance**2 * total:
            raise MismatchError(self.what, where=self.copy.name, hint=self.hint)
        return {"difference": (error / total) ** 0.5 if error else 0.0}
