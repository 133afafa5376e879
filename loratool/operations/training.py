"""What the header of an adapter file tells people: which models it is for, what it is called, how it was trained.

The header comes from a stranger: every field may be missing, malformed or enormous, and means no more than it says.
Sources: sd-scripts train_network.py (ss_*); Stability AI's model metadata standard (modelspec.*).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from loratool import strictjson
from loratool.adapter import Finding
from loratool.errors import FormatError
from loratool.formats.metadata import BASE, HISTORY, SPEC

_MOST_WORDS = 8
_MOST_CHARACTERS = 2000  # of one field: enough for a description
_FIELDS = {
    "base_version": (BASE, SPEC),
    "title": ("modelspec.title", "ss_output_name"),
    "author": ("modelspec.author",),
    "license": ("modelspec.license",),
    "description": ("modelspec.description",),
    "usage": ("modelspec.usage_hint",),
    "trigger_phrase": ("modelspec.trigger_phrase",),
    "comment": ("ss_training_comment",),
    "resolution": ("ss_resolution", "modelspec.resolution"),
    "steps": ("ss_steps",),
    "epochs": ("ss_epoch",),
    "images": ("ss_num_train_images",),
}
_NOTHING = ("", "None", "null")


def told(metadata: Mapping[str, str]) -> tuple[dict[str, Any], list[Finding]]:
    """Return what the header says that people ask for, and what of it cannot be read."""
    found: dict[str, Any] = {}
    for name, fields in _FIELDS.items():
        value = next((metadata[f] for f in fields if metadata.get(f, "") not in _NOTHING), "")
        if value:
            found[name] = value if len(value) <= _MOST_CHARACTERS else value[:_MOST_CHARACTERS] + "…"
    findings: list[Finding] = []
    words = _words(metadata, findings)
    if words:
        found["trigger_words"] = words
    steps = _list(metadata, HISTORY, findings)
    if steps:
        found["made_by"] = [made for step in steps[-_MOST_WORDS:] if (made := _made(step))]
    return found, findings


def _words(metadata: Mapping[str, str], findings: list[Finding]) -> list[str]:
    """Return the commonest tags of the captions. sd-scripts counts them by folder, or by data set and folder."""
    counts: Counter[str] = Counter()
    folders = [_parsed(metadata, "ss_tag_frequency", findings)]
    if "ss_tag_frequency" not in metadata:
        sets = _list(metadata, "ss_datasets", findings)
        folders = [d["tag_frequency"] for d in sets if isinstance(d, dict) and isinstance(d.get("tag_frequency"), dict)]
    for tags in (tags for by_folder in folders for tags in by_folder.values()):
        counts.update(dict(_counted(tags)))
    return [f"{tag} ({number:,})" for tag, number in sorted(counts.items(), key=lambda t: (-t[1], t[0]))[:_MOST_WORDS]]


def _counted(tags: object) -> Iterator[tuple[str, int]]:
    for tag, number in tags.items() if isinstance(tags, dict) else ():
        if isinstance(number, int) and 0 < number < 1 << 53 and tag.strip():
            yield tag.strip()[:200], number


def _parsed(metadata: Mapping[str, str], field: str, findings: list[Finding]) -> dict[str, Any]:
    text = metadata.get(field, "")
    if text in _NOTHING:
        return {}
    try:
        return strictjson.parse(text, field)
    except FormatError as problem:
        findings.append(Finding("info", field, f"cannot be read: {problem.what}"))
        return {}


def _list(metadata: Mapping[str, str], field: str, findings: list[Finding]) -> list[Any]:
    text = metadata.get(field, "")
    wrapped = {field: text if text in _NOTHING else f'{{"items": {text}}}'}
    items = _parsed(wrapped, field, findings).get("items", [])
    return items if isinstance(items, list) else []


def _made(step: object) -> str:
    """Return a step of loratool's history as a sentence, `resize (loratool 0.1.0) of style.safetensors`."""
    if not isinstance(step, dict):
        return ""
    sources = step.get("sources")
    names = [str(s.get("name", ""))[:200] for s in sources if isinstance(s, dict)] if isinstance(sources, list) else []
    of = f" of {', '.join(names[:_MOST_WORDS])}" if names else ""
    return f"{str(step.get('verb', '?'))[:40]} ({str(step.get('by', '?'))[:40]}){of}"
