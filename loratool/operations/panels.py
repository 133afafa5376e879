"""The units of a merge: rows of one matrix plus every adapter's delta of them, rounded once."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from loratool import dtypes
from loratool.errors import InputError, MismatchError
from loratool.layouts import Rows
from loratool.plan import Emit, Facts, Load, Out
from loratool.tensors import TensorRef

if TYPE_CHECKING:
    import torch

PANEL = 64 << 20  # bytes of weight a unit: the piece that is scheduled and journalled
TILE = 1 << 19  # bytes of weight in flight: with its fp32 sum it stays in a core's cache until it is written


class Term(NamedTuple):
    """One adapter's part in a weight: its factors, weight times scaling, and the output rows it is for (None: all)."""

    up: TensorRef
    down: TensorRef
    factor: float
    into: Rows | None = None


@dataclass(frozen=True)
class MergePanel:
    """Rows `start` to `stop` of one matrix, plus every adapter's delta of those rows (none: only a cast).

    The matrix begins at row `row` of the output: an expert of a stack does not begin at 0.
    """

    weight: TensorRef
    out: Out
    terms: tuple[Term, ...]
    transposed: bool
    row: int
    start: int
    stop: int

    @property
    def key(self) -> str:
        """Tensor and rows."""
        return f"{self.out.name}[{self.row + self.start}:{self.row + self.stop}]"

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """The rows of the weight, and every factor."""
        return self.weight.rows(self.start, self.stop), *(ref for t in self.terms for ref in (t.up, t.down))

    @property
    def outs(self) -> tuple[Out, ...]:
        """The merged weight."""
        return (self.out,)

    @property
    def scratch(self) -> int:
        """The factors as loaded, widened and joined, and a tile as read, summed and rounded."""
        tile = max(stop - start for start, stop in self._tiles()) * prod(self.weight.shape[1:])
        stacks = {ref.pieces: ref.held for t in self.terms for ref in (t.up, t.down) if ref.view}
        joined = 24 * sum(t.down.shape[0] for t in self.terms) * sum(_as_matrix(self.weight.shape))
        return joined + 24 * tile + sum(stacks.values())

    def run(self, load: Load, emit: Emit) -> Facts:
        """Read, add, round and write tile by tile."""
        import torch

        from loratool.algebra import lowrank
        from loratool.algebra.deltas import is_finite

        double = "F64" in (self.weight.dtype, self.out.dtype)
        wide = torch.float64 if double else torch.float32
        narrow = getattr(torch, dtypes.torch_name(self.out.dtype))
        left, right = self._factors(load, wide)  # (rows, r), (r, columns)
        tiles = self._tiles()
        height = max(stop - start for start, stop in tiles)
        stored = getattr(torch, dtypes.torch_name(self.weight.dtype))
        raw = torch.empty(height, *self.weight.shape[1:], dtype=stored)
        sums = torch.empty(height, prod(self.weight.shape[1:]), dtype=wide, device=left.device)
        result = torch.empty_like(sums, dtype=narrow)
        for start, stop in tiles:
            rows = stop - start
            tile, rounded = sums[:rows], result[:rows]
            tile.copy_(load(self.weight.rows(self.start + start, self.start + stop), raw[:rows]).flatten(1))
            if left.shape[1]:
                tile.addmm_(left[start:stop], right)
            rounded.copy_(tile)
            if not is_finite(rounded):
                raise InputError(_overflow(tile, rounded, narrow), where=self.out.name)
            emit(self.out, self.row + self.start + start, rounded)
        return {"delta": lowrank.squared_norm(left, right) if left.shape[1] else 0.0}

    def _tiles(self) -> list[tuple[int, int]]:
        return self.weight.rows(self.start, self.stop).panels(TILE)

    def _factors(self, load: Load, wide: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (left (rows, r), right (r, columns)) with left @ right the sum of all deltas of these rows.

        Terms are joined in the order of their bytes, so that the order of adapters cannot change a bit of the result.
        """
        import torch

        from loratool.algebra import lowrank
        from loratool.algebra.deltas import as_matrices, is_finite, spread

        loaded = []
        for term in self.terms:
            up, down = (matrix.to(wide) for matrix in as_matrices(load(term.up), load(term.down)))
            if not (is_finite(up) and is_finite(down)):
                raise InputError("the adapter's factors hold NaN or infinity", where=term.up.name)
            if term.into is not None:
                up = spread(up, term.into, self.weight.shape[1 if self.transposed else 0])
            pair = (down.T, up.T) if self.transposed else (up, down)
            loaded.append((pair[0][self.start : self.stop], pair[1], term.factor))
        if len(loaded) > 1:
            loaded.sort(key=lambda t: (_digest(t[1]), _digest(t[0]), t[2]))
        if not loaded:
            return torch.zeros(self.stop - self.start, 0, dtype=wide), torch.zeros(0, 1, dtype=wide)
        return lowrank.add(loaded)


@dataclass(frozen=True)
class SameValues:
    """A check: a base weight that an adapter's file carries along must be the base's own."""

    source: str
    copy: TensorRef
    weight: TensorRef
    outs: tuple[Out, ...] = ()

    @property
    def key(self) -> str:
        """The adapter's file and the tensor's name in it."""
        return f"check:{self.source}:{self.copy.name}"

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """Both."""
        return self.copy, self.weight

    @property
    def scratch(self) -> int:
        """Two tiles and their comparison."""
        return 16 * TILE

    def run(self, load: Load, emit: Emit) -> Facts:
        """Compare the values tile by tile."""
        same_shape = self.copy.shape == self.weight.shape
        for start, stop in self.weight.panels(TILE):
            if not same_shape or not bool(
                (load(self.copy.rows(start, stop)) == load(self.weight.rows(start, stop))).all()
            ):
                raise MismatchError(
                    "the adapter was saved with another base weight (a resized or trained embedding)",
                    where=self.copy.name,
                    hint="saved base weights are not merged yet: give the base that the adapter was trained on",
                )
        return {}


def _overflow(tile: torch.Tensor, rounded: torch.Tensor, narrow: torch.dtype) -> str:
    import torch

    if bool(torch.isfinite(tile).all()):
        count = int((~torch.isfinite(rounded)).sum())
        return (
            f"{count} merged values overflow {str(narrow).removeprefix('torch.')}: choose --dtype bfloat16 or float32"
        )
    return "the merged weight would hold NaN or infinity (so does the base, or the adapter is damaged)"


def _digest(tensor: torch.Tensor) -> bytes:
    return sha256(tensor.contiguous().numpy(force=True).tobytes()).digest()


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], prod(shape[1:])
