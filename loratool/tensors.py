"""Tensors as descriptions: what they are and where their bytes lie. Nothing here reads a byte.

A TensorRef is picklable (paths and offsets, never an open file); selecting rows or joining references makes another
reference without reading. Shapes are tuples, dtypes are safetensors names, sizes are bytes, data is row-major.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

from loratool import dtypes


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
    """Bytes at hand, such as a new alpha or a tensor out of a pickle."""

    data: bytes

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return len(self.data)


@dataclass(frozen=True)
class TensorRef:
    """A tensor that can be read later: its name at the source, shape, dtype, and the pieces that hold its bytes.

    `pieces` is empty for a tensor that a unit of a plan will compute.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Span | Inline, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return prod(self.shape) * dtypes.itemsize(self.dtype)

    @property
    def info(self) -> TensorInfo:
        """The description without the place."""
        return TensorInfo(self.name, self.shape, self.dtype)

    def renamed(self, name: str) -> TensorRef:
        """Return the same bytes under another name."""
        return replace(self, name=name)

    def rows(self, start: int, stop: int) -> TensorRef:
        """Rows `start` to `stop` of the first axis, as another reference."""
        row = self.nbytes // self.shape[0] if self.shape[0] else 0
        return TensorRef(
            self.name, (stop - start, *self.shape[1:]), self.dtype, _cut(self.pieces, start * row, stop * row)
        )

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
                out.append(Inline(piece.data[low:high]))
        at += piece.nbytes
    return tuple(out)


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
