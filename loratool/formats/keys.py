"""The keys in adapter files of image tools: which module a tensor belongs to, and what part of its adapter it is.

A key is `<leading elements><module><ending>`. Endings differ by tool, and mean the same parts, which are called here as
LyCORIS calls them (lycoris/modules/*.py: weight_list). Nothing is known here of model families.

Sources: sd-scripts networks/lora.py and oft.py; LyCORIS; diffusers utils/state_dict_utils.py; ComfyUI comfy/lora.py and
comfy/weight_adapter; x-flux (XLabs); ai-toolkit toolkit/network_mixins.py.
"""

from __future__ import annotations

import re
from typing import NamedTuple

#: What the two factors are called, by the name of the suffix family: (down, up).
FACTORS = {
    "down/up": ("lora_down.weight", "lora_up.weight"),
    "A/B": ("lora_A.weight", "lora_B.weight"),
    "lora.down/up": ("lora.down.weight", "lora.up.weight"),
    "linear_layer": ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    "processor": ("_lora.down.weight", "_lora.up.weight"),
    "xlabs": (".down.weight", ".up.weight"),
}
#: Parts that are spelled in one way everywhere, with or without `.weight` behind them.
_PLAIN = (
    *("alpha", "dora_scale", "lora_mid", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "oft_blocks", "rescale"),
    *("a1", "a2", "b1", "b2", "bm", "on_input", "diff", "diff_b", "w_norm", "b_norm", "set_weight", "reshape_weight"),
    *("bias_indices", "bias_values", "bias_size", "lora_magnitude_vector"),
)
_OTHER_NAMES = {"magnitude": "lora_magnitude_vector"}
_XLABS = re.compile(r"(?P<block>.+)\.processor\.(?P<what>qkv|proj)_lora(?P<stream>[12]?)")
_PROCESSOR = re.compile(r"(?P<block>.+?)(?:\.processor)?\.to_(?P<what>q|k|v|out)")
_STREAMS = {"1": "img_attn", "2": "txt_attn"}
_PATTERNS = (
    (re.compile(r"(.+)\.lora_(A|B)(?:\.(?!weight$|bias$)[^.]+)?(?:\.(weight|bias))?"), "A/B"),
    (re.compile(r"(.+)\.lora_(down|up)(?:\.(?!weight$)[^.]+)?(?:\.weight)?"), "down/up"),
    (re.compile(r"(.+)\.lora_linear_layer\.(down|up)\.weight"), "linear_layer"),
    (re.compile(r"(.+)\.lora\.(down|up)\.weight"), "lora.down/up"),
    (re.compile(r"(.+\.processor\.(?:qkv|proj)_lora[12]?)\.(down|up)\.weight"), "xlabs"),
    (re.compile(r"(.+)_lora\.(down|up)\.weight"), "processor"),
)
_PART = re.compile(rf"(.+)\.({'|'.join((*_PLAIN, *_OTHER_NAMES))})(?:\.default)?(?:\.weight)?")
_FACTOR = {"A": "lora_down", "down": "lora_down", "B": "lora_up", "up": "lora_up"}


class Key(NamedTuple):
    """A tensor's name, taken apart: the module as the file spells it, the part, and the family of the suffix."""

    module: str
    part: str
    suffix: str = ""


def split(name: str) -> Key | None:
    """Take a tensor's name apart; None where it is no part of an adapter that any tool writes."""
    for pattern, suffix in _PATTERNS:
        match = pattern.fullmatch(name)
        if match:
            module, which, *leaf = match.groups()
            if leaf == ["bias"]:
                return Key(module, "lora_B.bias", suffix) if which == "B" else None
            return Key(_module(module, suffix), _FACTOR[which], suffix)
    match = _PART.fullmatch(name)
    if match:
        return Key(match[1], _OTHER_NAMES.get(match[2], match[2]))
    match = re.fullmatch(r"(.+)\.weight", name)  # IA3's factors; told from a weight by on_input beside it
    return Key(match[1], "weight") if match else None


def _module(module: str, suffix: str) -> str:
    """Return the path of the model's module where the file names the adapter's own instead."""
    if suffix == "xlabs":
        match = _XLABS.fullmatch(module)
        assert match
        inside = _STREAMS.get(match["stream"], "")
        return ".".join(filter(None, (match["block"], inside, match["what"] if inside else f"{match['what']}_lora")))
    if suffix == "processor":
        match = _PROCESSOR.fullmatch(module)
        if match:
            in_text = ".self_attn" in match["block"]  # of CLIP: q_proj ... out_proj
            name = f"{match['what']}_proj" if in_text else f"to_{match['what']}"
            return f"{match['block']}.{'to_out.0' if name == 'to_out' else name}"
    return module
