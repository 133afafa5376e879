"""Updates that are there entry by entry: a difference, a replacement, some rows, some entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from loratool.deltas.base import Delta
from loratool.tensors import TensorRef


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
class Sparse(Delta):
    """Some entries of a matrix, which LyCORIS' extraction keeps beside the factors: scaling * values.

    indices (2, n) of rows and columns, values (n,), size (2,) of the matrix (out, in x kernel); `like` is the shape of
    the factors' update. Source: lycoris/utils, extract_diff (`bias_indices`, though it is the weight's).
    """

    indices: TensorRef
    values: TensorRef
    size: TensorRef
    scaling: float
    like: tuple[int, ...]

    kind = "sparse"

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in, *kernel)."""
        return self.like

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """All three."""
        return self.indices, self.values, self.size
