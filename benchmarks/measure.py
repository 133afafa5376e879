"""Measuring: whole processes by what the kernel accounts for them, functions by the CPU time of one thread.

CPU seconds are user + system of the process and what it waited for; wall seconds are for orientation (machines are
shared); memory is the largest resident set. Contenders take turns, so that drift hits both; medians are reported.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class Cost(NamedTuple):
    """CPU and wall in seconds, memory in MiB."""

    cpu: float
    wall: float
    memory: float


# A child inherits its parent's peak memory, so a small process stands between this one and the contender.
_LAUNCHER = """
import json, os, sys, time
start = time.monotonic()
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(pid, 0)
cpu, wall = usage.ru_utime + usage.ru_stime, time.monotonic() - start
print("\\n" + json.dumps([cpu, wall, usage.ru_maxrss / 1024]))
sys.exit(os.waitstatus_to_exitcode(status))
"""


def process(command: Sequence[str], variables: Mapping[str, str] | None = None) -> Cost:
    """Run a command (its program by absolute path) to its end; it must succeed. `variables` join the environment."""
    launcher = [sys.executable, "-S", "-c", _LAUNCHER]
    variables = {**os.environ, **(variables or {})}
    done = subprocess.run([*launcher, *command], capture_output=True, text=True, check=False, env=variables)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)[:200]} failed:\n{done.stderr[-2000:]}")
    return Cost(*json.loads(done.stdout.splitlines()[-1]))


def python(module: str, *arguments: object) -> list[str]:
    """Return the command that runs a module of this interpreter."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def loratool(*arguments: object) -> list[str]:
    """Return a loratool command."""
    return python("loratool", *arguments)


def in_turns(contenders: dict[str, Callable[[], Cost]], runs: int, once: str = "") -> dict[str, Cost]:
    """Run contenders A B A B ...; return the median of each figure. A slow one runs `once`, in the middle turn."""
    costs: dict[str, list[Cost]] = {name: [] for name in contenders}
    for turn in range(runs):
        for name, run in contenders.items():
            if name != once or turn == runs // 2:
                costs[name].append(run())
    return {
        name: Cost(*(statistics.median(figures) for figures in zip(*found, strict=True)))
        for name, found in costs.items()
    }


def function(call: Callable[[], object], runs: int) -> float:
    """Return the median CPU seconds of a call in this thread."""
    times = []
    for _ in range(runs):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times)


def start_up(costs: dict[str, Cost], ours: tuple[str, str], peer: tuple[str, str]) -> None:
    """Print a peer's ratio without what both spend before they begin: pairs of a contender and its start alone."""
    net = [costs[whole].cpu - costs[start].cpu for whole, start in (ours, peer)]
    print(f"  without start-up: {net[0]:.2f} and {net[1]:.2f} CPU s, {net[1] / net[0]:.0f}x")


def show(title: str, costs: dict[str, Cost], ours: str) -> None:
    """Print contenders and the ratios to ours."""
    print(f"\n{title}")
    print(f"  {'':<44}{'CPU s':>9}{'wall s':>9}{'MiB':>8}{'CPU x':>9}{'memory x':>10}")
    for name, cost in costs.items():
        ratio = f"{cost.cpu / costs[ours].cpu:>9.1f}{cost.memory / costs[ours].memory:>10.1f}"
        print(f"  {name:<44}{cost.cpu:>9.2f}{cost.wall:>9.2f}{cost.memory:>8.0f}{ratio}")
