"""What PiSSA and LoftQ left of a base: how it is known for that wherever it goes, and which adapters may go into it.

`init` puts a small file of its own beside the weights. It names no folders, and goes along when the folder is copied,
pushed or fetched; what transformers saves after a merge is no residual any more, and has no such file.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from loratool.adapter import Adapter, Finding, Weighted
from loratool.errors import LoratoolError, MismatchError
from loratool.operations.touched import is_base
from loratool.plan import JsonFile
from loratool.storage import jsonfile, location

MARK = "loratool_residual.json"
CHANGING = {"pissa": "PiSSA", "loftq": "LoftQ"}  # the starts that change the base, and what people call them


class Residual(NamedTuple):
    """The rest of the base `of` less what `adapter` starts from, made with `init`; names, not paths."""

    init: str
    of: str
    adapter: str

    def __str__(self) -> str:
        return f"the {CHANGING.get(self.init, self.init)} residual of {self.of}"

    @classmethod
    def new(cls, init: str, base: str, adapter: Path) -> Residual:
        """Describe the residual of a base that was given as `base`: a folder is called by its last name."""
        named = location.name_in_configs(base)
        return cls(init, Path(named).resolve().name if Path(named).exists() else named, adapter.resolve().name)

    @property
    def file(self) -> JsonFile:
        """The file that says so."""
        return JsonFile(MARK, {"init": self.init, "residual_of": self.of, "adapter": self.adapter})


def residual_in(source: str, *, ask: bool = True) -> Residual | None:
    """Return what a model is the residual of; None where it is none, or not to be found.

    `ask` looks for names of the Hub there.
    """
    with suppress(LoratoolError, OSError, ValueError):  # it may be only a name in a config
        if not Path(source).exists() and not ask:
            return None
        place = location.place(source)
        file = (place if place.is_dir() else place.parent) / MARK
        if file.is_file():
            told = jsonfile.read(file)
            return Residual(*(str(told.get(name) or "")[:200] for name in ("init", "residual_of", "adapter")))
    return None


def of_residual(adapter: Adapter, base: str) -> Adapter:
    """Return an adapter that was trained on a residual as one of a changed base, unless `base` is that residual."""
    named = adapter.base_model
    if not named or (adapter.changed_base and not adapter.residual):
        return adapter
    if base and _is_same(named, base):
        return replace(adapter, changed_base="", residual="")
    ask = location.is_remote(adapter.origin.path) or bool(base and location.is_remote(base))
    found = residual_in(named, ask=ask)
    if found is None or adapter.residual:
        return adapter
    note = Finding("info", "base_model_name_or_path", f"{named} is {found}: the adapter fits that base only")
    findings = (*adapter.findings, note)
    return replace(adapter, changed_base=found.init or "pissa", residual=named, findings=findings)


def _is_same(named: str, given: str) -> bool:
    """Whether a name in a config means the base that was given: the same folder, or the same repository."""
    with suppress(OSError):
        if Path(named).exists() and Path(given).exists():
            return any(Path(named).samefile(place) for place in (given, Path(given).parent))
    return location.name_in_configs(named) == location.name_in_configs(given)


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
    began = [w for w in adapters if _began(w.adapter, base, found)]
    unknown = [w.adapter for w in adapters if _began(w.adapter, base, found) is None]
    told = f"{base} is {found}: it lacks what {found.adapter or 'the new adapter'} starts from"
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
    if named and _is_same(named, base):
        return True
    as_this, as_original = bool(named) and is_base(named, base), bool(named) and is_base(named, found.of)
    return None if as_this == as_original else as_this


def _counted(began: Sequence[Weighted], base: str, found: Residual) -> list[Finding]:
    """Warn where a start comes back other than once; refuse several that do not make up one."""
    first = began[0].adapter.origin.path
    learnt = f"loratool merge {found.of} {first}{{}} --init-adapter {found.adapter}/initial"
    weights = [w.of(target) for w in began for target in w.adapter.deltas]
    total = sum(w.weight for w in began)
    if len(began) > 1 and abs(total - 1) > 1e-6:
        what = f"{len(began)} adapters bring back what {base}, {found}, lacks: it would count {total:g} times"
        raise MismatchError(
            what, where=first, hint=f"let their weights sum to 1; or {learnt.format(' ...')}, for each of them"
        )
    if len(began) == 1 and any(abs(weight - 1) > 1e-6 for weight in weights):
        scale = f"{began[0].weight:g}" if not began[0].scales else "W"
        what = f"a weight other than 1 on {found} scales the start, too, a part of the base"
        return [Finding("warning", first, what, f"{learnt.format(f':{scale}')} scales only what was learnt")]
    if any(w.adapter.skipped for w in began):
        what = f"modules that are left out stay without their start: {base} is {found}"
        hint = f"{learnt.format('')} with --target or --exclude leaves out only what was learnt"
        return [Finding("warning", first, what, hint)]
    return []
