"""What an adapter should have and lacks: its config says what was trained, and the base what there is to train.

A file that lost half of its keys looks like a smaller adapter. It is told apart by what its config names: a module that
has factors in other layers or in none, a trained bias, a module that was trained in full, trained tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loratool.adapter import Adapter, Finding
from loratool.architecture import Architecture
from loratool.errors import MismatchError
from loratool.layers import Experts
from loratool.operations.matching import Places, bias_of, places
from loratool.operations.meanings import Meanings, bare_name
from loratool.patterns import natural, outline, split
from loratool.storage.checkpoint import Checkpoint

_HINT = "was it saved completely? If this is all of it, say in adapter_config.json what was trained"
_UNEVEN = {"recurrent", "experts"}  # groups of layers that not all blocks of a model have
HEADS = ("classifier", "score", "qa_outputs")  # PEFT lists all that a task may have; a model has one of them
_SCOPES = ("layers_to_transform", "layers_pattern", "exclude_modules")  # with these, names do not say it all
_TARGETS, _BIAS, _SAVED = "target_modules", "bias", "modules_to_save"


def require_complete(
    adapter: Adapter, base: Checkpoint, known: Places, architecture: Architecture, changes: Mapping[str, Any]
) -> None:
    """Raise MismatchError that lists what the config of a PEFT adapter names, the base has, and the adapter lacks.

    `changes` are those of the base's config.
    """
    layers = _layers({**(base.config or {}), **changes})
    missing = [f"{name} ({field})" for name, field in _lacking(adapter, base, known, architecture, layers)]
    missing += _lost_tokens(adapter)
    if missing:
        more = [f"... and {len(missing) - 12} more"] if len(missing) > 12 else []
        what = "\n  ".join([_counted(missing), *missing[:12], *more])
        raise MismatchError(what, where=adapter.origin.path, hint=_HINT)


def incomplete(adapter: Adapter, base: Checkpoint | None, architecture: Architecture | None) -> list[Finding]:
    """Return a warning that lists what an adapter lacks of what its config names, for verbs that can do without.

    Whoever writes the adapter anew writes a config that no longer names it. Without a base, of `architecture`, what is
    there shows what is not: one of the modules that others of their kind have beside them, a layer between others, or
    a kind of module that the family has.
    """
    if base is not None and architecture is not None:
        known = places(base, architecture)
        missing = [
            f"{n} ({field})" for n, field in _lacking(adapter, base, known, architecture, _layers(base.config or {}))
        ]
    else:
        missing = [f"{n} ({field})" for n, field in _lacking_by_itself(adapter, architecture)]
    missing += _lost_tokens(adapter)
    if not missing:
        return []
    more = [f"and {len(missing) - 6} more"] if len(missing) > 6 else []
    what = f"{_counted(missing)}: {', '.join([*missing[:6], *more])}"
    return [Finding("warning", adapter.origin.path, what, _HINT)]


def _counted(missing: Sequence[str]) -> str:
    parts = "1 part of this adapter is" if len(missing) == 1 else f"{len(missing)} parts of this adapter are"
    return f"{parts} missing: its config says that this was trained"


def _lost_tokens(adapter: Adapter) -> list[str]:
    lost = adapter.origin.config.get("trainable_token_indices") and not any(
        "trainable_tokens_delta" in name for name in adapter.tensors
    )
    return ["trainable_tokens_delta (trainable_token_indices)"] if lost else []


def _lacking_by_itself(adapter: Adapter, architecture: Architecture | None) -> Iterator[tuple[str, str]]:
    """Yield what is missing as far as the adapter itself shows it, and the field of the config that names it."""
    config = adapter.origin.config
    names = set(_texts(config.get(_TARGETS)))
    trained = {part for t in adapter.origin.modules for part in t.parts}
    if trained and not any(config.get(scope) for scope in _SCOPES):
        layered = architecture is not None and not _UNEVEN & {layer.group for layer in architecture.layers}
        found = _gaps(trained, layered=layered)
        yield from ((path, _TARGETS) for path in sorted(found, key=natural) if _ends(path) & names)
        used = {name for path in trained for name in _ends(path)}
        kinds = {skeleton.text for skeleton, _ in architecture.skeletons()} if architecture else set()
        stacked = {element for stack in adapter.origin.stacks for element in split(stack)}
        for name in sorted(names - used - stacked):
            if any(f".{text}".endswith(f".{name}") for text in kinds):
                yield name, _TARGETS
    heads = [name for name in _texts(config.get(_SAVED)) if name in HEADS]  # of other modules that is an error
    tensors = (*adapter.tensors, *adapter.skipped)
    if heads and not any(within(name, tensor) for name in heads for tensor in tensors):
        yield " or ".join(heads), _SAVED


def _gaps(trained: set[str], *, layered: bool) -> set[str]:
    """Return paths of modules that such neighbours would have beside them; in `layered` models whole layers too.

    A layer that has none of them counts where others are above it, and their numbers show no period: some models have
    a kind of layer in every fourth place.
    """
    leaves: dict[str, set[str]] = {}  # by the outline of a parent
    parents: dict[str, set[str]] = {}
    for path in trained:
        parent, _, leaf = path.rpartition(".")
        leaves.setdefault(outline(parent), set()).add(leaf)
        parents.setdefault(outline(parent), set()).add(parent)
    if layered:
        for kind, found in parents.items():
            if kind.count("#") == 1:
                present = {_number(parent) for parent in found}
                absent = {n for n in range(max(present)) if n not in present}
                found |= {kind.replace("#", str(n)) for n in absent if not _repeats(present)}
    wanted = {(parent, leaf) for kind, found in parents.items() for parent in found for leaf in leaves[kind]}
    return {f"{parent}.{leaf}" if parent else leaf for parent, leaf in wanted} - trained


def _repeats(present: set[int]) -> bool:
    """Whether numbers follow a period of at most two thirds of their range."""
    size = max(present) + 1
    return any(
        all((n in present) == (n + period in present) for n in range(size - period))
        for period in range(2, 2 * size // 3 + 1)
    )


def _lacking(
    adapter: Adapter, base: Checkpoint, known: Places, architecture: Architecture, layers: int
) -> Iterator[tuple[str, str]]:
    """Yield what is missing, and the field of the config that names it."""
    config = adapter.origin.config
    stacked = (t for stack in adapter.origin.stacks.values() for t in stack.targets)
    trained = {(t.component, part) for t in (*adapter.origin.modules, *stacked) for part in t.parts}
    names = _texts(config.get(_TARGETS))
    if trained and not any(config.get(scope) for scope in _SCOPES):
        yield from ((path, _TARGETS) for path in _modules(set(names), trained, known, layers))
    own = {bare_name(p, t.component or architecture.at_hand, architecture) for t in adapter.deltas for p in t.parts}
    theirs = {bare: name for bare, (name, _) in Meanings(base, architecture).by_name.items()}
    if config.get(_BIAS) not in (None, "none"):
        modules = [t for t in adapter.targets if t in adapter.origin.modules]
        beside = {bare_name(part, t.component, architecture) for t in modules for part in bias_of(t).parts}
        elsewhere = config[_BIAS] == "all" and not adapter.skipped
        outlines = {outline(name) for name in own if name.endswith(".bias")} if elsewhere else set()
        wanted = (n for n in theirs if n in beside or (n.endswith(".bias") and outline(n) in outlines))
        yield from ((theirs[n], _BIAS) for n in wanted if n not in own and _number(n) < layers)
    for name in (*_texts(config.get(_SAVED)), *(HEADS if adapter.head_class else ())):
        has = any(within(name, tensor) for tensor in adapter.tensors)
        if (has or name not in HEADS) and not any(within(name, tensor) for tensor in adapter.skipped):
            inside = (n for n, tensor in theirs.items() if within(name, tensor))
            yield from ((theirs[n], _SAVED) for n in inside if n not in own and _number(n) < layers)


def within(module: str, tensor: str) -> bool:
    """Whether a tensor is in a module, as PEFT takes the names in modules_to_save: paths end like them."""
    return f"{module}." in f"{tensor.rpartition('.')[0]}."


def _modules(names: set[str], trained: set[tuple[str, str]], known: Places, layers: int) -> Iterator[str]:
    """Yield modules that the names select, and that have no factors: of kinds that have some elsewhere, or nowhere."""
    outlines = {(component, outline(path)) for component, path in trained}
    components = {component for component, _ in trained}
    used = {name for _, path in trained for name in _ends(path) & names}
    for target, place in known.items():
        component, path = target.component, target.parts[0]
        selected = _ends(path) & names
        if not selected or component not in components or (component, path) in trained or _number(path) >= layers:
            continue
        if (component, outline(path)) in outlines or not (selected & used or isinstance(place.layer, Experts)):
            yield path


def _ends(path: str) -> set[str]:
    """The names of target_modules that select a path: it and its ends."""
    elements = path.split(".")
    return {".".join(elements[n:]) for n in range(len(elements))}


def _texts(value: object) -> list[str]:
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


def _number(path: str) -> int:
    """The number of the layer. Files may have more layers than models are loaded with, to predict further tokens."""
    return next((int(element) for element in split(path) if element.isdecimal()), 0)


def _layers(config: Mapping[str, Any]) -> int:
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    found = [part["num_hidden_layers"] for part in parts if isinstance(part.get("num_hidden_layers"), int)]
    return max(found, default=1 << 30)
