"""The header of image tools' files: kept, true of the new file, and for readers of the right family."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import loratool
from loratool.api import open_adapter
from loratool.plugins import installed

STYLES = ("kohya", "comfy", "diffusers", "onetrainer", "lycoris", "ai-toolkit")
KEYS_AND_VALUES = {"stable-diffusion": 768, "stable-diffusion-2": 1024, "stable-diffusion-xl": 2048}
SPELLED = {  # of one module in the middle block, and what webui lists its adapter under
    "stable-diffusion": "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k",
    "stable-diffusion-2": "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k",
    "stable-diffusion-xl": "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k",
}
WEBUI = {"stable-diffusion": "SD1", "stable-diffusion-2": "SD2", "stable-diffusion-xl": "SDXL"}
PRIVATE = "/home/somebody/secret words"


def webui(metadata):
    """The rule by which stable-diffusion-webui sorts adapters (extensions-builtin/Lora/network.py)."""
    if str(metadata.get("ss_base_model_version", "")).startswith("sdxl_"):
        return "SDXL"
    if str(metadata.get("ss_v2", "")) == "True":
        return "SD2"
    return "SD1" if metadata else "Unknown"


def pair(module, rank=4, out=32, inside=16, *, kernel=(), alpha=None):
    ones = (1,) * len(kernel)
    tensors = {
        f"{module}.lora_down.weight": torch.randn(rank, inside, *kernel),
        f"{module}.lora_up.weight": torch.randn(out, rank, *ones),
    }
    return tensors if alpha is None else {**tensors, f"{module}.alpha": torch.tensor(alpha)}


def of(family, **sizes):
    return pair(SPELLED[family], inside=KEYS_AND_VALUES[family], alpha=2.0, **sizes)


def header(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.fixture
def convert(tmp_path):
    """Save tensors with a header, convert them, and return the new header and the report."""

    def call(tensors, told=None, *, to="kohya", verb=loratool.convert, **options):
        save_file(tensors, tmp_path / "style.safetensors", told)
        out = tmp_path / "new.safetensors"
        arguments = {"to": to, **options} if verb is loratool.convert else options
        report = verb(tmp_path / "style.safetensors", out, force=True, **arguments)
        return header(out), report

    return call


# ---- which family it is for


@pytest.mark.parametrize("to", STYLES)
@pytest.mark.parametrize("family", KEYS_AND_VALUES)
def test_a_file_without_metadata_is_listed_under_its_family(family, to, convert, tmp_path):
    metadata, _ = convert(of(family), to=to, arch=family)
    assert webui(metadata) == WEBUI[family]
    assert metadata["modelspec.architecture"].endswith("/lora")
    assert open_adapter(tmp_path / "new.safetensors").families == (family,)


@pytest.mark.parametrize("to", STYLES)
def test_a_family_that_nothing_tells_is_not_invented(to, convert):
    text = pair("lora_te_text_model_encoder_layers_0_mlp_fc1", inside=16, out=16)
    metadata, _ = convert(text, to="kohya")
    assert not metadata.keys() & {"ss_base_model_version", "ss_v2", "modelspec.architecture"}


def test_what_says_a_part_of_the_family_more_exactly_is_kept(convert):
    told = {"ss_base_model_version": "sdxl_base_v0-9", "modelspec.architecture": "stable-diffusion-xl-v0-9-base/lora"}
    metadata, report = convert(of("stable-diffusion-xl"), told, to="comfy")
    assert {name: metadata[name] for name in told} == told
    assert "modelspec.title" not in metadata
    assert not [f for f in report.findings if "said" in f.what]


def test_what_says_another_family_is_replaced_and_told(convert):
    told = {"ss_base_model_version": "sd_v1", "ss_v2": "True", "modelspec.architecture": "stable-diffusion-v1/lora"}
    metadata, report = convert(of("stable-diffusion-xl"), told, to="comfy")
    assert webui(metadata) == "SDXL"
    assert metadata["ss_v2"] == "False"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert any("sd_v1" in f.what for f in report.findings)


def test_every_family_that_is_trained_by_image_tools_is_read_by_its_label():
    """No label leads to another family, unless that has the same one (the sizes of SD 3.5, and Sana's two)."""
    families = [a for a in installed().architectures() if a.labels]
    assert len(families) > 18
    for family in families:
        said = [text for text in (family.labels.base, family.labels.spec) if text]
        assert said
        for text in said:
            meant = {
                a.name for a in installed().architectures() if a.match.metadata and text.startswith(a.match.metadata)
            }
            alike = {
                a.name
                for a in families
                if a.labels.base == family.labels.base and a.match.classes == family.match.classes
            }
            assert family.name in meant <= alike, text


# ---- what is in it


def test_one_rank_is_a_number_and_several_are_dynamic(convert):
    wide = pair("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", rank=8, alpha=8.0)
    told = {"ss_network_dim": "99", "ss_network_alpha": "99", "ss_network_module": "networks.lora"}
    metadata, _ = convert(of("stable-diffusion"), told)
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "2")
    metadata, _ = convert(of("stable-diffusion") | wide, told)
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    assert metadata["ss_network_module"] == "networks.lora"


