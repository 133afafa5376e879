"""Gemma 3n: text model, alone or under the towers, audio tower and projectors (transformers: models/gemma3n).

The vision tower (MobileNet-v5 of timm) is not described: its names are not transformers' own.
"""

from dataclasses import replace

from loratool import Architecture, Conv1d, Conv2d, Embedding, Linear, Match, hookimpl

_LAYER = "model.layers.{i}"
GEMMA3N_TEXT = Architecture(
    name="gemma3n-text",
    match=Match(model_types=("gemma3n_text",)),
    layers=(
        Embedding("model.(embed_tokens|embed_tokens_per_layer)", group="embedding", roles=("embed", "per_layer")),
        Linear(f"{_LAYER}.self_attn.(q_proj|k_proj|v_proj|o_proj)", group="attention", roles=("q", "k", "v", "o")),
        Linear(f"{_LAYER}.mlp.(gate_proj|up_proj|down_proj)", group="mlp", roles=("gate", "up", "down")),
        Linear(f"{_LAYER}.laurel.(linear_left|linear_right)", group="projection", roles=("down", "up")),
        Linear(f"{_LAYER}.altup.(correction_coefs|prediction_coefs)"),
        Linear(f"{_LAYER}.altup.modality_router", group="router", roles=("router",)),
        Linear(f"{_LAYER}.(per_layer_input_gate|per_layer_projection)", group="projection"),
        Linear("model.per_layer_model_projection", group="projection"),
        Linear("model.(altup_projections|altup_unembed_projections).{i}", group="projection"),
        Linear("lm_head", group="head"),
    ),
    default_targets=("self_attn.q_proj", "self_attn.v_proj"),  # the audio tower's are attn.q_proj
    prefixes={"": ("model.",)},
    headless=("Gemma3nTextModel",),
    tied=(("model.embed_tokens", "lm_head"),),
    tied_by_default=True,
)
_AUDIO = "model.audio_tower.conformer.{i}"
_SUBSAMPLE = "model.audio_tower.subsample_conv_projection"
GEMMA3N = replace(
    GEMMA3N_TEXT,
    name="gemma3n",
    match=Match(model_types=("gemma3n",)),
    layers=(
        *(replace(y, pattern=y.pattern.replace("model.", "model.language_model.")) for y in GEMMA3N_TEXT.layers),
        Linear(
            f"{_AUDIO}.attention.(attn.q_proj|attn.k_proj|attn.v_proj|post)",
            group="attention",
            roles=("q", "k", "v", "o"),
            tower="audio",
        ),
        Linear(
            f"{_AUDIO}.attention.attn.relative_position_embedding.pos_proj",
            group="attention",
            roles=("position",),
            tower="audio",
        ),
        Linear(
            f"{_AUDIO}.(ffw_layer_start|ffw_layer_end).(ffw_layer_1|ffw_layer_2)",
            group="mlp",
            roles=("up", "down"),
            tower="audio",
        ),
        Linear(f"{_AUDIO}.lconv1d.(linear_start|linear_end)", group="conv", roles=("up", "down"), tower="audio"),
        Conv1d(f"{_AUDIO}.lconv1d.depthwise_conv1d", group="conv", tower="audio"),
        Conv2d(f"{_SUBSAMPLE}.(conv_0|conv_1).conv", group="conv", roles=("conv",), tower="audio"),
        Linear(f"{_SUBSAMPLE}.input_proj_linear", group="projection", tower="audio"),
        Embedding("model.(embed_vision|embed_audio).embedding", group="embedding", tower="projector"),
        Linear("model.(embed_vision|embed_audio).embedding_projection", group="projection", tower="projector"),
    ),
    headless=("Gemma3nModel",),
    tied=(("model.language_model.embed_tokens", "lm_head"),),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Gemma 3n."""
    return [GEMMA3N_TEXT, GEMMA3N]
