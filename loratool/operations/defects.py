"""inspect --check: what is wrong with the numbers of an adapter, module by module; and what its shapes give away.

Errors are what makes an adapter useless or broken: NaN or infinity, an export that lost part of its tensors, updates
that are all zero. Warnings are what a person should look at. Siblings are modules whose names differ in numbers only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log, prod, sqrt
from typing import Any, NamedTuple

from loratool import dtypes
from loratool.adapter import Adapter, Finding, Target
from loratool.deltas import (
    Boft,
    Delta,
    Dora,
    Glora,
    Ia3,
    LoHa,
    LoKr,
    LowRank,
    OutputOft,
    Replace,
    Sparse,
    Taken,
    Tokens,
    Vera,
)
from loratool.patterns import outline
from loratool.plan import Emit, Facts, Load, Out
from loratool.tensors import TensorRef

TILE = 1 << 22
FP16_MAX = 65504.0  # the largest number of fp16 (IEEE 754 binary16)
FP16_NORMAL = 2.0**-14  # below it fp16 loses bits
#: A norm is an outlier beyond so many times the median of its siblings, and beyond so many times their usual spread.
TIMES, SPREADS, FEWEST = 30.0, 8.0, 5
_GATHER = (
    "gather before saving: DeepSpeed stage3_gather_16bit_weights_on_model_save or zero_to_fp32.py, "
    "FSDP state_dict_type FULL_STATE_DICT"
)


class Named(NamedTuple):
    """A tensor of a module, and what it is to it: up, down, or the last element of its name."""

    role: str
    ref: TensorRef


@dataclass(frozen=True)
class CheckModule:
    """The numbers of one module's tensors, and the norm of its update where that is a product of factors."""

    module: str
    deltas: tuple[Delta, ...]
    tensors: tuple[Named, ...]
    outs: tuple[Out, ...] = ()

    @property
    def key(self) -> str:
        """The module; a spectrum has that name already."""
        return f"check:{self.module}"

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """All of them."""
        return tuple(named.ref for named in self.tensors)

    @property
    def scratch(self) -> int:
        """A few tiles, and the factors in fp32 and fp64."""
        factors = (prod(ref.shape) for d in self.deltas if _factors(d) for ref in d.refs)
        return 16 * TILE + 16 * sum(factors)

    def run(self, load: Load, emit: Emit) -> Facts:
        """Count, and measure where everything is finite."""
        counts = [_counted(ref, load) for ref in self.reads]
        facts: Facts = {"tensors": counts}
        plain = [d for d in map(_factors, self.deltas) if d]
        if plain and not any(c["nan"] or c["infinite"] for c in counts):
            facts["norm"] = sqrt(sum(_squared_norm(d, load) for d in plain))
        return facts


def _counted(ref: TensorRef, load: Load) -> dict[str, Any]:
    """Return the tally of a tensor, and a digest of its bytes."""
    from hashlib import blake2b

    from loratool.algebra.tally import tally
    from loratool.storage.load import as_bytes

    digest = blake2b(repr((ref.shape, ref.dtype)).encode(), digest_size=16)

    def pieces() -> Iterator[Any]:
        for start, stop in ref.panels(TILE) or [(0, 0)]:
            piece = load(ref.rows(start, stop) if stop else ref)
            digest.update(as_bytes(piece))
            yield piece

    return {**tally(pieces()), "digest": digest.hexdigest()}


def _squared_norm(delta: LowRank, load: Load) -> float:
    from loratool.algebra import lowrank
    from loratool.algebra.kinds import lora_factors

    up, down = lora_factors(delta, [load(ref) for ref in delta.refs])
    return delta.scaling**2 * lowrank.squared_norm(up, down)


def _factors(delta: Delta) -> LowRank | None:
    """Return the part of a delta whose norm its factors tell."""
    plain = delta.inner if isinstance(delta, Dora) else delta
    return plain if isinstance(plain, LowRank) else None


def units(adapter: Adapter) -> tuple[CheckModule, ...]:
    """Return a check for each module, and for each tensor that belongs to none: a part of a broken one, a base copy."""
    checks = [CheckModule(str(t), adapter.deltas[t], tuple(_tensors(adapter.deltas[t]))) for t in adapter.targets]
    seen = {name for check in checks for ref in check.reads for name in _names(ref)}
    for name, ref in adapter.tensors.items():
        if name not in seen and name not in adapter.consumed and dtypes.is_float(ref.dtype):
            checks.append(CheckModule(name, (), (Named("tensor", ref),)))
    return tuple(checks)


