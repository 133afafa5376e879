"""Quantised checkpoints as the checkpoints that they stand for: every weight under its ordinary name, shape and dtype.

What a file stores of a weight (codes, scales, maps) is replaced by one reference that decodes the rows that are read;
other tensors stay as they are. Encodings that loratool does not read are refused by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loratool import dtypes
from loratool.errors import FormatError, UnsupportedError
from loratool.storage import encoded
from loratool.storage.encoded import Found
from loratool.storage.safetensors import Header
from loratool.tensors import TensorRef

if TYPE_CHECKING:
    from loratool.storage.checkpoint import Checkpoint, Shard

_WAY_OUT = "merge into the 16-bit model that it was made from"
#: Endings that other encodings leave in a file, where no config names them.
_FOREIGN = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors (packed)",
    ".W_q": "HQQ",
    ".codebooks": "AQLM",
    ".weight_scale_2": "NVFP4",
    ".comfy_quant": "ComfyUI's own layers",
}
_KEYS = ("quantization_config", "compression_config")
_USUAL_BLOCK = (128, 128)  # of fp8, where no config says so


def logical(opened: Checkpoint) -> Checkpoint:
    """Return a checkpoint whose quantised weights are logical tensors; it is the same where there are none.

    Each belongs to the shard that held its codes. Shards that changed have no raw header: their tensors are in the
    order that a new file has. `quantised` names the encodings, `stored` keeps the tensors of the files for the ledger,
    and `spent` are the fates of those that no logical tensor is made of.
    """
    config = opened.config or {}
    method = _method(config, opened.path)
    _refuse_foreign(opened)
    found = _find(opened.tensors, config, opened.path)
    _refuse_rest(opened, method, found)
    if not found:
        return opened
    holders = {one.holder: one.ref for one in found}
    gone = {name for one in found for name in (*one.parts, *one.fates)} - holders.keys()
    for one in found:
        if one.ref.name != one.holder and one.ref.name in opened.tensors:
            encoded.refuse(one.ref.name, f"it is there twice, as {one.holder!r}, too", opened.path)
    tensors = [holders.get(name, ref) for name, ref in opened.tensors.items() if name not in gone]
    shards = [_logical_shard(shard, holders, gone) for shard in opened.shards]
    shards = [shard for shard in shards if shard.header.tensors]  # one that held nothing but scales
    index = dict(opened.index)
    if "weight_map" in index:
        index["weight_map"] = {ref.name: shard.name for shard in shards for ref in shard.header.tensors}
    return replace(
        opened,
        tensors={ref.name: ref for ref in tensors},
        shards=tuple(shards),
        index=index,
        quantised={one.ref.name: one.encoding for one in found},
        stored=opened.tensors,
        stored_shards=opened.shards,
        spent={name: fate for one in found for name, fate in one.fates.items()},
    )


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's config without what it says of quantisation."""
    text = config.get("text_config")
    plain = {key: value for key, value in config.items() if key not in _KEYS}
    if isinstance(text, dict):
        plain["text_config"] = {key: value for key, value in text.items() if key not in _KEYS}
    return plain


def summary(quantised: Mapping[str, str]) -> str:
    """Say in words how many weights are encoded how: "14 weights in nf4"."""
    counts = Counter(quantised.values())
    return ", ".join(f"{count} weight{'s' * (count > 1)} in {encoding}" for encoding, count in counts.items())


def made_of(opened: Checkpoint, names: Iterable[str]) -> set[str]:
    """Return the stored tensors that these logical ones are made of, where they are quantised."""
    pieces = {piece for name in names if name in opened.quantised for piece in opened.tensors[name].pieces}
    return {name for name, ref in opened.stored.items() if ref.pieces and pieces.issuperset(ref.pieces)}


