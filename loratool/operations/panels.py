"""The units of a merge: rows of one matrix plus every adapter's delta of them, rounded once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import isfinite, prod
from typing import TYPE_CHECKING

from loratool import dtypes
from loratool.deltas import Dora, Full, LowRank, Taken, Term
from loratool.encodings import Scaled, Transposed4Bit
from loratool.errors import InputError
from loratool.plan import Emit, Facts, Load, Out
from loratool.tensors import TensorRef

if TYPE_CHECKING:
    import torch

    from loratool.algebra.merging import Sums

PANEL = 64 << 20  # bytes of weight a unit: the piece that is scheduled and journalled
TILE = 1 << 19  # bytes of weight in flight: with its fp32 sum it stays in a core's cache until it is written


@dataclass(frozen=True)
class MergePanel:
    """Rows `start` to `stop` of one matrix, plus every adapter's delta of those rows (none: only a cast).

    The matrix begins at row `row` of the output: an expert of a stack does not begin at 0. `compute` is the dtype of
    the arithmetic, "float32" or "float64". `as_trained`: what the weight was quantised to while the adapter was trained
    on it (nf4, nf4-double), and what is decoded of that is then what the deltas are added to. `as_nf4`: what is
    written is what nf4 makes of the sum in the output's dtype; the panel begins with a block, as every 64th row does.
    """

    weight: TensorRef
    out: Out
    terms: tuple[Term, ...]
    transposed: bool
    row: int
    start: int
    stop: int
    compute: str = "float32"
    as_trained: str = ""
    as_nf4: bool = False

    @property
    def key(self) -> str:
        """Tensor and rows."""
        return f"{self.out.key}[{self.row + self.start}:{self.row + self.stop}]"

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """The rows of the weight, and every factor."""
        return self.weight.rows(self.start, self.stop), *(ref for t in self.terms for ref in t.delta.refs)

    @property
    def outs(self) -> tuple[Out, ...]:
        """The merged weight."""
        return (self.out,)

    @property
    def scratch(self) -> int:
        """The factors as loaded, widened and joined, and a tile as read, summed and rounded."""
        tile = max(stop - start for start, stop in self.tiles()) * prod(self.weight.shape[1:])
        stacks = {ref.pieces: ref.held for t in self.terms for ref in t.delta.refs if ref.view}
        loaded = (
            ref for t in self.terms if not isinstance(t.delta, Full) for ref in t.delta.refs
        )  # Full comes in rows
        factors = 24 * sum(prod(ref.shape) for ref in loaded)
        decoded = max((self.weight.rows(a, b).held for a, b in self.tiles()), default=0) if self.weight.view else 0
        tiles = 24 if all(_is_plain(t) for t in self.terms) else 64
        return factors + tiles * tile + decoded + sum(stacks.values())

    def run(self, load: Load, emit: Emit) -> Facts:
        """Read, add, round and write tile by tile."""
        sums = self.sums(load)
        lost = 0.0
        for start, result, error in self.rounded(sums):
            lost += error
            emit(self.out, self.row + start, result)
        return {"delta": sums.moved, "lost": lost if self.terms and not self.as_nf4 else 0.0}

    def rounded(self, sums: Sums) -> Iterator[tuple[int, torch.Tensor, float]]:
        """Yield what is written: (row within the panel, tile in a buffer, the squared error of its rounding)."""
        import torch

        from loratool.algebra.deltas import is_finite
        from loratool.algebra.merging import squared, what_overflows
        from loratool.algebra.quantisation import quantise_nf4

        narrow = getattr(torch, dtypes.torch_name(self.out.dtype))
        rounded: torch.Tensor | None = None
        for start, tile in sums:
            rounded = torch.empty_like(tile, dtype=narrow) if rounded is None or len(rounded) < len(tile) else rounded
            result = rounded[: len(tile)].copy_(tile)
            error = 0.0
            if narrow is not tile.dtype or not is_finite(result):
                error = squared(tile.sub_(result.to(tile.dtype)))  # of the rounding; not finite where a value is not
                if not isfinite(error):
                    raise InputError(what_overflows(tile, narrow), where=self.out.name)
            yield start, quantise_nf4(result) if self.as_nf4 else result, error

    def sums(self, load: Load) -> Sums:
        """Return what gives the merged rows, in the dtype of the arithmetic."""
        import torch

        from loratool.algebra.merging import Sums

        double = "F64" in (self.weight.dtype, self.out.dtype) or self.compute == "float64"
        return Sums(
            self.weight,
            self.terms,
            load,
            tiles=[(self.start + a, self.start + b) for a, b in self.tiles()],
            survey=self.weight.panels(TILE),
            wide=torch.float64 if double else torch.float32,
            transposed=self.transposed,
            as_trained=self.as_trained,
        )

    def tiles(self) -> list[tuple[int, int]]:
        """Cut the panel, from its first row on."""
        if in_one_tile(self.terms, self.transposed):
            return [(0, self.stop - self.start)]
        return self.weight.rows(self.start, self.stop).panels(TILE)


def _is_plain(term: Term) -> bool:
    return isinstance(term.delta, LowRank)


def panels_of(weight: TensorRef, terms: Sequence[Term], *, transposed: bool) -> list[tuple[int, int]]:
    """Cut a matrix into units; one whose norms or rotations run along the cut ones stays whole."""
    whole = any(t.delta.mixes(outputs=not transposed) for t in terms)
    return [(0, weight.shape[0])] if whole else weight.panels(PANEL)


def in_one_tile(terms: Sequence[Term], transposed: bool) -> bool:
    """Whether some delta takes all rows of the stored matrix at once: norms alone could be surveyed beforehand."""
    mixing = [t.delta for t in terms if t.delta.mixes(outputs=not transposed)]
    return any(not isinstance(d.of if isinstance(d, Taken) else d, Dora) for d in mixing)


@dataclass(frozen=True)
class RequantisedPanel:
    """A merged panel that goes back into the encoding of the base: fp8 with its scales, or MXFP4.

    `merged` has the logical rows. `codes` and `scales` are outputs as flat matrices (E x rows, columns); the panel's
    first rows there are `code_row` and `scale_row`. What MXFP4 stores is the transpose of the logical matrix.
    """

    merged: MergePanel
    codes: Out
    scales: Out
    code_row: int
    scale_row: int

    @property
    def key(self) -> str:
        """Tensor and rows."""
        return f"{self.codes.key}[{self.code_row}:]"

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """The stored codes and scales, and every factor."""
        return self.merged.reads

    @property
    def outs(self) -> tuple[Out, ...]:
        """Both."""
        return self.codes, self.scales

    @property
    def scratch(self) -> int:
        """The merged rows in fp32, and what encoding makes of them."""
        rows = self.merged.stop - self.merged.start
        return self.merged.scratch + 24 * rows * prod(self.merged.weight.shape[1:])

    def run(self, load: Load, emit: Emit) -> Facts:
        """Merge all rows, encode them, write codes and scales, and measure what that lost."""
        import torch

        from loratool.algebra import quantisation
        from loratool.algebra.merging import squared, what_overflows

        sums = self.merged.sums(load)
        values = torch.cat([tile.clone() for _, tile in sums]).float()
        panel = self.merged.weight.rows(self.merged.start, self.merged.stop)
        assert panel.view is not None
        assert panel.view.encoding is not None
        codes, scales, decoded = quantisation.encode_like(panel.view.encoding, values, [load(r) for r in panel.view.of])
        lost = squared(values.sub_(decoded))
        if not isfinite(lost):
            raise InputError(what_overflows(values, codes.dtype), where=self.codes.name)
        emit(self.codes, self.code_row, codes)
        emit(self.scales, self.scale_row, scales)
        return {"delta": sums.moved, "lost": lost}


def requantised_panels(matrix: MergePanel, codes: Out, scales: Out) -> list[RequantisedPanel]:
    """Cut a touched matrix of an encoded weight into units that hold whole tiles of its scales."""
    encoding = matrix.weight.view.encoding if matrix.weight.view else None
    assert encoding is not None
    rows, columns = matrix.weight.shape[0], prod(matrix.weight.shape[1:])
    if isinstance(encoding, Transposed4Bit):
        row = matrix.row // rows * columns
        return [RequantisedPanel(matrix, codes, scales, row, row)]
    assert isinstance(encoding, Scaled)
    height, grid = encoding.tile[0], -(-rows // encoding.tile[0])
    step = max(PANEL // (2 * columns) // height, 1) * height
    step = rows if in_one_tile(matrix.terms, matrix.transposed) else step
    which = matrix.row // rows
    return [
        RequantisedPanel(
            replace(matrix, start=start, stop=min(start + step, rows)),
            codes,
            scales,
            matrix.row + start,
            which * grid + start // height,
        )
        for start in range(0, rows, step)
    ]
