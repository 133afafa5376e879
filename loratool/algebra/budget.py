"""One size for a whole adapter: ranks of all modules together, so that the total error is the least for the bytes.

A rank of module m costs (out + in) x itemsize bytes and takes sigma^2 off the squared error. Spectra descend, so gains
are concave, and taking ranks by gain per byte is optimal at every size at which the next rank just does not fit (the
classic greedy argument; between such sizes it is the best up to one rank). Every module keeps one.

`weights` make errors of modules comparable: 1 / |W|_F^2 of the base weight measures each update against what it
changes (the `fro_ckpt` score of elias-gaeros' resize_lora), 1 / sigma_1(W)^2 against its spectral norm (`spn_ckpt`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from loratool.errors import InputError


class Curve(NamedTuple):
    """The whole frontier of size and error, from rank 1 everywhere to everything. All of one length, s steps.

    `nbytes` (int64) ascends, `error` (fp64; relative, Frobenius) descends; `module` says whose rank grows at a step,
    -1 at the first.
    """

    nbytes: torch.Tensor
    error: torch.Tensor
    module: torch.Tensor


def allocate(
    spectra: Sequence[torch.Tensor],
    costs: Sequence[int],
    budget: int,
    *,
    overhead: int = 0,
    weights: Sequence[float] | None = None,
) -> list[int]:
    """Return a rank for each module, so that `overhead` and the factors take at most `budget` bytes.

    `spectra` are singular values, descending, cut where no rank may go beyond; `costs` are bytes a rank; `overhead` is
    everything that no rank changes. Ranks of singular value 0 are not bought. InputError if one rank each is too much.
    """
    used = overhead + sum(costs)
    if used > budget:
        raise InputError(
            f"a budget of {budget:,} bytes is less than one rank for each of {len(costs)} modules takes",
            hint=f"the smallest possible is {used:,} bytes",
        )
    ranks = [1] * len(spectra)
    full = [False] * len(spectra)
    for m in _by_gain_per_byte(spectra, costs, weights)[0].tolist():
        if full[m]:
            continue
        if used + costs[m] > budget:  # another module's rank may be cheaper
            full[m] = True
            continue
        ranks[m] += 1
        used += costs[m]
    return ranks


def curve(
    spectra: Sequence[torch.Tensor],
    costs: Sequence[int],
    *,
    overhead: int = 0,
    weights: Sequence[float] | None = None,
    beyond: Sequence[float] | None = None,
) -> Curve:
    """Return every best trade of bytes against error. `beyond` is the squared energy that the spectra leave out."""
    modules, gains = _by_gain_per_byte(spectra, costs, weights)
    scale = weights or [1.0] * len(spectra)
    kept = sum(w * float(s[0]) ** 2 for w, s in zip(scale, spectra, strict=True))  # by rank 1 everywhere
    never = sum(w * b for w, b in zip(scale, beyond, strict=True)) if beyond else 0.0
    left = torch.cat([gains, gains.new_tensor([never])]).flip(0).cumsum(0).flip(0)  # from the small end: exact digits
    total = kept + float(left[0])
    prices = torch.tensor(costs, dtype=torch.int64)[modules]
    nbytes = torch.cat([torch.tensor([0]), prices.cumsum(0)]) + overhead + sum(costs)
    error = (left / total).sqrt() if total else torch.zeros_like(left)
    return Curve(nbytes, error, torch.cat([torch.tensor([-1]), modules]))


def _by_gain_per_byte(
    spectra: Sequence[torch.Tensor], costs: Sequence[int], weights: Sequence[float] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return every rank after the first of each module, best first: (whose it is, what it takes off the error)."""
    scale = weights or [1.0] * len(spectra)
    gains = torch.cat([w * s[1:].double().square().cpu() for s, w in zip(spectra, scale, strict=True)])
    modules = torch.repeat_interleave(torch.tensor([len(s) - 1 for s in spectra]))
    worth = gains / torch.tensor(costs, dtype=torch.float64)[modules]
    order = worth.argsort(descending=True, stable=True)  # stable: equal values of one module stay in their order
    order = order[gains[order] > 0]
    return modules[order], gains[order]
