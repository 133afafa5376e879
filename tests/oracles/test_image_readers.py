"""What ComfyUI, sd-scripts and LyCORIS find in our files: their rules for names and shapes, and LyCORIS itself.

ComfyUI walks a map from names in files to weights of its model (comfy/lora.py: model_lora_keys_unet and _clip); a name
that is not in it is logged and lost. sd-scripts flattens the names of the modules that it built and looks those up;
what else is in a file is lost without a word (networks/lora.py, lora_flux.py: create_network_from_weights). So every
name must be in these sets, written out here, and every pair of factors must fit the weight.
"""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool

H = 16  # the width of a model, its MLP four times as wide
FLUX = {  # black-forest-labs/flux: name -> (out, in)
    r"double_blocks\.\d+\.(img|txt)_attn\.qkv": (3 * H, H),
    r"double_blocks\.\d+\.(img|txt)_attn\.proj": (H, H),
    r"double_blocks\.\d+\.(img|txt)_mlp\.0": (4 * H, H),
    r"double_blocks\.\d+\.(img|txt)_mlp\.2": (H, 4 * H),
    r"double_blocks\.\d+\.(img|txt)_mod\.lin": (6 * H, H),
    r"single_blocks\.\d+\.linear1": (7 * H, H),
    r"single_blocks\.\d+\.linear2": (H, 5 * H),
    r"single_blocks\.\d+\.modulation\.lin": (3 * H, H),
    r"(time|vector|guidance)_in\.(in|out)_layer": (H, H),
    r"(img|txt)_in": (H, H),
    r"final_layer\.linear": (H, H),
    r"final_layer\.adaLN_modulation\.1": (2 * H, H),
}
FLUX_PARTS = {  # diffusers: name -> (out, in)
    **{f"transformer_blocks.0.attn.{n}": (H, H) for n in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")},
    **{f"transformer_blocks.0.attn.add_{n}_proj": (H, H) for n in "qkv"},
    **{f"transformer_blocks.0.{ff}.net.0.proj": (4 * H, H) for ff in ("ff", "ff_context")},
    **{f"transformer_blocks.0.{ff}.net.2": (H, 4 * H) for ff in ("ff", "ff_context")},
    **{f"transformer_blocks.0.{n}.linear": (6 * H, H) for n in ("norm1", "norm1_context")},
    **{f"single_transformer_blocks.0.attn.to_{n}": (H, H) for n in "qkv"},
    "single_transformer_blocks.0.proj_mlp": (4 * H, H),
    "single_transformer_blocks.0.proj_out": (H, 5 * H),
    "single_transformer_blocks.0.norm.linear": (3 * H, H),
    **{f"time_text_embed.{n}_embedder.linear_1": (H, H) for n in ("timestep", "text", "guidance")},
    "x_embedder": (H, H),
    "context_embedder": (H, H),
    "proj_out": (H, H),
    "norm_out.linear": (2 * H, H),
}
SD3 = {
    r"joint_blocks\.\d+\.(x|context)_block\.attn2?\.qkv": (3 * H, H),
    r"joint_blocks\.\d+\.(x|context)_block\.attn2?\.proj": (H, H),
    r"joint_blocks\.\d+\.(x|context)_block\.mlp\.fc1": (4 * H, H),
    r"joint_blocks\.\d+\.(x|context)_block\.mlp\.fc2": (H, 4 * H),
    r"joint_blocks\.\d+\.(x|context)_block\.adaLN_modulation\.1": (6 * H, H),
}
SD3_PARTS = {n: s for n, s in FLUX_PARTS.items() if n.startswith("transformer_blocks.")}
Z = {
    r"(layers|noise_refiner|context_refiner)\.\d+\.attention\.qkv": (3 * H, H),
    r"(layers|noise_refiner|context_refiner)\.\d+\.attention\.out": (H, H),
    r"layers\.\d+\.feed_forward\.w(1|3)": (4 * H, H),
    r"layers\.\d+\.feed_forward\.w2": (H, 4 * H),
    r"layers\.\d+\.adaLN_modulation\.0": (4 * H, H),
    r"final_layer\.linear": (H, H),
    r"x_embedder": (H, H),
}
Z_PARTS = {
    **{f"{b}.0.attention.to_{n}": (H, H) for n in ("q", "k", "v", "out.0") for b in ("layers", "noise_refiner")},
    **{f"layers.0.feed_forward.{n}": (4 * H, H) for n in ("w1", "w3")},
    "layers.0.feed_forward.w2": (H, 4 * H),
    "layers.0.adaLN_modulation.0": (4 * H, H),
    "all_final_layer.2-1.linear": (H, H),
    "all_x_embedder.2-1": (H, H),
}
WAN = {
    r"blocks\.\d+\.(self|cross)_attn\.(q|k|v|o)": (H, H),
    r"blocks\.\d+\.cross_attn\.(k|v)_img": (H, H),
    r"blocks\.\d+\.ffn\.0": (4 * H, H),
    r"blocks\.\d+\.ffn\.2": (H, 4 * H),
    r"(time|text)_embedding\.(0|2)": (H, H),
    r"time_projection\.1": (6 * H, H),
    r"head\.head": (H, H),
}
WAN_PARTS = {
    **{f"blocks.0.{a}.to_{n}": (H, H) for n in ("q", "k", "v", "out.0") for a in ("attn1", "attn2")},
    **{f"blocks.0.attn2.add_{n}_proj": (H, H) for n in "kv"},
    "blocks.0.ffn.net.0.proj": (4 * H, H),
    "blocks.0.ffn.net.2": (H, 4 * H),
    **{f"condition_embedder.{n}_embedder.linear_{i}": (H, H) for n in ("time", "text") for i in (1, 2)},
    "condition_embedder.time_proj": (6 * H, H),
    "proj_out": (H, H),
}
CLIP = {
    f"text_model.encoder.layers.0.{n}": (H, H)
    for n in (*(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")), "mlp.fc1")
}
MODELS = {
    "flux": (FLUX, FLUX_PARTS, {"text_encoder": ("clip_l", "te1")}),
    "stable-diffusion-3": (SD3, SD3_PARTS, {"text_encoder": ("clip_l", "te1"), "text_encoder_2": ("clip_g", "te2")}),
    "z-image": (Z, Z_PARTS, {}),
    "wan": (WAN, WAN_PARTS, {}),
}
ENDINGS = {"comfy": ("lora_A.weight", "lora_B.weight"), "kohya": ("lora_down.weight", "lora_up.weight")}


def source(parts, encoders, *, alpha=2.0):
    """The tensors of diffusers' file, where all parts have factors of their own, at half strength."""
    tensors, generator = {}, torch.Generator().manual_seed(0)
    for start, shapes in (("transformer", parts), *((c, CLIP) for c in encoders)):
        for name, (out, inside) in shapes.items():
            tensors[f"{start}.{name}.lora_A.weight"] = torch.randn(4, inside, generator=generator)
            tensors[f"{start}.{name}.lora_B.weight"] = torch.randn(out, 4, generator=generator)
    fields = [f'"{c}.{n}": {v}' for c in ("transformer", *encoders) for n, v in (("r", 4), ("lora_alpha", alpha))]
    return tensors, {"lora_adapter_metadata": "{" + ", ".join(fields) + "}"}


def accepted(native, encoders, to):
    """Patterns of the module names that a tool looks up, and the shape of the weight under each."""
    for pattern, shape in native.items():
        flat = pattern.replace(r"\.", "_")
        yield (rf"diffusion_model\.{pattern}" if to == "comfy" else f"lora_unet_{flat}"), shape
    for comfy, kohya in encoders.values():
        for name, shape in CLIP.items():
            dotted = re.escape(f"text_encoders.{comfy}.transformer.{name}")
            yield (dotted if to == "comfy" else f"lora_{kohya}_{name.replace('.', '_')}"), shape


# kohya's names of Z-Image are musubi-tuner's, which are diffusers' (see tests/families)
@pytest.mark.parametrize(
    ("family", "to"), [(f, to) for f in MODELS for to in ENDINGS if (f, to) != ("z-image", "kohya")]
)
def test_every_name_is_one_that_the_tool_looks_up_and_fits_its_weight(family, to, tmp_path):
    native, parts, encoders = MODELS[family]
    tensors, metadata = source(parts, encoders)
    save_file(tensors, tmp_path / "d.safetensors", metadata)
    loratool.convert(tmp_path / "d.safetensors", tmp_path / "o.safetensors", to=to, arch=family)
    ours, down_up = load_file(tmp_path / "o.safetensors"), ENDINGS[to]
    names = {n.removesuffix(e).removesuffix(".") for n in ours for e in (*down_up, "alpha") if n.endswith(e)}
    assert {f"{n}.{e}" for n in names for e in (*down_up, "alpha")} == ours.keys()  # alpha is never left out
    known = list(accepted(native, encoders, to))
    for name in names:
        (shape,) = {shape for pattern, shape in known if re.fullmatch(pattern, name)}
        down, up = (ours[f"{name}.{e}"] for e in down_up)
        assert (up.shape[0], down.shape[1]) == shape, name
        assert up.shape[1] == down.shape[0]
        assert float(ours[f"{name}.alpha"]) == down.shape[0] / 2  # half strength, whatever rank joining made
    assert len(names) < len(tensors) / 2 or not any("qkv" in pattern for pattern in native)


def test_names_of_stable_diffusion_are_those_of_the_modules_that_sd_scripts_builds(tmp_path):
    """SD 1: diffusers' UNet and transformers' CLIP, whose names sd-scripts flattens."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(block_out_channels=(8, 16, 16, 16), norm_num_groups=4, cross_attention_dim=24)
    shapes = {
        f"lora_unet_{name}".replace(".", "_"): tuple(module.weight.shape)
        for name, module in unet.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
    }
    tensors = {}
    for name, module in unet.named_modules():
        if f"lora_unet_{name}".replace(".", "_") in shapes:
            out, inside, *kernel = module.weight.shape
            tensors[f"unet.{name}.lora_A.weight"] = torch.ones(2, inside, *kernel)
            tensors[f"unet.{name}.lora_B.weight"] = torch.ones(out, 2, *(1,) * len(kernel))
    save_file(tensors, tmp_path / "d.safetensors")
    loratool.convert(tmp_path / "d.safetensors", tmp_path / "k.safetensors", to="kohya", arch="stable-diffusion")
    ours = load_file(tmp_path / "k.safetensors")
    assert {n.split(".")[0] for n in ours} == shapes.keys()
    for name, (out, inside, *kernel) in shapes.items():
        assert tuple(ours[f"{name}.lora_down.weight"].shape) == (2, inside, *kernel)
        assert tuple(ours[f"{name}.lora_up.weight"].shape) == (out, 2, *(1,) * len(kernel))


class Block(torch.nn.Module):
    """Modules with the names of a UNet's, for LyCORIS to wrap."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.to_q, self.to_k, self.to_v = (torch.nn.Linear(16, 24) for _ in range(3))
        self.conv1 = torch.nn.Conv2d(16, 24, 3)


PATHS = {
    "to_q": "mid_block_attentions_0_transformer_blocks_0_attn1_to_q",
    "to_k": "mid_block_attentions_0_transformer_blocks_0_attn1_to_k",
    "to_v": "mid_block_attentions_0_transformer_blocks_0_attn1_to_v",
    "conv1": "mid_block_resnets_0_conv1",
}


def in_unet(block):
    """The block's modules where their names say that they are."""
    unet = torch.nn.Module()
    for name, flat in PATHS.items():
        unet.register_module(flat, getattr(block, name))
    return unet


@pytest.mark.parametrize("to", ["lycoris", "kohya"])
def test_lycoris_reads_what_we_write(to, tmp_path):
    """LoRA, LoCon, LoHa and LoKr through another format and back, into LyCORIS' own modules."""
    lycoris = pytest.importorskip("lycoris")
    r, g = torch.randn, torch.Generator().manual_seed(5)
    parts = {
        "to_q": {"lora_down.weight": r(4, 16, generator=g), "lora_up.weight": r(24, 4, generator=g), "alpha": 2.0},
        "conv1": {"lora_down.weight": r(4, 16, 3, 3, generator=g), "lora_up.weight": r(24, 4, 1, 1, generator=g),
                  "alpha": 1.0},
        "to_k": {"hada_w1_a": r(24, 2, generator=g), "hada_w1_b": r(2, 16, generator=g),
                 "hada_w2_a": r(24, 2, generator=g), "hada_w2_b": r(2, 16, generator=g), "alpha": 2.0},
        "to_v": {"lokr_w1": r(4, 4, generator=g), "lokr_w2_a": r(6, 2, generator=g), "lokr_w2_b": r(2, 4, generator=g),
                 "alpha": 2.0},
    }  # fmt: skip
    wanted = {
        "to_q": 0.5 * parts["to_q"]["lora_up.weight"] @ parts["to_q"]["lora_down.weight"],
        "conv1": 0.25 * parts["conv1"]["lora_up.weight"].flatten(1) @ parts["conv1"]["lora_down.weight"].flatten(1),
        "to_k": (parts["to_k"]["hada_w1_a"] @ parts["to_k"]["hada_w1_b"])
        * (parts["to_k"]["hada_w2_a"] @ parts["to_k"]["hada_w2_b"]),
        "to_v": torch.kron(parts["to_v"]["lokr_w1"], parts["to_v"]["lokr_w2_a"] @ parts["to_v"]["lokr_w2_b"]),
    }
    other = {"kohya": "lycoris", "lycoris": "comfy"}[to]
    tensors = {f"lora_unet_{PATHS[m]}.{p}": torch.as_tensor(t) for m, ps in parts.items() for p, t in ps.items()}
    save_file(tensors, tmp_path / "0.safetensors")
    loratool.convert(tmp_path / "0.safetensors", tmp_path / "1.safetensors", to=other, arch="stable-diffusion")
    loratool.convert(tmp_path / "1.safetensors", tmp_path / "2.safetensors", to=to, arch="stable-diffusion")
    ours = {n.replace("lora_unet_", "lycoris_", 1): t for n, t in load_file(tmp_path / "2.safetensors").items()}
    block = Block()
    network, _ = lycoris.create_lycoris_from_weights(1.0, "", in_unet(block), weights_sd=ours)
    assert len(network.loras) == len(parts)
    for lora in network.loras:
        (name,) = [n for n, flat in PATHS.items() if lora.lora_name == f"lycoris_{flat}"]
        found = lora.get_diff_weight(1.0)[0].detach().flatten(1)
        torch.testing.assert_close(found, wanted[name].flatten(1), rtol=1e-5, atol=1e-5)
