"""LTX-Video; the text encoder is T5.

Sources: diffusers, models/transformers/transformer_ltx.py and loaders/single_file_utils.py; ComfyUI,
comfy/ldm/lightricks/model.py, has the original names.
"""

from loratool import Architecture, Excluded, Linear, Match, Named, hookimpl
from loratool_families.text_encoders import T5_TIED, t5

_C, _TEXT = "transformer", "text_encoder"
_BLOCK = "transformer_blocks.{i}"
_TIMED = "emb.timestep_embedder.(linear_1|linear_2)"
LTX = Architecture(
    name="ltx",
    match=Match(
        classes=("LTXVideoTransformer3DModel",),
        shapes=(  # not the widths of others with these names: PixArt, Sana; nor the narrow text of Cosmos
            (f"{_BLOCK}.attn1.to_q", "inp != 1152 and inp != 2240"),
            (f"{_BLOCK}.attn2.to_k", "inp == out"),
        ),
    ),
    layers=(
        Linear(f"{_BLOCK}.(attn1|attn2).(to_q|to_k|to_v|to_out.0)", "attention", ("q", "k", "v", "o"), _C),
        Linear(f"{_BLOCK}.ff.net.(0.proj|2)", "mlp", ("up", "down"), _C),
        Linear("proj_in", "other", ("patch",), _C),
        Linear("caption_projection.(linear_1|linear_2)", "other", ("up", "down"), _C),
        Linear(f"time_embed.{_TIMED}", "other", ("up", "down"), _C),
        Linear("time_embed.linear", "modulation", ("time",), _C),
        Linear("proj_out", "head", ("out",), _C),
        Excluded("scale_shift_table", "modulation", component=_C),
        Excluded(f"{_BLOCK}.scale_shift_table", "modulation", component=_C),
        *t5(_TEXT),
    ),
    default_targets=("to_q", "to_k", "to_v", "to_out.0"),
    tied=T5_TIED,
    tied_by_default=True,
    named={
        _C: Named(
            "lora_unet",
            comfy="diffusion_model.",
            checkpoint=("model.diffusion_model.",),
            native=(
                "patchify_proj = proj_in",
                "adaln_single.** = time_embed.**",
                f"{_BLOCK}.(attn1|attn2).(q_norm|k_norm) = {_BLOCK}.(attn1|attn2).(norm_q|norm_k)",
            ),
            flat="native",
        ),
        _TEXT: Named("lora_te", comfy="text_encoders.t5xxl.transformer.", borrowed=True),
    },
    ignored=("vae.", "first_stage_model."),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """LTX-Video: transformer and text encoder."""
    return [LTX]
