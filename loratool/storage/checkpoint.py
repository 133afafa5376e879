"""Opening what lies on disk: a file, a folder, a sharded checkpoint by its index. Headers only.

An index is untrusted: its shard names must stay inside the folder (under Posix and Windows rules, links included;
the Hugging Face cache's blobs are the one allowed outside), and index and headers must agree both ways.

Pickled weights (pytorch_model.bin) are read only where the caller allows it. They are described as the safetensors
that they become: shards and index carry the names of the output, headers have no bytes of their own.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from loratool.errors import FormatError, InputError, StorageError
from loratool.plan import TensorFile
from loratool.storage import jsonfile, quantised, runs, safetensors
from loratool.storage.runs import PICKLES
from loratool.tensors import Inline, Span, TensorRef, TensorSource

_ADAPTER_WEIGHTS = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
)
#: The first that is there is the model; what lies beside it is a second copy.
_BASE_WEIGHTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin",
)
#: What goes along with the weights when a model is rewritten; nothing in it is parsed or executed.
_COMPANIONS = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".bpe", ".spm", ".vocab")
_COMPANION_NAMES = ("license", "notice", "merges", "use_policy")
_COMPANION_CAP = 64 << 20
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


class Shard(NamedTuple):
    """One weight file of a checkpoint: its name as safetensors, which is the output's, and its name in the folder.

    The header of a pickle has no raw bytes, and its tensors are in the order that a new file has.
    """

    name: str
    header: safetensors.Header
    source: str


@dataclass(frozen=True)
class Checkpoint(TensorSource):
    """An opened checkpoint or adapter: its tensors, its files, and the config beside them.

    `index` and `index_name` are those of the output: of a pickled checkpoint they differ from what lies in `folder`.
    `files` are the names there of what was read, `notes` say what was not, and why. Of a quantised checkpoint
    `tensors` are the logical ones, and `quantised` their encodings; `stored` are those of the files, `stored_shards`
    the files with them, and `spent` the fates of the ones that no logical tensor is made of.
    """

    shards: tuple[Shard, ...] = ()
    index: dict[str, object] = field(default_factory=dict)
    index_name: str = ""
    folder: str = ""
    files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    quantised: Mapping[str, str] = field(default_factory=dict)
    stored: Mapping[str, TensorRef] = field(default_factory=dict)
    spent: Mapping[str, str] = field(default_factory=dict)
    stored_shards: tuple[Shard, ...] = ()


def exists(text: str) -> bool:
    """Whether a source is a local path."""
    return Path(text).exists()


def open_adapter(path: str, *, allow_pickle: bool = False) -> Checkpoint:
    """Open an adapter: a folder with its config, or one file. One-element tensors (alphas) are read along."""
    place = Path(path)
    if place.is_dir():
        place = _adapter_folder(place)
        weights = next((place / n for n in _ADAPTER_WEIGHTS if (place / n).is_file()), None) or _only_file(place)
    else:
        weights = place
    config = weights.parent / "adapter_config.json"
    if place.is_file() and not weights.name.startswith("adapter_model"):
        config = Path()  # a config beside a file of another name belongs to something else
    opened = _open_file(weights, allow_pickle)
    found = jsonfile.read(config) if config.is_file() else None
    return replace(opened, path=path, config=found, tensors=_with_scalars(opened.tensors))


def open_base(path: str, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a base checkpoint: a folder (sharded or not), the index of one, or one file. Never more than headers."""
    place = Path(path)
    if place.name.endswith(".index.json") and place.is_file():
        weights, place = place, place.parent
    elif place.is_dir():
        weights = _base_weights(place)
    else:
        return quantised.logical(_open_file(place, allow_pickle))
    is_index = weights.name.endswith(".index.json")
    opened = _open_index(weights, allow_pickle) if is_index else _open_file(weights, allow_pickle)
    config = place / "config.json"
    opened = replace(
        opened,
        path=path,
        folder=str(place),
        config=jsonfile.read(config) if config.is_file() else None,
        notes=runs.second_copies(place, opened.files, _ADAPTER_WEIGHTS),
    )
    return quantised.logical(opened)


def config_of(path: str) -> dict[str, Any]:
    """Return the config.json of a model: of its folder, beside its weights, or the file itself."""
    place = Path(path)
    file = place / "config.json" if place.is_dir() else place
    if file.suffix != ".json" or file.name.endswith(".index.json"):
        file = file.with_name("config.json")
    if not file.is_file():
        raise StorageError("there is no config.json", where=path, hint="name the model's folder, or its config.json")
    return jsonfile.read(file)


