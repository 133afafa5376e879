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
from loratool.storage import writer
from loratool.storage.load import as_bytes
from loratool.storage.writer import Staging, check_target
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
    for fd in (*stage._fds.values(), stage._journal, stage._lock):
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
        assert set(stage.done) == {"file:model.safetensors", "unit"}
        stage.record("next", {})
    run_and_die(out)  # a record after a torn line is on a line of its own
    with (staged(out) / "journal").open("a") as journal:
        journal.write(torn)
    run_and_die(out)
    with Staging(out, "0" * 64) as stage:
        assert set(stage.done) == {"file:model.safetensors", "unit"}


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
    exchange = writer._publish

    def exchange_and_die(source: Path, target: Path, force: bool) -> None:
        exchange(source, target, force)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_publish", exchange_and_die)
        patch.setattr(Staging, "_leave", lambda stage: os.close(stage._lock))
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


# -- replacing -----------------------------------------------------------------------------------------------------


def test_force_replaces_the_whole_folder_and_leaves_no_trace_of_the_old(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_folder(out)
    (out / "old.txt").write_text("old")
    write_folder(out, -VALUES, force=True)
    assert torch.equal(load_file(out / "model.safetensors")["a"], -VALUES)
    assert sorted(p.name for p in out.iterdir()) == ["model.safetensors"]
    assert beside(out) == []


def test_replacing_works_where_the_system_cannot_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    write_folder(out)
    monkeypatch.setattr(writer, "_exchange", lambda one, other: False)
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
        stage.prepare_spool(outs)
        stage.write(outs[1], 0, as_bytes(torch.ones(5, 2)))
        stage.write(outs[0], 0, as_bytes(small))
        file = TensorFile.new("x.safetensors", [stage.spooled("m.down", (2, 3)), stage.spooled("m.up", (5, 2))], {})
        stage.prepare([file])
        stage.publish([file], force=False)
    written = load_file(out / "x.safetensors")
    assert torch.equal(written["m.down"], small)
    assert torch.equal(written["m.up"], torch.ones(5, 2))
    assert [p.name for p in out.iterdir()] == ["x.safetensors"]


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
    with pytest.raises(StorageError, match="no weights"):
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
