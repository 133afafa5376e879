"""The write protocol: an output appears whole or not at all; what a killed run left is trusted only where it may be."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loratool.errors import FormatError, LockedError, StorageError, UsageError
from loratool.plan import CopiedFile, JsonFile, Out, TensorFile
from loratool.storage import target, writer
from loratool.storage.load import as_bytes
from loratool.storage.target import check_target
from loratool.storage.writer import Staging
from loratool.tensors import Inline, TensorRef

VALUES = torch.arange(12, dtype=torch.float32).reshape(4, 3)
COPIED = torch.tensor([7.0, 8.0])
FILE = TensorFile.new(
    "model.safetensors",
    [TensorRef("a", (4, 3), "F32"), TensorRef("b", (2,), "F32", (Inline(COPIED.numpy().tobytes()),))],
    {"format": "pt"},
)
OUT = Out("model.safetensors", "a", (4, 3), "F32")


def beside(out: Path) -> list[str]:
    """What lies in the output's folder apart from the output."""
    return sorted(p.name for p in out.parent.iterdir() if p != out)


def write_all(stage: Staging, values: torch.Tensor = VALUES) -> None:
    stage.prepare([FILE])
    stage.write(OUT, 0, as_bytes(values[:2]))
    stage.write(OUT, 2, as_bytes(values[2:]))
    stage.record("unit", {"delta": 1.0})


def write_folder(out: Path, values: torch.Tensor = VALUES, *, force: bool = False, digest: str = "0" * 64) -> None:
    with Staging(out, digest) as stage:
        write_all(stage, values)
        stage.publish([FILE], force=force)


class Killed(BaseException):
    """Stands for SIGKILL: what would run afterwards does not."""


def test_an_output_appears_whole_and_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_folder(out)
    written = load_file(out / "model.safetensors")
    assert torch.equal(written["a"], VALUES)
    assert torch.equal(written["b"], COPIED)
    assert beside(out) == []


def test_nothing_is_visible_under_the_name_before_it_is_published(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Staging(out, "0" * 64) as stage:
        write_all(stage)
        assert not out.exists()
        stage.publish([FILE], force=False)
        assert out.exists()


def test_an_error_leaves_nothing_behind_not_even_folders(tmp_path: Path) -> None:
    out = tmp_path / "new" / "deep" / "out"

    def work() -> None:
        with Staging(out, "0" * 64) as stage:
            write_all(stage)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert list(tmp_path.iterdir()) == []


def test_folders_above_the_output_are_made(tmp_path: Path) -> None:
    out = tmp_path / "new" / "deep" / "out"
    write_folder(out)
    assert load_file(out / "model.safetensors").keys() == {"a", "b"}


def test_the_system_error_becomes_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No space left"), Staging(tmp_path / "out", "0" * 64):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_an_output_below_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError), Staging(tmp_path / "file" / "out", "0" * 64):
        pass


def test_an_error_while_entering_gives_the_lock_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(stage: Staging) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "_resume", fails)
        with pytest.raises(StorageError, match="Input/output"), Staging(tmp_path / "out", "0" * 64):
            pass
    assert list(tmp_path.iterdir()) == []
    write_folder(tmp_path / "out")


def test_a_second_run_on_the_same_output_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Staging(out, "0" * 64) as stage:
        write_all(stage)
        for digest in ("0" * 64, "1" * 64):
            with pytest.raises(LockedError), Staging(out, digest):
                pass
        stage.publish([FILE], force=False)
    assert torch.equal(load_file(out / "model.safetensors")["a"], VALUES)
    assert beside(out) == []


def test_runs_on_neighbouring_outputs_do_not_disturb_each_other(tmp_path: Path) -> None:
    with Staging(tmp_path / "out", "0" * 64) as one:
        write_all(one)
        write_folder(tmp_path / "out2")
        write_folder(tmp_path / "ou")
        one.publish([FILE], force=False)
    assert beside(tmp_path / "out") == ["ou", "out2"]


@pytest.mark.parametrize("name", ["[ab]*?", "with space", "-o", "a'\"b", "ünï", "x" * 200])
def test_any_name_can_be_written(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path / name)
    assert beside(tmp_path / name) == []


# -- resuming ------------------------------------------------------------------------------------------------------


