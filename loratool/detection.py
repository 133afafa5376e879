"""Which family a model is of: by `--arch`, by its config, or by the names and shapes of its tensors.

Detection keeps a set of candidates. Several families may share every name that a model has (Mistral has LLaMA's); that
matters only where they would read it differently, and then the command says so and asks for `--arch`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from loratool import expressions
from loratool.adapter import Adapter, Finding, Target
from loratool.architecture import Architecture, plainest
from loratool.deltas import Delta
from loratool.errors import AmbiguityError, FormatError, LoratoolError, MismatchError
from loratool.layers import Excluded
from loratool.patterns import outline, selects
from loratool.plugins import Plugins
from loratool.readings import Known
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

    By names a family must explain every weight of two or more dimensions, and its conditions on shapes must hold. The
    architecture knows which of its components the base is.
    """
    family = _family_of(base, plugins, name)
    if family is None:
        return None
    classes = (base.config or {}).get("architectures")
    model_class = str(classes[0]) if isinstance(classes, list) and classes else ""
    return family._replace(architecture=family.architecture.holding(model_class, matrices(base.tensors)))


def of_config(path: str, config: Mapping[str, Any], plugins: Plugins, name: str = "") -> Architecture | None:
    """Return the family of a model of which nothing but the config is read."""
    family = family_of(TensorSource(path, {}, {}, config), plugins, name)
    return family.architecture if family else None


def _family_of(base: TensorSource, plugins: Plugins, name: str) -> Family | None:
    if name:
        return Family(plugins.architecture(name), "--arch")
    config = base.config or {}
    weights = matrices(base.tensors)
    kind = config.get("model_type") or config.get("_class_name")
    every = plugins.architectures()
    named, strange = named_by(config, plugins)
    if named:
        chosen, findings = _by_rank(named, plugins)
        findings = (*strange, *findings)
        fitting = chosen if len(chosen) == 1 else [a for a in chosen if fits(a, weights)] or chosen
        family = _agreed(fitting, weights, base.path, every)
        return Family(family, f"model_type {kind}", (*findings, *_misnamed(base, kind, family, every)))
    fitting = [a for a in every if weights and fits(a, weights)]
    if not fitting:
        return None
    family = _agreed(fitting, weights, base.path, every)
    what = f"no family names the model_type {kind!r}; {family.name} knows every layer"
    return Family(family, "tensor names", (*strange, *((Finding("info", base.path, what),) if kind else ())))


def named_by(config: Mapping[str, Any], plugins: Plugins) -> tuple[list[Architecture], list[Finding]]:
    """Return the families that a config is of; and a finding for each whose condition cannot be asked of it.

    One family's mistake must not stop the commands of the others.
    """
    named, findings = [], []
    for family in plugins.architectures() if config else ():
        try:
            if family.match.fits(config):
                named.append(family)
        except LoratoolError as problem:
            owner = plugins.owners.get(family.name, "")
            what = (
                f"its condition {family.match.when!r} cannot be asked of this config, so it is passed over: {problem}"
            )
            findings.append(Finding("warning", f"family {family.name} ({owner})", what, "choose it with --arch"))
    return named, findings


def by_names_of(
    adapters: Iterable[Adapter], problem: MismatchError, base: TensorSource, chosen: Architecture, plugins: Plugins
) -> MismatchError:
    """Return why adapters do not fit a base, with the family that the names of one of them are of, where that can help.

    A relative's names may mean the same layers (Qwen 1 on Qwen 2), and a model_type may stand for two structures (phi).
    """
    every = plugins.architectures()
    some = _one_of_each(base)
    fitting = plainest([a for a in every if a.name != chosen.name and some and fits(a, some)], every)
    misread = not fits(chosen, some)
    for adapter in (a for a in adapters if a.origin.format and (misread or not a.families)):
        path = adapter.origin.path
        others = _families_of(adapter, every, plugins)
        both = next((a.name for a in fitting if _is_sized_for(adapter, base, a, plugins)), "")
        if both:
            hint = f"{both} knows the names of {path} and every weight of this base: --arch {both}"
            return MismatchError(problem.what, where=problem.where, hint=hint)
        if not adapter.families and others:
            hint = (
                f"the names of {path} are those of {' or '.join(others[:3])}, and this base was read as {chosen.name}"
            )
            return MismatchError(problem.what, where=problem.where, hint=f"{hint}: is it the right one?")
    return problem


