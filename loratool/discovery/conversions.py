"""A live model as plain data, and what the conversion of its weights from disk to memory means for their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from loratool.discovery.names import Shape, role_of
from loratool.layers import Conv1D, Embedding, Excluded, Experts, Layer, Linear
from loratool.layouts import Layout, concat, stride
from loratool.patterns import join, split
from loratool.tensors import module_of


class Parameter(NamedTuple):
    """A parameter of two or more dimensions in memory."""

    shape: Shape
    kind: type[Layer]
    holder: str  # the class of its module
    in_out: bool = False
    layout: str = ""  # of a stack of experts' gate and up, where transformers declares it

    @property
    def output_axis(self) -> int:
        """Which axis counts the outputs; -1 where there is none."""
        if self.kind is Experts:
            return 2 if self.in_out else 1
        return {Conv1D: 1, Embedding: -1, Excluded: -1}.get(self.kind, 0)


class Step(NamedTuple):
    """One operation of a transformers WeightConverter."""

    name: str
    dims: tuple[int, ...]
    plain: bool  # with no option that changes its meaning
    checked: bool = False  # done only where the shapes differ


class Conversion(NamedTuple):
    """Tensors on disk, by source pattern, that become these tensors in memory; no steps if it is only a new name."""

    sources: tuple[tuple[str, ...], ...]
    targets: tuple[str, ...]
    steps: tuple[Step, ...] = ()

    @property
    def single(self) -> str:
        """The one tensor on disk, or nothing if there are several."""
        return self.sources[0][0] if len(self.sources) == 1 == len(self.sources[0]) else ""

    @property
    def stacks(self) -> bool:
        """Whether tensors become the slabs of one."""
        return any(step.name == "MergeModulelist" for step in self.steps)


@dataclass
class Live:
    """A model on the meta device, described."""

    name: str
    cls: str
    library: str
    parameters: dict[str, Parameter]
    others: frozenset[str]  # names of buffers and of parameters of one dimension
    conversions: list[Conversion]
    strangers: list[str] = field(default_factory=list)  # names on disk that are nothing in memory
    tied: list[tuple[str, str]] = field(default_factory=list)
    prefix: str = ""  # base_model_prefix
    base: str = ""  # the class that the prefix leads to; nothing if the model is that class
    experts: frozenset[int] = frozenset()
    seq2seq: bool = False
    notes: list[str] = field(default_factory=list)


def without_transpose(
    conversion: Conversion, parameter: Parameter, shapes: Mapping[str, Shape]
) -> tuple[bool, list[Step]]:
    """Return whether the file has in and out in the other order, and the steps less the transpositions that do that."""
    axes = {len(parameter.shape) - 2, len(parameter.shape) - 1}
    swaps = [s for s in conversion.steps if s.name == "Transpose" and set(s.dims) == axes]
    as_in_memory = shapes.get(conversion.sources[0][0]) == parameter.shape
    turned = len([s for s in swaps if not (s.checked and as_in_memory)]) % 2 == 1
    return turned, [s for s in conversion.steps if s not in swaps]


def related(
    conversion: Conversion, steps: Sequence[Step], parameters: Mapping[str, Parameter]
) -> list[tuple[str, tuple[str, ...]]]:
    """Return which canonical paths each path in memory stands for; nothing where rules cannot say it."""
    targets = [module_of(t) for t in conversion.targets]
    parameter = parameters[conversion.targets[0]]
    rows, names = parameter.output_axis, [s.name for s in steps]
    if not all(s.plain and (s.name == "MergeModulelist" or s.dims == (rows,)) for s in steps):
        return []
    paths = [[module_of(n) for n in group] for group in conversion.sources]
    if names in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]) and len(targets) == 1:
        stacks = tuple(_stack(group, parameter.shape[0]) for group in paths)
        return [(targets[0], stacks)] if all(stacks) else []
    if names == ["Concatenate"] and len(targets) == 1 and all(len(group) == 1 for group in paths) and rows >= 0:
        return [(targets[0], tuple(group[0] for group in paths))]
    if not conversion.single:
        return []
    path = paths[0][0]
    if not names and len(targets) == 1:
        return [(targets[0], (path,))]
    parts, _ = division(conversion, steps, parameters)
    each = "[{e}]" if parameter.kind is Experts else ""
    inside = [f"{path}{each}[{part}]" for part in parts]
    if len(targets) == len(parts):
        return [(target, (part,)) for target, part in zip(targets, inside, strict=True)]
    return [(targets[0], tuple(inside))] if inside and len(targets) == 1 else []


def division(
    conversion: Conversion, steps: Sequence[Step], parameters: Mapping[str, Parameter]
) -> tuple[tuple[str, ...], Layout | None]:
    """Return the parts of a weight on disk and how its rows lie, where transformers says it."""
    parameter, names = parameters[conversion.targets[0]], [s.name for s in steps]
    rows = parameter.output_axis
    if not conversion.single or rows < 0 or not all(s.plain and s.dims == (rows,) for s in steps):
        return (), None
    if len(conversion.targets) > 1 and all(t in parameters for t in conversion.targets):
        leaves = [split(module_of(t))[-1] for t in conversion.targets]
        parts = tuple(role_of(leaf) or leaf for leaf in leaves)
        heights = {parameters[t].shape[rows] for t in conversion.targets}
        if len(set(parts)) < len(parts):
            return (), None
        if names == ["Chunk"] and len(heights) == 1:
            return parts, concat(parts=len(parts))
        if names == ["Split"]:
            return parts, concat(*(parameters[t].shape[rows] for t in conversion.targets))
        if names == ["Interleave", "Chunk"] and len(parts) == 2:
            return parts, stride(2)
    elif names == ["Interleave"] and parameter.kind in (Experts, Linear):
        return ("gate", "up"), stride(2)
    elif not names and parameter.layout:
        return ("gate", "up"), concat(parts=2) if parameter.layout == "concat" else stride(2)
    return (), None


def _stack(paths: Sequence[str], count: int) -> str:
    """Return the one path, open in `{e}`, of weights 0, 1, 2 ... of a stack; nothing if they are not that."""
    rows = [split(p) for p in paths]
    if len(rows) != count or len({len(r) for r in rows}) != 1:
        return ""
    places = [n for n, column in enumerate(zip(*rows, strict=True)) if len(set(column)) > 1]
    if not places and count == 1:
        places = [n for n, e in enumerate(rows[0]) if e == "0"][-1:]
    if len(places) != 1 or [r[places[0]] for r in rows] != [str(n) for n in range(count)]:
        return ""
    return join((*rows[0][: places[0]], "{e}", *rows[0][places[0] + 1 :]))
