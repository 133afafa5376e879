"""What goes along with merged weights: config, tokenizer, licence, index; and what does not, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter, Finding
from loratool.deltas import Tokens
from loratool.errors import MismatchError
from loratool.operations.rebuilt import edited
from loratool.operations.residual import MARK
from loratool.plan import CopiedFile, JsonFile, OutFile, TensorFile
from loratool.storage import location, pipeline
from loratool.storage.checkpoint import Checkpoint, companions, is_inside, left_behind, tokenizer_files
from loratool.storage.quantised import without_quantisation


def companion_files(
    base: Checkpoint,
    weights: Sequence[TensorFile],
    dtype: str,
    changes: Mapping[str, Any],
    adapters: Sequence[Adapter],
    *,
    decoded: bool = True,
) -> tuple[list[OutFile], list[Finding]]:
    """Return the files beside the weights, adapted to what changed, and findings on those that stay behind."""
    if base.components:
        return _of_pipeline(base, weights, dtype, changes, decoded=decoded)
    files: dict[str, OutFile] = {}
    findings: list[Finding] = []
    for name in (n for n in companions(base.folder) if n != MARK):  # what is merged is no residual any more
        if is_inside(Path(base.folder, name), Path(base.folder)):
            files[name] = CopiedFile(name, f"{base.folder}/{name}")
        else:
            findings.append(Finding("warning", name, "not copied: it is a link that leads out of the base's folder"))
    findings += _not_cached(base, files)
    if base.config and "config.json" in files:
        config = _config(base, dtype, changes, decoded=decoded)
        if config != base.config:
            files["config.json"] = JsonFile("config.json", config)
    words = any(isinstance(d, Tokens) for a in adapters for ds in a.deltas.values() for d in ds)
    if "vocab_size" in changes or words:
        findings += _tokenizer(files, adapters, resized="vocab_size" in changes)
    index = _index(base, weights)
    if index:
        files[index.name] = index
    taken = {MARK, *files, *base.files, *(file.name for file in weights)} | {f.where for f in findings}
    left = left_behind(base.folder, taken)
    if left:
        more = f" and {len(left) - 8} more" if len(left) > 8 else ""
        findings.append(Finding("info", base.path, f"not copied: {', '.join(left[:8])}{more}"))
    return list(files.values()), findings


def _not_cached(base: Checkpoint, files: Mapping[str, OutFile]) -> list[Finding]:
    """Say what should go along and is not in the cache, where the base was opened from there."""
    listed = location.listed(base.path) if location.is_from_cache(base.path) else None
    lacking = sorted(set(companions(str(listed))) - set(files)) if listed else []
    known = f"not copied, for the cache lacks it: {', '.join(lacking)}" if lacking else ""
    if not listed and location.is_from_cache(base.path) and not tokenizer_files(base.folder):
        known = "there is no tokenizer: the cache may hold a part of the repository only"
    return [Finding("warning", base.path, known, "run it once without HF_HUB_OFFLINE")] if known else []


def _of_pipeline(
    base: Checkpoint, weights: Sequence[TensorFile], dtype: str, changes: Mapping[str, Any], *, decoded: bool
) -> tuple[list[OutFile], list[Finding]]:
    """Return the files of each component, and the whole of the folders in which no adapter changes anything."""
    if changes:
        what = f"the adapter changes the config ({', '.join(changes)}) of one of the models in this pipeline"
        raise MismatchError(what, where=base.path, hint="merge it into the folder of that component alone")
    files: list[OutFile] = []
    findings: list[Finding] = []
    for name, component in base.components.items():
        own = [replace(f, name=f.name.removeprefix(f"{name}/")) for f in weights if f.name.startswith(f"{name}/")]
        found, notes = companion_files(component, own, dtype, {}, (), decoded=decoded)
        files += [_moved(file, name) for file in found]
        findings += [n if n.where == component.path else n._replace(where=f"{name}/{n.where}") for n in notes]
    for name in (n for n in pipeline.beside(Path(base.folder), base.components) if n != MARK):
        if is_inside(Path(base.folder, name), Path(base.folder)):
            files.append(CopiedFile(name, f"{base.folder}/{name}"))
        else:
            findings.append(Finding("warning", name, "not copied: it is a link that leads out of the base's folder"))
    return files, findings


def _moved(file: OutFile, folder: str) -> OutFile:
    """Return a file in a folder of the output."""
    name = f"{folder}/{file.name}"
    return replace(file, name=name) if isinstance(file, TensorFile) else file._replace(name=name)


def _config(base: Checkpoint, dtype: str, changes: Mapping[str, Any], *, decoded: bool) -> dict[str, Any]:
    config = edited(base.config or {}, changes)
    if dtype != "keep" and "_class_name" not in config:  # diffusers' configs do not say it
        config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    return without_quantisation(config) if base.quantised and decoded else config


def _tokenizer(files: dict[str, OutFile], adapters: Sequence[Adapter], *, resized: bool) -> list[Finding]:
    """Take the tokenizer of an adapter with a vocabulary of its own: the base's does not know the new words."""
    findings = []
    for folder in dict.fromkeys(a.origin.path for a in adapters):
        found = tokenizer_files(folder)
        if found:
            files.update({name: CopiedFile(name, str(location.place(folder) / name)) for name in found})
            findings.append(Finding("info", folder, "the tokenizer is the adapter's, as the vocabulary is"))
    if not findings and resized:
        what = "the vocabulary was resized, and no tokenizer lies beside the adapter: the base's is copied"
        findings.append(Finding("warning", ", ".join(a.origin.path for a in adapters), what))
    return findings


def _index(base: Checkpoint, weights: Sequence[TensorFile]) -> OutFile | None:
    """Return the index of a sharded output: the input's own where it still holds."""
    if not base.index_name:
        return None
    source = Path(base.folder, base.index_name)
    if all(file.header is not None for file in weights) and source.is_file():
        return CopiedFile(base.index_name, str(source))
    old = base.index.get("metadata")
    total = sum(ref.nbytes for file in weights for ref in file.tensors)
    weight_map = {ref.name: file.name for file in weights for ref in file.tensors}
    metadata = {**(old if isinstance(old, dict) else {}), "total_size": total}
    return JsonFile(base.index_name, {**base.index, "metadata": metadata, "weight_map": weight_map})
