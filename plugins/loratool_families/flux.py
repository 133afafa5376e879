"""Flux.1 (dev, schnell, Krea, Kontext, Fill, Canny, Depth) of Black Forest Labs.

Sources: diffusers, models/transformers/transformer_flux.py; black-forest-labs/flux, model.py. The text encoders are
CLIP-L and T5-XXL: te1 and te3 to sd-scripts and ComfyUI, te1 and te2 to OneTrainer.
"""

from loratool import Architecture, Labels, Match, Named, hookimpl
from loratool_families.double_stream import BLOCK_RULES, LAST_RULES, TARGETS, blocks, counts, linear, unlike
from loratool_families.text_encoders import T5_TIED, clip, t5

FLUX = Architecture(
    name="flux",
    match=Match(
        classes=("FluxTransformer2DModel",),
        shapes=unlike(1536, 2432, 3584, 4096, 6144),  # SD 3, HunyuanImage, Flux.2
        counts=counts(19, 38),
        metadata=("flux1", "flux-1", "Flux.1", "flux.1", "flux_kontext"),
    ),
    layers=(
        *blocks(),
        linear(
            "time_text_embed.(timestep_embedder|text_embedder|guidance_embedder).(linear_1|linear_2)",
            "other",
            "in",
            "out",
        ),
        linear("(x_embedder|context_embedder)", "embedding", "image", "text"),
        linear("norm_out.linear", "modulation", "modulation"),
        linear("proj_out", "head", "head"),
        *clip("text_encoder"),
        *t5("text_encoder_2"),
    ),
    default_targets=TARGETS,
    tied=T5_TIED,
    tied_by_default=True,
    prefixes={"text_encoder": ("text_model.",)},
    bare_in_memory=("text_encoder",),
    component_classes={"text_encoder": ("CLIPTextModel",), "text_encoder_2": ("T5EncoderModel",)},
    labels=Labels("flux1", "flux-1"),
    named={
        "transformer": Named(
            kohya="lora_unet",
            comfy="diffusion_model.",
            checkpoint=("model.diffusion_model.",),
            native=(
                *BLOCK_RULES,
                "(img_in|txt_in) = (x_embedder|context_embedder)",
                "(time_in|vector_in|guidance_in).(in_layer|out_layer)"
                " = time_text_embed.(timestep_embedder|text_embedder|guidance_embedder).(linear_1|linear_2)",
                *LAST_RULES,
            ),
            flat="native",
        ),
        "text_encoder": Named(kohya="lora_te1", comfy="text_encoders.clip_l.transformer."),
        "text_encoder_2": Named(kohya="lora_te3", also=("lora_te2",), comfy="text_encoders.t5xxl.transformer."),
    },
    aliases=(  # XLabs' adapters of a single block, which has q, k and v in linear1
        "single_blocks.{i}.qkv_lora = single_transformer_blocks.{i}.attn.(to_q|to_k|to_v)",
        "single_blocks.{i}.proj_lora = single_transformer_blocks.{i}.proj_out",
    ),
    ignored=("vae.", "first_stage_model."),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Flux.1: the transformer and its two text encoders."""
    return [FLUX]
