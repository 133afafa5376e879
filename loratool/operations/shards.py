"""The files of a merged checkpoint, and the units that fill them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from math import prod
from typing import NamedTuple

from loratool import dtypes
from loratool.operations.encoded import Codes, encoded_units
from loratool.operations.panels import MergePanel, panels_of
from loratool.operations.residual import FIELD
from loratool.operations.touched import AllTouched, Touched
from loratool.plan import Out, TensorFile, Unit
from loratool.storage.checkpoint import Shard
from loratool.tensors import TensorRef


class Output(NamedTuple):
    """A file of the output, and what the options say of all: dtypes, and what "keep" is for new tensors; encodings.

    `untouched` says of a tensor that it stays as it is: the VAE's in a checkpoint of one file. `as_nf4`: matrices
    that are touched are written as what nf4 makes of them.
    """

    file: str
    dtype: str
    compute: str
    kept_dtypes: Mapping[str, str]
    codes: Codes
    as_trained: str
    trained_on: frozenset[str]
    untouched: Callable[[str], bool]
    as_nf4: bool = False

    def wanted(self, ref: TensorRef) -> str:
        """Return the dtype that a tensor gets."""
        kept = self.kept_dtypes.get(ref.name, ref.dtype)
        converted = self.dtype != "keep" and dtypes.is_float(kept) and not self.untouched(ref.name)
        return dtypes.from_torch_name(self.dtype) if converted else kept

    def simulated(self, ref: TensorRef) -> str:
        """Return what a tensor was quantised to while the adapter was trained, or nothing."""
        return self.as_trained if ref.name in self.trained_on else ""


Units = list[tuple[Unit, Touched | None]]


def plan_shard(shard: Shard, output: Output, touched: AllTouched) -> tuple[TensorFile, Units]:
    """Return a shard of the output and the units that fill it, each with the matrix that it changes."""
    refs: list[TensorRef] = []
    units: Units = []
    for ref in shard.header.tensors:
        logical = output.codes.by_codes.get(ref.name) or output.codes.by_scales.get(ref.name)
        wanted = output.wanted(ref)
        blocks = touched.get(logical.name if logical else ref.name, {})
        name = shard.stored(ref.name)
        if logical and not blocks:
            refs.append(ref.renamed(name))
        elif logical:
            refs.append(TensorRef(name, ref.shape, ref.dtype))
            if ref.name in output.codes.by_codes:
                units += _encoded_units(logical, ref, output, blocks, shard)
        elif not blocks and wanted == ref.dtype and ref.view is None and not output.simulated(ref):
            refs.append(ref.renamed(name))
        else:
            refs.append(TensorRef(name, ref.shape, wanted))
            units += _panels(ref, name, output, wanted, blocks)
    header = shard.header
    metadata = {name: value for name, value in header.metadata.items() if name != FIELD}  # merged, it is none any more
    same = all(new.dtype == old.dtype for new, old in zip(refs, header.tensors, strict=True))
    same = same and len(metadata) == len(header.metadata)
    return TensorFile(output.file, tuple(refs), metadata, (header.raw or None) if same else None), units


def _encoded_units(
    logical: TensorRef, ref: TensorRef, output: Output, blocks: Mapping[int, Touched], shard: Shard
) -> Units:
    """Return the units of a touched tensor that is written in the base's own encoding."""
    scales = next(name for name, of in output.codes.by_scales.items() if of is logical)
    stored = next(r for shard in output.codes.shards for r in shard.header.tensors if r.name == scales)
    matrices = {
        row: MergePanel(
            t.place.stored,
            Out("", logical.name, t.place.stored.shape, logical.dtype),
            tuple(t.terms),
            t.place.transposed,
            row,
            0,
            t.place.stored.shape[0],
            output.compute,
        )
        for row, t in blocks.items()
    }
    codes, scale = (one.renamed(shard.stored(one.name)) for one in (ref, stored))
    made = encoded_units(logical, matrices, output.file, codes, scale)
    return [(unit, blocks[row] if row is not None else None) for unit, row in made]


def _panels(ref: TensorRef, name: str, output: Output, dtype: str, blocks: Mapping[int, Touched]) -> Units:
    """Cut a tensor, `name` in the output, into units: each matrix that is touched, and the rows between them."""
    if len(ref.shape) < 2:  # a vector is one column
        flat = replace(ref, shape=(prod(ref.shape), 1))
    elif not blocks:
        flat = replace(ref, shape=(prod(ref.shape[:-1]), ref.shape[-1]))
    else:  # the experts of a stack lie one below the other
        stored = next(t.place.stored for t in blocks.values())
        flat = replace(ref, shape=(prod(ref.shape[: 1 - len(stored.shape) or None]), *stored.shape[1:]))
    out = Out(output.file, name, flat.shape, dtype)
    ends = {row: row + t.place.stored.shape[0] for row, t in blocks.items()}
    simulated = output.simulated(ref)
    units: Units = []
    for start, stop in pairwise(sorted({0, flat.shape[0], *ends, *ends.values()})):
        mine = blocks.get(start)
        matrix = flat.rows(start, stop)
        terms = tuple(mine.terms) if mine else ()
        transposed = mine.place.transposed if mine else False
        whole = simulated == "nf4-double"  # whose scales depend on all of the weight
        cuts = [(0, stop - start)] if whole else panels_of(matrix, terms, transposed=transposed)
        as_nf4 = output.as_nf4 and mine is not None
        units += [
            (MergePanel(matrix, out, terms, transposed, start, a, b, output.compute, simulated, as_nf4), mine)
            for a, b in cuts
        ]
    return units
