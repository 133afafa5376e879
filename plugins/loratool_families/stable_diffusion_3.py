"""Stable Diffusion 3 and 3.5.

Sources: diffusers, models/transformers/transformer_sd3.py; Stability-AI/sd3.5, mmditx.py. Medium has 24 blocks, 3.5
large 38; 3.5 medium has a second attention (attn2) in its first 13. In the last block the text is only read: its
modulation gives shift and scale, which diffusers exchanges there as in the last layer. The text encoders are CLIP-L,
CLIP-G and T5-XXL, te1, te2 and te3 to every tool.
"""

from loratool import Architecture, Conv2d, Excluded, Labels, Match, Named, hookimpl
from loratool_families.double_stream import (
    COMPONENT,
    DOUBLE,
    LAST_RULES,
    TARGETS,
    attention,
    counts,
    feed_forward,
    linear,
    unlike,
)
from loratool_families.text_encoders import T5_TIED, clip, t5

_EMBEDDERS = "time_text_embed.(timestep_embedder|text_embedder).(linear_1|linear_2)"
_BLOCK = "joint_blocks.{i}"
_CONTEXT = "context_block.adaLN_modulation.1"
_LAST = f"{DOUBLE}.norm1_context.linear"  # its halves lie the other way in the last block, which differs


def _named(blocks: int) -> dict[str, Named]:
    """Return the names of a model whose last block is number `blocks` - 1."""
    last = blocks - 1
    rules = (
        f"{_BLOCK}.x_block.attn.qkv = {DOUBLE}.attn.(to_q|to_k|to_v)",
        f"{_BLOCK}.context_block.attn.qkv = {DOUBLE}.attn.(add_q_proj|add_k_proj|add_v_proj)",
        f"{_BLOCK}.(x_block|context_block).attn.proj = {DOUBLE}.attn.(to_out.0|to_add_out)",
        f"{_BLOCK}.x_block.attn.(ln_q|ln_k) = {DOUBLE}.attn.(norm_q|norm_k)",
        f"{_BLOCK}.context_block.attn.(ln_q|ln_k) = {DOUBLE}.attn.(norm_added_q|norm_added_k)",
        f"{_BLOCK}.x_block.attn2.qkv = {DOUBLE}.attn2.(to_q|to_k|to_v)",
        f"{_BLOCK}.x_block.attn2.(proj|ln_q|ln_k) = {DOUBLE}.attn2.(to_out.0|norm_q|norm_k)",
        f"{_BLOCK}.(x_block|context_block).mlp.(fc1|fc2) = {DOUBLE}.(ff|ff_context).net.(0.proj|2)",
        f"{_BLOCK}.x_block.adaLN_modulation.1 = {DOUBLE}.norm1.linear",
        f"joint_blocks.{{i<{last}}}.{_CONTEXT} = {DOUBLE}.norm1_context.linear",
        f"joint_blocks.{last}.{_CONTEXT} = transformer_blocks.{last}.norm1_context.linear @swap2",
        "x_embedder.proj = pos_embed.proj",
        "pos_embed = pos_embed.pos_embed",
        f"(t_embedder|y_embedder).mlp.(0|2) = {_EMBEDDERS}",
        *LAST_RULES,
    )
    return {
        "transformer": Named("lora_unet", (), "diffusion_model.", ("model.diffusion_model.",), rules, "native"),
        "text_encoder": Named("lora_te1", comfy="text_encoders.clip_l.transformer."),
        "text_encoder_2": Named("lora_te2", comfy="text_encoders.clip_g.transformer."),
        "text_encoder_3": Named("lora_te3", comfy="text_encoders.t5xxl.transformer."),
    }


SD3 = Architecture(
    name="stable-diffusion-3",
    match=Match(
        classes=("SD3Transformer2DModel",),
        # large, Flux.1 and the others with these names
        shapes=(*unlike(2432, 3072, 3584, 4096, 6144), (_LAST, "inp != 2432")),
        counts=counts(24),
        metadata=("sd_3", "sd3", "stable-diffusion-3", "stable-diffusion-v3"),
    ),
    layers=(
        *attention(),
        linear(f"{DOUBLE}.attn2.(to_q|to_k|to_v|to_out.0)", "attention", "q", "k", "v", "o"),
        *feed_forward(),
        linear(f"{DOUBLE}.(norm1|norm1_context).linear", "modulation", "image", "text"),
        linear(_EMBEDDERS, "other", "in", "out"),
        linear("context_embedder", "embedding", "text"),
        Conv2d("pos_embed.proj", "embedding", ("image",), COMPONENT),
        Excluded("pos_embed.pos_embed", "position", component=COMPONENT),
        linear("norm_out.linear", "modulation", "modulation"),
        linear("proj_out", "head", "head"),
        *clip("text_encoder", projection=True),
        *clip("text_encoder_2", projection=True),
        *t5("text_encoder_3"),
    ),
    default_targets=TARGETS,
    tied=T5_TIED,
    tied_by_default=True,
    component_classes={"text_encoder_3": ("T5EncoderModel",)},
    labels=Labels("sd_3", "stable-diffusion-3"),
    named=_named(24),
    ignored=("vae.", "first_stage_model."),
)
SD3_LARGE = Architecture(
    name="stable-diffusion-3.5-large",
    match=Match(
        classes=("SD3Transformer2DModel",),
        when="num_layers == 38",
        shapes=(("transformer_blocks.{i}.attn.to_q", "inp == 2432"), (_LAST, "inp == 2432")),
        counts=counts(38),
        metadata=("sd_3", "sd3", "stable-diffusion-3", "stable-diffusion-v3"),
    ),
    like="stable-diffusion-3",
    labels=Labels("sd_3", "stable-diffusion-3-5-large"),
    named=_named(38),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Stable Diffusion 3 and 3.5, medium and large: the transformer and the text encoders."""
    return [SD3, SD3_LARGE]
