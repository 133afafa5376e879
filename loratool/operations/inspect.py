"""inspect: what is in an adapter. From headers alone; with the spectrum, from its factors (still no base)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from loratool.adapter import Adapter, Delta, Target
from loratool.architecture import Architecture
from loratool.errors import InputError
from loratool.plan import Emit, Facts, Load, Out, Plan, Report, Settled, Spooled
from loratool.tensors import TensorRef


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one delta."""

    target: Target
    delta: Delta
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
            raise InputError("the factors hold NaN or infinity", where=self.key)
        return {"sigma": (lowrank.singular_values(up, down) * abs(self.delta.scaling)).tolist()}


def plan(adapter: Adapter, architecture: Architecture | None, *, spectrum: bool = False) -> Plan:
    """Plan an inspection; unsound adapters are described too, with their findings."""
    pairs = [(t, d) for t in adapter.targets for d in adapter.deltas[t]]
    refs = [ref for _, d in pairs for ref in d.refs]
    report = Report(
        verb="inspect",
        totals={
            "format": adapter.origin.format,
            "families": list(adapter.families),
            "base_model": adapter.base_model,
            "modules": len(pairs),
            "ranks": sorted({d.rank for _, d in pairs}),
            "alphas": sorted({d.alpha for _, d in pairs}),
            "scalings": sorted({d.scaling for _, d in pairs}),
            "dtypes": sorted({ref.dtype for ref in refs}),
            "parameters": sum(prod(ref.shape) for ref in refs),
            "bytes": sum(ref.nbytes for ref in refs),
            "tensors": len(adapter.tensors),
            "metadata": dict(sorted(adapter.metadata.items())),
        },
        rows=[_row(t, d, architecture) for t, d in pairs],
        findings=list(adapter.findings),
    )

    def settle(facts: Mapping[str, Facts], spooled: Spooled) -> Settled:
        for row in report.rows:
            if row["module"] in facts:
                row.update(_spectrum(facts[row["module"]]["sigma"]))
        return Settled(report)

    return Plan(tuple(Spectrum(t, d) for t, d in pairs) if spectrum else (), report, settle)


def _row(target: Target, delta: Delta, architecture: Architecture | None) -> dict[str, object]:
    each = [architecture.find(part, target.component) for part in target.parts] if architecture else []
    known = each[0] if each else None
    return {
        "module": str(target),
        "group": known.layer.group if known else "",
        "role": "+".join(dict.fromkeys(k.role for k in each if k)),
        "rank": delta.rank,
        "alpha": delta.alpha,
        "scaling": delta.scaling,
        "down": list(delta.down.shape),
        "up": list(delta.up.shape),
        "dtype": delta.down.dtype,
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
