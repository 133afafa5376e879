"""Adapters of a base that was changed before training, made adapters of the original base.

PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ subtract the adapter that training starts from out of the base. What the training
did to the original base is then scaling * (B A - B0 A0): the trained adapter less the initial one, exactly, of up to
twice the rank. Source: peft/utils/save_and_load.py, subtract_mutated_init (0.21.2).

`init --init pissa` and `--init loftq` write that changed base as a checkpoint of its own: see `residual`.
"""

from __future__ import annotations

from dataclasses import replace

from loratool.adapter import Adapter, Finding, Target
from loratool.deltas import Delta, LowRank
from loratool.errors import MismatchError
from loratool.tensors import TensorRef

_WHICH = "--init-adapter FOLDER is this very adapter as it was saved before training; init keeps it in `initial`"


def without_initial(adapter: Adapter, initial: Adapter) -> Adapter:
    """Return the adapter relative to the original base: each delta, and less the delta that it started from."""
    if not (adapter.changed_base or _begins(adapter, initial)):
        raise MismatchError(
            "the base was not changed before this adapter was trained: there is nothing to take back",
            where=adapter.origin.path,
            hint="leave --init-adapter out",
        )
    replace(initial, changed_base="").require_sound()
    started, trained = initial.low_rank("--init-adapter"), adapter.low_rank("--init-adapter")
    if started.keys() != trained.keys():
        odd = sorted(map(str, started.keys() ^ trained.keys()))
        more = f" and {len(odd) - 4} more" if odd[4:] else ""
        what = f"the initial adapter has other modules: {', '.join(odd[:4])}{more}"
        raise MismatchError(what, where=initial.origin.path, hint=_WHICH)
    deltas: dict[Target, tuple[Delta, ...]] = {}
    for target, found in trained.items():
        before = started[target]
        if [d.matrix_shape for d in found] != [d.matrix_shape for d in before]:
            what = f"the initial adapter has another shape at {target}"
            raise MismatchError(what, where=initial.origin.path, hint=_WHICH)
        deltas[target] = (*found, *(_negative(d) for d in before))
    findings = list(adapter.findings)
    if (adapter.changed_base or initial.changed_base).lower() == "loftq":
        what = "LoftQ also quantised the base: what that changed is no part of the adapter and is not taken over"
        findings.append(Finding("warning", adapter.origin.path, what))
    return replace(
        adapter,
        deltas=deltas,
        changed_base="",
        residual="",
        base_model=initial.base_model or adapter.base_model,
        findings=tuple(findings),
        tensors={**adapter.tensors, **{f"initial {name}": _initial(ref) for name, ref in initial.tensors.items()}},
        consumed=(*adapter.consumed, *(f"initial {name}" for name in _beside(initial))),
    )


def _begins(adapter: Adapter, initial: Adapter) -> bool:
    """Whether an adapter whose own config does not say so began as `initial`, which changed the base: at its ranks.

    One that was converted already, and is relative to the original base, has twice the ranks.
    """
    return bool(initial.changed_base) and _ranks(adapter) == _ranks(initial)


def _ranks(adapter: Adapter) -> dict[Target, list[int]]:
    return {target: [delta.rank for delta in deltas] for target, deltas in adapter.deltas.items()}


def _negative(delta: LowRank) -> LowRank:
    return replace(delta, down=_initial(delta.down), up=_initial(delta.up), scaling=-delta.scaling)


def _initial(ref: TensorRef) -> TensorRef:
    """The same tensor under a name that the trained adapter has not."""
    return ref.renamed(f"initial {ref.name}")


def _beside(initial: Adapter) -> list[str]:
    """The tensors of the initial adapter that are no part of a delta, such as copies of the base's."""
    used = {ref.name for deltas in initial.deltas.values() for d in deltas for ref in d.refs}
    return [name for name in initial.tensors if name not in used]
