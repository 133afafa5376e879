"""--stream: weights are read where they lie on the Hub; nothing is kept but the output, whatever breaks on the way."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from random import Random

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from tiny_files import (
    DOWN1,
    LLAMA_CONFIG,
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
from loratool.errors import FormatError, HubError, LoratoolError, UsageError
from loratool.storage import checkpoint, ranges, remote
from loratool.storage.hub import RemoteFile
from loratool.storage.hub_names import HubName
from loratool.storage.load import Loader
from loratool.testing.hub import Hub

pytest_plugins = ["hub_fixtures"]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Cut tiny files as large ones are cut."""
    monkeypatch.setattr(ranges, "_BLOCK", 700)
    monkeypatch.setattr(ranges, "_PIECE", 500)
    monkeypatch.setattr(ranges, "WINDOW", 3000)
    monkeypatch.setattr(ranges, "_pause", lambda left, seconds: None)


@pytest.fixture
def pair(hub: Hub, tmp_path) -> tuple[Path, Path]:
    base, adapter = write_sharded(tmp_path / "base", shards=3), write_adapter(tmp_path / "adapter")
    (base / "tokenizer.json").write_text('{"model": ' + '"x"' * 1000 + "}")
    (base / "README.md").write_text("# a card")
    hub.create("org/base", base)
    hub.create("me/adapter", adapter)
    return base, adapter


def kept(home: Path) -> list[str]:
    """What a cache holds of weights."""
    return [p.name for p in home.rglob("*") if p.is_file() and p.stat().st_size and p.suffix != ".json"]


def weights(folder: Path) -> dict[str, bytes]:
    """All files but the report and the card, which name where things came from."""
    return {name: data for name, data in snapshot(folder).items() if name not in ("loratool.report.json", "README.md")}


def test_a_streamed_merge_is_the_merge_and_keeps_nothing(hub: Hub, pair, tmp_path):
    base, adapter = pair
    with loratool.streaming():
        report = loratool.merge("org/base", ["me/adapter"], tmp_path / "streamed")
    loratool.merge(base, [adapter], tmp_path / "local")
    assert weights(tmp_path / "streamed") == weights(tmp_path / "local")
    assert report.sources["base"] == f"org/base@{hub.head('org/base')}"
    assert not [name for name in kept(tmp_path / "hf-home") if name != "main"]  # a note of which commit that was
    assert not (tmp_path / "hf-home/hub").exists()


def test_the_command_line(hub: Hub, pair, tmp_path, capsys):
    assert run_main("merge", "org/base", "me/adapter", "-o", tmp_path / "out", "--stream") == 0
    assert not (tmp_path / "hf-home/hub").exists()
    assert run_main("merge", "org/base", "me/adapter", "-o", tmp_path / "two") == 0  # the option ends with its command
    assert (tmp_path / "hf-home/hub").exists()
    assert weights(tmp_path / "out") == weights(tmp_path / "two")


def test_a_streamed_extract(hub: Hub, pair, tmp_path):
    base, _ = pair
    tuned = tensors_of_llama()
    tuned[f"{DOWN1}.weight"] += 0.01 * torch.randn(16, 4) @ torch.randn(4, 24)
    hub.create("org/tuned", write_base(tmp_path / "tuned", tuned))
    with loratool.streaming():
        loratool.extract("org/tuned", "org/base", tmp_path / "streamed", rank=4)
    loratool.extract(tmp_path / "tuned", base, tmp_path / "local", rank=4)
    name = "adapter_model.safetensors"
    assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    assert not (tmp_path / "hf-home/hub").exists()


def test_from_the_hub_to_the_hub(hub: Hub, pair, tmp_path):
    base, adapter = pair
    with loratool.streaming():
        loratool.merge("org/base", ["me/adapter"], "hf://me/merged")
    loratool.merge(base, [adapter], tmp_path / "local")
    name = "model-00002-of-00003.safetensors"
    assert hub.files("me/merged")[name] == (tmp_path / "local" / name).read_bytes()
    assert not [name for name in kept(tmp_path / "hf-home") if name.endswith(".safetensors")]


