"""Spherical interpolation of two deltas (Shoemake 1985), by inner products of their factors."""

from __future__ import annotations

from collections.abc import Sequence
from math import acos, sin, sqrt
from typing import TYPE_CHECKING, Annotated

from loratool.combining import Bounds, Pair, method
from loratool.errors import UsageError

if TYPE_CHECKING:
    import torch

_PARALLEL = 1e-6  # radians: below this the arc is its chord


@method("factors", only=2, ordered=True)
def slerp(
    pairs: Sequence[Pair],
    *,
    t: Annotated[float | None, "0 is the first, 1 the second; default: by the weights", Bounds(0, 1)] = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two deltas along the arc between them, which keeps their length: weights 0.3 and 0.7 go 0.7 of the way."""
    from loratool.algebra import lowrank

    one, two = pairs
    told = f"weights {one.weight:g} and {two.weight:g}"
    if t is None:
        if min(one.weight, two.weight) < 0 or one.weight + two.weight == 0:
            raise UsageError(f"slerp between {told}", hint="weights above 0, or -O t")
        t = two.weight / (one.weight + two.weight)
    elif one.weight != two.weight:
        raise UsageError(f"slerp at t={t:g} and between {told}", hint="give t or weights, not both")
    norms = [sqrt(lowrank.squared_norm(p.up, p.down)) * abs(p.scaling) for p in pairs]
    shares = 1 - t, t  # where one is zero there is no arc
    if all(norms):
        product = lowrank.inner(one.up, one.down, two.up, two.down) * one.scaling * two.scaling
        angle = acos(max(-1.0, min(1.0, product / (norms[0] * norms[1]))))
        if sin(angle) > _PARALLEL:
            shares = sin((1 - t) * angle) / sin(angle), sin(t * angle) / sin(angle)
    return lowrank.add(
        [(p.up.double(), p.down.double(), share * p.scaling) for p, share in zip(pairs, shares, strict=True)]
    )
