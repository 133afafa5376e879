"""Stable Diffusion 1, 2 and XL: the UNet and the text encoders.

Sources: diffusers, models/unets/unet_2d_condition.py; CompVis/stable-diffusion and Stability-AI/generative-models,
openaimodel.py, for the names of checkpoints in one file; transformers, models/clip. kohya's flat names come from
diffusers' names in SD 1 and 2, and from the original ones in XL. In SD 1 `proj_in` and `proj_out` are
1x1 convolutions, in SD 2 and XL they are linear: the shape of the weight decides. ff.net.0.proj is GEGLU's
[value; gate]. CLIPTextModel has no `text_model.` in memory since transformers 5, while files and kohya's names have
it; CLIPTextModelWithProjection, the second encoder of XL, keeps it. The width of the text encoder tells SD 1 from SD 2.
"""

from loratool import Architecture, Conv2d, Embedding, Excluded, Fused, Labels, Linear, Match, Named, concat, hookimpl
from loratool_families.text_encoders import OPEN_CLIP, OPEN_CLIP_PROJECTION, clip

_TRANSFORMERS = ("(down_blocks|up_blocks).{i}.attentions.{j}", "mid_block.attentions.{j}")
_RESNETS = ("(down_blocks|up_blocks).{i}.resnets.{j}", "mid_block.resnets.{j}")
_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")  # UNet, text encoders
_KEYS, _TEXT = "attn2.to_k", "text_encoder:text_model.encoder.layers.{i}.self_attn.q_proj"
_Layers = tuple[Linear | Conv2d | Embedding | Excluded, ...]
_GEGLU = tuple(
    Fused(f"{block}.transformer_blocks.{{k}}.ff.net.0.proj", ("value", "gate"), concat(parts=2), component="unet")
    for block in _TRANSFORMERS
)


def _unet(projection: type[Linear | Conv2d]) -> _Layers:
    layers: list[Linear | Conv2d | Excluded] = []
    for block in _TRANSFORMERS:
        inner = block + ".transformer_blocks.{k}"
        layers += [
            Linear(f"{inner}.(attn1|attn2).(to_q|to_k|to_v|to_out.0)", "attention", ("q", "k", "v", "o"), "unet"),
            Linear(f"{inner}.ff.net.(0.proj|2)", "mlp", ("up", "down"), "unet"),
            projection(f"{block}.(proj_in|proj_out)", "projection", ("proj_in", "proj_out"), "unet"),
            Excluded(f"{inner}.(norm1|norm2|norm3)", "norm", component="unet"),
            Excluded(f"{block}.norm", "norm", component="unet"),
        ]
    for block in _RESNETS:
        layers += [
            Conv2d(f"{block}.(conv1|conv2)", "resnet", ("conv1", "conv2"), "unet"),
            Linear(f"{block}.time_emb_proj", "resnet", ("time",), "unet"),
            Excluded(f"{block}.(norm1|norm2)", "norm", component="unet"),
        ]
    layers += [
        # the channels never change in the middle, so mid_block has no shortcut
        Conv2d(f"{_RESNETS[0]}.conv_shortcut", "resnet", ("shortcut",), "unet"),
        Conv2d("down_blocks.{i}.downsamplers.0.conv", "resample", ("downsample",), "unet"),
        Conv2d("up_blocks.{i}.upsamplers.0.conv", "resample", ("upsample",), "unet"),
        Conv2d("(conv_in|conv_out)", "other", ("in", "out"), "unet"),
        Linear("time_embedding.(linear_1|linear_2)", "other", ("time1", "time2"), "unet"),
        Excluded("conv_norm_out", "norm", component="unet"),
    ]
    return tuple(layers)


_RESNET = "(in_layers.0|in_layers.2|emb_layers.1|out_layers.0|out_layers.3|skip_connection)"
_NET = "(norm1|conv1|time_emb_proj|norm2|conv2|conv_shortcut)"
#: Both have two resnets a block going down, and three going up.
_UNET = (
    "time_embed.(0|2) = time_embedding.(linear_1|linear_2)",
    "input_blocks.0.0 = conv_in",
    f"input_blocks.{{1+3*b+j, j<2}}.0.{_RESNET} = down_blocks.{{b}}.resnets.{{j}}.{_NET}",
    "input_blocks.{1+3*b+j, j<2}.1.** = down_blocks.{b}.attentions.{j}.**",
    "input_blocks.{3+3*b}.0.op = down_blocks.{b}.downsamplers.0.conv",
    f"middle_block.(0|2).{_RESNET} = mid_block.resnets.(0|1).{_NET}",
    "middle_block.1.** = mid_block.attentions.0.**",
    f"output_blocks.{{3*b+j, j<3}}.0.{_RESNET} = up_blocks.{{b}}.resnets.{{j}}.{_NET}",
    "output_blocks.{3*b+j, j<3}.1.** = up_blocks.{b}.attentions.{j}.**",
    "out.(0|2) = (conv_norm_out|conv_out)",
)
#: SD 1, 2 and the refiner of XL have no attention in the first block going up, so that its upsampler comes sooner.
_UPSAMPLERS = (
    "output_blocks.2.1.conv = up_blocks.0.upsamplers.0.conv",
    "output_blocks.{2+3*b, b>=1}.2.conv = up_blocks.{b}.upsamplers.0.conv",
)
_UPSAMPLERS_XL = ("output_blocks.{2+3*b}.2.conv = up_blocks.{b}.upsamplers.0.conv", _UPSAMPLERS[0])
_ADDED = "label_emb.0.(0|2) = add_embedding.(linear_1|linear_2)"


