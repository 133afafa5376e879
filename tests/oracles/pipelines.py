"""Tiny pipelines of diffusers, their checkpoints of one file, and adapters for them, made without loratool.

Checkpoints of one file are written by a few loops over the models' authors' names; that diffusers' own converters give
back what went in is checked by the tests before anything is merged into them.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.loaders import single_file_utils

State = dict[str, torch.Tensor]
_UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
_XL = {
    "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 72,
    "use_linear_projection": True,
}
_FLUX = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 24,
    "axes_dims_rope": (2, 2, 4),
    "guidance_embeds": True,
}


def _clip(width: int, *, projection: bool = False) -> Any:
    sizes = {"vocab_size": 32, "intermediate_size": 20, "num_attention_heads": 4, "max_position_embeddings": 16}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "projection_dim": width}
    layers = 1 if width > 100 else 2
    config = transformers.CLIPTextConfig(hidden_size=width, num_hidden_layers=layers, **sizes, **special)
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def build(kind: str, scratch: Path) -> Any:
    """Return a tiny pipeline, "sd", "xl" or "flux", equal in every call."""
    torch.manual_seed(0)
    scratch.mkdir(exist_ok=True)
    words = ["<|startoftext|>", "<|endoftext|>", *"abcdefgh", *(f"{c}</w>" for c in "abcdefgh")]
    (scratch / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (scratch / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(scratch / "vocab.json"), str(scratch / "merges.txt"))
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    common = {"vae": vae, "tokenizer": tokenizer}
    if kind == "sd":
        unet = diffusers.UNet2DConditionModel(layers_per_block=2, **_UNET)
        extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        scheduler = diffusers.DDIMScheduler()
        return diffusers.StableDiffusionPipeline(
            unet=unet, text_encoder=_clip(24), scheduler=scheduler, **common, **extra
        )
    if kind == "xl":
        return diffusers.StableDiffusionXLPipeline(
            unet=diffusers.UNet2DConditionModel(layers_per_block=2, **{**_UNET, **_XL}),
            text_encoder=_clip(768),
            text_encoder_2=_clip(1280, projection=True),
            tokenizer_2=tokenizer,
            scheduler=diffusers.DDIMScheduler(),
            **common,
        )
    sizes = {"vocab_size": 32, "d_model": 24, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(**_FLUX),
        text_encoder=_clip(24),
        text_encoder_2=transformers.T5EncoderModel(transformers.T5Config(feed_forward_proj="gated-gelu", **sizes)),
        tokenizer_2=tokenizer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        **common,
    )


def models(pipe: Any) -> dict[str, Any]:
    """The models of a pipeline that adapters are for."""
    names = ("unet", "transformer", "text_encoder", "text_encoder_2")
    return {name: model for name in names if (model := getattr(pipe, name, None)) is not None}


# -- one file ---------------------------------------------------------------------------------------------------------


def single_file(pipe: Any) -> State:
    """Return a pipeline's weights under the names of checkpoints of one file."""
    vae = {f"first_stage_model.{n}": w for n, w in pipe.vae.state_dict().items()}
    if hasattr(pipe, "transformer"):
        return {f"model.diffusion_model.{n}": w for n, w in _flux(pipe.transformer.state_dict()).items()} | {
            f"vae.{n}": w for n, w in pipe.vae.state_dict().items()
        }
    unet = {f"model.diffusion_model.{n}": w for n, w in _ldm_unet(pipe.unet).items()}
    clip = {n if n.startswith("text_") else f"text_model.{n}": w for n, w in pipe.text_encoder.state_dict().items()}
    if not hasattr(pipe, "text_encoder_2"):
        texts = {f"cond_stage_model.transformer.{n}": w for n, w in clip.items()}
        texts |= {
            "betas": torch.ones(4),
            "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(16),
        }
        return unet | texts | vae
    texts = {f"conditioner.embedders.0.transformer.{n}": w for n, w in clip.items()}
    two = {f"conditioner.embedders.1.model.{n}": w for n, w in _open_clip(pipe.text_encoder_2.state_dict()).items()}
    two |= {"conditioner.embedders.1.model.logit_scale": torch.tensor(4.6)}
    return unet | texts | two | vae


