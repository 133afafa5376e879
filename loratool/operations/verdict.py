"""What the numbers of a comparison mean: whether two updates fight, in a word and in a line.

The thresholds. With a cosine c, two updates of equal norm that are added up have 1 + c times the energy (squared norm)
that they have apart. From |c| = 0.1 on, a tenth of it, the one is said to oppose or to reinforce the other. Below that
they are `mixed` where at least a tenth of the energy of each lies where the other acts as well, and at least twice what
chance would put there; else they do not meet: `orthogonal`.

|cosine| is never above the square root of the overlap: what does not meet cannot fight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

#: A cosine from which on two updates oppose or reinforce each other.
COSINE = 0.1
#: An overlap from which on two updates without a common direction are called mixed.
OVERLAP = 0.1
#: Distances below this share of what the factors are made of are rounding in fp64: the update is the same.
ROUNDING = 1e-13

Two = tuple[float, float]
_NONE = (0.0, 0.0)
_GRAVEST = ("opposed", "mixed", "reinforcing", "orthogonal", "different", "not compared", "one-sided", "equal")
_TOLD = ("opposed", "reinforcing", "different", "not compared")


@dataclass(frozen=True)
class Measure:
    """Two updates of one weight, or of many: sums over the weights.

    `energy` is the squared norm of each, `shared` what of it lies in the subspaces of the other, `chance` what would
    by chance, `spanned` the energy of the weights of which that is known.
    """

    energy: Two = _NONE
    inner: float = 0.0
    squared_distance: float = 0.0
    spanned: Two = _NONE
    shared: Two = _NONE
    chance: Two = _NONE
    equal: bool = True

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Measure:
        """Return what a unit measured of one weight (loratool.algebra.subspaces.likeness)."""
        first, second = facts["norms"]
        energy = (first * first, second * second)
        known = "shared" in facts
        by_chance = [e * c for e, c in zip(energy, facts["chance"], strict=True)] if known else _NONE
        return cls(
            energy,
            facts["inner"],
            facts["distance"] ** 2,
            energy if known else _NONE,
            (facts["shared"][0], facts["shared"][1]) if known else _NONE,
            (by_chance[0], by_chance[1]),
            facts["distance"] <= ROUNDING * facts["scale"],
        )

    def unequal(self) -> Measure:
        """Return the same of what differs in something that is not measured here."""
        return replace(self, equal=False)

    @property
    def norms(self) -> list[float]:
        """The Frobenius norms."""
        return [sqrt(e) for e in self.energy]

    @property
    def distance(self) -> float:
        """The norm of the difference over the larger norm."""
        return sqrt(self.squared_distance) / max(self.norms) if max(self.norms) else 0.0

    @property
    def cosine(self) -> float | None:
        """The cosine, or None where one of the two is zero."""
        norms = self.norms
        return max(-1.0, min(1.0, self.inner / (norms[0] * norms[1]))) if all(norms) else None

    @property
    def shares(self) -> list[float] | None:
        """The share of each one's energy that lies where the other acts."""
        if not all(self.spanned):
            return None
        return [min(1.0, s / e) for s, e in zip(self.shared, self.spanned, strict=True)]

    @property
    def overlap(self) -> float | None:
        """The smaller of the shares."""
        return min(self.shares) if self.shares else None

    @property
    def verdict(self) -> str:
        """One word for it."""
        if self.equal:
            return "equal"
        cosine, overlap = self.cosine, self.overlap
        if cosine is None:
            return "one-sided" if any(self.energy) else "different"
        if abs(cosine) >= COSINE:
            return "opposed" if cosine < 0 else "reinforcing"
        if overlap is None or self.shares is None:
            return "orthogonal"
        n = self.shares.index(overlap)
        return "mixed" if overlap >= max(OVERLAP, 2 * self.chance[n] / self.spanned[n]) else "orthogonal"


def total(measures: Iterable[Measure]) -> Measure:
    """Return the sum over weights."""
    every = list(measures)

    def both(name: str) -> Two:
        return sum(getattr(m, name)[0] for m in every), sum(getattr(m, name)[1] for m in every)

    return Measure(
        both("energy"),
        sum(m.inner for m in every),
        sum(m.squared_distance for m in every),
        both("spanned"),
        both("shared"),
        both("chance"),
        all(m.equal for m in every),
    )


def gravest(words: Iterable[str]) -> str:
    """Return the verdict of several pairs that matters most."""
    return min(words, key=_GRAVEST.index)


def in_words(measure: Measure, word: str, modules: Sequence[str]) -> str:
    """Return one line on two adapters, given the verdicts of the modules that both have."""
    cosine, overlap = measure.cosine, measure.overlap
    if word == "equal":
        return "the same update" + (", bit for bit" if measure.squared_distance == 0 else ", up to rounding in fp64")
    if cosine is None:
        unknown = "not the same; how far the updates are apart is not known without the base"
        return "one of the two does nothing" if any(measure.energy) else unknown
    kept = max(0.0, 1 + 2 * measure.inner / sum(measure.energy))  # rounding may leave less than nothing
    meeting = "" if overlap is None else f"{100 * overlap:.2g} % of the energy lies where both act"
    line = {
        "opposed": f"they fight: added up they keep {100 * kept:.0f} % of their energy",
        "reinforcing": f"they pull the same way: added up they have {100 * kept:.0f} % of their energy",
        "mixed": f"they act in the same place, and not in the same direction: {meeting}",
        "orthogonal": f"they hardly meet{': ' if meeting else ''}{meeting}",
    }.get(word, "not the same update")
    counts = Counter(modules)
    told = [f"{name} in {counts[name]}" for name in _TOLD if counts[name]]
    if told:
        line += f"; {', '.join(told)} of {len(modules)} common modules"
    norms = measure.norms
    times = max(norms) / min(norms)
    if times >= 3:
        line += f"; the {'first' if norms[0] > norms[1] else 'second'} is {times:.3g} times as strong"
    return line


def several_in_words(pairs: Sequence[tuple[tuple[int, int], str, Measure]]) -> str:
    """Return one line on the pairs of several adapters, which have numbers from 1."""
    told = []
    for word in _GRAVEST:
        which = [
            f"{one} and {two}" + (f" ({m.cosine:.2f})" if m.cosine is not None and word in _GRAVEST[:3] else "")
            for (one, two), verdict, m in pairs
            if verdict == word
        ]
        if which and word == "orthogonal" and len(which) == len(pairs):
            return "they hardly meet: every pair is orthogonal"
        if which:
            told.append(f"{word}: {', '.join(which)}")
    return "; ".join(told)
