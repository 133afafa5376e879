"""merge: adapters into the base's weights.

Every touched weight W becomes round(W + sum_i w_i s_i up_i @ down_i): factors are joined, products accumulate in
fp32, and there is one rounding, to the output's dtype. Weights stream through in tiles of about 512 KiB that stay in
cache; untouched tensors are copied as bytes; a shard whose names, shapes and dtypes stay keeps its header.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod, sqrt
from pathlib import Path
from typing import Any, NamedTuple

from loratool import dtypes
from loratool.adapter import Adapter, Finding, Target, Weighted
from loratool.architecture import Architecture
from loratool.deltas import Boft, Delta, Ia3, LoHa, LoKr, Oft, Replace, Term, Tokens
from loratool.errors import InputError, MismatchError
from loratool.layers import Excluded, Matrix
from loratool.operations.card import card
from loratool.operations.checks import SameValues
from loratool.operations.companions import companion_files
from loratool.operations.complete import require_complete
from loratool.operations.encoded import Codes, encoded_units, in_own_encoding
from loratool.operations.matching import (
    Place,
    Places,
    Slice,
    bias_of,
    misfit,
    names_of,
    oriented,
    places,
    resolve,
    sliced,
    tied_partner,
    vector_slices,
)
from loratool.operations.panels import MergePanel, panels_of
from loratool.operations.rebuilt import Rebuilt, rebuild
from loratool.operations.verify import SampledRows
from loratool.plan import Facts, Input, Out, OutFile, Plan, Report, Settled, Spooled, TensorFile, Unit
from loratool.storage.checkpoint import Checkpoint, Shard
from loratool.storage.quantised import made_of, summary
from loratool.tensors import TensorRef

_MUCH = 0.1  # of an update that rounding may lose without a word
_ROUNDING = 2**-7  # two roundings of one weight differ by less, bfloat16's included


def plan(
    base: Checkpoint,
    architecture: Architecture,
    adapters: Sequence[Weighted],
    *,
    out_name: str,
    dtype: str = "keep",
    compute: str = "float32",
    as_trained: str = "",
    allow_noop: bool = False,
) -> Plan:
    """Plan the merge of weighted `adapters` into `base`; every mismatch is reported at once.

    `out_name` names the output when the base is a single file. `dtype` is "keep" or a name in OUTPUT_DTYPES; `compute`
    the dtype of the arithmetic. `as_trained`: merge into what nf4 ("nf4", "nf4-double") made of the linear layers.
    """
    rebuilt = rebuild(base, architecture, adapters)
    ground = rebuilt.base
    known = _known(ground, adapters, architecture)
    touched = _match(rebuilt, adapters, known, architecture)
    weights: list[TensorFile] = []
    units: list[Unit] = []
    owners: dict[str, Touched] = {}
    codes = in_own_encoding(base, ground) if dtype == "keep" and not as_trained else Codes(ground.shards)
    trained_on = _trained_on(ground, known, architecture) if as_trained else frozenset()
    for shard in codes.shards:
        name = shard.name if base.folder else out_name
        output = _Output(name, dtype, compute, rebuilt.kept_dtypes, codes, as_trained, trained_on)
        file, shard_units = _plan_shard(shard, output, touched)
        weights.append(file)
        units += [unit for unit, _ in shard_units]
        owners |= {unit.key: owner for unit, owner in shard_units if owner}
    units += _checks(rebuilt, adapters, known, architecture)
    files: tuple[OutFile, ...] = tuple(weights)
    findings = [f for a in adapters for f in (*a.adapter.findings, *_other_base(a.adapter, base))]
    findings += rebuilt.findings
    findings += _of_quantised(base, codes, as_trained)
    if base.folder:
        beside, notes = companion_files(
            base, weights, dtype, rebuilt.config, [a.adapter for a in adapters], decoded=not codes.by_codes
        )
        how = summary(base.quantised) or (f"as {as_trained} makes it" if as_trained else "")
        files = (*files, *beside, card(base, adapters, how, dtype))
        findings += notes
    report = Report(
        verb="merge",
        totals={
            "family": architecture.name,
            "base": summary(base.quantised) or (f"as trained: {as_trained}" if as_trained else ""),
            "modules": sum(map(len, touched.values())),
            "replaced": sorted(rebuilt.replaced),
            "tensors": sum(len(file.tensors) for file in weights),
            "bytes": sum(ref.nbytes for file in weights for ref in file.tensors),
            "dtypes": sorted({ref.dtype for file in weights for ref in file.tensors}),
        },
        rows=[t.row for blocks in touched.values() for t in blocks.values()],
        findings=findings,
        files=[f.name for f in files],
    )

    def settle(facts: Mapping[str, Facts], spooled: Spooled) -> Settled:
        _measure(report, touched, owners, facts)
        if not report.totals["delta_norm"] and not rebuilt.replaced and not allow_noop:
            raise InputError(
                "the adapters change nothing: every update is zero",
                hint="was the adapter trained? --allow-noop writes the unchanged model",
            )
        return Settled(report)

    gone = {**rebuilt.replaced, **dict.fromkeys(made_of(base, rebuilt.replaced), "replaced")}
    spent = {} if codes.by_codes else base.spent
    inputs = [Input(base.path, base.stored or base.tensors, {**spent, **gone})]
    inputs += [Input(a.adapter.origin.path, a.adapter.tensors, a.adapter.explained) for a in adapters]
    return Plan(tuple(units), report, settle, files, not base.folder, tuple(inputs))


def samples(
    merged: Checkpoint, base: Checkpoint, architecture: Architecture, adapters: Sequence[Weighted]
) -> list[SampledRows]:
    """Return samples of a merged checkpoint, to be computed anew from the base and the adapters."""
    rebuilt = rebuild(base, architecture, adapters)
    known = _known(rebuilt.base, adapters, architecture)
    touched = _match(rebuilt, adapters, known, architecture)
    found = []
    for name, ref in rebuilt.base.tensors.items():
        output = merged.tensors[name]
        encoded = name in merged.quantised
        if not prod(ref.shape):
            continue
        blocks = touched.get(name, {})
        for row, one in blocks.items():
            stored = one.place.stored
            flat = replace(output, shape=(prod(ref.shape) // prod(stored.shape[1:]), *stored.shape[1:]))
            rows = flat.rows(row, row + stored.shape[0])
            found.append(SampledRows(rows, stored, tuple(one.terms), one.place.transposed, encoded))
        if not blocks and dtypes.is_float(ref.dtype):
            shape = (prod(ref.shape[:-1]), ref.shape[-1]) if len(ref.shape) > 1 else (prod(ref.shape), 1)
            whole = replace(output, shape=shape), replace(ref, shape=shape)
            found.append(SampledRows(*whole, (), transposed=False, encoded=False))
    return found


def _of_quantised(base: Checkpoint, codes: Codes, as_trained: str) -> list[Finding]:
    """Say what a quantised base is merged into, and what is written."""
    if as_trained:
        what = f"the linear layers are what {as_trained} makes of them, as they were while the adapter was trained"
        return [Finding("info", base.path, what)]
    if not base.quantised:
        return []
    written = "written in the base's own encoding" if codes.by_codes else "written as the numbers they stand for"
    return [Finding("info", base.path, f"quantised: {summary(base.quantised)}; decoded, merged, {written}")]


def _trained_on(base: Checkpoint, known: Places, architecture: Architecture) -> frozenset[str]:
    """Return the tensors that bitsandbytes quantises: linear layers but for the head, and nothing stacked."""
    linear = [(p.tensor, p.transposed) for p in known.values() if p.layer.kind == "linear" and p.layer.group != "head"]
    if not linear or any(turned for _, turned in linear) or base.quantised:
        raise InputError(
            "--base-as-trained is for bases in 16 bits whose layers are linear",
            where=base.path,
            hint="is this the base that was loaded in 4 bits?",
        )
    return frozenset(tensor for tensor, _ in linear)


def _measure(report: Report, touched: AllTouched, owners: Mapping[str, Touched], facts: Mapping[str, Facts]) -> None:
    """Write into the report how large the deltas are and how much of them the rounding to the output's dtype lost."""
    squared: dict[int, list[float]] = {}
    for key, owner in owners.items():
        sums = squared.setdefault(id(owner), [0.0, 0.0])
        sums[0] += facts[key]["delta"]
        sums[1] += facts[key]["lost"]
    every = [owner for blocks in touched.values() for owner in blocks.values()]
    for row, owner in zip(report.rows, every, strict=True):
        delta, lost = squared.get(id(owner), [0.0, 0.0])
        row["delta_norm"] = sqrt(delta)
        row["rounding"] = sqrt(lost / delta) if delta else None
    totals = [sum(sums[n] for sums in squared.values()) for n in (0, 1)]
    report.totals["delta_norm"] = sqrt(totals[0])
    report.totals["rounding"] = sqrt(totals[1] / totals[0]) if totals[0] else None
    if totals[1] > _MUCH**2 * totals[0]:
        what = f"rounding to the output's dtype lost {100 * report.totals['rounding']:.0f} % of the update"
        report.findings.append(Finding("warning", "rounding", what, "--dtype float32 keeps all of it"))


