"""Names of one layer over the releases of transformers: in released files, in memory in versions 4 and 5, in adapters.

The names are those of transformers' models and of its tables of renamings (conversion_mapping.py; key mappings in 4.52
to 4.57), written down here by hand; transformers itself confirms that it loads the files' names into those in memory.
"""

from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import rename_source_key
from zoo import build, record
from zoo_dense import TINY

import loratool
from loratool.detection import family_of, matrices, module_of
from loratool.plugins import load
from loratool.storage import checkpoint


class Names(NamedTuple):
    """Module paths of one layer: on disk, in transformers 5, and whatever else adapters and files have."""

    disk: str
    memory: str
    others: tuple[str, ...] = ()


TEXT = "layers.1.self_attn.q_proj"
#: family: class of the model, of the model without a head, and layers
NAMES = {
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Model",
        [
            Names(f"language_model.model.{TEXT}", f"model.language_model.{TEXT}", (f"language_model.{TEXT}",)),
            Names("language_model.model.embed_tokens", "model.language_model.embed_tokens"),
            Names("language_model.lm_head", "lm_head"),
            Names(
                "vision_tower.vision_model.encoder.layers.0.self_attn.out_proj",
                "model.vision_tower.encoder.layers.0.self_attn.out_proj",
                (
                    "model.vision_tower.vision_model.encoder.layers.0.self_attn.out_proj",  # 4.52 to 4.57
                    "vision_tower.encoder.layers.0.self_attn.out_proj",  # as 5 saves a model that it did not load
                ),
            ),
            Names(
                "vision_tower.vision_model.embeddings.patch_embedding",
                "model.vision_tower.embeddings.patch_embedding",
                ("model.vision_tower.vision_model.embeddings.patch_embedding",),
            ),
        ],
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        "Mistral3Model",
        [
            Names(f"language_model.model.{TEXT}", f"model.language_model.{TEXT}", (f"language_model.{TEXT}",)),
            Names("language_model.lm_head", "lm_head"),
            Names(
                "vision_tower.transformer.layers.0.attention.k_proj",
                "model.vision_tower.transformer.layers.0.attention.k_proj",
            ),
            Names("vision_tower.patch_conv", "model.vision_tower.patch_conv"),
            Names(
                "multi_modal_projector.patch_merger.merging_layer",
                "model.multi_modal_projector.patch_merger.merging_layer",
            ),
        ],
    ),
    "qwen2-vl": (
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLModel",
        [
            Names(f"model.{TEXT}", f"model.language_model.{TEXT}", (f"language_model.{TEXT}",)),
            Names("model.embed_tokens", "model.language_model.embed_tokens"),
            Names("lm_head", "lm_head"),
            Names("visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv"),
            Names("visual.merger.mlp.2", "model.visual.merger.mlp.2"),
        ],
    ),
    "qwen3-vl": (
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLModel",
        [
            Names(f"model.language_model.{TEXT}", f"model.language_model.{TEXT}", (f"language_model.{TEXT}",)),
            Names("model.visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv", ("visual.blocks.0.attn.qkv",)),
            Names("model.visual.deepstack_merger_list.0.linear_fc1", "model.visual.deepstack_merger_list.0.linear_fc1"),
        ],
    ),
    "gemma4-unified": (
        "Gemma4UnifiedForConditionalGeneration",
        "Gemma4UnifiedModel",
        [
            Names(f"model.language_model.{TEXT}", f"model.language_model.{TEXT}", (f"language_model.{TEXT}",)),
            Names("model.vision_embedder.patch_dense", "model.embed_vision.patch_dense"),
            Names(
                "model.embed_vision.embedding_projection",
                "model.embed_vision.multimodal_embedder.embedding_projection",
            ),
        ],
    ),
}
LAYERS = [pytest.param(family, cls, bare, n, id=n.disk) for family, (cls, bare, rest) in NAMES.items() for n in rest]
#: files by the release that wrote them: what to put for the start of a name that version 5 has in memory
FORMS = {
    "gemma3": {
        "released": {
            "lm_head": "language_model.lm_head",
            "model.language_model.": "language_model.model.",
            "model.vision_tower.": "vision_tower.vision_model.",
            "model.": "",
        },
        "4.52": {"model.vision_tower.": "model.vision_tower.vision_model."},
        "5": {},
    },
    "mistral3": {
        "released": {
            "lm_head": "language_model.lm_head",
            "model.language_model.": "language_model.model.",
            "model.": "",
        },
        "4.52": {},
    },
    "qwen2-vl": {"released": {"model.language_model.": "model.", "model.visual.": "visual."}, "4.52": {}},
}
PAIRS = [(f, a, b) for f, forms in FORMS.items() for a in forms for b in forms]
TARGETS = r".*(language_model\..*\.(q_proj|down_proj)|vision_tower.*\.(k_proj|fc1|up_proj)|visual.*\.(qkv|proj|2))"


