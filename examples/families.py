"""The default modules of a LoRA, family by family: made, trained for a step, merged, and compared with PEFT.

For each family of a table a tiny model is built by transformers with random weights. `loratool init` makes its default
adapter from the files alone; PEFT loads that and trains a step; `loratool merge` puts it into the weights. Claimed and
asserted for each: PEFT trains exactly the parameters that init named, and the merged model's logits are the live ones.

    python examples/families.py [-o DIR]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
warnings.filterwarnings("ignore")

import torch
import transformers
from peft import PeftModel
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as OF_PEFT
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import logging

import loratool

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {  # by model_type, with what differs from SIZES
    "llama": {},
    "mistral": {},
    "mixtral": {"num_local_experts": 4},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gemma2": {"head_dim": 8},
    "phi": {},
    "phi3": {},
    "falcon": {},
    "bloom": {},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4},
    "glm": {"head_dim": 8},
    "gpt2": {},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64},
    "cohere": {},
    "internlm3": {},
    "starcoder2": {},
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
        "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
    },
    "mamba": {"state_size": 8},
    "t5": {"d_kv": 8, "d_ff": 64, "num_decoder_layers": 2},
    "bart": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1},
    "bert": {},
    "roberta": {},
    "deberta-v2": {},
    "modernbert": {"cls_token_id": 1, "sep_token_id": 2},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
}  # fmt: skip
TOKENS = torch.arange(5, 21).view(2, 8)


def class_of(config: Any) -> Any:
    """Return the class that a task would use: one from text to text, of masked words, or a causal model."""
    for tasks in ("SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "CAUSAL_LM"):
        if type(config) in (classes := getattr(transformers, f"MODEL_FOR_{tasks}_MAPPING")):
            return classes[type(config)]
    raise SystemExit(f"{config.model_type} is no model of language")


def logits(model: Any, pair: bool) -> Tensor:
    """Return what a model says of some tokens; an encoder and decoder pair gets them twice."""
    return model(input_ids=TOKENS, **({"decoder_input_ids": TOKENS} if pair else {})).logits


def tried(model_type: str, folder: Path) -> str:
    """Go through init, PEFT and merge with one family; return its line of the table."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **SIZES | FAMILIES[model_type])
    kind, pair = class_of(config), config.is_encoder_decoder
    kind(config).save_pretrained(folder / "base")
    base = kind.from_pretrained(folder / "base", dtype=torch.float32).eval()
    before = logits(base, pair).detach()

    made = loratool.init(folder / "base", folder / "new")
    live = PeftModel.from_pretrained(base, folder / "new", is_trainable=True).eval()
    names = {name.replace(".default", "") for name, p in live.named_parameters() if p.requires_grad}
    named = load_file(folder / "new/adapter_model.safetensors")
    assert names == set(named), f"{model_type}: PEFT trains other parameters than init named"
    trainable, count = [p for p in live.parameters() if p.requires_grad], sum(t.numel() for t in named.values())
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    logits(live, pair).square().mean().backward()
    optimizer.step()
    live.save_pretrained(folder / "lora")

    loratool.merge(folder / "base", [folder / "lora"], folder / "merged")
    merged = kind.from_pretrained(folder / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        wanted, got = logits(live, pair), logits(merged, pair)
    changed, apart = (float((wanted - other).abs().max()) for other in (before, got))
    assert changed > 1e-4, f"{model_type}: the adapter changes nothing"
    assert apart < 1e-3 * changed + 1e-6, f"{model_type}: the merged model is {apart} from the live one"
    modules = Counter(row["module"].rpartition(".")[2] for row in made.rows)
    known = OF_PEFT.get(model_type, ["none"])
    peft = "the same" if set(known) == set(modules) else ", ".join(known)
    numbers = f"{sum(modules.values()):8}{count:11,}{changed:10.0e}{apart:11.0e}"
    return f"{model_type:12}{', '.join(modules):24}{peft:29}{numbers}"


def main(folder: Path, families: list[str]) -> None:
    columns = f"{'modules':>8}{'parameters':>11}{'update':>10}{'apart':>11}"
    print(f"{'model_type':12}{'default targets':24}{'default in PEFT':29}{columns}")
    for model_type in families:
        (folder / model_type).mkdir()
        print(tried(model_type, folder / model_type), flush=True)
    print(f"{len(families)} families: every merged model is the live one")
    print("update: largest difference of logits that the adapter makes; apart: that of merged and live")


if __name__ == "__main__":
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, help="keep the files in this new folder")
    parser.add_argument("--tiny", action="store_true", help="a few of the families, for tests")
    given = parser.parse_args()
    if given.out and given.out.exists():
        parser.error(f"{given.out} exists: -o makes a new folder")
    with tempfile.TemporaryDirectory() as temporary:
        out = given.out or Path(temporary, "out")
        out.mkdir(parents=True)
        main(out.resolve(), list(FAMILIES)[::5] if given.tiny else list(FAMILIES))
