"""How units run, whatever they are: N workers in one process, each pulling, computing and writing its own tiles.

Workers are threads: reading, arithmetic and writing release the interpreter lock, and one intra-op thread a worker
keeps results independent of their number. A unit starts when its scratch fits into what is left of the memory budget;
one that is larger than the whole budget runs alone.

On a GPU units that are alike run in batches, and every worker has a stream of its own: while one computes, others read
and copy. What does not fit into the GPU's memory is done in smaller batches, then on the CPU, and the report says so.
"""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from loratool import ledger
from loratool.adapter import Finding
from loratool.errors import InputError, LoratoolError, StorageError, UsageError
from loratool.plan import (
    RECORD,
    CopiedFile,
    Emit,
    Facts,
    JsonFile,
    Load,
    Out,
    OutFile,
    Plan,
    Report,
    Stackable,
    TensorFile,
    Unit,
    batches,
    work,
)
from loratool.storage import finite, remote
from loratool.storage.writer import Staging
from loratool.tensors import Span, TensorRef

if TYPE_CHECKING:
    import torch

Progress = Callable[[int, int], None]
#: Of every input, by path: size, time of change, inode.
Inputs = Mapping[str, tuple[int, int, int]]
Batch: TypeAlias = tuple[Unit, ...]
_OF_A_COMMIT = (0, 0)  # what is left on the Hub cannot change, though others may bring it here meanwhile
_SHORT = "short_of_memory"  # in the facts of a unit: what was done about it


class _Stopped(BaseException):
    """Raised in a worker when the run has ended without it; nobody sees it."""


class Resources(NamedTuple):
    """What a run may use. `memory` is the budget in bytes for the scratch of running units.

    `batches`: whether units that are alike are done together; None: where the device is not the CPU.
    """

    device: str = "auto"
    workers: int = 0
    memory: int = 2 << 30
    batches: bool | None = None

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

    def composed(self, units: Sequence[Unit]) -> list[Batch]:
        """Return the units as they are done: each alone, or in batches."""
        together = self.chosen_device() != "cpu" if self.batches is None else self.batches
        return batches(units, self.memory) if together else [(unit,) for unit in units]


#: No limits but the defaults.
EVERYTHING = Resources()


def execute(plan: Plan, out: Path, resources: Resources, *, force: bool, progress: Progress | None) -> Report:
    """Run a plan, publish its output at `out`, and return the report. All appears at `out`, or nothing."""
    inputs = inputs_of(plan.units, plan.files, plan.later)
    finite.require(plan.files, plan.inputs)
    with Staging(out, digest(plan, resources, inputs), single_file=plan.single_file) as stage:
        stage.prepare(plan.files, [o for unit in plan.units for o in unit.outs if not o.file])
        facts = run(plan.units, resources, stage, progress)
        report, more = plan.settle(facts, stage.spooled)
        report.findings += _retried(facts)
        files = [*plan.files, *more]
        if plan.single_file and len(files) != 1:
            names = ", ".join(file.name for file in files) or "none"
            what = f"the output is one file, and its format wrote {len(files)} ({names}): please report this bug"
            raise LoratoolError(what, where=out)
        report.ledger = ledger.close(plan.inputs, plan.units, files)
        inputs = {**inputs_of((), more), **inputs}
        finite.require(more, plan.inputs)
        stage.prepare(more)
        report.out = str(out)
        if not plan.single_file:
            record = JsonFile(RECORD, report.as_dict())
            stage.prepare([record])
            files.append(record)
        _check_unchanged(inputs)
        stage.publish(files, force=force)
    return report


def measure(plan: Plan, resources: Resources, progress: Progress | None) -> Report:
    """Run a plan that has no output, such as a comparison."""
    inputs = inputs_of(plan.units)
    facts = run(plan.units, resources, None, progress)
    _check_unchanged(inputs)
    report = plan.settle(facts, _no_spool).report
    report.findings += _retried(facts)
    return report


