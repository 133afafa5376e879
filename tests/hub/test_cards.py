"""Model cards on the Hub: licences, folders of this machine, and what somebody wrote, read back with yaml."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from tiny_files import run_main, snapshot, write_adapter, write_base

import loratool
from loratool import Publishing
from loratool.errors import FormatError
from loratool.operations import cardfile
from loratool.testing.hub import TOKEN, Hub

pytest_plugins = ["hub_fixtures"]
WEIGHTS = "adapter_model.safetensors"


class Strict(yaml.SafeLoader):
    """YAML without keys that occur twice, as its specification has it."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), keys
        return super().construct_mapping(node, deep)


def metadata(card: bytes | str) -> dict:
    text = card if isinstance(card, str) else card.decode()
    return yaml.load(text.split("---")[1], Strict)


def card_of(hub: Hub, name: str) -> str:
    return hub.files(name)["README.md"].decode()


@pytest.fixture
def adapter(tmp_path) -> Path:
    return write_adapter(tmp_path / "adapter", base_model_name_or_path="org/base", task_type="CAUSAL_LM")


@pytest.fixture
def base(hub: Hub, tmp_path) -> Path:
    folder = write_base(tmp_path / "base")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: llama3.2\nlicense_link: LICENSE\n---\n")
    hub.create("org/base", folder)
    return folder


WRITTEN = """---
base_model: org/sd
license: openrail
instance_prompt: a photo of sks dog
widget:
- text: sks dog
  output: {url: images/a b.png}
- text: another
  output: {url: 'https://example.org/b.png'}
---
# My dog
"""


@pytest.mark.parametrize("first", ["file", "folder"])
def test_the_card_of_a_folder_goes_along_whatever_is_named_before_it(first, hub: Hub, adapter, tmp_path):
    (adapter / "README.md").write_text(WRITTEN)
    loratool.convert(adapter, tmp_path / "dog.safetensors", to="kohya", arch="llama")
    paths = [tmp_path / "dog.safetensors", adapter]
    loratool.push(*(paths if first == "file" else reversed(paths)), to="me/both")
    card = card_of(hub, "me/both")
    assert "# My dog" in card
    told, meant = metadata(card), metadata(WRITTEN)
    assert {name: told[name] for name in meant} == meant


# -- licences ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["local", "Hub"])
def test_a_merged_model_has_the_licence_of_its_base(source, hub: Hub, base, adapter):
    (adapter / "README.md").write_text("---\nlicense: mit\nlicense_link: MIT.txt\n---\n")
    hub.create("me/adapter", adapter)
    named = base if source == "local" else "org/base"
    report = loratool.merge(named, ["me/adapter"], "hf://me/merged")
    told = metadata(card_of(hub, "me/merged"))
    assert (told["license"], told["license_name"], told["license_link"]) == ("other", "llama3.2", "LICENSE")
    warned = [f for f in report.findings if f.level == "warning" and "mit" in f.what]
    assert len(warned) == 1
    assert "llama3.2" in warned[0].what


def test_a_merged_model_of_a_base_without_a_licence_has_none(hub: Hub, base, adapter):
    hub.create("org/bare", {name: data for name, data in snapshot(base).items() if name != "README.md"})
    hub.create("me/adapter", {**snapshot(adapter), "README.md": "---\nlicense: mit\n---\n"})
    report = loratool.merge("org/bare", ["me/adapter"], "hf://me/merged")
    assert "license" not in metadata(card_of(hub, "me/merged"))
    assert any("--license" in f.hint and "mit" in f.what for f in report.findings)


@pytest.mark.parametrize("where", ["Hub", "disk"])
def test_a_licence_that_is_asked_for_replaces_the_one_of_a_card(where, hub: Hub, adapter):
    old = "---\nlicense: other\nlicense_name: odd\nlicense_link: ODD\nlanguage: de\n---\n"
    hub.create("me/adapter", {"README.md": old} if where == "Hub" else {})
    if where == "disk":
        (adapter / "README.md").write_text(old)
    loratool.push(adapter, to="me/adapter", publish=Publishing(licence="apache-2.0"))
    told = metadata(card_of(hub, "me/adapter"))
    assert told["license"] == "apache-2.0"
    assert told["language"] == "de"
    assert not {"license_name", "license_link"} & told.keys()


