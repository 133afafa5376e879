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
from math import isfinite, prod, sqrt
from typing import TYPE_CHECKING

from loratool import dtypes
from loratool.adapter import Adapter, Finding, Origin, Target
from loratool.architecture import Architecture
from loratool.deltas import Delta, LowRank
from loratool.errors import InputError, MismatchError
from loratool.hookspecs import Format
from loratool.operations.matching import Place, bare_name, places, stitched, tied_partner
from loratool.operations.resize import Rule, emit_factors, settled_factors
from loratool.operations.writing import spell
from loratool.patterns import selects
from loratool.plan import Emit, Facts, Input, Load, Out, Plan, Report, Settled, Spooled, Unit
from loratool.tensors import TensorRef, TensorSource, zeros

if TYPE_CHECKING:
    import torch

    from loratool.algebra import svd

TILE = 1 << 20
PANEL = 64 << 20


@dataclass(frozen=True)
class ExtractModule:
    """The delta of one weight, truncated."""

    target: Target
    tuned: TensorRef
    base: TensorRef
    transposed: bool
    rank: int
    dtype: str
    streamed: bool

    @property
    def key(self) -> str:
        """The module."""
        return str(self.target)

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """Both weights."""
        return self.tuned, self.base

    @property
    def outs(self) -> tuple[Out, ...]:
        """Down and up, in the spool."""
        out, columns = self.tuned.shape[0], self.tuned.shape[1:]
        if self.transposed:
            out, columns = self.tuned.shape[1], self.tuned.shape[:1]
        rank = min(self.rank, out, prod(columns))
        ones = (1,) * (len(columns) - 1)
        down, up = (rank, *columns), (out, rank, *ones)
        return Out("", f"{self.key}.down", down, self.dtype), Out("", f"{self.key}.up", up, self.dtype)

    @property
    def scratch(self) -> int:
        """The delta (or one panel of it), a few tiles, the blocks, and a Gram where the block is near the whole."""
        rows, columns = self.tuned.shape[0], prod(self.tuned.shape[1:])
        held = PANEL // dtypes.itemsize(self.tuned.dtype) + 64 * columns if self.streamed else rows * columns
        block = self.rank + self.rank // 2 + 8
        return 8 * held + 64 * TILE + 48 * (rows + columns) * block + 16 * min(rows, columns, 3 * block) ** 2

    def run(self, load: Load, emit: Emit) -> Facts:
        """Subtract, factorise, measure, write."""
        import torch

        from loratool.algebra import svd

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
        rank = self.outs[0].shape[0]
        triplets = svd.truncated(D, rank, seed)
        up, down = (factor.to(narrow).double() for factor in triplets.balanced(rank))
        residual = total - float(triplets.sigma.square().sum())
        # multiply out where rounding the factors costs something, or the subtraction has lost its digits
        if narrow is not torch.float32 or residual < 1e-5 * total:
            residual = D.residual(up, down)
        emit_factors(self.outs, up, down, emit)
        return {"total": total, "residual": residual, "rank": rank, "sigma": triplets.sigma.tolist()}

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


@dataclass(frozen=True)
class CompareRest:
    """Tensors that are not extracted: are they the same in both checkpoints? With `refuse`, a change is an error."""

    pairs: tuple[tuple[TensorRef, TensorRef | None], ...]
    refuse: bool
    outs: tuple[Out, ...] = ()

    @property
    def key(self) -> str:
        """The first tensor's name."""
        return f"rest:{self.pairs[0][0].name}"

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """All of them."""
        return tuple(ref for pair in self.pairs for ref in pair if ref is not None)

    @property
    def scratch(self) -> int:
        """A few tiles in fp64."""
        return 32 * TILE

    def run(self, load: Load, emit: Emit) -> Facts:
        """Compare bytes; where they differ, measure the change."""
        changed: dict[str, float] = {}
        for tuned, base in self.pairs:
            total = _change(tuned, base, load)
            if total is not None:  # the experts of a stack have one name
                changed[tuned.name] = changed.get(tuned.name, 0.0) + total
        if changed and self.refuse:
            names = list(changed)
            listed = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            raise InputError(
                f"{len(names)} tensors changed that are not extracted: {listed}",
                hint="--rest skip leaves them out and says how much that is",
            )
        return {"changed": changed}


