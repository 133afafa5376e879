"""A model card as text: metadata in YAML at the top, prose, and one block that is loratool's.

What somebody wrote stays as it is, byte for byte: fields that are missing are added, tags are joined, and of the text
only the block between its two marks changes. Source: the Hub's page on model cards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from loratool.errors import FormatError

Fields = Mapping[str, object]
_BEGIN, _END = "<!-- loratool -->", "<!-- /loratool -->"
_FRONT = re.compile(r"(?ms)\A\ufeff?(?:[ \t]*\r?\n)*---[ \t]*\r?\n(?P<yaml>.*?)^---[ \t]*(?:\r?\n|\Z)")
_BLOCK = re.compile(rf"{_BEGIN}(?:\r?\n)?(?P<text>(?:(?!{_BEGIN}).)*?)(?:\r?\n)?{_END}", re.DOTALL)
# of odd scalars, too: PyYAML lets what Python says of them through
_UNREADABLE = (RecursionError, ValueError, KeyError, TypeError, OverflowError, AttributeError)
_CAP = 1 << 20


def fields_of(card: str, where: object = "README.md") -> dict[str, Any]:
    """Return the metadata of a card; FormatError where it is no YAML, or no mapping."""
    match = _FRONT.match(card)
    if match is None:
        return {}
    import yaml

    if len(match["yaml"]) > _CAP:
        raise FormatError("the card's metadata is over 1 MiB", where=where, hint="shorten the part between the two ---")
    try:
        content = yaml.safe_load(match["yaml"])
    except (yaml.YAMLError, *_UNREADABLE) as problem:
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
    return match["text"].replace("\r\n", "\n") if match else ""


def without_block(card: str) -> str:
    """Return a card without loratool's block."""
    pattern = rf"(?P<before>(?:\r?\n)?){_BLOCK.pattern}(?P<after>(?:\r?\n)?)"
    return re.sub(pattern, lambda m: m["before"] and m["after"], card, count=1, flags=re.DOTALL)


def updated(
    card: str, fields: Fields, block: str, title: str = "", where: object = "README.md", *, said: Fields | None = None
) -> str:
    """Return a card with the fields that it lacks, joined tags, and the block; a new one where it is empty.

    What is `said` stands instead of what the card has; where it is empty, the field goes.
    """
    present = fields_of(card, where)
    changes = {n: v for n, v in fields.items() if v and n != "tags" and present.get(n) in (None, "", [])}
    changes |= {n: v for n, v in (said or {}).items() if v != (present.get(n) or "")}
    known = changes.get("tags", present.get("tags"))
    tags = known if isinstance(known, list) else [known] if known else []
    wanted = fields.get("tags")
    new = [tag for tag in wanted if tag not in map(str, tags)] if isinstance(wanted, (list, tuple)) else []
    changes |= {"tags": [*tags, *new]} if new else {}
    match = _FRONT.match(card)
    rest = card[match.end() :] if match else card
    newline = "\r\n" if "\r\n" in card else "\n"
    if not rest.strip() and title:
        rest = f"\n# {title}\n"
    if block:
        marked = f"{_BEGIN}\n{block}\n{_END}".replace("\n", newline)
        found = _BLOCK.search(rest)
        gap = newline if rest.endswith("\n") else newline * 2
        rest = rest[: found.start()] + marked + rest[found.end() :] if found else f"{rest}{gap}{marked}{newline}"
    if match is None:
        return f"---{newline}{_edited('', changes, newline)}---{newline}{rest}"
    front = _edited(match["yaml"], changes, newline) if changes else match["yaml"]
    return card[: match.start("yaml")] + front + card[match.end("yaml") : match.end()] + rest


def _edited(front: str, changes: Fields, newline: str) -> str:
    """Return metadata with some fields changed, or gone where they are empty, and the lines of all others as they are.

    Where lines do not suffice, as with an alias to what goes, or braces around everything, it is written anew.
    """
    wanted = {name: value for name, value in changes.items() if value}
    lines = "".join(f"{line}\n" for line in _spelled(wanted)).replace("\n", newline)
    flat = [item for value in wanted.values() for item in (value if isinstance(value, list) else [value])]
    if not front and all(isinstance(item, str) for item in flat):
        return lines
    import yaml

    expected = {name: v for name, v in (yaml.safe_load(front) or {}).items() if str(name) not in changes} | wanted
    text = _without(front, changes) + lines
    try:
        if (yaml.safe_load(text) or {}) == expected:
            return text
    except (yaml.YAMLError, RecursionError):
        pass
    return str(yaml.safe_dump(expected, sort_keys=False, allow_unicode=True)).replace("\n", newline)


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
    return str(value) if plain and not reserved else json.dumps(value, ensure_ascii=False, default=str)


def _without(front: str, names: Collection[str]) -> str:
    """Return metadata without some fields and the lines that belong to them."""
    import yaml

    root = yaml.compose(front, Loader=yaml.SafeLoader)
    keys = [key for key, _ in root.value] if isinstance(root, yaml.MappingNode) else []
    starts = [front.rfind("\n", 0, key.start_mark.index) + 1 for key in keys]
    starts.append(len(front))
    kept = front[: starts[0]]
    for key, (start, stop) in zip(keys, pairwise(starts), strict=True):
        lines = front[start:stop]
        after = re.search(r"(?:^(?:#[^\n]*)?\r?\n)*\Z", lines, re.MULTILINE)  # comments of what follows
        kept += lines if str(key.value) not in names else after[0] if after else ""
    return kept


def listed(lines: Sequence[str]) -> str:
    """Return lines as a list in markdown."""
    return "\n".join(f"- {line}" for line in lines)