def run(
    units: Sequence[Unit], resources: Resources, stage: Staging | None, progress: Progress | None
) -> dict[str, Facts]:
    """Run the units that the stage's journal does not know yet; return the facts of all, in plan order."""
    twice = [key for key, count in Counter(u.key for u in units).items() if count > 1]
    if twice:
        raise LoratoolError(f"two units of the plan are called {twice[0]!r}: please report this bug")
    done: Mapping[str, Facts] = stage.done if stage else {}
    facts = {u.key: done[u.key] for u in units if u.key in done}
    # a batch of which a part is missing is done again as a whole: in another one, results might be rounded differently
    pending = [batch for batch in resources.composed(units) if any(u.key not in facts for u in batch)] if units else []
    if pending:
        total = sum(work(u) for u in units)
        finished = total - sum(work(u) for batch in pending for u in batch)
        with _one_thread_each(), _frozen_garbage(), _workers(resources, stage) as submit:
            for batch, found in _completed(pending, submit, resources.threads, resources.memory):
                for unit, fact in zip(batch, found, strict=True):
                    facts[unit.key] = fact
                    if stage:
                        stage.record(unit.key, fact)
                    finished += work(unit)
                if progress:
                    progress(finished, total)
    return {u.key: facts[u.key] for u in units}


@contextmanager
def _workers(resources: Resources, stage: Staging | None) -> Iterator[Callable[[Batch], Future[list[Facts]]]]:
    """Give a function that has a worker run a batch. The first error stops all.

    An error waits for the other workers, which end at their next reading or writing. An interrupt does not: a worker
    may be in the middle of a decomposition that takes a minute. Files that such a worker uses stay open until it ends.
    """
    import torch

    from loratool.storage.load import Loader, as_bytes

    stopped = Event()

    def emit(out: Out, row: int, tensor: torch.Tensor) -> None:
        assert stage is not None
        data = as_bytes(tensor)
        if stopped.is_set():
            raise _Stopped
        stage.write(out, row, data)

    def loading(loader: Loader) -> Load:
        def load(ref: TensorRef, into: torch.Tensor | None = None) -> torch.Tensor:
            if stopped.is_set():
                raise _Stopped
            return loader(ref, into)

        return load

    def compute(batch: Batch) -> list[Facts]:
        with torch.no_grad():  # of each thread
            return _done(batch, loading(loader), loading(on_cpu), emit)

    device = resources.chosen_device()
    pool = ThreadPoolExecutor(resources.threads, "loratool", _use_own_stream, (device,))
    with Loader(device) as loader, Loader() as on_cpu:
        waits = True
        try:
            yield lambda batch: pool.submit(compute, batch)
        except Exception:
            raise
        except BaseException:
            waits = False
            raise
        finally:
            stopped.set()
            pool.shutdown(wait=waits, cancel_futures=True)


def _use_own_stream(device: str) -> None:
    """Give the worker that calls this a stream of its own, on a GPU: its copies overlap with what others compute."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


def _done(batch: Batch, load: Load, on_cpu: Load, emit: Emit) -> list[Facts]:
    """Run a batch; where it does not fit into the GPU's memory, its halves, and a single unit on the CPU."""
    import torch

    first = batch[0]
    try:
        if len(batch) > 1:
            assert isinstance(first, Stackable)
            return first.run_together(batch, load, emit)
        return [first.run(load, emit)]
    except torch.OutOfMemoryError:
        pass  # and on from outside: the traceback holds what was loaded
    if len(batch) == 1:
        return [first.run(on_cpu, emit) | {_SHORT: "on the CPU"}]
    half = len(batch) // 2
    parts = [fact for part in (batch[:half], batch[half:]) for fact in _done(part, load, on_cpu, emit)]
    return [{_SHORT: "in smaller batches", **fact} for fact in parts]


