"""inspect MODEL --check --base BASE: did a merge change anything? Tensor by tensor, each read until it differs.

Tensors are paired by name, however either file is sharded and whatever prefix it has; matrices that one of the two
spells, fuses or stacks otherwise are paired as the family places them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

from loratool import dtypes
from loratool.adapter import Finding
from loratool.architecture import Architecture
from loratool.errors import MismatchError
from loratool.operations.extract import same_bytes
from loratool.operations.matching import places, stitched
from loratool.operations.meanings import Meanings
from loratool.plan import Emit, Facts, Load, Out, Plan, Report, Settled, Spooled
from loratool.tensors import TensorRef, TensorSource

TILE = 1 << 20


@dataclass(frozen=True)
class SameTensor:
    """Whether two tensors are equal: byte for byte, or as numbers in the narrower dtype where the dtypes differ."""

    name: str
    one: TensorRef
    two: TensorRef
    outs: tuple[Out, ...] = ()

    @property
    def key(self) -> str:
        """The tensor."""
        return self.name

    @property
    def reads(self) -> tuple[TensorRef, ...]:
        """Both."""
        return self.one, self.two

    @property
    def scratch(self) -> int:
        """A tile of each, or all of what cannot be read in tiles."""
        return 8 * TILE + sum(ref.held for ref in self.reads if ref.view is not None)

    def run(self, load: Load, emit: Emit) -> Facts:
        """Compare up to the first tile that differs."""
        if self.one.dtype == self.two.dtype:
            return {"same": same_bytes(self.one, self.two, load)}
        return {"same": _same_numbers(self.one, self.two, load)}


def _same_numbers(one: TensorRef, two: TensorRef, load: Load) -> bool:
    import torch

    if not (dtypes.is_float(one.dtype) and dtypes.is_float(two.dtype)):
        return False
    narrow = getattr(torch, dtypes.torch_name(min(one.dtype, two.dtype, key=dtypes.itemsize)))
    return all(
        torch.equal(load(one.rows(a, b)).to(narrow), load(two.rows(a, b)).to(narrow)) for a, b in one.panels(TILE)
    )


def plan(model: TensorSource, base: TensorSource, architecture: Architecture) -> Plan:
    """Plan the comparison of a model with the base that it was made from; the report says what changed."""
    pairs, findings = _pair(model, base, architecture)
    alike = {name: (new, old) for name, (new, old) in pairs.items() if new.shape == old.shape}
    units = tuple(SameTensor(name, _as_rows(new), _as_rows(old)) for name, (new, old) in alike.items())
    report = Report(
        verb="inspect",
        totals={"family": architecture.name, "tensors": len(pairs)},
        rows=[{"module": name, "shape": list(new.shape), "dtype": new.dtype} for name, (new, _) in pairs.items()],
        findings=findings,
    )

    def settle(facts: Mapping[str, Facts], spooled: Spooled) -> Settled:
        for row in report.rows:
            row["changed"] = not facts.get(row["module"], {"same": False})["same"]
        changed = sum(row["changed"] for row in report.rows)
        report.totals["changed"] = changed
        report.findings.append(_verdict(changed, len(pairs), model.path, new=bool(findings)))
        return Settled(report)

    return Plan(units, report, settle)


def _verdict(changed: int, count: int, where: str, *, new: bool) -> Finding:
    """Say whether the model is its base. What only one of the two has may be what changed, such as an untied head."""
    if changed:
        return Finding("info", where, f"{changed} of {count} tensors differ from the base")
    what = f"0 of {count} tensors differ"
    if new:
        return Finding("warning", where, f"{what}: if anything changed, it is what only one of the two models has")
    hint = "merge it again: loratool merge BASE ADAPTER -o OUT refuses an adapter that does not fit or does nothing"
    return Finding("error", where, f"this model is equal to its base: the merge changed nothing ({what})", hint)


Pairs = dict[str, tuple[TensorRef, TensorRef]]


def _pair(model: TensorSource, base: TensorSource, architecture: Architecture) -> tuple[Pairs, list[Finding]]:
    """Pair tensors by name, the rest as the family places them; findings name what only one of the two has."""
    mine, theirs = Meanings(model, architecture), Meanings(base, architecture)
    pairs: Pairs = {}
    left, alone = set(base.tensors), []
    for name in model.tensors:
        found = mine.counterparts(name, theirs)
        names = [name] if len(found) == 1 else [bare for bare, _ in mine.parts(name)]
        pairs |= dict(zip(names, found, strict=True)) if found else {}
        left -= {other.name for _, other in found}
        alone += [] if found else [name]
    if left and alone:
        placed = list(_placed(model, base, architecture, set(alone), left))
        pairs |= {name: (new, old) for name, new, old, _ in placed}
        used = {name for _, _, _, names in placed for name in names}
        left, alone = left - used, [name for name in alone if name not in used]
    if not pairs:
        raise MismatchError(
            "the two models have no tensor in common",
            where=f"{model.path} against {base.path}",
            hint="is this the base?",
        )
    findings = [Finding("info", name, "is only in the model") for name in alone]
    findings += [Finding("info", name, "is only in the base") for name in sorted(left)]
    return pairs, findings


def _placed(
    model: TensorSource, base: TensorSource, architecture: Architecture, alone: set[str], left: set[str]
) -> Iterator[tuple[str, TensorRef, TensorRef, set[str]]]:
    """Yield the matrices that the two files spell, fuse or stack differently, and the tensors they lie in."""
    new, old = places(model, architecture), places(base, architecture)
    for target in dict.fromkeys([*new, *old]):
        sides = [
            side.get(target) or stitched(target.parts[0], target.component, side, architecture, source.config or {})
            for side, source in ((new, model), (old, base))
        ]
        one, two = sides
        if one is None or two is None:
            continue
        names = {*one.tensor.split("+"), *two.tensor.split("+")}
        if names <= alone | left:
            old_ref = two.ref if one.transposed == two.transposed else two.ref.transposed()
            yield str(target), one.ref, old_ref, names


def _as_rows(ref: TensorRef) -> TensorRef:
    """A vector or a number as one row, so that it can be read in panels."""
    return ref if len(ref.shape) > 1 else replace(ref, shape=(1, prod(ref.shape)))
