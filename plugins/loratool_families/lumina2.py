"""Lumina-Image 2.0 (NextDiT), with fewer keys than queries; the text encoder is Gemma 2.

Sources: diffusers, models/transformers/transformer_lumina2.py and loaders/single_file_utils.py; sd-scripts,
library/lumina_models.py, whose names are the original ones. There q, k and v are one weight: as many rows of q as
features come in, and k and v share the rest.
"""

from loratool import Architecture, Labels, Linear, Match, Named, hookimpl
from loratool_families.text_encoders import decoder

_C, _TEXT = "transformer", "text_encoder"
_BLOCKS = "(layers|noise_refiner|context_refiner).{i}"
_MODULATED = "(layers|noise_refiner).{i}"
_NATIVE = (
    f"{_BLOCKS}.attention.qkv = {_BLOCKS}.attn.(to_q:in|to_k:*|to_v:*)",
    f"{_BLOCKS}.attention.(out|q_norm|k_norm) = {_BLOCKS}.attn.(to_out.0|norm_q|norm_k)",
    f"{_BLOCKS}.feed_forward.(w1|w2|w3) = {_BLOCKS}.feed_forward.(linear_1|linear_2|linear_3)",
    f"{_BLOCKS}.attention_norm2 = {_BLOCKS}.norm2",
    f"{_MODULATED}.(adaLN_modulation.1|attention_norm1) = {_MODULATED}.norm1.(linear|norm)",
    "context_refiner.{i}.attention_norm1 = context_refiner.{i}.norm1",
    "cap_embedder.(0|1) = time_caption_embed.caption_embedder.(0|1)",
    "t_embedder.mlp.(0|2) = time_caption_embed.timestep_embedder.(linear_1|linear_2)",
    "final_layer.(adaLN_modulation.1|linear) = norm_out.(linear_1|linear_2)",
)
LUMINA2 = Architecture(
    name="lumina2",
    match=Match(
        classes=("Lumina2Transformer2DModel",),
        shapes=((f"{_BLOCKS}.attn.to_k", "out != inp and out != 3*inp"),),  # Z-Image has these
        metadata=("lumina2", "lumina-2"),
    ),
    layers=(
        Linear(f"{_BLOCKS}.attn.(to_q|to_k|to_v|to_out.0)", "attention", ("q", "k", "v", "o"), _C),
        Linear(f"{_BLOCKS}.feed_forward.(linear_1|linear_2|linear_3)", "mlp", ("gate", "down", "up"), _C),
        Linear(f"{_MODULATED}.norm1.linear", "modulation", ("modulation",), _C),
        Linear("x_embedder", "other", ("image",), _C),
        Linear("time_caption_embed.caption_embedder.1", "other", ("text",), _C),
        Linear("time_caption_embed.timestep_embedder.(linear_1|linear_2)", "other", ("up", "down"), _C),
        Linear("norm_out.linear_1", "modulation", ("out",), _C),
        Linear("norm_out.linear_2", "head", ("out",), _C),
        *decoder(_TEXT),
    ),
    default_targets=("to_q", "to_k", "to_v", "to_out.0"),
    aliases=("model.** = **",),  # files of the text encoder have it, the module in the pipeline does not
    labels=Labels("lumina2", "lumina-2"),
    named={
        _C: Named(
            "lora_unet",
            comfy="diffusion_model.",
            checkpoint=("model.diffusion_model.",),
            native=_NATIVE,
            flat="native",
        ),
        _TEXT: Named("lora_te", comfy="text_encoders.gemma2_2b.transformer.model.", borrowed=True),
    },
    ignored=("vae.", "first_stage_model."),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Lumina-Image 2.0: transformer and text encoder."""
    return [LUMINA2]
