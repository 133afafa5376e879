"""Deltas as the factors of one plain LoRA: the unit that resize and convert are made of.

Every kind whose update is a product of factors that can be written down exactly (AdaLoRA's diagonal, a Tucker core,
LoHa, LoKr, several deltas of one module) is one matrix up @ down; its truncated SVD comes from a small core
(loratool.algebra.lowrank), so nothing of size out x in is built and what is kept is known exactly. Of DoRA the low-rank
part is recompressed and the magnitude stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from loratool import dtypes
from loratool.adapter import Adapter, Target
from loratool.architecture import Architecture
from loratool.deltas import Delta, Dora, Full, LoHa, LoKr, LowRank, Replace, Taken, Tokens
from loratool.errors import InputError, MismatchError
from loratool.layers import Layer
from loratool.operations import relative
from loratool.operations.ranks import Rule
from loratool.plan import Emit, Facts, Load, Out, Spooled
from loratool.tensors import TensorRef

if TYPE_CHECKING:
    import torch

    from loratool.algebra.lowrank import Factored

_WHOLE = (Full, Replace, Tokens)  # they have no factors: what they hold is kept as it is
_NO_FACTORS = "depends on the weight that it changes, shares matrices with all modules, or is made of single entries"


@dataclass(frozen=True)
class ResizeModule:
    """The deltas of one module, recompressed into one pair of factors."""

    target: Target
    deltas: tuple[Delta, ...]
    rule: Rule
    dtype: str
    against: tuple[TensorRef, ...] = ()

    @property
    def key(self) -> str:
        """The module."""
        return str(self.target)

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """All factors, and the base's weight that they are measured against."""
        return *self.factors, *self.against

    @property
    def factors(self) -> tuple[TensorRef, ...]:
        """All factors."""
        return tuple(dict.fromkeys(ref for d in self.deltas for ref in d.refs))

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in, *kernel)."""
        return self.deltas[0].shape

    @property
    def rank(self) -> int:
        """The rank that all deltas together can have."""
        return min(sum(map(inner_rank, self.deltas)), self.shape[0], prod(self.shape[1:]))

    @property
    def outs(self) -> tuple[Out, ...]:
        """Down, and up transposed, at the largest rank that the rule allows, in the spool."""
        return factor_outs(self.key, self.shape, self.rule.bound(self.rank), self.dtype)

    @property
    def scratch(self) -> int:
        """All factors in fp64, four times over."""
        rank = sum(map(inner_rank, self.deltas))
        return 32 * rank * (self.shape[0] + prod(self.shape[1:])) + sum(r.held for r in self.factors)

    def run(self, load: Load, emit: Emit) -> Facts:
        """Factorise, choose the rank, write the factors, measure what they lose."""
        return self._finished(*_decomposed(self.deltas, load, self.outs[0].shape[0]), load, emit)

    @property
    def alike(self) -> tuple[int, ...] | None:
        """(out, in x kernel, rank of the factors, rank of the result); None where only the values tell the second."""
        if any(_innermost(d).kind == "lokr" for d in self.deltas):
            return None
        columns, inner = prod(self.shape[1:]), sum(map(inner_rank, self.deltas))
        return self.shape[0], columns, inner, self.outs[0].shape[0]

    def run_together(self, units: Sequence[ResizeModule], load: Load, emit: Emit) -> list[Facts]:
        """Do the same for several modules, whose factors are stacked."""
        import torch

        from loratool.algebra import batched

        ups, downs = (torch.stack(side) for side in zip(*(_sum_of(u.deltas, load) for u in units), strict=True))
        svds = batched.compress(ups, downs, self.outs[0].shape[0])
        every = zip(units, svds, ups, downs, strict=True)
        return [unit._finished(svd, svd.sigma, (up, down), load, emit) for unit, svd, up, down in every]

    def _finished(
        self,
        svd: Factored,
        sigma: torch.Tensor,
        factors: tuple[torch.Tensor, torch.Tensor] | None,
        load: Load,
        emit: Emit,
    ) -> Facts:
        """Choose the rank, write the factors, measure what they lose; arguments are as `_decomposed` returns them."""
        import torch

        from loratool.algebra import lowrank, rank

        narrow, bound, sigma = getattr(torch, dtypes.torch_name(self.dtype)), self.outs[0].shape[0], sigma.cpu()
        if not bool(torch.isfinite(sigma).all()):
            raise InputError("the factors hold NaN or infinity", where=self.key)
        base_norm = relative.norm(self.against, load, self.key)
        keep = self.rule.choose(
            sigma,
            auto=lambda s, _: rank.auto(s, torch.finfo(narrow).eps),
            size=min(self.shape[0], prod(self.shape[1:])),
            scaling=getattr(self.deltas[0], "scaling", 1.0),
            base_norm=base_norm,
        )
        keep = max(1, min(keep, bound, len(svd.sigma)))
        exact = svd.balanced(keep)
        emit_factors(self.outs, *exact, emit)
        residual = float(sigma[keep:].square().sum())
        facts = {"rank": keep, "total": float(sigma.square().sum()), "residual": residual, "sigma": sigma.tolist()}
        facts["base_norm"] = base_norm
        if torch.finfo(narrow).bits < 32:  # rounding the factors costs more than a truncation may
            up, down = (factor.to(narrow).double() for factor in exact)
            error = lowrank.squared_distance(factors or exact, (up, down))
            facts["residual"] = error if factors else residual + error
        return facts


def spectrum(deltas: Sequence[Delta], load: Load) -> torch.Tensor:
    """Return the singular values of what deltas that have factors add up to, descending."""
    from loratool.algebra import lowrank

    if len(deltas) == 1 and isinstance(deltas[0], LoKr):
        return _decomposed(deltas, load, 1)[1]
    return lowrank.singular_values(*_sum_of(deltas, load))


def _sum_of(deltas: Sequence[Delta], load: Load) -> tuple[torch.Tensor, torch.Tensor]:
    """Return up (out, R) and down (R, in x kernel) of all deltas of a module together, in fp64."""
    from loratool.algebra import lowrank

    return lowrank.add([(*factors_of(d, load), 1.0) for d in deltas])


def _decomposed(
    deltas: Sequence[Delta], load: Load, bound: int
) -> tuple[Factored, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """Return the SVD of the sum of deltas, all its singular values, and its factors in fp64 where those are small.

    A Kronecker product may have as many singular values as the weight: only `bound` of its triplets are formed.
    """
    from loratool.algebra import lowrank

    if len(deltas) == 1 and isinstance(deltas[0], LoKr) and not deltas[0].on_last:
        one, two = _kronecker_pair(deltas[0], load)
        sigma = (one.sigma[:, None] * two.sigma).flatten().sort(descending=True).values
        return lowrank.kronecker(one, two, bound), sigma, None
    up, down = _sum_of(deltas, load)
    svd = lowrank.compress(up, down, bound)
    return svd, svd.sigma, (up, down)


def factors_of(delta: Delta, load: Load) -> tuple[torch.Tensor, torch.Tensor]:
    """Return up (out, r) and down (r, in x kernel) in fp64, the scaling in up."""
    from loratool.algebra import kinds, lowrank

    if isinstance(delta, Taken):
        up, down = factors_of(delta.of, load)
        return up[[row for run in delta.rows for row in run]], down
    if isinstance(delta, Dora):
        return factors_of(delta.inner, load)
    if isinstance(delta, LoKr):
        return _kronecker(delta, load)
    tensors = [finite(ref, load) for ref in delta.refs]
    if isinstance(delta, Full):  # the update itself and an identity
        import torch

        whole = tensors[0].double().flatten(1)
        unit = torch.eye(min(whole.shape), dtype=torch.float64, device=whole.device)
        up, down = (whole, unit) if whole.shape[0] >= whole.shape[1] else (unit, whole)
    elif isinstance(delta, LoHa):
        w1_a, w1_b, w2_a, w2_b, *cores = (t.double() for t in tensors)
        if cores:
            w1_a, w1_b = lowrank.tucker_factors(w1_a.T, cores[0], w1_b)
            w2_a, w2_b = lowrank.tucker_factors(w2_a.T, cores[1], w2_b)
        up, down = lowrank.hadamard_factors(w1_a, w1_b, w2_a, w2_b)
    else:
        assert isinstance(delta, LowRank)
        up, down = kinds.lora_factors(delta, [t.double() for t in tensors])
    return up.double() * delta.scaling, down.double()


def _kronecker_pair(delta: LoKr, load: Load) -> tuple[Factored, Factored]:
    """Return the SVDs of w1, with the scaling, and of w2 (out2, in2 x kernel)."""
    from loratool.algebra import kinds, lowrank

    w1, w2 = kinds.kronecker_pair(delta, [finite(ref, load).double() for ref in delta.refs])
    return lowrank.small_svd(w1 * delta.scaling), lowrank.small_svd(w2.flatten(1))


def _kronecker(delta: LoKr, load: Load) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    from loratool.algebra import kinds, lowrank

    if not delta.on_last:
        return lowrank.kronecker_factors(*_kronecker_pair(delta, load))
    w1, w2 = kinds.kronecker_pair(delta, [finite(ref, load).double() for ref in delta.refs])
    whole = torch.kron(w1[None], w2.contiguous()).reshape(delta.shape[0], -1)  # (out, in x kernel)
    U, S, Vh = lowrank.small_svd(whole * delta.scaling)
    return U * S, Vh


def finite(ref: TensorRef, load: Load) -> torch.Tensor:
    """Load a tensor; InputError names it where it holds NaN or infinity."""
    from loratool.algebra.deltas import is_finite

    tensor = load(ref)
    if not is_finite(tensor):
        raise InputError("the factors hold NaN or infinity", where=ref.name)
    return tensor


def inner_rank(delta: Delta) -> int:
    """Return the largest rank that a delta's factors give it, whatever is in them."""
    if isinstance(delta, Taken):
        return inner_rank(delta.of)
    if isinstance(delta, Dora):
        return inner_rank(delta.inner)
    if isinstance(delta, LoHa):
        return delta.rank**2
    if isinstance(delta, LoKr):
        (out1, in1), (out, *rest) = _matrix(delta.w1), delta.shape
        r1 = min(out1, in1, delta.w1[-1].shape[0] if len(delta.w1) == 2 else out1)
        rows, columns = out // out1, prod(rest) // in1
        return r1 * min(rows, columns, delta.w2[-1].shape[0] if len(delta.w2) == 2 and not delta.on_last else rows)
    if isinstance(delta, Full):
        return min(delta.matrix_shape)
    return delta.rank


