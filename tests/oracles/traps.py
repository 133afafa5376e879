"""What the tests of traps share: adapters rewritten on disk, and what PEFT makes of them in memory. No loratool."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_files import write_json

Q0 = "model.layers.0.self_attn.q_proj"
V0 = "model.layers.0.self_attn.v_proj"
LIVE = "base_model.model."


@contextmanager
def heard() -> Iterator[list[str]]:
    """What PEFT warns of."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    said += [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return content


def rewritten(source: Path, target: Path, tensors: dict[str, torch.Tensor] | None = None, **fields: Any) -> Path:
    """A copy of an adapter with other tensors or fields; a field of None goes."""
    target.mkdir()
    save_file(read(source) if tensors is None else tensors, target / "adapter_model.safetensors")
    config = {k: v for k, v in {**config_of(source), **fields}.items() if k not in fields or v is not None}
    write_json(target / "adapter_config.json", config)
    return target


def state(model: Any) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def merged_by_peft(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    return state(peft.PeftModel.from_pretrained(model, folder).merge_and_unload())


def delta_of(live: Any, module: str, adapter: str = "default") -> torch.Tensor:
    """scaling * B @ A of a linear layer, in fp64."""
    layer = live.get_submodule(LIVE + module)
    product = layer.lora_B[adapter].weight.double() @ layer.lora_A[adapter].weight.double()
    return (layer.scaling[adapter] * product).detach()


def share(got: torch.Tensor, right: torch.Tensor) -> float:
    """How much of `right` is lost or added, relative to it."""
    return float((got.double() - right.double()).norm() / right.double().norm())


def logits(model: Any, *tokens: int) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens or (1, 5, 9, 2, 60)])).logits


def opened(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
