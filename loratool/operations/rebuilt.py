"""The base as the adapters mean it: layers repeated, resized embeddings and new heads in place, ties undone.

All of it is a rearrangement of references. What comes out is a checkpoint like the one that went in, so the rest of a
merge need not know; nothing is read here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from loratool import dtypes
from loratool.adapter import Adapter, Finding, Target, Weighted
from loratool.architecture import Architecture
from loratool.deltas import Delta, Dora, Replace, Tokens
from loratool.errors import MismatchError
from loratool.operations.complete import HEADS, within
from loratool.operations.matching import Slice, places, resolve, tied_partner, vector_slices
from loratool.operations.meanings import Meanings
from loratool.storage.checkpoint import Checkpoint
from loratool.storage.safetensors import Header
from loratool.tensors import TensorRef

_NUMBER = re.compile(r"(?P<before>.*?)\.(?P<layer>\d{1,6})\.(?P<after>.+)")


class Twins(NamedTuple):
    """Two tensors that must hold the same values, or a tie between them means something else than is assumed."""

    source: str
    one: TensorRef
    other: TensorRef


@dataclass
class Rebuilt:
    """A base ready to be merged into.

    `replaced`: tensors of the files that are not wanted any more, and why; `brought_by`: the number of the adapter
    whose tensor took their place; `before`: what was there. `kept_dtypes`: what `--dtype keep` means where the tensor
    is not the file's own. `config`: changes to config.json. `settled`: by adapter, the targets whose effect is in the
    base now; `mirrored`: deltas that are for a target too, besides its own. `twins`: what remains to be compared.
    """

    base: Checkpoint
    architecture: Architecture
    replaced: dict[str, str] = field(default_factory=dict)
    kept_dtypes: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    settled: dict[int, set[Target]] = field(default_factory=dict)
    mirrored: dict[int, dict[Target, tuple[Delta, ...]]] = field(default_factory=dict)
    brought_by: dict[str, int] = field(default_factory=dict)
    before: dict[str, TensorRef] = field(default_factory=dict)
    twins: list[Twins] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def say(self, level: str, where: object, what: str) -> None:
        """Add a finding."""
        self.findings.append(Finding(level, str(where), what))

    def put(self, name: str, ref: TensorRef, beside: str = "") -> None:
        """Put a tensor in the place of the one of that name, or add it to the file that has the tensor `beside`."""
        tensors = self.base.tensors
        floats = Counter(r.dtype for r in tensors.values() if dtypes.is_float(r.dtype))
        usual = floats.most_common(1)[0][0] if floats else ref.dtype
        self.kept_dtypes.setdefault(name, tensors[name].dtype if name in tensors else usual)
        ref = ref.renamed(name)
        shards = []
        for shard in self.base.shards:
            refs = shard.header.tensors
            names = {r.name for r in refs}
            if name in names:
                refs = tuple(ref if r.name == name else r for r in refs)
            elif name not in tensors and (beside in names if beside else shard is self.base.shards[-1]):
                refs = (*refs, ref)
            changed = refs is not shard.header.tensors
            shards.append(shard._replace(header=Header(b"", refs, shard.header.metadata)) if changed else shard)
        self.base = replace(self.base, shards=tuple(shards), tensors={**tensors, name: ref})

    def replace(self, name: str, ref: TensorRef, n: int, source: str) -> None:
        """Put the tensor of adapter `n` in the place of the base's."""
        self.replaced[name] = f"replaced by that of {source}"
        self.brought_by[name] = n
        self.before[name] = self.base.tensors[name]
        self.put(name, ref)


def rebuild(base: Checkpoint, architecture: Architecture, adapters: Sequence[Weighted]) -> Rebuilt:
    """Return the base that the adapters' deltas are for."""
    numbers = range(len(adapters))
    result = Rebuilt(base, architecture, settled={n: set() for n in numbers}, mirrored={n: {} for n in numbers})
    plain = [a.adapter for a in adapters]
    _repeat_layers(result, plain)
    for n, adapter in enumerate(plain):
        _take_resized(result, n, adapter)
    for pair in _tied_pairs(result.base, architecture):
        _untie(result, pair, plain)
    _require_one_in_full(plain)
    for n, weighted in enumerate(adapters):
        others = [other.adapter for m, other in enumerate(adapters) if m != n]
        _put_in_place(result, n, weighted, others)
    _require_one_vocabulary(result)
    return result


# -- repeated layers ----------------------------------------------------------------------------------------------


