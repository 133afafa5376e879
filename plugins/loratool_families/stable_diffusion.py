"""Stable Diffusion 1.x: the UNet in diffusers' names, and CLIP's text encoder.

Sources: diffusers, models/unets/unet_2d_condition.py; transformers, models/clip. In SD 1 `proj_in` and `proj_out` are
1x1 convolutions, in SD 2 they are linear: the shape of the weight decides. CLIPTextModel has no `text_model.` in
memory since transformers 5, while files and kohya's names have it.
"""

from loratool import Architecture, Conv2d, Embedding, Linear, Match, hookimpl

_TRANSFORMERS = ("(down_blocks|up_blocks).{i}.attentions.{j}", "mid_block.attentions.{j}")
_RESNETS = ("(down_blocks|up_blocks).{i}.resnets.{j}", "mid_block.resnets.{j}")


def _unet() -> tuple[Linear | Conv2d, ...]:
    layers: list[Linear | Conv2d] = []
    for block in _TRANSFORMERS:
        inner = block + ".transformer_blocks.{k}"
        layers += [
            Linear(f"{inner}.(attn1|attn2).(to_q|to_k|to_v|to_out.0)", "attention", ("q", "k", "v", "o"), "unet"),
            Linear(f"{inner}.ff.net.(0.proj|2)", "mlp", ("up", "down"), "unet"),
            Conv2d(f"{block}.(proj_in|proj_out)", "projection", ("proj_in", "proj_out"), "unet"),
        ]
    for block in _RESNETS:
        layers += [
            Conv2d(f"{block}.(conv1|conv2)", "resnet", ("conv1", "conv2"), "unet"),
            Linear(f"{block}.time_emb_proj", "resnet", ("time",), "unet"),
        ]
    layers += [
        # the channels never change in the middle, so mid_block has no shortcut
        Conv2d(f"{_RESNETS[0]}.conv_shortcut", "resnet", ("shortcut",), "unet"),
        Conv2d("down_blocks.{i}.downsamplers.0.conv", "resample", ("downsample",), "unet"),
        Conv2d("up_blocks.{i}.upsamplers.0.conv", "resample", ("upsample",), "unet"),
        Conv2d("(conv_in|conv_out)", "other", ("in", "out"), "unet"),
        Linear("time_embedding.(linear_1|linear_2)", "other", ("time1", "time2"), "unet"),
    ]
    return tuple(layers)


_CLIP = "text_model.encoder.layers.{i}"
STABLE_DIFFUSION = Architecture(
    name="stable-diffusion",
    match=Match(model_types=("clip_text_model",), classes=("UNet2DConditionModel",)),
    layers=(
        *_unet(),
        Embedding(
            "text_model.embeddings.(token_embedding|position_embedding)",
            "embedding",
            ("embed", "position"),
            "text_encoder",
        ),
        Linear(f"{_CLIP}.self_attn.(q_proj|k_proj|v_proj|out_proj)", "attention", ("q", "k", "v", "o"), "text_encoder"),
        Linear(f"{_CLIP}.mlp.(fc1|fc2)", "mlp", ("up", "down"), "text_encoder"),
    ),
    default_targets=("to_q", "to_k", "to_v", "to_out.0"),
    prefixes={"text_encoder": ("text_model.",)},
    bare_in_memory=("text_encoder",),
    kohya_prefixes={"unet": "lora_unet", "text_encoder": "lora_te"},
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Stable Diffusion 1.x, UNet and text encoder."""
    return [STABLE_DIFFUSION]
