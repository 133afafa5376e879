"""Which matrices of a base the adapters change, and by what; every mismatch is found here, and named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from loratool import dtypes
from loratool.adapter import Target, Weighted
from loratool.architecture import Architecture
from loratool.deltas import Boft, Delta, Glora, Ia3, LoHa, LoKr, Oft, OutputOft, Replace, Term, Tokens
from loratool.errors import MismatchError
from loratool.layers import Excluded, Matrix
from loratool.operations.complete import require_complete
from loratool.operations.matching import (
    Place,
    Places,
    Slice,
    bias_beside,
    bias_of,
    misfit,
    oriented,
    places,
    resolve,
    sliced,
    tied_partner,
    vector_slices,
)
from loratool.operations.meanings import Meanings
from loratool.operations.rebuilt import Rebuilt
from loratool.storage.checkpoint import Checkpoint, weights_of
from loratool.storage.location import name_in_configs
from loratool.storage.runs import SHARD


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


def known_places(base: Checkpoint, adapters: Sequence[Weighted], architecture: Architecture) -> dict[Target, Place]:
    """Return the matrices of the base; where the family does not know how they are stored, the deltas show it."""
    known = places(base, architecture)
    if not any(isinstance(layer, Matrix) for layer in architecture.layers):
        return known
    linear = (LoHa, LoKr, Glora, Oft, Boft, OutputOft)  # never on weights that are stored (in, out)
    deltas = [(t, d) for a in adapters for t, ds in a.adapter.deltas.items() for d in ds if not isinstance(d, linear)]
    wanted = {t: d.matrix_shape for t, d in deltas if not d.as_stored and not _is_of_attention(t, base)}
    return oriented(known, wanted, str((base.config or {}).get("model_type") or base.path))


def _is_of_attention(target: Target, base: Checkpoint) -> bool:
    """Whether this is the output of torch's MultiheadAttention, which is (out, in) though it is square."""
    return f"{target.parts[0].removesuffix('.out_proj')}.in_proj_weight" in base.tensors


def match(rebuilt: Rebuilt, adapters: Sequence[Weighted], known: Places, architecture: Architecture) -> AllTouched:
    """Return every matrix that is touched; raise MismatchError that lists every misfit."""
    base = rebuilt.base
    meanings = Meanings(base, architecture)
    touched: AllTouched = {}
    problems: list[str] = []
    for n, weighted in enumerate(adapters):
        adapter = weighted.adapter
        for stack in adapter.origin.stacks.values():
            if stack.beyond and resolve(stack.beyond, known, architecture, base.config or {}):
                problems.append(f"{stack.parameter}: the adapter has {len(stack.targets)} experts, the base has more")
        deltas_of = {t: adapter.deltas[t] for t in adapter.targets if t not in rebuilt.settled[n]}
        deltas_of |= {t: (*deltas_of.get(t, ()), *more) for t, more in rebuilt.mirrored[n].items()}
        for target, deltas in deltas_of.items():
            slices = resolve(target, known, architecture, base.config or {})
            as_stored = all(d.as_stored for d in deltas)  # others need to know what lies how
            if not slices and (as_stored or target.parts[0].endswith(".in_proj_weight")):  # torch's attention is known
                slices = vector_slices(target, known, meanings)
            if not slices:
                problems.append(
                    f"{target}: the base has no such module{_why_missing(target, known, base, architecture)}"
                )
                continue
            found = [problem for delta in deltas if (problem := misfit(delta, slices))]
            found += [problem for one in slices if (problem := _unmergeable(one, target, rebuilt, architecture, known))]
            theirs = rebuilt.brought_by.get(slices[0].place.tensor, n) != n
            if theirs and any(isinstance(d, Tokens) for d in deltas):
                found.append("another adapter brings this weight in full, and this one tokens of it")
            problems += [f"{target}: {problem}" for problem in found]
            if not found:
                _touch(touched, slices, target, deltas, weighted.of(target))
                problems += _scaled_biases(touched, slices, target, (deltas, weighted.of(target)), base)
    problems += [f"{tensor}: {problem}" for tensor, problem in _conflicts(touched)]
    if problems:
        plain = [a.adapter for a in adapters]
        named = sorted({a.base_model for a in plain if a.base_model and not is_base(a.base_model, base.path)})
        more = [f"... and {len(problems) - 12} more"] if len(problems) > 12 else []
        said = f"; it says that it was trained on {', '.join(named)}" if named else ""
        raise MismatchError(
            "\n  ".join([f"the adapter does not fit this base ({len(problems)} modules){said}", *problems[:12], *more]),
            where=base.path,
            hint=f"is this the right base, and {architecture.name} its family (--arch)?",
        )
    for weighted in adapters:
        require_complete(weighted.adapter, base, known, architecture, rebuilt.config)
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
    touched: AllTouched, slices: Sequence[Slice], target: Target, terms: tuple[Sequence[Delta], float], base: Checkpoint
) -> list[str]:
    """Enter PEFT's (IA)^3 factors of outputs at the biases too: what is scaled is all that a layer gives."""
    deltas, weight = terms
    factors = [d for d in deltas if isinstance(d, Ia3) and not (d.of_inputs or d.less_one)]
    names = [bias_beside(s.place.tensor) for s in slices]
    if not factors or not any(name in base.tensors for name in names):
        return []
    if not all(name in base.tensors and s.place.row == 0 for s, name in zip(slices, names, strict=True)):
        return [f"{target}: some of its parts have a bias and some have none"]
    columns = [replace(base.tensors[name], shape=(prod(base.tensors[name].shape), 1)) for name in names]
    biases = [
        s._replace(place=replace(s.place, stored=column, tensor=name, transposed=False))
        for s, name, column in zip(slices, names, columns, strict=True)
    ]
    _touch(touched, biases, bias_of(target), factors, weight)
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


def is_same(named: str, given: str) -> bool:
    """Whether the base that an adapter names is the one that was given: the same folder, weights of it, or repository.

    Another file that lies in the folder is another model.
    """
    with suppress(OSError):
        if Path(named).exists() and Path(given).exists():
            folder = folder_of(Path(given)) if Path(given).is_file() else None
            return any(Path(named).samefile(place) for place in (given, folder) if place)
    return name_in_configs(named) == name_in_configs(given)


def folder_of(file: Path) -> Path | None:
    """Return the folder whose model a weights file, an index or a shard is; None for what only lies beside that."""
    weights = weights_of(file.parent)
    is_shard = weights is not None and weights.suffix == ".json" and SHARD.search(file.name)
    return file.parent if weights is None or weights.name == file.name or is_shard else None


def is_base(named: str, given: str) -> bool:
    """Whether the base that an adapter names can be the one that was given: the same, or of the same last name."""
    return is_same(named, given) or Path(named).name in (Path(given).resolve().name, Path(name_in_configs(given)).name)
