"""DeepSeek-V2 (transformers: models/deepseek_v2): multi-head latent attention, GLM-4.5's names for the experts.

kv_a_proj_with_mqa is [latent; rotary part of k], kv_b_proj is [n_head, (k without rotation, v)].
Without q_lora_rank (V2-Lite) q_proj is one matrix.
"""

from loratool import Architecture, Fused, Linear, Match, concat, hookimpl, interleave_heads

_ATTENTION = "model.layers.{i}.self_attn"
DEEPSEEK_V2 = Architecture(
    name="deepseek-v2",
    like="glm4-moe",
    match=Match(model_types=("deepseek_v2",)),
    layers=(
        Linear(
            f"{_ATTENTION}.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj)",
            group="attention",
            roles=("q_a", "q_b", "kv_a", "kv_b"),
        ),
    ),
    default_targets=("q_proj", "q_b_proj", "kv_b_proj"),
    fused=(
        Fused(
            f"{_ATTENTION}.kv_a_proj_with_mqa",
            parts=("latent", "rope"),
            layout=concat("kv_lora_rank", "qk_rope_head_dim"),
        ),
        Fused(
            f"{_ATTENTION}.kv_b_proj",
            parts=("nope", "v"),
            layout=interleave_heads("num_attention_heads", "qk_nope_head_dim", "v_head_dim"),
        ),
    ),
    headless=("DeepseekV2Model",),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """DeepSeek-V2."""
    return [DEEPSEEK_V2]