def test_convolutions_have_a_rank_of_their_own(convert):
    conv = pair("lora_unet_down_blocks_0_resnets_0_conv1", rank=2, out=8, inside=8, kernel=(3, 3), alpha=1.0)
    told = {"ss_network_args": '{"conv_dim": "64", "dropout": "0.1"}'}
    metadata, _ = convert(of("stable-diffusion") | conv, told)
    assert metadata["ss_network_dim"] == "4"
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "1", "dropout": "0.1"}


def loha(module, rank=2, out=32, inside=16):
    shapes = {
        "hada_w1_a": (out, rank),
        "hada_w1_b": (rank, inside),
        "hada_w2_a": (out, rank),
        "hada_w2_b": (rank, inside),
    }
    return {f"{module}.{part}": torch.randn(shape) for part, shape in shapes.items()} | {
        f"{module}.alpha": torch.tensor(1.0)
    }


LOHA = {"ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "loha", "conv_dim": "8"}'}


def test_the_network_is_that_of_the_new_file(convert):
    tensors = loha("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q")
    metadata, _ = convert(tensors, LOHA, to="onetrainer", arch="stable-diffusion")
    assert {name: metadata[name] for name in LOHA} == LOHA
    metadata, _ = convert(tensors, LOHA, to="diffusers", arch="stable-diffusion")  # which knows plain factors alone
    assert metadata["ss_network_module"] == "networks.lora"
    assert "loha" not in json.dumps(metadata)
    metadata, _ = convert(tensors, None, arch="stable-diffusion")
    assert (metadata["ss_network_module"], json.loads(metadata["ss_network_args"])["algo"]) == ("lycoris.kohya", "loha")


def test_arguments_that_no_json_parser_reads_stay_as_they_are(convert):
    metadata, _ = convert(of("stable-diffusion"), {"ss_network_args": "{'algo': lora"})
    assert metadata["ss_network_args"] == "{'algo': lora"


def test_an_argument_that_changes_what_alpha_means_goes_with_that_meaning(convert, tmp_path):
    """LyCORIS' GLoRA keeps the raw alpha with rs_lora: alpha / sqrt(rank) is what its reader has to multiply by."""
    module, rank = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", 4
    shapes = {"a1": (16, rank), "a2": (rank, 16), "b1": (32, rank), "b2": (rank, 16)}
    tensors = {f"{module}.{part}.weight": torch.randn(shape) for part, shape in shapes.items()}
    tensors[f"{module}.alpha"] = torch.tensor(2.0)
    told = {"ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "glora", "rs_lora": "True"}'}
    metadata, _ = convert(tensors, told, arch="stable-diffusion")
    assert json.loads(metadata["ss_network_args"]) == {"algo": "glora"}
    new = load_file(tmp_path / "new.safetensors")
    assert float(new[f"{module}.alpha"]) / rank == pytest.approx(2.0 / rank**0.5)


def test_a_peft_adapter_that_was_a_kohya_file_does_not_keep_a_rank_that_is_no_more(convert, tmp_path):
    save_file(of("stable-diffusion"), tmp_path / "style.safetensors", {"ss_network_dim": "4", "ss_steps": "7"})
    loratool.convert(tmp_path / "style.safetensors", tmp_path / "peft", to="peft", arch="stable-diffusion")
    loratool.resize(tmp_path / "peft", tmp_path / "small", rank=1, arch="stable-diffusion")
    metadata = header(tmp_path / "small/adapter_model.safetensors")
    assert (metadata["ss_network_dim"], metadata["ss_steps"]) == ("1", "7")


# ---- where it comes from


def test_the_history_grows_by_a_step_and_names_files_without_their_folders(convert, tmp_path):
    metadata, _ = convert(of("stable-diffusion"), {"sshs_legacy_hash": "stale"})  # what has hashes gets new ones
    (first,) = json.loads(metadata["loratool.history"])
    assert first == {
        "by": f"loratool {loratool.__version__}",
        "verb": "convert",
        "sources": [{"name": "style.safetensors"}],
    }
    loratool.combine([tmp_path / "new.safetensors", tmp_path / "style.safetensors"], tmp_path / "sum.safetensors")
    loratool.resize(tmp_path / "new.safetensors", tmp_path / "small.safetensors", rank=1)
    assert json.loads(header(tmp_path / "small.safetensors")["loratool.history"])[0] == first
    last = json.loads(header(tmp_path / "small.safetensors")["loratool.history"])[-1]
    assert last["sources"] == [{"name": "new.safetensors", "sshs_model_hash": metadata["sshs_model_hash"]}]
    names = [s["name"] for s in json.loads(header(tmp_path / "sum.safetensors")["loratool.history"])[-1]["sources"]]
    assert names == ["new.safetensors", "style.safetensors"]
    assert header(tmp_path / "sum.safetensors")["modelspec.merged_from"] == "new, style"
    assert str(tmp_path) not in json.dumps(header(tmp_path / "sum.safetensors"))


@pytest.mark.parametrize("before", ["", "[", "{}", "7", '["x"]', '[{"a": 1}]', "[" * 9999, '[{"a":1}], "b": [1'])
def test_a_history_that_is_none_does_not_stop_the_next(before, convert):
    metadata, _ = convert(of("stable-diffusion"), {"loratool.history": before})
    steps = json.loads(metadata["loratool.history"])
    assert steps[-1]["verb"] == "convert"
    assert steps[:-1] == ([{"a": 1}] if before == '[{"a": 1}]' else [])


def test_a_history_does_not_grow_without_end(convert):
    metadata, _ = convert(of("stable-diffusion"), {"loratool.history": json.dumps([{"n": n} for n in range(5000)])})
    steps = json.loads(metadata["loratool.history"])
    assert len(steps) == 100
    assert steps[-2] == {"n": 4999}


@pytest.mark.parametrize(
    ("base", "told"),
    [("org/model", "org/model"), ("/home/me/base", "base"), ("./a/base.safetensors", "base.safetensors"),
     ("models/base.safetensors", "base.safetensors"), ("C:\\me\\base.ckpt", "base.ckpt")],
)  # fmt: skip
def test_a_base_on_somebody_s_disk_is_named_without_its_folders(base, told, convert, tmp_path):
    save_file(of("stable-diffusion"), tmp_path / "style.safetensors")
    loratool.convert(tmp_path / "style.safetensors", tmp_path / "peft", to="peft", arch="stable-diffusion")
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    loratool.convert(tmp_path / "peft", tmp_path / "new.safetensors", to="kohya", arch="stable-diffusion")
    assert header(tmp_path / "new.safetensors")["ss_sd_model_name"] == told


# ---- what is nobody's business

TRAINING = {
    "ss_tag_frequency": json.dumps({f"10_{PRIVATE}": {PRIVATE: 3}}),
    "ss_dataset_dirs": json.dumps({PRIVATE: 1}),
    "ss_sd_model_name": f"{PRIVATE}.safetensors",
    "ss_output_name": PRIVATE,
    "ss_seed": "42",
    "ss_training_comment": PRIVATE,
    "ss_network_args": json.dumps({"algo": "lora", "preset": PRIVATE}),
    "modelspec.merged_from": PRIVATE,
    "loratool.history": json.dumps([{"sources": [{"name": PRIVATE}]}]),
    "a field of the next version": PRIVATE,
}
NEEDED = {
    "ss_base_model_version": "sd_v1",
    "ss_network_module": "lycoris.kohya",
    "modelspec.architecture": "stable-diffusion-v1/lora",
    "modelspec.license": "CC0-1.0",
    "modelspec.trigger_phrase": "sks dog",
}


@pytest.mark.parametrize("to", [*STYLES, "peft"])
def test_stripping_leaves_nothing_of_the_training_and_all_that_readers_need(to, convert, tmp_path):
    metadata, report = convert(of("stable-diffusion"), TRAINING | NEEDED, to=to, strip_metadata=True)
    assert PRIVATE.encode() not in (tmp_path / "new.safetensors").read_bytes()
    assert not metadata.keys() & (TRAINING.keys() - {"ss_network_args"})
    assert {name: metadata[name] for name in NEEDED} == NEEDED
    (told,) = [f.what for f in report.findings if f.where == "--strip-metadata"]
    assert told.startswith(f"{len(TRAINING) - 1} fields are left out")
    assert open_adapter(tmp_path / "new.safetensors").families == ("stable-diffusion",)


def test_resize_and_combine_strip_too(convert, tmp_path):
    convert(of("stable-diffusion"), TRAINING | NEEDED, verb=loratool.resize, rank=2, strip_metadata=True)
    assert PRIVATE.encode() not in (tmp_path / "new.safetensors").read_bytes()
    one = tmp_path / "style.safetensors"
    loratool.combine([one, one], tmp_path / "sum.safetensors", strip_metadata=True)
    assert PRIVATE.encode() not in (tmp_path / "sum.safetensors").read_bytes()
    assert header(tmp_path / "sum.safetensors")["modelspec.license"] == "CC0-1.0"


def test_stripping_forgets_where_a_base_lies_and_not_its_name_on_the_hub(tmp_path):
    save_file(of("stable-diffusion"), tmp_path / "style.safetensors")
    loratool.convert(tmp_path / "style.safetensors", tmp_path / "peft", to="peft", arch="stable-diffusion")
    path = tmp_path / "peft/adapter_config.json"
    for base, kept in ((PRIVATE, None), ("org/model", "org/model")):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
        loratool.convert(tmp_path / "peft", tmp_path / "new", to="peft", strip_metadata=True, force=True)
        assert json.loads((tmp_path / "new/adapter_config.json").read_text())["base_model_name_or_path"] == kept