def _tensors(deltas: Iterable[Delta]) -> Iterator[Named]:
    for delta in deltas:
        plain = _factors(delta)
        roles = [(plain.down, "down"), (plain.up, "up")] if plain else []
        for ref in delta.refs:
            leaf = ref.name.removesuffix(".weight").rpartition(".")[2]
            yield Named(next((role for factor, role in roles if factor is ref), leaf), ref)


def _names(ref: TensorRef) -> Iterator[str]:
    """The stored tensors that one is made from."""
    yield ref.name
    for part in ref.view.of if ref.view else ():
        yield from _names(part)


# -- judging -----------------------------------------------------------------------------------------------------------


class _Module(NamedTuple):
    """A checked module: its tensors, each with its tally."""

    name: str
    unit: CheckModule
    facts: Facts

    @property
    def counted(self) -> list[tuple[Named, dict[str, Any]]]:
        return list(zip(self.unit.tensors, self.facts["tensors"], strict=True))

    def zero(self, role: str) -> bool:
        """Whether it has a tensor of this role that is all zero."""
        return any(named.role == role and _is_constant(c, 0.0) for named, c in self.counted)


def judge(
    adapter: Adapter, checks: Sequence[CheckModule], facts: Mapping[str, Facts]
) -> tuple[list[Finding], dict[str, list[str]]]:
    """Return the findings, and the defects of each module in a few words."""
    modules = [_Module(check.module, check, facts[check.key]) for check in checks]
    told: dict[str, list[str]] = {}
    findings = [
        *_not_finite(modules, told),
        *_untrained(adapter, modules, told),
        *_suspicious(modules, told),
        *_outliers(modules, told),
        *_copies(modules, told),
        *_smaller(adapter, told),
    ]
    return findings, told


def _tell(told: dict[str, list[str]], modules: Iterable[str], defect: str) -> None:
    for module in modules:
        told.setdefault(module, []).append(defect)


