"""Opening what lies on disk: a file, a folder, a sharded checkpoint by its index. Headers only.

An index is untrusted: its shard names must stay inside the folder (under Posix and Windows rules, links included;
the Hugging Face cache's blobs are the one allowed outside), and index and headers must agree both ways.

Pickled weights (pytorch_model.bin) are read only where the caller allows it. They are described as the safetensors
that they become: shards and index carry the names of the output, headers have no bytes of their own.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from loratool.errors import FormatError, InputError, LoratoolError, StorageError
from loratool.plan import RECORD, TensorFile
from loratool.storage import jsonfile, location, pipeline, quantised, remote, runs, safetensors
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
#: diffusers' names of weights of which a folder has several: in another dtype, or averaged over the training.
_VARIANTS = ("*model.safetensors.index.*.json", "*model.*.safetensors.index.json", "*model.*.safetensors")
_PIPELINE = "model_index.json"
#: The components of pipelines that adapters are for, by diffusers' names; of the others nothing is read.
_COMPONENT = re.compile(r"(unet|transformer|text_encoder)(_\d+)?")
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

    The header of a pickle has no raw bytes, and its tensors are in the order that a new file has. In a pipeline the
    component stands before the names of its tensors, as in `unet:conv_in.weight`, and its folder before the file's.
    """

    name: str
    header: safetensors.Header
    source: str
    component: str = ""

    def stored(self, name: str) -> str:
        """Return what a tensor is called in the file."""
        return name.removeprefix(f"{self.component}:") if self.component else name


@dataclass(frozen=True)
class Checkpoint(TensorSource):
    """An opened checkpoint or adapter: its tensors, its files, and the config beside them.

    `index` and `index_name` are those of the output: of a pickled checkpoint they differ from what lies in `folder`.
    `files` are the names there of what was read, `notes` say what was not, and why. Of a quantised checkpoint
    `tensors` are the logical ones, and `quantised` their encodings; `stored` are those of the files, `stored_shards`
    the files with them, and `spent` the fates of the ones that no logical tensor is made of.

    Of a pipeline of diffusers `components` are the models that an adapter can be for, by their folders; all tensors are
    the pipeline's, too, and the config is that of the model that makes the image.
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
    components: Mapping[str, Checkpoint] = field(default_factory=dict)


def exists(text: str) -> bool:
    """Whether a source is a local path."""
    try:
        return Path(text).exists()
    except OSError:  # too long for a name
        return False


def open_adapter(path: str, *, allow_pickle: bool = False) -> Checkpoint:
    """Open an adapter: a folder with its config, or one file. One-element tensors (alphas) are read along."""
    with location.named(path):
        opened = _open_adapter(location.place(path), allow_pickle)
        if opened.config is None and location.is_from_cache(path):
            _check_config(location.listed(path), opened.files)
        return replace(opened, path=location.called(path), tensors=_with_scalars(opened.tensors))


def _check_config(listed: Path | None, files: Collection[str]) -> None:
    """Refuse weights from a cache without their config, unless the repository is known to have none."""
    folder = listed.parent if listed and listed.is_file() else listed
    known = folder is not None and not (folder / "adapter_config.json").is_file()
    if not known and any(Path(name).name.startswith("adapter_model") for name in files):
        raise StorageError("there is no adapter_config.json")


def _open_adapter(place: Path, allow_pickle: bool) -> Checkpoint:
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
    return replace(opened, config=found)


def open_base(path: str, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a base checkpoint: a folder (sharded or not), the index of one, or one file. Never more than headers.

    A pipeline of diffusers is opened with all its components that an adapter can be for.
    """
    with location.named(path):
        place = location.place(path)
        if location.is_from_cache(path) and (place / _PIPELINE).is_file():
            pipeline.check_whole(place, jsonfile.read(place / _PIPELINE))
        return replace(_open_base(place, allow_pickle), path=location.called(path))


def _open_base(place: Path, allow_pickle: bool) -> Checkpoint:
    if not place.is_dir() and not (place.is_file() and _is_index(place.name)):
        return quantised.logical(_open_file(place, allow_pickle))
    if place.is_dir() and (place / _PIPELINE).is_file() and not any((place / n).is_file() for n in _BASE_WEIGHTS):
        return pipeline.together(str(place), _components(place, allow_pickle))
    return quantised.logical(_open_folder(place, allow_pickle))


def _open_folder(place: Path, allow_pickle: bool) -> Checkpoint:
    if place.is_dir():
        weights, folder = _base_weights(place), place
    else:
        weights, folder = place, place.parent
    opened = _open_index(weights, allow_pickle) if _is_index(weights.name) else _open_file(weights, allow_pickle)
    config = folder / "config.json"
    return replace(
        opened,
        path=str(place),
        folder=str(folder),
        config=jsonfile.read(config) if config.is_file() else None,
        notes=runs.second_copies(folder, opened.files, _ADAPTER_WEIGHTS),
    )