def _base_weights(place: Path) -> Path:
    """Return the file or index that is the model in a folder, or raise with what is there instead."""
    weights = next((place / n for n in _BASE_WEIGHTS if (place / n).is_file()), None)
    if weights is None and (place / "model_index.json").is_file():
        raise FormatError(
            "this is a whole diffusers pipeline",
            where=place,
            hint=f"name one component, for example {place / 'unet'}",
        )
    pickled = sorted(p for p in place.glob("pytorch_model*") if p.suffix in PICKLES and p.is_file())
    return weights or _only_file(place, pickled)


def is_adapter_folder(path: str) -> bool:
    """Whether a folder says by its file names that it is an adapter, or holds named adapters and no model."""
    place = Path(path)
    if not place.is_dir() or any((place / n).is_file() for n in _BASE_WEIGHTS):
        return _has_adapter(place)
    return _has_adapter(place) or any(_has_adapter(inner) for inner in place.iterdir())


def _has_adapter(place: Path) -> bool:
    return any((place / n).is_file() for n in ("adapter_config.json", *_ADAPTER_WEIGHTS))


def companions(folder: str) -> list[str]:
    """Return the files that belong with a model's weights (tokenizer, config, licence...), one subfolder deep."""
    root = Path(folder)
    names = []
    for path in sorted(p for pattern in ("*", "*/*") for p in root.glob(pattern)):
        relative = path.relative_to(root)
        hidden = any(part.startswith(".") for part in relative.parts)
        skipped = path.name.endswith(".index.json") or path.name in ("adapter_config.json", "loratool.report.json")
        skipped = skipped or runs.is_state(path.name)
        named = path.suffix in _COMPANIONS or path.stem.lower().startswith(_COMPANION_NAMES)
        nested = len(relative.parts) > 1 and (path.parent / "config.json") != path  # only configs of submodules
        wanted = path.is_file() and named and not (hidden or skipped or nested)
        if wanted and path.stat().st_size <= _COMPANION_CAP:
            names.append(relative.as_posix())
    return names


def tokenizer_files(folder: str) -> list[str]:
    """Return the files of a tokenizer in a folder; none where it is a file, or has only a chat template."""
    root = Path(folder)
    names = [n for n in _TOKENIZER if (root / n).is_file() and is_inside(root / n, root)] if root.is_dir() else []
    return (
        names if set(names) & {"tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt"} else []
    )