def _find(tensors: Mapping[str, TensorRef], config: Mapping[str, Any], where: str) -> list[Found]:
    """Find the quantised weights of all encodings that are read."""
    return [
        *encoded.four_bit(tensors, config, where),
        *encoded.int8(tensors, config, where),
        *encoded.fp8(tensors, config, where, _blocks(_settings(config))),
        *encoded.mxfp4(tensors, config, where),
    ]


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a config says of quantisation; of a model with several parts it may say so of the text model."""
    text = config.get("text_config")
    for one in (config, text if isinstance(text, dict) else {}):
        for key in _KEYS:
            if isinstance(one.get(key), dict):
                return dict(one[key])
    return {}


def _method(config: Mapping[str, Any], where: str) -> str:
    """Return the method that a config names, or raise UnsupportedError where loratool does not read it."""
    settings = _settings(config)
    method = str(settings.get("quant_method") or "").lower()
    if not method and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"
    if method == "compressed-tensors":
        problem = _not_float8(settings)
        called = f"compressed-tensors ({problem})" if problem else ""
    else:
        known = not settings or method in ("bitsandbytes", "fp8", "fbgemm_fp8", "mxfp4")
        called = "" if known else method or "an unnamed method"
    if called:
        what = f"its weights are quantised with {called}, which is not read"
        raise UnsupportedError(what, where=where, hint=_WAY_OUT)
    return method


def _not_float8(settings: Mapping[str, Any]) -> str:
    """Say what makes a compressed-tensors config other than plain fp8 weights with scales, or nothing."""
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format") not in (None, "dense"):
        return f"sparse: {sparsity.get('format')}"
    form = str(settings.get("format") or "no format")
    schemes = _schemes(settings)
    if form not in ("float-quantized", "naive-quantized") or not schemes:
        return form
    for scheme in schemes:
        if scheme.get("type") != "float" or scheme.get("num_bits") != 8 or scheme.get("symmetric") is False:
            return f"{scheme.get('num_bits')}-bit {scheme.get('type')}"
    return ""


def _schemes(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return how compressed-tensors says that weights are quantised, one scheme a group of layers."""
    groups = settings.get("config_groups")
    groups = groups if isinstance(groups, dict) else {}
    weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
    return [scheme for scheme in weights if isinstance(scheme, dict)]


def _blocks(settings: Mapping[str, Any]) -> set[tuple[int, int]]:
    """Return the block sizes of fp8 weights that a config names."""
    named = [settings.get("weight_block_size"), *(s.get("block_structure") for s in _schemes(settings))]
    named += [[1, scheme.get("group_size")] for scheme in _schemes(settings)]
    pairs = [tuple(one) for one in named if isinstance(one, list)]
    return {p for p in pairs if len(p) == 2 and all(type(n) is int and n > 0 for n in p)} or {_USUAL_BLOCK}


def _refuse_foreign(opened: Checkpoint) -> None:
    """Refuse what other encodings left in the file."""
    for name in opened.tensors:
        for end, called in _FOREIGN.items():
            if name.endswith(end):
                what = f"its weights are quantised with {called} ({name!r}), which is not read"
                raise UnsupportedError(what, where=opened.path, hint=_WAY_OUT)


def _refuse_rest(opened: Checkpoint, method: str, found: list[Found]) -> None:
    """Refuse weights that look quantised and were not found to be: scales are missing, or the encoding is another."""
    taken = {name for one in found for name in one.parts}
    for name, ref in opened.tensors.items():
        if name in taken or not method or dtypes.is_float(ref.dtype):
            continue
        lacking = {"F8_E4M3": "a scale", "F8_E5M2": "a scale", "I8": "an SCB"}.get(ref.dtype, "")
        if name.endswith((".weight", "_proj")) and lacking:
            raise FormatError(
                f"{name!r}: {ref.dtype} values without {lacking}, in a model quantised with {method}",
                where=opened.path,
                hint=f"the checkpoint is incomplete, or of a kind that is not read: {_WAY_OUT}",
            )


def _logical_shard(shard: Shard, holders: Mapping[str, TensorRef], gone: set[str]) -> Shard:
    """Return a shard with logical tensors where it held codes, in the order of a new file, or as it is."""
    names = {ref.name for ref in shard.header.tensors}
    if not names & (gone | holders.keys()):
        return shard
    refs = [holders.get(ref.name, ref) for ref in shard.header.tensors if ref.name not in gone]
    ordered = sorted(refs, key=lambda ref: (-dtypes.itemsize(ref.dtype), ref.name))
    return shard._replace(header=Header(b"", tuple(ordered), shard.header.metadata))
