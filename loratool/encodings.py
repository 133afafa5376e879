"""How quantised weights lie in a file: which stored bytes hold which rows of the weight. Numbers only, nothing is read.

An encoding cuts a weight by *lines*, the shortest runs of its elements (in the order of the logical, row-major tensor)
that can be read alone: single elements of flat blocks, rows of scaled matrices, columns of transposed ones. A cut names
the rows of each stored tensor that hold those lines, and the encoding of what was cut; algebra/quantisation.py decodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias


class Nested(NamedTuple):
    """Double quantisation: absmax is itself a byte a block, to be scaled by groups of `block` and moved by `offset`.

    `skip` is the place of the first byte in its group.
    """

    block: int
    offset: float
    skip: int = 0


class FourBit(NamedTuple):
    """bitsandbytes' nf4 and fp4 (`name`): two codes a byte, the first in the high half; a scale a block of elements.

    Blocks run over the flattened tensor, across rows. Stored: codes U8 (bytes,) and absmax F32 (blocks,); with `nested`
    absmax U8 (blocks,), its own absmax F32 (groups,) and the map of its codes F32 (256,). The first `skip` elements
    of the first block are not wanted.
    """

    name: str
    block: int
    nested: Nested | None = None
    skip: int = 0

    @property
    def line(self) -> int:
        """Elements of a line."""
        return 1

    def cuts(self, start: int, stop: int) -> Iterator[Cut]:
        """Cut out the elements `start` to `stop`: the blocks that cover them, less bytes behind the last one."""
        start, stop = start + self.skip, stop + self.skip
        first, last = start // self.block, _ceil(stop, self.block)
        codes = range(first * self.block // 2, _ceil(stop, 2))
        blocks = range(first, last)
        cut = self._replace(skip=start % self.block)
        if self.nested is None:
            yield Cut(cut, stop - start, (codes, blocks))
            return
        size, before = self.nested.block, self.nested.skip
        groups = range((before + first) // size, _ceil(before + last, size))
        nested = self.nested._replace(skip=(before + first) % size)
        yield Cut(cut._replace(nested=nested), stop - start, (codes, blocks, groups, None))


class Scaled(NamedTuple):
    """One value a byte and a scale a tile of each matrix: int8 (scale / 127) and fp8 (`name`).

    A tile is a block, a row or a whole matrix; the last tiles of a matrix may be partial. Stored: values (E x rows,
    columns) and scales (E x tile rows, tile columns) of E matrices of shape `matrix`, one below the other. The first
    `skip` rows of the first row of tiles are not there.
    """

    name: str
    matrix: tuple[int, int]
    tile: tuple[int, int]
    skip: int = 0

    @property
    def line(self) -> int:
        """Elements of a line."""
        return self.matrix[1]

    def cuts(self, start: int, stop: int) -> Iterator[Cut]:
        """Cut out the rows `start` to `stop`, and the rows of scales that cover them."""
        height = self.tile[0]
        grid = _ceil(self.matrix[0], height)
        for which, low, high in _runs(start + self.skip, stop + self.skip, self.matrix[0]):
            before = which.start * self.matrix[0]
            rows = range(before + low - self.skip, before + (len(which) - 1) * self.matrix[0] + high - self.skip)
            first = which.start * grid + low // height
            scales = range(first, (which.stop - 1) * grid + _ceil(high, height))
            yield Cut(self._replace(skip=low % height), len(rows), (rows, scales))


class Transposed4Bit(NamedTuple):
    """MXFP4: two E2M1 codes a byte, the first in the low half; an E8M0 scale for every 32 neighbours of a row.

    gpt-oss stores E matrices (out, in) and means their transposes (in, out): the lines are the stored columns. Stored:
    codes U8 (E x out, in / 2) and scales U8 (E x out, in / 32); `matrix` is (out, in), and `columns` those wanted.
    """

    name: str
    matrix: tuple[int, int]
    columns: range

    @property
    def line(self) -> int:
        """Elements of a line."""
        return self.matrix[0]

    def cuts(self, start: int, stop: int) -> Iterator[Cut]:
        """Cut out the logical rows `start` to `stop`: whole matrices are read, part of their columns decoded."""
        height = self.matrix[0]
        for which, low, high in _runs(start, stop, len(self.columns)):
            rows = range(which.start * height, which.stop * height)
            yield Cut(self._replace(columns=self.columns[low:high]), len(which) * (high - low), (rows, rows))


Encoding: TypeAlias = FourBit | Scaled | Transposed4Bit


class Cut(NamedTuple):
    """Some lines of a weight: how they are encoded, how many, and the rows of each stored tensor (None: all)."""

    encoding: Encoding
    lines: int
    rows: tuple[range | None, ...]


def _runs(start: int, stop: int, height: int) -> Iterator[tuple[range, int, int]]:
    """Split rows of stacked matrices into runs that lie in one matrix or are whole matrices: (which, from, to)."""
    while start < stop:
        which, low = divmod(start, height)
        whole = 0 if low else (stop - start) // height
        if whole:
            yield range(which, which + whole), 0, height
            start += whole * height
        else:
            high = min(low + stop - start, height)
            yield range(which, which + 1), low, high
            start += high - low


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)
