"""Where a source is: a local path, or a repository on the Hub, which becomes a local folder without its bytes.

A repository is opened as a folder of empty files under HF_HOME/loratool, one for each of its own; what is in them, is
asked for when it is read (loratool.storage.remote). So plans, dry runs and refusals cost a few requests, whatever the
size.

A revision is a commit from the first request on; every later one names that commit. A local path wins over a name.
"""

from __future__ import annotations

import os
import re
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, NamedTuple

from loratool.errors import HubError, LoratoolError, StorageError
from loratool.storage import hub_names, remote, runs
from loratool.storage.hub_names import HubName
from loratool.strictjson import parse

if TYPE_CHECKING:
    from loratool.storage.hub import Listing

_FILES_CAP = 50_000
_WHICH = "repository, branch and folder"
_LASTS = 600.0  # seconds for which a branch is not asked for again

#: Told of a source what was understood of it: which of two places, which commit.
announce: Callable[[str, str], None] = lambda source, text: None  # noqa: E731


class _Opened(NamedTuple):
    """What a source turned out to be: folder or file, its name in reports, since when, and whether from a cache."""

    place: Path
    called: str
    since: float
    offline: bool = False


_opened: dict[tuple[str, str], _Opened] = {}
_roots: set[Path] = set()
_said: set[str] = set()
_lock = threading.RLock()


def place(source: str) -> Path:
    """Return the local path of a source; a repository is listed, and nothing of it fetched."""
    found = _find(source)
    return found.place if found else Path(source)


def spelled(path: str) -> str:
    """Return a local path as nobody can take it for the name of a repository; an address as it is."""
    return path if hub_names.is_address(path) else str(Path(path).absolute())


def called(source: str) -> str:
    """Return how reports call a source: a repository with the commit that was opened, a path as it is."""
    found = _remembered(source)
    return found.called if found else source


def is_from_cache(source: str) -> bool:
    """Whether a repository was opened as the cache has it, which may be a part of it: the Hub could not be asked."""
    found = _remembered(source)
    return found is not None and found.offline


def listed(source: str) -> Path | None:
    """Return the folder with the names that the Hub listed for a repository at this commit, if it was ever asked."""
    from loratool.storage import hub

    name = _parsed(called(source))
    folder = Path(hub.own_folder(name), name.revision, name.path) if name and name.is_commit else None
    return folder if folder and folder.exists() else None


def config_of_base(base: str, adapter: str) -> dict[str, Any]:
    """Return the config.json of the base that an adapter on the Hub names: one request, and empty where it fails."""
    from loratool.storage import hub

    name, found = _parsed(base), _remembered(adapter)
    if name is None or name.path or found is None or found.offline:
        return {}
    try:
        return parse(hub.read_small(name._replace(revision=name.revision or "main", path="config.json")), base)
    except LoratoolError:  # only a name in a config
        return {}


def name_in_configs(source: str) -> str:
    """Return what a config says of a base: the repository without the commit, a path as it is."""
    name = None if Path(source).exists() else _parsed(source)
    return name.repo if name and not name.path else source


def is_remote(source: str) -> bool:
    """Whether a source is on the Hub: it says so, or has the form of a name there and is no local path."""
    return hub_names.is_address(source) or (not Path(source).exists() and _parsed(source) is not None)


def forget() -> None:
    """Ask for branches again: between two runs of one process they may move."""
    with _lock:
        for key in [key for key in _opened if not name_is_fixed(key[0])]:
            del _opened[key]


@contextmanager
def named(source: str) -> Iterator[None]:
    """Let errors speak of a repository, not of the folder that stands for it, and of a cache that lacks files."""
    try:
        yield
    except LoratoolError as problem:
        found = _remembered(source)
        if found is None:
            raise
        problem.where = problem.where.replace(str(found.place), found.called)
        problem.hint = problem.hint.replace(str(found.place), found.called)
        if isinstance(problem, StorageError) and not (found.offline or _holds_weights(found.place)):
            held = ", ".join(sorted(p.name for p in found.place.iterdir())[:6])
            hint = f"it holds {held}: is it the right {_WHICH}?"
            raise HubError("there are no weights in it that loratool reads", where=found.called, hint=hint) from None
        if not found.offline or isinstance(problem, HubError):
            raise
        what = f"the copy in the cache is not complete: {problem.what}"
        raise HubError(what, where=found.called, hint="run it once without HF_HUB_OFFLINE, or hf download it") from None


def _holds_weights(place: Path) -> bool:
    return not place.is_dir() or any(path.suffix in runs.WEIGHTS for path in place.rglob("*"))