def _innermost(delta: Delta) -> Delta:
    """Return what the factors of a delta are made of: that of which it takes rows, the low-rank part of DoRA."""
    if isinstance(delta, Taken):
        return _innermost(delta.of)
    return _innermost(delta.inner) if isinstance(delta, Dora) else delta


def _matrix(factors: Sequence[TensorRef]) -> tuple[int, int]:
    return factors[0].shape[0], factors[-1].shape[1]


# ---- which deltas have factors, and what becomes of the others


def has_factors(delta: Delta) -> bool:
    """Whether a delta is a product of factors: alone, or the low-rank part of DoRA."""
    return isinstance(delta.of if isinstance(delta, Taken) else delta, (LowRank, LoHa, LoKr, Dora))


def is_whole(delta: Delta) -> bool:
    """Whether a delta has no factors and is kept as it is: a trained weight, bias, or token."""
    return isinstance(delta, _WHOLE)


def recompressible(
    adapter: Adapter, architecture: Architecture | None, verb: str
) -> tuple[dict[Target, tuple[Delta, ...]], dict[Target, tuple[Delta, ...]]]:
    """Return the deltas that have factors, and those that are kept as they are; raise, by name, where one is neither.

    A sum that no format has a name for (DoRA and something else on one module) is refused, and so is a convolution
    whose kernel its factors do not show. What resize makes low-rank includes dense updates of matrices (`.diff`).
    """
    factored: dict[Target, tuple[Delta, ...]] = {}
    kept: dict[Target, tuple[Delta, ...]] = {}
    problems: list[str] = []
    for target in adapter.targets:
        deltas = adapter.deltas[target]
        known = architecture.find(target.parts[0], target.component) if architecture else None
        dense = known is not None and verb == "resize" and _is_plain_matrix(known.layer)
        products = tuple(d for d in deltas if has_factors(d) or (dense and type(d) is Full and len(d.shape) > 1))
        others = tuple(d for d in deltas if is_whole(d) and d not in products)
        strange = [d for d in deltas if d not in products and d not in others]
        if strange:
            problems.append(f"{target}: {strange[0].kind}")
            continue
        if len(products) > 1 and any(d.kind == "dora" for d in products):
            raise MismatchError(
                "DoRA and another delta on one module: no adapter can hold their sum", where=str(target), hint=_MERGE
            )
        inner = [d.inner if isinstance(d, Dora) else d for d in products]
        hidden = any(isinstance(d, (LoHa, LoKr)) and len(d.shape) == 2 for d in inner)
        if known and known.layer.kind.startswith("conv") and hidden:
            what = f"a {products[0].kind} delta of a convolution, whose factors do not show its kernel"
            raise MismatchError(what, where=str(target), hint=_MERGE)
        if products:
            factored[target] = products
        if others:
            kept[target] = others
    if problems:
        listed = [*problems[:6], *([f"... and {len(problems) - 6} more"] if len(problems) > 6 else [])]
        what = f"{verb} needs an update that is a product of factors, and this kind {_NO_FACTORS}"
        raise InputError("\n  ".join([what, *listed]), where=adapter.origin.path, hint=_MERGE)
    return factored, kept


