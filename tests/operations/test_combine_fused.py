"""combine where one adapter has fused what another has split, and weights for one part of what is fused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_combine import assert_equal, updates
from tiny_files import factors, write_adapter, write_base

import loratool

QKV = "model.layers.0.self_attn.qkv_proj"


def fused_and_split(tmp_path: Path, **split: Any) -> tuple[Path, Path, Path]:
    """A base of the phi3 family, an adapter of its fused weight, and one of q, k and v."""
    config = {"model_type": "phi3", "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    base = write_base(tmp_path / "base", {f"{QKV}.weight": torch.zeros(48, 16)}, **config)
    whole = write_adapter(tmp_path / "whole", factors(1, 3, {QKV: (48, 16)}), r=3)
    names = {f"model.layers.0.self_attn.{p}_proj": (16, 16) for p in "qkv"}
    return base, whole, write_adapter(tmp_path / "apart", factors(2, 2, names), r=2, **split)


@pytest.mark.parametrize("split", [{}, {"alpha_pattern": {"k_proj": 3}}], ids=["one scaling", "scalings differ"])
def test_q_k_and_v_apart_meet_the_fused_weight(split: dict[str, Any], tmp_path: Path) -> None:
    base, whole, apart = fused_and_split(tmp_path, **split)
    loratool.combine([whole, apart], tmp_path / "out", weights=[1, 0.5], base=base, arch="phi3")
    tensors, scalings = load_file(apart / "adapter_model.safetensors"), {"q": 4, "k": 1.5 if split else 4, "v": 4}
    stem = "base_model.model.model.layers.0.self_attn.{}_proj.lora_{}.weight"
    parts = [
        s * tensors[stem.format(p, "B")].double() @ tensors[stem.format(p, "A")].double() for p, s in scalings.items()
    ]
    assert_equal(tmp_path / "out", {QKV: updates(whole)[QKV] + 0.5 * torch.cat(parts)})
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["r"] == 3 + 3 * 2


def test_parts_that_have_no_factors_to_join_meet_a_cut_of_the_fused_weight(tmp_path: Path) -> None:
    base, whole, _ = fused_and_split(tmp_path)
    generator = torch.Generator().manual_seed(3)
    loha, wanted = {}, {}
    cuts = dict(zip("qkv", updates(whole)[QKV].split(16), strict=True))
    for part in "qkv":
        shapes = {"w1_a": (16, 2), "w1_b": (2, 16), "w2_a": (16, 2), "w2_b": (2, 16)}
        own = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
        module = f"model.layers.0.self_attn.{part}_proj"
        loha |= {f"base_model.model.{module}.hada_{n}": t for n, t in own.items()}
        a, b, c, d = (t.double() for t in own.values())
        wanted[module] = cuts[part] + 0.5 * 2 * (a @ b) * (c @ d)
    names = sorted(wanted)
    other = write_adapter(
        tmp_path / "loha", loha, peft_type="LOHA", r=2, alpha=4, target_modules=names, lora_alpha=None
    )
    loratool.combine([whole, other], tmp_path / "out", weights=[1, 0.5], base=base)
    assert_equal(tmp_path / "out", wanted)


def flux(file: Path, seed: int, rank: int = 4) -> dict[str, torch.Tensor]:
    """Write kohya's fused qkv and linear1 of one Flux block each; return what each updates, in fp64."""
    generator, tensors, found = torch.Generator().manual_seed(seed), {}, {}
    for name, out in (("double_blocks_0_img_attn_qkv", 48), ("single_blocks_0_linear1", 112)):
        down, up = torch.randn(rank, 16, generator=generator), torch.randn(out, rank, generator=generator)
        stem = f"lora_unet_{name}"
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(2.0)}
        found[stem] = 2 / rank * up.double() @ down.double()
    save_file(tensors, file, {"ss_network_module": "networks.lora_flux"})
    return found


def test_a_weight_for_one_part_of_a_fused_layer_is_of_that_part_alone(tmp_path: Path) -> None:
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    deltas = [flux(file, n) for n, file in enumerate(files)]
    scales = {"transformer_blocks.0.attn.to_k": 0.25, "single_transformer_blocks.{0-18}.proj_mlp": 0}
    loratool.combine(files, tmp_path / "out.safetensors", weights=[1, -0.5], scales=scales)
    got = load_file(tmp_path / "out.safetensors")
    for stem, first in deltas[0].items():
        wanted = first - 0.5 * deltas[1][stem]
        if "linear1" in stem:
            wanted[48:] = 0
        else:
            wanted[16:32] *= 0.25
        up, down = (got[f"{stem}.lora_{half}.weight"].double() for half in ("up", "down"))
        scaling = float(got[f"{stem}.alpha"]) / down.shape[0]
        torch.testing.assert_close(scaling * up @ down, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_a_fused_file_and_a_split_one_meet_in_the_modules_of_the_output(to: str, tmp_path: Path) -> None:
    fused = flux(tmp_path / "one.safetensors", 1)
    generator = torch.Generator().manual_seed(2)
    double, single = "transformer_blocks.0.attn", "single_transformer_blocks.0"
    names = [f"{double}.to_q", f"{double}.to_k", f"{double}.to_v", f"{single}.attn.to_k", f"{single}.proj_mlp"]
    split, wanted, two = {}, {}, tmp_path / "two.safetensors"
    for name in names:
        down = torch.randn(3, 16, generator=generator)
        up = torch.randn(64 if "mlp" in name else 16, 3, generator=generator)
        split |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
        wanted[name] = up.double() @ down.double()
    save_file(split, two)
    q, k, v = fused["lora_unet_double_blocks_0_img_attn_qkv"].split(16)
    first = dict(zip(names[:3], (q, k, v), strict=True))
    q, k, v, mlp = fused["lora_unet_single_blocks_0_linear1"].split([16, 16, 16, 64])
    first |= {f"{single}.attn.to_q": q, f"{single}.attn.to_k": k, f"{single}.attn.to_v": v, f"{single}.proj_mlp": mlp}
    total = {n: 0.5 * d + wanted.get(n, 0) for n, d in first.items()}
    loratool.combine([tmp_path / "one.safetensors", two], tmp_path / "out.safetensors", weights=[0.5, 1], to=to)
    got, files = load_file(tmp_path / "out.safetensors"), {}
    if to == "diffusers":
        files = {n: got[f"transformer.{n}.lora_B.weight"] @ got[f"transformer.{n}.lora_A.weight"] for n in total}
        assert len(got) == 2 * len(total)
    else:  # as much rank as both together have in the fused layer, not one share for each of its parts
        stems = "double_blocks_0_img_attn_qkv", "single_blocks_0_linear1"
        downs, ups = ([got[f"lora_unet_{s}.lora_{half}.weight"] for s in stems] for half in ("down", "up"))
        assert [len(d) for d in downs] == [4 + 3 * 3, 4 + 2 * 3]
        rows = [*(ups[0] @ downs[0]).split(16), *(ups[1] @ downs[1]).split([16, 16, 16, 64])]
        files = dict(zip(first, rows, strict=True))
    for name, delta in total.items():
        torch.testing.assert_close(files[name].double(), delta, rtol=1e-4, atol=1e-4)
