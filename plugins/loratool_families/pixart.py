"""PixArt-alpha and PixArt-Sigma; the text encoder is T5.

Sources: diffusers, models/transformers/pixart_transformer_2d.py and scripts/convert_pixart_alpha_to_diffusers.py;
ComfyUI, comfy/ldm/pixart. The original keeps q, k and v of a block's own attention in one weight, and k and v of the
attention to the text in another. Embedders of the resolution are in the alpha models of 1024 pixels alone.
"""

from loratool import Architecture, Conv2d, Excluded, Labels, Linear, Match, Named, hookimpl
from loratool_families.text_encoders import T5_TIED, t5

_C, _TEXT = "transformer", "text_encoder"
_BLOCK, _TIME = "transformer_blocks.{i}", "adaln_single.emb"
_NATIVE = (
    f"blocks.{{i}}.attn.qkv = {_BLOCK}.attn1.(to_q|to_k|to_v)",
    f"blocks.{{i}}.attn.proj = {_BLOCK}.attn1.to_out.0",
    f"blocks.{{i}}.cross_attn.kv_linear = {_BLOCK}.attn2.(to_k|to_v)",
    f"blocks.{{i}}.cross_attn.(q_linear|proj) = {_BLOCK}.attn2.(to_q|to_out.0)",
    f"blocks.{{i}}.mlp.(fc1|fc2) = {_BLOCK}.ff.net.(0.proj|2)",
    f"blocks.{{i}}.scale_shift_table = {_BLOCK}.scale_shift_table",
    "x_embedder.proj = pos_embed.proj",
    "y_embedder.y_proj.(fc1|fc2) = caption_projection.(linear_1|linear_2)",
    f"t_embedder.mlp.(0|2) = {_TIME}.timestep_embedder.(linear_1|linear_2)",
    f"csize_embedder.mlp.(0|2) = {_TIME}.resolution_embedder.(linear_1|linear_2)",
    f"ar_embedder.mlp.(0|2) = {_TIME}.aspect_ratio_embedder.(linear_1|linear_2)",
    "t_block.1 = adaln_single.linear",
    "final_layer.(linear|scale_shift_table) = (proj_out|scale_shift_table)",
)
PIXART = Architecture(
    name="pixart",
    match=Match(
        classes=("PixArtTransformer2DModel",),
        shapes=(  # not the widths of others with these names: LTX-Video, Sana, LTX-2; nor the narrow text of Cosmos
            (f"{_BLOCK}.attn1.to_q", "inp != 2048 and inp != 2240 and inp != 4096"),
            (f"{_BLOCK}.attn2.to_k", "inp != 1024 and (out == inp or out == 2*inp)"),
        ),
        metadata=("pixart",),
    ),
    layers=(
        Linear(f"{_BLOCK}.(attn1|attn2).(to_q|to_k|to_v|to_out.0)", "attention", ("q", "k", "v", "o"), _C),
        Linear(f"{_BLOCK}.ff.net.(0.proj|2)", "mlp", ("up", "down"), _C),
        Conv2d("pos_embed.proj", "conv", ("patch",), _C),
        Linear("caption_projection.(linear_1|linear_2)", "other", ("up", "down"), _C),
        Linear(
            f"{_TIME}.(timestep_embedder|resolution_embedder|aspect_ratio_embedder).(linear_1|linear_2)",
            "other",
            ("up", "down"),
            _C,
        ),
        Linear("adaln_single.linear", "modulation", ("time",), _C),
        Linear("proj_out", "head", ("out",), _C),
        Excluded("scale_shift_table", "modulation", component=_C),
        Excluded(f"{_BLOCK}.scale_shift_table", "modulation", component=_C),
        *t5(_TEXT),
    ),
    default_targets=("to_q", "to_k", "to_v", "to_out.0"),
    tied=T5_TIED,
    tied_by_default=True,
    labels=Labels("pixart"),
    named={
        _C: Named(
            "lora_unet",
            comfy="diffusion_model.",
            checkpoint=("model.diffusion_model.",),
            native=_NATIVE,
            flat="native",
        ),
        _TEXT: Named("lora_te1", also=("lora_te",), comfy="text_encoders.t5xxl.transformer.", borrowed=True),
    },
    ignored=("vae.", "first_stage_model."),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """PixArt: transformer and text encoder."""
    return [PIXART]