def _is_plain_matrix(layer: Layer) -> bool:
    """Whether a stored weight is (out, in, *kernel)."""
    return not layer.transposed and (layer.kind == "linear" or layer.kind.startswith("conv"))


_MERGE = "loratool merge it into its base, then loratool extract from the result; or leave the module out (--exclude)"


def dtype_of(deltas: Iterable[Delta]) -> str:
    """Return the dtype that holds the factors of several deltas."""
    names = [ref.dtype for d in deltas for ref in (d.inner.refs if isinstance(d, Dora) else d.refs)]
    dtype = names[0]
    for name in names[1:]:
        dtype = dtypes.wider(dtype, name)
    return dtype


def rebuilt(deltas: Sequence[Delta], factors: LowRank) -> Delta:
    """Return what takes the place of deltas of one module, given their new factors: DoRA keeps its magnitude."""
    (first, *_) = deltas
    return replace(first, inner=factors) if isinstance(first, Dora) else factors


@dataclass(frozen=True)
class ScaleBias:
    """The bias of lora_B, which PEFT multiplies by the scaling, with the scaling folded into it."""

    target: Target
    delta: Full
    dtype: str

    @property
    def key(self) -> str:
        """The bias."""
        return str(self.target)

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """The vector."""
        return self.delta.refs

    @property
    def outs(self) -> tuple[Out, ...]:
        """The same, scaled, in the spool."""
        return (Out("", self.key, self.delta.shape, self.dtype),)

    @property
    def scratch(self) -> int:
        """Three vectors."""
        return 24 * prod(self.delta.shape)

    def run(self, load: Load, emit: Emit) -> Facts:
        """Multiply."""
        import torch

        value = finite(self.delta.value, load).double() * self.delta.scaling
        emit(self.outs[0], 0, value.to(getattr(torch, dtypes.torch_name(self.dtype))))
        return {}

    def settled(self, spooled: Spooled) -> Full:
        """Return the scaled bias under its old name."""
        return Full(spooled(self.key, self.delta.shape).renamed(self.delta.value.name))


