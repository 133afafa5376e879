"""What reading formats share: pairing tensors into modules, checking the pairs, and choosing the family.

A format groups its tensors into `Parts` by module; `build` turns them into deltas and findings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from loratool import dtypes, expressions
from loratool.adapter import Finding, Target
from loratool.architecture import Architecture, plainest
from loratool.deltas import Delta, LowRank
from loratool.errors import AmbiguityError, MismatchError
from loratool.patterns import outline, selects
from loratool.readings import Known
from loratool.tensors import TensorRef


@dataclass
class Parts:
    """The tensors found for one module of the file; `others` by the format's names of the parts."""

    down: TensorRef | None = None
    up: TensorRef | None = None
    embedding: bool = False
    others: dict[str, TensorRef] = field(default_factory=dict)

    def missing(self, down: str, up: str) -> str:
        """Return the format's name of the half that is absent, or nothing."""
        return down if self.down is None else up if self.up is None else ""

    @property
    def size(self) -> tuple[int, int] | None:
        """(out, in) of the weight under plain factors, if these are."""
        down, up = self.down, self.up
        if self.embedding or down is None or up is None or len(down.shape) < 2 or len(up.shape) < 2:
            return None
        return up.shape[0], down.shape[1]


def error(where: str, what: str, hint: str = "") -> Finding:
    """Return a finding that stops every command but inspect."""
    return Finding("error", where, what, hint)


def half_a_pair(module: str, missing: str) -> Finding:
    """Return a finding for factors of which one is absent."""
    hint = "save or copy the adapter again: this file is not complete (loratool inspect --check lists what it lacks)"
    return error(module, f"half a pair: {missing} is missing", hint)


def shape_problem(down: TensorRef, up: TensorRef) -> str:
    """Say what is wrong with the shapes or dtypes of a pair, or nothing."""
    shapes = f"down {list(down.shape)}, up {list(up.shape)}"
    if not (dtypes.is_float(down.dtype) and dtypes.is_float(up.dtype)):  # 8-bit floats need scales that no file has
        return f"the factors are no floating-point numbers of 16 bits or more: down {down.dtype}, up {up.dtype}"
    if len(down.shape) < 2 or len(up.shape) != len(down.shape):
        return f"the factors have no matching dimensions: {shapes}"
    if 0 in down.shape or 0 in up.shape:
        return f"rank 0 or an empty factor: {shapes}"
    if down.shape[0] != up.shape[1]:
        return f"the factors have different ranks: {shapes}"
    if any(n != 1 for n in up.shape[2:]):
        return f"the up factor of a convolution must be 1x1: {shapes}"
    return ""


Scaling = Callable[[str, int], float]
_TURNED = "if these are (in, rank) and (rank, out), load them and give them to loratool.from_factors, which takes both"


def add(deltas: dict[Target, tuple[Delta, ...]], target: Target, delta: Delta) -> None:
    """Add a delta to what a target has already."""
    deltas[target] = (*deltas.get(target, ()), delta)


def build(
    modules: Mapping[str, Parts], targets: Mapping[str, Target], names: tuple[str, str], scaling: Scaling
) -> tuple[dict[Target, tuple[Delta, ...]], list[Finding]]:
    """Return the sound deltas of `modules` and an error finding for each of the others.

    `names` are the format's words for down and up; `scaling(module, rank)` is the factor that the format gives it.
    """
    deltas: dict[Target, tuple[Delta, ...]] = {}
    findings: list[Finding] = []
    for module, parts in modules.items():
        missing = parts.missing(*names)
        if missing:
            findings.append(half_a_pair(module, missing))
            continue
        assert parts.down is not None
        assert parts.up is not None
        problem = shape_problem(parts.down, parts.up)
        if problem:
            turned = parts.down.shape[1:] == parts.up.shape[:1]
            findings.append(error(module, problem, _TURNED if turned else ""))
        elif module in targets:
            if targets[module] in deltas:
                findings.append(error(module, f"two modules of the file update {targets[module]}"))
            delta = LowRank(parts.down, parts.up, scaling(module, parts.down.shape[0]))
            deltas[targets[module]] = (delta,)
    return deltas, findings


