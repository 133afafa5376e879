"""Updates that depend on the weight they change: DoRA, rotations of its inputs or outputs, scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from loratool.deltas.base import Delta, Taken, alpha_of
from loratool.deltas.products import LoHa, LoKr, LowRank
from loratool.tensors import TensorRef


@dataclass(frozen=True)
class Dora(Delta):
    """DoRA (Liu et al. 2024, arXiv 2402.09353): magnitude * (W + inner) / |W + inner| - W.

    The norm is that of each output row over all inputs; magnitude (out,). Or, `of_inputs`, that of each input over all
    outputs and the kernel; magnitude (in,): LyCORIS with wd_on_out=False, its default until 3.1 (lycoris/modules/
    locon.py: apply_weight_decompose). LyCORIS has it around LoHa and LoKr too, whose factors may show fewer dimensions
    of the weight than its magnitude: `dims`.
    """

    inner: LowRank | LoHa | LoKr
    magnitude: TensorRef
    of_inputs: bool = False
    dims: int = 0

    kind = "dora"
    of_weight = True

    @property
    def shape(self) -> tuple[int, ...]:
        """That of what is within."""
        return self.inner.shape

    @property
    def rank(self) -> int:
        """That of what is within."""
        return self.inner.rank

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Those of what is within, and the magnitude."""
        return *self.inner.refs, self.magnitude

    def mixes(self, *, outputs: bool) -> bool:
        """The norms do."""
        return outputs == self.of_inputs

    def take(self, rows: Sequence[range]) -> Delta:
        """Return the same of some output rows: norms of rows do not depend on the others."""
        inner = self.inner.take(rows)
        if self.of_inputs or not isinstance(inner, LowRank):
            return Taken(self, tuple(rows))
        return replace(self, inner=inner, magnitude=self.magnitude.take(rows))


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
    of_weight = True

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in x kernel), of which the inputs show where no block is shared."""
        return 0, 0 if self.shared else self.blocks.shape[0] * self.size

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The one tensor."""
        return (self.blocks,)

    def mixes(self, *, outputs: bool) -> bool:
        """Inputs."""
        return not outputs


@dataclass(frozen=True)
class Boft(Delta):
    """BOFT (Liu et al. 2024, arXiv 2311.06243): scale * (W R^T) - W, R a product of butterfly factors.

    R (factors, blocks, size, size) before the Cayley transform of its skew part; scale (out, 1), of a convolution
    (1, out).
    """

    R: TensorRef
    scale: TensorRef

    kind = "boft"
    of_weight = True

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in x kernel)."""
        return prod(self.scale.shape), self.R.shape[1] * self.R.shape[2]

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Both."""
        return self.R, self.scale

    def mixes(self, *, outputs: bool) -> bool:
        """Inputs."""
        return not outputs


@dataclass(frozen=True)
class OutputOft(Delta):
    """OFT as LyCORIS and sd-scripts have it: rescale * (R W) - W, with R orthogonal over the *outputs*.

    `blocks` (n, size, size) of a block diagonal R; or, BOFT, (factors, n, size, size) of a product of butterfly
    factors. Q = B - B^T is scaled down to a norm of `alpha * out` over all blocks where it is larger (None: never), and
    a block of R is its Cayley transform: (I + Q)^-1 (I - Q), of BOFT (I + Q) (I - Q)^-1. rescale (out, 1, ...).
    Source: lycoris/modules/diag_oft.py and boft.py; sd-scripts, networks/oft.py.
    """

    blocks: TensorRef
    alpha: float | None = None
    rescale: TensorRef | None = None

    of_weight = True

    @property
    def kind(self) -> str:  # type: ignore[override]
        """By its blocks."""
        return "boft" if self.is_butterfly else "oft"

    @property
    def is_butterfly(self) -> bool:
        """Whether R is a product of factors."""
        return len(self.blocks.shape) == 4

    @property
    def size(self) -> int:
        """Outputs of a block."""
        return self.blocks.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in x kernel), of which the inputs do not show."""
        return self.blocks.shape[-3] * self.size, 0

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The blocks, and the scale where there is one."""
        return (self.blocks,) if self.rescale is None else (self.blocks, self.rescale)

    def mixes(self, *, outputs: bool) -> bool:
        """Outputs."""
        return outputs

    def stands_alone(self, rows: Sequence[range]) -> bool:
        """Whole blocks do."""
        if self.is_butterfly:
            return tuple(rows) == (range(self.shape[0]),)
        return all(r.step == 1 and r.start % self.size == 0 and len(r) % self.size == 0 for r in rows)


@dataclass(frozen=True)
class Glora(Delta):
    """GLoRA (Chavan et al. 2023, arXiv 2306.07967) as LyCORIS has it: scaling * W a1 a2 + b.

    a1 (in, rank), a2 (rank, in), both with a 1x1 kernel of a convolution, over whose inputs they go at every place of
    the kernel. Source: lycoris/modules/glora.py.
    """

    a1: TensorRef
    a2: TensorRef
    b: LowRank

    kind = "glora"
    of_weight = True

    @property
    def rank(self) -> int:
        """That of either half."""
        return self.b.rank

    @property
    def alpha(self) -> float:
        """The alpha that makes `alpha / rank` the scaling."""
        return alpha_of(self.b.scaling, self.rank)

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in, *kernel)."""
        return self.b.shape

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Both halves."""
        return self.a1, self.a2, *self.b.refs

    def mixes(self, *, outputs: bool) -> bool:
        """Inputs."""
        return not outputs

    def take(self, rows: Sequence[range]) -> Glora:
        """Return the same of some output rows."""
        return Glora(self.a1, self.a2, self.b.take(rows))


@dataclass(frozen=True)
class Ia3(Delta):
    """(IA)^3 (Liu et al. 2022, arXiv 2205.05638): W times a factor for each output or, `of_inputs`, for each input.

    `less_one`: the factors are kept less one, and those of outputs are not for the bias too. So LyCORIS has them
    (lycoris/modules/ia3.py).
    """

    factors: TensorRef
    of_inputs: bool
    less_one: bool = False

    kind = "ia3"
    of_weight = True

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), one of which the factors do not show."""
        return (0, prod(self.factors.shape)) if self.of_inputs else (prod(self.factors.shape), 0)

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """The factors."""
        return (self.factors,)
