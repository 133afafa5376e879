"""Taking a fused weight's delta apart: where each part uses columns of its own, those alone go with it.

Three adapters of one fused weight are stored as one of the sum of their ranks: downs below each other, ups as blocks.
Cutting that by its rows would give every part the rank of all; the columns that are zero in a part, with their rows of
`down`, can be left out exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loratool.adapter import Target
from loratool.deltas import LowRank
from loratool.layouts import Rows, runs
from loratool.plan import Emit, Facts, Load, Out
from loratool.tensors import TensorRef


@dataclass(frozen=True)
class FindBlocks:
    """One fused delta: which columns of `up` each of its parts uses."""

    target: Target
    delta: LowRank
    outs: tuple[Out, ...] = ()

    @property
    def key(self) -> str:
        """The module, and that it is looked at only."""
        return f"{self.target} (blocks)"

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """The up factor."""
        return (self.delta.up,)

    @property
    def scratch(self) -> int:
        """The up factor twice."""
        return 2 * self.delta.up.nbytes

    def run(self, load: Load, emit: Emit) -> Facts:
        """Return the numbers of the columns that are not zero, part by part."""
        used, end = load(self.delta.up) != 0, 0
        columns = []
        for height in self.target.shares(self.delta.up.shape[0]):
            columns.append(used[end : end + height].any(dim=0).nonzero().flatten().tolist())
            end += height
        return {"columns": columns}


def apart(unit: FindBlocks, columns: Sequence[Sequence[int]]) -> dict[Target, tuple[LowRank, ...]]:
    """Return the deltas of the parts, each with the columns that it uses; a part that uses none has no delta."""
    delta, target = unit.delta, unit.target
    pieces = delta.cut(target.shares(delta.up.shape[0]))
    found: dict[Target, tuple[LowRank, ...]] = {}
    for part, piece, used in zip(target.parts, pieces, columns, strict=True):
        assert isinstance(piece, LowRank)
        if used:
            found[Target(target.component, (part,))] = (_trimmed(piece, runs(used)),)
    return found


def _trimmed(delta: LowRank, columns: Rows) -> LowRank:
    if sum(map(len, columns)) == delta.rank:
        return delta
    return LowRank(delta.down.take(columns), delta.up.columns(columns), delta.scaling)
