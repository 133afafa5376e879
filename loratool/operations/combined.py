"""The units of combine: the factors of one module from those of several adapters, and a tensor that was trained whole.

Adapters are taken in the order of their bytes, so the order in which they are named changes no bit of the result; but
of a method for which that order has a meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from loratool import dtypes
from loratool.adapter import Target
from loratool.combining import SEED, Matrix, Method, Pair
from loratool.deltas import Delta, Full, LowRank, Replace, Tokens
from loratool.errors import InputError, LoratoolError
from loratool.operations.ranks import AUTO, Rule
from loratool.operations.recompress import emit_factors, factor_outs, factors_of, finite, inner_rank
from loratool.plan import Emit, Facts, Load, Out, Spooled, seed_of
from loratool.tensors import TensorRef

if TYPE_CHECKING:
    import torch

MAX_RANK = 512  # of dense results under rules that adapt, where nobody says another
_NOTHING = 1e-28  # of the energy of the terms: the rounding of their sum in fp64
_TILE = 1 << 22  # bytes of a whole tensor that are combined at once
#: All that there is, to the rounding of fp32: what a sum keeps where nobody asks for a rank.
EVERYTHING = Rule(energy=1.0)


class Voice(NamedTuple):
    """What one adapter does to a module: its deltas (none: nothing), its weight there, and its step of training."""

    deltas: tuple[Delta, ...]
    weight: float
    step: int

    @property
    def rank(self) -> int:
        """The rank that its factors have."""
        return sum(map(inner_rank, self.deltas))


@dataclass(frozen=True)
class CombineModule:
    """One module: a method makes one update of those of all adapters, which is brought to a rank.

    `rule` is None where the method's result is kept as it is. The weight of a voice is its coefficient in methods that
    give one.
    """

    target: Target
    voices: tuple[Voice, ...]
    method: Method
    options: tuple[tuple[str, Any], ...]
    rule: Rule | None
    dtype: str

    @property
    def key(self) -> str:
        """The module."""
        return str(self.target)

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """All factors."""
        return tuple(dict.fromkeys(ref for v in self.voices for d in v.deltas for ref in d.refs))

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in, *kernel): of the adapter whose tensors show the kernel."""
        return max((d.shape for v in self.voices for d in v.deltas), key=len)

    @property
    def rank(self) -> int:
        """The rank that the result can have."""
        smaller = min(self.shape[0], prod(self.shape[1:]))
        together = sum(v.rank for v in self.voices)
        if self.rule is None:  # a sum in half precision keeps its factors apart, whatever the size of the weight
            return together
        if self.method.space != "dense":
            return min(smaller, together)
        adapts = self.rule.adapts and self.rule.max_rank is None
        return min(smaller, MAX_RANK) if adapts else smaller

    @property
    def bound(self) -> int:
        """The largest rank that may be chosen."""
        return self.rank if self.rule is None else self.rule.bound(self.rank)

    @property
    def outs(self) -> tuple[Out, ...]:
        """Down, and up transposed, at the largest rank that may be chosen, in the spool."""
        return factor_outs(self.key, self.shape, self.bound, self.dtype)

    @property
    def scratch(self) -> int:
        """All factors in fp64, four times over; of dense methods a matrix for each adapter, twice, and some more."""
        out, into = self.shape[0], prod(self.shape[1:])
        held = 32 * sum(v.rank for v in self.voices) * (out + into) + sum(r.held for r in self.reads)
        dense = 4 * out * into * (2 * len(self.voices) + 6) + 16 * min(out, into) ** 2
        return held + (dense if self.method.space == "dense" else 0)

    def run(self, load: Load, emit: Emit) -> Facts:
        """Combine, choose the rank, write the factors, measure what they lose."""
        if self.method.space == "dense":
            return self._truncated(self._dense(load), emit)
        return self._compressed(*self._product(load), emit)

    @property
    def _given(self) -> dict[str, Any]:
        """The options of the method: a seed is each module's own."""
        given = dict(self.options)
        return given | {SEED: seed_of(given[SEED], self.key)} if SEED in given else given

    def _called(self, terms: list[Any]) -> Any:
        """Call the method; what it raises on purpose says where, and anything else is its own mistake."""
        try:
            return self.method(terms, **self._given)
        except LoratoolError as problem:
            problem.where = problem.where or self.key
            raise

    def _product(self, load: Load) -> tuple[torch.Tensor, torch.Tensor]:
        """Return up (out, r) and down (r, in x kernel) of the result."""
        from loratool.algebra import lowrank

        if self.method.space == "factors":
            pairs = [self._pair(v, load) for v in self.voices]
            device = next(p.up.device for p, v in zip(pairs, self.voices, strict=True) if v.deltas)
            pairs = [p._replace(up=p.up.to(device), down=p.down.to(device)) for p in pairs]
            up, down = self._called(self._sorted(pairs))
            return up, down
        terms = []
        for voice in self.voices:
            if voice.weight:
                terms += [(*factors_of(d, load), voice.weight) for d in voice.deltas]
        terms.sort(key=lambda t: (_digest(t[1]), _digest(t[0]), t[2]))
        return lowrank.add(terms)

    def _pair(self, voice: Voice, load: Load) -> Pair:
        """Load an adapter's factors: as the file has them where they are one plain pair."""
        import torch

        from loratool.algebra import kinds, lowrank

        out, into = self.shape[0], prod(self.shape[1:])
        if not voice.deltas:
            return Pair(voice.weight, voice.step, 1.0, torch.zeros(out, 0), torch.zeros(0, into))
        (first, *more) = voice.deltas
        if isinstance(first, LowRank) and first.mid is None and not more:
            up, down = kinds.lora_factors(first, [finite(ref, load) for ref in first.refs])
            return Pair(voice.weight, voice.step, first.scaling, up, down)
        up, down = lowrank.add([(*factors_of(d, load), 1.0) for d in voice.deltas])
        return Pair(voice.weight, voice.step, 1.0, up, down)

    def _sorted(self, pairs: list[Pair]) -> list[Pair]:
        if self.method.ordered:
            return pairs
        return sorted(pairs, key=lambda p: (_digest(p.down), _digest(p.up), p.scaling, p.weight))

    def _dense(self, load: Load) -> torch.Tensor:
        """Return the result as a matrix (out, in x kernel) in fp32."""
        pairs = self._sorted([self._pair(v, load) for v in self.voices if v.deltas])
        matrices = [Matrix(p.weight, p.step, (p.up.float() @ p.down.float()) * p.scaling) for p in pairs]
        result: torch.Tensor = self._called(matrices)
        return result

    def _compressed(self, up: torch.Tensor, down: torch.Tensor, emit: Emit) -> Facts:
        """Write a product at its rank: as it is where nothing is asked for and nothing can be gained."""
        import torch

        from loratool.algebra import lowrank, rank

        up, down = up.double(), down.double()
        svd = lowrank.compress(up, down)
        if not bool(torch.isfinite(svd.sigma).all()):
            raise InputError("the factors hold NaN or infinity", where=self.key)
        narrow = getattr(torch, dtypes.torch_name(self.dtype))
        rule, sigma = self.rule or EVERYTHING, svd.sigma.cpu()
        keep = rule.choose(
            sigma,
            auto=lambda s, _: rank.auto(s, torch.finfo(narrow).eps),
            size=min(self.shape[0], prod(self.shape[1:])),
        )
        keep = max(1, min(keep, self.bound, len(sigma)))
        pair = svd.balanced(keep)
        # in half precision a basis of its own costs a rounding of both factors, which is no lossless recompression
        gains = keep < up.shape[1] and torch.finfo(narrow).bits >= 32
        as_it_is = self.rule is None and not gains and up.shape[1] <= self.bound
        if as_it_is:
            pair, keep = (up, down), up.shape[1]
        emit_factors(self.outs, *pair, emit)
        rounded = tuple(factor.to(narrow).double() for factor in pair)
        difference = lowrank.add([(up, down, 1.0), (rounded[0], rounded[1], -1.0)])
        error = float(lowrank.singular_values(*difference).square().sum())
        total = float(sigma.square().sum())
        if total <= _NOTHING * float(up.square().sum() * down.square().sum()):  # what is left of terms that cancel
            total = error = 0.0
        return {"rank": keep, "total": total, "residual": error, "sigma": sigma.tolist()}

    def _truncated(self, D: torch.Tensor, emit: Emit) -> Facts:
        """Write a dense matrix at its rank."""
        import torch

        from loratool.algebra import rank, svd

        assert self.rule is not None
        rule, panels = self.rule, svd.Panels.of(D)
        total = panels.squared_norm()
        if not total < float("inf"):
            raise InputError("the combined update holds NaN or infinity", where=self.key)
        narrow = getattr(torch, dtypes.torch_name(self.dtype))
        eps, size = torch.finfo(narrow).eps, min(D.shape)

        def choose(sigma: torch.Tensor, beyond: float | None) -> int:
            return rule.choose(sigma, beyond, auto=lambda s, _: rank.auto(s, eps), size=size)

        exact = rule.needs_everything or rule.rank == AUTO
        wanted = choose if rule.is_open else self.bound
        quality = "exact" if exact else "balanced"
        found = svd.truncate(panels, wanted, seed_of(0, self.key), quality=quality, cap=self.bound, total=total)
        keep = len(found.factors.sigma)
        up, down = found.factors.balanced(keep)
        emit_factors(self.outs, up, down, emit)
        residual = svd.squared_error(panels, up.to(narrow), down.to(narrow), total) if total else 0.0
        facts = {"rank": keep, "total": total, "residual": max(residual, 0.0), "sigma": found.sigma.tolist()}
        return facts | {"excess": found.excess}


