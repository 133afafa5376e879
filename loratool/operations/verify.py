"""Verifying a merge: the output is opened again, and samples of every tensor are computed anew, in fp64 and one by one.

What a merge does in joined factors, tiles and threads is done here the plain way: for a few stretches of rows of each
matrix, base plus every delta by its own formula. What no adapter touches must have kept its values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from typing import TYPE_CHECKING

from loratool import dtypes
from loratool.deltas import Term
from loratool.errors import LoratoolError
from loratool.operations.panels import TILE, in_one_tile
from loratool.plan import Emit, Facts, Load, Out, Plan, Report, Settled, Spooled, Unit
from loratool.tensors import TensorRef

if TYPE_CHECKING:
    import torch

STRETCHES, ROWS = 4, 4  # of each matrix


@dataclass(frozen=True)
class SampledRows:
    """Some rows of an output tensor against the base's, and what is to be added to them (nothing: they are equal).

    Both as the files store them; `encoded` allows for the rounding to fp8 or 4 bits.
    """

    merged: TensorRef
    weight: TensorRef
    terms: tuple[Term, ...]
    transposed: bool
    encoded: bool
    row: int = 0  # of the tensor at which the matrix begins
    outs: tuple[Out, ...] = ()

    @property
    def key(self) -> str:
        """The tensor and the place of the matrix in it."""
        return f"verify:{self.merged.name}:{self.row}"

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """Both, and all deltas."""
        return self.merged, self.weight, *(ref for t in self.terms for ref in t.delta.refs)

    @property
    def scratch(self) -> int:
        """The deltas in fp64, and a few rows."""
        rows = max(stop - start for start, stop in self._stretches())
        sampled = 64 * rows * prod(self.weight.shape[1:]) + self.weight.held * bool(self.weight.view)
        return 32 * sum(prod(ref.shape) for t in self.terms for ref in t.delta.refs) + sampled + 64 * TILE

    def run(self, load: Load, emit: Emit) -> Facts:
        """Compute the samples and compare."""
        import torch

        from loratool.algebra.kinds import dense
        from loratool.algebra.merging import Part

        wide = torch.float64
        parts = [Part(t, dense(t.delta, load, wide, transposed=self.transposed), self.weight.shape) for t in self.terms]
        for part in parts:
            tiles = self.weight.panels(TILE)
            part.survey((load(self.weight.rows(a, b)).to(wide).flatten(1), a) for a, b in tiles)
        worst, elements = 0.0, 0
        for start, stop in self._stretches():
            original = load(self.weight.rows(start, stop)).to(wide).flatten(1)
            exact = original.clone()
            for part in sorted(parts, key=lambda p: not p.replaces):
                part.add_to(exact, original, start)
            merged = load(self.merged.rows(start, stop)).to(wide).flatten(1)
            delta = (exact - original).abs().max()  # in fp32 it has errors of its own, of products that may cancel
            allowed = self._step(exact) + 1e-6 * (exact.abs() + original.abs() + delta)
            worst = max(worst, float(((merged - exact).abs() / allowed.clamp(min=1e-30)).max()))
            elements += exact.numel()
        return {"worst": worst, "elements": elements}

    def _stretches(self) -> list[tuple[int, int]]:
        """Return the first, the last and some other rows, chosen by the tensor's name; all of a rotated matrix."""
        rows = self.weight.shape[0]
        if rows <= STRETCHES * ROWS or in_one_tile(self.terms, self.transposed) or (self.transposed and self.encoded):
            return [(0, rows)]
        seed = sha256(self.key.encode()).digest()
        starts = {0, rows - ROWS, *(int.from_bytes(seed[4 * n : 4 * n + 4], "big") % (rows - ROWS) for n in range(2))}
        return [(start, start + ROWS) for start in sorted(starts)]

    def _step(self, exact: torch.Tensor) -> torch.Tensor:
        """Return how far one rounding to the output's dtype may move each value."""
        import torch

        if self.encoded and self.transposed:  # MXFP4: one scale for 32 inputs, steps up to a third of the largest
            largest = exact.abs().view(-1, 32, exact.shape[1]).amax(dim=1)
            return largest.repeat_interleave(32, dim=0) / 3
        if self.encoded:  # fp8
            return exact.abs() * 2**-4 + 1e-4 * exact.abs().max()
        info = torch.finfo(getattr(torch, dtypes.torch_name(self.merged.dtype)))
        return exact.abs() * (info.eps / 2) + info.smallest_normal * info.eps


def plan(units: Sequence[SampledRows], where: str) -> Plan:
    """Plan the comparison of samples; a difference beyond rounding is an error that names the tensors."""
    report = Report(verb="verify")

    def settle(facts: Mapping[str, Facts], spooled: Spooled) -> Settled:
        wrong = [u.merged.name for u in units if not facts[u.key]["worst"] <= 1.01]
        if wrong:
            raise LoratoolError(
                f"the merged model is not what it should be at {', '.join(wrong[:6])}: please report this bug",
                where=where,
                hint="the output is there, and should not be used",
            )
        report.totals = {
            "verified_tensors": len(units),
            "verified_values": sum(facts[u.key]["elements"] for u in units),
            "worst_rounding": max((facts[u.key]["worst"] for u in units), default=0.0),
        }
        return Settled(report)

    every: tuple[Unit, ...] = tuple(units)
    return Plan(every, report, settle)
