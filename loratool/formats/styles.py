"""The formats of image tools as a table: which names they give modules, what their factors end in, where alpha is.

A format is (first elements, spelling, endings, alpha): the reader takes all of them in any mixture, and a row says how
one is written. Sources: see keys.py; OneTrainer modules/util/convert; XLabs x-flux; BFL flux, Depth and Canny LoRA.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from loratool.architecture import Architecture
from loratool.formats import keys
from loratool.native import DENOISER


class Style(NamedTuple):
    """One row of the table.

    suffix    the family of the factors' endings (keys.FACTORS)
    start     what stands before a module: kohya, numbered, transformer, lycoris, comfy, component, or nothing
    spelling  native, canonical, or what the family says that kohya flattens (family)
    alpha     a tensor a module, `metadata` in the header, or folded into the factors
    """

    name: str
    summary: str
    suffix: str
    start: str
    spelling: str
    alpha: str
    flat: bool = False

    def prefix(self, architecture: Architecture, component: str) -> str | None:
        """Return what stands before the names of a component's modules, or None where the format has none for it."""
        named = architecture.named.get(component)
        denoiser = named is not None and named.comfy == DENOISER
        encoders = [c for c in architecture.components if c.startswith("text_encoder")]
        number = f"{encoders.index(component) + 1}" if component in encoders and len(encoders) > 1 else ""
        match self.start:
            case "component":
                return f"{component}." if component else "transformer."
            case "comfy":
                return named.comfy or None if named else None
            case "":
                return "" if denoiser else None
            case "kohya":
                return f"{architecture.kohya_prefix(component)}_"
        if not denoiser and component not in encoders:
            return None
        transformer = "lora_unet" if component == "unet" else "lora_transformer"
        first = {"numbered": "lora_unet", "transformer": transformer, "lycoris": "lycoris"}[self.start]
        return f"{first}_" if denoiser else f"lora_te{number}_"

    def is_native(self, architecture: Architecture, component: str) -> bool:
        """Whether modules have their original names in this format: denoisers may, text encoders never do."""
        named = architecture.named.get(component)
        if named is None or named.comfy != DENOISER:
            return False
        return self.spelling == "native" or (self.spelling == "family" and named.flat != "canonical")

    def is_last(self, architecture: Architecture, component: str) -> bool:
        """Whether the last of several original names is meant."""
        return self.spelling == "family" and architecture.named[component].flat == "last"


STYLES = {
    style.name: style
    for style in (
        Style(
            "kohya",
            "sd-scripts and musubi-tuner: lora_unet_... lora_down / lora_up / alpha, and what LyCORIS trains",
            "down/up",
            "kohya",
            "family",
            "tensor",
            flat=True,
        ),
        Style("comfy", "ComfyUI: diffusion_model. and original names, with alpha", "A/B", "comfy", "native", "tensor"),
        Style("diffusers", "diffusers: unet. or transformer. lora_A", "A/B", "component", "canonical", "metadata"),
        Style("ai-toolkit", "ai-toolkit: diffusers' names, alpha = rank", "A/B", "component", "canonical", "folded"),
        Style("bfl", "Black Forest Labs: original names alone, alpha = rank", "A/B", "", "native", "folded"),
        Style("xlabs", "XLabs: double_blocks.N.processor.qkv_lora1", "xlabs", "", "native", "folded"),
        Style(
            "onetrainer",
            "OneTrainer: kohya's names, text encoders numbered",
            "down/up",
            "numbered",
            "family",
            "tensor",
            flat=True,
        ),
        Style(
            "onetrainer-legacy",
            "older OneTrainer and SimpleTuner: lora_unet_ or lora_transformer_ and diffusers' names",
            "down/up",
            "transformer",
            "canonical",
            "tensor",
            flat=True,
        ),
        Style(
            "lycoris",
            "LyCORIS' wrapper: lycoris_ and diffusers' names",
            "down/up",
            "lycoris",
            "canonical",
            "tensor",
            flat=True,
        ),
    )
}
_COMPONENTS = ("unet.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")
# `transformer.` is the leading element of GPT-2, BLOOM, Falcon, ChatGLM, MPT and DBRX too
_LANGUAGE = re.compile(
    r"transformer\.(?:h|encoder|wte|wpe|word_embeddings|blocks\.\d+\.(?:norm_attn_norm|attn|ffn\.\D\w+))\."
)
_BARE_DIFFUSERS = re.compile(r"(?:single_)?transformer_blocks\.\d")
_BARE_NATIVE = re.compile(r"(?:double|single)_blocks\.\d|blocks\.\d+\.(?:self_attn|cross_attn)\.")


def classify(names: Iterable[str]) -> str:
    """Return the name of the style that most keys of a file are in, or nothing where they are no image tool's."""
    votes = Counter(filter(None, map(_style_of, names)))
    return votes.most_common(1)[0][0] if votes else ""


@lru_cache(maxsize=1 << 14)  # every format asks of the same names
def _style_of(name: str) -> str:
    key = keys.split(name)
    if key is None or key.part == "weight" or key.module.startswith("base_model."):
        return ""
    module, flat = key.module, "." not in key.module
    if flat:
        if module.startswith("lora_transformer_"):
            return "onetrainer-legacy"
        return "lycoris" if module.startswith("lycoris_") else "kohya"
    if key.suffix == "xlabs":
        return "xlabs"
    if module.startswith((DENOISER, "text_encoders.")):
        return "comfy"
    if module.startswith(_COMPONENTS) or (module.startswith("transformer.") and not _LANGUAGE.match(name)):
        return "diffusers"
    if key.suffix in ("down/up", "processor", "linear_layer", "lora.down/up") or _BARE_DIFFUSERS.match(module):
        return "diffusers"
    return "bfl" if _BARE_NATIVE.match(module) else ""