# ---- factors in the spool: down and up transposed, so that a smaller rank is a prefix of the rows of both


def factor_outs(key: str, shape: tuple[int, ...], rank: int, dtype: str) -> tuple[Out, Out]:
    """Return what a unit spools for a weight (out, in, *kernel): down (rank, in, *kernel), up^T (rank, out, 1, ...)."""
    ones = (1,) * (len(shape) - 2)
    down, up = (rank, *shape[1:]), (rank, shape[0], *ones)
    return Out("", f"{key}.down", down, dtype), Out("", f"{key}.up", up, dtype)


def emit_factors(outs: Sequence[Out], up: Any, down: Any, emit: Emit) -> None:
    """Write matrices up (out, r) and down (r, in x kernel) as the first r rows of `outs`, rounding them once."""
    import torch

    from loratool.algebra.deltas import is_finite

    dtype = getattr(torch, dtypes.torch_name(outs[0].dtype))
    up, down = up.to(dtype).T.contiguous(), down.to(dtype).contiguous()
    if not (is_finite(up) and is_finite(down)):
        raise InputError(f"the new factors overflow {outs[0].dtype}", where=outs[0].name, hint="--dtype float32")
    emit(outs[0], 0, down.reshape(-1, *outs[0].shape[1:]))
    emit(outs[1], 0, up.reshape(-1, *outs[1].shape[1:]))


def settled_factors(outs: Sequence[Out], rank: int, spooled: Spooled) -> LowRank:
    """Return the spooled factors at their settled rank, with scale 1."""
    down, up = outs
    columns = spooled(up.name, (rank, up.shape[1]))  # as a matrix, whatever the kernel
    turned = columns.transposed()
    if len(up.shape) > 2:
        turned = TensorRef(up.name, (up.shape[1], rank, *up.shape[2:]), up.dtype, turned.pieces, turned.view)
    return LowRank(spooled(down.name, (rank, *down.shape[1:])), turned, 1.0)


def reads_of(kept: Mapping[Target, Sequence[Delta]]) -> list[TensorRef]:
    """Return the tensors of deltas that are kept as they are."""
    return [ref for deltas in kept.values() for d in deltas for ref in d.refs]
