"""For the tests of a family's author: does an Architecture explain a model, and does it contradict itself?

    from loratool.testing import check_architecture, shapes_of

    def test_my_family_fits_my_model():
        assert check_architecture(MY_FAMILY, shapes_of("path/to/model")) == []

No torch, no weights: names and shapes are enough. `loratool arch check` says the same on the command line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loratool import layouts
from loratool.adapter import Finding
from loratool.architecture import Architecture
from loratool.errors import LoratoolError, MismatchError
from loratool.expressions import AbsentError, holds
from loratool.layers import Excluded, Experts
from loratool.operations.rules import filled, rule_problems
from loratool.operations.survey import is_transposed
from loratool.patterns import flatten, parse, selects
from loratool.readings import Known
from loratool.tensors import module_of

Shapes = Mapping[str, tuple[int, ...]]
_DIMENSIONS = {"linear": (2,), "Conv1D": (2,), "embedding": (2,), "conv1d": (2, 3), "conv2d": (2, 4), "conv3d": (2, 5)}


def shapes_of(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors of a model by name, from the headers: a folder or a .safetensors file."""
    from loratool.storage import checkpoint

    return {name: ref.shape for name, ref in checkpoint.open_base(str(path)).tensors.items()}


def config_of(path: str | Path) -> dict[str, Any]:
    """Return the config.json of a model's folder; empty without one."""
    from loratool.storage import jsonfile

    place = Path(path) / "config.json"
    return dict(jsonfile.read(place)) if place.is_file() else {}


def check_architecture(
    architecture: Architecture, shapes: Shapes, config: Mapping[str, Any] | None = None
) -> list[str]:
    """Return what is wrong with a family, in sentences; an empty list if nothing is.

    `shapes` are the tensors on disk of a model, or of several that together have every layer of the family:
    `shapes_of(one) | shapes_of(other)`. Without any, only what the family says of itself is checked. `config` is the
    model's config.json, which the sizes of fused weights come from; without it those that need one are not checked.
    """
    found = problems(architecture, shapes, config)
    if shapes and not _contradictions(architecture):
        found += unmatched(architecture, shapes)
    return [f"{finding.where}: {finding.what}" for finding in found]


def problems(architecture: Architecture, shapes: Shapes, config: Mapping[str, Any] | None = None) -> list[Finding]:
    """Return error findings: contradictions in a family, and what of a model it does not explain."""
    contradictions = _contradictions(architecture)
    if contradictions:
        return contradictions
    family = _completed(architecture)
    return _folded(
        [
            *rule_problems(family),
            *_names(family, shapes),
            *_dimensions(family, shapes),
            *_flat_names(family, shapes),
            *_fused(family, shapes, config),
            *_targets(family),
        ]
    )


def _contradictions(architecture: Architecture) -> list[Finding]:
    """Return what makes a family unusable, whatever the model; nothing else can be asked of it then."""
    try:
        architecture.validate_types()
        family = _completed(architecture)
        family.validate()
    except LoratoolError as problem:
        return [Finding("error", architecture.name, problem.what, problem.hint)]
    return []


def _folded(found: list[Finding]) -> list[Finding]:
    """Return one finding for those that differ only in the numbers of layers."""
    kinds: dict[tuple[str, str], list[Finding]] = {}
    for finding in found:
        where, what = (re.sub(r"(?<=[.\[_])\d+(?=[.\]_]|$)", "*", text) for text in (finding.where, finding.what))
        kinds.setdefault((where, what), []).append(finding)
    return [
        first if len(alike) == 1 else first._replace(what=f"{first.what} (and {len(alike) - 1} more like this)")
        for alike in kinds.values()
        for first in alike[:1]
    ]


def unmatched(architecture: Architecture, shapes: Shapes) -> list[Finding]:
    """Return a note for each pattern of a family that matches no tensor: a misspelling, or a layer that is optional.

    What a family shares with another is that family's; of tied weights a file holds one, of the components often one.
    Excluded weights are a matter of the file: what is misspelt there is a weight that no layer explains.
    """
    family = _completed(architecture)
    found = [known for _, known in _known(family, shapes) if known]
    paths = {p for known in found for p in _paths(known)}
    components = {known.component for known in found} or {*family.components}
    present = {skeleton.text for skeleton, _ in family.skeletons() if any(skeleton.match(p) is not None for p in paths)}
    tied = {path for group in family.tied if paths & set(group) for path in group}
    parent = _parent(architecture)
    inherited = {skeleton.text for skeleton, _ in parent.skeletons()} if parent else set()
    return [
        Finding("info", skeleton.text, "matches no tensor")
        for skeleton, layer in family.skeletons()
        if skeleton.text not in present | tied | inherited
        and layer.component in components
        and not isinstance(layer, Excluded)
    ]


def _parent(architecture: Architecture) -> Architecture | None:
    from loratool.plugins import installed

    return installed().architecture(architecture.like) if architecture.like else None


