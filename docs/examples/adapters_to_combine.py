"""Write the small adapters of docs/combine.md: `python docs/examples/adapters_to_combine.py FOLDER`.

They have the names and shapes of real ones and numbers of a random generator, made so that they relate as the page
tells: the page is about what to ask and what to do, not about these numbers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

UNET = {
    "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": (320, 320),
    "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (320, 768),
    "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_v": (640, 640),
    "mid_block_attentions_0_transformer_blocks_0_ff_net_2": (1280, 5120),
}
LLAMA = {
    f"model.layers.{n}.self_attn.{name}": size
    for n in (0, 1)
    for name, size in (("q_proj", (256, 256)), ("v_proj", (64, 256)))
}
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def random(shapes: dict[str, tuple[int, int]], rank: int, seed: int) -> Factors:
    """Return (up, down) for each module."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(out, rank, generator=generator) / out**0.5,
            torch.randn(rank, into, generator=generator) / into**0.5,
        )
        for name, (out, into) in shapes.items()
    }


def joined(*parts: tuple[float, Factors]) -> Factors:
    """Return the weighted sum of updates as one pair of factors."""
    names = parts[0][1]
    return {
        n: (torch.cat([w * f[n][0] for w, f in parts], dim=1), torch.cat([f[n][1] for _, f in parts])) for n in names
    }


def kohya(file: Path, factors: Factors) -> None:
    """Write factors as sd-scripts does, with alpha = rank."""
    tensors = {}
    for name, (up, down) in factors.items():
        tensors[f"lora_unet_{name}.lora_up.weight"] = up.contiguous()
        tensors[f"lora_unet_{name}.lora_down.weight"] = down.contiguous()
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(float(down.shape[0]))
    save_file(tensors, file, {"ss_network_module": "networks.lora"})


def peft(folder: Path, factors: Factors) -> None:
    """Write factors as PEFT does, with alpha = rank."""
    folder.mkdir()
    tensors = {}
    for name, (up, down) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = down.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = up.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    rank = next(iter(factors.values()))[1].shape[0]
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": rank, "lora_alpha": rank}
    config |= {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def main(folder: Path) -> None:
    """Write them all."""
    folder.mkdir(parents=True, exist_ok=True)
    kohya(folder / "lcm.safetensors", random(UNET, 16, 1))
    line = {n: s for n, s in UNET.items() if "attn" in n}
    kohya(folder / "ink.safetensors", random(line, 8, 2))
    common = random(line, 4, 3)
    kohya(folder / "sharp.safetensors", joined((1.0, common), (0.8, random(line, 4, 4))))
    kohya(folder / "soft.safetensors", joined((-0.8, common), (1.0, random(line, 4, 5))))
    shared = random(LLAMA, 4, 6)  # what all three tasks teach
    for seed, name in enumerate(("math", "code", "chat"), start=7):
        peft(folder / name, joined((1.0, shared), (1.0, random(LLAMA, 4, seed))))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