def _components(place: Path, allow_pickle: bool) -> dict[str, Checkpoint]:
    """Open the components of a pipeline that an adapter can be for."""
    index = jsonfile.read(place / _PIPELINE)
    listed = [name for name, value in index.items() if _COMPONENT.fullmatch(name) and value != [None, None]]
    missing = [name for name in listed if not (place / name).is_dir()]
    if missing or not listed:
        what = f"the pipeline has no {missing[0]}/" if missing else "no component of this pipeline can have an adapter"
        raise StorageError(what, where=place, hint="was it fetched completely? A component can be named by itself")
    return {name: _open_folder(place / name, allow_pickle) for name in listed}


def _is_index(name: str) -> bool:
    return re.fullmatch(r".*\.index(\.[\w-]+)?\.json", name) is not None


def config_of(path: str) -> dict[str, Any]:
    """Return the config.json of a model: of its folder, beside its weights, or the file itself."""
    place = location.place(path)
    if place.is_dir() and (place / _PIPELINE).is_file():
        place = next((place / name for name in ("unet", "transformer") if (place / name).is_dir()), place)
    file = place / "config.json" if place.is_dir() else place
    if file.suffix != ".json" or file.name.endswith(".index.json"):
        file = file.with_name("config.json")
    if not file.is_file():
        raise StorageError("there is no config.json", where=path, hint="name the model's folder, or its config.json")
    return jsonfile.read(file)


def _base_weights(place: Path) -> Path:
    """Return the file or index that is the model in a folder, or raise with what is there instead."""
    weights = next((place / n for n in _BASE_WEIGHTS if (place / n).is_file()), None)
    variants = [p for kind in _VARIANTS for p in sorted(place.glob(kind)) if not runs.SHARD.search(p.name)]
    if weights is None and len(variants) > 1:
        raise InputError(
            f"several variants and none without a name: {', '.join(p.name for p in variants)}",
            where=place,
            hint="keep the one that is meant in this folder",
        )
    pickled = sorted(p for p in place.glob("pytorch_model*") if p.suffix in PICKLES and p.is_file())
    return weights or next(iter(variants), None) or _only_file(place, pickled)


def weights_of(folder: Path) -> Path | None:
    """Return the file or index that is opened where a model's folder is named; None where none is, or several are."""
    try:
        return _base_weights(folder)
    except LoratoolError:
        return None


def is_adapter_folder(path: str) -> bool:
    """Whether a folder says by its file names that it is an adapter, or holds named adapters and no model."""
    place = location.place(path)
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
        skipped = _is_index(path.name) or path.name in ("adapter_config.json", RECORD)
        skipped = skipped or runs.is_state(path.name)
        named = path.suffix in _COMPANIONS or path.stem.lower().startswith(_COMPANION_NAMES)
        nested = len(relative.parts) > 1 and (path.parent / "config.json") != path  # only configs of submodules
        wanted = path.is_file() and named and not (hidden or skipped or nested)
        if wanted and remote.size(path) <= _COMPANION_CAP:
            names.append(relative.as_posix())
    return names


def tokenizer_files(folder: str) -> list[str]:
    """Return the files of a tokenizer in a folder; none where it is a file, or has only a chat template."""
    root = location.place(folder)
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
    commits = [place for place in (home, *home.parents) if place.parent.name == "snapshots"]
    roots = [home, *(commit.parent.parent / "blobs" for commit in commits)]  # snapshots/<commit>/x/y -> blobs/<digest>
    roots += location.stores(folder)
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
        inside = not path.is_absolute() and len(path.parts) > 2 and ".." not in path.parts
        hint = f"a source is a path, org/name or hf://{path.as_posix() if inside else 'org/name'}"
        raise StorageError("no such file or folder", where=path, hint=hint)
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

    remote.fetch_whole(path)
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


def _open_index(path: Path, allow_pickle: bool) -> Checkpoint:
    index = jsonfile.read(path, jsonfile.INDEX_CAP)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError("the index has no weight_map", where=path)
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise FormatError("the index's weight_map must map tensors to file names", where=path)
    shards: list[Shard] = []
    tensors: dict[str, TensorRef] = {}
    listed = list(dict.fromkeys(weight_map.values()))
    remote.look_ahead(_contained(path, name) for name in listed)
    for name in listed:
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
    small: dict[str, dict[str, Span]] = {}
    for name, ref in tensors.items():
        span = ref.pieces[0] if ref.pieces else None
        if isinstance(span, Span) and 0 < ref.nbytes <= 8 and all(n == 1 for n in ref.shape):
            small.setdefault(span.path, {})[name] = span
    values: dict[str, bytes] = {}
    for path, spans in small.items():
        pieces = remote.small_pieces(path, [(span.offset, span.nbytes) for span in spans.values()])
        values |= dict(zip(spans, pieces, strict=True))
    return {n: replace(ref, pieces=(Inline(values[n]),)) if n in values else ref for n, ref in tensors.items()}
