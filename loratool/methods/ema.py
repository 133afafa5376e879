"""Post-hoc exponential moving average over the checkpoints of one run, of power-function profile.

Karras et al. 2024, arXiv 2312.02696, section 3: the average at the end of a run, at time T, weighs what the parameters
were at time t by t^gamma. A checkpoint at t_k stands for the time since the one before it, so that its weight is the
integral of t^gamma from t_(k-1) to t_k. The width of the profile relative to the length of the run is
sigma_rel = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)), which goes down as gamma goes up (their equation 5 ff.).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Annotated

from loratool.combining import Bounds, Share, method
from loratool.errors import UsageError

_WIDEST = sqrt(1 / 12)  # of gamma = 0: all of the run, evenly


@method("weights", ordered=True)
def ema(
    shares: Sequence[Share],
    *,
    sigma_rel: Annotated[float, "width of the profile, as a share of the run", Bounds(0.01, _WIDEST)] = 0.1,
    gamma: Annotated[float | None, "its exponent, instead of the width", Bounds(0, 10_000)] = None,
) -> list[float]:
    """Post-hoc EMA over the checkpoints of one run: of the deltas, by their steps (checkpoint-500), latest the most."""
    steps = [share.step for share in shares]
    if len(set(steps)) != len(steps) or min(steps) < 0:
        raise UsageError(f"the steps {steps} are not those of one run", hint="name checkpoints in the order of the run")
    exponent = (exponent_of(sigma_rel) if gamma is None else gamma) + 1
    last = max(steps) or 1
    order = sorted(range(len(steps)), key=steps.__getitem__)
    before, weights = 0.0, [0.0] * len(steps)
    for n in order:
        now = (steps[n] / last) ** exponent
        weights[n], before = now - before, now
    return [share.weight * weight for share, weight in zip(shares, weights, strict=True)]


def exponent_of(sigma_rel: float) -> float:
    """Return the gamma of a relative width, by bisection: the width falls as gamma grows."""
    low, high = 0.0, 1e5
    for _ in range(100):
        gamma = (low + high) / 2
        if sqrt(gamma + 1) / ((gamma + 2) * sqrt(gamma + 3)) > sigma_rel:
            low = gamma
        else:
            high = gamma
    return low
