"""From PEFT's parts of modules to deltas, by peft_type and config. Source: peft/tuners/*/layer.py (0.21.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import isqrt
from typing import Any

from loratool import dtypes
from loratool.adapter import Finding, Target
from loratool.architecture import Architecture
from loratool.deltas import Delta, Dora, Full, LowRank, Replace, Tokens
from loratool.formats import kinds, naming
from loratool.formats.naming import Parts, error
from loratool.formats.peft_config import Scaling, version_of
from loratool.formats.peft_names import OUTPUT, TOKENS, bare
from loratool.tensors import TensorRef, joined, module_of, padded, zeros

Deltas = dict[Target, tuple[Delta, ...]]
_HEADS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
_HEAD_MODULES = ("score", "classifier", "qa_outputs")  # what PEFT trains in full for these tasks
_EMBEDDINGS = ("embed_tokens", "lm_head")  # what PEFT saves in full where the vocabulary was resized
_TWICE_UNTIL = (0, 21)  # the version up to which PEFT applies the update of an attention's output twice
_BASE_CHANGING = ("pissa", "olora", "corda", "lora_ga", "loftq")


def paths(modules: Mapping[str, Parts]) -> dict[str, str]:
    """Return the module path of each module of the file; torch's MultiheadAttention has two weights in one module."""
    outputs = _attention_outputs(modules)
    result = {}
    for module in modules:
        path = bare(module)
        if module in outputs.values():
            path = f"{path}.in_proj_weight"
        elif module in outputs:
            path = path.replace(".base_layer.", ".")
        result[module] = path
    return result


def _attention_outputs(modules: Mapping[str, Parts]) -> dict[str, str]:
    """Return the output projections of torch's MultiheadAttention, and the attention that each belongs to."""
    return {f"{m}{OUTPUT}": m for m in modules if f"{m}{OUTPUT}" in modules}


def build(
    modules: Mapping[str, Parts],
    targets: Mapping[str, Target],
    told: Mapping[str, str],
    config: Mapping[str, Any],
    *,
    scaler: Scaling,
    shared: Mapping[str, TensorRef],
) -> tuple[Deltas, list[Finding]]:
    """Return the deltas of modules, and an error finding for each that cannot be used.

    `told[module]` is the path under which the config speaks of it; `shared` holds VeRA's common matrices.
    """
    kind = str(config.get("peft_type", "LORA"))
    if kind in ("LORA", "ADALORA", "TRAINABLE_TOKENS"):
        return _lora(modules, targets, told, config, scaler)
    makers: dict[str, Callable[[str, Mapping[str, TensorRef]], Delta]] = {
        "LOHA": lambda m, parts: kinds.loha(parts, scaler(told[m], kinds.loha(parts, 1.0).rank)),
        "LOKR": lambda m, parts: _lokr(parts, scaler(told[m], scaler.told(told[m]))),
        "VERA": lambda m, parts: kinds.vera(parts, shared.get("vera_A"), shared.get("vera_B")),
        "OFT": lambda m, parts: _oft(parts, config),
        "BOFT": lambda m, parts: kinds.boft(parts),
        "IA3": lambda m, parts: kinds.ia3(parts, of_inputs=_feeds_forward(told[m], parts, config)),
    }
    deltas: Deltas = {}
    findings: list[Finding] = []
    for module, parts in modules.items():
        if kind not in makers:
            continue  # said by the config already
        try:
            naming.add(deltas, targets[module], makers[kind](module, parts.others))
        except ValueError as problem:
            findings.append(error(module, str(problem)))
    return deltas, findings


def _lokr(parts: Mapping[str, TensorRef], scaling: float) -> Delta:
    """LoKr as PEFT multiplies it: a Conv1d's whole w2, (out2, in2, kernel), with w1 on its last two axes."""
    delta = kinds.lokr(parts, scaling)
    return replace(delta, on_last=len(delta.w2) == 1 and len(delta.w2[0].shape) == 3)


