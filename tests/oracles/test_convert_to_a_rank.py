"""convert --rank: a fused layer of joined parts at the rank that was asked for, as well as Eckart-Young allows."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool

BLOCK = "transformer.transformer_blocks.0.attn"


def parts():
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for name in ("to_q", "to_k", "to_v"):
        tensors[f"{BLOCK}.{name}.lora_A.weight"] = torch.randn(3, 24, generator=generator)
        tensors[f"{BLOCK}.{name}.lora_B.weight"] = torch.randn(24, 3, generator=generator)
    return tensors


@pytest.mark.parametrize("rank", [2, 6, 9, 20])
def test_joined_parts_come_out_at_the_rank_that_was_asked_for(rank, tmp_path):
    tensors = parts()
    save_file(tensors, tmp_path / "a.safetensors")
    out = tmp_path / "out.safetensors"
    arguments = {"to": "comfy", "arch": "flux", "rank": rank}
    preview = loratool.convert(tmp_path / "a.safetensors", out, **arguments, dry_run=True)
    assert preview.dry_run
    assert any("error" in f.what and "after the run" in f.what for f in preview.findings)
    assert not out.exists()
    report = loratool.convert(tmp_path / "a.safetensors", out, **arguments)
    written = load_file(out)
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    up, down = (
        next(t for n, t in written.items() if n.startswith(name) and side in n).double()
        for side in ("lora_B", "lora_A")
    )
    alpha = written.get(f"{name}.alpha")
    scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
    ups, downs = (
        [tensors[f"{BLOCK}.{n}.lora_{half}.weight"].double() for n in ("to_q", "to_k", "to_v")] for half in "BA"
    )
    whole = torch.cat([u @ d for u, d in zip(ups, downs, strict=True)])
    best = torch.linalg.svdvals(whole)[rank:].square().sum().sqrt()
    assert down.shape[0] == min(rank, 9)
    assert float((whole - scale * up @ down).norm()) == pytest.approx(float(best), rel=1e-5, abs=1e-5)
    assert report.verb == "convert"
    assert json.dumps(report.as_dict())
    assert "tmp" not in "".join(report.sources.values()).replace(str(tmp_path), "")
