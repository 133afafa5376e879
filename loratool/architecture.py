"""Architectures: which layers of a model family can carry an adapter. Data, not code.

A family author writes `Architecture(...)` with the layers' patterns (see loratool.patterns); everything else follows
from it: names on disk and in memory, kohya's flat names, default targets, whether a weight is stored transposed, which
rows of a fused weight are q.

Layer paths are *canonical*: the Hugging Face checkpoint's spelling on disk, with the leading element that some files
omit (`transformer.`, `bert.`, `model.`) spelled out and listed in `prefixes`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from loratool import expressions, fieldtypes
from loratool.errors import LoratoolError, MismatchError, PluginError
from loratool.layers import Excluded, Experts, Fused, Layer
from loratool.layouts import Rows
from loratool.native import ANY_DENOISER, DENOISER, Labels, Named, Names, Original
from loratool.patterns import Lexicon, Rule, Skeleton, parse_rule
from loratool.readings import Known, Slot

_OPEN = "987654321"  # stands for the open index of a stack while its paths are looked up
_DEPTH = 3  # a name may need a rule for its prefix, one for its module and one for its expert


@dataclass(frozen=True)
class Match:
    """What identifies a family: a config's `model_type` or `_class_name`, if `when` holds of the config.

    `shapes` are pairs of a layer's pattern and a condition on its `out` and `inp` (features), such as
    ("mid_block.attentions.{i}.transformer_blocks.{j}.attn2.to_k", "inp == 768"): they narrow families of equal names.
    `counts` are pairs of an element and how many of it a model has, ("transformer_blocks", 19): an adapter with more is
    of another family, one with exactly as many likely of this. `metadata` are beginnings of what trainers write as
    ss_base_model_version or modelspec.architecture.
    """

    model_types: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    when: str = ""
    shapes: tuple[tuple[str, str], ...] = ()
    counts: tuple[tuple[str, int], ...] = ()
    metadata: tuple[str, ...] = ()

    def fits(self, config: Mapping[str, Any]) -> bool:
        """Whether a config is of this family."""
        named = config.get("model_type") in self.model_types or config.get("_class_name") in self.classes
        return named and expressions.holds(self.when, config)


@dataclass(frozen=True)
class Architecture:
    """One model family.

    like             the name of a family whose layers, rules and conventions this one has too
    fused            which layers hold several projections, and how their rows lie
    memory           rules (see patterns.Rule) from transformers' names in memory to canonical ones, where they differ
    aliases          rules from any other spelling: older releases, split or fused relatives
    prefixes         leading elements that files may omit, per component: {"": ("transformer.",)}
    headless         transformers class names whose modules carry no prefix in memory (GPT2Model, BertModel)
    bare_in_memory   components whose modules never carry the prefix in memory (CLIPTextModel in transformers 5)
    wrapped          {"transformer.": (class names)}: classes that keep the model under another element than usual
    tied             groups of paths that may share one tensor
    tied_by_default  whether they do where config.json has no tie_word_embeddings
    named            component -> how the files of image tools name it (native.Named)
    labels           what adapter files of image tools call it (native.Labels)
    ignored          leading elements of names in single-file checkpoints that no adapter updates: `first_stage_model.`
    component_classes  component -> the names of its model's classes, which tell two text encoders apart
    at_hand          the component that the model at hand is: said where a model is recognised, not by a family
    """

    name: str
    match: Match = Match()
    layers: tuple[Layer, ...] = ()
    default_targets: tuple[str, ...] = ()
    like: str = ""
    fused: tuple[Fused, ...] = ()
    memory: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    prefixes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    headless: tuple[str, ...] = ()
    bare_in_memory: tuple[str, ...] = ()
    wrapped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tied: tuple[tuple[str, ...], ...] = ()
    tied_by_default: bool = False
    named: Mapping[str, Named] = field(default_factory=dict)
    labels: Labels | None = None
    ignored: tuple[str, ...] = ()
    component_classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    at_hand: str = ""

    def completed(self, parent: Architecture) -> Architecture:
        """Return this family with everything that it shares with the one it is like."""
        merged: dict[str, Any] = {}
        for name in (f.name for f in fields(self)):
            mine, theirs = getattr(self, name), getattr(parent, name)
            if name in ("layers", "fused", "memory", "aliases"):
                merged[name] = mine + theirs
            elif name not in ("name", "match", "like"):
                merged[name] = mine or theirs
        return replace(self, **merged)

    @cached_property
    def components(self) -> tuple[str, ...]:
        """The components in the order of the layers; `("",)` for a model of one piece."""
        return tuple(dict.fromkeys(layer.component for layer in self.layers))

    def holding(self, model_class: str, paths: Iterable[str] = ()) -> Architecture:
        """Return this family with the component that a model is: by its class, else the first that has all its paths.

        What two components have in common, such as the layers of two text encoders, is then that component's.
        """
        by_class = [c for c, classes in self.component_classes.items() if model_class in classes]
        paths = [p for p in paths if not self.ignores(p)] if len(self.components) > 1 and not by_class else []
        by_names = [c for c in self.components if paths and all(self.find(path, c) for path in paths)]
        found = next(iter(by_class or by_names), "")
        return replace(self, at_hand=found) if found else self

    @cached_property
    def _lexicons(self) -> dict[str, Lexicon[Layer]]:
        return {c: Lexicon([(y.pattern, y) for y in self.layers if y.component == c]) for c in self.components}

    @cached_property
    def _fused(self) -> dict[str, Lexicon[tuple[Fused, ...]]]:
        """Per component: the fused weights; several of one pattern differ in `when`."""
        found: dict[str, dict[str, tuple[Fused, ...]]] = {c: {} for c in self.components}
        for fused in self.fused:
            patterns = found.setdefault(fused.component, {})
            patterns[fused.pattern] = (*patterns.get(fused.pattern, ()), fused)
        return {c: Lexicon(patterns.items()) for c, patterns in found.items()}

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        """The rules from other spellings, those of the names in memory first."""
        return tuple(rule for text in (*self.memory, *self.aliases) for rule in parse_rule(text))

    @cached_property
    def _memory_rules(self) -> tuple[Rule, ...]:
        return tuple(rule for text in self.memory for rule in parse_rule(text))

    def find(self, path: str, component: str | None = None) -> Known | None:
        """Return what this family knows of a dotted path, in any spelling it may have on disk or in memory.

        A path may say itself which component it is in: `unet:conv_in`, as in a pipeline of diffusers.
        """
        said, colon, rest = path.partition(":")
        if colon and component is None:
            component, path = said, rest
        return next(self._readings(path, self._order if component is None else (component,)), None)

    def readings(self, path: str) -> list[Known]:
        """Return what a path may be, in every component that has such a layer; in the one at hand if that does."""
        found = list(self._readings(path, self._order))
        return [k for k in found if k.component == self.at_hand] or found

    def _readings(self, path: str, components: Iterable[str]) -> Iterator[Known]:
        found = (self._find(name, path, _DEPTH) for name in components if name in self._lexicons)
        return (known for known in found if known)

    @cached_property
    def _order(self) -> tuple[str, ...]:
        return tuple(sorted(self.components, key=lambda component: component != self.at_hand))

    def _find(self, component: str, path: str, depth: int) -> Known | None:
        spellings = [path, *(prefix + path for prefix in self.prefixes.get(component, ()))]
        native = self._native(component, path) if depth == _DEPTH else None
        if native is not None and not native.distance:
            return native
        for spelling in spellings:
            found = self._canonical(component, spelling)
            if found:
                borrowed = component in self.named and self.named[component].borrowed
                near = spelling is path or component in self.bare_in_memory
                return found if near and not borrowed else found._replace(distance=1)
        if native is not None:
            return native
        for spelling in spellings if depth else ():
            for rule in self.rules:
                stands_for = rule.apply(spelling)
                if stands_for is None:
                    continue
                axis = "{" + rule.axis + "}"
                parts = [part.replace(axis, _OPEN) for part in stands_for]
                known = [k for k in (self._find(component, part, depth - 1) for part in parts) if k]
                if known and len(known) == len(parts):
                    return _combined(known, rule.axis)
        return None

    def _canonical(self, component: str, path: str) -> Known | None:
        """Return the layer whose canonical path this is; `weight[q]` and `experts[3]` are paths too."""
        whole, bracket, inside = path.partition("[")
        found = self._lexicons[component].find(whole)
        if found is None:
            return None
        layer, role = found.value, found.value.role(found.skeleton)
        indices = inside[:-1].split("][") if bracket else []
        if isinstance(layer, Experts):
            if not indices:
                return Known(component, (path + "[{e}]",), layer, role, "e")
            index = indices.pop(0)
            if not index.isdecimal() and index != "{e}":
                return None
        if not indices:
            return Known(component, (path,), layer, role, "e" if "[{e}]" in path else "")
        fused = self._fused[component].find(whole)
        if len(indices) > 1 or fused is None or not any(_has_part(f, indices[0]) for f in fused.value):
            return None
        role = role if indices[0].isdecimal() else indices[0]
        return Known(component, (path,), layer, role, "e" if "[{e}]" in path else "")

    def layout(self, path: str, component: str, out: int, config: Mapping[str, Any]) -> dict[str, Rows]:
        """Return which output rows of a fused weight belong to each part, `path[q]` by `path[q]`; empty if not fused.

        `out` is the number of its output rows. MismatchError where the config lacks a size or they do not add up.
        """
        for fused in self.fused_at(path, component):
            if expressions.holds(fused.when, config):
                try:
                    rows = fused.layout.rows(out, config)
                except MismatchError as problem:
                    raise MismatchError(
                        f"the layout {fused.layout.name} of {'|'.join(fused.parts)} does not work out: {problem.what}",
                        where=path,
                        hint="is config.json beside the base, and is this the family (--arch)?",
                    ) from None
                names = fused.parts if fused.layout.name != "stack" else map(str, range(len(rows)))
                return {f"{path}[{name}]": r for name, r in zip(names, rows, strict=True)}
        return {}

    def parts_of(self, path: str, component: str) -> tuple[str, ...]:
        """Return the parts of a fused weight, `path[q]` and so on; empty if it is not fused."""
        fused = next((f for f in self.fused_at(path, component) if f.layout.name != "stack"), None)
        return tuple(f"{path}[{name}]" for name in fused.parts) if fused else ()

    def fused_at(self, path: str, component: str) -> tuple[Fused, ...]:
        """Return what is fused under a path; several differ in `when`."""
        whole, bracket, inside = path.partition("[")
        known = self._canonical(component, whole) if component in self._lexicons else None
        if known is None or (bracket and not (known.axis and inside[:-1].isdecimal())):
            return ()  # a part has no parts
        found = self._fused[component].find(whole)
        return found.value if found else ()

    @cached_property
    def natives(self) -> dict[str, Names]:
        """The rules between the original spelling and the canonical one, by component."""
        return {
            c: Names(named.native, [skeleton.elements for skeleton, _ in self._lexicons[c]])
            for c, named in self.named.items()
        }

    def kohya_prefix(self, component: str) -> str:
        """Return the first element of kohya's flat names for a component."""
        return self.named[component].kohya if component in self.named else "lora_te"

    def unflatten(self, flat: str) -> list[Known]:
        """Return every reading of a kohya module name (`lora_unet_down_blocks_0_...`); more than one is ambiguous."""
        readings = []
        for component in self.components:
            named = self.named.get(component)
            starts = (named.kohya, *named.also, *(ANY_DENOISER if named.comfy == DENOISER else ())) if named else ("",)
            for start in starts if named else ("lora_te",):
                if flat.startswith(start + "_"):
                    readings += self._flat_readings(component, flat[len(start) + 1 :])
        return list({(k.component, k.parts): k for k in reversed(readings)}.values())[::-1]

    def _flat_readings(self, component: str, flat: str) -> list[Known]:
        named = self.named.get(component)
        here = named is None or named.flat == "canonical"
        far = int(not here or (named is not None and named.borrowed))
        found = self._lexicons[component].unflatten(flat)
        known = [Known(component, (f.path,), f.value, f.value.role(f.skeleton), "", far) for f in found]
        originals = self.natives[component].unflatten(flat) if named else []
        natives = [self._of_original(component, o, int(here)) for o in originals]
        return sorted([*known, *(k for k in natives if k)], key=lambda k: k.distance)

    def _of_original(self, component: str, original: Original, distance: int) -> Known | None:
        """Return what a weight of the original spelling is, if all its parts are layers."""
        paths = (part.removesuffix(".weight") for part in original.parts)  # a parameter may stand for a weight
        known = [k for k in (self._canonical(component, path) for path in paths) if k]
        if len(known) < len(original.parts):
            return None
        whole = known[0] if len(known) == 1 else _combined(known, "")
        return whole._replace(distance=distance, heights=original.heights, swap=original.swap, turned=original.turned)

    def original(self, component: str, path: str, *, last: bool = False) -> Original:
        """Return the weight of the original spelling that a canonical path lies in; its own name where no rule says.

        Where several rules do, by the first or by the `last` of them (see native.Named.flat).
        """
        found = self.natives[component].original(path, last=last) if component in self.natives else None
        return found if found and not found.turned else Original(path, (path,))  # adapters turn nothing

    def _native(self, component: str, path: str) -> Known | None:
        """Return what a name in the original spelling is, with the leading elements that checkpoints have or not."""
        named = self.named.get(component)
        if named is None:
            return None
        start = self.start_of(component, path)
        starts, rest = bool(start), path.removeprefix(start)
        original = self.natives[component].find(rest)
        known = self._of_original(component, original, distance=int(not starts)) if original else None
        return known or (self._canonical(component, rest) if starts else None)

    def explains(self, paths: Iterable[str]) -> bool:
        """Whether every module path belongs to this family, less those that it ignores."""
        return all(self.ignores(path) or self.find(path) is not None for path in paths)

    def ignores(self, name: str) -> bool:
        """Whether a tensor is beside what adapters update: `first_stage_model.*`, another component of a pipeline."""
        component, colon, _ = name.partition(":")
        beside = bool(colon) and "" not in self.components and component not in self.components
        return beside or name.startswith(self.ignored)

    def start_of(self, component: str, name: str) -> str:
        """Return the elements that a checkpoint of one file, or ComfyUI, puts before a component's names; or none."""
        named = self.named.get(component)
        starts = (*named.checkpoint, named.comfy) if named else ()
        return max((s for s in starts if s and name.startswith(s)), key=len, default="")

    def in_memory(self, component: str, path: str, model_class: str = "") -> str:
        """Return the module path of the live transformers or diffusers model, where PEFT counts its names from."""
        path = next((name for rule in self._memory_rules if (name := rule.invert(path)) is not None), path)
        return self._live(component, path, model_class)

    def slot(self, component: str, path: str, model_class: str = "") -> Slot | None:
        """Return the place of a canonical matrix in a 3-D parameter of the live model, or None if it is no expert."""
        weight, bracket, index = path.partition("[")
        known = self._canonical(component, weight)
        if known is not None and isinstance(known.layer, Experts):
            if not bracket or not index[:-1].isdecimal():
                return None
            return Slot(self.in_memory(component, weight, model_class), int(index[:-1]), (path,), known.layer.unmarked)
        for rule in self._memory_rules:
            found = rule.locate(path)
            if found:
                return Slot(self._live(component, found[0], model_class), *found[1:])
        return None

    @cached_property
    def stacked_leaves(self) -> frozenset[str]:
        """The last elements of the names on disk of matrices that are stacked in memory: `gate_proj`, `w1`."""
        return frozenset(p.elements[-1] for rule in self._memory_rules if rule.axis for p in rule.parts)

    def is_bare(self, component: str, model_class: str) -> bool:
        """Whether the modules of the live model carry no prefix; another class in a component's place keeps its own."""
        classes = self.component_classes.get(component, ())
        bare = component in self.bare_in_memory and (not model_class or not classes or model_class in classes)
        return bare or model_class in self.headless

    def _live(self, component: str, path: str, model_class: str) -> str:
        if self.is_bare(component, model_class):
            for prefix in self.prefixes.get(component, ()):
                if path.startswith(prefix):
                    return path[len(prefix) :]
        known = self.find(path, component) if self.wrapped else None
        for wrapper, classes in self.wrapped.items():
            if model_class in classes and known and known.layer.group != "head":
                own = next((p for p in self.prefixes.get(component, ()) if path.startswith(p)), "")
                return wrapper + path.removeprefix(own)
        return path

    def on_disk(self, name: str) -> str:
        """Return the canonical spelling of any tensor's name, such as a norm's, by the rules for whole subtrees."""
        found = [
            (len(r.left.elements), new[0]) for r in self.rules if r.left.elements[-1] == "**" if (new := r.apply(name))
        ]
        return max(found)[1] if found else name

    def skeletons(self) -> Iterator[tuple[Skeleton, Layer]]:
        """Every layer, one choice-free skeleton at a time."""
        for lexicon in self._lexicons.values():
            yield from lexicon

    def validate_types(self) -> None:
        """Raise PluginError where a field is of another type than it says: a tuple of one that lacks its comma."""
        for mistake in fieldtypes.mistakes(self):
            hint = "a tuple of one has a comma: (x,); see docs/plugins.md"
            raise PluginError(mistake, where=self.name, hint=hint)
        for fused in self.fused:
            parts = len(fused.layout.widths) if fused.layout.name != "stack" else len(fused.parts)
            if len(fused.parts) != parts:
                what = f"{fused.pattern!r} has {len(fused.parts)} parts, and its layout {parts}"
                raise PluginError(what, where=self.name, hint="parts=('q', 'k'), layout=concat(parts=2)")

    def validate(self) -> None:
        """Raise PluginError where the data contradicts itself."""
        seen: dict[tuple[str, str], Layer] = {}
        for skeleton, layer in self.skeletons():
            if len(layer.roles) > 1 and skeleton.alternative >= len(layer.roles):
                raise PluginError(f"layer {layer.pattern!r} has fewer roles than alternatives", where=self.name)
            shape = re.sub(r"\{\w+\}", "{}", skeleton.text)  # an index is one, whatever it is called
            if seen.setdefault((layer.component, shape), layer) is not layer:
                raise PluginError(f"two layers claim {skeleton.text!r}", where=self.name)
        named = {"prefixes": self.prefixes, "bare_in_memory": self.bare_in_memory, "named": self.named}
        named |= {"component_classes": self.component_classes, "fused": [f.component for f in self.fused]}
        for component, where in ((c, where) for where, components in named.items() for c in components):
            if component not in self.components:
                raise PluginError(f"{where} of an unknown component {component!r}", where=self.name)
        self._validate_rules()

    def _validate_rules(self) -> None:
        try:
            _ = self.rules
            for fused in self.fused:
                for expression in (fused.when, fused.layout.groups, *fused.layout.widths):
                    expressions.check(expression)
            for condition in (self.match.when, *(text for _, text in self.match.shapes)):
                expressions.check(condition)
        except LoratoolError as problem:
            raise PluginError(problem.what, where=self.name, hint=problem.hint) from None
        layers = {skeleton.text for skeleton, layer in self.skeletons() if not isinstance(layer, Excluded)}
        strangers = [k.text for lexicon in self._fused.values() for k, _ in lexicon if k.text not in layers]
        if strangers:
            raise PluginError(f"{strangers[0]!r} is fused and is no layer", where=self.name)


def plainest(candidates: Iterable[Architecture], every: Iterable[Architecture]) -> list[Architecture]:
    """Return families in the order in which they are meant by names that all of them explain.

    First those that many others are like, then those that say least beyond.
    """
    likened = Counter(a.like for a in every)
    return sorted(candidates, key=lambda a: (-likened[a.name], sum(1 for _ in a.skeletons()), a.name))


def _has_part(fused: Fused, part: str) -> bool:
    return part in fused.parts or (fused.layout.name == "stack" and (part.isdecimal() or part == "{e}"))


def _combined(known: list[Known], axis: str) -> Known:
    """Return the reading of a weight that is fused under one name out of the readings of its parts."""
    first = known[0]
    role = first.role if len({k.role for k in known}) == 1 else "+".join(k.role for k in known)
    parts = tuple(p.replace(_OPEN, "{" + axis + "}") if axis else p for k in known for p in k.parts)
    distance = 1 + max(k.distance for k in known)
    return Known(first.component, parts, first.layer, role, axis or first.axis, distance)