def _repeat_layers(result: Rebuilt, adapters: Sequence[Adapter]) -> None:
    """Write the stack of layers that the adapter was trained on: layer n is a copy of the base's `order[n]`."""
    orders = {a.replication for a in adapters}
    if orders == {()}:
        return
    if len(orders) > 1:
        where = ", ".join(a.origin.path for a in adapters)
        raise MismatchError("the adapters repeat different layers (layer_replication)", where=where)
    (order,) = orders
    base = result.base
    stacks = {m["before"] for name in base.tensors if (m := _NUMBER.fullmatch(name))}
    layers = {int(m["layer"]) for name in base.tensors if (m := _NUMBER.fullmatch(name))}
    if len(stacks) != 1 or not set(order) <= layers:
        raise MismatchError(
            f"the adapter repeats layers {order[0]} to {max(order)} of a model with {len(stacks)} stacks of layers",
            where=base.path,
            hint="layer_replication is for one stack, and all its layers must be there",
        )
    shards = []
    for shard in base.shards:
        refs = tuple(ref for old in shard.header.tensors for ref in _repeated(old, order))
        shards.append(shard._replace(header=Header(b"", refs, shard.header.metadata)))
    tensors = {ref.name: ref for shard in shards for ref in shard.header.tensors}
    dropped = layers - set(order)
    numbered = [(m, name) for name in base.tensors if (m := _NUMBER.fullmatch(name))]
    result.replaced |= {name: "a layer that is not repeated" for m, name in numbered if int(m["layer"]) in dropped}
    result.base = replace(base, shards=tuple(shards), tensors=tensors)
    result.config["num_hidden_layers"] = len(order)
    kinds = (base.config or {}).get("layer_types")
    if isinstance(kinds, list) and len(kinds) == len(layers):
        result.config["layer_types"] = [kinds[n] for n in order]
    result.say("info", base.path, f"the layers are repeated as the adapter has them: {len(layers)} become {len(order)}")


def _repeated(ref: TensorRef, order: Sequence[int]) -> Iterator[TensorRef]:
    match = _NUMBER.fullmatch(ref.name)
    if match is None:
        yield ref
        return
    for new, old in enumerate(order):
        if old == int(match["layer"]):
            yield ref.renamed(f"{match['before']}.{new}.{match['after']}")


# -- resized embeddings -------------------------------------------------------------------------------------------


def _take_resized(result: Rebuilt, n: int, adapter: Adapter) -> None:
    """Take a resized embedding from the adapter that was trained on it; other copies are compared later."""
    known = places(result.base, result.architecture)
    for target, copy in adapter.base_copies.items():
        place = known.get(target)
        if place is None or place.rows is not None:
            continue
        stored = result.base.tensors[place.tensor]
        (delta, *_) = adapter.deltas.get(target, (None,))
        trained_on_it = isinstance(delta, Tokens) or (
            delta is not None and delta.weight_shape(transposed=place.transposed) == copy.shape
        )
        if not trained_on_it or copy.shape[1:] != stored.shape[1:]:
            continue
        if place.tensor in result.replaced and copy.shape == stored.shape:  # of an adapter with the same vocabulary
            result.twins.append(Twins(adapter.origin.path, copy, stored))
        elif copy.shape[0] != stored.shape[0]:
            result.replace(place.tensor, copy, n, adapter.origin.path)
            _say_resized(result, place.tensor, stored.shape[0], copy.shape[0])


def _say_resized(result: Rebuilt, name: str, before: int, after: int) -> None:
    result.config["vocab_size"] = after
    result.say("info", name, f"the vocabulary {'grows' if after > before else 'shrinks'} from {before} to {after} rows")


def _require_one_vocabulary(result: Rebuilt) -> None:
    """Raise where the embedding and the head have different numbers of rows."""
    if "vocab_size" not in result.config:
        return
    rows: dict[int, str] = {}
    for pair in (group for group in result.architecture.tied if len(group) == 2):
        for path in pair:
            ref = result.base.tensors.get(f"{path}.weight")
            if ref is not None:
                rows[ref.shape[0]] = f"{path}.weight"
    if len(rows) > 1:
        told = ", ".join(f"{name} has {n} rows" for n, name in rows.items())
        hint = "the adapter has only one of the two; train with both in modules_to_save"
        raise MismatchError(f"the resized vocabulary does not fit together: {told}", where=result.base.path, hint=hint)


# -- tied weights -------------------------------------------------------------------------------------------------