@pytest.fixture
def big(hub: Hub, tmp_path, monkeypatch) -> int:
    """A base of whose bytes an adapter touches a half, in two files: its size. Some 60 requests read it."""
    monkeypatch.setattr(ranges, "_BLOCK", 4096)
    monkeypatch.setattr(ranges, "_PIECE", 20_000)
    monkeypatch.setattr(ranges, "WINDOW", 100_000)
    folder = tmp_path / "big"
    folder.mkdir()
    tensors = {f"model.layers.{n}.self_attn.{p}_proj.weight": torch.randn(256, 256) for n in (0, 1) for p in "qk"}
    tensors |= {f"model.layers.{n}.input_layernorm.weight": torch.ones(256) for n in (0, 1)}
    for n in (0, 1):
        mine = {name: tensor for name, tensor in tensors.items() if f".{n}." in name}
        save_file(mine, folder / f"model-0000{n + 1}-of-00002.safetensors", {"format": "pt"})
    files = {name: f"model-0000{1 + ('.1.' in name)}-of-00002.safetensors" for name in tensors}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})
    write_json(folder / "config.json", LLAMA_CONFIG)
    hub.create("org/big", folder)
    shapes = {f"model.layers.{n}.self_attn.q_proj": (256, 256) for n in (0, 1)}
    hub.create("me/small", write_adapter(folder.with_name("small"), factors(shapes=shapes)))
    return sum(tensor.nbytes for tensor in tensors.values())


def with_headers(hub: Hub, *names: str) -> list[str]:
    """Names of commits of which the headers have been read: what is asked for from here on is weights."""
    fixed = [f"{name}@{hub.head(name)}" for name in names]
    with loratool.streaming():
        loratool.merge(fixed[0], [fixed[1]], "unwritten", dry_run=True)
    return fixed


def test_every_byte_is_asked_for_once_and_the_hub_once_a_file(hub: Hub, big, tmp_path):
    base, adapter = with_headers(hub, "org/big", "me/small")
    with hub.counted() as requests, loratool.streaming():
        loratool.merge(base, [adapter], tmp_path / "out")
    assert sum(r.sent for r in requests if "/cdn/" in r.path) < 1.1 * big
    assert sum(r.method == "HEAD" for r in requests) == 3


def test_bytes_are_equal_after_a_hundred_cuts(hub: Hub, big, tmp_path):
    base, adapter = with_headers(hub, "org/big", "me/small")
    random = Random(0)
    for _ in range(100):
        hub.fail("GET /cdn", cut=random.randrange(15_000), skip=random.randrange(4))
    with hub.counted() as requests, loratool.streaming():
        loratool.merge(base, [adapter], tmp_path / "streamed")
    loratool.merge(tmp_path / "big", [tmp_path / "small"], tmp_path / "local")
    assert weights(tmp_path / "streamed") == weights(tmp_path / "local")
    assert len([r for r in requests if "/cdn/" in r.path and r.sent < 15_000]) > 90


def test_an_address_whose_time_is_over_is_asked_for_again(hub: Hub, pair, tmp_path):
    base, adapter = pair
    for skip in (4, 9, 20):
        hub.fail("GET /cdn", status=403, skip=skip)
    hub.fail("GET /cdn", status=503, skip=12)
    hub.fail("GET /cdn", skip=15)
    with hub.counted() as requests, loratool.streaming():
        loratool.merge("org/base", ["me/adapter"], tmp_path / "streamed")
    loratool.merge(base, [adapter], tmp_path / "local")
    assert weights(tmp_path / "streamed") == weights(tmp_path / "local")
    assert sum(r.status == 403 for r in requests) == 3