def _completed(architecture: Architecture) -> Architecture:
    """Return a family with what it shares with the one it is like, unless it has that already."""
    parent = _parent(architecture)
    if parent is None or set(parent.layers) <= set(architecture.layers):
        return architecture
    return architecture.completed(parent)


def _known(family: Architecture, shapes: Shapes) -> Iterator[tuple[str, Known | None]]:
    """Yield what each tensor of two or more dimensions is, one layer of a stack after another."""
    for name, shape in shapes.items():
        if len(shape) > 1:
            known = family.find(module_of(name))
            stacked = known is not None and known.axis and len(shape) > 2
            for index in range(shape[0]) if stacked else (0,):
                yield name, known.at(index) if known is not None and stacked else known


def _paths(known: Known | None) -> list[str]:
    return [part.partition("[")[0] for part in known.parts] if known else []


def _names(family: Architecture, shapes: Shapes) -> Iterator[Finding]:
    """Weights that the family does not know, and weights that are one layer to it."""
    claimed: dict[tuple[str, str], str] = {}
    for name, known in _known(family, shapes):
        if known is None:
            what = f"no layer explains this weight ({' x '.join(map(str, shapes[name]))})"
            yield Finding("error", name, what, "add a layer for it, or Excluded(...) if it carries no adapter")
            continue
        for part in known.parts:
            other = claimed.setdefault((known.component, part), name)
            if other != name:
                yield Finding("error", name, f"is one layer with {other}: both mean {part}")


def _dimensions(family: Architecture, shapes: Shapes) -> Iterator[Finding]:
    for name, shape in shapes.items():
        known = family.find(module_of(name)) if len(shape) > 1 else None
        if known is None or isinstance(known.layer, Excluded):
            continue
        kind, size = known.layer.kind, len(shape)
        wanted: tuple[int, ...] = _DIMENSIONS.get(kind, (size,))
        if isinstance(known.layer, Experts) or (known.axis and size > 2):
            wanted = (3,)
        if size not in wanted:
            what = f"has {size} dimensions, and the family calls it {'an' if kind[0] in 'ae' else 'a'} {kind} layer"
            yield Finding("error", name, what)
        elif known.axis and len(known.parts) > 1 and shape[1] % len(known.parts):
            yield Finding("error", name, f"{shape[1]} rows do not divide into {' and '.join(known.parts)}")


def _flat_names(family: Architecture, shapes: Shapes) -> Iterator[Finding]:
    """Names that kohya's spelling, with underscores for dots, does not give back."""
    paths = {(k.component, p) for _, k in _known(family, shapes) if k for p in k.parts}
    layers = [(s, y) for s, y in family.skeletons() if not isinstance(y, (Excluded, Experts))]
    paths |= {(layer.component, filled(skeleton)) for skeleton, layer in layers}
    for component, path in sorted(paths):
        known = family.find(path, component)
        if "[" in path or known is None or isinstance(known.layer, Excluded):
            continue
        found = family.unflatten(f"{family.kohya_prefix(component)}_{flatten(path)}")
        if [(k.component, k.path) for k in found] != [(component, path)]:
            read = " or ".join(sorted(k.path for k in found)) or "nothing"
            yield Finding("error", path, f"its flat name {flatten(path)} is read as {read}")


def _fused(family: Architecture, shapes: Shapes, config: Mapping[str, Any] | None) -> Iterator[Finding]:
    """Fused weights whose rows do not divide among the parts; and parts that a rule does not lead to."""
    for name, shape in shapes.items():
        known = family.find(module_of(name)) if len(shape) > 1 else None
        if known is None or len(known.parts) > 1 or isinstance(known.layer, Excluded):
            continue
        stacked = bool(known.axis) and len(shape) > 2
        inner = shape[1:] if stacked else shape
        out = inner[1 if is_transposed(known, inner, stacked, config or {}) else 0]
        path = known.parts[0].partition("[")[0]
        for fused in family.fused:
            fits = any(skeleton.match(path) is not None for skeleton in parse(fused.pattern))
            if fused.component == known.component and fits and holds(fused.when, config or {}):
                try:
                    rows = fused.layout.rows(out, config or {})
                    if sum(map(layouts.count, rows)) != out or (fused.parts and len(rows) != len(fused.parts)):
                        what = f"{len(rows)} parts of {sum(map(layouts.count, rows))} rows, not of {out}"
                        yield Finding("error", name, f"the layout {fused.layout.name} gives {what}")
                except AbsentError as problem:
                    if config is not None:
                        yield Finding(
                            "error", name, f"the layout {fused.layout.name} does not work out: {problem.what}"
                        )
                except MismatchError as problem:
                    yield Finding("error", name, f"the layout {fused.layout.name} does not work out: {problem.what}")
                break


def _targets(family: Architecture) -> Iterator[Finding]:
    paths = [(filled(skeleton), layer.component) for skeleton, layer in family.skeletons()]
    for target in family.default_targets:
        if not any(selects(target, path, component) for path, component in paths):
            yield Finding("error", target, "is a default target and selects no layer")
