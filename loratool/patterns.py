"""The one pattern language for module paths: parse, match, expand, flatten, unflatten.

    model.layers.{i}.self_attn.(q_proj|k_proj)     {i} fills one whole element with an index; (a|b) is a choice
    encoder.**        *.proj                       * is one element; ** a subtree, only at the end

A pattern without choices is a *skeleton*: a tuple of path elements. Choices are expanded when a pattern is parsed,
so matching is a comparison of tuples and needs no regular expressions (the paths come from untrusted files).

Flat spellings (kohya's `.` -> `_`) are inverted by looking up digit-free skeletons, never by guessing which
underscore was a dot: see Lexicon.unflatten.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import product
from typing import Generic, NamedTuple, TypeVar

from loratool.errors import UsageError

_ELEMENT = re.compile(r"\{[a-z]\w*\}|\*\*?|[\w-]+")
_INDEX = re.compile("0|[1-9][0-9]{0,8}")  # int() takes 007 and other scripts' digits, and fails on thousands of them
_DIGITS = re.compile(r"(?<![^._])[0-9]{1,9}(?![^._])")  # a number that is a whole element, dotted or flattened
T = TypeVar("T")


class Skeleton(NamedTuple):
    """One choice-free reading of a pattern, and which alternative of its last choice it took."""

    elements: tuple[str, ...]
    alternative: int

    @property
    def text(self) -> str:
        """The skeleton as a dotted string, with `{i}` for indices."""
        return ".".join(self.elements)

    def match(self, path: str) -> tuple[int, ...] | None:
        """The indices that make this skeleton equal `path`, or None."""
        return _match(self.elements, tuple(path.split(".")))

    def fill(self, indices: Iterable[int]) -> str:
        """Return the path with the given indices in the places of `{i}`."""
        numbers = iter(indices)
        return ".".join(str(next(numbers)) if e.startswith("{") else e for e in self.elements)


@lru_cache(maxsize=4096)
def parse(pattern: str) -> tuple[Skeleton, ...]:
    """Expand the choices of `pattern` into skeletons; raises UsageError where it is malformed."""
    parts = re.split(r"\(([^()]*)\)", pattern)  # literal, choice, literal, choice, ..., literal
    choices = [part.split("|") if n % 2 else [part] for n, part in enumerate(parts)]
    last = max((n for n in range(1, len(choices), 2)), default=None)
    skeletons = []
    for picked in product(*(enumerate(c) for c in choices)):
        elements = tuple("".join(text for _, text in picked).split("."))
        if not all(_ELEMENT.fullmatch(e) for e in elements) or "**" in elements[:-1]:
            raise UsageError(
                f"the pattern {pattern!r} is malformed",
                hint="elements are names, {i}, *, or ** at the end; choices are (a|b) and do not nest",
            )
        skeletons.append(Skeleton(elements, picked[last][0] if last is not None else 0))
    return tuple(skeletons)


def _match(elements: tuple[str, ...], path: tuple[str, ...]) -> tuple[int, ...] | None:
    subtree = elements[-1] == "**"
    if len(path) < len(elements) if subtree else len(path) != len(elements):
        return None
    indices = []
    for element, name in zip(elements, path, strict=False):
        if element.startswith("{"):
            if not _INDEX.fullmatch(name):
                return None
            indices.append(int(name))
        elif element not in (name, "*", "**"):
            return None
    return tuple(indices)


def selects(pattern: str, path: str, component: str = "") -> bool:
    """Whether a user's `--target` pattern selects a path: the whole of it, or any of its suffixes.

    `q_proj` selects every module of that name, as PEFT's target_modules do; `unet:**` selects a component.
    """
    scope, _, text = pattern.rpartition(":")
    if scope and scope != component:
        return False
    names = tuple(path.split("."))
    return any(_ends(skeleton.elements, names) for skeleton in parse(text))


def _ends(elements: tuple[str, ...], names: tuple[str, ...]) -> bool:
    """Whether some suffix of `names` matches; only one can, except where a subtree takes any number of names."""
    if elements[-1] != "**":
        return len(elements) <= len(names) and _match(elements, names[len(names) - len(elements) :]) is not None
    size = len(elements)
    return any(_match(elements, names[at : at + size]) is not None for at in range(len(names) - size + 1))


def flatten(path: str) -> str:
    """Return kohya's flat spelling of a path: dots become underscores."""
    return path.replace(".", "_")


def natural(path: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key that puts layer 2 before layer 10."""
    return tuple((0, int(e), "") if _INDEX.fullmatch(e) else (1, 0, e) for e in path.split("."))


class Found(NamedTuple, Generic[T]):
    """A path that a Lexicon explains: the value of its pattern and the skeleton it took."""

    path: str
    value: T
    skeleton: Skeleton


class Lexicon(Generic[T]):
    """Patterns with a value each, indexed so that looking up a path costs one dictionary access.

    The index key is the path with every number replaced by `#`; candidates under a key are then compared exactly.
    """

    def __init__(self, entries: Iterable[tuple[str, T]]) -> None:
        self._dotted: dict[str, list[tuple[Skeleton, T]]] = {}
        self._flat: dict[str, list[tuple[Skeleton, T]]] = {}
        for pattern, value in entries:
            for skeleton in parse(pattern):
                if "*" in skeleton.text:
                    raise UsageError(f"the pattern {pattern!r} has a wildcard", hint="layers name every element")
                key = _DIGITS.sub("#", re.sub(r"\{\w+\}", "#", skeleton.text))
                self._dotted.setdefault(key, []).append((skeleton, value))
                self._flat.setdefault(flatten(key), []).append((skeleton, value))

    def __iter__(self) -> Iterator[tuple[Skeleton, T]]:
        for candidates in self._dotted.values():
            yield from candidates

    def find(self, path: str) -> Found[T] | None:
        """Return the pattern that matches a dotted path, or None."""
        for skeleton, value in self._dotted.get(_DIGITS.sub("#", path), ()):
            if skeleton.match(path) is not None:
                return Found(path, value, skeleton)
        return None

    def unflatten(self, flat: str) -> list[Found[T]]:
        """Return every dotted path of these patterns whose flat spelling is `flat`: none, one, or an ambiguity."""
        numbers = [int(n) for n in _DIGITS.findall(flat)]
        found = []
        for skeleton, value in self._flat.get(_DIGITS.sub("#", flat), ()):
            path = _place(skeleton, numbers)
            if path is not None and flatten(path) == flat:
                found.append(Found(path, value, skeleton))
        return found


def _place(skeleton: Skeleton, numbers: list[int]) -> str | None:
    """Put the numbers of a flat name into a skeleton, or None where a literal number differs."""
    rest = iter(numbers)
    path = []
    for element in skeleton.elements:
        if element.startswith("{"):
            path.append(str(next(rest)))
            continue
        for literal in _DIGITS.findall(flatten(element)):
            if next(rest) != int(literal):
                return None
        path.append(element)
    return ".".join(path)
