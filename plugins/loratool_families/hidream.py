"""HiDream-I1: two streams, then one, with experts in the feed-forward of the image; diffusers' names are the original.

Sources: diffusers, models/transformers/transformer_hidream_image.py; ComfyUI, comfy/ldm/hidream/model.py. Its four text
encoders are CLIP-L, CLIP-G, T5 and Llama 3.1, in this order.
"""

from loratool import Architecture, Labels, Linear, Match, Named, hookimpl
from loratool_families.text_encoders import T5_TIED, clip, decoder, t5

_C = "transformer"
_BLOCKS = "(double_stream_blocks|single_stream_blocks).{i}.block"
_GLU, _ROLES, _QKVO = "(w1|w2|w3)", ("gate", "down", "up"), ("q", "k", "v", "o")
HIDREAM = Architecture(
    name="hidream",
    match=Match(classes=("HiDreamImageTransformer2DModel",), metadata=("hidream_i1", "hidream-i1")),
    layers=(
        Linear(f"{_BLOCKS}.attn1.(to_q|to_k|to_v|to_out)", "attention", _QKVO, _C),
        Linear("double_stream_blocks.{i}.block.attn1.(to_q_t|to_k_t|to_v_t|to_out_t)", "attention", _QKVO, _C),
        Linear(f"double_stream_blocks.{{i}}.block.ff_t.{_GLU}", "mlp", _ROLES, _C),
        Linear(f"{_BLOCKS}.ff_i.shared_experts.{_GLU}", "mlp", _ROLES, _C),
        Linear(f"{_BLOCKS}.ff_i.experts.{{j}}.{_GLU}", "experts", _ROLES, _C),
        Linear(f"{_BLOCKS}.ff_i.gate", "router", ("router",), _C),
        Linear(f"{_BLOCKS}.adaLN_modulation.1", "modulation", ("modulation",), _C),
        Linear("x_embedder.proj", "other", ("image",), _C),
        Linear("caption_projection.{i}.linear", "other", ("text",), _C),
        Linear("t_embedder.timestep_embedder.(linear_1|linear_2)", "other", ("up", "down"), _C),
        Linear("p_embedder.pooled_embedder.(linear_1|linear_2)", "other", ("up", "down"), _C),
        Linear("final_layer.adaLN_modulation.1", "modulation", ("out",), _C),
        Linear("final_layer.linear", "head", ("out",), _C),
        *clip("text_encoder", projection=True),
        *clip("text_encoder_2", projection=True),
        *t5("text_encoder_3"),
        *decoder("text_encoder_4", "model."),
        Linear("lm_head", "head", ("out",), "text_encoder_4"),
    ),
    default_targets=("to_q", "to_k", "to_v", "to_out"),
    tied=T5_TIED,
    tied_by_default=True,
    labels=Labels("hidream_i1", "hidream-i1"),
    named={
        _C: Named("lora_unet", comfy="diffusion_model.", checkpoint=("model.diffusion_model.",)),
        "text_encoder": Named("lora_te1", comfy="text_encoders.clip_l.transformer.", borrowed=True),
        "text_encoder_2": Named("lora_te2", comfy="text_encoders.clip_g.transformer.", borrowed=True),
        "text_encoder_3": Named("lora_te3", comfy="text_encoders.t5xxl.transformer.", borrowed=True),
        "text_encoder_4": Named("lora_te4", comfy="text_encoders.llama.transformer.", borrowed=True),
    },
    ignored=("vae.", "first_stage_model."),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """HiDream-I1: transformer and four text encoders."""
    return [HIDREAM]
