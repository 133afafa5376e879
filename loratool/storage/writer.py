"""The only place that creates files: an output appears whole or not at all.

Protocol: lock, staging folder beside the target, journal, preallocated files, positioned writes, fsync, self-check,
publish by one rename (an exchange where an existing output is replaced). A killed run leaves the old output or none;
the same command run again finds its journal and goes on. Layout of the staging folder:

    .OUT.loratool-<digest>/payload/...   what will become the output
                          /spool         factors waiting for their rank to be settled
                          /journal       one JSON line a finished unit, under the boot that wrote it
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from loratool.errors import FormatError, LockedError, StorageError, UsageError
from loratool.plan import Facts, JsonFile, Out, OutFile, TensorFile
from loratool.storage import jsonfile, safetensors
from loratool.storage.writeback import WriteBehind
from loratool.tensors import Inline, Span, TensorRef

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def check_target(out: Path, inputs: Iterable[str], *, single_file: bool, force: bool) -> None:
    """Refuse an output that exists (without `force`), that is an input or holds one, or that is no place to write."""
    for name in inputs:
        source, target = Path(name).resolve(), out.resolve()
        if target == source or source.is_relative_to(target) or (source.is_dir() and target.is_relative_to(source)):
            raise UsageError("the output would overwrite or enter an input", where=out, hint="choose another -o")
    if not out.exists():
        return
    empty = out.is_dir() and not any(out.iterdir())
    if not force and not empty:
        raise StorageError("the output exists", where=out, hint="choose another -o, or --force to replace it")
    if out.is_dir() == single_file:
        raise StorageError(
            f"the output is a {'folder' if out.is_dir() else 'file'}", where=out, hint="choose another -o"
        )
    if out.is_dir() and not empty and not (any(out.glob("*.safetensors")) or (out / "loratool.report.json").exists()):
        raise StorageError("refusing to replace a folder that holds no weights", where=out, hint="choose another -o")


class Staging:
    """One output being written. A context manager: left without `publish`, it removes what it staged."""

    def __init__(self, out: Path, digest: str, *, single_file: bool = False) -> None:
        self.out, self.digest, self.single_file = out, digest, single_file
        self.root = out.parent / f".{out.name}.loratool-{digest[:16]}"
        self.payload = self.root / "payload"
        self.done: dict[str, Facts] = {}
        self._places: dict[tuple[str, str], tuple[int, int]] = {}  # (file, tensor) -> (offset, bytes a row)
        self._spool: dict[str, tuple[int, str]] = {}  # name -> (offset, dtype)
        self._fds: dict[str, int] = {}
        self._behind = WriteBehind()
        self._lock = -1
        self._journal = -1
        self._made: list[Path] = []  # folders above the output that this run created

    # -- life ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Staging:
        try:
            self._made = [p for p in self.out.parents if not p.exists()]
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _take_lock(self._lock_path)
            for stale in self.out.parent.glob(f".{_glob_escape(self.out.name)}.loratool-*"):
                if stale != self.root:
                    shutil.rmtree(stale, ignore_errors=True)
            self._resume()
        except BaseException as error:  # __exit__ is not called for what fails here
            self._leave()
            if isinstance(error, OSError):
                raise _storage_error(error, self.out) from None
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()
        if isinstance(error, OSError):
            raise _storage_error(error, self.out) from error

    def _leave(self) -> None:
        """Remove what was staged and give the lock back. What a run without the lock finds belongs to another run."""
        for fd in (*self._fds.values(), self._journal):
            if fd >= 0:
                os.close(fd)
        if self._lock >= 0:
            with suppress(OSError):
                self._forget()
            shutil.rmtree(self.root, ignore_errors=True)
            self._lock_path.unlink(missing_ok=True)
            os.close(self._lock)
        for folder in self._made:
            with suppress(OSError):  # not empty: it holds the output, or somebody else's
                folder.rmdir()

    def _forget(self) -> None:
        """Remove the journal: from here on the payload may go, piece by piece, and no later run may trust the rest."""
        (self.root / "journal").unlink(missing_ok=True)

    @property
    def _lock_path(self) -> Path:
        return self.out.parent / f".{self.out.name}.loratool.lock"

    def _resume(self) -> None:
        """Read the journal of a killed run of the same plan; start clean where there is none to trust."""
        journal, boot = self.root / "journal", _boot_id()
        lines = journal.read_bytes().split(b"\n") if journal.is_file() else [b""]
        if lines[0] != boot:  # after a power loss unsynced data may be gone while its journal line survived
            shutil.rmtree(self.root, ignore_errors=True)
            self.payload.mkdir(parents=True, mode=0o700)
            journal.write_bytes(boot + b"\n")
            lines = [boot]
        for line in lines[1:]:
            try:
                key, facts = json.loads(line)
            except ValueError:  # torn by the kill
                continue
            self.done[key] = facts
        self._journal = os.open(journal, os.O_WRONLY | os.O_APPEND)
        os.write(self._journal, b"\n")

    # -- writing ------------------------------------------------------------------------------------------------

    def prepare(self, files: Iterable[OutFile]) -> None:
        """Create files: headers, preallocated data, and every byte that needs no computing."""
        for file in files:
            path = self.payload / file.name
            if not path.resolve().is_relative_to(self.payload.resolve()):
                raise UsageError(f"an output file may not be called {file.name!r}")
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(file, TensorFile):
                self._prepare_tensors(file, path)
            elif isinstance(file, JsonFile):
                path.write_bytes(jsonfile.dump(file.content))
            else:
                shutil.copyfile(file.source, path)

    def _prepare_tensors(self, file: TensorFile, path: Path) -> None:
        infos = [ref.info for ref in file.tensors]
        header = file.header or safetensors.make_header(infos, file.metadata)
        size = len(header) + sum(info.nbytes for info in infos)
        # left by the killed run that is being resumed; files that settle made may differ from what it made
        resumed = f"file:{file.name}" in self.done and _starts_with(path, header, size)
        if resumed:
            self._fds[file.name] = os.open(path, os.O_RDWR)
        else:
            path.unlink(missing_ok=True)
            self._fds[file.name] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            _allocate(self._fds[file.name], size, self.out)
            self._behind.write(self._fds[file.name], header, 0)
        places = safetensors.offsets(header, infos)
        for ref in file.tensors:
            row = ref.nbytes // ref.shape[0] if ref.shape and ref.shape[0] else ref.nbytes
            self._places[file.name, ref.name] = places[ref.name], row
        if not resumed:
            self._fill(self._fds[file.name], file.tensors, places)
            self.record(f"file:{file.name}", {})

    def _fill(self, fd: int, refs: Sequence[TensorRef], places: Mapping[str, int]) -> None:
        """Write every byte of a file that needs no computing."""
        for ref in refs:
            at = places[ref.name]
            for piece in ref.pieces:
                if isinstance(piece, Inline):
                    self._behind.write(fd, piece.data, at)
                at += piece.nbytes
        sources: dict[str, int] = {}
        try:
            for path, start, at, nbytes in _runs(refs, places):
                if path not in sources:
                    sources[path] = os.open(path, os.O_RDONLY)
                self._behind.copy(sources[path], fd, start, at, nbytes)
        finally:
            for source in sources.values():
                os.close(source)

    def prepare_spool(self, outs: Iterable[Out]) -> None:
        """Reserve room in the spool for outputs whose rank is settled later."""
        at = 0
        for out in outs:
            nbytes = TensorRef(out.name, out.shape, out.dtype).nbytes
            self._places["", out.name] = at, nbytes // out.shape[0]
            self._spool[out.name] = at, out.dtype
            at += nbytes
        if at:
            self._fds[""] = os.open(self.root / "spool", os.O_RDWR | os.O_CREAT, 0o600)
            os.ftruncate(self._fds[""], max(at, os.fstat(self._fds[""]).st_size))

    def write(self, out: Out, row: int, data: memoryview) -> None:
        """Write rows of a tensor from `row` on. Spooled tensors are written whole, at their final shape."""
        offset, row_bytes = self._places[out.file, out.name]
        self._behind.write(self._fds[out.file], data, offset + row * row_bytes)

    def spooled(self, name: str, shape: tuple[int, ...]) -> TensorRef:
        """Return a reference to what was spooled as `name`."""
        offset, dtype = self._spool[name]
        ref = TensorRef(name, shape, dtype)
        return TensorRef(name, shape, dtype, (Span(str(self.root / "spool"), offset, ref.nbytes),))

    def record(self, key: str, facts: Facts) -> None:
        """Journal a finished unit: a resumed run will not repeat it."""
        self.done[key] = facts
        os.write(self._journal, json.dumps([key, facts]).encode() + b"\n")

    # -- publishing ---------------------------------------------------------------------------------------------

    def publish(self, files: Sequence[OutFile], *, force: bool) -> None:
        """Fsync, read back every header, and let the output appear under its name in one step."""
        for file in files:
            path = self.payload / file.name
            if isinstance(file, TensorFile):
                _check_written(path, file)
            _fsync(path)
        umask = os.umask(0)
        os.umask(umask)
        for path in (self.payload, *self.payload.rglob("*")):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        source = self.payload / files[0].name if self.single_file else self.payload
        _fsync(self.payload)
        self._forget()  # after an exchange the payload is the old output: it must not be resumed as the new one
        _publish(source, self.out, force)
        _fsync(self.out.parent)


def _publish(source: Path, out: Path, force: bool) -> None:
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    if not out.exists():
        source.rename(out)
    elif not force:
        raise StorageError("the output appeared while this run was working", where=out, hint="--force replaces it")
    elif out.is_file():
        source.replace(out)
    elif not _exchange(source, out):
        aside = source.parent / "replaced"
        out.rename(aside)
        source.rename(out)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths atomically (Linux renameat2); False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return bool(renameat2(_AT_FDCWD, bytes(one), _AT_FDCWD, bytes(other), _RENAME_EXCHANGE) == 0)


def _take_lock(path: Path) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise LockedError("another run is writing this output", where=path, hint="wait for it to end") from None
        try:
            if os.fstat(fd).st_ino == path.stat().st_ino:
                return fd
        except FileNotFoundError:
            pass  # its last holder removed it between our open and our lock
        os.close(fd)


def _runs(refs: Sequence[TensorRef], places: Mapping[str, int]) -> list[tuple[str, int, int, int]]:
    """Return what to copy as (path, from, to, bytes); neighbours in both files are one run."""
    runs: list[tuple[str, int, int, int]] = []
    for ref in refs:
        target = places[ref.name]
        for piece in ref.pieces:
            if isinstance(piece, Span):
                run = (piece.path, piece.offset, target, piece.nbytes)
                if runs:
                    path, start, at, nbytes = runs[-1]
                    if (path, start + nbytes, at + nbytes) == run[:3]:
                        runs.pop()
                        run = (path, start, at, nbytes + piece.nbytes)
                runs.append(run)
            target += piece.nbytes
    return runs


def _starts_with(path: Path, header: bytes, size: int) -> bool:
    if not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header


def _allocate(fd: int, size: int, out: Path) -> None:
    free = os.fstatvfs(fd)
    if size > free.f_bavail * free.f_frsize:
        raise StorageError(
            f"{size:,} bytes are needed, {free.f_bavail * free.f_frsize:,} are free",
            where=out,
            hint="choose another disk",
        )
    os.ftruncate(fd, size)  # not fallocate: writing into unwritten extents costs ext4 up to five times the CPU


def _check_written(path: Path, file: TensorFile) -> None:
    """Re-open the file with the safetensors library itself and compare it with the plan."""
    from safetensors import safe_open

    wanted = {ref.name: (list(ref.shape), ref.dtype) for ref in file.tensors}
    with safe_open(path, framework="numpy") as opened:
        written = {n: (opened.get_slice(n).get_shape(), str(opened.get_slice(n).get_dtype())) for n in opened.keys()}  # noqa: SIM118
    if written != wanted:
        raise FormatError("the written file does not read back as planned: please report this bug", where=path)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _boot_id() -> bytes:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    except OSError:
        return b"no boot id: " + os.urandom(8).hex().encode()  # never equal: such a system does not resume


def _glob_escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _storage_error(error: OSError, out: Path) -> StorageError:
    return StorageError(f"{error.strerror or error}", where=error.filename or out)
