"""The original spelling of image models, against the converters of diffusers and key maps of others.

An original checkpoint whose rows are numbered goes through diffusers' own converter; where each row ends up must be
what the family's rules say.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers.loaders import single_file_utils
from zoo import every, record
from zoo_images import TINY, denoiser

from loratool import Named
from loratool.layers import Excluded
from loratool.native import Names
from loratool.patterns import flatten
from loratool.plugins import load
from loratool.tensors import module_of

FIXTURES = Path(__file__).parents[2] / "../shared/fixtures"
MAIN = ("unet", "transformer")
DENOISERS = [z for z in every() if z.component in MAIN]
_SKIPPED = "needs the shared fixtures"


@pytest.fixture(scope="module")
def plugins():
    return load()


class Numbered(NamedTuple):
    """A checkpoint in the original spelling whose rows are numbered, and what the rules say of it."""

    tensors: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]  # canonical tensor name: the numbers of its rows


def shapes_on_meta(one) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """The parameters of a model of any size, and its config."""
    import diffusers

    with torch.device("meta"):
        model = getattr(diffusers, one.cls)(**dict(one.settings))
    return {n: tuple(p.shape) for n, p in model.named_parameters()}, dict(model.config)


def original_of(names: Names, tensor: str) -> tuple[Any, str]:
    """The weight of the original spelling that a tensor lies in, and the ending that both have."""
    module, _, ending = tensor.rpartition(".")
    whole, found = names.original(tensor), names.original(module)
    if whole is not None and whole.name.endswith("." + ending) and ending in ("weight", "bias"):
        return whole._replace(name=whole.name.removesuffix("." + ending), parts=(module,)), "." + ending
    if whole is not None:
        return whole, ""
    if found is not None and found.name.endswith("_" + ending):  # a parameter of its own
        return found._replace(parts=tuple(f"{part}.{ending}" for part in found.parts)), ""
    return found, "." + ending if module else ""


def numbered(names: Names, shapes: dict[str, tuple[int, ...]], config: dict[str, Any]) -> Numbered:
    """Number the rows of every tensor of the original spelling."""
    tensors, expected, count = {}, {}, 0
    for tensor, shape in shapes.items():
        found, ending = original_of(names, tensor)
        name = (found.name if found else tensor.removesuffix(ending)) + ending
        parts = [p + ending for p in found.parts] if found else [tensor]
        if name in tensors:
            assert tensor in expected, f"{tensor} and {name} are one tensor"
            continue
        if not all(p in shapes for p in parts):
            assert len(parts) > 1, (name, parts)
            continue
        rows = sum(shapes[p][0] for p in parts)
        tensors[name] = torch.arange(count, count + rows, dtype=torch.float64).reshape(rows, *(1,) * (len(shape) - 1))
        numbers = tensors[name].flatten()
        halves = (numbers[rows // 2 :], numbers[: rows // 2])
        pieces = [torch.cat(halves)] if found and found.swap else numbers.split([shapes[p][0] for p in parts])
        expected |= dict(zip(parts, pieces, strict=True))
        count += rows
    assert set(expected) == set(shapes)
    return Numbered(tensors, expected)


def layers(architecture, component: str) -> list[tuple[str, ...]]:
    return [s.elements for s, layer in architecture.skeletons() if layer.component == component]


def names_of(architecture, component: str, *, last: bool = False) -> Names:
    """The rules of a component; `last` prefers the last of several spellings."""
    rules = architecture.named[component].native
    return Names(rules[::-1] if last else rules, layers(architecture, component))


def assert_same_rows(converted: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(converted) == set(expected)
    for name, numbers in expected.items():
        assert torch.equal(converted[name].flatten(), numbers), name


_FLUX = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 128, "num_attention_heads": 24}
_XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16, 32),
    "transformer_layers_per_block": (1, 2, 3),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 30,
    "use_linear_projection": True,
}
_REFINER = {
    **_XL,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16, 32, 32),
    "transformer_layers_per_block": 2,
}
_UNET = {"norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": 24}
_SMALL = {"block_out_channels": (8, 16, 32, 32), **_UNET}


def real(family: str, cls: str, converter: str, component: str = "transformer", **settings: Any):
    """A model with the widths that diffusers' converter expects."""
    one = denoiser(family, cls)._replace(component=component, settings=tuple(settings.items()))
    return pytest.param(one, converter, id=f"{family}-{len(settings)}")


