"""A quantised base merged in its own encoding, and 16-bit bases merged as a QLoRA adapter was trained on them.

What transformers and bitsandbytes decode of the output is compared with fp64 references.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_files import FOLDERS, expected, llama, read_all
from safetensors.torch import load_file
from test_quantised_bases import trained

import loratool

KEPT = ["fp8-blocks", "fp8-rows", "fp8-tensor", "mxfp4"]


@pytest.mark.parametrize("kind", KEPT)
def test_keep_writes_the_bases_own_encoding(kind: str, tmp_path: Path, adapter_folder: Callable[..., Any]):
    FOLDERS[kind](tmp_path / "base")
    weights = expected(tmp_path / "base")
    live, adapter = trained(kind, weights, adapter_folder)
    report = loratool.merge(tmp_path / "base", [adapter], tmp_path / "out")
    before, after = read_all(tmp_path / "base"), read_all(tmp_path / "out")
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    assert "quantization_config" in json.loads((tmp_path / "out" / "config.json").read_text())

    exact, merged = live.merge_and_unload().state_dict(), expected(tmp_path / "out")
    lost = moved = 0.0
    touched = [name for name in exact if not torch.equal(exact[name], weights[name].double())]
    for name in exact:
        if name not in touched:
            assert torch.equal(merged[name], weights[name]), name
            continue
        error = (merged[name].double() - exact[name]).norm() / exact[name].norm()
        # E4M3 rounds to 2^-4 of a value at worst; E2M1 with a power of two for 32 neighbours is much coarser
        assert error < (0.2 if "experts" in name else 2**-4), (name, error)
        lost += float((merged[name].double() - exact[name]).square().sum())
        moved += float((exact[name] - weights[name].double()).square().sum())
    assert touched
    told = report.totals["rounding"]
    assert told == pytest.approx((lost / moved) ** 0.5, rel=0.05)  # the 16-bit rounding of `expected` is in the oracle


@pytest.mark.parametrize("kind", ["fp8-blocks", "mxfp4"])
def test_tensors_that_no_adapter_touches_keep_their_bytes(
    kind: str, tmp_path: Path, adapter_folder: Callable[..., Any]
):
    FOLDERS[kind](tmp_path / "base")
    live, _ = trained(kind, expected(tmp_path / "base"), adapter_folder)
    _, adapter = adapter_folder(live.unload(), r=2, target_modules=["layers.1.self_attn.q_proj"])
    loratool.merge(tmp_path / "base", [adapter], tmp_path / "out")
    before, after = read_all(tmp_path / "base"), read_all(tmp_path / "out")
    changed = {n for n in before if not torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8))}
    assert changed
    assert changed <= {n for n in before if "layers.1.self_attn.q_proj" in n}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_cannot_be_encoded_again_is_written_in_16_bits(
    kind: str, tmp_path: Path, adapter_folder: Callable[..., Any]
):
    FOLDERS[kind](tmp_path / "base")
    _, adapter = trained(kind, expected(tmp_path / "base"), adapter_folder)
    report = loratool.merge(tmp_path / "base", [adapter], tmp_path / "out")
    assert {t.dtype for t in read_all(tmp_path / "out").values()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert any("written as the numbers" in f.what for f in report.findings)


@pytest.mark.parametrize("scheme", ["nf4", "nf4-double"])
def test_a_base_as_trained_is_what_bitsandbytes_makes_of_it(
    scheme: str, tmp_path: Path, adapter_folder: Callable[..., Any]
):
    import bitsandbytes.functional as bnb

    model = llama()
    model.save_pretrained(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    live, adapter = adapter_folder(llama(), r=4, target_modules=["q_proj", "down_proj"])
    loratool.merge(tmp_path / "base", [adapter], tmp_path / "out", base_as_trained=scheme, dtype="float32")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    updates = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").double()
        for name, module in live.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert len(updates) == 4
    for name, original in weights.items():
        weight = original
        quantised = weight.dim() == 2 and not name.startswith(("lm_head", "model.embed"))
        if quantised:
            flat = weight.flatten()[None]  # one row: bitsandbytes' AVX-512 path takes wrong scales for some widths
            codes, state = bnb.quantize_4bit(flat, quant_type="nf4", compress_statistics=scheme == "nf4-double")
            weight = bnb.dequantize_4bit(codes, state).reshape(weight.shape)
        exact = weight.double() + updates.get(name.removesuffix(".weight"), 0)
        assert torch.allclose(merged[name].double(), exact, rtol=0, atol=2e-7), name