def _parsed(source: str) -> HubName | None:
    try:
        return hub_names.parse(source)
    except LoratoolError:
        return None


def _find(source: str) -> _Opened | None:
    if not hub_names.is_address(source) and Path(source).exists():
        if hub_names.parse(source):
            _say(source, f"{source}: the local path (hf://{source} is what the Hub has under this name)")
        return None
    name = hub_names.parse(source)
    if name is None:
        return None
    with _lock:
        return _remembered(source) or _open(source, name)


def _remembered(source: str) -> _Opened | None:
    found = _opened.get((source, os.environ.get("HF_ENDPOINT", "")))
    return found if found and (time.monotonic() - found.since < _LASTS or name_is_fixed(source)) else None


def name_is_fixed(source: str) -> bool:
    """Whether a source names a commit."""
    name = _parsed(source)
    return name is not None and name.is_commit


def _say(source: str, text: str) -> None:
    if text not in _said:
        _said.add(text)
        announce(source, text)


def warn_of_open_endpoint() -> None:
    """Say that others can read along, where HF_ENDPOINT is neither https nor on this machine."""
    from loratool.storage import hub

    if hub.is_open():
        _say(
            "HF_ENDPOINT", f"warning: {hub.shown_endpoint()} is not https: others can read tokens and files on the way"
        )


def _open(source: str, name: HubName) -> _Opened:
    from loratool.storage import hub

    warn_of_open_endpoint()
    try:
        if hub.is_offline():
            raise HubError("HF_HUB_OFFLINE is set, and the cache has no such revision", where=name, hint=_GET_ONCE)
        told = hub.listing(name)
    except HubError as problem:
        unreachable = hub.is_offline() or problem.missing == "connection"
        cached = hub.cached(name) if unreachable else None
        if cached is None:
            raise
        commit, root = cached
        fixed = name._replace(revision=commit)
        _say(
            source,
            f"{name}: commit {commit}, from the cache{'' if hub.is_offline() else ': the Hub cannot be reached'}",
        )
    else:
        fixed = name._replace(revision=told.commit)
        hub.note_commit(name, told.commit)
        root = _mirrored(fixed._replace(path=""), told)
        _say(source, f"{name}: commit {told.commit} on {hub.shown_endpoint()}")
        cached = None
    inside = root / name.path if name.path else root
    if not inside.exists():
        what = f"there is no {name.path!r} in it" if name.path else "there are no files in it"
        raise HubError(what, where=name._replace(path=""), hint=f"is it the right {'path' if name.path else _WHICH}?")
    opened = _Opened(inside, str(fixed), time.monotonic(), cached is not None)
    for text in (source, opened.called):
        _opened[text, os.environ.get("HF_ENDPOINT", "")] = opened
    return opened


_GET_ONCE = "run it once without HF_HUB_OFFLINE, or name a local path"


def _mirrored(name: HubName, told: Listing) -> Path:
    """Return the folder of empty files and links that stands for a repository at a commit."""
    from loratool.storage import hub

    if not re.fullmatch(r"[0-9a-f]{40}", told.commit) or len(told.files) > _FILES_CAP:
        raise HubError(f"commit {told.commit[:60]!r} with {len(told.files):,} files is not to be believed", where=name)
    root = hub.own_folder(name) / told.commit
    _roots.add(root)
    for path, file in told.files.items():
        _check_name(path, name)
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_symlink() and not target.exists():
            target.unlink()  # it led into a cache that was emptied
        try:
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        except FileExistsError:
            if target.stat().st_size == file.size:
                continue
        if file.size:
            remote.add(str(target), name._replace(path=path), file)
    return root


def _check_name(path: str, name: HubName) -> None:
    """Refuse a repository with names that would leave a folder, or that a terminal would obey."""
    odd = any(unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") for c in path)
    leaves = any(r.is_absolute() or r.drive or ".." in r.parts for r in (PurePosixPath(path), PureWindowsPath(path)))
    if odd or leaves or not path or "\\" in path:
        raise HubError(f"it holds a file that is called {path!r}", where=name, hint="a Hub does not allow such names")


def stores(folder: Path) -> list[Path]:
    """Return where the links of a folder may lead: huggingface_hub's cache, where it stands for a repository."""
    if not any(folder.is_relative_to(root) for root in _roots):
        return []
    from huggingface_hub import constants

    return [Path(constants.HF_HUB_CACHE).resolve()]


def nbytes(source: str) -> int:
    """Return the size in bytes of a source: of a file, or of the files in a folder."""
    root = place(source)
    return sum(map(remote.size, (p for p in root.glob("*") if p.is_file()))) if root.is_dir() else remote.size(root)
