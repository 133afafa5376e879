"""Merging into a base in its own encoding: what is not touched stays as bytes, what is goes back to codes and scales.

fp8 and MXFP4 weights can be encoded again; where a base has others, all of it is decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod

from loratool.encodings import Scaled, Transposed4Bit
from loratool.operations.panels import PANEL, MergePanel, requantised_panels
from loratool.plan import Emit, Facts, Load, Out, Unit
from loratool.storage.checkpoint import Checkpoint, Shard
from loratool.storage.safetensors import Header
from loratool.tensors import TensorRef


@dataclass(frozen=True)
class Codes:
    """What a file stores in the place of logical tensors: `logical` by the name of the codes, and of the scales."""

    shards: tuple[Shard, ...]
    by_codes: Mapping[str, TensorRef] = field(default_factory=dict)
    by_scales: Mapping[str, TensorRef] = field(default_factory=dict)


def can_encode(ref: TensorRef) -> bool:
    """Whether a logical tensor's encoding can hold a merged one."""
    encoding = ref.view.encoding if ref.view else None
    return isinstance(encoding, Transposed4Bit) or (isinstance(encoding, Scaled) and encoding.name == "fp8")


def in_own_encoding(base: Checkpoint, ground: Checkpoint) -> Codes:
    """Return the shards of `ground`, which is `base` as the adapters mean it, with codes where the files have them."""
    refs = {name: ground.tensors[name] for name in base.quantised if name in ground.tensors}
    refs = {name: ref for name, ref in refs.items() if ref.view is not None and ref.view.encoding is not None}
    if not refs or not all(can_encode(ref) for ref in refs.values()):
        return Codes(ground.shards)
    parts = {name: [base.stored[part.name] for part in ref.view.of] for name, ref in refs.items() if ref.view}
    before = {shard.name: shard for shard in base.shards}
    shards = []
    for shard in ground.shards:
        stored = [s for s in base.stored_shards if s.name == shard.name]
        if stored and before.get(shard.name) == shard and not _moved_out(stored[0], parts, shard):
            shards.append(stored[0])
            continue
        names = {ref.name for ref in (stored[0].header.tensors if stored else ())}
        tensors = [part for ref in shard.header.tensors for part in parts.get(ref.name, [ref])]
        tensors += [base.stored[name] for name in base.spent if name in names]
        shards.append(shard._replace(header=Header(b"", tuple(tensors), shard.header.metadata)))
    return Codes(
        tuple(shards),
        {both[0].name: refs[name] for name, both in parts.items()},
        {both[1].name: refs[name] for name, both in parts.items()},
    )


def _moved_out(stored: Shard, parts: Mapping[str, list[TensorRef]], shard: Shard) -> bool:
    """Whether scales lie in another file than their codes: then both are written beside each other."""
    names = {ref.name for ref in stored.header.tensors}
    return any(part.name not in names for ref in shard.header.tensors for part in parts.get(ref.name, ()))


def encoded_units(
    logical: TensorRef, matrices: Mapping[int, MergePanel], file: str, codes: TensorRef, scales: TensorRef
) -> list[tuple[Unit, int | None]]:
    """Return the units that fill the codes and scales of a touched tensor, each with the row of its matrix.

    `matrices` are the touched ones, by the row at which they begin in the logical tensor; the rest is copied.
    """
    assert logical.view is not None
    outs = [
        Out(file, stored.name, (prod(part.shape[:-1]), part.shape[-1]), stored.dtype)
        for stored, part in zip((codes, scales), logical.view.of, strict=True)
    ]
    units: list[tuple[Unit, int | None]] = []
    for row, matrix in matrices.items():
        units += [(unit, row) for unit in requantised_panels(matrix, outs[0], outs[1])]
    matrix_rows = next(m.weight.shape[0] for m in matrices.values())
    count = prod(logical.shape[:-1]) // matrix_rows
    touched = {row // matrix_rows for row in matrices}
    for out, part in zip(outs, logical.view.of, strict=True):
        flat = replace(part, shape=out.shape)
        share = out.shape[0] // count
        for which in sorted(set(range(count)) - touched):
            units.append((CopiedRows(flat.rows(which * share, (which + 1) * share), out, which * share), None))
    return units


@dataclass(frozen=True)
class CopiedRows:
    """Rows of a tensor that go to the output as they are, beside others that are computed."""

    rows: TensorRef
    out: Out
    row: int

    @property
    def key(self) -> str:
        """Tensor and rows."""
        return f"{self.out.key}[{self.row}:{self.row + self.rows.shape[0]}] copied"

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """The rows."""
        return (self.rows,)

    @property
    def outs(self) -> tuple[Out, ...]:
        """The tensor."""
        return (self.out,)

    @property
    def scratch(self) -> int:
        """A panel."""
        return 2 * PANEL

    def run(self, load: Load, emit: Emit) -> Facts:
        """Copy them."""
        for start, stop in self.rows.panels(PANEL):
            emit(self.out, self.row + start, load(self.rows.rows(start, stop)))
        return {"delta": 0.0, "lost": 0.0}
