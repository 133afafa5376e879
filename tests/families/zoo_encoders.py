"""Encoders, encoder-decoders, state-space models and image models (see zoo.py)."""

from typing import Any

from zoo import Tiny, tiny

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
}
DECODER = {"is_decoder": True, "add_cross_attention": True}
HEADS = ("Model", "ForMaskedLM", "ForMultipleChoice", "ForQuestionAnswering", "ForTokenClassification")
HEADS = (*HEADS, "ForSequenceClassification")


def heads(family: str, stem: str, classes: tuple[str, ...], sizes: dict[str, Any], **settings: Any) -> list[Tiny]:
    """One model of each class: BertModel, BertForMaskedLM, ..."""
    return [tiny(family, stem + cls, stem + "Config", **sizes, **settings) for cls in classes]


BERT = [
    *heads("bert", "Bert", (*HEADS, "ForPreTraining", "ForNextSentencePrediction"), SIZES),
    tiny("bert", "BertForMaskedLM", "BertConfig", **SIZES, tie_word_embeddings=False),
    tiny("bert", "BertLMHeadModel", "BertConfig", **SIZES, **DECODER),
    *heads("roberta", "Roberta", HEADS, SIZES),
    *heads("roberta", "XLMRoberta", HEADS, SIZES),
    *heads("roberta", "Camembert", HEADS, SIZES),
    *heads("roberta", "XLMRobertaXL", HEADS, SIZES),
    tiny("roberta", "RobertaForMaskedLM", "RobertaConfig", **SIZES, tie_word_embeddings=False),
    tiny("roberta", "RobertaForCausalLM", "RobertaConfig", **SIZES, **DECODER),
]
_SMALL = {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 24}
BERT += [
    *heads("distilbert", "DistilBert", HEADS, _SMALL),
    tiny("distilbert", "DistilBertForMaskedLM", "DistilBertConfig", **_SMALL, tie_word_embeddings=False),
]

_RELATIVE = {"relative_attention": True, "max_relative_positions": 6, "pos_att_type": ["c2p", "p2c"]}
_WIDE = {"embedding_size": 24, "type_vocab_size": 2}  # more modules: embed_proj, token_type_embeddings
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
DEBERTA = [
    *heads("deberta", "Deberta", tuple(h for h in HEADS if h != "ForMultipleChoice"), SIZES, **_RELATIVE),
    tiny("deberta", "DebertaForMaskedLM", "DebertaConfig", **SIZES, **_RELATIVE, **_WIDE, talking_head=True),
    tiny("deberta", "DebertaForMaskedLM", "DebertaConfig", **SIZES, **_RELATIVE, legacy=False),
    *heads("deberta-v2", "DebertaV2", HEADS, SIZES, **_RELATIVE, share_att_key=True, position_buckets=8),
    tiny("deberta-v2", "DebertaV2ForMaskedLM", "DebertaV2Config", **SIZES, **_RELATIVE, **_WIDE, conv_kernel_size=3),
    tiny("deberta-v2", "DebertaV2ForMaskedLM", "DebertaV2Config", **SIZES, **_RELATIVE, legacy=False),
    *heads("modernbert", "ModernBert", HEADS, SIZES, **_TOKENS, global_attn_every_n_layers=2),
]

_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}
_T5 = {**_T5, "num_decoder_layers": 3, "decoder_start_token_id": 0}
_T5_HEADS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "Model",
    "EncoderModel",
    "ForConditionalGeneration",
    "ForQuestionAnswering",
)
_BART = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_BART_HEADS = ("Model", "ForConditionalGeneration", "ForCausalLM", "ForQuestionAnswering", "ForSequenceClassification")
_SPEECH = {
    **{name: size for name, size in _BART.items() if name != "max_position_embeddings"},
    "num_mel_bins": 10,
    "max_source_positions": 12,
    "max_target_positions": 14,
    "classifier_proj_size": 20,
    "begin_suppress_tokens": None,
}
SEQUENCES = [
    *heads("t5", "T5", _T5_HEADS, _T5),
    *heads("t5", "MT5", _T5_HEADS, _T5),
    *heads("t5", "UMT5", _T5_HEADS, _T5),
    *heads("bart", "Bart", _BART_HEADS, _BART),
    *heads("bart", "MBart", _BART_HEADS, _BART),
    *heads("bart", "PLBart", ("Model", "ForConditionalGeneration", "ForSequenceClassification"), _BART),
    *heads("bart", "Marian", ("Model", "MTModel", "ForCausalLM"), _BART),
    *heads("bart", "Pegasus", ("Model", "ForConditionalGeneration", "ForCausalLM"), _BART),
    *heads("bart", "Blenderbot", ("Model", "ForConditionalGeneration"), _BART),
    *heads("bart", "BlenderbotSmall", ("Model", "ForConditionalGeneration"), _BART),
    *heads("bart", "M2M100", ("Model", "ForConditionalGeneration"), _BART),
    tiny("bart", "BartForConditionalGeneration", "BartConfig", **_BART, tie_word_embeddings=False),
    *heads("whisper", "Whisper", ("Model", "ForConditionalGeneration", "ForCausalLM"), _SPEECH),
    tiny("whisper", "WhisperForConditionalGeneration", "WhisperConfig", **_SPEECH, tie_word_embeddings=False),
    tiny("whisper", "WhisperForAudioClassification", "WhisperConfig", **_SPEECH, use_weighted_layer_sum=True),
]

