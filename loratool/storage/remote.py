"""The bytes of files that are on the Hub and not here: asked for when they are read, or fetched when a run starts.

Such a file is an empty one here, which keeps its place. What a header or a config says is read by ranges; what a run
reads is fetched into huggingface_hub's cache, when the run starts, and linked in. While `streaming`, it stays where it
is, and the run reads it by ranges (loratool.storage.ranges).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from loratool.errors import HubError, UsageError
from loratool.storage.hub_names import HubName

if TYPE_CHECKING:
    from loratool.storage.hub import RemoteFile
    from loratool.storage.ranges import Ranges

_FIRST = 1 << 18  # bytes: nearly all headers of adapters, and all of a small file
_SMALL = 1 << 20  # configs up to here are read by one request, and kept
_RANGES_CAP = 1024  # beyond, a file is fetched
_NEAR = 1 << 16  # bytes between two ranges that are not worth a request


class _Stub(NamedTuple):
    """A file that is not here: repository, commit and path, what the Hub says of it, the first bytes so far."""

    name: HubName
    file: RemoteFile
    head: bytearray

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self.file.size


_stubs: dict[str, _Stub] = {}
_ranges: dict[str, Ranges] = {}  # of those stubs that runs read where they are
_streaming: ContextVar[bool] = ContextVar("streaming", default=False)
_lock = threading.RLock()


def add(path: str, name: HubName, file: RemoteFile) -> None:
    """Let the empty file at `path` stand for a file on the Hub."""
    _stubs[path] = _Stub(name, file, bytearray())


@contextmanager
def streaming() -> Iterator[None]:
    """Let the runs inside this block read what is on the Hub by ranges, and keep nothing of it but small configs.

        with loratool.streaming():
            loratool.merge("org/base", ["org/adapter"], "merged")

    What huggingface_hub's cache has already is read from there. Pickles, which are not read in parts, are refused. It
    is a matter of the thread that enters the block, and of what its runs start; other threads enter one of their own.
    """
    before = _streaming.set(True)
    try:
        yield
    finally:
        _streaming.reset(before)


def size(path: Path) -> int:
    """Return the size of a file in bytes, here or on the Hub."""
    stub = _stubs.get(str(path))
    return stub.size if stub else path.stat().st_size


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
    if sum(stop > len(stub.head) for _, stop in runs) > _RANGES_CAP:
        fetch([path])
        left = ranges(path)
        return [_piece(left, *one) for one in places] if left else small_pieces(path, places)
    with ThreadPoolExecutor(8) as pool:
        found = dict(zip((run[0] for run in runs), pool.map(lambda run: read(Path(path), *run), runs), strict=True))
    starts = sorted(found)
    pieces = []
    for offset, nbytes in places:
        start = max(s for s in starts if s <= offset)
        pieces.append(found[start][offset - start : offset - start + nbytes])
    return pieces


def _piece(source: Ranges, offset: int, nbytes: int) -> bytes:
    data = bytearray(nbytes)
    source.read_into(memoryview(data), offset)
    return bytes(data)


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
        _ranges.setdefault(path, Ranges(stub.name, stub.file))
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
