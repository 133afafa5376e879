"""The file behind `--adapter-config`: adapters, each with its weight and its modules."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratool.errors import UsageError
from loratool.storage import jsonfile, location

if TYPE_CHECKING:
    from loratool.settings import Applied

_EXAMPLE = '{"adapters": [{"path": "style", "weight": 0.7, "exclude": ["lm_head"]}, {"path": "subject"}]}'
_KEYS = {"path", "weight", "target", "exclude", "scales", "init_adapter"}


def read(file: Path) -> list[Applied]:
    """Return the adapters that a file lists; UsageError names what is malformed."""
    content = jsonfile.read(file)
    entries = content.get("adapters")
    if content.keys() != {"adapters"} or not isinstance(entries, list) or not entries:
        raise UsageError("a list of adapters is wanted", where=file, hint=_EXAMPLE)
    return [_applied(entry, file) for entry in entries]


def _applied(entry: Any, file: Path) -> Applied:
    from loratool.settings import Applied

    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise UsageError(f"an adapter without a path: {entry}", where=file, hint=_EXAMPLE)
    if entry.keys() - _KEYS:
        unknown = ", ".join(sorted(entry.keys() - _KEYS))
        raise UsageError(f"unknown: {unknown}", where=file, hint=f"there are {', '.join(sorted(_KEYS))}")
    weight, scales, initial = entry.get("weight", 1.0), entry.get("scales", {}), entry.get("init_adapter", "")
    if not isinstance(scales, dict) or not all(_is_number(n) for n in (weight, *scales.values())):
        raise UsageError(f"the weights of {entry['path']} are no numbers", where=file, hint=_EXAMPLE)
    target, exclude = (_patterns(entry.get(name, []), name, file) for name in ("target", "exclude"))
    if not isinstance(initial, str):
        raise UsageError("init_adapter is a path", where=file)
    paths = [_place(entry["path"], file), _place(initial, file)]
    return Applied(paths[0], float(weight), scales, target, exclude, paths[1])


def _place(source: str, file: Path) -> str | Path:
    """Return a source as seen from the file: a path beside it, or a name on the Hub."""
    beside = file.parent / source
    return source if not source or (location.is_remote(source) and not beside.exists()) else beside


def _patterns(value: Any, name: str, file: Path) -> list[str]:
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
        raise UsageError(f"{name} is a list of patterns", where=file, hint=_EXAMPLE)
    return patterns


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
