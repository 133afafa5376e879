"""Runs of the command line that die, fail or dawdle at a chosen moment. A script: a test starts it as a process.

    faults.py slow ARGUMENTS...           a pause in every unit (of $PAUSE s), so that a signal can arrive in the middle
    faults.py stuck ARGUMENTS...          all units but the first take a minute, and no signal wakes them
    faults.py sweep kill|error FILE ...   read {"arguments", "out", "work"} from FILE, and fork one run for every n, in
                                          which the n-th system call that changes a file kills the process or fails

The sweep imports everything once and forks: hundreds of runs in seconds. Its result is one JSON document on stdout.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

CALLS = (
    "mkdir",
    "open",
    "write",
    "pwrite",
    "copy_file_range",
    "fsync",
    "chmod",
    "rename",
    "replace",
)
SYSTEM = (("writeback", "WriteBehind._range"), ("target", "_exchange"))  # sync_file_range and renameat2, by ctypes
REMOVALS = ("unlink", "rmdir")  # a failing removal may leave something behind; a killed one must not harm


def digest_of(path: Path) -> str:
    """One text for everything under a path, names and bytes; empty where there is nothing."""
    if path.is_file():
        return sha256(path.read_bytes()).hexdigest()
    state = sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        state.update(str(file.relative_to(path)).encode() + b"\0" + sha256(file.read_bytes()).digest())
    return state.hexdigest() if files else ""


def count_units(log: Path) -> None:
    """Write the key of every unit that runs to `log`."""
    from loratool.operations import extract, panels, resize

    for kind in (panels.MergePanel, extract.ExtractModule, extract.CompareRest, resize.ResizeModule):
        _logged(kind, log)


def _logged(kind: Any, log: Path) -> None:
    run = kind.run

    def logged(self: Any, load: Any, emit: Any) -> Any:
        with log.open("a") as file:
            file.write(self.key + "\n")
        return run(self, load, emit)

    kind.run = logged


def arm(nth: int, what: str) -> list[int]:
    """Let the n-th call of those above kill the process, or fail. Returns the counter."""
    counter = [0]

    def wrapped(name: str) -> Callable[..., Any]:
        call = getattr(os, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            if name == "open" and not arguments[1] & (os.O_CREAT | os.O_RDWR):
                return call(*arguments, **options)
            if name == "write" and arguments[0] <= 2:
                return call(*arguments, **options)
            counter[0] += 1
            if counter[0] == nth:
                if what == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(errno.ENOSPC, f"No space left on device ({name})")
            return call(*arguments, **options)

        return counted

    for name in (*CALLS, *(REMOVALS if what == "kill" else ())):
        setattr(os, name, wrapped(name))
    for module, name in SYSTEM:
        _arm_system_call(module, name, counter, nth, what)
    return counter


def _arm_system_call(module: str, name: str, counter: list[int], nth: int, what: str) -> None:
    from loratool.storage import writeback

    writeback.WINDOW, writeback._LEAST = 1024, 256  # so that tiny files reach the disk in several parts
    *owners, name = name.split(".")
    owner = import_module(f"loratool.storage.{module}")
    for part in owners:
        owner = getattr(owner, part)
    call = getattr(owner, name)

    def counted(*arguments: Any) -> Any:
        counter[0] += 1
        if counter[0] == nth:
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "_exchange":
                return False  # a system that cannot
            raise OSError(errno.EIO, "Input/output error (sync_file_range)")
        return call(*arguments)

    setattr(owner, name, counted)


def fork_run(arguments: list[str], log: Path, nth: int = 0, what: str = "kill", count: Path | None = None) -> int:
    """Run the command line in a child; return its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(quiet, fd)
        code = 99
        try:
            from loratool.cli.main import main

            count_units(log)
            counter = arm(nth, what)
            main(arguments)
        except SystemExit as ending:
            code = int(ending.code or 0)
            if count:
                count.write_text(str(counter[0]))
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def journalled(folder: Path) -> list[str]:
    """The units that a dead run's journal calls finished."""
    keys = []
    for journal in folder.glob(".*.loratool-*/journal"):
        for line in journal.read_text().splitlines()[1:]:
            try:
                kind, key, _ = json.loads(line)
            except ValueError:
                continue
            if kind == "unit":
                keys.append(key)
    return keys


def warm_up(arguments: list[str]) -> None:
    """Run once in this process, so that the children find everything imported."""
    from loratool.cli.main import main

    out, sys.stdout = sys.stdout, sys.stderr
    try:
        main(arguments)
    except SystemExit:
        sys.stdout = out


def sweep(what: str, arguments: list[str], out: Path, work: Path) -> dict[str, Any]:
    """Run once undisturbed, then once for every n. `out` may exist: then it is put back before every run."""
    log, count, old = work / "log", work / "count", work / "old"
    existed = out.exists()
    if existed:
        shutil.copytree(out, old)

    def restore() -> None:
        for path in out.parent.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if existed:
            shutil.copytree(old, out)
        log.unlink(missing_ok=True)

    before = digest_of(out)
    warm_up(arguments)
    restore()
    code = fork_run(arguments, log, count=count)
    steps, after = int(count.read_text()), digest_of(out)
    units = sorted(log.read_text().split("\n")[:-1])
    result: dict[str, Any] = {
        "code": code,
        "steps": steps,
        "before": before,
        "after": after,
        "units": units,
        "runs": [],
    }
    for nth in range(1, steps + 1):
        restore()
        first = fork_run(arguments, log, nth, what)
        run = {"nth": nth, "code": first, "state": digest_of(out), "left": others(out)}
        if what == "kill":
            log.unlink(missing_ok=True)
            run["finished"] = journalled(out.parent)
            run["second"] = fork_run(arguments, log)
            run["rerun"] = sorted(log.read_text().split("\n")[:-1]) if log.exists() else []
            run["final"], run["final_left"] = digest_of(out), others(out)
        result["runs"].append(run)
    return result


def others(out: Path) -> list[str]:
    """What lies beside the output."""
    return sorted(p.name for p in out.parent.iterdir() if p != out)


def slow(arguments: list[str], pause: float, but_first: bool = False) -> None:
    """Run the command line with a pause in every unit."""
    from loratool.cli.main import main
    from loratool.operations import panels

    run, started = panels.MergePanel.run, []

    def dawdling(self: Any, load: Any, emit: Any) -> Any:
        started.append(self)
        if len(started) > 1 or not but_first:
            time.sleep(pause)
        return run(self, load, emit)

    panels.MergePanel.run = dawdling  # type: ignore[method-assign]
    main(arguments)


if __name__ == "__main__":
    if sys.argv[1] == "slow":
        slow(sys.argv[2:], float(os.environ.get("PAUSE", "0.15")))
    elif sys.argv[1] == "stuck":
        slow(sys.argv[2:], 60, but_first=True)
    else:
        order = json.loads(Path(sys.argv[3]).read_text())
        json.dump(sweep(sys.argv[2], order["arguments"], Path(order["out"]), Path(order["work"])), sys.stdout)
