"""Krea 2: one stream of blocks with gated attention, and a small transformer that fuses the layers of the text encoder.

Sources: diffusers, models/transformers/transformer_krea2.py and loaders/single_file_utils.py; musubi-tuner and
ai-toolkit train it under its original names. The modulation of a block is a table of six rows, which the original keeps
as one row, without a rule here. No tool trains the text encoder, Qwen3-VL.
"""

from loratool import Architecture, Excluded, Labels, Linear, Match, Named, hookimpl

_C = "transformer"
_FUSION = "text_fusion.(layerwise_blocks|refiner_blocks).{i}"
_NORMS = "(attn.norm_q.weight|attn.norm_k.weight|norm1.weight|norm2.weight)"
_SCALES = "(attn.qknorm.qnorm.scale|attn.qknorm.knorm.scale|prenorm.scale|postnorm.scale)"
_GATED = "(to_q|to_k|to_v|to_out.0|to_gate)"
_PAIRS = (  # blocks of the original and of diffusers
    ("blocks.{i}", "transformer_blocks.{i}"),
    ("txtfusion.(layerwise_blocks|refiner_blocks).{i}", _FUSION),
)
_NATIVE = (
    *(f"{old}.attn.(wq|wk|wv|wo|gate) = {new}.attn.{_GATED}" for old, new in _PAIRS),
    *(f"{old}.mlp.(gate|up|down) = {new}.ff.(gate|up|down)" for old, new in _PAIRS),
    *(f"{old}.{_SCALES} = {new}.{_NORMS}" for old, new in _PAIRS),
    "txtfusion.projector = text_fusion.projector",
    "first = img_in",
    "tmlp.(0|2) = time_embed.(linear_1|linear_2)",
    "tproj.1 = time_mod_proj",
    "txtmlp.(0.scale|1|3) = txt_in.(norm.weight|linear_1|linear_2)",
    "last.(linear|norm.scale|modulation.lin) = final_layer.(linear|norm.weight|scale_shift_table)",
)
KREA2 = Architecture(
    name="krea2",
    match=Match(classes=("Krea2Transformer2DModel",), metadata=("krea2", "Krea-2")),
    layers=(
        Linear(f"transformer_blocks.{{i}}.attn.{_GATED}", "attention", ("q", "k", "v", "o", "gate"), _C),
        Linear(f"{_FUSION}.attn.{_GATED}", "attention", ("q", "k", "v", "o", "gate"), _C),
        Linear("transformer_blocks.{i}.ff.(gate|up|down)", "mlp", ("gate", "up", "down"), _C),
        Linear(f"{_FUSION}.ff.(gate|up|down)", "mlp", ("gate", "up", "down"), _C),
        Linear("text_fusion.projector", "projection", ("layers",), _C),
        Linear("img_in", "other", ("image",), _C),
        Linear("(txt_in|time_embed).(linear_1|linear_2)", "other", ("up", "down"), _C),
        Linear("time_mod_proj", "modulation", ("time",), _C),
        Linear("final_layer.linear", "head", ("out",), _C),
        Excluded("(transformer_blocks.{i}|final_layer).scale_shift_table", "modulation", component=_C),
    ),
    default_targets=("to_q", "to_k", "to_v", "to_out.0", "to_gate"),
    labels=Labels("krea2", "Krea-2"),
    named={
        _C: Named(
            "lora_unet",
            comfy="diffusion_model.",
            checkpoint=("model.diffusion_model.",),
            native=_NATIVE,
            flat="native",
        )
    },
    ignored=("vae.", "first_stage_model."),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Krea 2: the transformer."""
    return [KREA2]
