"""What every kind of delta has, and some rows of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import ClassVar, NamedTuple

from loratool.layouts import Rows, count, within
from loratool.tensors import TensorRef


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
    #: Its dW depends on W.
    of_weight: ClassVar[bool] = False

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

    def mixes(self, *, outputs: bool) -> bool:
        """Whether a row of dW depends on other rows of W (`outputs`), or a column of it on other columns."""
        return False

    def stands_alone(self, rows: Sequence[range]) -> bool:
        """Whether dW of these output rows depends on the same rows of W alone."""
        return not self.mixes(outputs=True)

    def take(self, rows: Sequence[range]) -> Delta:
        """Return the delta of the output rows `rows`."""
        return Taken(self, tuple(rows))

    def cut(self, heights: Sequence[int]) -> list[Delta]:
        """Return the deltas of parts of so many output rows each."""
        ends = list(accumulate(heights))
        return [self.take((range(end - height, end),)) for height, end in zip(heights, ends, strict=True)]


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
    def of_weight(self) -> bool:  # type: ignore[override]
        """That of the whole."""
        return self.of.of_weight

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

    def mixes(self, *, outputs: bool) -> bool:
        """As the whole does."""
        return self.of.mixes(outputs=outputs)

    def stands_alone(self, rows: Sequence[range]) -> bool:
        """As rows of the whole."""
        return self.of.stands_alone(within(self.rows, rows))

    def take(self, rows: Sequence[range]) -> Taken:
        """Return some of these rows."""
        return Taken(self.of, within(self.rows, rows))


def alpha_of(scaling: float, rank: int) -> float:
    """Return the alpha that makes `alpha / rank` this scaling, without the noise of a division undone."""
    alpha = scaling * rank
    tidy = float(f"{alpha:.12g}")
    return tidy if rank and tidy / rank == scaling else alpha


class Term(NamedTuple):
    """One delta's part in a weight: times the adapter's weight, and the output rows it is for (None: all)."""

    delta: Delta
    weight: float
    into: Rows | None = None
