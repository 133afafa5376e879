"""The metadata of adapter files of image tools: what stays true of a new file, and what is brought up to date.

`ss_*` are what sd-scripts' trainers write, `modelspec.*` a standard of Stability AI's. Readers sort files into families
by them: stable-diffusion-webui (extensions-builtin/Lora/network.py) takes what has a base version of `sdxl_...` for
SDXL, what else has ss_v2 = True for Stable Diffusion 2, and all other files that have any metadata for 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import PurePath
from typing import Any

from loratool import strictjson
from loratool.adapter import Adapter, Finding
from loratool.architecture import Architecture
from loratool.deltas import Delta, Dora, Glora, Ia3, LoHa, LoKr, LowRank, OutputOft
from loratool.errors import FormatError
from loratool.formats.peft_config import EMBEDDED
from loratool.native import Labels
from loratool.plan import Digest

#: Both of sd-scripts' hashes (library/train_util.py, precalculate_safetensors_hashes).
DIGESTS = (Digest("sshs_model_hash"), Digest("sshs_legacy_hash", 8, (0x100000, 0x110000), "ss_"))
BASE, V2, SPEC = "ss_base_model_version", "ss_v2", "modelspec.architecture"
DIM, ALPHA, MODULE, ARGUMENTS = "ss_network_dim", "ss_network_alpha", "ss_network_module", "ss_network_args"
BASE_NAME, SPEC_VERSION = "ss_sd_model_name", "modelspec.sai_model_spec"
HISTORY = "loratool.history"
# What describes the file it is in: its container, its config, digests of its bytes.
_OF_THE_FILE = ("format", EMBEDDED, "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
_MOST_STEPS = 100  # of the history that is carried on
_FILES = (".safetensors", ".ckpt", ".pt", ".bin", ".gguf")
_ALGORITHMS: dict[type[Delta], tuple[str, ...]] = {  # what LyCORIS calls them, first the usual name
    LowRank: ("locon", "lora"),
    LoHa: ("loha",),
    LoKr: ("lokr",),
    OutputOft: ("diag-oft", "boft", "oft"),
    Glora: ("glora",),
    Ia3: ("ia3",),
}
# Fields of ss_network_args that say how the numbers in the file are meant, and no more.
_PLAIN_ARGUMENTS = (
    *("algo", "conv_dim", "conv_alpha", "dora_wd", "wd_on_output", "factor", "use_tucker", "rs_lora", "rescaled"),
    *("split_qkv", "bypass_mode", "constraint", "decompose_both", "full_matrix", "block_size"),
)
# What a reader of the file needs, or its author wants read: all else is about the training and its data.
_PUBLIC = frozenset(
    (
        *(BASE, V2, DIM, ALPHA, MODULE, ARGUMENTS, SPEC_VERSION, SPEC, "format"),
        *("modelspec.implementation", "modelspec.title", "modelspec.author", "modelspec.license", "modelspec.tags"),
        *("modelspec.description", "modelspec.usage_hint", "modelspec.trigger_phrase", "modelspec.resolution"),
        *("modelspec.prediction_type", *(digest.field for digest in DIGESTS)),
    )
)


def updated(
    adapter: Adapter,
    architecture: Architecture,
    deltas: Sequence[Delta],
    options: Mapping[str, Any],
    notes: list[str],
) -> dict[str, str]:
    """Return the metadata of the source as it is true of a file that has these deltas, and how the file was made.

    What the source says of its family is kept where it is right, and replaced where the family is known to be another,
    which is added to `notes`.
    """
    metadata = _lasting(adapter.metadata)
    inner = [d.inner if isinstance(d, Dora) else d for d in deltas]
    _say_kind(metadata, inner)
    _say_sizes(metadata, inner)
    metadata.pop(HISTORY, None)
    if adapter.base_model:
        metadata.setdefault(BASE_NAME, name_of(adapter.base_model))
    if architecture.labels and len(adapter.families) < 2 and not adapter.rivals:
        _say_family(metadata, architecture, architecture.labels, notes)
    if "made" in options:
        made = options["made"]
        metadata[HISTORY] = history(adapter.metadata.get(HISTORY, ""), made)
        if SPEC in metadata and len(made["sources"]) > 1:
            metadata["modelspec.merged_from"] = ", ".join(PurePath(s["name"]).stem for s in made["sources"])
    return metadata


def digests(*sources: Mapping[str, str]) -> tuple[Digest, ...]:
    """Return the digests that a file has: those of sd-scripts where a source has any of them.

    No reader needs them, and they cost ten times what copying the file does: stable-diffusion-webui takes a file that
    has none for what it is and hashes it itself (extensions-builtin/Lora/network.py), and so does Civitai.
    """
    return DIGESTS if any(digest.field in metadata for metadata in sources for digest in DIGESTS) else ()


def _lasting(metadata: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in metadata.items() if name not in _OF_THE_FILE}


def carried(adapter: Adapter) -> dict[str, str]:
    """Return the metadata of the source as it is true of a file in another tool's format: nothing is added."""
    metadata = _lasting(adapter.metadata)
    if DIM in metadata:
        _say_sizes(metadata, [d.inner if isinstance(d, Dora) else d for ds in adapter.deltas.values() for d in ds])
    return metadata


