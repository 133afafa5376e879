"""How the verbs that make adapters write them: in a format, and only if that loses nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loratool.adapter import Adapter, Finding, gathered
from loratool.architecture import Architecture
from loratool.deltas import LowRank
from loratool.errors import AmbiguityError, InputError, MismatchError
from loratool.factors import require_alike
from loratool.formats import metadata
from loratool.hookspecs import Format
from loratool.operations.refinement import in_whole_modules, one_module
from loratool.plan import OutFile, Report, TensorFile


def spell(
    adapter: Adapter,
    architecture: Architecture | None,
    format: Format,
    options: Mapping[str, Any],
    report: Report,
    *,
    drop_unmapped: bool = False,
) -> tuple[OutFile, ...]:
    """Return the files of an adapter in `format`; what the format cannot hold is an error, or with the flag a finding.

    The report learns the files and what the format has to say about them. `options`: `private` leaves the metadata of
    the training out; `sources` are the names and metadata of what it was made of, where that is not this adapter's.
    """
    if options.get("private"):
        adapter, told = metadata.less_private(adapter)
        report.findings.append(told)
    else:
        sources = options.get("sources") or [(adapter.origin.path, adapter.metadata)]
        options = {**options, "made": metadata.step(report.verb, sources)}
    if format.name != adapter.origin.format:
        if adapter.rivals:
            raise AmbiguityError(
                f"the names fit {' and '.join([adapter.families[0], *adapter.rivals])}, which spell them differently "
                f"in {format.name}",
                where=adapter.origin.path,
                hint=f"choose: --arch {adapter.families[0]}",
            )
        whole = {t for t in adapter.deltas if len(t.parts) > 1 and one_module(format, t, architecture)}
        brought = in_whole_modules(adapter, architecture, options.get("config") or {}, whole)
        _require_one_pair(brought, adapter)
        adapter = brought
    written = format.write(adapter, architecture, options)
    if written.losses and not drop_unmapped:
        shown, more = gathered(_lost(loss) for loss in written.losses)
        some = [f"{f.where}: {f.what}" for f in shown] + ([f"... and {more} more"] if more else [])
        raise InputError(
            "\n  ".join([f"{format.name} cannot hold {len(written.losses)} parts of this", *some]),
            where=adapter.origin.path,
            hint="choose another format, or convert with --drop-unmapped to leave them out",
        )
    if written.losses and not any(isinstance(f, TensorFile) and f.tensors for f in written.files):
        raise InputError(
            f"{format.name} cannot hold any of this: nothing would be left (such as {written.losses[0]})",
            where=adapter.origin.path,
            hint="choose another format",
        )
    report.files = [file.name for file in written.files]
    report.findings += [Finding("warning", format.name, note) for note in written.notes]
    report.findings += [f._replace(what=f"dropped: {f.what}") for f in map(_lost, written.losses)]
    return tuple(replace(file, finite=True) if isinstance(file, TensorFile) else file for file in written.files)


def _lost(loss: str) -> Finding:
    """Return a loss, `module: why`, as what to warn of."""
    place, _, why = loss.partition(": ")
    return Finding("warning", place, why)


def _require_one_pair(adapter: Adapter, before: Adapter) -> None:
    """Raise MismatchError where joining made several deltas of a module, which no other format can hold."""
    for target, deltas in adapter.deltas.items():
        if len(deltas) < 2 or len(deltas) == len(before.deltas.get(target, ())):
            continue
        if target not in before.deltas:
            require_alike([d for d in deltas if isinstance(d, LowRank)], target)
        raise MismatchError(
            "the adapter updates it as a whole and in parts, which one module cannot say",
            where=str(target),
            hint="merge adds both up; or convert one of them, with --exclude for the other",
        )
