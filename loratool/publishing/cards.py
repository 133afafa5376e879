"""The README.md that goes along: what is on the Hub or beside the files, with what is missing and how it was made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

from loratool.adapter import Adapter, Finding
from loratool.errors import FormatError, HubError, LoratoolError
from loratool.opening import open_adapter
from loratool.operations import card, cardfile
from loratool.operations.residual import residual_in
from loratool.publishing.sending import PRIVATE, Target, replaces_weights
from loratool.settings import Publishing
from loratool.storage import checkpoint, hub, jsonfile, location
from loratool.storage.hub_names import parse

_DIGESTED = 4 << 30  # bytes: inputs up to this size are named by their SHA-256
_NO_LICENCE = "the card says no licence: --license NAME, such as apache-2.0, or other"


def opened(paths: list[str], plugins: Any = None) -> Adapter | checkpoint.Checkpoint:
    """Return what is to be published: the first path's adapter, or its model."""
    try:
        return open_adapter(paths[0], plugins=plugins)
    except LoratoolError as problem:
        if checkpoint.is_adapter_folder(paths[0]):
            raise
        try:
            return checkpoint.open_base(paths[0])
        except LoratoolError:
            raise problem from None


def composed(
    content: Adapter | checkpoint.Checkpoint,
    files: Mapping[str, Path],
    paths: Sequence[str],
    to: Target,
    publishing: Publishing,
    *,
    report: Mapping[str, Any] | None = None,
) -> tuple[str, list[Finding]]:
    """Return the card, and what should be known about it. `report` is of the run that made the content.

    A card on the Hub is kept, and one among the files otherwise; either gets the fields that it lacks, and our block.
    """
    path = f"{to.name.path}/README.md" if to.name.path else "README.md"
    there = to.text(path)
    report = report if report is not None else _report_in(paths)
    fields = card.of_adapter(content) if isinstance(content, Adapter) else card.of_model(content)
    local, findings = _local(files.get("README.md"), str(fields.get("base_model") or ""))
    beside = cardfile.fields_of(local, files.get("README.md"))
    try:
        present = cardfile.fields_of(there, f"README.md of {to.name}")
    except FormatError as problem:
        raise HubError(problem.what, where=problem.where, hint=f"{problem.hint}, on the Hub; then push again") from None
    fields, sources = _joined(beside, fields), _of_sources(report or {})
    is_adapter = isinstance(content, Adapter)
    for role, told in sources.items():
        same_base = is_adapter and role != "tuned"
        fields = _joined(fields, card.inherited(told, *(("base_model",) if same_base else ())))
    base = present.get("base_model") or fields.get("base_model")
    fields = _joined(fields, {"base_model_relation": "adapter" if is_adapter and base else ""})
    licence = _licence([present, beside, *([_common(sources)] if is_adapter else [])], report or {}, base)
    fields = card.with_licence(fields, {} if publishing.licence else licence)
    said = {}
    if publishing.licence and publishing.licence != (present if there else beside).get("license"):
        said = card.new_licence(publishing.licence)
    elif not publishing.licence:
        given = {} if is_adapter else {"base": _card_of(_base_in(report or {}))}
        findings += _other_licences(licence, {**given, **sources}, path)
    block = _block(cardfile.block_of(local), report, publishing)
    if report is None and block in ("", cardfile.block_of(there)) and replaces_weights(to, files):
        there, local, block = cardfile.without_block(there), cardfile.without_block(local), ""
    text = cardfile.updated(there or local, fields, block, to.name.repo.rpartition("/")[2], path, said=said)
    if there and local and there != local:
        what = "the card on the Hub stays as it is, but for fields that it lacks and loratool's block"
        findings.append(Finding("info", path, what))
    if not cardfile.fields_of(text).get("license"):
        findings.append(Finding("warning", path, _NO_LICENCE))
    return hub.without_tokens(text), findings


def _local(path: Path | None, base: str) -> tuple[str, list[Finding]]:
    """Return the card among the files, without what it says of folders of this machine; `base` is the Hub's name."""
    text = _text(path) if path else ""
    fields = cardfile.fields_of(text, path)
    said = card.without_paths(fields)
    if not said:
        return text, []
    what = f"the card names a folder of this machine as its base ({fields.get('base_model')})"
    what += f"; on the Hub it says {base}" if base else "; on the Hub it does not"
    hint = "" if base else f"set base_model in {path} to the base's name on the Hub, and push this again"
    return cardfile.updated(text, {}, "", said=said), [Finding("info", str(path), what, hint)]


def _licence(cards: Sequence[Mapping[str, Any]], report: Mapping[str, Any], named: object) -> dict[str, object]:
    """Return the licence of the first card that says one, or else of the base: as it was given, or as it is named."""
    found = next(filter(None, map(card.licence, cards)), None)
    return found or card.licence(_card_of(_base_in(report))) or _of_base(named)


def _base_in(report: Mapping[str, Any]) -> str:
    """Return the base that something was made from, as it was given; empty where there was none."""
    sources = report.get("sources")
    return str(sources.get("base") or "") if isinstance(sources, dict) else ""


def _common(sources: Mapping[str, Mapping[str, Any]]) -> dict[str, object]:
    """Return the licence that all sources have, or nothing: one of them cannot speak for the others."""
    told = [card.licence(fields) for fields in sources.values()]
    return told[0] if told and all(one == told[0] for one in told) else {}


