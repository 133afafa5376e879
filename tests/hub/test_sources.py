"""Sources on the Hub, over real HTTP with huggingface_hub's own client: what is asked for, and what is not."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save
from tiny_files import DOWN1, Q0, factors, tensors_of_llama, write_adapter, write_base, write_sharded

import loratool
from loratool.errors import HubError, UsageError
from loratool.storage import location
from loratool.testing.hub import READ_TOKEN, Hub

pytest_plugins = ["hub_fixtures"]


def large(folder: Path, rank: int = 64) -> Path:
    """An adapter whose data is much more than its header."""
    generator = torch.Generator().manual_seed(1)
    name = f"base_model.model.{Q0}.lora_"
    factors = {
        f"{name}A.weight": torch.randn(rank, 4096, generator=generator),
        f"{name}B.weight": torch.randn(64, rank),
    }
    return write_adapter(folder, factors, r=rank)


def sent(requests: list) -> int:
    return sum(request.sent for request in requests)


def test_inspect_asks_for_the_list_the_config_and_the_header_alone(hub: Hub, tmp_path):
    folder = large(tmp_path / "adapter")
    hub.create("me/adapter", folder)
    with hub.counted() as requests:
        report = loratool.inspect("me/adapter")
    local = loratool.inspect(folder)
    assert (report.rows, report.totals) == (local.rows, local.totals)
    requests = [r for r in requests if r.path != "/api/agent-harnesses"]  # the client's own, once a day
    asked = [r for r in requests if "/cdn/" not in r.path]  # where large files lie is told by a redirection
    assert [(r.method, r.path.partition("?")[0]) for r in asked] == [
        ("GET", "/api/models/me/adapter/revision/main"),
        ("GET", f"/me/adapter/resolve/{hub.head('me/adapter')}/adapter_model.safetensors"),
        ("GET", f"/me/adapter/resolve/{hub.head('me/adapter')}/adapter_config.json"),
    ]
    assert len(requests) == 4
    assert sent(requests) < 300_000 < (folder / "adapter_model.safetensors").stat().st_size
    assert report.sources == {"adapter": f"me/adapter@{hub.head('me/adapter')}"}


def test_a_branch_is_a_commit_from_the_first_request_on(hub: Hub, tmp_path):
    old, new = write_adapter(tmp_path / "old"), write_adapter(tmp_path / "new", lora_alpha=99)
    first = hub.create("me/adapter", old)
    hub.commit("me/adapter", {"adapter_config.json": (new / "adapter_config.json").read_bytes()}, "v2")
    for name, alpha in ((f"me/adapter@{first}", 8), ("me/adapter", 8), ("hf://me/adapter@v2", 99)):
        assert loratool.inspect(name).rows[0]["alpha"] == alpha, name
    hub.repos["me/adapter"].refs["refs/pr/7"] = hub.head("me/adapter", "v2")
    for name in (
        "hf://me/adapter@refs/pr/7",
        f"{hub.url}/me/adapter/tree/v2",
        f"{hub.url}/me/adapter/tree/refs%2Fpr%2F7",
    ):
        assert loratool.inspect(name).rows[0]["alpha"] == 99, name


def test_a_file_and_a_folder_in_a_repository_are_sources(hub: Hub, tmp_path):
    folder = write_adapter(tmp_path / "adapter")
    inside = {f"sub/{p.name}": p.read_bytes() for p in folder.iterdir()}
    loratool.convert(folder, tmp_path / "style.safetensors", to="kohya", arch="llama")
    hub.create("me/many", {**inside, "style.safetensors": (tmp_path / "style.safetensors").read_bytes()})
    rows = loratool.inspect(folder).rows
    assert loratool.inspect("hf://me/many/sub").rows == rows
    assert loratool.inspect("hf://me/many/sub/adapter_model.safetensors").rows == rows
    kohya = loratool.inspect(f"{hub.url}/me/many/blob/main/style.safetensors", arch="llama")
    assert [row["alpha"] for row in kohya.rows] == [row["alpha"] for row in rows]


def test_alphas_that_lie_all_over_a_large_file_are_asked_for_alone(hub: Hub, tmp_path):
    folder, out = large(tmp_path / "adapter"), tmp_path / "style.safetensors"
    loratool.convert(folder, out, to="kohya", arch="llama")
    data = out.read_bytes()
    hub.create("me/style", {"style.safetensors": data})
    with hub.counted() as requests:
        report = loratool.inspect("me/style", arch="llama")
    assert report.rows == loratool.inspect(out, arch="llama").rows
    assert sent(requests) < 300_000 < len(data)


@pytest.fixture
def pair(hub: Hub, tmp_path) -> tuple[Path, Path]:
    base, adapter = write_sharded(tmp_path / "base"), write_adapter(tmp_path / "adapter")
    (base / "README.md").write_text("# a card")
    hub.create("org/base", base)
    hub.create("me/adapter", adapter)
    return base, adapter


def test_merge_from_the_hub_is_merge_from_the_disk(hub: Hub, pair, tmp_path):
    base, adapter = pair
    remote = loratool.merge("org/base", ["me/adapter"], tmp_path / "remote")
    loratool.merge(base, [adapter], tmp_path / "local")
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "config.json"):
        assert (tmp_path / "remote" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    record = json.loads((tmp_path / "remote/loratool.report.json").read_text())
    wanted = {"base": f"org/base@{hub.head('org/base')}", "adapter 1": f"me/adapter@{hub.head('me/adapter')}"}
    assert record["sources"] == remote.sources == wanted


def test_the_headers_of_many_shards_are_asked_for_once_each(hub: Hub, tmp_path):
    hub.create("org/wide", write_sharded(tmp_path / "wide", shards=7))
    hub.create("me/adapter", write_adapter(tmp_path / "adapter"))
    with hub.counted() as requests:
        loratool.merge("org/wide", ["me/adapter"], tmp_path / "out", dry_run=True)
    asked = [r.path for r in requests if r.path.endswith(".safetensors")]
    assert len(asked) == len(set(asked)) == 8


def test_a_header_longer_than_the_first_look(hub: Hub, tmp_path):
    shapes = {f"model.layers.{n}.self_attn.{p}_proj": (16, 16) for n in range(700) for p in "qk"}
    folder = write_adapter(tmp_path / "deep", factors(shapes=shapes, rank=1), r=1)
    assert int.from_bytes((folder / "adapter_model.safetensors").read_bytes()[:8], "little") > 300_000
    hub.create("me/deep", folder)
    assert loratool.inspect("me/deep").rows == loratool.inspect(folder).rows


def test_a_dry_run_and_a_refusal_fetch_no_weights(hub: Hub, pair, tmp_path):
    odd = write_adapter(tmp_path / "odd", {f"base_model.model.{Q0}.lora_A.weight": torch.ones(4, 99)})
    hub.create("me/odd", odd)
    with hub.counted() as requests:
        loratool.merge("org/base", ["me/adapter"], tmp_path / "out", dry_run=True)
        with pytest.raises(loratool.errors.InputError):
            loratool.merge("org/base", ["me/odd"], tmp_path / "out")
    assert not any(r.method == "HEAD" for r in requests)  # how huggingface_hub begins a download
    assert not (tmp_path / "out").exists()


def test_what_was_fetched_once_is_not_fetched_again(hub: Hub, pair, tmp_path):
    loratool.merge("org/base", ["me/adapter"], tmp_path / "one")
    with hub.counted() as requests:
        loratool.merge("org/base", ["me/adapter"], tmp_path / "two")
    assert not [r for r in requests if "/cdn/" in r.path]


def test_extract_resize_convert_compare_and_combine_take_names(hub: Hub, pair, tmp_path):
    tuned = tensors_of_llama()
    tuned[f"{DOWN1}.weight"] += 0.01 * torch.randn(16, 4) @ torch.randn(4, 24)
    hub.create("org/tuned", write_base(tmp_path / "tuned", tuned))
    loratool.extract("org/tuned", "org/base", tmp_path / "delta", rank=4)
    config = json.loads((tmp_path / "delta/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    loratool.resize("me/adapter", tmp_path / "small", rank=2)
    loratool.convert("me/adapter", tmp_path / "kohya.safetensors", to="kohya", base="org/base")
    assert loratool.compare("me/adapter", tmp_path / "kohya.safetensors", arch="llama").totals["equal"] is True
    loratool.combine(["me/adapter", tmp_path / "small"], tmp_path / "both")
    assert load_file(tmp_path / "both/adapter_model.safetensors")


def test_verify_after_a_merge_from_the_hub(hub: Hub, pair, tmp_path):
    report = loratool.merge("org/base", ["me/adapter"], tmp_path / "out", verify=True)
    assert report.totals["verified_tensors"]


def test_a_local_path_wins(hub: Hub, pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_adapter(tmp_path / "me/adapter", lora_alpha=77)
    with hub.counted() as requests:
        assert loratool.inspect("me/adapter").rows[0]["alpha"] == 77
    assert not requests
    assert loratool.inspect("hf://me/adapter").rows[0]["alpha"] == 8


def failure(*arguments: object, **settings: object) -> HubError:
    with pytest.raises(HubError) as caught:
        loratool.inspect(*arguments, **settings)
    assert caught.value.exit_code == 4
    return caught.value


def test_a_repository_or_revision_or_file_that_is_not_there(hub: Hub, pair):
    assert "no repository" in str(failure("me/none"))
    assert "no revision 'v9'" in str(failure("me/adapter@v9"))
    assert "no 'sub'" in str(failure("hf://me/adapter/sub"))


def test_a_private_repository_wants_a_token(hub: Hub, tmp_path, monkeypatch):
    hub.create("you/secret", write_adapter(tmp_path / "adapter"), private=True)
    assert loratool.inspect("you/secret").rows
    location.forget()
    monkeypatch.setenv("HF_TOKEN", "")
    assert "HF_TOKEN" in failure("you/secret").hint
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "does not accept this token" in str(failure("you/secret"))


def test_a_gated_repository_says_where_to_ask(hub: Hub, tmp_path):
    hub.create("you/gated", write_adapter(tmp_path / "adapter"), gated=True, readers={READ_TOKEN})
    problem = failure("you/gated")
    assert "restricted" in str(problem)
    assert f"{hub.url}/you/gated" in problem.hint


@pytest.mark.parametrize("status", [403, 429, 500, 503])
def test_what_the_hub_answers_is_explained(hub: Hub, pair, status):
    hub.fail("revision", status, times=9)
    problem = failure("me/adapter")
    assert problem.hint
    assert {403: "refuses", 429: "wait"}.get(status, str(status)) in str(problem)


def test_a_moment_of_trouble_is_waited_for(hub: Hub, pair):
    hub.fail("", 503, times=2)
    hub.fail("adapter_model", 429)
    hub.fail("adapter_config")
    assert loratool.inspect("me/adapter").rows


def test_a_download_that_is_cut_goes_on(hub: Hub, tmp_path):
    folder = large(tmp_path / "adapter")
    hub.create("me/adapter", folder)
    for at in (1, 1000, 700_000):
        hub.fail("GET /cdn", cut=at)
    loratool.resize("me/adapter", tmp_path / "remote", rank=4)
    loratool.resize(folder, tmp_path / "local", rank=4)
    name = "adapter_model.safetensors"
    assert (tmp_path / "remote" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


def test_bytes_are_equal_after_a_hundred_cuts(hub: Hub, tmp_path):
    random = Random(0)
    for n in range(25):
        data = random.randbytes(100_000)
        hub.create(f"me/x{n}", {"a.safetensors": data})
        for at in sorted(random.randrange(100_000) for _ in range(4)):
            hub.fail("GET /cdn", cut=at)
        loratool.pull(f"hf://me/x{n}/a.safetensors", tmp_path / f"{n}.safetensors")
        assert (tmp_path / f"{n}.safetensors").read_bytes() == data


def test_an_endpoint_that_others_can_read_is_said(hub: Hub, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(location, "announce", lambda source, text: told.append(text))
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    with pytest.raises(UsageError):
        loratool.inspect("https://huggingface.co/datasets/a/b")
    location.warn_of_open_endpoint()
    assert "not https" in told[0]


def test_offline_the_cache_is_used_or_the_gap_named(hub: Hub, pair, tmp_path, monkeypatch):
    from huggingface_hub import constants

    loratool.merge("org/base", ["me/adapter"], tmp_path / "one")
    location.forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with hub.counted() as requests:
        report = loratool.merge("org/base", ["me/adapter"], tmp_path / "two")
        assert report.sources["base"] == f"org/base@{hub.head('org/base')}"
        assert "HF_HUB_OFFLINE" in str(failure("me/other"))
        snapshot = Path(constants.HF_HUB_CACHE, "models--me--adapter/snapshots", hub.head("me/adapter"))
        (snapshot / "adapter_model.safetensors").unlink()
        location.forget()
        assert "not complete" in str(failure("me/adapter"))
    assert not requests


def test_without_a_connection_the_cache_is_used(hub: Hub, pair, tmp_path):
    loratool.merge("org/base", ["me/adapter"], tmp_path / "one")
    location.forget()
    hub.fail("", times=99)
    assert loratool.inspect("me/adapter").rows


def test_large_files_by_xet(xet_hub: Hub, tmp_path):
    folder = large(tmp_path / "adapter")
    xet_hub.create("me/adapter", folder)
    loratool.resize("me/adapter", tmp_path / "remote", rank=4)
    loratool.resize(folder, tmp_path / "local", rank=4)
    name = "adapter_model.safetensors"
    assert (tmp_path / "remote" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    assert any("xet-read-token" in r.path for r in xet_hub.requests)


def test_a_repository_without_an_adapter(hub: Hub):
    hub.create("me/words", {"README.md": "# nothing"})
    with pytest.raises(loratool.LoratoolError) as caught:
        loratool.inspect("me/words")
    assert "me/words@" in str(caught.value)
    assert str(Path.home()) not in str(caught.value)


@pytest.mark.parametrize("name", ["../outside", "/etc/x", "a\x1b[2J", "C:\\x"])
def test_names_that_leave_the_folder_are_refused(hub: Hub, name):
    hub.create("me/odd", {name: b"x"})
    assert "called" in str(failure("me/odd"))


def test_offline_a_pipeline_of_which_a_part_was_fetched_is_not_merged(hub: Hub, tmp_path, monkeypatch):
    """A UNet that was fetched for an inspection must not become the whole pipeline without a VAE."""
    import huggingface_hub
    from huggingface_hub import constants

    unet = {"conv_in.weight": torch.ones(4, 4, 3, 3)}
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    index |= {"vae": ["diffusers", "AutoencoderKL"], "safety_checker": [None, None]}
    files = {"model_index.json": json.dumps(index), "unet/config.json": '{"_class_name": "UNet2DConditionModel"}'}
    weights = {f"{name}/diffusion_pytorch_model.safetensors": save(unet) for name in ("unet", "vae")}
    hub.create("org/pipeline", {**files, **weights, "vae/config.json": "{}"})
    huggingface_hub.snapshot_download("org/pipeline", allow_patterns=["*.json", "unet/*"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(loratool.LoratoolError, match="no weights in vae/") as caught:
        loratool.merge("org/pipeline", [write_adapter(tmp_path / "adapter")], tmp_path / "out")
    assert "HF_HUB_OFFLINE" in caught.value.hint
    location.forget()
    huggingface_hub.constants.HF_HUB_OFFLINE = False
    huggingface_hub.snapshot_download("org/pipeline")
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    with pytest.raises(loratool.LoratoolError) as caught:  # now it is whole, and the adapter is for another model
        loratool.merge("org/pipeline", [tmp_path / "adapter"], tmp_path / "out")
    assert "vae" not in str(caught.value)