def left_behind(folder: str, taken: Collection[str]) -> list[str]:
    """Return what lies in a model's folder and is not taken along: files, and folders with a trailing slash."""
    names = []
    for path in sorted(Path(folder).iterdir()):
        if path.name.startswith(".") or path.name in taken:
            continue
        if not path.is_dir():
            names.append(path.name)
        elif any(p.is_file() and p.relative_to(folder).as_posix() not in taken for p in path.glob("*")):
            names.append(f"{path.name}/")
    return names


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path, links followed, stays in its folder; the blobs of the Hugging Face cache count as inside."""
    real, home = path.resolve(), folder.resolve()
    roots = [home]
    if home.parent.name == "snapshots":  # snapshots/<commit>/x -> ../../blobs/<digest>
        roots.append(home.parent.parent / "blobs")
    return any(real.is_relative_to(root) for root in roots)


def _adapter_folder(place: Path) -> Path:
    """Return the folder itself, or the one subfolder that holds an adapter (PEFT saves named adapters so)."""
    if _has_adapter(place):
        return place
    inner = [p for p in sorted(place.iterdir()) if p.is_dir() and _has_adapter(p)]
    steps = [p for p in runs.checkpoints(place) if p in inner]
    named = [p for p in inner if p not in steps]
    if len(named) > 1:
        raise InputError(
            f"several adapters are in this folder: {', '.join(p.name for p in named)}",
            where=place,
            hint=f"name one of them, for example {named[0]}",
        )
    if steps and not named:
        raise runs.one_of(steps, place)
    return named[0] if named else place


def _only_file(place: Path, pickled: Sequence[Path] = ()) -> Path:
    """Return the one weights file of a folder: safetensors, or else one of `pickled`."""
    files = sorted(place.glob("*.safetensors")) or list(pickled)
    if len(files) == 1:
        return files[0]
    if not files:
        raise runs.no_weights(place)
    raise InputError(
        f"{len(files)} weight files and no index: {', '.join(f.name for f in files[:4])}",
        where=place,
        hint="name one file",
    )


def _open_file(path: Path, allow_pickle: bool) -> Checkpoint:
    if not path.is_file():
        raise StorageError("no such file or folder", where=path, hint=_fetching(path))
    shard, tensors = _read(path, path.name, allow_pickle)
    return Checkpoint(str(path), tensors, shard.header.metadata, shards=(shard,), files=(path.name,))


def _read(path: Path, name: str, allow_pickle: bool) -> tuple[Shard, dict[str, TensorRef]]:
    """Read what a weights file holds: as a shard, and its tensors in file order."""
    pieces = runs.in_pieces(path)
    if pieces is not None:
        raise pieces
    if path.suffix not in PICKLES:
        header = safetensors.read_header(path)
        return Shard(name, header, name), {ref.name: ref for ref in header.tensors}
    if not allow_pickle:
        raise FormatError(
            "a pickle can run code when it is opened",
            where=path,
            hint="if you trust its author: --allow-pickle (opened with weights_only=True); "
            "or save it as safetensors: model.save_pretrained(folder)",
        )
    from loratool.storage import torchfile

    tensors = torchfile.read(path)
    new = TensorFile.new(_as_safetensors(name), tensors.values(), {"format": "pt"})  # transformers wants to be told
    return Shard(new.name, safetensors.Header(b"", new.tensors, dict(new.metadata)), name), tensors


def _as_safetensors(name: str) -> str:
    """Return what save_pretrained calls a pickle of weights, or the index of them, when it writes safetensors."""
    path = PurePosixPath(name)
    weights, index, _ = path.name.partition(".index.json")
    stem = weights.removesuffix(PurePosixPath(weights).suffix)
    stem = stem.removeprefix("pytorch_") if stem.startswith("pytorch_model") else stem
    return str(path.with_name(f"{stem}.safetensors{index}"))


def _fetching(path: Path) -> str:
    """Say how a source that looks like a Hub id gets here."""
    name = path.as_posix()
    hub = f"; `hf download {name} --local-dir {path.name}` fetches it" if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else ""
    return f"sources are local paths{hub}"


def _open_index(path: Path, allow_pickle: bool) -> Checkpoint:
    index = jsonfile.read(path, jsonfile.INDEX_CAP)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError("the index has no weight_map", where=path)
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise FormatError("the index's weight_map must map tensors to file names", where=path)
    shards: list[Shard] = []
    tensors: dict[str, TensorRef] = {}
    for name in dict.fromkeys(weight_map.values()):
        shard, found = _read(_contained(path, name), name, allow_pickle)
        if any(other.name == shard.name for other in shards):
            raise FormatError(f"two shards would be called {shard.name!r} as safetensors", where=path)
        strange = next((n for n in found if weight_map.get(n) != name), None)
        if strange is not None:
            raise FormatError(
                f"{name} holds {strange!r}, which the index places in {weight_map.get(strange)!r}", where=path
            )
        shards.append(shard)
        tensors |= found
    missing = [n for n in weight_map if n not in tensors]
    if missing:
        raise FormatError(
            f"the index names {len(missing)} tensors that no shard holds, such as {missing[0]!r}",
            where=path,
            hint="the checkpoint is incomplete: fetch it again",
        )
    names = {shard.source: shard.name for shard in shards}
    return Checkpoint(
        str(path),
        tensors,
        shards[0].header.metadata,
        shards=tuple(shards),
        index={**index, "weight_map": {tensor: names[source] for tensor, source in weight_map.items()}},
        index_name=path.name if all(s.name == s.source for s in shards) else _as_safetensors(path.name),
        folder=str(path.parent),
        files=(path.name, *names),
    )


def _contained(index: Path, name: str) -> Path:
    """Return the path of a shard, or raise where its name leaves the index's folder."""
    refused = FormatError(f"the index points outside its folder: {name!r}", where=index)
    if not name or "\0" in name:
        raise refused
    for rules in (PurePosixPath(name), PureWindowsPath(name)):
        if rules.is_absolute() or rules.drive or rules.root or ".." in rules.parts:
            raise refused
    path, folder = index.parent / name, index.parent
    if not is_inside(path, folder):
        raise refused
    try:
        mode = path.stat().st_mode
    except OSError:
        raise StorageError(
            "the index names a shard that is missing", where=path, hint="fetch the checkpoint again"
        ) from None
    if not stat.S_ISREG(mode):
        raise FormatError("a shard must be a regular file", where=path)
    return path


def _with_scalars(tensors: Iterable[str] | dict[str, TensorRef]) -> dict[str, TensorRef]:
    """Read the one-element tensors, so that formats can ask for their value."""
    assert isinstance(tensors, dict)
    out, opened = {}, {}
    try:
        for name, ref in tensors.items():
            span = ref.pieces[0] if ref.pieces else None
            if isinstance(span, Span) and 0 < ref.nbytes <= 8 and all(n == 1 for n in ref.shape):
                if span.path not in opened:
                    opened[span.path] = os.open(span.path, os.O_RDONLY)
                data = os.pread(opened[span.path], span.nbytes, span.offset)
                out[name] = replace(ref, pieces=(Inline(data),))
            else:
                out[name] = ref
    finally:
        for fd in opened.values():
            os.close(fd)
    return out
