"""Phi-3-small (remote code: modeling_phi3_small.py): q, k, v by key-value head in query_key_value.

up_proj holds the gate in its even rows and the linear half in its odd ones (gegelu).
"""

from loratool import Architecture, Embedding, Fused, Linear, Match, hookimpl, interleave_heads, stride

_ATTENTION = "model.layers.{i}.self_attn"
_HEAD = "hidden_size/num_attention_heads"
PHI3SMALL = Architecture(
    name="phi3small",
    match=Match(model_types=("phi3small",)),
    layers=(
        Embedding("model.embed_tokens", group="embedding"),
        Linear(f"{_ATTENTION}.(query_key_value|dense)", group="attention", roles=("qkv", "o")),
        Linear("model.layers.{i}.mlp.(up_proj|down_proj)", group="mlp", roles=("gate_up", "down")),
        Linear("(lm_head|score)", group="head"),
    ),
    default_targets=("query_key_value",),
    fused=(
        Fused(
            f"{_ATTENTION}.query_key_value",
            parts=("q", "k", "v"),
            layout=interleave_heads(
                "num_key_value_heads", f"num_attention_heads/num_key_value_heads*({_HEAD})", _HEAD, _HEAD
            ),
        ),
        Fused("model.layers.{i}.mlp.up_proj", parts=("gate", "up"), layout=stride(2)),
    ),
    aliases=(
        f"{_ATTENTION}.(q_proj|k_proj|v_proj) = {_ATTENTION}.query_key_value[(q|k|v)]",
        f"{_ATTENTION}.o_proj = {_ATTENTION}.dense",
    ),
    prefixes={"": ("model.",)},
    headless=("Phi3SmallModel",),
    tied=(("model.embed_tokens", "lm_head"),),
    tied_by_default=True,
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Phi-3-small."""
    return [PHI3SMALL]
