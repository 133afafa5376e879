"""Which rank a module gets: the rules that people choose from, the same for every verb that makes factors.

Every rule bounds the rank from above; several together give the least that any of them allows (loratool.algebra.rank
has one function a rule). A budget is no rule of a module: it is shared out at the end (loratool.operations.sizes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING, Any, TypedDict

from loratool.adapter import Target
from loratool.errors import MismatchError, UsageError
from loratool.patterns import selects

if TYPE_CHECKING:
    import torch

_SHARES = ("energy", "cumulative", "sv_fro", "sv_cumulative")  # between 0 and 1
_RATIOS = ("ratio", "sv_ratio")  # 1 or more
AUTO = "auto"
OF_THE_BASE = ("error", "ratio")  # what --relative-to changes, beside what is shared out over all modules


@dataclass(frozen=True)
class Rule:
    """How a rank is chosen. Each field is a bound from above; `rank_for` gives the modules of a pattern theirs instead.

    `max_rank` and `budget` bound these, too. `rank` is a number or "auto"; `energy` a share of the squared singular
    values, `error` a relative Frobenius error, `ratio` sigma_1 / sigma_k, `cumulative` a share of their plain sum;
    `sv_*` are the rules of kohya's sd-scripts. `budget` is the size in bytes of the whole adapter.
    """

    rank: int | str | None = None
    energy: float | None = None
    error: float | None = None
    ratio: float | None = None
    cumulative: float | None = None
    sv_ratio: float | None = None
    sv_fro: float | None = None
    sv_cumulative: float | None = None
    max_rank: int | None = None
    rank_for: tuple[tuple[str, int], ...] = ()
    budget: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank != AUTO and not isinstance(self.rank, int):
            raise UsageError(f"a rank of {self.rank!r} is impossible", hint="a number such as 16, or auto")
        ranks = [r for r in (self.rank, self.max_rank) if r is not None] + [r for _, r in self.rank_for]
        for number in ranks:
            if number != AUTO and (isinstance(number, str) or number < 1):
                raise UsageError(f"a rank of {number} is impossible", hint="the smallest rank is 1")
        for name in _SHARES:
            self._require(name, "a share above 0 and at most 1, such as 0.95", lambda x: 0 < x <= 1)
        for name in _RATIOS:
            self._require(name, "a ratio of 1 or more, such as 20", lambda x: x >= 1)
        self._require("error", "a relative error above 0 and below 1, such as 0.05", lambda x: 0 < x < 1)
        if self.budget is not None and self.budget < 1:
            raise UsageError(f"a budget of {self.budget} bytes is impossible", hint="--budget 50MB")
        if all(getattr(self, f.name) in (None, ()) for f in fields(self)):
            raise UsageError("no rank rule was given", hint="--rank 16, --rank auto, --energy 0.95, or --budget 50MB")

    def _require(self, name: str, wanted: str, fits: Callable[[float], bool]) -> None:
        value = getattr(self, name)
        if value is not None and not (isfinite(value) and fits(value)):
            shown = name.replace("_", "-")
            raise UsageError(f"--{shown} {value:g} is impossible", hint=f"--{shown} takes {wanted}")

    @property
    def adapts(self) -> bool:
        """Whether the rank depends on the numbers, rather than being given."""
        return not isinstance(self.rank, int)

    @property
    def is_open(self) -> bool:
        """Whether singular values have to be looked at: any rule but a number, or the largest that there may be."""
        names = ("energy", "error", "ratio", "cumulative", "sv_ratio", "sv_fro", "sv_cumulative")
        return self.rank == AUTO or any(getattr(self, name) is not None for name in names)

    @property
    def needs_everything(self) -> bool:
        """Whether only the whole spectrum decides."""
        return self.cumulative is not None or self.sv_cumulative is not None

    def bound(self, available: int) -> int:
        """Return the largest rank that this rule can choose out of `available` singular values."""
        numbers = [n for n in (self.rank, self.max_rank) if isinstance(n, int)]
        return min([available, *numbers])

    def of(self, target: Target) -> Rule:
        """Return the rule of one module: the last pattern of `rank_for` that selects it, or this."""
        own = [n for pattern, n in self.rank_for if _hits(pattern, target)]
        return (
            Rule(rank=own[-1], max_rank=self.max_rank) if own else replace(self, rank_for=()) if self.rank_for else self
        )

    def require_patterns_used(self, targets: Iterable[Target], where: str) -> None:
        """Raise MismatchError where a pattern of `rank_for` selects nothing."""
        targets = list(targets)
        for pattern, _ in self.rank_for:
            if not any(_hits(pattern, t) for t in targets):
                hint = "loratool inspect lists the modules; patterns match whole names or their ends"
                raise MismatchError(f"no module matches {pattern!r} (--rank-for)", where=where, hint=hint)

    def choose(
        self,
        sigma: torch.Tensor,
        beyond: float | None = None,
        *,
        auto: Callable[[torch.Tensor, float | None], int],
        size: int | None = None,
        scaling: float = 1.0,
        base_norm: float = 0.0,
    ) -> int:
        """Return the rank for singular values `sigma`; one more than there are where more must be known to say.

        `beyond` is the squared energy outside sigma, None where that is all (loratool.algebra.rank). `auto` is what
        `--rank auto` means here. kohya's rules look at up @ down without `scaling`; `size` is min(out, in). With a
        `base_norm`, that of the weight which is updated, `error` and `ratio` are relative to it.
        """
        from loratool.algebra import rank

        rules: list[rank.Rule] = []
        if isinstance(self.rank, int):
            rules.append(partial(_swapped, rank.fixed, self.rank))
        elif self.rank == AUTO:
            rules.append(auto)
        if base_norm and self.error is not None:
            rules.append(partial(_swapped, rank.within, self.error * base_norm))
        if base_norm and self.ratio is not None:
            rules.append(partial(_swapped, rank.above, base_norm / self.ratio))
        for name in ("energy", "error", "cumulative", "ratio"):
            value = getattr(self, name)
            if value is not None and not (base_norm and name in OF_THE_BASE):
                rules.append(partial(_swapped, getattr(rank, name), value))
        for name in ("sv_ratio", "sv_fro", "sv_cumulative"):
            value = getattr(self, name)
            if value is not None:
                rules.append(partial(_unscaled, partial(getattr(rank, name), size=size), value, abs(scaling) or 1.0))
        if self.max_rank is not None:
            rules.append(partial(_swapped, rank.fixed, self.max_rank))
        return rank.smallest(rules, sigma, beyond)


class Ranking(TypedDict, total=False):
    """Which rank a module gets: every rule is a bound from above, and the least of those that are given counts.

    `rank` is a number or "auto"; `rank_for` gives the modules of a pattern theirs; `budget` is the size in bytes of the
    whole adapter; the others are those of `Rule`. `pad_rank` (a number or "engine") fills all
    modules up to one rank with zeros.
    """

    rank: int | str | None
    energy: float | None
    error: float | None
    ratio: float | None
    cumulative: float | None
    sv_ratio: float | None
    sv_fro: float | None
    sv_cumulative: float | None
    max_rank: int | None
    rank_for: Mapping[str, int]
    budget: int | None
    pad_rank: int | str | None


def ranking(settings: Mapping[str, Any]) -> tuple[Rule, int | str | None, dict[str, Any]]:
    """Return the rank rule, --pad-rank, and the other settings."""
    others = {n: v for n, v in settings.items() if n not in Ranking.__annotations__}
    given = {n: v for n, v in settings.items() if n in Ranking.__annotations__}
    pad_rank = given.pop("pad_rank", None)
    given["rank_for"] = tuple(dict(given.get("rank_for") or {}).items())
    return Rule(**given), pad_rank, others


def optional_ranking(settings: Mapping[str, Any]) -> tuple[Rule | None, int | str | None, dict[str, Any]]:
    """Return the same as `ranking`, but no rule where none was given."""
    rules = [n for n in Ranking.__annotations__ if n != "pad_rank"]
    if any(settings.get(n) not in (None, {}) for n in rules):
        return ranking(settings)
    others = {n: v for n, v in settings.items() if n not in Ranking.__annotations__}
    return None, settings.get("pad_rank"), others


def _swapped(rule: Callable[..., int], value: float, sigma: torch.Tensor, beyond: float | None) -> int:
    return rule(sigma, value, beyond)


def _unscaled(rule: Callable[..., int], value: float, scaling: float, sigma: torch.Tensor, beyond: float | None) -> int:
    return rule(sigma / scaling, value, None if beyond is None else beyond / scaling**2)


def _hits(pattern: str, target: Target) -> bool:
    return any(selects(pattern, part, target.component) for part in target.parts)
