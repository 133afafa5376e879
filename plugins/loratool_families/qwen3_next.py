"""Qwen3-Next (transformers: models/qwen3_next): Qwen2-MoE's experts, gated attention, and linear attention.

q_proj is [n_head, (q, gate)]; in_proj_qkvz is [key heads, (q, k, their values, their z)], in_proj_ba likewise.
Released files have a layer that predicts a second token, `mtp`, which transformers does not load.
"""

from loratool import Architecture, Conv1d, Excluded, Fused, Linear, Match, hookimpl, interleave_heads

_LINEAR = "model.layers.{i}.linear_attn"
_MTP, _GLU = "mtp.layers.{i}", "(gate_proj|up_proj|down_proj)"
_PREDICTION = (
    "mtp.fc",
    f"{_MTP}.self_attn.(q_proj|k_proj|v_proj|o_proj)",
    f"{_MTP}.mlp.(gate|shared_expert_gate)",
    f"{_MTP}.mlp.shared_expert.{_GLU}",
    f"{_MTP}.mlp.experts.{{e}}.{_GLU}",
)
_SHARE = "linear_num_value_heads/linear_num_key_heads"
_VALUES = f"{_SHARE}*linear_value_head_dim"
QWEN3_NEXT = Architecture(
    name="qwen3-next",
    like="qwen2-moe",
    match=Match(model_types=("qwen3_next",)),
    layers=(
        Linear(f"{_LINEAR}.(in_proj_qkvz|in_proj_ba|out_proj)", group="recurrent", roles=("qkvz", "ba", "o")),
        Conv1d(f"{_LINEAR}.conv1d", group="recurrent", roles=("conv",)),
        *(Excluded(pattern, group="prediction") for pattern in _PREDICTION),
    ),
    default_targets=("q_proj", "v_proj", "in_proj_qkvz"),
    fused=(
        Fused(
            "model.layers.{i}.self_attn.q_proj",
            parts=("q", "gate"),
            layout=interleave_heads("num_attention_heads", "head_dim", "head_dim"),
        ),
        Fused(
            f"{_LINEAR}.in_proj_qkvz",
            parts=("q", "k", "v", "z"),
            layout=interleave_heads(
                "linear_num_key_heads", "linear_key_head_dim", "linear_key_head_dim", _VALUES, _VALUES
            ),
        ),
        Fused(
            f"{_LINEAR}.in_proj_ba", parts=("b", "a"), layout=interleave_heads("linear_num_key_heads", _SHARE, _SHARE)
        ),
    ),
    headless=("Qwen3NextModel",),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Qwen3-Next."""
    return [QWEN3_NEXT]
