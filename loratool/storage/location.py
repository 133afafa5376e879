"""Where a source is: a local path, or a repository on the Hub, which becomes a local folder without its bytes.

A repository is opened as a folder of empty files under HF_HOME/loratool, one for each of its own. What a header or a
config says is asked for by ranges, when it is read; a file that a run needs whole is fetched into huggingface_hub's
cache, when the run starts, and linked in. So plans, dry runs and refusals cost a few requests, whatever the size.
While `streaming`, such files stay where they are, too, and the run reads them by ranges.

A revision is a commit from the first request on; every later one names that commit. A local path wins over a name.
"""

from __future__ import annotations

import os
import re
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, NamedTuple

from loratool.errors import HubError, LoratoolError, UsageError
from loratool.storage import hub_names
from loratool.storage.hub_names import HubName

if TYPE_CHECKING:
    from loratool.storage.hub import Listing
    from loratool.storage.ranges import Ranges

_FIRST = 1 << 18  # bytes: nearly all headers of adapters, and all of a small file
_SMALL = 1 << 20  # configs up to here are read by one request, and kept
_FILES_CAP = 50_000
_RANGES_CAP = 1024  # beyond, a file is fetched
_NEAR = 1 << 16  # bytes between two ranges that are not worth a request
_LASTS = 600.0  # seconds for which a branch is not asked for again

#: Told of a source what was understood of it: which of two places, which commit.
announce: Callable[[str, str], None] = lambda source, text: None  # noqa: E731


class _Stub(NamedTuple):
    """A file that is not here: repository and commit, path, size in bytes, and the first bytes as far as asked for."""

    name: HubName
    size: int
    head: bytearray


class _Opened(NamedTuple):
    """What a source turned out to be: folder or file, its name in reports, since when, and whether from a cache."""

    place: Path
    called: str
    since: float
    offline: bool = False


_stubs: dict[str, _Stub] = {}
_ranges: dict[str, Ranges] = {}  # of those stubs that runs read where they are
_streaming: ContextVar[bool] = ContextVar("streaming", default=False)
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
def streaming() -> Iterator[None]:
    """Let the runs inside this block read what is on the Hub by ranges, and keep nothing of it but small configs.

        with loratool.streaming():
            loratool.merge("org/base", ["org/adapter"], "merged")

    What huggingface_hub's cache has already is read from there. Pickles, which are not read in parts, are refused.
    """
    before = _streaming.set(True)
    try:
        yield
    finally:
        _streaming.reset(before)


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
        if not found.offline or isinstance(problem, HubError):
            raise
        what = f"the copy in the cache is not complete: {problem.what}"
        raise HubError(what, where=found.called, hint="run it once without HF_HUB_OFFLINE, or hf download it") from None


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
        raise HubError(f"there is no {name.path!r} in it", where=name._replace(path=""), hint="is the path right?")
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
            _stubs[str(target)] = _Stub(name._replace(path=path), file.size, bytearray())
    return root


def _check_name(path: str, name: HubName) -> None:
    """Refuse a repository with names that would leave a folder, or that a terminal would obey."""
    odd = any(unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") for c in path)
    leaves = any(r.is_absolute() or r.drive or ".." in r.parts for r in (PurePosixPath(path), PureWindowsPath(path)))
    if odd or leaves or not path or "\\" in path:
        raise HubError(f"it holds a file that is called {path!r}", where=name, hint="a Hub does not allow such names")


# -- the bytes --------------------------------------------------------------------------------------------------


def size(path: Path) -> int:
    """Return the size of a file in bytes, here or on the Hub."""
    stub = _stubs.get(str(path))
    return stub.size if stub else path.stat().st_size


def stores(folder: Path) -> list[Path]:
    """Return where the links of a folder may lead: huggingface_hub's cache, where it stands for a repository."""
    if not any(folder.is_relative_to(root) for root in _roots):
        return []
    from huggingface_hub import constants

    return [Path(constants.HF_HUB_CACHE).resolve()]


def nbytes(source: str) -> int:
    """Return the size in bytes of a source: of a file, or of the files in a folder."""
    root = place(source)
    return sum(map(size, (p for p in root.glob("*") if p.is_file()))) if root.is_dir() else size(root)


def read(path: Path, start: int, stop: int) -> bytes:
    """Read bytes of a file, fewer where it ends before `stop`. Of a file on the Hub, those alone."""
    stub = _stubs.get(str(path))
    if stub is None:
        with path.open("rb") as file:
            return os.pread(file.fileno(), stop - start, start)
    stop = min(stop, stub.size)
    if start >= stop:
        return b""
    if start <= len(stub.head) < stop:
        _extend(stub, max(stop, _FIRST))
    return bytes(stub.head[start:stop]) if stop <= len(stub.head) else _asked(stub, start, stop)


def _extend(stub: _Stub, stop: int) -> None:
    start, stop = len(stub.head), min(stop, stub.size)
    data = _asked(stub, start, stop)
    with _lock:
        stub.head[start:] = data if len(data) > len(stub.head) - start else stub.head[start:]


def look_ahead(paths: Iterable[Path]) -> None:
    """Ask for the beginnings of many files at once, of those that are on the Hub."""
    wanted = [path for path in dict.fromkeys(paths) if str(path) in _stubs and not _stubs[str(path)].head]
    if len(wanted) > 1:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda path: read(path, 0, 8), wanted))


