"""What of a fine-tune is no low-rank delta: norms, biases, new heads, resized embeddings. Compared, and kept if asked.

`--rest error` refuses a change here, `skip` leaves it out and says how much that is, `save` puts the tensors themselves
into the adapter: modules to save, trained biases. Files of image tools hold what was added instead: `.diff`, `.diff_b`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, prod
from typing import NamedTuple

from loratool.adapter import Finding, Target
from loratool.architecture import Architecture
from loratool.deltas import Delta, Full, Replace
from loratool.errors import InputError
from loratool.operations.meanings import Meanings
from loratool.patterns import outline
from loratool.plan import Emit, Facts, Load, Out, Report, Spooled
from loratool.tensors import TensorRef, TensorSource

TILE = 1 << 20
Pair = tuple[TensorRef, TensorRef | None]  # of the tuned model, and of the base where it has one


@dataclass(frozen=True)
class CompareRest:
    """Tensors that are not extracted: are they the same in both checkpoints? With `refuse`, a change is an error.

    Where there is an out, it is for the difference of the one pair, in fp32.
    """

    pairs: tuple[Pair, ...]
    refuse: bool
    outs: tuple[Out, ...] = ()

    @property
    def key(self) -> str:
        """The first tensor's name."""
        return f"rest:{self.pairs[0][0].name}"

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """All of them."""
        return tuple(ref for pair in self.pairs for ref in pair if ref is not None)

    @property
    def scratch(self) -> int:
        """A few tiles in fp64."""
        return 32 * TILE

    def run(self, load: Load, emit: Emit) -> Facts:
        """Compare bytes; where they differ, measure the change."""
        changed: dict[str, float] = {}
        for tuned, base in self.pairs:
            total = _change(tuned, base, load)
            if total and self.outs and base is not None:
                for start, stop in tuned.panels(TILE):
                    new = load(tuned.rows(start, stop)).double()
                    emit(self.outs[0], start, (new - load(base.rows(start, stop)).double()).float())
            if total is not None:  # the experts of a stack have one name
                changed[tuned.name] = changed.get(tuned.name, 0.0) + total
        if changed and self.refuse:
            names = list(changed)
            raise InputError(
                f"{len(names)} tensors changed that are not extracted: {_listed(names)}",
                hint="--rest save keeps them whole; --rest skip leaves them out and says how much that is",
            )
        return {"changed": changed}


def _change(tuned: TensorRef, base: TensorRef | None, load: Load) -> float | None:
    """Return the squared norm of a tensor's change; None where nothing changed. Rows of one side only count whole."""
    if base is not None and base.shape != tuned.shape:
        rows = min(base.shape[0], tuned.shape[0])
        common = _change(tuned.rows(0, rows), base.rows(0, rows), load) or 0.0
        longer = tuned if tuned.shape[0] > rows else base
        return common + (_change(longer.rows(rows, longer.shape[0]), None, load) or 0.0)
    if base is not None and same_bytes(tuned, base, load):
        return None
    total = 0.0
    for start, stop in tuned.panels(TILE):
        new = load(tuned.rows(start, stop)).double()
        total += float((new - load(base.rows(start, stop)).double() if base else new).square().sum())
    if not isfinite(total):
        raise InputError("the tensor holds NaN or infinity", where=tuned.name)
    return total if total or base is None else None  # the same values in another dtype are no change


def same_bytes(one: TensorRef, two: TensorRef, load: Load) -> bool:
    """Whether two tensors are equal byte for byte; reads no further than the first panel that differs."""
    import torch

    if one.dtype != two.dtype:
        return False
    return all(
        torch.equal(load(one.rows(a, b)).view(torch.uint8), load(two.rows(a, b)).view(torch.uint8))
        for a, b in one.panels(TILE)
    )


def rest_units(others: Sequence[Pair], rest: str, *, differences: bool) -> list[CompareRest]:
    """Return the comparisons of what is not extracted: one unit, to run first, where a change is an error.

    Nobody should wait for every SVD to be told that a norm changed. With `differences` that is what is saved.
    """
    compared = tuple(map(_in_rows, others))
    if rest == "error":
        return [CompareRest(compared, refuse=True)] if compared else []
    named: dict[str, list[Pair]] = {}
    for pair in compared:
        named.setdefault(pair[0].name, []).append(pair)
    keep = differences and rest == "save"
    return [
        CompareRest(tuple(pairs), refuse=False, outs=_difference(pairs) if keep else ()) for pairs in named.values()
    ]


def _difference(pairs: Sequence[Pair]) -> tuple[Out, ...]:
    """Return where the difference of a tensor goes, if the base has one of its shape."""
    (tuned, base), *more = pairs
    same = base is not None and base.shape == tuned.shape and not more
    return (Out("", f"difference of {tuned.name}", tuned.shape, "F32"),) if same else ()


class Rest(NamedTuple):
    """What changed and is not low-rank: the deltas that are kept of it, and the squared change that is left out."""

    saved: dict[Target, tuple[Delta, ...]]
    left_out: float


class Savable(NamedTuple):
    """What may be kept whole: `tensors` of the tuned model by name, and what it takes to name them.

    `layers` are the matrices that a delta can be extracted of, by the name of their tensor: of such a module only the
    bias is saved, of any other all tensors. Of `together` all are saved or none.
    """

    tensors: Mapping[str, TensorRef]
    tuned: TensorSource
    architecture: Architecture
    layers: Mapping[str, Target]
    together: frozenset[str] = frozenset()


