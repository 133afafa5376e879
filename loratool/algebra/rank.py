"""Rank rules: from a spectrum to a rank. One function each.

All take singular values `sigma` in descending order. Where these are only the leading ones, `beyond` is the squared
energy of the rest; None says that there are no others. A rule returns the smallest rank that satisfies it, and at
least 1, as formats have no rank 0; or len(sigma) + 1, where more singular values must be known to say. So the least
answer of several rules is the rank that all of them bound from above, whatever is known: `smallest`.

`sv_ratio`, `sv_fro` and `sv_cumulative` are the rules of kohya's sd-scripts (networks/resize_lora.py, commit 48d368f):
they keep one rank more than they say, 2 at least, and look at up @ down without alpha / rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

Rule = Callable[[torch.Tensor, float | None], int]


def smallest(rules: Iterable[Rule], sigma: torch.Tensor, beyond: float | None = None) -> int:
    """Return the rank that every rule bounds from above; all singular values where there are no rules."""
    return min([fixed(sigma, len(sigma) + 1, beyond), *(rule(sigma, beyond) for rule in rules)])


# ---- by number, by what is kept


def fixed(sigma: torch.Tensor, rank: int, beyond: float | None = None) -> int:
    """`rank`, or as many singular values as there are."""
    return max(1, min(rank, len(sigma) + (beyond is not None)))


def energy(sigma: torch.Tensor, share: float, beyond: float | None = None) -> int:
    """Return the smallest rank that keeps at least `share` (0 < share <= 1) of the sum of squared singular values."""
    kept = torch.cumsum(sigma.double() ** 2, 0)
    # relative slack of a few ulp: a share of 1.0 must not keep noise that the sum itself cannot resolve
    wanted = share * (float(kept[-1]) + (beyond or 0.0)) * (1 - 1e-15)
    return fixed(sigma, _first_at_least(kept, wanted), beyond)


def error(sigma: torch.Tensor, limit: float, beyond: float | None = None) -> int:
    """Return the smallest rank whose error |M - M_k| / |M| (Frobenius) is at most `limit`."""
    lost = _lost(sigma, beyond)
    return fixed(sigma, int((lost > limit**2 * lost[0]).sum()), beyond)


def within(sigma: torch.Tensor, distance: float, beyond: float | None = None) -> int:
    """Return the smallest rank whose error |M - M_k| (Frobenius) is at most `distance`."""
    return fixed(sigma, int((_lost(sigma, beyond) > distance**2).sum()), beyond)


def cumulative(sigma: torch.Tensor, share: float, beyond: float | None = None) -> int:
    """Return the smallest rank that keeps at least `share` of the plain sum of singular values. Needs all of them."""
    if beyond is not None:
        return len(sigma) + 1
    kept = torch.cumsum(sigma.double(), 0)
    return fixed(sigma, _first_at_least(kept, share * float(kept[-1]) * (1 - 1e-15)))


# ---- by the size of singular values


def above(sigma: torch.Tensor, floor: float, beyond: float | None = None) -> int:
    """Keep the singular values above `floor`."""
    return _count(sigma > floor, sigma, beyond)


def ratio(sigma: torch.Tensor, limit: float, beyond: float | None = None) -> int:
    """Keep the singular values that are at least sigma_1 / limit."""
    return _count((sigma * limit >= sigma[0]) & (sigma > 0), sigma, beyond)


def resolved(sigma: torch.Tensor, eps: float, beyond: float | None = None) -> int:
    """Keep what factors of a dtype hold beside sigma_1: singular values above `eps` (of that dtype) times sigma_1."""
    return above(sigma, eps * float(sigma[0]), beyond)


def knee(sigma: torch.Tensor, beyond: float | None = None) -> int:
    """Keep the singular values before the bend of log(sigma): where it is farthest from the line between its ends.

    (Satopaa et al. 2011, Kneedle.) The bend is the first value of a low tail, or the last one of a high head. A curve
    that strays from the line by less than a tenth of its fall has none, and keeps all. Needs all of the spectrum.
    """
    if beyond is not None:
        return len(sigma) + 1
    curve = sigma[sigma > 0].double().log()
    if len(curve) < 3:
        return fixed(sigma, len(curve))
    line = torch.linspace(0, 1, len(curve), dtype=torch.float64) * (curve[-1] - curve[0]) + curve[0]
    strays = curve - line
    bend = int(strays.abs().argmax())
    if float(strays[bend].abs()) <= 0.1 * float(curve[0] - curve[-1]):
        return fixed(sigma, len(curve))
    return fixed(sigma, bend if float(strays[bend]) < 0 else bend + 1)


def auto(sigma: torch.Tensor, eps: float) -> int:
    """Return the rank that an adapter seems to use: what its dtype resolves, up to the knee of that."""
    held = sigma[: resolved(sigma, eps)]
    return knee(held)


# ---- kohya's names


def sv_ratio(sigma: torch.Tensor, target: float, beyond: float | None = None, *, size: int | None = None) -> int:
    """kohya's: one more than the singular values above sigma_1 / target. `size` is min(out, in)."""
    return _kohya(sigma, int((sigma > sigma[0] / target).sum()), beyond, size)


def sv_fro(sigma: torch.Tensor, target: float, beyond: float | None = None, *, size: int | None = None) -> int:
    """kohya's: one more than the smallest rank that keeps the share `target` of the Frobenius norm (not squared)."""
    kept = torch.cumsum(sigma.double() ** 2, 0)
    total = float(kept[-1]) + (beyond or 0.0)
    return _kohya(sigma, _first_at_least(kept, target**2 * total), beyond, size)


def sv_cumulative(sigma: torch.Tensor, target: float, beyond: float | None = None, *, size: int | None = None) -> int:
    """kohya's: one more than the smallest rank that keeps the share `target` of the plain sum. Needs all of sigma."""
    if beyond is not None:
        return len(sigma) + 1
    kept = torch.cumsum(sigma.double(), 0)
    return _kohya(sigma, _first_at_least(kept, target * float(kept[-1])), None, size)


def _kohya(sigma: torch.Tensor, index: int, beyond: float | None, size: int | None) -> int:
    if float(sigma[0]) <= 1e-6:  # sd-scripts' MIN_SV: "a zero matrix"
        return 1
    index = max(1, min(index, (size or len(sigma)) - 1))
    return fixed(sigma, index + 1, beyond)


def _lost(sigma: torch.Tensor, beyond: float | None) -> torch.Tensor:
    """Return the squared energy that rank 0, 1, ..., len(sigma) loses; summed from the small end, for its digits."""
    squares = torch.cat([sigma.double() ** 2, sigma.new_tensor([beyond or 0.0], dtype=torch.float64)])
    return squares.flip(0).cumsum(0).flip(0)


def _first_at_least(sums: torch.Tensor, wanted: float) -> int:
    """Return the number of terms after which a running sum reaches `wanted`; one more than there are if never."""
    return int(torch.searchsorted(sums, torch.tensor(wanted, dtype=sums.dtype, device=sums.device))) + 1


def _count(kept: torch.Tensor, sigma: torch.Tensor, beyond: float | None) -> int:
    """Return how many are kept; if all are, the next might be as well."""
    count = int(kept.sum())
    return fixed(sigma, count + (count == len(sigma)), beyond)
