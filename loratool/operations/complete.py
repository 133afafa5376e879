"""What an adapter should have and lacks: its config says what was trained, and the base what there is to train.

A file that lost half of its keys looks like a smaller adapter. It is told apart by what its config names: a module that
has factors in other layers or in none, a trained bias, a module to save.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loratool.adapter import Adapter, Target
from loratool.errors import MismatchError
from loratool.layers import Experts
from loratool.operations.matching import Places
from loratool.patterns import outline, split
from loratool.storage.checkpoint import Checkpoint

_SCOPES = ("layers_to_transform", "layers_pattern", "exclude_modules")  # with these, names do not say it all
_HEADS = ("classifier", "score", "qa_outputs")  # PEFT lists all that a task may have; a model has one of them


def require_complete(adapter: Adapter, base: Checkpoint, known: Places, changes: Mapping[str, Any]) -> None:
    """Raise MismatchError that lists what an adapter lacks; `changes` are those of the base's config."""
    missing = list(_lacking(adapter, base, known, changes))
    if missing:
        more = [f"... and {len(missing) - 12} more"] if len(missing) > 12 else []
        raise MismatchError(
            "\n  ".join([f"{len(missing)} parts of this adapter are missing", *missing[:12], *more]),
            where=adapter.origin.path,
            hint="was it saved completely? If this is all of it, say in adapter_config.json what was trained",
        )


def _lacking(adapter: Adapter, base: Checkpoint, known: Places, changes: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the config of a PEFT adapter says was trained, the base has, and the adapter does not."""
    config = adapter.origin.config
    stacked = (t for stack in adapter.origin.stacks.values() for t in stack.targets)
    trained = {(t.component, part) for t in (*adapter.origin.modules, *stacked) for part in t.parts}
    names = config.get("target_modules")
    if isinstance(names, list) and trained and not any(config.get(scope) for scope in _SCOPES):
        yield from _modules(
            [n for n in names if isinstance(n, str)], trained, known, _layers({**(base.config or {}), **changes})
        )
    if config.get("bias") not in (None, "none"):
        for target in (t for t in adapter.targets if t in adapter.origin.modules and t in known):
            bias = Target(target.component, tuple(f"{part}.bias" for part in target.parts))
            tensor = f"{known[target].tensor.removesuffix('.weight')}.bias"
            if tensor in base.tensors and bias not in adapter.deltas:
                yield f"{bias}: the config says that biases were trained, and the adapter does not have this one"
    saved = config.get("modules_to_save")
    for name in (n for n in (saved if isinstance(saved, list) else ()) if n not in _HEADS):
        if any(f".{name}." in f".{t}" for t in base.tensors) and not any(f".{name}." in t for t in adapter.tensors):
            yield f"{name}: the config says that it was trained in full, and the adapter does not have it"


def _modules(names: list[str], trained: set[tuple[str, str]], known: Places, layers: int) -> Iterator[str]:
    outlines = {(component, outline(part)) for component, part in trained}
    components = {component for component, _ in trained}
    unused = [n for n in names if not any(_ends(part, n) for _, part in trained)]
    for (component, (path, *_)), place in known.items():
        if component not in components or (component, path) in trained or not any(_ends(path, n) for n in names):
            continue
        number = next((int(element) for element in split(path) if element.isdecimal()), 0)
        if layers and number >= layers:
            continue  # such as the ones that predict further tokens, which models are loaded without
        elsewhere = (component, outline(path)) in outlines
        if elsewhere or (any(_ends(path, n) for n in unused) and not isinstance(place.layer, Experts)):
            yield f"{path}: the config says that it was trained (target_modules), and the adapter has nothing for it"


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _layers(config: Mapping[str, Any]) -> int:
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    found = [part["num_hidden_layers"] for part in parts if isinstance(part.get("num_hidden_layers"), int)]
    return max(found, default=0)
