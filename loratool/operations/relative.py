"""--relative-to: updates measured against the base weights that they change (`fro_ckpt` of elias-gaeros' resize_lora).

An update of norm 1 is much for a weight of norm 10 and nothing for one of norm 1000. Relative to the base, errors of
different modules are comparable, and a singular value can be compared with a threshold that is one for all modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, prod, sqrt

from loratool import dtypes
from loratool.adapter import Target
from loratool.architecture import Architecture
from loratool.errors import InputError, MismatchError, UsageError
from loratool.operations.matching import places, resolve
from loratool.operations.ranks import OF_THE_BASE, Rule
from loratool.plan import Facts, Load
from loratool.tensors import TensorRef, TensorSource

_TILE = 1 << 20


def require_use(rule: Rule, *, curve: bool = False) -> None:
    """Raise UsageError where no rule was given that a base changes."""
    if not curve and rule.budget is None and all(getattr(rule, name) is None for name in OF_THE_BASE):
        what = "--relative-to changes none of these rules"
        raise UsageError(what, hint="it is for --budget, --error, --ratio and --curve")


def weights_of(
    base: TensorSource | None, architecture: Architecture | None, shapes: Mapping[Target, tuple[int, ...]]
) -> dict[Target, tuple[TensorRef, ...]]:
    """Return the base's weights that targets of these shapes update: of each its parts, in any order and orientation.

    MismatchError lists the targets that the base lacks, or has in another size.
    """
    if base is None or architecture is None:
        return dict.fromkeys(shapes, ())
    known = places(base, architecture)
    found: dict[Target, tuple[TensorRef, ...]] = {}
    problems = []
    for target, shape in shapes.items():
        refs = tuple(s.place.ref for s in resolve(target, known, architecture, base.config or {}))
        held = sum(prod(ref.shape) for ref in refs)
        if not refs:
            problems.append(f"{target}: the base has no such module")
        elif held != prod(shape):
            problems.append(f"{target}: the base's weight has {held:,} elements, the update {prod(shape):,}")
        elif not all(dtypes.is_float(ref.dtype) for ref in refs):
            problems.append(f"{target}: a {refs[0].dtype} weight, quantised in a way that loratool does not know")
        found[target] = refs
    if problems:
        more = [f"... and {len(problems) - 12} more"] if len(problems) > 12 else []
        what = f"{len(problems)} modules cannot be measured against this base (--relative-to)"
        raise MismatchError("\n  ".join([what, *problems[:12], *more]), where=base.path, hint="is it the right base?")
    return found


def norm(refs: Sequence[TensorRef], load: Load, where: str) -> float:
    """Return the Frobenius norm of a weight, read in tiles and summed in fp64; 0 where there is none."""
    squares = (load(ref.rows(a, b)).double().square().sum() for ref in refs for a, b in ref.panels(_TILE))
    total = sum(float(square) for square in squares)
    if refs and not (isfinite(total) and total):
        what = "zero" if not total else "not finite"
        raise InputError(f"the norm of the base's weight is {what}: nothing is relative to it", where=where)
    return sqrt(total)


def weight_of(fact: Facts) -> float:
    """Return what makes the squared errors of a module comparable with those of others."""
    return 1 / fact["base_norm"] ** 2 if fact.get("base_norm") else 1.0


def told(facts: Sequence[Facts], residuals: Sequence[float]) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Return what a report says of errors relative to the base: of each module, and of all; nothing without a base.

    `weighted_error` is what a budget makes least: the root of the sum of all squared errors, each over |W|^2, relative
    to that of the updates.
    """
    if not facts or not all(fact.get("base_norm") for fact in facts):
        return [{} for _ in facts], {}
    rows = [{"error_of_base": sqrt(r) / f["base_norm"]} for f, r in zip(facts, residuals, strict=True)]
    whole = sum(f["total"] * weight_of(f) for f in facts)
    left = sum(r * weight_of(f) for f, r in zip(facts, residuals, strict=True))
    return rows, {"weighted_error": sqrt(left / whole) if whole else 0.0}
