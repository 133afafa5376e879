"""Adapters brought to common modules, where one has fused what another has split: exactly, and without arithmetic.

`in_common_modules` only cuts: a delta of several modules by its output rows over the same inputs, one of a fused weight
into the parts of its layout, whatever its kind. `in_whole_modules` brings an adapter to the modules that its family
has: there the deltas of the parts of a fused weight are joined, those that cannot share a pair of factors as a sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

from loratool.adapter import Adapter, Target, by_parts
from loratool.architecture import Architecture
from loratool.deltas import Delta, LowRank
from loratool.errors import MismatchError
from loratool.factors import below_each_other
from loratool.hookspecs import Format
from loratool.layouts import Rows, count
from loratool.operations.matching import assembled, sliced
from loratool.tensors import TensorRef

Deltas = Mapping[Target, tuple[Delta, ...]]


def selected_together(adapters: Sequence[Adapter], target: Sequence[str], exclude: Sequence[str]) -> list[Adapter]:
    """Return the adapters less what the user's globs leave out; a glob has to match in one of them only."""
    found = []
    matched = {p: [a.has(p) for a in adapters] for p in (*target, *exclude)}
    dead = [p for p, each in matched.items() if not any(each)]
    for n, adapter in enumerate(adapters):
        wanted, unwanted = ([p for p in given if matched[p][n] or p in dead] for given in (target, exclude))
        # where none of `target` matches, `selected` says so
        found.append(adapter.selected(wanted or target, unwanted))
    return found


def in_common_modules(
    adapters: Sequence[Adapter], architecture: Architecture | None, config: Mapping[str, Any]
) -> list[Adapter]:
    """Return the adapters with targets that are either the same or have nothing in common.

    `config` is the base's: the layout of a fused weight may depend on it. MismatchError where that cannot be settled.
    """
    every = {target for a in adapters for target in a.deltas}
    if all(every == a.deltas.keys() for a in adapters):
        return list(adapters)
    fused = met_in_parts(every)
    singles = {Target(t.component, (part,)) for t in every for part in t.parts}
    parted = {Target(t.component, (t.parts[0].rpartition("[")[0],)) for t in singles if t.parts[0].endswith("]")}
    found = []
    for adapter in adapters:
        deltas: dict[Target, tuple[Delta, ...]] = {}
        for target, own in adapter.deltas.items():
            for cut, pieces in (by_parts(target, own) if target in fused else {target: own}).items():
                split = _by_layout(cut, pieces, architecture, config) if cut in parted else {}
                for final, more in (split or {cut: pieces}).items():
                    deltas[final] = (*deltas.get(final, ()), *more)
        found.append(replace(adapter, deltas=deltas))
    return found


def met_in_parts(targets: Collection[Target]) -> set[Target]:
    """Return the targets of several modules of which another target has a part too."""
    met = Counter((t.component, part) for t in targets for part in t.parts)
    return {t for t in targets if len(t.parts) > 1 and any(met[t.component, part] > 1 for part in t.parts)}


def _by_layout(
    target: Target, deltas: tuple[Delta, ...], architecture: Architecture | None, config: Mapping[str, Any]
) -> Deltas:
    """Cut the deltas of a fused weight into those of its parts; nothing where the family knows no parts of it."""
    known = architecture.find(target.parts[0], target.component) if architecture else None
    if architecture is None or known is None:
        return {}
    transposed = known.layer.transposed
    rows: dict[str, Rows] = {}
    for delta in deltas:
        out = delta.weight_shape(transposed=transposed)[-1 if transposed else 0]
        if not out:  # OFT does not show it, and rotates the inputs of all parts alike
            return {}
        try:
            rows = architecture.layout(target.parts[0], target.component, out, config)
        except MismatchError as problem:
            raise MismatchError(
                f"one adapter has its parts apart, and how they lie is not known: {problem.what}",
                where=str(target),
                hint="--base MODEL: its config.json has the sizes",
            ) from None
    return {
        Target(target.component, (name,)): tuple(sliced(d, part, transposed=transposed) for d in deltas)
        for name, part in rows.items()
    }


# ---- the family's own modules


def one_module(format: Format, target: Target, architecture: Architecture | None) -> bool:
    """Whether a format has one module for all that a target covers."""
    names = getattr(format, "names", None)
    return bool(names and names(target, architecture))