@dataclass(frozen=True)
class CombineWhole:
    """A bias, or a tensor that was trained as a whole: the sum of coefficient * tensor.

    A replacement stands for value - W, whose sum does not depend on W where the coefficients add up to 1. Where they do
    not, the tensors must be one and the same, which is then kept: nothing is emitted, and the facts say "same".
    """

    target: Target
    voices: tuple[Voice, ...]
    dtype: str

    @property
    def key(self) -> str:
        """The tensor."""
        return f"{self.target} ({self.delta.kind})"

    @property
    def delta(self) -> Full | Tokens:
        """The first of its deltas, which gives the result its name."""
        (delta,) = self.voices[0].deltas
        assert isinstance(delta, (Full, Tokens))
        return delta

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """All tensors."""
        return tuple(ref for v in self.voices for d in v.deltas for ref in d.refs)

    @property
    def outs(self) -> tuple[Out, ...]:
        """The sum, in the spool."""
        return (Out("", self.key, self.delta.refs[0].shape, self.dtype),)

    @property
    def scratch(self) -> int:
        """A tile of each tensor in fp64."""
        return 16 * _TILE * (len(self.voices) + 2)

    def run(self, load: Load, emit: Emit) -> Facts:
        """Add tile by tile; of replacements see first whether they are the same."""
        import torch

        refs = [v.deltas[0].refs[0] for v in self.voices]
        tiles = refs[0].panels(_TILE)
        if not self._is_sum:
            first = [load(refs[0].rows(a, b)) for a, b in tiles] if len(tiles) == 1 else []
            for a, b in tiles:
                one = first[0] if first else load(refs[0].rows(a, b))
                if not all(r.dtype == refs[0].dtype and torch.equal(one, load(r.rows(a, b))) for r in refs[1:]):
                    told = " + ".join(f"{v.weight:g}" for v in self.voices)
                    raise InputError(
                        f"{self.delta.kind}: the adapters have different values, and weights that add up to 1 alone "
                        f"make a mean of them without the base's ({told})",
                        where=str(self.target),
                        hint=f"--normalize; or --exclude '{self.target.path}'; or merge into the base, then extract",
                    )
            return {"same": True}
        for a, b in tiles:
            terms = []
            for voice, ref in zip(self.voices, refs, strict=True):
                scaling = getattr(voice.deltas[0], "scaling", 1.0)
                terms.append(finite(ref.rows(a, b), load).double() * (voice.weight * scaling))
            terms.sort(key=_digest)
            emit(self.outs[0], a, sum(terms[1:], terms[0]).to(getattr(torch, dtypes.torch_name(self.dtype))))
        return {"same": False}

    @property
    def _is_sum(self) -> bool:
        """Whether the sum does not depend on the base."""
        if not isinstance(self.delta, (Replace, Tokens)):
            return True
        return abs(sum(v.weight for v in self.voices) - 1) < 1e-9

    def settled(self, facts: Mapping[str, Any], spooled: Spooled) -> Delta:
        """Return the delta: the sum under the first one's name, or that one."""
        delta = self.delta
        if facts.get("same"):
            return delta
        ref = spooled(self.key, delta.refs[0].shape).renamed(delta.refs[0].name)
        if isinstance(delta, Tokens):
            return Tokens(ref, delta.indices)
        return Replace(ref) if isinstance(delta, Replace) else Full(ref)


def _digest(tensor: torch.Tensor) -> bytes:
    from loratool.algebra.merging import digest

    return digest(tensor)
