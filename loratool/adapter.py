"""Adapters: what every format is read into and written from.

An adapter maps targets (weights of the base, by canonical path) to deltas (updates of those weights, of the kinds in
loratool.deltas). The tensors in it are references; nothing is loaded. Factors keep the orientation of the paper (Hu et
al. 2021, arXiv 2106.09685): `down` (A) is (rank, in), `up` (B) is (out, rank), and the update of an (out, in) weight is
`scaling * up @ down`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import NamedTuple

from loratool.deltas import Delta, LowRank
from loratool.errors import InputError, MismatchError
from loratool.patterns import natural, outline, selects
from loratool.tensors import TensorRef


class Target(NamedTuple):
    """What one delta updates: canonical module paths whose output rows it covers, in that order (almost always one).

    A module path is the name of its weight less the final `.weight`; other tensors, such as biases, have their names.
    """

    component: str
    parts: tuple[str, ...]
    heights: tuple[int, ...] = ()  # output rows of each part, where they are not equal

    def shares(self, out: int) -> tuple[int, ...]:
        """Return how many of a delta's `out` rows belong to each part; MismatchError where they do not divide."""
        share, rest = divmod(out, len(self.parts))
        found = self.heights or (share,) * len(self.parts)
        if sum(found) != out or (rest and not self.heights):
            raise MismatchError(f"{out} rows do not divide into {', '.join(self.parts)}", where=str(self))
        return found

    @property
    def path(self) -> str:
        """The module path, for messages and sorting: several parts as one pattern, `experts.3.(w1|w3)`."""
        if len(self.parts) == 1:
            return self.parts[0]
        elements = [part.split(".") for part in self.parts]
        levels = zip(*(each[:-1] for each in elements), strict=False)
        shared = len(list(takewhile(lambda names: len(set(names)) == 1, levels)))
        if not shared or "[" in "".join(self.parts):
            return "+".join(self.parts)
        return f"{'.'.join(elements[0][:shared])}.({'|'.join('.'.join(each[shared:]) for each in elements)})"

    def __str__(self) -> str:
        return f"{self.component}:{self.path}" if self.component else self.path

    @property
    def sort_key(self) -> tuple[str, tuple[tuple[int, int, str], ...]]:
        """Component, then path, with layer 2 before layer 10."""
        return self.component, natural(self.path)


class Finding(NamedTuple):
    """Something a person should know: `error` findings stop every command but inspect."""

    level: str  # error | warning | info
    where: str
    what: str
    hint: str = ""


def gathered(findings: Iterable[Finding], most: int = 8) -> tuple[list[Finding], int]:
    """Return findings to show: those that say the same of many places as one, at most so many of each level.

    And how many findings are not among them.
    """
    alike: dict[tuple[str, str], list[Finding]] = {}
    for f in findings:
        alike.setdefault((f.level, outline(f.what)), []).append(f)
    shown: list[Finding] = []
    for (level, _), group in alike.items():
        room = most - sum(f.level == level for f in shown)
        if len(group) > 2 and room > 0:
            places = f"{group[0].where}, {group[1].where} and {len(group) - 2} more"
            shown.append(group[0]._replace(where=places))
            group.clear()
        else:
            shown += group[: max(room, 0)]
            del group[: max(room, 0)]
    return shown, sum(map(len, alike.values()))


class Stack(NamedTuple):
    """A parameter of several matrices (experts, ., .): its path in memory, and the target of each matrix.

    `beyond` would be the next one: a base that has it has more matrices than the adapter was trained on.
    """

    parameter: str
    targets: tuple[Target, ...]
    beyond: Target | None = None


