"""The one pattern language for module paths: parse, match, expand, flatten, unflatten, and rules between spellings.

    model.layers.{i}.self_attn.(q_proj|k_proj)     {i} fills one whole element with an index; (a|b) is a choice
    encoder.**        *.proj                       * is one element; ** a subtree, only at the end
    layers.{8-15}.**                               a range of indices, both ends included
    attn.c_attn[q]    experts.down_proj[{e}]       [..] is an element too: a named part of a fused weight, an expert

A *rule* says that another spelling means canonical ones, `left = right` (see Rule).

A pattern without choices is a *skeleton*: a tuple of path elements. Choices are expanded when a pattern is parsed,
so matching is a comparison of tuples and needs no regular expressions (the paths come from untrusted files).

Flat spellings (kohya's `.` -> `_`) are inverted by looking up digit-free skeletons, never by guessing which
underscore was a dot: see Lexicon.unflatten.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import product
from typing import Generic, NamedTuple, TypeVar

from loratool.errors import UsageError

_ELEMENT = re.compile(r"\{[a-z]\w*\}|\{\d{1,6}-\d{1,6}\}|\*\*?|[\w-]+|\[(?:\w+|\{[a-z]\w*\})\]")
_INDEX = re.compile("0|[1-9][0-9]{0,8}")  # int() takes 007 and other scripts' digits, and fails on thousands of them
_DIGITS = re.compile(r"(?<![^._[])[0-9]{1,9}(?![^._\]])")  # a number that is a whole element, dotted or flattened
T = TypeVar("T")


@lru_cache(maxsize=8192)
def split(path: str) -> tuple[str, ...]:
    """Return the elements of a path: `a.b[q]` has three, a, b and [q]."""
    return tuple((path.replace("[", ".[") if "[" in path else path).split("."))


def join(elements: Iterable[str]) -> str:
    """Return the path with these elements."""
    return ".".join(elements).replace(".[", "[")


def _variable(element: str) -> str:
    """The name in {i} or [{i}], or nothing."""
    inner = element.strip("[]")
    return inner[1:-1] if inner.startswith("{") else ""


class Skeleton(NamedTuple):
    """One choice-free reading of a pattern, and which alternative of its last choice it took."""

    elements: tuple[str, ...]
    alternative: int

    @property
    def text(self) -> str:
        """The skeleton as a dotted string, with `{i}` for indices."""
        return join(self.elements)

    @property
    def variables(self) -> tuple[str, ...]:
        """The names of its indices, in order."""
        return tuple(v for v in map(_variable, self.elements) if v)

    def match(self, path: str) -> tuple[int, ...] | None:
        """The indices that make this skeleton equal `path`, or None."""
        return _match(self.elements, split(path))

    def fill(self, indices: Iterable[int]) -> str:
        """Return the path with the given indices in the places of `{i}`."""
        numbers = iter(indices)
        return join(e.replace("{" + v + "}", str(next(numbers))) if (v := _variable(e)) else e for e in self.elements)


@lru_cache(maxsize=4096)
def parse(pattern: str) -> tuple[Skeleton, ...]:
    """Expand the choices of `pattern` into skeletons; raises UsageError where it is malformed."""
    parts = choices(pattern)
    last = max((n for n in range(1, len(parts), 2)), default=None)
    return tuple(
        Skeleton(_elements("".join(text for _, text in picked), pattern), picked[last][0] if last is not None else 0)
        for picked in product(*(enumerate(c) for c in parts))
    )


def choices(pattern: str) -> list[list[str]]:
    """Return literal, alternatives, literal, alternatives, ..., literal; a literal is a list of one."""
    return [p.split("|") if n % 2 else [p] for n, p in enumerate(re.split(r"\(([^()]*)\)", pattern))]


def _elements(text: str, pattern: str) -> tuple[str, ...]:
    elements = split(text)
    if not all(_ELEMENT.fullmatch(e) for e in elements) or "**" in elements[:-1]:
        raise UsageError(f"the pattern {pattern!r} is malformed", hint=_instead(pattern))
    return elements


def _instead(pattern: str) -> str:
    """Return what to write instead of a malformed pattern."""
    if "," in pattern:
        each = " ".join(f"--target {part.strip()}" for part in pattern.split(",") if part.strip())
        return f"repeat the option, as in {each}"
    return (
        "a pattern is names and numbers with dots between them, {0-5} for a range, * for any one element, (a|b) for a "
        "choice, ** at the end for all below: layers.{0-5}.mlp.**; more: docs/init.md, Patterns"
    )


def _match(elements: tuple[str, ...], path: tuple[str, ...]) -> tuple[int, ...] | None:
    subtree = elements[-1] == "**"
    if len(path) < len(elements) if subtree else len(path) != len(elements):
        return None
    indices = []
    for element, name in zip(elements, path, strict=False):
        if element.startswith(("{", "[{")):
            if element[0] == "[":
                name = name[1:-1] if name[:1] == "[" else ""  # noqa: PLW2901
            if not _INDEX.fullmatch(name) or not _in_range(element, int(name)):
                return None
            indices.append(int(name))
        elif element not in (name, "*", "**"):
            return None
    return tuple(indices)


def _in_range(element: str, index: int) -> bool:
    """Whether an index is in the range of an element such as {8-15}; any index is in {i}."""
    low, dash, high = element.strip("[]{}").partition("-")
    return not dash or int(low) <= index <= int(high)


def selects(pattern: str, path: str, component: str = "") -> bool:
    """Whether a user's `--target` pattern selects a path: the whole of it, or any of its suffixes.

    `q_proj` selects every module of that name, as PEFT's target_modules do; `unet:**` selects a component.
    """
    scope, _, text = pattern.rpartition(":")
    if scope and scope != component:
        return False
    readings = {split(path), split(path.partition("[")[0])}  # a weight's name selects all its parts
    return any(_ends(skeleton.elements, names) for skeleton in parse(text) for names in readings)


def _ends(elements: tuple[str, ...], names: tuple[str, ...]) -> bool:
    """Whether some suffix of `names` matches; only one can, except where a subtree takes any number of names."""
    if elements[-1] != "**":
        return len(elements) <= len(names) and _match(elements, names[len(names) - len(elements) :]) is not None
    size = len(elements)
    return any(_match(elements, names[at : at + size]) is not None for at in range(len(names) - size + 1))


def outline(path: str) -> str:
    """Return a path with every number in it as #: layers of one kind have one outline."""
    return _DIGITS.sub("#", path)


