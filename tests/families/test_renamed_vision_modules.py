"""Image models whose modules transformers 5 renamed: adapters of either release mean the layers of the file."""

import pytest
from safetensors.torch import load_file, save_file
from zoo import build, record, tiny

import loratool
from loratool.patterns import selects
from loratool.plugins import load

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
# canonical name (on disk, and in transformers 4) below layer 1: name in memory since transformers 5
BLOCK = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
DENSE = {"intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"}
ROOTS = {
    "vit": ("vit", "ViTModel"),
    "deit": ("deit", "DeiTModel"),
    "beit": ("beit", "BeitModel"),
    "dinov2": ("dinov2", "Dinov2Model"),
    "dinov2-with-registers": ("dinov2_with_registers", "Dinov2WithRegistersModel"),
}


@pytest.fixture(scope="module")
def plugins():
    return load()


def renamed(family):
    """Pairs of the canonical path and the path in memory; DINOv2 keeps encoder.layer and its own feed-forward."""
    root, _ = ROOTS[family]
    names = BLOCK if family.startswith("dinov2") else BLOCK | DENSE
    place = "encoder.layer" if family.startswith("dinov2") else "layers"
    return [(f"{root}.encoder.layer.1.{old}", f"{root}.{place}.1.{new}") for old, new in names.items()]


@pytest.mark.parametrize("family", ROOTS)
def test_old_and_new_spelling_mean_one_layer_with_a_head_and_without(family, plugins):
    architecture = plugins.architecture(family)
    root, bare = ROOTS[family]
    for canonical, in_memory in renamed(family):
        for spelling in (canonical, in_memory, canonical.removeprefix(f"{root}."), in_memory.removeprefix(f"{root}.")):
            assert architecture.find(spelling).path == canonical
        assert architecture.in_memory("", canonical, "SomeForImageClassification") == in_memory
        assert architecture.in_memory("", canonical, bare) == in_memory.removeprefix(f"{root}.")


def test_targets_of_transformers_4_select_the_layers_of_the_file(plugins):
    paths = [canonical for canonical, _ in renamed("vit")]
    assert [p for p in paths if any(selects(t, p) for t in ("query", "value"))] == [
        "vit.encoder.layer.1.attention.attention.query",
        "vit.encoder.layer.1.attention.attention.value",
    ]


@pytest.mark.parametrize("old", [True, False], ids=["transformers 4", "transformers 5"])
def test_an_adapter_in_either_spelling_merges_into_the_same_weights(old, tmp_path, adapter_folder):
    one = tiny("vit", "ViTForImageClassification", "ViTConfig", **SIZES, intermediate_size=48)
    live, folder = adapter_folder(build(one), target_modules=["q_proj", "v_proj", "fc1"], r=3, lora_alpha=5)
    before = load_file(record(one).folder / "model.safetensors")
    if old:  # as PEFT wrote it under transformers 4
        names = {new: canonical for canonical, new in renamed("vit")}
        names |= {new.replace(".1.", ".0.", 1): canonical.replace(".1.", ".0.", 1) for new, canonical in names.items()}
        tensors = {}
        for name, tensor in load_file(folder / "adapter_model.safetensors").items():
            module, _, factor = name.removeprefix("base_model.model.").partition(".lora_")
            tensors[f"base_model.model.{names[module]}.lora_{factor}"] = tensor
        assert len(tensors) == 12
        save_file(tensors, folder / "adapter_model.safetensors")
    loratool.merge(record(one).folder, [folder], tmp_path / "merged")
    after = load_file(tmp_path / "merged/model.safetensors")
    layers = {n.removesuffix(".weight"): m for n, m in live.named_modules() if hasattr(m, "lora_A")}
    changed = {n for n in before if not before[n].equal(after[n])}
    assert len(changed) == 6
    for canonical, in_memory in renamed("vit"):
        module = layers.get(f"base_model.model.{in_memory}")
        assert (module is not None) == (f"{canonical}.weight" in changed)
        if module is not None:
            wanted = before[f"{canonical}.weight"].double() + module.get_delta_weight("default").detach().double()
            assert (after[f"{canonical}.weight"].double() - wanted).abs().max() < 1e-6
