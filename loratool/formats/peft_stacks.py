"""PEFT's target_parameters: LoRA on a 3-D parameter, such as the stacked experts of transformers 5.

One pair of factors serves E matrices at once. lora_A is (E x r, in) with the rows of expert e together; lora_B is
(out, r x E) with the experts fastest, column k x E + e. The update of expert e is scaling * B_e @ A_e, where scaling
uses r, not E x r. The key names the module that owns the parameter; several parameters of one module are nested, the
first in order of registration innermost (`experts.base_layer.lora_A` before `experts.lora_A`).

PEFT 0.17 and 0.18 took every parameter as (experts, in, out); since 0.19 one that is (experts, out, in) is taken as
that. An older adapter of such a parameter has A (E x r, out) and B (in, r x E), and its update is the transpose of
B_e @ A_e. The files look alike: peft_version tells them apart, else the shapes of two parameters of one module do.
Source: peft/tuners/lora/layer.py: ParamWrapper (0.21.2, and its change in pull request 3083).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from loratool.adapter import Finding, Stack, Target
from loratool.deltas import Delta, LowRank
from loratool.errors import MismatchError
from loratool.factors import below_each_other, require_alike
from loratool.formats.naming import Parts, error, half_a_pair, shape_problem
from loratool.formats.peft_config import STACKED_SINCE, Scaling, version_of
from loratool.layers import Experts
from loratool.readings import Known
from loratool.tensors import TensorRef, joined, padded, woven, zeros

_NESTED = ".base_layer"


def parameters(
    modules: Sequence[str], config: Mapping[str, Any], findings: list[Finding], is_module: Callable[[str], bool]
) -> dict[str, str]:
    """Return the path of the parameter that each stacked module of the file is for; the others are left out.

    `is_module` says of a path that it is a layer of its own: a parameter named without its owner is not that layer's.
    """
    wanted = [name for name in config.get("target_parameters") or () if not name.endswith(".weight")]
    owners: dict[str, list[str]] = {}
    for module in modules:
        owners.setdefault(module.replace(_NESTED, ""), []).append(module)
    found: dict[str, str] = {}
    for owner, nested in owners.items():
        names = sorted(
            {p.rpartition(".")[2] for p in wanted if _owns(owner, p) and ("." in p or not is_module(owner))},
            key=_registration,
        )
        if not names:
            continue
        if len(names) != len(nested):
            what = f"{len(nested)} pairs of factors for the parameters {', '.join(names)}"
            findings.append(error(owner, what, "target_parameters of adapter_config.json does not fit the file"))
            continue
        innermost_first = sorted(nested, key=lambda m: -m.count(_NESTED))
        found |= {module: f"{owner}.{name}" for module, name in zip(innermost_first, names, strict=True)}
    return found


def _owns(owner: str, parameter: str) -> bool:
    """Whether a parameter, spelled as in target_parameters, is one of this module's: PEFT compares ends of paths."""
    of = parameter.rpartition(".")[0]
    return not of or owner == of or owner.endswith("." + of)


def _registration(name: str) -> tuple[bool, bool, str]:
    """Order parameters as expert classes register them: what leads in before what leads out."""
    return bool(re.search("down|out|w2|fc2", name)), name != "w1", name


class Stacks(NamedTuple):
    """What the stacked modules of a file come to."""

    deltas: dict[Target, tuple[Delta, ...]]
    stacks: dict[str, Stack]
    findings: list[Finding]


def read(
    modules: Mapping[str, Parts],
    paths: Mapping[str, str],
    known: Mapping[str, Known],
    config: Mapping[str, Any],
    scaling: Scaling,
    *,
    certain: bool,
) -> Stacks:
    """Return the delta of every matrix of every stacked module; `paths` are those of their parameters."""
    result = Stacks({}, {}, [])
    sound: dict[str, Parts] = {}
    for module in paths:
        missing = modules[module].missing("lora_A", "lora_B")
        problem = "" if missing else _problem(modules[module], known[module], scaling.told(paths[module]))
        if missing:
            result.findings.append(half_a_pair(module, missing))
        elif problem:
            result.findings.append(error(module, problem))
        else:
            sound[module] = modules[module]
    old, findings = swapped(sound, paths, known, config, certain=certain)
    result.findings.extend(findings)
    for module, parts in sound.items():
        rank = int(scaling.told(paths[module]))
        deltas = split(parts, rank, scaling(paths[module], rank), old=old[module])
        axis = known[module].axis
        each = [known[module].at(e) if axis else known[module] for e in range(len(deltas) + bool(axis))]
        targets = tuple(Target(k.component, k.parts) for k in each)
        result.deltas.update({t: (d,) for t, d in zip(targets, deltas, strict=False)})
        result.stacks[module] = Stack(paths[module], targets[: len(deltas)], targets[-1] if axis else None)
    return result


def _problem(parts: Parts, known: Known, rank: Any) -> str:
    """Say why a stacked module that has both factors cannot be used, or nothing."""
    assert parts.down is not None
    assert parts.up is not None
    problem = shape_problem(parts.down, parts.up)
    if problem:
        return problem
    if not known.axis and parts.down.shape[0] != rank:
        return "this is LoRA on a 3-D parameter, and no family says what is stacked in it"
    if not isinstance(rank, int) or rank < 1 or parts.down.shape[0] % rank:
        return f"{parts.down.shape[0]} rows of lora_A are no whole number of experts of rank {rank}"
    return ""


