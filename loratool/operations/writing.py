"""How the verbs that make adapters write them: in a format, and only if that loses nothing."""

from __future__ import annotations

from collections.abc import Mapping

from loratool.adapter import Adapter, Finding
from loratool.architecture import Architecture
from loratool.errors import AmbiguityError, InputError
from loratool.hookspecs import Format
from loratool.plan import OutFile, Report


def spell(
    adapter: Adapter,
    architecture: Architecture | None,
    format: Format,
    options: Mapping[str, str],
    report: Report,
    *,
    drop_unmapped: bool = False,
) -> tuple[OutFile, ...]:
    """Return the files of an adapter in `format`; what the format cannot hold is an error, or with the flag a finding.

    The report learns the files and what the format has to say about them.
    """
    if adapter.rivals and format.name != adapter.origin.format:
        raise AmbiguityError(
            f"the names fit {' and '.join([adapter.families[0], *adapter.rivals])}, which spell them differently in "
            f"{format.name}",
            where=adapter.origin.path,
            hint=f"choose: --arch {adapter.families[0]}",
        )
    written = format.write(adapter, architecture, options)
    if written.losses and not drop_unmapped:
        raise InputError(
            "\n  ".join([f"{format.name} cannot hold {len(written.losses)} parts of this", *written.losses[:12]]),
            where=adapter.origin.path,
            hint="choose another format, or convert with --drop-unmapped to leave them out",
        )
    report.files = [file.name for file in written.files]
    report.findings += [Finding("warning", format.name, note) for note in written.notes]
    report.findings += [Finding("warning", "dropped", loss) for loss in written.losses]
    return written.files