def _other_licences(licence: Mapping[str, object], sources: Mapping[str, Any], path: str) -> list[Finding]:
    """Warn of what something was made from, where it is under another licence."""
    name = licence.get("license_name") or licence.get("license") or ""
    others = {role: told.get("license_name") or told.get("license") or "" for role, told in sources.items()}
    differ = ", ".join(f"{role}: {other}" for role, other in others.items() if other not in ("", name))
    what = f"the card says {f'the licence {name}' if name else 'no licence'}; what this was made from says: {differ}"
    hint = "do they agree? --license NAME says another"
    return [Finding("warning", path, what, hint)] if differ else []


def bases_of_here(files: Mapping[str, Path]) -> list[Finding]:
    """Warn of adapters that name a folder of this machine as their base: elsewhere nobody finds it."""
    findings = []
    for name, path in files.items():
        told = jsonfile.read(path).get("base_model_name_or_path") if Path(name).name == "adapter_config.json" else ""
        if not isinstance(told, str) or not (told and (card.is_path(told) or checkpoint.exists(told))):
            continue
        found = residual_in(told, ask=False)
        what = f"names {told} as its base{f', {found},' if found else ''} which is a folder of this machine"
        first = f"loratool push {told} ORG/NAME; then " if found else ""
        hint = f"{first}set base_model_name_or_path in {path} to the base's name on the Hub, and push this again"
        findings.append(Finding("warning", name, what, hint))
    return findings


def _joined(first: Mapping[str, Any], more: Mapping[str, object]) -> dict[str, Any]:
    """Return fields, with what they lack of more of them; tags are joined."""
    found = {**more, **{name: value for name, value in first.items() if value not in (None, "", [])}}
    tags = [tag for fields in (first, more) for tag in _listed(fields.get("tags"))]
    return {**found, "tags": list(dict.fromkeys(tags))}


def _listed(tags: object) -> list[str]:
    every = tags if isinstance(tags, (list, tuple)) else [tags] if tags else []
    return [str(tag) for tag in every if not isinstance(tag, (dict, list))]


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8") if path.is_file() else ""
    except UnicodeDecodeError:
        raise FormatError("the card is not UTF-8", where=path, hint="save it as UTF-8") from None


def _report_in(paths: Sequence[str]) -> dict[str, Any] | None:
    """Return the report beside the files of how they were made; that of a pull says nothing of it."""
    found = next((place for path in paths if (place := Path(path) / PRIVATE[0]).is_file()), None)
    report = jsonfile.read(found, 1 << 30) if found else {}
    return report if report and report.get("verb") != "pull" else None


def _block(local: str, report: Mapping[str, Any] | None, publishing: Publishing) -> str:
    from loratool import __version__

    if report is None:
        return local
    sources = report.get("sources")
    digests = {role: _digest(str(path)) for role, path in (sources if isinstance(sources, dict) else {}).items()}
    made = card.made(report, __version__, hub.without_tokens(publishing.command), digests)
    return f"{local}\n{made}" if local and made not in local else made


def _digest(source: str) -> str:
    """Return the SHA-256 of a local adapter's weights; a commit says as much of what was on the Hub."""
    place = Path(source)
    if not place.exists():
        return ""
    weights = place
    if place.is_dir():
        weights = next((place / n for n in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
                        if (place / n).is_file()), place)  # fmt: skip
    if not weights.is_file() or weights.stat().st_size > _DIGESTED:
        return ""
    state = sha256()
    with weights.open("rb") as file:
        while piece := file.read(4 << 20):
            state.update(piece)
    return state.hexdigest()


def _of_sources(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what the cards of the adapters or the model that this was made from say, where they can be read."""
    sources = report.get("sources")
    named = sources if isinstance(sources, dict) else {}
    return {role: _card_of(str(path)) for role, path in named.items() if str(role).startswith(("adapter", "tuned"))}


def _of_base(named: object) -> dict[str, object]:
    """Return the licence that the base's card names, where it is on the Hub."""
    bases = [named] if isinstance(named, str) else list(named) if isinstance(named, list) else []
    return card.licence(_card_of(str(bases[0]))) if bases else {}


def _card_of(source: str) -> dict[str, Any]:
    """Return the metadata of a source's card; empty where there is none, or it cannot be read."""
    try:
        place = Path(source)
        if not source or not (location.is_remote(source) or place.exists()):
            return {}
        if not location.is_remote(source):
            return _shown(cardfile.fields_of(_text((place if place.is_dir() else place.parent) / "README.md")), "")
        name = parse(source)
        if name is None or not re.fullmatch(r"[\w.-]+/[\w.-]+", name.repo):
            return {}
        listing = hub.listing(name._replace(path=""))
        files = f"{hub.shown_endpoint()}/{name.repo}/resolve/{listing.commit}/"
        return _shown(cardfile.fields_of(Target(name._replace(path=""), listing).text("README.md")), files)
    except LoratoolError:
        return {}


def _shown(fields: dict[str, Any], files: str) -> dict[str, Any]:
    """Return metadata of which another card can show the images: they are at `files`, or they stay behind."""
    widget = fields.get("widget")
    if not isinstance(widget, list):
        return fields
    for one in widget:
        output = one.get("output") if isinstance(one, dict) else None
        url = output.get("url") if isinstance(output, dict) else None
        if isinstance(output, dict) and isinstance(url, str) and "://" not in url:
            output["url"] = files + quote(url.removeprefix("./"))
            if not files:
                del one["output"]
    return {**fields, "widget": [one for one in widget if one]}
