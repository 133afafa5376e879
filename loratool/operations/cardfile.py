"""A model card as text: metadata in YAML at the top, prose, and one block that is loratool's.

What somebody wrote stays as it is, byte for byte: fields that are missing are added, tags are joined, and of the text
only the block between its two marks changes. Source: the Hub's page on model cards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loratool.errors import FormatError

Fields = Mapping[str, object]
_BEGIN, _END = "<!-- loratool -->", "<!-- /loratool -->"
_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(?P<yaml>.*?)(?:^|\n)---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_BLOCK = re.compile(re.escape(_BEGIN) + r"\n?(?P<text>.*?)\n?" + re.escape(_END), re.DOTALL)
_CAP = 1 << 20


def fields_of(card: str, where: object = "README.md") -> dict[str, Any]:
    """Return the metadata of a card; FormatError where it is no YAML, or no mapping."""
    match = _FRONT.match(card)
    if match is None:
        return {}
    import yaml

    try:
        content = yaml.safe_load(match["yaml"][:_CAP])
    except (yaml.YAMLError, RecursionError) as problem:
        mark = getattr(problem, "problem_mark", None)
        line = f", line {mark.line + 2}" if mark is not None else ""
        what = f"the card's metadata is broken YAML{line}: {getattr(problem, 'problem', None) or 'not readable'}"
        raise FormatError(what, where=where, hint="mend the lines between the two ---") from None
    if content is not None and not isinstance(content, dict):
        raise FormatError("the card's metadata is no mapping", where=where, hint="mend the lines between the two ---")
    return {str(name): value for name, value in (content or {}).items()}


def block_of(card: str) -> str:
    """Return loratool's block of a card, without its marks; empty where there is none."""
    match = _BLOCK.search(card)
    return match["text"] if match else ""


def updated(card: str, fields: Fields, block: str, title: str = "", where: object = "README.md") -> str:
    """Return a card with the fields that it lacks, joined tags, and the block; a new one where it is empty."""
    present = fields_of(card, where)
    missing = {n: v for n, v in fields.items() if v and n != "tags" and present.get(n) in (None, "", [])}
    known = present.get("tags")
    tags = [known] if isinstance(known, str) else [str(tag) for tag in known] if isinstance(known, list) else []
    wanted = fields.get("tags")
    new = [tag for tag in wanted if tag not in tags] if isinstance(wanted, (list, tuple)) else []
    match = _FRONT.match(card)
    front, rest = (match["yaml"].strip("\n"), card[match.end() :]) if match else ("", card)
    for name in [*missing, *(["tags"] if new else [])]:
        front = _without(front, name)
    lines = [line for line in (front, *_spelled(missing), *(_spelled({"tags": [*tags, *new]}) if new else ())) if line]
    if not rest.strip() and title:
        rest = f"\n# {title}\n"
    if block:
        marked = f"{_BEGIN}\n{block}\n{_END}"
        found = _BLOCK.search(rest)
        rest = rest[: found.start()] + marked + rest[found.end() :] if found else f"{rest.rstrip()}\n\n{marked}\n"
    if match and not missing and not new:
        return card[: match.end()] + rest
    return "\n".join(["---", *lines, "---", rest])


def _spelled(fields: Fields) -> Iterator[str]:
    """Yield fields as YAML: JSON, which YAML is a superset of, one tag or base a line."""
    for name, value in fields.items():
        if isinstance(value, (list, tuple)):
            yield "\n".join([f"{name}:", *(f"- {_scalar(item)}" for item in value)])
        else:
            yield f"{name}: {_scalar(value)}"


def _scalar(value: object) -> str:
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w.+/-]*(?::[\w.+/-]+)*", value)
    reserved = str(value).lower() in ("true", "false", "null", "yes", "no", "on", "off", "y", "n")
    return str(value) if plain and not reserved else json.dumps(value, ensure_ascii=False)


def _without(front: str, name: str) -> str:
    """Return metadata without one field and the lines that belong to it."""
    kept, inside = list[str](), False
    for line in front.splitlines():
        if re.match(rf"{re.escape(name)}\s*:", line):
            inside = True
        elif inside and (not line.strip() or line[0] in " \t-#"):
            continue
        else:
            inside = False
        if not inside:
            kept.append(line)
    return "\n".join(kept)


def listed(lines: Sequence[str]) -> str:
    """Return lines as a list in markdown."""
    return "\n".join(f"- {line}" for line in lines)
