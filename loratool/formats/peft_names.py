r"""The names in PEFT's files: which module a tensor belongs to, and what part of its adapter it is.

Wrappers that training frameworks leave in raw state dicts are no part of a name: `_orig_mod` (torch.compile),
`_fsdp_wrapped_module`, DDP's leading `module.`, the adapter's name, `modules_to_save.<adapter>`.
Source: peft/utils/save_and_load.py and utils/other.py (0.21.2).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from loratool.adapter import Finding
from loratool.formats.naming import Parts, error
from loratool.tensors import TensorRef

WRAPPER = "base_model.model."
BASE_COPY = ".base_layer.weight"  # PEFT saves the untouched embedding beside its adapter
TOKENS = "trainable_tokens_delta"
OUTPUT = ".base_layer.out_proj"  # the second weight of torch's MultiheadAttention
_FRAMEWORKS = ("_orig_mod", "_fsdp_wrapped_module")
# The parts of an adapter of each type, as PEFT's tuners name their parameters.
PARTS = {
    "LORA": ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", TOKENS),
    "ADALORA": ("lora_A", "lora_B", "lora_E", "ranknum"),
    "LOHA": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "LOKR": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "VERA": ("vera_lambda_b", "vera_lambda_d"),
    "OFT": ("oft_R",),
    "BOFT": ("boft_R", "boft_s"),
    "IA3": ("ia3_l",),
    "TRAINABLE_TOKENS": (TOKENS,),
}
FACTOR = re.compile(
    rf"(?P<module>.+)\.(?P<part>{'|'.join(dict.fromkeys(p for ps in PARTS.values() for p in ps))})"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
_LEAVES = {  # what stands behind a part: nothing, or what is listed
    "oft_R": ("weight",),
    "lora_A": ("weight", None),  # in loralib's files and in those of layers written by hand they are parameters
    "lora_B": ("weight", None, "bias"),
    "lora_magnitude_vector": (None, "weight"),  # raw state dicts have the latter
}
_OF_TRAINING = re.compile(r".+\.(?:lora_monteclora_sampler|lora_velora_embed)(?:\..+)?")
# Parts of kinds that are not carried, by a piece of the name.
_FOREIGN = (
    ("lora_diag", "KaSA truncates the base before it adds to it"),
    ("oft_embedding_R", "OFT on embeddings is not supported yet"),
)
_GROWN = re.compile(r".+\.lora_E\.\d+")  # IncreLoRA's lists of factors (IncreLoRA: loralib/increlora.py)


@dataclass
class Names:
    """The tensors of an adapter by what they are.

    `modules` by module; `copies`: base weights saved along, by module; `whole`: weights and biases that were trained
    as a whole, by tensor name; `shared`: VeRA's matrices; `ignored`: what training alone needs.
    """

    modules: dict[str, Parts] = field(default_factory=dict)
    copies: dict[str, TensorRef] = field(default_factory=dict)
    whole: dict[str, TensorRef] = field(default_factory=dict)
    shared: dict[str, TensorRef] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def parse(tensors: Mapping[str, TensorRef], kind: str) -> Names:
    """Sort the tensors of an adapter of one peft_type; what belongs nowhere is an error finding."""
    found = Names()
    if grown := next(filter(_GROWN.fullmatch, tensors), ""):
        what = "IncreLoRA keeps lists of factors that grew in training, beside the base they are trained on"
        found.findings.append(error(grown, what, "docs/training_methods.md joins them into an adapter, in 20 lines"))
        return found
    adapters: set[str] = set()
    ddp = bool(tensors) and all(name.startswith("module.") for name in tensors)
    for key, ref in tensors.items():
        name = ".".join(e for e in key.removeprefix("module." if ddp else "").split(".") if e not in _FRAMEWORKS)
        match = FACTOR.fullmatch(name)
        if match and _is_part(match, kind):
            adapters.add(match["adapter"] or "")
            _add(found.modules.setdefault(match["module"].removesuffix(".token_adapter"), Parts()), match, ref)
            if match["part"] == "ranknum":
                found.ignored.append(key)
        elif match:
            what = f"{match['part']} is no part of {'an' if kind[0] in 'AIO' else 'a'} {kind} adapter"
            found.findings.append(error(key, what, "is peft_type in adapter_config.json right?"))
        else:
            _sort(found, key, name, ref)
    if len(adapters) > 1:
        listed = ", ".join(sorted(map(repr, adapters)))
        found.findings.append(error("names", f"several adapters in one file: {listed}"))
    if not found.modules and not found.whole:
        parts = " and ".join(PARTS.get(kind, ())[:2])
        found.findings.append(error("names", f"no {parts} tensors are in this file"))
    stray = [m for m in found.copies if m not in found.modules]
    found.findings += [error(m + BASE_COPY, "a base weight without an adapter") for m in stray]
    return found


def _is_part(match: re.Match[str], kind: str) -> bool:
    part, leaf = match["part"], match["leaf"]
    leaves: tuple[str | None, ...] = _LEAVES.get(part, (None,))
    if kind == "ADALORA":
        leaves = (None,)
    return part in PARTS.get(kind, ()) and leaf in leaves


def _add(parts: Parts, match: re.Match[str], ref: TensorRef) -> None:
    part = match["part"]
    if part.endswith(("lora_A", "embedding_A")):
        parts.down = ref
        parts.embedding = "embedding" in part
    elif part.endswith(("lora_B", "embedding_B")) and match["leaf"] != "bias":
        parts.up = ref
        parts.embedding = "embedding" in part
    else:
        parts.others[part + (".bias" if match["leaf"] == "bias" else "")] = ref


def _sort(found: Names, key: str, name: str, ref: TensorRef) -> None:
    """File a tensor that is no part of a module's adapter."""
    foreign = next((what for piece, what in _FOREIGN if piece in name), "")
    whole = re.sub(r"\.modules_to_save\.(?:[^.]+\.)?(?=.)", ".", name).replace(".base_layer.", ".")
    if foreign:
        found.findings.append(error(key, foreign))
    elif name in ("base_model.vera_A", "base_model.vera_B"):
        found.shared[name.rpartition(".")[2]] = ref
    elif _OF_TRAINING.fullmatch(name) or ".original_module." in name:
        found.ignored.append(key)
    elif name.endswith(BASE_COPY):
        found.copies[name.removesuffix(BASE_COPY).removesuffix(".token_adapter")] = ref
    elif whole in found.whole:  # with bias="all" PEFT saves the biases of modules_to_save under two names
        found.ignored.append(key)
    else:
        found.whole[whole] = ref


def bare(module: str) -> str:
    """The module path without PEFT's wrappers, which occur zero, one or two times."""
    while module.startswith(WRAPPER):
        module = module[len(WRAPPER) :]
    return module