def _oft(parts: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Delta:
    entries = parts["oft_R"].shape[-1] if "oft_R" in parts and parts["oft_R"].shape else 0
    size = (1 + isqrt(1 + 8 * entries)) // 2
    terms = config.get("num_cayley_neumann_terms", 5) if config.get("use_cayley_neumann", True) else 0
    if not isinstance(terms, int) or not 0 <= terms <= 64:
        raise ValueError(f"num_cayley_neumann_terms is {terms!r}")
    return kinds.oft(parts, size=size, terms=terms, shared=bool(config.get("block_share")))


def _feeds_forward(module: str, parts: Mapping[str, TensorRef], config: Mapping[str, Any]) -> bool:
    """Whether IA3 scales what a module takes in: a linear layer's shape says so, a convolution's config does."""
    shape = parts["ia3_l"].shape if "ia3_l" in parts else ()
    if len(shape) == 2 and shape != (1, 1):
        return shape[0] == 1
    names = config.get("feedforward_modules") or ()
    if isinstance(names, str):
        raise ValueError(f"feedforward_modules is the expression {names!r}: a list of names is wanted")
    return any(module == name or module.endswith(f".{name}") for name in names)


def _lora(
    modules: Mapping[str, Parts],
    targets: Mapping[str, Target],
    told: Mapping[str, str],
    config: Mapping[str, Any],
    scaler: Scaling,
) -> tuple[Deltas, list[Finding]]:
    """LoRA and AdaLoRA, with what may stand beside the factors: magnitudes, biases of B, trained tokens."""
    findings: list[Finding] = []
    ordinary: dict[str, Parts] = {}
    deltas: Deltas = {}
    for module, parts in modules.items():
        try:
            _require_floats(parts.others)
            if TOKENS in parts.others:
                naming.add(deltas, targets[module], _tokens(bare(module), parts.others[TOKENS], config))
                if parts.down is None and parts.up is None:
                    continue
            if config.get("peft_type") == "ADALORA" and parts.down is not None and parts.down.shape[:1] == (0,):
                continue  # the allocator left nothing of this module
            _require_one_group(parts)
            ordinary[module] = _grouped(parts, config)
        except ValueError as problem:
            findings.append(error(module, str(problem)))
    outputs = _attention_outputs(modules)

    def scaling(module: str, rank: int) -> float:
        attention = outputs.get(module, module)  # by whose name alone PEFT looks up patterns
        name = told[attention]
        name = name.removesuffix(".in_proj_weight") if attention in outputs.values() else name
        up = modules[module].up
        told_rank = up.shape[1] if up is not None else rank  # of each group, where there are several
        return scaler(name, told_rank) * (2 if module in outputs and twice else 1)

    twice = bool(outputs) and (version_of(config) or (0, 0)) <= _TWICE_UNTIL
    if twice:
        what = "PEFT up to 0.21 applies this update twice, in training too: it is taken as it was trained"
        findings.append(Finding("warning", min(outputs), what))
    found, broken = naming.build(ordinary, targets, ("lora_A", "lora_B"), scaling)
    by_target = {targets[m]: (m, parts) for m, parts in ordinary.items()}
    for target, (delta,) in found.items():
        module, parts = by_target[target]
        assert isinstance(delta, LowRank)
        try:
            for where, one in _beside(target, delta, parts, config).items():
                naming.add(deltas, where, one)
        except ValueError as problem:
            broken.append(error(module, str(problem)))
    return deltas, findings + broken


def _require_floats(others: Mapping[str, TensorRef]) -> None:
    odd = [f"{name} is {ref.dtype}" for name, ref in others.items() if not dtypes.is_float(ref.dtype)]
    if odd:
        raise ValueError(", ".join(odd))


def _beside(target: Target, delta: LowRank, parts: Parts, config: Mapping[str, Any]) -> dict[Target, Delta]:
    """Return the delta with what its module has beyond two factors, and that of the module's bias."""
    others = parts.others
    result: Delta = delta
    if config.get("peft_type") == "ADALORA":
        if "lora_E" not in others:
            raise ValueError("half a module: lora_E is missing")
        if others["lora_E"].shape not in ((delta.rank, 1), (delta.rank,)):
            raise ValueError(f"lora_E is {list(others['lora_E'].shape)}, the rank is {delta.rank}")
        result = replace(delta, mid=others["lora_E"])
    magnitude = others.get("lora_magnitude_vector")
    if bool(config.get("use_dora")) != (magnitude is not None):
        what = "a DoRA magnitude" if magnitude is not None else "no DoRA magnitude"
        raise ValueError(f"{what}, and use_dora is {config.get('use_dora')!r}")
    if magnitude is not None:
        out = delta.shape[0]
        if sorted(n for n in magnitude.shape if n > 1) not in ([out], [] if out == 1 else [out]):
            raise ValueError(f"the magnitude is {list(magnitude.shape)}, the layer has {out} outputs")
        result = Dora(delta, replace(magnitude, shape=(out,)))
    found = {target: result}
    bias = others.get("lora_B.bias")
    if bool(config.get("lora_bias")) != (bias is not None):
        what = "a bias on lora_B" if bias is not None else "no bias on lora_B"
        raise ValueError(f"{what}, and lora_bias is {config.get('lora_bias')!r}")
    if bias is not None:
        if bias.shape != (delta.shape[0],):
            raise ValueError(f"the bias is {list(bias.shape)}, the layer has {delta.shape[0]} outputs")
        found[bias_of(target)] = Full(bias, delta.scaling)
    return found


def bias_of(target: Target) -> Target:
    """Return the bias that stands beside a weight."""
    return Target(
        target.component,
        tuple(f"{part.removesuffix('_weight')}{'_' if part.endswith('_weight') else '.'}bias" for part in target.parts),
    )


def _tokens(module: str, values: TensorRef, config: Mapping[str, Any]) -> Tokens:
    """Return the trained rows of an embedding; which rows they are stands in the config only."""
    told = config.get("token_indices") or config.get("trainable_token_indices")
    if isinstance(told, dict):
        told = next((v for name, v in told.items() if module == name or module.endswith(f".{name}")), None)
    if not isinstance(told, list) or not told or not all(isinstance(n, int) and 0 <= n < 1 << 31 for n in told):
        raise ValueError("which tokens were trained does not stand in the config (trainable_token_indices)")
    if len(values.shape) != 2 or values.shape[0] != len(told) or len(set(told)) != len(told):
        raise ValueError(f"{len(told)} trained tokens in the config, {list(values.shape)} in the file")
    return Tokens(values, tuple(told))


def _require_one_group(parts: Parts) -> None:
    """Raise for a convolution in groups: PEFT lets the down factor go across them, so no weight can hold the update."""
    if parts.down is None or parts.up is None or min(len(parts.down.shape), len(parts.up.shape)) < 3:
        return
    rank, share = parts.down.shape[0], parts.up.shape[1]
    if len(parts.down.shape) == len(parts.up.shape) and 0 < share < rank and rank % share == 0:
        groups = rank // share
        raise ValueError(f"LoRA on a convolution in {groups} groups mixes what they keep apart: no weight can hold it")


def _grouped(parts: Parts, config: Mapping[str, Any]) -> Parts:
    """Return plain factors for those of `enable_lora` (PEFT 0.1 and 0.2).

    B (enabled outputs, r, 1) is a grouped convolution over the groups of A (r x groups, in); the outputs that are not
    enabled are zero between them.
    """
    enabled = config.get("enable_lora")
    up, down = parts.up, parts.down
    if not isinstance(enabled, list) or up is None or down is None or len(up.shape) != 3:
        return parts
    on = sum(map(bool, enabled))
    rank = up.shape[1]
    if not on or up.shape[2] != 1 or up.shape[0] % on or down.shape[0] != rank * on:
        raise ValueError(f"enable_lora has {on} groups, which A {list(down.shape)} and B {list(up.shape)} have not")
    height, matrix, done = up.shape[0] // on, replace(up, shape=up.shape[:2]), 0
    pieces = []
    for wanted in enabled:
        if wanted:
            piece = matrix.rows(done * height, (done + 1) * height)
            pieces.append(padded(piece, rank * on, done * rank))
            done += 1
        else:
            pieces.append(zeros("", (height, rank * on), up.dtype))
    return replace(parts, up=joined(up.name, pieces))


def trained_whole(
    whole: Mapping[str, TensorRef], config: Mapping[str, Any], family: Architecture | None
) -> tuple[Deltas, list[Finding]]:
    """Return replacements of weights and biases that were trained in full; error findings for what nobody announced."""
    deltas: Deltas = {}
    findings: list[Finding] = []
    saved = [name for name in config.get("modules_to_save") or () if isinstance(name, str)]
    if saved and not any(_names(saved, bare(name)) for name in whole):
        what = f"says that {', '.join(saved)} were trained in full, and the file has no such tensor"
        findings.append(error("adapter_config.json: modules_to_save", what, "was the adapter saved completely?"))
    for name, ref in whole.items():
        if not _announced(bare(name), config) and not _is_vocabulary(bare(name), family):
            what = "a full tensor, which the config says nothing of (modules_to_save, bias)"
            findings.append(error(name, what, "it is refused so that it cannot be lost"))
            continue
        if not dtypes.is_float(ref.dtype) or not ref.shape:
            findings.append(error(name, f"a trained tensor of dtype {ref.dtype} and shape {list(ref.shape)}"))
            continue
        naming.add(deltas, _whole_target(bare(name), family), Replace(ref))
    return deltas, findings


def _announced(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a full tensor is one that PEFT saves: a module to save, a trained bias, a resized embedding."""
    saved = [*(config.get("modules_to_save") or ()), *_EMBEDDINGS]
    saved += _HEAD_MODULES if config.get("task_type") in _HEADS else ()
    return _names(saved, name) or (name.endswith(".bias") and config.get("bias") not in (None, "none"))


def _is_vocabulary(name: str, family: Architecture | None) -> bool:
    """Whether a tensor is one that PEFT saves by itself where the vocabulary was resized."""
    known = family.find(name.removesuffix(".weight")) if family and name.endswith(".weight") else None
    if known is None or family is None:
        return False
    return known.layer.group == "embedding" or any(known.path in group for group in family.tied)


def _names(modules: Iterable[object], tensor: str) -> bool:
    """Whether a tensor lies in one of these modules, as PEFT takes their names: paths that end like them."""
    inside = f"{tensor.rpartition('.')[0]}."
    return any(isinstance(module, str) and f"{module}." in inside for module in modules)


def _whole_target(name: str, family: Architecture | None) -> Target:
    module, _, leaf = name.rpartition(".")
    known = family.find(module) if family else None
    if known is not None and not known.axis:
        parts = known.parts if leaf == "weight" else tuple(f"{part}.{leaf}" for part in known.parts)
        return Target(known.component, parts)
    return Target("", (module_of(family.on_disk(name) if family else name),))


def together(*several: Mapping[Target, tuple[Delta, ...]]) -> Deltas:
    """Return all deltas of several mappings."""
    found: Deltas = {}
    for deltas in several:
        for target, ones in deltas.items():
            found[target] = (*found.get(target, ()), *ones)
    return found


def replication(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return which layer of the base each layer of the adapted model repeats: layer_replication's ranges unrolled."""
    ranges = config.get("layer_replication") or ()
    return tuple(n for start, stop in ranges for n in range(start, stop))


def changed_base(config: Mapping[str, Any]) -> str:
    """Return the initialisation that changed the base model before training, or nothing."""
    start = config.get("init_lora_weights")
    return start if isinstance(start, str) and start.lower().startswith(_BASE_CHANGING) else ""


def head_class(config: Mapping[str, Any]) -> str:
    """Return the ending of the transformers class that has the head which an adapter brings."""
    return _HEADS.get(str(config.get("task_type")), "")
