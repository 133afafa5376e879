"""What a word after `loratool arch ...` means: a family, the model_type of one, a model, or an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from loratool.errors import MismatchError, UsageError
from loratool.plugins import installed
from loratool.storage import checkpoint, jsonfile, location
from loratool.tensors import TensorRef, TensorSource

if TYPE_CHECKING:
    from loratool.architecture import Architecture
    from loratool.detection import Family
    from loratool.operations.survey import Survey


class Model(NamedTuple):
    """An opened model, and the family that it is of."""

    source: TensorSource
    family: Family

    @property
    def survey(self) -> Survey:
        """What the family says of it."""
        from loratool.operations.survey import survey_of

        return survey_of(self.source, self.family.architecture)


def family(word: str) -> Architecture | None:
    """Return the family of that name, or else the one whose configs say this model_type; None if there is neither."""
    every = installed().architectures()
    if word in installed().contested or any(a.name == word for a in every):
        return installed().architecture(word)
    named = [a for a in every if word in (*a.match.model_types, *a.match.classes)]
    if len(named) > 1:
        names = ", ".join(a.name for a in named)
        raise UsageError(f"{word!r} is a model_type of {names}", hint="name one of them")
    return named[0] if named else None


def family_alone(word: str, ranks: Sequence[int]) -> Architecture | None:
    """Return the family that a word means, as `family` does; UsageError where ranks were given, for it has no sizes."""
    found = family(word)
    if found is not None and ranks:
        hint = f"loratool arch show PATH --rank {ranks[0]}"
        raise UsageError(f"--rank is for a model: the {found.name} family alone has no sizes", hint=hint)
    return found


def require_path(word: str) -> None:
    """Raise UsageError, with what is near, where a word that names no family is no file or folder either."""
    if word.endswith(".py"):
        raise UsageError("a Python file is no model", where=word, hint=f"a family in it: -p {word}, then its name")
    if location.is_remote(word) or Path(word).exists():
        return
    if "/" in word or word.endswith((".safetensors", ".json")):
        raise UsageError("no such file or folder", where=word)
    known = family(word)
    if known is not None:
        what = f"{word} is a family" if known.name == word else f"{word} is a model_type of the {known.name} family"
        hint = f"name a model's folder, weights or config.json; `loratool arch show {word}` shows the family"
        raise UsageError(f"{what}, and a model is needed here", hint=hint)
    try:
        installed().architecture(word)
    except UsageError as problem:
        raise UsageError(f"{problem.what}, and there is no such file", hint=problem.hint) from None


def source(path: str) -> TensorSource:
    """Open a model: a folder, a weights file, or a config.json alone, which has no tensors."""
    place = location.place(path)
    config = place / "config.json" if place.is_dir() else place
    weights = place.is_dir() and any(p.suffix != ".json" for p in place.iterdir() if p.is_file())
    if config.name.endswith(".json") and not config.name.endswith(".index.json") and config.is_file() and not weights:
        return TensorSource(location.called(path), {}, {}, jsonfile.read(config))
    return checkpoint.open_base(path)


def is_adapter(path: str) -> bool:
    """Whether a path is an adapter: by the files in a folder, by the names in a file."""
    if location.place(path).is_dir():
        return checkpoint.is_adapter_folder(path)
    opened = source(path)
    return any(f.detect(opened) for f in installed().formats())


def model(path: str, arch: str = "", *, described: bool = False) -> Model:
    """Open a model and find its family. A config alone is enough: the libraries build its model without weights.

    With `described` it must be a family that a plugin describes.
    """
    from loratool.detection import family_of, recognise

    if is_adapter(path):
        raise UsageError("this is an adapter, and a model is needed here", where=path, hint=f"loratool inspect {path}")
    opened = source(path)
    if not opened.tensors and opened.config:
        from loratool.discovery import shapes_from_config

        shapes = shapes_from_config(opened.config)
        opened = replace(opened, tensors={name: TensorRef(name, shape, "F32") for name, shape in shapes.items()})
    if described and family_of(opened, installed(), arch) is None:
        kind = kind_of(opened.config or {}) or "no config"
        hint = "add one with -p FILE (30 lines: docs/plugins.md), or name one with --arch: loratool arch list"
        raise MismatchError(f"no installed family fits this model ({kind})", where=path, hint=hint)
    return Model(opened, recognise(opened, installed(), arch))


def kind_of(config: Mapping[str, Any]) -> str:
    """Return what a config calls its model."""
    return str(config.get("model_type") or config.get("_class_name") or "")


def candidates(opened: TensorSource, chosen: Architecture | None) -> list[dict[str, Any]]:
    """Return a row for each family that a model's config names or that knows all its weights."""
    from loratool.detection import fits, matrices, named_by, taken

    weights = matrices(opened.tensors)
    named_by_config, _ = named_by(opened.config or {}, installed())
    rows = []
    for one in installed().architectures():
        named = one in named_by_config
        knows = bool(weights) and fits(one, weights)
        mine = chosen is not None and one.name == chosen.name
        if named or knows or mine:
            alike = chosen is not None and all(taken(one.find(p)) == taken(chosen.find(p)) for p in weights)
            row = {"family": one.name, "named_by_config": named, "knows_every_weight": knows}
            rows.append({**row, **({"reads_them_alike": alike} if chosen else {}), "chosen": mine})
    return sorted(rows, key=lambda row: not row["chosen"])


def fitted(names: list[str], width: int) -> str:
    """Return the first names that fit a column, and how many more there are."""
    for shown in range(len(names), 0, -1):
        rest = f" and {len(names) - shown} more" if shown < len(names) else ""
        text = ", ".join(names[:shown]) + rest
        if len(text) <= width:
            return text
    return "…" + text[1 - width :] if names else ""
