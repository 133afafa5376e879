"""Where a residual says that it is one: beside its weights or in their header, of which files, and when it is damaged.

The oracle is PEFT: the logits of the live model that it trained on the residual.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_init_residual import IDS, Made, logits, make, step, warned
from tiny_files import snapshot
from transformers import LlamaForCausalLM

import loratool
from loratool import Publishing
from loratool.errors import FormatError, MismatchError, UsageError
from loratool.testing.hub import Hub

pytest_plugins = ["hub_fixtures"]


@pytest.fixture
def made(tmp_path, tiny) -> Made:
    return make(tmp_path, tiny)


class Single(NamedTuple):
    """A base that was one file; its residual, as a file and as a folder; an adapter of that, and one of the base."""

    base: Path
    file: Path
    folder: Path
    trained: Path
    plain: Path


@pytest.fixture
def single(tiny, tmp_path) -> Single:
    found = Single(*(tmp_path / n for n in ("base", "rest.safetensors", "folder", "trained", "plain")))
    tiny("llama").save_pretrained(found.base)
    weights = found.base / "model.safetensors"
    loratool.init(weights, tmp_path / "new", init="pissa", residual=found.file, rank=4, alpha=6, arch="llama")
    found.folder.mkdir()
    shutil.copy(found.file, found.folder / "model.safetensors")
    shutil.copy(found.base / "config.json", found.folder)
    rest = LlamaForCausalLM.from_pretrained(found.folder)
    step(peft.PeftModel.from_pretrained(rest, str(tmp_path / "new"), is_trainable=True)).save_pretrained(
        found.trained, save_embedding_layers=False
    )
    loratool.init(found.base, tmp_path / "kaiming")
    live = peft.PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(found.base), str(tmp_path / "kaiming"), is_trainable=True
    )
    step(live).save_pretrained(found.plain)
    return found


def names(adapter: Path, base: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(base)}))


def test_a_residual_file_is_one_in_a_folder_too(single, tmp_path):
    names(single.trained, single.folder)  # where it was trained
    with pytest.raises(MismatchError, match=r"PiSSA residual of model\.safetensors: it lacks what new starts from"):
        loratool.merge(single.folder, single.plain, tmp_path / "out")
    with pytest.raises(MismatchError, match="pissa changed the base model"):
        loratool.merge(single.base, single.trained, tmp_path / "out")
    with pytest.raises(MismatchError, match="pissa changed the base model"):
        loratool.convert(single.trained, tmp_path / "out.safetensors", to="kohya")
    assert not warned(loratool.merge(single.folder, single.trained, tmp_path / "out"))
    assert not warned(loratool.merge(single.file, single.trained, tmp_path / "out.safetensors", arch="llama"))
    live = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(single.folder), str(single.trained)).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "out"), live(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
    assert not warned(loratool.init(tmp_path / "out", tmp_path / "again"))  # it is no residual any more


def test_a_residual_file_is_one_on_the_hub(hub: Hub, single, tmp_path):
    hub.create("me/original", single.base)
    loratool.push(single.file, to="me/rest", publish=Publishing(licence="mit"))
    names(single.trained, "me/rest")
    with pytest.raises(MismatchError, match=r"PiSSA residual of model\.safetensors"):
        loratool.merge("me/rest", single.plain, tmp_path / "out", arch="llama")
    with pytest.raises(MismatchError, match="pissa changed the base model"):
        loratool.merge("me/original", single.trained, tmp_path / "out")
    assert not warned(loratool.merge("me/rest", single.trained, tmp_path / "out", arch="llama"))


@pytest.mark.parametrize("name", ["rest", "rest.bin"])
def test_the_residual_of_a_file_is_called_as_what_it_is(name, tiny, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "base")
    before = snapshot(tmp_path)
    with pytest.raises(UsageError, match="a file of safetensors") as refusal:
        loratool.init(tmp_path / "base/model.safetensors", tmp_path / "new", init="pissa", residual=tmp_path / name,
                      arch="llama")  # fmt: skip
    assert refusal.value.hint == f"--residual {tmp_path}/rest.safetensors"
    assert snapshot(tmp_path) == before


def test_what_is_merged_beside_the_residual_is_none(made, tmp_path):
    merged, weights = made.rest / "merged.safetensors", made.rest / "model.safetensors"
    assert not warned(loratool.merge(weights, made.trained, merged, arch="llama"))
    assert any("PiSSA residual" in text for text in warned(loratool.init(weights, tmp_path / "k", arch="llama")))
    assert not warned(loratool.init(merged, tmp_path / "k2", arch="llama"))
    with pytest.raises(MismatchError, match="pissa changed the base model"):  # the start would be in it twice
        loratool.merge(merged, made.trained, tmp_path / "out.safetensors", arch="llama")
    loratool.convert(made.trained, tmp_path / "plain", to="peft", init_adapter=made.new / "initial")
    with pytest.raises(MismatchError, match="it lacks what new starts from"):
        loratool.merge(weights, tmp_path / "plain", tmp_path / "out.safetensors", arch="llama")
    loratool.merge(merged, tmp_path / "plain", tmp_path / "out.safetensors", arch="llama")


def test_a_shard_of_a_residual_is_of_it(made, tmp_path):
    LlamaForCausalLM.from_pretrained(made.base).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    loratool.init(tmp_path / "sharded", tmp_path / "n", init="pissa", residual=tmp_path / "r")
    for name in ("", "model.safetensors.index.json"):
        found = warned(loratool.init(tmp_path / "r" / name, tmp_path / "k", force=True, arch="llama"))
        assert any("PiSSA residual of sharded" in text for text in found)


@pytest.mark.parametrize(
    ("mark", "field"),
    [("{}", "init"), ('{"init": 5}', "init"), ('{"init": "other"}', "residual_of"), ("{broken", "JSON")],
)
def test_a_damaged_mark_says_where_it_is_and_what_it_lacks(mark, field, made, tmp_path):
    (made.rest / "loratool_residual.json").write_text(mark)
    with pytest.raises(FormatError, match=rf"loratool_residual\.json: .*{field}"):
        loratool.merge(made.rest, made.trained, tmp_path / "out")
    (made.rest / "loratool_residual.json").unlink()
    file = made.rest / "model.safetensors"
    save_file(load_file(file), file, {"format": "pt", "loratool_residual": mark})
    with pytest.raises(FormatError, match=rf"model\.safetensors, loratool_residual in its metadata: .*{field}"):
        loratool.merge(made.rest, made.trained, tmp_path / "out")
