"""What is compared of two adapters at one module, and the units that measure it.

An update that is known without the weight it changes is compared as a matrix: by its factors where they are small
beside it, else block by block. Of DoRA that is the low-rank part; its magnitudes, weights that were trained whole and
trained tokens are values that take the place of others, and are compared as such. OFT, BOFT and (IA)^3 multiply the
weight: of them the trained parameters are compared, less those that would change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from loratool import dtypes
from loratool.deltas import (
    Boft,
    Delta,
    Dora,
    Full,
    Glora,
    Ia3,
    LoHa,
    LoKr,
    LowRank,
    Oft,
    OutputOft,
    Replace,
    Taken,
    Tokens,
    Vera,
)
from loratool.errors import MismatchError, UnsupportedError
from loratool.layouts import runs
from loratool.operations.recompress import factors_of, finite, inner_rank
from loratool.plan import Emit, Facts, Load, Out, Unit
from loratool.tensors import TensorRef

if TYPE_CHECKING:
    import torch

_BLOCK = 1 << 18  # elements of a block in fp64
_ALWAYS = 1024  # ranks together up to which factors are used; beyond it up to a quarter of the weight's smaller side


class Value(NamedTuple):
    """A tensor that is compared as it is. Two of one kind can be where `told`, what gives it its meaning, is equal.

    `neutral` is what its elements are where they change nothing; None of values that take the place of others.
    """

    kind: str
    ref: TensorRef
    told: tuple[object, ...] = ()
    neutral: float | None = None


class Side(NamedTuple):
    """What one adapter does to a module: a sum of matrices, and values."""

    update: tuple[Delta, ...] = ()
    values: tuple[Value, ...] = ()
    kinds: tuple[str, ...] = ()
    rank: int = 0

    @classmethod
    def of(cls, deltas: Sequence[Delta]) -> Side:
        """Sort deltas into matrices and values."""
        kinds = tuple(dict.fromkeys(d.kind for d in deltas))
        update = tuple(matrix for d in deltas if (matrix := _matrix(d)))
        return cls(update, tuple(v for d in deltas for v in _values(d)), kinds, sum(d.rank for d in deltas))


def _matrix(delta: Delta) -> Delta | None:
    """Return what of a delta is a matrix whatever the weight is."""
    match delta:
        case Taken():
            whole = _matrix(delta.of)
            return delta if whole is delta.of else whole and whole.take(delta.rows)
        case Dora():
            return delta.inner
        case Glora():
            return delta.b
        case Replace() | Tokens():
            return None
    return None if delta.of_weight else delta


def _values(delta: Delta) -> tuple[Value, ...]:
    """Return the rest of it."""
    match delta:
        case Dora():
            return (Value("magnitude", delta.magnitude, (delta.of_inputs,)),)
        case Replace():
            return (Value("replace", delta.value),)
        case Tokens():
            order = sorted(range(len(delta.indices)), key=delta.indices.__getitem__)
            return (Value("tokens", delta.values.take(runs(order)), tuple(sorted(delta.indices))),)
        case Oft():
            return (Value("oft", delta.blocks, (delta.size, delta.terms, delta.shared), 0.0),)
        case Boft():
            return Value("boft", delta.R, (), 0.0), Value("boft scale", delta.scale, (), 1.0)
        case OutputOft():
            blocks = Value(delta.kind, delta.blocks, ("of outputs", delta.alpha), 0.0)
            scale = (Value(f"{delta.kind} scale", delta.rescale, (), 1.0),) if delta.rescale else ()
            return (blocks, *scale)
        case Ia3():
            return (Value("ia3", delta.factors, (delta.of_inputs,), 0.0 if delta.less_one else 1.0),)
        case Glora():
            return Value("glora a1", delta.a1, (delta.b.scaling,)), Value("glora a2", delta.a2, (delta.b.scaling,))
        case Taken():
            return tuple(v._replace(told=(*v.told, delta.rows)) for v in _values(delta.of))
    if delta.of_weight:
        raise UnsupportedError(f"compare does not know updates of the kind {delta.kind}", where=delta.name, hint=_LEAVE)
    return ()


_LEAVE = "leave them out with --exclude"


class Paired(NamedTuple):
    """The units of one module of two adapters, and why some of it cannot be compared."""

    units: tuple[Unit, ...]
    problem: str = ""


def paired(key: str, one: Side, two: Side, shape: tuple[int, int], *, transposed: bool) -> Paired:
    """Return the units that compare one module; `shape` is (out, in x kernel) of the update.

    A side may be empty: the adapter does nothing to the module.
    """
    units: list[Unit] = []
    problem = ""
    if one.update or two.update:
        matrices = (one.update, two.update)
        by_factors = all(_has_factors(d) for ds in matrices for d in ds)
        rank = sum(inner_rank(d) for ds in matrices for d in ds) if by_factors else 0
        if by_factors and rank <= max(_ALWAYS, min(shape) // 4):
            units.append(FactoredPair(key, *matrices, shape))
        else:
            units.append(DensePair(key, *matrices, shape, transposed))
    for kind in dict.fromkeys(v.kind for v in (*one.values, *two.values)):
        first, second = ([v for v in side.values if v.kind == kind] for side in (one, two))
        if not first or not second:
            alone = (first or second)[0]
            if alone.neutral is not None and not (one.kinds and two.kinds):  # beside nothing
                units.append(ValuesPair(f"{key} {kind}", *((alone, None) if first else (None, alone))))
            else:
                problem = _alone(kind, one if first else two, two if first else one)
        elif len(first) != len(second) or len(first) > 1:
            problem = f"several {kind}: not compared"
        elif first[0].told != second[0].told:
            problem = f"{kind}: of other {'tokens' if kind == 'tokens' else 'rows or settings'}, and not compared"
        elif prod(first[0].ref.shape) != prod(second[0].ref.shape):
            problem = f"{kind}: of shapes {list(first[0].ref.shape)} and {list(second[0].ref.shape)}, and not compared"
        else:
            units.append(ValuesPair(f"{key} {kind}", first[0], second[0]))
    return Paired(tuple(units), problem)


def _alone(kind: str, has: Side, lacks: Side) -> str:
    """Say why a value that the other side has not leaves the two apart."""
    names = "+".join(has.kinds), "+".join(lacks.kinds)
    if not lacks.kinds:
        return f"{names[0]}: one adapter has it and the other has not; how strong it is shows only beside the base"
    what = "only the low-rank parts are compared" if kind == "magnitude" and lacks.update else "not compared"
    return f"{names[0]} beside {names[1]}: {what}"


def _has_factors(delta: Delta) -> bool:
    return isinstance(delta.of if isinstance(delta, Taken) else delta, (LowRank, LoHa, LoKr, Vera))


def matrix_shape(deltas: Sequence[Delta], where: str, source: str, *, transposed: bool) -> tuple[int, int]:
    """Return (out, in x kernel) of updates of one weight, as far as they show it; MismatchError where they disagree."""
    sizes = [0, 0]
    for delta in deltas:
        shape = _oriented(delta, transposed=transposed)
        for n in (0, 1):
            if sizes[n] and shape[n] and sizes[n] != shape[n]:
                shown = _oriented(deltas[0], transposed=transposed)
                raise MismatchError(f"{where} has shape {shown} in one and {shape} in the other", where=source)
            sizes[n] = sizes[n] or shape[n]
    if not sizes[1]:
        sizes[1] = min((_vera(d).A.shape[1] for d in deltas), default=0)
    return sizes[0], sizes[1]


def _oriented(delta: Delta, *, transposed: bool) -> tuple[int, int]:
    out, columns = delta.matrix_shape
    return (columns, out) if transposed and isinstance(delta, Full) and len(delta.shape) == 2 else (out, columns)


def _vera(delta: Delta) -> Vera:
    inner = delta.of if isinstance(delta, Taken) else delta
    assert isinstance(inner, Vera)
    return inner


def _refs(deltas: Sequence[Delta]) -> tuple[TensorRef, ...]:
    return tuple(dict.fromkeys(ref for d in deltas for ref in d.refs))


@dataclass(frozen=True)
class FactoredPair:
    """Two updates that are sums of products of factors; either may have none."""

    key: str
    first: tuple[Delta, ...]
    second: tuple[Delta, ...]
    shape: tuple[int, int]
    outs: tuple[Out, ...] = ()

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """All factors."""
        return _refs((*self.first, *self.second))

    @property
    def scratch(self) -> int:
        """All factors in fp64, four times over, and the cores."""
        rank = sum(map(inner_rank, (*self.first, *self.second)))
        return 32 * rank * sum(self.shape) + 64 * rank * rank + sum(ref.held for ref in self.reads)

    def run(self, load: Load, emit: Emit) -> Facts:
        """Measure what they have in common."""
        from loratool.algebra import subspaces

        one, two = (self._joined(deltas, load) for deltas in (self.first, self.second))
        if one is None or two is None:
            known = one or two
            assert known
            nothing = known[0][:, :0], known[1][:0]  # of rank 0, on the same device
            one, two = one or nothing, two or nothing
        return subspaces.likeness(one, two)

    def _joined(self, deltas: tuple[Delta, ...], load: Load) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return (up (out, r), down (r, in)) in fp64, scaling folded into up, of the sum of deltas; None of none."""
        from loratool.algebra import lowrank

        return lowrank.add([(*self._factors(d, load), 1.0) for d in deltas]) if deltas else None

    def _factors(self, delta: Delta, load: Load) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(delta, Taken) and isinstance(delta.of, Vera):
            up, down = self._factors(delta.of, load)
            return up[[row for run in delta.rows for row in run]], down
        if not isinstance(delta, Vera):
            return factors_of(delta, load)
        lambda_b, lambda_d, A, B = (finite(ref, load).double() for ref in delta.refs)
        return lambda_b[:, None] * B[: len(lambda_b)], lambda_d[:, None] * A[:, : self.shape[1]]


