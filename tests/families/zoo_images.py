"""Transformers of diffusers that make images, their video relatives, and text encoders (see zoo.py)."""

from typing import Any

from zoo import Tiny, tiny

HEADS = {"attention_head_dim": 8, "num_attention_heads": 2}
_BLOCKS = {"num_layers": 2, "num_single_layers": 2}
_TEXT = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_T5 = {"vocab_size": 64, "d_model": 24, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}


def denoiser(family: str, cls: str, **settings: Any) -> Tiny:
    """A transformer of diffusers."""
    return tiny(family, cls, component="transformer", library="diffusers", **HEADS, **settings)


def clip(family: str, component: str = "text_encoder", *, projection: bool = False) -> Tiny:
    """CLIP's text model, in one of the two classes that pipelines have."""
    cls = "CLIPTextModelWithProjection" if projection else "CLIPTextModel"
    more = {"max_position_embeddings": 16, **({"projection_dim": 20} if projection else {})}
    return tiny(family, cls, "CLIPTextConfig", component=component, alone="stable-diffusion", **_TEXT, **more)


def t5(family: str, component: str) -> Tiny:
    """T5 1.1's encoder."""
    gated = {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
    return tiny(family, "T5EncoderModel", "T5Config", component=component, alone="t5", **_T5, **gated)


_PIXELS = {"in_channels": 4, "out_channels": 4}
_FLUX = {"in_channels": 8, "joint_attention_dim": 24, **_BLOCKS}
_FLUX1 = {**_FLUX, "pooled_projection_dim": 20, "axes_dims_rope": (2, 2, 4)}
_SD3 = {
    **_PIXELS,
    "sample_size": 8,
    "joint_attention_dim": 24,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 8,
}
_HUNYUAN = {**_PIXELS, **_BLOCKS, "num_refiner_layers": 2, "text_embed_dim": 24}
_VIDEO = {**_HUNYUAN, "pooled_projection_dim": 20, "rope_axes_dim": (2, 2, 4)}
_LLAMA = {**_TEXT, "max_position_embeddings": 16}
SD3 = [
    denoiser("stable-diffusion-3", "SD3Transformer2DModel", num_layers=24, **_SD3),
    denoiser(
        "stable-diffusion-3",
        "SD3Transformer2DModel",
        num_layers=24,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
        **_SD3,
    ),
    denoiser("stable-diffusion-3.5-large", "SD3Transformer2DModel", num_layers=38, qk_norm="rms_norm", **_SD3),
    clip("stable-diffusion-3", projection=True),
    clip("stable-diffusion-3", "text_encoder_2", projection=True),
    t5("stable-diffusion-3", "text_encoder_3"),
]
FLUX = [
    denoiser("flux", "FluxTransformer2DModel", guidance_embeds=True, **_FLUX1),
    clip("flux"),
    t5("flux", "text_encoder_2"),
    denoiser(
        "chroma",
        "ChromaTransformer2DModel",
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=2,
        **{name: value for name, value in _FLUX1.items() if name != "pooled_projection_dim"},
    ),
    t5("chroma", "text_encoder"),
    denoiser("flux2", "Flux2Transformer2DModel", axes_dims_rope=(2, 2, 2, 2), timestep_guidance_channels=16, **_FLUX),
]
HUNYUAN = [
    denoiser("hunyuan-video", "HunyuanVideoTransformer3DModel", **_VIDEO),
    denoiser("hunyuan-video", "HunyuanVideoTransformer3DModel", image_condition_type="token_replace", **_VIDEO),
    tiny("hunyuan-video", "LlamaModel", "LlamaConfig", component="text_encoder", alone="llama", **_LLAMA),
    clip("hunyuan-video", "text_encoder_2"),
    denoiser(
        "framepack",
        "HunyuanVideoFramepackTransformer3DModel",
        has_image_proj=True,
        image_proj_dim=16,
        has_clean_x_embedder=True,
        **_VIDEO,
    ),
    denoiser(
        "hunyuan-image",
        "HunyuanImageTransformer2DModel",
        text_embed_2_dim=20,
        rope_axes_dim=(4, 4),
        guidance_embeds=True,
        use_meanflow=True,
        **_HUNYUAN,
    ),
]
TINY = [*SD3, *FLUX, *HUNYUAN]
