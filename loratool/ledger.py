"""The ledger: every input tensor has a fate, and every output tensor has a maker.

Nothing is declared by hand: fates follow from what the units read and what the files hold, by the place of the bytes.
A tensor that nothing touches must be explained (read for its value, left out by the user's glob or flag), or the job is
refused.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence

from loratool.errors import MismatchError
from loratool.plan import Input, OutFile, TensorFile, Unit
from loratool.tensors import Inline, Span, TensorRef


class Places:
    """Bytes as disjoint intervals: of files by their path, of what is at hand by identity."""

    def __init__(self, refs: Iterable[TensorRef]) -> None:
        found: dict[str | int, list[tuple[int, int]]] = {}
        for ref in refs:
            for piece in ref.pieces:
                source, start = _place(piece)
                found.setdefault(source, []).append((start, start + piece.nbytes))
        self.intervals = {source: _joined(sorted(each)) for source, each in found.items()}

    def hold(self, ref: TensorRef) -> bool:
        """Whether all bytes of a tensor are among these."""
        return all(self._holds(piece) for piece in ref.pieces)

    def touch(self, ref: TensorRef) -> bool:
        """Whether any byte of a tensor is among these."""
        return any(self._touches(piece) for piece in ref.pieces)

    def _touches(self, piece: Span | Inline) -> bool:
        source, start = _place(piece)
        intervals = self.intervals.get(source, [])
        before = bisect_left(intervals, (start + piece.nbytes, 0)) - 1
        return before >= 0 and intervals[before][1] > start

    def _holds(self, piece: Span | Inline) -> bool:
        source, start = _place(piece)
        intervals = self.intervals.get(source, [])
        at = bisect_right(intervals, (start, float("inf"))) - 1
        return not piece.nbytes or (at >= 0 and start + piece.nbytes <= intervals[at][1])


def _place(piece: Span | Inline) -> tuple[str | int, int]:
    """Return what a piece lies in, and where it starts there."""
    return (piece.path, piece.offset) if isinstance(piece, Span) else (id(piece.whole), piece.start)


def _joined(intervals: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, stop in intervals:
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((start, stop))
    return joined


def close(
    inputs: Iterable[Input], units: Sequence[Unit], files: Iterable[OutFile], later: Iterable[TensorRef] = ()
) -> dict[str, dict[str, int]]:
    """Return how many tensors of each input were computed with, copied, or explained; raise where one has no fate.

    `later` are references that will be copied once ranks are settled.
    """
    written = [ref for file in files if isinstance(file, TensorFile) for ref in file.tensors]
    computed = Places(ref for unit in units for ref in unit.reads)
    copied = Places([*written, *later])
    summary: dict[str, dict[str, int]] = {}
    for source, tensors, explained, otherwise in inputs:
        counts = summary.setdefault(source, {})
        open_names = []
        for name, ref in tensors.items():
            fate = explained.get(name, "")
            if not fate and ref.nbytes:
                fate = "computed" if computed.hold(ref) else "copied" if copied.hold(ref) else otherwise
            elif not fate:
                fate = "empty"
            if not fate:
                open_names.append(name)
            counts[fate] = counts.get(fate, 0) + 1
        if open_names:
            more = f" and {len(open_names) - 6} more" if len(open_names) > 6 else ""
            raise MismatchError(
                f"the ledger does not close: nothing accounts for {', '.join(open_names[:6])}{more}",
                where=source,
                hint="this would be a silent loss; please report it with the names above",
            )
    _check_makers(units, files)
    return summary


def _check_makers(units: Sequence[Unit], files: Iterable[OutFile]) -> None:
    """Raise where an output tensor has neither bytes nor a unit that computes it."""
    made = {(out.file, out.name) for unit in units for out in unit.outs}
    for file in files:
        for ref in file.tensors if isinstance(file, TensorFile) else ():
            if ref.nbytes and not ref.pieces and (file.name, ref.name) not in made:
                raise MismatchError(f"the ledger does not close: nothing makes {ref.name}", where=file.name)
