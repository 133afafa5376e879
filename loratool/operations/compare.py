"""compare: are adapters the same update, and do they fight? Module by module, without the base.

Every pair of adapters is measured by itself (loratool.operations.pairs), by factor algebra wherever there are factors;
what the numbers mean is in loratool.operations.verdict.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from loratool.adapter import Adapter, Finding, Target
from loratool.architecture import Architecture
from loratool.errors import MismatchError
from loratool.operations import verdict
from loratool.operations.pairs import DensePair, Paired, Side, matrix_shape, paired
from loratool.operations.refinement import in_common_modules
from loratool.operations.verdict import Measure
from loratool.plan import Facts, Input, Plan, Report, Settled, Spooled, Unit

_COMPARED_AS = {
    "dora": "the low-rank parts, and the magnitudes beside them; the update itself depends on the base",
    "replace": "trained whole: the values, relative to their norm; the update, which is less the base, is not known",
    "tokens": "the trained values, relative to their norm; the update, which is less the base, is not known",
    "oft": "the rotations by their parameters, not by what they do to the weights of the base",
    "boft": "the rotations by their parameters, not by what they do to the weights of the base",
    "glora": "what is added as an update, and of a1 and a2, which multiply the weight, the values",
    "vera": "where nothing shows how many inputs a weight has, with all columns of the shared matrix A",
    "ia3": "the factors less 1, not by what they do to the weights of the base",
}


@dataclass(frozen=True)
class _Pair:
    """Two adapters, by number, and what is compared of them at each module."""

    numbers: tuple[int, int]
    modules: Mapping[Target, Paired]
    common: frozenset[Target]

    @property
    def units(self) -> list[Unit]:
        """All units."""
        return [unit for each in self.modules.values() for unit in each.units]


class _Compared(NamedTuple):
    """What is known of one module of two adapters: its measure, and what has none."""

    measure: Measure
    values: Mapping[str, float]  # kind -> distance relative to the larger norm
    angles: Mapping[str, list[float]]
    verdict: str
    by_parameters: bool  # the measure is one of parameters, not of an update

    @property
    def row(self) -> dict[str, Any]:
        """The numbers of a report."""
        values = {f"{kind}_distance": value for kind, value in self.values.items()}
        numbers = _numbers(self.measure)
        if not any(self.measure.energy) and values:  # nothing but values: theirs is the distance
            numbers["distance"] = max(values.values())
            values = {}
        return {**numbers, **values, **self.angles, "equal": self.measure.equal, "verdict": self.verdict}


def plan(
    adapters: Sequence[Adapter],
    architecture: Architecture | None = None,
    config: Mapping[str, Any] = MappingProxyType({}),
) -> Plan:
    """Plan the comparison of two adapters or more, over the modules of any.

    A stack meets the modules that it stands for, the parts of a fused weight (`architecture` knows them) the whole; the
    base's `config` has the sizes of those parts.
    """
    adapters = in_common_modules(_of_one_model(adapters), architecture, config)
    targets = sorted({t for a in adapters for t in a.deltas}, key=lambda t: t.sort_key)
    sides = {t: [Side.of(a.deltas.get(t, ())) for a in adapters] for t in targets}
    pairs = [_pair(numbers, adapters, sides, architecture) for numbers in combinations(range(len(adapters)), 2)]
    if not any(pair.common for pair in pairs):
        raise MismatchError(
            f"no module in common: {' ... against '.join(str(a.targets[0]) for a in adapters)} ...",
            where=" and ".join(a.origin.path for a in adapters),
            hint="are they for the same base model? --arch reads both under one family",
        )
    report = Report(verb="compare", findings=[f for a in adapters for f in a.findings])
    report.totals = {"modules": len(targets), "common": sum(all(t in a.deltas for a in adapters) for t in targets)}
    report.findings += [*_other_bases(adapters), *_compared_as(sides), *_gaps(pairs)]
    report.rows = [_described(t, sides[t]) for t in targets]

    def settle(facts: Mapping[str, Facts], spooled: Spooled) -> Settled:
        found = [{t: _compared(each, t, pair, facts) for t, each in pair.modules.items()} for pair in pairs]
        for row, target in zip(report.rows, targets, strict=True):
            known = {pair.numbers: known[target] for pair, known in zip(pairs, found, strict=True) if target in known}
            row.update(_row(known, several=len(pairs) > 1))
        report.totals |= _of_two(pairs[0], found[0]) if len(pairs) == 1 else _of_several(pairs, found, len(adapters))
        return Settled(report)

    units = tuple(unit for pair in pairs for unit in pair.units)
    return Plan(units, report, settle, inputs=_inputs(adapters, pairs, sides))


def _of_one_model(adapters: Sequence[Adapter]) -> Sequence[Adapter]:
    """Return the adapters, or raise where their layers are not the same ones."""
    if len({a.replication for a in adapters}) > 1:
        what = "their layer_replication differs: layer 1 of the one is not layer 1 of the other"
        raise MismatchError(what, where=" and ".join(a.origin.path for a in adapters), hint="merge each into its base")
    return adapters


def _pair(
    numbers: tuple[int, int],
    adapters: Sequence[Adapter],
    sides: Mapping[Target, Sequence[Side]],
    architecture: Architecture | None,
) -> _Pair:
    one, two = (adapters[n] for n in numbers)
    modules: dict[Target, Paired] = {}
    for target, every in sides.items():
        first, second = (every[n] for n in numbers)
        if not (first.kinds or second.kinds):
            continue
        key = str(target) if len(adapters) == 2 else f"{target} of {numbers[0] + 1} and {numbers[1] + 1}"
        known = architecture.find(target.parts[0], target.component) if architecture else None
        transposed = bool(known and known.layer.transposed)
        update = (*first.update, *second.update)
        shape = matrix_shape(update, str(target), one.origin.path, transposed=transposed) if update else (0, 0)
        modules[target] = paired(key, first, second, shape, transposed=transposed)
    return _Pair(numbers, modules, frozenset(one.deltas.keys() & two.deltas.keys()))


def _compared(each: Paired, target: Target, pair: _Pair, facts: Mapping[str, Facts]) -> _Compared:
    """Return what the units of one module found."""
    measures, parameters, values, angles = [], [], {}, {}
    for unit in each.units:
        fact = facts[unit.key]
        kind = fact.get("kind", "")
        if not kind:
            measures.append(Measure.of(fact))
            angles = {f"{name[:-1]}_angles": fact[name] for name in ("columns", "rows") if name in fact}
        elif fact["has_neutral"]:
            parameters.append(Measure.of(fact))
        else:
            values[kind] = fact["distance"] / max(fact["norms"]) if max(fact["norms"]) else 0.0
    measure = verdict.total(measures or parameters)
    if each.problem or any(values.values()) or not all(p.equal for p in parameters):
        measure = measure.unequal()
    word = measure.verdict
    if target not in pair.common and not measure.equal:
        word = "one-sided"
    elif each.problem and not measures:
        word = "not compared"
    return _Compared(measure, values, angles, word, bool(parameters) and not measures)


def _numbers(measure: Measure) -> dict[str, Any]:
    """Return the numbers of two updates, or of two adapters."""
    unknown = not any(measure.energy) and not measure.equal
    return {
        "norms": measure.norms,
        "distance": None if unknown else measure.distance,
        "cosine": measure.cosine,
        "overlap": measure.overlap,
        "shares": measure.shares,
    }


def _row(known: Mapping[tuple[int, int], _Compared], *, several: bool) -> dict[str, Any]:
    """Return what the report says of a module beside what it is."""
    if not several:
        return next(iter(known.values())).row
    pairs = [{"adapters": [n + 1 for n in numbers], **each.row} for numbers, each in known.items()]
    cosines, overlaps = ([p[name] for p in pairs if p[name] is not None] for name in ("cosine", "overlap"))
    return {
        "lowest_cosine": min(cosines, default=None),
        "highest_overlap": max(overlaps, default=None),
        "equal": all(p["equal"] for p in pairs),
        "verdict": verdict.gravest(p["verdict"] for p in pairs),
        "pairs": pairs,
    }


def _total(modules: Mapping[Target, _Compared]) -> Measure:
    """Return the sum over modules: of updates, or where there are none of parameters."""
    updates = [c for c in modules.values() if not c.by_parameters and any(c.measure.energy)]
    summed = verdict.total(c.measure for c in updates or modules.values())
    return summed if all(c.measure.equal for c in modules.values()) else summed.unequal()


def _of_two(pair: _Pair, modules: Mapping[Target, _Compared]) -> dict[str, Any]:
    """Return the totals of two adapters."""
    measure = _total(modules)
    words = [c.verdict for t, c in modules.items() if t in pair.common]
    return {
        **_numbers(measure),
        "equal": measure.equal,
        "verdicts": dict(Counter(c.verdict for c in modules.values())),
        "verdict": measure.verdict,
        "summary": verdict.in_words(measure, measure.verdict, words),
    }


def _of_several(pairs: Sequence[_Pair], found: Sequence[Mapping[Target, _Compared]], adapters: int) -> dict[str, Any]:
    """Return the totals of more than two: matrices, and a verdict for each pair."""
    measures = [_total(modules) for modules in found]
    matrices: dict[str, list[list[Any]]] = {}
    for name, self_ in (("cosine", 1.0), ("overlap", 1.0), ("distance", 0.0)):
        matrix: list[list[Any]] = [[self_ if i == j else None for j in range(adapters)] for i in range(adapters)]
        for pair, measure in zip(pairs, measures, strict=True):
            i, j = pair.numbers
            matrix[i][j] = matrix[j][i] = _numbers(measure)[name]
        matrices[f"{name}s"] = matrix
    judged = [((p.numbers[0] + 1, p.numbers[1] + 1), m.verdict, m) for p, m in zip(pairs, measures, strict=True)]
    norms = {n: m.norms[side] for p, m in zip(pairs, measures, strict=True) for side, n in enumerate(p.numbers)}
    return {
        "norms": [norms[n] for n in range(adapters)],
        **matrices,
        "equal": all(m.equal for m in measures),
        "pairs": [{"adapters": list(numbers), **_numbers(m), "verdict": word} for numbers, word, m in judged],
        "verdict": verdict.gravest(word for _, word, _ in judged),
        "summary": verdict.several_in_words(judged),
    }


# ---- what the report says beforehand


def _described(target: Target, sides: Sequence[Side]) -> dict[str, Any]:
    kinds = dict.fromkeys(kind for side in sides for kind in side.kinds)
    return {"module": str(target), "kind": "+".join(kinds), "ranks": [side.rank for side in sides]}


def _other_bases(adapters: Sequence[Adapter]) -> list[Finding]:
    """Warn where the adapters name models that cannot be the same."""
    names = {Path(a.base_model).name: a.base_model for a in adapters if a.base_model}
    if len(names) < 2:
        return []
    what = f"they were trained on {' and on '.join(names.values())}; on different bases the numbers mean little"
    return [Finding("warning", "base model", what)]


def _compared_as(sides: Mapping[Target, Sequence[Side]]) -> list[Finding]:
    """Say of which kinds it is not simply the update that is compared."""
    counts = Counter(kind for every in sides.values() for kind in {k for side in every for k in side.kinds})
    return [Finding("info", f"{kind} ({counts[kind]})", what) for kind, what in _COMPARED_AS.items() if counts[kind]]


def _gaps(pairs: Sequence[_Pair]) -> list[Finding]:
    """Name what is not compared, or not in full."""
    problems: dict[str, dict[Target, None]] = {}
    dense: dict[Target, None] = {}
    for pair in pairs:
        for target, each in pair.modules.items():
            if each.problem:
                problems.setdefault(each.problem, {})[target] = None
            if any(isinstance(unit, DensePair) for unit in each.units):
                dense[target] = None
    found = []
    for problem, targets in problems.items():
        where, _, what = problem.partition(": ")
        found.append(Finding("warning", where, f"{what} ({_listed(targets)})"))
    if dense:
        what = f"has no small factors: its subspaces are not compared, and the overlap leaves it out ({_listed(dense)})"
        found.append(Finding("info", "overlap", what))
    return found


def _listed(targets: Mapping[Target, None]) -> str:
    first = next(iter(targets))
    return str(first) if len(targets) == 1 else f"{len(targets)} modules, such as {first}"


def _inputs(
    adapters: Sequence[Adapter], pairs: Sequence[_Pair], sides: Mapping[Target, Sequence[Side]]
) -> tuple[Input, ...]:
    """Return what the ledger has to account for; what no unit reads is said to be not compared."""
    found = []
    for n, adapter in enumerate(adapters):
        fates: dict[str, str] = {}
        for target in adapter.deltas:
            units = [u for p in pairs if n in p.numbers for u in p.modules[target].units]
            reads = {ref for unit in units for ref in unit.reads}
            fates |= {v.ref.name: "not compared" for v in sides[target][n].values if v.ref not in reads}
        found.append(Input(adapter.origin.path, adapter.tensors, {**adapter.explained, **fates}, "copy of the base"))
    return tuple(found)
