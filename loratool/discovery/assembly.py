"""The architecture of a described model, for the names on disk at hand, and what is not known of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from loratool.adapter import Finding
from loratool.architecture import Architecture, Match
from loratool.discovery.conversions import Conversion, Live, Parameter, division, related, without_transpose
from loratool.discovery.names import (
    HEADS,
    Shape,
    Weight,
    by_name,
    from_header,
    guess_targets,
    is_fused,
    named,
    tower_of,
    vocabulary_of,
)
from loratool.discovery.patterns import Claimed, claim, is_path, rule
from loratool.layers import Conv1D, Excluded, Experts, Layer, Linear
from loratool.native import Named
from loratool.patterns import split
from loratool.tensors import module_of


class Assembly:
    """Collects weights under their names on disk, and how their names in memory relate to those."""

    def __init__(self, live: Live, shapes: Mapping[str, Shape]) -> None:
        self.live = live
        self.shapes = shapes
        self.weights: dict[str, Weight] = {}
        self.relations: dict[str, tuple[str, ...]] = {}  # path in memory -> other canonical paths
        self.unmapped: list[str] = []  # paths in memory whose weights lie on disk in a way that rules cannot say
        self.ambiguous: list[str] = []  # paths that are one weight on disk and another in memory
        self.misfits: list[str] = []
        self.strangers = [n for n in live.strangers if len(shapes.get(n, ())) > 1]

    def result(self) -> tuple[Architecture, tuple[Finding, ...]]:
        """Return the architecture and what is not known of it."""
        for conversion in self.live.conversions:
            self._convert(conversion)
        vocabulary = vocabulary_of({n: s for n, s in self.shapes.items() if len(s) > 1})
        for name in self.strangers:
            self._add(from_header(name, self.shapes[name], vocabulary))
        for path in (*self.unmapped, *self.relations):
            if path in self.weights:  # an adapter's rows would land on the wrong ones, and nothing would show it
                self.ambiguous.append(path)
                self.weights[path] = Weight(path, Excluded, "ambiguous")
        tied = self._tied()
        claimed = claim(self.weights.values())
        architecture = self._architecture(claimed, tied)
        return architecture, tuple(self._findings(architecture, claimed))

    def _architecture(self, claimed: Claimed, tied: tuple[tuple[str, ...], ...]) -> Architecture:
        live = self.live
        prefix = f"{live.prefix}."
        image = live.library == "diffusers"
        outer = [("unet" if live.cls.startswith("UNet") else "transformer")] if image else []
        if live.prefix and not live.base and not any(path.startswith(prefix) for path in self.weights):
            outer.append(live.prefix)  # adapters on a model with a head spell it
        rules = dict.fromkeys(text for path, parts in self.relations.items() if (text := rule(path, parts)))
        return Architecture(
            name=live.name,
            match=Match(classes=(live.name,)) if image else Match(model_types=(live.name,)),
            layers=claimed.layers,
            fused=claimed.fused,
            default_targets=guess_targets(self.weights.values()),
            memory=tuple(sorted(rules, key=lambda text: text.count("{"))),  # the more literal rule first
            aliases=tuple(f"{name}.** = **" for name in outer if is_path(name)),
            prefixes={"": (prefix,)} if live.base else {},
            headless=(live.base,) if live.base else (),
            tied=tied,
            tied_by_default=bool(tied),
            named={"": Named("lora_unet")} if image else {},
        )

    def _convert(self, conversion: Conversion) -> None:
        """Take in the weights of one conversion and what their names in memory are."""
        parameter = self.live.parameters.get(conversion.targets[0])
        if parameter is None:  # a buffer, or of one dimension in memory
            for name in (n for names in conversion.sources for n in names if len(self.shapes.get(n, ())) > 1):
                self._add(Weight(module_of(name), Excluded, "buffer"))
            return
        turned, steps = without_transpose(conversion, parameter, self.shapes)
        known = not (turned and steps)
        parts, layout = division(conversion, steps, self.live.parameters) if known else ((), None)
        kind, in_out = _stored(parameter, turned, conversion.stacks)
        inside = module_of(conversion.targets[0])
        flipped, tower = turned and kind is Experts, tower_of(inside, self.live.seq2seq)
        for names in conversion.sources:  # those of one pattern differ in an index only
            group, role = self._sense(module_of(names[0]), inside, kind, conversion)
            if len(parts) == len(conversion.targets) > 1:
                role = "".join(parts) if set(parts) <= {"q", "k", "v"} else "_".join(parts)
            for name in names:
                self._add(Weight(module_of(name), kind, group, role, tower, in_out, flipped, parts, layout))
                self._compare(name, parameter, turned, conversion)
        relations = related(conversion, steps, self.live.parameters) if known else []
        self.relations.update({path: names for path, names in relations if names != (path,)})
        if not relations and parameter.kind is not Excluded:
            self.unmapped += [module_of(t) for t in conversion.targets]

    def _add(self, weight: Weight) -> None:
        self.weights.setdefault(weight.path, weight)

    def _compare(self, name: str, parameter: Parameter, turned: bool, conversion: Conversion) -> None:
        """Note a weight whose shape in the file is not what the config makes it."""
        shape = self.shapes.get(name)
        swapped = (*parameter.shape[:-2], parameter.shape[-1], parameter.shape[-2])
        if shape and (turned or not conversion.steps) and shape != (swapped if turned else parameter.shape):
            self.misfits.append(name)

    def _sense(self, path: str, inside: str, kind: type[Layer], conversion: Conversion) -> tuple[str, str]:
        """Return the group and the role of a weight, by its names and what the model says of it."""
        parameter = self.live.parameters[conversion.targets[0]]
        names = named(inside)
        outside = self.live.base and not inside.startswith(self.live.prefix + ".")
        if kind in (Linear, Conv1D) and not conversion.stacks:
            gate = "gate" in names[-2:] and parameter.shape[0] in self.live.experts
            if gate or re.search("Router|TopK", parameter.holder) or any("router" in e for e in names):
                return "router", "router"
        if kind is Linear and (names[-1] in HEADS or (outside and len(names) < 3 and not tower_of(inside))):
            return "head", names[-1]
        spellings = (inside, path) if conversion.single and not conversion.stacks else (path, inside)
        senses = [by_name(spelling, kind) for spelling in spellings]
        known = [s for s, spelling in zip(senses, spellings, strict=True) if s[1] != named(spelling)[-1]]
        group, role = (known or senses[1:])[0]
        return ("experts" if parameter.kind is Experts else group), role

    def _tied(self) -> tuple[tuple[str, ...], ...]:
        """Return the groups of paths that share a tensor; what is not on disk keeps its name in memory."""
        groups: dict[str, list[str]] = {}
        for copy, source in self.live.tied:
            first, second = (self._canonical(name) for name in (source, copy))
            if second not in groups.setdefault(first, [first]):
                groups[first].append(second)
        return tuple(tuple(g) for g in groups.values() if len(g) > 1)

    def _canonical(self, name: str) -> str:
        """Return the path on disk of a parameter; one that the file leaves out becomes a layer of its own."""
        path = module_of(name)
        parts = self.relations.get(path, (path,))
        if len(parts) > 1 or parts[0] not in self.weights:
            kind = self.live.parameters[name].kind
            group, role = self._sense(path, path, kind, Conversion(((name,),), (name,)))
            self._add(Weight(path, kind, group, role, tower_of(path, self.live.seq2seq)))
            return path
        return parts[0]

    def _findings(self, architecture: Architecture, claimed: Claimed) -> Iterator[Finding]:
        live, where = self.live, architecture.name
        yield Finding("info", where, f"no family is made for it; its layers are those of {live.cls} in {live.library}")
        for note in live.notes:
            yield Finding("info", where, note)
        yield from about_fused(architecture)
        said = {
            f"not in {live.cls}, and read from names and shapes alone": self.strangers,
            "of another shape than the config says": self.misfits,
            "one weight on disk and another in memory, so they take no adapter": self.ambiguous,
            "names in memory that no weight on disk answers to": [*self.unmapped, *self._wrong(architecture)],
        }
        for what, names in said.items():
            if names:
                yield Finding("warning", where, f"{what}: {some(names)}")
        yield from about_names(architecture, claimed)

    def _wrong(self, architecture: Architecture) -> list[str]:
        """Return the names in memory that the finished rules do not read as they should."""
        wrong = []
        for path, parts in self.relations.items():
            known = architecture.find(path)
            read = (
                tuple(p.replace("{" + known.axis + "}", "{e}") if known.axis else p for p in known.parts)
                if known
                else ()
            )
            stacks = [tuple(_expert(p) for p in parts), parts]
            if path not in self.ambiguous and read not in stacks:
                wrong.append(path)
        return wrong


def _expert(path: str) -> str:
    """The spelling of one expert of a stack: `experts.gate_up[{e}]`, and `experts.gate_up[{e}][q]` of a part of it."""
    whole, bracket, inside = path.partition("[")
    return f"{whole}[{{e}}]{bracket}{inside}"


def _stored(parameter: Parameter, turned: bool, stacks: bool) -> tuple[type[Layer], bool]:
    """Return the kind of a weight on disk that becomes this parameter, and whether a stack is stored (in, out)."""
    if parameter.kind is Experts:
        in_out = parameter.in_out ^ turned
        return ((Conv1D if in_out else Linear), False) if stacks else (Experts, in_out)
    other = {Linear: Conv1D, Conv1D: Linear}
    return (other.get(parameter.kind, parameter.kind) if turned else parameter.kind), False


def about_fused(architecture: Architecture) -> Iterator[Finding]:
    """Say which weights hold several projections that cannot be told apart."""
    divided = {fused.pattern for fused in architecture.fused}
    whole = {y.pattern for y in architecture.layers if y.pattern not in divided and is_fused(y)}
    if whole:
        names = ", ".join(sorted({split(pattern)[-1] for pattern in whole}))
        what = f"fused weights ({names}) are not divided: their layout is unknown"
        yield Finding("info", architecture.name, what)


def about_names(architecture: Architecture, claimed: Claimed) -> Iterator[Finding]:
    """Say what was guessed from names, and which names could not be read."""
    if architecture.default_targets:
        shown = some(architecture.default_targets, 8)
        yield Finding("info", architecture.name, f"the default targets ({shown}) are a guess by name")
    if claimed.odd:
        what = f"names that are no module paths are left out: {some(claimed.odd)}"
        yield Finding("warning", architecture.name, what)


def some(names: Sequence[str], most: int = 3) -> str:
    """Return the first names of a list, and how many more there are."""
    shown = ", ".join(repr(n[:100])[1:-1] for n in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
