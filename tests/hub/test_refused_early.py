"""What is refused before the Hub, or a folder here, holds anything of it."""

from __future__ import annotations

import shlex

import pytest
from tiny_files import run_main, snapshot, write_adapter, write_base

import loratool
from loratool import Publishing
from loratool.errors import HubError, UsageError
from loratool.storage import hub_names
from loratool.testing.hub import Hub

pytest_plugins = ["hub_fixtures"]


@pytest.fixture
def adapter(tmp_path):
    return write_adapter(tmp_path / "adapter", base_model_name_or_path="org/base", task_type="CAUSAL_LM")


def writes(requests: list) -> list:
    return [r for r in requests if r.method in ("POST", "PUT") and "validate-yaml" not in r.path]


@pytest.mark.parametrize("query", ["token=hf_SECRETxyz", "download=true&token=hf_SECRETxyz", "token=hf_SECRETxyz&x"])
def test_an_address_with_a_query_is_refused_and_not_shown(hub: Hub, query, tmp_path, capsys):
    hub.create("org/ad", snapshot(write_adapter(tmp_path / "a")))
    assert run_main("inspect", f"{hub.url}/org/ad?{query}") == 2
    assert run_main("combine", f"{hub.url}/org/ad", "org/ad", "-o", f"{hub.url}/me/new?{query}") == 2
    shown = capsys.readouterr()
    assert "SECRET" not in shown.out + shown.err
    assert "me/new" not in hub.repos


def test_the_query_of_a_download_button_is_understood(hub: Hub):
    address = f"{hub.url}/org/ad/resolve/main/x.safetensors?download=true"
    assert hub_names.parse(address) == hub_names.HubName("org/ad", "main", "x.safetensors")


def test_a_name_of_one_word_is_refused_before_anything_is_made(hub: Hub, adapter):
    with pytest.raises(UsageError) as caught:
        loratool.push(adapter, to="hf://me")
    assert "org/name" in caught.value.what + caught.value.hint
    assert not hub.repos


def test_a_branch_of_a_repository_that_is_not_there_is_refused_before_it_is_made(hub: Hub, adapter):
    with pytest.raises(HubError, match="no repository") as caught:
        loratool.push(adapter, to="me/new", publish=Publishing(revision="dev"))
    assert "main" in caught.value.hint
    assert not hub.repos
    loratool.push(adapter, to="me/new", publish=Publishing(revision="main"))
    assert "adapter_model.safetensors" in hub.files("me/new")


def test_a_card_that_the_hub_refuses_leaves_no_repository_behind(hub: Hub, adapter):
    hub.fail("POST /api/validate-yaml", status=400, times=9)
    with pytest.raises(HubError, match=r"README\.md: the Hub refuses") as caught, hub.counted() as requests:
        loratool.push(adapter, to="me/new")
    assert "metadata" in caught.value.hint
    assert not hub.repos
    assert not writes(requests)


@pytest.mark.parametrize("out", ["hf://me/copy", "https://huggingface.co/me/copy"])
def test_pull_writes_to_no_address(hub: Hub, adapter, tmp_path, monkeypatch, out):
    hub.create("org/ad", snapshot(adapter))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run_main("pull", "org/ad", "-o", out) == 2
    assert run_main("inspect", "org/ad", "--report", out) == 2
    assert run_main("pull", "org/ad", "-o", "copy", "--report", out) == 2
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize("branch", ["v2", "feature/two"])
def test_the_way_to_push_again_goes_where_the_output_was_to_go(hub: Hub, adapter, tmp_path, branch):
    hub.create("org/base", snapshot(write_base(tmp_path / "base")))
    hub.create("me/there")
    hub.commit("me/there", {"x.txt": "1"}, branch)
    hub.fail("POST /api/models/me/there/commit", status=412)
    out = f"hf://me/there@{branch.replace('/', '%2F')}/folder/sub"
    publish = Publishing(create_pr=True, message="it's first", licence="mit")
    with pytest.raises(HubError) as caught:
        loratool.combine([adapter, adapter], out, publish=publish)
    command = shlex.split(caught.value.hint.partition("loratool ")[2])
    assert run_main(*command) == 0
    sent = hub.files("me/there", "refs/pr/1")
    assert "folder/sub/adapter_model.safetensors" in sent
    assert "x.txt" in sent
    repo = hub.repos["me/there"]
    assert repo.at("refs/pr/1").message == "it's first"
    assert b"license: mit" in sent["folder/sub/README.md"]


@pytest.mark.parametrize(("files", "told"), [({"README.md": "# x", "a.txt": "1"}, "a.txt"), ({}, "no files")])
def test_a_repository_without_weights_says_what_it_holds(hub: Hub, tmp_path, files, told, capsys):
    hub.create("me/txt", files)
    base = write_base(tmp_path / "base")
    assert run_main("inspect", "me/txt") == 4
    assert told in " ".join(capsys.readouterr().err.split())
    assert run_main("merge", base, "me/txt", "-o", tmp_path / "out") == 4
    assert run_main("merge", "me/txt", base, "-o", tmp_path / "out") == 4
    assert "right repository" in " ".join(capsys.readouterr().err.split())


def test_a_model_in_the_place_of_an_adapter_is_still_called_one(hub: Hub, tmp_path, capsys):
    hub.create("org/base", snapshot(write_base(tmp_path / "base")))
    assert run_main("inspect", "org/base") == 3
    assert "model" in capsys.readouterr().err
