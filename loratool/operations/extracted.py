"""What an extraction says of itself: a row a module, and warnings where no low rank can hold what changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod, sqrt
from typing import Protocol

from loratool.adapter import Finding, Target
from loratool.errors import UsageError
from loratool.operations import relative
from loratool.operations.pairing import Pairs, shape_in_file
from loratool.operations.ranks import Rule
from loratool.operations.resize import cost_of, losses, residual_at, shown
from loratool.plan import Facts, Report

_ENOUGH = 0.9  # the share of the energy that is spoken of where a rank keeps little


class Extracted(Protocol):
    """What has to be known of a module."""

    @property
    def key(self) -> str:
        """Its name."""

    @property
    def target(self) -> Target:
        """The module."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in, *kernel)."""

    @property
    def rank(self) -> int:
        """The largest rank that could be chosen."""

    @property
    def dtype(self) -> str:
        """That of the factors."""


def describe(
    report: Report,
    modules: Sequence[Extracted],
    changed: Mapping[str, tuple[Facts, int]],
    left_out: float,
    pairs: Pairs,
) -> None:
    """Say in the rows what became of each module, and in the totals of all; `left_out` is the squared change beside."""
    for unit, row in zip(modules, report.rows, strict=True):
        if unit.key not in changed:
            row.update(unchanged=True)
            continue
        fact, rank = changed[unit.key]
        row.update(rank=rank, norm=sqrt(fact["total"]), **losses(fact["total"], residual_at(fact, rank)))
        row["noise_floor"] = sqrt(fact["noise"] / fact["total"])
        row["bytes"] = rank * cost_of(shape_in_file(unit.target, unit.shape, pairs), unit.dtype)
        row["sigma"] = shown(fact["sigma"])
    rows = [row for unit, row in zip(modules, report.rows, strict=True) if unit.key in changed]
    found = [changed[unit.key] for unit in modules if unit.key in changed]
    of_base, weighted = relative.told([f for f, _ in found], [residual_at(*f) for f in found])
    for row, more in zip(rows, of_base, strict=True):
        row.update(more)
    report.totals |= weighted
    total = sum(fact["total"] for fact, _ in changed.values())
    report.totals["changed"] = len(changed)
    if total:
        report.totals |= losses(total, sum(residual_at(*found) for found in changed.values()))
        report.totals["excess"] = max(fact["excess"] for fact, _ in changed.values())
        report.totals["noise_floor"] = sqrt(sum(fact["noise"] for fact, _ in changed.values()) / total)
        report.totals["norm"] = sqrt(total)
        report.totals["left_out"] = left_out / (left_out + total)
    report.totals["bytes"] = sum(int(row.get("bytes", 0)) for row in report.rows)


def full_rank(rule: Rule, modules: Sequence[Extracted]) -> list[Finding]:
    """Refuse a rank that no module can have; say where some have less."""
    if not isinstance(rule.rank, int):
        return []
    small = [u for u in modules if min(u.shape[0], prod(u.shape[1:])) < rule.rank]
    if len(small) == len(modules) and not rule.rank_for:
        most = max(min(u.shape[0], prod(u.shape[1:])) for u in modules)
        raise UsageError(
            f"--rank {rule.rank} is above the smaller side of every weight ({most} at most)", hint=f"--rank {most}"
        )
    if not small:
        return []
    what = f"{len(small)} modules, such as {small[0].key}, have fewer rows or columns: they are extracted at full rank"
    return [Finding("info", f"--rank {rule.rank}", what)]


def too_little(
    found: Sequence[Facts], ranks: Sequence[int], rule: Rule, modules: Sequence[Extracted], most: int
) -> list[Finding]:
    """Warn where less than half of what is no noise is kept, with the rank that would keep most, if that is known.

    `most` is the rank at which rules that adapt stop where nobody said another.
    """
    stopped = [u for u in modules if rule.adapts and u.rank == most]
    notes = []
    if rule.max_rank is None and any(f["rank"] == most for f in found) and stopped:
        what = f"some modules stop at rank {most}, the most without --max-rank"
        notes.append(Finding("info", "ranks", what, "--max-rank N allows more"))
    lost, whole = 0.0, 0.0
    for fact, rank in zip(found, ranks, strict=True):
        whole += max(fact["total"] - fact["noise"], 0.0)
        lost += max(residual_at(fact, rank) - fact["noise"], 0.0)
    if not whole or lost <= 0.5 * whole:
        return notes
    enough = _rank_that_keeps(found, _ENOUGH)
    known = max(len(f["sigma"]) for f in found)
    told = f"rank {enough} would keep {_ENOUGH:.0%}" if enough else f"{_ENOUGH:.0%} would take more than rank {known}"
    what = f"these ranks keep {1 - lost / whole:.0%} of the change: it is not of low rank ({told})"
    return [*notes, Finding("warning", "ranks", what, "--energy 0.9 chooses the ranks; --budget shares out a size")]


def _rank_that_keeps(found: Sequence[Facts], share: float) -> int:
    """Return the one rank at which all modules together keep a share of their energy; 0 where it is not known."""
    wanted, kept = share * sum(f["total"] for f in found), 0.0
    for rank in range(max(len(f["sigma"]) for f in found)):
        kept += sum(f["sigma"][rank] ** 2 for f in found if rank < len(f["sigma"]))
        if kept >= wanted:
            return rank + 1
    return 0
