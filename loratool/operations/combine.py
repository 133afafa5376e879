"""combine: several adapters into one, by a method, without the base.

Each module of any adapter is a unit (loratool.operations.combined): a weighted sum in factor space, a method's own
algebra there, or, for methods that look at single entries, the dense matrix of one module after the other.
The scaling is folded into the new factors: the result has scale 1, but where one adapter is left as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from loratool.adapter import Adapter, Finding, Target, Weighted
from loratool.architecture import Architecture
from loratool.combining import Share
from loratool.deltas import Delta, Full, LowRank, Replace
from loratool.errors import InputError, UsageError
from loratool.hookspecs import Format
from loratool.operations import convert, sizes, union
from loratool.operations.recompress import rebuilt, settled_factors
from loratool.operations.resize import cost_of, joined_deltas, losses, residual_at, shown
from loratool.operations.sizes import Sized
from loratool.operations.voices import Choice, Parts, coefficients, parts
from loratool.operations.writing import spell
from loratool.plan import Facts, Input, OutFile, Plan, Report, Settled, Spooled, Unit
from loratool.tensors import zeros

__all__ = ["Choice", "normalised", "plan"]

Deltas = dict[Target, tuple[Delta, ...]]
_STEP = re.compile(r"(?:^|[-_])(?:step|epoch|e|s)?0*(\d+)(?:\.safetensors)?$")
_OF_UP = ".lora_B.bias"  # PEFT's: all modules of a file have one, or none


def plan(
    weighted: Sequence[Weighted],
    steps: Sequence[int],
    choice: Choice,
    architecture: Architecture | None,
    format: Format,
    *,
    options: Mapping[str, Any],
    allow_different_bases: bool = False,
    allow_disjoint: bool = False,
) -> Plan:
    """Plan the combination of adapters, written in `format`; `steps` are those of training that they are from."""
    _require_sense(weighted, choice)
    if _is_left_alone(weighted, choice, format):
        return _unchanged(weighted[0].adapter, architecture, format, options)
    together = union.brought_together(
        weighted,
        architecture,
        options.get("config") or {},
        format,
        allow_different_bases=allow_different_bases,
        allow_disjoint=allow_disjoint,
    )
    frame = union.frame(together, architecture, format.name)
    options = {**options, "sources": [(w.adapter.origin.path, w.adapter.metadata) for w in weighted]}
    todo = parts(together, steps, choice, architecture)
    if not todo.modules:
        raise InputError("nothing with factors is left to combine", where=frame.origin.path)
    if choice.rule is not None:
        choice.rule.require_patterns_used([u.target for u in todo.modules], frame.origin.path)
    report = _preview(together, steps, todo, choice, frame)
    ending = _Ending(todo, choice, frame, architecture, format, options, report)
    copied = [*frame.base_copies.values(), *(ref for ds in todo.kept.values() for d in ds for ref in d.refs)]
    units: tuple[Unit, ...] = (*todo.modules, *todo.wholes)
    used = {ref for u in units for ref in u.reads} | set(copied)
    inputs = [_input(n, w.adapter, todo, used) for n, w in enumerate(together)]
    single = format.single_file or "file" in options
    later = (*copied, *(ref for u in units for ref in u.reads))
    return Plan(units, report, ending.settle, (), single, tuple(inputs), later)


def normalised(weighted: Sequence[Weighted]) -> list[Weighted]:
    """Return the adapters with weights that add up to 1."""
    total = sum(w.weight for w in weighted)
    if abs(total) < 1e-12:
        raise UsageError("--normalize: the weights add up to zero", hint="leave it out, or choose other weights")
    return [w._replace(weight=w.weight / total) for w in weighted]


def steps_of(weighted: Sequence[Weighted]) -> list[int]:
    """Return the step of training that each adapter is from.

    It stands at the end of its name (checkpoint-500, style-000010.safetensors); where any name has none, the places of
    the adapters do.
    """
    found = [_STEP.search(PurePath(w.adapter.origin.path).name) for w in weighted]
    return [int(m[1]) for m in found if m] if all(found) else list(range(1, len(weighted) + 1))


def _require_sense(weighted: Sequence[Weighted], choice: Choice) -> None:
    """Raise for weights and options that mean nothing."""
    method = choice.method
    sizes.check_pad(choice.pad_rank, choice.rule.budget if choice.rule else None)
    if not any(w.of(t) for w in weighted for t in w.adapter.deltas):
        where = " and ".join(w.adapter.origin.path for w in weighted)
        raise InputError("all weights are zero: nothing would be left", where=where, hint="-w 0.7 -w 0.4")
    if method.only and len(weighted) != method.only:
        what = f"{method.name} is for {method.only} adapters, and these are {len(weighted)}"
        raise UsageError(what, hint="--method cat takes any number; `loratool methods` lists all")


def _is_left_alone(weighted: Sequence[Weighted], choice: Choice, format: Format) -> bool:
    """Whether there is one adapter, which comes out as it is: a sum of one delta with weight 1."""
    (first, *others) = weighted
    if others or choice.method.space != "weights" or choice.rule is not None or choice.pad_rank is not None:
        return False
    return choice.dtype == "keep" and all(first.of(t) == 1 for t in first.adapter.deltas)


def _unchanged(adapter: Adapter, architecture: Architecture | None, format: Format, options: Mapping[str, Any]) -> Plan:
    """Plan to write an adapter with the bytes of its factors."""
    plan = convert.plan(adapter, architecture, format, options=options)
    plan.preview.verb = "combine"
    plan.preview.findings.append(Finding("info", adapter.origin.path, "one adapter with weight 1: written as it is"))
    return plan


def _input(place: int, adapter: Adapter, todo: Parts, used: set[Any]) -> Input:
    """Return what the ledger has to account for: copies of the base are taken from the first adapter that has them."""
    explained = dict(adapter.explained)
    for ref in adapter.base_copies.values():
        if ref not in used:
            explained[ref.name] = "copy of the base"
    for n, target in todo.silent:
        refs = [ref for d in adapter.deltas.get(target, ()) for ref in d.refs] if n == place else []
        explained |= {ref.name: "at weight 0" for ref in refs if ref not in used}
    return Input(adapter.origin.path, adapter.tensors, explained)


def _preview(weighted: Sequence[Weighted], steps: Sequence[int], todo: Parts, choice: Choice, frame: Adapter) -> Report:
    """Return the report as far as it is known before anything runs."""
    report = Report("combine", findings=list(frame.findings))
    weights = [w.weight for w in weighted]
    report.totals = {"method": choice.method.name, "weights": weights}
    if choice.method.space == "weights":
        found = coefficients(choice, list(map(Share, weights, steps)))
        report.totals |= {"coefficients": found} if found != weights else {}
        if choice.method.ordered and list(steps) == list(range(1, len(steps) + 1)):
            what = (
                "no steps of training in all their names: the adapters are taken in the order in which they are named"
            )
            report.findings.append(Finding("info", choice.method.name, what))
    report.totals["options"] = {name: value for name, value in choice.options.items() if value is not None}
    common = sum(sum(u.target in w.adapter.deltas for w in weighted) > 1 for u in todo.modules)
    report.totals |= {"modules": len(todo.modules), "common": common}
    report.totals["bytes_before"] = sum(ref.nbytes for u in todo.modules for ref in u.reads)
    report.rows = [
        {"module": u.key, "ranks": [v.rank for v in u.voices if v.deltas], "rank_at_most": u.bound}
        for u in todo.modules
    ]
    if choice.method.space == "dense":
        what = "looks at single entries: the whole update of a module is formed, of one module after the other"
        report.findings.append(Finding("info", choice.method.name, what))
    if todo.silent:
        what = f"{len(todo.silent)} updates have weight 0, such as that of {min(t for _, t in todo.silent)}"
        report.findings.append(Finding("info", "weights", what))
    return report


@dataclass(frozen=True)
class _Ending:
    """What becomes of the facts: ranks, the files, and the report."""

    todo: Parts
    choice: Choice
    frame: Adapter
    architecture: Architecture | None
    format: Format
    options: Mapping[str, Any]
    report: Report

    def settle(self, facts: Mapping[str, Facts], spooled: Spooled) -> Settled:
        """Choose the ranks within a budget, write the files, say what was lost."""
        report, units = self.report, self.todo.modules
        found = [facts[u.key] for u in units]
        total = sum(f["total"] for f in found)
        if not total:
            what = "the adapters cancel each other: nothing would be left"
            raise InputError(
                what, where=self.frame.origin.path, hint="other weights; loratool compare tells them apart"
            )
        ranks = [int(f["rank"]) for f in found]
        others = self._others(facts, spooled)

        def spelled(ranks: Sequence[int], into: Report) -> tuple[OutFile, ...]:
            deltas = joined_deltas({t: (d,) for t, d in self._factors(ranks, spooled, into).items()}, others)
            adapter = _with_biases(replace(self.frame, deltas=deltas))
            return spell(adapter, self.architecture, self.format, self.options, into)

        budget = self.choice.rule.budget if self.choice.rule else None
        if budget is not None:
            modules = [self._sized(u, f) for u, f in zip(units, found, strict=True)]
            ranks = sizes.fitted(modules, budget, lambda r: spelled(r, Report("combine")))
        for unit, row, fact, rank in zip(units, report.rows, found, ranks, strict=True):
            row.update(rank=rank, **losses(fact["total"], residual_at(fact, rank)))
            row["bytes"] = rank * cost_of(unit.shape, unit.dtype)
            row["sigma"] = shown(fact["sigma"])
        report.totals |= losses(total, sum(residual_at(f, r) for f, r in zip(found, ranks, strict=True)))
        same = [u for u in self.todo.wholes if facts[u.key].get("same")]
        if same:
            what = (
                f"{len(same)} tensors that were trained whole are the same in all adapters, and kept: {same[0].target}"
            )
            report.findings.append(Finding("info", "combine", what))
        files = spelled(ranks, report)
        report.totals["bytes"] = sum(row["bytes"] for row in report.rows)
        report.totals["file_bytes"] = sizes.size_of(files)
        return Settled(report, files)

    def _factors(self, ranks: Sequence[int], spooled: Spooled, into: Report) -> dict[Target, Delta]:
        new = {}
        for unit, rank in zip(self.todo.modules, ranks, strict=True):
            deltas = next(v.deltas for v in unit.voices if v.deltas)
            new[unit.target] = rebuilt(deltas, settled_factors(unit.outs, rank, spooled))
        padded, one = sizes.settled(new, self.choice.pad_rank)
        if one:
            into.totals["padded_to"] = one
        return padded

    def _others(self, facts: Mapping[str, Facts], spooled: Spooled) -> Deltas:
        wholes: Deltas = {u.target: (u.settled(facts[u.key], spooled),) for u in self.todo.wholes}
        return joined_deltas(self.todo.kept, wholes)

    def _sized(self, unit: Any, fact: Facts) -> Sized:
        sigma = tuple(fact["sigma"][: fact["rank"]])
        beyond = max(fact["total"] - sum(s * s for s in sigma), 0.0)
        group = sizes.group_of(unit.target, self.frame, self.architecture, self.format.name)
        return Sized(unit.target, sigma, cost_of(unit.shape, unit.dtype), beyond, group)


def _with_biases(adapter: Adapter) -> Adapter:
    """Return the adapter with a bias of zeros for each module that has none, where others have one on lora_B."""
    biases = {d.value.name: d for ds in adapter.deltas.values() for d in ds if isinstance(d, Full)}
    some = next((d for name, d in biases.items() if name.endswith(_OF_UP) and not isinstance(d, Replace)), None)
    if some is None:
        return adapter
    more: Deltas = {}
    for target, name in adapter.origin.modules.items():
        plain = [d for d in adapter.deltas.get(target, ()) if isinstance(d, LowRank)]
        if plain and f"{name}{_OF_UP}" not in biases:
            bias = Target(target.component, tuple(f"{part}.bias" for part in target.parts))
            more[bias] = (Full(zeros(f"{name}{_OF_UP}", (plain[0].shape[0],), some.value.dtype)),)
    return replace(adapter, deltas=joined_deltas(adapter.deltas, more))
