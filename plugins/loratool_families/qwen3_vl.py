"""Qwen3-VL, dense: the same names in files and in memory (transformers: models/qwen3_vl)."""

from loratool import Architecture, Conv3d, Embedding, Fused, Linear, Match, concat, hookimpl

_TEXT = "model.language_model"
_VISION = "model.visual"
QWEN3_VL = Architecture(
    name="qwen3-vl",
    match=Match(model_types=("qwen3_vl",)),
    layers=(
        Embedding(f"{_TEXT}.embed_tokens", group="embedding"),
        Linear(
            f"{_TEXT}.layers.{{i}}.self_attn.(q_proj|k_proj|v_proj|o_proj)",
            group="attention",
            roles=("q", "k", "v", "o"),
        ),
        Linear(f"{_TEXT}.layers.{{i}}.mlp.(gate_proj|up_proj|down_proj)", group="mlp", roles=("gate", "up", "down")),
        Linear("lm_head", group="head"),
        Conv3d(f"{_VISION}.patch_embed.proj", group="conv", roles=("patch",), tower="vision"),
        Embedding(f"{_VISION}.pos_embed", group="embedding", roles=("position",), tower="vision"),
        Linear(f"{_VISION}.blocks.{{i}}.attn.(qkv|proj)", group="attention", roles=("qkv", "o"), tower="vision"),
        Linear(
            f"{_VISION}.blocks.{{i}}.mlp.(linear_fc1|linear_fc2)", group="mlp", roles=("up", "down"), tower="vision"
        ),
        Linear(
            f"{_VISION}.(merger|deepstack_merger_list.{{i}}).(linear_fc1|linear_fc2)",
            group="projection",
            roles=("up", "down"),
            tower="projector",
        ),
    ),
    default_targets=("q_proj", "v_proj"),
    fused=(Fused(f"{_VISION}.blocks.{{i}}.attn.qkv", parts=("q", "k", "v"), layout=concat(parts=3)),),
    prefixes={"": ("model.",)},
    headless=("Qwen3VLModel",),
    tied=((f"{_TEXT}.embed_tokens", "lm_head"),),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Qwen3-VL."""
    return [QWEN3_VL]
