"""Every built-in family against live transformers and diffusers models: names, kinds of layers, defaults."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from safetensors import safe_open
from transformers.pytorch_utils import Conv1D

from loratool.detection import family_of
from loratool.patterns import selects
from loratool.plugins import load
from loratool.storage import checkpoint

FIXTURES = Path(__file__).parents[2] / "../shared/fixtures"


class Head(NamedTuple):
    family: str
    component: str
    builder: str
    options: dict[str, Any]


# every weight of two or more dimensions must be a layer, without exception
HEADS = [
    Head("llama", "", "llama", {}),
    Head("llama", "", "llama", {"cls": "LlamaForSequenceClassification"}),
    Head("llama", "", "llama", {"cls": "LlamaForTokenClassification"}),
    Head("llama", "", "llama-bare", {}),
    Head("llama", "", "mistral", {}),
    Head("llama", "", "llama", {"cls": "MistralForSequenceClassification"}),
    Head("llama", "", "llama", {"cls": "MistralModel"}),
    Head("gpt2", "", "gpt2", {}),
    Head("gpt2", "", "gpt2", {"add_cross_attention": True}),
    Head("gpt2", "", "gpt2", {"cls": "GPT2ForSequenceClassification"}),
    Head("gpt2", "", "gpt2", {"cls": "GPT2ForTokenClassification"}),
    Head("gpt2", "", "gpt2-bare", {}),
    Head("bert", "", "bert", {}),
    Head("bert", "", "bert", {"cls": "BertForMaskedLM", "tie_word_embeddings": False}),
    Head("bert", "", "bert", {"cls": "BertForPreTraining"}),
    Head("bert", "", "bert", {"cls": "BertForNextSentencePrediction"}),
    Head("bert", "", "bert", {"cls": "BertForTokenClassification"}),
    Head("bert", "", "bert", {"cls": "BertForQuestionAnswering"}),
    Head("bert", "", "bert", {"cls": "BertForMultipleChoice"}),
    Head("bert", "", "bert", {"cls": "BertLMHeadModel", "is_decoder": True, "add_cross_attention": True}),
    Head("bert", "", "bert-bare", {}),
    Head("distilbert", "", "distilbert", {}),
    Head("distilbert", "", "distilbert", {"cls": "DistilBertForMaskedLM", "tie_word_embeddings": False}),
    Head("distilbert", "", "distilbert", {"cls": "DistilBertForQuestionAnswering"}),
    Head("distilbert", "", "distilbert", {"cls": "DistilBertForTokenClassification"}),
    Head("distilbert", "", "distilbert-bare", {}),
    Head("stable-diffusion", "unet", "unet", {}),
    Head("stable-diffusion", "unet", "unet", {"layers_per_block": 2, "block_out_channels": (16, 32)}),
    Head("stable-diffusion", "text_encoder", "clip", {}),
]
KINDS = {"linear": torch.nn.Linear, "Conv1D": Conv1D, "conv2d": torch.nn.Conv2d, "embedding": torch.nn.Embedding}
IDS = [" ".join([h.builder, *map(str, h.options.values())]) for h in HEADS]


@pytest.fixture(scope="module")
def plugins():
    return load(",".join(["bert", "distilbert", "gpt2", "llama", "stable_diffusion"]))


def matrices(model) -> list[str]:
    """The modules with a weight of two or more dimensions; of tied ones both."""
    return [n for n, m in model.named_modules() if getattr(getattr(m, "weight", None), "ndim", 0) >= 2]


def saved_modules(folder: Path) -> Iterable[str]:
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
            if len(opened.get_slice(name).get_shape()) >= 2:
                yield name.removesuffix(".weight")


@pytest.mark.parametrize("head", HEADS, ids=IDS)
def test_every_matrix_of_the_model_is_a_layer_of_the_right_kind(head, plugins, tiny):
    model = tiny(head.builder, **head.options)
    architecture = plugins.architecture(head.family)
    modules = dict(model.named_modules())
    found = matrices(model)
    assert found
    for name in found:
        known = architecture.find(name)
        assert known is not None, name
        assert known.component == head.component
        assert isinstance(modules[name], KINDS[known.layer.kind]), (name, known.layer.kind)
        assert known.layer.transposed == isinstance(modules[name], (Conv1D, torch.nn.Embedding))


@pytest.mark.parametrize("head", HEADS, ids=IDS)
def test_names_in_memory_and_on_disk_mean_the_same_layers(head, plugins, saved):
    model, folder = saved(head.builder, **head.options)
    architecture = plugins.architecture(head.family)
    in_memory = {architecture.find(n).path for n in matrices(model)}
    on_disk = {architecture.find(n).path for n in saved_modules(folder)}
    assert on_disk <= in_memory
    tied = {p for group in architecture.tied for p in group}
    assert in_memory - on_disk <= tied  # of tied weights one is saved


@pytest.mark.parametrize("head", HEADS, ids=IDS)
def test_in_memory_names_are_those_of_the_live_model(head, plugins, tiny):
    model = tiny(head.builder, **head.options)
    architecture = plugins.architecture(head.family)
    for name in matrices(model):
        known = architecture.find(name)
        assert architecture.in_memory(head.component, known.path, type(model).__name__) == name


@pytest.mark.parametrize("head", HEADS, ids=IDS)
def test_flat_names_come_back_to_one_module_each(head, plugins, tiny):
    model = tiny(head.builder, **head.options)
    architecture = plugins.architecture(head.family)
    paths = {architecture.find(n).path for n in matrices(model)}
    flat = {p: architecture.kohya_prefix(head.component) + "_" + p.replace(".", "_") for p in paths}
    assert len(set(flat.values())) == len(paths)  # nothing collides
    for path, name in flat.items():
        assert [(k.component, k.path) for k in architecture.unflatten(name)] == [(head.component, path)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "distilbert", "stable-diffusion"])
def test_every_pattern_of_a_family_occurs_in_some_model(family, plugins, tiny):
    architecture = plugins.architecture(family)
    unseen = {(layer.component, skeleton.text) for skeleton, layer in architecture.skeletons()}
    for name, component, builder, options in HEADS:
        if name == family:
            for module in matrices(tiny(builder, **options)):
                path = architecture.find(module).path
                unseen -= {
                    (layer.component, skeleton.text)
                    for skeleton, layer in architecture.skeletons()
                    if layer.component == component and skeleton.match(path) is not None
                }
    assert unseen == set()


@pytest.mark.parametrize("head", HEADS, ids=IDS)
def test_the_family_of_a_saved_model_is_found_by_config_and_by_names(head, plugins, saved):
    _, folder = saved(head.builder, **head.options)
    base = checkpoint.open_base(str(folder))
    assert family_of(base, plugins).architecture.name == head.family
    (folder / "config.json").unlink()
    (file,) = folder.glob("*.safetensors")
    assert family_of(checkpoint.open_base(str(file)), plugins).architecture.name == head.family


@pytest.mark.parametrize("head", HEADS, ids=IDS)
def test_no_two_families_claim_one_model(head, plugins, tiny):
    names = matrices(tiny(head.builder, **head.options))
    assert [a.name for a in plugins.architectures() if a.explains(names)] == [head.family]


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt2", "bert"])
def test_default_targets_are_those_of_peft(model_type, plugins):
    (family,) = [a for a in plugins.architectures() if model_type in a.match.model_types]
    assert sorted(family.default_targets) == sorted(PEFT_TARGETS[model_type])


@pytest.mark.parametrize(
    ("family", "builder"),
    [
        ("llama", "llama"),
        ("gpt2", "gpt2"),
        ("bert", "bert"),
        ("distilbert", "distilbert"),
        ("stable-diffusion", "unet"),
    ],
)
def test_default_targets_select_modules_of_the_model(family, builder, plugins, tiny):
    names = matrices(tiny(builder))
    for pattern in plugins.architecture(family).default_targets:
        assert any(selects(pattern, n) for n in names)


def test_families_validate_and_every_layer_has_a_role(plugins):
    for architecture in plugins.architectures():
        architecture.validate()
        for skeleton, layer in architecture.skeletons():
            assert layer.role(skeleton)


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="needs the shared fixtures")
def test_the_whole_stable_diffusion_1_checkpoint_is_explained(plugins):
    keymap = json.loads((FIXTURES / "aitoolkit/sd1.json").read_text())  # name in the original file: in diffusers
    architecture = plugins.architecture("stable-diffusion")
    counts = {"unet": 0, "te": 0}
    for name in keymap.values():
        component, _, path = name.partition("_")
        if component not in counts or not path.endswith(".weight") or "norm" in path:
            continue
        known = architecture.find(path.removesuffix(".weight"))
        assert known is not None, path
        assert known.component == {"unet": "unet", "te": "text_encoder"}[component]
        counts[component] += 1
    attention = 16 * (8 + 2 + 2)  # blocks of two attentions, a feed-forward of two layers, proj_in and proj_out
    resnets = 22 * 3 + 14  # conv1, conv2, time_emb_proj; a shortcut where the channels change: 2 going down, 12 up
    assert counts == {"unet": attention + resnets + 3 + 3 + 2 + 2, "te": 12 * 6 + 2}
