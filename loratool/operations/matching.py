"""Which weights of a base a target means, and which rows of them: the one place where names meet tensors.

`places` lists the matrices that a base holds, by canonical path, however the file spells, fuses or stacks them;
`resolve` says for a target where its rows lie. merge, extract, convert and inspect all go through these two.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from loratool import expressions
from loratool.adapter import Delta, LowRank, Target
from loratool.architecture import Architecture
from loratool.errors import MismatchError
from loratool.layers import Excluded, Experts, Layer, Matrix
from loratool.layouts import Rows, count, runs, within
from loratool.patterns import split
from loratool.tensors import TensorRef, TensorSource, joined, module_of

# transformers classes without a language-model head: their configs say tie_word_embeddings, yet there is nothing to tie
_UNTIED_CLASSES = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
)


@dataclass(frozen=True)
class Place:
    """A matrix that a base holds, or the part of a stored one that has a canonical path of its own.

    `stored` is the matrix as it lies in the file (one expert of a stack), `tensor` the name of the tensor it lies in
    and `row` the row at which it begins there, all leading dimensions counted as rows. `rows` are the output rows of
    `stored` that are meant (None: all). `transposed`: the file has (in, out).
    """

    stored: TensorRef
    tensor: str
    row: int
    layer: Layer
    role: str
    transposed: bool
    rows: Rows | None = None

    @property
    def out(self) -> int:
        """The number of output rows that are meant."""
        return count(self.rows) if self.rows is not None else self.stored.shape[1 if self.transposed else 0]

    @property
    def ref(self) -> TensorRef:
        """What is meant, as the file has it: to read from, in its stored orientation."""
        if self.rows is None:
            return self.stored
        return self.stored.columns(self.rows) if self.transposed else self.stored.take(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `ref`."""
        return self.ref.shape

    def part(self, rows: Rows, role: str) -> Place:
        """Return the place of some output rows of this one."""
        rows = rows if self.rows is None else within(self.rows, rows)
        return Place(self.stored, self.tensor, self.row, self.layer, role, self.transposed, rows)


class Slice(NamedTuple):
    """Where some rows of a target lie: rows `rows` of its delta (None: all) update what `place` means."""

    path: str
    place: Place
    rows: Rows | None = None


Places = Mapping[Target, Place]


def places(base: TensorSource, architecture: Architecture) -> dict[Target, Place]:
    """Return the matrices of a base that its family knows, one path each; the base's own spelling is in `tensor`."""
    found: dict[Target, Place] = {}
    for name, ref in base.tensors.items():
        if len(ref.shape) < 2:
            continue
        for target, place in _places_of(name, ref, architecture, base.config or {}):
            if target in found:
                raise MismatchError(
                    f"{found[target].tensor} and {name} are the same layer to the {architecture.name} family",
                    where=base.path,
                )
            found[target] = place
    return found


def _places_of(
    name: str, ref: TensorRef, architecture: Architecture, config: Mapping[str, Any]
) -> Iterator[tuple[Target, Place]]:
    """Yield what one tensor holds: one matrix, the parts of a fused one, or the experts of a stack with their parts."""
    known = architecture.find(module_of(name))
    if known is None or isinstance(known.layer, Excluded):
        return
    stacked = bool(known.axis) and len(ref.shape) > 2
    transposed = _is_transposed(known.layer, ref, stacked, config)
    for index in range(ref.shape[0]) if stacked else (0,):
        at = known.at(index) if known.axis else known
        matrix = ref.item(index) if stacked else ref
        row = index * matrix.shape[0] if stacked else 0
        whole = Place(matrix, name, row, known.layer, known.role, transposed)
        if len(at.parts) == 1:
            yield Target(at.component, at.parts), whole
            continue
        share, rest = divmod(whole.out, len(at.parts))
        if rest:
            raise MismatchError(f"{whole.out} rows do not divide into {', '.join(at.parts)}", where=name)
        for n, part in enumerate(at.parts):
            role = architecture.find(part, at.component)
            rows = (range(n * share, (n + 1) * share),)
            yield Target(at.component, (part,)), whole.part(rows, role.role if role else known.role)


