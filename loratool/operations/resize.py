"""resize: every delta at another rank, chosen exactly from its whole spectrum in factor space.

The truncated SVD of scaling * up @ down comes from an r x r core (loratool.algebra.lowrank), so nothing of size
out x in is built and the retained energy is exact. The scaling is folded into the new factors: the result has scale 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod, sqrt
from typing import Any

from loratool import dtypes
from loratool.adapter import Adapter, Finding, Target
from loratool.architecture import Architecture
from loratool.deltas import Delta, LowRank
from loratool.errors import InputError, UsageError
from loratool.hookspecs import Format
from loratool.operations.writing import spell
from loratool.plan import Emit, Facts, Input, Load, Out, Plan, Report, Settled, Spooled
from loratool.tensors import TensorRef


@dataclass(frozen=True)
class Rule:
    """How a rank is chosen: at most `rank`, and the least that keeps the share `energy` of squared singular values."""

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if self.rank is None and self.energy is None:
            raise UsageError("no rank rule was given", hint="--rank 16, or --energy 0.95")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"a rank of {self.rank} is impossible", hint="the smallest rank is 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"an energy of {self.energy} is impossible", hint="a share between 0 and 1, such as 0.95")

    def bound(self, available: int) -> int:
        """Return the largest rank that this rule can choose out of `available` singular values."""
        return min(self.rank or available, available)


@dataclass(frozen=True)
class ResizeModule:
    """One delta, recompressed."""

    target: Target
    delta: LowRank
    rule: Rule
    dtype: str

    @property
    def key(self) -> str:
        """The module."""
        return str(self.target)

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """Both factors."""
        return self.delta.refs

    @property
    def outs(self) -> tuple[Out, ...]:
        """Down and up at the largest rank that the rule allows, in the spool."""
        rank = self.rule.bound(min(self.delta.rank, *self.delta.matrix_shape))
        down, up = factor_shapes(self.delta.down.shape, self.delta.up.shape, rank)
        return Out("", f"{self.key}.down", down, self.dtype), Out("", f"{self.key}.up", up, self.dtype)

    @property
    def scratch(self) -> int:
        """Both factors in fp64, four times over."""
        return 32 * (prod(self.delta.down.shape) + prod(self.delta.up.shape)) + sum(r.held for r in self.delta.refs)

    def run(self, load: Load, emit: Emit) -> Facts:
        """Factorise, choose the rank, write the factors, measure what they lose."""
        import torch

        from loratool.algebra import lowrank, rank
        from loratool.algebra.deltas import as_matrices, is_finite

        up, down = as_matrices(load(self.delta.up), load(self.delta.down))
        if not (is_finite(up) and is_finite(down)):
            raise InputError("the factors hold NaN or infinity", where=self.key)
        up = up.double() * self.delta.scaling
        svd = lowrank.compress(up, down)
        bound = self.outs[0].shape[0]
        keep = rank.fixed(svd.sigma, bound)
        if self.rule.energy is not None:
            keep = min(keep, rank.energy(svd.sigma, self.rule.energy))
        narrow = getattr(torch, dtypes.torch_name(self.dtype))
        new_up, new_down = (factor.to(narrow).double() for factor in svd.balanced(keep))
        emit_factors(self.outs, new_up, new_down, emit)
        residual = float(svd.sigma[keep:].square().sum())
        if torch.finfo(narrow).bits < 32:  # rounding the factors costs more than a truncation may
            difference = lowrank.add([(up, down.double(), 1.0), (new_up, new_down, -1.0)])
            residual = float(lowrank.singular_values(*difference).square().sum())
        return {"rank": keep, "total": float(svd.sigma.square().sum()), "residual": residual}


def factor_shapes(down: tuple[int, ...], up: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of a layer's factors at another rank."""
    return (rank, *down[1:]), (up[0], rank, *up[2:])


def emit_factors(outs: Sequence[Out], up: Any, down: Any, emit: Emit) -> None:
    """Write matrices up (out, r) and down (r, in x kernel) as the factors `outs` = (down, up), rounding them once."""
    import torch

    from loratool.algebra.deltas import as_factors, is_finite

    dtype = getattr(torch, dtypes.torch_name(outs[0].dtype))
    up, down = as_factors(up, down, outs[0].shape, dtype)
    if not (is_finite(up) and is_finite(down)):
        raise InputError(f"the new factors overflow {outs[0].dtype}", where=outs[0].name, hint="--dtype float32")
    emit(outs[0], 0, down)
    emit(outs[1], 0, up)


def plan(
    adapter: Adapter,
    architecture: Architecture | None,
    rule: Rule,
    format: Format,
    *,
    dtype: str = "keep",
    options: Mapping[str, str],
) -> Plan:
    """Plan the recompression of every delta of `adapter` under `rule`, written in `format`."""
    plain = adapter.low_rank("resize")
    units = tuple(
        ResizeModule(
            t,
            delta,
            rule,
            dtypes.wider(delta.down.dtype, delta.up.dtype) if dtype == "keep" else dtypes.from_torch_name(dtype),
        )
        for t in adapter.targets
        for delta in plain[t]
    )
    report = Report(verb="resize", findings=list(adapter.findings))
    report.totals = {"modules": len(units), "bytes_before": sum(ref.nbytes for u in units for ref in u.reads)}
    if rule.rank is not None and all(rule.rank >= u.delta.rank for u in units):
        what = f"no module has a rank above {max(u.delta.rank for u in units)}: nothing gets smaller"
        report.findings.append(Finding("warning", f"--rank {rule.rank}", what))
    report.rows = [{"module": u.key, "rank_before": u.delta.rank} for u in units]

    def settle(facts: Mapping[str, Facts], spooled: Spooled) -> Settled:
        deltas: dict[Target, tuple[Delta, ...]] = {}
        for unit, row in zip(units, report.rows, strict=True):
            fact = facts[unit.key]
            deltas[unit.target] = (settled_factors(unit.outs, fact["rank"], spooled),)
            row.update(rank=fact["rank"], **_losses(fact["total"], fact["residual"]))
        report.totals |= _losses(*(sum(facts[u.key][name] for u in units) for name in ("total", "residual")))
        files = spell(replace(adapter, deltas=deltas), architecture, format, options, report)
        report.totals["bytes"] = sum(ref.nbytes for ds in deltas.values() for d in ds for ref in d.refs)
        return Settled(report, files)

    inputs = (Input(adapter.origin.path, adapter.tensors, adapter.explained),)
    later = tuple(adapter.base_copies.values())
    return Plan(units, report, settle, (), format.single_file or "file" in options, inputs, later)


def _losses(total: float, residual: float) -> dict[str, float]:
    """Return the share of energy that is kept, and the relative Frobenius error."""
    lost = residual / total if total else 0.0
    return {"retained": 1 - lost, "error": sqrt(lost)}


def settled_factors(outs: Sequence[Out], rank: int, spooled: Spooled) -> LowRank:
    """Return the spooled factors at their settled rank, with scale 1."""
    down, up = factor_shapes(outs[0].shape, outs[1].shape, rank)
    return LowRank(spooled(outs[0].name, down), spooled(outs[1].name, up), 1.0)
