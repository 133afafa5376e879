"""Without the Hub, with a part of a repository in the cache: what is not there is said, and guessed by nobody."""

from __future__ import annotations

import huggingface_hub
import pytest
from tiny_files import run_main, snapshot, write_adapter, write_base

import loratool
from loratool.errors import HubError
from loratool.storage import location
from loratool.testing.hub import Hub

pytest_plugins = ["hub_fixtures"]


@pytest.fixture
def adapter(tmp_path):
    return write_adapter(tmp_path / "adapter", lora_alpha=8)


@pytest.fixture
def base(hub: Hub, tmp_path):
    files = snapshot(write_base(tmp_path / "base"))
    hub.create("org/base", {**files, "tokenizer.json": "{}", "chat_template.jinja": "x", "notes.md": "y"})
    return "org/base"


def offline(monkeypatch) -> None:
    location.forget()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_weights_without_their_config_are_a_part_of_an_adapter(hub: Hub, base, adapter, tmp_path, monkeypatch):
    hub.create("org/ad", snapshot(adapter))
    huggingface_hub.hf_hub_download("org/ad", "adapter_model.safetensors")
    offline(monkeypatch)
    with pytest.raises(HubError, match=r"not complete: .*adapter_config\.json") as caught:
        loratool.inspect("org/ad")
    assert "HF_HUB_OFFLINE" in caught.value.hint
    assert run_main("merge", tmp_path / "base", "org/ad", "-o", tmp_path / "out") == 4


def test_weights_that_never_had_a_config_are_read(hub: Hub, tmp_path, adapter, monkeypatch):
    hub.create("org/ad", {"adapter_model.safetensors": (adapter / "adapter_model.safetensors").read_bytes()})
    rows = loratool.inspect("org/ad").rows
    huggingface_hub.snapshot_download("org/ad")
    offline(monkeypatch)
    assert loratool.inspect("org/ad").rows == rows


def warned(report: loratool.Report) -> list[str]:
    return [f.what for f in report.findings if f.level == "warning" and "cache" in f.what]


@pytest.mark.parametrize("seen", [True, False])
def test_a_merge_says_what_the_cache_lacks_of_the_base(base, adapter, tmp_path, monkeypatch, seen):
    if seen:
        loratool.merge(base, [adapter], tmp_path / "out", dry_run=True)
    huggingface_hub.snapshot_download(base, allow_patterns=["*.safetensors", "config.json"])
    offline(monkeypatch)
    report = loratool.merge(base, [adapter], tmp_path / "out")
    assert not (tmp_path / "out/tokenizer.json").exists()
    (text,) = warned(report)
    assert "tokenizer" in text
    assert ("chat_template.jinja" in text) is seen
    assert "notes.md" not in text


def test_a_merge_from_a_whole_cache_warns_of_nothing(hub: Hub, base, adapter, tmp_path, monkeypatch):
    loratool.merge(base, [adapter], tmp_path / "online")
    offline(monkeypatch)
    report = loratool.merge(base, [adapter], tmp_path / "offline")
    assert not warned(report)
    assert (tmp_path / "offline/tokenizer.json").exists()