def _is_transposed(layer: Layer, ref: TensorRef, stacked: bool, config: Mapping[str, Any]) -> bool:
    """Whether the file has (in, out). A stack may have been saved in the order of the memory instead of the file's."""
    if not isinstance(layer, Experts):
        return False if stacked else layer.transposed  # a memory spelling of per-expert matrices: (experts, out, in)
    if not stacked:
        return False  # experts that lie apart are linear layers, whatever the order of a stack
    if layer.flipped_in_memory and layer.inputs:
        inputs = expressions.size(layer.inputs, config)
        if inputs in ref.shape[1:] and ref.shape[1] != ref.shape[2]:
            return ref.shape[1] == inputs
    return layer.transposed


def resolve(target: Target, known: Places, architecture: Architecture, config: Mapping[str, Any]) -> list[Slice]:
    """Return where the rows of a target lie; empty where the base has no such module.

    A part of a fused weight (`W_pack[q]`) is found inside the whole, a whole inside its parts if the base is split.
    """
    slices: list[Slice] = []
    start = 0
    for path in target.parts:
        found = _resolve_path(target.component, path, known, architecture, config)
        if not found:
            return []
        for one in found:
            rows = one.rows if one.rows is not None else (range(one.place.out),)
            shifted = tuple(range(r.start + start, r.stop + start, r.step) for r in rows)
            slices.append(one._replace(rows=shifted))
        start += sum(one.place.out for one in found)
    whole = len(slices) == 1
    return [slices[0]._replace(rows=None)] if whole else slices


def _resolve_path(
    component: str, path: str, known: Places, architecture: Architecture, config: Mapping[str, Any]
) -> list[Slice]:
    place = known.get(Target(component, (path,)))
    if place is not None:
        return [Slice(path, place)]
    weight = path.rpartition("[")[0]
    whole = known.get(Target(component, (weight,))) if weight else None
    if whole is not None:  # a part of a weight that is fused in the base
        rows = architecture.layout(weight, component, whole.out, config).get(path)
        part = path[len(weight) + 1 : -1]
        return [Slice(path, whole.part(rows, whole.role if part.isdecimal() else part))] if rows else []
    apart = _apart(component, path, known, architecture)
    layout = architecture.layout(path, component, sum(p.out for p in apart.values()), config) if apart else {}
    for part, held in apart.items():
        if count(layout.get(part, ())) != held.out:
            raise MismatchError(
                f"{held.tensor} has {held.out} rows, and the layout gives it {count(layout.get(part, ()))}",
                where=part,
                hint="is this the config.json of these weights, and is this the family (--arch)?",
            )
    return [Slice(part, held, layout[part]) for part, held in apart.items()]


def _apart(component: str, path: str, known: Places, architecture: Architecture) -> dict[str, Place]:
    """Return the parts of a fused weight that a base holds apart, if it has them all; of a stack slab after slab."""
    parts = architecture.parts_of(path, component)
    slabs = (f"{path}[{n}]" for n in itertools.count())
    found: dict[str, Place] = {}
    for part in parts or slabs:
        place = known.get(Target(component, (part,)))
        if place is None or (not parts and isinstance(place.layer, Experts)):  # experts in 3-D are not fused
            return {} if parts else found
        found[part] = place
    return found


def stitched(
    path: str, component: str, known: Places, architecture: Architecture, config: Mapping[str, Any]
) -> Place | None:
    """Return a fused weight put together from the parts that a split base holds, or None where it does not."""
    slices = _resolve_path(component, path, known, architecture, config)
    if len(slices) < 2:
        return None
    parts = [s.place.ref.transposed() if s.place.transposed else s.place.ref for s in slices]
    if len({(part.dtype, part.shape[1:]) for part in parts}) > 1:
        told = [f"{s.place.tensor} {part.dtype} {list(part.shape)}" for s, part in zip(slices, parts, strict=True)]
        what = f"the parts do not make one matrix: {', '.join(told)}"
        raise MismatchError(what, where=path, hint="save the model in one dtype")
    first = slices[0].place
    name = "+".join(s.place.tensor for s in slices)
    ref = assembled(parts, [s.rows or () for s in slices]).renamed(name)
    return Place(ref, name, 0, first.layer, first.role, transposed=False)