@dataclass(frozen=True)
class Origin:
    """How the adapter was spelled where it came from, so that writing the same format spells it the same way.

    `stacks` are the file's modules that hold one pair of factors for many targets, such as all experts of a layer.
    """

    format: str
    path: str
    modules: Mapping[Target, str] = field(default_factory=dict)  # target -> the module's name in the file
    stacks: Mapping[str, Stack] = field(default_factory=dict)
    embeddings: frozenset[Target] = frozenset()  # targets that the file spells as embeddings
    config: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter: targets and their deltas, and what else the files held.

    `families` are the architectures that explain every name, `rivals` others that do and mean other modules.
    `base_copies` are untouched base weights that were saved along (PEFT does so for embeddings). `tensors` are all of
    the files, `consumed` the names of those that were read for their value (alphas), `skipped` those that the user's
    globs left out, `partly` those of which they left out some experts. `unmapped`: the findings' places that
    are modules or tensors which nothing explains.
    `findings` is everything that reading noticed.

    `replication`: the layer of the base that each layer of the adapted model repeats, where they are not the same.
    `changed_base`: how the base was changed before training (PiSSA ...); the deltas are relative to that changed base.
    `residual`: where that base is, if `init` wrote it.
    `shares_ties`: what it does to one of two tied weights it does to both. `head_class`: the ending of the transformers
    class whose head it brings, ForSequenceClassification.
    """

    deltas: Mapping[Target, tuple[Delta, ...]]
    origin: Origin
    families: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()
    base_copies: Mapping[Target, TensorRef] = field(default_factory=dict)
    tensors: Mapping[str, TensorRef] = field(default_factory=dict)
    consumed: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    partly: tuple[str, ...] = ()
    unmapped: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    base_model: str = ""
    findings: tuple[Finding, ...] = ()
    replication: tuple[int, ...] = ()
    changed_base: str = ""
    residual: str = ""
    shares_ties: bool = False
    head_class: str = ""

    @property
    def targets(self) -> list[Target]:
        """The targets in natural order."""
        return sorted(self.deltas, key=lambda t: t.sort_key)

    def low_rank(self, verb: str) -> Mapping[Target, tuple[LowRank, ...]]:
        """Return the deltas, all of them plain LoRA; raise InputError, which names the others, where some are not."""
        plain: dict[Target, tuple[LowRank, ...]] = {}
        others: dict[str, list[Target]] = {}
        for target, deltas in self.deltas.items():
            found = tuple(d for d in deltas if isinstance(d, LowRank) and d.mid is None)
            if len(found) == len(deltas):
                plain[target] = found
            else:
                kind = next(d.kind for d in deltas if d not in found)
                others.setdefault(kind, []).append(target)
        if others:
            told = [f"{kind}: {len(ts)} modules, such as {ts[0]}" for kind, ts in others.items()]
            raise InputError(
                "\n  ".join([f"{verb} does not carry these kinds of updates yet", *told]),
                where=self.origin.path,
                hint="merge does; or leave them out with --exclude",
            )
        return plain

    @property
    def explained(self) -> dict[str, str]:
        """The fates of tensors that are neither computed with nor copied, for the ledger."""
        return {
            **dict.fromkeys(self.consumed, "read"),
            **dict.fromkeys(self.skipped, "skipped"),
            **dict.fromkeys(self.partly, "computed in part"),
        }

    def require_sound(self) -> Adapter:
        """Return self, or raise MismatchError that lists every error finding."""
        errors = [f for f in self.findings if f.level == "error"]
        if self.changed_base:
            what = f"{self.changed_base} changed the base model before training; this adapter fits that base only"
            hint = "--init-adapter FOLDER: the adapter as it was saved before training, or the folder `initial` of init"
            if self.residual:
                here = f"merge it into {self.residual}, without --init-adapter (convert and combine: --base)"
                hint = f"{here}; for the original base {hint}"
            errors.append(Finding("error", "init_lora_weights", what, hint))
        if errors:
            shown, more = gathered(errors)
            lines = [f"{f.where}: {f.what}" for f in shown]
            if more:
                lines.append(f"... and {more} more (loratool inspect -v lists them all)")
            raise MismatchError(
                "\n  ".join([f"{len(errors)} part{'s' * (len(errors) > 1)} of this adapter cannot be used", *lines]),
                where=self.origin.path,
                hint=next((f.hint for f in errors if f.hint), ""),
            )
        return self

    def without_unmapped(self) -> Adapter:
        """Return this adapter less what nothing explains: the errors become warnings."""
        dropped = (f._replace(level="warning", what=f"dropped: {f.what}", hint="") for f in self.findings)
        findings = (w if f.where in self.unmapped else f for f, w in zip(self.findings, dropped, strict=True))
        return replace(self, findings=tuple(findings))

    def has(self, pattern: str) -> bool:
        """Whether a user's pattern selects any module; a bias goes with its module."""
        named = ((part.removesuffix(".bias"), t.component) for t in self.deltas for part in t.parts)
        return any(selects(pattern, part, component) for part, component in named)

    def selected(self, target: Iterable[str] = (), exclude: Iterable[str] = ()) -> Adapter:
        """Return this adapter less what the user's globs leave out; the tensors left out are in `skipped`."""
        target, exclude = tuple(target), tuple(exclude)
        used = dict.fromkeys((*target, *exclude), False)

        def hit(pattern: str, part: str, component: str) -> bool:
            matched = selects(pattern, part, component)
            used[pattern] |= matched
            return matched

        def wanted(part: str, component: str) -> bool:
            part = part.removesuffix(".bias")  # a bias goes with its module
            yes = [hit(p, part, component) for p in target]
            no = [hit(p, part, component) for p in exclude]
            return (any(yes) or not target) and not any(no)

        kept: dict[Target, tuple[Delta, ...]] = {}
        for t, deltas in self.deltas.items():
            chosen = [wanted(part, t.component) for part in t.parts]
            if all(chosen):
                kept[t] = deltas
            elif any(chosen):  # some of the parts that one delta covers, such as an expert's gate without its up
                kept |= {part: cut for part, cut in by_parts(t, deltas).items() if wanted(part.parts[0], t.component)}
        dead = [p for p, matched in used.items() if not matched]
        if dead or not kept:
            raise MismatchError(
                f"no module matches {' or '.join(map(repr, dead))}" if dead else "no module is left to work on",
                where=self.origin.path,
                hint="loratool inspect lists the modules; patterns match whole names or their ends",
            )
        left_out = [t for t in self.targets if t not in kept]
        skipped = [*self.skipped, *self.partly]
        skipped += [ref.name for t in left_out for delta in self.deltas[t] for ref in delta.refs]
        skipped += [self.base_copies[t].name for t in left_out if t in self.base_copies]
        shared = {ref.name for deltas in kept.values() for d in deltas for ref in d.refs}  # with other experts
        partly = [name for name in dict.fromkeys(skipped) if name in shared]
        skipped = [name for name in skipped if name not in shared]
        copies = {t: ref for t, ref in self.base_copies.items() if t in kept}
        return replace(self, deltas=kept, base_copies=copies, skipped=tuple(skipped), partly=tuple(partly))


