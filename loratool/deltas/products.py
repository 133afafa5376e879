"""Updates that are products of small matrices, whatever the weight: LoRA, LoHa, LoKr, VeRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from loratool.deltas.base import Delta, alpha_of
from loratool.tensors import Inline, TensorRef


@dataclass(frozen=True)
class LowRank(Delta):
    """A plain LoRA delta: `scaling * up @ down`.

    Linear, Conv1D and embedding: down (rank, in), up (out, rank).
    Convolution: down (rank, in, *kernel), up (out, rank, 1, ...); the update is up.flatten(1) @ down.flatten(1).
    With `mid` there is more between the two: a diagonal, (rank,) or (rank, 1), as AdaLoRA has it (Zhang et al. 2023,
    arXiv 2303.10512); or the core of a Tucker decomposition, (rank, rank, *kernel), between two 1x1 convolutions.
    """

    down: TensorRef
    up: TensorRef
    scaling: float
    mid: TensorRef | None = None

    kind = "lora"
    factorable = True

    @property
    def rank(self) -> int:
        """The inner dimension, from the shape of up."""
        return self.up.shape[1]

    @property
    def alpha(self) -> float:
        """The alpha that makes `alpha / rank` this scaling."""
        return alpha_of(self.scaling, self.rank)

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in, *kernel)."""
        kernel = self.mid.shape[2:] if self.has_core and self.mid else self.down.shape[2:]
        return self.up.shape[0], self.down.shape[1], *kernel

    @property
    def has_core(self) -> bool:
        """Whether `mid` is the core of a Tucker decomposition."""
        return self.mid is not None and len(self.mid.shape) > 2

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Down, up and what is between them."""
        return (self.down, self.up) if self.mid is None else (self.down, self.up, self.mid)

    def take(self, rows: Sequence[range]) -> LowRank:
        """Return fewer rows of up over the same down."""
        return replace(self, up=self.up.take(rows))

    @property
    def positive(self) -> LowRank:
        """The same with a scaling that is not negative, as readers of configs have it: the sign goes into `up`."""
        return replace(self, up=self.up.scaled(-1.0), scaling=-self.scaling) if self.scaling < 0 else self

    @property
    def is_zero(self) -> bool:
        """Whether up was made of zeros."""
        return all(isinstance(p, Inline) and not any(p.data) for p in self.up.pieces)


@dataclass(frozen=True)
class LoHa(Delta):
    """LoHa (Hyeon-Woo et al. 2022, arXiv 2108.06098; LyCORIS): scaling * (w1_a @ w1_b) * (w2_a @ w2_b), entry by entry.

    w_a (out, rank), w_b (rank, in x kernel). With cores t1 and t2 (rank, rank, *kernel), w_a is (rank, out) and
    w_b (rank, in).
    """

    w1_a: TensorRef
    w1_b: TensorRef
    w2_a: TensorRef
    w2_b: TensorRef
    scaling: float
    t1: TensorRef | None = None
    t2: TensorRef | None = None

    kind = "loha"

    @property
    def rank(self) -> int:
        """That of each of the two products; the rank of their product by entries is up to its square."""
        return self.w1_b.shape[0]

    @property
    def alpha(self) -> float:
        """The alpha that makes `alpha / rank` this scaling."""
        return alpha_of(self.scaling, self.rank)

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in x kernel), or (out, in, *kernel) with cores."""
        if self.t1 is None:
            return self.w1_a.shape[0], self.w1_b.shape[1]
        return self.w1_a.shape[1], self.w1_b.shape[1], *self.t1.shape[2:]

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """All there are."""
        return _present(self.w1_a, self.w1_b, self.w2_a, self.w2_b, self.t1, self.t2)

    def take(self, rows: Sequence[range]) -> Delta:
        """Return fewer rows of both w_a; with cores they are no rows."""
        if self.t1 is not None:
            return super().take(rows)
        return replace(self, w1_a=self.w1_a.take(rows), w2_a=self.w2_a.take(rows))


@dataclass(frozen=True)
class LoKr(Delta):
    """LoKr (Yeh et al. 2023, arXiv 2309.14859): scaling * kron(w1, w2).

    Either of the two is one matrix, or a product `a @ b`: w1 (out1, in1), w2 (out2, in2, *kernel) or w2_a (out2, rank)
    and w2_b (rank, in2 x kernel); with the core t2 (rank, rank, *kernel), w2_a is (rank, out2) and w2_b (rank, in2).

    `on_last`: w1 is multiplied onto the last two axes of w2 (out2, in2, kernel), and the result laid out as the weight.
    So PEFT (tuners/lokr/layer.py: make_kron, 0.21.2) does with a Conv1d's whole w2, in training too.
    """

    w1: tuple[TensorRef, ...]
    w2: tuple[TensorRef, ...]
    scaling: float
    t2: TensorRef | None = None
    on_last: bool = False

    kind = "lokr"

    @property
    def rank(self) -> int:
        """That of the factors of w1 or w2; 0 where both are whole."""
        return next((pair[1].shape[0] for pair in (self.w1, self.w2) if len(pair) == 2), 0)

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in, *kernel), or (out, in x kernel) where w2 is a product."""
        (out1, in1), (out2, *rest) = _product_shape(self.w1), _product_shape(self.w2)
        if self.t2 is not None:
            out2, rest = self.w2[0].shape[1], [self.w2[1].shape[1], *self.t2.shape[2:]]
        return out1 * out2, in1 * rest[0], *rest[1:]

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """All there are."""
        return _present(*self.w1, *self.w2, self.t2)

    @property
    def dim(self) -> int:
        """The rank by which LyCORIS divides alpha; 0 where both are whole, whose scaling is 1."""
        return next((pair[1].shape[0] for pair in (self.w2, self.w1) if len(pair) == 2), 0)

    @property
    def alpha(self) -> float:
        """The alpha that makes `alpha / dim` this scaling; 1 where there is no dim."""
        return alpha_of(self.scaling, self.dim) if self.dim else 1.0

    def take(self, rows: Sequence[range]) -> Delta:
        """Return fewer rows of w1 where each of its rows is wanted with all of w2's."""
        height = self.shape[0] // self.w1[0].shape[0]
        if self.on_last or any(r.step != 1 or r.start % height or len(r) % height for r in rows):
            return super().take(rows)
        mine = [range(r.start // height, r.stop // height) for r in rows]
        return replace(self, w1=(self.w1[0].take(mine), *self.w1[1:]))


@dataclass(frozen=True)
class Vera(Delta):
    """VeRA (Kopiczko et al. 2024, arXiv 2310.11454): (lambda_b * B) @ (lambda_d * A), A and B shared by all layers.

    lambda_b (out,), lambda_d (rank,), A (rank, >= in), B (>= out, rank).
    """

    lambda_b: TensorRef
    lambda_d: TensorRef
    A: TensorRef
    B: TensorRef

    kind = "vera"

    @property
    def rank(self) -> int:
        """That of the shared matrices."""
        return self.lambda_d.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), of which A shows no more than the largest."""
        return self.lambda_b.shape[0], 0

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The vectors and what the layers share."""
        return self.lambda_b, self.lambda_d, self.A, self.B


def _present(*refs: TensorRef | None) -> tuple[TensorRef, ...]:
    return tuple(ref for ref in refs if ref is not None)


def _product_shape(factors: Sequence[TensorRef]) -> tuple[int, ...]:
    """The shape of one tensor, or of the product of two matrices."""
    return factors[0].shape if len(factors) == 1 else (factors[0].shape[0], factors[1].shape[1])
