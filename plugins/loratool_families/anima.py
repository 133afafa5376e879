"""Anima and Cosmos-Predict2: a video transformer, and for Anima an adapter between its two text encoders.

Sources: diffusers, models/transformers/transformer_cosmos.py, models/condition_embedders/condition_embedder_anima.py
and scripts/convert_anima_to_diffusers.py; sd-scripts, library/anima_models.py and networks/lora_anima.py. What is the
text conditioner in diffusers is `llm_adapter`, a part of the transformer, in other tools. The text encoder is Qwen 3.
"""

from loratool import Architecture, Embedding, Excluded, Labels, Linear, Match, Named, hookimpl
from loratool_families.text_encoders import decoder

_C, _CONDITIONER, _TEXT = "transformer", "text_conditioner", "text_encoder"
_BLOCK, _ROLES = "transformer_blocks.{i}", ("q", "k", "v", "o")
_NATIVE = (
    f"blocks.{{i}}.(self|cross)_attn.(q_proj|k_proj|v_proj|output_proj|q_norm|k_norm) = "
    f"{_BLOCK}.(attn1|attn2).(to_q|to_k|to_v|to_out.0|norm_q|norm_k)",
    f"blocks.{{i}}.mlp.(layer1|layer2) = {_BLOCK}.ff.net.(0.proj|2)",
    f"blocks.{{i}}.adaln_modulation_(self_attn|cross_attn|mlp).(1|2) = "
    f"{_BLOCK}.(norm1|norm2|norm3).(linear_1|linear_2)",
    "x_embedder.proj.1 = patch_embed.proj",
    "t_embedder.1.(linear_1|linear_2) = time_embed.t_embedder.(linear_1|linear_2)",
    "t_embedding_norm = time_embed.norm",
    "final_layer.adaln_modulation.(1|2) = norm_out.(linear_1|linear_2)",
    "final_layer.linear = proj_out",
)
ANIMA = Architecture(
    name="anima",
    match=Match(
        classes=("CosmosTransformer3DModel", "AnimaTextConditioner"),
        shapes=((f"{_BLOCK}.attn2.to_k", "inp != out"),),  # the text is narrower than the image
        metadata=("anima", "Anima"),
    ),
    layers=(
        Linear(f"{_BLOCK}.(attn1|attn2).(to_q|to_k|to_v|to_out.0)", "attention", _ROLES, _C),
        Linear(f"{_BLOCK}.ff.net.(0.proj|2)", "mlp", ("up", "down"), _C),
        Linear(f"{_BLOCK}.(norm1|norm2|norm3).(linear_1|linear_2)", "modulation", ("down", "up"), _C),
        Linear("patch_embed.proj", "other", ("patch",), _C),
        Linear("time_embed.t_embedder.(linear_1|linear_2)", "other", ("up", "down"), _C),
        Linear("norm_out.(linear_1|linear_2)", "modulation", ("down", "up"), _C),
        Linear("proj_out", "head", ("out",), _C),
        Excluded("learnable_pos_embed.(pos_emb_t|pos_emb_h|pos_emb_w)", "position", component=_C),
        Linear("blocks.{i}.(self_attn|cross_attn).(q_proj|k_proj|v_proj|o_proj)", "attention", _ROLES, _CONDITIONER),
        Linear("blocks.{i}.mlp.(0|2)", "mlp", ("up", "down"), _CONDITIONER),
        Linear("(in_proj|out_proj)", "projection", ("in", "out"), _CONDITIONER),
        Embedding("embed", "embedding", ("embed",), _CONDITIONER),
        *decoder(_TEXT),
    ),
    default_targets=("to_q", "to_k", "to_v", "to_out.0"),
    aliases=("model.** = **",),  # files of the text encoder have it, the module in the pipeline does not
    labels=Labels("anima", "Anima"),
    named={
        _C: Named(
            "lora_unet",
            comfy="diffusion_model.",
            checkpoint=("model.diffusion_model.", "net."),
            native=_NATIVE,
            flat="native",
        ),
        _CONDITIONER: Named(
            "lora_unet_llm_adapter",
            comfy="diffusion_model.llm_adapter.",
            checkpoint=("model.diffusion_model.llm_adapter.", "net.llm_adapter."),
        ),
        _TEXT: Named("lora_te", comfy="text_encoders.qwen3_06b.transformer.model.", borrowed=True),
    },
    ignored=("vae.", "first_stage_model."),
    component_classes={_C: ("CosmosTransformer3DModel",), _CONDITIONER: ("AnimaTextConditioner",)},
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Anima: transformer, text conditioner and text encoder."""
    return [ANIMA]
