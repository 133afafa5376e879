"""diffusers' own loaders take the files that we write for it, and fuse exactly what the source says.

The source is written here key by key, with ranks and alphas that differ; on the way it is a file of the family's own
tool (fused weights, original names). What is loaded is compared with W + alpha / r * up @ down of the source.
"""

import inspect
import warnings

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from zoo import build, every
from zoo_images import clip

import loratool

CLIPS = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
#: The pipeline, and which components it loads adapters into.
PIPELINES = {
    "stable-diffusion": ("StableDiffusionPipeline", ("unet", "text_encoder")),
    "stable-diffusion-xl": ("StableDiffusionXLPipeline", ("unet", "text_encoder", "text_encoder_2")),
    "stable-diffusion-3": ("StableDiffusion3Pipeline", ("transformer", "text_encoder", "text_encoder_2")),
    "flux": ("FluxPipeline", ("transformer", "text_encoder")),
    "wan": ("WanPipeline", ("transformer",)),
    "qwen-image": ("QwenImagePipeline", ("transformer",)),
    "z-image": ("ZImagePipeline", ("transformer",)),
    "hunyuan-video": ("HunyuanVideoPipeline", ("transformer",)),
    "lumina2": ("Lumina2Pipeline", ("transformer",)),
    "flux2": ("Flux2Pipeline", ("transformer",)),
    "chroma": ("ChromaPipeline", ("transformer",)),
    "ltx": ("LTXPipeline", ("transformer",)),
}
PROJECTED = {"stable-diffusion-xl": ("text_encoder_2",), "stable-diffusion-3": ("text_encoder", "text_encoder_2")}
LAYERS = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
UNET = {"sample_size": 8, "norm_num_groups": 4, "layers_per_block": 2, "attention_head_dim": 4}
UNETS = {
    "stable-diffusion": {
        "block_out_channels": (8, 8, 16, 16),
        "cross_attention_dim": 24,
    },
    "stable-diffusion-xl": {
        "block_out_channels": (8, 16, 16),
        "cross_attention_dim": 2048,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    },
}
NO_LORA = ("patch_embedding", "pos_embed")  # of a UNet or transformer: a convolution of patches, no adapter's


def model_of(family, component):
    if component == "unet":
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel(**UNET, **UNETS[family]).eval()
    if component in CLIPS:
        return build(clip(family, component, projection=component in PROJECTED.get(family, ())))
    return build(next(z for z in every() if (z.family, z.component) == (family, component)))


def pipeline_of(cls, components):
    parameters = inspect.signature(cls.__init__).parameters.values()
    given = {p.name: None for p in parameters if p.name != "self" and p.default is p.empty}
    extra = {"requires_safety_checker": False} if cls is diffusers.StableDiffusionPipeline else {}
    return cls(**{**given, **components, **extra})


def source_of(models, *, alike=False):
    """Return {(component, module): (down, up, alpha)} for every layer, and the tensors of a file of all of them.

    `alike`: with one rank and one alpha, which is not the rank.
    """
    factors, tensors, generator = {}, {}, torch.Generator().manual_seed(3)
    for component, model in models.items():
        start = CLIPS.get(component, "lora_transformer")
        for n, (name, module) in enumerate(model.named_modules()):
            if not isinstance(module, LAYERS) or name.split(".")[0] in NO_LORA:
                continue
            out, inside, *kernel = module.weight.shape
            rank = 2 if alike else 2 + len(name) % 3
            down = torch.randn(rank, inside, *kernel, generator=generator).mul(0.1)
            up = torch.randn(out, rank, *(1,) * len(kernel), generator=generator).mul(0.1)
            alpha = 3.0 if alike else float(rank * (1, 0.5, 2, 0.25)[n % 4])
            factors[component, name] = down, up, alpha
            on_disk = f"text_model.{name}" if component in CLIPS and not name.startswith("text_") else name
            flat = f"{start}_{on_disk}".replace(".", "_")
            tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
            tensors[f"{flat}.alpha"] = torch.tensor(alpha)
    return factors, tensors


