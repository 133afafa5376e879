"""An adapter merged into a quantised base is a 16-bit model: dequant(W) + s B A, rounded once, no codes left.

The oracle is PEFT's own merge in fp64, into the weights as the quantising libraries read them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_files import FOLDERS, expected, gpt_oss, llama, read_all
from safetensors import safe_open

import loratool
from loratool.storage.load import Loader
from loratool.tensors import TensorRef

LLAMA = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
GPT_OSS = {
    "target_modules": ["q_proj", "o_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}


def trained(kind: str, weights: dict[str, torch.Tensor], adapter_folder: Callable[..., Any]) -> tuple[Any, Path]:
    """A PeftModel in fp64 on these weights, and its adapter."""
    live = gpt_oss() if kind == "mxfp4" else llama()
    live.load_state_dict({name: tensor.double() for name, tensor in weights.items()}, assign=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says a lot about experts
        return adapter_folder(live, r=4, lora_alpha=6, **(GPT_OSS if kind == "mxfp4" else LLAMA))


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_merge_into_a_quantised_base_is_a_16_bit_model(kind: str, tmp_path: Path, adapter_folder: Callable[..., Any]):
    import transformers

    FOLDERS[kind](tmp_path / "base")
    weights = expected(tmp_path / "base")
    live, adapter = trained(kind, weights, adapter_folder)
    loratool.merge(tmp_path / "base", [adapter], tmp_path / "out", dtype="bfloat16")

    exact = live.merge_and_unload().state_dict()
    merged = read_all(tmp_path / "out")
    assert merged.keys() == weights.keys() == exact.keys()
    changed = 0
    for name, tensor in merged.items():
        assert tensor.dtype == torch.bfloat16, name
        if torch.equal(exact[name], weights[name].double()):
            assert torch.equal(tensor, weights[name]), name
            continue
        changed += 1
        error, bound = (tensor.double() - exact[name]).abs(), exact[name].abs() * 2**-8
        assert (error <= bound * (1 + 1e-4) + 1e-7).all(), name
    assert changed == (4 + 4 if kind == "mxfp4" else 14)

    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert again.dtype == torch.bfloat16
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, merged[name]), name


@pytest.mark.parametrize("kind", ["nf4", "mxfp4"])
def test_the_report_says_what_the_base_was(kind: str, tmp_path: Path, adapter_folder: Callable[..., Any]):
    FOLDERS[kind](tmp_path / "base")
    _, adapter = trained(kind, expected(tmp_path / "base"), adapter_folder)
    report = loratool.merge(tmp_path / "base", [adapter], tmp_path / "out", dtype="bfloat16")
    assert any(kind in finding.what for finding in report.findings)


def test_experts_that_no_adapter_touches_are_decoded_in_tiles(
    tmp_path: Path, adapter_folder: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    FOLDERS["mxfp4"](tmp_path / "base")
    _, adapter = adapter_folder(gpt_oss(), r=2, target_modules=["q_proj"])
    monkeypatch.setattr("loratool.operations.panels.TILE", 1)  # 64 rows, the least that a tile has
    read, call = [], Loader.__call__

    def listening(self: Loader, ref: TensorRef, into: torch.Tensor | None = None) -> torch.Tensor:
        read.append(prod(ref.shape) if "experts" in ref.name and ref.view else 0)
        return call(self, ref, into)

    monkeypatch.setattr(Loader, "__call__", listening)
    loratool.merge(tmp_path / "base", [adapter], tmp_path / "out", dtype="bfloat16")
    weights = expected(tmp_path / "base")
    assert 0 < max(read) <= (64 + 15) * 192
    for name, tensor in read_all(tmp_path / "out").items():
        assert "q_proj" in name or torch.equal(tensor, weights[name]), name
