"""What a model card says: of a merged model, of an adapter, and how either was made; as the Hub's conventions have it.

Paths of this machine stay out of it: a folder is called by its last name. base_model, its relation, library_name,
pipeline_tag and tags are those that PEFT, diffusers' training scripts and mergekit write.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PureWindowsPath
from typing import Any

from loratool.adapter import Adapter, Weighted
from loratool.deltas import Dora
from loratool.errors import LoratoolError
from loratool.operations.cardfile import fields_of, listed, updated
from loratool.operations.residual import Residual
from loratool.plan import TextFile
from loratool.storage.checkpoint import Checkpoint

_HUB_NAME = re.compile(r"(?!\.)[\w.-]{1,96}/(?!\.)[\w.-]{1,96}(?:@[\w./-]{1,200})?")
_LICENCE = ("license", "license_name", "license_link")
_TASKS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
_CLASSES = {
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
}
_VIDEO = ("wan", "hunyuan_video", "ltx", "ltx2")
#: What a report says of how good the result is.
_FIGURES = ("ranks", "rank", "retained", "error", "distance", "rounding", "noise_floor", "delta_norm", "bytes")


def card(base: Checkpoint, adapters: Sequence[Weighted], merged_into: str, dtype: str) -> TextFile:
    """Return README.md of a merged model.

    `merged_into` says what the base was when the deltas were added: decoded, or as trained.
    """
    hub = _hub_name(base, [a.adapter.base_model for a in adapters])
    lines = [f"Base: `{called(base.path if _is_hub(base.path) else hub or base.path)}`"]
    lines[0] += f", {merged_into}" if merged_into else ""
    for one in adapters:
        scales = "".join(f", {pattern}: x {scale:g}" for pattern, scale in one.scales)
        lines.append(f"Adapter: `{called(one.adapter.origin.path)}`, weight {one.weight:g}{scales}")
    how = "the base's own dtypes" if dtype == "keep" else dtype
    lines.append(f"Written in {how}; sums in fp32 or wider, rounded once, by loratool.")
    sources = [_repo(a.adapter.origin.path) for a in adapters if _is_hub(a.adapter.origin.path)]
    fields: dict[str, object] = {"base_model": [hub, *sources] if hub and sources else hub}
    fields |= {"base_model_relation": "merge" if hub else "", "tags": ["lora", "merged", "loratool"]}
    fields = {**of_model(base), **_licence_beside(base), **fields}
    return TextFile("README.md", updated("", fields, listed(lines), "Merged model"))


def residual_card(base: Checkpoint, residual: Residual) -> TextFile:
    """Return README.md of what a start left of a base: what it is, and which adapters it is for."""
    hub, name = _hub_name(base, []), _plain(str(residual))
    rest = ", and rounded to what nf4 holds" if residual.init == "loftq" else ""
    lines = [
        f"Base: `{called(base.path)}`, less what the adapter `{_plain(residual.adapter)}` starts from{rest}",
        "It is no model by itself: train on it, and merge into it, adapters that started there, at weight 1.",
        f"Adapters of {called(base.path)} itself do not fit it.",
    ]
    fields: dict[str, object] = {"base_model": hub, "tags": ["lora", "loratool"]}
    fields = {**of_model(base), **_licence_beside(base), **fields}
    return TextFile("README.md", updated("", fields, listed(lines), name[:1].upper() + name[1:]))


def _hub_name(base: Checkpoint, of_adapters: Sequence[str]) -> str:
    """Return what the Hub calls a base: as it was given, or as the adapters name it.

    `_name_or_path` in a config is what the model's author began with, as often as what the model is called: it counts
    where its last name is the folder's.
    """
    told = str((base.config or {}).get("_name_or_path") or "")
    own = [told] if Path(told).name == Path(base.path).name else []
    return next((_repo(name) for name in (base.path, *of_adapters, *own) if _is_hub(name)), "")


def _licence_beside(base: Checkpoint) -> dict[str, object]:
    """Return the licence that the card beside a local base says; on the Hub, push looks it up."""
    path = Path(base.folder, "README.md")
    if not base.folder or not path.is_file():
        return {}
    with suppress(LoratoolError, OSError, UnicodeDecodeError):  # somebody else's card
        return licence(fields_of(path.read_bytes().decode("utf-8")))
    return {}


def of_model(model: Checkpoint) -> dict[str, object]:
    """Return the metadata that the config of a whole model gives."""
    config = model.config or {}
    classes = config.get("architectures")
    name = str(classes[0]) if isinstance(classes, list) and classes else ""
    task = next((tag for ending, tag in _CLASSES.items() if name.endswith(ending)), "")
    library = "transformers" if config.get("model_type") else "diffusers" if config.get("_class_name") else ""
    return {"library_name": library, "pipeline_tag": task}


def of_adapter(adapter: Adapter) -> dict[str, object]:
    """Return the metadata that an adapter gives."""
    peft, base = adapter.origin.format == "peft", _repo(adapter.base_model) if _is_hub(adapter.base_model) else ""
    kind = str((adapter.origin.config or {}).get("task_type") or "")
    image = not peft or (not kind and _is_image(adapter))
    task = _TASKS.get(kind, "") if peft else ""
    if image:
        task = "text-to-video" if adapter.families and adapter.families[0] in _VIDEO else "text-to-image"
    dora = any(isinstance(d, Dora) for deltas in adapter.deltas.values() for d in deltas)
    tags = ["dora" if dora else "lora", *([f"base_model:adapter:{base}"] if base else []), "loratool"]
    tags += ["template:sd-lora", *([task] if task else [])] if image else []
    fields: dict[str, object] = {"base_model": base, "base_model_relation": "adapter" if base else ""}
    return {**fields, "library_name": "diffusers" if image else "peft", "pipeline_tag": task, "tags": tags}


def _is_image(adapter: Adapter) -> bool:
    return any(target.component in ("unet", "transformer") for target in adapter.deltas)


def inherited(source: Mapping[str, Any], *more: str) -> dict[str, object]:
    """Return what the card of an adapter that another was made from has to say of it, too."""
    names = ("instance_prompt", "widget", "language", "datasets", *more)
    found = {**source, **without_paths(source)}
    return {name: found[name] for name in names if found.get(name)}


def licence(source: Mapping[str, Any]) -> dict[str, object]:
    """Return the licence that a card says; name and link belong to it, and mean nothing beside that of another card."""
    return {name: source[name] for name in _LICENCE if source.get(name)}


def with_licence(fields: Mapping[str, object], told: Mapping[str, object]) -> dict[str, object]:
    """Return fields with the whole licence of another card instead of their own."""
    return {**{name: value for name, value in fields.items() if name not in _LICENCE}, **told}


def new_licence(name: str) -> dict[str, object]:
    """Return what a card says that gets another licence: nothing of the name and the link of the old one."""
    return {**dict.fromkeys(_LICENCE, ""), "license": name}


def is_path(name: str) -> bool:
    """Whether what a card or a config calls its base can only be a folder of some machine."""
    rooted = name.startswith((".", "/", "~", "\\")) or PureWindowsPath(name).drive != ""
    return rooted or ("://" not in name and name.partition("@")[0].count("/") > 1)


def without_paths(fields: Mapping[str, Any]) -> dict[str, object]:
    """Return base_model and tags, where they name folders of a machine, without these; empty where they do not."""
    bases, tags = (
        value if isinstance(value, list) else [value] if value else []
        for value in (fields.get("base_model"), fields.get("tags"))
    )
    kept = [base for base in bases if not is_path(str(base))]
    left = [tag for tag in tags if not _names_path(str(tag))]
    if (kept, left) == (bases, tags):
        return {}
    return {"base_model": kept[0] if len(kept) == 1 else kept, "tags": left}


def _names_path(tag: str) -> bool:
    """Whether this is a tag such as base_model:adapter:/home/me/base."""
    return tag.startswith("base_model:") and is_path(tag.split(":", 2)[-1])


def made(report: Mapping[str, Any], version: str, command: str = "", digests: Mapping[str, str] | None = None) -> str:
    """Return how something was made, by its report: command or verb, inputs with commit or SHA-256, error figures."""
    lines = [f"Made by loratool {version}: `{_plain(command or 'loratool ' + str(report.get('verb', '')))}`"]
    sources, totals = _mapping(report, "sources"), _mapping(report, "totals")
    for role, source in sources.items():
        digest = (digests or {}).get(role, "")
        lines.append(f"{_plain(role).capitalize()}: `{called(str(source))}`{f', SHA-256 {digest}' if digest else ''}")
    for name in _FIGURES:
        if totals.get(name) not in (None, "", [], {}):
            lines.append(f"{name.replace('_', ' ').capitalize()}: {_figure(totals[name])}")
    return listed(lines)


def _mapping(report: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = report.get(name)
    return value if isinstance(value, dict) else {}


def _figure(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(_figure, value[:12])) if isinstance(value, list) else _plain(str(value))


def _is_hub(name: str) -> bool:
    return _HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def _repo(name: str) -> str:
    return name.partition("@")[0]


def called(path: str) -> str:
    """Return a source as a card may show it: no folders of this machine, nothing that markdown would read."""
    return _plain(path if _is_hub(path) else Path(path).name or path)


def _plain(text: str) -> str:
    return re.sub(r"[^\w./@:=*{}\[\], -]", "_", text)[:400]
