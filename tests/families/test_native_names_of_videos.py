"""The original spelling of video and newer image models, against what diffusers makes of checkpoints and adapters."""

import json
from pathlib import Path

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as lora
from diffusers.loaders import single_file_utils as single
from test_native_names import assert_same_rows, names_of, numbered, shapes_on_meta
from zoo import Tiny, record
from zoo_videos import TINY, denoiser

from loratool.detection import fits
from loratool.layers import Excluded
from loratool.patterns import flatten
from loratool.plugins import load
from loratool.tensors import module_of

FIXTURES = Path(__file__).parents[2] / "../shared/fixtures/invokeai"
LUMINA = denoiser(  # of the widths that diffusers' converters know
    "lumina2", "Lumina2Transformer2DModel", num_layers=2, num_refiner_layers=1, multiple_of=16, cap_feat_dim=20
)


def some(cls: str, nth: int = 0) -> Tiny:
    return [one for one in TINY if one.cls == cls][nth]


SEEN = some("WanTransformer3DModel", 1)
CLIP_ALONE = SEEN._replace(settings=tuple(s for s in SEEN.settings if s[0] != "pos_embed_seq_len"))  # not converted
CHECKPOINTS = [
    (some("WanTransformer3DModel"), single.convert_wan_transformer_to_diffusers),
    (CLIP_ALONE, single.convert_wan_transformer_to_diffusers),
    (some("WanVACETransformer3DModel"), single.convert_wan_transformer_to_diffusers),
    (some("WanAnimateTransformer3DModel"), single.convert_wan_transformer_to_diffusers),
    (some("ChronoEditTransformer3DModel"), single.convert_wan_transformer_to_diffusers),
    (some("ZImageTransformer2DModel"), single.convert_z_image_transformer_checkpoint_to_diffusers),
    (some("ZImageTransformer2DModel", 1), single.convert_z_image_transformer_checkpoint_to_diffusers),
    (some("LTXVideoTransformer3DModel"), single.convert_ltx_transformer_checkpoint_to_diffusers),
    (some("LTX2VideoTransformer3DModel"), single.convert_ltx2_transformer_to_diffusers),
    (LUMINA, single.convert_lumina2_to_diffusers),
    (some("SanaTransformer2DModel"), single.convert_sana_transformer_to_diffusers),
    (some("CosmosTransformer3DModel"), single.convert_cosmos_transformer_checkpoint_to_diffusers),
    (some("HiDreamImageTransformer2DModel"), single.convert_hidream_transformer_to_diffusers),
    (some("Krea2Transformer2DModel"), single.convert_krea2_transformer_checkpoint_to_diffusers),
]
#: what the converters look for in an original, and no parameter of the model is
UNUSED = {"sana": ("pos_embed", "y_embedder.y_embedding")}


@pytest.fixture(scope="module")
def plugins():
    return load()


def named(value: object) -> str:
    """A test's id: functions by name, for their addresses differ between the processes that share the tests out."""
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize("bare", [True, False], ids=["bare", "prefixed"])
@pytest.mark.parametrize(("one", "converter"), CHECKPOINTS, ids=named)
def test_every_row_of_a_checkpoint_is_where_diffusers_puts_it(one, converter, bare, plugins):
    bare = bare or one is LUMINA  # whose converter loses sight of names that begin with more
    architecture = plugins.architecture(one.family)
    shapes, config = shapes_on_meta(one)
    checkpoint = numbered(names_of(architecture, "transformer"), shapes, config)
    start = "" if bare else architecture.named["transformer"].checkpoint[-1]
    tensors = {start + name: tensor for name, tensor in checkpoint.tensors.items()}
    unused = {start + name: torch.ones(1) for name in UNUSED.get(one.family, ())}
    assert_same_rows(converter({**tensors, **unused}), checkpoint.expected)
    for name, tensor in tensors.items():  # and the family reads it so
        known = architecture.find(module_of(name))
        if tensor.ndim > 1 and not (known and isinstance(known.layer, Excluded)):
            ending = name.removeprefix(module_of(name))
            rows = known.rows(len(tensor), shapes[known.parts[0] + ending][1], config)
            for part, ranges in zip(known.parts, rows, strict=True):
                numbers = torch.cat([tensor[r.start : r.stop].flatten() for r in ranges])
                assert torch.equal(numbers, checkpoint.expected[part + ending]), (name, part)


# -- Adapters ---------------------------------------------------------------------------------------------------------