def test_the_name_of_a_licence_comes_from_the_card_that_says_the_licence(hub: Hub, adapter, tmp_path):
    hub.create("me/one", {**snapshot(adapter), "README.md": "---\nlicense: mit\n---\n"})
    hub.create("me/two", {**snapshot(adapter), "README.md": "---\nlicense: other\nlicense_name: x\n---\n"})
    report = loratool.combine(["me/one", "me/two"], "hf://me/sum", method="cat")
    told = metadata(card_of(hub, "me/sum"))
    assert "license" not in told  # neither speaks for the other
    assert "license_name" not in told
    assert any(f.level == "warning" and "adapter 1: mit, adapter 2: x" in f.what for f in report.findings)
    hub.create("me/three", {**snapshot(adapter), "README.md": "---\nlicense: mit\n---\n"})
    loratool.combine(["me/one", "me/three"], "hf://me/same", method="cat")
    assert metadata(card_of(hub, "me/same"))["license"] == "mit"
    hub.create("me/mine", {"README.md": "---\nlicense: bsd\n---\n"})
    (adapter / "README.md").write_text("---\nlicense: other\nlicense_name: x\n---\n")
    loratool.push(adapter, to="me/mine")
    assert "license_name" not in metadata(card_of(hub, "me/mine"))


def test_another_licence_replaces_name_and_link_too(hub: Hub, base, adapter):
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: x\nlicense_link: https://x\n---\n")
    publish = Publishing(licence="mit")
    loratool.merge(base, [adapter], "hf://me/merged", publish=publish)
    told = metadata(card_of(hub, "me/merged"))
    assert told["license"] == "mit"
    assert not {"license_name", "license_link"} & told.keys()


def test_a_stray_mark_and_the_lines_around_the_block_are_the_users(hub: Hub, adapter):
    text = "# A\n<!-- loratool -->\nMY TEXT\n"
    once = cardfile.updated(text, {}, "first")
    again = cardfile.updated(once, {}, "second")
    assert "MY TEXT" in again
    assert "second" in again
    assert "first" not in again
    assert cardfile.without_block("# Title\n<!-- loratool -->\nx\n<!-- /loratool -->\nnotes\n") == "# Title\nnotes\n"


def test_metadata_after_an_empty_line_and_odd_scalars(hub: Hub):
    assert cardfile.fields_of("\n---\nlicense: mit\n---\n") == {"license": "mit"}
    for odd in ("date: 2024-13-45", "a: !!int abc", "a: !!bool x"):
        with pytest.raises(FormatError, match="broken YAML"):
            cardfile.fields_of(f"---\n{odd}\n---\n")


# -- what stays on this machine ---------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False], ids=["a card on the Hub", "a new repository"])
def test_a_card_of_peft_takes_no_folder_of_this_machine_along(there, hub: Hub, base, adapter):
    path = "/home/me/secret/base"
    tags = f"- base_model:adapter:{path}\n- lora\n"
    (adapter / "README.md").write_text(f"---\nbase_model: {path}\nlibrary_name: peft\ntags:\n{tags}---\n# Words\n")
    if there:
        hub.create("me/adapter", {"README.md": "# Mine\n"})
    report = loratool.push(adapter, to="me/adapter")
    card = card_of(hub, "me/adapter")
    assert "secret" not in card
    assert metadata(card)["base_model"] == "org/base"
    assert set(metadata(card)["tags"]) == {"base_model:adapter:org/base", "lora", "loratool"}
    assert any(f.level == "info" and path in f.what for f in report.findings)


