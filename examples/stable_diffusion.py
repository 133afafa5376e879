"""Stable Diffusion: a style, a subject and an LCM-like LoRA stacked into one file for ComfyUI and into the UNet.

A tiny UNet with the blocks of Stable Diffusion 1 and random weights. diffusers and PEFT train two adapters on its cross
attention, and one as LCM-LoRA has it, on attention, feed-forward, convolutions and time embedding, which is saved as
kohya's scripts do. `combine` adds them up by weights, exactly. Claimed and asserted: the ComfyUI file holds the same
update, and the UNet with the stack merged predicts what diffusers does with all three adapters live. And, from a
config alone: how much of OPT-175B a LoRA trains.

    python examples/stable_diffusion.py [-o DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are wanted

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

UNET = {
    "sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4, "cross_attention_dim": 32,
}  # fmt: skip
CROSS = ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"]
LCM = [
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
]  # fmt: skip
WEIGHTS = {"style": 0.8, "subject": 0.6, "lcm": 1.0}
OPT_175B = {
    "model_type": "opt", "hidden_size": 12288, "word_embed_proj_dim": 12288, "num_hidden_layers": 96,
    "num_attention_heads": 96, "ffn_dim": 49152, "vocab_size": 50272, "max_position_embeddings": 2048,
}  # fmt: skip


def batch(seed: int) -> dict[str, Tensor]:
    """Return noisy latents (4, 4, 8, 8), their timesteps (4,), and the states of a prompt (4, 6, 32)."""
    random = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(4, 4, 8, 8, generator=random),
        "timestep": torch.randint(1000, (4,), generator=random),
        "encoder_hidden_states": torch.randn(4, 6, 32, generator=random),
    }


def train(unet: UNet2DConditionModel, name: str, config: LoraConfig, seed: int, steps: int) -> dict[str, Tensor]:
    """Add an adapter, train it alone for a moment, and return its factors."""
    unet.add_adapter(config, name)
    unet.set_adapters(name)
    given, wanted = batch(seed), batch(seed + 1)["sample"]
    optimizer = torch.optim.AdamW([p for n, p in unet.named_parameters() if f".{name}." in n], lr=5e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (unet(**given).sample - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"{name}: loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
    assert losses[-1] < losses[0], f"{name} learnt nothing"
    return get_peft_model_state_dict(unet, adapter_name=name)


@torch.no_grad()
def noise(unet: UNet2DConditionModel) -> Tensor:
    return unet.eval()(**batch(seed=9)).sample


def run(folder: Path, *words: str) -> str:
    """Run loratool, with what it prints shown, or returned if that is JSON."""
    print(f"\n$ loratool {' '.join(words)}", flush=True)
    command, told = [sys.executable, "-m", "loratool", *words], subprocess.PIPE if "--json" in words else None
    return subprocess.run(command, cwd=folder, check=True, text=True, stdout=told).stdout


def opt_175b(folder: Path) -> None:
    """Count what a LoRA on q and v of every layer trains, as in the LoRA paper; no weights are needed."""
    (folder / "opt-175b").mkdir()
    (folder / "opt-175b/config.json").write_text(json.dumps(OPT_175B))
    ranks = ("--rank", "1", "--rank", "4", "--rank", "8")
    totals = json.loads(run(folder, "arch", "show", "opt-175b/config.json", *ranks, "--json"))["totals"]
    print(f"the whole model: {totals['parameters']:,} parameters")
    for row in totals["adapters"]:
        if row["preset"] == "default":  # q_proj and v_proj
            share = totals["parameters"] / row["parameters"]
            print(f"LoRA on q and v, rank {row['rank']}: {row['parameters']:,}, one in {share:,.0f}")
            assert row["parameters"] == 96 * 2 * row["rank"] * (12288 + 12288)


def main(folder: Path, steps: int) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**UNET)
    unet.save_pretrained(folder / "unet")
    plain = noise(unet)
    for seed, name in ((1, "style"), (3, "subject")):
        config = LoraConfig(r=4, lora_alpha=8, target_modules=CROSS)
        factors = convert_state_dict_to_diffusers(train(unet, name, config, seed, steps))
        metadata = config.to_dict()  # alpha is nowhere else in a file of diffusers
        StableDiffusionPipeline.save_lora_weights(folder / name, factors, unet_lora_adapter_metadata=metadata)
    factors = train(unet, "lcm", LoraConfig(r=8, lora_alpha=8, target_modules=LCM), 5, steps)
    kohya = convert_state_dict_to_kohya({f"unet.{key}": tensor for key, tensor in factors.items()})
    save_file(kohya, folder / "lcm.safetensors")
    adapters = ("style:0.8", "subject:0.6", "lcm.safetensors:1")
    run(folder, "combine", *adapters, "-o", "stack.safetensors", "--to", "kohya")
    run(folder, "convert", "stack.safetensors", "-o", "stack-comfy.safetensors", "--to", "comfy", "--verify")
    run(folder, "merge", "unet", "stack-comfy.safetensors", "-o", "merged")
    unet.set_adapters(list(WEIGHTS), list(WEIGHTS.values()))
    live, merged = noise(unet), noise(UNet2DConditionModel.from_pretrained(folder / "merged"))
    print(f"\nlargest difference of predicted noise, all three live to none: {(live - plain).abs().max():.2f}")
    print(f"all three live to merged: {(live - merged).abs().max():.0e}")
    assert torch.allclose(live, merged, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(live, plain, atol=0.01)
    opt_175b(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, help="keep the files in this new folder")
    parser.add_argument("--tiny", action="store_true", help="fewer steps, for tests")
    given = parser.parse_args()
    if given.out and given.out.exists():
        parser.error(f"{given.out} exists: -o makes a new folder")
    with tempfile.TemporaryDirectory() as temporary:
        out = given.out or Path(temporary, "out")
        out.mkdir(parents=True)
        main(out.resolve(), 4 if given.tiny else 20)