def _change(tuned: TensorRef, base: TensorRef | None, load: Load) -> float | None:
    """Return the squared norm of a tensor's change; None where nothing changed."""
    if base is not None and same_bytes(tuned, base, load):
        return None
    total = 0.0
    for start, stop in tuned.panels(TILE):
        new = load(tuned.rows(start, stop)).double()
        total += float((new - load(base.rows(start, stop)).double() if base else new).square().sum())
    if not isfinite(total):
        raise InputError("the tensor holds NaN or infinity", where=tuned.name)
    return total if total or base is None else None  # the same values in another dtype are no change


def same_bytes(one: TensorRef, two: TensorRef, load: Load) -> bool:
    """Whether two tensors are equal byte for byte; reads no further than the first panel that differs."""
    import torch

    if one.dtype != two.dtype:
        return False
    return all(
        torch.equal(load(one.rows(a, b)).view(torch.uint8), load(two.rows(a, b)).view(torch.uint8))
        for a, b in one.panels(TILE)
    )


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
    memory: int = 2 << 30,
    options: Mapping[str, str],
) -> Plan:
    """Plan the extraction of `tuned - base`, at rank `rule.rank`, into an adapter written in `format`.

    `rest` says what to do where something that is no LoRA delta changed: "error" or "skip". `memory` (bytes) decides
    which deltas are read in panels.
    """
    pairs, others = _pair(tuned, base, architecture)
    chosen = _choose(pairs, target, exclude, tuned.path)
    report = Report(verb="extract", totals={"family": architecture.name})
    known = {t: new for t, (new, _) in pairs.items()}
    for t in [t for t in chosen if tied_partner(t.parts[0], t.component, tuned, architecture, known)]:
        del chosen[t]  # an adapter would change one of the two uses only; what changed is judged with the rest
        report.findings.append(Finding("info", str(t), "not extracted: its weight is tied to another layer's"))
    modules = _extract_units(chosen, rule.rank or 1, dtype, memory)
    others += [_alike(new, old) for t, (new, old) in pairs.items() if t not in chosen]
    remaining = _rest_units(others, rest)
    report.totals["modules"] = len(modules)
    report.rows = [
        {"module": u.key, "role": pairs[u.target][0].role, "shape": list(u.tuned.shape), "rank": u.outs[0].shape[0]}
        for u in modules
    ]
    units: tuple[Unit, ...] = (*remaining, *modules)
    paired = {name for unit in units for ref in unit.reads for name in ref.name.split("+")}
    lost = [name for name in base.tensors if name not in paired]
    for name in lost:  # a buffer that newer libraries no longer save is worth a note, a lost weight a warning
        level = "warning" if dtypes.is_float(base.tensors[name].dtype) else "info"
        report.findings.append(Finding(level, name, "is only in the base: the adapter cannot say so"))

    def settle(facts: Mapping[str, Facts], spooled: Spooled) -> Settled:
        left_out = _judge_rest(remaining, facts, report)
        deltas: dict[Target, tuple[Delta, ...]] = {}
        for unit, row in zip(modules, report.rows, strict=True):
            fact = facts[unit.key]
            if fact.get("same"):
                row.update(unchanged=True)
                continue
            deltas[unit.target] = (settled_factors(unit.outs, fact["rank"], spooled),)
            row["norm"] = sqrt(fact["total"])
            row["retained"] = 1 - fact["residual"] / fact["total"]
            row["error"] = sqrt(fact["residual"] / fact["total"])
        deltas |= _unchanged_experts(pairs, modules, deltas, architecture)
        if not deltas:
            raise InputError("the two models are equal: there is nothing to extract", where=tuned.path)
        changed = [str(unit.target) for unit in modules if not facts[unit.key].get("same")]
        total = sum(facts[key]["total"] for key in changed)
        residual = sum(facts[key]["residual"] for key in changed)
        # not the config's _name_or_path: that is where the base itself once came from
        adapter = Adapter(deltas, Origin("", tuned.path), base_model=base.path)
        report.totals |= {
            "changed": len(changed),
            "retained": 1 - residual / total,
            "error": sqrt(residual / total),
            "norm": sqrt(total),
            "left_out": left_out / (left_out + total),
            "bytes": sum(ref.nbytes for ds in deltas.values() for d in ds for ref in d.refs),
        }
        return Settled(report, spell(adapter, architecture, format, options, report))

    inputs = Input(tuned.path, tuned.tensors), Input(base.path, base.tensors, dict.fromkeys(lost, "only in the base"))
    return Plan(units, report, settle, (), format.single_file or "file" in options, inputs)


