"""inspect shows what the header of an image tool's file says, which a stranger wrote."""

import json

import pytest
import torch
from safetensors.torch import save_file

import loratool

MODULE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
TENSORS = {f"{MODULE}.lora_down.weight": torch.ones(2, 768), f"{MODULE}.lora_up.weight": torch.ones(8, 2)}
SAID = {
    "ss_base_model_version": "sd_v1",
    "ss_output_name": "file_name",
    "modelspec.title": "My Dog",
    "modelspec.author": "me",
    "modelspec.license": "CC0-1.0",
    "modelspec.description": "A dog.\nAnd a cat.",
    "modelspec.trigger_phrase": "sks dog",
    "ss_training_comment": "a comment",
    "ss_resolution": "(512, 512)",
    "ss_steps": "1500",
    "ss_epoch": "10",
    "ss_num_train_images": "20",
}
TAGS = {"10_dog": {"sks dog": 20, "grass": 7, " sky ": 7}, "1_cat": {"sks cat": 5, "grass": 7}}


@pytest.fixture
def inspect(tmp_path):
    def call(**metadata):
        save_file(TENSORS, tmp_path / "style.safetensors", metadata)
        return loratool.inspect(tmp_path / "style.safetensors")

    return call


def test_title_author_licence_training_and_base_are_shown(inspect):
    totals = inspect(**SAID).totals
    shown = {
        "base_version": "sd_v1", "title": "My Dog", "author": "me", "license": "CC0-1.0",
        "description": "A dog.\nAnd a cat.", "trigger_phrase": "sks dog", "comment": "a comment",
        "resolution": "(512, 512)", "steps": "1500", "epochs": "10", "images": "20",
    }  # fmt: skip
    assert {name: totals.get(name) for name in shown} == shown
    assert totals["metadata"] == dict(sorted(SAID.items()))


def test_what_is_not_said_is_not_shown(inspect):
    totals = inspect(**{**dict.fromkeys(SAID, "None"), "ss_output_name": "file_name", "ss_tag_frequency": "{}"}).totals
    assert totals["title"] == "file_name"
    assert not totals.keys() & {"author", "license", "description", "steps", "trigger_words", "base_version", "made_by"}


def test_trigger_words_are_the_commonest_tags_of_all_folders(inspect):
    wanted = ["sks dog (20)", "grass (14)", "sky (7)", "sks cat (5)"]
    assert inspect(ss_tag_frequency=json.dumps(TAGS)).totals["trigger_words"] == wanted
    sets = json.dumps([{"tag_frequency": TAGS}, {"tag_frequency": {"1_x": {"sky": 14}}}, {}, 7])
    assert inspect(ss_datasets=sets).totals["trigger_words"] == ["sky (21)", *wanted[:2], wanted[3]]
    many = json.dumps({"x": {f"tag {n}": n for n in range(1, 40_000)}})
    assert inspect(ss_tag_frequency=many).totals["trigger_words"][0] == "tag 39999 (39,999)"
    assert len(inspect(ss_tag_frequency=many).totals["trigger_words"]) == 8


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "7", '{"a": {"b": NaN}}', '{"a": {"b": 1}, "a": {}}', "[" * 100_000, '{"a": {"b": 1e999}}', "\0"],
)
def test_tags_that_are_no_json_are_told_and_not_fatal(text, inspect):
    report = inspect(ss_tag_frequency=text, ss_steps="3")
    assert "trigger_words" not in report.totals
    assert report.totals["steps"] == "3"
    assert [f.level for f in report.findings if f.where == "ss_tag_frequency"] == ["info"]


@pytest.mark.parametrize("tags", [7, "x", None, [1], {"b": "9"}, {"b": -1}, {"b": 10**400}, {"b": 1.5}, {"": 3}])
def test_tags_of_another_shape_are_passed_over(tags, inspect):
    assert "trigger_words" not in inspect(ss_tag_frequency=json.dumps({"a": tags})).totals


def test_fields_are_bounded(inspect):
    totals = inspect(**{"modelspec.description": "d" * 10**6, "ss_tag_frequency": json.dumps({"a": {"t" * 10**6: 1}})})
    totals = totals.totals
    assert len(totals["description"]) < 3000
    assert len(totals["trigger_words"][0]) < 300


@pytest.mark.parametrize("history", ["[", "[7]", '[{"sources": [7, {"name": 3}], "by": [], "verb": {}}]', '{"a": 1}'])
def test_a_strange_history_is_no_obstacle(history, inspect):
    assert inspect(**{"loratool.history": history}).totals["modules"] == 1


def test_how_a_file_was_made_is_shown(tmp_path):
    save_file(TENSORS, tmp_path / "style.safetensors")
    loratool.convert(tmp_path / "style.safetensors", tmp_path / "new.safetensors", to="kohya", arch="stable-diffusion")
    made = loratool.inspect(tmp_path / "new.safetensors").totals["made_by"]
    assert made == [f"convert (loratool {loratool.__version__}) of style.safetensors"]


def test_every_family_that_the_names_fit_is_shown(tmp_path):
    module = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    save_file(
        {f"{module}.lora_down.weight": torch.ones(2, 768), f"{module}.lora_up.weight": torch.ones(3072, 2)},
        tmp_path / "text.safetensors",
    )
    totals = loratool.inspect(tmp_path / "text.safetensors").totals
    assert {"clip", "stable-diffusion", "stable-diffusion-2"} <= {*totals["families"], *totals["other_readings"]}
