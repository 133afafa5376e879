"""inspect: what is in an adapter. From headers alone; with spectrum or check, from its tensors (still no base)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from loratool.adapter import Adapter, Target
from loratool.architecture import Architecture
from loratool.deltas import Delta, Dora, LowRank
from loratool.errors import InputError
from loratool.operations import defects
from loratool.plan import Emit, Facts, Load, Out, Plan, Report, Settled, Spooled, Unit
from loratool.tensors import TensorRef


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one delta; `lenient` where a check says what is not finite."""

    target: Target
    delta: LowRank
    lenient: bool = False
    outs: tuple[Out, ...] = ()

    @property
    def key(self) -> str:
        """The module."""
        return str(self.target)

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """Both factors."""
        return self.delta.refs

    @property
    def scratch(self) -> int:
        """Both factors in fp64, twice."""
        return 16 * sum(prod(ref.shape) for ref in self.reads)

    def run(self, load: Load, emit: Emit) -> Facts:
        """Compute them from the core."""
        from loratool.algebra import lowrank
        from loratool.algebra.deltas import as_matrices, is_finite

        up, down = as_matrices(load(self.delta.up), load(self.delta.down))
        if not (is_finite(up) and is_finite(down)):
            if self.lenient:
                return {}
            raise InputError("the factors hold NaN or infinity", where=self.key)
        return {"sigma": (lowrank.singular_values(up, down) * abs(self.delta.scaling)).tolist()}


def plan(adapter: Adapter, architecture: Architecture | None, *, spectrum: bool = False, check: bool = False) -> Plan:
    """Plan an inspection; unsound adapters are described too, with their findings."""
    pairs = [(t, d) for t in adapter.targets for d in adapter.deltas[t]]
    refs = [ref for _, d in pairs for ref in d.refs]
    lora = [d for _, d in pairs if isinstance(d, LowRank)]
    report = Report(
        verb="inspect",
        totals={
            "format": adapter.origin.format,
            "families": list(adapter.families),
            "base_model": adapter.base_model,
            "modules": len(pairs),
            "kinds": sorted({d.kind for _, d in pairs}),
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
        findings=[*adapter.findings, *defects.torn(adapter)],
    )
    checks = defects.units(adapter) if check else ()

    def settle(facts: Mapping[str, Facts], spooled: Spooled) -> Settled:
        for row in report.rows:
            if facts.get(row["module"]):
                row.update(_spectrum(facts[row["module"]]["sigma"]))
        if check:
            _judge(report, adapter, checks, facts)
        return Settled(report)

    plain = adapter.low_rank("--spectrum") if spectrum else {}
    units: tuple[Unit, ...] = (*checks, *(Spectrum(t, d, check) for t, ds in plain.items() for d in ds))
    return Plan(units, report, settle)


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
        "kind": delta.kind,
        "rank": delta.rank or None,
        **(_factors(delta.inner if isinstance(delta, Dora) else delta)),
        "dtype": delta.refs[0].dtype,
    }


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