def in_whole_modules(
    adapter: Adapter, architecture: Architecture | None, config: Mapping[str, Any], whole: Collection[Target] = ()
) -> Adapter:
    """Return the adapter with the modules that the family has, by exact splitting and joining.

    A delta that covers several modules is cut by its rows, `down` shared, unless it is one of the `whole`. Plain LoRA
    of parts of those, or of the parts of one fused weight, becomes one delta of the sum of their ranks, or one for all
    that share scaling and dtypes. Where the rows of a fused weight depend on the base, its `config` has the sizes.
    """
    deltas: dict[Target, tuple[Delta, ...]] = {}
    parts: dict[Target, dict[str, tuple[LowRank, ...]]] = {}
    wholes = {(t.component, part): t for t in whole for part in t.parts}
    for target, found in adapter.deltas.items():
        plain = tuple(d for d in found if isinstance(d, LowRank) and d.mid is None)
        fused = wholes.get((target.component, target.parts[0]))
        if fused is None and architecture is not None and fused_in(target) != target:
            fused = fused_in(target)
        if len(target.parts) > 1:
            _add(deltas, {target: found} if target in whole else by_parts(target, found))
        elif fused and plain == found:
            parts.setdefault(fused, {})[target.parts[0]] = plain
        else:
            _add(deltas, {target: found})
    for target, pieces in parts.items():
        if len(target.parts) > 1:
            names, (some, *_) = target.parts, pieces.values()
            rows = list(target.heights) or [some[0].up.shape[0]] * len(names)
            joined = _in_one_weight(target, pieces, dict(zip(names, rows, strict=True)))
        else:
            assert architecture is not None
            joined = in_fused(target, pieces, _layout(target, pieces, architecture, config))
        _add(deltas, {target: joined})
    return replace(adapter, deltas=deltas)


def _add(deltas: dict[Target, tuple[Delta, ...]], more: Deltas) -> None:
    for target, found in more.items():
        deltas[target] = (*deltas.get(target, ()), *found)


def fused_in(target: Target) -> Target:
    """Return the fused weight that a target is a part of; any other target is itself."""
    weight, _, part = target.parts[0].rpartition("[")
    return Target(target.component, (weight,)) if weight and not part[:-1].isdecimal() else target


def in_fused(
    target: Target, pieces: Mapping[str, tuple[LowRank, ...]], layout: Mapping[str, Rows]
) -> tuple[LowRank, ...]:
    """Return the deltas of a fused weight of which these parts have some: where two meet, of the sum of their ranks."""
    joined = _in_one_weight(target, pieces, {name: count(rows) for name, rows in layout.items()})
    return tuple(replace(d, up=_laid_out(d.up, layout)) for d in joined)


def _in_one_weight(
    target: Target, pieces: Mapping[str, tuple[LowRank, ...]], rows: Mapping[str, int]
) -> tuple[LowRank, ...]:
    """Return the deltas of a weight that has these pieces: one of all that can share a pair of factors."""
    alike: dict[object, dict[str, LowRank]] = {}
    for name, found in pieces.items():
        for n, d in enumerate(found):
            alike.setdefault((n, d.scaling, d.down.dtype, d.up.dtype, d.down.shape[1:]), {})[name] = d
    return tuple(below_each_other(group, rows, target) for group in alike.values())


def _layout(
    target: Target, pieces: Mapping[str, tuple[LowRank, ...]], architecture: Architecture, config: Mapping[str, Any]
) -> Mapping[str, Rows]:
    """Return which rows of a fused weight each of its parts is; MismatchError where the pieces do not fit."""
    names = architecture.parts_of(target.parts[0], target.component)
    rows = [pieces[name][0].up.shape[0] if name in pieces else 0 for name in names]
    if 0 in rows and len({r for r in rows if r}) == 1:
        rows = [max(rows)] * len(rows)  # what was not trained is as large as the rest, or the layout will not add up
    try:
        layout = architecture.layout(target.parts[0], target.component, sum(rows), config)
        wrong = [name for name, n in zip(names, rows, strict=True) if count(layout.get(name, ())) != n]
        if wrong:
            raise MismatchError(f"{wrong[0]} has {rows[names.index(wrong[0])]} rows, which its layout does not allow")
    except MismatchError as problem:
        raise MismatchError(
            f"its parts cannot be joined{'' if config else ' without the base'}: {problem.what}",
            where=str(target),
            hint="--base MODEL: its config.json has the sizes",
        ) from None
    return {name: layout[name] for name in names}


def _laid_out(up: TensorRef, layout: Mapping[str, Rows]) -> TensorRef:
    """Return rows that lie part after part where the fused weight has them."""
    ends = list(accumulate(count(rows) for rows in layout.values()))
    return assembled([up.rows(a, b) for a, b in pairwise([0, *ends])], list(layout.values()))
