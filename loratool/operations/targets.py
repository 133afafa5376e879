"""How PEFT is told to train the layers of a preset: the names for a LoraConfig, exact in the live model.

PEFT takes a module whose name is an entry of target_modules or ends in a dot and an entry; a string is a regular
expression for the whole name (peft: tuners/tuners_utils.py, check_target_module_exists). target_parameters, for stacks
of experts and other bare parameters, follow the first rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from loratool.adapter import Finding
from loratool.operations.survey import PRESETS, Module, Survey, main_towers
from loratool.patterns import split

_WIDTH = 100


def targets(survey: Survey, preset: str) -> dict[str, Any]:
    """Return `target_modules` and `target_parameters` with which PEFT adapts exactly the modules of a preset.

    PEFT takes a module whose name is an entry or ends in a dot and an entry. Entries are the shortest that hit nothing
    else in the model, containers included; where only the number of a layer could tell, all are one regular
    expression, which PEFT matches with the whole name.

    Where transformers stacks experts that released files have one by one, PEFT takes their names on disk (gate_proj) to
    mean the stacks, whatever stands before them, and whichever way this file has them; a dense layer of such a name is
    given as a parameter, `mlp.gate_proj.weight`.
    """
    return targets_of(survey, survey.selected(preset))


def targets_of(survey: Survey, chosen: Iterable[Module]) -> dict[str, Any]:
    """Return the same for any modules of a model."""
    told = [as_told(survey, module) for module in chosen]
    modules = [module for module in told if not module.is_parameter]
    parameters = [module for module in told if module.is_parameter]
    entries = _entries(modules, _ends(_all_modules(survey) - {m.name for m in modules}))
    return {
        "target_modules": entries if all(isinstance(e, str) for e in entries) else _expression(entries),
        "target_parameters": _names(parameters, _ends(_all_parameters(survey) - {p.name for p in parameters})),
    }


def as_told(survey: Survey, module: Module) -> Module:
    """Return a module as PEFT must be told of it: a parameter, where its name means others or its class is unknown."""
    is_router = any(weight.layer.group == "router" for weight in module.weights)
    if module.is_parameter or not (is_router or module.template[-1] in survey.architecture.stacked_leaves):
        return module
    return module._replace(name=f"{module.name}.weight", template=(*module.template, "weight"), is_parameter=True)


def pasteable(found: Mapping[str, Any]) -> list[str]:
    """Return the lines of a LoraConfig with these targets."""
    lines = ["LoraConfig("]
    for name, value in found.items():
        if isinstance(value, str):
            lines.append(f'    {name}=r"{value}",')
        elif value or name == "target_modules":
            one_line = f"    {name}=[{', '.join(map(_quoted, value))}],"
            several = [f"    {name}=[", *(f"        {_quoted(v)}," for v in value), "    ],"]
            lines += [one_line] if len(one_line) <= _WIDTH else several
    return [*lines, ")"]


def _quoted(name: str) -> str:
    return f'"{name}"'


def shared(survey: Survey, preset: str) -> list[Finding]:
    """Return a finding for each kind of module in memory that holds more than what the preset asks for."""
    main = main_towers(survey.modules)
    wanted = PRESETS[preset]
    found = []
    for module in survey.selected(preset):
        more = [w for w in module.weights if not wanted(survey.architecture, w, main)]
        if more:
            name = ".".join(e if isinstance(e, str) else "*" for e in module.template)
            what = f"holds {more[0].skeleton.text} too, in one parameter: both are trained"
            found.append(Finding("warning", name, what))
    return list(dict.fromkeys(found))


def _all_modules(survey: Survey) -> set[str]:
    """Every module of the live model that the base shows, containers and tied heads included.

    Numbers before one that is there are modules too, if without weights: the SiLU in a Sequential.
    """
    family, model_class = survey.architecture, survey.model_class
    own = family.at_hand or family.components[0]
    names = {m.name.rpartition(".")[0] if m.is_parameter else m.name for m in survey.modules}
    held = {w.tensor for m in survey.modules for w in m.weights}
    for tensor in (t for t in survey.shapes if t not in held):
        path = tensor.rpartition(".")[0]
        known = family.find(path)
        component = known.component if known else own
        names.add(family.in_memory(component, known.parts[0] if known else path, model_class))
    present = {w.path for weights in survey.weights.values() for w in weights}
    for group in family.tied:
        if present & set(group):
            names |= {family.in_memory(own, path, model_class) for path in group}
    found = {".".join(e[:n]) for e in map(split, names) for n in range(1, len(e) + 1)}
    last: dict[str, int] = {}
    for parent, _, number in (name.rpartition(".") for name in found):
        last[parent] = max(last.get(parent, -1), int(number) if number.isdecimal() else -1)
    return found | {f"{parent}.{n}" for parent, most in last.items() if parent for n in range(most)}


def _all_parameters(survey: Survey) -> set[str]:
    own = {m.name for m in survey.modules if m.is_parameter}
    return own | {f"{name}.{kind}" for name in _all_modules(survey) for kind in ("weight", "bias")} | set(survey.shapes)


def _ends(names: Iterable[str]) -> dict[int, set[str]]:
    """Return every end of every name, by its number of elements."""
    ends: dict[int, set[str]] = {}
    for elements in map(split, names):
        for size in range(1, len(elements) + 1):
            ends.setdefault(size, set()).add(".".join(elements[-size:]))
    return ends


class _Numbered(NamedTuple):
    """An entry that needs a regular expression: its elements, and whether it is the whole name or the end of one."""

    elements: tuple[str, ...]
    whole: bool


def _entries(modules: Sequence[Module], others: Mapping[int, set[str]]) -> list[str | _Numbered]:
    kinds: dict[tuple[str | int, ...], list[Module]] = {}
    for module in modules:
        kinds.setdefault(module.template, []).append(module)
    entries: list[str | _Numbered] = []
    for template, members in kinds.items():
        for entry in _shortest(template, members, others):
            if entry not in entries:
                entries.append(entry)
    return entries


def _shortest(
    template: tuple[str | int, ...], members: Sequence[Module], others: Mapping[int, set[str]]
) -> list[str | _Numbered]:
    """Return the shortest end of a name that hits no other module: plain, with any number, or the names as they are."""
    whole = len(template)
    for size in range(1, whole + 1):
        end = template[-size:]
        if isinstance(end[0], int) or (end[0].isdecimal() and size < whole):
            continue  # `to_out.0`, not `0`
        if all(isinstance(e, str) for e in end):
            text = ".".join(map(str, end))
            if text not in others.get(size, ()):
                return [text]
            continue
        elements = tuple(re.escape(e) if isinstance(e, str) else r"\d+" for e in end)
        pattern = re.compile(r"\.".join(elements))
        if not any(pattern.fullmatch(other) for other in others.get(size, ())):
            return [_Numbered(elements, whole=False)]
    return [_Numbered(tuple(map(re.escape, split(m.name))), whole=True) for m in members]


def _expression(entries: Sequence[str | _Numbered]) -> str:
    """Return one regular expression for all entries, those with an equal beginning together."""
    heads: dict[tuple[bool, tuple[str, ...]], list[str]] = {}
    for entry in entries:
        one = _Numbered(tuple(map(re.escape, split(entry))), whole=False) if isinstance(entry, str) else entry
        heads.setdefault((one.whole, one.elements[:-1]), []).append(one.elements[-1])
    found = []
    for (whole, head), leaves in heads.items():
        leaf = leaves[0] if len(leaves) == 1 else f"({'|'.join(leaves)})"
        found.append(("" if whole else r"(.*\.)?") + r"\.".join((*head, leaf)))
    return "|".join(found)


def _names(parameters: Sequence[Module], others: Mapping[int, set[str]]) -> list[str]:
    """Return the shortest ends of parameters' names that hit no other parameter."""
    names: list[str] = []
    for parameter in parameters:
        elements = split(parameter.name)
        ends = (".".join(elements[-n:]) for n in range(min(2, len(elements)), len(elements) + 1))
        ends_alone = (e for e in ends if not e[0].isdecimal() and e not in others.get(e.count(".") + 1, ()))
        name = next(ends_alone, parameter.name)
        if name not in names:
            names.append(name)
    return names
