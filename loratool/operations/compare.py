"""compare: are two adapters the same update? By factor algebra, module by module; no base is needed.

The distance of two deltas is the Frobenius norm of a product of stacked factors, [up1, -up2] @ [down1; down2], from
the triangular factors of their QR in fp64: accurate to about 1e-15 of the norms, where a difference of Grams loses half
the digits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod, sqrt
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from loratool.adapter import Adapter, Target
from loratool.architecture import Architecture
from loratool.deltas import LowRank
from loratool.errors import InputError, MismatchError
from loratool.operations.writing import in_whole_modules
from loratool.plan import Emit, Facts, Input, Load, Out, Plan, Report, Settled, Spooled
from loratool.tensors import TensorRef

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CompareModule:
    """One target: the deltas of both adapters, either of which may be absent."""

    target: Target
    first: tuple[LowRank, ...]
    second: tuple[LowRank, ...]
    outs: tuple[Out, ...] = ()

    @property
    def key(self) -> str:
        """The module."""
        return str(self.target)

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """All factors."""
        return tuple(ref for d in (*self.first, *self.second) for ref in d.refs)

    @property
    def scratch(self) -> int:
        """All factors in fp64, three times over."""
        return 24 * sum(prod(ref.shape) for ref in self.reads)

    def run(self, load: Load, emit: Emit) -> Facts:
        """Measure both norms, the inner product and the distance."""
        import torch

        from loratool.algebra import lowrank

        one, two = _joined(self.first, load), _joined(self.second, load)
        if one is None or two is None:
            pair = one or two
            assert pair is not None
            norm = sqrt(lowrank.squared_norm(*pair))
            return {"norms": [norm if one else 0.0, norm if two else 0.0], "inner": 0.0, "distance": norm}
        same = all(x.shape == y.shape and bool(torch.equal(x, y)) for x, y in zip(one, two, strict=True))
        difference = lowrank.add([(*one, 1.0), (*two, -1.0)])
        distance = 0.0 if same else float(lowrank.singular_values(*difference).norm())
        norms = [sqrt(lowrank.squared_norm(*pair)) for pair in (one, two)]
        return {"norms": norms, "inner": lowrank.inner(*one, *two), "distance": distance}


def _joined(deltas: tuple[LowRank, ...], load: Load) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return (up, down) in fp64, scaling folded into up, of the sum of `deltas`."""
    from loratool.algebra import lowrank
    from loratool.algebra.deltas import as_matrices, is_finite

    pairs = []
    for delta in deltas:
        up, down = as_matrices(load(delta.up), load(delta.down))
        if not (is_finite(up) and is_finite(down)):
            raise InputError("the factors hold NaN or infinity", where=delta.up.name)
        pairs.append((up.double(), down.double(), delta.scaling))
    return lowrank.add(pairs) if pairs else None


def plan(
    first: Adapter,
    second: Adapter,
    architecture: Architecture | None = None,
    config: Mapping[str, Any] = MappingProxyType({}),
) -> Plan:
    """Plan the comparison of two adapters, over the modules of either.

    A stack meets the modules that it stands for, the parts of a fused weight (`architecture` knows them) the whole; the
    base's `config` has the sizes of those parts.
    """
    if first.deltas.keys() != second.deltas.keys():
        paths = {part for a in (first, second) for t in a.deltas for part in t.parts}
        family = architecture if any(path.rpartition("[")[0] in paths for path in paths) else None
        first, second = (in_whole_modules(a, family, config) for a in (first, second))
    one, two = first.low_rank("compare"), second.low_rank("compare")
    targets = sorted({*one, *two}, key=lambda t: t.sort_key)
    common = [t for t in targets if t in first.deltas and t in second.deltas]
    if not common:
        raise MismatchError(
            f"no module in common: {first.targets[0]} ... against {second.targets[0]} ...",
            where=f"{first.origin.path} and {second.origin.path}",
            hint="are they for the same base model? --arch reads both under one family",
        )
    for t in common:
        shapes = [a.deltas[t][0].matrix_shape for a in (first, second)]
        if shapes[0] != shapes[1]:
            raise MismatchError(
                f"{t} has shape {shapes[0]} in one and {shapes[1]} in the other", where=first.origin.path
            )
    units = tuple(CompareModule(t, one.get(t, ()), two.get(t, ())) for t in targets)
    report = Report(verb="compare", findings=[*first.findings, *second.findings])
    report.totals = {"modules": len(targets), "common": len(common)}
    report.rows = [
        {"module": u.key, "ranks": [sum(d.rank for d in u.first), sum(d.rank for d in u.second)]} for u in units
    ]

    def settle(facts: Mapping[str, Facts], spooled: Spooled) -> Settled:
        for row in report.rows:
            fact = facts[row["module"]]
            row.update(_measures([n * n for n in fact["norms"]], fact["inner"], fact["distance"]))
        every = [facts[row["module"]] for row in report.rows]
        squares = [sum(f["norms"][n] ** 2 for f in every) for n in (0, 1)]
        distance = sqrt(sum(f["distance"] ** 2 for f in every))
        report.totals |= _measures(squares, sum(f["inner"] for f in every), distance)
        report.totals["equal"] = distance == 0.0
        return Settled(report)

    inputs = tuple(Input(a.origin.path, a.tensors, a.explained, "copy of the base") for a in (first, second))
    return Plan(units, report, settle, inputs=inputs)


def _measures(squares: list[float], inner: float, distance: float) -> dict[str, object]:
    """Return norms, relative distance (to the larger norm) and cosine."""
    norms = [sqrt(s) for s in squares]
    return {
        "norms": norms,
        "distance": distance / max(norms) if max(norms) else 0.0,
        "cosine": max(-1.0, min(1.0, inner / (norms[0] * norms[1]))) if all(norms) else None,
    }
