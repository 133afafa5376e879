"""Decoders that are dense: LLaMA's names and relatives, and their vision-language models (see zoo.py)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from zoo import Tiny, tiny

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
SMALL_IDS = {"bos_token_id": 1, "eos_token_id": 2}
HEADS = "Model ForCausalLM ForSequenceClassification ForTokenClassification"


def heads(family: str, name: str, which: str = HEADS, **settings: Any) -> list[Tiny]:
    """Return the models of one config class: `name` with each of the endings."""
    sizes = {**SIZES, **SMALL_IDS, **settings}
    return [tiny(family, name + ending, f"{name}Config", **sizes) for ending in which.split()]


def gemma3n_config(**settings: Any) -> Any:
    """Return the config of Gemma 3n with its towers."""
    from transformers import Gemma3nConfig

    return Gemma3nConfig(**settings)


def gemma3n_without_vision(config: Any) -> Any:
    """Return Gemma 3n with nothing in place of its vision tower, which is timm's."""
    from torch.nn import Identity
    from transformers.models.gemma3n import modeling_gemma3n as modeling

    def from_config(part: Any) -> Any:
        return Identity() if part.model_type == "gemma3n_vision" else build(part)

    build = modeling.AutoModel.from_config
    with patch.object(modeling, "AutoModel", SimpleNamespace(from_config=from_config)):
        return modeling.Gemma3nForConditionalGeneration(config)


