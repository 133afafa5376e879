"""Where a push goes, and what is said of a place that is not as the command line says."""

from __future__ import annotations

import pytest
from tiny_files import run_main, snapshot, write_adapter

import loratool
from loratool import Publishing
from loratool.errors import HubError, UsageError
from loratool.testing.hub import Hub

pytest_plugins = ["hub_fixtures"]


@pytest.fixture
def adapter(tmp_path):
    return write_adapter(tmp_path / "adapter", base_model_name_or_path="org/base", task_type="CAUSAL_LM")


@pytest.fixture
def file(adapter, tmp_path):
    out = tmp_path / "made.safetensors"
    loratool.convert(adapter, out, to="kohya", arch="llama")
    return out


@pytest.mark.parametrize("dry_run", [True, False])
def test_private_does_not_hide_what_everybody_sees(hub: Hub, adapter, dry_run):
    hub.create("me/open")
    hub.create("me/hidden", private=True)
    before = hub.head("me/open")
    with pytest.raises(HubError, match="and public"):
        loratool.push(adapter, to="me/open", publish=Publishing(private=True, dry_run=dry_run))
    assert hub.head("me/open") == before
    for repo in ("me/hidden", "me/new"):
        loratool.push(adapter, to=repo, publish=Publishing(private=True, dry_run=dry_run))
    assert dry_run or hub.repos["me/new"].private


@pytest.mark.parametrize("path", ["x.safetensors", "sub/x.safetensors"])
def test_a_file_goes_where_the_address_of_a_file_says(hub: Hub, file, path):
    loratool.push(file, to=f"hf://me/sf/{path}")
    files = hub.files("me/sf")
    assert files.keys() == {path, f"{path.rpartition('/')[0]}/README.md".lstrip("/")}
    assert files[path] == file.read_bytes()
    assert "nothing to do" in loratool.push(file, to=f"hf://me/sf/{path}").totals["result"]


def test_a_folder_is_not_sent_to_the_address_of_a_file(hub: Hub, adapter, file):
    for paths in ((adapter,), (file, adapter / "adapter_model.safetensors")):
        with pytest.raises(UsageError, match="one file"):
            loratool.push(*paths, to="hf://me/sf/x.safetensors")
    assert not hub.repos


@pytest.mark.parametrize("step", [1, -1])
def test_weights_and_config_in_any_order(hub: Hub, adapter, step):
    paths = [adapter / "adapter_model.safetensors", adapter / "adapter_config.json"][::step]
    loratool.push(*paths, to="me/two")
    assert {k: v for k, v in hub.files("me/two").items() if k != "README.md"} == snapshot(adapter)


def test_a_dry_run_without_a_token_asks_who_is_there(hub: Hub, adapter, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    assert run_main("push", adapter, "me/new", "-n") == 4
    told = capsys.readouterr().err
    assert "HF_TOKEN" in told
    assert "local path" not in told


def test_a_push_without_a_connection_does_not_speak_of_the_cache(hub: Hub, adapter):
    hub.fail("", times=99)
    with pytest.raises(HubError) as caught:
        loratool.push(adapter, to="me/new")
    assert caught.value.missing == "connection"
    assert "again" in caught.value.hint
    assert "OFFLINE" not in caught.value.hint
