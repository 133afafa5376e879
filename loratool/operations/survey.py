"""What a family says of a base: its layers, the modules they are in memory, and what an adapter on them weighs.

Pure functions of an Architecture and the shapes of the tensors on disk. PEFT adapts the *live* model, so sizes are
those of the modules that transformers or diffusers make of the weights: one stacked parameter of 128 experts' gate and
up, where the file has 256 matrices.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple, TypeAlias

from loratool import expressions, layouts
from loratool.adapter import Finding
from loratool.architecture import Architecture
from loratool.errors import MismatchError
from loratool.layers import Excluded, Experts, Layer
from loratool.patterns import Lexicon, Skeleton, parse_rule, selects, split
from loratool.readings import Known
from loratool.tensors import TensorSource, module_of

Shapes = Mapping[str, tuple[int, ...]]
RANKS = (4, 8, 16, 32, 64)
_FIRST = 900_000_001  # stands for the first index of a path while it is renamed
_LINEAR = ("linear", "Conv1D", "experts", "matrix")
#: What PEFT will not adapt, as these models' kernels read the weights past it (peft: tuners/tuners_utils.py)
_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_REFUSED_BY_PEFT = ("out_proj", "conv1d")
_NEVER = ("embedding", "head", "router", "position")  # what all-linear leaves out


class Weight(NamedTuple):
    """A matrix that a base holds, by its canonical path: out x inputs x kernel, `copies` times in a stack."""

    tensor: str
    component: str
    path: str
    layer: Layer
    role: str
    skeleton: Skeleton
    out: int
    inputs: int
    kernel: int = 1
    copies: int = 1

    @property
    def indices(self) -> tuple[int, ...]:
        """The numbers in the path."""
        return self.skeleton.match(self.path) or ()

    @property
    def is_linear(self) -> bool:
        """Whether this is a linear map; a 1x1 convolution that is stored as a matrix is one."""
        return self.layer.kind in _LINEAR or (self.layer.kind.startswith("conv") and self.kernel == 0)


class Module(NamedTuple):
    """A module of the live model, or a parameter that PEFT takes by itself, and the weights that it holds.

    `template` is its name with the position of each index in its place.
    """

    name: str
    template: tuple[str | int, ...]
    is_parameter: bool
    weights: tuple[Weight, ...]
    out: int
    inputs: int
    kernel: int
    copies: int

    def parameters(self, rank: int) -> int:
        """The numbers in an adapter of this rank: down (rank, inputs x kernel) and up (out, rank), for each copy."""
        return self.copies * rank * (self.inputs * self.kernel + self.out)


@dataclass(frozen=True)
class Survey:
    """A base in the eyes of a family: the shapes of its tensors by name, its config, and what follows from them."""

    architecture: Architecture
    shapes: Shapes
    config: Mapping[str, Any]

    @cached_property
    def weights(self) -> dict[str, list[Weight]]:
        """What each tensor of two or more dimensions holds; nothing where the family does not know it."""
        lexicons = _lexicons(self.architecture)
        return {
            name: list(_weights_of(name, shape, self.architecture, lexicons, self.config))
            for name, shape in self.shapes.items()
            if len(shape) > 1
        }

    @cached_property
    def unknown(self) -> list[str]:
        """The tensors of two or more dimensions that the family does not know."""
        return [name for name, weights in self.weights.items() if not weights]

    @property
    def model_class(self) -> str:
        """The class that the config names."""
        classes = self.config.get("architectures")
        return str(classes[0]) if isinstance(classes, list) and classes else ""

    @cached_property
    def modules(self) -> list[Module]:
        """The modules and parameters in memory that hold the weights which can carry an adapter."""
        return _modules(self)

    def selected(self, preset: str) -> list[Module]:
        """The modules of a preset: those that hold a weight of it."""
        wanted = PRESETS[preset]
        main = main_towers(self.modules)
        found = [m for m in self.modules if any(wanted(self.architecture, w, main) for w in m.weights)]
        return [m for m in found if not self.is_refused(m)]

    def is_refused(self, module: Module) -> bool:
        """Whether PEFT will not adapt this module, though it is one."""
        return self.config.get("model_type") in _MAMBA and module.template[-1] in _REFUSED_BY_PEFT


def survey_of(model: TensorSource, architecture: Architecture) -> Survey:
    """Return what the family says of an opened model, less the buffers that some files hold beside the weights."""
    buffers = ("I64", "BOOL")  # positions, indices and masks
    shapes = {name: ref.shape for name, ref in model.tensors.items() if ref.dtype not in buffers}
    return Survey(architecture, shapes, model.config or {})


_Lexicons: TypeAlias = Mapping[str, Lexicon[tuple[Skeleton, Layer]]]


def _lexicons(architecture: Architecture) -> _Lexicons:
    entries: dict[str, list[tuple[str, tuple[Skeleton, Layer]]]] = {c: [] for c in architecture.components}
    for skeleton, layer in architecture.skeletons():
        entries[layer.component].append((skeleton.text, (skeleton, layer)))
    return {component: Lexicon(pairs) for component, pairs in entries.items()}


def _weights_of(
    name: str, shape: tuple[int, ...], family: Architecture, lexicons: _Lexicons, config: Any
) -> Iterator[Weight]:
    known = family.find(module_of(name))
    if known is None:
        return
    stacked = bool(known.axis) and len(shape) > 2
    one = known.at(0) if known.axis else known
    inner = shape[1:] if stacked else shape
    turned = is_transposed(known, inner, stacked, config)
    out, inputs = (inner[1], inner[0]) if turned else inner[:2]
    for path in one.parts:
        whole = path.partition("[")[0]
        found = lexicons[known.component].find(whole)
        if found is not None:
            skeleton, layer = found.value
            kernel = prod(inner[2:]) if inner[2:] else 0 if _is_conv(layer) else 1
            yield Weight(
                name,
                known.component,
                whole,
                layer,
                layer.role(skeleton),
                skeleton,
                out // len(one.parts),
                inputs,
                kernel,
                shape[0] if stacked else 1,
            )


def _is_conv(layer: Layer) -> bool:
    return layer.kind.startswith("conv")


def is_transposed(known: Known, shape: tuple[int, ...], stacked: bool, config: Mapping[str, Any]) -> bool:
    """Whether the file has (in, out); a stack of experts may have been saved in the order of the memory."""
    layer = known.layer
    if not isinstance(layer, Experts):
        return layer.transposed and not stacked
    if layer.flipped_in_memory and layer.inputs and shape[0] != shape[1]:
        try:
            inputs = expressions.size(layer.inputs, config)
        except MismatchError:
            return layer.transposed
        return shape[0] == inputs if inputs in shape else layer.transposed
    return layer.transposed


# -- In memory --------------------------------------------------------------------------------------------------------


class _Spelling(NamedTuple):
    """A name in memory of the layers of one skeleton: `part` of such a layer lies there, alone or with others."""

    template: tuple[str | int, ...]
    part: str = ""
    stacked: bool = False

    def fill(self, indices: Sequence[int]) -> str:
        return ".".join(e if isinstance(e, str) else str(indices[e]) for e in self.template)


def _spellings(survey: Survey, skeleton: Skeleton, component: str) -> list[_Spelling]:
    """Return the names that the layers of a skeleton have in memory: one, or one for each part of a fused weight."""
    family = survey.architecture
    path = skeleton.fill(range(_FIRST, _FIRST + len(skeleton.variables)))
    found = []
    for rule in (r for text in family.memory for r in parse_rule(text)):
        for part in rule.parts:
            whole, bracket, inside = part.text.partition("[")
            if not (rule.axis or len(rule.parts) > 1 or bracket) or whole.endswith("*"):
                continue  # one name for one layer is what Architecture.in_memory answers
            pattern = Skeleton(split(whole), 0)
            indices = pattern.match(path)
            if indices is not None:
                bound = dict(zip(pattern.variables, indices, strict=True))
                name = rule.left.fill(bound.get(v, 0) for v in rule.left.variables)
                inside = inside.removesuffix("]").rpartition("[")[2] if bracket else ""
                found.append((_bare(family, component, name, survey.model_class), inside, bool(rule.axis)))
    if not found:
        found = [(family.in_memory(component, path, survey.model_class), "", False)]
    return [_Spelling(_template(name), part, stacked) for name, part, stacked in found]


def _template(name: str) -> tuple[str | int, ...]:
    return tuple(int(e) - _FIRST if e.isdecimal() and len(e) == 9 else e for e in split(name))


def _bare(family: Architecture, component: str, path: str, model_class: str) -> str:
    """Return a name in memory less the prefix, where the live model has none."""
    if family.is_bare(component, model_class):
        for prefix in family.prefixes.get(component, ()):
            if path.startswith(prefix):
                return path[len(prefix) :]
    return path


def _is_beyond(weight: Weight, config: Mapping[str, Any]) -> bool:
    """Whether this is of a layer behind the last, which predicts a second token and is not in the live model."""
    last = config.get("num_hidden_layers")
    if not config.get("num_nextn_predict_layers") or not isinstance(last, int):
        return False
    return weight.skeleton.elements[:2] == ("model", "layers") and weight.indices[0] >= last


def _modules(survey: Survey) -> list[Module]:
    spellings: dict[tuple[str, Skeleton], list[_Spelling]] = {}
    held: dict[str, tuple[_Spelling, list[tuple[Weight, int]]]] = {}
    for weight in (w for weights in survey.weights.values() for w in weights):
        if isinstance(weight.layer, Excluded) or _is_beyond(weight, survey.config):
            continue
        key = weight.component, weight.skeleton
        if key not in spellings:
            spellings[key] = _spellings(survey, weight.skeleton, weight.component)
        rows = _rows_of_parts(survey, weight) if len(spellings[key]) > 1 else {}
        for spelling in spellings[key]:
            name = spelling.fill(weight.indices)
            if name == weight.path and isinstance(weight.layer, Experts) and weight.tensor.endswith(".weight"):
                name += ".weight"  # the stack is the parameter `weight` of its module
                spelling = spelling._replace(template=(*spelling.template, "weight"))  # noqa: PLW2901
            share = rows.get(spelling.part, weight.out // len(spellings[key]))
            held.setdefault(name, (spelling, []))[1].append((weight, share))
    return [_module(name, *rest) for name, rest in held.items()]


def _module(name: str, spelling: _Spelling, members: list[tuple[Weight, int]]) -> Module:
    first = members[0][0]
    per_skeleton: Counter[Skeleton] = Counter()
    for weight, _ in members:
        per_skeleton[weight.skeleton] += weight.copies
    copies = max(per_skeleton.values())
    out = sum(share * weight.copies for weight, share in members) // copies
    bare = not first.tensor.endswith(".weight")  # a parameter of its own on disk is one in memory
    is_parameter = isinstance(first.layer, Experts) or spelling.stacked or bare
    weights = tuple(weight for weight, _ in members)
    return Module(name, spelling.template, is_parameter, weights, out, first.inputs, max(first.kernel, 1), copies)


def _rows_of_parts(survey: Survey, weight: Weight) -> dict[str, int]:
    try:
        parts = survey.architecture.layout(weight.path, weight.component, weight.out, survey.config)
    except MismatchError:
        return {}
    return {path.rpartition("[")[2][:-1]: layouts.count(rows) for path, rows in parts.items()}


# -- Presets ----------------------------------------------------------------------------------------------------------


def main_towers(modules: Iterable[Module]) -> frozenset[str]:
    """The main model; all towers of a model that has no main one."""
    towers = {w.layer.tower for m in modules for w in m.weights}
    return frozenset({""} if "" in towers else towers)


def _default(family: Architecture, weight: Weight, main: frozenset[str]) -> bool:
    return any(selects(target, weight.path, weight.component) for target in family.default_targets)


def _attention(family: Architecture, weight: Weight, main: frozenset[str]) -> bool:
    return weight.is_linear and weight.layer.tower in main and weight.layer.group == "attention"


def _mlp(family: Architecture, weight: Weight, main: frozenset[str]) -> bool:
    return weight.is_linear and weight.layer.tower in main and weight.layer.group in ("mlp", "experts")


def _all_linear(family: Architecture, weight: Weight, main: frozenset[str]) -> bool:
    return weight.is_linear and weight.layer.tower in main and weight.layer.group not in _NEVER


#: What to train: the family's own targets; the main model's attention; its MLPs and experts; all its linear layers but
#: heads and routers.
PRESETS: dict[str, Callable[[Architecture, Weight, frozenset[str]], bool]] = {
    "default": _default,
    "attention": _attention,
    "mlp": _mlp,
    "all-linear": _all_linear,
}


# -- Tables -----------------------------------------------------------------------------------------------------------


def layers(survey: Survey) -> list[dict[str, Any]]:
    """Return a row for each kind of layer that the base has: layers that differ in their numbers alone are one row."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[Weight]] = {}
    for name, weights in survey.weights.items():
        if weights:
            text = "+".join(w.skeleton.text for w in weights)
            groups.setdefault((weights[0].component, text, survey.shapes[name]), []).append(weights[0])
    rows = []
    for (component, text, shape), found in groups.items():
        layer = found[0].layer
        row = {
            "component": component,
            "layer": text,
            "count": len(found),
            "shape": list(shape),
            "kind": layer.kind,
            "group": layer.group,
            "role": found[0].role,
            "tower": layer.tower,
            "parameters": len(found) * prod(shape),
        }
        rows.append(row)
    order = {skeleton.text: n for n, (skeleton, _) in enumerate(survey.architecture.skeletons())}
    return sorted(rows, key=lambda row: order.get(row["layer"].partition("+")[0], 0))


