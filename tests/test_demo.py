"""The demo runs once, as a newcomer runs it; what it claims is then checked on the files that it left."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from loratool.cli.main import main
from loratool.demo import stage, story
from loratool.errors import StorageError, UsageError


class Run(NamedTuple):
    code: int
    told: dict[str, Any]
    noise: str
    folder: Path


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    place = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "loratool", "demo", "-o", "shown", "--json"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout, done.stderr
    yield Run(done.returncode, json.loads(done.stdout), done.stderr, place / "shown")
    shutil.rmtree(place)  # 300 MB, which pytest would keep for three runs


def test_every_promise_is_kept(demo: Run):
    assert demo.code == 0
    assert demo.told["ok"] is True
    assert len(demo.told["promises"]) >= 10
    for promise in demo.told["promises"]:
        assert promise["ok"] is True, promise
        assert promise["measured"] <= promise["at most"], promise
    verbs = {promise["promise"].split(":")[0] for promise in demo.told["promises"]}
    assert verbs == {"merge", "extract", "resize", "convert", "compare"}


def test_training_moved_what_it_should_move(demo: Run):
    """Were the adapter nothing, the promises would be kept too."""
    facts = demo.told["facts"]
    base, live, merged = facts["cosine of that pair: base, live, merged"]
    assert live - base > 0.05
    assert merged == pytest.approx(live, abs=1e-5)
    for name, value in facts.items():
        if name.startswith("for scale"):
            assert value > 0.01, name


def test_third_parties_are_silent(demo: Run):
    assert demo.noise == ""


def test_the_merged_model_is_what_peft_merges(demo: Run):
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModel

    base = AutoModel.from_pretrained(demo.folder / "base", dtype=torch.float32)
    wanted = PeftModel.from_pretrained(base, demo.folder / "lora").merge_and_unload().state_dict()
    merged = load_file(demo.folder / "merged/model.safetensors")
    assert set(wanted) <= set(merged)
    for name, tensor in wanted.items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_the_image_adapter_came_back_bit_for_bit(demo: Run):
    from safetensors.torch import load_file

    first, last = (load_file(demo.folder / name / "adapter_model.safetensors") for name in ("unet-lora", "style-peft"))
    assert first.keys() == last.keys()
    assert all(first[name].equal(last[name]) for name in first)


def test_the_extracted_adapter_names_the_base_that_it_was_extracted_against(demo: Run):
    config = json.loads((demo.folder / "delta/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"


def test_it_leaves_nothing_but_what_a_rerun_replaces(demo: Run):
    assert {p.name for p in demo.folder.iterdir()} == {*stage.LEFT, stage.MARKER}


def test_every_command_told_can_be_repeated_on_the_files_left(
    demo: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(demo.folder)
    codes = {}
    for line in demo.told["commands"]:
        words = shlex.split(line)
        assert words[0] == "loratool"
        with pytest.raises(SystemExit) as end:
            main([*words[1:], *(["--force"] if "-o" in words else [])])
        codes[line] = end.value.code
    refused = [line for line, code in codes.items() if code != 0]
    assert len(codes) >= 9
    assert refused == ["loratool extract tuned --base base -o delta --rank 16"], capsys.readouterr().err
    assert codes[refused[0]] == 3


def test_a_broken_promise_is_exit_code_1_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def run(out: Path, narrator: object) -> story.Outcome:
        return story.Outcome(str(out), [stage.Promise("merge: difference", float("nan"), 1e-5)], {}, [], 0.1)

    monkeypatch.setattr(story, "run", run)
    with pytest.raises(SystemExit) as end:
        main(["demo"])
    assert end.value.code == 1
    assert "broken" in capsys.readouterr().out


def test_a_missing_library_is_named_and_nothing_is_touched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match="peft") as refusal:
        story.run(tmp_path / "out", stage.Silent())
    assert refusal.value.hint == "pip install 'loratool[demo]'"
    assert not (tmp_path / "out").exists()


def test_a_folder_that_no_demo_made_is_left_alone(tmp_path: Path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/weights").write_text("mine")
    with pytest.raises(StorageError, match="no demo made it"):
        stage.prepare(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
    assert (tmp_path / "base/weights").read_text() == "mine"


def test_a_file_in_the_way_is_left_alone(tmp_path: Path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(StorageError):
        stage.prepare(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_rerun_replaces_the_demos_files_and_keeps_the_readers(tmp_path: Path):
    stage.prepare(tmp_path / "out")
    (tmp_path / "out/lora").mkdir()
    (tmp_path / "out/lora/old").write_text("old")
    (tmp_path / "out/style.safetensors").write_text("old")
    (tmp_path / "out/mine").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/kept").write_text("kept")
    (tmp_path / "out/base").symlink_to(tmp_path / "elsewhere")
    stage.prepare(tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {stage.MARKER, "mine"}
    assert (tmp_path / "elsewhere/kept").read_text() == "kept"
