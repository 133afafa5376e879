"""Wan 2.1 and 2.2, text or image to video, with VACE, Animate, SkyReels V2 and ChronoEdit, which extend their names.

Sources: diffusers, models/transformers/transformer_wan.py, transformer_wan_vace.py, transformer_wan_animate.py and
transformer_skyreels_v2.py; the original names are those of Wan's own code, which ComfyUI and musubi-tuner have too. The
third norm of a block is called before the second in the original. The high-noise and the low-noise model of Wan 2.2
are two files of one structure, and so are their adapters. Animate's encoder of motions has layers of its own kinds,
which no adapter is for. The text encoder is UMT5.
"""

from loratool import Architecture, Conv1d, Conv3d, Embedding, Excluded, Labels, Linear, Match, Named, hookimpl
from loratool_families.text_encoders import T5_TIED, t5

_C, _MODULATION = "transformer", "modulation"
_BLOCKS = "(blocks|vace_blocks).{i}"
_CONDITIONS = "condition_embedder"
_MOTION = "motion_encoder"
_NATIVE = (
    f"{_BLOCKS}.self_attn.(q|k|v|o|norm_q|norm_k) = {_BLOCKS}.attn1.(to_q|to_k|to_v|to_out.0|norm_q|norm_k)",
    f"{_BLOCKS}.cross_attn.(q|k|v|o|norm_q|norm_k) = {_BLOCKS}.attn2.(to_q|to_k|to_v|to_out.0|norm_q|norm_k)",
    f"{_BLOCKS}.cross_attn.(k_img|v_img|norm_k_img) = {_BLOCKS}.attn2.(add_k_proj|add_v_proj|norm_added_k)",
    f"{_BLOCKS}.ffn.(0|2) = {_BLOCKS}.ffn.net.(0.proj|2)",
    f"{_BLOCKS}.(norm2|norm3) = {_BLOCKS}.(norm3|norm2)",
    f"{_BLOCKS}.modulation = {_BLOCKS}.scale_shift_table",
    "vace_blocks.{i}.(before_proj|after_proj) = vace_blocks.{i}.(proj_in|proj_out)",
    f"(time|text)_embedding.(0|2) = {_CONDITIONS}.(time|text)_embedder.(linear_1|linear_2)",
    f"time_projection.1 = {_CONDITIONS}.time_proj",
    f"img_emb.proj.(0|1|3|4) = {_CONDITIONS}.image_embedder.(norm1|ff.net.0.proj|ff.net.2|norm2)",
    f"img_emb.emb_pos = {_CONDITIONS}.image_embedder.pos_embed",
    "fps_projection.(0|2) = fps_projection.net.(0.proj|2)",
    "(head.head|head.modulation) = (proj_out|scale_shift_table)",
    "face_adapter.fuser_blocks.{i}.(linear1_q|linear2|q_norm|k_norm) = face_adapter.{i}.(to_q|to_out|norm_q|norm_k)",
    "face_adapter.fuser_blocks.{i}.linear1_kv = face_adapter.{i}.(to_k|to_v)",
    "face_encoder.(conv1_local|conv2|conv3).conv = face_encoder.(conv1_local|conv2|conv3)",
    f"{_MOTION}.dec.direction.weight = {_MOTION}.motion_synthesis_weight",  # the tensor, and the module that has it
    f"{_MOTION}.dec.direction = {_MOTION}.motion_synthesis_weight",
    f"{_MOTION}.enc.fc.{{i}} = {_MOTION}.motion_network.{{i}}",
    f"{_MOTION}.enc.net_app.convs.(0.0|8) = {_MOTION}.(conv_in|conv_out)",
    f"{_MOTION}.enc.net_app.convs.{{1+i, i<7}}.(conv1.0|conv2.1|skip.1) = "
    f"{_MOTION}.res_blocks.{{i}}.(conv1|conv2|conv_skip)",
)
_TRANSFORMER = (
    Linear(f"{_BLOCKS}.(attn1|attn2).(to_q|to_k|to_v|to_out.0)", "attention", ("q", "k", "v", "o"), _C),
    Linear("blocks.{i}.attn2.(add_k_proj|add_v_proj)", "attention", ("k", "v"), _C),  # of the image
    Linear(f"{_BLOCKS}.ffn.net.(0.proj|2)", "mlp", ("up", "down"), _C),
    Linear("vace_blocks.{i}.(proj_in|proj_out)", "projection", ("proj_in", "proj_out"), _C),
    Conv3d("(patch_embedding|vace_patch_embedding|pose_patch_embedding)", "conv", ("patch",), _C),
    Linear(f"{_CONDITIONS}.(time_embedder|text_embedder).(linear_1|linear_2)", "other", ("up", "down"), _C),
    Linear(f"{_CONDITIONS}.image_embedder.ff.net.(0.proj|2)", "other", ("up", "down"), _C),
    Linear(f"{_CONDITIONS}.time_proj", _MODULATION, ("time",), _C),
    Embedding("fps_embedding", "embedding", ("fps",), _C),  # SkyReels V2
    Linear("fps_projection.net.(0.proj|2)", "other", ("up", "down"), _C),
    Linear("proj_out", "head", ("out",), _C),
    Linear("face_adapter.{i}.(to_q|to_k|to_v|to_out)", "attention", ("q", "k", "v", "o"), _C),  # Animate
    Conv1d("face_encoder.(conv1_local|conv2|conv3)", "conv", ("conv",), _C),
    Linear("face_encoder.out_proj", "projection", ("out",), _C),
    Excluded("scale_shift_table", _MODULATION, component=_C),
    Excluded(f"{_BLOCKS}.scale_shift_table", _MODULATION, component=_C),
    Excluded(f"{_CONDITIONS}.image_embedder.pos_embed", "position", component=_C),
    Excluded("face_encoder.padding_tokens", "token", component=_C),
    Excluded(f"{_MOTION}.(motion_synthesis_weight|conv_in|conv_out|motion_network.{{i}})", "motion", component=_C),
    Excluded(f"{_MOTION}.res_blocks.{{i}}.(conv1|conv2|conv_skip)", "motion", component=_C),
)
WAN = Architecture(
    name="wan",
    match=Match(
        classes=(
            "WanTransformer3DModel",
            "WanVACETransformer3DModel",
            "WanAnimateTransformer3DModel",
            "SkyReelsV2Transformer3DModel",
            "ChronoEditTransformer3DModel",
        ),
        metadata=("wan",),
    ),
    layers=(*_TRANSFORMER, *t5("text_encoder")),
    default_targets=("to_q", "to_k", "to_v", "to_out.0"),
    tied=T5_TIED,
    tied_by_default=True,
    labels=Labels("wan"),
    named={
        _C: Named(
            "lora_unet",
            comfy="diffusion_model.",
            checkpoint=("model.diffusion_model.",),
            native=_NATIVE,
            flat="native",
        ),
        "text_encoder": Named("lora_te", comfy="text_encoders.umt5xxl.transformer.", borrowed=True),
    },
    ignored=("vae.", "first_stage_model."),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Wan: transformer and text encoder."""
    return [WAN]
