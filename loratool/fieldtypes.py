"""Whether the fields of a dataclass hold what they are annotated with: families are data, written by strangers.

A tuple of one that lacks its comma is a text, and texts have letters where a tuple has items: `roles="q"` would be
taken without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

_SINGLE = {str: "a text", int: "a whole number", bool: "True or False"}
_MANY = {str: "texts", int: "whole numbers"}


def mistakes(record: Any) -> Iterator[str]:
    """Yield what is wrong with the fields of a dataclass, and with those of the dataclasses in them."""
    kind: Any = type(record)
    for name, hint in _hints(kind):
        value = getattr(record, name)
        if not holds(value, hint):
            yield f"{name} must be {_told(hint)}, not {_short(value)}"
            continue
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if is_dataclass(item):
                of = f"{type(item).__name__}({getattr(item, 'pattern', '')!r})"
                yield from (f"{mistake} (in {of})" for mistake in mistakes(item))


@cache
def _hints(kind: Any) -> tuple[tuple[str, Any], ...]:
    hints = get_type_hints(kind)
    return tuple((f.name, hints[f.name]) for f in fields(kind))


def holds(value: object, hint: Any) -> bool:
    """Whether a value is of a type, looking into tuples and mappings; a list will do for a tuple."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(holds(value, one) for one in inner)
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        if inner[-1] is Ellipsis:
            return all(holds(item, inner[0]) for item in value)
        return len(value) == len(inner) and all(map(holds, value, inner))
    if origin is Mapping:
        return isinstance(value, Mapping) and all(holds(k, inner[0]) and holds(v, inner[1]) for k, v in value.items())
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return hint is Any or isinstance(value, hint)


def _told(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(_told, inner))
    if origin is tuple:
        return f"a tuple of {_plural(inner[0])}" if inner[-1] is Ellipsis else f"({', '.join(map(_told, inner))})"
    if origin is Mapping:
        return f"a dict of {_plural(inner[0])} to {_plural(inner[1])}"
    return _SINGLE.get(hint, f"{hint.__name__}(...)")


def _plural(hint: Any) -> str:
    if get_origin(hint) is tuple:
        return (
            f"tuples, each {_told(hint)}"
            if get_args(hint)[-1] is not Ellipsis
            else f"tuples of {_plural(get_args(hint)[0])}"
        )
    return _MANY.get(hint, f"{getattr(hint, '__name__', hint)}s")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
