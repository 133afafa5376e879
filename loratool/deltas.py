"""Deltas: the updates that adapters make to weights, one kind a class, as references; the arithmetic is in algebra.

Every kind is a map from a weight W to dW(W), a matrix (out, in x kernel), of the *original* W. What several adapters
do to one weight is the sum of their dW, each times the adapter's weight, so their order never matters.

`take(rows)` is the delta of some output rows, for weights that are fused on one side and split on the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar, NamedTuple

from loratool.errors import MismatchError
from loratool.layouts import Rows, count, within
from loratool.tensors import Inline, TensorRef


@dataclass(frozen=True)
class Delta:
    """What every kind has.

    `shape` is that of the weight it updates, (out, in, *kernel), or (out, in x kernel) where the tensors do not show
    the kernel. A 0 in it is a size that they do not show either.
    """

    kind: ClassVar[str] = ""
    #: It has the orientation of the stored weight, whichever that is, rather than (out, in).
    as_stored: ClassVar[bool] = False
    #: Its dW does not depend on W, and is the product of two factors.
    factorable: ClassVar[bool] = False

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Its tensors."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        """See above."""
        raise NotImplementedError

    @property
    def rank(self) -> int:
        """The inner dimension of its factors; 0 where it has none."""
        return 0

    @property
    def name(self) -> str:
        """The name of one of its tensors, for messages."""
        return self.refs[0].name

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in x kernel) of the update as a matrix."""
        return self.shape[0], prod(self.shape[1:])

    @property
    def is_zero(self) -> bool:
        """Whether this is the delta of a weight that did not change: a factor that was made of zeros."""
        return False

    def weight_shape(self, *, transposed: bool) -> tuple[int, ...]:
        """Return the shape of the stored weight that this delta fits, kernels included."""
        return self.shape[::-1] if transposed and not self.as_stored else self.shape

    def take(self, rows: Sequence[range]) -> Delta:
        """Return the delta of the output rows `rows`."""
        return Taken(self, tuple(rows))

    def cut(self, parts: int) -> list[Delta]:
        """Return the deltas of equal shares of the output rows."""
        share, rest = divmod(self.shape[0], parts)
        if rest:
            raise MismatchError(f"{self.shape[0]} rows do not divide into {parts} parts", where=self.name)
        return [self.take((range(n * share, (n + 1) * share),)) for n in range(parts)]


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
        """The alpha that makes `alpha / rank` this scaling, without the noise of a division undone."""
        alpha = self.scaling * self.rank
        tidy = float(f"{alpha:.12g}")
        return tidy if self.rank and tidy / self.rank == self.scaling else alpha

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
    def is_zero(self) -> bool:
        """Whether up was made of zeros."""
        return all(isinstance(p, Inline) and not any(p.data) for p in self.up.pieces)


@dataclass(frozen=True)
class Dora(Delta):
    """DoRA (Liu et al. 2024, arXiv 2402.09353): magnitude * (W + inner) / |W + inner| - W.

    The norm is that of each output row over all inputs, in fp32 of the original W. magnitude (out,).
    """

    inner: LowRank
    magnitude: TensorRef

    kind = "dora"

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the low-rank part."""
        return self.inner.shape

    @property
    def rank(self) -> int:
        """That of the low-rank part."""
        return self.inner.rank

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The low-rank part's, and the magnitude."""
        return *self.inner.refs, self.magnitude

    def take(self, rows: Sequence[range]) -> Dora:
        """Return the same of some output rows: their norms do not depend on the others."""
        return Dora(self.inner.take(rows), self.magnitude.take(rows))


@dataclass(frozen=True)
class Full(Delta):
    """A dense update, `scaling * value`, in the orientation of the stored weight; of a bias too, (out,)."""

    value: TensorRef
    scaling: float = 1.0

    kind = "full"
    as_stored = True

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is stored."""
        return self.value.shape

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The one tensor."""
        return (self.value,)

    def take(self, rows: Sequence[range]) -> Full:
        """Return some rows of the tensor."""
        return replace(self, value=self.value.take(rows))


