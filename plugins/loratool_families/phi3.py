"""Phi-3, Phi-3.5-mini and Phi-4: q, k, v in one weight, gate and up in another (transformers: models/phi3)."""

from loratool import Architecture, Embedding, Fused, Linear, Match, concat, hookimpl

_ATTENTION, _MLP = "model.layers.{i}.self_attn", "model.layers.{i}.mlp"
_DIM = "(head_dim|hidden_size/num_attention_heads)"
_KV = f"(num_key_value_heads|num_attention_heads)*{_DIM}"
PHI3 = Architecture(
    name="phi3",
    match=Match(model_types=("phi3",)),
    layers=(
        Embedding("model.embed_tokens", group="embedding", roles=("embed",)),
        Linear(f"{_ATTENTION}.(qkv_proj|o_proj)", group="attention", roles=("qkv", "o")),
        Linear(f"{_MLP}.(gate_up_proj|down_proj)", group="mlp", roles=("gate_up", "down")),
        Linear("(lm_head|score)", group="head"),
    ),
    default_targets=("qkv_proj",),
    fused=(
        Fused(f"{_ATTENTION}.qkv_proj", parts=("q", "k", "v"), layout=concat(f"num_attention_heads*{_DIM}", _KV, _KV)),
        Fused(f"{_MLP}.gate_up_proj", parts=("gate", "up"), layout=concat("intermediate_size", "intermediate_size")),
    ),
    aliases=(  # after llamafying
        f"{_ATTENTION}.(q_proj|k_proj|v_proj) = {_ATTENTION}.qkv_proj[(q|k|v)]",
        f"{_MLP}.(gate_proj|up_proj) = {_MLP}.gate_up_proj[(gate|up)]",
    ),
    prefixes={"": ("model.",)},
    headless=("Phi3Model",),
    tied=(("model.embed_tokens", "lm_head"),),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Phi-3 and its successors of the same layout."""
    return [PHI3]