def test_a_connection_that_is_lost_for_good_ends_the_run_which_can_be_taken_up(hub: Hub, big, tmp_path, monkeypatch):
    monkeypatch.setattr(ranges, "_FAILURES", 2)
    lost = hub.fail("(GET|HEAD) /(cdn|org/big/resolve)", times=999, skip=45)
    with loratool.streaming(), pytest.raises(HubError) as caught:
        loratool.merge("org/big", ["me/small"], tmp_path / "out")
    assert caught.value.missing == "connection"
    assert "goes on where it stopped" in caught.value.hint
    assert not (tmp_path / "out").exists()
    lost.times = 0
    with hub.counted() as requests, loratool.streaming():
        loratool.merge("org/big", ["me/small"], tmp_path / "out")
    loratool.merge(tmp_path / "big", [tmp_path / "small"], tmp_path / "local")
    assert weights(tmp_path / "out") == weights(tmp_path / "local")
    first = hub.repos["org/big"].at("main").files["model-00001-of-00002.safetensors"].oid
    untouched = [r for r in requests if f"/cdn/{first}" in r.path]
    assert sum(r.sent for r in untouched) < 2.6 * 256 * 256 * 4  # header, one matrix; not the one that was copied
    assert not list(tmp_path.glob(".out*"))


def test_no_token_leaves_for_the_store(hub: Hub, pair, tmp_path):
    with hub.counted() as requests, loratool.streaming():  # this store answers 400 to a token
        loratool.merge("org/base", ["me/adapter"], tmp_path / "out")
    assert not [r for r in requests if r.status == 400]


def test_a_server_that_does_not_know_ranges(hub: Hub, pair, tmp_path):
    base, adapter = with_headers(hub, "org/base", "me/adapter")
    hub.fail("GET /cdn", status=200, times=99)
    with loratool.streaming(), pytest.raises(HubError, match="parts"):
        loratool.merge(base, [adapter], tmp_path / "out")


