"""resize: every delta at another rank, chosen exactly from its whole spectrum in factor space.

The truncated SVD of what a module's deltas come to is found in a small core (loratool.operations.recompress), so the
retained energy is exact. The scaling is folded into the new factors: the result has scale 1. What has no factors
(modules that were trained as a whole, biases, tokens) is kept as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod, sqrt
from typing import Any

from loratool import dtypes
from loratool.adapter import Adapter, Finding, Target
from loratool.architecture import Architecture
from loratool.deltas import Delta, Full, Replace
from loratool.errors import InputError
from loratool.hookspecs import Format
from loratool.operations import relative, sizes
from loratool.operations.ranks import AUTO, Rule
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
from loratool.tensors import TensorRef, TensorSource

__all__ = ["ResizeModule", "Rule", "plan"]

Deltas = dict[Target, tuple[Delta, ...]]
_MUCH = 0.1  # of a module's energy, that --rank auto may leave out without a word


def plan(
    adapter: Adapter,
    architecture: Architecture | None,
    rule: Rule,
    format: Format,
    *,
    dtype: str = "keep",
    pad_rank: int | str | None = None,
    curve: bool = False,
    relative_to: TensorSource | None = None,
    options: Mapping[str, Any],
) -> Plan:
    """Plan the recompression of every delta of `adapter` under `rule`, written in `format`.

    Errors are measured against the weights of `relative_to`, the base.
    """
    sizes.check_pad(pad_rank, rule.budget)
    if relative_to is not None:
        relative.require_use(rule, curve=curve)
    rule.require_patterns_used(adapter.targets, adapter.origin.path)
    factored, kept = recompressible(adapter, architecture, "resize")
    if not factored:
        raise InputError("no module of this adapter has factors", where=adapter.origin.path)
    units = [
        ResizeModule(t, ds, rule.of(t), dtype_of(ds) if dtype == "keep" else dtypes.from_torch_name(dtype))
        for t, ds in factored.items()
    ]
    yardsticks = relative.weights_of(relative_to, architecture, {u.target: u.shape for u in units})
    units = [replace(u, against=yardsticks[u.target]) for u in units]
    biases = scaled_biases(kept)
    report = Report(verb="resize", findings=list(adapter.findings))
    report.totals = {"modules": len(units), "bytes_before": sum(ref.nbytes for u in units for ref in u.factors)}
    report.findings += _upsizing(rule, units)
    report.rows = [{"module": u.key, "rank_before": u.rank} for u in units]

    ending = _Ending(adapter, units, biases, kept, rule, pad_rank, curve, (architecture, format, options), report)
    return Plan(
        (*units, *biases),
        report,
        ending.settle,
        (),
        format.single_file or "file" in options,
        (Input(adapter.origin.path, adapter.tensors, adapter.explained),),
        _copied(adapter, factored, kept),
    )


@dataclass(frozen=True)
class _Ending:
    """How a resizing ends: the ranks settled, everything written and told. `out` is where to."""

    adapter: Adapter
    units: Sequence[ResizeModule]
    biases: Sequence[ScaleBias]
    kept: Deltas
    rule: Rule
    pad_rank: int | str | None
    curve: bool
    out: tuple[Architecture | None, Format, Mapping[str, Any]]
    report: Report

    def settle(self, facts: Mapping[str, Facts], spooled: Spooled) -> Settled:
        """Write what the units found."""
        units, report, (architecture, format, _) = self.units, self.report, self.out
        found = [facts[u.key] for u in units]
        modules = [_sized(u, f, self.adapter, architecture, format) for u, f in zip(units, found, strict=True)]
        ranks = [int(f["rank"]) for f in found]
        if self.rule.budget is not None:
            ranks = sizes.fitted(modules, self.rule.budget, lambda r: self._spelled(r, spooled, Report("resize")))
        _describe(report, units, found, ranks)
        report.findings += _of_auto(self.rule, units, report.rows)
        if self.curve:
            everything = [replace(m, sigma=tuple(f["sigma"]), beyond=0.0) for m, f in zip(modules, found, strict=True)]
            report.totals["curve"] = sizes.curve(everything)
        files = self._spelled(ranks, spooled, report)
        report.totals["bytes"] = sum(row["bytes"] for row in report.rows)
        report.totals["file_bytes"] = sizes.size_of(files)
        return Settled(report, files)

    def _spelled(self, ranks: Sequence[int], spooled: Spooled, into: Report) -> tuple[OutFile, ...]:
        """Return the files with all deltas at these ranks."""
        pairs = zip(self.units, ranks, strict=True)
        new = {u.target: rebuilt(u.deltas, settled_factors(u.outs, rank, spooled)) for u, rank in pairs}
        factors, padded_to = sizes.settled(new, self.pad_rank)
        into.totals |= {"padded_to": padded_to} if padded_to else {}
        others: Deltas = {**self.kept, **{b.target: (b.settled(spooled),) for b in self.biases}}
        deltas = joined_deltas({t: (d,) for t, d in factors.items()}, others)
        return spell(replace(self.adapter, deltas=deltas), *self.out, into)


def _copied(adapter: Adapter, factored: Deltas, kept: Deltas) -> tuple[TensorRef, ...]:
    """Return the tensors that are written as they are."""
    of_dora = (ref for deltas in factored.values() for ref in magnitudes(deltas))
    return *adapter.base_copies.values(), *reads_of(kept), *of_dora


def _describe(report: Report, units: Sequence[ResizeModule], found: Sequence[Facts], ranks: Sequence[int]) -> None:
    """Say in the rows what each module kept, and in the totals what all did."""
    residuals = [residual_at(fact, rank) for fact, rank in zip(found, ranks, strict=True)]
    of_base, weighted = relative.told(found, residuals)
    for n, (unit, row, fact, rank) in enumerate(zip(units, report.rows, found, ranks, strict=True)):
        row.update(rank=rank, **losses(fact["total"], residuals[n]), **of_base[n])
        row["bytes"] = rank * cost_of(unit.shape, unit.dtype)
        row["sigma"] = shown(fact["sigma"])
    report.totals |= losses(sum(f["total"] for f in found), sum(residuals)) | weighted


def _upsizing(rule: Rule, units: Sequence[ResizeModule]) -> list[Finding]:
    """Say so where the rank that was asked for makes nothing smaller."""
    if not isinstance(rule.rank, int) or rule.rank_for or any(rule.rank < u.rank for u in units):
        return []
    what = f"no module has a rank above {max(u.rank for u in units)}: nothing gets smaller"
    return [Finding("warning", f"--rank {rule.rank}", what, "--pad-rank fills ranks up with zeros")]


def _of_auto(rule: Rule, units: Sequence[ResizeModule], rows: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Say so where --rank auto found no bend that would tell signal from noise: it then leaves out much, or nothing."""
    auto = [(u, row) for u, row in zip(units, rows, strict=True) if u.rule.rank == AUTO]
    short = [row for _, row in auto if 1 - row["retained"] > _MUCH]
    whole = [row for u, row in auto if row["rank"] == u.rank > 1]
    findings = []
    if rule.rank == AUTO and short:
        worst = min(short, key=lambda row: row["retained"])
        what = (
            f"{len(short)} of {len(units)} modules lose more than {_MUCH:.0%} of their energy, {worst['module']} "
            f"{1 - worst['retained']:.0%} at rank {worst['rank']}: their spectra are flat, and show no rank"
        )
        findings.append(Finding("warning", "--rank auto", what, "--energy 0.95 keeps a share of every module"))
    if rule.rank == AUTO and whole:
        what = f"{len(whole)} of {len(units)} modules keep all of their rank, such as {whole[0]['module']}"
        what += ": their spectra have no bend"
        findings.append(Finding("info", "--rank auto", what, "--rank or --energy cuts these, too"))
    return findings


def _sized(
    unit: ResizeModule, fact: Facts, adapter: Adapter, architecture: Architecture | None, format: Format
) -> Sized:
    sigma = tuple(fact["sigma"][: fact["rank"]])
    beyond = max(fact["total"] - sum(s * s for s in sigma), 0.0) if len(sigma) < len(fact["sigma"]) else 0.0
    group = sizes.group_of(unit.target, adapter, architecture, format.name)
    return Sized(unit.target, sigma, cost_of(unit.shape, unit.dtype), beyond, group, relative.weight_of(fact))


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
