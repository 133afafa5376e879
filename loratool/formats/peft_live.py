"""PEFT's names for what an adapter updates: the modules and parameters of the live model, where PEFT counts from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratool.adapter import Adapter, Target
from loratool.architecture import Architecture
from loratool.deltas import LowRank
from loratool.errors import MismatchError
from loratool.formats import peft_stacks
from loratool.formats.peft_names import OUTPUT, WRAPPER, bare
from loratool.readings import Slot

Plain = list[tuple[Target, str, LowRank]]  # with the module's name in the file
Stacked = list[tuple[str, str, list[LowRank | None]]]  # the module's name in the file, its parameter, a delta each


def live(
    adapter: Adapter, architecture: Architecture | None, model_class: str, config: Mapping[str, Any]
) -> tuple[Plain, Stacked]:
    """Return what to write, by the names of the live model; what came from PEFT keeps the names it had."""
    deltas = adapter.low_rank("the PEFT format as it is written")
    from_peft = adapter.origin.format == "peft"
    plain: Plain = []
    stacks: Stacked = []
    done: set[Target] = set()
    for module, stack in adapter.origin.stacks.items() if from_peft else ():
        each = [deltas[t][0] if t in deltas else None for t in stack.targets]
        if any(each):
            known = architecture.slot(stack.targets[0].component, stack.targets[0].parts[0]) if architecture else None
            stacks.append((module, stack.parameter, _ordered(each, unmarked=bool(known and known.unmarked))))
            done |= set(stack.targets)
    placed: dict[str, peft_stacks.Placed] = {}
    for target in (t for t in adapter.targets if t not in done):
        (delta,) = deltas[target]
        if from_peft and target in adapter.origin.modules:
            if adapter.origin.modules[target].endswith(OUTPUT):
                raise MismatchError(
                    "PEFT gives both weights of a MultiheadAttention one rank, and up to 0.21 adds the second twice",
                    where=str(target),
                    hint="merge the adapter; or leave these modules out with --exclude",
                )
            plain.append((target, adapter.origin.modules[target], delta))
            continue
        path = target.parts[0]
        slot = architecture.slot(target.component, path, model_class) if architecture else None
        slot = slot or _alone(path, target.component, architecture, model_class)
        if slot and len(target.parts) == 1:
            into = placed.setdefault(slot.parameter, peft_stacks.Placed(target.component, slot.unmarked))
            into.parts[slot.number], into.deltas[path] = slot.parts, delta
        else:
            pieces = _pieces(target, delta, architecture, model_class, config=config, where=adapter.origin.path)
            plain += [(target, WRAPPER + name, piece) for name, piece in pieces]
    for parameter, module in peft_stacks.nested(placed).items():
        each = placed[parameter].each(parameter)
        stacks.append((WRAPPER + module, parameter, _ordered(each, unmarked=placed[parameter].unmarked)))
    return plain, stacks


def _alone(path: str, component: str, architecture: Architecture | None, model_class: str) -> Slot | None:
    """Return the place of a matrix that is a parameter by itself: PEFT takes it like a stack of one."""
    known = architecture.find(path, component) if architecture else None
    if architecture is None or known is None or not known.layer.parameter or "[" in path:
        return None
    return Slot(architecture.in_memory(component, path, model_class), 0, (path,))


def _ordered(each: list[LowRank | None], *, unmarked: bool) -> list[LowRank | None]:
    """Return deltas in the order in which PEFT takes a stack: (experts, in, out) that nothing marks it swaps."""
    return [d and LowRank(d.up.transposed(), d.down.transposed(), d.scaling) if unmarked else d for d in each]


def _pieces(
    target: Target,
    delta: LowRank,
    architecture: Architecture | None,
    model_class: str,
    *,
    config: Mapping[str, Any],
    where: str,
) -> list[tuple[str, LowRank]]:
    """Return the modules of the live model that a target is: one, or the parts of what only the file has fused."""
    known = architecture.find(target.parts[0], target.component) if architecture and len(target.parts) == 1 else None
    if architecture is None or known is None:
        raise MismatchError(
            "no family explains this name, so its PEFT spelling is unknown",
            where=f"{where}: {target}",
            hint="loratool arch list shows the families; -p FILE adds one",
        )
    path = target.parts[0]
    parts = architecture.parts_of(path, target.component)
    names = [architecture.in_memory(target.component, part, model_class) for part in parts]
    if names and not any("[" in name for name in names):
        try:
            layout = architecture.layout(path, target.component, delta.up.shape[0], config)
        except MismatchError as problem:
            hint = "--base MODEL: its config.json has the sizes" if not config else problem.hint
            raise MismatchError(problem.what, where=problem.where, hint=hint) from None
        cuts = (LowRank(delta.down, delta.up.take(layout[part]), delta.scaling) for part in parts)
        return list(zip(names, cuts, strict=True))
    name = architecture.in_memory(target.component, path, model_class)
    if "[" in name:
        raise MismatchError(
            f"{architecture.name} models have no module of their own for this, so PEFT has no name for it",
            where=f"{where}: {target}",
        )
    return [(name, delta)]


def told_as(target: Target, name: str, adapter: Adapter, architecture: Architecture | None) -> str:
    """Return the path under which the config speaks of a module.

    PEFT 0.21 takes target modules that end like the experts of a stack for these experts, and loses the module; and it
    knows no router that is a class of its own. Both are given as their parameters, `mlp.gate_proj.weight`.
    """
    path = bare(name)
    if adapter.origin.format == "peft" and target in adapter.origin.modules:
        return peft_stacks.told_as(path, adapter.origin.config)
    known = architecture.find(target.parts[0], target.component) if architecture else None
    is_router = known is not None and known.layer.group == "router"
    leaves = architecture.stacked_leaves if architecture else frozenset()
    return f"{path}.weight" if is_router or path.rpartition(".")[2] in leaves else path


def naming_notes(adapter: Adapter, architecture: Architecture | None, options: Mapping[str, Any]) -> tuple[str, ...]:
    """What PEFT's names depend on and the source does not say: the class of the live model."""
    prefixed = (
        architecture
        and architecture.headless
        and any(t.parts[0].startswith(architecture.prefixes.get(t.component, ("\0",))) for t in adapter.deltas)
    )
    if adapter.origin.format == "peft" or options.get("model_class") or not prefixed or not architecture:
        return ()
    return (f"the names are those of a model with a head; a bare {architecture.headless[0]} has no such prefix",)


def embeddings(adapter: Adapter, architecture: Architecture | None) -> set[Target]:
    """The targets that PEFT spells with lora_embedding_A: by the family, else as the file had them."""
    if architecture is None:
        return set(adapter.origin.embeddings)
    known = {t: architecture.find(t.parts[0], t.component) for t in adapter.deltas}
    return {t for t, k in known.items() if (k.layer.kind == "embedding" if k else t in adapter.origin.embeddings)}


def all_conv1d(adapter: Adapter, architecture: Architecture) -> bool:
    """Whether every matrix that the adapter updates is stored as (in, out), embeddings aside."""
    known = [architecture.find(t.parts[0], t.component) for t in adapter.deltas]
    kinds = {k.layer.kind for k in known if k} - {"embedding"}
    return kinds == {"Conv1D"}
