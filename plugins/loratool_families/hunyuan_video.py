"""HunyuanVideo of Tencent, from text or from an image, and FramePack.

Sources: diffusers, models/transformers/transformer_hunyuan_video.py, transformer_hunyuan_video_framepack.py;
Tencent/HunyuanVideo, hyvideo/modules; ComfyUI, ldm/hunyuan_video/model.py. Tencent's names and ComfyUI's differ; both
fuse what diffusers splits. The text encoders are a Llama and CLIP-L: te1 and te2 to OneTrainer.
"""

from loratool import Architecture, Conv3d, Labels, Linear, Match, Named, hookimpl
from loratool_families.double_stream import (
    BLOCK_RULES,
    COMPONENT,
    DOUBLE,
    LAST_RULES,
    SINGLE,
    TARGETS,
    blocks,
    counts,
    linear,
    unlike,
)
from loratool_families.text_encoders import clip, decoder

_TOKENS = "txt_in.individual_token_refiner.blocks.{i}"
_REFINER = "context_embedder.token_refiner.refiner_blocks.{i}"
_TEXT = "context_embedder.time_text_embed.(timestep_embedder|text_embedder).(linear_1|linear_2)"
_TIME = "time_text_embed.(timestep_embedder|text_embedder|guidance_embedder).(linear_1|linear_2)"
#: what ComfyUI and Tencent name alike
_ALIKE = (
    "img_in.proj = x_embedder.proj",
    "txt_in.input_embedder = context_embedder.proj_in",
    f"{_TOKENS}.(norm1|norm2) = {_REFINER}.(norm1|norm2)",
    f"{_TOKENS}.adaLN_modulation.1 = {_REFINER}.norm_out.linear",
    *LAST_RULES,
)
COMFY_TEXT = (
    f"{_TOKENS}.self_attn.qkv = {_REFINER}.attn.(to_q|to_k|to_v)",
    f"{_TOKENS}.self_attn.proj = {_REFINER}.attn.to_out.0",
    f"{_TOKENS}.mlp.(0|2) = {_REFINER}.ff.net.(0.proj|2)",
    f"txt_in.(t_embedder|c_embedder).(in_layer|out_layer) = {_TEXT}",
)
TENCENT_BLOCKS = (
    f"double_blocks.{{i}}.img_attn_qkv = {DOUBLE}.attn.(to_q|to_k|to_v)",
    f"double_blocks.{{i}}.txt_attn_qkv = {DOUBLE}.attn.(add_q_proj|add_k_proj|add_v_proj)",
    f"double_blocks.{{i}}.(img|txt)_attn_proj = {DOUBLE}.attn.(to_out.0|to_add_out)",
    f"double_blocks.{{i}}.img_attn_(q_norm|k_norm).weight = {DOUBLE}.attn.(norm_q|norm_k).weight",
    f"double_blocks.{{i}}.txt_attn_(q_norm|k_norm).weight = {DOUBLE}.attn.(norm_added_q|norm_added_k).weight",
    f"double_blocks.{{i}}.(img|txt)_mlp.(fc1|fc2) = {DOUBLE}.(ff|ff_context).net.(0.proj|2)",
    f"double_blocks.{{i}}.(img|txt)_mod.linear = {DOUBLE}.(norm1|norm1_context).linear",
    f"single_blocks.{{i}}.modulation.linear = {SINGLE}.norm.linear",
    f"single_blocks.{{i}}.(q_norm|k_norm).weight = {SINGLE}.attn.(norm_q|norm_k).weight",
)
TENCENT_TEXT = (
    f"{_TOKENS}.self_attn_qkv = {_REFINER}.attn.(to_q|to_k|to_v)",
    f"{_TOKENS}.self_attn_proj = {_REFINER}.attn.to_out.0",
    f"{_TOKENS}.mlp.(fc1|fc2) = {_REFINER}.ff.net.(0.proj|2)",
    "txt_in.t_embedder.mlp.(0|2) = context_embedder.time_text_embed.timestep_embedder.(linear_1|linear_2)",
    "txt_in.c_embedder.(linear_1|linear_2) = context_embedder.time_text_embed.text_embedder.(linear_1|linear_2)",
)
#: everything but the embedders of time, guidance and text: ComfyUI's names, then Tencent's, which trainers have
RULES = (*BLOCK_RULES, *COMFY_TEXT, *_ALIKE, *TENCENT_BLOCKS, *TENCENT_TEXT)


