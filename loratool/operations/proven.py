"""Proving a conversion: the result is opened again, and compared with its source by factor algebra, module by module.

What the target format cannot hold is named by the conversion itself; here nothing else may be missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loratool.adapter import Adapter
from loratool.architecture import Architecture
from loratool.errors import LoratoolError
from loratool.operations import compare
from loratool.plan import Facts, Plan, Report, Settled, Spooled

#: More than rounding all factors of a module to bfloat16 once more can make of its update.
TOO_MUCH = 2.0**-6


def plan(
    source: Adapter,
    result: Adapter,
    architecture: Architecture | None,
    config: Mapping[str, Any],
    *,
    dropping: bool = False,
) -> Plan:
    """Plan the comparison; a module that is not the same update, but for rounding, is an error that names it.

    `dropping`: modules that only the source has were left out on purpose.
    """
    compared = compare.plan([source, result.require_sound()], architecture, config)

    def settle(facts: Mapping[str, Facts], spooled: Spooled) -> Settled:
        rows = compared.settle(facts, spooled).report.rows
        lost = [row["module"] for row in rows if row["verdict"] == "one-sided" and dropping]
        kept = [row for row in rows if row["module"] not in lost]
        errors = {row["module"]: row["distance"] or 0.0 for row in kept}
        unlike = ("one-sided", "not compared", "different")
        wrong = [row["module"] for row in kept if not errors[row["module"]] <= TOO_MUCH or row["verdict"] in unlike]
        if wrong or not kept:
            raise LoratoolError(
                f"the result is not the same update at {', '.join(wrong[:6])}: please report this bug",
                where=result.origin.path,
                hint="the output is there, and should not be used",
            )
        totals = {"verified_modules": len(kept), **({"left_out_modules": len(lost)} if lost else {})}
        return Settled(Report(verb="verify", totals={**totals, **_in_words(kept, errors)}))

    return replace(compared, preview=Report(verb="verify"), settle=settle)


def _in_words(rows: list[dict[str, Any]], errors: Mapping[str, float]) -> dict[str, Any]:
    """Return the largest error, relative to the norm of the update of its module, and what that means."""
    worst = max(errors, key=errors.__getitem__)
    if not errors[worst]:
        return {"verified": "bit-exact"}
    if all(row["equal"] for row in rows):
        return {"verified": "the same update: what differs is the rounding of this check, in fp64"}
    largest = errors[worst]
    return {"verified": f"the largest relative error is {largest:.1e}, in {worst}", "largest_relative_error": largest}
