"""Joining low-rank deltas into one, exactly and without arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loratool.deltas import LowRank
from loratool.errors import MismatchError
from loratool.tensors import joined, padded, zeros


def below_each_other(pieces: Mapping[str, LowRank], heights: Mapping[str, int], where: object) -> LowRank:
    """Return the delta of weights that lie one below the other, as `heights` has them: name and rows of each.

    Without a piece a weight has no delta: zeros. Pieces with one `down` keep their rank; else the downs are joined, the
    ups side by side, and ranks add up.
    """
    present = {name: pieces[name] for name in heights if name in pieces}
    require_alike(list(present.values()), where)
    first = next(iter(present.values()))
    shared = all(p.down == first.down for p in present.values())
    rank, before, ups = first.rank if shared else sum(p.rank for p in present.values()), 0, []
    for name, rows in heights.items():
        if name in present:
            ups.append(padded(present[name].up, rank, before))
            before += 0 if shared else present[name].rank
        else:
            ups.append(zeros("", (rows, rank), first.up.dtype))
    down = first.down if shared else joined("", [p.down for p in present.values()])
    return LowRank(down, joined("", ups), first.scaling)


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