def _retried(facts: Mapping[str, Facts]) -> list[Finding]:
    """Say what became of units for which the GPU's memory was too small."""
    counts = Counter(fact[_SHORT] for fact in facts.values() if _SHORT in fact)
    if not counts:
        return []
    what = " and ".join(f"{count} of {len(facts)} pieces were done {how}" for how, count in sorted(counts.items()))
    what = f"the GPU's memory was too small: {what}; their last digits may differ from those of another run"
    return [Finding("warning", "--device", what, "--workers 1 or a smaller --max-memory asks for less at a time")]


def _completed(
    pending: Sequence[Batch], submit: Callable[[Batch], Future[list[Facts]]], threads: int, memory: int
) -> Iterator[tuple[Batch, list[Facts]]]:
    """Run batches in order of the plan as workers and memory allow; yield each as it ends."""
    queue = list(reversed(pending))
    running: dict[Future[list[Facts]], Batch] = {}
    while queue or running:
        while queue and len(running) < threads:
            taken = sum(unit.scratch for batch in running.values() for unit in batch)
            if running and taken + sum(unit.scratch for unit in queue[-1]) > memory:
                break
            batch = queue.pop()
            running[submit(batch)] = batch
        finished, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in sorted(finished, key=lambda f: running[f][0].key):
            yield running.pop(future), future.result()


@contextmanager
def _frozen_garbage() -> Iterator[None]:
    """Spare the garbage collector what the plan is made of: looking through it again and again took 5 % of a merge."""
    if gc.get_freeze_count():  # by the caller, who would not want it thawed, or by another run
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """One intra-op thread a worker; the caller's setting comes back afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _no_spool(name: str, shape: tuple[int, ...]) -> TensorRef:
    raise InputError(f"this plan spooled nothing, and {name} was asked for")


def digest(plan: Plan, resources: Resources, inputs: Inputs) -> str:
    """Return what identifies a plan and its inputs: a killed run is resumed only by exactly the same one."""
    from loratool import __version__

    state = sha256(f"loratool {__version__}, torch {_torch_version()}".encode())
    if plan.units:
        state.update(f"on {resources.chosen_device().partition(':')[0]}".encode())
        sizes = [len(batch) for batch in resources.composed(plan.units)]
        state.update(f"in batches of {sizes}".encode() if max(sizes) > 1 else b"")
    for text in (*map(repr, plan.units), *map(repr, plan.files), *map(repr, sorted(inputs.items()))):
        state.update(text.encode())
    return state.hexdigest()


def _torch_version() -> str:
    """Ask the installation, for importing torch takes longer than many a conversion."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return "of unknown version"


def inputs_of(units: Iterable[Unit], files: Iterable[OutFile] = (), later: Iterable[TensorRef] = ()) -> Inputs:
    """Look at every input file that units read, or whose bytes go to the output."""
    files = tuple(files)
    refs = [*(ref for unit in units for ref in unit.reads), *later]
    refs += [ref for file in files if isinstance(file, TensorFile) for ref in file.tensors]
    paths = {piece.path for ref in refs for piece in ref.pieces if isinstance(piece, Span)}
    paths |= {file.source for file in files if isinstance(file, CopiedFile)}
    remote.fetch(paths)
    return {path: _look(path) for path in paths}


def _look(path: str) -> tuple[int, int, int]:
    left = remote.ranges(path)
    if left is not None:
        return left.size, *_OF_A_COMMIT
    try:
        status = Path(path).stat()
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror}", where=path) from None
    return status.st_size, status.st_mtime_ns, status.st_ino


def _check_unchanged(inputs: Inputs) -> None:
    """Refuse what was made of an input that changed meanwhile: part of it may be old and part of it new."""
    for path, before in inputs.items():
        if before[1:] != _OF_A_COMMIT and _look(path) != before:
            raise StorageError("this input was changed while it was being used", where=path, hint="run it again")
