"""The family of an adapter whose names fit many: its base on the Hub says it, by its config alone."""

from __future__ import annotations

import pytest
from tiny_files import snapshot, write_adapter, write_base

import loratool
from loratool.opening import open_adapter
from loratool.storage import location
from loratool.testing.hub import Hub

pytest_plugins = ["hub_fixtures"]

CONFIG = "/org/base/resolve/main/config.json"


@pytest.fixture
def adapter(hub: Hub, tmp_path):
    folder = write_adapter(tmp_path / "adapter", base_model_name_or_path="org/base", task_type="CAUSAL_LM")
    hub.create("me/ad", snapshot(folder))
    return folder


def families(source: object) -> tuple[str, ...]:
    location.forget()
    return open_adapter(source).families


def test_a_base_on_the_hub_says_which_family(hub: Hub, adapter, tmp_path):
    several = families("me/ad")
    assert len(several) > 1
    hub.create("org/base", snapshot(write_base(tmp_path / "base", model_type="mistral", architectures=[])))
    with hub.counted() as requests:
        assert families("me/ad") == ("mistral",)
    assert [r.path for r in requests if "org/base" in r.path] == [CONFIG]  # no list, and no weights
    loratool.convert("me/ad", tmp_path / "out.safetensors", to="kohya")


def test_an_adapter_of_this_machine_asks_nobody(hub: Hub, adapter):
    with hub.counted() as requests:
        assert len(families(adapter)) > 1
    assert not requests


@pytest.mark.parametrize(
    "config", [b"\xff", b"[1]", b"{", b'{"model_type": "bert"}', b'{"model_type": []}', b"{" * 9000]
)
def test_a_config_that_says_nothing_of_use_changes_nothing(hub: Hub, adapter, config):
    several = families("me/ad")
    hub.create("org/base", {"config.json": config})
    assert families("me/ad") == several


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_a_base_that_nobody_may_see_is_passed_over_in_silence(hub: Hub, adapter, capsys, status):
    hub.fail(CONFIG, status=status, times=9)
    with hub.counted() as requests:
        assert len(families("me/ad")) > 1
    assert len([r for r in requests if r.path == CONFIG]) == 1
    assert "org/base" not in capsys.readouterr().err


def test_a_family_that_is_known_is_not_asked_for(hub: Hub, adapter):
    with hub.counted() as requests:
        assert open_adapter("me/ad", arch="llama").families == ("llama",)
    assert not [r for r in requests if "org/base" in r.path]