def _listed(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _not_finite(modules: Sequence[_Module], told: dict[str, list[str]]) -> Iterator[Finding]:
    for module in modules:
        for named, c in module.counted:
            if c["nan"] or c["infinite"]:
                bad = [f"{c[n]:,} {word}" for n, word in (("nan", "NaN"), ("infinite", "infinite")) if c[n]]
                what = f"{named.role} has {' and '.join(bad)} among its {c['count']:,} numbers"
                hint = "the training diverged, or a cast overflowed: take an earlier checkpoint"
                _tell(told, [module.name], "NaN" if c["nan"] else "infinite")
                yield Finding("error", module.name, what, hint)


def _untrained(adapter: Adapter, modules: Sequence[_Module], told: dict[str, list[str]]) -> Iterator[Finding]:
    """Say which factors are zero: what was never trained, or lost its numbers; all of them do nothing at all."""
    where = adapter.origin.path
    embeddings = {str(t) for t in adapter.origin.embeddings}  # whose training starts with a down of zeros
    deltas = [m for m in modules if m.unit.deltas]
    factored = [m for m in deltas if any(map(_factors, m.unit.deltas))]
    for role in ("up", "down"):
        names = [m.name for m in factored if m.zero(role)]
        started = [name for name in names if (name in embeddings) == (role == "down")]
        _tell(told, names, f"{role} is zero")
        if names:
            why = "never trained" if started else "no training starts from that"
            what = f"the {role} factors of {len(names)} of {len(factored)} modules are all zero ({why}): "
            yield Finding("warning", where, what + _listed(names))
    if deltas and all(_does_nothing(m) for m in deltas):
        what = f"this adapter does nothing: the updates of all {len(deltas)} modules are zero"
        yield Finding("error", where, what, "was it saved before it was trained, or without gathering its shards?")


def _does_nothing(module: _Module) -> bool:
    at, every = 0, module.facts["tensors"]
    for delta in module.unit.deltas:
        mine = every[at : at + len(delta.refs)]
        at += len(delta.refs)
        if not _is_nothing(delta, mine):
            return False
    return True


def _is_nothing(delta: Delta, counts: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a delta is zero whatever the weight: a product with a zero factor, a rotation or a scale by one."""
    if isinstance(delta, Taken):
        return _is_nothing(delta.of, counts)
    if isinstance(delta, (Dora, Replace, Tokens)):
        return False  # that depends on the weight
    if isinstance(delta, Ia3):
        return _is_constant(counts[0], 0.0 if delta.less_one else 1.0)
    if isinstance(delta, (Boft, OutputOft)):
        return _is_constant(counts[0], 0.0) and all(_is_constant(c, 1.0) for c in counts[1:])
    if isinstance(delta, Glora):
        return all(any(_is_constant(c, 0.0) for c in half) for half in (counts[:2], counts[2:]))
    if isinstance(delta, Sparse):
        return _is_constant(counts[1], 0.0)
    if isinstance(delta, (LowRank, LoHa, LoKr, Vera)):
        return any(_is_constant(c, 0.0) for c in counts)
    return all(_is_constant(c, 0.0) for c in counts)


def _is_constant(c: Mapping[str, Any], value: float) -> bool:
    return bool(c["count"]) and c["low"] == c["high"] == value and not (c["nan"] or c["infinite"])


def _is_varied(c: Mapping[str, Any]) -> bool:
    """Whether a tensor has something in it that another could be a copy of."""
    return bool(c["low"] < c["high"])


def _suspicious(modules: Sequence[_Module], told: dict[str, list[str]]) -> Iterator[Finding]:
    """Find numbers that training does not make, and such as another dtype does not hold."""
    kinds: list[tuple[str, str, str, Callable[[Named, Mapping[str, Any]], bool]]] = [
        (
            "beyond fp16",
            f"numbers beyond {FP16_MAX:,.0f}: cast to fp16 they would be infinite",
            "keep bf16 or fp32",
            lambda named, c: max(-c["low"], c["high"]) > FP16_MAX,
        ),
        (
            "constant",
            "all numbers of a factor are the same: no training does that",
            "was the file written by a test or a broken export?",
            lambda named, c: named.role in ("up", "down") and c["low"] == c["high"] != 0 and c["count"] > 1,
        ),
        (
            "garbage",
            "more than 1 % of the numbers that are not zero are below 1e-30: other data, read as numbers",
            "is the dtype in the file's header right?",
            lambda named, c: named.ref.dtype != "F16" and c["faint"] > 0.01 * (c["count"] - c["zero"]),
        ),
        (
            "lost in fp16",
            f"no number is as large as {FP16_NORMAL:.2g}, below which fp16 keeps fewer than 10 bits",
            "save the adapter in bf16 or fp32",
            lambda named, c: named.ref.dtype == "F16" and 0 < max(-c["low"], c["high"]) < FP16_NORMAL,
        ),
    ]
    for word, what, hint, is_so in kinds:
        names = [m.name for m in modules if any(is_so(named, c) for named, c in m.counted)]
        _tell(told, names, word)
        if names:
            yield Finding("warning", _listed(names), what, hint)


def _outliers(modules: Sequence[_Module], told: dict[str, list[str]]) -> Iterator[Finding]:
    """Find norms that are far from the median of their siblings (at least FEWEST with them), on a logarithmic scale."""
    from statistics import median  # which imports a lot

    groups: dict[str, list[tuple[str, float]]] = {}
    for m in modules:
        if m.facts.get("norm"):
            groups.setdefault(outline(m.name), []).append((m.name, m.facts["norm"]))
    for group in (g for g in groups.values() if len(g) >= FEWEST):
        middle = median(log(norm) for _, norm in group)
        spread = median(abs(log(norm) - middle) for _, norm in group)
        limit = max(log(TIMES), SPREADS * spread)
        for name, norm in group:
            if abs(log(norm) - middle) > limit:
                times = norm / exp(middle)
                what = (
                    f"the norm of its update, {norm:.3g}, is {times:.3g} times the median of its {len(group)} siblings "
                    f"(more than {TIMES:g} times, and than {SPREADS:g} times their median deviation)"
                )
                _tell(told, [name], "outlier")
                yield Finding("warning", name, what, "compare it with another checkpoint of the same training")


def _copies(modules: Sequence[_Module], told: dict[str, list[str]]) -> Iterator[Finding]:
    """Find modules with the same numbers that lie at different places of the file.

    One factor may well be shared: what was trained on a fused weight has the same down in all of its parts.
    """
    modules = [m for m in modules if m.unit.deltas]
    whole = _alike(modules, lambda m: [[(n, c) for n, c in m.counted if n.role in ("up", "down")] or m.counted])
    for names in whole:
        _tell(told, names, "copy")
        what = "these modules have the same numbers, byte for byte: copied by mistake, or tied weights?"
        yield Finding("warning", _listed(names), what, "of tied weights only one needs an adapter")
    done = {name for names in whole for name in names}
    rest = [m for m in modules if m.name not in done]
    for names in _alike(rest, lambda m: [[pair] for pair in m.counted]):
        layers = {re.sub(r"(\.\d+\.)(?!.*\.\d+\.).*", r"\1", name) for name in names}
        if len(layers) > 1:
            yield Finding("info", _listed(names), "these modules have one factor in common, byte for byte")


_Counted = Sequence[tuple[Named, Mapping[str, Any]]]


def _alike(modules: Sequence[_Module], parts: Callable[[_Module], Iterable[_Counted]]) -> list[list[str]]:
    """Group modules of which some part has the same bytes as one of another module, at another place."""
    found: dict[tuple[str, ...], dict[str, object]] = {}
    for module in modules:
        for part in parts(module):
            if part and all(_is_varied(c) for _, c in part):
                place = tuple((named.ref.pieces, named.ref.view) for named, _ in part)
                found.setdefault(tuple(c["digest"] for _, c in part), {}).setdefault(module.name, place)
    groups = [names for names in found.values() if len(names) > 1 and len(set(names.values())) > 1]
    return [list(names) for names in groups]


# -- shapes ------------------------------------------------------------------------------------------------------------


def torn(adapter: Adapter) -> list[Finding]:
    """Find what sharded training (DeepSpeed ZeRO-3, FSDP) leaves where it saves without gathering; headers tell.

    Tensors are empty, flattened, or each rank's share of the first dimension: then A (r / n, in) has fewer rows than
    B (out / n, r) has columns.
    """
    broken = dict.fromkeys(f.where for f in adapter.findings if f.level == "error")
    parts: dict[str, list[TensorRef]] = {}
    for name in sorted(adapter.tensors) if broken else ():  # A before B, down before up
        for start in _ancestors(name):
            parts.setdefault(start, []).append(adapter.tensors[name])
    signs = Counter(_sign(parts.get(module, [])) for module in broken)
    found = []
    for sign, count in ((sign, count) for sign, count in signs.items() if sign):
        what = f"the tensors of {count} module{'s' * (count > 1)} are {sign}"
        what += ", as where a sharded model is saved without gathering it"
        found.append(Finding("warning", adapter.origin.path, what, _GATHER))
    return found


def _ancestors(name: str) -> Iterator[str]:
    """The paths that a tensor lies under, up to three elements up: its module is one of them."""
    for _ in range(3):
        name = name.rpartition(".")[0]
        if name:
            yield name


def _sign(refs: Sequence[TensorRef]) -> str:
    """Say in what way the tensors of a broken module are shards, or nothing."""
    factors = [ref for ref in refs if ref.shape and dtypes.is_float(ref.dtype)]
    if any(0 in ref.shape for ref in factors):
        return "empty"
    if len(factors) == 2 and all(len(ref.shape) == 1 for ref in factors):
        return "flattened to one dimension"
    if len(factors) == 2 and all(len(ref.shape) == 2 for ref in factors):
        share, rank = factors[0].shape[0], factors[1].shape[1]
        if share < rank and rank % share == 0:
            return f"cut to 1/{rank // share} of their rows"
    return ""


def _smaller(adapter: Adapter, told: dict[str, list[str]]) -> Iterator[Finding]:
    """Find updates whose shape is a fraction of that of nearly all siblings along one number of the name."""
    shapes = {t: d.matrix_shape for t, ds in adapter.deltas.items() for d in ds if _factors(d)}
    rows: dict[tuple[str, str], list[Target]] = {}
    for target in shapes:
        path = str(target)
        for number in re.finditer(r"(?<=\.)\d+(?=\.)", path):
            rows.setdefault((path[: number.start()], path[number.end() :]), []).append(target)
    for siblings in rows.values():
        usual, count = Counter(shapes[t] for t in siblings).most_common(1)[0]
        if len(siblings) < FEWEST or count < 0.75 * len(siblings):
            continue
        for target in (t for t in siblings if shapes[t] != usual and str(t) not in told):
            share = prod(usual) // prod(shapes[target])
            if share > 1 and all(n % m == 0 for n, m in zip(usual, shapes[target], strict=True)):
                _tell(told, [str(target)], "smaller")
                what = f"it updates {list(shapes[target])}, 1/{share} of the {list(usual)} of its siblings: a shard?"
                yield Finding("warning", str(target), what, "merge refuses it where the base has the larger weight")
