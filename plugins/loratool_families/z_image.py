"""Z-Image: diffusers' names, and ComfyUI's, where q, k and v are one weight; the text encoder is Qwen 3.

Sources: diffusers, models/transformers/transformer_z_image.py and loaders/single_file_utils.py. musubi-tuner flattens
diffusers' names. The released models have one size of patch, `2-1`. Every head has its own key and value.
"""

from loratool import Architecture, Excluded, Labels, Linear, Match, Named, hookimpl
from loratool_families.text_encoders import decoder

_C, _TEXT = "transformer", "text_encoder"
_BLOCKS = "(layers|noise_refiner|context_refiner|siglip_refiner).{i}"
_NATIVE = (
    f"{_BLOCKS}.attention.qkv = {_BLOCKS}.attention.(to_q|to_k|to_v)",
    f"{_BLOCKS}.attention.(out|q_norm|k_norm) = {_BLOCKS}.attention.(to_out.0|norm_q|norm_k)",
    "x_embedder = all_x_embedder.2-1",
    "final_layer.(linear|adaLN_modulation.1) = all_final_layer.2-1.(linear|adaLN_modulation.1)",
)
Z_IMAGE = Architecture(
    name="z-image",
    match=Match(
        classes=("ZImageTransformer2DModel",),
        # Lumina 2 has fewer keys than queries; alone, or fused with queries and values
        shapes=(("(layers|noise_refiner|context_refiner).{i}.attention.to_k", "out == inp or out == 3*inp"),),
        metadata=("z_image", "zimage", "Z-Image"),
    ),
    layers=(
        Linear(f"{_BLOCKS}.attention.(to_q|to_k|to_v|to_out.0)", "attention", ("q", "k", "v", "o"), _C),
        Linear(f"{_BLOCKS}.feed_forward.(w1|w2|w3)", "mlp", ("gate", "down", "up"), _C),
        Linear("(layers|noise_refiner).{i}.adaLN_modulation.0", "modulation", ("modulation",), _C),
        Linear("all_x_embedder.2-1", "other", ("image",), _C),
        Linear("(cap_embedder|siglip_embedder).1", "other", ("text", "image"), _C),
        Linear("t_embedder.mlp.(0|2)", "other", ("up", "down"), _C),
        Linear("all_final_layer.2-1.adaLN_modulation.1", "modulation", ("out",), _C),
        Linear("all_final_layer.2-1.linear", "head", ("out",), _C),
        Excluded("(x_pad_token|cap_pad_token|siglip_pad_token)", "token", component=_C),
        *decoder(_TEXT),
    ),
    default_targets=("to_q", "to_k", "to_v", "to_out.0"),
    aliases=("model.** = **",),  # files of the text encoder have it, the module in the pipeline does not
    labels=Labels("z_image", "Z-Image"),
    named={
        _C: Named("lora_unet", comfy="diffusion_model.", checkpoint=("model.diffusion_model.",), native=_NATIVE),
        _TEXT: Named("lora_te", comfy="text_encoders.qwen3_4b.transformer.model.", borrowed=True),
    },
    ignored=("vae.", "first_stage_model."),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Z-Image: transformer and text encoder."""
    return [Z_IMAGE]
