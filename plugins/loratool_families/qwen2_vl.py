"""Qwen2-VL and Qwen2.5-VL (transformers: models/qwen2_vl, qwen2_5_vl).

Files have `model.layers` and `visual`; transformers 4.52 and later have `model.language_model` and `model.visual` in
memory, and so do some files. The text model alone is qwen2's.
"""

from loratool import Architecture, Conv3d, Embedding, Fused, Linear, Match, concat, hookimpl

_BLOCK = "visual.blocks.{i}"
QWEN2_VL = Architecture(
    name="qwen2-vl",
    match=Match(model_types=("qwen2_vl", "qwen2_5_vl")),
    layers=(
        Embedding("model.embed_tokens", group="embedding"),
        Linear(
            "model.layers.{i}.self_attn.(q_proj|k_proj|v_proj|o_proj)", group="attention", roles=("q", "k", "v", "o")
        ),
        Linear("model.layers.{i}.mlp.(gate_proj|up_proj|down_proj)", group="mlp", roles=("gate", "up", "down")),
        Linear("lm_head", group="head"),
        Conv3d("visual.patch_embed.proj", group="conv", roles=("patch",), tower="vision"),
        Linear(f"{_BLOCK}.attn.(qkv|proj)", group="attention", roles=("qkv", "o"), tower="vision"),
        Linear(f"{_BLOCK}.mlp.(fc1|fc2)", group="mlp", roles=("up", "down"), tower="vision"),  # Qwen2-VL
        Linear(  # Qwen2.5-VL
            f"{_BLOCK}.mlp.(gate_proj|up_proj|down_proj)", group="mlp", roles=("gate", "up", "down"), tower="vision"
        ),
        Linear("visual.merger.mlp.(0|2)", group="projection", roles=("up", "down"), tower="projector"),
    ),
    default_targets=("q_proj", "v_proj"),
    fused=(Fused(f"{_BLOCK}.attn.qkv", parts=("q", "k", "v"), layout=concat(parts=3)),),
    memory=("model.language_model.** = model.**", "model.visual.** = visual.**"),
    prefixes={"": ("model.",)},
    headless=("Qwen2VLModel", "Qwen2_5_VLModel"),
    tied=(("model.embed_tokens", "lm_head"),),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Qwen2-VL and Qwen2.5-VL."""
    return [QWEN2_VL]
