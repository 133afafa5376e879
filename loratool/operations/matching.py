"""Which weights of a base a target means, and which rows of them: the one place where names meet tensors.

`places` lists the matrices that a base holds, by canonical path, however the file spells, fuses or stacks them;
`resolve` says for a target where its rows lie. merge, extract, convert and inspect all go through these two.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

from loratool import expressions
from loratool.adapter import Target
from loratool.architecture import Architecture
from loratool.deltas import Delta, Full, Ia3, Oft, Tokens, Vera
from loratool.errors import MismatchError
from loratool.layers import Excluded, Experts, Layer, Matrix
from loratool.layouts import Rows, count, runs, within
from loratool.operations.meanings import Meanings
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
    if known is None or isinstance(known.layer, Excluded) or architecture.ignores(name):
        return
    stacked = bool(known.axis) and len(ref.shape) > 2
    turned = known.turned and not name.endswith(".weight")  # a parameter of its own, not the weight of a layer
    transposed = turned != _is_transposed(known.layer, ref, stacked, config)
    for index in range(ref.shape[0]) if stacked else (0,):
        at = known.at(index) if known.axis else known
        matrix = ref.item(index) if stacked else ref
        row = index * matrix.shape[0] if stacked else 0
        whole = Place(matrix, name, row, known.layer, known.role, transposed)
        if len(at.parts) == 1 and not at.swap:
            yield Target(at.component, at.parts), whole
            continue
        inputs = matrix.shape[0] if transposed else prod(matrix.shape[1:])
        for part, rows in zip(at.parts, at.rows(whole.out, inputs, config), strict=True):
            role = architecture.find(part, at.component)
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
    slices = [_in_one(slices)] if _is_whole(slices) else slices
    return [slices[0]._replace(rows=None)] if len(slices) == 1 else slices


def _is_whole(slices: Sequence[Slice]) -> bool:
    """Whether slices are the parts, in order, of one stored matrix and all of it: then they are one again."""
    places = [s.place for s in slices]
    if len({(p.tensor, p.row) for p in places}) > 1 or any(p.rows is None for p in places):
        return False
    rows = [row for p in places for run in p.rows or () for row in run]
    return rows == list(range(replace(places[0], rows=None).out))


def _in_one(slices: Sequence[Slice]) -> Slice:
    role = "+".join(s.place.role for s in slices)
    return Slice("+".join(s.path for s in slices), replace(slices[0].place, rows=None, role=role))


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
    first, whole = slices[0].place, architecture.find(path, component)
    name = "+".join(s.place.tensor for s in slices)
    ref = assembled(parts, [s.rows or () for s in slices]).renamed(name)
    return Place(ref, name, 0, first.layer, whole.role if whole else first.role, transposed=False)


def vector_slices(target: Target, known: Places, meanings: Meanings) -> list[Slice]:
    """Return where a target lies that is no matrix of the family: the bias of one, or any other tensor by its name.

    Empty where the base has no such tensor.
    """
    base, path = meanings.source, target.parts[0]
    if path.endswith(".bias"):
        whole = Target(target.component, tuple(p.removesuffix(".bias") for p in target.parts))
        slices = resolve(whole, known, meanings.architecture, base.config or {})
        biases = [bias_beside(s.place.tensor) for s in slices]
        if slices and all(name in base.tensors and s.place.row == 0 for s, name in zip(slices, biases, strict=True)):
            places = [
                replace(s.place, stored=_as_column(base.tensors[name]), tensor=name, transposed=False)
                for s, name in zip(slices, biases, strict=True)
            ]
            return [s._replace(place=place) for s, place in zip(slices, places, strict=True)]
    found = meanings.find(target.component, path)
    if found is None or len(target.parts) > 1:
        return []
    ref, rows = found
    stored = ref if len(ref.shape) > 1 else _as_column(ref)
    return [Slice(path, Place(stored, ref.name, 0, Layer(path), path.rpartition(".")[2], transposed=False, rows=rows))]


def bias_beside(tensor: str) -> str:
    """Return the name of the bias beside a weight; torch's fused attention has parameters of its own for both."""
    fused = tensor.removesuffix("in_proj_weight")
    return f"{fused}in_proj_bias" if fused != tensor else f"{tensor.removesuffix('.weight')}.bias"


def bias_of(target: Target) -> Target:
    """Return the bias that stands beside a weight."""
    return Target(target.component, tuple(f"{part}.bias" for part in target.parts))


def _as_column(ref: TensorRef) -> TensorRef:
    """A vector (n,) as a matrix (n, 1): one input, n outputs."""
    return replace(ref, shape=(prod(ref.shape), 1))


