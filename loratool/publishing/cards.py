"""The README.md that goes along: what is on the Hub or beside the files, with what is missing and how it was made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter, Finding
from loratool.errors import FormatError, HubError, LoratoolError
from loratool.opening import open_adapter
from loratool.operations import card, cardfile
from loratool.operations.residual import residual_in
from loratool.publishing.sending import PRIVATE, Target
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
    beside: Path,
    to: Target,
    publishing: Publishing,
    report: Mapping[str, Any] | None = None,
) -> tuple[str, list[Finding]]:
    """Return the card, and what should be known about it. `report` is of the run that made the content.

    A card on the Hub is kept, and one beside the files otherwise; either gets the fields that it lacks, and our block.
    """
    path = f"{to.name.path}/README.md" if to.name.path else "README.md"
    there = to.text(path)
    local = _text(beside / "README.md") if beside.is_dir() else ""
    report = report if report is not None else _report_in(beside)
    fields = card.of_adapter(content) if isinstance(content, Adapter) else card.of_model(content)
    fields = _joined(cardfile.fields_of(local, beside / "README.md"), fields)
    fields = _joined(fields, _of_sources(report or {}, fields))
    try:
        present = cardfile.fields_of(there, f"README.md of {to.name}")
    except FormatError as problem:
        raise HubError(problem.what, where=problem.where, hint=f"{problem.hint}, on the Hub; then push again") from None
    if publishing.licence:
        fields["license"] = publishing.licence
    elif not (present.get("license") or fields.get("license")):
        fields |= _of_base(present.get("base_model") or fields.get("base_model"))
    block = _block(cardfile.block_of(local), report, publishing)
    text = cardfile.updated(there or local, fields, block, to.name.repo.rpartition("/")[2], path)
    findings = []
    if there and local and there != local:
        what = "the card on the Hub stays as it is, but for fields that it lacks and loratool's block"
        findings.append(Finding("info", path, what))
    if not cardfile.fields_of(text).get("license"):
        findings.append(Finding("warning", path, _NO_LICENCE))
    return text, findings


def bases_of_here(files: Mapping[str, Path]) -> list[Finding]:
    """Warn of adapters that name a folder of this machine as their base: elsewhere nobody finds it."""
    findings = []
    for name, path in files.items():
        told = jsonfile.read(path).get("base_model_name_or_path") if Path(name).name == "adapter_config.json" else ""
        if not isinstance(told, str) or not (told and (Path(told).is_absolute() or checkpoint.exists(told))):
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
    return [str(tag) for tag in tags] if isinstance(tags, (list, tuple)) else [str(tags)] if tags else []


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8") if path.is_file() else ""
    except UnicodeDecodeError:
        raise FormatError("the card is not UTF-8", where=path, hint="save it as UTF-8") from None


def _report_in(folder: Path) -> dict[str, Any] | None:
    path = folder / PRIVATE[0]
    return jsonfile.read(path, 1 << 30) if folder.is_dir() and path.is_file() else None


def _block(local: str, report: Mapping[str, Any] | None, publishing: Publishing) -> str:
    from loratool import __version__

    if report is None:
        return local
    sources = report.get("sources")
    digests = {role: _digest(str(path)) for role, path in (sources if isinstance(sources, dict) else {}).items()}
    made = card.made(report, __version__, publishing.command, digests)
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


def _of_sources(report: Mapping[str, Any], fields: Mapping[str, object]) -> dict[str, object]:
    """Return what the cards of the adapters that this was made from say, where they can be read."""
    sources = report.get("sources")
    found: dict[str, object] = {}
    for role, source in (sources if isinstance(sources, dict) else {}).items():
        told = _card_of(str(source)) if str(role).startswith(("adapter", "tuned")) else {}
        found = {**card.inherited(told), **found}
    return found


def _of_base(named: object) -> dict[str, object]:
    """Return the licence that the base's card names, where it is on the Hub."""
    bases = [named] if isinstance(named, str) else list(named) if isinstance(named, list) else []
    return card.licence(_card_of(str(bases[0]))) if bases else {}


def _card_of(source: str) -> dict[str, Any]:
    """Return the metadata of a source's card; empty where there is none, or it cannot be read."""
    try:
        if not location.is_remote(source):
            place = Path(source)
            return cardfile.fields_of(_text((place if place.is_dir() else place.parent) / "README.md"))
        name = parse(source)
        if name is None or not re.fullmatch(r"[\w.-]+/[\w.-]+", name.repo):
            return {}
        listing = hub.listing(name._replace(path=""))
        return cardfile.fields_of(Target(name._replace(path=""), listing).text("README.md"))
    except LoratoolError:
        return {}
