"""convert: the same adapter in another format. Names and metadata change, the factors' bytes do not.

What no format has as a plain pair of factors (several deltas on one module, AdaLoRA, LoHa, LoKr) is recompressed by
resize's unit, keeping everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from loratool.adapter import Adapter, Finding, Target
from loratool.architecture import Architecture
from loratool.deltas import Delta, Dora, LowRank
from loratool.hookspecs import Format
from loratool.operations.ranks import Rule
from loratool.operations.recompress import ResizeModule, dtype_of, rebuilt, recompressible, settled_factors
from loratool.operations.resize import joined_deltas
from loratool.operations.writing import spell
from loratool.plan import Facts, Input, OutFile, Plan, Report, Settled, Spooled, TensorFile
from loratool.tensors import TensorRef


def plan(
    adapter: Adapter,
    architecture: Architecture | None,
    format: Format,
    *,
    options: Mapping[str, Any],
    drop_unmapped: bool = False,
) -> Plan:
    """Plan the conversion; what the format cannot hold is an error that lists it, unless `drop_unmapped`."""
    factored, kept = recompressible(adapter, architecture, "convert")
    units = tuple(
        ResizeModule(t, ds, Rule(energy=1.0), dtype_of(ds)) for t, ds in factored.items() if not _is_written_so(ds)
    )
    report = Report(verb="convert", findings=list(adapter.findings))
    report.totals = {"from": adapter.origin.format, "to": format.name}
    report.totals["family"] = architecture.name if architecture else ""
    report.totals["modules"] = len(adapter.deltas)
    report.rows = [{"module": str(t)} for t in adapter.targets]

    def spelled(new: Mapping[Target, tuple[Delta, ...]]) -> tuple[OutFile, ...]:
        deltas = joined_deltas({**factored, **new}, kept)
        files = spell(
            replace(adapter, deltas=deltas), architecture, format, options, report, drop_unmapped=drop_unmapped
        )
        tensors = [ref for file in files if isinstance(file, TensorFile) for ref in file.tensors]
        report.totals |= {"tensors": len(tensors), "bytes": sum(ref.nbytes for ref in tensors)}
        for row, target in zip(report.rows, adapter.targets, strict=True):
            found = deltas[target][0]
            inner = found.inner if isinstance(found, Dora) else found
            row |= {"rank": found.rank or None, "alpha": inner.alpha if isinstance(inner, LowRank) else None}
        return files

    def settle(facts: Mapping[str, Facts], spooled: Spooled) -> Settled:
        if not units:
            return Settled(report)
        new = {u.target: rebuilt(u.deltas, settled_factors(u.outs, facts[u.key]["rank"], spooled)) for u in units}
        what = f"{len(units)} modules were no plain pair of factors, and were made one, exactly: the scaling is in it"
        report.findings.append(Finding("info", "convert", what))
        return Settled(report, spelled({t: (d,) for t, d in new.items()}))

    files = () if units else spelled({})
    otherwise = "dropped" if drop_unmapped else ""
    inputs = (Input(adapter.origin.path, adapter.tensors, adapter.explained, otherwise),)
    later = (*adapter.base_copies.values(), *(ref for ds in (*factored.values(), *kept.values()) for ref in _refs(ds)))
    return Plan(units, report, settle, files, format.single_file or "file" in options, inputs, later if units else ())


def _refs(deltas: Sequence[Delta]) -> list[TensorRef]:
    return [ref for d in deltas for ref in d.refs]


def _is_written_so(deltas: Sequence[Delta]) -> bool:
    """Whether the factors of a module are written as they are: one plain pair, or that of DoRA."""
    inner = [d.inner if isinstance(d, Dora) else d for d in deltas]
    return len(inner) == 1 and isinstance(inner[0], LowRank) and inner[0].mid is None
