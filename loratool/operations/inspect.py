"""inspect: what is in an adapter. From headers alone; with spectrum or check, from its tensors (still no base)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from loratool.adapter import Adapter, Finding, Target
from loratool.architecture import Architecture
from loratool.deltas import Delta, Dora, LowRank
from loratool.errors import InputError, MismatchError
from loratool.layouts import Rows
from loratool.operations import defects, sizes, training
from loratool.operations.recompress import dtype_of, has_factors, inner_rank
from loratool.operations.resize import cost_of
from loratool.plan import Emit, Facts, Load, Out, Plan, Report, Settled, Spooled, Unit
from loratool.tensors import TensorRef


@dataclass(frozen=True)
class Spectrum:
    """The singular values of the deltas of one module; `lenient` where a check says what is not finite."""

    target: Target
    deltas: tuple[Delta, ...]
    lenient: bool = False
    outs: tuple[Out, ...] = ()

    @property
    def key(self) -> str:
        """The module."""
        return str(self.target)

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """All factors."""
        return tuple(dict.fromkeys(ref for d in self.deltas for ref in d.refs))

    @property
    def scratch(self) -> int:
        """All factors in fp64, twice."""
        (out, *columns), rank = self.deltas[0].shape, sum(map(inner_rank, self.deltas))
        return 16 * rank * (out + prod(columns))

    def run(self, load: Load, emit: Emit) -> Facts:
        """Compute them from the core."""
        from loratool.operations.recompress import spectrum

        try:
            return {"sigma": spectrum(self.deltas, load).tolist()}
        except InputError:
            if self.lenient:
                return {}
            raise


def plan(
    adapter: Adapter,
    architecture: Architecture | None,
    *,
    spectrum: bool = False,
    check: bool = False,
    curve: bool = False,
) -> Plan:
    """Plan an inspection; unsound adapters are described too, with their findings."""
    pairs = [(t, d) for t in adapter.targets for d in adapter.deltas[t]]
    refs = [ref for _, d in pairs for ref in d.refs]
    lora = [d for _, d in pairs if isinstance(d, LowRank)]
    told, findings = training.told(adapter.metadata)
    report = Report(
        verb="inspect",
        totals={
            "format": adapter.origin.format,
            "families": list(adapter.families),
            "other_readings": list(adapter.rivals),
            "base_model": adapter.base_model,
            **told,
            "modules": len(pairs),
            "kinds": sorted({d.kind for _, d in pairs} - {"lora"}) and sorted({d.kind for _, d in pairs}),
            "ranks": sorted({d.rank for _, d in pairs if d.rank}),
            "alphas": sorted({d.alpha for d in lora}),
            "scalings": sorted({d.scaling for d in lora}),
            "dtypes": sorted({ref.dtype for ref in refs}),
            "parameters": sum(prod(ref.shape) for ref in refs),
            "bytes": sum(ref.nbytes for ref in refs),
            "tensors": len(adapter.tensors),
            "metadata": dict(sorted(adapter.metadata.items())),
        },
        rows=[_row(t, d, architecture) for t, d in pairs],
        findings=[*adapter.findings, *findings, *defects.torn(adapter)],
    )
    checks = defects.units(adapter) if check else ()

    def settle(facts: Mapping[str, Facts], spooled: Spooled) -> Settled:
        for row in report.rows:
            if facts.get(row["module"]):
                row.update(_spectrum(facts[row["module"]]["sigma"]))
        if curve:
            report.totals["curve"] = _curve(spectra, facts, adapter, architecture)
        if check:
            _judge(report, adapter, checks, facts)
        return Settled(report)

    spectra: list[Spectrum] = []
    if spectrum or curve:
        factored = {t: tuple(d for d in adapter.deltas[t] if has_factors(d)) for t in adapter.targets}
        spectra = [Spectrum(t, ds, check) for t, ds in factored.items() if ds]
        without = sorted({d.kind for _, d in pairs if not has_factors(d)})
        if without:
            what = f"no singular values of these kinds, which are no products of factors: {', '.join(without)}"
            report.findings.append(Finding("info", "--spectrum", what))
    units: tuple[Unit, ...] = (*checks, *spectra)
    return Plan(units, report, settle)


def _curve(
    spectra: Sequence[Spectrum], facts: Mapping[str, Facts], adapter: Adapter, architecture: Architecture | None
) -> list[dict[str, float]]:
    """Return the trade of size (of the factors alone) against error."""
    modules = []
    for unit in spectra:
        sigma = tuple(facts[unit.key].get("sigma", ()))
        group = sizes.group_of(unit.target, adapter, architecture, adapter.origin.format)
        if sigma:
            cost = cost_of(unit.deltas[0].shape, dtype_of(unit.deltas))
            modules.append(sizes.Sized(unit.target, sigma, cost, group=group))
    return sizes.curve(modules) if modules else []


def _judge(report: Report, adapter: Adapter, checks: Sequence[defects.CheckModule], facts: Mapping[str, Facts]) -> None:
    """Write what a check found into the report: in its findings, and beside each module."""
    findings, told = defects.judge(adapter, checks, facts)
    report.findings += findings
    measured = {check.module: facts[check.key] for check in checks}
    for row in report.rows:
        if "norm" in measured[row["module"]]:
            row["norm"] = measured[row["module"]]["norm"]
        if row["module"] in told:
            row["defects"] = told[row["module"]]
    levels = Counter(f.level for f in report.findings)
    told_levels = [f"{levels[name]} {name}{'s' * (levels[name] > 1)}" for name in ("error", "warning") if levels[name]]
    report.totals["check"] = ", ".join(told_levels) or "no defects"


def _row(target: Target, delta: Delta, architecture: Architecture | None) -> dict[str, object]:
    each = [architecture.find(part, target.component) for part in target.parts] if architecture else []
    known = each[0] if each else None
    return {
        "module": str(target),
        "group": known.layer.group if known else "",
        "role": "+".join(dict.fromkeys(k.role for k in each if k)),
        **({"parts": parts} if (parts := _parts(target, delta, architecture)) else {}),
        "kind": delta.kind,
        "rank": delta.rank or None,
        **(_factors(delta.inner if isinstance(delta, Dora) else delta)),
        "dtype": delta.refs[0].dtype,
    }


def _parts(target: Target, delta: Delta, architecture: Architecture | None) -> list[str]:
    """Name the parts of a fused weight; with the rows that are theirs, where that does not depend on the config."""
    path = target.parts[0]
    fused = architecture.fused_at(path, target.component) if architecture and len(target.parts) == 1 else ()
    if not fused or fused[0].layout.name == "stack":
        return []
    try:
        rows = fused[0].layout.rows(delta.shape[0], {}) if len(fused) == 1 and not fused[0].when else []
    except MismatchError:  # an AbsentError: the config has the sizes
        rows = []
    told = [f" {_row_numbers(of_part)}" for of_part in rows] or [""] * len(fused[0].parts)
    return [f"{name}{text}" for name, text in zip(fused[0].parts, told, strict=True)]


def _row_numbers(rows: Rows) -> str:
    """Return 0-31 for a run, `2 x 16` for several runs, 0, 2 ... for a stride."""
    first = rows[0]
    if len(rows) > 1:
        return f"{len(rows)} x {len(first)}"
    return f"{first.start}-{first.stop - 1}" if first.step == 1 else f"{first.start}, {first.start + first.step} ..."


def _factors(delta: Delta) -> dict[str, object]:
    """Return what only plain LoRA has, or the shape of what another kind updates."""
    if not isinstance(delta, LowRank):
        return {"shape": [n or None for n in delta.shape]}
    return {
        "alpha": delta.alpha,
        "scaling": delta.scaling,
        "down": list(delta.down.shape),
        "up": list(delta.up.shape),
    }


def _spectrum(sigma: list[float]) -> dict[str, object]:
    """Return the singular values, the norm, and the smallest ranks that keep 90, 95 and 99 % of the energy."""
    squares = [s * s for s in sigma]
    total = sum(squares)
    ranks = {}
    for share in (0.9, 0.95, 0.99):
        kept, rank = 0.0, 0
        while kept < share * total and rank < len(squares):
            kept, rank = kept + squares[rank], rank + 1
        ranks[f"rank_at_{100 * share:g}"] = max(rank, 1)
    return {"sigma": sigma, "norm": total**0.5, **ranks}