def _tied_pairs(base: Checkpoint, architecture: Architecture) -> list[tuple[Target, Target]]:
    """Return the pairs of weights that are one when this base is loaded; groups of more are left as they are."""
    known = places(base, architecture)
    pairs = []
    for group in (g for g in architecture.tied if len(g) == 2):
        component = next((c for c in architecture.components if architecture.find(group[0], c)), "")
        one, other = (Target(component, (path,)) for path in group)
        if (one in known or other in known) and (
            tied_partner(group[0], component, base, architecture, known)
            or tied_partner(group[1], component, base, architecture, known)
        ):
            pairs.append((one, other))
    return pairs


def _untie(result: Rebuilt, pair: tuple[Target, Target], adapters: Sequence[Adapter]) -> None:
    """Write both of two tied weights where adapters do different things to them; else see that it happens once."""
    touched = {n: [m for m in pair if m in a.deltas] for n, a in enumerate(adapters)}
    users = {n: members for n, members in touched.items() if members}
    if not users:
        return
    known = places(result.base, result.architecture)
    held = [m for m in pair if m in known]
    if all(_shares(adapters[n], members, held[0]) for n, members in users.items()):
        for n, members in users.items():
            _apply_once(result, n, adapters[n], members, held)
            result.mirrored[n] |= {m: adapters[n].deltas[members[0]] for m in held if m not in members}
        return
    for n, members in users.items():
        result.mirrored[n] |= _shared_deltas(adapters[n], members, pair)
    if len(held) == 1:
        (absent,) = (m for m in pair if m not in held)
        place = known[held[0]]
        result.put(f"{absent.parts[0]}.weight", result.base.tensors[place.tensor], beside=place.tensor)
    else:
        one, other = (result.base.tensors[known[m].tensor] for m in held)
        result.twins.append(Twins(result.base.path, one, other))
    result.config["tie_word_embeddings"] = False
    what = "were one weight and get different values: both are written (tie_word_embeddings: false)"
    result.say("info", f"{pair[0]} and {pair[1]}", what)


def _shares(adapter: Adapter, members: Sequence[Target], primary: Target) -> bool:
    """Whether an adapter means both of two tied weights by what it does to these. DoRA's norms are each side's own.

    Where PEFT shares an update (ensure_weight_tying) both are in the file; equal trained tokens it shares in any case.
    """
    deltas = [d for m in members for d in adapter.deltas[m]]
    tokens = {d.indices if isinstance(d, Tokens) else () for d in deltas}
    own = any(isinstance(d, Dora) for d in deltas)
    return (
        primary in members
        and not own
        and ((len(tokens) == 1 and () not in tokens) or (adapter.shares_ties and len(members) == 2))
    )


def _shared_deltas(
    adapter: Adapter, members: Sequence[Target], pair: tuple[Target, Target]
) -> dict[Target, tuple[Delta, ...]]:
    """Return what an adapter says of one of two tied weights and means of the other too: trained tokens always."""
    found: dict[Target, tuple[Delta, ...]] = {}
    for one, other in (pair, pair[::-1]):
        mine, theirs = adapter.deltas.get(one, ()), adapter.deltas.get(other, ())
        tokens = tuple(d for d in mine if isinstance(d, Tokens))
        if tokens and not any(isinstance(d, Tokens) for d in theirs):
            found[other] = tokens
        elif one in members and other not in members and _shares(adapter, members, one):
            found[other] = mine
    return found


def _apply_once(result: Rebuilt, n: int, adapter: Adapter, members: Sequence[Target], held: Sequence[Target]) -> None:
    """Leave one of two equal deltas of one weight; that they are equal is checked when they are read."""
    for double in (m for m in members if m not in held):
        result.settled[n].add(double)
        for one, two in zip(adapter.deltas[held[0]], adapter.deltas[double], strict=False):
            pairs = zip(one.refs[:2], reversed(two.refs[:2]) if one.factorable else two.refs[:2], strict=False)
            turned = one.factorable
            result.twins += [
                Twins(adapter.origin.path, a, b.transposed() if turned else b) for a, b in pairs if len(a.shape) == 2
            ]


# -- weights trained in full --------------------------------------------------------------------------------------


def _require_one_in_full(adapters: Sequence[Adapter]) -> None:
    """Raise where two adapters bring one weight in full: their sum would be neither."""
    owners: dict[Target, str] = {}
    for adapter in adapters:
        for target in (t for t in adapter.targets if any(isinstance(d, Replace) for d in adapter.deltas[t])):
            if target in owners:
                raise MismatchError(
                    f"{owners[target]} and {adapter.origin.path} bring this weight in full: which one is meant?",
                    where=str(target),
                    hint="leave it out of one of them: --adapter-config has an `exclude` for each adapter",
                )
            owners[target] = adapter.origin.path


