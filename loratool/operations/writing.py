"""How the verbs that make adapters write them: in a format, and only if that loses nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

from loratool.adapter import Adapter, Finding, Target
from loratool.architecture import Architecture
from loratool.deltas import Delta, LowRank
from loratool.errors import AmbiguityError, InputError, MismatchError
from loratool.factors import below_each_other, require_alike
from loratool.hookspecs import Format
from loratool.layouts import count
from loratool.operations.matching import assembled
from loratool.plan import OutFile, Report


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

    The report learns the files and what the format has to say about them.
    """
    if format.name != adapter.origin.format:
        if adapter.rivals:
            raise AmbiguityError(
                f"the names fit {' and '.join([adapter.families[0], *adapter.rivals])}, which spell them differently "
                f"in {format.name}",
                where=adapter.origin.path,
                hint=f"choose: --arch {adapter.families[0]}",
            )
        adapter = in_whole_modules(adapter, architecture, options.get("config") or {})
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


def in_whole_modules(adapter: Adapter, architecture: Architecture | None, config: Mapping[str, Any]) -> Adapter:
    """Return the adapter with one delta for each module that the family has, by exact splitting and joining.

    A delta that covers several modules is cut by its rows, `down` shared; deltas of parts of one fused weight become
    one of the sum of their ranks, by the sizes in the base's `config` where the layout depends on it.
    """
    deltas: dict[Target, tuple[Delta, ...]] = {}
    parts: dict[Target, dict[str, LowRank]] = {}
    plain = {t: ds for t, ds in adapter.deltas.items() if all(isinstance(d, LowRank) and d.mid is None for d in ds)}
    for target, found in adapter.deltas.items():
        weight, _, part = target.parts[0].rpartition("[")
        if len(target.parts) > 1:
            _add(deltas, _split(target, found))
        elif target in plain and weight and not part[:-1].isdecimal() and architecture is not None:
            parts.setdefault(Target(target.component, (weight,)), {})[target.parts[0]] = found[0]  # type: ignore[assignment]
        else:
            _add(deltas, {target: found})
    for target, pieces in parts.items():
        assert architecture is not None
        _add(deltas, {target: (_join(target, pieces, architecture, config),)})
    return replace(adapter, deltas=deltas)


def _add(deltas: dict[Target, tuple[Delta, ...]], more: Mapping[Target, tuple[Delta, ...]]) -> None:
    """Add deltas; a second one for a module would take the place of the first."""
    for target, found in more.items():
        if target in deltas:
            raise MismatchError(
                "the adapter updates it as a whole and in parts, which one module cannot say",
                where=str(target),
                hint="merge adds both up; or convert one of them, with --exclude for the other",
            )
        deltas[target] = found


def _split(target: Target, deltas: tuple[Delta, ...]) -> dict[Target, tuple[Delta, ...]]:
    cuts = [d.cut(len(target.parts)) for d in deltas]
    return {Target(target.component, (part,)): tuple(c[n] for c in cuts) for n, part in enumerate(target.parts)}


def _join(
    target: Target, pieces: Mapping[str, LowRank], architecture: Architecture, config: Mapping[str, Any]
) -> LowRank:
    """Return the delta of a fused weight: downs one below the other, ups side by side and zero elsewhere."""
    names = architecture.parts_of(target.parts[0], target.component)
    present = [pieces[name] for name in names if name in pieces]
    rows = [pieces[name].up.shape[0] if name in pieces else 0 for name in names]
    if 0 in rows and len({r for r in rows if r}) == 1:
        rows = [max(rows)] * len(rows)  # what was not trained is as large as the rest, or the layout will not add up
    require_alike(present, target)
    try:
        layout = architecture.layout(target.parts[0], target.component, sum(rows), config)
        wrong = [name for name, n in zip(names, rows, strict=True) if count(layout.get(name, ())) != n]
        if wrong:
            raise MismatchError(f"{wrong[0]} has {rows[names.index(wrong[0])]} rows, which its layout does not allow")
    except MismatchError as problem:
        raise MismatchError(
            f"its parts cannot be joined{'' if config else ' without the base'}: {problem.what}",
            where=str(target),
            hint="--base MODEL: its config.json has the sizes; or keep the format, which has the parts apart",
        ) from None
    whole = below_each_other([pieces.get(name) for name in names], rows, target)
    heights = [sum(rows[:n]) for n in range(len(rows) + 1)]
    ups = [whole.up.rows(a, b) for a, b in pairwise(heights)]
    return LowRank(whole.down, assembled(ups, [layout[name] for name in names]), whole.scaling)
