"""The test Hub as pytest fixtures. In a conftest.py: `pytest_plugins = ["loratool.testing.fixtures"]`.

    def test_my_tool_pushes(hub):
        hub.create("me/adapter")
        huggingface_hub.HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="a.json", repo_id="me/adapter")
        assert hub.files("me/adapter") == {"a.json": b"{}"}

Inside such a test this process and those that it starts talk to that Hub, with a token that may write, a cache of
their own, and short waits between attempts. `xet_hub` is the same with large files by the xet protocol.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loratool.testing.hub import TOKEN, Hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub without repositories, and huggingface_hub pointed to it."""
    with Hub() as server, connected(server, tmp_path / "hf-home", monkeypatch):
        yield server


@pytest.fixture
def xet_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The same Hub, where large files come and go by the xet protocol (needs hf_xet)."""
    pytest.importorskip("hf_xet")
    store = tmp_path / "xet-store"
    store.mkdir()
    with Hub(xet=store) as server, connected(server, tmp_path / "hf-home", monkeypatch):
        yield server


@contextmanager
def connected(
    server: Hub, home: Path, monkeypatch: pytest.MonkeyPatch, token: str | None = TOKEN
) -> Iterator[dict[str, str]]:
    """Point this process and its children to a Hub; yield the environment variables.

    huggingface_hub reads them when it is imported. Where it has been, its constants are set too.
    """
    variables = server.environment(home, token)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    from huggingface_hub import constants

    session: Any = import_module("huggingface_hub.utils._http")
    settings: dict[str, Any] = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": variables["HF_HUB_CACHE"],
        "HF_TOKEN_PATH": variables["HF_TOKEN_PATH"],
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_XET_CACHE": str(home / "xet"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": not server.xet,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
    }
    for name, setting in settings.items():
        monkeypatch.setattr(constants, name, setting, raising=False)
    monkeypatch.setattr(import_module("huggingface_hub.hf_api").api, "endpoint", server.url)
    impatient = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    for module in (session, import_module("huggingface_hub.file_download")):
        monkeypatch.setattr(module, "time", impatient)
    session.close_session()
    try:
        yield variables
    finally:
        session.close_session()