def load(pipeline, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.load_lora_weights(path.parent, weight_name=path.name, local_files_only=True)


def assert_fused(pipeline, components, before, factors):
    loaded = {(c, n) for c in components for n, m in getattr(pipeline, c).named_modules() if hasattr(m, "base_layer")}
    assert loaded == factors.keys()
    pipeline.fuse_lora(components=list(components))
    for (component, name), (down, up, alpha) in factors.items():
        weight = getattr(pipeline, component).get_submodule(name).base_layer.weight
        update = alpha / down.shape[0] * up.double().flatten(1) @ down.double().flatten(1)
        wanted = before[component][f"{name}.weight"].double() + update.view(weight.shape)
        torch.testing.assert_close(weight.double(), wanted, rtol=0, atol=3e-6, msg=f"{component}:{name}")


def models_of(family):
    cls, components = PIPELINES[family]
    models = {c: model_of(family, c) for c in components}
    before = {c: {n: t.clone() for n, t in m.state_dict().items()} for c, m in models.items()}
    return getattr(diffusers, cls), models, before


@pytest.mark.parametrize("family", PIPELINES)
def test_a_pipeline_loads_every_module_at_the_strength_of_the_source(family, tmp_path):
    cls, models, before = models_of(family)
    factors, tensors = source_of(models)
    save_file(tensors, tmp_path / "source.safetensors")
    loratool.convert(tmp_path / "source.safetensors", tmp_path / "own.safetensors", to="kohya", arch=family)
    loratool.convert(tmp_path / "own.safetensors", tmp_path / "ours.safetensors", to="diffusers", arch=family)
    pipeline = pipeline_of(cls, models)
    load(pipeline, tmp_path / "ours.safetensors")
    assert_fused(pipeline, models, before, factors)


@pytest.mark.parametrize("family", ["stable-diffusion", "stable-diffusion-xl", "wan", "qwen-image", "z-image"])
def test_diffusers_finds_every_module_of_our_kohya_file(family, tmp_path):
    """Its own converters read kohya's names of these families in full: original names, rows of fused weights."""
    cls, models, before = models_of(family)
    factors, tensors = source_of(models, alike=True)
    if family == "wan":  # diffusers has no names for what lies outside the blocks
        factors = {key: value for key, value in factors.items() if key[1].startswith("blocks.")}
        tensors = {name: t for name, t in tensors.items() if name.startswith("lora_transformer_blocks_")}
    save_file(tensors, tmp_path / "source.safetensors")
    loratool.convert(tmp_path / "source.safetensors", tmp_path / "ours.safetensors", to="kohya", arch=family)
    pipeline = pipeline_of(cls, models)
    load(pipeline, tmp_path / "ours.safetensors")
    assert_fused(pipeline, models, before, factors)


def test_dora_is_loaded_as_dora(tmp_path):
    """kohya's dora_scale, from which diffusers' own reader makes plain LoRA (0.42), through our file for diffusers."""
    cls, models, before = models_of("stable-diffusion")
    factors, tensors = source_of(models)
    scales = {}
    for component, name in factors:
        weight = before[component][f"{name}.weight"]
        on_disk = f"{CLIPS.get(component, 'lora_transformer')}_{'text_model.' * (component in CLIPS)}{name}"
        scales[component, name] = torch.linspace(0.5, 2, len(weight))
        spread = scales[component, name].reshape(-1, *(1,) * (weight.dim() - 1)).clone()
        tensors[f"{on_disk.replace('.', '_')}.dora_scale"] = spread
    save_file(tensors, tmp_path / "source.safetensors")
    loratool.convert(
        tmp_path / "source.safetensors", tmp_path / "ours.safetensors", to="diffusers", arch="stable-diffusion"
    )
    pipeline = pipeline_of(cls, models)
    load(pipeline, tmp_path / "ours.safetensors")
    pipeline.fuse_lora(components=list(models))
    for (component, name), (down, up, alpha) in factors.items():
        weight = getattr(pipeline, component).get_submodule(name).base_layer.weight
        whole = before[component][f"{name}.weight"].double().flatten(1)
        whole = whole + alpha / down.shape[0] * up.double().flatten(1) @ down.double().flatten(1)
        wanted = scales[component, name].double()[:, None] / whole.norm(dim=1, keepdim=True) * whole
        torch.testing.assert_close(weight.double().flatten(1), wanted, rtol=0, atol=1e-5, msg=name)