def _checks(
    rebuilt: Rebuilt, adapters: Sequence[Weighted], known: Places, architecture: Architecture
) -> list[SameValues]:
    """Return the comparisons of what must be equal: weights of the base that adapters carry along, tied pairs."""
    units = []
    for adapter in (a.adapter for a in adapters):
        for target, copy in adapter.base_copies.items():
            slices = resolve(target, known, architecture, rebuilt.base.config or {})
            partner = tied_partner(target.parts[0], target.component, rebuilt.base, architecture, known)
            if not slices and partner:  # one of two tied weights, of which the base holds the other
                slices = resolve(Target(target.component, (partner,)), known, architecture, rebuilt.base.config or {})
            tensor = slices[0].place.tensor if slices else ""
            if tensor in rebuilt.replaced and rebuilt.base.tensors[tensor].shape == copy.shape:
                continue  # it is this one
            what = "the adapter was saved with another base weight than this base has"
            hint = "give the base that the adapter was trained on, or leave the module out with --exclude"
            if slices:
                units.append(SameValues(adapter.origin.path, copy, slices[0].place.ref, what, hint, _ROUNDING))
    for source, one, other in rebuilt.twins:
        what = f"it is tied to {other.name}, and the two have different values"
        hint = "is tie_word_embeddings of the config right?"
        units.append(SameValues(source, one, other, what, hint, _ROUNDING))
    return units


