"""From many weights to few patterns: layers that claim them, and rules between their spellings."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

from loratool.discovery.names import Weight
from loratool.layers import Experts, Fused, Layer
from loratool.patterns import join, split

_VARIABLES = "ijklmnopq"  # {e} is the open index of a stack
_INDEX = re.compile("0|[1-9][0-9]{0,8}")
_NAME = re.compile(r"[\w-]+")


class Claimed(NamedTuple):
    """Layers that claim exactly the skeletons of some weights, their fused layouts, and names that fit no pattern."""

    layers: tuple[Layer, ...]
    fused: tuple[Fused, ...]
    odd: tuple[str, ...]


def claim(weights: Iterable[Weight]) -> Claimed:
    """Return the layers of these weights.

    A number stays literal where weights that differ in it alone are of different kinds (the 0 and 2 of a Sequential).
    """
    shelves: dict[str, list[Weight]] = defaultdict(list)
    odd = []
    for weight in weights:
        if is_path(weight.path):
            elements = split(weight.path)
            shelves[_opened(elements, _numbers(elements))].append(weight)
        else:
            odd.append(weight.path)
    found = [one for members in shelves.values() for one in _consistent(members).items()]
    fused = tuple(Fused(pattern, w.parts, w.layout) for pattern, w in found if w.layout is not None)
    return Claimed(tuple(_layer(pattern, w) for pattern, w in found), fused, tuple(odd))


def is_path(name: str) -> bool:
    """Whether a name can be a module path: names that files hold may be anything."""
    return all(_NAME.fullmatch(e) for e in name.split("."))


def rule(path: str, parts: Sequence[str]) -> str:
    """Return the rule `path = parts`, open in the numbers that all sides share from the left; nothing for odd names."""
    sides = [split(p) for p in (path, *parts)]
    if not all(_NAME.fullmatch(e) or e == "{e}" or e[:1] == "[" for side in sides for e in side):
        return ""
    numbers = [[side[n] for n in _numbers(side)] for side in sides]
    shared = 0
    while all(len(n) > shared and n[shared] == numbers[0][shared] for n in numbers):
        shared += 1
    left, *right = (_opened(side, _numbers(side)[:shared]) for side in sides)
    return f"{left} = {_choice(right)}"


def _choice(paths: Sequence[str]) -> str:
    """Return `a.(b|c).d` for paths that differ in their middle."""
    if len(paths) == 1:
        return paths[0]
    rows = [split(p) for p in paths]
    shortest = min(map(len, rows)) - 1
    same = [len(set(column)) == 1 for column in zip(*(r[:shortest] for r in rows), strict=True)]
    start = [*same, False].index(False)
    if any("[" in e for row in rows for e in row[start:]):
        return f"({'|'.join(paths)})" if start == 0 else _bracketed(rows, start)
    return join((*rows[0][:start], f"({'|'.join(join(r[start:]) for r in rows)})"))


def _bracketed(rows: Sequence[Sequence[str]], start: int) -> str:
    """Return `a.b[(q|k)]` for parts of one weight, else the whole paths as alternatives."""
    if all(len(r) == start + 1 for r in rows):
        return f"{join(rows[0][:start])}[({'|'.join(r[-1].strip('[]') for r in rows)})]"
    return f"({'|'.join(map(join, rows))})"


def _numbers(elements: Sequence[str]) -> list[int]:
    """Where the indices of a path are, as many as there are variables for."""
    return [n for n, e in enumerate(elements) if _INDEX.fullmatch(e)][: len(_VARIABLES)]


def _opened(elements: Sequence[str], places: Sequence[int]) -> str:
    """Return a path with the numbers in these places replaced by {i}, {j} ..."""
    names: Mapping[int, str] = {place: "{" + _VARIABLES[n] + "}" for n, place in enumerate(places)}
    return join(names.get(n, e) for n, e in enumerate(elements))


def _consistent(members: Sequence[Weight]) -> dict[str, Weight]:
    """Return patterns for weights of one skeleton, with as few numbers literal as their differences need."""
    rows = [(split(w.path), replace(w, path="")) for w in members]
    places = _numbers(rows[0][0])
    some = [c for size in range(len(places)) for c in combinations(places[::-1], size)] if len(places) < 6 else [()]
    for literal in (*some, tuple(places)):
        found: dict[str, Weight] = {}
        free = [p for p in places if p not in literal]
        for elements, alike in rows:
            pattern = _opened(elements, free)
            if found.setdefault(pattern, alike) != alike:
                break
        else:
            return found
    return {w.path: w for w in members}


def _layer(pattern: str, weight: Weight) -> Layer:
    roles = (weight.role,) if weight.role else ()
    if weight.kind is Experts:
        stacked = Experts(pattern, weight.group, roles, tower=weight.tower)
        return replace(stacked, in_out=weight.in_out, flipped_in_memory=weight.flipped)
    return weight.kind(pattern, weight.group, roles, tower=weight.tower)
