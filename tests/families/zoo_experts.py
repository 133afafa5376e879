"""Mixtures of experts (see zoo.py)."""

from typing import Any

from zoo import Tiny, tiny

SIZES: dict[str, Any] = {  # every width differs from every other
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
LOCAL = {**SIZES, "num_local_experts": 4}
SPARSE = {**SIZES, "num_experts": 4, "moe_intermediate_size": 12, "num_experts_per_tok": 2}
SHARED = {**SPARSE, "shared_expert_intermediate_size": 20}
GATED: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 8,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
ROUTED = {
    **SIZES,
    "moe_intermediate_size": 12,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {
    **ROUTED,
    "num_key_value_heads": 4,
    "q_lora_rank": 14,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
}
INDEXED = {**LATENT, "index_head_dim": 6, "index_n_heads": 3}
HYBRID = {
    **LOCAL,
    "shared_intermediate_size": 20,
    "layer_types": ["mamba", "attention"],
    "mamba_n_heads": 4,
    "mamba_n_groups": 2,
    "mamba_d_state": 6,
}
LLAMA4 = {**LOCAL, "intermediate_size_mlp": 44, "head_dim": 8, "moe_layers": [1]}
GPT_OSS = {
    **LOCAL,
    "head_dim": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
DBRX: dict[str, Any] = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "vocab_size": 64,
    "max_seq_len": 64,
    "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 12, "moe_num_experts": 4},
}
VISION = {
    "depth": 1,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}
LLAMA4_VISION = {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "vision_output_dim": 20,
    "image_size": 8,
    "patch_size": 4,
    "projector_input_dim": 20,
    "projector_output_dim": 20,
}
QWEN3_5: dict[str, Any] = {"text_config": {**SIZES, **GATED}, "vision_config": VISION}
QWEN3_5_MOE: dict[str, Any] = {"text_config": {**SHARED, **GATED}, "vision_config": VISION}
QWEN3_VL_MOE: dict[str, Any] = {
    "text_config": {**SPARSE, "mlp_only_layers": [0]},
    "vision_config": {**VISION, "deepstack_visual_indexes": [0]},
}


def heads(family: str, start: str, config: str, names: str, **settings: Any) -> list[Tiny]:
    """Return one model a class: `start` and then each of the names."""
    return [tiny(family, start + name, config, **settings) for name in names.split()]


BOTH = "ForCausalLM Model"
SOME = f"{BOTH} ForSequenceClassification"
MORE = f"{SOME} ForTokenClassification"
ALL = f"{MORE} ForQuestionAnswering"

TINY = [
    *heads("mixtral", "Mixtral", "MixtralConfig", ALL, **LOCAL),
    *heads("phimoe", "Phimoe", "PhimoeConfig", SOME, **LOCAL),
    *heads("minimax", "MiniMaxM2", "MiniMaxM2Config", BOTH, **LOCAL, head_dim=10),
    *heads("minimax", "MiniMax", "MiniMaxConfig", ALL, **LOCAL, head_dim=10, block_size=8),
    *heads("qwen3-moe", "Qwen3Moe", "Qwen3MoeConfig", MORE, **SPARSE, head_dim=10, mlp_only_layers=[0]),
    *heads("qwen2-moe", "Qwen2Moe", "Qwen2MoeConfig", ALL, **SHARED, mlp_only_layers=[0]),
    *heads("olmoe", "Olmoe", "OlmoeConfig", BOTH, **SIZES, num_experts=4, num_experts_per_tok=2),
    *heads("olmoe", "FlexOlmo", "FlexOlmoConfig", BOTH, **SIZES, num_experts=4, num_experts_per_tok=2),
    *heads("glm4-moe", "Glm4Moe", "Glm4MoeConfig", BOTH, **ROUTED, head_dim=10),
    *heads("glm4-moe-lite", "Glm4MoeLite", "Glm4MoeLiteConfig", BOTH, **LATENT),
    *heads("glm4-moe-lite", "GlmMoeDsa", "GlmMoeDsaConfig", BOTH, **INDEXED),
    *heads("deepseek-v2", "DeepseekV2", "DeepseekV2Config", SOME, **LATENT),
    tiny("deepseek-v2", "DeepseekV2ForCausalLM", "DeepseekV2Config", **{**LATENT, "q_lora_rank": None}),
    *heads("deepseek-v3", "DeepseekV3", "DeepseekV3Config", MORE, **LATENT),
    tiny("deepseek-v3", "DeepseekV3ForCausalLM", "DeepseekV3Config", **{**LATENT, "q_lora_rank": None}),
    *heads("deepseek-v3", "DeepseekV32", "DeepseekV32Config", BOTH, **INDEXED),
    *heads("qwen3-next", "Qwen3Next", "Qwen3NextConfig", MORE, **SHARED, **GATED),
    tiny("qwen3-next", "Qwen3NextForCausalLM", "Qwen3NextConfig", **SHARED, **GATED, mlp_only_layers=[0]),
    *heads("qwen3-5", "Qwen3_5", "Qwen3_5Config", "ForConditionalGeneration Model", **QWEN3_5),
    *heads("qwen3-5", "Qwen3_5", "Qwen3_5Config", "ForSequenceClassification ForTokenClassification", **QWEN3_5),
    *heads("qwen3-5-text", "Qwen3_5", "Qwen3_5TextConfig", "ForCausalLM TextModel", **SIZES, **GATED),
    tiny("qwen3-5-text", "Qwen3_5TextForSequenceClassification", "Qwen3_5TextConfig", **SIZES, **GATED),
    *heads("qwen3-5-moe", "Qwen3_5Moe", "Qwen3_5MoeConfig", "ForConditionalGeneration Model", **QWEN3_5_MOE),
    *heads("qwen3-5-moe-text", "Qwen3_5Moe", "Qwen3_5MoeTextConfig", "ForCausalLM TextModel", **SHARED, **GATED),
    *heads("qwen3-vl-moe", "Qwen3VLMoe", "Qwen3VLMoeConfig", "ForConditionalGeneration Model", **QWEN3_VL_MOE),
    *heads("gpt-oss", "GptOss", "GptOssConfig", MORE, **GPT_OSS),
    tiny("llama4", "Llama4ForCausalLM", "Llama4TextConfig", **LLAMA4),
    tiny("llama4", "Llama4ForConditionalGeneration", "Llama4Config", text_config=LLAMA4, vision_config=LLAMA4_VISION),
    *heads("granitemoe", "GraniteMoe", "GraniteMoeConfig", BOTH, **LOCAL),
    *heads("granitemoe", "GraniteMoeShared", "GraniteMoeSharedConfig", BOTH, **LOCAL, shared_intermediate_size=20),
    *heads("granitemoe", "GraniteMoeHybrid", "GraniteMoeHybridConfig", BOTH, **HYBRID),
    tiny("granitemoe", "GraniteMoeHybridForCausalLM", "GraniteMoeHybridConfig", **{**HYBRID, "num_local_experts": 0}),
    *heads("dbrx", "Dbrx", "DbrxConfig", BOTH, **DBRX),
]
