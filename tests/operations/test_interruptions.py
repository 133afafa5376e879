"""Whatever happens in the middle: the output is the old one, none, or the whole new one, and nothing else stays."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_files import environment, run_cli, tensors_of_llama, write_adapter, write_base, write_sharded

FAULTS = str(Path(__file__).with_name("faults.py"))


def sweep(tmp_path: Path, what: str, *arguments: object, out: Path) -> dict[str, Any]:
    """Let every n-th system call of a run kill it, or fail; return what faults.py saw."""
    work = tmp_path / "work"
    work.mkdir()
    out.parent.mkdir(exist_ok=True)
    order = {"arguments": [*map(str, arguments), "-o", str(out), "--workers", "1"], "out": str(out), "work": str(work)}
    (work / "order.json").write_text(json.dumps(order))
    command = [sys.executable, FAULTS, "sweep", what, str(work / "order.json")]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    result: dict[str, Any] = json.loads(ended.stdout)
    assert result["code"] == 0
    assert result["after"]
    return result


@pytest.fixture
def job(tmp_path: Path) -> tuple[Path, Path]:
    base = write_sharded(tmp_path / "base")
    (base / "tokenizer.json").write_text("{}")
    return base, write_adapter(tmp_path / "adapter")


def check_kills(result: dict[str, Any], *, force: bool) -> None:
    """The promises about a killed run and the same command run again, for every moment of death."""
    assert {run["code"] for run in result["runs"]} == {-signal.SIGKILL}
    resumed = 0
    for run in result["runs"]:
        where = f"killed at call {run['nth']}"
        assert run["state"] in (result["before"], result["after"]), where
        assert run["final"] == result["after"], where
        assert run["final_left"] == [], where
        assert not set(run["finished"]) & set(run["rerun"]), where
        if run["state"] == result["before"] or force:
            assert run["second"] == 0, where
            assert sorted({*run["finished"], *run["rerun"]}) == result["units"], where
        else:
            assert run["second"] == 5, where  # the output exists: the dead run had published it
        resumed += bool(run["finished"])
    assert resumed >= 3  # deaths in the middle of the work happened, and were resumed


def test_a_merge_killed_at_any_moment_leaves_all_or_nothing_and_resumes(tmp_path: Path, job: tuple[Path, Path]) -> None:
    result = sweep(tmp_path, "kill", "merge", *job, out=tmp_path / "outs" / "merged")
    assert result["before"] == ""
    check_kills(result, force=False)


def test_a_forced_merge_killed_at_any_moment_leaves_the_old_or_the_new(tmp_path: Path, job: tuple[Path, Path]) -> None:
    out = tmp_path / "outs" / "merged"
    write_base(out, tensors_of_llama(seed=9))
    result = sweep(tmp_path, "kill", "merge", *job, "--force", out=out)
    assert result["before"] != result["after"]
    check_kills(result, force=True)


def test_an_extraction_killed_at_any_moment_leaves_all_or_nothing_and_resumes(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    changed = tensors_of_llama()
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        changed[name] = changed[name] + 0.01 * torch.randn(
            changed[name].shape, generator=torch.Generator().manual_seed(3)
        )
    tuned = write_base(tmp_path / "tuned", changed)
    result = sweep(tmp_path, "kill", "extract", tuned, "--base", base, "--rank", 2, out=tmp_path / "outs" / "delta")
    check_kills(result, force=False)


@pytest.mark.parametrize("force", [False, True])
def test_a_full_disk_at_any_moment_exits_5_and_leaves_nothing(
    tmp_path: Path, job: tuple[Path, Path], force: bool
) -> None:
    out = tmp_path / "outs" / "merged"
    if force:
        write_base(out, tensors_of_llama(seed=9))
    result = sweep(tmp_path, "error", "merge", *job, *(["--force"] if force else []), out=out)
    codes = [run["code"] for run in result["runs"]]
    assert set(codes) <= {0, 5}  # 0 where there is another way: copying without copy_file_range
    assert codes.count(5) > len(codes) / 2
    for run in result["runs"]:
        assert run["left"] == [], run
        assert run["state"] in (result["before"], result["after"]), run
        assert run["code"] == 5 or run["state"] == result["after"], run


def test_a_resumed_run_notices_that_an_input_has_changed(tmp_path: Path, job: tuple[Path, Path]) -> None:
    base, adapter = job
    out = tmp_path / "merged"
    victim = start_slow("merge", base, adapter, "-o", out)
    wait_for_units(victim, tmp_path, 1)
    victim.kill()
    victim.communicate()
    for n, path in enumerate(sorted(base.glob("*.safetensors"))):  # untouched tensors change, too
        content = bytearray(path.read_bytes())
        content[-4 * (n + 1)] ^= 1
        path.write_bytes(content)
    expected = tmp_path / "expected"
    assert run_cli("merge", base, adapter, "-o", expected).returncode == 0
    assert run_cli("merge", base, adapter, "-o", out).returncode == 0
    for path in expected.glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_a_resumed_resize_notices_that_its_adapter_has_changed(tmp_path: Path) -> None:
    from loratool import engine
    from loratool.api import open_adapter
    from loratool.formats.peft import Peft
    from loratool.operations.resize import Rule, plan

    adapter = write_adapter(tmp_path / "adapter")
    digests = []
    for _ in range(2):
        made = plan(open_adapter(adapter), None, Rule(2), Peft(), options={})
        digests.append(engine.digest(made, engine.Resources("cpu"), engine.inputs_of(made.units, made.files)))
        weights = adapter / "adapter_model.safetensors"
        os.utime(weights, ns=(1, weights.stat().st_mtime_ns + 1_000_000))
    assert digests[0] != digests[1]


# -- signals -------------------------------------------------------------------------------------------------------


def start_slow(*arguments: object, how: str = "slow", pause: float = 0.15) -> subprocess.Popen[bytes]:
    command = [sys.executable, FAULTS, how, *map(str, arguments), "--workers", "1"]
    env = environment(PAUSE=str(pause))
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_units(process: subprocess.Popen[bytes], folder: Path, count: int) -> None:
    """Wait until the journal knows `count` finished units."""
    limit = time.monotonic() + 60
    while time.monotonic() < limit and process.poll() is None:
        for journal in folder.glob(".*.loratool-*/journal"):
            if journal.exists() and journal.read_text().count("delta") >= count:
                return
        time.sleep(0.01)
    pytest.fail(f"no unit finished: {process.communicate()}")


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_promptly_and_leaves_nothing(
    tmp_path: Path, job: tuple[Path, Path], sent: signal.Signals, code: int
) -> None:
    out = tmp_path / "outs" / "merged"
    out.parent.mkdir()
    running = start_slow("merge", *job, "-o", out)
    wait_for_units(running, out.parent, 1)
    start = time.monotonic()
    running.send_signal(sent)
    _, stderr = running.communicate(timeout=30)
    assert running.returncode == code
    assert time.monotonic() - start < 5
    assert list(out.parent.iterdir()) == []
    assert b"Traceback" not in stderr
    assert b"nothing was written" in stderr


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_does_not_wait_for_a_worker_that_no_signal_reaches(
    tmp_path: Path, job: tuple[Path, Path], sent: signal.Signals, code: int
) -> None:
    out = tmp_path / "outs" / "merged"
    out.parent.mkdir()
    running = start_slow("merge", *job, "-o", out, how="stuck")
    wait_for_units(running, out.parent, 1)
    start = time.monotonic()
    running.send_signal(sent)
    running.communicate(timeout=30)
    assert running.returncode == code
    assert time.monotonic() - start < 2
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("lost", ["payload/*.safetensors", "spool"])
def test_a_resumed_run_does_not_trust_units_whose_files_are_gone(
    tmp_path: Path, job: tuple[Path, Path], lost: str
) -> None:
    base, adapter = job
    out, expected = tmp_path / "outs" / "out", tmp_path / "expected"
    arguments = ["merge", base, adapter] if "payload" in lost else ["resize", adapter, "--rank", 2]
    assert run_cli(*arguments, "-o", expected).returncode == 0
    out.parent.mkdir()
    dying = (
        "import os, sys, loratool.storage.writer as w\n"
        "w._check_written = lambda *_: os.kill(os.getpid(), 9)\n"
        "from loratool.cli.main import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", dying, *map(str, arguments), "-o", str(out)]
    died = subprocess.run(command, env=environment(), capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL
    found = list(out.parent.glob(f".out.loratool-*/{lost}"))
    assert found
    for path in found:
        path.unlink()
    assert run_cli(*arguments, "-o", out).returncode == 0
    for path in expected.glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_a_second_run_on_the_same_output_exits_6_and_the_first_goes_on(tmp_path: Path, job: tuple[Path, Path]) -> None:
    out = tmp_path / "outs" / "merged"
    out.parent.mkdir()
    first = start_slow("merge", *job, "-o", out)
    wait_for_units(first, out.parent, 1)
    first.send_signal(signal.SIGSTOP)  # however slow the second is, the first is not done before it
    second = run_cli("merge", *job, "-o", out)
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 6
    assert "another run" in second.stderr
    first.communicate(timeout=60)
    assert first.returncode == 0
    assert [p.name for p in out.parent.iterdir()] == ["merged"]
    assert len(load_file(out / "model-00001-of-00002.safetensors")) == len([*tensors_of_llama()][::2])


# -- space ---------------------------------------------------------------------------------------------------------


def can_mount() -> bool:
    tried = shutil.which("unshare") and subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False)
    return bool(tried) and tried.returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs a mount namespace for a small file system of its own")
@pytest.mark.parametrize("kilobytes", [4, 16, 28])
def test_a_file_system_that_is_too_small_is_found_out_and_left_empty(
    tmp_path: Path, job: tuple[Path, Path], kilobytes: int
) -> None:
    (tmp_path / "small").mkdir()
    script = f"mount -t tmpfs -o size={kilobytes}k none small && cd small && set +e\n"
    script += (
        f'"{sys.executable}" -m loratool merge ../base ../adapter -o merged; echo "code $?"; echo "left:" $(ls -A)'
    )
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-ec", script],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "code 5\nleft:\n", done
    assert "Traceback" not in done.stderr
