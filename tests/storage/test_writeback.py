"""Writing behind changes when bytes reach the disk, never which."""

import ctypes
import errno
import os
import threading

import pytest

from loratool.errors import StorageError
from loratool.storage import writeback


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(writeback, "WINDOW", 1 << 16)
    monkeypatch.setattr(writeback, "_LEAST", 1 << 12)


def test_bytes_written_by_several_threads_in_any_pieces_are_all_there(tmp_path, small_windows):
    data = os.urandom(1 << 20)
    fd = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    behind = writeback.WriteBehind()

    def write(start: int, stop: int, step: int) -> None:
        for at in range(start, stop, step):
            behind.write(fd, data[at : min(at + step, stop)], at)

    threads = [threading.Thread(target=write, args=(n << 18, (n + 1) << 18, 1000 + 7000 * n)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(fd)
    assert (tmp_path / "out").read_bytes() == data


def test_a_copy_lands_at_its_place_also_without_help_from_the_kernel(tmp_path, small_windows, monkeypatch):
    data = os.urandom(300_000)
    (tmp_path / "in").write_bytes(data)
    source = os.open(tmp_path / "in", os.O_RDONLY)
    for kernel in (True, False):
        if not kernel:
            monkeypatch.setattr(os, "copy_file_range", lambda *_: (_ for _ in ()).throw(OSError(18, "cross-device")))
        fd = os.open(tmp_path / f"out{kernel}", os.O_RDWR | os.O_CREAT)
        writeback.WriteBehind().copy(source, fd, 1000, 5, 250_000)
        os.close(fd)
        assert (tmp_path / f"out{kernel}").read_bytes() == bytes(5) + data[1000:251_000]


def test_an_input_that_ends_too_early_is_an_error(tmp_path):
    (tmp_path / "in").write_bytes(b"short")
    source, fd = (os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in ("in", "out"))
    with pytest.raises(StorageError, match="ends at byte 5"):
        writeback.WriteBehind().copy(source, fd, 0, 0, 10)


def test_a_system_without_the_call_writes_all_the_same(tmp_path, monkeypatch):
    behind = writeback.WriteBehind()
    monkeypatch.setattr(behind, "_sync", None)
    fd = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    behind.write(fd, b"abc", 2)
    assert (tmp_path / "out").read_bytes() == b"\0\0abc"


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_an_error_of_the_disk_is_raised_where_it_is_told(tmp_path, small_windows, monkeypatch, code):
    behind = writeback.WriteBehind()
    monkeypatch.setattr(behind, "_sync", lambda *_: ctypes.set_errno(code) or -1)
    fd = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    with pytest.raises(OSError) as caught:  # noqa: PT011
        behind.write(fd, bytes(1 << 17), 0)
    assert caught.value.errno == code
    os.close(fd)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL, errno.ESPIPE])
def test_a_file_system_without_the_call_is_no_error(tmp_path, small_windows, monkeypatch, code):
    behind = writeback.WriteBehind()
    monkeypatch.setattr(behind, "_sync", lambda *_: ctypes.set_errno(code) or -1)
    fd = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    behind.write(fd, bytes(1 << 17), 0)
    os.close(fd)


def test_the_real_call_reports_its_errors(tmp_path, small_windows):
    fd = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    behind = writeback.WriteBehind()
    behind.write(fd, bytes(1 << 18), 0)
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        behind._range(writeback._Run(fd, 0, 1 << 16), 2)
