"""Checkpoints of pickles (pytorch_model.bin): read in place behind --allow-pickle, and written as safetensors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_files import (
    LLAMA_CONFIG,
    Q0,
    environment,
    factors,
    run_main,
    snapshot,
    tensors_of_llama,
    write_adapter,
    write_base,
    write_json,
    write_sharded,
)

import loratool
from loratool.errors import FormatError, InputError, LoratoolError, StorageError
from loratool.storage.checkpoint import is_adapter_folder, open_base
from loratool.storage.load import Loader

SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
RENAMED = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "pytorch_model.bin.index.json"


def write_bin(folder: Path, tensors: dict[str, Any] | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True)
    torch.save(OrderedDict(tensors_of_llama() if tensors is None else tensors), folder / "pytorch_model.bin")
    write_json(folder / "config.json", {**LLAMA_CONFIG, **config})
    return folder


def write_bins(folder: Path) -> Path:
    """Two shards and an index, as save_pretrained(safe_serialization=False) named them."""
    folder.mkdir(parents=True)
    tensors = tensors_of_llama()
    halves = [dict(list(tensors.items())[n::2]) for n in range(2)]
    for name, half in zip(SHARDS, halves, strict=True):
        torch.save(half, folder / name)
    weight_map = {tensor: name for name, half in zip(SHARDS, halves, strict=True) for tensor in half}
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    write_json(folder / "config.json", LLAMA_CONFIG)
    return folder


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    write_json(folder / INDEX, index)


@pytest.mark.parametrize("write", [write_bin, write_bins])
def test_a_pickled_checkpoint_opens_with_the_values_that_torch_loads(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    opened = open_base(str(write(tmp_path / "base")), allow_pickle=True)
    expected = tensors_of_llama()
    assert opened.config == LLAMA_CONFIG
    assert opened.tensors.keys() == expected.keys()
    with Loader() as load:
        assert all(torch.equal(load(opened.tensors[name]), tensor) for name, tensor in expected.items())


def test_it_is_described_as_the_safetensors_that_it_becomes(tmp_path: Path) -> None:
    opened = open_base(str(write_bins(tmp_path / "base")), allow_pickle=True)
    assert opened.index_name == "model.safetensors.index.json"
    assert [(s.name, s.source, s.header.raw) for s in opened.shards] == [
        (new, old, b"") for new, old in zip(RENAMED, SHARDS, strict=True)
    ]
    assert opened.index["weight_map"] == {
        ref.name: shard.name for shard in opened.shards for ref in shard.header.tensors
    }
    assert set(opened.files) == {INDEX, *SHARDS}
    (shard,) = open_base(str(write_bin(tmp_path / "one")), allow_pickle=True).shards
    assert shard.name == "model.safetensors"
    assert shard.header.metadata == {"format": "pt"}


@pytest.mark.parametrize(
    ("name", "becomes"),
    [
        ("pytorch_model.bin", "model.safetensors"),
        ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
        ("model.v2.ckpt", "model.v2.safetensors"),
    ],
)
def test_one_file_is_called_as_save_pretrained_calls_it(tmp_path: Path, name: str, becomes: str) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / name)
    assert open_base(str(tmp_path / name), allow_pickle=True).shards[0].name == becomes


@pytest.mark.parametrize("write", [write_bin, write_bins])
def test_without_leave_nothing_is_opened_and_the_way_on_is_named(
    tmp_path: Path, write: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = write(tmp_path / "base"), write_adapter(tmp_path / "adapter")
    with pytest.raises(FormatError, match=r"pytorch_model.*\.bin: a pickle can run code") as caught:
        open_base(str(base))
    assert "--allow-pickle" in caught.value.hint
    assert "save_pretrained" in caught.value.hint
    assert run_main("merge", base, adapter, "-o", tmp_path / "out") == 3
    assert "--allow-pickle" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- merging -----------------------------------------------------------------------------------------------------------


def merged_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize(
    ("write", "write_safe", "files"),
    [
        (write_bin, write_base, ["README.md", "config.json", "model.safetensors"]),
        (write_bins, write_sharded, ["README.md", "config.json", *RENAMED, "model.safetensors.index.json"]),
    ],
)
def test_a_merge_is_that_of_the_same_model_in_safetensors(
    tmp_path: Path, write: Callable[[Path], Path], write_safe: Callable[[Path], Path], files: list[str]
) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    base = write(tmp_path / "base")
    before = snapshot(base)
    report = loratool.merge(base, [adapter], tmp_path / "out", allow_pickle=True)
    loratool.merge(write_safe(tmp_path / "safe"), [adapter], tmp_path / "expected")
    out, expected = merged_of(tmp_path / "out"), merged_of(tmp_path / "expected")
    assert out.keys() == expected.keys()
    assert all(torch.equal(out[name], tensor) for name, tensor in expected.items())
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if "report" not in p.name) == sorted(files)
    assert snapshot(base) == before
    assert json.loads((tmp_path / "out/config.json").read_text()) == LLAMA_CONFIG
    assert not any(".bin" in finding.what for finding in report.findings)


def test_the_index_of_a_merge_is_of_its_own_files(tmp_path: Path) -> None:
    base = write_bins(tmp_path / "base")
    loratool.merge(base, [write_adapter(tmp_path / "adapter")], tmp_path / "out", allow_pickle=True, dtype="float16")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    held = {name: load_file(tmp_path / "out" / name) for name in RENAMED}
    assert index["weight_map"] == {tensor: name for name, tensors in held.items() for tensor in tensors}
    size = sum(t.numel() * t.element_size() for tensors in held.values() for t in tensors.values())
    assert index["metadata"]["total_size"] == size


def test_a_merge_from_the_command_line(tmp_path: Path) -> None:
    base, adapter = write_bin(tmp_path / "base"), write_adapter(tmp_path / "adapter")
    assert run_main("merge", base, adapter, "-o", tmp_path / "out", "--allow-pickle") == 0
    file = base / "pytorch_model.bin"
    assert run_main("merge", file, adapter, "-o", tmp_path / "one.safetensors", "--allow-pickle") == 0
    assert snapshot(tmp_path / "out")["model.safetensors"] == (tmp_path / "one.safetensors").read_bytes()


def test_both_names_of_a_tied_weight_are_kept(tmp_path: Path) -> None:
    tensors = tensors_of_llama()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    base = write_bin(tmp_path / "base", tensors, tie_word_embeddings=True)
    opened = open_base(str(base), allow_pickle=True).tensors
    assert opened["lm_head.weight"].pieces == opened["model.embed_tokens.weight"].pieces
    loratool.merge(base, [write_adapter(tmp_path / "adapter")], tmp_path / "out", allow_pickle=True)
    out = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(out["lm_head.weight"], tensors["lm_head.weight"])
    assert torch.equal(out["model.embed_tokens.weight"], tensors["lm_head.weight"])


def test_weights_that_were_saved_transposed_or_cut_merge_as_what_they_are(tmp_path: Path) -> None:
    tensors = tensors_of_llama()
    plain = write_base(tmp_path / "plain", tensors)
    views = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            views[name] = tensor.T.contiguous().T
    wider = torch.randn(24, 30)
    wider[3:19, 5:21] = tensors[f"{Q0}.weight"]
    views[f"{Q0}.weight"] = wider[3:19, 5:21]
    adapter = write_adapter(tmp_path / "adapter")
    loratool.merge(write_bin(tmp_path / "base", views), [adapter], tmp_path / "out", allow_pickle=True)
    loratool.merge(plain, [adapter], tmp_path / "expected")
    out, expected = merged_of(tmp_path / "out"), merged_of(tmp_path / "expected")
    assert all(torch.equal(out[name], tensor) for name, tensor in expected.items())


def test_transformers_loads_what_was_merged_from_pickles(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=40,
    )
    model = LlamaForCausalLM(config)
    folder = tmp_path / "base"
    folder.mkdir()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    adapter = write_adapter(tmp_path / "adapter")
    loratool.merge(folder, [adapter], tmp_path / "out", allow_pickle=True)
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    expected = torch.load(folder / "pytorch_model.bin", weights_only=True)
    given = factors()
    for name in [key.removesuffix(".lora_A.weight") for key in given if key.endswith("lora_A.weight")]:
        delta = (
            given[f"{name}.lora_B.weight"].double() @ given[f"{name}.lora_A.weight"].double() * 2
        )  # alpha 8 of rank 4
        key = f"{name.removeprefix('base_model.model.')}.weight"
        expected[key] = (expected[key].double() + delta).float()
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=1e-6)


def test_a_delta_is_extracted_from_pickles_as_from_safetensors(tmp_path: Path) -> None:
    tensors = tensors_of_llama()
    tuned = {**tensors, f"{Q0}.weight": tensors[f"{Q0}.weight"] + torch.randn(16, 2) @ torch.randn(2, 16)}
    write_bin(tmp_path / "tuned", tuned)
    write_bin(tmp_path / "base", tensors)
    write_base(tmp_path / "safe tuned", tuned)
    write_base(tmp_path / "safe base", tensors)
    loratool.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "a", rank=2, allow_pickle=True)
    loratool.extract(tmp_path / "safe tuned", tmp_path / "safe base", tmp_path / "b", rank=2)
    name = "adapter_model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    arguments = ("extract", tmp_path / "tuned", "--base", tmp_path / "base", "--rank", 2, "-o", tmp_path / "c")
    assert run_main(*arguments) == 3
    assert run_main(*arguments, "--allow-pickle") == 0


# -- memory ------------------------------------------------------------------------------------------------------------

# VmHWM and not ru_maxrss: the latter starts at the size of the process that forked, pytest with all it imported
PEAK = """
import sys
def peak():
    return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