BARE_AND_CAUSAL = "Model ForCausalLM"
TEXT = {**SIZES, **SMALL_IDS, "head_dim": 8, "rope_parameters": None}
TEXT.pop("tie_word_embeddings")
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
SIGLIP = {**TOWER, "image_size": 28, "patch_size": 14}
PIXTRAL = {**SIGLIP, "model_type": "pixtral", "head_dim": 8}
GEMMA3 = {"text_config": TEXT, "vision_config": SIGLIP, "mm_tokens_per_image": 1}
PER_LAYER = {**TEXT, "hidden_size_per_layer_input": 6, "vocab_size_per_layer_input": 60, "sliding_window": 16}
GEMMA3N = {
    **PER_LAYER,
    "altup_num_inputs": 3,
    "laurel_rank": 5,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
    "activation_sparsity_pattern": [0.0, 0.0],
}
GEMMA3N_AUDIO = {
    "hidden_size": 16,
    "conf_num_hidden_layers": 1,
    "conf_num_attention_heads": 2,
    "sscp_conv_channel_size": [4, 2],
    "input_feat_size": 16,
    "vocab_size": 8,
}
EXPERTS = {"enable_moe_block": True, "num_experts": 3, "top_k_experts": 2, "moe_intermediate_size": 12}
GEMMA4_VISION = {**TOWER, "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "position_embedding_size": 10}
GEMMA4_AUDIO = {**TOWER, "subsampling_conv_channels": [4, 2], "output_proj_dims": 12}
del GEMMA4_AUDIO["intermediate_size"]
GEMMA4 = {"text_config": PER_LAYER, "vision_config": GEMMA4_VISION, "audio_config": GEMMA4_AUDIO}
UNIFIED_TEXT = {n: v for n, v in PER_LAYER.items() if "per_layer" not in n}
UNIFIED = {
    "text_config": UNIFIED_TEXT,
    "vision_config": {"patch_size": 2, "mm_embed_dim": 20, "mm_posemb_size": 10, "output_proj_dims": 20},
    "audio_config": {"output_proj_dims": 12},
}
QWEN2_VISION = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
QWEN25_VISION = {"depth": 1, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 24}
QWEN3_VISION = {
    **QWEN25_VISION,
    "depth": 2,
    "patch_size": 4,
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
}

TINY = [
    *heads("llama", "Llama"),
    *heads("llama", "Helium"),
    *heads("llama", "Cwm", BARE_AND_CAUSAL, rope_parameters=None),
    *heads("llama", "HyperCLOVAX", BARE_AND_CAUSAL),
    *heads("mistral", "Mistral", f"{HEADS} ForQuestionAnswering"),
    *heads("mistral", "Ministral", head_dim=8),
    *heads("mistral", "Ministral3", f"{HEADS} ForQuestionAnswering"),
    *heads("qwen2", "Qwen2"),
    *heads("qwen2", "Qwen2VLText", "Model"),
    *heads("qwen2", "Qwen2_5_VLText", "Model"),
    *heads("qwen3", "Qwen3"),
    *heads("qwen3", "Qwen3VLText", "Model"),
    *heads("gemma", "Gemma", tie_word_embeddings=True),
    *heads("gemma", "Gemma2"),
    *heads("gemma", "Gemma3Text", "Model ForSequenceClassification"),
    tiny("gemma", "Gemma3ForCausalLM", "Gemma3TextConfig", **TEXT),
    *heads("gemma", "VaultGemma", BARE_AND_CAUSAL),
    *heads("cohere", "Cohere", BARE_AND_CAUSAL, tie_word_embeddings=True),
    *heads("cohere", "Cohere2", BARE_AND_CAUSAL),
    *heads("granite", "Granite", BARE_AND_CAUSAL),
    *heads("olmo", "Olmo", "Model ForCausalLM ForSequenceClassification"),
    *heads("olmo", "Olmo2", "Model ForCausalLM ForSequenceClassification"),
    *heads("olmo", "Olmo3", "Model ForCausalLM ForSequenceClassification"),
    *heads("glm", "Glm"),
    *heads("glm", "Glm4"),
    *heads("smollm3", "SmolLM3"),
    *heads("exaone4", "Exaone4"),
    *heads("seed-oss", "SeedOss"),
    *(
        tiny("gemma3", f"Gemma3{ending}", "Gemma3Config", **GEMMA3)
        for ending in ("ForConditionalGeneration", "Model", "ForSequenceClassification")
    ),
    tiny("gemma3", "Gemma3ForConditionalGeneration", "Gemma3Config", **GEMMA3, tie_word_embeddings=False),
    tiny("mistral3", "Mistral3Model", "Mistral3Config", text_config={**TEXT, "model_type": "mistral"},
         vision_config=PIXTRAL),
    tiny("mistral3", "Mistral3ForConditionalGeneration", "Mistral3Config",
         text_config={**TEXT, "model_type": "ministral3"}, vision_config=PIXTRAL, tie_word_embeddings=False),
    *(
        tiny("qwen2-vl", f"Qwen2VL{ending}", "Qwen2VLConfig", text_config=TEXT, vision_config=QWEN2_VISION)
        for ending in ("ForConditionalGeneration", "Model")
    ),
    *(
        tiny("qwen2-vl", f"Qwen2_5_VL{ending}", "Qwen2_5_VLConfig", text_config=TEXT, vision_config=QWEN25_VISION)
        for ending in ("ForConditionalGeneration", "Model")
    ),
    *(
        tiny("qwen3-vl", f"Qwen3VL{ending}", "Qwen3VLConfig", text_config=TEXT, vision_config=QWEN3_VISION)
        for ending in ("ForConditionalGeneration", "Model")
    ),
    tiny("gemma4", "Gemma4ForConditionalGeneration", "Gemma4Config", **GEMMA4),
    tiny("gemma4", "Gemma4ForConditionalGeneration", "Gemma4Config", text_config={**PER_LAYER, **EXPERTS}),
    tiny("gemma4", "Gemma4Model", "Gemma4Config", **GEMMA4),
    tiny("gemma4-text", "Gemma4ForCausalLM", "Gemma4TextConfig", **PER_LAYER, **EXPERTS, tie_word_embeddings=False),
    tiny("gemma4-text", "Gemma4TextModel", "Gemma4TextConfig", **PER_LAYER),
    tiny("gemma4-text", "Gemma4UnifiedForCausalLM", "Gemma4UnifiedTextConfig", **UNIFIED_TEXT),
    tiny("gemma4-unified", "Gemma4UnifiedForConditionalGeneration", "Gemma4UnifiedConfig", **UNIFIED),
    tiny("gemma4-unified", "Gemma4UnifiedModel", "Gemma4UnifiedConfig", **UNIFIED),
    tiny("gemma3n-text", "Gemma3nForCausalLM", "Gemma3nTextConfig", **GEMMA3N),
    tiny("gemma3n-text", "Gemma3nTextModel", "Gemma3nTextConfig", **GEMMA3N),
    tiny("gemma3n", "gemma3n_without_vision", "gemma3n_config", library="zoo_dense", text_config=GEMMA3N,
         audio_config=GEMMA3N_AUDIO, vision_config={"hidden_size": 12, "vocab_size": 8}),
]  # fmt: skip