def _unchanged_experts(
    pairs: Pairs, modules: Sequence[ExtractModule], deltas: Deltas, architecture: Architecture
) -> Deltas:
    """Return deltas of zero for the other experts of a stack: a format may have to write the stack as a whole."""

    def stack(target: Target) -> str:
        slot = architecture.slot(target.component, target.parts[0])
        return slot.parameter if slot else ""

    outs = {stack(unit.target): unit.outs for unit in modules if unit.target in deltas}
    nothing: Deltas = {}
    for target in (t for t in pairs if t not in deltas):
        name = stack(target)
        if name and name in outs:
            down, up = outs[name]
            factors = zeros("", (1, *down.shape[1:]), down.dtype), zeros("", (up.shape[0], 1), up.dtype)
            nothing[target] = (LowRank(*factors, 1.0),)
    return nothing


def _extract_units(chosen: Pairs, rank: int, dtype: str, memory: int) -> list[ExtractModule]:
    """Return a unit for each pair; those whose delta does not fit into `memory` read it in panels."""
    units = []
    for t, (new, old) in chosen.items():
        one, two = _alike(new, old)
        stored = one.dtype if dtype == "keep" else dtypes.from_torch_name(dtype)
        held = ExtractModule(t, one, two, new.transposed, rank, stored, streamed=False)
        units.append(held if held.scratch <= memory else replace(held, streamed=True))
    return units


def _rest_units(others: Sequence[tuple[TensorRef, TensorRef | None]], rest: str) -> list[CompareRest]:
    """Return the comparisons of what is not extracted: one unit, to run first, where a change is an error.

    Nobody should wait for every SVD to be told that a norm changed.
    """
    compared = tuple((_as_rows(new), _as_rows(old) if old else None) for new, old in others)
    if rest == "error":
        return [CompareRest(compared, refuse=True)] if compared else []
    named: dict[str, list[tuple[TensorRef, TensorRef | None]]] = {}
    for pair in compared:
        named.setdefault(pair[0].name, []).append(pair)
    return [CompareRest(tuple(pairs), refuse=False) for pairs in named.values()]


def _pair(
    tuned: TensorSource, base: TensorSource, architecture: Architecture
) -> tuple[Pairs, list[tuple[TensorRef, TensorRef | None]]]:
    """Pair the matrices of both checkpoints, however each spells, fuses or stacks them, and the rest by name.

    Raises where they do not belong together.
    """
    new, old = places(tuned, architecture), places(base, architecture)
    pairs: Pairs = {}
    layers: set[str] = set()  # tensors of the tuned model that are paired as matrices
    problems: list[str] = []
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
        pairs[target] = mine, place
        layers.update(mine.tensor.split("+"))
        if _shape(mine) != _shape(place):
            shapes = f"{list(mine.shape)} in the tuned model, {list(place.shape)} in the base"
            problems.append(f"{target}: {shapes}")
    problems += [f"{t}: only in the base" for t in old if t not in pairs and _whole(t) not in pairs]
    matrices = {place.tensor for place in old.values()}
    by_name = {bare_name(n, architecture): ref for n, ref in base.tensors.items() if n not in matrices}
    others = []
    for name, ref in tuned.tensors.items():
        if name in layers:
            continue
        other = by_name.get(bare_name(name, architecture))
        others.append((ref, other))
        if other is not None and other.shape != ref.shape:
            problems.append(f"{name}: {list(ref.shape)} in the tuned model, {list(other.shape)} in the base")
    if not pairs:
        problems.append("no layer in common")
    if problems:
        more = [f"... and {len(problems) - 12} more"] if len(problems) > 12 else []
        raise MismatchError(
            "\n  ".join([f"the two models do not belong together ({len(problems)} tensors)", *problems[:12], *more]),
            where=f"{tuned.path} against {base.path}",
            hint="the base must be the model that the fine-tune started from",
        )
    return pairs, others


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


def _judge_rest(remaining: Sequence[CompareRest], facts: Mapping[str, Facts], report: Report) -> float:
    """Return the squared change that the adapter leaves out, and name the tensors in the report."""
    changed: dict[str, float] = {}
    for unit in remaining:
        changed |= facts[unit.key]["changed"]
    if changed:
        names = list(changed)
        listed = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        what = f"{len(names)} changed tensors are not in the adapter: {listed}"
        report.findings.append(Finding("warning", "--rest skip", what))
        report.totals["skipped_tensors"] = names
    return sum(changed.values())


def _as_rows(ref: TensorRef) -> TensorRef:
    """A vector as one row, so that it can be read in panels."""
    return ref if len(ref.shape) > 1 else replace(ref, shape=(1, prod(ref.shape)))
