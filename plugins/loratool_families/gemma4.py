"""Gemma 4: text, vision and audio, the text model alone, and the encoder-free variant (transformers: models/gemma4*).

Names are the same in files and in memory, but for the vision embedder of the encoder-free variant. The towers wrap each
linear layer (`q_proj.linear`). Experts are 3-D, [gate; up]. No size has all of these layers.
"""

from dataclasses import replace

from loratool import (
    Architecture,
    Conv1d,
    Conv2d,
    Embedding,
    Excluded,
    Experts,
    Fused,
    Linear,
    Match,
    concat,
    hookimpl,
)  # fmt: skip

_LAYER = "model.layers.{i}"
_EXPERTS = f"{_LAYER}.experts"
GEMMA4_TEXT = Architecture(
    name="gemma4-text",
    match=Match(model_types=("gemma4_text", "gemma4_unified_text")),
    layers=(
        Embedding("model.(embed_tokens|embed_tokens_per_layer)", group="embedding", roles=("embed", "per_layer")),
        Linear(f"{_LAYER}.self_attn.(q_proj|k_proj|v_proj|o_proj)", group="attention", roles=("q", "k", "v", "o")),
        Linear(f"{_LAYER}.mlp.(gate_proj|up_proj|down_proj)", group="mlp", roles=("gate", "up", "down")),
        Linear(f"{_LAYER}.(per_layer_input_gate|per_layer_projection)", group="projection"),
        Linear("model.per_layer_model_projection", group="projection"),
        Linear(f"{_LAYER}.router.proj", group="router", roles=("router",)),
        Experts(f"{_EXPERTS}.(gate_up_proj|down_proj)", group="experts", roles=("gate_up", "down")),
        Linear("lm_head", group="head"),
    ),
    default_targets=("q_proj", "v_proj"),
    fused=(Fused(f"{_EXPERTS}.gate_up_proj", parts=("gate", "up"), layout=concat(parts=2)),),
    aliases=(
        f"{_EXPERTS}.{{e}}.(gate_proj|up_proj) = {_EXPERTS}.gate_up_proj[{{e}}][(gate|up)]",
        f"{_EXPERTS}.{{e}}.down_proj = {_EXPERTS}.down_proj[{{e}}]",
    ),
    prefixes={"": ("model.",)},
    headless=("Gemma4TextModel", "Gemma4UnifiedTextModel"),
    tied=(("model.embed_tokens", "lm_head"),),
    tied_by_default=True,
)
_VISION = "model.vision_tower"
_AUDIO = "model.audio_tower.layers.{i}"
_SUBSAMPLE = "model.audio_tower.subsample_conv_projection"
GEMMA4 = replace(
    GEMMA4_TEXT,  # a tower's layers are q_proj.linear: the default targets are the text model's
    name="gemma4",
    match=Match(model_types=("gemma4",)),
    layers=(
        *(replace(y, pattern=y.pattern.replace("model.", "model.language_model.")) for y in GEMMA4_TEXT.layers),
        Linear(f"{_VISION}.patch_embedder.input_proj", group="embedding", roles=("patch",), tower="vision"),
        Excluded(f"{_VISION}.patch_embedder.position_embedding_table", group="embedding", tower="vision"),
        Linear(
            f"{_VISION}.encoder.layers.{{i}}.self_attn.(q_proj|k_proj|v_proj|o_proj).linear",
            group="attention",
            roles=("q", "k", "v", "o"),
            tower="vision",
        ),
        Linear(
            f"{_VISION}.encoder.layers.{{i}}.mlp.(gate_proj|up_proj|down_proj).linear",
            group="mlp",
            roles=("gate", "up", "down"),
            tower="vision",
        ),
        Linear(
            f"{_AUDIO}.self_attn.(q_proj|k_proj|v_proj|post).linear",
            group="attention",
            roles=("q", "k", "v", "o"),
            tower="audio",
        ),
        Linear(f"{_AUDIO}.self_attn.relative_k_proj", group="attention", roles=("position",), tower="audio"),
        Linear(
            f"{_AUDIO}.(feed_forward1|feed_forward2).(ffw_layer_1|ffw_layer_2).linear",
            group="mlp",
            roles=("up", "down"),
            tower="audio",
        ),
        Linear(f"{_AUDIO}.lconv1d.(linear_start|linear_end).linear", group="conv", roles=("up", "down"), tower="audio"),
        Conv1d(f"{_AUDIO}.lconv1d.depthwise_conv1d", group="conv", tower="audio"),
        Conv2d(f"{_SUBSAMPLE}.(layer0|layer1).conv", group="conv", roles=("conv",), tower="audio"),
        Linear(f"{_SUBSAMPLE}.input_proj_linear", group="projection", tower="audio"),
        Linear("model.audio_tower.output_proj", group="projection", tower="audio"),
        Linear("model.(embed_vision|embed_audio).embedding_projection", group="projection", tower="projector"),
    ),
    fused=tuple(replace(y, pattern=y.pattern.replace("model.", "model.language_model.")) for y in GEMMA4_TEXT.fused),
    aliases=tuple(rule.replace("model.", "model.language_model.") for rule in GEMMA4_TEXT.aliases),
    headless=("Gemma4Model", "Gemma4UnifiedModel"),
    tied=(("model.language_model.embed_tokens", "lm_head"),),
)
GEMMA4_UNIFIED = Architecture(
    name="gemma4-unified",
    like="gemma4",
    match=Match(model_types=("gemma4_unified",)),
    layers=(
        Linear("model.vision_embedder.patch_dense", group="embedding", roles=("patch",), tower="vision"),
        Excluded("model.vision_embedder.pos_embedding", group="embedding", tower="vision"),
    ),
    memory=(
        "model.embed_vision.multimodal_embedder.embedding_projection = model.embed_vision.embedding_projection",
        "model.embed_vision.(patch_dense|pos_embedding) = model.vision_embedder.(patch_dense|pos_embedding)",
    ),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Gemma 4."""
    return [GEMMA4_TEXT, GEMMA4, GEMMA4_UNIFIED]
