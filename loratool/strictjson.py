"""Strict JSON: the text comes from strangers, and Python's parser is lenient where leniency changes meaning.

Refused: encodings other than UTF-8, halves of surrogate pairs, duplicate keys (the last would win silently), NaN and
infinities, numbers that overflow, bottomless nesting.
"""

from __future__ import annotations

import json
import re
from math import isfinite
from typing import Any

from loratool.errors import FormatError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse(data: bytes | str, where: object) -> dict[str, Any]:
    """Parse a JSON object, or raise FormatError naming `where`."""
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        content = json.loads(
            text,
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
        if _SURROGATE.search(text):
            json.dumps(content, ensure_ascii=False).encode()  # fails on half a pair, which no file or terminal can hold
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not valid JSON: {_first_line(error)}", where=where) from None
    if not isinstance(content, dict):
        raise FormatError(f"expected a JSON object, found a {type(content).__name__}", where=where)
    return content


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key {twice[:80]!r}")
    return content


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _integer(text: str) -> int | float:
    return int(text) if text != "-0" else -0.0  # as other parsers read it, so that no size may be spelled so


def _finite(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"the number {text[:20]} overflows")
    return value


def _first_line(error: BaseException) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0][:200]