class Touched(NamedTuple):
    """A matrix of the base that adapters change."""

    place: Place
    targets: dict[Target, str]  # and their roles
    terms: list[Term]

    @property
    def row(self) -> dict[str, Any]:
        """What the report says of it."""
        return {
            "module": ", ".join(map(str, self.targets)),
            "tensor": self.place.tensor,
            "group": self.place.layer.group,
            "role": "+".join(dict.fromkeys(self.targets.values())),
            "shape": list(self.place.stored.shape),
            "kind": "+".join(dict.fromkeys(t.delta.kind for t in self.terms)),
            "ranks": [t.delta.rank for t in self.terms if t.delta.rank],
        }


#: tensor of the base -> row at which a matrix begins in it (0, but for the experts of a stack) -> what changes it
AllTouched = dict[str, dict[int, Touched]]


def _known(base: Checkpoint, adapters: Sequence[Weighted], architecture: Architecture) -> dict[Target, Place]:
    """Return the matrices of the base; where the family does not know how they are stored, the deltas show it."""
    known = places(base, architecture)
    if not any(isinstance(layer, Matrix) for layer in architecture.layers):
        return known
    linear = (LoHa, LoKr, Oft, Boft)  # never on weights that are stored (in, out)
    deltas = [(t, d) for a in adapters for t, ds in a.adapter.deltas.items() for d in ds if not isinstance(d, linear)]
    wanted = {t: d.matrix_shape for t, d in deltas if not d.as_stored and not _is_of_attention(t, base)}
    return oriented(known, wanted, str((base.config or {}).get("model_type") or base.path))


