"""Tiny models of every built-in family, built from configs (nothing is downloaded), and PEFT adapters for them.

The heavy imports are inside the functions, so that tests which need no model stay fast.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# how fast a machine is, is no property of the code
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would reach for the network must fail, not wait
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Let what a test draws depend on no test that ran before it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def _llama(cls: str = "LlamaForCausalLM", **overrides: Any) -> Any:
    import transformers

    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
    }
    config = "MistralConfig" if cls.startswith("Mistral") else "LlamaConfig"
    return getattr(transformers, cls)(getattr(transformers, config)(**{**sizes, **overrides}))


def _gpt2(cls: str = "GPT2LMHeadModel", **overrides: Any) -> Any:
    import transformers

    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0}
    return getattr(transformers, cls)(transformers.GPT2Config(**{**sizes, **overrides}))


def _bert(cls: str = "BertForSequenceClassification", **overrides: Any) -> Any:
    import transformers

    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 32,
    }
    return getattr(transformers, cls)(transformers.BertConfig(**{**sizes, **overrides}))


def _distilbert(cls: str = "DistilBertForSequenceClassification", **overrides: Any) -> Any:
    import transformers

    sizes = {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 32}
    return getattr(transformers, cls)(transformers.DistilBertConfig(**{**sizes, **overrides}))


def _unet(**overrides: Any) -> Any:
    from diffusers import UNet2DConditionModel

    sizes = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**sizes, **overrides})


def _clip(**overrides: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {
        "vocab_size": 64,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 16,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return CLIPTextModel(CLIPTextConfig(**{**sizes, **overrides}))


_BUILDERS: dict[str, Callable[..., Any]] = {
    "llama": _llama,
    "llama-bare": lambda **o: _llama("LlamaModel", **o),
    "mistral": lambda **o: _llama("MistralForCausalLM", **o),
    "gpt2": _gpt2,
    "gpt2-bare": lambda **o: _gpt2("GPT2Model", **o),
    "bert": _bert,
    "bert-bare": lambda **o: _bert("BertModel", **o),
    "distilbert": _distilbert,
    "distilbert-bare": lambda **o: _distilbert("DistilBertModel", **o),
    "unet": _unet,
    "clip": _clip,
}


def build(kind: str, **overrides: Any) -> Any:
    """Return a tiny model in eval mode, equal in every call; `cls` names another transformers class of the family."""
    import torch

    torch.manual_seed(0)
    return _BUILDERS[kind](**overrides).eval()


def adapt(model: Any, seed: int = 1, **config: Any) -> Any:
    """Return a PeftModel on `model` (which it changes in place) whose LoRA factors are all random and non-zero."""
    import peft
    import torch

    with warnings.catch_warnings():
        # PEFT chooses fan_in_fan_out by the kind of each layer itself, and says so
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        live = peft.get_peft_model(model, peft.LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in live.named_parameters():
            if "lora_A" in name or "lora_B" in name or "lora_embedding" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    return live


def answer(kind: str, model: Any) -> Any:
    """Return what a model (bare, adapted or merged) makes of one fixed input: its first output."""
    import torch

    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        if kind.startswith("unet"):
            sample = torch.randn(1, 4, 8, 8, generator=generator).to(dtype)
            states = torch.randn(1, 5, 24, generator=generator).to(dtype)
            return model(sample, torch.tensor([3]), encoder_hidden_states=states)[0]
        ids = torch.randint(3, 64, (2, 9), generator=generator)
        return model(input_ids=ids)[0]


@pytest.fixture
def tiny() -> Callable[..., Any]:
    """`tiny("llama")`, `tiny("gpt2-bare")`, ...: a model built from a config."""
    return build


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """`saved("bert", dtype=torch.bfloat16)`: a tiny model and the folder that save_pretrained wrote."""

    def make(kind: str, *, dtype: Any = None, folder: str = "", **overrides: Any) -> tuple[Any, Path]:
        model = build(kind, **overrides)
        model = model if dtype is None else model.to(dtype)
        place = tmp_path / (folder or f"base-{kind}")
        model.save_pretrained(place)
        return model, place

    return make


@pytest.fixture
def adapter_folder(tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """`adapter_folder(model, target_modules=[...], r=4)`: a live PeftModel and the folder that PEFT saved it to."""

    def make(model: Any, *, seed: int = 1, folder: str = "adapter", **config: Any) -> tuple[Any, Path]:
        live = adapt(model, seed, **config)
        with warnings.catch_warnings():
            # PEFT saves the untouched embedding along with an adapter on it, and says so
            warnings.filterwarnings("ignore", "Setting `save_embedding_layers`", UserWarning)
            live.save_pretrained(tmp_path / folder)
        return live, tmp_path / folder

    return make


@pytest.fixture
def run_model() -> Callable[[str, Any], Any]:
    """`run_model("llama", model)`: its output for one fixed input."""
    return answer