def staged(out: Path) -> Path:
    """The staging folder that a killed run left."""
    (found,) = (p for p in out.parent.iterdir() if p.name.startswith(f".{out.name}.loratool-"))
    return found


def run_and_die(out: Path, values: torch.Tensor = VALUES) -> None:
    """Do all the work and stop before publishing; as after SIGKILL, only the kernel closes files and drops the lock.

    (tests/operations kills real processes; this is the same moment again and again, without starting Python for it.)
    """
    stage = Staging(out, "0" * 64).__enter__()
    write_all(stage, values)
    stage._files.clear()
    for fd in (stage._journal, stage._lock):
        os.close(fd)


def test_a_killed_run_is_resumed_with_its_data_and_facts(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_and_die(out)
    assert not out.exists()
    with Staging(out, "0" * 64) as stage:
        assert stage.done["unit"] == {"delta": 1.0}
        stage.prepare([FILE])  # and nothing is written again
        stage.publish([FILE], force=False)
    assert torch.equal(load_file(out / "model.safetensors")["a"], VALUES)
    assert torch.equal(load_file(out / "model.safetensors")["b"], COPIED)
    assert beside(out) == []


def test_another_plan_does_not_resume_and_removes_the_leftover(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_and_die(out)
    with Staging(out, "1" * 64) as stage:
        assert stage.done == {}
        write_all(stage, -VALUES)
        stage.publish([FILE], force=False)
    assert torch.equal(load_file(out / "model.safetensors")["a"], -VALUES)
    assert beside(out) == []


@pytest.mark.parametrize("torn", ['["other", {"del', "[", '["other"', "\0\0\0\0", "[]x"])
def test_a_torn_line_of_the_journal_is_ignored(tmp_path: Path, torn: str) -> None:
    out = tmp_path / "out"
    run_and_die(out)
    with (staged(out) / "journal").open("a") as journal:
        journal.write(torn)
    with Staging(out, "0" * 64) as stage:
        assert set(stage.done) == {"unit"}
        stage.record("next", {})
    run_and_die(out)  # a record after a torn line is on a line of its own
    with (staged(out) / "journal").open("a") as journal:
        journal.write(torn)
    run_and_die(out)
    with Staging(out, "0" * 64) as stage:
        assert set(stage.done) == {"unit"}


def test_the_journal_of_another_boot_is_not_trusted(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_and_die(out)
    journal = staged(out) / "journal"
    journal.write_bytes(b"another-boot\n" + journal.read_bytes().partition(b"\n")[2])
    with Staging(out, "0" * 64) as stage:
        assert stage.done == {}


def test_what_is_left_after_publishing_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # killed between the exchange and the clean-up, the payload is the *old* output under a journal that says "done"
    out = tmp_path / "out"
    write_folder(out, VALUES)
    exchange = target.publish

    def exchange_and_die(source: Path, target: Path, force: bool) -> None:
        exchange(source, target, force)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(target, "publish", exchange_and_die)
        patch.setattr(Staging, "_leave", lambda stage, **how: os.close(stage._lock))
        with pytest.raises(Killed):
            write_folder(out, -VALUES, force=True)
    assert torch.equal(load_file(out / "model.safetensors")["a"], -VALUES)
    with Staging(out, "0" * 64) as stage:
        assert stage.done == {}


def test_a_half_removed_staging_folder_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # killed while an interrupted run cleans up: the payload is gone, and a journal that survived would bring zeros back
    out = tmp_path / "out"

    def remove_payload_and_die(root: Path, **_: object) -> None:
        (root / "payload" / "model.safetensors").unlink()
        raise Killed

    stage = Staging(out, "0" * 64).__enter__()
    write_all(stage)
    with monkeypatch.context() as patch:
        patch.setattr(writer.shutil, "rmtree", remove_payload_and_die)
        with pytest.raises(Killed):
            stage.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    os.close(stage._lock)
    with Staging(out, "0" * 64) as stage:
        assert stage.done == {}


def test_a_staged_file_with_another_header_is_written_anew(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_and_die(out)
    other = TensorFile.new("model.safetensors", [FILE.tensors[1]], {"other": "header"})
    with Staging(out, "0" * 64) as stage:
        stage.prepare([other])
        stage.publish([other], force=False)
    assert torch.equal(load_file(out / "model.safetensors")["b"], COPIED)


@pytest.mark.parametrize("damage", ["removed", "cut off", "another header"])
def test_units_run_again_where_the_file_that_they_filled_is_gone(tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    run_and_die(out)
    file = staged(out) / "payload" / "model.safetensors"
    if damage == "removed":
        file.unlink()
    elif damage == "cut off":
        os.truncate(file, file.stat().st_size - 1)
    else:
        file.write_bytes(b"x" + file.read_bytes()[1:])
    with Staging(out, "0" * 64) as stage:
        stage.prepare([FILE])
        assert stage.done == {}
    run_and_die(out)
    file = staged(out) / "payload" / "model.safetensors"
    file.write_bytes(b"x" + file.read_bytes()[1:])
    stage = Staging(out, "0" * 64).__enter__()
    stage.prepare([FILE])
    for fd in (stage._journal, stage._lock):  # killed again: what was forgotten stays forgotten
        os.close(fd)
    with Staging(out, "0" * 64) as stage:
        assert stage.done == {}


@pytest.mark.parametrize("damage", ["removed", "cut off"])
def test_units_run_again_where_the_spool_is_gone(tmp_path: Path, damage: str) -> None:
    out, outs = tmp_path / "out", [Out("", "m.down", (4, 3), "F32")]
    stage = Staging(out, "0" * 64).__enter__()
    stage.prepare([], outs)
    stage.write(outs[0], 0, as_bytes(VALUES))
    stage.record("unit", {})
    for fd in (stage._journal, stage._lock):
        os.close(fd)
    spool = staged(out) / "spool"
    assert spool.stat().st_size == 48
    os.truncate(spool, 40) if damage == "cut off" else spool.unlink()
    with Staging(out, "0" * 64) as stage:
        stage.prepare([], outs)
        assert stage.done == {}


def test_a_neighbour_whose_name_begins_like_staging_keeps_its_own(tmp_path: Path) -> None:
    with Staging(tmp_path / "out.loratool-x", "0" * 64) as neighbour:
        write_all(neighbour)
        write_folder(tmp_path / "out")
        neighbour.publish([FILE], force=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.loratool-x"]


def test_what_a_run_left_that_died_after_publishing_goes_when_the_output_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_folder(out)
    (tmp_path / f".out.loratool-{'0' * 16}" / "payload").mkdir(parents=True)
    (tmp_path / ".out.loratool.lock").touch()
    to_resume = tmp_path / f".out.loratool-{'1' * 16}"
    to_resume.mkdir()
    (to_resume / "journal").touch()
    with pytest.raises(StorageError, match="exists"):
        check_target(out, [], single_file=False, force=False)
    assert beside(out) == [to_resume.name]


def test_staging_of_a_run_that_is_at_work_stays_when_the_output_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Staging(out, "0" * 64) as stage:
        write_all(stage)
        out.mkdir()
        (out / "theirs").write_text("x")
        stage._forget()  # as in the moment of publishing
        with pytest.raises(StorageError, match="exists"):
            check_target(out, [], single_file=False, force=False)
        assert stage.payload.is_dir()


def test_late_writers_fail_and_never_write_into_a_file_opened_meanwhile(tmp_path: Path) -> None:
    stage = Staging(tmp_path / "out", "0" * 64).__enter__()
    write_all(stage)
    held = stage._files["model.safetensors"]  # as a worker in the middle of a write holds it
    stage.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    assert other != held.number
    os.pwrite(held.number, b"late", 0)
    with pytest.raises(KeyError):
        stage.write(OUT, 0, as_bytes(VALUES))
    assert (tmp_path / "other").read_bytes() == b""
    number = held.number
    del held
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
    os.close(other)


def test_an_interrupt_says_whether_the_output_was_written(tmp_path: Path) -> None:
    def interrupted(*, publish: bool) -> list[str]:
        with Staging(tmp_path / "out", "0" * 64) as stage:
            write_all(stage)
            if publish:
                stage.publish([FILE], force=False)
            raise KeyboardInterrupt

    for publish, wanted in ((False, "nothing was written to"), (True, "out was written")):
        with pytest.raises(KeyboardInterrupt) as caught:
            interrupted(publish=publish)
        assert wanted in caught.value.__notes__[0]


def test_every_descriptor_that_wrote_is_synced_before_it_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # an error of the disk is told once, to a descriptor that was open when it happened
    wrote: dict[int, tuple[int, int]] = {}
    synced: list[int] = []
    write, sync = os.pwrite, os.fsync

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        status = os.fstat(fd)
        wrote[fd] = status.st_dev, status.st_ino
        return write(fd, data, offset)

    def fsync(fd: int) -> None:
        status = os.fstat(fd)
        if wrote.get(fd) == (status.st_dev, status.st_ino):
            synced.append(fd)
        sync(fd)

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(os, "fsync", fsync)
    config = JsonFile("config.json", {})
    with Staging(tmp_path / "out", "0" * 64) as stage:
        write_all(stage)
        stage.prepare([config], [Out("", "m.down", (4, 3), "F32")])
        stage.write(Out("", "m.down", (4, 3), "F32"), 0, as_bytes(VALUES))
        stage.publish([FILE, config], force=False)
        assert len(wrote) == 3
        assert sorted(synced) == sorted(wrote)


def test_folders_inside_the_output_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    sync = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.fstat(fd).st_ino)
        sync(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    config, out = JsonFile("deep/er/config.json", {}), tmp_path / "new" / "out"
    with Staging(out, "0" * 64) as stage:
        stage.prepare([config])
        stage.publish([config], force=False)
    folders = [tmp_path, out.parent, out, out / "deep", out / "deep" / "er"]
    assert {folder.stat().st_ino for folder in folders} <= set(synced)


# -- replacing -----------------------------------------------------------------------------------------------------


def test_force_replaces_the_whole_folder_and_leaves_no_trace_of_the_old(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_folder(out)
    (out / "config.json").write_text("old")
    write_folder(out, -VALUES, force=True)
    assert torch.equal(load_file(out / "model.safetensors")["a"], -VALUES)
    assert sorted(p.name for p in out.iterdir()) == ["model.safetensors"]
    assert beside(out) == []


def test_replacing_works_where_the_system_cannot_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    write_folder(out)
    monkeypatch.setattr(target, "_exchange", lambda one, other: False)
    write_folder(out, -VALUES, force=True)
    assert torch.equal(load_file(out / "model.safetensors")["a"], -VALUES)
    assert beside(out) == []


def test_the_name_is_never_empty_while_a_folder_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_folder(out)
    code = (
        "import sys, pathlib\np = pathlib.Path(sys.argv[1])\nprint('ready', flush=True)\n"
        "n = 0\nwhile not (p.parent / 'stop').exists():\n    n += not p.exists()\nprint(n)"
    )
    watcher = subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True)
    assert watcher.stdout is not None
    assert watcher.stdout.readline() == "ready\n"
    for _ in range(30):
        write_folder(out, -VALUES, force=True)
    (tmp_path / "stop").touch()
    assert watcher.communicate(timeout=30)[0] == "0\n"


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Staging(out, "0" * 64) as stage:
        write_all(stage)
        out.mkdir()
        (out / "theirs").write_text("x")
        with pytest.raises(StorageError, match="appeared"):
            stage.publish([FILE], force=False)
    assert sorted(p.name for p in out.iterdir()) == ["theirs"]
    assert beside(out) == []


def test_a_single_file_replaces_a_single_file(tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    for values in (VALUES, -VALUES):
        with Staging(out, "0" * 64, single_file=True) as stage:
            write_all(stage, values)
            stage.publish([FILE], force=True)
        assert torch.equal(load_file(out)["a"], values)
        assert beside(out) == []


def test_the_old_output_comes_back_where_the_new_one_cannot_be_moved_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write_folder(out)
    monkeypatch.setattr(target, "_exchange", lambda one, other: False)
    rename = Path.rename

    def fails(path: Path, target: Path) -> Path:
        if path.name == "payload":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(KeyboardInterrupt):
        write_folder(out, -VALUES, force=True)
    assert torch.equal(load_file(out / "model.safetensors")["a"], VALUES)
    assert beside(out) == []


# -- what is written -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        out = tmp_path / "out"
        config = JsonFile("sub/config.json", {"a": 1})
        with Staging(out, "0" * 64) as stage:
            write_all(stage)
            stage.prepare([config])
            stage.publish([FILE, config], force=False)
    finally:
        os.umask(before)
    assert (out / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (out / "sub" / "config.json").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (out / "sub").stat().st_mode & 0o777 == out.stat().st_mode & 0o777 == 0o777 & ~umask


def test_nobody_else_can_look_into_the_payload_while_it_is_made(tmp_path: Path) -> None:
    with Staging(tmp_path / "out", "0" * 64) as stage:
        write_all(stage)
        assert stage.payload.stat().st_mode & 0o077 == 0


def test_json_and_copied_files_arrive(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\0\1\2")
    files = [
        FILE,
        JsonFile("config.json", {"b": 1, "a": [1.5]}),
        CopiedFile("tokenizer.model", str(tmp_path / "tokenizer.model")),
    ]
    out = tmp_path / "out"
    with Staging(out, "0" * 64) as stage:
        stage.prepare(files)
        stage.write(OUT, 0, as_bytes(VALUES))
        stage.publish(files, force=False)
    assert json.loads((out / "config.json").read_text()) == {"a": [1.5], "b": 1}
    assert (out / "tokenizer.model").read_bytes() == b"\0\1\2"


def test_a_file_name_cannot_leave_the_output(tmp_path: Path) -> None:
    with pytest.raises(UsageError), Staging(tmp_path / "out", "0" * 64) as stage:
        stage.prepare([JsonFile("../escaped.json", {})])
    assert list(tmp_path.iterdir()) == []


def test_new_files_are_aligned_and_ordered_for_every_dtype(tmp_path: Path) -> None:
    refs = [
        TensorRef("z", (3,), "U8", (Inline(b"abc"),)),
        TensorRef("a", (1,), "F16", (Inline(b"hh"),)),
        TensorRef("m", (1,), "F64", (Inline(bytes(8)),)),
        TensorRef("b", (1,), "F32", (Inline(bytes(4)),)),
        TensorRef("a2", (1,), "F32", (Inline(bytes(4)),)),
    ]
    contents = []
    for n, order in enumerate((refs, refs[::-1])):
        file = TensorFile.new("x.safetensors", order, {"k": "v", "a": "b"} if n else {"a": "b", "k": "v"})
        with Staging(tmp_path / f"out{n}", "0" * 64) as stage:
            stage.prepare([file])
            stage.publish([file], force=False)
        contents.append((tmp_path / f"out{n}" / "x.safetensors").read_bytes())
    assert contents[0] == contents[1]
    length = int.from_bytes(contents[0][:8], "little")
    header = json.loads(contents[0][8 : 8 + length])
    sizes = {"F64": 8, "F32": 4, "F16": 2, "U8": 1}
    for name, entry in header.items():
        if name != "__metadata__":
            assert (8 + length + entry["data_offsets"][0]) % sizes[entry["dtype"]] == 0
    assert bytes(load_file(tmp_path / "out0" / "x.safetensors")["z"].numpy()) == b"abc"


def test_a_file_that_does_not_read_back_as_planned_is_not_published(tmp_path: Path) -> None:
    out = tmp_path / "out"
    wrong = TensorFile(FILE.name, (TensorRef("a", (3, 4), "F32"), FILE.tensors[1]))
    with Staging(out, "0" * 64) as stage:
        write_all(stage)
        with pytest.raises(FormatError, match="read back"):
            stage.publish([wrong], force=False)
    assert list(tmp_path.iterdir()) == []


def test_space_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    huge = TensorFile.new("model.safetensors", [TensorRef("a", (1 << 50,), "F32")], {})
    with pytest.raises(StorageError, match="bytes are needed"), Staging(tmp_path / "out", "0" * 64) as stage:
        stage.prepare([huge])
    assert list(tmp_path.iterdir()) == []


def test_a_spooled_tensor_is_found_again_at_its_settled_shape(tmp_path: Path) -> None:
    outs = [Out("", "m.down", (4, 3), "F32"), Out("", "m.up", (5, 4), "F32")]
    small = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    out = tmp_path / "out"
    with Staging(out, "0" * 64) as stage:
        stage.prepare([], outs)
        stage.write(outs[1], 0, as_bytes(torch.ones(5, 2)))
        stage.write(outs[0], 0, as_bytes(small))
        file = TensorFile.new("x.safetensors", [stage.spooled("m.down", (2, 3)), stage.spooled("m.up", (5, 2))], {})
        stage.prepare([file])
        stage.publish([file], force=False)
    written = load_file(out / "x.safetensors")
    assert torch.equal(written["m.down"], small)
    assert torch.equal(written["m.up"], torch.ones(5, 2))
    assert [p.name for p in out.iterdir()] == ["x.safetensors"]


def test_the_space_for_all_files_and_the_spool_is_checked_together(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    third = disk.f_bavail * disk.f_frsize * 4 // 10
    files = [TensorFile.new(f"{n}.safetensors", [TensorRef("a", (third,), "U8")], {}) for n in range(2)]
    with Staging(tmp_path / "out", "0" * 64) as stage:
        with pytest.raises(StorageError, match="bytes are needed") as caught:
            stage.prepare(files, [Out("", "m.down", (third, 1), "U8")])
        assert list(stage.payload.iterdir()) == []
    assert "another disk" in caught.value.hint


# -- where an output may be ----------------------------------------------------------------------------------------


def test_an_existing_output_needs_force(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    check_target(tmp_path / "out", [], single_file=False, force=False)  # an empty folder is no output
    (tmp_path / "out" / "model.safetensors").touch()
    with pytest.raises(StorageError, match="exists"):
        check_target(tmp_path / "out", [], single_file=False, force=False)
    check_target(tmp_path / "out", [], single_file=False, force=True)


def test_force_does_not_replace_a_folder_that_is_no_model(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.doc").touch()
    with pytest.raises(StorageError, match="thesis"):
        check_target(home, [], single_file=False, force=True)


def test_force_does_not_replace_a_file_by_a_folder_nor_the_other_way(tmp_path: Path) -> None:
    file, folder = tmp_path / "file.safetensors", tmp_path / "folder"
    file.touch()
    folder.mkdir()
    (folder / "x.safetensors").touch()
    with pytest.raises(StorageError, match="is a file"):
        check_target(file, [], single_file=False, force=True)
    with pytest.raises(StorageError, match="is a folder"):
        check_target(folder, [], single_file=True, force=True)


@pytest.mark.parametrize("out", ["base", "base/", "base/../base", "base/new", "base/new/deep", ".", "link", "link/new"])
def test_an_output_that_is_an_input_or_in_one_or_around_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").touch()
    (tmp_path / "link").symlink_to("base")
    for force in (True, False):
        with pytest.raises(UsageError, match="input"):
            check_target(Path(out), ["base"], single_file=False, force=force)


def test_a_file_beside_an_input_file_is_fine(tmp_path: Path) -> None:
    (tmp_path / "in.safetensors").touch()
    check_target(tmp_path / "out.safetensors", [str(tmp_path / "in.safetensors")], single_file=True, force=False)


def model_folder(folder: Path) -> Path:
    folder.mkdir()
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tokenizer.model"):
        (folder / name).touch()
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json", "README.md"):
        (folder / name).touch()
    return folder


def test_force_replaces_what_save_pretrained_left(tmp_path: Path) -> None:
    check_target(model_folder(tmp_path / "out"), [], single_file=False, force=True)


@pytest.mark.parametrize(
    "name", ["diary/thesis.docx", "my-style.safetensors", "sub/config.json", "notes.txt", "empty/"]
)
def test_force_names_the_file_that_it_would_take_with_it(tmp_path: Path, name: str) -> None:
    out = model_folder(tmp_path / "out")
    foreign = out / name
    if name.endswith("/"):
        foreign.mkdir()
    else:
        foreign.parent.mkdir(exist_ok=True)
        foreign.touch()
    with pytest.raises(StorageError, match=name) as caught:
        check_target(out, [], single_file=False, force=True)
    assert caught.value.exit_code == 5
    if not name.endswith("/"):
        check_target(out, [], single_file=False, force=True, names=[name])  # the plan writes it


def test_force_replaces_whatever_is_in_a_folder_that_loratool_made(tmp_path: Path) -> None:
    out = model_folder(tmp_path / "out")
    (out / "notes.txt").touch()
    (out / "loratool.report.json").write_text("{}")
    with pytest.raises(StorageError, match="notes"):
        check_target(out, [], single_file=False, force=True)
    (out / "loratool.report.json").write_text('{"verb": "merge", "ledger": {}}')
    check_target(out, [], single_file=False, force=True)


def test_force_looks_again_before_it_replaces(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_folder(out)
    with Staging(out, "0" * 64) as stage:
        write_all(stage)
        (out / "thesis.docx").touch()
        with pytest.raises(StorageError, match="thesis"):
            stage.publish([FILE], force=True)
    assert (out / "thesis.docx").exists()
