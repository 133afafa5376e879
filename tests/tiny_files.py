"""Small checkpoints and adapters made of torch and safetensors alone: no transformers, so that a file costs nothing.

The sizes are tiny but most weights are not square, so that a transposition cannot go unnoticed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, KV, INNER, VOCAB, LAYERS = 16, 8, 24, 40, 2
LLAMA_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def tensors_of_llama(seed: int = 0, *, dtype: torch.dtype = torch.float32, layers: int = LAYERS) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.1).to(dtype)

    tensors = {"model.embed_tokens.weight": weight(VOCAB, HIDDEN), "model.norm.weight": weight(HIDDEN)}
    for n in range(layers):
        layer = f"model.layers.{n}"
        tensors |= {
            f"{layer}.self_attn.q_proj.weight": weight(HIDDEN, HIDDEN),
            f"{layer}.self_attn.k_proj.weight": weight(KV, HIDDEN),
            f"{layer}.self_attn.v_proj.weight": weight(KV, HIDDEN),
            f"{layer}.self_attn.o_proj.weight": weight(HIDDEN, HIDDEN),
            f"{layer}.mlp.gate_proj.weight": weight(INNER, HIDDEN),
            f"{layer}.mlp.down_proj.weight": weight(HIDDEN, INNER),
            f"{layer}.input_layernorm.weight": weight(HIDDEN),
        }
    return tensors | {"lm_head.weight": weight(VOCAB, HIDDEN)}


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_base(folder: Path, tensors: dict[str, Any] | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors_of_llama() if tensors is None else tensors, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", {**LLAMA_CONFIG, **config})
    return folder


def write_sharded(folder: Path, tensors: dict[str, Any] | None = None, shards: int = 2, **config: Any) -> Path:
    """Shards of equal tensor counts and an index, as save_pretrained names them."""
    folder.mkdir(parents=True)
    tensors = tensors_of_llama() if tensors is None else tensors
    weight_map: dict[str, str] = {}
    for n in range(shards):
        name = f"model-{n + 1:05}-of-{shards:05}.safetensors"
        mine = dict(list(tensors.items())[n::shards])
        save_file(mine, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(mine, name)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", {**LLAMA_CONFIG, **config})
    return folder


Q0, K1, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj"
SHAPES = {Q0: (HIDDEN, HIDDEN), K1: (KV, HIDDEN), DOWN1: (HIDDEN, INNER)}


def factors(seed: int = 1, rank: int = 4, shapes: dict[str, tuple[int, int]] | None = None) -> dict[str, torch.Tensor]:
    """PEFT's keys, random and non-zero."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (out, into) in (SHAPES if shapes is None else shapes).items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, into, generator=generator) * 0.1
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.1
    return tensors


def peft_config(**changes: Any) -> dict[str, Any]:
    """A config with `changes`; a change to None leaves the field out."""
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": sorted(SHAPES)}
    return {k: v for k, v in {**config, **changes}.items() if v is not None}


def write_adapter(folder: Path, tensors: dict[str, Any] | None = None, **config: Any) -> Path:
    """A folder as PEFT writes it; its config names the modules that it has, if `config` says nothing else."""
    folder.mkdir(parents=True)
    tensors = factors() if tensors is None else tensors
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    modules = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in tensors if ".lora_" in name}
    write_json(folder / "adapter_config.json", peft_config(**{"target_modules": sorted(modules), **config}))
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refusal(base: Path, adapters: list[Any], out: Path, **options: Any) -> str:
    """What merge says when it refuses: with exit code 3, every file as it was, and nothing new beside them."""
    import pytest

    import loratool

    def around() -> tuple[object, ...]:
        return snapshot(out.parent), sorted(p for p in out.parent.rglob("*") if p.is_dir())

    before = around()
    with pytest.raises(loratool.errors.LoratoolError) as caught:
        loratool.merge(base, adapters, out, **options)
    assert caught.value.exit_code == 3, caught.value
    assert around() == before
    return f"{caught.value}\n{caught.value.hint}"


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **extra}


def run_main(*arguments: object) -> int:
    """Run the command line in this process and return its exit code, leaving the process as it was."""
    from loratool.cli.main import main

    handler = signal.getsignal(signal.SIGTERM)
    try:
        main([str(a) for a in arguments])
    except SystemExit as ending:
        return int(ending.code or 0)
    finally:
        signal.signal(signal.SIGTERM, handler)
    raise AssertionError("main returned")


def run_cli(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "loratool", *map(str, arguments)]
    settings = {"env": environment(), "capture_output": True, "text": True, "timeout": 120, **options}
    return subprocess.run(command, check=False, **settings)