_STATE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "state_size": 6,
    "num_hidden_layers": 2,
    "conv_kernel": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEADS2 = {**_STATE, "expand": 3, "num_heads": 12, "head_dim": 8, "n_groups": 2}
_RWKV = {"vocab_size": 64, "hidden_size": 32, "attention_hidden_size": 40, "intermediate_size": 48}
_RWKV = {**_RWKV, "num_hidden_layers": 2, "context_length": 16}
RECURRENT = [
    *heads("mamba", "Mamba", ("Model", "ForCausalLM"), _STATE, time_step_rank=5),
    *heads("mamba", "FalconMamba", ("Model", "ForCausalLM"), _STATE, time_step_rank=5),
    tiny("mamba", "MambaForCausalLM", "MambaConfig", **_STATE, tie_word_embeddings=False),
    *heads("mamba2", "Mamba2", ("Model", "ForCausalLM"), _HEADS2),
    tiny("mamba2", "Mamba2ForCausalLM", "Mamba2Config", **_HEADS2, tie_word_embeddings=True),
    *heads("rwkv", "Rwkv", ("Model", "ForCausalLM"), _RWKV),
    tiny("rwkv", "RwkvForCausalLM", "RwkvConfig", **_RWKV, tie_word_embeddings=True),
]

_IMAGE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_IMAGE = {**_IMAGE, "image_size": 16, "patch_size": 8}
_PATCHES = {**{name: size for name, size in _IMAGE.items() if name != "image_size"}, "num_patches": 9}
_LABELS = ("Model", "ForImageClassification")
_TEXT = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_PAIR = {"text_config": _TEXT, "vision_config": _IMAGE}
_PAIR2 = {"text_config": {**_TEXT, "projection_size": 32}, "vision_config": _PATCHES}
IMAGES = [
    *heads("vit", "ViT", _LABELS, _IMAGE),
    *heads("vit", "ViTMSN", _LABELS, _IMAGE),
    tiny("vit", "ViTForMaskedImageModeling", "ViTConfig", **_IMAGE, encoder_stride=8),
    *heads("deit", "DeiT", (*_LABELS, "ForImageClassificationWithTeacher"), _IMAGE),
    tiny("deit", "DeiTForMaskedImageModeling", "DeiTConfig", **_IMAGE, encoder_stride=8),
    *heads("beit", "Beit", _LABELS, _IMAGE, use_shared_relative_position_bias=True),
    *heads("beit", "Beit", _LABELS, _IMAGE, use_relative_position_bias=True, use_absolute_position_embeddings=True),
    tiny("beit", "BeitForMaskedImageModeling", "BeitConfig", **_IMAGE, vocab_size=40, use_mask_token=True),
    *heads("dinov2", "Dinov2", (*_LABELS, "Backbone"), _IMAGE),
    *heads("dinov2-with-registers", "Dinov2WithRegisters", (*_LABELS, "Backbone"), _IMAGE),
    tiny("dinov2", "Dinov2Model", "Dinov2Config", **_IMAGE, use_swiglu_ffn=True),
    tiny(
        "dinov2-with-registers", "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **_IMAGE, use_swiglu_ffn=True
    ),
    *heads("clip", "CLIP", _LABELS, _PAIR, projection_dim=20),
    tiny("clip", "CLIPVisionModel", "CLIPVisionConfig", **_IMAGE),
    tiny("clip", "CLIPVisionModelWithProjection", "CLIPVisionConfig", **_IMAGE, projection_dim=20),
    *heads("siglip", "Siglip", _LABELS, {**_PAIR2, "vision_config": _IMAGE}),
    tiny("siglip", "SiglipVisionModel", "SiglipVisionConfig", **_IMAGE),
    *heads("siglip2", "Siglip2", _LABELS, _PAIR2),
    tiny("siglip2", "Siglip2VisionModel", "Siglip2VisionConfig", **_PATCHES),
]


def unet(family: str, **settings: Any) -> Tiny:
    """A UNet with a shortcut, a sampler and a transformer on each way."""
    sizes = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 4,
        "norm_num_groups": 4,
        **settings,
    }
    return tiny(family, "UNet2DConditionModel", component="unet", library="diffusers", **sizes)


_XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 30,
    "use_linear_projection": True,
}
_NARROW = {**_TEXT, "num_hidden_layers": 1, "intermediate_size": 20}
DIFFUSION = [
    unet("stable-diffusion", cross_attention_dim=24),
    unet("stable-diffusion", cross_attention_dim=768, layers_per_block=2),
    tiny("stable-diffusion", "CLIPTextModel", "CLIPTextConfig", component="text_encoder", **_TEXT),
    unet("stable-diffusion-2", cross_attention_dim=1024, use_linear_projection=True, attention_head_dim=(4, 8)),
    tiny(
        "stable-diffusion-2",
        "CLIPTextModel",
        "CLIPTextConfig",
        component="text_encoder",
        **{**_NARROW, "hidden_size": 1024},
    ),
    unet("stable-diffusion-xl", cross_attention_dim=2048, **_XL),
    unet("stable-diffusion-xl", cross_attention_dim=1280, **_XL),  # the refiner
    tiny(
        "stable-diffusion-xl",
        "CLIPTextModelWithProjection",
        "CLIPTextConfig",
        component="text_encoder_2",
        **_TEXT,
        projection_dim=1280,
    ),
]

TINY = [*BERT, *DEBERTA, *SEQUENCES, *RECURRENT, *IMAGES, *DIFFUSION]
