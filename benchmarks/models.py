"""LLaMA-shaped checkpoints and PEFT adapters of random numbers, written without building a model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

TINY = {"hidden": 2048, "inter": 5632, "heads": 32, "kv_heads": 4, "vocab": 32000}  # the shape of TinyLlama-1.1B


def shapes(layers: int, shape: dict[str, int] = TINY) -> dict[str, tuple[int, int]]:
    """Return the linear layers of every block, by module path."""
    h, i, kv = shape["hidden"], shape["inter"], shape["hidden"] // shape["heads"] * shape["kv_heads"]
    block = {
        "self_attn.q_proj": (h, h),
        "self_attn.k_proj": (kv, h),
        "self_attn.v_proj": (kv, h),
        "self_attn.o_proj": (h, h),
        "mlp.gate_proj": (i, h),
        "mlp.up_proj": (i, h),
        "mlp.down_proj": (h, i),
    }
    return {f"model.layers.{n}.{name}": size for n in range(layers) for name, size in block.items()}


def checkpoint(folder: Path, layers: int, shape: dict[str, int] = TINY, delta: float = 0.0) -> Path:
    """Write a bf16 checkpoint, one shard every four blocks; with `delta`, a fine-tune of it (same seed plus noise)."""
    folder.mkdir(parents=True, exist_ok=True)
    h = shape["hidden"]
    tensors = {"model.embed_tokens.weight": (shape["vocab"], h), "lm_head.weight": (shape["vocab"], h)}
    tensors |= {"model.norm.weight": (h,)}
    tensors |= {f"{name}.weight": size for name, size in shapes(layers, shape).items()}
    for n in range(layers):
        tensors |= {f"model.layers.{n}.{norm}.weight": (h,) for norm in ("input_layernorm", "post_attention_layernorm")}
    shards: dict[str, list[str]] = {}
    for name in tensors:
        n = int(name.split(".")[2]) // 4 + 1 if ".layers." in name else 0
        shards.setdefault(f"model-{n:05}.safetensors", []).append(name)
    for shard, names in shards.items():
        save_file({n: _weight(n, tensors[n], delta) for n in names}, folder / shard, {"format": "pt"})
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(_config(layers, shape)))
    return folder


def _weight(name: str, shape: tuple[int, ...], delta: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    weight = torch.randn(shape, generator=generator) * 0.02
    if delta and "_proj" in name:  # a power-law update of full rank, as fine-tunes make
        m, n = shape
        rank = min(m, n, 256)
        left, right = torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator)
        update = (left * torch.arange(1, rank + 1) ** -0.5) @ right
        weight += update * (delta * weight.norm() / update.norm())
    return weight.to(torch.bfloat16)


def _config(layers: int, shape: dict[str, int]) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["inter"],
        "num_hidden_layers": layers,
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "vocab_size": shape["vocab"],
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def adapter(folder: Path, layers: int, rank: int, shape: dict[str, int] = TINY, seed: int = 0) -> Path:
    """Write a PEFT adapter over every linear layer, fp32, with an update of about 3 % of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (m, n) in shapes(layers, shape).items():
        start = f"base_model.model.{name}.lora_"
        tensors[f"{start}A.weight"] = torch.randn(rank, n, generator=generator) / n**0.5
        tensors[f"{start}B.weight"] = torch.randn(m, rank, generator=generator) * 0.0003 * (n / rank) ** 0.5
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({n.rpartition(".")[2] for n in shapes(layers, shape)}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