CONVERTERS = [
    real("flux", "FluxTransformer2DModel", "flux_transformer_checkpoint", **_FLUX, guidance_embeds=True),
    real("flux", "FluxTransformer2DModel", "flux_transformer_checkpoint", **_FLUX),
    real("chroma", "ChromaTransformer2DModel", "chroma_transformer_checkpoint", **_FLUX),
    real("flux2", "Flux2Transformer2DModel", "flux2_transformer_checkpoint", num_layers=2, num_single_layers=2),
    *(
        real(one.family, one.cls, "sd3_transformer_checkpoint", **dict(one.settings))
        for one in TINY
        if one.cls == "SD3Transformer2DModel"
    ),
]
UNETS = [
    real("stable-diffusion", "UNet2DConditionModel", "", "unet", **_SMALL),
    real("stable-diffusion-2", "UNet2DConditionModel", "", "unet", **_SMALL, use_linear_projection=True),
    real("stable-diffusion-xl", "UNet2DConditionModel", "", "unet", **_UNET, **_XL),
]


@pytest.mark.parametrize(("one", "converter"), CONVERTERS)
def test_every_row_of_a_checkpoint_is_where_diffusers_puts_it(one, converter, plugins):
    shapes, config = shapes_on_meta(one)
    checkpoint = numbered(names_of(plugins.architecture(one.family), "transformer"), shapes, config)
    tensors = dict(checkpoint.tensors)
    if one.cls == "SD3Transformer2DModel":  # a buffer, which the model saves
        tensors |= {"pos_embed": torch.ones(1)}
        shapes["pos_embed.pos_embed"] = (1,)
    converted = getattr(single_file_utils, f"convert_{converter}_to_diffusers")(tensors)
    converted.pop("pos_embed.pos_embed", None)
    assert_same_rows(converted, checkpoint.expected)


@pytest.mark.parametrize(("one", "_"), UNETS)
def test_every_row_of_a_unet_is_where_diffusers_puts_it(one, _, plugins):
    shapes, config = shapes_on_meta(one)
    checkpoint = numbered(names_of(plugins.architecture(one.family), "unet"), shapes, config)
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in checkpoint.tensors.items()}
    assert_same_rows(single_file_utils.convert_ldm_unet_checkpoint(tensors, config), checkpoint.expected)


def test_the_refiner_of_xl_is_read_though_its_upsampler_comes_sooner(plugins):
    one, _ = real("stable-diffusion-xl", "UNet2DConditionModel", "", "unet", **_UNET, **_REFINER).values
    shapes, config = shapes_on_meta(one)
    architecture = plugins.architecture("stable-diffusion-xl")
    checkpoint = numbered(names_of(architecture, "unet", last=True), shapes, config)
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in checkpoint.tensors.items()}
    assert "model.diffusion_model.output_blocks.2.1.conv.weight" in tensors
    assert_same_rows(single_file_utils.convert_ldm_unet_checkpoint(tensors, config), checkpoint.expected)
    matrices = [module_of(name) for name, tensor in tensors.items() if tensor.ndim > 1]
    assert architecture.explains(matrices)


def test_tencents_names_of_hunyuan_video_are_read_as_diffusers_reads_them(plugins):
    one, _ = real("hunyuan-video", "HunyuanVideoTransformer3DModel", "", guidance_embeds=True, **_FLUX).values
    shapes, config = shapes_on_meta(one)
    checkpoint = numbered(names_of(plugins.architecture(one.family), "transformer", last=True), shapes, config)
    assert "double_blocks.0.img_attn_qkv.weight" in checkpoint.tensors
    converted = single_file_utils.convert_hunyuan_video_transformer_to_diffusers(dict(checkpoint.tensors))
    assert_same_rows(converted, checkpoint.expected)


