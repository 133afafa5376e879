"""Strict JSON: the files come from strangers, and Python's parser is lenient where leniency changes meaning.

Refused: encodings other than UTF-8, halves of surrogate pairs, duplicate keys (the last would win silently), NaN and
infinities, numbers that overflow, bottomless nesting, files beyond a cap. Caps are bytes.
"""

from __future__ import annotations

import json
import re
from math import isfinite
from pathlib import Path
from typing import Any

from loratool.errors import FormatError, StorageError

CONFIG_CAP = 10 << 20
INDEX_CAP = 64 << 20
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


def read(path: Path, cap: int = CONFIG_CAP) -> dict[str, Any]:
    """Read and parse a JSON file of at most `cap` bytes."""
    try:
        if path.stat().st_size > cap:
            raise FormatError(f"{path.stat().st_size:,} bytes is beyond the cap of {cap:,}", where=path)
        return parse(path.read_bytes(), path)
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror}", where=path) from None


def dump(content: object) -> bytes:
    """Serialise as the Hugging Face libraries do: indented, fields sorted, one newline at the end.

    Only the fields of the outermost object: in rank_pattern and alpha_pattern the first key that matches wins.
    """
    if isinstance(content, dict):
        content = dict(sorted(content.items()))
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [k for k, _ in pairs]
        raise ValueError(f"duplicate key {next(n for n in names if names.count(n) > 1)!r}")
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