@pytest.fixture(scope="module")
def plugins():
    return load()


def first(family, cls):
    return next(one for one in TINY if (one.family, one.cls) == (family, cls))


def spelled(name, starts):
    """The name with the first of these starts replaced."""
    start = next((s for s in starts if name.startswith(s)), "")
    return starts.get(start, "") + name.removeprefix(start)


@pytest.mark.parametrize(("family", "cls", "bare", "names"), LAYERS)
def test_every_spelling_of_a_layer_means_its_name_on_disk(family, cls, bare, names, plugins):
    architecture = plugins.architecture(family)
    for spelling in (names.disk, names.memory, *names.others):
        known = architecture.find(spelling)
        assert known is not None, spelling
        assert known.parts == (names.disk,), spelling


@pytest.mark.parametrize(("family", "cls", "bare", "names"), LAYERS)
def test_names_in_memory_are_those_of_transformers_5(family, cls, bare, names, plugins):
    architecture = plugins.architecture(family)
    assert architecture.in_memory("", names.disk, cls) == names.memory
    assert architecture.in_memory("", names.disk, bare) == names.memory.removeprefix("model.")


@pytest.mark.parametrize(("family", "cls", "bare", "names"), LAYERS)
def test_transformers_loads_the_names_on_disk_into_those_in_memory(family, cls, bare, names):
    model = build(first(family, cls))
    renamings = get_model_conversion_mapping(model)
    assert names.memory in dict(model.named_modules())
    found, _ = rename_source_key(f"{names.disk}.weight", renamings, [])
    assert found == f"{names.memory}.weight"


@pytest.mark.parametrize(("family", "form"), [(f, form) for f, forms in FORMS.items() for form in forms])
def test_files_of_every_release_have_the_same_layers(family, form, plugins, tmp_path):
    live = record(first(family, NAMES[family][0]))
    architecture = plugins.architecture(family)
    base = write_base(family, form, tmp_path)
    assert family_of(base, plugins).architecture.name == family
    assert architecture.explains(matrices(base.tensors))
    found = {architecture.find(module_of(n)).parts for n, ref in base.tensors.items() if len(ref.shape) > 1}
    assert found == {architecture.find(module_of(n)).parts for n, shape in live.disk.items() if len(shape) > 1}


def write_base(family, form, folder):
    """A file with the names of one release, of the model as the zoo builds it."""
    model = build(first(family, NAMES[family][0]))
    tied = set() if model.config.tie_word_embeddings is False else {"lm_head.weight"}
    tensors = {spelled(n, FORMS[family][form]): p.contiguous() for n, p in model.state_dict().items() if n not in tied}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(folder)
    return checkpoint.open_base(str(folder))


@pytest.mark.parametrize(("family", "form", "trained"), PAIRS)
def test_an_adapter_of_any_release_merges_into_files_of_any_release(family, form, trained, tmp_path):
    base, adapter, merged = (tmp_path / name for name in ("base", "adapter", "merged"))
    base.mkdir()
    write_base(family, form, base)
    live = get_peft_model(build(first(family, NAMES[family][0])), LoraConfig(r=3, target_modules=TARGETS))
    torch.manual_seed(1)
    for name, parameter in live.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter)
    live.save_pretrained(adapter)
    file = adapter / "adapter_model.safetensors"
    wrapper = "base_model.model."
    names = {n: wrapper + spelled(n.removeprefix(wrapper), FORMS[family][trained]) for n in load_file(file)}
    assert len(names) > 6
    save_file({names[n]: t for n, t in load_file(file).items()}, file)

    loratool.merge(base, [adapter], merged)

    written = load_file(merged / "model.safetensors")
    wanted = live.merge_and_unload().state_dict()
    before = load_file(base / "model.safetensors")
    changed = 0
    for name, tensor in wanted.items():
        there = spelled(name, FORMS[family][form])
        if there in written:
            torch.testing.assert_close(written[there], tensor, rtol=1e-5, atol=1e-6)
            changed += not torch.equal(written[there], before[there])
    assert set(written) == set(before)
    assert changed == len(names) / 2


def test_a_model_for_questions_has_the_layers_of_the_model_for_text(plugins):
    architecture = plugins.architecture("llama")
    for path in (f"model.{TEXT}", f"transformer.{TEXT}", TEXT):
        assert architecture.find(path).parts == (f"model.{TEXT}",)


def test_split_and_per_expert_names_are_parts_of_the_fused_weights(plugins):
    glm, gemma4 = plugins.architecture("glm"), plugins.architecture("gemma4")
    assert glm.find("model.layers.0.mlp.up_proj").parts == ("model.layers.0.mlp.gate_up_proj[up]",)
    experts = "model.language_model.layers.1.experts"
    assert gemma4.find(f"{experts}.2.gate_proj").parts == (f"{experts}.gate_up_proj[2][gate]",)
    assert gemma4.find(f"{experts}.2.down_proj").parts == (f"{experts}.down_proj[2]",)
