"""convert: the same adapter in another format. Names and metadata change, the factors' bytes do not.

What no format has as a plain pair of factors (several deltas on one module, AdaLoRA, LoHa, LoKr) is recompressed by
resize's unit, keeping everything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from loratool.adapter import Adapter, Finding, Target
from loratool.architecture import Architecture
from loratool.deltas import Delta, Dora, LowRank
from loratool.hookspecs import Format
from loratool.ledger import Places
from loratool.operations.blocks import FindBlocks, apart
from loratool.operations.ranks import Rule
from loratool.operations.recompress import ResizeModule, dtype_of, rebuilt, recompressible, settled_factors
from loratool.operations.resize import joined_deltas
from loratool.operations.writing import spell
from loratool.plan import Facts, Input, OutFile, Plan, Report, Settled, Spooled, TensorFile, Unit
from loratool.tensors import TensorRef

Parts = Mapping[Target, Mapping[Target, tuple[LowRank, ...]]]  # of a fused target, those of its parts


def plan(
    adapter: Adapter,
    architecture: Architecture | None,
    format: Format,
    *,
    options: Mapping[str, Any],
    drop_unmapped: bool = False,
) -> Plan:
    """Plan the conversion; what the format cannot hold is an error that lists it, unless `drop_unmapped`."""
    carried = {t: ds for t, ds in adapter.deltas.items() if _is_carried(t, ds, format, architecture)}
    others = {t: ds for t, ds in adapter.deltas.items() if t not in carried}
    factored, kept = recompressible(replace(adapter, deltas=others), architecture, "convert")
    kept = {**carried, **kept}
    rewritten = tuple(
        ResizeModule(t, ds, Rule(energy=1.0), dtype_of(ds)) for t, ds in factored.items() if not _is_written_so(ds)
    )
    fused = tuple(_fused({**factored, **kept}, adapter, format, architecture))
    units: tuple[Unit, ...] = (*rewritten, *fused)
    report = Report(verb="convert", findings=list(adapter.findings))
    report.totals = {"from": adapter.origin.format, "to": format.name}
    report.totals["families"] = list(adapter.families)  # which agree on every name
    report.totals["modules"] = len(adapter.deltas)
    report.rows = [{"module": str(t)} for t in adapter.targets]

    def spelled(new: Mapping[Target, tuple[Delta, ...]], parts: Parts) -> tuple[OutFile, ...]:
        deltas = joined_deltas({**factored, **new}, kept)
        cut = {t: ds for t, ds in deltas.items() if t not in parts} | {
            t: ds for of in parts.values() for t, ds in of.items()
        }
        files = spell(replace(adapter, deltas=cut), architecture, format, options, report, drop_unmapped=drop_unmapped)
        tensors = [ref for file in files if isinstance(file, TensorFile) for ref in file.tensors]
        report.totals |= {"tensors": len(tensors), "bytes": sum(ref.nbytes for ref in tensors)}
        for row, target in zip(report.rows, adapter.targets, strict=True):
            found = deltas[target][0]
            inner = found.inner if isinstance(found, Dora) else found
            row |= {"rank": found.rank or None, "alpha": inner.alpha if isinstance(inner, LowRank) else None}
        if any(f.what.startswith("dropped: ") for f in report.findings):
            _leave_out_the_dropped(report, deltas, Places(tensors))
        return files

    def settle(facts: Mapping[str, Facts], spooled: Spooled) -> Settled:
        if not units:
            return Settled(report)
        report.findings = [f for f in report.findings if f not in foreseen]
        new = {u.target: rebuilt(u.deltas, settled_factors(u.outs, facts[u.key]["rank"], spooled)) for u in rewritten}
        if new:
            report.findings.append(_of_ranks({u.target: u.deltas for u in rewritten}, new))
        parts = {u.target: apart(u, facts[u.key]["columns"]) for u in fused}
        report.findings += list(_of_parts(parts))
        return Settled(report, spelled({t: (d,) for t, d in new.items()}, parts))

    foreseen: list[Finding] = []
    if fused and not rewritten:
        whole = replace(adapter, deltas={**factored, **kept})
        foreseen = _foreseen(whole, fused, architecture, format, options, drop_unmapped=drop_unmapped)
    report.findings += foreseen
    files = () if units else spelled({}, {})
    otherwise = "dropped" if drop_unmapped else ""
    inputs = (Input(adapter.origin.path, adapter.tensors, adapter.explained, otherwise),)
    later = (*adapter.base_copies.values(), *(ref for ds in (*factored.values(), *kept.values()) for ref in _refs(ds)))
    return Plan(units, report, settle, files, format.single_file or "file" in options, inputs, later if units else ())


def _leave_out_the_dropped(report: Report, deltas: Mapping[Target, Sequence[Delta]], written: Places) -> None:
    """Count only the modules of which something was written: of a plain pair `up`, for `down` may be shared."""
    gone = set()
    for target, found in deltas.items():
        inner = [d.inner if isinstance(d, Dora) else d for d in found]
        own = [ref for d in inner for ref in ([d.up] if isinstance(d, LowRank) else d.refs)]
        if not any(written.touch(ref) for ref in own):
            gone.add(str(target))
    report.rows = [row for row in report.rows if row["module"] not in gone]
    report.totals["modules"] = len(report.rows)


def _fused(
    deltas: Mapping[Target, Sequence[Delta]], adapter: Adapter, format: Format, architecture: Architecture | None
) -> Iterator[FindBlocks]:
    """Yield a look at each fused delta that the format has apart: its blocks may be of the parts alone."""
    names = getattr(format, "names", lambda target, family: "")
    for target, (delta, *more) in deltas.items() if format.name != adapter.origin.format else ():
        plain = isinstance(delta, LowRank) and delta.mid is None and len(delta.up.shape) == 2
        if plain and not more and len(target.parts) > 1 and not names(target, architecture):
            yield FindBlocks(target, delta)  # type: ignore[arg-type]


def _foreseen(
    adapter: Adapter,
    fused: Sequence[FindBlocks],
    architecture: Architecture | None,
    format: Format,
    options: Mapping[str, Any],
    *,
    drop_unmapped: bool,
) -> list[Finding]:
    """Return what a format says of an adapter if every part of its fused weights is used: a dry run looks at none."""
    parts = {u.target: apart(u, [range(u.delta.rank)] * len(u.target.parts)) for u in fused}
    deltas = {t: ds for t, ds in adapter.deltas.items() if t not in parts}
    deltas |= {t: ds for of in parts.values() for t, ds in of.items()}
    report = Report(verb="convert")
    spell(replace(adapter, deltas=deltas), architecture, format, options, report, drop_unmapped=True)
    losses = [f"{f.where}: {f.what[9:]}" for f in report.findings if f.what.startswith("dropped: ")]
    if not losses or drop_unmapped:
        return report.findings
    what = f"cannot hold {len(losses)} parts of this, such as {losses[0]}; they are refused where they are not zero"
    return [Finding("warning", format.name, what, "choose another format, or --drop-unmapped leaves them out")]


def _of_ranks(before: Mapping[Target, Sequence[Delta]], new: Mapping[Target, Delta]) -> Finding:
    """Say what became of the ranks of modules that were rewritten as one pair of factors."""
    changes = Counter((before[t][0].rank, delta.rank) for t, delta in new.items())
    told = [f"rank {a} became {b} in {n}" if a else f"{n} have rank {b}" for (a, b), n in sorted(changes.items())]
    more = f" and {len(told) - 4} more ranks" if told[4:] else ""
    what = f"{len(new)} modules got new factors, exactly, with the scaling in them: {', '.join(told[:4])}{more}"
    return Finding("info", "convert", what)


def _of_parts(parts: Parts) -> Iterator[Finding]:
    """Say which parts of fused weights have no delta."""
    zero = [p for t, of in parts.items() for p in t.parts if Target(t.component, (p,)) not in of]
    if zero:
        what = f"{len(zero)} parts of fused weights, such as {zero[0]}, are not updated (zeros), and are left out"
        yield Finding("info", "convert", what)


def _refs(deltas: Sequence[Delta]) -> list[TensorRef]:
    return [ref for d in deltas for ref in d.refs]


def _is_carried(target: Target, deltas: Sequence[Delta], format: Format, architecture: Architecture | None) -> bool:
    """Whether a format that knows more kinds than plain factors has this delta as it is."""
    carries = getattr(format, "carries", None)
    return carries is not None and len(deltas) == 1 and carries(target, deltas[0], architecture)


def _is_written_so(deltas: Sequence[Delta]) -> bool:
    """Whether the factors of a module are written as they are: one plain pair, or that of DoRA."""
    inner = [d.inner if isinstance(d, Dora) else d for d in deltas]
    return len(inner) == 1 and isinstance(inner[0], LowRank) and inner[0].mid is None
