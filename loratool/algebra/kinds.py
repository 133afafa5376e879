"""The arithmetic of each kind of delta: blocks of dW, and exact factors where they exist.

`dense(delta, load, wide)` loads a delta and returns an object whose `block(W, rows, columns)` is dW for the output rows
`rows` and the inputs `columns` (kernels flattened into them) of a weight, of which W is that very block. The formulas
and their sources stand with the kinds in loratool.deltas; `wide` is the dtype of the arithmetic, fp32 or fp64.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from loratool import deltas
from loratool.algebra import rotations
from loratool.algebra.deltas import as_matrices, is_finite
from loratool.algebra.dense import Dense, Rows, numbers
from loratool.errors import InputError
from loratool.plan import Load
from loratool.tensors import TensorRef


class _LowRank(Dense):
    def __init__(self, delta: Any, load: Load, wide: torch.dtype, *, transposed: bool) -> None:
        super().__init__(delta, load, wide, transposed=transposed)
        self.up, self.down = lora_factors(delta, self.tensors)

    def block(self, W: torch.Tensor, rows: Rows, columns: slice) -> torch.Tensor:
        return float(self.delta.scaling) * (self.up[rows] @ self.down[:, columns])


class _Dora(Dense):
    def __init__(self, delta: Any, load: Load, wide: torch.dtype, *, transposed: bool) -> None:
        super().__init__(delta, load, wide, transposed=transposed)
        self.inner = dense(delta.inner, load, wide, transposed=transposed)
        self.magnitude = self.tensors[-1].flatten()  # (out,) or (in,)
        self.squared: torch.Tensor | None = None  # norms (out,) or (in,), where they had to be found beforehand

    def survey(self, blocks: Iterable[tuple[torch.Tensor, Rows, slice]]) -> None:
        self.squared = torch.zeros_like(self.magnitude)
        for W, rows, columns in blocks:
            squares = (W + self.inner.block(W, rows, columns)).square()
            if self.delta.of_inputs:
                self.squared += self._of_inputs(squares)
            else:
                self.squared[rows] += squares.sum(dim=1)

    def block(self, W: torch.Tensor, rows: Rows, columns: slice) -> torch.Tensor:
        moved = W + self.inner.block(W, rows, columns)
        if not self.delta.of_inputs:
            squared = moved.square().sum(dim=1) if self.squared is None else self.squared[rows]
            return moved * _divided(self.magnitude[rows], squared.sqrt())[:, None] - W
        if self.squared is None:  # all outputs of some inputs: a matrix stored (in, out)
            return moved * _divided(self.magnitude[columns], moved.square().sum(dim=0).sqrt()) - W
        factors = _divided(self.magnitude, self.squared.sqrt())
        return moved * factors.repeat_interleave(W.shape[1] // len(factors)) - W

    def _of_inputs(self, squares: torch.Tensor) -> torch.Tensor:
        return squares.sum(dim=0).view(len(self.magnitude), -1).sum(dim=1)


def _divided(magnitude: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """Return magnitude / norm; where the norm is 0 there is nothing to be scaled."""
    return torch.where(norm > 0, magnitude / norm, 0)


class _Glora(Dense):
    def __init__(self, delta: Any, load: Load, wide: torch.dtype, *, transposed: bool) -> None:
        super().__init__(delta, load, wide, transposed=transposed)
        self.a1, self.a2 = (t.flatten(1) for t in self.tensors[:2])  # (in, r), (r, in)
        self.b = _LowRank(delta.b, load, wide, transposed=transposed)

    def block(self, W: torch.Tensor, rows: Rows, columns: slice) -> torch.Tensor:
        inputs = W.reshape(len(W), len(self.a1), -1)  # (rows, in, kernel)
        through = torch.einsum("oik,ir,rj->ojk", inputs, self.a1, self.a2).reshape(W.shape)
        return float(self.delta.b.scaling) * through + self.b.block(W, rows, columns)


class _Sparse(Dense):
    def __init__(self, delta: Any, load: Load, wide: torch.dtype, *, transposed: bool) -> None:
        super().__init__(delta, load, wide, transposed=transposed)
        (self.rows, self.columns), (out, inputs) = self.tensors[0].long(), self.tensors[2].tolist()
        inside = (self.rows < out) & (self.columns < inputs) & (self.rows >= 0) & (self.columns >= 0)
        if (out, inputs) != delta.matrix_shape or not bool(inside.all()):
            told = f"{int(out)} x {int(inputs)} with indices up to {int(self.rows.max())}, {int(self.columns.max())}"
            what = f"the sparse remainder is of a matrix {told}, the factors' is {delta.matrix_shape}"
            raise InputError(what, where=delta.name, hint="16-bit indices overflow above 32,767")

    def block(self, W: torch.Tensor, rows: Rows, columns: slice) -> torch.Tensor:
        wanted = numbers(rows, self.delta.shape[0]).to(W.device)
        place = torch.full((self.delta.shape[0],), -1, device=W.device)
        place[wanted] = torch.arange(len(wanted), device=W.device)
        start = columns.start or 0
        here = (place[self.rows] >= 0) & (self.columns >= start) & (self.columns < start + W.shape[1])
        result = torch.zeros_like(W)
        at = (place[self.rows[here]], self.columns[here] - start)
        return result.index_put_(at, float(self.delta.scaling) * self.tensors[1][here], accumulate=True)


class _Full(Dense):
    """A dense tensor: as large as the weight, so it is read in the rows that are wanted."""

    def __init__(self, delta: Any, load: Load, wide: torch.dtype, *, transposed: bool) -> None:
        self.delta, self.transposed, self.load, self.wide = delta, transposed, load, wide
        self.tensors: list[torch.Tensor] = []

    def value(self, rows: Rows, columns: slice) -> torch.Tensor:
        """Return a block of the tensor as (out, in x kernel)."""
        ref = self.delta.value
        if self.transposed:
            return self._read(ref.rows(columns.start or 0, ref.shape[0] if columns.stop is None else columns.stop)).T[
                rows
            ]
        if isinstance(rows, slice) and rows.stop is not None:
            return self._read(ref.rows(rows.start or 0, rows.stop))[:, columns]
        return self._read(ref)[rows, columns]

    def _read(self, ref: TensorRef) -> torch.Tensor:
        tensor = self.load(ref).to(self.wide)
        if not is_finite(tensor):
            raise InputError("the adapter's tensors hold NaN or infinity", where=ref.name)
        return tensor.reshape(ref.shape[0], -1)

    def block(self, W: torch.Tensor, rows: Rows, columns: slice) -> torch.Tensor:
        return float(self.delta.scaling) * self.value(rows, columns)


class _Replace(_Full):
    def put(self, target: torch.Tensor, picked: Rows, rows: Rows, columns: slice) -> None:
        target[picked] = self.value(rows, columns)

    def block(self, W: torch.Tensor, rows: Rows, columns: slice) -> torch.Tensor:
        return self.value(rows, columns) - W


class _Tokens(Dense):
    """Rows of the stored matrix are the inputs of an embedding, (dim, entries), and the outputs of a head."""

    def block(self, W: torch.Tensor, rows: Rows, columns: slice) -> torch.Tensor:
        moved = W.clone()
        self.put(moved, slice(None), rows, columns)
        return moved - W

    def put(self, target: torch.Tensor, picked: Rows, rows: Rows, columns: slice) -> None:
        values = self.tensors[0]  # (n, dim)
        run = columns if self.transposed else rows
        if not isinstance(run, slice):
            raise InputError("trained tokens of a weight that is fused or split", where=self.delta.name)
        start, stop = run.start or 0, (run.start or 0) + target.shape[1 if self.transposed else 0]
        for n, index in enumerate(self.delta.indices):
            if start <= index < stop and self.transposed:
                target[picked, index - start] = values[n, rows]
            elif start <= index < stop:
                target[index - start] = values[n, columns]


class _LoHa(Dense):
    def __init__(self, delta: Any, load: Load, wide: torch.dtype, *, transposed: bool) -> None:
        super().__init__(delta, load, wide, transposed=transposed)
        w1_a, w1_b, w2_a, w2_b, *cores = self.tensors
        if cores:  # up (out, r), and the core folded into down
            (w1_a, w1_b), (w2_a, w2_b) = _with_core(w1_a, w1_b, cores[0]), _with_core(w2_a, w2_b, cores[1])
        self.pairs = ((w1_a, w1_b), (w2_a, w2_b))

    def block(self, W: torch.Tensor, rows: Rows, columns: slice) -> torch.Tensor:
        (w1_a, w1_b), (w2_a, w2_b) = self.pairs
        return float(self.delta.scaling) * (w1_a[rows] @ w1_b[:, columns]) * (w2_a[rows] @ w2_b[:, columns])


class _LoKr(Dense):
    def __init__(self, delta: Any, load: Load, wide: torch.dtype, *, transposed: bool) -> None:
        super().__init__(delta, load, wide, transposed=transposed)
        self.w1, self.w2 = kronecker_pair(delta, self.tensors)
        self.whole: torch.Tensor | None = None
        if delta.on_last:  # (1, out1, in1) with (out2, in2, kernel)
            self.whole = torch.kron(self.w1[None], self.w2.contiguous()).reshape(delta.shape[0], -1)

    def block(self, W: torch.Tensor, rows: Rows, columns: slice) -> torch.Tensor:
        if self.whole is not None:
            return float(self.delta.scaling) * self.whole[rows, columns]
        (out1, in1), (out2, in2, kernel) = self.w1.shape, self.w2.shape
        every = torch.arange(out1 * out2, device=self.w1.device)[rows]
        one, two = self.w1[every // out2], self.w2[every % out2]  # (n, in1), (n, in2, kernel)
        whole = torch.einsum("na,nbk->nabk", one, two).reshape(len(every), in1 * in2 * kernel)
        return float(self.delta.scaling) * whole[:, columns]


class _Vera(Dense):
    def block(self, W: torch.Tensor, rows: Rows, columns: slice) -> torch.Tensor:
        lambda_b, lambda_d, A, B = self.tensors
        up = lambda_b[rows, None] * B[: len(lambda_b)][rows]
        start = columns.start or 0
        return up @ (lambda_d[:, None] * A[:, start : start + W.shape[1]])


class _Ia3(Dense):
    def block(self, W: torch.Tensor, rows: Rows, columns: slice) -> torch.Tensor:
        factors = self.tensors[0].flatten()
        change = factors if self.delta.less_one else factors - 1
        if not self.delta.of_inputs:
            return W * change[rows, None]
        kernel = 1 if self.transposed else W.shape[1] // len(factors)
        return W * change.repeat_interleave(kernel)[columns]


class _Taken(Dense):
    """Some rows of another delta: row numbers are translated, W is as it comes."""

    def __init__(self, delta: Any, load: Load, wide: torch.dtype, *, transposed: bool) -> None:
        self.delta, self.transposed = delta, transposed
        self.whole = dense(delta.of, load, wide, transposed=transposed)
        self.tensors = self.whole.tensors
        self.rows = torch.tensor([row for run in delta.rows for row in run])

    def survey(self, blocks: Iterable[tuple[torch.Tensor, Rows, slice]]) -> None:
        self.whole.survey((W, self.rows[rows], columns) for W, rows, columns in blocks)

    def block(self, W: torch.Tensor, rows: Rows, columns: slice) -> torch.Tensor:
        return self.whole.block(W, self.rows[rows], columns)


_KINDS: dict[type[deltas.Delta], type[Dense]] = {
    deltas.LowRank: _LowRank,
    deltas.Dora: _Dora,
    deltas.Full: _Full,
    deltas.Replace: _Replace,
    deltas.Tokens: _Tokens,
    deltas.LoHa: _LoHa,
    deltas.LoKr: _LoKr,
    deltas.Vera: _Vera,
    deltas.Oft: rotations.InputOft,
    deltas.Boft: rotations.InputBoft,
    deltas.OutputOft: rotations.OutputOft,
    deltas.Glora: _Glora,
    deltas.Ia3: _Ia3,
    deltas.Sparse: _Sparse,
    deltas.Taken: _Taken,
}


def dense(delta: deltas.Delta, load: Load, wide: torch.dtype, *, transposed: bool = False) -> Dense:
    """Load a delta for arithmetic in `wide`. `transposed`: the stored weight is (in, out)."""
    return _KINDS[type(delta)](delta, load, wide, transposed=transposed)


def lora_factors(delta: deltas.LowRank, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (up (out, r), down (r, in x kernel)) of loaded down, up and mid; the scaling is not in them."""
    down, up, *mid = tensors
    up, down = as_matrices(up, down)
    if not mid:
        return up, down
    if delta.has_core:
        return _with_core(up.T, down, mid[0])
    return up, mid[0].to(down.dtype).reshape(-1, 1) * down


def _with_core(left: torch.Tensor, right: torch.Tensor, core: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return up (out, r) and down (r, in x kernel) of left (r, out), core (r, r, *kernel), right (r, in)."""
    folded = torch.einsum("rsk,si->rik", core.flatten(2).to(right.dtype), right)
    return left.T, folded.flatten(1)


def kronecker_pair(delta: deltas.LoKr, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return w1 (out1, in1) and w2 (out2, in2, kernel) of LoKr's loaded tensors, products multiplied out."""
    first, second = tensors[: len(delta.w1)], tensors[len(delta.w1) : len(delta.w1) + len(delta.w2)]
    w1 = first[0] if len(first) == 1 else first[0] @ first[1]
    if delta.t2 is not None:
        up, down = _with_core(second[0], second[1], tensors[-1])
        return w1, (up @ down).view(len(up), second[1].shape[1], -1)
    w2 = second[0] if len(second) == 1 else second[0] @ second[1]
    return w1, w2.reshape(*w2.shape[:2], -1)
