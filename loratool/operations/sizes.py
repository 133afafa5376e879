"""How large an adapter becomes: one budget for all modules, the curve of size against error, one rank for an engine.

Units spool their factors at the largest rank that their rule allows; here the rank of each is settled, and the files
are spelled and measured until they fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from loratool.adapter import Adapter, Target
from loratool.architecture import Architecture
from loratool.deltas import Delta, Dora, LowRank
from loratool.errors import InputError, UsageError
from loratool.plan import JsonFile, OutFile, TensorFile
from loratool.storage import jsonfile, safetensors
from loratool.tensors import joined, padded, zeros

ENGINE_RANKS = (8, 16, 32, 64, 128, 256)  # vLLM's max_lora_rank
_POINTS = 128


@dataclass(frozen=True)
class Sized:
    """What a module may cost: its singular values as far as it was factorised, and bytes a rank.

    `beyond` is the squared energy that no rank of these keeps; `group` names what must have one rank with others, such
    as the experts of a stack, or is empty. `weight` makes its error comparable with that of other modules.
    """

    target: Target
    sigma: tuple[float, ...]
    cost: int
    beyond: float = 0.0
    group: str = ""
    weight: float = 1.0


class _Groups(NamedTuple):
    """Modules that share a rank, as one each."""

    members: list[list[int]]
    spectra: list[Any]
    costs: list[int]
    beyond: list[float]


def fitted(modules: Sequence[Sized], budget: int, spelled: Callable[[Sequence[int]], tuple[OutFile, ...]]) -> list[int]:
    """Return the rank of every module, so that the files that `spelled(ranks)` makes take at most `budget` bytes.

    What is no factor (headers, other tensors, the config) is measured in files as they would be written, and a format
    that pads ranks is found out the same way.
    """
    from loratool.algebra.budget import allocate

    groups = _grouped(modules)
    ones = spread(groups, [1] * len(groups.members))
    size = size_of(spelled(ones))
    if size > budget:
        raise InputError(
            f"a budget of {budget:,} bytes is less than one rank for each of {len(modules)} modules takes",
            hint=f"the smallest possible is {size:,} bytes; --exclude leaves modules out",
        )
    overhead = size - sum(groups.costs)
    for _ in range(24):
        try:
            found = spread(groups, allocate(groups.spectra, groups.costs, budget, overhead=overhead))
        except InputError:
            break
        size = size_of(spelled(found))
        if size <= budget:
            return found
        overhead += size - budget
    return ones


def curve(modules: Sequence[Sized]) -> list[dict[str, float]]:
    """Return points of the best trade of bytes against relative error, from rank 1 everywhere to everything."""
    from loratool.algebra import budget

    groups = _grouped(modules)
    whole = budget.curve(groups.spectra, groups.costs, beyond=groups.beyond)
    last = len(whole.nbytes) - 1
    steps = sorted({round(last * n / (_POINTS - 1)) for n in range(_POINTS)})
    return [{"bytes": int(whole.nbytes[n]), "error": float(f"{float(whole.error[n]):.6g}")} for n in steps]


def _grouped(modules: Sequence[Sized]) -> _Groups:
    """Join modules that must have one rank: rank k of all together takes off the sum of their k-th gains."""
    import torch

    named: dict[str, list[int]] = {}
    for n, module in enumerate(modules):
        named.setdefault(module.group or f"\0{n}", []).append(n)
    members = list(named.values())
    spectra = []
    for group in members:
        length = max(len(modules[n].sigma) for n in group)
        squares = torch.zeros(length, dtype=torch.float64)
        for n in group:
            own = torch.tensor(modules[n].sigma, dtype=torch.float64)
            squares[: len(own)] += modules[n].weight * own.square()
        spectra.append(squares.sqrt())
    costs = [sum(modules[n].cost for n in group) for group in members]
    beyond = [sum(modules[n].weight * modules[n].beyond for n in group) for group in members]
    return _Groups(members, spectra, costs, beyond)


def spread(groups: _Groups, ranks: Sequence[int]) -> list[int]:
    """Return the rank of each module from those of the groups."""
    found = {n: rank for members, rank in zip(groups.members, ranks, strict=True) for n in members}
    return [found[n] for n in range(len(found))]


def size_of(files: Sequence[OutFile]) -> int:
    """Return how many bytes files take when they are written."""
    total = 0
    for file in files:
        if isinstance(file, TensorFile):
            infos = [ref.info for ref in file.tensors]
            header = safetensors.make_header(infos, file.metadata or None)
            total += len(header) + sum(info.nbytes for info in infos)
        elif isinstance(file, JsonFile):
            total += len(jsonfile.dump(file.content))
    return total


def group_of(target: Target, adapter: Adapter | None, architecture: Architecture | None, format: str) -> str:
    """Return the stack of experts in which a format gives a module one rank with others, or nothing."""
    if format != "peft":
        return ""
    for module, stack in adapter.origin.stacks.items() if adapter else ():
        if target in stack.targets:
            return module
    slot = architecture.slot(target.component, target.parts[0]) if architecture and len(target.parts) == 1 else None
    return slot.parameter if slot else ""


# ---- one rank for all


def engine_rank(wanted: int | str, ranks: Sequence[int]) -> int:
    """Return the one rank that all modules get: the number that was asked for, or the next that vLLM takes."""
    most = max(ranks)
    if wanted == "engine":
        if most > ENGINE_RANKS[-1]:
            raise UsageError(
                f"the largest rank is {most}, and vLLM takes {ENGINE_RANKS[-1]} at most",
                hint=f"--max-rank {ENGINE_RANKS[-1]}",
            )
        return next(n for n in ENGINE_RANKS if n >= most)
    if most > int(wanted):
        raise UsageError(f"the largest rank is {most}, above --pad-rank {wanted}", hint=f"--max-rank {wanted}")
    return int(wanted)


def check_pad(wanted: int | str | None, budget: int | None) -> None:
    """Raise UsageError for a --pad-rank that means nothing."""
    if wanted is None:
        return
    if wanted != "engine" and (not isinstance(wanted, int) or wanted < 1):
        raise UsageError(f"--pad-rank {wanted} is impossible", hint="a number such as 16, or engine")
    if budget is not None:
        raise UsageError("--pad-rank makes the adapter larger than --budget allows", hint="use one of them")


def padded_to(delta: Delta, rank: int) -> Delta:
    """Return the same delta with zeros up to a rank."""
    if isinstance(delta, Dora) and isinstance(delta.inner, LowRank):
        return replace(delta, inner=_padded(delta.inner, rank))
    return _padded(delta, rank) if isinstance(delta, LowRank) else delta


def _padded(delta: LowRank, rank: int) -> LowRank:
    down, up, missing = delta.down, delta.up, rank - delta.rank
    if missing <= 0:
        return delta
    down = joined(down.name, [down, zeros("", (missing, *down.shape[1:]), down.dtype)])
    flat = padded(replace(up, shape=up.shape[:2]), rank)
    up = replace(flat, shape=(up.shape[0], rank, *up.shape[2:]))
    return LowRank(down, up, delta.scaling)


def settled(deltas: Mapping[Target, Delta], pad: int | str | None) -> tuple[dict[Target, Delta], int | None]:
    """Return deltas padded as asked for, and the rank that all have then."""
    if pad is None or not deltas:
        return dict(deltas), None
    rank = engine_rank(pad, [d.rank for d in deltas.values()])
    return {t: padded_to(d, rank) for t, d in deltas.items()}, rank
