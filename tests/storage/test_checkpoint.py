"""Opening what lies on disk: an index is untrusted, and index and shards must agree both ways."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_files import factors, peft_config, tensors_of_llama, write_adapter, write_base, write_json, write_sharded

from loratool.errors import FormatError, InputError, LoratoolError, StorageError
from loratool.storage.checkpoint import companions, is_adapter_folder, open_adapter, open_base


@pytest.fixture
def indexed(tmp_path: Path) -> Callable[[object], Path]:
    """A folder whose index names one given shard; a valid shard of that tensor lies outside the folder."""
    save_file({"t": torch.zeros(2)}, tmp_path / "outside.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()

    def make(shard: object) -> Path:
        write_json(folder / "model.safetensors.index.json", {"weight_map": {"t": shard}})
        return folder

    return make


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "x/../../outside.safetensors",
        "/etc/passwd",
        "C:\\Windows\\x.safetensors",
        "C:x.safetensors",
        "..\\outside.safetensors",
        "\\\\server\\share\\x.safetensors",
        "\\x.safetensors",
        "x\0.safetensors",
        "",
        "..",
    ],
)
def test_a_shard_name_that_leaves_the_folder_is_refused(indexed: Callable[[object], Path], shard: str) -> None:
    with pytest.raises(FormatError, match="outside its folder"):
        open_base(str(indexed(shard)))


@pytest.mark.parametrize("shard", [["a"], {"a": 1}, 3, None, True])
def test_a_shard_name_that_is_no_text_is_refused(indexed: Callable[[object], Path], shard: object) -> None:
    with pytest.raises(FormatError, match="weight_map"):
        open_base(str(indexed(shard)))


def test_an_absolute_path_to_an_existing_shard_is_refused(indexed: Callable[[object], Path], tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="outside its folder"):
        open_base(str(indexed(str(tmp_path / "outside.safetensors"))))


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_an_index_without_a_map_is_refused(tmp_path: Path, weight_map: object) -> None:
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": weight_map})
    with pytest.raises(FormatError, match="weight_map"):
        open_base(str(tmp_path))


def test_a_link_out_of_the_folder_is_refused(indexed: Callable[[object], Path], tmp_path: Path) -> None:
    folder = indexed("x.safetensors")
    (folder / "x.safetensors").symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(FormatError, match="outside its folder"):
        open_base(str(folder))


def test_a_linked_subfolder_out_of_the_folder_is_refused(indexed: Callable[[object], Path], tmp_path: Path) -> None:
    folder = indexed("sub/outside.safetensors")
    (folder / "sub").symlink_to(tmp_path)
    with pytest.raises(FormatError, match="outside its folder"):
        open_base(str(folder))


def hub_cache(root: Path, *, blobs: str = "blobs") -> Path:
    """models--org--name/{blobs,snapshots/<commit>} with links, as huggingface_hub lays them out."""
    repository = root / "models--org--name"
    commit, store = repository / "snapshots" / "abc123", repository / blobs
    commit.mkdir(parents=True)
    store.mkdir()
    save_file({"t": torch.zeros(2)}, store / "digest1")
    write_json(store / "digest2", {"weight_map": {"t": "model-00001-of-00001.safetensors"}})
    (commit / "model-00001-of-00001.safetensors").symlink_to(f"../../{blobs}/digest1")
    (commit / "model.safetensors.index.json").symlink_to(f"../../{blobs}/digest2")
    return commit


def test_the_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    assert list(open_base(str(hub_cache(tmp_path))).tensors) == ["t"]


def test_the_hub_cache_is_followed_through_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hub_cache(tmp_path))
    assert list(open_base(".").tensors) == ["t"]


def test_a_link_to_another_place_in_the_hub_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="outside its folder"):
        open_base(str(hub_cache(tmp_path, blobs="elsewhere")))


def test_a_named_pipe_as_shard_does_not_hang(indexed: Callable[[object], Path]) -> None:
    folder = indexed("x.safetensors")
    os.mkfifo(folder / "x.safetensors")
    with pytest.raises(FormatError, match="regular file"):
        open_base(str(folder))


def test_a_named_pipe_as_weights_or_config_does_not_hang(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_config.json").unlink()
    os.mkfifo(folder / "adapter_config.json")
    assert open_adapter(str(folder)).config is None
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(StorageError):
        open_adapter(str(tmp_path / "pipe.safetensors"))


def test_a_folder_as_shard_is_refused(indexed: Callable[[object], Path]) -> None:
    folder = indexed("x.safetensors")
    (folder / "x.safetensors").mkdir()
    with pytest.raises(FormatError, match="regular file"):
        open_base(str(folder))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "base")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(StorageError, match=r"model-00002-of-00002\.safetensors.*missing"):
        open_base(str(folder))


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    write_json(path, index)


def test_a_tensor_that_only_the_index_knows_is_refused(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "base")
    edit_index(folder, lambda m: m.update({"model.ghost.weight": "model-00001-of-00002.safetensors"}))
    with pytest.raises(FormatError, match=r"model\.ghost\.weight"):
        open_base(str(folder))


def test_a_tensor_that_only_a_shard_knows_is_refused(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "base")
    edit_index(folder, lambda m: m.pop("lm_head.weight"))
    with pytest.raises(FormatError, match=r"lm_head\.weight"):
        open_base(str(folder))


def test_a_tensor_in_another_shard_than_the_index_says_is_refused(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "base")
    edit_index(
        folder, lambda m: m.update({"lm_head.weight": next(s for s in set(m.values()) if s != m["lm_head.weight"])})
    )
    with pytest.raises(FormatError, match=r"lm_head\.weight"):
        open_base(str(folder))


def test_a_sharded_checkpoint_opens_whole(tmp_path: Path) -> None:
    opened = open_base(str(write_sharded(tmp_path / "base", shards=3)))
    expected = {name: tuple(t.shape) for name, t in tensors_of_llama().items()}
    assert {name: ref.shape for name, ref in opened.tensors.items()} == expected
    assert len(opened.shards) == 3


def test_several_weight_files_without_an_index_are_not_guessed_at(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"t": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(InputError, match="2 weight files and no index"):
        open_base(str(tmp_path))


def test_pickle_weights_of_a_base_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(FormatError, match="pickle") as caught:
        open_base(str(tmp_path))
    assert "save_pretrained" in caught.value.hint


def test_an_adapter_in_the_one_named_subfolder_is_found(tmp_path: Path) -> None:
    write_adapter(tmp_path / "out" / "style")
    assert set(open_adapter(str(tmp_path / "out")).tensors) == set(factors())


def test_two_named_adapters_are_not_guessed_at(tmp_path: Path) -> None:
    write_adapter(tmp_path / "out" / "style")
    write_adapter(tmp_path / "out" / "subject")
    with pytest.raises(InputError, match="style, subject"):
        open_adapter(str(tmp_path / "out"))


def test_a_config_belongs_to_the_weights_of_its_name_only(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    save_file(factors(), folder / "other.safetensors")
    assert open_adapter(str(folder / "adapter_model.safetensors")).config == peft_config()
    assert open_adapter(str(folder / "other.safetensors")).config is None


def test_an_empty_folder_says_what_was_expected(tmp_path: Path) -> None:
    for opening in (open_base, open_adapter):
        with pytest.raises(LoratoolError, match="no weights") as caught:
            opening(str(tmp_path))
        assert "safetensors" in caught.value.hint


def test_a_folder_is_an_adapter_by_its_files(tmp_path: Path) -> None:
    assert is_adapter_folder(str(write_adapter(tmp_path / "a")))
    assert not is_adapter_folder(str(write_base(tmp_path / "b")))


BELONGS = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "LICENSE",
    "NOTICE",
    "USE_POLICY.md",
    "modeling_custom.py",
    "qwen.tiktoken",
    "1_Pooling/config.json",
]
STAYS = [
    "README.md",
    "optimizer.pt",
    "training_args.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "adapter_config.json",
    "loratool.report.json",
    ".gitattributes",
    ".git/config.json",
    ".cache/config.json",
    "runs/events.json",
    "image.png",
    "deep/er/config.json",
]


def test_what_belongs_to_a_model_goes_along_and_nothing_else(tmp_path: Path) -> None:
    for name in (*BELONGS, *STAYS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert sorted(companions(str(tmp_path))) == sorted(BELONGS)


def test_a_pipe_or_a_giant_beside_the_weights_does_not_go_along(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(65 << 20)
    (tmp_path / "config.json").write_text("{}")
    assert companions(str(tmp_path)) == ["config.json"]


def test_a_companion_that_links_out_of_the_folder_is_not_copied_and_named(tmp_path):
    from tiny_files import write_adapter, write_base

    import loratool

    secret = tmp_path / "secret.txt"
    secret.write_text("not yours")
    base = write_base(tmp_path / "base")
    (base / "vocab.txt").symlink_to(secret)
    (base / "merges.txt").symlink_to(base / "config.json")
    report = loratool.merge(base, [write_adapter(tmp_path / "adapter")], tmp_path / "out")
    assert not (tmp_path / "out" / "vocab.txt").exists()
    assert (tmp_path / "out" / "merges.txt").read_text() == (base / "config.json").read_text()
    assert [f.where for f in report.findings if "link" in f.what] == ["vocab.txt"]


def test_what_a_merge_does_not_take_along_is_named(tmp_path):
    from tiny_files import write_adapter, write_base

    import loratool

    base = write_base(tmp_path / "base")
    for name in (
        "README.md",
        "onnx/model.onnx",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "1_Pooling/config.json",
    ):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("{}")
    report = loratool.merge(base, [write_adapter(tmp_path / "adapter")], tmp_path / "out")
    said = next(f.what for f in report.findings if "not copied" in f.what)
    assert said == "not copied: 2_Dense/, README.md, onnx/"
    assert (tmp_path / "out" / "1_Pooling" / "config.json").exists()