def test_a_pickle_is_not_streamed(hub: Hub, tmp_path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    torch.save(tensors_of_llama(), folder / "pytorch_model.bin")
    write_json(folder / "config.json", LLAMA_CONFIG)
    hub.create("org/pickled", folder)
    hub.create("me/adapter", write_adapter(tmp_path / "adapter"))
    with loratool.streaming(), pytest.raises(FormatError):
        loratool.merge("org/pickled", ["me/adapter"], tmp_path / "out")
    with loratool.streaming(), pytest.raises(UsageError) as caught:
        loratool.merge("org/pickled", ["me/adapter"], tmp_path / "out", allow_pickle=True)
    assert "--stream" in caught.value.hint
    assert not (tmp_path / "hf-home/hub").exists()


def test_what_the_cache_has_is_read_from_there(hub: Hub, pair, tmp_path):
    loratool.merge("org/base", ["me/adapter"], tmp_path / "one")
    (tmp_path / "hf-home/loratool").rename(tmp_path / "forgotten")
    loratool.storage.location.forget()
    with hub.counted() as requests, loratool.streaming():
        loratool.merge("org/base", ["me/adapter"], tmp_path / "two")
    assert not [r for r in requests if r.method == "HEAD"]
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


def test_verify_reads_by_ranges_too_and_says_what_it_cannot_compare(hub: Hub, pair, tmp_path):
    with loratool.streaming():
        report = loratool.merge("org/base", ["me/adapter"], tmp_path / "out", verify=True)
    assert report.totals["verified_tensors"]
    assert any("--stream" in finding.what for finding in report.findings)
    assert not (tmp_path / "hf-home/hub").exists()


def test_without_access_nothing_is_begun(hub: Hub, pair, tmp_path):
    hub.repos["org/base"].gated = True
    with loratool.streaming(), pytest.raises(LoratoolError) as caught:
        loratool.merge("org/base", ["me/adapter"], tmp_path / "out")
    assert caught.value.exit_code == 4
    assert not list(tmp_path.glob(".out*"))


def test_after_a_streamed_run_others_fetch_as_ever(hub: Hub, pair, tmp_path):
    with loratool.streaming():
        loratool.merge("org/base", ["me/adapter"], tmp_path / "one")
    loratool.merge("org/base", ["me/adapter"], tmp_path / "two")
    assert (tmp_path / "hf-home/hub").exists()
    assert json.loads((tmp_path / "two/config.json").read_text()) == json.loads(
        (tmp_path / "one/config.json").read_text()
    )
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


@pytest.mark.parametrize("name", ["resize", "convert", "inspect"])
def test_adapters_are_read_so_by_other_verbs(hub: Hub, pair, tmp_path, name):
    _, adapter = pair
    with loratool.streaming():
        if name == "resize":
            loratool.resize("me/adapter", tmp_path / "streamed", rank=2)
            loratool.resize(adapter, tmp_path / "local", rank=2)
            assert (
                weights(tmp_path / "streamed")["adapter_model.safetensors"]
                == (weights(tmp_path / "local")["adapter_model.safetensors"])
            )
        elif name == "convert":
            for source, out in (("me/adapter", "streamed.safetensors"), (adapter, "local.safetensors")):
                loratool.convert(source, tmp_path / out, to="kohya", base=tmp_path / "base")
            streamed, local = (load_file(tmp_path / name) for name in ("streamed.safetensors", "local.safetensors"))
            assert streamed.keys() == local.keys()
            assert all(torch.equal(streamed[name], local[name]) for name in local)
        else:
            assert loratool.inspect("me/adapter", spectrum=True).rows == loratool.inspect(adapter, spectrum=True).rows
    assert not (tmp_path / "hf-home/hub").exists()


def test_others_may_fetch_the_same_commit_meanwhile(hub: Hub, pair, tmp_path):
    base, adapter = pair
    told = []

    def progress(done: int, total: int) -> None:
        """Fetch the base in another thread, which does not stream, when a piece is done."""
        if not told:
            told.append(done)
            other = threading.Thread(
                target=loratool.merge, args=("org/base", ["me/adapter"], tmp_path / "fetched"), daemon=True
            )
            other.start()
            other.join()

    with loratool.streaming():
        loratool.merge("org/base", ["me/adapter"], tmp_path / "streamed", progress=progress)
    assert (tmp_path / "hf-home/hub").exists()
    loratool.merge(base, [adapter], tmp_path / "local")
    assert weights(tmp_path / "streamed") == weights(tmp_path / "fetched") == weights(tmp_path / "local")


def test_fused_parts_live_adapters_and_hashes_are_read_by_ranges_too(hub: Hub, tmp_path):
    """Planning reads factors here: q, k and v of Flux share their down factors in a fused file."""
    block = "transformer.transformer_blocks.0.attn"
    down, files = torch.randn(4, 3072), {}
    for part in ("to_q", "to_k", "to_v"):
        files |= {f"{block}.{part}.lora_A.weight": down.clone(), f"{block}.{part}.lora_B.weight": torch.randn(3072, 4)}
    save_file(files, tmp_path / "pytorch_lora_weights.safetensors", {"format": "pt"})
    hub.create(
        "me/flux", {"pytorch_lora_weights.safetensors": (tmp_path / "pytorch_lora_weights.safetensors").read_bytes()}
    )
    hub.create("me/adapter", write_adapter(tmp_path / "adapter"))
    with loratool.streaming():
        loratool.convert("me/flux", tmp_path / "streamed.safetensors", to="kohya", arch="flux")
        hashes = loratool.inspect("me/adapter", hashes=True).totals
        opened = checkpoint.open_adapter("me/adapter")
        with Loader() as load:  # as for a live model: outside of any plan
            live = {name: load(ref) for name, ref in opened.tensors.items()}
    loratool.convert(
        tmp_path / "pytorch_lora_weights.safetensors", tmp_path / "local.safetensors", to="kohya", arch="flux"
    )
    streamed, local = (load_file(tmp_path / name) for name in ("streamed.safetensors", "local.safetensors"))
    assert streamed.keys() == local.keys()
    assert all(torch.equal(streamed[name], local[name]) for name in local)
    data = (tmp_path / "adapter/adapter_model.safetensors").read_bytes()
    assert sha256(data).hexdigest() in hashes.values()
    on_disk = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert all(torch.equal(live[name], tensor) for name, tensor in on_disk.items())
    assert not (tmp_path / "hf-home/hub").exists()


def test_another_file_under_the_same_address_is_noticed(hub: Hub, pair, tmp_path):
    """By its SHA-256, which the Hub tells with the address."""
    base, adapter = with_headers(hub, "org/base", "me/adapter")
    commit = hub.repos["org/base"].at("main")
    name = "model-00001-of-00003.safetensors"
    data = bytearray(commit.files[name].data)
    data[-1] ^= 1
    commit.files[name] = hub.stored(name, bytes(data))
    with loratool.streaming(), pytest.raises(HubError, match="another file"):
        loratool.merge(base, [adapter], tmp_path / "out")


def test_a_store_that_refuses_is_not_taken_for_the_hub(hub: Hub, pair, tmp_path):
    base, adapter = with_headers(hub, "org/base", "me/adapter")
    hub.fail("GET /cdn", status=403, times=999)
    with loratool.streaming(), pytest.raises(HubError, match="store of its large files refuses") as caught:
        loratool.merge(base, [adapter], tmp_path / "out")
    assert "log in" not in caught.value.hint


def test_after_a_failure_no_worker_is_left_that_writes_into_the_memory(hub: Hub, pair, monkeypatch):
    """The owner of the memory has it back, and may read something else into it."""

    def answer(self: ranges.Ranges, address: str, start: int, stop: int) -> Iterator[bytes]:
        if start == 0:
            raise HubError("no", where=self.name)
        threading.Event().wait(0.3)
        yield b"x" * (stop - start)

    file = hub.repos["org/base"].at("main").files["model-00001-of-00003.safetensors"]
    name = HubName("org/base", hub.head("org/base"), "model-00001-of-00003.safetensors")
    monkeypatch.setattr(ranges.Ranges, "_answer", answer)
    memory = bytearray(2000)
    with pytest.raises(HubError, match="no"):
        ranges.Ranges(name, RemoteFile(len(file.data), file.oid)).read_into(memoryview(memory), 0)
    seen = bytes(memory)
    threading.Event().wait(0.6)
    assert bytes(memory) == seen


def test_alphas_all_over_a_large_file_bring_nothing_here(hub: Hub, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_RANGES_CAP", 3)
    monkeypatch.setattr(remote, "_NEAR", 0)
    monkeypatch.setattr(remote, "_FIRST", 64)
    adapter = {}
    for n in range(8):
        name = f"lora_unet_double_blocks_{n}_img_attn_proj"
        adapter |= {f"{name}.lora_down.weight": torch.randn(4, 3072), f"{name}.lora_up.weight": torch.randn(3072, 4)}
        adapter[f"{name}.alpha"] = torch.tensor(float(n + 1))
    hub.create("me/kohya", {"a.safetensors": save(adapter)})
    with loratool.streaming():
        rows = loratool.inspect("hf://me/kohya/a.safetensors").rows
    assert [row["alpha"] for row in rows] == [float(n + 1) for n in range(8)]
    assert not (tmp_path / "hf-home/hub").exists()


def test_a_signed_address_is_in_no_log(hub: Hub, pair, tmp_path, caplog):
    hub.fail("GET /cdn", cut=300, times=3, skip=4)
    loratool.merge("org/base", ["me/adapter"], tmp_path / "fetched")
    assert "Error while downloading" in caplog.text
    assert "signature" not in caplog.text


def test_a_mirror_may_have_etags_of_its_own(hub: Hub, pair, tmp_path, monkeypatch):
    asked = huggingface_hub.get_hf_file_metadata
    told = lambda *words, **names: replace(asked(*words, **names), etag="0f3a-of-the-mirror")  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", told)
    with loratool.streaming():
        loratool.merge("org/base", ["me/adapter"], tmp_path / "out")
    assert (tmp_path / "out/config.json").is_file()
