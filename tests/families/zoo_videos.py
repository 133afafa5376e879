"""Transformers of diffusers that make images and videos of LLMs' and T5's embeddings, and what else they load."""

from typing import Any

from zoo import Tiny, tiny
from zoo_images import clip, t5

_TEXT = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {"depth": 2, "hidden_size": 16, "intermediate_size": 20, "num_heads": 2, "out_hidden_size": 24}
_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 1], "rope_theta": 1e4}


def denoiser(family: str, cls: str, *, component: str = "transformer", **settings: Any) -> Tiny:
    """A model of diffusers."""
    return tiny(family, cls, component=component, library="diffusers", **settings)


def decoder(family: str, cls: str, config: str, alone: str, component: str = "text_encoder") -> Tiny:
    """A language model that encodes the prompt."""
    return tiny(family, cls, config, component=component, alone=alone, **_TEXT)


_PIXELS = {"in_channels": 4, "out_channels": 4, "num_layers": 2}
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 12}
_WAN = {**_PIXELS, **_HEADS, "text_dim": 20, "freq_dim": 16, "ffn_dim": 28}
_SEEN = {"image_dim": 18, "added_kv_proj_dim": 24}
_UMT5 = {
    "vocab_size": 64,
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
WAN = [
    denoiser("wan", "WanTransformer3DModel", **_WAN),
    denoiser("wan", "WanTransformer3DModel", pos_embed_seq_len=6, qk_norm="rms_norm_across_heads", **_SEEN, **_WAN),
    denoiser("wan", "WanVACETransformer3DModel", vace_layers=[0, 1], vace_in_channels=6, **_WAN),
    denoiser(
        "wan",
        "WanAnimateTransformer3DModel",
        latent_channels=4,
        inject_face_latents_blocks=1,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=8,
        face_encoder_num_heads=2,
        **_SEEN,
        **{**_WAN, "in_channels": 12},
    ),
    denoiser("wan", "SkyReelsV2Transformer3DModel", inject_sample_info=True, **_SEEN, **_WAN),
    denoiser("wan", "ChronoEditTransformer3DModel", **_SEEN, **_WAN),
    tiny("wan", "UMT5EncoderModel", "UMT5Config", component="text_encoder", alone="t5", **_UMT5),
]
_LTX2 = {
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 2,
    "caption_channels": 20,
    "cross_attention_dim": 24,
    "audio_in_channels": 6,
    "audio_out_channels": 6,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    **_HEADS,
}
_LTX23 = {
    "gated_attn": True,
    "audio_gated_attn": True,
    "cross_attn_mod": True,
    "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False,
    "use_keyframes_abs_pos_embedding": True,
}
_CONNECTORS = {
    "caption_channels": 16,
    "text_proj_in_factor": 3,
    **{f"{kind}_connector_num_attention_heads": 2 for kind in ("video", "audio")},
    **{f"{kind}_connector_attention_head_dim": 8 for kind in ("video", "audio")},
    **{f"{kind}_connector_num_layers": 1 for kind in ("video", "audio")},
    **{f"{kind}_connector_num_learnable_registers": 4 for kind in ("video", "audio")},
}


def _connectors(**settings: Any) -> Tiny:
    place = "diffusers.pipelines.ltx2"
    return tiny("ltx2", "LTX2TextConnectors", component="connectors", library=place, **_CONNECTORS, **settings)


LTX = [
    denoiser(
        "ltx",
        "LTXVideoTransformer3DModel",
        caption_channels=20,
        cross_attention_dim=24,
        **{**_PIXELS, **_HEADS, "in_channels": 8},
    ),
    t5("ltx", "text_encoder"),
    denoiser("ltx2", "LTX2VideoTransformer3DModel", **_LTX2),
    denoiser("ltx2", "LTX2VideoTransformer3DModel", **_LTX2, **_LTX23),
    _connectors(),
    _connectors(
        per_modality_projections=True,
        video_gated_attn=True,
        audio_gated_attn=True,
        video_hidden_dim=16,
        audio_hidden_dim=16,
    ),
]
_QWEN = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 20,
    "axes_dims_rope": (8, 4, 4),
}
_Z = {
    "in_channels": 4,
    "dim": 32,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 20,
    "axes_dims": [8, 4, 4],
    "axes_lens": [16, 16, 16],
}
STREAMS = [
    denoiser("qwen-image", "QwenImageTransformer2DModel", **_QWEN),
    denoiser("qwen-image", "QwenImageTransformer2DModel", use_additional_t_cond=True, **_QWEN),
    tiny(
        "qwen-image",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        component="text_encoder",
        alone="qwen2-vl",
        text_config={**_TEXT, "rope_parameters": _ROPE},
        vision_config=_VISION,
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=7,
        vision_end_token_id=8,
    ),
    denoiser("z-image", "ZImageTransformer2DModel", **_Z),
    denoiser("z-image", "ZImageTransformer2DModel", siglip_feat_dim=12, **_Z),
    decoder("z-image", "Qwen3Model", "Qwen3Config", "qwen3"),
    denoiser(
        "lumina2",
        "Lumina2Transformer2DModel",
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(8, 8, 8),
        cap_feat_dim=20,
    ),
    decoder("lumina2", "Gemma2Model", "Gemma2Config", "gemma"),
    denoiser(
        "krea2",
        "Krea2Transformer2DModel",
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=40,
        timestep_embed_dim=12,
        text_hidden_dim=24,
        num_text_layers=3,
        text_num_attention_heads=3,
        text_num_key_value_heads=3,
        text_intermediate_size=28,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    ),
]
_COSMOS = {**_PIXELS, **_HEADS, "text_embed_dim": 20, "adaln_lora_dim": 6, "max_size": (4, 8, 8)}
_CONDITIONER = {"source_dim": 20, "model_dim": 16, "num_layers": 2, "num_attention_heads": 2, "target_vocab_size": 30}
ANIMA = [
    denoiser("anima", "CosmosTransformer3DModel", extra_pos_embed_type=None, **_COSMOS),
    denoiser("anima", "CosmosTransformer3DModel", extra_pos_embed_type="learnable", **_COSMOS),
    denoiser("anima", "AnimaTextConditioner", component="text_conditioner", target_dim=16, **_CONDITIONER),
    denoiser("anima", "AnimaTextConditioner", component="text_conditioner", target_dim=18, **_CONDITIONER),
    decoder("anima", "Qwen3Model", "Qwen3Config", "qwen3"),
]
_PIXART = {**_HEADS, "num_layers": 2, "cross_attention_dim": 24, "caption_channels": 20}
_SANA = {
    **_PIXART,
    "in_channels": 8,
    "out_channels": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 12,
    "sample_size": 8,
}
CROSSED = [
    denoiser("pixart", "PixArtTransformer2DModel", sample_size=8, **_PIXART),
    denoiser("pixart", "PixArtTransformer2DModel", sample_size=8, use_additional_conditions=True, **_PIXART),
    t5("pixart", "text_encoder"),
    denoiser("sana", "SanaTransformer2DModel", **_SANA),
    decoder("sana", "Gemma2Model", "Gemma2Config", "gemma"),
    denoiser("sana-sprint", "SanaTransformer2DModel", guidance_embeds=True, qk_norm="rms_norm_across_heads", **_SANA),
    decoder("sana-sprint", "Gemma2Model", "Gemma2Config", "gemma"),
    denoiser(
        "hidream",
        "HiDreamImageTransformer2DModel",
        patch_size=2,
        num_single_layers=2,
        caption_channels=[20, 22],
        text_emb_dim=10,
        num_routed_experts=3,
        axes_dims_rope=(8, 4),
        max_resolution=(8, 8),
        llama_layers=[0, 1],
        **_PIXELS,
        **_HEADS,
    ),
    clip("hidream", projection=True),
    clip("hidream", "text_encoder_2", projection=True),
    t5("hidream", "text_encoder_3"),
    decoder("hidream", "LlamaForCausalLM", "LlamaConfig", "llama", "text_encoder_4"),
]
TINY = [*WAN, *LTX, *STREAMS, *ANIMA, *CROSSED]
