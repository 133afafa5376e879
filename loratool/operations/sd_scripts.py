r"""How kohya's sd-scripts are told to train the layers of a preset, in models with a UNet.

networks.lora takes layers by the class of the block they are in, and has no argument for names: each Linear and 1x1
convolution in a Transformer2DModel of the UNet, in a CLIPAttention or CLIPMLP of the text encoders (sd-scripts:
networks/lora.py, LoRANetwork; conv_dim adds the resnets' convolutions, block_dims takes whole blocks away). Any other
selection goes through LyCORIS, which sd-scripts load as a network module: its preset has a list of names for the UNet
and one for all text encoders, in each of which an entry is a whole name or a regular expression for re.match (LyCORIS:
lycoris/kohya.py, LycorisNetworkKohya). With algo=lora it writes the same file.

The UNet of sd-scripts has diffusers' names in Stable Diffusion 1 and 2, and the original ones in XL.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from loratool.errors import MismatchError
from loratool.operations.survey import Survey, Weight
from loratool.patterns import split

_UNET = "unet"
_BLOCKS = {_UNET: {"attentions"}}  # the elements of a path that say a class; of a text encoder:
_CLIP = {"self_attn", "mlp"}
_FILE = "targets.toml"
Places = set[tuple[str, str]]  # component and name in sd-scripts' live model


def arguments(survey: Survey, preset: str) -> dict[str, Any]:
    """Return `network_module`, `network_args`, whether one side is left out, and the `preset` where that is a file.

    `networks_lora` then says which layers that module would train besides or leave out. Raises MismatchError for
    families without a UNet, and where names cannot tell the layers apart.
    """
    family = survey.architecture
    if _UNET not in family.components:
        image = bool(family.named)
        what = "choose this family's layers by class, not by name" if image else "train image models"
        hint = "--for peft, with a trainer that takes target_modules" if image else "--for llama-factory or axolotl"
        raise MismatchError(f"sd-scripts {what}, and this is of the {family.name} family", hint=hint)
    every = [w for m in survey.modules for w in m.weights]
    wanted = _places(survey, (w for m in survey.selected(preset) for w in m.weights))
    sides = {component == _UNET for component, _ in wanted}
    theirs = {p for p in _places(survey, filter(_by_class, every)) if (p[0] == _UNET) in sides}
    only = {"network_train_unet_only": sides == {True}, "network_train_text_encoder_only": sides == {False}}
    found: dict[str, Any] = {name: True for name, is_so in only.items() if is_so}
    if wanted == theirs:
        return {"network_module": "networks.lora", **found}
    others = _places(survey, every) - wanted
    unet, text = (_patterns(wanted, others, is_unet) for is_unet in (True, False))
    return {
        "network_module": "lycoris.kohya",
        "network_args": {"algo": "lora", "preset": _FILE},
        **found,
        "preset": {
            "enable_conv": False,
            "unet_target_module": [],
            "unet_target_name": unet,
            "text_encoder_target_module": [],
            "text_encoder_target_name": text,
        },
        "networks_lora": {"trains_besides": _kinds(theirs - wanted), "leaves_out": _kinds(wanted - theirs)},
    }


def lines(found: Mapping[str, Any]) -> list[str]:
    """Return the arguments on one line; with a preset its TOML file, which begins with them and with the reason."""
    words = [f"--network_module {found['network_module']}"]
    given = " ".join(f"{name}={value}" for name, value in found.get("network_args", {}).items())
    words += [f"--network_args {given}"] if given else []
    words += [f"--{name}" for name in ("network_train_unet_only", "network_train_text_encoder_only") if name in found]
    if "preset" not in found:
        return [" ".join(words)]
    differs = {n.replace("_", " "): ", ".join(v) for n, v in found["networks_lora"].items() if v}
    reasons = [f"# {how}: {what}" for how, what in differs.items()]
    top = ["# networks.lora takes layers by class and cannot train exactly these. It", *reasons]
    top += [f"# so this is a preset of LyCORIS: save it as {_FILE}, and train with", f"# {' '.join(words)}"]
    return [*top, *_toml(found["preset"])]


def _toml(content: Mapping[str, Any]) -> Iterator[str]:
    for name, value in content.items():
        if isinstance(value, bool):
            yield f"{name} = {str(value).lower()}"
        elif not value:
            yield f"{name} = []"
        else:
            yield from (f"{name} = [", *(f"    '{entry}'," for entry in value), "]")


def _places(survey: Survey, weights: Iterable[Weight]) -> Places:
    family = survey.architecture
    native = {c for c, named in family.named.items() if c == _UNET and named.flat != "canonical"}
    return {
        (w.component, family.original(w.component, w.path).name if w.component in native else w.path) for w in weights
    }


def _by_class(weight: Weight) -> bool:
    """Whether networks.lora trains a layer by itself."""
    fits = weight.is_linear or (weight.layer.kind == "conv2d" and weight.kernel == 1)
    return fits and bool(_BLOCKS.get(weight.component, _CLIP) & set(split(weight.path)))


def _patterns(wanted: Places, others: Places, is_unet: bool) -> list[str]:
    """Return expressions that match the wanted names of one side and no other name there, the shortest ends first."""
    mine = {name: None for component, name in sorted(wanted) if (component == _UNET) is is_unet}
    rest = {name for component, name in others if (component == _UNET) is is_unet}
    both = sorted(rest & set(mine))
    if both:
        what = f"LyCORIS has one list of names for all text encoders, and one of them leaves out {both[0]}"
        raise MismatchError(what, hint="--for peft, one text encoder at a time")
    taken = {".".join(e[-size:]) for e in map(split, rest) for size in range(1, len(e) + 1)}
    found: dict[str, None] = {}
    for elements in map(split, mine):
        ends = (".".join(elements[-n:]) for n in range(1, len(elements)) if not elements[-n].isdecimal())
        end = next((e for e in ends if e not in taken), "")
        found[rf"(.*\.)?{re.escape(end)}$" if end else re.escape(".".join(elements)) + "$"] = None
    return list(found)


def _kinds(places: Places) -> list[str]:
    """Return the kinds of layers: names without the blocks that they are in."""
    return list(dict.fromkeys(re.sub(r"^.*\.\d+\.(?=\D)", "", name) for _, name in sorted(places)))