def _asked(stub: _Stub, start: int, stop: int) -> bytes:
    from loratool.storage import hub

    return hub.read(stub.name, start, stop)


def small_pieces(path: str, places: Sequence[tuple[int, int]]) -> list[bytes]:
    """Return small pieces (offset, bytes) of a file.

    On the Hub neighbours are one request, several go at once; where they are very many the file is fetched.
    """
    stub = _stubs.get(path)
    if stub is None:
        with Path(path).open("rb") as file:
            return [os.pread(file.fileno(), nbytes, offset) for offset, nbytes in places]
    runs: list[list[int]] = []
    for offset, nbytes in sorted(places):
        if runs and offset - runs[-1][1] <= _NEAR:
            runs[-1][1] = max(runs[-1][1], offset + nbytes)
        else:
            runs.append([offset, offset + nbytes])
    if sum(stop > len(stub.head) for _, stop in runs) > _RANGES_CAP and not _streaming.get():
        fetch([path])
        return small_pieces(path, places)
    with ThreadPoolExecutor(8) as pool:
        found = dict(zip((run[0] for run in runs), pool.map(lambda run: read(Path(path), *run), runs), strict=True))
    starts = sorted(found)
    pieces = []
    for offset, nbytes in places:
        start = max(s for s in starts if s <= offset)
        pieces.append(found[start][offset - start : offset - start + nbytes])
    return pieces


def fetch(paths: Iterable[str]) -> None:
    """Bring files here that are on the Hub so far, by huggingface_hub's cache; while streaming, those that it has."""
    wanted: dict[HubName, list[str]] = {}
    for path in dict.fromkeys(paths):
        stub = _stubs.get(path)
        if stub is not None and not (_streaming.get() and _is_left(path, stub)):
            wanted.setdefault(stub.name._replace(path=""), []).append(path)
    for name, files in wanted.items():
        _fetch(name, files)


def _is_left(path: str, stub: _Stub) -> bool:
    """Leave a file where it is, to be read by ranges, unless the cache has it."""
    from loratool.storage import hub
    from loratool.storage.ranges import Ranges

    if hub.is_cached(stub.name):
        return False
    with _lock:
        _ranges.setdefault(path, Ranges(stub.name, stub.size))
    return True


def ranges(path: str) -> Ranges | None:
    """Return what reads a file that a streaming run left on the Hub; None for any other file."""
    return _ranges.get(path) if path in _stubs else None


def is_here(folder: Path) -> bool:
    """Whether no file in a folder was left on the Hub by a streaming run."""
    return not any(path in _stubs and Path(path).is_relative_to(folder) for path in _ranges)


def fetch_whole(path: Path) -> None:
    """Bring a file here that is opened by others, or not read in parts."""
    if str(path) in _stubs and (_streaming.get() or str(path) in _ranges):
        fetch([str(path)])  # from the cache, perhaps
        if str(path) in _stubs:
            raise UsageError("this file is not read in parts", where=path, hint="leave --stream out")
    fetch([str(path)])


def fetch_small(path: Path) -> None:
    """Bring a config here: by one request, where it is not large."""
    stub = _stubs.get(str(path))
    if stub is not None and stub.size > _SMALL and not _streaming.get():
        fetch([str(path)])
    elif stub is not None:
        _keep(path, stub)


def _keep(path: Path, stub: _Stub) -> None:
    data = read(path, 0, stub.size)
    with _lock:
        staged = path.with_name(f".{path.name}.{os.getpid()}")
        staged.write_bytes(data)
        staged.replace(path)
        _stubs.pop(str(path), None)


def _fetch(name: HubName, files: Sequence[str]) -> None:
    """Fetch files of one commit into the cache, with what was read of it before, and link them in."""
    from loratool.storage import hub

    with _lock:
        stubs = {path: _stubs[path] for path in files if path in _stubs}
        if not stubs:
            return
        root = Path(next(iter(stubs)).removesuffix(next(iter(stubs.values())).name.path))
        beside = [p.relative_to(root).as_posix() for p in root.rglob("*") if _is_read(p)]
        snapshot = hub.download(name, sorted({*beside, *(stub.name.path for stub in stubs.values())}))
        for path, stub in stubs.items():
            there = snapshot / stub.name.path
            if there.stat().st_size != stub.size:
                what = f"{there.stat().st_size:,} bytes arrived of {stub.size:,}"
                raise HubError(what, where=stub.name, hint="hf cache verify finds what is damaged; run it again")
            link = Path(f"{path}.{os.getpid()}.link")
            link.symlink_to(there.resolve())
            link.replace(path)
            _stubs.pop(path, None)


def _is_read(path: Path) -> bool:
    """Whether a file of a mirror was read by a request of its own, and is not in the cache."""
    return not path.is_symlink() and path.is_file() and path.stat().st_size > 0 and not path.name.startswith(".")