def _is_of_attention(target: Target, base: Checkpoint) -> bool:
    """Whether this is the output of torch's MultiheadAttention, which is (out, in) though it is square."""
    return f"{target.parts[0].removesuffix('.out_proj')}.in_proj_weight" in base.tensors


def _match(rebuilt: Rebuilt, adapters: Sequence[Weighted], known: Places, architecture: Architecture) -> AllTouched:
    """Return every matrix that is touched; raise MismatchError that lists every misfit."""
    base = rebuilt.base
    names = names_of(base, architecture)
    touched: AllTouched = {}
    problems: list[str] = []
    for n, weighted in enumerate(adapters):
        adapter = weighted.adapter
        for stack in adapter.origin.stacks.values():
            if stack.beyond and resolve(stack.beyond, known, architecture, base.config or {}):
                problems.append(f"{stack.parameter}: the adapter has {len(stack.targets)} experts, the base has more")
        for target in (t for t in adapter.targets if t not in rebuilt.settled[n]):
            slices = resolve(target, known, architecture, base.config or {})
            if not slices and all(d.as_stored for d in adapter.deltas[target]):  # others need a family's orientation
                slices = vector_slices(target, base, known, architecture, names)
            if not slices:
                problems.append(
                    f"{target}: the base has no such module{_why_missing(target, known, base, architecture)}"
                )
                continue
            found = [problem for delta in adapter.deltas[target] if (problem := misfit(delta, slices))]
            found += [problem for one in slices if (problem := _unmergeable(one, target, rebuilt, architecture, known))]
            fate = rebuilt.replaced.get(slices[0].place.tensor, "")
            if adapter.origin.path not in fate and fate and any(isinstance(d, Tokens) for d in adapter.deltas[target]):
                found.append("another adapter brings this weight in full, and this one tokens of it")
            problems += [f"{target}: {problem}" for problem in found]
            if not found:
                _touch(touched, slices, target, adapter.deltas[target], weighted.of(target))
                problems += _scaled_biases(touched, slices, target, weighted, base)
    problems += [f"{tensor}: {problem}" for tensor, problem in _conflicts(touched)]
    if problems:
        plain = [a.adapter for a in adapters]
        named = sorted({a.base_model for a in plain if a.base_model and not _is_base(a.base_model, base.path)})
        more = [f"... and {len(problems) - 12} more"] if len(problems) > 12 else []
        said = f"; it says that it was trained on {', '.join(named)}" if named else ""
        raise MismatchError(
            "\n  ".join([f"the adapter does not fit this base ({len(problems)} modules){said}", *problems[:12], *more]),
            where=base.path,
            hint=f"is this the right base, and {architecture.name} its family (--arch)?",
        )
    for weighted in adapters:
        require_complete(weighted.adapter, base, known, rebuilt.config)
    return touched


def _touch(
    touched: AllTouched, slices: Sequence[Slice], target: Target, deltas: Sequence[Delta], weight: float
) -> None:
    """Enter the deltas of a target at every matrix in which its rows lie."""
    for one in slices:
        blocks = touched.setdefault(one.place.tensor, {})
        entry = blocks.setdefault(one.place.row, Touched(one.place, {}, []))
        entry.targets[target] = "+".join(s.place.role for s in slices)
        for delta in deltas:
            part = sliced(delta, one.rows, transposed=one.place.transposed)
            entry.terms.append(Term(part, weight, one.place.rows))


