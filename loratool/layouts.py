"""How the output rows of a fused weight lie: which rows are q, which are k, which are v.

Every layout in use is one formula. The rows come in `groups` equal groups; a group holds, one after another,
`widths[n]` rows of each part n. With W = sum(widths), part n owns for every group g the `widths[n]` rows from
g * W + widths[0] + ... + widths[n - 1] on.

    concat            groups = 1             [q; k; v]                                   Baichuan, Phi-3, MPT
    interleave_heads  groups = heads         [q0 k0 v0; q1 k1 v1; ...]                   BLOOM, GPT-NeoX, Falcon
    blocks            groups = n             the same in n large blocks                  CodeGen
    stride            groups = rows / parts  rows 0, 2, 4 ... and rows 1, 3, 5 ...       gpt-oss
    stack             groups = 1             as many equal slabs as there are rows for    DBRX's experts

Sizes are numbers or expressions over config keys (loratool.expressions), and `out`, the rows of the weight at hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratool import expressions
from loratool.errors import MismatchError

Size = str | int
Rows = tuple[range, ...]


@dataclass(frozen=True)
class Layout:
    """Rows in `groups` groups, each with `widths[n]` rows of part n. Build one with the functions below."""

    name: str
    groups: Size
    widths: tuple[Size, ...]

    def rows(self, out: int, config: Mapping[str, Any]) -> list[Rows]:
        """Return the rows of each part of a weight with `out` rows; MismatchError where the sizes do not add up."""
        values = {**config, "out": out}
        groups = expressions.size(self.groups, values)
        widths = [expressions.size(width, values) for width in self.widths]
        if self.name == "stack" and widths[0] > 0:
            widths *= out // widths[0]
        height = sum(widths)
        if min([groups, *widths], default=0) < 1 or groups * height != out:
            raise MismatchError(f"{groups} groups of {' + '.join(map(str, widths))} rows are not {out} rows")
        parts: list[Rows] = []
        for n, width in enumerate(widths):
            offset = sum(widths[:n])
            if width == 1:
                parts.append((range(offset, out, height),))
            else:
                parts.append(tuple(range(start, start + width) for start in range(offset, out, height)))
        return parts


def concat(*sizes: Size, parts: int = 0) -> Layout:
    """One block a part, of the given sizes; or `parts` blocks of equal size."""
    return Layout("concat", 1, sizes or (f"out/{parts}",) * parts)


def interleave_heads(groups: Size, *widths: Size) -> Layout:
    """`groups` times (rows of q, rows of k, ...): [n_head, 3, head_dim] and its grouped-query forms."""
    return Layout("interleave_heads", groups, widths)


def blocks(n: int, parts: int) -> Layout:
    """`n` large blocks, each with equal shares of all parts (CodeGen's [4, (q, v, k)])."""
    return Layout("blocks", n, (f"out/{n * parts}",) * parts)


def stride(parts: int) -> Layout:
    """Every `parts`-th row: gate at 0, 2, 4 ... and up at 1, 3, 5 ... (gpt-oss)."""
    return Layout("stride", f"out/{parts}", (1,) * parts)


def stack(height: Size) -> Layout:
    """Slabs of `height` rows, as many as there are, each a layer of its own: DBRX's experts in one 2-D weight."""
    return Layout("stack", 1, (height,))


def count(rows: Sequence[range]) -> int:
    """Return how many rows these ranges select."""
    return sum(len(r) for r in rows)


def within(outer: Sequence[range], inner: Sequence[range]) -> Rows:
    """Return the rows that `inner` selects out of the rows that `outer` selects, in the numbers of the whole weight."""
    found: list[range] = []
    for wanted in inner:
        at = 0
        for have in outer:
            low, high = max(wanted.start - at, 0), min(wanted.stop - at, len(have))
            if low < high and wanted.step != 1:
                low += -(low + at - wanted.start) % wanted.step
            if low < high:
                found.append(have[low : high : wanted.step])
            at += len(have)
    return tuple(found)


def runs(rows: Sequence[int]) -> Rows:
    """Return row numbers, in their order, as ranges: neighbours that ascend by one become one."""
    found: list[range] = []
    for row in rows:
        if found and row == found[-1].stop:
            found[-1] = range(found[-1].start, row + 1)
        else:
            found.append(range(row, row + 1))
    return tuple(found)
