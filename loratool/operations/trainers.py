"""A preset in the arguments of programs that train: PEFT's own, LLaMA-Factory, axolotl, sd-scripts.

LLaMA-Factory cuts lora_target at its commas and gives PEFT the list, so that it can say no regular expression; where
the model has towers it asks instead whether an entry stands anywhere in a module's name. It has no argument for bare
parameters (hparams/finetuning_args.py, model/adapter.py, model/model_utils/visual.py: patch_target_modules). axolotl
gives PEFT a list or a string as they are (utils/schemas/peft.py, loaders/adapter.py). A whole name means one module to
all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from loratool.errors import MismatchError
from loratool.operations import sd_scripts
from loratool.operations.survey import Survey
from loratool.operations.targets import pasteable, targets

_PLAIN = re.compile(r"(?!(?i:y|n|yes|no|on|off|true|false|null)$)[A-Za-z_][\w.,]*")


class Form(NamedTuple):
    """How a trainer is told: its arguments for a preset of a model, and the lines to paste."""

    arguments: Callable[[Survey, str], dict[str, Any]]
    lines: Callable[[Mapping[str, Any]], list[str]]


def llama_factory(survey: Survey, preset: str) -> dict[str, Any]:
    """Return `lora_target`: the names for PEFT with commas between; whole names where those could mean more.

    Raises MismatchError where the preset holds bare parameters, such as stacks of experts.
    """
    _require_language(survey, "LLaMA-Factory")
    found = targets(survey, preset)
    if found["target_parameters"]:
        names = ", ".join(found["target_parameters"])
        raise MismatchError(
            f"LLaMA-Factory has no argument for parameters, and {preset} trains some: {names}",
            hint="--for axolotl or --for peft has one; or --preset attention",
        )
    entries = found["target_modules"]
    towers = any(w.layer.tower for m in survey.modules for w in m.weights)
    if isinstance(entries, str) or towers:
        entries = [m.name for m in survey.selected(preset)]
    return {"lora_target": ",".join(entries)}


def axolotl(survey: Survey, preset: str) -> dict[str, Any]:
    """Return `lora_target_modules`, a list or one regular expression, and `lora_target_parameters` where there are any.

    PEFT trains parameters without dropout only, and axolotl asks for `lora_dropout: 0` with them.
    """
    _require_language(survey, "axolotl")
    found = targets(survey, preset)
    parameters = {"lora_target_parameters": found["target_parameters"]} if found["target_parameters"] else {}
    return {"lora_target_modules": found["target_modules"], **parameters}


def _require_language(survey: Survey, trainer: str) -> None:
    if survey.architecture.named:
        what = f"{trainer} trains language models, and this is of the {survey.architecture.name} family"
        raise MismatchError(what, hint="--for peft, or --for kohya where the model has a UNet")


def _yaml(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, value in found.items():
        if isinstance(value, str):
            lines.append(f"{name}: {_scalar(value)}")
        else:
            lines += [f"{name}:" if value else f"{name}: []", *(f"  - {_scalar(v)}" for v in value)]
    return lines


def _scalar(text: str) -> str:
    quoted = text.replace("'", "''")
    return text if _PLAIN.fullmatch(text) else f"'{quoted}'"


FORMS = {
    "peft": Form(targets, pasteable),
    "llama-factory": Form(llama_factory, _yaml),
    "axolotl": Form(axolotl, _yaml),
    "kohya": Form(sd_scripts.arguments, sd_scripts.lines),
}
FORMS["sd-scripts"] = FORMS["kohya"]
