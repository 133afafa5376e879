"""Pipelines of diffusers: a folder of components, each a model of its own, as one checkpoint.

Names of tensors get their component in front, `unet:conv_in.weight`; what is no model that an adapter can be for (VAE,
schedulers, tokenizers, safety checkers) is not opened, and goes along as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.errors import StorageError
from loratool.storage import quantised
from loratool.storage.runs import WEIGHTS
from loratool.storage.safetensors import Header
from loratool.tensors import TensorRef

if TYPE_CHECKING:
    from loratool.storage.checkpoint import Checkpoint

_MAIN = ("unet", "transformer")


def together(path: str, parts: Mapping[str, Checkpoint]) -> Checkpoint:
    """Return a pipeline out of its opened components, by their folders."""
    components = {name: quantised.logical(_qualified(one, name)) for name, one in parts.items()}
    every = list(components.values())
    main = next((components[name] for name in _MAIN if name in components), every[0])
    return replace(
        main,
        path=path,
        tensors=_merged(*(c.tensors for c in every)),
        metadata={},
        shards=tuple(chain.from_iterable(c.shards for c in every)),
        index={},
        index_name="",
        folder=str(Path(path)),
        files=tuple(f"{name}/{file}" for name, c in components.items() for file in c.files),
        notes=tuple(f"{name}: {note}" for name, c in components.items() for note in c.notes),
        quantised={name: how for c in every for name, how in c.quantised.items()},
        stored=_merged(*(c.stored or c.tensors for c in every)) if any(c.stored for c in every) else {},
        spent={name: fate for c in every for name, fate in c.spent.items()},
        stored_shards=tuple(chain.from_iterable(c.stored_shards or c.shards for c in every)),
        components=components,
    )


def check_whole(place: Path, index: Mapping[str, object]) -> None:
    """Raise StorageError where a folder lacks components that its model_index.json lists, or their weights."""
    listed = [name for name, value in index.items() if isinstance(value, list) and value[:1] != [None]]
    for name in listed:
        folder = place / name
        is_model = (folder / "config.json").is_file()  # schedulers and tokenizers call theirs otherwise
        if not folder.is_dir() or (is_model and not any(p.suffix in WEIGHTS for p in folder.iterdir())):
            raise StorageError(f"the pipeline has no {'weights in ' * is_model}{name}/", where=place)


def _qualified(opened: Checkpoint, name: str) -> Checkpoint:
    """Return a component with its name before those of its tensors, and its folder before those of its files."""

    def renamed(ref: TensorRef) -> TensorRef:
        return ref.renamed(f"{name}:{ref.name}")

    shards = [
        shard._replace(
            name=f"{name}/{shard.name}",
            header=Header(shard.header.raw, tuple(map(renamed, shard.header.tensors)), shard.header.metadata),
            component=name,
        )
        for shard in opened.shards
    ]
    tensors = {f"{name}:{n}": renamed(ref) for n, ref in opened.tensors.items()}
    return replace(opened, tensors=tensors, shards=tuple(shards))


def _merged(*parts: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    return {name: ref for part in parts for name, ref in part.items()}


def beside(root: Path, opened: Mapping[str, Checkpoint]) -> list[str]:
    """Return the files of a pipeline that go along as they are: all in its other folders, and what is no weights."""
    names = []
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        relative = path.relative_to(root)
        hidden = any(part.startswith(".") for part in relative.parts)
        top = relative.parts[0]
        at_top = len(relative.parts) == 1
        if not hidden and top not in opened and not (at_top and (path.suffix in WEIGHTS or path.name == "README.md")):
            names.append(relative.as_posix())
    return names
