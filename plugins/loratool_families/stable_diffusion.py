"""Stable Diffusion 1, 2 and XL: the UNet in diffusers' names, and the text encoders.

Sources: diffusers, models/unets/unet_2d_condition.py; transformers, models/clip. In SD 1 `proj_in` and `proj_out` are
1x1 convolutions, in SD 2 and XL they are linear: the shape of the weight decides. ff.net.0.proj is GEGLU's
[value; gate]. CLIPTextModel has no `text_model.` in memory since transformers 5, while files and kohya's names have
it; CLIPTextModelWithProjection, the second encoder of XL, keeps it. The width of the text encoder tells SD 1 from SD 2.
"""

from loratool import Architecture, Conv2d, Embedding, Fused, Linear, Match, concat, hookimpl

_TRANSFORMERS = ("(down_blocks|up_blocks).{i}.attentions.{j}", "mid_block.attentions.{j}")
_RESNETS = ("(down_blocks|up_blocks).{i}.resnets.{j}", "mid_block.resnets.{j}")
_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")  # UNet, text encoders
_KEYS, _TEXT = "attn2.to_k", "text_encoder:text_model.encoder.layers.{i}.self_attn.q_proj"
_Layers = tuple[Linear | Conv2d | Embedding, ...]
_GEGLU = tuple(
    Fused(f"{block}.transformer_blocks.{{k}}.ff.net.0.proj", ("value", "gate"), concat(parts=2), component="unet")
    for block in _TRANSFORMERS
)


def _unet(projection: type[Linear | Conv2d]) -> _Layers:
    layers: list[Linear | Conv2d] = []
    for block in _TRANSFORMERS:
        inner = block + ".transformer_blocks.{k}"
        layers += [
            Linear(f"{inner}.(attn1|attn2).(to_q|to_k|to_v|to_out.0)", "attention", ("q", "k", "v", "o"), "unet"),
            Linear(f"{inner}.ff.net.(0.proj|2)", "mlp", ("up", "down"), "unet"),
            projection(f"{block}.(proj_in|proj_out)", "projection", ("proj_in", "proj_out"), "unet"),
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


def _clip(component: str) -> _Layers:
    layer = "text_model.encoder.layers.{i}"
    tables = "text_model.embeddings.(token_embedding|position_embedding)"
    return (
        Embedding(tables, "embedding", ("embed", "position"), component),
        Linear(f"{layer}.self_attn.(q_proj|k_proj|v_proj|out_proj)", "attention", ("q", "k", "v", "o"), component),
        Linear(f"{layer}.mlp.(fc1|fc2)", "mlp", ("up", "down"), component),
    )


def _family(name: str, match: Match, layers: _Layers, prefixes: tuple[tuple[str, str], ...]) -> Architecture:
    return Architecture(
        name=name,
        match=match,
        layers=layers,
        default_targets=_TARGETS,
        fused=_GEGLU,
        prefixes={"text_encoder": ("text_model.",)},
        bare_in_memory=("text_encoder",),
        kohya_prefixes={"unet": "lora_unet", **dict(prefixes)},
        component_classes={component: _MODELS[component] for component, _ in prefixes},
    )


_MODELS = {"text_encoder": ("CLIPTextModel",), "text_encoder_2": ("CLIPTextModelWithProjection",)}
_TYPES, _CLASSES = ("clip_text_model",), ("UNet2DConditionModel",)
STABLE_DIFFUSION = _family(
    "stable-diffusion",
    Match(_TYPES, _CLASSES, shapes=((_KEYS, "inp != 1024"),)),
    (*_unet(Conv2d), *_clip("text_encoder")),
    (("text_encoder", "lora_te"),),
)
STABLE_DIFFUSION_2 = _family(
    "stable-diffusion-2",
    Match(
        _TYPES,
        _CLASSES,
        when="cross_attention_dim == 1024 or hidden_size == 1024",
        shapes=((_KEYS, "inp == 1024"), (_TEXT, "inp == 1024")),
    ),
    (*_unet(Linear), *_clip("text_encoder")),
    (("text_encoder", "lora_te"),),
)
STABLE_DIFFUSION_XL = _family(
    "stable-diffusion-xl",
    Match(
        _TYPES,
        _CLASSES,
        when="cross_attention_dim == 2048 or addition_embed_type == 'text_time' or projection_dim == 1280",
        shapes=((_KEYS, "inp == 2048 or inp == 1280"), (_TEXT, "inp == 768 or inp == 1280")),  # base, refiner
    ),
    (
        *_unet(Linear),
        Linear("add_embedding.(linear_1|linear_2)", "other", ("add1", "add2"), "unet"),
        *_clip("text_encoder"),
        *_clip("text_encoder_2"),
        Linear("text_projection", "projection", ("projection",), "text_encoder_2"),
    ),
    (("text_encoder", "lora_te1"), ("text_encoder_2", "lora_te2")),
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Stable Diffusion 1, 2 and XL: UNet and text encoders."""
    return [STABLE_DIFFUSION, STABLE_DIFFUSION_2, STABLE_DIFFUSION_XL]
