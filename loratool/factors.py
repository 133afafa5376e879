"""Joining low-rank deltas into one, exactly and without arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

from loratool.deltas import LowRank
from loratool.errors import MismatchError
from loratool.tensors import joined, padded, zeros


def below_each_other(pieces: Sequence[LowRank | None], rows: Sequence[int], where: object) -> LowRank:
    """Return the delta of weights that lie one below the other; None is a weight of `rows[n]` rows without a delta.

    Pieces with one `down` keep their rank; else the downs are joined, the ups side by side, and ranks add up.
    """
    present = [p for p in pieces if p is not None]
    require_alike(present, where)
    first = present[0]
    if all(p.down == first.down for p in present):
        every = zip(pieces, rows, strict=True)
        ups = [zeros("", (n, first.rank), first.up.dtype) if p is None else p.up for p, n in every]
        return LowRank(first.down, joined("", ups), first.scaling)
    rank, before, ups = sum(p.rank for p in present), 0, []
    for piece, count in zip(pieces, rows, strict=True):
        if piece is None:
            ups.append(zeros("", (count, rank), first.up.dtype))
        else:
            ups.append(padded(piece.up, rank, before))
            before += piece.rank
    return LowRank(joined("", [p.down for p in present]), joined("", ups), first.scaling)


def require_alike(deltas: Sequence[LowRank], where: object) -> None:
    """Raise MismatchError where deltas have no common scaling, dtypes or inputs, so that one pair cannot hold them."""
    if len({d.scaling for d in deltas}) > 1:
        what, hint = "different scalings", "loratool resize --energy 1 folds the scalings in"
    elif len({(d.down.dtype, d.up.dtype, d.down.shape[1:]) for d in deltas}) > 1:
        what = "different dtypes or input sizes"
        hint = "loratool resize --energy 1 --dtype float32 makes the dtypes one"
    else:
        return
    raise MismatchError(f"its parts have {what}, so they have no common factors", where=str(where), hint=hint)