#: what ComfyUI calls the parts of HunyuanVideo's names, by what Tencent calls them (ComfyUI: supported_models.py)
COMFY = (
    ("_attn_qkv", "_attn.qkv"),
    ("_attn_proj", "_attn.proj"),
    ("mlp.fc1", "mlp.0"),
    ("mlp.fc2", "mlp.2"),
    ("_mod.linear", "_mod.lin"),
    ("modulation.linear", "modulation.lin"),
    ("_embedder.mlp.0", "_embedder.in_layer"),
    ("_embedder.mlp.2", "_embedder.out_layer"),
    ("c_embedder.linear_1", "c_embedder.in_layer"),
    ("c_embedder.linear_2", "c_embedder.out_layer"),
    ("_in.mlp.0", "_in.in_layer"),
    ("_in.mlp.2", "_in.out_layer"),
    ("_attn_q_norm.weight", "_attn.norm.query_norm.scale"),
    ("_attn_k_norm.weight", "_attn.norm.key_norm.scale"),
    (".q_norm.weight", ".norm.query_norm.scale"),
    (".k_norm.weight", ".norm.key_norm.scale"),
)


@pytest.mark.parametrize("family", ["hunyuan-video", "framepack", "hunyuan-image"])
def test_comfyuis_names_of_hunyuan_mean_what_tencents_mean(family, plugins):
    architecture = plugins.architecture(family)
    one = next(z for z in TINY if z.family == family and z.component == "transformer")
    shapes = record(one).memory
    extra = "clean_x_embedder", "image_projection"  # FramePack's, which has no other names
    shapes = {n: shape for n, shape in shapes.items() if not n.startswith(extra)}
    theirs = numbered(names_of(architecture, "transformer", last=True), shapes, {})
    ours = numbered(names_of(architecture, "transformer"), shapes, {})
    renamed = []
    for name in theirs.tensors:
        for tencent, comfy in COMFY:
            name = name.replace(tencent, comfy)  # noqa: PLW2901
        renamed.append(name)
    assert renamed == list(ours.tensors)
    for tencents, comfys in zip(theirs.tensors, ours.tensors, strict=True):
        one, other = (architecture.find(module_of(n), "transformer") for n in (tencents, comfys))
        assert (one and one[:2]) == (other and other[:2]), (tencents, comfys)


@pytest.mark.parametrize("family", ["hunyuan-video", "hunyuan-image"])
def test_flat_names_of_hunyuan_are_those_of_trainers_and_dotted_ones_comfyuis(family, plugins):
    architecture = plugins.architecture(family)
    path = "transformer_blocks.3.ff.net.0.proj"
    assert architecture.named["transformer"].flat == "last"
    assert architecture.original("transformer", path).name == "double_blocks.3.img_mlp.0"
    assert architecture.original("transformer", path, last=True).name == "double_blocks.3.img_mlp.fc1"


@pytest.mark.parametrize(
    ("family", "component", "prefix"),
    [
        ("stable-diffusion-2", "text_encoder", "cond_stage_model.model."),
        ("stable-diffusion-xl", "text_encoder_2", "conditioner.embedders.1.model."),
    ],
)
def test_open_clip_is_split_as_diffusers_splits_it(family, component, prefix, plugins):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = CLIPTextConfig(**sizes, num_attention_heads=2, projection_dim=16, max_position_embeddings=8)
    model = CLIPTextModelWithProjection(config)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if n != "text_projection.weight"}
    architecture = plugins.architecture(family)
    checkpoint = numbered(names_of(architecture, component), shapes, {})
    tensors = {prefix + name: tensor for name, tensor in checkpoint.tensors.items()}
    assert prefix + "transformer.resblocks.1.attn.in_proj_weight" in tensors
    assert_same_rows(single_file_utils.convert_open_clip_checkpoint(model, tensors, prefix), checkpoint.expected)
    for name in tensors:
        known = architecture.find(module_of(name))
        assert known is None or known.component == component


