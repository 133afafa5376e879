"""convert: the same adapter in another format. Names and metadata change, the factors' bytes do not."""

from __future__ import annotations

from collections.abc import Mapping

from loratool.adapter import Adapter
from loratool.architecture import Architecture
from loratool.hookspecs import Format
from loratool.operations.writing import spell
from loratool.plan import Facts, Input, Plan, Report, Settled, Spooled, TensorFile


def plan(
    adapter: Adapter,
    architecture: Architecture | None,
    format: Format,
    *,
    options: Mapping[str, str],
    drop_unmapped: bool = False,
) -> Plan:
    """Plan the conversion; what the format cannot hold is an error that lists it, unless `drop_unmapped`."""
    deltas = adapter.low_rank("convert")
    report = Report(verb="convert", findings=list(adapter.findings))
    files = spell(adapter, architecture, format, options, report, drop_unmapped=drop_unmapped)
    tensors = [ref for file in files if isinstance(file, TensorFile) for ref in file.tensors]
    report.totals = {
        "from": adapter.origin.format,
        "to": format.name,
        "family": architecture.name if architecture else "",
        "modules": len(adapter.deltas),
        "tensors": len(tensors),
        "bytes": sum(ref.nbytes for ref in tensors),
    }
    report.rows = [{"module": str(t), "rank": d.rank, "alpha": d.alpha} for t in adapter.targets for d in deltas[t]]

    def settle(facts: Mapping[str, Facts], spooled: Spooled) -> Settled:
        return Settled(report)

    otherwise = "dropped" if drop_unmapped else ""
    inputs = (Input(adapter.origin.path, adapter.tensors, adapter.explained, otherwise),)
    return Plan((), report, settle, files, format.single_file or "file" in options, inputs)