@dataclass(frozen=True)
class Replace(Full):
    """A weight or bias that was trained as a whole (PEFT's modules_to_save and `bias`): value - W."""

    kind = "replace"


@dataclass(frozen=True)
class Tokens(Delta):
    """Trained rows of an embedding (PEFT's trainable_token_indices): they take the place of rows `indices`.

    values (n, dim), n indices into the stored (entries, dim).
    """

    values: TensorRef
    indices: tuple[int, ...]

    kind = "tokens"
    as_stored = True

    @property
    def shape(self) -> tuple[int, ...]:
        """(entries, dim) at least: as many entries as the largest index needs."""
        return max(self.indices) + 1, self.values.shape[1]

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The trained rows."""
        return (self.values,)


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
    def shape(self) -> tuple[int, ...]:
        """(out, in x kernel), or (out, in, *kernel) with cores."""
        if self.t1 is None:
            return self.w1_a.shape[0], self.w1_b.shape[1]
        return self.w1_a.shape[1], self.w1_b.shape[1], *self.t1.shape[2:]

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """All there are."""
        return _present(self.w1_a, self.w1_b, self.w2_a, self.w2_b, self.t1, self.t2)


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


@dataclass(frozen=True)
class Oft(Delta):
    """OFT (Qiu et al. 2023, arXiv 2306.07280): W R^T - W, with R orthogonal and block diagonal over the inputs.

    `blocks` (n, size (size - 1) / 2) holds the upper triangles of skew-symmetric matrices Q; a block of R is their
    Cayley transform, by `terms` terms of its Neumann series or, with 0, exactly: (I - Q) (I + Q)^-1. A `shared` block
    is repeated over all inputs.
    """

    blocks: TensorRef
    size: int
    terms: int
    shared: bool = False

    kind = "oft"

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in x kernel), of which the inputs show where no block is shared."""
        return 0, 0 if self.shared else self.blocks.shape[0] * self.size

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The one tensor."""
        return (self.blocks,)


@dataclass(frozen=True)
class Boft(Delta):
    """BOFT (Liu et al. 2024, arXiv 2311.06243): scale * (W R^T) - W, R a product of butterfly factors.

    R (factors, blocks, size, size) before the Cayley transform of its skew part; scale (out, 1), of a convolution
    (1, out).
    """

    R: TensorRef
    scale: TensorRef

    kind = "boft"

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in x kernel)."""
        return prod(self.scale.shape), self.R.shape[1] * self.R.shape[2]

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Both."""
        return self.R, self.scale


@dataclass(frozen=True)
class Ia3(Delta):
    """(IA)^3 (Liu et al. 2022, arXiv 2205.05638): W times a factor for each output or, `of_inputs`, for each input."""

    factors: TensorRef
    of_inputs: bool

    kind = "ia3"

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), one of which the factors do not show."""
        return (0, prod(self.factors.shape)) if self.of_inputs else (prod(self.factors.shape), 0)

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The factors."""
        return (self.factors,)


@dataclass(frozen=True)
class Taken(Delta):
    """Some output rows of another delta."""

    of: Delta
    rows: Rows

    @property
    def kind(self) -> str:  # type: ignore[override]
        """That of the whole."""
        return self.of.kind

    @property
    def rank(self) -> int:
        """That of the whole."""
        return self.of.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """As many rows as are taken."""
        return count(self.rows), *self.of.shape[1:]

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Those of the whole."""
        return self.of.refs

    def take(self, rows: Sequence[range]) -> Taken:
        """Return some of these rows."""
        return Taken(self.of, within(self.rows, rows))


class Term(NamedTuple):
    """One delta's part in a weight: times the adapter's weight, and the output rows it is for (None: all)."""

    delta: Delta
    weight: float
    into: Rows | None = None


def _present(*refs: TensorRef | None) -> tuple[TensorRef, ...]:
    return tuple(ref for ref in refs if ref is not None)


def _product_shape(factors: Sequence[TensorRef]) -> tuple[int, ...]:
    """The shape of one tensor, or of the product of two matrices."""
    return factors[0].shape if len(factors) == 1 else (factors[0].shape[0], factors[1].shape[1])
