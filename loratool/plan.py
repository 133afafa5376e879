"""Plans: what will be done, in independent pieces, and what was done.

An operation turns descriptions into a Plan; an engine runs its units; a writer publishes its files; `settle` makes the
Report (and, for factors whose rank was only known after computing, the remaining files) from the facts of all units.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from loratool import dtypes
from loratool.adapter import Finding
from loratool.tensors import TensorRef

if TYPE_CHECKING:
    import torch

#: What a unit measured: JSON values by name. Kept in the journal, so that a resumed run knows them.
Facts: TypeAlias = dict[str, Any]
#: The file in an output folder that says how it was made.
RECORD = "loratool.report.json"


def seed_of(seed: int, key: str) -> int:
    """Return the seed of one unit: the first 7 bytes of the SHA-256 of `seed:key`, whatever the number of workers."""
    return int.from_bytes(sha256(f"{seed}:{key}".encode()).digest()[:7], "big")


class Out(NamedTuple):
    """A tensor that a unit writes: into an output file, or into the spool (`file` is empty) until its rank is settled.

    In the spool the shape is an upper bound.
    """

    file: str
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def key(self) -> str:
        """The tensor's name, and before it the folder of its file where the output has several."""
        folder = self.file.rpartition("/")[0]
        return f"{folder}:{self.name}" if folder else self.name


class Load(Protocol):
    """`load(ref)` reads a tensor in its stored dtype onto the run's device.

    `into` is a buffer in main memory to read into: fresh pages cost more than the reading itself.
    """

    def __call__(self, ref: TensorRef, into: torch.Tensor | None = None) -> torch.Tensor:
        """Read `ref`."""


class Emit(Protocol):
    """`emit(out, row, tensor)` writes rows of an output from `row` on; dtype and row shape must be the output's."""

    def __call__(self, out: Out, row: int, tensor: torch.Tensor) -> None:
        """Write rows."""


class Unit(Protocol):
    """A piece of work: frozen, picklable, idempotent. It pulls what it needs and emits what it made."""

    @property
    def key(self) -> str:
        """A name unique in the plan."""

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """What it reads: the ledger, the digest and the progress follow from it."""

    @property
    def outs(self) -> tuple[Out, ...]:
        """What it writes."""

    @property
    def scratch(self) -> int:
        """Bytes of memory it needs while running."""

    def run(self, load: Load, emit: Emit) -> Facts:
        """Do it."""


@runtime_checkable
class Stackable(Unit, Protocol):
    """A unit that can be done together with others like it, in stacked tensors: many small ones keep a GPU waiting."""

    @property
    def alike(self) -> Hashable:
        """Equal for units of one kind that fit into one batch; None for one that is always done alone."""

    def run_together(self, units: Sequence[Any], load: Load, emit: Emit) -> list[Facts]:
        """Do all of `units`, this one among them: the same as one by one, but for rounding."""


def batches(units: Sequence[Unit], memory: int) -> list[tuple[Unit, ...]]:
    """Compose batches of units that are alike, in the order of the plan.

    They follow from the plan and `memory` (bytes) alone, not from what is free or how many workers there are: so does
    every rounding. Each takes a quarter at most, so that some are read while others are computed.
    """
    found: list[list[Unit]] = []
    filling: dict[object, list[Unit]] = {}
    for unit in units:
        alike = unit.alike if isinstance(unit, Stackable) else None
        batch = filling.get((type(unit), alike)) if alike is not None else None
        if not batch or len(batch) == _LARGEST or 4 * (unit.scratch + sum(u.scratch for u in batch)) > memory:
            batch = filling[type(unit), alike] = []
            found.append(batch)
        batch.append(unit)
    return [tuple(batch) for batch in found]


_LARGEST = 64  # units of a batch: more gain nothing, and are done later


def work(unit: Unit) -> int:
    """Return the bytes that a unit reads: the measure of progress."""
    return sum(ref.nbytes for ref in unit.reads)


class Digest(NamedTuple):
    """A field of a file's metadata that its bytes decide: the first `digits` of their SHA-256, in hexadecimal.

    Of the data behind the header; or of those bytes (from, to) that the `window` shows of the file as it would be if
    its metadata were only the fields that start with `prefix`. Until the data is written the field holds zeros.
    """

    field: str
    digits: int = 64
    window: tuple[int, int] | None = None
    prefix: str = ""


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file of the output: tensors in file order, computed ones (no pieces) filled in by units.

    `header` is the input's header, kept byte for byte where nothing in it changes. `finite`: no tensor that is copied
    into it may hold NaN or infinity.
    """

    name: str
    tensors: tuple[TensorRef, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    header: bytes | None = None
    digests: tuple[Digest, ...] = ()
    finite: bool = False

    @classmethod
    def new(
        cls, name: str, tensors: Iterable[TensorRef], metadata: Mapping[str, str], digests: tuple[Digest, ...] = ()
    ) -> TensorFile:
        """Return a file in the order of the safetensors library: by dtype, largest elements first, then by name."""
        ordered = sorted(tensors, key=lambda ref: (-dtypes.order(ref.dtype), ref.name))
        return cls(name, tuple(ordered), {**metadata, **{d.field: "0" * d.digits for d in digests}}, digests=digests)


class JsonFile(NamedTuple):
    """A JSON file of the output."""

    name: str
    content: Mapping[str, Any]


class TextFile(NamedTuple):
    """A text file of the output, such as a model card."""

    name: str
    text: str


class CopiedFile(NamedTuple):
    """A file of the input that goes to the output byte for byte."""

    name: str
    source: str


OutFile: TypeAlias = TensorFile | JsonFile | TextFile | CopiedFile


@dataclass
class Report:
    """What a verb did or, after a dry run, would do. `rows` describe modules; `totals` the whole."""

    verb: str
    sources: dict[str, str] = field(default_factory=dict)
    out: str = ""
    totals: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    ledger: dict[str, dict[str, int]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    dry_run: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        content = asdict(self)
        content["findings"] = [f._asdict() for f in self.findings]
        return content


class Input(NamedTuple):
    """An input: its tensors, and the fates that no reading or copying shows, by tensor name.

    `otherwise` is the fate of every other tensor that nothing touches; without it such a tensor is an error.
    """

    source: str
    tensors: Mapping[str, TensorRef]
    explained: Mapping[str, str] = {}
    otherwise: str = ""


class Spooled(Protocol):
    """`spooled(name, shape)` is a reference to what a unit spooled as `name`, at its settled shape."""

    def __call__(self, name: str, shape: tuple[int, ...]) -> TensorRef:
        """Find it."""


class Settled(NamedTuple):
    """The end of a plan: the files that had to wait for the facts, and the report."""

    report: Report
    files: tuple[OutFile, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Units of work, the output files known beforehand, a report to show before running, and how it ends.

    `settle(facts, spooled)` may raise: then nothing is published. `inputs` are what the ledger has to account for;
    `later` are references that `settle` will copy.
    """

    units: tuple[Unit, ...]
    preview: Report
    settle: Callable[[Mapping[str, Facts], Spooled], Settled]
    files: tuple[OutFile, ...] = ()
    single_file: bool = False
    inputs: tuple[Input, ...] = ()
    later: tuple[TensorRef, ...] = ()
