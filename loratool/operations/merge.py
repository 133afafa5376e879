"""merge: adapters into the base's weights.

Every touched weight W becomes round(W + sum_i w_i s_i up_i @ down_i): factors are joined, products accumulate in
fp32, and there is one rounding, to the output's dtype. Weights stream through in tiles of about 512 KiB that stay in
cache; untouched tensors are copied as bytes; a shard whose names, shapes and dtypes stay keeps its header.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod, sqrt
from typing import Any

from loratool import dtypes
from loratool.adapter import Adapter, Finding, Target, Weighted
from loratool.architecture import Architecture
from loratool.errors import InputError
from loratool.operations.card import card
from loratool.operations.checks import SameValues
from loratool.operations.companions import companion_files
from loratool.operations.encoded import Codes, in_own_encoding
from loratool.operations.matching import (
    Places,
    resolve,
    tied_partner,
)
from loratool.operations.rebuilt import Rebuilt, rebuild
from loratool.operations.shards import Output, plan_shard
from loratool.operations.touched import AllTouched, Touched, is_base, known_places, match
from loratool.operations.verify import SampledRows
from loratool.plan import Facts, Input, OutFile, Plan, Report, Settled, Spooled, TensorFile, Unit
from loratool.storage.checkpoint import Checkpoint
from loratool.storage.quantised import made_of, summary

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
    as_nf4: bool = False,
    allow_noop: bool = False,
) -> Plan:
    """Plan the merge of weighted `adapters` into `base`; every mismatch is reported at once.

    `out_name` names the output when the base is a single file. `dtype` is "keep" or a name in OUTPUT_DTYPES; `compute`
    the dtype of the arithmetic. `as_trained`: merge into what nf4 ("nf4", "nf4-double") made of the linear layers.
    `as_nf4`: what the adapters touch is written as what nf4 makes of it, in its own dtype.
    """
    rebuilt = rebuild(base, architecture, adapters)
    ground = rebuilt.base
    known = known_places(ground, adapters, architecture)
    touched = match(rebuilt, adapters, known, architecture)
    decoded = dtype != "keep" or as_trained or "num_hidden_layers" in rebuilt.config  # repeated layers have no codes
    codes = Codes(ground.shards) if decoded else in_own_encoding(base, ground)
    trained_on = _trained_on(ground, known, architecture) if as_trained else frozenset()
    ignores = architecture.ignores
    output = Output("", dtype, compute, rebuilt.kept_dtypes, codes, as_trained, trained_on, ignores, as_nf4)
    weights, units, owners = _shards(output, "" if base.folder else out_name, touched)
    findings = [f for a in adapters for f in (*a.adapter.findings, *_other_base(a.adapter, base))]
    findings += rebuilt.findings
    findings += _of_quantised(base, codes, as_trained)
    files: tuple[OutFile, ...] = tuple(weights)
    if base.folder:
        beside, notes = companion_files(
            base, weights, dtype, rebuilt.config, [a.adapter for a in adapters], decoded=not codes.by_codes
        )
        how = summary(base.quantised) or (f"as {as_trained} makes it" if as_trained else "")
        how = "and what is changed of it is rounded to nf4" if as_nf4 else how
        files = (*files, *beside, card(base, adapters, how, dtype))
        findings += notes
    of_base = summary(base.quantised) or (f"as trained: {as_trained}" if as_trained else "")
    report = Report(
        verb="merge",
        totals={"family": architecture.name, "base": of_base, **_totals(weights, touched, rebuilt)},
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

    units += _checks(rebuilt, adapters, known, architecture)
    gone = {**rebuilt.replaced, **dict.fromkeys(made_of(base, rebuilt.replaced), "replaced")}
    spent = {} if codes.by_codes else base.spent
    inputs = [Input(base.path, base.stored or base.tensors, {**spent, **gone})]
    inputs += [Input(a.adapter.origin.path, a.adapter.tensors, a.adapter.explained) for a in adapters]
    return Plan(tuple(units), report, settle, files, not base.folder, tuple(inputs))


def _shards(
    output: Output, out_name: str, touched: AllTouched
) -> tuple[list[TensorFile], list[Unit], dict[str, Touched]]:
    """Return the weights' files, what computes them, and by the key of a unit the matrix that it is about.

    `out_name` is that of a single file; the files of a folder keep theirs.
    """
    weights: list[TensorFile] = []
    units: list[Unit] = []
    owners: dict[str, Touched] = {}
    for shard in output.codes.shards:
        file, of_shard = plan_shard(shard, output._replace(file=out_name or shard.name), touched)
        weights.append(file)
        units += [unit for unit, _ in of_shard]
        owners |= {unit.key: owner for unit, owner in of_shard if owner}
    return weights, units, owners


def _totals(weights: Sequence[TensorFile], touched: AllTouched, rebuilt: Rebuilt) -> dict[str, Any]:
    """Return what is known of the whole output beforehand."""
    tensors = [ref for file in weights for ref in file.tensors]
    return {
        "modules": sum(map(len, touched.values())),
        "replaced": sorted(rebuilt.replaced),
        "tensors": len(tensors),
        "bytes": sum(ref.nbytes for ref in tensors),
        "dtypes": sorted({ref.dtype for ref in tensors}),
    }


def samples(
    merged: Checkpoint, base: Checkpoint, architecture: Architecture, adapters: Sequence[Weighted]
) -> list[SampledRows]:
    """Return samples of a merged checkpoint, to be computed anew from the base and the adapters."""
    rebuilt = rebuild(base, architecture, adapters)
    known = known_places(rebuilt.base, adapters, architecture)
    touched = match(rebuilt, adapters, known, architecture)
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
            found.append(SampledRows(rows, stored, tuple(one.terms), one.place.transposed, encoded, row))
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
    for n, adapter in enumerate(a.adapter for a in adapters):
        for target, copy in adapter.base_copies.items():
            slices = resolve(target, known, architecture, rebuilt.base.config or {})
            partner = tied_partner(target.parts[0], target.component, rebuilt.base, architecture, known)
            if not slices and partner:  # one of two tied weights, of which the base holds the other
                slices = resolve(Target(target.component, (partner,)), known, architecture, rebuilt.base.config or {})
            tensor = slices[0].place.tensor if slices else ""
            if not slices or rebuilt.base.tensors[tensor].pieces == copy.pieces:
                continue  # it is this one
            original = rebuilt.before.get(tensor)
            own = original if original is not None and original.shape == copy.shape else slices[0].place.ref
            what = "the adapter was saved with another base weight than this base has"
            hint = "give the base that the adapter was trained on, or leave the module out with --exclude"
            units.append(SameValues(f"{n} {adapter.origin.path}", copy, own, what, hint, _ROUNDING))
    for n, (source, one, other) in enumerate(rebuilt.twins):
        what = f"it must be equal to {other.name} of {source}, and is not"
        hint = "are the weights tied as the config says (tie_word_embeddings), and the vocabularies one?"
        units.append(SameValues(f"twins {n} {source}", one, other, what, hint, _ROUNDING))
    return units


def _other_base(adapter: Adapter, base: Checkpoint) -> list[Finding]:
    if not adapter.base_model or is_base(adapter.base_model, base.path):
        return []
    what = f"says that it was trained on {adapter.base_model}; it is merged into {base.path}, which its shapes fit"
    hint = "if that is what PiSSA or LoftQ left of a base, merge into that, or give the start: --init-adapter"
    return [Finding("warning", adapter.origin.path, what, hint)]