def numbers(path: str) -> list[int]:
    """Return the numbers in a path, dotted or flat, that are whole elements."""
    return [int(n) for n in _DIGITS.findall(path)]


def flatten(path: str) -> str:
    """Return kohya's flat spelling of a path: dots become underscores."""
    return path.replace(".", "_")


def natural(path: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key that puts layer 2 before layer 10."""
    return tuple((0, int(i), "") if _INDEX.fullmatch(i := e.strip("[]")) else (1, 0, e) for e in split(path))


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
                key = outline(re.sub(r"\{\w+\}", "#", skeleton.text))
                self._dotted.setdefault(key, []).append((skeleton, value))
                self._flat.setdefault(flatten(key), []).append((skeleton, value))

    def __iter__(self) -> Iterator[tuple[Skeleton, T]]:
        for candidates in self._dotted.values():
            yield from candidates

    def find(self, path: str) -> Found[T] | None:
        """Return the pattern that matches a dotted path, or None."""
        for skeleton, value in self._dotted.get(outline(path), ()):
            if skeleton.match(path) is not None:
                return Found(path, value, skeleton)
        return None

    def unflatten(self, flat: str) -> list[Found[T]]:
        """Return every dotted path of these patterns whose flat spelling is `flat`: none, one, or an ambiguity."""
        found = []
        for skeleton, value in self._flat.get(outline(flat), ()):
            path = _place(skeleton, numbers(flat))
            if path is not None and flatten(path) == flat:
                found.append(Found(path, value, skeleton))
        return found


def _place(skeleton: Skeleton, given: list[int]) -> str | None:
    """Put the numbers of a flat name into a skeleton, or None where a literal number differs."""
    rest = iter(given)
    path = []
    for element in skeleton.elements:
        if _variable(element):
            path.append(element.replace("{" + _variable(element) + "}", str(next(rest))))
            continue
        if any(next(rest) != literal for literal in numbers(flatten(element))):
            return None
        path.append(element)
    return join(path)


class Rule(NamedTuple):
    """One choice-free reading of a rule: a foreign spelling, and the canonical parts that it stands for, in order.

        model.language_model.**                = model.**                                   another prefix
        layers.{i}.attention.(q_proj|k_proj)   = encoder.layer.{i}.attention.(query|key)    a zip of choices
        layers.{i}.self_attn.(q_proj|k_proj)   = layers.{i}.attn.qkv[(q|k)]                 parts of one weight
        layers.{i}.mlp.gate_up_proj            = layers.{i}.mlp.(gate_proj|up_proj)         several weights
        layers.{i}.mlp.experts.gate_up_proj    = layers.{i}.moe.experts.{e}.(w1|w3)         a stack along e

    A choice that only the right side has lists the parts of a weight that is fused on the left; an index that only the
    right side has is the axis of a stack, and stays as `{e}` in what `apply` returns.
    """

    left: Skeleton
    parts: tuple[Skeleton, ...]

    @property
    def axis(self) -> str:
        """The index that only the right side has, or nothing."""
        return next((v for v in self.parts[0].variables if v not in self.left.variables), "")

    def apply(self, path: str) -> tuple[str, ...] | None:
        """Return the canonical paths that `path` stands for, or None where the rule says nothing of it."""
        found = _bind(self.left, path)
        return None if found is None else tuple(_substitute(part, *found) for part in self.parts)

    def locate(self, path: str) -> tuple[str, int, tuple[str, ...]] | None:
        """Return a stack's foreign name, the number of the matrix that `path` is in, and all parts there; or None."""
        for part in self.parts if self.axis else ():
            found = _bind(part, path)
            if found is not None:
                parts = tuple(_substitute(p, *found) for p in self.parts)
                return _substitute(self.left, *found), int(found[0][self.axis]), parts
        return None

    def invert(self, path: str) -> str | None:
        """Return the foreign spelling of one canonical path; None where it is not one to one."""
        if len(self.parts) > 1 or self.axis:
            return None
        found = _bind(self.parts[0], path)
        return None if found is None else _substitute(self.left, *found)


def parse_rule(text: str) -> tuple[Rule, ...]:
    """Expand the choices of `left = right`; raises UsageError where the sides do not correspond."""
    left, equals, right = (side.strip() for side in text.partition("="))
    ours, theirs = choices(left), choices(right)
    shared = len(ours) // 2
    extra = len(theirs) // 2 - shared
    if (
        not equals
        or extra not in (0, 1)
        or any(len(a) != len(b) for a, b in zip(ours[1::2], theirs[1::2], strict=False))
    ):
        raise UsageError(
            f"the rule {text!r} is malformed", hint="choices on both sides zip: equally many, in one order"
        )
    rules = []
    for picked in product(*(range(len(c)) for c in ours[1::2])):
        one = pick(ours, picked)
        many = [pick(theirs, (*picked, n)) for n in range(len(theirs[-2]))] if extra else [pick(theirs, picked)]
        rule = Rule(Skeleton(_elements(one, text), 0), tuple(Skeleton(_elements(m, text), 0) for m in many))
        unbound = set(rule.left.variables) - set(rule.parts[0].variables)
        if unbound or len(set(rule.parts[0].variables) - set(rule.left.variables)) > 1 or "*" in rule.left.elements:
            raise UsageError(f"the rule {text!r} is malformed", hint="each {i} of the left occurs on the right")
        rules.append(rule)
    return tuple(rules)


def pick(every: list[list[str]], picked: tuple[int, ...]) -> str:
    """Return the text with these alternatives of its choices."""
    places = iter(picked)
    return "".join(c[next(places)] if n % 2 else c[0] for n, c in enumerate(every))


def _bind(skeleton: Skeleton, path: str) -> tuple[dict[str, str], tuple[str, ...]] | None:
    """Return what the indices of a skeleton are in `path`, and the elements that its ** stands for."""
    elements = split(path)
    indices = _match(skeleton.elements, elements)
    if indices is None:
        return None
    tail = elements[len(skeleton.elements) - 1 :] if skeleton.elements[-1] == "**" else ()
    return dict(zip(skeleton.variables, map(str, indices), strict=True)), tail


def _substitute(skeleton: Skeleton, values: Mapping[str, str], tail: tuple[str, ...]) -> str:
    filled: list[str] = []
    for element in skeleton.elements:
        variable = _variable(element)
        if element == "**":
            filled += tail
        else:
            filled.append(element.replace("{" + variable + "}", values.get(variable, "{" + variable + "}")))
    return join(filled)