@pytest.mark.parametrize("one", DENOISERS, ids=str)
def test_every_layer_has_one_original_name_and_comes_back(one, plugins):
    architecture = plugins.architecture(one.family)
    named: Named = architecture.named[one.component]
    for path in (module_of(n) for n, shape in record(one).memory.items() if len(shape) > 1):
        known = architecture.find(path, one.component)
        if known is None or isinstance(known.layer, Excluded):
            continue
        originals = [architecture.original(one.component, path, last=last) for last in (False, True)]
        for original in originals:
            assert path in original.parts
            for start in (named.comfy, *named.checkpoint):
                back = architecture.find(start + original.name, one.component)
                assert back.parts == original.parts
                assert (back.heights, back.swap) == (original.heights, original.swap)
        for name, parts in (*(o[:2] for o in originals), (path, (path,))):
            flat = architecture.unflatten(f"{named.kohya}_{flatten(name)}")
            assert [(k.component, k.parts) for k in flat] == [(one.component, parts)]


@pytest.mark.parametrize("family", sorted({one.family for one in DENOISERS}))
def test_every_rule_says_something_of_some_model(family, plugins):
    architecture = plugins.architecture(family)
    relatives = (family, architecture.like)
    for component, named in architecture.named.items():
        tensors = {n for z in every() if z.family in relatives and z.component == component for n in record(z).disk}
        tensors |= {start + n for n in tensors for start in architecture.prefixes.get(component, ())}
        for one in (values[0] for values, *_ in UNETS if component == "unet"):
            tensors |= set(shapes_on_meta(one)[0])
        for rule in named.native if tensors else ():
            alone = Names((rule,), layers(architecture, component) if "**" in rule else ())
            assert any(original_of(alone, tensor)[0] for tensor in tensors), rule


@pytest.mark.skipif(not FIXTURES.is_dir(), reason=_SKIPPED)
@pytest.mark.parametrize(("file", "family"), [("sd1", "stable-diffusion"), ("sd2", "stable-diffusion-2")])
def test_the_key_maps_of_whole_checkpoints_are_reproduced(file, family, plugins):
    keymap = json.loads((FIXTURES / f"aitoolkit/{file}.json").read_text())  # name in the original file: in diffusers
    architecture = plugins.architecture(family)
    components = {"unet": "unet", "te": "text_encoder"}
    names = {c: names_of(architecture, c) for c in components.values()}
    seen = 0
    for theirs, ours in keymap.items():
        kind, _, tensor = ours.partition("_")
        if kind not in components:
            assert theirs.startswith(architecture.ignored), theirs
            continue
        start = next(s for s in architecture.named[components[kind]].checkpoint if theirs.startswith(s))
        found, ending = original_of(names[components[kind]], tensor)
        name = (found.name if found else tensor.removesuffix(ending)) + ending
        assert start + name == theirs
        if theirs.endswith(".weight") and architecture.find(tensor.removesuffix(".weight"), components[kind]):
            known = architecture.find(module_of(theirs))
            assert (known.component, known.parts) == (components[kind], found.parts if found else (module_of(tensor),))
        seen += 1
    assert seen > 800


FLUX_FILES = {
    "flux_lora_kohya_format": 304,
    "flux_lora_diffusers_format": 494,
    "flux_lora_diffusers_no_proj_mlp_format": 342,
}


@pytest.mark.skipif(not FIXTURES.is_dir(), reason=_SKIPPED)
@pytest.mark.parametrize("file", FLUX_FILES)
def test_files_of_flux_adapters_are_explained(file, plugins):
    architecture = plugins.architecture("flux")
    shapes = json.loads((FIXTURES / f"invokeai/{file}.json").read_text())
    found: dict[str, tuple[str, ...]] = {}
    for key, shape in shapes.items():
        module = key.partition(".lora_")[0].removesuffix(".alpha")
        if module == key or not shape:
            continue
        if module.startswith("lora_"):
            (known,) = architecture.unflatten(module)
        else:
            known = architecture.find(module.removeprefix("transformer."), "transformer")
        assert known, key
        found[module] = known.parts
    assert len(found) == FLUX_FILES[file]
    paths = [p for parts in found.values() for p in parts]
    assert len(set(paths)) == len(paths)