def judge(
    units: Sequence[CompareRest],
    facts: Mapping[str, Facts],
    report: Report,
    savable: Savable,
    spooled: Spooled,
    *,
    extracted: Sequence[str] | None,
) -> Rest:
    """Name in the report what changed; keep of it what is savable: whole, or what was added to it.

    `extracted` are the names of the tensors that get factors, where a config says that all biases beside them are kept.
    """
    tuned, architecture, layers = savable.tuned, savable.architecture, savable.layers
    changed: dict[str, float] = {}
    for unit in units:
        changed |= facts[unit.key]["changed"]
    kept = [name for name in changed if name in savable.tensors]
    if savable.together & {*kept}:
        kept += sorted(savable.together & savable.tensors.keys() - {*kept})
    claimed = [] if extracted is None else _claimed(kept, savable, extracted)
    left = [name for name in changed if name not in savable.tensors]
    meanings = Meanings(tuned, architecture)
    lacking = _lacking(meanings, layers)
    bare = [name for name in kept if _is_bare(name, meanings.of[name].paths)]
    saved: dict[Target, tuple[Delta, ...]] = {}
    added = {}
    for unit in (u for u in units if u.outs and facts[u.key]["changed"]):
        name = unit.pairs[0][0].name
        added[name] = spooled(unit.outs[0].name, tuned.tensors[name].shape).renamed(name)
    for name in (*kept, *claimed):
        alone = _is_of_layer(name, layers) or name in bare
        for sibling in [name] if alone or name in added else _tensors_of(name.rpartition(".")[0], tuned):
            component, paths = meanings.of[sibling][:2]
            for path, (_, ref) in zip(paths, meanings.parts(sibling, added.get(name)), strict=True):
                delta = Full(ref) if name in added else Replace(ref)
                saved[Target(component, (_canonical(path, component, architecture, lacking),))] = (delta,)
    if left:
        what = f"{len(left)} changed tensors are not in the adapter: {_listed(left)}"
        report.findings.append(Finding("warning", "--rest skip" if not kept else "left out", what))
        report.totals["skipped_tensors"] = left
    if bare and not added:
        what = f"parameters that are no modules, which PEFT passes over when it loads them: {_listed(bare)}"
        report.findings.append(Finding("warning", "--rest save", what, "loratool merge puts them in"))
    if kept:
        size = sum((added.get(name) or savable.tensors[name]).nbytes for name in (*kept, *claimed))
        how = "as differences" if added else "whole"
        what = f"{len(kept)} tensors are in the adapter {how}, not as low-rank deltas ({size:,} bytes): {_listed(kept)}"
        more = f"; and {len(claimed)} biases as they were: a config has one word for all biases" if claimed else ""
        report.totals["saved_bytes"] = size
        report.findings.append(Finding("info", "--rest save", what + more))
        report.totals["saved_tensors"] = kept
    return Rest(saved, sum(changed[name] for name in left))


def _is_of_layer(name: str, layers: Mapping[str, Target]) -> bool:
    """Whether a tensor is the bias of a matrix that has factors, or could."""
    weight = f"{name.rpartition('.')[0]}.weight"
    return name != weight and weight in layers


def _is_bare(name: str, paths: Sequence[str]) -> bool:
    """Whether a tensor is no weight or bias of a module, but a parameter of its own: sinks, cls_token."""
    leaf = name.rpartition(".")[2]
    return leaf != "bias" and paths[0].rpartition(".")[2] == leaf


def _claimed(kept: Sequence[str], savable: Savable, extracted: Sequence[str]) -> list[str]:
    """Return the unchanged biases that belong into an adapter which has one bias of a layer.

    PEFT's `bias: lora_only` says that the bias of every module with factors was trained, `all` that every one of the
    model was: `merge` then misses others of a kind that is there.
    """
    trained = {name for name in kept if name.endswith(".bias") and _is_of_layer(name, savable.layers)}
    if not trained:
        return []
    wanted = {f"{name.removesuffix('.weight')}.bias" for name in extracted}
    if not trained <= wanted:
        modules = {name.rpartition(".")[0] for name in kept if not _is_of_layer(name, savable.layers)}
        kinds = {outline(name) for name in (*kept, *wanted)} | {outline(f"{module}.bias") for module in modules}
        wanted |= {name for name in savable.tensors if outline(name) in kinds}
    return [name for name in savable.tensors if name in wanted and name.endswith(".bias") and name not in kept]


def _tensors_of(module: str, tuned: TensorSource) -> list[str]:
    """Return the tensors that lie directly in a module."""
    return [name for name in tuned.tensors if name.rpartition(".")[0] == module]


def _lacking(meanings: Meanings, layers: Mapping[str, Target]) -> dict[str, str]:
    """Return the leading element that a file of a bare model lacks, by component."""
    found = {}
    for component, prefixes in meanings.architecture.prefixes.items():
        paths = [m.paths[0] for m in meanings.of.values() if m.component == component]
        for prefix in prefixes:
            has = any(meanings.architecture.on_disk(path).startswith(prefix) for path in paths)
            if not has and any(t.parts[0].startswith(prefix) for t in layers.values() if t.component == component):
                found[component] = prefix
    return found


def _canonical(path: str, component: str, architecture: Architecture, lacking: Mapping[str, str]) -> str:
    """Return the canonical path of a tensor: with the leading element that a file of a bare model lacks."""
    module = path.removesuffix(".bias")
    known = architecture.find(module, component)
    if known is not None and len(known.parts) == 1:
        return known.parts[0] + path[len(module) :]
    return lacking.get(component, "") + architecture.on_disk(path)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _in_rows(pair: Pair) -> Pair:
    """Vectors as one row, so that they can be read in panels; as a column where one is longer."""
    new, old = pair
    longer = old is not None and old.shape != new.shape

    def matrix(ref: TensorRef) -> TensorRef:
        size = prod(ref.shape)
        return ref if len(ref.shape) > 1 else replace(ref, shape=(size, 1) if longer else (1, size))

    return matrix(new), matrix(old) if old is not None else None
