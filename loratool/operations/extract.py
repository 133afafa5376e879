"""extract: the low-rank delta of a full fine-tune, D = tuned - base in fp32, by truncated SVD.

Weights whose bytes are equal are found first and skipped. The residual |D - up @ down| is exact: it follows from the
captured energy, and is measured directly where that difference would lose its digits. A weight whose delta does not
fit in memory is read in panels, once a pass. What is not low-rank (norms, biases, unknown tensors) is the *rest*:
every changed tensor of it is named, and leaving it out needs a flag.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from math import isfinite, prod
from typing import TYPE_CHECKING, Any

from loratool import dtypes
from loratool.adapter import Adapter, Finding, Origin, Target
from loratool.architecture import Architecture
from loratool.deltas import Delta, LowRank
from loratool.errors import InputError, MismatchError
from loratool.hookspecs import Format
from loratool.operations import extracted, sizes
from loratool.operations.matching import Place, bare_name, places, stitched, tied_partner
from loratool.operations.ranks import Rule
from loratool.operations.recompress import emit_factors, factor_outs, settled_factors
from loratool.operations.remainder import TILE, CompareRest, Pair, Savable, judge, rest_units, same_bytes
from loratool.operations.resize import cost_of, joined_deltas
from loratool.operations.sizes import Sized
from loratool.operations.writing import spell
from loratool.patterns import selects
from loratool.plan import Emit, Facts, Input, Load, Out, OutFile, Plan, Report, Settled, Spooled, Unit
from loratool.tensors import TensorRef, TensorSource, zeros

if TYPE_CHECKING:
    import torch

    from loratool.algebra import svd

__all__ = ["CompareRest", "ExtractModule", "plan", "same_bytes"]

PANEL = 64 << 20
MAX_RANK = 512  # of rules that adapt, where nobody says another: factors that large are hardly smaller than the weight
_SAMPLE = 1 << 22  # elements of a weight that its rounding is judged by


@dataclass(frozen=True)
class ExtractModule:
    """The delta of one weight, truncated."""

    target: Target
    tuned: TensorRef
    base: TensorRef
    transposed: bool
    rule: Rule
    rank: int
    dtype: str
    streamed: bool
    quality: str = "balanced"

    @property
    def key(self) -> str:
        """The module."""
        return str(self.target)

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """Both weights."""
        return self.tuned, self.base

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in, *kernel)."""
        return self.tuned.shape[::-1] if self.transposed else self.tuned.shape

    @property
    def outs(self) -> tuple[Out, ...]:
        """Down, and up transposed, at the largest rank that may be chosen, in the spool."""
        return factor_outs(self.key, self.shape, self.rank, self.dtype)

    @property
    def scratch(self) -> int:
        """The delta (or one panel of it), a few tiles, the blocks, and a Gram where the block is near the whole."""
        rows, columns = self.tuned.shape[0], prod(self.tuned.shape[1:])
        held = PANEL // dtypes.itemsize(self.tuned.dtype) + 64 * columns if self.streamed else rows * columns
        block = self.rank + self.rank // 2 + 8
        gram = min(rows, columns) if self._quality == "exact" else min(rows, columns, 3 * block)
        return 8 * held + 64 * TILE + 48 * (rows + columns) * block + 16 * gram**2

    @property
    def _quality(self) -> str:
        return "exact" if self.rule.needs_everything else self.quality

    def run(self, load: Load, emit: Emit) -> Facts:
        """Subtract, choose the rank, factorise, measure, write."""
        import torch

        from loratool.algebra import rank, svd

        narrow = getattr(torch, dtypes.torch_name(self.dtype))
        if same_bytes(self.tuned, self.base, load):
            return {"same": True}
        D = self._difference(load)
        total = D.squared_norm()
        if total == 0:  # the same values in another dtype
            return {"same": True}
        if not isfinite(total):
            raise InputError("the weights hold NaN or infinity", where=self.tuned.name)
        seed = int.from_bytes(sha256(self.key.encode()).digest()[:7], "big")
        variance = sum(_rounding(ref, load) for ref in self.reads)
        size = min(D.shape)

        def choose(sigma: torch.Tensor, beyond: float | None) -> int:
            return self.rule.choose(sigma, beyond, auto=lambda s, b: rank.noise(s, D.shape, variance, b), size=size)

        wanted = choose if self.rule.is_open else self.rank
        found = svd.truncate(D, wanted, seed, quality=self._quality, cap=self.rank, total=total)
        keep = len(found.factors.sigma)
        up, down = found.factors.balanced(keep)
        emit_factors(self.outs, up, down, emit)
        residual = found.residual
        if torch.finfo(narrow).bits < 32:  # rounding the factors costs something
            residual = svd.squared_error(D, up.to(narrow), down.to(narrow), total)
        facts = {"total": total, "residual": residual, "rank": keep, "sigma": found.sigma.tolist()}
        return facts | {"excess": found.excess, "noise": variance * prod(D.shape)}

    def _difference(self, load: Load) -> svd.Panels:
        """Return D (out, in x kernel): held in memory, or read anew in panels for every product."""
        import torch

        from loratool.algebra import svd

        wide = torch.float64 if "F64" in (self.tuned.dtype, self.base.dtype) else torch.float32

        def panel(start: int, stop: int) -> torch.Tensor:
            difference: torch.Tensor | None = None  # in tiles: whole weights in fp32 would be two more of its size
            for a, b in self.tuned.rows(start, stop).panels(TILE):
                tuned = load(self.tuned.rows(start + a, start + b)).flatten(1).to(wide)
                base = load(self.base.rows(start + a, start + b)).flatten(1).to(wide)
                if difference is None:
                    difference = tuned.new_empty(stop - start, tuned.shape[1])
                torch.sub(tuned, base, out=difference[a:b])
            assert difference is not None
            return difference

        stored = self.tuned.shape[0], prod(self.tuned.shape[1:])
        if self.streamed:
            cuts = self.tuned.panels(PANEL)
            return svd.Panels(lambda: ((a, b, panel(a, b)) for a, b in cuts), stored, transposed=self.transposed)
        whole = panel(0, stored[0])
        return svd.Panels(lambda: [(0, stored[0], whole)], stored, transposed=self.transposed)


