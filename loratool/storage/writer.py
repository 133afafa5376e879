"""The only place that creates files: an output appears whole or not at all.

Protocol: lock, staging folder beside the target, journal, preallocated files, positioned writes, fsync, self-check,
publish by one rename (an exchange where an existing output is replaced). A killed run leaves the old output or none;
the same command run again finds its journal and goes on. Layout of the staging folder:

    .OUT.loratool-<digest>/payload/...   what will become the output
                          /spool         factors waiting for their rank to be settled
                          /journal       one JSON line a finished file or unit, under the boot that wrote it
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from loratool.errors import FormatError, HubError, StorageError, UsageError
from loratool.plan import CopiedFile, Facts, JsonFile, Out, OutFile, TensorFile, TextFile
from loratool.storage import digests, jsonfile, ranges, remote, safetensors, target
from loratool.storage.descriptor import Descriptor
from loratool.storage.writeback import WriteBehind
from loratool.tensors import Inline, Span, TensorRef


class Staging:
    """One output being written. A context manager: left without `publish`, it removes what it staged."""

    def __init__(self, out: Path, digest: str, *, single_file: bool = False) -> None:
        self.out, self.digest, self.single_file = out, digest, single_file
        self.root = out.parent / f".{out.name}.loratool-{digest[:16]}"
        self.payload = self.root / "payload"
        self.done: dict[str, Facts] = {}
        self._places: dict[tuple[str, str], int] = {}  # (file, tensor) -> offset
        self._spool: dict[str, tuple[int, str]] = {}  # name -> (offset, dtype)
        self._files: dict[str, Descriptor] = {}  # by name in the payload; the spool is ""
        self._whole: dict[str, int] = {}  # what the journal calls prepared, below the staging folder -> its size
        self._behind = WriteBehind()
        self._lock = -1
        self._journal = -1
        self._made: list[Path] = []  # folders above the output that this run created
        self._published: tuple[int, int] | None = None  # device and inode of what is to be published

    # -- life ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Staging:
        try:
            self._made = [p for p in self.out.parents if not p.exists()]
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._lock = target.take_lock(target.lock_path(self.out))
            for stale in target.stagings(self.out):
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
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            error.add_note(f"{self.out} was written" if self._is_published() else f"nothing was written to {self.out}")
        lost = isinstance(error, HubError) and bool(self._whole)
        if lost and isinstance(error, HubError):
            error.hint = f"the same command goes on where it stopped: what it made so far is in {self.root}"
        self._leave(keep=lost)
        if isinstance(error, OSError):
            raise _storage_error(error, self.out) from error

    def _leave(self, *, keep: bool = False) -> None:
        """Remove what was staged and give the lock back. What a run without the lock finds belongs to another run.

        `keep`: as a killed run would leave it, to be resumed.
        """
        self._files.clear()
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1
        if self._lock >= 0:
            if not keep:
                with suppress(OSError):
                    self._forget()
                shutil.rmtree(self.root, ignore_errors=True)
            target.lock_path(self.out).unlink(missing_ok=True)
            os.close(self._lock)
        for folder in self._made:
            with suppress(OSError):  # not empty: it holds the output, or somebody else's
                folder.rmdir()

    def _forget(self) -> None:
        """Remove the journal: from here on the payload may go, piece by piece, and no later run may trust the rest."""
        (self.root / "journal").unlink(missing_ok=True)

    def _is_published(self) -> bool:
        """Whether the output is ours, asked of the file system: a signal may arrive between any two instructions."""
        with suppress(OSError):
            status = self.out.stat()
            return (status.st_dev, status.st_ino) == self._published
        return False

    def _resume(self) -> None:
        """Read the journal of a killed run of the same plan; start clean where there is none to trust."""
        journal, boot = self.root / "journal", _boot_id()
        # after a power loss unsynced data may be gone while its journal line survived
        if not self._read_journal(journal, boot):
            shutil.rmtree(self.root, ignore_errors=True)
            self.done, self._whole = {}, {}
            self.payload.mkdir(parents=True, mode=0o700)
            journal.write_bytes(boot + b"\n")
        self._journal = os.open(journal, os.O_WRONLY | os.O_APPEND)
        os.write(self._journal, b"\n")

    def _read_journal(self, journal: Path, boot: bytes) -> bool:
        """Learn what a killed run had finished; False where it is of another boot, or files that it names are gone."""
        lines = journal.read_bytes().split(b"\n") if journal.is_file() else [b""]
        for line in lines[1:]:
            try:
                kind, name, value = json.loads(line)
            except (ValueError, TypeError):  # torn by the kill
                continue
            if kind == "file":
                self._whole[name] = value
            elif kind == "unit":
                self.done[name] = value
            else:
                self.done.clear()
        return lines[0] == boot and all(_has_size(self.root / name, size) for name, size in self._whole.items())

    def _note(self, kind: str, name: str, value: object) -> None:
        os.write(self._journal, json.dumps([kind, name, value]).encode() + b"\n")

    def _note_whole(self, name: str, size: int) -> None:
        """Journal that a file is prepared: where it is missing later, what units wrote into it is missing, too."""
        self._whole[name] = size
        self._note("file", name, size)

    def _forget_units(self) -> None:
        """Let every unit run again: a file that they write into had to be made anew."""
        if self.done:
            self.done.clear()
            self._note("forget", "", None)

    # -- writing ------------------------------------------------------------------------------------------------

    def prepare(self, files: Sequence[OutFile], spooled: Sequence[Out] = ()) -> None:
        """Create files: headers, room for data, and every byte that needs no computing.

        `spooled` are the outputs whose rank is settled later: room in the spool is reserved for them.
        """
        spool = sum(_room(out) for out in spooled)
        self._check_space(sum(map(_size_of, files)) + spool)
        for file in files:
            path = self.payload / file.name
            if not path.resolve().is_relative_to(self.payload.resolve()):
                raise UsageError(f"an output file may not be called {file.name!r}")
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(file, TensorFile):
                self._prepare_tensors(file, path)
            elif isinstance(file, JsonFile):
                self._behind.write(self._create(file.name).number, jsonfile.dump(file.content), 0)
            elif isinstance(file, TextFile):
                self._behind.write(self._create(file.name).number, file.text.encode(), 0)
            else:
                size = remote.size(Path(file.source))
                self._copy(self._create(file.name).number, [(file.source, 0, 0, size)], file.name)
        if spool:
            self._prepare_spool(spooled, spool)

    def _check_space(self, needed: int) -> None:
        """Refuse before anything is created; what a killed run already wrote is not needed again."""
        disk = os.statvfs(self.root)
        free = disk.f_bavail * disk.f_frsize
        if needed <= free:
            return
        held = sum(p.stat().st_blocks * 512 for p in self.root.rglob("*") if p.is_file())
        if needed > free + held:
            raise StorageError(
                f"{needed:,} bytes are needed, {free + held:,} are free",
                where=self.out,
                hint="free some space, or choose an -o on another disk",
            )

    def _create(self, name: str) -> Descriptor:
        """Create a file of the payload. It stays open: only the descriptors that wrote are sure to hear of errors."""
        path = self.payload / name
        path.unlink(missing_ok=True)
        self._files[name] = Descriptor(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        return self._files[name]

    def _prepare_tensors(self, file: TensorFile, path: Path) -> None:
        infos = [ref.info for ref in file.tensors]
        header = _header(file)
        size = _size_of(file)
        # left by the killed run that is being resumed; files that settle made may differ from what it made
        resumed = f"payload/{file.name}" in self._whole and _starts_with(path, header, size)
        if resumed:
            self._files[file.name] = Descriptor(path, os.O_RDWR)
        else:
            if not all(ref.pieces for ref in file.tensors):
                self._forget_units()
            fd = self._create(file.name).number
            os.ftruncate(fd, size)  # not fallocate: writing into unwritten extents costs ext4 up to five times the CPU
            self._behind.write(fd, header, 0)
        places = safetensors.offsets(header, infos)
        for ref in file.tensors:
            self._places[file.name, ref.name] = places[ref.name]
        if not resumed:
            self._fill(self._files[file.name].number, file.tensors, places, file.name)
            self._note_whole(f"payload/{file.name}", size)

    def _fill(self, fd: int, refs: Sequence[TensorRef], places: Mapping[str, int], title: str) -> None:
        """Write every byte of a file that needs no computing (a view has to be read and rearranged)."""
        views = [ref for ref in refs if ref.view]
        if views:
            from loratool.storage.load import Loader, as_bytes  # imports torch, which a copy does not need

            with Loader() as load:
                for ref in views:
                    self._behind.write(fd, as_bytes(load(ref)), places[ref.name])
        refs = [ref for ref in refs if not ref.view]
        for ref in refs:
            at = places[ref.name]
            for piece in ref.pieces:
                if isinstance(piece, Inline):
                    self._behind.write(fd, piece.data, at)
                at += piece.nbytes
        self._copy(fd, _runs(refs, places), title)

    def _copy(self, fd: int, runs: Sequence[tuple[str, int, int, int]], title: str) -> None:
        """Copy (path, from, to, bytes) into an open file."""
        away = {path: source for path, *_ in runs if (source := remote.ranges(path))}
        local: dict[str, Descriptor] = {}
        for path, start, at, nbytes in runs:
            if path not in away:
                if path not in local:
                    local[path] = Descriptor(path, os.O_RDONLY)
                self._behind.copy(local[path].number, fd, start, at, nbytes)
        if away:
            self._receive(fd, [(away[run[0]], *run[1:]) for run in runs if run[0] in away], title)

    def _receive(self, fd: int, runs: Sequence[tuple[ranges.Ranges, int, int, int]], title: str) -> None:
        """Copy from the Hub, with a progress bar: of a large model it takes hours."""
        buffer = memoryview(bytearray(min(ranges.WINDOW, max(run[3] for run in runs))))
        with ranges.bar(title, sum(run[3] for run in runs)) as bar:
            for source, start, at, nbytes in runs:
                for done in range(0, nbytes, ranges.WINDOW):
                    part = buffer[: nbytes - done]
                    source.read_into(part, start + done, bar.update)
                    self._behind.write(fd, part, at + done)

    def _prepare_spool(self, outs: Iterable[Out], size: int) -> None:
        """Reserve room in the spool for outputs whose rank is settled later."""
        at = 0
        for out in outs:
            self._places["", out.name] = at
            self._spool[out.name] = at, out.dtype
            at += _room(out)
        self._files[""] = Descriptor(self.root / "spool", os.O_RDWR | os.O_CREAT)
        if self._whole.get("spool") != size:
            self._forget_units()
            os.ftruncate(self._files[""].number, size)
            self._note_whole("spool", size)

    def write(self, out: Out, row: int, data: memoryview) -> None:
        """Write rows of a tensor from `row` on. Spooled tensors are written whole, at their final shape."""
        offset = self._places[out.file, out.name]
        row_bytes = TensorRef("", out.shape[1:], out.dtype).nbytes
        file = self._files[out.file]  # held while it is written: an interrupted run lets go of its files meanwhile
        self._behind.write(file.number, data, offset + row * row_bytes)

    def spooled(self, name: str, shape: tuple[int, ...]) -> TensorRef:
        """Return a reference to what was spooled as `name`."""
        offset, dtype = self._spool[name]
        ref = TensorRef(name, shape, dtype)
        return TensorRef(name, shape, dtype, (Span(str(self.root / "spool"), offset, ref.nbytes),))

    def record(self, key: str, facts: Facts) -> None:
        """Journal a finished unit: a resumed run will not repeat it."""
        self.done[key] = facts
        self._note("unit", key, facts)

    # -- publishing ---------------------------------------------------------------------------------------------

    def publish(self, files: Sequence[OutFile], *, force: bool) -> None:
        """Fill in the digests, fsync, read back every header, and let the output appear under its name in one step."""
        for file in files:
            if isinstance(file, TensorFile):
                self._settle_digests(file)
                _check_written(self.payload / file.name, file)
        for written in self._files.values():  # a descriptor opened now would not hear of an error told to these
            os.fsync(written.number)
        umask = os.umask(0)
        os.umask(umask)
        for path in (self.payload, *self.payload.rglob("*")):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
            if path.is_dir():
                target.fsync(path)
        source = self.payload / files[0].name if self.single_file else self.payload
        if force and self.out.exists():  # once more: the run may have taken hours
            target.check_replaceable(self.out, self.single_file, {file.name for file in files})
        status = source.stat()
        self._published = status.st_dev, status.st_ino
        self._forget()  # after an exchange the payload is the old output: it must not be resumed as the new one
        target.publish(source, self.out, force)
        for folder in {self.out.parent, *(made.parent for made in self._made)}:
            target.fsync(folder)

    def _settle_digests(self, file: TensorFile) -> None:
        """Write the header again with what the data, now complete, says: the fields are as long as before."""
        if file.digests:
            written, infos, before = self._files[file.name], [ref.info for ref in file.tensors], _header(file)
            told = digests.fields_of(written, len(before), infos, file.metadata, file.digests)
            self._behind.write(written.number, safetensors.make_header(infos, {**file.metadata, **told}), 0)


def _runs(refs: Sequence[TensorRef], places: Mapping[str, int]) -> list[tuple[str, int, int, int]]:
    """Return what to copy as (path, from, to, bytes); neighbours in both files are one run."""
    runs: list[tuple[str, int, int, int]] = []
    for ref in refs:
        place = places[ref.name]
        for piece in ref.pieces:
            if isinstance(piece, Span):
                run = (piece.path, piece.offset, place, piece.nbytes)
                if runs:
                    path, start, at, nbytes = runs[-1]
                    if (path, start + nbytes, at + nbytes) == run[:3]:
                        runs.pop()
                        run = (path, start, at, nbytes + piece.nbytes)
                runs.append(run)
            place += piece.nbytes
    return runs


def _starts_with(path: Path, header: bytes, size: int) -> bool:
    if not _has_size(path, size):
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _header(file: TensorFile) -> bytes:
    return file.header or safetensors.make_header((ref.info for ref in file.tensors), file.metadata or None)


def _size_of(file: OutFile) -> int:
    """Bytes that a file takes on the disk; of JSON, too few to count."""
    if isinstance(file, TensorFile):
        return len(_header(file)) + sum(ref.nbytes for ref in file.tensors)
    return remote.size(Path(file.source)) if isinstance(file, CopiedFile) else 0


def _room(out: Out) -> int:
    """Bytes that an output may take in the spool."""
    return TensorRef(out.name, out.shape, out.dtype).nbytes


def _check_written(path: Path, file: TensorFile) -> None:
    """Re-open the file with the safetensors library itself and compare it with the plan."""
    from safetensors import safe_open

    wanted = {ref.name: (list(ref.shape), ref.dtype) for ref in file.tensors}
    with safe_open(path, framework="numpy") as opened:
        written = {n: (opened.get_slice(n).get_shape(), str(opened.get_slice(n).get_dtype())) for n in opened.keys()}  # noqa: SIM118
    if written != wanted:
        raise FormatError("the written file does not read back as planned: please report this bug", where=path)


def _boot_id() -> bytes:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    except OSError:
        return b"no boot id: " + os.urandom(8).hex().encode()  # never equal: such a system does not resume


def _storage_error(error: OSError, out: Path) -> StorageError:
    return StorageError(f"{error.strerror or error}", where=error.filename or out)