def by_parts(target: Target, deltas: tuple[Delta, ...]) -> dict[Target, tuple[Delta, ...]]:
    """Return the deltas of several modules, cut into those of each by their output rows, `down` shared."""
    cuts = [d.cut(target.shares(d.shape[0])) for d in deltas]
    return {Target(target.component, (part,)): tuple(c[n] for c in cuts) for n, part in enumerate(target.parts)}


class Weighted(NamedTuple):
    """An adapter and how strongly it is applied: `weight`, times the scales of the patterns that select a module."""

    adapter: Adapter
    weight: float = 1.0
    scales: tuple[tuple[str, float], ...] = ()

    def of(self, target: Target) -> float:
        """Return the weight of one target."""
        weight = self.weight
        for pattern, scale in self.scales:
            if any(selects(pattern, part.removesuffix(".bias"), target.component) for part in target.parts):
                weight *= scale
        return weight

    def cut(self) -> Weighted:
        """Return the same with each delta cut that covers several modules, if their weights differ."""
        deltas: dict[Target, tuple[Delta, ...]] = {}
        for target, found in self.adapter.deltas.items():
            weights = {self.of(Target(target.component, (part,))) for part in target.parts}
            deltas |= by_parts(target, found) if len(weights) > 1 else {target: found}
        return self._replace(adapter=replace(self.adapter, deltas=deltas))

    def require_used(self, scales: Iterable[str]) -> None:
        """Raise MismatchError where a pattern selects nothing."""
        for pattern in scales:
            if not self.adapter.has(pattern):
                raise MismatchError(
                    f"no module matches {pattern!r}",
                    where=self.adapter.origin.path,
                    hint="loratool inspect lists the modules; patterns match whole names or their ends",
                )
