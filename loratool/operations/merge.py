"""merge: adapters into the base's weights.

Every touched weight W becomes round(W + sum_i w_i s_i up_i @ down_i): factors are joined, products accumulate in
fp32, and there is one rounding, to the output's dtype. Weights stream through in tiles of about 512 KiB that stay in
cache; untouched tensors are copied as bytes; a shard whose names, shapes and dtypes stay keeps its header.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod, sqrt
from pathlib import Path
from typing import Any, NamedTuple

from loratool import dtypes
from loratool.adapter import Adapter, Finding, Target
from loratool.architecture import Architecture
from loratool.errors import InputError, MismatchError
from loratool.layers import Excluded, Matrix
from loratool.operations.matching import (
    Place,
    Places,
    Slice,
    misfit,
    oriented,
    places,
    resolve,
    sliced,
    tied_partner,
)
from loratool.operations.panels import PANEL, MergePanel, SameValues, Term
from loratool.plan import (
    CopiedFile,
    Facts,
    Input,
    JsonFile,
    Out,
    OutFile,
    Plan,
    Report,
    Settled,
    Spooled,
    TensorFile,
    Unit,
)
from loratool.storage.checkpoint import Checkpoint, Shard, companions, is_inside, left_behind
from loratool.tensors import TensorRef


def plan(
    base: Checkpoint,
    architecture: Architecture,
    adapters: Sequence[tuple[Adapter, float]],
    *,
    out_name: str,
    dtype: str = "keep",
    allow_noop: bool = False,
) -> Plan:
    """Plan the merge of `adapters` (each with its weight) into `base`; every mismatch is reported at once.

    `out_name` names the output when the base is a single file. `dtype` is "keep" or a name in OUTPUT_DTYPES.
    """
    known = _known(base, adapters, architecture)
    touched = _match(base, adapters, known, architecture)
    weights: list[TensorFile] = []
    units: list[Unit] = []
    owners: dict[str, Touched] = {}
    for shard in base.shards:
        file, shard_units = _plan_shard(shard, shard.name if base.folder else out_name, touched, dtype)
        weights.append(file)
        units += [unit for unit, _ in shard_units]
        owners |= {unit.key: owner for unit, owner in shard_units if owner}
    for adapter, _ in adapters:
        units += [
            SameValues(adapter.origin.path, ref, resolve(t, known, architecture, base.config or {})[0].place.ref)
            for t, ref in adapter.base_copies.items()
        ]
    files: tuple[OutFile, ...] = tuple(weights)
    findings = [f for a, _ in adapters for f in (*a.findings, *_other_base(a, base))]
    if base.folder:
        beside, notes = _companion_files(base, weights, dtype)
        files, findings = (*files, *beside), [*findings, *notes]
    report = Report(
        verb="merge",
        totals={
            "family": architecture.name,
            "modules": sum(map(len, touched.values())),
            "tensors": len(base.tensors),
            "bytes": sum(ref.nbytes for file in weights for ref in file.tensors),
            "dtypes": sorted({ref.dtype for file in weights for ref in file.tensors}),
        },
        rows=[t.row for blocks in touched.values() for t in blocks.values()],
        findings=findings,
        files=[f.name for f in files],
    )

    def settle(facts: Mapping[str, Facts], spooled: Spooled) -> Settled:
        squared: dict[int, float] = {}
        for key, owner in owners.items():
            squared[id(owner)] = squared.get(id(owner), 0.0) + facts[key]["delta"]
        if not any(squared.values()) and not allow_noop:
            raise InputError(
                "the adapters change nothing: every update is zero",
                hint="was the adapter trained? --allow-noop writes the unchanged model",
            )
        every = (owner for blocks in touched.values() for owner in blocks.values())
        for row, owner in zip(report.rows, every, strict=True):
            row["delta_norm"] = sqrt(squared.get(id(owner), 0.0))
        report.totals["delta_norm"] = sqrt(sum(squared.values()))
        return Settled(report)

    inputs = [Input(base.path, base.tensors), *(Input(a.origin.path, a.tensors, a.explained) for a, _ in adapters)]
    return Plan(tuple(units), report, settle, files, not base.folder, tuple(inputs))


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
            "ranks": [t.down.shape[0] for t in self.terms],
        }


#: tensor of the base -> row at which a matrix begins in it (0, but for the experts of a stack) -> what changes it
AllTouched = dict[str, dict[int, Touched]]


def _known(
    base: Checkpoint, adapters: Sequence[tuple[Adapter, float]], architecture: Architecture
) -> dict[Target, Place]:
    """Return the matrices of the base; where the family does not know how they are stored, the deltas show it."""
    known = places(base, architecture)
    if not any(isinstance(layer, Matrix) for layer in architecture.layers):
        return known
    wanted = {t: d.matrix_shape for a, _ in adapters for t, ds in a.deltas.items() for d in ds}
    return oriented(known, wanted, str((base.config or {}).get("model_type") or base.path))


def _match(
    base: Checkpoint, adapters: Sequence[tuple[Adapter, float]], known: Places, architecture: Architecture
) -> AllTouched:
    """Return every matrix that is touched; raise MismatchError that lists every misfit."""
    touched: AllTouched = {}
    problems: list[str] = []
    for adapter, weight in adapters:
        for stack in adapter.origin.stacks.values():
            if stack.beyond and resolve(stack.beyond, known, architecture, base.config or {}):
                problems.append(f"{stack.parameter}: the adapter has {len(stack.targets)} experts, the base has more")
        for target in adapter.targets:
            slices = resolve(target, known, architecture, base.config or {})
            if not slices:
                problems.append(
                    f"{target}: the base has no such module{_why_missing(target, known, base, architecture)}"
                )
                continue
            found = [problem for delta in adapter.deltas[target] if (problem := misfit(delta, slices))]
            found += [problem for one in slices if (problem := _unmergeable(one, target, base, architecture, known))]
            problems += [f"{target}: {problem}" for problem in found]
            for one in slices if not found else ():
                blocks = touched.setdefault(one.place.tensor, {})
                entry = blocks.setdefault(one.place.row, Touched(one.place, {}, []))
                entry.targets[target] = "+".join(s.place.role for s in slices)
                for delta in adapter.deltas[target]:
                    part = sliced(delta, one.rows)
                    entry.terms.append(Term(part.up, part.down, weight * delta.scaling, one.place.rows))
    if problems:
        names = sorted({a.base_model for a, _ in adapters if a.base_model and not _is_base(a.base_model, base.path)})
        more = [f"... and {len(problems) - 12} more"] if len(problems) > 12 else []
        raise MismatchError(
            "\n  ".join([f"the adapter does not fit this base ({len(problems)} modules)", *problems[:12], *more]),
            where=base.path,
            hint=f"the adapter says it was trained on {', '.join(names)}"
            if names
            else f"is this the right base, and {architecture.name} its family (--arch)?",
        )
    return touched


def _unmergeable(one: Slice, target: Target, base: Checkpoint, architecture: Architecture, known: Places) -> str:
    """Say why this weight cannot be changed, or nothing."""
    partner = tied_partner(one.path, target.component, base, architecture, known)
    if partner:
        return f"shares its weight with {partner}; merging tied weights is not supported yet"
    if not dtypes.is_float(one.place.stored.dtype):
        return f"a {one.place.stored.dtype} weight; quantised bases are not supported yet"
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


def _plan_shard(
    shard: Shard, name: str, touched: AllTouched, dtype: str
) -> tuple[TensorFile, list[tuple[MergePanel, Touched | None]]]:
    """Return a shard of the output and the units that fill it, each with the matrix that it changes."""
    refs: list[TensorRef] = []
    units: list[tuple[MergePanel, Touched | None]] = []
    for ref in shard.header.tensors:
        wanted = dtypes.from_torch_name(dtype) if dtype != "keep" and dtypes.is_float(ref.dtype) else ref.dtype
        blocks = touched.get(ref.name, {})
        if not blocks and wanted == ref.dtype:
            refs.append(ref)
            continue
        refs.append(replace(ref, dtype=wanted, pieces=()))
        units += _panels(ref, name, wanted, blocks)
    same = all(new.dtype == old.dtype for new, old in zip(refs, shard.header.tensors, strict=True))
    return TensorFile(name, tuple(refs), shard.header.metadata, shard.header.raw if same else None), units


def _panels(
    ref: TensorRef, file: str, dtype: str, blocks: Mapping[int, Touched]
) -> list[tuple[MergePanel, Touched | None]]:
    """Cut a tensor into units: each matrix that is touched, and the rows between them."""
    if len(ref.shape) < 2:  # a vector is one row
        flat = replace(ref, shape=(1, prod(ref.shape)))
    else:  # the experts of a stack lie one below the other
        stored = next((t.place.stored for t in blocks.values()), ref)
        flat = replace(ref, shape=(prod(ref.shape[: 1 - len(stored.shape) or None]), *stored.shape[1:]))
    out = Out(file, ref.name, flat.shape, dtype)
    ends = {row: row + t.place.stored.shape[0] for row, t in blocks.items()}
    units: list[tuple[MergePanel, Touched | None]] = []
    for start, stop in pairwise(sorted({0, flat.shape[0], *ends, *ends.values()})):
        mine = blocks.get(start)
        matrix = flat.rows(start, stop)
        terms = tuple(mine.terms) if mine else ()
        transposed = mine.place.transposed if mine else False
        units += [(MergePanel(matrix, out, terms, transposed, start, a, b), mine) for a, b in matrix.panels(PANEL)]
    return units


def _companion_files(
    base: Checkpoint, weights: Sequence[TensorFile], dtype: str
) -> tuple[list[OutFile], list[Finding]]:
    """Return the config, tokenizer and licence files, and the index, adapted where the dtype changed."""
    changed = any(file.header is None for file in weights)
    files: list[OutFile] = []
    findings: list[Finding] = []
    for name in companions(base.folder):
        if not is_inside(Path(base.folder, name), Path(base.folder)):
            findings.append(Finding("warning", name, "not copied: it is a link that leads out of the base's folder"))
        elif name == "config.json" and changed and base.config:
            field = "dtype" if "dtype" in base.config else "torch_dtype"
            files.append(JsonFile(name, {**base.config, field: dtype}))
        else:
            files.append(CopiedFile(name, f"{base.folder}/{name}"))
    if base.index_name and changed:
        total = sum(ref.nbytes for file in weights for ref in file.tensors)
        old = base.index.get("metadata")
        metadata = {**(old if isinstance(old, dict) else {}), "total_size": total}
        files.append(JsonFile(base.index_name, {**base.index, "metadata": metadata}))
    elif base.index_name:
        files.append(CopiedFile(base.index_name, f"{base.folder}/{base.index_name}"))
    taken = {file.name for file in (*weights, *files)} | {f.where for f in findings}
    left = left_behind(base.folder, taken)
    if left:
        more = f" and {len(left) - 8} more" if len(left) > 8 else ""
        findings.append(Finding("info", base.path, f"not copied: {', '.join(left[:8])}{more}"))
    return files, findings
