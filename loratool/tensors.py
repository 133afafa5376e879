"""Tensors as descriptions: what they are and where their bytes lie. Nothing here reads a byte.

A TensorRef is picklable (paths and offsets, never an open file); selecting rows or joining references makes another
reference without reading. Shapes are tuples, dtypes are safetensors names, sizes are bytes, data is row-major.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import accumulate
from math import prod
from typing import NamedTuple

from loratool import dtypes
from loratool.encodings import Encoding
from loratool.errors import MismatchError
from loratool.layouts import within


def module_of(name: str) -> str:
    """Return the module path of a tensor: its name less a final `.weight`; other tensors keep their full name."""
    return name.removesuffix(".weight")


class TensorInfo(NamedTuple):
    """What a header says of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return prod(self.shape) * dtypes.itemsize(self.dtype)


class Span(NamedTuple):
    """Bytes in a file."""

    path: str
    offset: int
    nbytes: int


class Inline(NamedTuple):
    """Bytes at hand, such as a new alpha or a tensor of a live model: those of `whole` from `start` to `stop`."""

    whole: bytes
    start: int = 0
    stop: int | None = None

    @property
    def data(self) -> bytes:
        """The bytes."""
        return self.whole[self.start : self.stop]

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return (len(self.whole) if self.stop is None else self.stop) - self.start

    def __repr__(self) -> str:  # goes into the digests of plans: short, and the same for the same bytes
        return f"Inline({self.nbytes} bytes, {sha256(self.data).hexdigest()})"


