"""What an adapter should have and lacks: its config says what was trained, and the base what there is to train.

A file that lost half of its keys looks like a smaller adapter. It is told apart by what its config names: a module that
has factors in other layers or in none, a trained bias, a module that was trained in full, trained tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loratool.adapter import Adapter
from loratool.architecture import Architecture
from loratool.errors import MismatchError
from loratool.layers import Experts
from loratool.operations.matching import Places, bare_name, bias_of
from loratool.patterns import outline, split
from loratool.storage.checkpoint import Checkpoint
from loratool.tensors import module_of

HEADS = ("classifier", "score", "qa_outputs")  # PEFT lists all that a task may have; a model has one of them
_SCOPES = ("layers_to_transform", "layers_pattern", "exclude_modules")  # with these, names do not say it all
_TARGETS, _BIAS, _SAVED = "target_modules", "bias", "modules_to_save"


def require_complete(
    adapter: Adapter, base: Checkpoint, known: Places, architecture: Architecture, changes: Mapping[str, Any]
) -> None:
    """Raise MismatchError that lists what the config of a PEFT adapter names, the base has, and the adapter lacks.

    `changes` are those of the base's config.
    """
    config = adapter.origin.config
    layers = _layers({**(base.config or {}), **changes})
    missing = [f"{name} ({field})" for name, field in _lacking(adapter, base, known, architecture, layers)]
    if "trainable_tokens_delta" not in "\n".join(adapter.tensors) and config.get("trainable_token_indices"):
        missing.append("trainable_tokens_delta (trainable_token_indices)")
    if missing:
        more = [f"... and {len(missing) - 12} more"] if len(missing) > 12 else []
        parts = "1 part of this adapter is" if len(missing) == 1 else f"{len(missing)} parts of this adapter are"
        what = f"{parts} missing: its config says that this was trained"
        raise MismatchError(
            "\n  ".join([what, *missing[:12], *more]),
            where=adapter.origin.path,
            hint="was it saved completely? If this is all of it, say in adapter_config.json what was trained",
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
    own = {bare_name(part, architecture) for target in adapter.deltas for part in target.parts}
    theirs = {module_of(bare_name(name, architecture)): name for name in base.tensors}
    if config.get(_BIAS) not in (None, "none"):
        modules = [t for t in adapter.targets if t in adapter.origin.modules]
        beside = {bare_name(part, architecture) for target in modules for part in bias_of(target).parts}
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
    for (component, (path, *_)), place in known.items():
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
