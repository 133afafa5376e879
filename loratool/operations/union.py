"""Several adapters seen as one: over the modules of any of them, under one family, for one base.

Before factors meet, what is fused in one adapter and split in another is brought to the same modules, exactly. What the
result says of itself is what the adapters agree on, so it does not depend on the order in which they are named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import PurePath
from typing import Any

from loratool.adapter import Adapter, Finding, Origin, Stack, Target, Weighted
from loratool.architecture import Architecture
from loratool.errors import MismatchError
from loratool.hookspecs import Format
from loratool.operations.refinement import in_common_modules, in_whole_modules, met_in_parts, one_module

# Fields of a PEFT config that follow from what is written; with r and lora_alpha gone the config is made anew.
_FOLLOWS = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "target_parameters",
    "layers_to_transform", "layers_pattern", "exclude_modules",
)  # fmt: skip


def brought_together(
    weighted: Sequence[Weighted],
    architecture: Architecture | None,
    config: Mapping[str, Any],
    format: Format,
    *,
    allow_different_bases: bool = False,
    allow_disjoint: bool = False,
) -> list[Weighted]:
    """Return the adapters over common modules, those that `format` has; raise MismatchError where that cannot be."""
    adapters = [w.adapter for w in weighted]
    _require_one_base(adapters, allowed=allow_different_bases)
    if len({a.replication for a in adapters}) > 1:
        raise MismatchError("they are for models whose layers are repeated in different ways", where=_paths(adapters))
    targets = {t for a in adapters for t in a.deltas}
    if _overlap(targets):
        several = {t for t in targets if len(t.parts) > 1}
        whole = (several - met_in_parts(targets)) | {t for t in several if one_module(format, t, architecture)}
        joined = [in_whole_modules(a, architecture, config, whole) for a in adapters]
        cut = in_common_modules(joined, architecture, config)  # of what has no factors to join, such as LoHa
        weighted = [w._replace(adapter=a) for w, a in zip(weighted, cut, strict=True)]
        left = _overlap({t for a in cut for t in a.deltas})
        if left:
            what = "one adapter updates it as a whole and another in parts, and no family says how they lie"
            raise MismatchError(what, where=left, hint="--arch NAME, or --base MODEL")
    _require_common(weighted, allowed=allow_disjoint)
    _require_shapes(weighted)
    return list(weighted)


def _paths(adapters: Sequence[Adapter]) -> str:
    return " and ".join(dict.fromkeys(a.origin.path for a in adapters))


def _require_one_base(adapters: Sequence[Adapter], *, allowed: bool) -> None:
    """Raise where adapters name different base models; a path and `org/name` with one last element are the same."""
    names = {PurePath(a.base_model).name.lower(): a for a in adapters if a.base_model}
    if len(names) > 1 and not allowed:
        told = [f"{a.origin.path}: {a.base_model}" for a in names.values()]
        raise MismatchError(
            "\n  ".join(["the adapters were trained on different base models", *told]),
            hint="--allow-different-bases, if these are copies of one model, or you want to try",
        )


def _overlap(targets: set[Target]) -> str:
    """Return a module that two different targets have a part in, or nothing."""
    seen: dict[tuple[str, str], Target] = {}
    parts: dict[tuple[str, str], Target] = {}
    for target in sorted(targets, key=lambda t: t.sort_key):
        for path in target.parts:
            weight, _, part = path.rpartition("[")
            is_part = bool(weight) and not part[:-1].isdecimal()
            if (target.component, path) in seen:
                return str(target)
            seen[target.component, path] = target
            if is_part:
                parts[target.component, weight] = target
    return next((str(t) for key, t in parts.items() if key in seen), "")


def _require_common(weighted: Sequence[Weighted], *, allowed: bool) -> None:
    """Raise where an adapter has no module in common with any other."""
    if allowed or len(weighted) < 2:
        return
    for n, one in enumerate(weighted):
        others = {t for m, w in enumerate(weighted) if m != n for t in w.adapter.deltas}
        if not others & set(one.adapter.deltas):
            other = weighted[0 if n else 1].adapter
            raise MismatchError(
                f"no module in common: {one.adapter.targets[0]} ... against {other.targets[0]} ...",
                where=f"{one.adapter.origin.path} and {other.origin.path}",
                hint="are they for the same base model? --allow-disjoint puts both into one adapter",
            )


def _require_shapes(weighted: Sequence[Weighted]) -> None:
    found: dict[Target, tuple[tuple[int, int], str]] = {}
    for w in weighted:
        for target, deltas in w.adapter.deltas.items():
            for delta in (d for d in deltas if d.kind not in ("tokens", "vera", "oft", "boft", "ia3")):
                shape, path = found.setdefault(target, (delta.matrix_shape, w.adapter.origin.path))
                if delta.matrix_shape != shape:
                    raise MismatchError(
                        f"{list(shape)} in {path}, and {list(delta.matrix_shape)} in {w.adapter.origin.path}",
                        where=str(target),
                        hint="the adapters are for models of different sizes",
                    )


# ---- what the result says of itself


def frame(weighted: Sequence[Weighted], architecture: Architecture | None, format: str) -> Adapter:
    """Return the adapter that the result is put into: no deltas yet, and what all adapters agree on."""
    adapters = [w.adapter for w in weighted]
    formats = {a.origin.format for a in adapters}
    path = _paths(adapters)
    spelled = formats == {format}
    config = _common_config([a.origin.config for a in adapters]) if spelled else {}
    origin = Origin(format if spelled else "", path, config=config)
    if spelled:
        stacks = _common_stacks(adapters)
        stacked = {t for stack in stacks.values() for t in stack.targets}
        modules = {t: name for t, name in _common_names(adapters).items() if t not in stacked}
        embedded = frozenset(t for a in adapters for t in a.origin.embeddings)
        origin = replace(origin, modules=modules, stacks=stacks, embeddings=embedded)
    every = [a.metadata for a in adapters]
    metadata = {k: v for k, v in every[0].items() if all(m.get(k) == v for m in every)}
    known = [(*a.families, *a.rivals) for a in adapters]
    families = tuple(f for f in adapters[0].families if all(f in k for k in known))
    if architecture is not None:
        families = tuple(dict.fromkeys((architecture.name, *families)))
    rivals = {f for a in adapters for f in a.rivals} - set(families)
    names = {a.base_model for a in adapters if a.base_model}
    alike = len({PurePath(name).name.lower() for name in names}) == 1
    copies = {t: ref for a in reversed(adapters) for t, ref in a.base_copies.items()}
    return Adapter(
        {},
        origin,
        families=families,
        rivals=tuple(sorted(r for r in rivals if all(r in k for k in known))),
        base_copies=copies,
        tensors={name: ref for a in adapters for name, ref in a.tensors.items()},
        metadata=metadata,
        base_model=min(names) if alike else "",
        findings=_findings(adapters, metadata),
        replication=adapters[0].replication,
        shares_ties=any(a.shares_ties for a in adapters),
        head_class=next((a.head_class for a in adapters if a.head_class), ""),
    )


def _common_config(configs: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """Return the fields that all configs agree on; what names parts of the adapter is that of those which have any."""
    first = configs[0]
    agreed = {k: v for k, v in first.items() if all(k in c and c[k] == v for c in configs)}
    if any(name in c and name not in agreed for c in configs for name in _FOLLOWS):
        agreed = {k: v for k, v in agreed.items() if k not in _FOLLOWS}
    saved = [c.get("modules_to_save") or [] for c in configs]
    if any(saved):
        agreed["modules_to_save"] = sorted({name for names in saved if isinstance(names, list) for name in names})
    biases = {str(c.get("bias") or "none") for c in configs} - {"none"}
    if biases:
        agreed["bias"] = "all" if len(biases) > 1 else biases.pop()
    for name in ("trainable_token_indices", "task_type", "auto_mapping"):
        values = [c[name] for c in configs if c.get(name)]
        if values and all(v == values[0] for v in values):
            agreed[name] = values[0]
    agreed.setdefault("peft_type", "LORA")
    return agreed


def _common_stacks(adapters: Sequence[Adapter]) -> dict[str, Stack]:
    """Return the stacks of all adapters; none where two that share modules lie differently in the file."""
    stacks: dict[str, Stack] = {}
    owners: dict[Target, str] = {}
    for adapter in adapters:
        for module, stack in adapter.origin.stacks.items():
            if stacks.setdefault(module, stack) != stack:
                return {}
            if any(owners.setdefault(t, module) != module for t in stack.targets):
                return {}
    return stacks


def _common_names(adapters: Sequence[Adapter]) -> dict[Target, str]:
    """Return what all modules are called in the files; none where the adapters spell them in different ways."""
    names: dict[Target, str] = {}
    for adapter in adapters:
        for target, name in adapter.origin.modules.items():
            if names.setdefault(target, name) != name:
                return {}
    roots = [{name.partition(".")[0] for name in a.origin.modules.values()} for a in adapters if a.origin.modules]
    return names if all(one & two for one, two in pairwise(roots)) or adapters[0].origin.format != "peft" else {}


def _findings(adapters: Sequence[Adapter], kept: Mapping[str, str]) -> tuple[Finding, ...]:
    found = [f for a in adapters for f in a.findings]
    lost = sorted({k for a in adapters for k in a.metadata if k not in kept})
    if lost and len(adapters) > 1:
        told = ", ".join(lost[:6]) + (f" and {len(lost) - 6} more" if len(lost) > 6 else "")
        found.append(Finding("info", "metadata", f"the adapters do not agree on {told}: left out"))
    return tuple(dict.fromkeys(found))
