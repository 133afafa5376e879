"""What PiSSA and LoftQ left of a base: how it is known for that wherever it goes, and which adapters may go into it.

`init` puts a small file of its own beside the weights, or says it in the header of a single file. It names no folders,
and goes along when the weights are copied, pushed or fetched; what comes of a merge is no residual any more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from loratool import strictjson
from loratool.adapter import Adapter, Finding, Target, Weighted
from loratool.errors import FormatError, HubError, MismatchError, StorageError, UsageError
from loratool.operations.touched import folder_of, is_base, is_same
from loratool.plan import JsonFile, TensorFile
from loratool.storage import checkpoint, jsonfile, location, safetensors

MARK = "loratool_residual.json"
FIELD = "loratool_residual"  # of a file's metadata
_FIELDS = ("init", "residual_of", "adapter", "start")
CHANGING = {"pissa": "PiSSA", "loftq": "LoftQ"}  # the starts that change the base, and what people call them


class Residual(NamedTuple):
    """The rest of the base `of` less what `adapter` starts from, made with `init`; names, not paths.

    `start` is a digest of what training leaves as it was: the modules of the adapter and their ranks.
    """

    init: str
    of: str
    adapter: str
    start: str

    def __str__(self) -> str:
        return f"the {CHANGING[self.init]} residual of {self.of}"

    @classmethod
    def new(cls, init: str, base: str, adapter: Adapter, out: Path) -> Residual:
        """Describe the residual of a base that was given as `base`: a folder is called by its last name."""
        named = location.name_in_configs(base)
        of = Path(named).resolve().name if Path(named).exists() else named
        return cls(init, of, out.resolve().name, _start_of(adapter))

    @property
    def file(self) -> JsonFile:
        """The file that says so."""
        return JsonFile(MARK, self._told)

    def marked(self, file: TensorFile) -> TensorFile:
        """Return a single file that says so in its header."""
        return replace(file, metadata={**file.metadata, FIELD: json.dumps(self._told)}, header=None)

    @property
    def _told(self) -> dict[str, str]:
        return dict(zip(_FIELDS, self, strict=True))


def residual_in(source: str, *, ask: bool = True) -> Residual | None:
    """Return what a model is the residual of; None where it is none, or not to be found.

    `ask` looks for names of the Hub there. FormatError where the file that says so is damaged.
    """
    with suppress(HubError, StorageError, UsageError, OSError, ValueError):  # it may be only a name in a config
        if not Path(source).exists() and not ask:
            return None
        place = location.place(source)
        return _marked(place) if place.exists() else None
    return None


def _marked(place: Path) -> Residual | None:
    """Read the file beside a model's weights, or else the header of the one file that these are."""
    folder = place if place.is_dir() else folder_of(place)
    if folder and (folder.parent / "model_index.json").is_file():
        folder = folder.parent  # of a pipeline this is a component
    if folder and (folder / MARK).is_file():
        return _read(jsonfile.read(folder / MARK), folder / MARK)
    file = checkpoint.weights_of(place) if place.is_dir() else place
    if file is None or file.suffix != ".safetensors":
        return None
    told = None
    with suppress(FormatError):  # it says nothing where it cannot be read; who opens it is told why
        told = safetensors.read_header(file).metadata.get(FIELD)
    where = f"{file}, {FIELD} in its metadata"
    return None if told is None else _read(strictjson.parse(told, where), where)


def _read(told: Mapping[str, Any], where: object) -> Residual:
    """Read a mark; FormatError where a field is missing, empty or not text, or the start is an unknown one."""
    wrong = [name for name in _FIELDS if not (isinstance(told.get(name), str) and told[name])]
    wrong = wrong or [name for name in _FIELDS[:1] if told[name] not in CHANGING]
    if wrong:
        hint = "restore it from where the residual was made; or take the mark away, if this is no residual of init's"
        raise FormatError(
            f"what should say of which base this is the residual has no {wrong[0]!r} that init writes",
            where=where,
            hint=hint,
        )
    return Residual(*(told[name][:200] for name in _FIELDS))


def of_residual(adapter: Adapter, base: str, *, ask: bool = False) -> Adapter:
    """Return an adapter that was trained on a residual as one of a changed base, unless `base` is that residual.

    On the Hub the base that an adapter names is looked for where there is a `base`, or with `ask`.
    """
    named = adapter.base_model
    if not named or (adapter.changed_base and not adapter.residual):
        return adapter
    if base and is_same(named, base):
        return replace(adapter, changed_base="", residual="")
    found = residual_in(named, ask=(ask or bool(base)) and _asks(adapter, base))
    if found is None:
        return adapter
    if base and residual_in(base) == found:  # a copy
        return replace(adapter, changed_base="", residual="", base_model=base)
    if adapter.residual:
        return adapter
    note = Finding("info", "base_model_name_or_path", f"{named} is {found}: the adapter fits that base only")
    findings = (*adapter.findings, note)
    return replace(adapter, changed_base=found.init, residual=named, findings=findings)


