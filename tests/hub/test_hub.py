"""The test Hub behaves like the Hub towards huggingface_hub, the real client; and what its page says works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors
from tiny_files import environment

from loratool.testing.hub import READ_TOKEN, Hub

pytest_plugins = ["hub_fixtures"]

BLOB = os.urandom(300_000)


@pytest.fixture(params=["lfs", "xet"])
def either(request) -> Hub:
    return request.getfixturevalue("hub" if request.param == "lfs" else "xet_hub")


def additions(large: Path, **more: bytes) -> list[CommitOperationAdd]:
    large.write_bytes(BLOB)
    texts = [CommitOperationAdd(name, data) for name, data in {"c.json": b"{}", **more}.items()]
    return [CommitOperationAdd("a.safetensors", str(large)), *texts]


def test_commits_downloads_and_pull_requests(either: Hub, tmp_path):
    api, large = HfApi(), tmp_path / "a.safetensors"
    assert api.whoami()["name"] == "me"
    api.create_repo("me/x")
    api.create_repo("me/x", exist_ok=True)
    done = api.create_commit("me/x", additions(large), commit_message="one", parent_commit=either.head("me/x"))
    assert either.files("me/x") == {"a.safetensors": BLOB, "c.json": b"{}"}
    again = api.create_commit("me/x", additions(large), commit_message="two")
    assert again.oid == done.oid == either.head("me/x")
    asked = api.create_commit("me/x", additions(large, **{"d.json": b"[]"}), commit_message="three", create_pr=True)
    assert asked.pr_revision == "refs/pr/1"
    assert "d.json" not in either.files("me/x")
    folder = Path(huggingface_hub.snapshot_download("me/x", revision="refs/pr/1"))
    assert (folder / "a.safetensors").read_bytes() == BLOB
    assert (folder / "d.json").read_bytes() == b"[]"
    api.create_commit("me/x", [CommitOperationDelete("c.json")], commit_message="four")
    assert api.list_repo_files("me/x") == ["a.safetensors"]


def test_upload_folder_cards_and_the_file_system(hub: Hub, tmp_path):
    (tmp_path / "folder/sub").mkdir(parents=True)
    (tmp_path / "folder/README.md").write_text("---\nlicense: mit\n---\n# x\n")
    (tmp_path / "folder/sub/a.bin").write_bytes(BLOB)
    hub.create("me/x")
    HfApi().upload_folder(repo_id="me/x", folder_path=tmp_path / "folder")
    assert huggingface_hub.ModelCard.load("me/x").data.license == "mit"
    files = huggingface_hub.HfFileSystem(skip_instance_cache=True)
    assert sorted(files.ls("me/x", detail=False)) == ["me/x/README.md", "me/x/sub"]
    assert files.cat("me/x/sub/a.bin") == BLOB


def test_errors_are_those_of_the_hub(hub: Hub, tmp_path, monkeypatch):
    api = HfApi()
    hub.create("you/gated", {"a.json": "{}"}, gated=True, readers={READ_TOKEN})
    hub.create("you/secret", {"a.json": "{}"}, private=True)
    with pytest.raises(errors.RepositoryNotFoundError):
        api.model_info("me/none")
    with pytest.raises(errors.RepositoryNotFoundError):
        HfApi(token=False).model_info("you/secret")
    with pytest.raises(errors.RevisionNotFoundError):
        api.model_info("you/secret", revision="v9")
    with pytest.raises(errors.EntryNotFoundError):
        huggingface_hub.hf_hub_download("you/secret", "none.json")
    with pytest.raises(errors.GatedRepoError):
        huggingface_hub.hf_hub_download("you/gated", "a.json")
    assert Path(huggingface_hub.hf_hub_download("you/gated", "a.json", token=READ_TOKEN)).read_text() == "{}"
    for token, owner, status in ((READ_TOKEN, "me", 403), ("hf_wrong", "me", 401), (None, "me/--x", 0)):
        with pytest.raises((errors.HfHubHTTPError, errors.HFValidationError)) as caught:
            api.create_repo(f"{owner}/x" if status else owner, token=token)
        assert not status or caught.value.response.status_code == status
    with pytest.raises(errors.HfHubHTTPError) as caught:
        api.create_commit("you/secret", additions(tmp_path / "a"), commit_message="x", parent_commit="0" * 40)
    assert caught.value.response.status_code == 412
    with pytest.raises(ValueError, match="YAML"):
        api.upload_file(path_or_fileobj=b"---\ntags: [a\n---\n", path_in_repo="README.md", repo_id="you/secret")


def test_ranges_and_cuts(hub: Hub):
    hub.create("me/x", {"a.safetensors": BLOB})
    session = huggingface_hub.get_session()
    answer = session.get(f"{hub.url}/me/x/resolve/main/a.safetensors", headers={"Range": "bytes=10-19"})
    assert answer.status_code == 206
    assert answer.content == BLOB[10:20]
    assert answer.headers["Content-Range"] == f"bytes 10-19/{len(BLOB)}"
    assert session.get(answer.url, headers={"Range": f"bytes={len(BLOB)}-"}).status_code == 416
    for at in range(0, len(BLOB), 80_000):
        hub.fail("cdn", cut=at)
    assert Path(huggingface_hub.hf_hub_download("me/x", "a.safetensors")).read_bytes() == BLOB


def test_the_example_of_the_page_works(tmp_path):
    page = (Path(__file__).parents[2] / "docs/hub.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    first, _, rest = block.partition("\n")
    (tmp_path / "conftest.py").write_text(first.removeprefix("# conftest.py: "))
    (tmp_path / "test_page.py").write_text(rest)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert "2 passed" in done.stdout, done.stdout + done.stderr