def adapter(architecture, one: Tiny, spelling: str, keep: str = "") -> tuple[dict, dict]:
    """An adapter of rank 1 on every layer whose path contains `keep`: its file, and what it means.

    The rows of each up are numbered, so that a part shows where it was; spelled flat, native, or `split`: flat and
    canonical.
    """
    shapes = shapes_on_meta(one)[0] if one.library == "diffusers" else record(one).disk
    named, count = architecture.named[one.component], 0
    file, expected = {}, {}
    for path in (module_of(n) for n in shapes if n.endswith(".weight")):
        known = architecture.find(path, one.component)
        if known is None or known.layer.kind != "linear" or keep not in path:
            continue
        original = architecture.original(one.component, path)
        name, parts = (path, (path,)) if spelling == "split" else (original.name, original.parts)
        module = named.comfy + name if spelling == "native" else f"{named.kohya}_{flatten(name)}"
        heights = [shapes[f"{part}.weight"][0] for part in parts]
        up = torch.arange(count, count + sum(heights), dtype=torch.float32).reshape(-1, 1)
        down, (a, b) = torch.ones(1, 3), ("lora_A", "lora_B") if spelling == "native" else ("lora_down", "lora_up")
        file |= {f"{module}.{a}.weight": down, f"{module}.{b}.weight": up}
        if spelling != "native":
            file[f"{module}.alpha"] = torch.tensor(1.0)
        for part, rows in zip(parts, up.split(heights), strict=True):
            expected |= {f"{one.component}.{part}.lora_A.weight": down, f"{one.component}.{part}.lora_B.weight": rows}
        count += sum(heights)
    return file, expected


CROSS, BLOCKS = "attn", "blocks."
ADAPTERS = [
    (some("WanTransformer3DModel"), "flat", lora._convert_musubi_wan_lora_to_diffusers, BLOCKS),
    (SEEN, "flat", lora._convert_musubi_wan_lora_to_diffusers, BLOCKS),
    (some("WanTransformer3DModel"), "native", lora._convert_non_diffusers_wan_lora_to_diffusers, ""),
    (some("QwenImageTransformer2DModel"), "flat", lora._convert_non_diffusers_qwen_lora_to_diffusers, ""),
    (some("QwenImageTransformer2DModel"), "native", lora._convert_non_diffusers_qwen_lora_to_diffusers, ""),
    (some("ZImageTransformer2DModel"), "split", lora._convert_non_diffusers_z_image_lora_to_diffusers, "layers."),
    (LUMINA, "native", lora._convert_non_diffusers_lumina2_lora_to_diffusers, "."),
    (some("Krea2Transformer2DModel"), "native", lora._convert_non_diffusers_krea2_lora_to_diffusers, ""),
    (some("CosmosTransformer3DModel"), "native", lora._convert_non_diffusers_anima_lora_to_diffusers, ""),
    (some("AnimaTextConditioner"), "native", lora._convert_non_diffusers_anima_lora_to_diffusers, ""),
    (some("HiDreamImageTransformer2DModel"), "native", lora._convert_non_diffusers_hidream_lora_to_diffusers, ""),
    (some("LTXVideoTransformer3DModel"), "native", lora._convert_non_diffusers_ltxv_lora_to_diffusers, BLOCKS),
    (some("LTX2VideoTransformer3DModel"), "native", lora._convert_non_diffusers_ltx2_lora_to_diffusers, ""),
    (some("LTX2VideoTransformer3DModel", 1), "native", lora._convert_non_diffusers_ltx2_lora_to_diffusers, ""),
]


@pytest.mark.parametrize(("one", "spelling", "converter", "keep"), ADAPTERS, ids=named)
def test_an_adapter_in_the_original_spelling_means_what_diffusers_reads(one, spelling, converter, keep, plugins):
    file, expected = adapter(plugins.architecture(one.family), one, spelling, keep)
    if one is LUMINA:  # nothing but the blocks
        blocks = ("layers.", "noise_refiner.", "context_refiner.")
        file = {n: t for n, t in file.items() if n.removeprefix("diffusion_model.").startswith(blocks)}
        expected = {n: t for n, t in expected.items() if n.removeprefix("transformer.").startswith(blocks)}
    assert len(expected) > 20
    read = converter(dict(file))
    assert set(read) == set(expected)
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("nth", [0, 1])
def test_the_projections_of_the_text_lie_outside_the_transformer_of_ltx2(nth, plugins):
    one = some("LTX2TextConnectors", nth)
    file, expected = adapter(plugins.architecture("ltx2"), one, "native", "proj_in")
    read = lora._convert_non_diffusers_ltx2_lora_to_diffusers(dict(file), "text_embedding_projection")
    assert len(expected) == 2 + 2 * nth
    assert set(read) == set(expected)


