"""What two updates have in common, by factor algebra: distance, inner product, and the subspaces in which they act.

Of two products up1 @ down1 and up2 @ down2, the triangular factors of a QR of [up1, up2] and of [down1; down2]^T are
all that counts: they turn both updates by the same rotations into small cores. Everything is measured on the cores in
fp64, to about 1e-15 of the norms, where a difference of Grams would lose half the digits.

The column space of an update is where its outputs go, the row space is what it reads of its inputs. A direction whose
singular value is below 1e-6 of the largest counts as rounding of the factors, and belongs to neither.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

_ROUNDING = 1e-6  # of the largest singular value
Pair = tuple[torch.Tensor, torch.Tensor]  # up (out, r) and down (r, in)


class Spaces(NamedTuple):
    """An SVD of a core without its rounding: left (p, k) and right (q, k) orthonormal, sigma (k,), fp64."""

    left: torch.Tensor
    sigma: torch.Tensor
    right: torch.Tensor


def likeness(one: Pair, two: Pair) -> dict[str, Any]:
    """Return what two updates of one weight have in common; all norms are Frobenius norms.

    norms       of both
    inner       their inner product
    distance    the norm of their difference, 0 where the factors are equal bit for bit
    scale       the size of the terms that make up the larger: rounding is relative to it
    shared      of each one's energy (squared norm) what lies in the column and the row space of the other
    chance      the share that would lie there if the directions were drawn at random
    columns     principal angles between the column spaces, ascending, in degrees
    rows        the same of the row spaces
    """
    (left1, left2), (right1, right2) = _turned([one[0], two[0]]), _turned([one[1].T, two[1].T])
    cores = left1 @ right1.T, left2 @ right2.T
    same = all(x.shape == y.shape and bool(torch.equal(x, y)) for x, y in zip(one, two, strict=True))
    spaces = _spaces(left1, right1), _spaces(left2, right2)
    sizes = one[0].shape[0] * one[1].shape[1]
    dimensions = [len(s.sigma) ** 2 / sizes for s in spaces]
    return {
        "norms": [float(core.norm()) for core in cores],
        "inner": float((cores[0] * cores[1]).sum()),
        "distance": 0.0 if same else float((cores[0] - cores[1]).norm()),
        "scale": max(_scale(left1, right1), _scale(left2, right2)),
        "shared": _shared(*spaces),
        "chance": dimensions[::-1],
        "columns": principal_angles(spaces[0].left, spaces[1].left),
        "rows": principal_angles(spaces[0].right, spaces[1].right),
    }


def principal_angles(one: torch.Tensor, two: torch.Tensor) -> list[float]:
    """Return the angles, ascending and in degrees, between the spans of orthonormal (n, k1) and (n, k2).

    Small ones come from their sines, large ones from their cosines (Bjorck and Golub 1973), each to about 1e-15.
    """
    if one.shape[1] < two.shape[1]:
        one, two = two, one
    if not two.shape[1]:
        return []
    product = one.T @ two  # (k1, k2)
    cosines = torch.linalg.svdvals(product).clamp(max=1.0)  # descending
    sines = torch.linalg.svdvals(two - one @ product).flip(0).clamp(max=1.0)[: len(cosines)]  # ascending
    angles = torch.where(cosines.square() >= 0.5, sines.arcsin(), cosines.arccos())
    degrees: list[float] = angles.rad2deg().sort().values.tolist()
    return degrees


class Sums:
    """The sums over blocks of two dense updates from which their norms, inner product and distance follow, in fp64."""

    def __init__(self) -> None:
        self.squares = [0.0, 0.0]
        self.inner = self.squared_distance = 0.0

    def add(self, one: torch.Tensor | None, two: torch.Tensor | None) -> None:
        """Add blocks of equal shape; None is a block of zeros."""
        blocks = [None if block is None else block.double().flatten() for block in (one, two)]
        for n, block in enumerate(blocks):
            self.squares[n] += 0.0 if block is None else float(block @ block)
        first, second = blocks
        if first is None or second is None:
            self.squared_distance += sum(0.0 if block is None else float(block @ block) for block in blocks)
            return
        self.inner += float(first @ second)
        difference = first - second
        self.squared_distance += float(difference @ difference)

    @property
    def facts(self) -> dict[str, Any]:
        """What `likeness` has, less the subspaces."""
        norms = [square**0.5 for square in self.squares]
        return {"norms": norms, "inner": self.inner, "distance": self.squared_distance**0.5, "scale": max(norms)}


def _turned(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return matrices (n, r_i) as (p, r_i) with p at most the sum of the r_i: in one orthonormal basis of them all."""
    together = torch.linalg.qr(torch.cat([m.double() for m in matrices], dim=1), mode="r")[1].cpu()
    return list(together.split([m.shape[1] for m in matrices], dim=1))


def _spaces(left: torch.Tensor, right: torch.Tensor) -> Spaces:
    """Return the SVD of left @ right^T, (p, r) and (q, r)."""
    (Ql, Rl), (Qr, Rr) = torch.linalg.qr(left), torch.linalg.qr(right)
    U, sigma, Vh = torch.linalg.svd(Rl @ Rr.T, full_matrices=False)
    k = int((sigma > _ROUNDING * sigma[0]).sum()) if len(sigma) else 0
    return Spaces(Ql @ U[:, :k], sigma[:k], Qr @ Vh[:k].T)


def _shared(one: Spaces, two: Spaces) -> list[float]:
    """Return |P one Q|^2 for the projections P, Q onto the column and the row space of two, and the other way round."""
    across, along = one.left.T @ two.left, one.right.T @ two.right  # (k1, k2) each
    first = (across.T * one.sigma) @ along
    second = (across * two.sigma) @ along.T
    return [float(first.square().sum()), float(second.square().sum())]


def _scale(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left.norm(dim=0) * right.norm(dim=0)).sum())