def _scaled_biases(
    touched: AllTouched, slices: Sequence[Slice], target: Target, weighted: Weighted, base: Checkpoint
) -> list[str]:
    """Enter (IA)^3 factors of outputs at the biases too: what is scaled is all that a layer gives."""
    factors = [d for d in weighted.adapter.deltas[target] if isinstance(d, Ia3) and not d.of_inputs]
    names = [f"{s.place.tensor.removesuffix('.weight')}.bias" for s in slices]
    if not factors or not any(name in base.tensors for name in names):
        return []
    if not all(name in base.tensors and s.place.row == 0 for s, name in zip(slices, names, strict=True)):
        return [f"{target}: some of its parts have a bias and some have none"]
    columns = [replace(base.tensors[name], shape=(prod(base.tensors[name].shape), 1)) for name in names]
    biases = [
        s._replace(place=replace(s.place, stored=column, tensor=name, transposed=False))
        for s, name, column in zip(slices, names, columns, strict=True)
    ]
    _touch(touched, biases, bias_of(target), factors, weighted.of(target))
    return []


def _conflicts(touched: AllTouched) -> Iterator[tuple[str, str]]:
    """Yield the weights that two adapters want to replace, in full or in the same rows."""
    for tensor, blocks in touched.items():
        for entry in blocks.values():
            whole = [t for t in entry.terms if isinstance(t.delta, Replace)]
            if len(whole) > len({t.into for t in whole}):
                yield tensor, "two adapters bring this weight in full: leave it out of one (--adapter-config)"
            rows = [i for t in entry.terms if isinstance(t.delta, Tokens) for i in t.delta.indices]
            if len(rows) > len(set(rows)):
                yield tensor, "two adapters bring the same tokens"
            if whole and rows:
                yield tensor, "one adapter brings this weight in full and another tokens of it"


def _unmergeable(one: Slice, target: Target, rebuilt: Rebuilt, architecture: Architecture, known: Places) -> str:
    """Say why this weight cannot be changed, or nothing."""
    partner = tied_partner(one.path, target.component, rebuilt.base, architecture, known)
    if partner and any(len(group) > 2 for group in architecture.tied if one.path in group):
        return f"shares its weight with {partner}, and a model of this family cannot be saved without that tie"
    if not dtypes.is_float(one.place.stored.dtype):
        return f"a {one.place.stored.dtype} weight: it is quantised in a way that loratool does not know"
    return ""


def _why_missing(target: Target, known: Places, base: Checkpoint, architecture: Architecture) -> str:
    """Return a reason that a person can act on, or nothing."""
    if all(f"{part}.weight" in base.tensors and not architecture.find(part) for part in target.parts):
        return f" that {architecture.name} knows (the file has it: see loratool arch check)"
    components = {t.component for t in known}
    if components and target.component not in components:
        return f" (it is {min(components)}: choose with --target '{min(components)}:**')"
    layers = [architecture.find(part, target.component) for part in target.parts]
    if any(k and isinstance(k.layer, Excluded) for k in layers):
        return f" that can carry an adapter ({next(k.layer.group for k in layers if k)})"
    tied = [p for path in target.parts for group in architecture.tied if path in group for p in group if p != path]
    return f" (it is tied to {tied[0]})" if any(Target(target.component, (p,)) in known for p in tied) else ""


def _is_base(named: str, given: str) -> bool:
    """Whether the base that an adapter names can be the one that was given: the same place, or the same last name."""
    return Path(named).name == Path(given).resolve().name


def _other_base(adapter: Adapter, base: Checkpoint) -> list[Finding]:
    if not adapter.base_model or _is_base(adapter.base_model, base.path):
        return []
    what = f"says that it was trained on {adapter.base_model}; it is merged into {base.path}, which its shapes fit"
    return [Finding("warning", adapter.origin.path, what)]


class _Output(NamedTuple):
    """A file of the output, and what the options say of all: dtypes, and what "keep" is for new tensors; encodings."""

    file: str
    dtype: str
    compute: str
    kept_dtypes: Mapping[str, str]
    codes: Codes
    as_trained: str
    trained_on: frozenset[str]

    def wanted(self, ref: TensorRef) -> str:
        """Return the dtype that a tensor gets."""
        kept = self.kept_dtypes.get(ref.name, ref.dtype)
        return dtypes.from_torch_name(self.dtype) if self.dtype != "keep" and dtypes.is_float(kept) else kept

    def simulated(self, ref: TensorRef) -> str:
        """Return what a tensor was quantised to while the adapter was trained, or nothing."""
        return self.as_trained if ref.name in self.trained_on else ""