def _asks(adapter: Adapter, base: str) -> bool:
    """Whether the base that an adapter names is worth a request: where something else is on the Hub already."""
    return location.is_remote(adapter.origin.path) or location.is_remote(base)


def _start_of(adapter: Adapter) -> str:
    """Return the digest of an adapter's modules and their ranks."""
    ranks = sorted((str(target), [delta.rank for delta in found]) for target, found in adapter.deltas.items())
    return sha256(repr(ranks).encode()).hexdigest()[:16]


def refuse_start(base: str, adapter: Adapter) -> None:
    """Raise MismatchError where an adapter less its start would go into a residual, which lacks that start already."""
    found = None if adapter.changed_base else residual_in(base)
    if found is not None:
        raise MismatchError(
            f"{base} is {found}, which has no part of the start: it would be taken out twice",
            where=adapter.origin.path,
            hint=f"{base} is what it was trained on: leave --init-adapter out; or give {found.of} as the base",
        )


def into_residual(base: str, adapters: Sequence[Weighted]) -> list[Finding]:
    """Say what is wrong with adapters that go into a residual, of which exactly one start has to come back.

    MismatchError where none of them can have begun as the adapter that the residual lacks, or several have.
    """
    found = residual_in(base)
    if found is None:
        return []
    whole = [w for w in adapters if not any(name.startswith("initial ") for name in w.adapter.tensors)]
    named = [w for w in whole if _began(w.adapter, base, found)]
    unknown = [w.adapter for w in whole if _began(w.adapter, base, found) is None]
    began = [w for w in named if w.adapter.skipped or found.start == _start_of(w.adapter)]
    told = f"{base} is {found}: it lacks what {found.adapter} starts from"
    if named and not began:  # resized or combined since, or of another start
        what = f"{told}, and this adapter has other modules or ranks"
        hint = "right for what was resized or combined since; wrong for an earlier residual of the same name"
        findings = [Finding("warning", w.adapter.origin.path, what, hint) for w in named]
        return [*findings, *_counted(named, base, found)]
    if not began and not unknown:
        raise MismatchError(
            f"{told}, and the adapter is one of {adapters[0].adapter.base_model}" if adapters else told,
            where=adapters[0].adapter.origin.path if adapters else base,
            hint=f"merge it into {found.of}; was it trained on the residual? Then base_model_name_or_path in its "
            "adapter_config.json has to name that",
        )
    if not began:
        what = "{}, and whether this adapter started there is not known: it names {}"
        hint = f"right for what was trained on this very residual; otherwise merge it into {found.of}"
        names = [(a.origin.path, a.base_model or "no base") for a in unknown]
        return [Finding("warning", path, what.format(told, name), hint) for path, name in names]
    return _counted(began, base, found)


def _began(adapter: Adapter, base: str, found: Residual) -> bool | None:
    """Whether an adapter was trained on this residual, by the base that it names; None where it cannot be told."""
    named = adapter.base_model
    if named and is_same(named, base):
        return True
    own = residual_in(named, ask=_asks(adapter, base)) if named else None
    if own is not None or (named and Path(named).exists()):
        return own == found
    as_this, as_original = bool(named) and is_base(named, base), bool(named) and is_base(named, found.of)
    return None if as_this == as_original else as_this


def _counted(began: Sequence[Weighted], base: str, found: Residual) -> list[Finding]:
    """Warn where a start comes back other than once; refuse several that do not make up one."""
    first = began[0].adapter.origin.path
    learnt = f"loratool merge {found.of} {first}{{}} --init-adapter {found.adapter}/initial"
    counts: dict[Target, float] = {}
    for w in began:
        for target in w.adapter.deltas:
            counts[target] = counts.get(target, 0.0) + w.of(target)
    odd = [count for count in counts.values() if abs(count - 1) > 1e-6]
    if len(began) > 1 and odd:
        what = f"{len(began)} adapters bring back what {base}, {found}, lacks: it would count {odd[0]:g} times"
        hint = f"let their weights sum to 1, in every module; or {learnt.format(' ...')}, for each of them. Where one "
        hint += "was trained on top of another, merge that first; then base_model_name_or_path has to name the result"
        raise MismatchError(what, where=first, hint=hint)
    if odd:
        scale = f"{began[0].weight:g}" if not began[0].scales else "W"
        what = f"a weight other than 1 on {found} scales the start, too, a part of the base"
        return [Finding("warning", first, what, f"{learnt.format(f':{scale}')} scales only what was learnt")]
    if any(w.adapter.skipped for w in began):
        what = f"modules that are left out stay without their start: {base} is {found}"
        hint = f"{learnt.format('')} with --target or --exclude leaves out only what was learnt"
        return [Finding("warning", first, what, hint)]
    return []