def test_a_tag_that_names_a_folder_of_this_machine_stays_here(hub: Hub, base, adapter):
    tags = "tags: ['base_model:adapter:/home/me/a:b', 'base_model:adapter:org/base', x]\n"
    (adapter / "README.md").write_text(f"---\nbase_model: org/base\n{tags}---\n# Words\n")
    report = loratool.push(adapter, to="me/adapter")
    assert metadata(card_of(hub, "me/adapter"))["tags"] == ["base_model:adapter:org/base", "x", "lora", "loratool"]
    assert any(f.level == "info" and f.where.endswith("README.md") for f in report.findings)


@pytest.mark.parametrize("path", ["../models/base-dir", "../base-dir", "~/base", "C:\\models\\base", "/gone/base"])
def test_a_base_that_only_a_machine_can_know_is_warned_of(path, hub: Hub, tmp_path):
    folder = write_adapter(tmp_path / "adapter", base_model_name_or_path=path)
    report = loratool.push(folder, to="me/adapter")
    assert any(f.level == "warning" and path in f.what for f in report.findings)
    assert "base_model" not in metadata(card_of(hub, "me/adapter"))


def test_the_command_in_a_card_names_no_folders(hub: Hub, base, adapter, tmp_path):
    new = tmp_path / "new/r.json"
    new.parent.mkdir()
    words = ["merge", base, f"{adapter}:0.5", "-o", "hf://me/merged", f"--report={new}"]
    assert run_main(*words) == 0
    card = card_of(hub, "me/merged")
    assert "loratool merge base adapter:0.5 -o hf://me/merged --report=r.json" in card
    assert run_main(*words[:-2], "hf://me/other", "--report", tmp_path / "new/s.json") == 0
    assert "-o hf://me/other --report s.json" in card_of(hub, "me/other")
    assert str(tmp_path) not in card + card_of(hub, "me/other")


def test_a_token_in_the_command_is_not_in_the_card(hub: Hub, adapter):
    assert run_main("resize", adapter, "-o", "hf://me/small", "--rank", 2, "--message", f"by {TOKEN}") == 0
    card = card_of(hub, "me/small")
    assert "loratool resize" in card
    assert TOKEN not in card


# -- how it was made --------------------------------------------------------------------------------------------


def test_a_push_of_what_was_pulled_does_nothing(hub: Hub, base, adapter, tmp_path):
    loratool.push(adapter, to="me/adapter")
    before = hub.head("me/adapter")
    loratool.pull("me/adapter", tmp_path / "back")
    report = loratool.push(tmp_path / "back", to="me/adapter")
    assert "nothing to do" in report.totals["result"]
    assert hub.head("me/adapter") == before
    hub.create("you/adapter", {**snapshot(adapter), "README.md": "# Yours\n"})
    loratool.pull("you/adapter", tmp_path / "theirs")
    loratool.push(tmp_path / "theirs", to="me/copy")
    assert "Made by" not in card_of(hub, "me/copy")


@pytest.mark.parametrize("pulled", [False, True], ids=["another adapter", "pulled and trained on"])
def test_a_block_goes_with_the_weights_that_it_is_about(pulled, hub: Hub, base, adapter, tmp_path):
    loratool.resize(adapter, "hf://me/small", rank=2)
    hub.commit("me/small", {"README.md": card_of(hub, "me/small") + "\nWords of mine.\n"})
    loratool.pull("me/small", tmp_path / "back")
    (tmp_path / "back/notes.txt").write_text("the same weights")
    loratool.push(tmp_path / "back", to="me/small")
    assert "Made by loratool" in card_of(hub, "me/small")
    if pulled:
        weights = load_file(tmp_path / "back" / WEIGHTS)
        save_file({name: 2 * tensor for name, tensor in weights.items()}, tmp_path / "back" / WEIGHTS)
    loratool.push(tmp_path / "back" if pulled else adapter, to="me/small")
    card = card_of(hub, "me/small")
    assert "Made by" not in card
    assert "<!--" not in card
    assert "Words of mine." in card