class View(NamedTuple):
    """How a tensor follows from others where that is more than a choice of rows: it has to be read to be rearranged.

    rows        the rows `ranges` of a tensor that is itself a view
    columns     the columns `ranges` of a matrix
    transposed  the transpose of a matrix
    joined      the rows of several matrices, one after another
    woven       E matrices (rows, n) as one (rows, n x E), the matrix changing fastest: PEFT's stacked lora_B
    padded      a matrix with columns of zeros before it (as many as `ranges` says) and behind it, up to its shape
    quantised   the values that an `encoding` gives to the stored tensors
    scaled      a tensor times `factor`, in float32 and rounded back
    """

    kind: str
    of: tuple[TensorRef, ...]
    ranges: tuple[range, ...] = ()
    encoding: Encoding | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class TensorRef:
    """A tensor that can be read later: its name at the source, shape, dtype, and the pieces that hold its bytes.

    `pieces` is empty for a tensor that a unit of a plan will compute. Where there is a `view`, the pieces are those of
    the tensors that it rearranges.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Span | Inline, ...] = ()
    view: View | None = None

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return prod(self.shape) * dtypes.itemsize(self.dtype)

    @property
    def held(self) -> int:
        """Bytes that reading it takes up: of a view, all that it is made from."""
        return self.nbytes if self.view is None else sum(ref.held for ref in self.view.of)

    @property
    def info(self) -> TensorInfo:
        """The description without the place."""
        return TensorInfo(self.name, self.shape, self.dtype)

    def renamed(self, name: str) -> TensorRef:
        """Return the same bytes under another name."""
        return replace(self, name=name)

    def rows(self, start: int, stop: int) -> TensorRef:
        """Rows `start` to `stop` of the first axis, as another reference."""
        return self if (start, stop) == (0, self.shape[0]) else self.take((range(start, stop),))

    def take(self, ranges: Sequence[range]) -> TensorRef:
        """Return the rows that `ranges` select, in that order, as another reference."""
        if tuple(ranges) == (range(self.shape[0]),):
            return self
        shape = (sum(len(r) for r in ranges), *self.shape[1:])
        if self.view is not None:
            return self._taken(self.view, ranges, shape)
        row = self.nbytes // self.shape[0] if self.shape[0] else 0
        runs = [run for r in ranges for run in ([r] if r.step == 1 else [range(n, n + 1) for n in r])]
        pieces = tuple(piece for r in runs for piece in _cut(self.pieces, r.start * row, r.stop * row))
        return TensorRef(self.name, shape, self.dtype, pieces)

    def _taken(self, view: View, ranges: Sequence[range], shape: tuple[int, ...]) -> TensorRef:
        """Take rows of a view: from what it is of, where that spares the reading of all of it."""
        inner = view.of[0]
        if view.encoding and prod(shape) and prod(self.shape[1:]) % view.encoding.line == 0:
            return self._decodable(view, ranges, shape)
        if view.kind == "columns":
            return inner.take(ranges).columns(view.ranges)
        if view.kind == "transposed":
            return inner.columns(ranges).transposed()
        if view.kind == "rows":
            return inner.take(within(view.ranges, ranges))
        if view.kind == "scaled":
            return inner.take(ranges).scaled(view.factor)
        stacked = all(part.shape[1:] == self.shape[1:] for part in view.of)
        if view.kind == "joined" and stacked and len(ranges) == 1 and len(ranges[0]) and ranges[0].step == 1:
            start, stop = ranges[0].start, ranges[0].stop
            begins = accumulate((part.shape[0] for part in view.of[:-1]), initial=0)
            cuts = [
                (part, max(start - at, 0), min(stop - at, part.shape[0]))
                for part, at in zip(view.of, begins, strict=True)
            ]
            return joined(self.name, [part.rows(low, high) for part, low, high in cuts if low < high])
        return TensorRef(self.name, shape, self.dtype, self.pieces, View("rows", (self,), tuple(ranges)))

    def _decodable(self, view: View, ranges: Sequence[range], shape: tuple[int, ...]) -> TensorRef:
        """Take rows of a quantised tensor: a run of rows from the stored bytes of that run alone."""
        low, high = min(min(r) for r in ranges if r), max(max(r) for r in ranges if r) + 1
        if any(r.step != 1 for r in ranges):  # single rows would be so many references
            cover = self.rows(low, high)
            within_cover = tuple(range(r.start - low, r.stop - low, r.step) for r in ranges)
            return TensorRef(self.name, shape, self.dtype, cover.pieces, View("rows", (cover,), within_cover))
        parts = [part for r in ranges for part in self._run(view, r)]
        return replace(parts[0] if len(parts) == 1 else joined(self.name, parts), shape=shape)

    def _run(self, view: View, rows: range) -> Iterator[TensorRef]:
        """Cut a run of rows out of a quantised tensor, as parts that hold one line of the encoding a row."""
        assert view.encoding
        line = view.encoding.line
        lines = prod(self.shape[1:]) // line
        for cut in view.encoding.cuts(rows.start * lines, rows.stop * lines):
            of = [ref if r is None else ref.rows(r.start, r.stop) for ref, r in zip(view.of, cut.rows, strict=True)]
            yield quantised(self.name, (cut.lines, line), self.dtype, of, cut.encoding)

    def item(self, index: int) -> TensorRef:
        """Return one slab of the first axis, which goes: expert `index` of a stack."""
        slab = self.rows(index, index + 1)
        return replace(slab, shape=slab.shape[1:])

    def columns(self, ranges: Sequence[range]) -> TensorRef:
        """Return the columns that `ranges` select from this matrix, in that order."""
        if self.view is not None and self.view.kind == "transposed":
            return self.view.of[0].take(ranges).transposed()
        if self.view is not None and self.view.kind == "columns":
            inner, ranges = self.view.of[0], within(self.view.ranges, ranges)
        else:
            inner = self
        shape = (self.shape[0], sum(len(r) for r in ranges))
        return TensorRef(self.name, shape, self.dtype, inner.pieces, View("columns", (inner,), tuple(ranges)))

    def transposed(self) -> TensorRef:
        """Return the transpose of this matrix."""
        if self.view is not None and self.view.kind == "transposed":
            return self.view.of[0]
        return TensorRef(self.name, self.shape[::-1], self.dtype, self.pieces, View("transposed", (self,)))

    def scaled(self, factor: float) -> TensorRef:
        """Return this tensor times a factor."""
        if factor == 1:
            return self
        return TensorRef(self.name, self.shape, self.dtype, self.pieces, View("scaled", (self,), factor=factor))

    def panels(self, nbytes: int) -> list[tuple[int, int]]:
        """Cut the first axis into panels of about `nbytes`: (start, stop) pairs that depend on shape and dtype only.

        Heights are multiples of 64 rows; a tail under 16 rows joins the panel before (thin tails round differently).
        """
        rows = self.shape[0] if self.shape else 0
        if not rows or not self.nbytes:
            return []
        height = max(64, nbytes // (self.nbytes // rows) // 64 * 64)
        starts = list(range(0, rows, height))
        if len(starts) > 1 and rows - starts[-1] < 16:
            starts.pop()
        return list(zip(starts, [*starts[1:], rows], strict=True))


def _cut(pieces: tuple[Span | Inline, ...], start: int, stop: int) -> tuple[Span | Inline, ...]:
    """Return the bytes from `start` to `stop` of a chain of pieces."""
    out: list[Span | Inline] = []
    at = 0
    for piece in pieces:
        low, high = max(start - at, 0), min(stop - at, piece.nbytes)
        if low < high:
            if isinstance(piece, Span):
                out.append(Span(piece.path, piece.offset + low, high - low))
            else:
                out.append(Inline(piece.whole, piece.start + low, piece.start + high))
        at += piece.nbytes
    return tuple(out)


def joined(name: str, refs: Sequence[TensorRef]) -> TensorRef:
    """Return the rows of several tensors as one tensor; MismatchError where their dtypes or row shapes differ."""
    if len(kinds := {(r.dtype, *r.shape[1:]) for r in refs}) > 1:
        told = " and ".join(sorted(f"{dtype} {[*row]}" for dtype, *row in kinds))
        raise MismatchError(f"rows of different dtypes or shapes cannot be one tensor: {told}", where=name)
    pieces = tuple(p for r in refs for p in r.pieces)
    shape = (sum(r.shape[0] for r in refs), *refs[0].shape[1:])
    view = View("joined", tuple(refs)) if any(r.view for r in refs) else None
    return TensorRef(name, shape, refs[0].dtype, pieces, view)


def woven(name: str, refs: Sequence[TensorRef]) -> TensorRef:
    """Return E matrices (rows, n) as one (rows, n x E) whose column k x E + e is column k of matrix e."""
    rows, columns = refs[0].shape
    pieces = tuple(p for r in refs for p in r.pieces)
    return TensorRef(name, (rows, columns * len(refs)), refs[0].dtype, pieces, View("woven", tuple(refs)))


def padded(ref: TensorRef, columns: int, before: int = 0) -> TensorRef:
    """Return a matrix with columns of zeros: `before` it, and behind it up to `columns`."""
    if ref.shape[1] == columns:
        return ref
    view = View("padded", (ref,), (range(before),))
    return TensorRef(ref.name, (ref.shape[0], columns), ref.dtype, ref.pieces, view)


def quantised(
    name: str, shape: tuple[int, ...], dtype: str, stored: Sequence[TensorRef], encoding: Encoding
) -> TensorRef:
    """Return the tensor that an encoding makes of stored ones, in the order in which the encoding names them."""
    pieces = tuple(p for r in stored for p in r.pieces)
    return TensorRef(name, shape, dtype, pieces, View("quantised", tuple(stored), encoding=encoding))


def zeros(name: str, shape: tuple[int, ...], dtype: str) -> TensorRef:
    """Return a tensor of zeros."""
    return TensorRef(name, shape, dtype, (Inline(bytes(prod(shape) * dtypes.itemsize(dtype))),))


def inline_scalar(name: str, value: float) -> TensorRef:
    """Return a 0-d F32 tensor holding `value`, such as kohya's alpha."""
    return TensorRef(name, (), "F32", (Inline(dtypes.encode_scalar(value)),))


@dataclass(frozen=True)
class TensorSource:
    """An opened source of tensors: a checkpoint, a component of one, or the files of an adapter.

    `tensors` is in file order; `metadata` is the header's string map; `config` the parsed JSON beside it, or None.
    `alpha` is the user's word where the files have none.
    """

    path: str
    tensors: Mapping[str, TensorRef]
    metadata: Mapping[str, str]
    config: Mapping[str, object] | None = None
    alpha: float | None = None

    def small(self, name: str) -> float:
        """Return the number in a one-element tensor; storage inlines the bytes of those for adapters."""
        ref = self.tensors[name]
        return dtypes.decode_scalar(ref.dtype, b"".join(p.data for p in ref.pieces if isinstance(p, Inline)))
