"""What the arithmetic of every kind of delta is asked for: blocks of dW."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from loratool.algebra.deltas import is_finite
from loratool.errors import InputError
from loratool.plan import Load

Rows = slice | torch.Tensor  # of a block: a stretch, or row numbers


class Dense:
    """A loaded delta. What a block needs beside its own entries of W, `delta.mixes` says.

    A delta that mixes outputs gets blocks with all of them, one that mixes inputs blocks with all inputs; or `survey`
    has seen the whole weight.
    """

    def __init__(self, delta: Any, load: Load, wide: torch.dtype, *, transposed: bool) -> None:
        self.delta, self.transposed = delta, transposed
        self.tensors = [load(ref).to(wide) for ref in delta.refs]
        for ref, tensor in zip(delta.refs, self.tensors, strict=True):
            if not is_finite(tensor):
                raise InputError("the adapter's tensors hold NaN or infinity", where=ref.name)

    def block(self, W: torch.Tensor, rows: Rows, columns: slice) -> torch.Tensor:
        """Return dW (rows, columns) where the weight is W (rows, columns)."""
        raise NotImplementedError

    def survey(self, blocks: Iterable[tuple[torch.Tensor, Rows, slice]]) -> None:
        """See the whole weight before the first block, once, where blocks do not have all that a delta mixes."""

    def put(self, target: torch.Tensor, picked: Rows, rows: Rows, columns: slice) -> None:
        """Put into `target[picked]`, which is such a block, what takes its place, of kinds that replace a weight."""
        raise NotImplementedError


def numbers(rows: Rows, count: int) -> torch.Tensor:
    """Return row numbers of `count` rows."""
    return torch.arange(count)[rows]