def _put_in_place(result: Rebuilt, n: int, weighted: Weighted, others: Sequence[Adapter]) -> None:
    """Put weights that were trained in full where the base has them; heads that it has not are added.

    Where another adapter's delta depends on the original weight (DoRA ...), that stays, and the merge replaces it.
    """
    adapter = weighted.adapter
    known, meanings = places(result.base, result.architecture), Meanings(result.base, result.architecture)
    before = result.base.tensors
    for target in adapter.targets:
        deltas = adapter.deltas[target]
        if len(deltas) != 1 or not isinstance(deltas[0], Replace) or weighted.of(target) != 1:
            continue
        ref = deltas[0].value
        if any(d.of_weight for other in others for d in other.deltas.get(target, ())):
            continue
        slices = resolve(target, known, result.architecture, result.base.config or {})
        slices = slices or vector_slices(target, known, meanings)
        if slices:
            _replace_whole(result, n, target, slices, adapter)
        elif _is_new(adapter, target, before):
            name = target.parts[0] if len(ref.shape) < 2 else f"{target.parts[0]}.weight"
            what = f"is new in the model: the base has no such tensor, the adapter brings {list(ref.shape)}"
            result.say("warning", name, what)
            _describe_head(result, adapter.head_class, ref)
            result.put(name, ref)
            result.replaced[name] = f"new in the model: that of {adapter.origin.path}"
            result.brought_by[name] = n
            result.settled[n].add(target)


def _replace_whole(result: Rebuilt, n: int, target: Target, slices: Sequence[Slice], adapter: Adapter) -> None:
    """Replace a tensor as a whole; a part of one, and what does not fit, is left to the merge."""
    (delta,), place = adapter.deltas[target], slices[0].place
    ref, stored = delta.refs[0], result.base.tensors[place.tensor]
    if len(slices) > 1 or place.rows is not None or len(ref.shape) != len(stored.shape):
        return
    if ref.shape != stored.shape:
        if ref.shape[1:] != stored.shape[1:] or not _is_vocabulary(target, result.architecture):
            return
        _say_resized(result, place.tensor, stored.shape[0], ref.shape[0])
    result.replace(place.tensor, ref, n, adapter.origin.path)
    result.settled[n].add(target)


def _is_vocabulary(target: Target, architecture: Architecture) -> bool:
    known = architecture.find(target.parts[0].removesuffix(".bias"), target.component)
    return known is not None and known.layer.group in ("embedding", "head")


def _is_new(adapter: Adapter, target: Target, tensors: Mapping[str, TensorRef]) -> bool:
    """Whether a tensor is of a module that was trained in full and of which the base has nothing, such as a head."""
    saved = adapter.origin.config.get("modules_to_save")
    names = [*(saved if isinstance(saved, list) else ()), *(HEADS if adapter.head_class else ())]
    mine = [name for name in names if within(name, f"{target.parts[0].removesuffix('.bias')}.")]
    return bool(mine) and not any(within(name, tensor) for name in mine for tensor in tensors)


def _describe_head(result: Rebuilt, ending: str, ref: TensorRef) -> None:
    """Say in the config which class has the new head, and how many labels it has."""
    classes = (result.base.config or {}).get("architectures")
    if ending and isinstance(classes, list) and classes:
        result.config["architectures"] = [re.sub(r"(For[A-Z]\w*|LMHeadModel|Model)$", "", str(classes[0])) + ending]
    if ending and len(ref.shape) == 2:
        result.config["id2label"] = {str(i): f"LABEL_{i}" for i in range(ref.shape[0])}
        result.config["label2id"] = {f"LABEL_{i}": i for i in range(ref.shape[0])}


def edited(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with changes, made where the key stands: at the top, in a language model's part, or in both."""
    result = {**config}
    for key, value in changes.items():
        tie = key == "tie_word_embeddings"  # has a default of its own in the part
        parts = {k: part for k, part in config.items() if isinstance(part, dict)}
        nested = [k for k, part in parts.items() if key in part or (tie and k in ("text_config", "llm_config"))]
        for name in nested:
            result[name] = {**result[name], key: value}
        if key in config or not nested or tie:
            result[key] = value
    return result