def _say_sizes(metadata: dict[str, str], deltas: Sequence[Delta]) -> None:
    """Bring rank and alpha up to date, and those of convolutions beside them; `Dynamic` where modules differ."""
    sized = [d for d in deltas if isinstance(d, (LowRank, LoHa, LoKr, Glora)) and d.rank]
    convolved = [d for d in sized if prod(d.shape[2:]) > 1]
    plain = [d for d in sized if prod(d.shape[2:]) == 1] or sized
    for field, of in _SIZES.items():
        metadata.pop(field, None)
        if plain:
            metadata[field] = _agreed(map(of, plain))
    arguments = _arguments(metadata)
    told = {f"conv_{field[11:]}": _agreed(map(of, convolved)) for field, of in _SIZES.items()} if convolved else {}
    if told.keys() & arguments.keys() or (told and _agreed(map(_rank, convolved)) != metadata[DIM]):
        _set_arguments(metadata, {**arguments, **told})


def _rank(delta: LowRank | LoHa | LoKr | Glora) -> str:
    return str(delta.dim or delta.rank if isinstance(delta, LoKr) else delta.rank)


def _alpha(delta: LowRank | LoHa | LoKr | Glora) -> str:
    return f"{delta.alpha:g}"


_SIZES: dict[str, Callable[[Any], str]] = {DIM: _rank, ALPHA: _alpha}


def _agreed(values: Iterable[str]) -> str:
    found = set(values)
    return found.pop() if len(found) == 1 else "Dynamic"


def _say_kind(metadata: dict[str, str], deltas: Sequence[Delta]) -> None:
    """Say by which network such deltas are made, where the source does not, or says another."""
    found = {type(d) for d in deltas}
    kinds = [kind for kind in _ALGORITHMS if kind in found]
    arguments = _arguments(metadata)
    algorithm, module = str(arguments.get("algo", "")).lower(), metadata.get(MODULE, "")
    by_lycoris = bool(algorithm) or "lycoris" in module
    if kinds and kinds != [LowRank]:
        known = [name for kind in kinds if kind is not LowRank for name in _ALGORITHMS[kind]]
        if algorithm not in known and not ("oft" in module and OutputOft in kinds):
            metadata[MODULE] = "lycoris.kohya"
            arguments["algo"] = known[0]
    elif kinds and ("oft" in module or (by_lycoris and algorithm not in ("", "full", "lora", "locon"))):
        metadata[MODULE] = "networks.lora"
        arguments = {name: value for name, value in arguments.items() if name.startswith("conv_")}
    elif kinds:
        metadata.setdefault(MODULE, "lycoris.kohya" if algorithm else "networks.lora")
    if Glora in kinds:
        arguments.pop("rs_lora", None)  # what it says of alpha was true of the source's: ours is as readers apply it
    if arguments != _arguments(metadata):
        _set_arguments(metadata, arguments)


