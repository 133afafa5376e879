"""The arithmetic of rotations: OFT and BOFT, over inputs as PEFT has them and over outputs as LyCORIS has them."""

from __future__ import annotations

from typing import Any

import torch

from loratool.algebra.dense import Dense, Rows, numbers
from loratool.errors import InputError
from loratool.plan import Load


class InputOft(Dense):
    """PEFT's OFT."""

    def __init__(self, delta: Any, load: Load, wide: torch.dtype, *, transposed: bool) -> None:
        super().__init__(delta, load, wide, transposed=transposed)
        size, vectors = delta.size, self.tensors[0]
        row, column = torch.triu_indices(size, size, 1, device=vectors.device)
        Q = vectors.new_zeros(len(vectors), size, size)
        Q[:, row, column] = vectors
        self.R = cayley(Q - Q.transpose(1, 2), delta.terms)  # (n, size, size)

    def block(self, W: torch.Tensor, rows: Rows, columns: slice) -> torch.Tensor:
        """Return W R^T - W."""
        pieces = W.reshape(len(W), -1, self.delta.size)  # (rows, n, size)
        R = self.R.expand(pieces.shape[1], -1, -1)
        return torch.einsum("onk,njk->onj", pieces, R).reshape(W.shape) - W


class InputBoft(Dense):
    """PEFT's BOFT."""

    def __init__(self, delta: Any, load: Load, wide: torch.dtype, *, transposed: bool) -> None:
        super().__init__(delta, load, wide, transposed=transposed)
        raw, self.scale = self.tensors[0], self.tensors[1].flatten()  # (out,)
        factors, blocks, size, _ = raw.shape
        skew = 0.5 * (raw - raw.transpose(2, 3))
        self.R = cayley(skew.flatten(0, 1), 0).view(factors, blocks, size, size)
        self.orders = [_butterfly(blocks * size, blocks >> n, size // 2, factors) for n in range(factors)]

    def block(self, W: torch.Tensor, rows: Rows, columns: slice) -> torch.Tensor:
        """Return scale * (W R^T) - W."""
        rotated = W
        for R, order in zip(self.R, self.orders, strict=True):  # W P B^T P^T for each factor P B P^T of the product
            mixed = rotated[:, order.argsort()].reshape(len(W), len(R), -1)
            rotated = torch.einsum("onk,njk->onj", mixed, R).reshape(W.shape)[:, order]
        return rotated * self.scale[rows, None] - W


class OutputOft(Dense):
    """OFT and BOFT of LyCORIS, OFT of sd-scripts."""

    def __init__(self, delta: Any, load: Load, wide: torch.dtype, *, transposed: bool) -> None:
        super().__init__(delta, load, wide, transposed=transposed)
        blocks, *rescale = self.tensors
        Q = blocks - blocks.transpose(-1, -2)
        if delta.alpha is not None:
            Q *= (delta.alpha * delta.shape[0] / (Q.norm() + 1e-8)).clamp(max=1)  # the trainers' 1e-8
        self.R = cayley(-Q if delta.is_butterfly else Q, 0)
        self.rescale = rescale[0].flatten() if rescale else None  # (out,)

    def block(self, W: torch.Tensor, rows: Rows, columns: slice) -> torch.Tensor:
        """Return rescale * (R W) - W."""
        wanted = numbers(rows, self.delta.shape[0])
        rotated = self._by_butterflies(W) if self.delta.is_butterfly else self._by_blocks(W, wanted)
        if self.rescale is not None:
            rotated = rotated * self.rescale[wanted, None]
        return rotated - W

    def _by_blocks(self, W: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        size = self.delta.size
        first = wanted[::size]
        if len(W) % size or not torch.equal(wanted, (first[:, None] + torch.arange(size)).flatten()):
            raise InputError(f"rotated outputs do not come in whole blocks of {size}", where=self.delta.name)
        R = self.R[first // size]  # (blocks, size, size)
        return torch.bmm(R, W.reshape(len(R), size, -1)).reshape(W.shape)

    def _by_butterflies(self, W: torch.Tensor) -> torch.Tensor:
        """Each factor takes outputs that are 2^n half blocks apart together, and puts them back."""
        size, rotated = self.delta.size, W
        if len(W) != self.delta.shape[0]:
            raise InputError("a product of rotations needs all outputs", where=self.delta.name)
        for n, R in enumerate(self.R):
            order = torch.arange(len(W)).view(-1, 2, 2**n * size // 2).transpose(1, 2).flatten()
            mixed = torch.bmm(R, rotated[order].reshape(len(R), size, -1)).reshape(W.shape)
            rotated = mixed[order.argsort()]
        return rotated


def cayley(Q: torch.Tensor, terms: int) -> torch.Tensor:
    """Return (I - Q) (I + Q)^-1 of skew-symmetric Q (..., size, size).

    With `terms` > 0 it is what PEFT trains with, a cut Neumann series for -Q: I + 2 Q + 2 Q^2 + ... + Q^last, where
    last is terms - 1, or 3 with 3 terms (peft/tuners/oft/layer.py, 0.21.2).
    """
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device).expand_as(Q)
    if not terms:
        solved: torch.Tensor = torch.linalg.solve(eye + Q, eye - Q, left=False)
        return solved
    last = terms - 1 if terms < 3 else max(terms - 1, 3)
    total, power = eye.clone(), eye
    for n in range(1, last + 1):
        power = power @ Q
        total += power if n == last > 1 else 2 * power
    return total


def _butterfly(n: int, blocks: int, half: int, factors: int) -> torch.Tensor:
    """Return the order in which a butterfly factor takes n inputs.

    Within each of `blocks` blocks, even stretches of `half` inputs come before odd ones (peft/tuners/boft/layer.py).
    """
    inputs = torch.arange(n)
    if factors == 1:
        return inputs
    stretches = inputs.view(blocks, -1, half)
    return torch.cat([stretches[:, 0::2], stretches[:, 1::2]], dim=1).flatten()