def text_refiner() -> tuple[Linear, ...]:
    """Return the layers that text goes through first."""
    return (
        linear(f"{_REFINER}.attn.(to_q|to_k|to_v|to_out.0)", "attention", "q", "k", "v", "o"),
        linear(f"{_REFINER}.ff.net.(0.proj|2)", "mlp", "up", "down"),
        linear(f"{_REFINER}.norm_out.linear", "modulation", "modulation"),
        linear(_TEXT, "other", "in", "out"),
        linear("context_embedder.proj_in", "embedding", "text"),
    )


HUNYUAN_VIDEO = Architecture(
    name="hunyuan-video",
    match=Match(
        classes=("HunyuanVideoTransformer3DModel",),
        shapes=unlike(1536, 2432, 3584, 4096, 6144),  # SD 3, HunyuanImage, Flux.2
        counts=counts(20, 40),
        metadata=("hunyuan_video", "hunyuan-video"),
    ),
    layers=(
        *blocks(),
        *text_refiner(),
        linear(_TIME, "other", "in", "out"),
        Conv3d("x_embedder.proj", "embedding", ("image",), COMPONENT),
        linear("norm_out.linear", "modulation", "modulation"),
        linear("proj_out", "head", "head"),
        *decoder("text_encoder"),
        *clip("text_encoder_2"),
    ),
    default_targets=TARGETS,
    prefixes={"text_encoder_2": ("text_model.",)},
    bare_in_memory=("text_encoder_2",),
    component_classes={"text_encoder": ("LlamaModel",), "text_encoder_2": ("CLIPTextModel",)},
    labels=Labels("hunyuan_video", "hunyuan-video"),
    named={
        "transformer": Named(
            kohya="lora_unet",
            comfy="diffusion_model.",
            checkpoint=("model.diffusion_model.", "model.model."),
            native=(
                *RULES,
                f"(time_in|vector_in|guidance_in).(in_layer|out_layer) = {_TIME}",
                "(time_in|guidance_in).mlp.(0|2)"
                " = time_text_embed.(timestep_embedder|guidance_embedder).(linear_1|linear_2)",
            ),
            flat="last",
        ),
        "text_encoder": Named(kohya="lora_te1", comfy="text_encoders.llama.transformer.model."),
        "text_encoder_2": Named(kohya="lora_te2", comfy="text_encoders.clip_l.transformer."),
    },
    ignored=("vae.",),
)
FRAMEPACK = Architecture(
    name="framepack",
    match=Match(
        classes=("HunyuanVideoFramepackTransformer3DModel",),
        shapes=HUNYUAN_VIDEO.match.shapes,
        counts=counts(20, 40),
        metadata=("framepack",),
    ),
    like="hunyuan-video",
    layers=(
        Conv3d("clean_x_embedder.(proj|proj_2x|proj_4x)", "embedding", ("image",), COMPONENT),
        linear("image_projection.(up|down)", "projection", "up", "down"),
    ),
    labels=Labels("framepack", "framepack"),
    named={
        **HUNYUAN_VIDEO.named,
        "transformer": Named("lora_unet", (), "diffusion_model.", (), HUNYUAN_VIDEO.named["transformer"].native),
    },
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """HunyuanVideo and FramePack: the transformer and the text encoders."""
    return [HUNYUAN_VIDEO, FRAMEPACK]