def diffusers_names(pipe: Any, tensors: State) -> dict[str, State]:
    """Return what diffusers' own converters make of a checkpoint of one file, by component."""
    if hasattr(pipe, "transformer"):
        source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
        scope = dict(vars(single_file_utils))
        exec(source.replace("inner_dim = 3072", f"inner_dim = {pipe.transformer.inner_dim}"), scope)
        own = {n.removeprefix("model.diffusion_model."): w for n, w in tensors.items() if n.startswith("model.")}
        return {"transformer": scope["convert_flux_transformer_checkpoint_to_diffusers"](own)}
    found = {"unet": single_file_utils.convert_ldm_unet_checkpoint(dict(tensors), dict(pipe.unet.config))}
    start = (
        "cond_stage_model.transformer."
        if not hasattr(pipe, "text_encoder_2")
        else "conditioner.embedders.0.transformer."
    )
    found["text_encoder"] = {
        n.removeprefix(start): w for n, w in tensors.items() if n.startswith(start) and not n.endswith("position_ids")
    }
    if hasattr(pipe, "text_encoder_2"):
        own = dict(tensors)
        found["text_encoder_2"] = single_file_utils.convert_open_clip_checkpoint(
            pipe.text_encoder_2, own, "conditioner.embedders.1.model."
        )
        found["text_encoder_2"].pop("text_model.embeddings.position_ids", None)
    return found


def _ldm_unet(unet: Any) -> State:
    """Rename a UNet of two blocks, with two resnets each going down and three going up, as CompVis' code has it."""
    places = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    places |= {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}
    places |= {"mid_block.resnets.1": "middle_block.2", "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op"}
    for block in (0, 1):
        for n in range(2):
            places[f"down_blocks.{block}.resnets.{n}"] = f"input_blocks.{1 + 3 * block + n}.0"
            places[f"down_blocks.{block}.attentions.{n}"] = f"input_blocks.{1 + 3 * block + n}.1"
        for n in range(3):
            places[f"up_blocks.{block}.resnets.{n}"] = f"output_blocks.{3 * block + n}.0"
            places[f"up_blocks.{block}.attentions.{n}"] = f"output_blocks.{3 * block + n}.1"
    attends = any(n.startswith("up_blocks.0.attentions") for n in unet.state_dict())
    places["up_blocks.0.upsamplers.0.conv"] = f"output_blocks.2.{2 if attends else 1}.conv"
    for ours, theirs in (("time_embedding", "time_embed"), ("add_embedding", "label_emb.0")):
        places |= {f"{ours}.linear_1": f"{theirs}.0", f"{ours}.linear_2": f"{theirs}.2"}
    inner = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
    inner |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    found = {}
    for name, weight in unet.state_dict().items():
        start = max((p for p in places if name.startswith(f"{p}.")), key=len)
        rest = name[len(start) + 1 :]
        if "resnets" in start:
            part, _, leaf = rest.rpartition(".")
            rest = f"{inner[part]}.{leaf}"
        found[f"{places[start]}.{rest}"] = weight
    return found