def assembled(parts: Sequence[TensorRef], rows: Sequence[Rows]) -> TensorRef:
    """Return a fused tensor put together from its parts; `rows` says which of its rows each part is."""
    places = [row for of_part in rows for run in of_part for row in run]
    order = sorted(range(len(places)), key=places.__getitem__)
    return joined("", parts).take(runs(order))


def bare_name(name: str, architecture: Architecture) -> str:
    """Return a tensor name as it is on disk, less the leading element that may be absent: to compare two files."""
    name = architecture.on_disk(name)
    for prefixes in architecture.prefixes.values():
        for prefix in prefixes:
            if name.startswith(prefix):
                return name[len(prefix) :]
    return name


def misfit(delta: Delta, slices: Sequence[Slice]) -> str:
    """Say how a delta does not fit the weights it updates, or nothing. A 1x1 convolution and a linear layer fit."""
    rows = sum(s.place.out for s in slices)
    shape = delta.weight_shape(transposed=False)
    for place in (s.place for s in slices):
        kernel = place.stored.shape
        wanted = (rows, kernel[0], *kernel[2:]) if place.transposed else (rows, *kernel[1:])
        if _squeezed(wanted) != _squeezed(shape):
            stored, updated = (wanted[::-1], shape[::-1]) if place.transposed else (wanted, shape)
            return f"the base's weight is {list(stored)}, the adapter updates {list(updated)}"
    return ""


def sliced(delta: LowRank, rows: Rows | None) -> LowRank:
    """Return the delta of some of its output rows: the same down, fewer rows of up."""
    return delta if rows is None else LowRank(delta.down, delta.up.take(rows), delta.scaling)


def oriented(known: Places, wanted: Mapping[Target, tuple[int, ...]], model: str) -> dict[Target, Place]:
    """Return places whose orientation the family does not know, turned as the (out, in) of the deltas has them.

    Square weights follow what the others in blocks show (a head is linear in models of Conv1D too); MismatchError
    where nothing shows it.
    """
    unknown = {t: p for t, p in known.items() if isinstance(p.layer, Matrix) and len(p.stored.shape) == 2}
    clear = {t: s for t, s in wanted.items() if t in unknown and s[0] != s[1] and _in_a_block(t)}
    seen = {unknown[t].stored.shape == shape[::-1] for t, shape in clear.items()}
    turned = dict(known)
    for target, shape in wanted.items():
        place = unknown.get(target)
        if place is None:
            continue
        if shape[0] == shape[1] and len(seen) != 1:
            raise MismatchError(
                "this weight is square, and nothing says whether it is stored (out, in) or (in, out)",
                where=str(target),
                hint=f"name the family with --arch, or add one for {model} with -p FILE (docs/plugins.md)",
            )
        flipped = place.stored.shape == shape[::-1] if shape[0] != shape[1] else seen == {True}
        turned[target] = Place(place.stored, place.tensor, place.row, place.layer, place.role, flipped)
    return turned


def _in_a_block(target: Target) -> bool:
    return any(element.isdecimal() for element in split(target.parts[0]))


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if all(n == 1 for n in shape[2:]) else shape


def tied_partner(path: str, component: str, base: TensorSource, architecture: Architecture, known: Places) -> str:
    """Return the weight that shares its values with this one when the model is loaded, or nothing."""
    config = base.config or {}
    classes = config.get("architectures")
    if isinstance(classes, list) and any(
        c in architecture.headless or str(c).endswith(_UNTIED_CLASSES) for c in classes
    ):
        return ""
    for group in architecture.tied:
        if path not in group:
            continue
        others = [p for p in group if p != path]
        present = [p for p in others if Target(component, (p,)) in known]
        flag = config.get("tie_word_embeddings", architecture.tied_by_default)
        if flag is not False or (not present and "tie_word_embeddings" not in config):
            return others[0]
    return ""
