"""Chroma: Flux.1 schnell whose modulations one small network gives, with T5 as its only text encoder.

Sources: diffusers, models/transformers/transformer_chroma.py; ComfyUI, ldm/chroma/model.py. sd-scripts calls T5 te3, as
with Flux.1; OneTrainer and ComfyUI call it te1.
"""

from loratool import Architecture, Labels, Match, Named, hookimpl
from loratool_families.double_stream import (
    ATTENTION_RULES,
    FEED_FORWARD_RULES,
    TARGETS,
    attention,
    counts,
    feed_forward,
    linear,
    single,
    unlike,
)
from loratool_families.text_encoders import T5_TIED, t5

_GUIDANCE = "distilled_guidance_layer"
CHROMA = Architecture(
    name="chroma",
    match=Match(
        classes=("ChromaTransformer2DModel",),
        shapes=unlike(1536, 2432, 3584, 4096, 6144),  # SD 3, HunyuanImage, Flux.2
        counts=counts(19, 38),
        metadata=("chroma", "Chroma"),
    ),
    layers=(
        *attention(),
        *feed_forward(),
        *single(),
        linear(f"{_GUIDANCE}.layers.{{i}}.(linear_1|linear_2)", "modulation", "in", "out"),
        linear(f"{_GUIDANCE}.(in_proj|out_proj)", "modulation", "in", "out"),
        linear("(x_embedder|context_embedder)", "embedding", "image", "text"),
        linear("proj_out", "head", "head"),
        *t5("text_encoder"),
    ),
    default_targets=TARGETS,
    tied=T5_TIED,
    tied_by_default=True,
    component_classes={"text_encoder": ("T5EncoderModel",)},
    labels=Labels("chroma", "chroma"),
    named={
        "transformer": Named(
            kohya="lora_unet",
            comfy="diffusion_model.",
            checkpoint=("model.diffusion_model.",),
            native=(
                *ATTENTION_RULES,
                *FEED_FORWARD_RULES,
                "(img_in|txt_in) = (x_embedder|context_embedder)",
                f"{_GUIDANCE}.layers.{{i}}.(in_layer|out_layer) = {_GUIDANCE}.layers.{{i}}.(linear_1|linear_2)",
                f"{_GUIDANCE}.norms.{{i}}.scale = {_GUIDANCE}.norms.{{i}}.weight",
                "final_layer.linear = proj_out",
            ),
            flat="native",
        ),
        "text_encoder": Named(kohya="lora_te3", also=("lora_te1",), comfy="text_encoders.t5xxl.transformer."),
    },
    ignored=("vae.",),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Chroma: the transformer and T5."""
    return [CHROMA]