"""
OPENING = """
from loratool.storage import torchfile
from loratool.storage.checkpoint import open_base
from loratool.storage.load import Loader
torchfile._meta_knows_offsets()
before = peak()
opened = open_base(sys.argv[1], allow_pickle=True)
with Loader() as load:
    assert float(load(opened.tensors["small"])[1]) == 1
    assert float(load(opened.tensors["b"].rows(7, 8))[0, 0]) == 2
print("PEAK", peak() - before)
"""
MERGING = """
from loratool.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print("PEAK", peak())
"""


def peak_of(program: str, *arguments: object) -> float:
    """The peak in MiB that a program says it reached."""
    command = [sys.executable, "-c", PEAK + program, *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.rpartition("PEAK ")[2]) / 1024


def test_opening_300_mb_and_reading_one_tensor_reads_little_else(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(6000, 6250), "small": torch.arange(4.0), "b": torch.full((6000, 6250), 2.0)}, path)
    try:
        assert path.stat().st_size > 300e6
        assert peak_of(OPENING, path) < 20
    finally:
        path.unlink()


def test_a_merge_of_pickles_never_holds_the_model(tmp_path: Path) -> None:
    modules = [f"model.layers.{n}.self_attn.{m}_proj" for n in range(2) for m in "qo"]
    base = write_bin(tmp_path / "base", {f"{m}.weight": torch.full((6144, 6144), 0.5).bfloat16() for m in modules})
    adapter = write_adapter(tmp_path / "adapter", factors(shapes=dict.fromkeys(modules, (6144, 6144))))
    try:
        size = (base / "pytorch_model.bin").stat().st_size
        peak = peak_of(MERGING, "merge", base, adapter, "-o", tmp_path / "out", "--workers", "2", "--allow-pickle")
    finally:
        (base / "pytorch_model.bin").unlink()
        (tmp_path / "out/model.safetensors").unlink(missing_ok=True)
    assert size > 300e6
    assert peak < 500  # MiB, of which torch itself takes about 230


# -- an index is untrusted ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shard", ["../outside.bin", "/etc/passwd", "..\\outside.bin", "C:x.bin", "", "x/../../outside.bin"]
)
def test_a_shard_outside_the_folder_is_refused(tmp_path: Path, shard: str) -> None:
    torch.save({"t": torch.zeros(2)}, tmp_path / "outside.bin")
    (tmp_path / "base").mkdir()
    write_json(tmp_path / "base" / INDEX, {"weight_map": {"t": shard}})
    with pytest.raises(FormatError, match="outside its folder"):
        open_base(str(tmp_path / "base"), allow_pickle=True)


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path) -> None:
    def refused(change: Callable[[dict[str, str]], object], match: str) -> None:
        base = write_bins(tmp_path / match.replace(" ", "-"))
        edit_index(base, change)
        with pytest.raises(LoratoolError, match=match):
            open_base(str(base), allow_pickle=True)

    refused(lambda m: m.update(ghost=SHARDS[0]), "no shard holds")
    refused(lambda m: m.pop("lm_head.weight"), "places in None")
    refused(lambda m: m.update(dict(zip(m, reversed(m.values()), strict=True))), "which the index places in")
    refused(lambda m: m.update({"lm_head.weight": "gone.bin"}), "missing")


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    base = write_bins(tmp_path / "base")
    whole = (base / SHARDS[1]).read_bytes()
    (base / SHARDS[1]).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError, match=SHARDS[1]) as caught:
        open_base(str(base), allow_pickle=True)
    assert "fetch it again" in caught.value.hint


def test_two_shards_that_would_get_one_name_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "x.bin")
    torch.save({"b": torch.zeros(2)}, tmp_path / "x.pt")
    write_json(tmp_path / INDEX, {"weight_map": {"a": "x.bin", "b": "x.pt"}})
    with pytest.raises(FormatError, match=r"called 'x\.safetensors'"):
        open_base(str(tmp_path), allow_pickle=True)


def test_an_index_of_safetensors_cannot_smuggle_in_a_pickle(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "x.bin")
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"a": "x.bin"}})
    with pytest.raises(FormatError, match="pickle"):
        open_base(str(tmp_path))


def test_shards_without_an_index_are_not_guessed_at(tmp_path: Path) -> None:
    base = write_bins(tmp_path / "base")
    (base / INDEX).unlink()
    with pytest.raises(InputError, match="2 weight files and no index"):
        open_base(str(base), allow_pickle=True)


def test_an_index_can_be_named_itself(tmp_path: Path) -> None:
    base = write_bins(tmp_path / "base")
    assert open_base(str(base / INDEX), allow_pickle=True).config == LLAMA_CONFIG
    with pytest.raises(StorageError, match="no such file"):
        open_base(str(base / "other.index.json"), allow_pickle=True)


# -- weights that lie there twice --------------------------------------------------------------------------------------


def test_the_safetensors_win_and_what_is_not_read_is_told(tmp_path: Path) -> None:
    base = write_sharded(tmp_path / "base")
    for name in (
        "consolidated.safetensors",
        "consolidated.00.pth",
        "pytorch_model.bin",
        "optimizer.pt",
        "training_args.bin",
    ):
        (base / name).write_bytes(b"never opened")
    save_file({"t": torch.zeros(2)}, base / "model.fp16.safetensors")
    (base / "original").mkdir()
    (base / "original/consolidated.00.pth").write_bytes(b"never opened")
    opened = open_base(str(base), allow_pickle=True)
    assert opened.tensors.keys() == tensors_of_llama().keys()
    assert set(opened.notes) == {
        "not read: consolidated.00.pth, consolidated.safetensors, original/ "
        "(the same weights under the names of their first release)",
        "not read: model.fp16.safetensors (model.safetensors.index.json does not name them)",
        "not read: pytorch_model.bin (pickles, and there are safetensors)",
    }
    report = loratool.merge(base, [write_adapter(tmp_path / "adapter")], tmp_path / "out")
    told = {finding.what for finding in report.findings if finding.level == "info"}
    assert told >= set(opened.notes)
    assert not list((tmp_path / "out").glob("*consolidated*"))


def test_the_index_wins_over_a_single_file(tmp_path: Path) -> None:
    base = write_sharded(tmp_path / "base")
    save_file({"stale": torch.zeros(2)}, base / "model.safetensors")
    opened = open_base(str(base))
    assert "stale" not in opened.tensors
    assert opened.notes == ("not read: model.safetensors (model.safetensors.index.json does not name them)",)


def test_a_model_that_lies_there_once_has_nothing_to_tell(tmp_path: Path) -> None:
    for opened in (
        open_base(str(write_base(tmp_path / "a"))),
        open_base(str(write_sharded(tmp_path / "b"))),
        open_base(str(write_bins(tmp_path / "c")), allow_pickle=True),
    ):
        assert opened.notes == ()


def test_a_pickled_model_with_adapters_in_its_checkpoints_is_a_model(tmp_path: Path) -> None:
    base = write_bin(tmp_path / "base")
    write_adapter(base / "checkpoint-5")
    assert not is_adapter_folder(str(base))