#: names by the authors' own code, where diffusers has no converter to ask: (PixArt-alpha, Sana Sprint, LTX-2)
BY_HAND = {
    ("pixart", "transformer"): {
        "blocks.3.attn.qkv": [f"transformer_blocks.3.attn1.to_{n}" for n in "qkv"],
        "blocks.3.attn.proj": ["transformer_blocks.3.attn1.to_out.0"],
        "blocks.3.cross_attn.q_linear": ["transformer_blocks.3.attn2.to_q"],
        "blocks.3.cross_attn.kv_linear": [f"transformer_blocks.3.attn2.to_{n}" for n in "kv"],
        "blocks.3.cross_attn.proj": ["transformer_blocks.3.attn2.to_out.0"],
        "blocks.3.mlp.fc1": ["transformer_blocks.3.ff.net.0.proj"],
        "blocks.3.mlp.fc2": ["transformer_blocks.3.ff.net.2"],
        "x_embedder.proj": ["pos_embed.proj"],
        "t_embedder.mlp.0": ["adaln_single.emb.timestep_embedder.linear_1"],
        "csize_embedder.mlp.2": ["adaln_single.emb.resolution_embedder.linear_2"],
        "ar_embedder.mlp.0": ["adaln_single.emb.aspect_ratio_embedder.linear_1"],
        "t_block.1": ["adaln_single.linear"],
        "y_embedder.y_proj.fc2": ["caption_projection.linear_2"],
        "final_layer.linear": ["proj_out"],
    },
    ("sana-sprint", "transformer"): {
        "t_embedder.mlp.2": ["time_embed.timestep_embedder.linear_2"],
        "cfg_embedder.mlp.0": ["time_embed.guidance_embedder.linear_1"],
        "t_block.1": ["time_embed.linear"],
    },
    ("ltx2", "connectors"): {
        "diffusion_model.audio_embeddings_connector.transformer_1d_blocks.1.attn1.to_out.0": [
            "audio_connector.transformer_blocks.1.attn1.to_out.0"
        ],
        "diffusion_model.video_embeddings_connector.transformer_1d_blocks.0.ff.net.0.proj": [
            "video_connector.transformer_blocks.0.ff.net.0.proj"
        ],
        "text_embedding_projection.aggregate_embed": ["text_proj_in"],
        "text_embedding_projection.audio_aggregate_embed": ["audio_text_proj_in"],
    },
    ("wan", "transformer"): {
        "fps_projection.0": ["fps_projection.net.0.proj"],  # SkyReels V2
        "img_emb.emb_pos": ["condition_embedder.image_embedder.pos_embed"],  # first and last frame
    },
}


@pytest.mark.parametrize(("family", "component"), BY_HAND, ids=str)
def test_names_of_the_authors_own_code_are_known(family, component, plugins):
    architecture = plugins.architecture(family)
    for name, parts in BY_HAND[family, component].items():
        known = architecture.find(name)
        assert (known.component, list(known.parts)) == (component, parts)
        assert all(architecture.original(component, part).name == name for part in parts)


# -- Text encoders ----------------------------------------------------------------------------------------------------

#: by family and component: what a name begins with in ComfyUI, and in kohya's spelling, and one whole name of either
ENCODERS = {
    ("anima", "text_encoder"): (
        "text_encoders.qwen3_06b.transformer.model.layers.7.mlp.up_proj",  # sd-scripts: convert_anima_lora_to_comfy.py
        "lora_te_layers_7_mlp_up_proj",
    ),
    ("lumina2", "text_encoder"): (
        "text_encoders.gemma2_2b.transformer.model.layers.7.mlp.up_proj",
        "lora_te_layers_7_mlp_up_proj",
    ),
    ("qwen-image", "text_encoder"): (
        "text_encoders.qwen25_7b.transformer.model.layers.7.mlp.up_proj",
        "lora_te_model_layers_7_mlp_up_proj",
    ),
    ("hidream", "text_encoder_2"): (
        "text_encoders.clip_g.transformer.text_model.encoder.layers.7.mlp.fc1",
        "lora_te2_text_model_encoder_layers_7_mlp_fc1",
    ),
    ("hidream", "text_encoder_4"): (
        "text_encoders.llama.transformer.model.layers.7.mlp.up_proj",
        "lora_te4_model_layers_7_mlp_up_proj",
    ),
    ("wan", "text_encoder"): (
        "text_encoders.umt5xxl.transformer.encoder.block.7.layer.1.DenseReluDense.wi_0",
        "lora_te_encoder_block_7_layer_1_DenseReluDense_wi_0",
    ),
    ("pixart", "text_encoder"): (
        "text_encoders.t5xxl.transformer.encoder.block.7.layer.1.DenseReluDense.wi_0",
        "lora_te1_encoder_block_7_layer_1_DenseReluDense_wi_0",
    ),
}