def _rounding(ref: TensorRef, load: Load) -> float:
    """Return the mean square error of a weight's own rounding, judged by tiles spread over it where it is large."""
    import torch

    from loratool.algebra import rank

    dtype = getattr(torch, dtypes.torch_name(ref.dtype))
    panels = ref.panels(TILE)
    step = max(1, prod(ref.shape) // _SAMPLE)
    some = [(b - a, rank.rounding_variance(load(ref.rows(a, b)), dtype)) for a, b in panels[::step]]
    return sum(n * v for n, v in some) / sum(n for n, _ in some)


Pairs = dict[Target, tuple[Place, Place]]
Deltas = dict[Target, tuple[Delta, ...]]


def plan(
    tuned: TensorSource,
    base: TensorSource,
    architecture: Architecture,
    rule: Rule,
    format: Format,
    *,
    dtype: str = "float32",
    rest: str = "error",
    target: Sequence[str] = (),
    exclude: Sequence[str] = (),
    quality: str = "balanced",
    pad_rank: int | str | None = None,
    allow_noop: bool = False,
    memory: int = 2 << 30,
    options: Mapping[str, Any],
) -> Plan:
    """Plan the extraction of `tuned - base`, at ranks that `rule` chooses, into an adapter written in `format`.

    `rest` says what to do where something that is no LoRA delta changed: "error", "skip" or "save". `memory` (bytes)
    decides which deltas are read in panels.
    """
    sizes.check_pad(pad_rank, rule.budget)
    if rest == "save":
        extracted.require_equal_ties(tuned, base, architecture)
    pairs, others, resized = _pair(tuned, base, architecture, allow_resized=rest != "error")
    chosen = _choose(pairs, target, exclude, tuned.path)
    rule.require_patterns_used(chosen, tuned.path)
    report = Report(verb="extract", totals={"family": architecture.name})
    layers = {place.tensor: t for t, (place, _) in pairs.items()}
    savable = {new.name: new for new, _ in others} if rest == "save" else {}
    for t in _tied(chosen, pairs, tuned, architecture):
        savable |= {chosen[t][0].tensor: chosen[t][0].stored} if rest == "save" else {}
        del chosen[t]  # an adapter would change one of the two uses only; what changed is judged with the rest
        report.findings.append(Finding("info", str(t), "not extracted: its weight is tied to another layer's"))
    report.findings += _vocabularies(resized, rest)
    modules = _extract_units(chosen, rule, dtype, memory, quality)
    others += [_alike(new, old) for t, (new, old) in pairs.items() if t not in chosen]
    remaining = rest_units(others, rest)
    report.totals["modules"] = len(modules)
    report.rows = [_row(u, pairs[u.target][0].role) for u in modules]
    report.findings += extracted.full_rank(rule, modules)
    units: tuple[Unit, ...] = (*remaining, *modules)
    lost = _unpaired(base, units)
    report.findings += [_lost(base.tensors[name]) for name in lost]

    def settle(facts: Mapping[str, Facts], spooled: Spooled) -> Settled:
        saved, left_out = judge(remaining, facts, report, Savable(savable, tuned, architecture, layers))
        changed = [u for u in modules if not facts[u.key].get("same")]
        if not changed:
            report.findings += _nothing_changed(tuned.path, allowed=allow_noop or bool(saved))
        found = [facts[u.key] for u in changed]
        # not the config's _name_or_path: that is where the base itself once came from
        adapter = Adapter({}, Origin("", tuned.path), base_model=base.path)

        def spelled(ranks: Sequence[int], into: Report) -> tuple[OutFile, ...]:
            pairs_at = zip(changed, ranks, strict=True)
            new: dict[Target, Delta] = {u.target: settled_factors(u.outs, r, spooled) for u, r in pairs_at}
            new, into.totals["padded_to"] = sizes.settled(new, pad_rank)
            deltas: Deltas = (
                {t: (d,) for t, d in new.items()} if changed else {u.target: (_nothing(u),) for u in modules}
            )
            deltas |= _unchanged_experts(pairs, modules, deltas, architecture)
            return spell(replace(adapter, deltas=joined_deltas(deltas, saved)), architecture, format, options, into)

        ranks = [int(f["rank"]) for f in found]
        if rule.budget is not None and changed:
            sized = [_sized(u, f, architecture, format) for u, f in zip(changed, found, strict=True)]
            ranks = sizes.fitted(sized, rule.budget, lambda r: spelled(r, Report("extract")))
        described = dict(zip((u.key for u in changed), zip(found, ranks, strict=True), strict=True))
        extracted.describe(report, modules, described, left_out)
        report.findings += extracted.too_little(found, ranks, rule, modules, MAX_RANK)
        files = spelled(ranks, report)
        report.totals["file_bytes"] = sizes.size_of(files)
        return Settled(report, files)

    inputs = Input(tuned.path, tuned.tensors), Input(base.path, base.tensors, dict.fromkeys(lost, "only in the base"))
    return Plan(units, report, settle, (), format.single_file or "file" in options, inputs)


def _tied(chosen: Pairs, pairs: Pairs, tuned: TensorSource, architecture: Architecture) -> list[Target]:
    """Return the chosen matrices that share their values with another layer."""
    known = {t: new for t, (new, _) in pairs.items()}
    return [t for t in chosen if tied_partner(t.parts[0], t.component, tuned, architecture, known)]


def _row(unit: ExtractModule, role: str) -> dict[str, Any]:
    return {"module": unit.key, "role": role, "shape": list(unit.tuned.shape), "rank_at_most": unit.rank}


def _vocabularies(resized: Mapping[str, tuple[int, int]], rest: str) -> list[Finding]:
    findings = []
    for name, (now, before) in resized.items():
        what = f"has another vocabulary than the base's ({before} rows, now {now}): it is kept whole or left out"
        hint = f"resize_token_embeddings({now}) before PEFT loads this adapter" if rest == "save" else ""
        findings.append(Finding("warning", name, what, hint))
    return findings


def _unpaired(base: TensorSource, units: Sequence[Unit]) -> list[str]:
    """Return the tensors of the base that nothing of the tuned model is compared with."""
    paired = {name for unit in units for ref in unit.reads for name in ref.name.split("+")}
    return [name for name in base.tensors if name not in paired]


def _nothing_changed(where: str, *, allowed: bool) -> list[Finding]:
    if not allowed:
        what, hint = "the two models are equal: there is nothing to extract", "--allow-noop writes an adapter of zeros"
        raise InputError(what, where=where, hint=hint)
    return [Finding("warning", where, "no weight changed: the factors are zeros")]


def _lost(ref: TensorRef) -> Finding:
    """A buffer that newer libraries no longer save is worth a note, a lost weight a warning."""
    level = "warning" if dtypes.is_float(ref.dtype) else "info"
    return Finding(level, ref.name, "is only in the base: the adapter cannot say so")


def _sized(unit: ExtractModule, fact: Facts, architecture: Architecture, format: Format) -> Sized:
    sigma = tuple(fact["sigma"][: fact["rank"]])
    beyond = max(fact["total"] - sum(s * s for s in sigma), 0.0)
    group = sizes.group_of(unit.target, None, architecture, format.name)
    return Sized(unit.target, sigma, cost_of(unit.shape, unit.dtype), beyond, group)


def _nothing(unit: ExtractModule) -> LowRank:
    down, up = unit.outs
    factors = (
        zeros("", (1, *down.shape[1:]), down.dtype),
        zeros("", (up.shape[1], 1, *up.shape[2:]), up.dtype),
    )
    return LowRank(*factors, 1.0)


def _unchanged_experts(
    pairs: Pairs, modules: Sequence[ExtractModule], deltas: Deltas, architecture: Architecture
) -> Deltas:
    """Return deltas of zero for the other experts of a stack: a format may have to write the stack as a whole."""

    def stack(target: Target) -> str:
        slot = architecture.slot(target.component, target.parts[0])
        return slot.parameter if slot else ""

    units = {stack(unit.target): unit for unit in modules if unit.target in deltas}
    stacks = {t: stack(t) for t in pairs if t not in deltas}
    return {t: (_nothing(units[name]),) for t, name in stacks.items() if name and name in units}


def _extract_units(chosen: Pairs, rule: Rule, dtype: str, memory: int, quality: str) -> list[ExtractModule]:
    """Return a unit for each pair; those whose delta does not fit into `memory` read it in panels."""
    units = []
    for t, (new, old) in chosen.items():
        one, two = _alike(new, old)
        stored = one.dtype if dtype == "keep" else dtypes.from_torch_name(dtype)
        held = ExtractModule(t, one, two, new.transposed, rule.of(t), 0, stored, streamed=False, quality=quality)
        units.append(held)
    cost = sum(cost_of(u.shape, u.dtype) for u in units)
    bounded = []
    for u in units:
        rank = u.rule.bound(min(u.shape[0], prod(u.shape[1:])))
        if u.rule.adapts and u.rule.max_rank is None:
            rank = min(rank, MAX_RANK)
        if u.rule.budget is not None:  # four times what all would have if all had the same
            rank = min(rank, max(8, 4 * u.rule.budget // cost))
        ranked = replace(u, rank=rank)
        bounded.append(ranked if ranked.scratch <= memory else replace(ranked, streamed=True))
    return bounded


def _pair(
    tuned: TensorSource, base: TensorSource, architecture: Architecture, *, allow_resized: bool
) -> tuple[Pairs, list[Pair], dict[str, tuple[int, int]]]:
    """Pair the matrices of both checkpoints, however each spells, fuses or stacks them, and the rest by name.

    Raises where they do not belong together. Where only a vocabulary differs, and that is allowed, its matrices are
    among the rest; their numbers of rows in both models come third.
    """
    new, old = places(tuned, architecture), places(base, architecture)
    pairs: Pairs = {}
    layers: set[str] = set()  # tensors of the tuned model that are paired as matrices
    problems: list[str] = []
    others: list[Pair] = []
    resized: dict[str, tuple[int, int]] = {}
    for target in dict.fromkeys(t for part in [*new, *old] for t in (_whole(part), part)):
        if _whole(target) in pairs:  # as a part of a fused weight, which is the module that an adapter is for
            continue
        sides = [
            side.get(target) or stitched(target.parts[0], target.component, side, architecture, config or {})
            for side, config in ((new, tuned.config), (old, base.config))
        ]
        if sides[0] is None or sides[1] is None:
            continue
        mine, place = sides[0], sides[1]
        layers.update(mine.tensor.split("+"))
        if _is_resized(mine, place):
            resized[mine.tensor] = mine.shape[0], place.shape[0]
            others.append((mine.ref, place.ref))
            if allow_resized:
                continue
        pairs[target] = mine, place
        if _shape(mine) != _shape(place):
            shapes = f"{list(mine.shape)} in the tuned model, {list(place.shape)} in the base"
            problems.append(f"{target}: {shapes}")
    found = {*pairs, *(t for t, place in new.items() if place.tensor in resized)}
    problems += [f"{t}: only in the base" for t in old if t not in found and _whole(t) not in found]
    matrices = {place.tensor for place in old.values()}
    by_name = {bare_name(n, architecture): ref for n, ref in base.tensors.items() if n not in matrices}
    for name, ref in tuned.tensors.items():
        if name in layers:
            continue
        other = by_name.get(bare_name(name, architecture))
        others.append((ref, other))
        of_vocabulary = f"{name.rpartition('.')[0]}.weight" in resized and len(ref.shape) == 1
        if other is not None and other.shape != ref.shape and not (of_vocabulary and allow_resized):
            problems.append(f"{name}: {list(ref.shape)} in the tuned model, {list(other.shape)} in the base")
    if not pairs:
        problems.append("no layer in common")
    if problems:
        more = [f"... and {len(problems) - 12} more"] if len(problems) > 12 else []
        raise MismatchError(
            "\n  ".join([f"the two models do not belong together ({len(problems)} tensors)", *problems[:12], *more]),
            where=f"{tuned.path} against {base.path}",
            hint="--rest save keeps the resized vocabulary whole, --rest skip leaves it out"
            if resized and len(problems) <= len(resized)
            else "the base must be the model that the fine-tune started from",
        )
    return pairs, others, resized


def _is_resized(new: Place, old: Place) -> bool:
    """Whether two matrices differ in the number of their entries only, and are such that a vocabulary counts."""
    of_words = new.layer.kind == "embedding" or new.layer.group in ("embedding", "head")
    same = new.transposed == old.transposed and new.shape[1:] == old.shape[1:]
    return of_words and same and new.shape[0] != old.shape[0]


def _whole(target: Target) -> Target:
    """The fused weight that a target is a part of, or the target itself."""
    weight = target.parts[0].rpartition("[")[0]
    return Target(target.component, (weight,)) if weight else target


def _shape(place: Place) -> tuple[int, ...]:
    """The shape of a matrix as (out, in, ...), however it is stored."""
    return place.shape[::-1] if place.transposed else place.shape


def _alike(new: Place, old: Place) -> tuple[TensorRef, TensorRef]:
    """Return both matrices in the orientation in which the tuned model has them."""
    return new.ref, old.ref if new.transposed == old.transposed else old.ref.transposed()


def _choose(pairs: Pairs, target: Sequence[str], exclude: Sequence[str], where: str) -> Pairs:
    """Return the pairs that the user's globs select, of floating-point weights."""

    def hit(patterns: Sequence[str], t: Target) -> bool:
        return any(selects(p, part, t.component) for p in patterns for part in t.parts)

    for pattern in (*target, *exclude):
        if not any(hit([pattern], t) for t in pairs):
            raise MismatchError(f"no module matches {pattern!r}", where=where, hint="loratool arch show lists them")
    chosen = {
        t: pair
        for t, pair in sorted(pairs.items(), key=lambda x: x[0].sort_key)
        if (not target or hit(target, t)) and not hit(exclude, t)
    }
    for t, pair in chosen.items():
        for place in pair:
            if not dtypes.is_float(place.stored.dtype):
                raise InputError(f"a {place.stored.dtype} weight: quantised models are not supported yet", where=str(t))
    if not chosen:
        raise MismatchError("no module is left to extract", where=where)
    return chosen