def brief(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of `layers` or `family_layers` in few columns, the most telling first."""
    short = []
    for row in rows:
        if "count" in row:
            shape = "x".join(map(str, row["shape"]))
            columns = {"times": row["count"], "of": shape, "parameters": row["parameters"], "is": _in_words(row)}
        else:
            fused = f"{row['fused']} ({row['layout']})" if row["fused"] else ""
            columns = {"is": _in_words(row), "default": "yes" if row["default"] else "", "fused": fused}
        short.append({"layer": row["layer"], **columns})
    return short


def _in_words(row: Mapping[str, Any]) -> str:
    kind = "" if row["kind"] == "linear" or row["kind"].startswith(row["group"]) else row["kind"]
    group = row["group"] if row["tower"] != "projector" else ""
    return " ".join(filter(None, (row["tower"], group, row["role"], kind)))


def totals(survey: Survey) -> dict[str, Any]:
    """Return what the base has altogether."""
    everything = {name: prod(shape) for name, shape in survey.shapes.items()}
    return {
        "modules": len(survey.modules),
        "parameters": sum(everything.values()),
        "norms_and_biases": sum(n for name, n in everything.items() if len(survey.shapes[name]) < 2),
        "unknown_weights": len(survey.unknown),
    }


def sizes(
    survey: Survey, ranks: Sequence[int] = RANKS, presets: Iterable[str] = tuple(PRESETS)
) -> list[dict[str, Any]]:
    """Return what an adapter of each rank has in each preset: modules in memory, parameters, bytes."""
    rows = []
    for preset in presets:
        chosen = survey.selected(preset)
        for rank in ranks:
            count = sum(m.parameters(rank) for m in chosen)
            row = {"preset": preset, "modules": len(chosen), "rank": rank, "parameters": count}
            rows.append({**row, "fp32_bytes": 4 * count, "bf16_bytes": 2 * count})
    return rows


def family_layers(architecture: Architecture) -> list[dict[str, Any]]:
    """Return a row for each layer that a family declares."""
    rows = []
    for skeleton, layer in architecture.skeletons():
        path = skeleton.fill(range(len(skeleton.variables)))
        found = [f for f in architecture.fused if f.component == layer.component and _is_of(skeleton, f.pattern)]
        row = {
            "component": layer.component,
            "layer": skeleton.text,
            "kind": layer.kind,
            "role": layer.role(skeleton),
            "group": layer.group,
            "tower": layer.tower,
            "fused": " or ".join(dict.fromkeys("|".join(f.parts) or "slabs" for f in found)),
            "layout": " or ".join(dict.fromkeys(f.layout.name for f in found)),
            "default": any(selects(t, path, layer.component) for t in architecture.default_targets),
        }
        rows.append(row)
    return rows


def _is_of(skeleton: Skeleton, pattern: str) -> bool:
    return any(other.text == skeleton.text for other, _ in Lexicon([(pattern, None)]))


def strangers(survey: Survey) -> list[Finding]:
    """Return a finding for each kind of weight that the family does not know."""
    counts = Counter((re.sub(r"(?<![^.])\d+(?![^.])", "*", n), survey.shapes[n]) for n in survey.unknown)
    what = "the {} family has no such layer ({} x {})"
    return [
        Finding("warning", name, what.format(survey.architecture.name, count, list(shape)))
        for (name, shape), count in counts.items()
    ]