@pytest.mark.parametrize(("family", "component"), ENCODERS, ids=str)
def test_text_encoders_are_known_by_each_tools_names(family, component, plugins):
    architecture = plugins.architecture(family)
    comfy, kohya = ENCODERS[family, component]
    known, (flat,) = architecture.find(comfy), architecture.unflatten(kohya)
    assert (known.component, known.parts) == (flat.component, flat.parts) == (component, known.parts)
    named = architecture.named[component]
    assert named.comfy + architecture.original(component, known.path).name == comfy
    assert f"{named.kohya}_{flatten(known.path)}" == kohya


# -- Files of real adapters -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="needs the shared fixtures")
@pytest.mark.parametrize(
    ("file", "family", "modules"),
    [
        ("anima_lora_kohya_format", "anima", 11),
        ("anima_lora_peft_format", "anima", 6),
        ("qwen_image_lora_diffusers_format", "qwen-image", 3),
    ],
)
def test_files_of_adapters_are_explained(file, family, modules, plugins):
    architecture = plugins.architecture(family)
    shapes = json.loads((FIXTURES / f"{file}.json").read_text())
    found: dict[str, tuple[str, ...]] = {}
    for key, shape in shapes.items():
        module = key.partition(".lora_")[0]
        if not shape:  # an alpha
            continue
        if module.startswith("lora_"):
            (known,) = architecture.unflatten(module)
        else:
            known = architecture.find(module)
        assert known, key
        assert known.component == "transformer"
        found[module] = known.parts
    assert len(set(found.values())) == len(found) == modules


def test_the_adapter_between_animas_text_encoders_is_no_part_of_its_transformer(plugins):
    architecture = plugins.architecture("anima")
    flat = "lora_unet_llm_adapter_blocks_2_self_attn_q_proj"
    assert [(k.component, k.path) for k in architecture.unflatten(flat)] == [
        ("text_conditioner", "blocks.2.self_attn.q_proj")
    ]
    assert [(k.component, k.path) for k in architecture.unflatten(flat.replace("llm_adapter_", ""))] == [
        ("transformer", "transformer_blocks.2.attn1.to_q")
    ]
    for start in ("diffusion_model.", "net.", "model.diffusion_model."):
        known = architecture.find(start + "llm_adapter.blocks.2.self_attn.q_proj")
        assert (known.component, known.path) == ("text_conditioner", "blocks.2.self_attn.q_proj")
    own = list(record(some("AnimaTextConditioner")).disk)
    assert architecture.holding("AnimaTextConditioner").find(module_of(own[1])).component == "text_conditioner"


# -- Families of equal names ------------------------------------------------------------------------------------------

#: by model: the widths of image or video and of the text, as they are in attention
WIDTHS = {
    "ltx": [(2048, 2048), (4096, 4096)],  # 2B and 13B
    "ltx2": [(4096, 4096)],
    "pixart": [(1152, 1152)],
    "sana": [(2240, 2240), (1152, 1152)],
    "anima": [(2048, 1024), (5120, 1024)],
}


@pytest.mark.parametrize(("family", "width", "text"), [(f, *w) for f, widths in WIDTHS.items() for w in widths])
def test_models_whose_attention_is_named_alike_are_told_apart_by_its_widths(family, width, text, plugins):
    shapes = {f"transformer_blocks.0.attn{n}.to_{x}": (width, width) for n in (1, 2) for x in "qkv"}
    shapes |= {f"transformer_blocks.0.attn2.to_{x}": (width, text) for x in "kv"}
    found = {a.name for a in plugins.architectures() if fits(a, shapes)} & set(WIDTHS)
    alike = {(4096, 4096): {"ltx", "ltx2"}, (1152, 1152): {"pixart", "sana"}}  # nothing there to tell them by
    assert found == alike.get((width, text), {family})


def test_lumina_and_z_image_are_told_apart_by_the_heads_of_the_keys(plugins):
    every = {"lumina2": 2304 + 2 * 768, "z-image": 3 * 2304}
    for family, out in every.items():
        fused = {"layers.0.attention.qkv": (out, 2304)}
        assert {a.name for a in plugins.architectures() if fits(a, fused)} & set(every) == {family}
