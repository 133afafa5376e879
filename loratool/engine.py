"""How units run, whatever they are: N workers in one process, each pulling, computing and writing its own tiles.

Workers are threads: reading, arithmetic and writing release the interpreter lock, and one intra-op thread a worker
keeps results independent of their number. A unit starts when its scratch fits into what is left of the memory budget;
one that is larger than the whole budget runs alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import is_dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from loratool.errors import InputError, UsageError
from loratool.plan import Emit, Facts, JsonFile, Load, Out, Plan, Report, Unit
from loratool.storage.writer import Staging
from loratool.tensors import Span, TensorRef

if TYPE_CHECKING:
    import torch

Progress = Callable[[int, int], None]


class Resources(NamedTuple):
    """What a run may use. `memory` is the budget in bytes for the scratch of running units."""

    device: str = "auto"
    workers: int = 0
    memory: int = 2 << 30

    @property
    def threads(self) -> int:
        """The number of workers: as asked, or one a core that this process may use."""
        return self.workers or len(os.sched_getaffinity(0))

    def chosen_device(self) -> str:
        """Return the torch device; UsageError where there is no such device."""
        import torch

        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(self.device)
        except RuntimeError:
            device = torch.device("meta")
        if device.type not in ("cpu", "cuda"):
            raise UsageError(f"no device is called {self.device!r}", hint="--device cpu, cuda, cuda:1 or auto")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"this machine has no {self.device}", hint="--device cpu")
        return self.device


#: No limits but the defaults.
EVERYTHING = Resources()


def execute(plan: Plan, out: Path, resources: Resources, *, force: bool, progress: Progress | None) -> Report:
    """Run a plan, publish its output at `out`, and return the report. All appears at `out`, or nothing."""
    with Staging(out, digest(plan, resources), single_file=plan.single_file) as stage:
        stage.prepare(plan.files)
        stage.prepare_spool(o for unit in plan.units for o in unit.outs if not o.file)
        facts = run(plan.units, resources, stage, progress)
        report, more = plan.settle(facts, stage.spooled)
        stage.prepare(more)
        files = [*plan.files, *more]
        report.out = str(out)
        if not plan.single_file:
            record = JsonFile("loratool.report.json", report.as_dict())
            stage.prepare([record])
            files.append(record)
        stage.publish(files, force=force)
    return report


def measure(plan: Plan, resources: Resources, progress: Progress | None) -> Report:
    """Run a plan that has no output, such as a comparison."""
    return plan.settle(run(plan.units, resources, None, progress), _no_spool).report


def run(
    units: Sequence[Unit], resources: Resources, stage: Staging | None, progress: Progress | None
) -> dict[str, Facts]:
    """Run the units that the stage's journal does not know yet; return the facts of all, in plan order."""
    done: Mapping[str, Facts] = stage.done if stage else {}
    facts = {u.key: done[u.key] for u in units if u.key in done}
    pending = [u for u in units if u.key not in facts]
    if pending:
        from loratool.storage.load import Loader, as_bytes

        def emit(out: Out, row: int, tensor: torch.Tensor) -> None:
            assert stage is not None
            stage.write(out, row, as_bytes(tensor))

        total = sum(u.work for u in units)
        finished = total - sum(u.work for u in pending)
        with _one_thread_each(), Loader(resources.chosen_device()) as load:
            for unit, fact in _completed(pending, load, emit, resources):
                facts[unit.key] = fact
                if stage:
                    stage.record(unit.key, fact)
                finished += unit.work
                if progress:
                    progress(finished, total)
    return {u.key: facts[u.key] for u in units}


def _completed(pending: Sequence[Unit], load: Load, emit: Emit, resources: Resources) -> Iterator[tuple[Unit, Facts]]:
    """Run units in order of the plan as workers and memory allow; yield each as it ends. The first error stops all."""
    queue = list(reversed(pending))
    running: dict[Future[Facts], Unit] = {}
    pool = ThreadPoolExecutor(resources.threads, thread_name_prefix="loratool")
    try:
        while queue or running:
            while queue and len(running) < resources.threads:
                taken = sum(unit.scratch for unit in running.values())
                if running and taken + queue[-1].scratch > resources.memory:
                    break
                unit = queue.pop()
                running[pool.submit(unit.run, load, emit)] = unit
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in sorted(finished, key=lambda f: running[f].key):
                yield running.pop(future), future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """One intra-op thread a worker, without gradients; the caller's setting comes back afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _no_spool(name: str, shape: tuple[int, ...]) -> TensorRef:
    raise InputError(f"this plan spooled nothing, and {name} was asked for")


def digest(plan: Plan, resources: Resources) -> str:
    """Return what identifies a plan and its inputs: a killed run is resumed only by exactly the same one."""
    from loratool import __version__

    state = sha256(f"loratool {__version__} on {resources.device}".encode())
    for text in (*map(repr, plan.units), *map(repr, plan.files)):
        state.update(text.encode())
    for path in sorted(_paths((plan.units, plan.files))):
        status = Path(path).stat()
        state.update(f"{path} {status.st_size} {status.st_mtime_ns}".encode())
    return state.hexdigest()


def _paths(value: object) -> set[str]:
    """The files behind every TensorRef in a value."""
    if isinstance(value, TensorRef):
        return {piece.path for piece in value.pieces if isinstance(piece, Span)}
    if isinstance(value, tuple):
        return set().union(*map(_paths, value))
    if is_dataclass(value):
        return set().union(*map(_paths, vars(value).values()))
    return set()