def assembled(parts: Sequence[TensorRef], rows: Sequence[Rows]) -> TensorRef:
    """Return a fused tensor put together from its parts; `rows` says which of its rows each part is."""
    places = [row for of_part in rows for run in of_part for row in run]
    order = sorted(range(len(places)), key=places.__getitem__)
    return joined("", parts).take(runs(order))


def misfit(delta: Delta, slices: Sequence[Slice]) -> str:
    """Say how a delta does not fit the weights it updates, or nothing. A 1x1 convolution and a linear layer fit."""
    rows = sum(s.place.out for s in slices)
    if any(s.rows is not None and not delta.stands_alone(s.rows) for s in slices):
        return f"a {delta.kind} update of the whole, and the base has it in parts: each depends on the others"
    for place in (s.place for s in slices):
        kernel = place.stored.shape
        wanted = (rows, kernel[0], *kernel[2:]) if place.transposed else (rows, *kernel[1:])
        turned = place.transposed and delta.as_stored
        if isinstance(delta, Tokens):  # rows of the stored matrix, which must be there
            fits = len(kernel) == 2 and kernel[1] == delta.shape[1] and kernel[0] >= delta.shape[0]
        else:
            fits = _fits(delta, delta.shape[::-1] if turned else delta.shape, wanted)
        if not fits:
            stored, updated = (wanted, delta.shape) if not place.transposed else (wanted[::-1], delta.shape[::-1])
            shown = [n or "?" for n in (delta.shape if turned else updated)]
            return f"the base's weight is {list(stored)}, the adapter updates [{', '.join(map(str, shown))}]"
    return ""


def _fits(delta: Delta, shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a delta of this shape is one of a weight (out, in, *kernel): sizes that it does not show are 0 in it."""
    if len(shape) > 2:
        return _squeezed(shape) == _squeezed(wanted)
    out, inputs = shape[0], prod(shape[1:])
    whole = prod(wanted[1:])
    if isinstance(delta, Vera) and delta.A.shape[1] < whole:
        return False
    if isinstance(delta, Oft) and whole % delta.size:
        return False
    of_channels = isinstance(delta, Ia3) and inputs == wanted[1]  # one factor for a whole kernel
    return out in (0, wanted[0]) and (inputs in (0, whole) or of_channels)


def sliced(delta: Delta, rows: Rows | None, *, transposed: bool = False) -> Delta:
    """Return the delta of some of its output rows, of a weight that is stored (in, out) if `transposed`."""
    if rows is None:
        return delta
    if transposed and isinstance(delta, Full):
        return replace(delta, value=delta.value.columns(rows))
    if isinstance(delta, Tokens):
        return replace(delta, values=delta.values.columns(rows))
    return delta.take(rows)


def oriented(known: Places, wanted: Mapping[Target, tuple[int, ...]], model: str) -> dict[Target, Place]:
    """Return places whose orientation the family does not know, turned as the (out, in) of the deltas has them.

    Square weights follow what the others in blocks show (a head is linear in models of Conv1D too); MismatchError
    where nothing shows it.
    """
    unknown = {t: p for t, p in known.items() if isinstance(p.layer, Matrix) and len(p.stored.shape) == 2}
    found = {t: _is_turned(unknown[t].stored.shape, shape) for t, shape in wanted.items() if t in unknown}
    seen = {flipped for t, flipped in found.items() if flipped is not None and _in_a_block(t)}
    turned = dict(known)
    for target, shown in found.items():
        place = unknown[target]
        flipped = next(iter(seen)) if shown is None and len(seen) == 1 else shown
        if flipped is None:
            raise MismatchError(
                "this weight is square, and nothing says whether it is stored (out, in) or (in, out)",
                where=str(target),
                hint=f"name the family with --arch, or add one for {model} with -p FILE (docs/plugins.md)",
            )
        turned[target] = Place(place.stored, place.tensor, place.row, place.layer, place.role, flipped)
    return turned


def _is_turned(stored: tuple[int, ...], shape: tuple[int, ...]) -> bool | None:
    """Whether a stored matrix is (in, out) where the delta is (out, in), 0 for a size not shown; None if it can be."""
    as_it_is, turned = (all(n in (0, m) for n, m in zip(shape, way, strict=True)) for way in (stored, stored[::-1]))
    return None if as_it_is and turned else turned


def _in_a_block(target: Target) -> bool:
    return any(element.isdecimal() for element in split(target.parts[0]))


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without kernel sizes of 1 at its end: LyCORIS' cores for 1-D convolutions have one."""
    return _squeezed(shape[:-1]) if len(shape) > 2 and shape[-1] == 1 else shape


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