def swapped(
    stacks: Mapping[str, Parts],
    paths: Mapping[str, str],
    known: Mapping[str, Known],
    config: Mapping[str, Any],
    *,
    certain: bool = True,
) -> tuple[dict[str, bool], list[Finding]]:
    """Return for each stacked module whether its factors are in the order of PEFT 0.17 and 0.18.

    Where the family is not `certain`, neither is the order in memory, and old factors must show theirs by their shapes.
    """
    version = version_of(config)
    old = None if version is None else version < STACKED_SINCE
    findings: list[Finding] = []
    result = {}
    for module in stacks:
        if not known[module].axis:  # one matrix, which PEFT has always taken as (out, in)
            result[module] = False
            continue
        layer = known[module].layer
        in_out = isinstance(layer, Experts) and layer.in_out != layer.flipped_in_memory
        if isinstance(layer, Experts) and in_out and not layer.unmarked and (certain or old is False):
            result[module] = False  # (experts, in, out) in memory, and marked so: no PEFT took it for anything else
            continue
        owner = paths[module].rpartition(".")[0]
        shown = _shown([stacks[m] for m, p in paths.items() if p.rpartition(".")[0] == owner and m in stacks])
        unmarked = isinstance(layer, Experts) and layer.unmarked  # what was right became wrong with 0.19
        swapped_by_version = old if old is None or not unmarked else not old
        if not certain and old:
            swapped_by_version = None
        if swapped_by_version is None and shown is None:
            what = "written before PEFT 0.19 or after? The factors would be read differently, and their shapes fit both"
            hint = 'put "peft_version" into adapter_config.json' if certain else "name the family with --arch"
            findings.append(error(module, what, hint))
        elif None not in (swapped_by_version, shown) and swapped_by_version != shown:
            what = f"peft_version {config.get('peft_version')} and the shapes of the factors contradict each other"
            findings.append(error(module, what, "was peft_version changed by hand?"))
        result[module] = bool(shown if swapped_by_version is None else swapped_by_version)
    return result, findings


def _shown(siblings: Sequence[Parts]) -> bool | None:
    """Return what the shapes of a module's two pairs show: A of the first takes what B of the last gives."""
    shapes = [(p.down.shape[1], p.up.shape[0]) for p in siblings if p.down is not None and p.up is not None]
    if len(shapes) != 2:
        return None
    (first_a, first_b), (last_a, last_b) = shapes
    usual, old = first_a == last_b, first_b == last_a
    return None if usual == old else old


def split(parts: Parts, rank: int, scaling: float, *, old: bool) -> list[LowRank]:
    """Return the delta of each matrix of a stack."""
    assert parts.down is not None
    assert parts.up is not None
    count = parts.down.shape[0] // rank
    deltas = []
    for e in range(count):
        a = parts.down.rows(e * rank, (e + 1) * rank)
        b = parts.up.columns((range(e, rank * count, count),))
        deltas.append(LowRank(b.transposed(), a.transposed(), scaling) if old else LowRank(a, b, scaling))
    return deltas


def stacked(parameter: str, deltas: Sequence[LowRank | None]) -> tuple[LowRank, int]:
    """Return the factors of a stack in the order of PEFT 0.19 and later, and their rank.

    Matrices without a delta and ranks that are smaller get zeros.
    """
    present = [d for d in deltas if d is not None]
    if not present:
        raise MismatchError("none of its matrices has a delta", where=parameter)
    require_alike(present, parameter)
    rank = max(d.rank for d in present)
    down, up = present[0].down, present[0].up
    nothing = LowRank(zeros("", (rank, *down.shape[1:]), down.dtype), zeros("", (up.shape[0], rank), up.dtype), 1.0)
    filled = [nothing if d is None else d for d in deltas]
    downs = [_rows_padded(d.down, rank) for d in filled]
    return LowRank(joined("", downs), woven("", [padded(d.up, rank) for d in filled]), present[0].scaling), rank


def _rows_padded(ref: TensorRef, rows: int) -> TensorRef:
    missing = rows - ref.shape[0]
    return joined(ref.name, [ref, zeros("", (missing, *ref.shape[1:]), ref.dtype)]) if missing else ref


@dataclass
class Placed:
    """Deltas that go into one 3-D parameter of the live model, by index and canonical path."""

    component: str
    unmarked: bool
    parts: dict[int, tuple[str, ...]] = field(default_factory=dict)
    deltas: dict[str, LowRank] = field(default_factory=dict)

    def each(self, parameter: str) -> list[LowRank | None]:
        """Return one delta a matrix, None where nothing changes; gate and up that lie in one matrix are joined."""
        result: list[LowRank | None] = []
        for index in range(max(self.parts) + 1):
            paths = self.parts.get(index, ())
            present = {p: d for p in paths if (d := self.deltas.get(p)) is not None and not d.is_zero}
            some = next(iter(present.values()), None)
            if some is None or len(paths) == 1:
                result.append(some)
            else:
                result.append(below_each_other(present, dict.fromkeys(paths, some.up.shape[0]), parameter))
        return result


def nested(parameters: Iterable[str]) -> dict[str, str]:
    """Return the module of the file for each parameter: those of one owner are nested, the first innermost."""
    owners: dict[str, list[str]] = {}
    for parameter in parameters:
        owners.setdefault(parameter.rpartition(".")[0], []).append(parameter)
    modules: dict[str, str] = {}
    for owner, names in owners.items():
        names.sort(key=lambda p: _registration(p.rpartition(".")[2]))
        modules |= {parameter: owner + _NESTED * depth for depth, parameter in enumerate(reversed(names))}
    return modules


def told_as(module: str, config: Mapping[str, Any]) -> str:
    """Return the path under which PEFT looks up rank and alpha: that of the parameter where one was targeted."""
    wanted = [name for name in config.get("target_parameters") or () if name.endswith(".weight")]
    return module + ".weight" if any(_owns(module, name) for name in wanted) else module
