"""Tiny quantised checkpoints as the libraries write them, and what those libraries read them as.

bitsandbytes and transformers do the quantising and, for `expected`, the dequantising; loratool is not asked.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

HIDDEN, INNER, KV, EXPERTS = 80, 144, 40, 3  # rows cut nf4's blocks of 64, and a stack's border is none of blocks
SIZES = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
FP8_BLOCK = (8, 16)
Tensors = dict[str, torch.Tensor]


def llama() -> Any:
    import transformers

    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).bfloat16().eval()


def gpt_oss() -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_local_experts": EXPERTS}
    config = transformers.GptOssConfig(**{**SIZES, **sizes, "num_experts_per_tok": 2})
    return transformers.GptOssForCausalLM(config).bfloat16().eval()


def read_all(folder: Path) -> Tensors:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def configure(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))


# -- writing -----------------------------------------------------------------------------------------------------------


def bitsandbytes(folder: Path, **settings: Any) -> None:
    """What from_pretrained with a BitsAndBytesConfig and save_pretrained write."""
    import transformers

    plain = folder.with_name(folder.name + "-plain")
    llama().save_pretrained(plain)
    live = transformers.AutoModelForCausalLM.from_pretrained(
        plain,
        quantization_config=transformers.BitsAndBytesConfig(**settings),
        device_map="cpu",
        dtype=torch.bfloat16,
    )
    live.save_pretrained(folder)


def fp8_blocks(folder: Path) -> None:
    """What transformers' FineGrainedFP8Config writes; quantising itself asks for a GPU, its code does not."""
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    settings = FineGrainedFP8Config(weight_block_size=FP8_BLOCK, modules_to_not_convert=["lm_head"])
    quantise = Fp8Quantize(types.SimpleNamespace(quantization_config=settings))
    _rewrite(folder, quantise._quantize_one)
    configure(folder, **{**settings.to_dict(), "weight_block_size": list(FP8_BLOCK)})


def fp8_rows(folder: Path) -> None:
    """What llm-compressor's FP8_DYNAMIC writes: a bfloat16 scale a row."""

    def quantise(name: str, weight: torch.Tensor) -> Tensors:
        scale = (weight.float().abs().amax(1, keepdim=True) / 448).bfloat16()
        codes = (weight.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {name: codes, f"{name}_scale": scale}

    _rewrite(folder, quantise)
    _compressed(folder, "channel")


def fp8_tensor(folder: Path) -> None:
    """What llm-compressor's FP8 writes: a scale a tensor, and one for the activations."""

    def quantise(name: str, weight: torch.Tensor) -> Tensors:
        scale = (weight.float().abs().max() / 448).reshape(1)
        codes = (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {name: codes, f"{name}_scale": scale, f"{name.removesuffix('.weight')}.input_scale": torch.ones(1)}

    _rewrite(folder, quantise)
    _compressed(folder, "tensor")


def _compressed(folder: Path, strategy: str) -> None:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    configure(
        folder,
        quant_method="compressed-tensors",
        format="float-quantized",
        config_groups=groups,
        ignore=["lm_head"],
        quantization_status="compressed",
    )


def _rewrite(folder: Path, quantise: Callable[[str, torch.Tensor], Tensors]) -> None:
    """Write a LLaMA whose layers' matrices are quantised."""
    llama().save_pretrained(folder)
    tensors: Tensors = {}
    for name, weight in read_all(folder).items():
        tensors |= quantise(name, weight) if "_proj.weight" in name else {name: weight}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def mxfp4(folder: Path) -> None:
    """gpt-oss as it was released: experts as blocks and scales, all else in bfloat16."""
    gpt_oss().save_pretrained(folder)
    generator = torch.Generator().manual_seed(7)
    tensors: Tensors = {}
    for name, weight in read_all(folder).items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = weight
            continue
        count, into, out = weight.shape
        shape = (count, out, into // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator).to(torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(119, 124, shape, generator=generator).to(torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    configure(folder, quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn", "lm_head"])


FOLDERS: dict[str, Callable[[Path], None]] = {
    "nf4": lambda folder: bitsandbytes(folder, load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4-nested": lambda folder: bitsandbytes(
        folder, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "nf4-storage": lambda folder: bitsandbytes(
        folder, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage="bfloat16"
    ),
    "fp4": lambda folder: bitsandbytes(folder, load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": lambda folder: bitsandbytes(folder, load_in_8bit=True),
    "fp8-blocks": fp8_blocks,
    "fp8-rows": fp8_rows,
    "fp8-tensor": fp8_tensor,
    "mxfp4": mxfp4,
}

# -- reading -----------------------------------------------------------------------------------------------------------


def expected(folder: Path) -> Tensors:
    """The checkpoint in bfloat16, read by the code of the libraries that it is for."""
    stored, plain = read_all(folder), {}
    spent: set[str] = set()
    for name, tensor in stored.items():
        beside = {n.removeprefix(name): n for n in stored if n.startswith(name)}
        if any("quant_state" in n for n in beside):
            plain[name] = _four_bit(
                tensor, {n.removeprefix(f"{name}."): stored[n] for n in beside.values() if n != name}
            )
        elif tensor.dtype == torch.int8:
            module = name.removesuffix("weight")
            plain[name] = _int8(tensor, stored[f"{module}SCB"])
            spent |= {f"{module}SCB", f"{module}weight_format"}
            continue
        elif tensor.dtype == torch.float8_e4m3fn:
            plain[name] = _fp8(tensor, stored[next(n for end, n in beside.items() if end.startswith("_scale"))])
            spent.add(f"{name.removesuffix('weight')}input_scale")
        elif name.endswith("_blocks"):
            plain[name.removesuffix("_blocks")] = _mxfp4(tensor, stored[name.replace("_blocks", "_scales")])
            spent |= {name, name.replace("_blocks", "_scales")}
            continue
        else:
            plain[name] = tensor
            continue
        spent |= set(beside.values()) - {name}
    return {name: tensor for name, tensor in plain.items() if name not in spent}


def _four_bit(codes: torch.Tensor, beside: Tensors) -> torch.Tensor:
    from bitsandbytes import functional

    state = functional.QuantState.from_dict(beside, torch.device("cpu"))
    shape, state.shape = state.shape, torch.Size([1, state.shape.numel()])  # in one row: its AVX-512 kernel errs
    return functional.dequantize_4bit(codes, state).reshape(shape)


def _int8(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    from bitsandbytes import functional

    return functional.int8_vectorwise_dequant(codes, scales).bfloat16()


def _fp8(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    return Fp8Dequantize(None)._dequantize_one(codes, scales.reshape(-1, scales.shape[-1]), torch.bfloat16)


def _mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(blocks, scales)
