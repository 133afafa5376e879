"""Qwen-Image and Qwen-Image-Edit: diffusers' names are the original ones; the text encoder is Qwen2.5-VL.

Sources: diffusers, models/transformers/transformer_qwenimage.py; transformers, models/qwen2_5_vl. musubi-tuner, ComfyUI
and the files of ModelScope spell the transformer alike. transformers has the text model under `model.language_model`
and the vision tower under `model.visual` in memory.
"""

from loratool import Architecture, Conv3d, Embedding, Fused, Labels, Linear, Match, Named, concat, hookimpl
from loratool_families.text_encoders import decoder

_C, _TEXT = "transformer", "text_encoder"
_BLOCK = "transformer_blocks.{i}"
_VISION = "visual.blocks.{i}"
QWEN_IMAGE = Architecture(
    name="qwen-image",
    match=Match(classes=("QwenImageTransformer2DModel",), metadata=("qwen_image", "Qwen-Image")),
    layers=(
        Linear(f"{_BLOCK}.attn.(to_q|to_k|to_v|to_out.0)", "attention", ("q", "k", "v", "o"), _C),
        Linear(f"{_BLOCK}.attn.(add_q_proj|add_k_proj|add_v_proj|to_add_out)", "attention", ("q", "k", "v", "o"), _C),
        Linear(f"{_BLOCK}.(img_mlp|txt_mlp).net.(0.proj|2)", "mlp", ("up", "down"), _C),
        Linear(f"{_BLOCK}.(img_mod|txt_mod).1", "modulation", ("image", "text"), _C),
        Linear("(img_in|txt_in)", "other", ("image", "text"), _C),
        Linear("time_text_embed.timestep_embedder.(linear_1|linear_2)", "other", ("up", "down"), _C),
        Embedding("time_text_embed.addition_t_embedding", "embedding", ("condition",), _C),  # layered images
        Linear("norm_out.linear", "modulation", ("out",), _C),
        Linear("proj_out", "head", ("out",), _C),
        *decoder(_TEXT, "model."),
        Linear("lm_head", "head", ("out",), _TEXT),
        Conv3d("visual.patch_embed.proj", "conv", ("patch",), _TEXT, "vision"),
        Linear(f"{_VISION}.attn.(qkv|proj)", "attention", ("qkv", "o"), _TEXT, "vision"),
        Linear(f"{_VISION}.mlp.(gate_proj|up_proj|down_proj)", "mlp", ("gate", "up", "down"), _TEXT, "vision"),
        Linear("visual.merger.mlp.(0|2)", "projection", ("up", "down"), _TEXT, "projector"),
    ),
    default_targets=("to_q", "to_k", "to_v", "to_out.0"),
    fused=(Fused(f"{_VISION}.attn.qkv", ("q", "k", "v"), concat(parts=3), component=_TEXT),),
    memory=("model.language_model.** = model.**", "model.visual.** = visual.**"),
    tied=(("model.embed_tokens", "lm_head"),),
    labels=Labels("qwen_image", "Qwen-Image"),
    named={
        _C: Named("lora_unet", comfy="diffusion_model.", checkpoint=("model.diffusion_model.",)),
        _TEXT: Named("lora_te", comfy="text_encoders.qwen25_7b.transformer.", borrowed=True),
    },
    ignored=("vae.", "first_stage_model."),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Qwen-Image: transformer and text encoder."""
    return [QWEN_IMAGE]
