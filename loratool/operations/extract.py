"""extract: the low-rank delta of a full fine-tune, D = tuned - base in fp32, by truncated SVD.

Weights whose bytes are equal are found first and skipped. The residual |D - up @ down| is exact: it follows from the
captured energy, and is measured directly where that difference would lose its digits. A weight whose delta does not
fit in memory is read in panels, once a pass. What is not low-rank (norms, biases, unknown tensors) is the *rest*:
every changed tensor of it is named, and leaving it out needs a flag.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, prod
from typing import TYPE_CHECKING, Any

from loratool import dtypes
from loratool.adapter import Adapter, Finding, Origin, Target
from loratool.architecture import Architecture
from loratool.deltas import Delta, LowRank
from loratool.errors import InputError
from loratool.hookspecs import Format
from loratool.operations import extracted, relative, sizes
from loratool.operations.matching import tied_partner
from loratool.operations.pairing import (
    Paired,
    Pairs,
    alike,
    apart,
    choose,
    comparable,
    hit,
    in_parts,
    joined_parts,
    of_words,
    pair,
    shape_in_file,
    shares_ties,
)
from loratool.operations.ranks import AUTO, Rule
from loratool.operations.recompress import emit_factors, factor_outs, settled_factors
from loratool.operations.refinement import fused_in
from loratool.operations.remainder import TILE, CompareRest, Savable, judge, rest_units, same_bytes
from loratool.operations.resize import cost_of, joined_deltas
from loratool.operations.sizes import Sized
from loratool.operations.writing import spell
from loratool.plan import Emit, Facts, Input, Load, Out, OutFile, Plan, Report, Settled, Spooled, Unit, seed_of
from loratool.storage.location import name_in_configs
from loratool.tensors import TensorRef, TensorSource, zeros

if TYPE_CHECKING:
    import torch

    from loratool.algebra import svd

__all__ = ["CompareRest", "ExtractModule", "plan", "same_bytes"]

PANEL = 64 << 20
MAX_RANK = 512  # of rules that adapt, where nobody says another: factors that large are hardly smaller than the weight
_SAMPLE = 1 << 20  # elements of a weight that its rounding is judged by


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
    against: tuple[TensorRef, ...] = ()

    @property
    def key(self) -> str:
        """The module."""
        return str(self.target)

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """Both weights, and those that the update is measured against."""
        return self.tuned, self.base, *self.against

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

        from loratool.algebra import noise, svd

        narrow = getattr(torch, dtypes.torch_name(self.dtype))
        if same_bytes(self.tuned, self.base, load):
            return {"same": True}
        D = self._difference(load)
        total = D.squared_norm()
        if total == 0:  # the same values in another dtype
            return {"same": True}
        if not isfinite(total):
            raise InputError("the weights hold NaN or infinity", where=self.tuned.name)
        seed = seed_of(0, self.key)
        rows, columns = self._rounding(load)
        variance, size = float(rows.mean()) / len(columns), min(D.shape)
        base_norm = relative.norm(self.against, load, self.key)

        def choose(sigma: torch.Tensor, beyond: float | None) -> int:
            return self.rule.choose(
                sigma,
                beyond,
                auto=lambda s, b: noise.outstanding(s, rows, columns, b),
                size=size,
                base_norm=base_norm,
            )

        wanted = choose if self.rule.is_open else self.rank
        found = svd.truncate(D, wanted, seed, quality=self._quality, cap=self.rank, total=total)
        keep = len(found.factors.sigma)
        up, down = found.factors.balanced(keep)
        emit_factors(self.outs, up, down, emit)
        residual = found.residual
        if torch.finfo(narrow).bits < 32:  # rounding the factors costs something
            residual = svd.squared_error(D, up.to(narrow), down.to(narrow), total)
        facts = {"total": total, "residual": residual, "rank": keep, "sigma": found.sigma.tolist()}
        return facts | {"base_norm": base_norm, "excess": found.excess, "noise": variance * prod(D.shape)}

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
        cuts = self.tuned.panels(PANEL) if self.streamed else ()
        return svd.Panels.read(panel, stored, cuts, transposed=self.transposed)

    def _rounding(self, load: Load) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the variances of both weights' own rounding, summed over each row and over each column.

        Where no rank depends on it, a large weight is judged by tiles spread over it: of some rows, then.
        """
        import torch

        from loratool.algebra import noise

        step = 1 if self.rule.rank == AUTO else max(1, prod(self.tuned.shape) // _SAMPLE)
        kinds = [(ref, getattr(torch, dtypes.torch_name(ref.dtype))) for ref in (self.tuned, self.base)]
        sums = []
        for a, b in self.tuned.panels(TILE // 8)[::step]:
            one, other = (noise.rounding_variance(load(ref.rows(a, b)).flatten(1), dtype) for ref, dtype in kinds)
            sums.append((one.add_(other).sum(1).cpu(), one.sum(0).cpu()))
        return torch.cat([rows for rows, _ in sums]), torch.stack([columns for _, columns in sums]).sum(0)


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
    split: bool = False,
    quality: str = "balanced",
    pad_rank: int | str | None = None,
    relative_to: TensorSource | None = None,
    allow_noop: bool = False,
    memory: int = 2 << 30,
    options: Mapping[str, Any],
) -> Plan:
    """Plan the extraction of `tuned - base`, at ranks that `rule` chooses, into an adapter written in `format`.

    `rest` says what to do where something that is no LoRA delta changed: "error", "skip" or "save". With `split` each
    part of a fused weight gets a delta. `memory` (bytes) decides which deltas are read in panels. Errors are measured
    against the weights of `relative_to`.
    """
    sizes.check_pad(pad_rank, rule.budget)
    if relative_to is not None:
        relative.require_use(rule)
    tuned, base, beside = comparable(tuned, base, architecture)
    tuned, base, half_tied = apart(tuned, base, architecture)
    paired = pair(tuned, base, architecture, allow_resized=rest != "error")
    if split:
        tuned = replace(tuned, config=tuned.config or base.config)
        paired = paired._replace(matrices=in_parts(paired.matrices, architecture, tuned.config or {}))
    selected = choose(paired.matrices, target, exclude, tuned.path)
    rule.require_patterns_used(selected, tuned.path)
    report = Report(verb="extract", totals={"family": architecture.name})
    chosen, report.findings = _low_rank(selected, paired, tuned, architecture, half_tied if rest == "save" else ())
    report.findings += beside + _vocabularies(paired, tuned, rest) + _half_tied(half_tied, base, rest)
    modules = _extract_units(chosen, rule, dtype, memory, quality)
    yardsticks = relative.weights_of(relative_to, architecture, {u.target: u.shape for u in modules})
    modules = [replace(u, against=yardsticks[u.target]) for u in modules]
    others = [*paired.others, *(alike(new, old) for t, (new, old) in paired.matrices.items() if t not in chosen)]
    remaining = rest_units(others, rest, differences=getattr(format, "differences", False))
    report.totals["modules"] = len(modules)
    report.rows = [_row(u, paired.matrices[u.target][0].role) for u in modules]
    report.findings += extracted.full_rank(rule, modules)
    units: tuple[Unit, ...] = (*remaining, *modules)
    lost = _unpaired(base, units)
    report.findings += [_lost(base.tensors[name]) for name in lost]
    ending = _Ending(
        modules,
        remaining,
        _savable(paired, chosen, tuned, architecture, half_tied=half_tied, patterns=target if rest == "save" else None),
        paired.matrices,
        rule,
        pad_rank,
        allow_noop,
        # not the config's _name_or_path: that is where the base itself once came from
        Adapter(
            {},
            Origin("", tuned.path),
            base_model=name_in_configs(base.path),
            shares_ties=shares_ties(tuned, architecture),
        ),
        (architecture, format, options),
        report,
    )
    inputs = Input(tuned.path, tuned.tensors), Input(base.path, base.tensors, dict.fromkeys(lost, "only in the base"))
    return Plan(units, report, ending.settle, (), format.single_file or "file" in options, inputs)


@dataclass(frozen=True)
class _Ending:
    """How an extraction ends: the rest judged, the ranks settled, everything written and told. `out` is where to."""

    modules: Sequence[ExtractModule]
    remaining: Sequence[CompareRest]
    savable: Savable
    pairs: Pairs
    rule: Rule
    pad_rank: int | str | None
    allow_noop: bool
    adapter: Adapter
    out: tuple[Architecture, Format, Mapping[str, Any]]
    report: Report

    def settle(self, facts: Mapping[str, Facts], spooled: Spooled) -> Settled:
        """Write what the units found."""
        report, (architecture, format, _) = self.report, self.out
        changed = [u for u in self.modules if not facts[u.key].get("same")]
        names = [self.pairs[u.target][0].tensor for u in changed] if format.name == "peft" else None
        saved, left_out = judge(self.remaining, facts, report, self.savable, spooled, extracted=names)
        if not changed:
            report.findings += _nothing_changed(self.adapter.origin.path, allowed=self.allow_noop or bool(saved))
        found = [facts[u.key] for u in changed]
        ranks = [int(f["rank"]) for f in found]

        def spelled(ranks: Sequence[int], into: Report) -> tuple[OutFile, ...]:
            new = {u.target: settled_factors(u.outs, r, spooled) for u, r in zip(changed, ranks, strict=True)}
            return self._spelled(new, saved, into)

        if self.rule.budget is not None and changed:
            sized = [_sized(u, f, self.pairs, architecture, format) for u, f in zip(changed, found, strict=True)]
            ranks = sizes.fitted(sized, self.rule.budget, lambda r: spelled(r, Report("extract")))
        described = dict(zip((u.key for u in changed), zip(found, ranks, strict=True), strict=True))
        extracted.describe(report, self.modules, described, left_out, self.pairs)
        report.findings += extracted.too_little(found, ranks, self.rule, self.modules, MAX_RANK)
        files = spelled(ranks, report)
        report.totals["file_bytes"] = sizes.size_of(files)
        return Settled(report, files)

    def _spelled(self, new: Mapping[Target, LowRank], saved: Deltas, into: Report) -> tuple[OutFile, ...]:
        """Return the files with these factors, or with zeros where nothing changed."""
        architecture, format, options = self.out
        new = new or {u.target: _nothing(u, u.shape[0]) for u in self.modules}
        new = joined_parts(new, self.pairs, architecture, self.savable.tuned.config or {})
        padded, into.totals["padded_to"] = sizes.settled(new, self.pad_rank)
        deltas: Deltas = {t: (d,) for t, d in padded.items()}
        deltas |= _unchanged_experts(self.pairs, self.modules, deltas, architecture)
        adapter = replace(self.adapter, deltas=joined_deltas(deltas, saved))
        return spell(adapter, architecture, format, options, into)


def _low_rank(
    chosen: Pairs, paired: Paired, tuned: TensorSource, architecture: Architecture, half_tied: Sequence[Target]
) -> tuple[Pairs, list[Finding]]:
    """Return the chosen matrices that an adapter can update by factors, and what to say of the others.

    One that shares its values with another layer it cannot: an adapter would change one of the two uses only.
    """
    known = {t: new for t, (new, _) in paired.matrices.items()}
    tied = [t for t in chosen if tied_partner(t.parts[0], t.component, tuned, architecture, known)]
    findings = [Finding("info", str(t), "not extracted: its weight is tied to another layer's") for t in tied]
    return {t: pair for t, pair in chosen.items() if t not in tied and t not in half_tied}, findings


def _savable(
    paired: Paired,
    chosen: Pairs,
    tuned: TensorSource,
    architecture: Architecture,
    *,
    half_tied: Sequence[Target],
    patterns: Sequence[str] | None,
) -> Savable:
    """Return what may be kept whole: what is no matrix, and of the modules that the user means heads and embeddings.

    Without `patterns` that is nothing.
    """
    matrices = paired.matrices
    layers = {place.tensor: t for t, (place, _) in matrices.items()}
    together = frozenset(matrices[t][0].tensor for t in half_tied if t in matrices)
    if patterns is None:
        return Savable({}, tuned, architecture, layers, together)
    spared = [t for t, (new, _) in matrices.items() if of_words(new) and t not in chosen]
    tensors = {new.name: new for new, _ in paired.others}
    tensors |= {matrices[t][0].tensor: matrices[t][0].stored for t in spared if not patterns or hit(patterns, t)}
    return Savable(tensors, tuned, architecture, layers, together)


def _half_tied(targets: Sequence[Target], base: TensorSource, rest: str) -> list[Finding]:
    """Say how a head is kept that is tied in one model and not in the other."""
    if not targets:
        return []
    names = " and ".join(map(str, targets))
    if rest == "save":
        what = "tied in one model and not in the other: if one changed, both are written, apart and whole"
        return [Finding("info", names, f"{what} (PEFT warns about ties when it loads this for a tied base)")]
    what = "tied in one model and not in the other: each has a delta of its own"
    hint = "loratool merge keeps them apart; PEFT's merge_and_unload of a tied base does not"
    return [Finding("warning", names, what, hint)]


def _row(unit: ExtractModule, role: str) -> dict[str, Any]:
    return {"module": unit.key, "role": role, "shape": list(unit.tuned.shape), "rank_at_most": unit.rank}


def _vocabularies(paired: Paired, tuned: TensorSource, rest: str) -> list[Finding]:
    findings = []
    for name, (now, before) in paired.resized.items():
        fate = f"kept whole ({tuned.tensors[name].nbytes:,} bytes)" if rest == "save" else "left out"
        what = f"has another vocabulary than the base's ({before} rows, now {now}): it is {fate}"
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


def _sized(unit: ExtractModule, fact: Facts, pairs: Pairs, architecture: Architecture, format: Format) -> Sized:
    sigma = tuple(fact["sigma"][: fact["rank"]])
    beyond = max(fact["total"] - sum(s * s for s in sigma), 0.0)
    group = sizes.group_of(fused_in(unit.target), None, architecture, format.name)
    cost = cost_of(shape_in_file(unit.target, unit.shape, pairs), unit.dtype)
    return Sized(unit.target, sigma, cost, beyond, group, relative.weight_of(fact))


def _nothing(unit: ExtractModule, out: int) -> LowRank:
    down, up = unit.outs
    factors = zeros("", (1, *down.shape[1:]), down.dtype), zeros("", (out, 1, *up.shape[2:]), up.dtype)
    return LowRank(*factors, 1.0)


def _unchanged_experts(
    pairs: Pairs, modules: Sequence[ExtractModule], deltas: Deltas, architecture: Architecture
) -> Deltas:
    """Return deltas of zero for the other experts of a stack: a format may have to write the stack as a whole."""

    def stack(target: Target) -> str:
        slot = architecture.slot(target.component, target.parts[0])
        return slot.parameter if slot else ""

    units = {stack(fused_in(unit.target)): unit for unit in modules if fused_in(unit.target) in deltas}
    stacks = {t: stack(t) for t in map(fused_in, pairs) if t not in deltas}
    found = {t: units[name] for t, name in stacks.items() if name and name in units}
    return {t: (_nothing(unit, shape_in_file(unit.target, unit.shape, pairs)[0]),) for t, unit in found.items()}


def _extract_units(chosen: Pairs, rule: Rule, dtype: str, memory: int, quality: str) -> list[ExtractModule]:
    """Return a unit for each pair; those whose delta does not fit into `memory` read it in panels."""
    units = []
    for t, (new, old) in chosen.items():
        one, two = alike(new, old)
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