def _arguments(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        return strictjson.parse(metadata.get(ARGUMENTS) or "{}", ARGUMENTS)
    except FormatError:
        return {}


def _set_arguments(metadata: dict[str, str], arguments: Mapping[str, Any]) -> None:
    metadata.pop(ARGUMENTS, None)
    if arguments:
        metadata[ARGUMENTS] = json.dumps(arguments)


def _say_family(metadata: dict[str, str], architecture: Architecture, labels: Labels, notes: list[str]) -> None:
    """Say the family in the words of image tools; what says another family is replaced, and told."""
    wanted = {BASE: labels.base, SPEC: labels.spec and f"{labels.spec}/lora"}
    for field, value in wanted.items():
        said = metadata.get(field, "")
        if said and said.startswith(architecture.match.metadata):
            continue
        if said and said != "None":
            notes.append(f"{field} said {said!r}, which is not {architecture.name}: it says {value or 'nothing'} now")
        metadata.pop(field, None)
        if value:
            metadata[field] = value
    metadata[V2] = str(labels.v2)
    if SPEC in metadata:
        metadata.setdefault(SPEC_VERSION, "1.0.1")


def name_of(base: str) -> str:
    """Return a base model's name as a file that others get may have it: of the Hub, or without the folders."""
    on_hub = re.fullmatch(r"\w[\w.-]*/[\w.-]+", base) and not base.lower().endswith(_FILES)
    return base if on_hub else re.split(r"[/\\]", base.rstrip("/\\"))[-1]


def history(before: str, made: Mapping[str, Any]) -> str:
    """Return how a file was made, as a JSON list of steps, the last one last; what others wrote there must be one."""
    try:
        steps = strictjson.parse(f'{{"steps": {before or "[]"}}}', HISTORY)["steps"]
    except FormatError:
        steps = []
    steps = [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    return json.dumps([*steps[1 - _MOST_STEPS :], made], sort_keys=True)


def step(verb: str, adapters: Iterable[tuple[str, Mapping[str, str]]]) -> dict[str, Any]:
    """Return a step of the history: the verb, and the names and hashes (as the files say them) of its sources."""
    from loratool import __version__

    sources = []
    for path, metadata in adapters:
        digest = metadata.get("sshs_model_hash", "")
        known = {"sshs_model_hash": digest} if re.fullmatch("[0-9a-f]{64}", digest) else {}
        sources.append({"name": PurePath(path).name, **known})
    return {"by": f"loratool {__version__}", "verb": verb, "sources": sources}


def less_private(adapter: Adapter) -> tuple[Adapter, Finding]:
    """Return an adapter less what it says of its training and of paths on somebody's disk, and what that is."""
    kept = public(adapter.metadata)
    base = adapter.base_model
    on_hub = bool(base) and name_of(base) == base and "/" in base and BASE_NAME not in adapter.metadata
    gone = sorted(adapter.metadata.keys() - kept.keys() - {EMBEDDED})
    gone += ["base_model_name_or_path"] if base and not on_hub and BASE_NAME not in adapter.metadata else []
    told = f": {', '.join(gone[:6])}{' ...' if len(gone) > 6 else ''}" if gone else ""
    what = f"{len(gone)} fields are left out{told}; {len(kept)} are kept"
    base = base if on_hub else ""
    config = adapter.origin.config and {**adapter.origin.config, "base_model_name_or_path": base or None}
    left = replace(adapter, origin=replace(adapter.origin, config=config), metadata=kept, base_model=base)
    return left, Finding("info", "--strip-metadata", what)


def public(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata less what is about the training: captions, paths, data sets, seeds, hyperparameters."""
    kept = {name: value for name, value in metadata.items() if name in _PUBLIC}
    if ARGUMENTS in kept:
        _set_arguments(kept, {n: v for n, v in _arguments(kept).items() if n in _PLAIN_ARGUMENTS})
    return kept
