"""Who says what to which weight: the updates of several adapters, module by module, and what cannot be combined.

Without a base a module is a sum of factors. DoRA's update depends on the weight, so it is carried where nothing is
added to it; so is a tensor that was trained as a whole, unless the weights of those that have it add up to 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from loratool import dtypes
from loratool.adapter import Target, Weighted
from loratool.architecture import Architecture
from loratool.combining import Method, Share, require_one_rank
from loratool.deltas import Delta, Dora, Full, LowRank, Replace, Tokens
from loratool.errors import InputError, MismatchError, UsageError
from loratool.operations.combined import EVERYTHING, CombineModule, CombineWhole, Voice
from loratool.operations.ranks import Rule
from loratool.operations.recompress import dtype_of, recompressible

_MERGE = "loratool merge it into its base, then loratool extract from the result; or leave it out: --exclude '{}'"


class Choice(NamedTuple):
    """How adapters are combined: a method with its options, and a rank rule (None: the method's own)."""

    method: Method
    options: Mapping[str, Any]
    rule: Rule | None = None
    pad_rank: int | str | None = None
    dtype: str = "keep"


class Parts(NamedTuple):
    """The units of a plan: modules with factors, and tensors that are added up; and what is kept as it is.

    `silent` are the modules that an adapter (by its place) has and in which its weight is zero.
    """

    modules: list[CombineModule]
    wholes: list[CombineWhole]
    kept: dict[Target, tuple[Delta, ...]]
    silent: set[tuple[int, Target]]


def parts(
    weighted: Sequence[Weighted], steps: Sequence[int], choice: Choice, architecture: Architecture | None
) -> Parts:
    """Return what is to be done for each module; raise, by name, where the mathematics does not allow it."""
    split = [recompressible(w.adapter, architecture, "combine") for w in weighted]
    targets = sorted({t for w in weighted for t in w.adapter.deltas}, key=lambda t: t.sort_key)
    found = Parts([], [], {}, set())
    products = [d for factored, _ in split for ds in factored.values() for d in ds]
    if not products:
        where = " and ".join(w.adapter.origin.path for w in weighted)
        raise InputError("no module of these adapters has factors", where=where)
    dtype = dtype_of(products) if choice.dtype == "keep" else dtypes.from_torch_name(choice.dtype)
    for target in targets:
        weights = [w.of(target) for w in weighted]
        shares = [Share(w, step) for w, step in zip(weights, steps, strict=True)]
        if choice.method.space == "weights":
            weights = coefficients(choice, shares)
        having = [n for n, w in enumerate(weighted) if target in w.adapter.deltas]
        if choice.method.space == "weights" or not any(weights[n] for n in having):
            found.silent.update((n, target) for n in having if not weights[n])
        if not any(weights[n] for n in having):
            continue
        factored, kept = (
            [Voice(one[n].get(target, ()), w, s) for one, w, s in zip(split, weights, steps, strict=True)]
            for n in (0, 1)
        )
        if any(v.deltas for v in factored) and any(isinstance(d, Replace) for v in kept for d in v.deltas):
            what = "one adapter has it whole (a module to save) and another has factors for it"
            raise MismatchError(what, where=str(target), hint=_MERGE.format(target.path))
        if any(v.deltas for v in factored):
            found.modules.extend(_module(target, factored, choice, dtype))
        if any(v.deltas for v in kept):
            _whole(target, kept, choice.method, found)
    return found


def coefficients(choice: Choice, shares: Sequence[Share]) -> list[float]:
    """Return what a method in the space of weights multiplies the deltas with."""
    found = [float(c) for c in choice.method(shares, **choice.options)]
    if len(found) != len(shares):
        what = f"{choice.method.name} gave {len(found)} coefficients for {len(shares)} adapters"
        raise UsageError(what, hint="a method in the space of weights returns one for each share")
    return found


def _module(target: Target, voices: list[Voice], choice: Choice, dtype: str) -> list[CombineModule]:
    """Return the unit of a module with factors, if its coefficients leave anything of it."""
    method = choice.method
    present = [v for v in voices if v.deltas]
    if method.space == "weights":
        present = voices = [v for v in present if v.weight]
    if not present:
        return []
    if any(isinstance(d, Dora) for v in present for d in v.deltas):
        alone = len(present) == 1 and present[0].weight == 1 and method.space == "weights"
        if not alone:
            raise MismatchError(
                "DoRA's update depends on the weight that it changes, so it cannot be added to another or scaled "
                f"({len(present)} adapters here, weights {', '.join(f'{v.weight:g}' for v in present)})",
                where=str(target),
                hint=_MERGE.format(target.path),
            )
    if method.one_rank and all(isinstance(d, LowRank) for v in present for d in v.deltas):  # of others once they run
        require_one_rank([v.rank for v in present], str(target))
    rule = choice.rule.of(target) if choice.rule else None
    if rule is None and method.rank == "largest":
        rule = Rule(rank=max(v.rank for v in present))
    elif rule is None and method.space == "dense":
        rule = EVERYTHING
    return [CombineModule(target, tuple(voices), method, tuple(choice.options.items()), rule, dtype)]


def _whole(target: Target, voices: Sequence[Voice], method: Method, found: Parts) -> None:
    """Sort a tensor that has no factors: added up, kept as the only one, or refused."""
    present = [v for v in voices if v.deltas and v.weight]
    if not present:
        return
    kinds = {(type(d), d.shape, d.indices if isinstance(d, Tokens) else ()) for v in present for d in v.deltas}
    way_out = _MERGE.format(target.path)
    replaces = any(isinstance(d, (Replace, Tokens)) for v in present for d in v.deltas)
    if len(present) == 1 and present[0].weight == 1 and replaces:
        found.kept[target] = present[0].deltas
        return
    if len(kinds) > 1 or any(len(v.deltas) > 1 for v in present):
        told = " and ".join(sorted({f"{d.kind} {list(d.shape)}" for v in present for d in v.deltas}))
        raise MismatchError(f"the adapters train it in different ways ({told})", where=str(target), hint=way_out)
    if method.space != "weights" and len(present) > 1 and not replaces:
        what = f"{method.name} is for products of factors, and this is a {present[0].deltas[0].kind} tensor"
        raise InputError(what, where=str(target), hint=f"--method cat or svd; or --exclude '{target.path}'")
    if replaces and len(present) == 1:
        raise InputError(
            f"{present[0].deltas[0].kind}: it takes the place of the base's, and at a weight of {present[0].weight:g} "
            "something of the base's would be left",
            where=str(target),
            hint=f"weight 1; {way_out}",
        )
    (delta,) = present[0].deltas
    assert isinstance(delta, (Full, Tokens))
    dtype = delta.refs[0].dtype
    for voice in present:
        dtype = dtypes.wider(dtype, voice.deltas[0].refs[0].dtype)
    if not replaces or method.space == "weights":
        found.wholes.append(CombineWhole(target, tuple(present), dtype))
    else:  # of other methods only what all agree on
        same = [v._replace(weight=0.0) for v in present]
        found.wholes.append(CombineWhole(target, tuple(same), dtype))