#: What checkpoints of one file hold besides: the VAE, an average of the weights, tables of the schedule, CLIP's scale.
_BESIDE = (
    *("first_stage_model.", "model_ema.", "denoiser.", "logvar"),
    *("betas", "alphas_cumprod", "sqrt_", "log_one_minus_", "posterior_"),
    *("cond_stage_model.model.logit_scale", "conditioner.embedders.1.model.logit_scale"),
    *("cond_stage_model.model.text_projection", "cond_stage_model.model.transformer.resblocks.23."),  # not in diffusers
)


def _denoiser(rules: tuple[str, ...], flat: str) -> Named:
    return Named("lora_unet", (), "diffusion_model.", ("model.diffusion_model.",), rules, flat)


def _family(name: str, match: Match, labels: Labels, layers: _Layers, named: dict[str, Named]) -> Architecture:
    return Architecture(
        name=name,
        match=match,
        layers=layers,
        default_targets=_TARGETS,
        fused=_GEGLU,
        prefixes={"text_encoder": ("text_model.",)},
        bare_in_memory=("text_encoder",),
        labels=labels,
        named=named,
        ignored=_BESIDE,
        component_classes={component: _MODELS[component] for component in named if component in _MODELS},
    )


_MODELS = {"text_encoder": ("CLIPTextModel",), "text_encoder_2": ("CLIPTextModelWithProjection",)}
_TYPES, _CLASSES = ("clip_text_model",), ("UNet2DConditionModel",)
STABLE_DIFFUSION = _family(
    "stable-diffusion",
    Match(
        _TYPES,
        _CLASSES,
        shapes=((_KEYS, "inp != 1024 and inp != 1280 and inp != 2048"),),
        metadata=("sd_v1", "sd_1", "stable-diffusion-v1"),
    ),
    Labels("sd_v1", "stable-diffusion-v1"),
    (*_unet(Conv2d), *clip("text_encoder")),
    {
        "unet": _denoiser((*_UNET, *_UPSAMPLERS), "canonical"),
        "text_encoder": Named(
            "lora_te", ("lora_te1",), "text_encoders.clip_l.transformer.", ("cond_stage_model.transformer.",)
        ),
    },
)
STABLE_DIFFUSION_2 = _family(
    "stable-diffusion-2",
    Match(
        _TYPES,
        _CLASSES,
        when="cross_attention_dim == 1024 or hidden_size == 1024",
        shapes=((_KEYS, "inp == 1024"), (_TEXT, "inp == 1024")),
        metadata=("sd_v2", "sd_2", "stable-diffusion-v2"),
    ),
    Labels("sd_v2", "stable-diffusion-v2", v2=True),
    (*_unet(Linear), *clip("text_encoder")),
    {
        "unet": _denoiser((*_UNET, *_UPSAMPLERS), "canonical"),
        "text_encoder": Named(
            "lora_te", ("lora_te1",), "text_encoders.clip_h.transformer.", ("cond_stage_model.model.",), OPEN_CLIP
        ),
    },
)
STABLE_DIFFUSION_XL = _family(
    "stable-diffusion-xl",
    Match(
        _TYPES,
        _CLASSES,
        when="cross_attention_dim == 2048 or addition_embed_type == 'text_time' or projection_dim == 1280",
        shapes=((_KEYS, "inp == 2048 or inp == 1280"), (_TEXT, "inp == 768 or inp == 1280")),  # base, refiner
        metadata=("sdxl_", "stable-diffusion-xl"),
    ),
    Labels("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    (
        *_unet(Linear),
        Linear("add_embedding.(linear_1|linear_2)", "other", ("add1", "add2"), "unet"),
        *clip("text_encoder"),
        *clip("text_encoder_2", projection=True),
    ),
    {
        "unet": _denoiser((*_UNET, _ADDED, *_UPSAMPLERS_XL), "native"),
        "text_encoder": Named(
            "lora_te1", (), "text_encoders.clip_l.transformer.", ("conditioner.embedders.0.transformer.",)
        ),
        "text_encoder_2": Named(
            "lora_te2",
            (),
            "text_encoders.clip_g.transformer.",
            ("conditioner.embedders.1.model.",),
            (*OPEN_CLIP, *OPEN_CLIP_PROJECTION),
        ),
    },
)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Stable Diffusion 1, 2 and XL: UNet and text encoders."""
    return [STABLE_DIFFUSION, STABLE_DIFFUSION_2, STABLE_DIFFUSION_XL]