@dataclass(frozen=True)
class DensePair:
    """Two updates, one of which has no small factors, in blocks. `transposed`: the stored weight is (in, out)."""

    key: str
    first: tuple[Delta, ...]
    second: tuple[Delta, ...]
    shape: tuple[int, int]
    transposed: bool
    outs: tuple[Out, ...] = ()

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """All tensors."""
        return _refs((*self.first, *self.second))

    @property
    def scratch(self) -> int:
        """Factors in fp64, and a few blocks; what is as large as the weight is read in rows."""
        factors = _refs([d for d in (*self.first, *self.second) if not isinstance(d, Full)])
        return 16 * sum(prod(r.shape) for r in factors) + 64 * max(_BLOCK, *self.shape)

    def run(self, load: Load, emit: Emit) -> Facts:
        """Sum over blocks."""
        import torch

        from loratool.algebra import kinds, subspaces

        sums = subspaces.Sums()
        sides = [
            [kinds.dense(d, load, torch.float64, transposed=self.transposed and isinstance(d, Full)) for d in deltas]
            for deltas in (self.first, self.second)
        ]
        device = next((t.device for side in sides for d in side for t in d.tensors), torch.device("cpu"))
        for rows, columns in self._blocks():
            W = torch.zeros(1, 1, dtype=torch.float64, device=device).expand(
                rows.stop - rows.start, columns.stop - columns.start
            )
            blocks = [[d.block(W, rows, columns) for d in side] for side in sides]
            sums.add(*(sum(each[1:], each[0]) if each else None for each in blocks))
        return sums.facts

    def _blocks(self) -> Iterator[tuple[slice, slice]]:
        """Cut the matrix into rows; into columns where a stored tensor has them as its rows."""
        out, columns = self.shape
        by_columns = self.transposed and any(isinstance(d, Full) for d in (*self.first, *self.second))
        length, across = (columns, out) if by_columns else (out, columns)
        step = max(1, _BLOCK // max(1, across))
        for start in range(0, length, step):
            run, whole = slice(start, min(start + step, length)), slice(0, across)
            yield (whole, run) if by_columns else (run, whole)


@dataclass(frozen=True)
class ValuesPair:
    """Two tensors of as many elements, one of which may be missing: then it is what changes nothing."""

    key: str
    first: Value | None
    second: Value | None
    outs: tuple[Out, ...] = ()

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """Both."""
        return tuple(value.ref for value in (self.first, self.second) if value)

    @property
    def scratch(self) -> int:
        """A few panels."""
        widest = max(prod(ref.shape[1:]) for ref in self.reads)
        return 64 * max(_BLOCK, 64 * widest)

    def run(self, load: Load, emit: Emit) -> Facts:
        """Sum over panels of rows."""
        from loratool.algebra import subspaces

        sums = subspaces.Sums()
        for panels in zip(self._panels(self.first), self._panels(self.second), strict=True):
            sums.add(*(None if v is None else finite(v.ref, load).double() - (v.neutral or 0.0) for v in panels))
        value = self.first or self.second
        assert value
        return {**sums.facts, "kind": value.kind, "has_neutral": value.neutral is not None}

    def _panels(self, value: Value | None) -> list[Value | None]:
        """Cut into rows where both have them; of other shapes one is a vector on edge, and small."""
        first = self.reads[0]
        if len({ref.shape for ref in self.reads}) > 1 or not first.shape:
            return [value]
        panels = first.panels(_BLOCK * dtypes.itemsize(first.dtype))
        return [value and value._replace(ref=value.ref.rows(a, b)) for a, b in panels]
