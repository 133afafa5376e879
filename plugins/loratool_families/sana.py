"""Sana and Sana Sprint: linear attention and convolutions in the feed-forward; the text encoder is Gemma 2.

Sources: diffusers, models/transformers/sana_transformer.py and scripts/convert_sana_to_diffusers.py. The original keeps
q, k and v of a block's own attention in one weight, and k and v of the attention to the text in another. Sprint embeds
the guidance too, and has its embedder of time in another place. Trainers flatten diffusers' names.
"""

from loratool import Architecture, Conv2d, Excluded, Labels, Linear, Match, Named, hookimpl
from loratool_families.text_encoders import decoder

_C, _TEXT = "transformer", "text_encoder"
_BLOCK = "transformer_blocks.{i}"
_CONVS = "(conv_inverted|conv_depth|conv_point)"
_NATIVE = (
    f"blocks.{{i}}.attn.qkv = {_BLOCK}.attn1.(to_q|to_k|to_v)",
    f"blocks.{{i}}.cross_attn.kv_linear = {_BLOCK}.attn2.(to_k|to_v)",
    f"blocks.{{i}}.attn.(proj|q_norm|k_norm) = {_BLOCK}.attn1.(to_out.0|norm_q|norm_k)",
    f"blocks.{{i}}.cross_attn.(q_linear|proj|q_norm|k_norm) = {_BLOCK}.attn2.(to_q|to_out.0|norm_q|norm_k)",
    f"blocks.{{i}}.mlp.(inverted_conv|depth_conv|point_conv).conv = {_BLOCK}.ff.{_CONVS}",
    f"blocks.{{i}}.scale_shift_table = {_BLOCK}.scale_shift_table",
    "x_embedder.proj = patch_embed.proj",
    "y_embedder.y_proj.(fc1|fc2) = caption_projection.(linear_1|linear_2)",
    "attention_y_norm = caption_norm",
    "t_block.1 = time_embed.linear",
    "final_layer.(linear|scale_shift_table) = (proj_out|scale_shift_table)",
)


def _family(name: str, when: str, embedders: str, native: tuple[str, ...]) -> Architecture:
    return Architecture(
        name=name,
        match=Match(
            classes=("SanaTransformer2DModel",),
            when=when,
            shapes=(  # not the widths of others with these names: LTX-Video, LTX-2; nor the narrow text of Cosmos
                (f"{_BLOCK}.attn1.to_q", "inp != 2048 and inp != 4096"),
                (f"{_BLOCK}.attn2.to_k", "inp != 1024 and (out == inp or out == 2*inp)"),
            ),
            metadata=("sana",),
        ),
        layers=(
            Linear(f"{_BLOCK}.(attn1|attn2).(to_q|to_k|to_v|to_out.0)", "attention", ("q", "k", "v", "o"), _C),
            Conv2d(f"{_BLOCK}.ff.{_CONVS}", "mlp", ("up", "depth", "down"), _C),
            Conv2d("patch_embed.proj", "conv", ("patch",), _C),
            Linear("caption_projection.(linear_1|linear_2)", "other", ("up", "down"), _C),
            Linear(f"{embedders}.(linear_1|linear_2)", "other", ("up", "down"), _C),
            Linear("time_embed.linear", "modulation", ("time",), _C),
            Linear("proj_out", "head", ("out",), _C),
            Excluded("scale_shift_table", "modulation", component=_C),
            Excluded(f"{_BLOCK}.scale_shift_table", "modulation", component=_C),
            *decoder(_TEXT),
        ),
        default_targets=("to_q", "to_k", "to_v", "to_out.0"),
        aliases=("model.** = **",),  # files of the text encoder have it, the module in the pipeline does not
        labels=Labels(spec="sana"),
        named={
            _C: Named(
                "lora_unet",
                comfy="diffusion_model.",
                checkpoint=("model.diffusion_model.",),
                native=(*_NATIVE, *native),
            ),
            _TEXT: Named("lora_te", comfy="text_encoders.gemma2_2b.transformer.model.", borrowed=True),
        },
        ignored=("vae.", "first_stage_model."),
    )


SANA = _family(
    "sana",
    "not guidance_embeds",
    "time_embed.emb.timestep_embedder",
    ("t_embedder.mlp.(0|2) = time_embed.emb.timestep_embedder.(linear_1|linear_2)",),
)
SANA_SPRINT = _family(
    "sana-sprint",
    "guidance_embeds",
    "time_embed.(timestep_embedder|guidance_embedder)",
    ("(t|cfg)_embedder.mlp.(0|2) = time_embed.(timestep|guidance)_embedder.(linear_1|linear_2)",),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Sana and Sana Sprint: transformer and text encoder."""
    return [SANA, SANA_SPRINT]
