"""Flux.2 (dev, Klein) of Black Forest Labs: the modulations are shared by all blocks, the feed-forward is gated.

Sources: diffusers, models/transformers/transformer_flux2.py; black-forest-labs/flux2, model.py. The blocks with one
stream have one layer in, [q; k; v; gate; up], in diffusers too: the feed-forward is three times as wide as the model.
Text goes through a language model (Mistral 3 in dev, Qwen 3 in Klein) that no tool trains adapters of.
"""

from loratool import Architecture, Fused, Labels, Match, Named, concat, hookimpl
from loratool_families.double_stream import (
    ATTENTION_RULES,
    COMPONENT,
    DOUBLE,
    LAST_RULES,
    SINGLE,
    TARGETS,
    attention,
    counts,
    linear,
    unlike,
)

_SHARED = "(double_stream_modulation_img|double_stream_modulation_txt|single_stream_modulation)"
_EMBEDDERS = "time_guidance_embed.(timestep_embedder|guidance_embedder).(linear_1|linear_2)"
FLUX2 = Architecture(
    name="flux2",
    match=Match(
        classes=("Flux2Transformer2DModel",),
        shapes=unlike(1536, 2432, 3584),  # SD 3, HunyuanImage
        counts=counts(8, 48),  # dev; Klein has fewer
        metadata=("Flux.2", "flux_2", "flux-2", "flux2"),
    ),
    layers=(
        *attention(),
        linear(f"{DOUBLE}.(ff|ff_context).(linear_in|linear_out)", "mlp", "up", "down"),
        linear(f"{SINGLE}.attn.(to_qkv_mlp_proj|to_out)", "attention", "qkv", "o"),
        linear(f"{_SHARED}.linear", "modulation", "modulation"),
        linear(_EMBEDDERS, "other", "in", "out"),
        linear("(x_embedder|context_embedder)", "embedding", "image", "text"),
        linear("norm_out.linear", "modulation", "modulation"),
        linear("proj_out", "head", "head"),
    ),
    default_targets=(*TARGETS, "attn.to_qkv_mlp_proj"),
    fused=(
        Fused(
            f"{SINGLE}.attn.to_qkv_mlp_proj",
            ("q", "k", "v", "gate", "up"),
            concat(*("out/9",) * 3, *("out/3",) * 2),
            component=COMPONENT,
        ),
        Fused(f"{DOUBLE}.ff.linear_in", ("gate", "up"), concat(parts=2), component=COMPONENT),
        Fused(f"{DOUBLE}.ff_context.linear_in", ("gate", "up"), concat(parts=2), component=COMPONENT),
    ),
    labels=Labels("flux2", "Flux.2"),
    named={
        "transformer": Named(
            kohya="lora_unet",
            comfy="diffusion_model.",
            checkpoint=("model.diffusion_model.",),
            native=(
                *ATTENTION_RULES,
                f"double_blocks.{{i}}.(img|txt)_mlp.(0|2) = {DOUBLE}.(ff|ff_context).(linear_in|linear_out)",
                f"single_blocks.{{i}}.(linear1|linear2) = {SINGLE}.attn.(to_qkv_mlp_proj|to_out)",
                f"{_SHARED}.lin = {_SHARED}.linear",
                "(img_in|txt_in) = (x_embedder|context_embedder)",
                f"(time_in|guidance_in).(in_layer|out_layer) = {_EMBEDDERS}",
                *LAST_RULES,
            ),
            flat="native",
        ),
    },
    ignored=("vae.",),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Flux.2: the transformer."""
    return [FLUX2]