def _open_clip(state: State) -> State:
    """Name the weights of CLIP as open_clip does: q, k and v in one parameter, the projection transposed."""
    state = {n.removeprefix("text_model."): w for n, w in state.items()}
    found = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T.contiguous(),
    }
    names = {"self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    names |= {"layer_norm1": "ln_1", "layer_norm2": "ln_2"}
    for leaf in ("weight", "bias"):
        qkv = [state[f"encoder.layers.0.self_attn.{x}_proj.{leaf}"] for x in "qkv"]
        found[f"transformer.resblocks.0.attn.in_proj_{leaf}"] = torch.cat(qkv)
        for ours, theirs in names.items():
            found[f"transformer.resblocks.0.{theirs}.{leaf}"] = state[f"encoder.layers.0.{ours}.{leaf}"]
    return found


def _flux(state: State) -> State:
    """Name the weights of Flux as Black Forest Labs do."""
    whole = {"x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear"}
    for ours, theirs in (
        ("timestep_embedder", "time_in"),
        ("text_embedder", "vector_in"),
        ("guidance_embedder", "guidance_in"),
    ):
        whole |= {f"time_text_embed.{ours}.linear_1": f"{theirs}.in_layer"}
        whole |= {f"time_text_embed.{ours}.linear_2": f"{theirs}.out_layer"}
    fused: dict[str, tuple[str, ...]] = {}
    for n in range(2):
        block, single = f"transformer_blocks.{n}", f"single_transformer_blocks.{n}"
        for stream, norm, ff, out in (
            ("img", "norm1", "ff", "to_out.0"),
            ("txt", "norm1_context", "ff_context", "to_add_out"),
        ):
            whole[f"{block}.{norm}.linear"] = f"double_blocks.{n}.{stream}_mod.lin"
            whole[f"{block}.{ff}.net.0.proj"] = f"double_blocks.{n}.{stream}_mlp.0"
            whole[f"{block}.{ff}.net.2"] = f"double_blocks.{n}.{stream}_mlp.2"
            whole[f"{block}.attn.{out}"] = f"double_blocks.{n}.{stream}_attn.proj"
        fused[f"double_blocks.{n}.img_attn.qkv"] = tuple(f"{block}.attn.to_{x}" for x in "qkv")
        fused[f"double_blocks.{n}.txt_attn.qkv"] = tuple(f"{block}.attn.add_{x}_proj" for x in "qkv")
        fused[f"single_blocks.{n}.linear1"] = (*(f"{single}.attn.to_{x}" for x in "qkv"), f"{single}.proj_mlp")
        whole |= {
            f"{single}.proj_out": f"single_blocks.{n}.linear2",
            f"{single}.norm.linear": f"single_blocks.{n}.modulation.lin",
        }
        for x, word in (("q", "query"), ("k", "key")):
            found = {f"{block}.attn.norm_{x}": "img_attn", f"{block}.attn.norm_added_{x}": "txt_attn"}
            whole |= {ours: f"double_blocks.{n}.{theirs}.norm.{word}_norm" for ours, theirs in found.items()}
            whole[f"{single}.attn.norm_{x}"] = f"single_blocks.{n}.norm.{word}_norm"
    tensors = {}
    for ours, theirs in whole.items():
        for leaf in ("weight", "bias"):
            if f"{ours}.{leaf}" in state:
                tensors[f"{theirs}.{leaf.replace('weight', 'scale') if theirs.endswith('_norm') else leaf}"] = state[
                    f"{ours}.{leaf}"
                ]
    for theirs, parts in fused.items():
        for leaf in ("weight", "bias"):
            tensors[f"{theirs}.{leaf}"] = torch.cat([state[f"{part}.{leaf}"] for part in parts])
    for leaf in ("weight", "bias"):
        scale, shift = state[f"norm_out.linear.{leaf}"].chunk(2)
        tensors[f"final_layer.adaLN_modulation.1.{leaf}"] = torch.cat([shift, scale])
    return tensors


# -- adapters ---------------------------------------------------------------------------------------------------------


def factors(model: Any, words: tuple[str, ...], rank: int, seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return random (down, up) for the modules of a model whose paths contain one of `words`."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and any(word in name for word in words):
            shape = module.weight.shape
            down = torch.randn(rank, *shape[1:], generator=generator) * 0.3
            up = torch.randn(shape[0], rank, *(1,) * (len(shape) - 2), generator=generator) * 0.3
            found[name] = down, up
    return found


def add(state: State, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], scaling: float) -> State:
    """Return a model's weights with scaling * up @ down added, in fp64."""
    merged = dict(state)
    for name, (down, up) in pairs.items():
        key = f"{name}.weight"
        delta = up.double().flatten(1) @ down.double().flatten(1)
        merged[key] = (state[key].double() + scaling * delta.reshape(state[key].shape)).float()
    return merged


def kohya(prefix: str, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], alpha: float) -> State:
    """Return factors under sd-scripts' flat names."""
    tensors = {}
    for name, (down, up) in pairs.items():
        flat = f"{prefix}_{name.replace('.', '_')}"
        tensors |= {
            f"{flat}.lora_down.weight": down,
            f"{flat}.lora_up.weight": up,
            f"{flat}.alpha": torch.tensor(alpha),
        }
    return tensors


def in_diffusers(component: str, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> State:
    """Return factors under diffusers' names; the scaling is 1."""
    named = {f"{component}.{name}": pair for name, pair in pairs.items()}
    return {f"{name}.lora_{x}.weight": pair[n] for name, pair in named.items() for n, x in enumerate("AB")}
