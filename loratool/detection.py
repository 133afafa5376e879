"""Which family a model is of: by `--arch`, by its config, or by the names and shapes of its tensors.

Detection keeps a set of candidates. Several families may share every name that a model has (Mistral has LLaMA's); that
matters only where they would read it differently, and then the command says so and asks for `--arch`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from loratool import expressions
from loratool.adapter import Finding
from loratool.architecture import Architecture, Known, plainest
from loratool.errors import AmbiguityError
from loratool.layers import Excluded
from loratool.patterns import selects
from loratool.plugins import Plugins
from loratool.tensors import TensorRef, TensorSource, module_of


class Family(NamedTuple):
    """The architecture of a base, how it was found, and what a person should know about that."""

    architecture: Architecture
    by: str
    findings: tuple[Finding, ...] = ()


def matrices(tensors: Mapping[str, TensorRef]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what a family has to explain, by module path: weights of two or more dimensions."""
    return {module_of(n): ref.shape for n, ref in tensors.items() if len(ref.shape) > 1 and n.endswith(".weight")}


def family_of(base: TensorSource, plugins: Plugins, name: str = "") -> Family | None:
    """Return the family of a base checkpoint, or None if no installed one fits.

    By names a family must explain every weight of two or more dimensions, and its conditions on shapes must hold.
    """
    if name:
        return Family(plugins.architecture(name), "--arch")
    config = base.config or {}
    weights = matrices(base.tensors)
    kind = config.get("model_type") or config.get("_class_name")
    every = plugins.architectures()
    named = [a for a in every if config and a.match.fits(config)]
    if named:
        chosen, findings = _by_rank(named, plugins)
        fitting = chosen if len(chosen) == 1 else [a for a in chosen if fits(a, weights)] or chosen
        return Family(_agreed(fitting, weights, base.path, every), f"model_type {kind}", findings)
    fitting = [a for a in every if weights and fits(a, weights)]
    if not fitting:
        return None
    family = _agreed(fitting, weights, base.path, every)
    what = f"no family names the model_type {kind!r}; {family.name} knows every layer"
    return Family(family, "tensor names", (Finding("info", base.path, what),) if kind else ())


def recognise(base: TensorSource, plugins: Plugins, name: str = "") -> Family:
    """Return the family of a base; of a model that no plugin describes what its config, else its headers, say."""
    family = family_of(base, plugins, name)
    if family is not None:
        return family
    from loratool import discovery  # asks transformers

    shapes = {n: ref.shape for n, ref in base.tensors.items()}
    found, findings = discovery.from_config(base.config, shapes) if base.config else (None, ())
    if found is not None:
        return Family(found, "config.json, by way of the library that knows it", findings)
    found, more = discovery.from_headers(shapes)
    return Family(found, "names and shapes alone", (*findings, *more))


def fits(architecture: Architecture, weights: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a family explains every weight, and its conditions on shapes hold."""
    return architecture.explains(weights) and all(
        _shape_holds(architecture, pattern, condition, weights) for pattern, condition in architecture.match.shapes
    )


def _shape_holds(
    architecture: Architecture, pattern: str, condition: str, weights: Mapping[str, tuple[int, ...]]
) -> bool:
    for path, shape in weights.items():
        known = architecture.find(path)
        if known and any(selects(pattern, part, known.component) for part in known.parts):
            out, inp = (shape[1], shape[0]) if known.layer.transposed else shape[:2]
            return expressions.holds(condition, {"out": out, "inp": inp})
    return True  # the model has no such layer


def _by_rank(named: Sequence[Architecture], plugins: Plugins) -> tuple[list[Architecture], tuple[Finding, ...]]:
    """Apply the written rule: the more specific match wins, then a file given by hand, a third party, a built-in."""
    specific = [a for a in named if a.match.when] or list(named)
    best = [a for a in specific if not any(plugins.beats(b.name, a.name) for b in specific)]
    if len(best) < len(specific):
        losers = ", ".join(a.name for a in specific if a not in best)
        return best, (
            Finding("warning", best[0].name, f"chosen over the built-in {losers}, which fits the config too"),
        )
    return best, ()


def _agreed(
    fitting: Sequence[Architecture], weights: Iterable[str], where: str, every: Sequence[Architecture]
) -> Architecture:
    """Return the family that is meant: of those whose spelling is nearest the plainest, if all read the file alike.

    What a family calls a layer does not matter here, only how its bytes are to be taken.
    """
    known = {a.name: [a.find(path) for path in weights] for a in fitting}
    distance = {name: sum(k.distance for k in found if k) for name, found in known.items()}
    nearest = plainest([a for a in fitting if distance[a.name] == min(distance.values())], every)
    readings = {a.name: [taken(k) for k in known[a.name]] for a in nearest}
    mine = readings[nearest[0].name]
    if any(one and two and one != two for other in readings.values() for one, two in zip(mine, other, strict=True)):
        raise AmbiguityError(
            f"this fits {', '.join(readings)}, which read it differently",
            where=where,
            hint=f"choose: --arch {nearest[0].name}",
        )
    return nearest[0]


def taken(known: Known | None) -> object:
    """Return what decides how the bytes of a weight are taken; nothing where no adapter can be on it."""
    if known is None or isinstance(known.layer, Excluded):
        return None
    return known.layer.transposed, len(known.parts), known.axis