def _is_sized_for(adapter: Adapter, base: TensorSource, family: Architecture, plugins: Plugins) -> bool:
    """Whether a family explains the names of an adapter that was read otherwise, and its updates fit the weights.

    The names alone may mean another model: GPT-2's are Qwen's, too.
    """
    read = _read(adapter, (family,), plugins)
    if read is None or not read.families:
        return False
    sizes: dict[str, list[tuple[int, ...]]] = {}  # (out, in) of a path, and of the parts of a fused one
    for path, shape in matrices(base.tensors).items():
        known = family.find(path)
        if known and len(known.parts) == 1:
            part = known.parts[0]
            for name in {part, part.partition("[")[0]}:
                sizes.setdefault(name, []).append(shape[1::-1] if known.layer.transposed else shape[:2])

    def fits_there(target: Target, delta: Delta) -> bool:
        parts = [size for part in target.parts for size in sizes.get(part, ())]
        whole = (sum(out for out, _ in parts), parts[0][1]) if parts else ()
        return not all(part in sizes for part in target.parts) or 0 in delta.shape or delta.shape[:2] == whole

    return all(fits_there(target, delta) for target, deltas in read.deltas.items() for delta in deltas)


def _read(adapter: Adapter, architectures: tuple[Architecture, ...], plugins: Plugins) -> Adapter | None:
    source = TensorSource(adapter.origin.path, adapter.tensors, adapter.metadata, adapter.origin.config or None)
    try:
        return plugins.format(adapter.origin.format).read(source, architectures)
    except LoratoolError:
        return None


def _families_of(adapter: Adapter, architectures: tuple[Architecture, ...], plugins: Plugins) -> tuple[str, ...]:
    """Return which of some families explain the names of an adapter that was read as one for another family."""
    read = _read(adapter, architectures, plugins)
    return read.families if read else ()


def _one_of_each(base: TensorSource) -> dict[str, tuple[int, ...]]:
    """Return the weights of a base, of those that differ only in the numbers in their names one."""
    kinds = {(outline(path), shape): path for path, shape in matrices(base.tensors).items()}
    return {path: shape for (_, shape), path in kinds.items()}


def _misnamed(base: TensorSource, kind: object, chosen: Architecture, every: Sequence[Architecture]) -> list[Finding]:
    """Say so where a config names a family that does not know the weights beside it, and another one does."""
    some = _one_of_each(base)
    unknown = next((path for path in some if chosen.find(path) is None), "")
    fitting = plainest([a for a in every if unknown and fits(a, some)], every)
    if not fitting:
        return []
    what = f"the config says {kind}, and the {chosen.name} family does not know {unknown}; {fitting[0].name} knows all"
    return [Finding("warning", base.path, what, f"--arch {fitting[0].name}")]


def recognise(base: TensorSource, plugins: Plugins, name: str = "") -> Family:
    """Return the family of a base; of a model that no plugin describes what its config, else its headers, say."""
    family = family_of(base, plugins, name)
    if family is not None:
        return family
    from loratool import discovery  # asks transformers

    shapes = {n: ref.shape for n, ref in base.tensors.items()}
    _, strange = named_by(base.config or {}, plugins)
    found, findings = discovery.from_config(base.config, shapes) if base.config else (None, ())
    if found is not None:
        return Family(found, "config.json, by way of the library that knows it", (*strange, *findings))
    found, more = discovery.from_headers(shapes)
    return Family(found, "names and shapes alone", (*strange, *findings, *more))


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
            try:
                return expressions.holds(condition, {"out": out, "inp": inp})
            except MismatchError:  # such as a width that the condition divides by another
                return False
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


def as_model(base: TensorSource, plugins: Plugins) -> FormatError | None:
    """Return why a source is no adapter where it is a model instead, and what can be asked of one; else None."""
    config, family = base.config or {}, family_of(base, plugins)
    kind = config.get("model_type") or config.get("_class_name") or (family.architecture.name if family else "")
    if not kind or any(f.detect(base) for f in plugins.formats()):
        return None
    return FormatError(
        f"this is a model ({kind}, {len(base.tensors)} tensors), and no adapter in a format that loratool knows",
        where=base.path,
        hint=f"loratool arch show {base.path} lists its layers, loratool extract {base.path} --base BASE -o OUT makes "
        f"an adapter of it, loratool inspect {base.path} --check --base BASE says what a merge changed; loratool "
        "formats lists what an adapter can be",
    )


def read_as(adapter: Adapter, architecture: Architecture, plugins: Plugins) -> Adapter:
    """Return an opened adapter as one for this family: read again where others claimed its names.

    It is not where it is no longer what its tensors say: somebody has changed it since.
    """
    settled = architecture.name in adapter.families and not adapter.rivals and not architecture.at_hand
    if settled or not adapter.origin.format:
        return adapter
    format = plugins.format(adapter.origin.format)
    source = TensorSource(adapter.origin.path, adapter.tensors, adapter.metadata, adapter.origin.config or None)
    again = format.read(source, (architecture,))
    if _updates(again) == _updates(adapter):
        return again
    try:
        unchanged = format.read(source, plugins.architectures()).deltas == adapter.deltas
    except AmbiguityError:
        unchanged = False
    return again if unchanged else adapter


def _updates(adapter: Adapter) -> Counter[Delta]:
    """The updates of an adapter, whatever they are called."""
    return Counter(delta for deltas in adapter.deltas.values() for delta in deltas)