Units = list[tuple[Unit, Touched | None]]


def _plan_shard(shard: Shard, output: _Output, touched: AllTouched) -> tuple[TensorFile, Units]:
    """Return a shard of the output and the units that fill it, each with the matrix that it changes."""
    refs: list[TensorRef] = []
    units: Units = []
    for ref in shard.header.tensors:
        logical = output.codes.by_codes.get(ref.name) or output.codes.by_scales.get(ref.name)
        wanted = output.wanted(ref)
        blocks = touched.get(logical.name if logical else ref.name, {})
        if logical and not blocks:
            refs.append(ref)
        elif logical:
            refs.append(TensorRef(ref.name, ref.shape, ref.dtype))
            if ref.name in output.codes.by_codes:
                units += _encoded_units(logical, ref, output, blocks)
        elif not blocks and wanted == ref.dtype and ref.view is None and not output.simulated(ref):
            refs.append(ref)
        else:
            refs.append(TensorRef(ref.name, ref.shape, wanted))
            units += _panels(ref, output, wanted, blocks)
    header = shard.header
    same = all(new.dtype == old.dtype for new, old in zip(refs, header.tensors, strict=True)) and header.raw
    file = TensorFile(output.file, tuple(refs), header.metadata, header.raw if same else None)
    return file, units


def _encoded_units(logical: TensorRef, ref: TensorRef, output: _Output, blocks: Mapping[int, Touched]) -> Units:
    """Return the units of a touched tensor that is written in the base's own encoding."""
    scales = next(name for name, of in output.codes.by_scales.items() if of is logical)
    stored = next(r for shard in output.codes.shards for r in shard.header.tensors if r.name == scales)
    matrices = {
        row: MergePanel(
            t.place.stored,
            Out("", logical.name, t.place.stored.shape, logical.dtype),
            tuple(t.terms),
            t.place.transposed,
            row,
            0,
            t.place.stored.shape[0],
            output.compute,
        )
        for row, t in blocks.items()
    }
    made = encoded_units(logical, matrices, output.file, ref, stored)
    return [(unit, blocks[row] if row is not None else None) for unit, row in made]


def _panels(ref: TensorRef, output: _Output, dtype: str, blocks: Mapping[int, Touched]) -> Units:
    """Cut a tensor into units: each matrix that is touched, and the rows between them."""
    if len(ref.shape) < 2:  # a vector is one column
        flat = replace(ref, shape=(prod(ref.shape), 1))
    elif not blocks:
        flat = replace(ref, shape=(prod(ref.shape[:-1]), ref.shape[-1]))
    else:  # the experts of a stack lie one below the other
        stored = next(t.place.stored for t in blocks.values())
        flat = replace(ref, shape=(prod(ref.shape[: 1 - len(stored.shape) or None]), *stored.shape[1:]))
    out = Out(output.file, ref.name, flat.shape, dtype)
    ends = {row: row + t.place.stored.shape[0] for row, t in blocks.items()}
    simulated = output.simulated(ref)
    units: Units = []
    for start, stop in pairwise(sorted({0, flat.shape[0], *ends, *ends.values()})):
        mine = blocks.get(start)
        matrix = flat.rows(start, stop)
        terms = tuple(mine.terms) if mine else ()
        transposed = mine.place.transposed if mine else False
        whole = simulated == "nf4-double"  # whose scales depend on all of the weight
        cuts = [(0, stop - start)] if whole else panels_of(matrix, terms, transposed=transposed)
        units += [
            (MergePanel(matrix, out, terms, transposed, start, a, b, output.compute, simulated), mine) for a, b in cuts
        ]
    return units
