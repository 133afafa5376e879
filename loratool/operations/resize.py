"""resize: every delta at another rank, chosen exactly from its whole spectrum in factor space.

The truncated SVD of what a module's deltas come to is found in a small core (loratool.operations.recompress), so the
retained energy is exact. The scaling is folded into the new factors: the result has scale 1. What has no factors
(modules that were trained as a whole, biases, tokens) is kept as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod, sqrt
from typing import Any

from loratool import dtypes
from loratool.adapter import Adapter, Finding, Target
from loratool.architecture import Architecture
from loratool.deltas import Delta, Full, Replace
from loratool.errors import InputError
from loratool.hookspecs import Format
from loratool.operations import sizes
from loratool.operations.ranks import Rule
from loratool.operations.recompress import (
    ResizeModule,
    ScaleBias,
    dtype_of,
    reads_of,
    rebuilt,
    recompressible,
    settled_factors,
)
from loratool.operations.sizes import Sized
from loratool.operations.writing import spell
from loratool.plan import Facts, Input, OutFile, Plan, Report, Settled, Spooled

__all__ = ["ResizeModule", "Rule", "plan"]

Deltas = dict[Target, tuple[Delta, ...]]


def plan(
    adapter: Adapter,
    architecture: Architecture | None,
    rule: Rule,
    format: Format,
    *,
    dtype: str = "keep",
    pad_rank: int | str | None = None,
    curve: bool = False,
    options: Mapping[str, Any],
) -> Plan:
    """Plan the recompression of every delta of `adapter` under `rule`, written in `format`."""
    sizes.check_pad(pad_rank, rule.budget)
    rule.require_patterns_used(adapter.targets, adapter.origin.path)
    factored, kept = recompressible(adapter, architecture, "resize")
    if not factored:
        raise InputError("no module of this adapter has factors", where=adapter.origin.path)
    units = [
        ResizeModule(t, ds, rule.of(t), dtype_of(ds) if dtype == "keep" else dtypes.from_torch_name(dtype))
        for t, ds in factored.items()
    ]
    biases = scaled_biases(kept)
    report = Report(verb="resize", findings=list(adapter.findings))
    report.totals = {"modules": len(units), "bytes_before": sum(ref.nbytes for u in units for ref in u.reads)}
    report.findings += _upsizing(rule, units)
    report.rows = [{"module": u.key, "rank_before": u.rank} for u in units]

    def settle(facts: Mapping[str, Facts], spooled: Spooled) -> Settled:
        others: Deltas = {**kept, **{b.target: (b.settled(spooled),) for b in biases}}
        found = [facts[u.key] for u in units]
        modules = [_sized(u, f, adapter, architecture, format) for u, f in zip(units, found, strict=True)]

        def deltas_at(ranks: Sequence[int]) -> Deltas:
            new = {
                u.target: rebuilt(u.deltas, settled_factors(u.outs, rank, spooled))
                for u, rank in zip(units, ranks, strict=True)
            }
            padded, report_rank = sizes.settled(new, pad_rank)
            if report_rank:
                report.totals["padded_to"] = report_rank
            return joined_deltas({t: (d,) for t, d in padded.items()}, others)

        def spelled(ranks: Sequence[int], into: Report) -> tuple[OutFile, ...]:
            return spell(replace(adapter, deltas=deltas_at(ranks)), architecture, format, options, into)

        ranks = [int(f["rank"]) for f in found]
        if rule.budget is not None:
            ranks = sizes.fitted(modules, rule.budget, lambda r: spelled(r, Report("resize")))
        for unit, row, fact, rank in zip(units, report.rows, found, ranks, strict=True):
            row.update(rank=rank, **losses(fact["total"], residual_at(fact, rank)))
            row["bytes"] = rank * cost_of(unit.shape, unit.dtype)
            row["sigma"] = shown(fact["sigma"])
        total = sum(f["total"] for f in found)
        report.totals |= losses(total, sum(residual_at(f, r) for f, r in zip(found, ranks, strict=True)))
        if curve:
            everything = [replace(m, sigma=tuple(f["sigma"]), beyond=0.0) for m, f in zip(modules, found, strict=True)]
            report.totals["curve"] = sizes.curve(everything)
        files = spelled(ranks, report)
        report.totals["bytes"] = sum(row["bytes"] for row in report.rows)
        report.totals["file_bytes"] = sizes.size_of(files)
        return Settled(report, files)

    inputs = (Input(adapter.origin.path, adapter.tensors, adapter.explained),)
    later = (
        *adapter.base_copies.values(),
        *reads_of(kept),
        *(ref for ds in factored.values() for ref in magnitudes(ds)),
    )
    return Plan((*units, *biases), report, settle, (), format.single_file or "file" in options, inputs, later)


def _upsizing(rule: Rule, units: Sequence[ResizeModule]) -> list[Finding]:
    """Say so where the rank that was asked for makes nothing smaller."""
    if not isinstance(rule.rank, int) or rule.rank_for or any(rule.rank < u.rank for u in units):
        return []
    what = f"no module has a rank above {max(u.rank for u in units)}: nothing gets smaller"
    return [Finding("warning", f"--rank {rule.rank}", what, "--pad-rank fills ranks up with zeros")]


def _sized(
    unit: ResizeModule, fact: Facts, adapter: Adapter, architecture: Architecture | None, format: Format
) -> Sized:
    sigma = tuple(fact["sigma"][: fact["rank"]])
    beyond = max(fact["total"] - sum(s * s for s in sigma), 0.0) if len(sigma) < len(fact["sigma"]) else 0.0
    group = sizes.group_of(unit.target, adapter, architecture, format.name)
    return Sized(unit.target, sigma, cost_of(unit.shape, unit.dtype), beyond, group)


def cost_of(shape: tuple[int, ...], dtype: str) -> int:
    """Return the bytes that one rank of a module takes."""
    return (shape[0] + prod(shape[1:])) * dtypes.itemsize(dtype)


def residual_at(fact: Facts, rank: int) -> float:
    """Return the squared error that is left at a rank, which may be below the one that the unit chose."""
    if rank == fact["rank"]:
        return float(fact["residual"])
    return float(fact["residual"] + sum(s * s for s in reversed(fact["sigma"][rank : fact["rank"]])))


def scaled_biases(kept: Mapping[Target, Sequence[Delta]]) -> list[ScaleBias]:
    """Return a unit for each vector whose scaling has to be folded in."""
    return [
        ScaleBias(t, d, d.value.dtype)
        for t, deltas in kept.items()
        for d in deltas
        if isinstance(d, Full) and not isinstance(d, Replace) and d.scaling != 1
    ]


def magnitudes(deltas: Sequence[Delta]) -> list[Any]:
    """Return the magnitudes of DoRA among the deltas of a module, which are copied."""
    return [d.refs[-1] for d in deltas if d.kind == "dora"]


def joined_deltas(*several: Mapping[Target, tuple[Delta, ...]]) -> Deltas:
    """Return all deltas of several mappings."""
    found: Deltas = {}
    for deltas in several:
        for target, ones in deltas.items():
            found[target] = (*found.get(target, ()), *ones)
    return found


def losses(total: float, residual: float) -> dict[str, float]:
    """Return the share of energy that is kept, and the relative Frobenius error."""
    lost = residual / total if total else 0.0
    return {"retained": 1 - lost, "error": sqrt(lost)}


def shown(sigma: Sequence[float]) -> list[float]:
    """Return singular values with the digits that a report needs."""
    return [float(f"{s:.6g}") for s in sigma]
