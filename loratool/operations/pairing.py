"""Which tensors of a fine-tune and its base belong together: matrices that can have a low-rank delta, and the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from loratool import dtypes
from loratool.adapter import Finding, Target
from loratool.architecture import Architecture
from loratool.deltas import LowRank
from loratool.errors import InputError, MismatchError
from loratool.operations.matching import Place, places, stitched, tied_partner
from loratool.operations.meanings import Meanings
from loratool.operations.refinement import fused_in, in_fused
from loratool.operations.remainder import Pair
from loratool.patterns import selects
from loratool.tensors import TensorRef, TensorSource

Pairs = dict[Target, tuple[Place, Place]]


class Paired(NamedTuple):
    """What belongs together: matrices, and everything else, of which the base may have no counterpart.

    `resized` are matrices of the tuned model among the rest because of their vocabulary, with their rows in both.
    """

    matrices: Pairs
    others: list[Pair]
    resized: dict[str, tuple[int, int]]


def apart(
    tuned: TensorSource, base: TensorSource, architecture: Architecture
) -> tuple[TensorSource, TensorSource, list[Target]]:
    """Return both models with embedding and head written apart, where these are one weight in one model only.

    The weights that this is about come third.
    """
    both: list[Target] = []
    sides = [tuned, base]
    for group in (g for g in architecture.tied if len(g) == 2):
        for component in architecture.components:
            known = [places(side, architecture) for side in sides]
            ties = [
                bool(tied_partner(group[0], component, s, architecture, k)) for s, k in zip(sides, known, strict=True)
            ]
            if ties[0] == ties[1]:
                continue
            one = ties.index(True)
            members = [Target(component, (path,)) for path in group]
            held = [t for t in members if t in known[one]]
            names = {t: f"{t.parts[0]}.weight" for t in members if t not in held}
            if not held or not all(t in known[1 - one] for t in members):
                continue  # the other has no head at all
            copies = {name: known[one][held[0]].stored.renamed(name) for name in names.values()}
            config = {**(sides[one].config or {}), "tie_word_embeddings": False}
            sides[one] = replace(sides[one], tensors={**sides[one].tensors, **copies}, config=config)
            both += members
    return sides[0], sides[1], both


def comparable(
    tuned: TensorSource, base: TensorSource, architecture: Architecture
) -> tuple[TensorSource, TensorSource, list[Finding]]:
    """Return what both models have of a family of several components, and what is said of the rest.

    A checkpoint of one file may hold text encoders and a VAE, a folder beside it the UNet alone.
    """
    if len(architecture.components) == 1 and not architecture.ignored:
        return tuned, base, []
    sides, findings = [tuned, base], []
    held = [{t.component for t in places(side, architecture)} for side in sides]
    for n, (source, other) in enumerate(((tuned, base), (base, tuned))):
        meanings, theirs = Meanings(source, architecture), Meanings(other, architecture)
        numbers = [k for k, ref in source.tensors.items() if not dtypes.is_float(ref.dtype)]  # such as position_ids
        beside = [name for name in source.tensors if architecture.ignores(name) and name not in other.tensors]
        beside += [name for name in numbers if name not in beside and not meanings.counterparts(name, theirs)]
        ofs = {c: [k for k, m in meanings.of.items() if m.component == c] for c in sorted(held[n] - held[1 - n])}
        left = {name for names in (beside, *ofs.values()) for name in names}
        if held[n] & held[1 - n]:
            sides[n] = replace(source, tensors={k: ref for k, ref in source.tensors.items() if k not in left})
            findings += [Finding("warning", source.path, f"not compared: {c} is only here") for c in ofs]
            what = f"not compared: {len(beside)} tensors that no adapter updates, such as {min(beside, default='')}"
            findings += [Finding("info", source.path, what)] if beside else []
    return sides[0], sides[1], findings


def shares_ties(model: TensorSource, architecture: Architecture) -> bool:
    """Whether embedding and head of a model are one weight."""
    known = places(model, architecture)
    tied = [(path, component) for group in architecture.tied for path in group for component in architecture.components]
    return any(tied_partner(path, component, model, architecture, known) for path, component in tied)


def pair(tuned: TensorSource, base: TensorSource, architecture: Architecture, *, allow_resized: bool) -> Paired:
    """Pair the matrices of both checkpoints, however each spells, fuses or stacks them, and the rest by name.

    Raises where they do not belong together. Where only a vocabulary differs, and that is allowed, its matrices are
    among the rest.
    """
    new, old = places(tuned, architecture), places(base, architecture)
    pairs: Pairs = {}
    layers: set[str] = set()  # tensors of the tuned model that are paired as matrices
    problems: list[str] = []
    others: list[Pair] = []
    resized: dict[str, tuple[int, int]] = {}
    for target in dict.fromkeys(t for part in [*new, *old] for t in (_whole(part), part)):
        if _whole(target) in pairs:  # as a part of a fused weight, which is the module that an adapter is for
            continue
        sides = [
            side.get(target) or stitched(target.parts[0], target.component, side, architecture, config or {})
            for side, config in ((new, tuned.config), (old, base.config))
        ]
        if sides[0] is None or sides[1] is None:
            continue
        ours, place = sides[0], sides[1]
        layers.update(ours.tensor.split("+"))
        if _is_resized(ours, place):
            resized[ours.tensor] = ours.shape[0], place.shape[0]
            others.append((ours.ref, place.ref))
            if allow_resized:
                continue
        pairs[target] = ours, place
        if _shape(ours) != _shape(place):
            shapes = f"{list(ours.shape)} in the tuned model, {list(place.shape)} in the base"
            problems.append(f"{target}: {shapes}")
    found = {*pairs, *(t for t, place in new.items() if place.tensor in resized)}
    problems += [f"{t}: only in the base" for t in old if t not in found and _whole(t) not in found]
    matrices = {place.tensor for place in old.values()}
    mine, theirs = Meanings(tuned, architecture), Meanings(base, architecture)
    for name in (n for n in tuned.tensors if n not in layers):
        unpaired: list[Pair] = [(tuned.tensors[name], None)]
        same: list[Pair] = [(one, two) for one, two in mine.counterparts(name, theirs) if two.name not in matrices]
        for ref, other in same or unpaired:
            others.append((ref, other))
            of_vocabulary = f"{name.rpartition('.')[0]}.weight" in resized and len(ref.shape) == 1
            if other is not None and other.shape != ref.shape and not (of_vocabulary and allow_resized):
                problems.append(f"{name}: {list(ref.shape)} in the tuned model, {list(other.shape)} in the base")
    if not pairs:
        problems.append("no layer in common")
    if problems:
        more = [f"... and {len(problems) - 12} more"] if len(problems) > 12 else []
        raise MismatchError(
            "\n  ".join([f"the two models do not belong together ({len(problems)} tensors)", *problems[:12], *more]),
            where=f"{tuned.path} against {base.path}",
            hint="--rest save keeps the resized vocabulary whole, --rest skip leaves it out"
            if resized and len(problems) <= len(resized)
            else "the base must be the model that the fine-tune started from",
        )
    return Paired(pairs, others, resized)


def in_parts(pairs: Pairs, architecture: Architecture, config: Mapping[str, Any]) -> Pairs:
    """Return pairs with every fused weight in its parts, `qkv_proj[q]` and so on: each may get a delta of its own."""
    found: Pairs = {}
    for target, (new, old) in pairs.items():
        parts = architecture.layout(target.parts[0], target.component, new.out, config)
        for part, rows in parts.items():
            role = part.rpartition("[")[2].removesuffix("]")
            found[Target(target.component, (part,))] = new.part(rows, role), old.part(rows, role)
        if not parts:
            found[target] = new, old
    return found


def shape_in_file(target: Target, shape: tuple[int, ...], pairs: Pairs) -> tuple[int, ...]:
    """Return the shape (out, in, ...) that the factors of a target have in the file: of a part, that of the whole."""
    if fused_in(target) == target:
        return shape
    return sum(new.out for t, (new, _) in pairs.items() if fused_in(t) == fused_in(target)), *shape[1:]


def joined_parts(
    deltas: Mapping[Target, LowRank], pairs: Pairs, architecture: Architecture, config: Mapping[str, Any]
) -> dict[Target, LowRank]:
    """Return deltas with those of the parts of a fused weight as one, of the sum of their ranks."""
    pieces: dict[Target, dict[str, tuple[LowRank, ...]]] = {}
    for target, delta in deltas.items():
        pieces.setdefault(fused_in(target), {})[target.parts[0]] = (delta,)
    found: dict[Target, LowRank] = {}
    for whole, parts in pieces.items():
        if list(parts) == [whole.parts[0]]:
            found[whole] = deltas[whole]
            continue
        any_part = Target(whole.component, (next(iter(parts)),))
        height = shape_in_file(any_part, (), pairs)[0]
        layout = architecture.layout(whole.parts[0], whole.component, height, config)
        (found[whole],) = in_fused(whole, parts, layout)
    return found


def of_words(place: Place) -> bool:
    """Whether a matrix is an embedding or a head."""
    return place.layer.kind == "embedding" or place.layer.group in ("embedding", "head")


def hit(patterns: Sequence[str], target: Target) -> bool:
    """Whether one of several globs selects a target."""
    return any(selects(p, part, target.component) for p in patterns for part in target.parts)


def _is_resized(new: Place, old: Place) -> bool:
    """Whether two matrices differ in the number of their entries only, and are such that a vocabulary counts."""
    same = new.transposed == old.transposed and new.shape[1:] == old.shape[1:]
    return of_words(new) and same and new.shape[0] != old.shape[0]


def _whole(target: Target) -> Target:
    """The fused weight that a target is a part of, or the target itself."""
    weight = target.parts[0].rpartition("[")[0]
    return Target(target.component, (weight,)) if weight else target


def _shape(place: Place) -> tuple[int, ...]:
    """The shape of a matrix as (out, in, ...), however it is stored."""
    return place.shape[::-1] if place.transposed else place.shape


def alike(new: Place, old: Place) -> tuple[TensorRef, TensorRef]:
    """Return both matrices in the orientation in which the tuned model has them."""
    return new.ref, old.ref if new.transposed == old.transposed else old.ref.transposed()


def choose(pairs: Pairs, target: Sequence[str], exclude: Sequence[str], where: str) -> Pairs:
    """Return the pairs that the user's globs select, of floating-point weights."""
    for pattern in (*target, *exclude):
        if not any(hit([pattern], t) for t in pairs):
            raise MismatchError(f"no module matches {pattern!r}", where=where, hint="loratool arch show lists them")
    chosen = {
        t: pair
        for t, pair in sorted(pairs.items(), key=lambda x: x[0].sort_key)
        if (not target or hit(target, t)) and not hit(exclude, t)
    }
    for t, pair in chosen.items():
        for place in pair:
            if not dtypes.is_float(place.stored.dtype):
                raise InputError(f"a {place.stored.dtype} weight: quantised models are not supported yet", where=str(t))
    if not chosen:
        raise MismatchError("no module is left to extract", where=where)
    return chosen
