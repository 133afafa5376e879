"""push, pull and -o hf://, over real HTTP with huggingface_hub's own client: one commit, or the state from before."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from tiny_files import environment, run_main, snapshot, write_adapter, write_base

import loratool
from loratool import Publishing
from loratool.errors import HubError, LoratoolError, UsageError
from loratool.storage import location
from loratool.testing.hub import READ_TOKEN, Hub

pytest_plugins = ["hub_fixtures"]


def metadata(card: bytes | str) -> dict:
    text = card.decode() if isinstance(card, bytes) else card
    return yaml.safe_load(text.split("---")[1])


@pytest.fixture
def adapter(tmp_path) -> Path:
    return write_adapter(tmp_path / "adapter", base_model_name_or_path="org/base", task_type="CAUSAL_LM")


@pytest.fixture
def base(hub: Hub, tmp_path) -> str:
    folder = write_base(tmp_path / "base")
    hub.create("org/base", {**snapshot(folder), "README.md": "---\nlicense: llama3\n---\n# Base\n"})
    return "org/base"


def test_a_push_is_one_commit_that_peft_can_load(hub: Hub, base, adapter, tmp_path):
    report = loratool.push(adapter, to="me/adapter", publish=Publishing(message="first", private=True))
    repo = hub.repos["me/adapter"]
    assert len(repo.commits) == 2  # the Hub's own, and ours
    assert repo.private
    assert repo.commits[report.totals["commit"]].message == "first"
    files = hub.files("me/adapter")
    assert files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert files["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()


def test_pushing_again_does_nothing(hub: Hub, base, adapter):
    loratool.push(adapter, to="me/adapter")
    with hub.counted() as requests:
        report = loratool.push(adapter, to="me/adapter")
    assert "nothing to do" in report.totals["result"]
    assert {row["state"] for row in report.rows} == {"same"}
    assert not [r for r in requests if r.method in ("POST", "PUT")]
    assert len(hub.repos["me/adapter"].commits) == 2


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(hub: Hub, base, adapter):
    with hub.counted() as requests:
        report = loratool.push(adapter, to="me/adapter", publish=Publishing(dry_run=True))
    assert report.dry_run
    assert report.totals["repository"] == "will be created"
    assert "me/adapter" not in hub.repos
    assert not [r for r in requests if r.method in ("POST", "PUT")]
    loratool.push(adapter, to="me/adapter")
    (adapter / "extra.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    (adapter / "notes.txt").write_text("new")
    report = loratool.push(adapter, to="me/adapter", publish=Publishing(dry_run=True))
    states = {row["file"]: row["state"] for row in report.rows}
    assert states["extra.safetensors"] == "bytes are there"
    assert states["notes.txt"] == "new"
    assert states["adapter_model.safetensors"] == "same"
    assert report.totals["bytes_to_send"] == 3


def test_a_pull_request_leaves_the_branch_as_it_is(hub: Hub, base, adapter):
    before = hub.create("you/adapter", {"README.md": "---\nlicense: mit\n---\n"})
    hub.foreign.add("you")
    with pytest.raises(HubError) as caught:
        loratool.push(adapter, to="you/adapter")
    assert "--create-pr" in caught.value.hint
    report = loratool.push(adapter, to="you/adapter", publish=Publishing(create_pr=True))
    assert hub.head("you/adapter") == before
    assert "adapter_model.safetensors" in hub.files("you/adapter", "refs/pr/1")
    assert report.totals["pull_request"].endswith("/discussions/1")


def test_another_branch(hub: Hub, base, adapter):
    hub.create("me/adapter")
    hub.commit("me/adapter", {"x.txt": "1"}, "v2")
    loratool.push(adapter, to="me/adapter@v2")
    assert "adapter_model.safetensors" in hub.files("me/adapter", "v2")
    assert not hub.files("me/adapter")
    with pytest.raises(HubError, match="no revision 'v9'"):
        loratool.push(adapter, to="me/adapter", publish=Publishing(revision="v9"))


def test_two_formats_of_one_adapter_are_one_commit(hub: Hub, base, adapter, tmp_path):
    loratool.convert(adapter, tmp_path / "adapter.safetensors", to="kohya", arch="llama")
    loratool.push(adapter, tmp_path / "adapter.safetensors", to="me/both")
    assert len(hub.repos["me/both"].commits) == 2
    rows = loratool.inspect("me/both").rows
    assert [r["rank"] for r in loratool.inspect("hf://me/both/adapter.safetensors", arch="llama").rows] == [
        r["rank"] for r in rows
    ]


def test_somebody_was_faster(hub: Hub, base, adapter, monkeypatch):
    hub.create("me/adapter")
    other = hub.fault_for

    def interfere(request: str):
        if "POST" in request and "/commit/" in request:
            hub.commit("me/adapter", {"theirs.txt": "1"})
        return other(request)

    monkeypatch.setattr(hub, "fault_for", interfere)
    with pytest.raises(HubError, match="meanwhile") as caught:
        loratool.push(adapter, to="me/adapter")
    assert "--create-pr" in caught.value.hint
    assert hub.files("me/adapter") == {"theirs.txt": b"1"}


@pytest.mark.parametrize("lost", [False, True], ids=["dropped", "answer-lost"])
def test_a_connection_cut_at_each_request_leaves_the_old_state_or_the_new(hub: Hub, base, adapter, lost):
    old = {"README.md": b"---\nlicense: mit\n---\n", "notes.txt": b"old"}
    hub.create("me/zero", old)
    with hub.counted() as requests:
        loratool.push(adapter, to="me/zero")
    new, told = hub.files("me/zero"), len(requests)
    assert told > 6
    for n in range(told):
        name = f"me/cut{n}"
        hub.create(name, old)
        hub.blobs.clear()
        hub.faults = []
        fault = hub.fail("", skip=n, lost=lost, times=20)
        ended = False
        with suppress(HubError):
            loratool.push(adapter, to=name)
            ended = True
        fault.times = 0
        state = {path: data for path, data in hub.files(name).items() if path != "README.md"}
        assert state in ({"notes.txt": b"old"}, {p: d for p, d in new.items() if p != "README.md"}), n
        assert not ended or "adapter_model.safetensors" in state
        loratool.push(adapter, to=name)
        assert len(hub.repos[name].commits) == 2, n
        assert hub.files(name).keys() == new.keys()


@pytest.mark.parametrize("status", [401, 403, 404, 409, 412, 429, 500, 503])
def test_every_refusal_of_a_commit_is_explained(hub: Hub, base, adapter, status):
    hub.create("me/adapter")
    hub.fail("POST .*/commit/", status, times=9)
    with pytest.raises(HubError) as caught:
        loratool.push(adapter, to="me/adapter")
    assert caught.value.exit_code == 4
    assert caught.value.hint
    assert hub.files("me/adapter") == {}


def test_uploads_wait_out_a_moment_of_trouble(hub: Hub, base, adapter):
    hub.fail("PUT", 503, times=2)
    hub.fail("preupload", 429, headers={"Retry-After": "1"})
    loratool.push(adapter, to="me/adapter")
    assert "adapter_model.safetensors" in hub.files("me/adapter")


def test_large_files_by_xet(xet_hub: Hub, adapter, tmp_path):
    loratool.push(adapter, to="me/adapter")
    assert "nothing to do" in loratool.push(adapter, to="me/adapter").totals["result"]
    loratool.pull("me/adapter", tmp_path / "back")
    name = "adapter_model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (adapter / name).read_bytes()
    assert any("xet-write-token" in r.path for r in xet_hub.requests)
    assert not any(r.method == "PUT" for r in xet_hub.requests)


def test_a_name_that_the_hub_refuses(hub: Hub, adapter):
    with pytest.raises(LoratoolError):
        loratool.push(adapter, to="me/--bad")
    hub.fail("repos/create", 400)
    with pytest.raises(HubError) as caught:
        loratool.push(adapter, to="me/odd")
    assert caught.value.exit_code == 4


def test_without_a_token_nothing_is_sent(hub: Hub, base, adapter, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(HubError) as caught:
        loratool.push(adapter, to="me/adapter")
    assert "HF_TOKEN" in caught.value.hint
    assert "without a token" in caught.value.what
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    with pytest.raises(HubError, match="refuses"):
        loratool.push(adapter, to="me/adapter")


def test_the_repository_comes_last(hub: Hub, adapter):
    with pytest.raises(UsageError) as caught:
        loratool.push("me/adapter", to=str(adapter))
    assert f"loratool push {adapter} me/adapter" in caught.value.hint


def test_a_proposal_is_not_said_to_be_written(hub: Hub, adapter, tmp_path, capsys):
    hub.create("org/adapter")
    assert run_main("push", adapter, "org/adapter", "--create-pr") == 0
    said = capsys.readouterr().out
    assert "proposed to" in said
    assert "wrote" not in said


def test_what_is_no_adapter_and_no_model_is_not_sent(hub: Hub, tmp_path):
    (tmp_path / "words").mkdir()
    (tmp_path / "words/a.txt").write_text("a")
    with pytest.raises(LoratoolError) as caught:
        loratool.push(tmp_path / "words", to="me/words")
    assert caught.value.exit_code in (3, 5)
    assert "me/words" not in hub.repos


# -- cards ------------------------------------------------------------------------------------------------------


def test_the_card_of_an_adapter_says_what_the_hub_wants_to_know(hub: Hub, base, adapter):
    loratool.push(adapter, to="me/adapter")
    assert metadata(hub.files("me/adapter")["README.md"]) == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "llama3",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "base_model:adapter:org/base", "loratool"],
    }


def test_a_licence_is_never_invented(hub: Hub, adapter, tmp_path):
    report = loratool.push(adapter, to="me/adapter")
    assert any("--license" in f.what for f in report.findings)
    assert "license" not in metadata(hub.files("me/adapter")["README.md"])
    loratool.push(adapter, to="me/adapter", publish=Publishing(licence="apache-2.0"))
    assert metadata(hub.files("me/adapter")["README.md"])["license"] == "apache-2.0"


WRITTEN = """---
# mine
license:   openrail++   # as the base
tags: [style, lora]
instance_prompt: a photo of sks dog
widget:
- text: sks dog
  output: {url: a.png}
