"""MiniMax-Text-01 and MiniMax-M2 (transformers: models/minimax, models/minimax_m2): Mixtral's experts.

Text-01 has lightning attention in most layers: its qkv_proj is [n_head, (q, k, v)], and its decay tables are saved.
"""

from loratool import Architecture, Excluded, Fused, Linear, Match, hookimpl, interleave_heads

_ATTENTION = "model.layers.{i}.self_attn"
_HEAD = "head_dim|hidden_size/num_attention_heads"
MINIMAX = Architecture(
    name="minimax",
    like="mixtral",
    match=Match(model_types=("minimax", "minimax_m2")),
    layers=(
        Linear(f"{_ATTENTION}.(qkv_proj|out_proj|output_gate)", group="attention", roles=("qkv", "o", "gate")),
        Excluded(f"{_ATTENTION}.(slope_rate|query_decay|key_decay|diagonal_decay)", group="attention"),
    ),
    default_targets=("q_proj", "v_proj", "qkv_proj"),
    fused=(
        Fused(
            f"{_ATTENTION}.qkv_proj",
            parts=("q", "k", "v"),
            layout=interleave_heads("num_attention_heads", _HEAD, _HEAD, _HEAD),
        ),
    ),
    headless=("MiniMaxModel", "MiniMaxM2Model"),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """MiniMax."""
    return [MINIMAX]
