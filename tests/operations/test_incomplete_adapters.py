"""Adapters that lost parts: merge refuses them, and the verbs that write them anew or look at them say so."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import MismatchError

LOST = {
    "a module": lambda n: "layers.1.self_attn.q_proj" in n,
    "a layer": lambda n: "layers.1." in n,
    "a kind": lambda n: "v_proj" in n,
}


@pytest.fixture
def adapter(tiny, adapter_folder):
    """An adapter by PEFT on the attention of four layers, with a head that was trained whole."""
    model = tiny("llama", num_hidden_layers=4)
    return adapter_folder(model, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])[1]


def without(folder, lost, **config):
    weights = folder / "adapter_model.safetensors"
    kept = {name: t for name, t in load_file(weights).items() if not lost(name)}
    save_file(kept, weights, {"format": "pt"})
    told = json.loads((folder / "adapter_config.json").read_text()) | config
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return folder


def said(report):
    return [f.what for f in report.findings if "its config says that this was trained" in f.what]


def every_verb(adapter, tmp_path):
    yield loratool.resize(adapter, tmp_path / "resized", rank=2)
    yield loratool.convert(adapter, tmp_path / "converted", to="peft")
    yield loratool.inspect(adapter, check=True)


def test_a_whole_adapter_is_not_warned_of(adapter, tmp_path):
    for report in every_verb(adapter, tmp_path):
        assert said(report) == []
    assert loratool.inspect(adapter, check=True).totals["check"] == "no defects"


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("base", ["here", "elsewhere"])
def test_what_an_adapter_lost_is_named_by_every_verb(lost, base, adapter, saved, tmp_path):
    _, model = saved("llama", num_hidden_layers=4)
    without(adapter, LOST[lost], base_model_name_or_path=str(model) if base == "here" else "org/model")
    named = {
        "a module": "model.layers.1.self_attn.q_proj (target_modules)",
        "a layer": "model.layers.1.self_attn.v_proj (target_modules)",
        "a kind": "v_proj (target_modules)",
    }[lost]
    with pytest.raises(MismatchError, match="its config says that this was trained"):
        loratool.merge(model, [adapter], tmp_path / "merged")
    for report in every_verb(adapter, tmp_path):
        (what,) = said(report)
        assert named in what
        assert "missing" in what
    assert "1 warning" in loratool.inspect(adapter, check=True).totals["check"]
    assert loratool.inspect(adapter).findings == []  # only a check looks


def test_what_was_narrowed_is_what_the_new_config_says(adapter, saved, tmp_path):
    _, model = saved("llama", num_hidden_layers=4)
    without(adapter, LOST["a kind"])
    loratool.resize(adapter, tmp_path / "resized", rank=2)
    loratool.merge(model, [tmp_path / "resized"], tmp_path / "merged")  # nothing is left that could tell


def test_modules_that_the_user_leaves_out_are_not_missing(adapter, tmp_path):
    report = loratool.resize(adapter, tmp_path / "out", rank=2, exclude="v_proj")
    assert said(report) == []


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "v_proj", "query_key_value", "c_attn"]},  # lists for several families
        {"layers_to_transform": [0, 2, 3]},
    ],
    ids=["names of other families", "some layers"],
)
def test_what_a_config_names_beyond_the_model_is_not_missing(config, adapter, tmp_path):
    lost = LOST["a layer"] if "layers_to_transform" in config else lambda name: False
    without(adapter, lost, base_model_name_or_path="org/model", **config)
    for report in every_verb(adapter, tmp_path):
        assert said(report) == []


def test_a_kind_of_layer_in_every_second_place_is_no_loss(adapter, tmp_path):
    without(adapter, lambda n: "layers.1." in n or "layers.3." in n, base_model_name_or_path="org/model")
    assert said(loratool.inspect(adapter, check=True)) == []


def test_one_head_of_those_that_peft_lists_is_enough(adapter_folder, tiny, tmp_path):
    _, folder = adapter_folder(tiny("bert"), target_modules=["query"], task_type="SEQ_CLS")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert {"classifier", "score"} <= set(config["modules_to_save"])
    assert said(loratool.inspect(folder, check=True)) == []
    copy = shutil.copytree(folder, tmp_path / "lost")
    without(copy, lambda name: "classifier" in name)
    (what,) = said(loratool.inspect(copy, check=True))
    assert "classifier" in what