---

# My dog

Words — with <b>html</b>.
"""


def test_a_card_on_the_hub_keeps_every_word(hub: Hub, base, adapter):
    hub.create("me/adapter", {"README.md": WRITTEN})
    (adapter / "README.md").write_text("# a template\n[More Information Needed]")
    loratool.push(adapter, to="me/adapter")
    card = hub.files("me/adapter")["README.md"].decode()
    assert "# mine\nlicense:   openrail++   # as the base" in card
    assert "# My dog\n\nWords — with <b>html</b>.\n" in card
    assert "More Information" not in card
    assert metadata(card)["widget"] == [{"text": "sks dog", "output": {"url": "a.png"}}]
    assert metadata(card)["tags"][:2] == ["style", "lora"]
    assert metadata(card)["base_model"] == "org/base"


def test_only_our_block_of_a_card_changes(hub: Hub, base, adapter, tmp_path):
    loratool.resize(adapter, tmp_path / "one", rank=2)
    loratool.push(tmp_path / "one", to="me/small")
    first = hub.files("me/small")["README.md"].decode()
    hub.commit("me/small", {"README.md": first + "\nMore of mine.\n"})
    loratool.resize(adapter, tmp_path / "two", rank=1)
    loratool.push(tmp_path / "two", to="me/small")
    second = hub.files("me/small")["README.md"].decode()
    assert second.count("<!-- loratool -->") == second.count("<!-- /loratool -->") == 1
    assert second.endswith("More of mine.\n")
    before, after = (text.split("<!-- loratool -->")[1].split("<!-- /loratool -->")[0] for text in (first, second))
    assert before != after
    assert "loratool resize" in after
    assert "SHA-256" in after
    assert str(tmp_path) not in second


def test_a_broken_card_on_the_hub_stops_the_push(hub: Hub, base, adapter):
    hub.create("me/adapter", {"README.md": "---\ntags: [a\n---\n"})
    with pytest.raises(HubError, match="broken YAML") as caught:
        loratool.push(adapter, to="me/adapter")
    assert caught.value.hint
    assert list(hub.files("me/adapter")) == ["README.md"]


def test_prompts_of_an_image_adapter_survive_a_conversion(hub: Hub, adapter, tmp_path):
    hub.create("you/dog", {**snapshot(adapter), "README.md": WRITTEN})
    loratool.convert("you/dog", "hf://me/dog/dog.safetensors", to="kohya", arch="llama")
    card = metadata(hub.files("me/dog")["README.md"])
    assert card["instance_prompt"] == "a photo of sks dog"
    assert card["widget"][0]["text"] == "sks dog"
    assert card["license"] == "openrail++"
    assert {"template:sd-lora", "text-to-image"} <= set(card["tags"])
    assert hub.files("me/dog").keys() == {"README.md", "dog.safetensors"}


# -- outputs on the Hub -----------------------------------------------------------------------------------------


def test_merge_from_the_hub_to_the_hub(hub: Hub, base, adapter, tmp_path):
    hub.create("me/adapter", adapter)
    report = loratool.merge("org/base", ["me/adapter"], "hf://me/merged", publish=Publishing(private=True))
    loratool.merge("org/base", ["me/adapter"], tmp_path / "local")
    files = hub.files("me/merged")
    assert files["model.safetensors"] == (tmp_path / "local/model.safetensors").read_bytes()
    assert "loratool.report.json" not in files
    card = metadata(files["README.md"])
    assert card["base_model"] == ["org/base", "me/adapter"]
    assert card["base_model_relation"] == "merge"
    assert card["license"] == "llama3"
    assert card["pipeline_tag"] == "text-generation"
    assert f"org/base@{hub.head('org/base')}" in files["README.md"].decode()
    assert hub.head("me/merged") == report.totals["commit"]
    assert not list((tmp_path / "hf-home").rglob("outgoing/*"))
    again = loratool.merge("org/base", ["me/adapter"], "hf://me/merged")
    assert "nothing to do" in again.totals["result"]


def test_what_was_made_is_kept_when_the_push_fails(hub: Hub, base, adapter):
    hub.fail("POST .*/commit/", 500, times=9)
    with pytest.raises(HubError) as caught:
        loratool.resize(adapter, "hf://me/small", rank=2)
    words = caught.value.hint.split("loratool push ")[1].split()
    hub.faults = []
    loratool.push(words[0], to=words[1])
    assert load_file(Path(words[0]) / "adapter_model.safetensors")
    assert "adapter_model.safetensors" in hub.files("me/small")


def test_the_hub_is_asked_before_the_work(hub: Hub, base, adapter, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="token"):
        loratool.resize(adapter, "hf://me/small", rank=2)


# -- pull -------------------------------------------------------------------------------------------------------


def test_pull_is_the_repository(hub: Hub, base, adapter, tmp_path):
    loratool.push(adapter, to="me/adapter")
    report = loratool.pull("me/adapter", tmp_path / "out")
    pulled = snapshot(tmp_path / "out")
    record = json.loads(pulled.pop("loratool.report.json"))
    assert pulled == hub.files("me/adapter")
    assert record["sources"] == report.sources == {"repository": f"me/adapter@{hub.head('me/adapter')}"}
    with pytest.raises(LoratoolError, match="exists"):
        loratool.pull("me/adapter", tmp_path / "out")
    loratool.pull("me/adapter", tmp_path / "out", force=True)


def test_pull_of_a_folder_or_a_file(hub: Hub, tmp_path):
    hub.create("me/many", {"a/x.json": "{}", "a/b/y.json": "[]", "z.json": "1", ".gitattributes": "x"})
    loratool.pull("hf://me/many/a", tmp_path / "a")
    assert {p for p in snapshot(tmp_path / "a") if p != "loratool.report.json"} == {"x.json", "b/y.json"}
    loratool.pull("hf://me/many/z.json", tmp_path / "z.json")
    assert (tmp_path / "z.json").read_text() == "1"
    report = loratool.pull("me/many", tmp_path / "no", dry_run=True)
    assert report.totals["files"] == 3
    assert any(".gitattributes" in f.what for f in report.findings)
    assert not (tmp_path / "no").exists()


def test_a_pull_that_fails_leaves_nothing(hub: Hub, base, adapter, tmp_path):
    loratool.push(adapter, to="me/adapter")
    hub.fail("cdn", times=99)
    with pytest.raises(HubError):
        loratool.pull("me/adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pull_from_a_cache_that_may_be_a_part_is_refused(hub: Hub, adapter, tmp_path, monkeypatch):
    from huggingface_hub import constants, hf_hub_download

    hub.create("me/adapter", {**snapshot(adapter), "README.md": "# hi"})
    hf_hub_download("me/adapter", "README.md")  # is all that the cache has
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="a part of it"):
        loratool.pull("me/adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    loratool.pull("hf://me/adapter/README.md", tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == "# hi"


# -- the command line -------------------------------------------------------------------------------------------


def test_the_command_line_pushes_pulls_and_says_which_commit(hub: Hub, base, adapter, tmp_path, capsys):
    assert run_main("push", adapter, "me/adapter", "--license", "mit", "--message", "hello") == 0
    told = capsys.readouterr().out
    assert hub.head("me/adapter") in told
    assert run_main("inspect", "me/adapter") == 0
    assert f"me/adapter: commit {hub.head('me/adapter')}" in capsys.readouterr().err
    assert run_main("merge", "me/adapter:0.5", "-o", "hf://me/merged", "--private") == 0
    assert "org/base" in capsys.readouterr().err
    card = hub.files("me/merged")["README.md"].decode()
    assert "loratool merge me/adapter:0.5 -o hf://me/merged --private" in card
    assert run_main("pull", "me/merged", "-o", tmp_path / "merged") == 0
    assert run_main("arch", "detect", "me/merged") == 0
    assert run_main("inspect", "me/none") == 4
    assert run_main("resize", adapter, "-o", tmp_path / "x", "--rank", 1, "--private") == 2
    assert run_main("convert", adapter, "-o", "hf://me/one", "--to", "kohya", "--arch", "llama") == 2
    assert "hf://org/name/FILE.safetensors" in capsys.readouterr().err


def test_a_local_path_that_looks_like_a_name_is_said_to_win(hub: Hub, adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_adapter(tmp_path / "me/adapter")
    assert run_main("inspect", "me/adapter") == 0
    assert "me/adapter: the local path (hf://me/adapter is" in capsys.readouterr().err
    location._said.clear()
    assert run_main("inspect", "me/adapter", "-q") == 0
    assert not capsys.readouterr().err
    assert not hub.requests


@pytest.mark.parametrize("more", [(), ("-q",), ("-q", "--stream")])
def test_quiet_shows_no_bars_of_huggingface_hub_and_leaves_them_to_others(more, base, adapter, tmp_path, capsys):
    from huggingface_hub.utils import are_progress_bars_disabled

    commands = {
        "push": ("push", adapter, "me/adapter", *more[:1]),
        "pull": ("pull", "me/adapter", "-o", tmp_path / "pulled", *more[:1]),
        "merge": ("merge", "org/base", "me/adapter", "-o", tmp_path / "merged", *more),
    }
    for verb, command in commands.items():
        capsys.readouterr()
        assert run_main(*command) == 0
        assert ("%|" in capsys.readouterr().err) is not bool(more), verb
        assert not are_progress_bars_disabled()


def test_a_path_inside_a_repository_is_told_how_it_is_written(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoratoolError, match="no such file") as refusal:
        loratool.inspect("me/npis/initial")
    assert "hf://me/npis/initial" in refusal.value.hint


def test_a_link_that_leads_out_of_the_folder_is_not_sent(hub: Hub, adapter, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    (adapter / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(LoratoolError, match="leads out"):
        loratool.push(adapter, to="me/adapter")
    assert "me/adapter" not in hub.repos


@pytest.mark.parametrize("to", ["folder", "nothing"])
def test_a_link_that_is_no_file_is_not_left_out_silently(to, hub: Hub, adapter, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/x.safetensors").write_bytes(b"weights")
    (adapter / "unet").symlink_to(tmp_path / to)
    with pytest.raises(LoratoolError, match="link to no file"):
        loratool.push(adapter, to="me/adapter")
    assert "me/adapter" not in hub.repos


@pytest.mark.parametrize("where", ["the Hub", "the disk"])
def test_a_card_that_is_not_utf8_is_not_mangled(where, hub: Hub, adapter):
    raw = "---\nlicense: mit\n---\n# Caf\u00e9\n".encode("latin-1")
    hub.create("me/adapter", {"README.md": raw if where == "the Hub" else "# x\n"})
    if where == "the disk":
        (adapter / "README.md").write_bytes(raw)
    before = hub.files("me/adapter")
    with pytest.raises(LoratoolError, match="UTF-8"):
        loratool.push(adapter, to="me/adapter")
    assert hub.files("me/adapter") == before


CANARY = "hf_canaryTOKENthatNoOutputMayHold"
VERBS = [
    ["inspect", "me/adapter", "--debug"],
    ["inspect", "me/none", "--debug"],
    ["merge", "org/base", "me/adapter", "-o", "hf://me/merged", "--debug"],
    ["push", "ADAPTER", "me/other", "--debug", "--json"],
    ["push", "ADAPTER", "you/adapter", "--debug"],
    ["pull", "me/adapter", "-o", "OUT", "--debug"],
]


def test_a_token_is_in_no_output(hub: Hub, base, adapter, tmp_path, monkeypatch):
    hub.create("me/adapter", adapter)
    hub.create("you/adapter")
    hub.foreign.add("you")
    hub.tokens[CANARY] = "write"
    (tmp_path / "token").write_text(CANARY + "\n")
    told = ""
    variables = hub.environment(str(tmp_path / "canary-home"), token=None)
    settings = {**environment(**variables), "HF_DEBUG": "1", "TMPDIR": str(tmp_path), "PYTHONPATH": str(Path.cwd())}
    words = {"ADAPTER": str(adapter), "OUT": str(tmp_path / "out")}
    script = "import json, sys\nfrom loratool.cli.main import _run\n"
    script += "for line in json.load(sys.stdin): print('code', _run(line, debug=True), flush=True)"
    lines = [[words.get(w, w) for w in verb] + ["--token-file", str(tmp_path / "token")] for verb in VERBS]
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(lines),
        env=settings,
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    told = done.stdout + done.stderr
    codes = [line for line in done.stdout.splitlines() if line.startswith("code")]
    assert codes == ["code 0", "code 4", "code 0", "code 0", "code 4", "code 0"], told
    assert "authorization" in told.lower()  # HF_DEBUG shows the requests, with the header masked
    assert CANARY not in told
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.name != "token":
            assert CANARY.encode() not in path.read_bytes(), path
    for name in hub.repos:
        for data in hub.files(name).values():
            assert CANARY.encode() not in data
    assert CANARY not in repr(hub.requests)


def test_local_paths_load_no_huggingface_hub(tmp_path):
    folder = write_adapter(tmp_path / "adapter")
    code = (
        "import sys, loratool\n"
        f"loratool.inspect({str(folder)!r}); loratool.resize({str(folder)!r}, {str(tmp_path / 'out')!r}, rank=1)\n"
        "assert 'huggingface_hub' not in sys.modules and 'yaml' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


def test_a_token_in_an_address_is_refused_and_not_repeated(hub: Hub):
    with pytest.raises(LoratoolError) as caught:
        loratool.inspect(f"https://user:{CANARY}@huggingface.co/me/adapter")
    assert CANARY not in f"{caught.value} {caught.value.hint}"


def test_a_password_in_the_address_of_the_hub_is_in_no_message(hub: Hub, monkeypatch, tmp_path, caplog):
    from loratool.storage.hub import own_folder
    from loratool.storage.hub_names import HubName

    told: list[str] = []
    monkeypatch.setattr(location, "announce", lambda source, text: told.append(text))
    monkeypatch.setenv("HF_ENDPOINT", f"http://joe:{CANARY}@127.0.0.1:9")
    monkeypatch.setattr("loratool.storage.hub._RETRIES", 1)
    with pytest.raises(HubError, match=r"127\.0\.0\.1:9 failed") as caught:
        loratool.inspect("me/adapter")
    monkeypatch.setenv("HF_ENDPOINT", f"http://joe:{CANARY}@mirror.example")
    location.warn_of_open_endpoint()
    assert "http://mirror.example is not https" in told[0]
    assert "Retrying" in caplog.text  # huggingface_hub's own log says where it tries again
    for text in (str(caught.value), caught.value.hint, *told, str(own_folder(HubName("me/adapter"))), caplog.text):
        assert CANARY not in text
