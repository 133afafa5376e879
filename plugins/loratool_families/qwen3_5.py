"""Qwen3.5, dense and mixtures of experts, with vision and text only (transformers: models/qwen3_5, models/qwen3_5_moe).

Gated attention as in Qwen3-Next, and linear attention whose in_proj_qkv is [q; k; v]. The text models have LLaMA's
prefix, those with vision `model.language_model`. Released files have a layer that predicts a second token, `mtp`, which
transformers does not load.
"""

from loratool import (
    Architecture,
    Conv1d,
    Conv3d,
    Embedding,
    Excluded,
    Fused,
    Linear,
    Match,
    concat,
    hookimpl,
    interleave_heads,
)

_KEYS = "linear_num_key_heads*linear_key_head_dim"


def _mixers(root: str) -> tuple[Linear | Conv1d, ...]:
    linear = f"{root}.layers.{{i}}.linear_attn"
    return (
        Linear(
            f"{linear}.(in_proj_qkv|in_proj_z|in_proj_b|in_proj_a|out_proj)",
            group="recurrent",
            roles=("qkv", "z", "b", "a", "o"),
        ),
        Conv1d(f"{linear}.conv1d", group="recurrent", roles=("conv",)),
    )


def _fused(root: str) -> tuple[Fused, ...]:
    layer = f"{root}.layers.{{i}}"
    gated = interleave_heads("num_attention_heads", "head_dim", "head_dim")
    flat = concat(_KEYS, _KEYS, "linear_num_value_heads*linear_value_head_dim")
    return (
        Fused(f"{layer}.self_attn.q_proj", parts=("q", "gate"), layout=gated),
        Fused(f"{layer}.linear_attn.in_proj_qkv", parts=("q", "k", "v"), layout=flat),
    )


_TEXT = "model.language_model"
_LAYER = f"{_TEXT}.layers.{{i}}"
_VISION = "model.visual"
_GLU = "(gate_proj|up_proj|down_proj)"
_MTP = "mtp.layers.{i}"
_PREDICTION = ("mtp.fc", f"{_MTP}.self_attn.(q_proj|k_proj|v_proj|o_proj)", f"{_MTP}.mlp.{_GLU}")
_PREDICTION_MOE = (
    f"{_MTP}.mlp.(gate|shared_expert_gate)",
    f"{_MTP}.mlp.shared_expert.{_GLU}",
    f"{_MTP}.mlp.experts.{{e}}.{_GLU}",
    f"{_MTP}.mlp.experts.(gate_up_proj|down_proj)",
)


def _excluded(*patterns: str) -> tuple[Excluded, ...]:
    return tuple(Excluded(pattern, group="prediction") for pattern in patterns)


QWEN3_5 = Architecture(
    name="qwen3-5",
    match=Match(model_types=("qwen3_5",)),
    layers=(
        Embedding(f"{_TEXT}.embed_tokens", group="embedding"),
        Linear(f"{_LAYER}.self_attn.(q_proj|k_proj|v_proj|o_proj)", group="attention", roles=("q", "k", "v", "o")),
        *_mixers(_TEXT),
        Linear(f"{_LAYER}.mlp.{_GLU}", group="mlp", roles=("gate", "up", "down")),
        Linear("(lm_head|score)", group="head"),
        Conv3d(f"{_VISION}.patch_embed.proj", group="conv", roles=("patch",), tower="vision"),
        Embedding(f"{_VISION}.pos_embed", group="embedding", roles=("position",), tower="vision"),
        Linear(f"{_VISION}.blocks.{{i}}.attn.(qkv|proj)", group="attention", roles=("qkv", "o"), tower="vision"),
        Linear(
            f"{_VISION}.blocks.{{i}}.mlp.(linear_fc1|linear_fc2)", group="mlp", roles=("up", "down"), tower="vision"
        ),
        Linear(
            f"{_VISION}.merger.(linear_fc1|linear_fc2)", group="projection", roles=("up", "down"), tower="projector"
        ),
        *_excluded(*_PREDICTION),
    ),
    default_targets=("q_proj", "v_proj", "in_proj_qkv"),
    fused=(*_fused(_TEXT), Fused(f"{_VISION}.blocks.{{i}}.attn.qkv", parts=("q", "k", "v"), layout=concat(parts=3))),
    aliases=(  # as the text model calls them, which AutoModelForCausalLM takes out of these checkpoints
        f"model.layers.** = {_TEXT}.layers.**",
        f"model.embed_tokens = {_TEXT}.embed_tokens",
    ),
    prefixes={"": ("model.",)},
    headless=("Qwen3_5Model",),
    tied=((f"{_TEXT}.embed_tokens", "lm_head"),),
)
QWEN3_5_MOE = Architecture(
    name="qwen3-5-moe",
    like="qwen3-5",
    match=Match(model_types=("qwen3_5_moe",)),
    layers=(
        Linear(f"{_LAYER}.mlp.experts.{{e}}.{_GLU}", group="experts", roles=("gate", "up", "down")),
        Linear(f"{_LAYER}.mlp.shared_expert.{_GLU}", group="mlp", roles=("gate", "up", "down")),
        Linear(f"{_LAYER}.mlp.(gate|shared_expert_gate)", group="router", roles=("router",)),
        *_excluded(*_PREDICTION_MOE),
    ),
    memory=(
        f"{_LAYER}.mlp.experts.gate_up_proj = {_LAYER}.mlp.experts.{{e}}.(gate_proj|up_proj)",
        f"{_LAYER}.mlp.experts.down_proj = {_LAYER}.mlp.experts.{{e}}.down_proj",
    ),
    headless=("Qwen3_5MoeModel",),
)
QWEN3_5_TEXT = Architecture(
    name="qwen3-5-text",
    like="llama",
    match=Match(model_types=("qwen3_5_text",)),
    layers=(*_mixers("model"), *_excluded(*_PREDICTION)),
    default_targets=("q_proj", "v_proj", "in_proj_qkv"),
    fused=_fused("model"),
    headless=("Qwen3_5TextModel",),
)
QWEN3_5_MOE_TEXT = Architecture(
    name="qwen3-5-moe-text",
    like="qwen2-moe",
    match=Match(model_types=("qwen3_5_moe_text",)),
    layers=(*_mixers("model"), *_excluded(*_PREDICTION, *_PREDICTION_MOE)),
    default_targets=("q_proj", "v_proj", "in_proj_qkv"),
    fused=_fused("model"),
    headless=("Qwen3_5MoeTextModel",),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Qwen3.5."""
    return [QWEN3_5, QWEN3_5_MOE, QWEN3_5_TEXT, QWEN3_5_MOE_TEXT]
