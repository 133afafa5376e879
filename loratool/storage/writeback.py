"""Writing behind: what was written goes to the disk while the next part is computed, and then leaves the page cache.

An output larger than memory would otherwise push every other program's files out of the cache, and end with one long
fsync. Measured on a virtual machine, 2.2 GB: a third of the wall time and a quarter of the system time of writing all
and syncing at the end (fresh pages of the cache are what is dear there). Linux only; elsewhere nothing happens and the
final fsync does all the work.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from typing import NamedTuple

from loratool.errors import StorageError

WINDOW = 32 << 20  # bytes that are sent to the disk together
_LEAST = 4 << 20  # shorter runs are left to the kernel
_START, _FINISH = 2, 7  # SYNC_FILE_RANGE_WRITE; ... between WAIT_BEFORE and WAIT_AFTER
_UNABLE = (errno.ENOSYS, errno.EINVAL, errno.ESPIPE)  # the kernel or the file system has no such call: nothing is lost


class _Run(NamedTuple):
    """Contiguous bytes of one file."""

    fd: int
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class WriteBehind:
    """Positioned writes; each thread has two windows, one filling and one on its way to the disk."""

    def __init__(self) -> None:
        self._mine = threading.local()
        self._sync = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
        if self._sync is not None:
            self._sync.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
            self._sync.restype = ctypes.c_int

    def write(self, fd: int, data: bytes | memoryview, offset: int) -> None:
        """Write all of `data` at `offset`."""
        view, at = memoryview(data), offset
        while view:
            done = os.pwrite(fd, view, at)
            view, at = view[done:], at + done
        self._wrote(fd, offset, at - offset)

    def copy(self, source: int, fd: int, start: int, offset: int, nbytes: int) -> None:
        """Copy bytes from `start` of another file to `offset`, by the kernel where it can (or shares the blocks)."""
        while nbytes:
            try:
                done = os.copy_file_range(source, fd, min(nbytes, WINDOW), start, offset)
            except OSError:  # across file systems, or a kernel without it
                done = os.pwrite(fd, os.pread(source, min(nbytes, _LEAST), start), offset)
            if not done:
                raise StorageError(f"an input ends at byte {start:,}: was it changed?")
            self._wrote(fd, offset, done)
            start, offset, nbytes = start + done, offset + done, nbytes - done

    def _wrote(self, fd: int, offset: int, nbytes: int) -> None:
        if self._sync is None:
            return
        run: _Run | None = getattr(self._mine, "filling", None)
        if run and (run.fd, run.stop) == (fd, offset):
            run = _Run(fd, run.start, offset + nbytes)
        else:
            if run and run.nbytes >= _LEAST:
                self._send(run)
            run = _Run(fd, offset, offset + nbytes)
        if run.nbytes >= WINDOW:
            self._send(run)
            run = None
        self._mine.filling = run

    def _send(self, run: _Run) -> None:
        """Start writing a run to the disk; finish the run before it and let go of its pages."""
        self._range(run, _START)
        before: _Run | None = getattr(self._mine, "sent", None)
        if before:
            self._range(before, _FINISH)
            os.posix_fadvise(before.fd, before.start, before.nbytes, os.POSIX_FADV_DONTNEED)
        self._mine.sent = run

    def _range(self, run: _Run, flags: int) -> None:
        """Call sync_file_range; OSError where the disk failed: the kernel tells a failure once, here or by fsync."""
        assert self._sync is not None
        if self._sync(run.fd, run.start, run.nbytes, flags):
            failure = ctypes.get_errno()
            if failure not in _UNABLE:
                raise OSError(failure, os.strerror(failure))
