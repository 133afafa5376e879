"""HunyuanImage 2.1 of Tencent: the blocks of HunyuanVideo, on images, with glyphs through a ByT5.

Sources: diffusers, models/transformers/transformer_hunyuanimage.py; Tencent/HunyuanImage-2.1, hyimage/models; ComfyUI,
ldm/hunyuan_video/model.py. Text goes through a Qwen 2.5 VL and a ByT5 that no tool trains adapters of.
"""

from loratool import Architecture, Conv2d, Labels, Match, Named, hookimpl
from loratool_families.double_stream import COMPONENT, TARGETS, blocks, counts, linear, unlike
from loratool_families.hunyuan_video import RULES, text_refiner

_TIME = "time_guidance_embed.(timestep_embedder|timestep_embedder_r|guidance_embedder).(linear_1|linear_2)"
HUNYUAN_IMAGE = Architecture(
    name="hunyuan-image",
    match=Match(
        classes=("HunyuanImageTransformer2DModel",),
        shapes=unlike(1536, 2432, 3072, 4096, 6144),  # SD 3, Flux.1, HunyuanVideo, Flux.2
        counts=counts(20, 40),
        metadata=("hunyuan-image",),
    ),
    layers=(
        *blocks(),
        *text_refiner(),
        linear(_TIME, "other", "in", "out"),
        linear("context_embedder_2.(linear_1|linear_2|linear_3)", "embedding", "glyphs"),
        Conv2d("x_embedder.proj", "embedding", ("image",), COMPONENT),
        linear("norm_out.linear", "modulation", "modulation"),
        linear("proj_out", "head", "head"),
    ),
    default_targets=TARGETS,
    labels=Labels("hunyuan-image-2.1", "hunyuan-image-2.1"),
    named={
        "transformer": Named(
            kohya="lora_unet",
            comfy="diffusion_model.",
            checkpoint=("model.diffusion_model.", "model.model."),
            native=(
                *RULES,
                f"(time_in|time_r_in|guidance_in).(in_layer|out_layer) = {_TIME}",
                f"(time_in|time_r_in|guidance_in).mlp.(0|2) = {_TIME}",
                "byt5_in.(layernorm|fc1|fc2|fc3) = context_embedder_2.(norm|linear_1|linear_2|linear_3)",
            ),
            flat="last",
        ),
    },
    ignored=("vae.",),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """HunyuanImage 2.1: the transformer."""
    return [HUNYUAN_IMAGE]