class Readings(NamedTuple):
    """Who explains the names of a file: the families that agree, the plainest first, and what each module is to them.

    `rivals` explain all names as well as these, and mean other modules by them, or write them otherwise.
    """

    families: tuple[str, ...] = ()
    known: Mapping[str, Known] = {}
    rivals: tuple[str, ...] = ()


def of_these_sizes(
    architectures: Sequence[Architecture],
    sizes: Mapping[str, tuple[int, int]],
    readings: Callable[[Architecture, str], list[Known]],
) -> list[Architecture]:
    """Return the families whose conditions on shapes hold of the weights that a file's modules update; else all.

    `sizes` are (out, in) of the weights, by module.
    """
    one: dict[str, str] = (
        {outline(m): m for m in reversed(list(sizes))} if any(a.match.shapes for a in architectures) else {}
    )
    some = {m: sizes[m] for m in one.values()}
    return [a for a in architectures if _shapes_hold(a, some, readings)] or list(architectures)


def _shapes_hold(
    architecture: Architecture,
    sizes: Mapping[str, tuple[int, int]],
    readings: Callable[[Architecture, str], list[Known]],
) -> bool:
    seen: dict[str, bool] = {}
    for module, (out, inp) in sizes.items() if architecture.match.shapes else ():
        known = readings(architecture, module)
        for pattern, condition in architecture.match.shapes if known else ():
            if pattern not in seen and any(selects(pattern, part, known[0].component) for part in known[0].parts):
                try:
                    seen[pattern] = expressions.holds(condition, {"out": out, "inp": inp})
                except MismatchError:
                    seen[pattern] = False
        if len(seen) == len(architecture.match.shapes):
            break
    return all(seen.values())


def resolve(
    modules: Iterable[str],
    architectures: Sequence[Architecture],
    readings: Callable[[Architecture, str], list[Known]],
    where: str,
) -> Readings:
    """Ask every family what the modules are; nothing is found where no family explains all of them.

    `readings(architecture, module)` lists what the module may be; two readings in one family are an error. Of families
    that disagree those are meant whose own spelling is nearest. A mixture of experts has tens of thousands of modules:
    the candidates are judged by two modules of each kind, and what the chosen one says is then asked for each.
    """
    modules = list(modules)
    some: dict[str, list[str]] = {}
    for module in modules:
        some.setdefault(outline(module), []).append(module)
    samples = [m for alike in some.values() for m in {alike[0], alike[-1]}]
    found: dict[str, dict[str, Known]] = {}
    unclear: dict[str, str] = {}  # family -> what a name can be in it
    for architecture in architectures if modules else ():
        mapping = {}
        for module in samples:
            known = readings(architecture, module)
            if not known:
                break
            mapping[module] = known[0]
            if len({(k.component, k.parts) for k in known}) > 1:
                paths = " or ".join(sorted(str(Target(k.component, k.parts)) for k in known))
                unclear[architecture.name] = f"{module!r} can be {paths}"
        else:
            found[architecture.name] = mapping
    clear = [name for name in found if name not in unclear]
    if found and not clear:
        hint = "the base tells: merge reads it, and convert and compare take --base MODEL"
        raise AmbiguityError(unclear[next(iter(found))], where=where, hint=hint)
    if not found:
        return Readings()
    distances = {name: sum(k.distance for k in found[name].values()) for name in found}
    nearest = [a for a in architectures if distances.get(a.name) == min(distances[n] for n in clear)]
    targets = {
        a.name: {m: (k.component, k.parts, k.swap, a.kohya_prefix(k.component)) for m, k in found[a.name].items()}
        for a in nearest
    }
    ordered = plainest(nearest, architectures)
    first = next(a for a in ordered if a.name in clear)
    agreed = tuple(a.name for a in ordered if a.name in clear and targets[a.name] == targets[first.name])
    every = {m: known[0] for m in modules if (known := readings(first, m))}
    if len(every) < len(set(modules)):
        others = [a for a in architectures if a is not first]
        return resolve(modules, others, readings, where)
    return Readings(agreed, every, tuple(a.name for a in ordered if a.name not in agreed))