# -- image adapters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["Hub", "disk"])
def test_base_and_images_of_an_adapter_survive_a_conversion(source, hub: Hub, tmp_path):
    folder = write_adapter(tmp_path / "dog")
    (folder / "README.md").write_text(WRITTEN)
    hub.create("you/dog", folder)
    loratool.convert("you/dog" if source == "Hub" else folder, "hf://me/dog/dog.safetensors", to="kohya", arch="llama")
    told = metadata(card_of(hub, "me/dog"))
    assert told["base_model"] == "org/sd"
    assert told["base_model_relation"] == "adapter"
    assert told["widget"][1] == {"text": "another", "output": {"url": "https://example.org/b.png"}}
    address = f"{hub.url}/you/dog/resolve/{hub.head('you/dog')}/images/a%20b.png"
    first = {"text": "sks dog", "output": {"url": address}} if source == "Hub" else {"text": "sks dog"}
    assert told["widget"][0] == first


def test_an_adapter_whose_card_names_its_base_gets_the_relation(hub: Hub, tmp_path):
    folder = write_adapter(tmp_path / "dog")
    (folder / "README.md").write_text(WRITTEN)
    loratool.push(folder, to="me/dog")
    told = metadata(card_of(hub, "me/dog"))
    assert told["base_model_relation"] == "adapter"
    assert {name: told[name] for name in metadata(WRITTEN)} == metadata(WRITTEN)


# -- the text of a card -----------------------------------------------------------------------------------------

FRONTS = {
    "quoted key": '"tags": [a]\nlicense: mit\n',
    "anchor": "tags: &t [a, b]\nkeywords: *t\n",
    "alias": "keywords: &t\n- a\ntags: *t\nlicense: mit\n",
    "flow": "{license: mit, tags: [a], datasets: [x, y]}\n",
    "mapping in tags": "tags:\n- {a: b}\n- c\n- 2024\n",
    "indented": "  license: mit\n  tags:\n  - a\n",
    "explicit key": "? tags\n: - a\nlicense: mit\n",
    "text with a hash": "description: |\n  # not a comment\n  tags: x\ntags: a\n# of it\nlicense: mit # inline\n",
    "comment alone": "# nothing yet\n",
    "empty": "",
    "dates and numbers": "date: 2024-01-01\ntags: [a]\nx: 1e-7\nmodel-index: [{name: a, v: .5}]\n",
}


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("front", FRONTS.values(), ids=FRONTS)
def test_whatever_yaml_a_card_has_keeps_its_meaning(front, newline):
    before = yaml.safe_load(front) or {}
    card = f"---\n{front}---\n\n# Words  \n".replace("\n", newline)
    fields = {"base_model": "org/base", "license": "apache-2.0", "tags": ["lora", "a"]}
    after = cardfile.updated(card, fields, "- made", said={"x": ""})
    told = metadata(after)
    had = before.pop("tags", None) or []
    had = had if isinstance(had, list) else [had]
    assert told.pop("tags") == [*had, *(tag for tag in ("lora", "a") if tag not in had)]
    before.pop("x", None)
    assert told == {"license": "apache-2.0", "base_model": "org/base", **before}
    assert f"{newline}# Words  {newline}" in after
    assert (after.count("\n") == after.count("\r\n")) is (newline == "\r\n")
    assert cardfile.updated(after, fields, "- made", said={"x": ""}) == after
    for line in front.splitlines():
        assert not line.startswith(("#", "license: mit #", "  # not", "date")) or line + newline in after


def test_a_card_with_nothing_to_add_stays_byte_for_byte(hub: Hub, adapter):
    loratool.push(adapter, to="me/adapter", publish=Publishing(licence="mit"))
    card = b"\xef\xbb\xbf" + hub.files("me/adapter")["README.md"].replace(b"\n", b"\r\n")
    hub.commit("me/adapter", {"README.md": card})
    report = loratool.push(adapter, to="me/adapter")
    assert "nothing to do" in report.totals["result"], json.dumps(report.rows)
