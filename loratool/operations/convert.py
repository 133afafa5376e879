"""convert: the same adapter in another format. Names and metadata change, the factors' bytes do not."""

from __future__ import annotations

from collections.abc import Mapping

from loratool.adapter import Adapter, Finding
from loratool.architecture import Architecture
from loratool.errors import InputError
from loratool.hookspecs import Format
from loratool.plan import Facts, Ledger, Plan, Report, Settled, Spooled, TensorFile


def plan(
    adapter: Adapter,
    architecture: Architecture | None,
    format: Format,
    *,
    options: Mapping[str, str],
    drop_unmapped: bool = False,
) -> Plan:
    """Plan the conversion; what the format cannot hold is an error that lists it, unless `drop_unmapped`."""
    written = format.write(adapter, architecture, options)
    if written.losses and not drop_unmapped:
        raise InputError(
            "\n  ".join(
                [f"{format.name} cannot hold {len(written.losses)} parts of this adapter", *written.losses[:12]]
            ),
            where=adapter.origin.path,
            hint="--drop-unmapped leaves them out",
        )
    ledger = Ledger()
    ledger.note_adapter(adapter)
    tensors = [ref for file in written.files if isinstance(file, TensorFile) for ref in file.tensors]
    report = Report(
        verb="convert",
        totals={
            "from": adapter.origin.format,
            "to": format.name,
            "family": architecture.name if architecture else "",
            "modules": len(adapter.deltas),
            "tensors": len(tensors),
            "bytes": sum(ref.nbytes for ref in tensors),
        },
        rows=[{"module": str(t), "rank": d.rank, "alpha": d.alpha} for t in adapter.targets for d in adapter.deltas[t]],
        findings=[
            *adapter.findings,
            *(Finding("warning", format.name, note) for note in written.notes),
            *(Finding("warning", "dropped", loss) for loss in written.losses),
        ],
        ledger=ledger.summary(),
        files=[f.name for f in written.files],
    )

    def settle(facts: Mapping[str, Facts], spooled: Spooled) -> Settled:
        return Settled(report)

    return Plan((), report, settle, written.files, single_file=format.single_file or "file" in options)
