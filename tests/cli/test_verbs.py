"""What every verb's options mean, through the command line."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from tiny_files import (
    Q0,
    environment,
    factors,
    run_cli,
    run_main,
    snapshot,
    tensors_of_llama,
    write_adapter,
    write_base,
)

import loratool
from loratool import api


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run the command line in a folder that holds base, tuned, adapter and other."""
    monkeypatch.chdir(tmp_path)
    base, tuned = tensors_of_llama(), tensors_of_llama()
    tuned[f"{Q0}.weight"] = tuned[f"{Q0}.weight"] + 0.1
    write_base(tmp_path / "base", base)
    write_base(tmp_path / "tuned", tuned)
    write_adapter(tmp_path / "adapter", base_model_name_or_path="base")
    write_adapter(tmp_path / "other", factors(5))

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        code = run_main(*arguments)
        return Outcome(code, *capfd.readouterr())

    return run


WRITING = {
    "merge": ("merge", "base", "adapter", "-o", "out"),
    "extract": ("extract", "tuned", "--base", "base", "--rank", "2", "-o", "out"),
    "resize": ("resize", "adapter", "--rank", "2", "-o", "out"),
    "convert": ("convert", "adapter", "--to", "kohya", "-o", "out.safetensors"),
}
VERBS = {**WRITING, "inspect": ("inspect", "adapter"), "compare": ("compare", "adapter", "other")}


@pytest.mark.parametrize("verb", VERBS)
def test_json_is_one_document_with_the_same_fields_for_every_verb(cli: Cli, verb: str) -> None:
    outcome = cli(*VERBS[verb], "--json")
    assert outcome.code == 0
    report = json.loads(outcome.out, parse_constant=pytest.fail)
    assert report["verb"] == verb
    assert {"verb", "sources", "totals", "rows", "findings", "ledger", "files", "out", "dry_run"} <= set(report)
    assert report["rows"]
    assert report["sources"]


@pytest.mark.parametrize("verb", WRITING)
def test_every_tensor_of_every_input_is_in_the_ledger(cli: Cli, verb: str) -> None:
    ledger = json.loads(cli(*VERBS[verb], "--json").out)["ledger"]
    counts = {source: sum(fates.values()) for source, fates in ledger.items()}
    whole = {"base": len(tensors_of_llama()), "tuned": len(tensors_of_llama()), "adapter": len(factors())}
    assert counts == {source: whole[source] for source in counts}
    assert set(counts) == {"merge": {"base", "adapter"}, "extract": {"base", "tuned"}}.get(verb, {"adapter"})


@pytest.mark.parametrize("verb", WRITING)
def test_a_dry_run_writes_nothing_and_shows_the_plan_that_is_then_run(cli: Cli, tmp_path: Path, verb: str) -> None:
    before = snapshot(tmp_path)
    dry = json.loads(cli(*VERBS[verb], "--json", "--dry-run").out)
    assert dry["dry_run"] is True
    assert snapshot(tmp_path) == before
    text = cli(*VERBS[verb], "-n")
    assert re.search(r"^would write +out", text.out, re.MULTILINE)
    assert snapshot(tmp_path) == before
    done = json.loads(cli(*VERBS[verb], "--json").out)
    assert done["dry_run"] is False
    for name, value in dry["totals"].items():
        assert done["totals"][name] == value, name
    assert len(done["rows"]) == len(dry["rows"])
    for planned, row in zip(dry["rows"], done["rows"], strict=True):
        assert {name: row[name] for name in planned} == planned
    assert (done["sources"], done["ledger"], done["out"]) == (dry["sources"], dry["ledger"], dry["out"])
    assert set(dry["files"]) <= set(done["files"])


@pytest.mark.parametrize("verb", WRITING)
def test_a_dry_run_finds_what_would_be_refused(cli: Cli, tmp_path: Path, verb: str) -> None:
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"x")
    (tmp_path / "tuned" / "model.safetensors").write_bytes(b"x")
    assert cli(*VERBS[verb], "-n").code == 3
    write_base(tmp_path / "out")


@pytest.mark.parametrize("verb", ["merge", "extract", "resize"])
def test_a_dry_run_finds_an_output_that_exists(cli: Cli, tmp_path: Path, verb: str) -> None:
    write_base(tmp_path / "out")
    assert cli(*VERBS[verb], "-n").code == 5
    assert cli(*VERBS[verb], "-n", "--force").code == 0


def test_force_replaces_an_output(cli: Cli, tmp_path: Path) -> None:
    write_base(tmp_path / "out", {"old.weight": torch.zeros(1)})
    assert cli(*VERBS["merge"], "--force").code == 0
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(tensors_of_llama())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "other", "out", "tuned"]


@pytest.mark.parametrize("verb", VERBS)
def test_a_report_file_holds_what_json_prints(cli: Cli, tmp_path: Path, verb: str) -> None:
    outcome = cli(*VERBS[verb], "--json", "--report", "report.json")
    assert (tmp_path / "report.json").read_text() == outcome.out


def test_a_report_that_cannot_be_written_is_a_storage_error(cli: Cli) -> None:
    outcome = cli("inspect", "adapter", "--report", "nowhere/report.json")
    assert outcome.code == 5
    assert "nowhere/report.json" in outcome.err


@pytest.mark.parametrize("content", ["thesis", '{"verb": "merge"}', "[]", ""])
def test_a_report_does_not_replace_another_file_and_nothing_is_run(cli: Cli, tmp_path: Path, content: str) -> None:
    (tmp_path / "file").write_text(content)
    outcome = cli(*VERBS["merge"], "--report", "file")
    assert outcome.code == 5
    assert "file" in outcome.err
    assert (tmp_path / "file").read_text() == content
    assert not (tmp_path / "out").exists()
    assert cli(*VERBS["merge"], "--report", "base").code == 5


def test_a_report_replaces_a_report_and_goes_into_a_pipe(cli: Cli, tmp_path: Path) -> None:
    assert cli("inspect", "adapter", "--report", "file").code == 0
    assert cli("inspect", "other", "--report", "file").code == 0
    assert json.loads((tmp_path / "file").read_text())["sources"] == {"adapter": "other"}
    assert cli("inspect", "adapter", "--report", os.devnull).code == 0


def test_force_spares_a_folder_that_holds_something_else(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "loras" / "diary").mkdir(parents=True)
    (tmp_path / "loras" / "my-style.safetensors").touch()
    (tmp_path / "loras" / "diary" / "thesis.docx").touch()
    before = snapshot(tmp_path)
    outcome = cli("resize", "adapter", "--rank", "2", "-o", "loras", "--force")
    assert outcome.code == 5
    assert "diary/thesis.docx" in outcome.err
    assert snapshot(tmp_path) == before


def test_an_interrupt_after_publishing_does_not_say_that_nothing_was_written(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)  # this process has more to do
    monkeypatch.setattr("loratool.cli.render.report", interrupt)
    outcome = cli(*VERBS["merge"])
    assert outcome.code == 130
    assert "interrupted" in outcome.err
    assert "nothing" not in outcome.err
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_garbage_collector_works_while_a_command_runs(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    inspect = api.inspect

    def looking(*arguments: Any, **options: Any) -> Any:
        seen.append(gc.isenabled())
        return inspect(*arguments, **options)

    monkeypatch.setattr(api, "inspect", looking)
    assert cli("inspect", "adapter").code == 0
    assert seen == [True]


@pytest.mark.parametrize("verb", VERBS)
def test_quiet_says_nothing_about_a_success(cli: Cli, verb: str) -> None:
    outcome = cli(*VERBS[verb], "-q")
    assert outcome.code == 0
    assert outcome.out == ""


def test_quiet_still_says_why_something_was_refused(cli: Cli) -> None:
    outcome = cli("merge", "base", "nowhere", "-o", "out", "-q")
    assert outcome.code == 5
    assert "nowhere" in outcome.err


def test_verbose_shows_every_module(cli: Cli, tmp_path: Path) -> None:
    shapes = {f"model.layers.{n}.self_attn.q_proj": (16, 16) for n in range(30)}
    write_adapter(tmp_path / "deep", factors(shapes=shapes))
    assert cli("compare", "deep", "deep").out.count("q_proj") < 30
    assert cli("compare", "deep", "deep", "-v").out.count("q_proj") == 30


def test_weights_mean_the_same_in_every_spelling(cli: Cli, tmp_path: Path) -> None:
    cli("merge", "base", "adapter:0.7", "other", "-o", "a")
    cli("merge", "base", "adapter", "other", "-w", "0.7", "-w", "1", "-o", "b")
    cli("merge", "base", "other:1.0", "adapter:0.7", "-o", "c")
    loratool.merge(tmp_path / "base", ["adapter", "other"], tmp_path / "d", weights=[0.7, 1])
    contents = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abcd"]
    assert contents[0] == contents[1] == contents[2] == contents[3]
    merged = load_file(tmp_path / "a" / "model.safetensors")[f"{Q0}.weight"].double()
    true = tensors_of_llama()[f"{Q0}.weight"].double()
    for weight, seed in ((0.7, 1), (1.0, 5)):
        down, up = (factors(seed)[f"base_model.model.{Q0}.lora_{half}.weight"].double() for half in "AB")
        true = true + weight * 2.0 * up @ down
    assert torch.allclose(merged, true, rtol=1e-6, atol=1e-7)


def test_negative_weights_subtract(cli: Cli, tmp_path: Path) -> None:
    cli("merge", "base", "adapter", "-o", "plus")
    assert cli("merge", "plus", "adapter", "-w", "-1", "-o", "back").code == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    for name, tensor in tensors_of_llama().items():
        assert torch.allclose(back[name], tensor, atol=1e-6)


def test_a_file_whose_name_ends_like_a_weight_is_a_file(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "adapter").rename(tmp_path / "adapter:0.5")
    cli("merge", "base", "adapter:0.5", "-o", "a")
    (tmp_path / "adapter:0.5").rename(tmp_path / "adapter")
    cli("merge", "base", "adapter", "-o", "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_the_base_is_the_one_that_the_adapter_names(cli: Cli, tmp_path: Path) -> None:
    outcome = cli("merge", "adapter", "-o", "a")
    assert outcome.code == 0
    assert "base: base (named by the adapter)" in outcome.err
    cli("merge", "base", "adapter", "-o", "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_targets_and_exclusions_choose_modules(cli: Cli, tmp_path: Path) -> None:
    only = json.loads(cli("merge", "base", "adapter", "-o", "a", "--target", "q_proj", "--json").out)
    assert [row["module"] for row in only["rows"]] == [Q0]
    rest = json.loads(cli("merge", "base", "adapter", "-o", "b", "--exclude", "layers.{i}.mlp.**", "--json").out)
    assert [row["module"].rpartition(".")[2] for row in rest["rows"]] == ["q_proj", "k_proj"]


def test_an_empty_folder_may_be_the_output(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert cli(*VERBS["merge"]).code == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_debug_shows_a_traceback_and_nothing_else_does(cli: Cli) -> None:
    assert "Traceback" not in cli("inspect", "nowhere").err
    assert "Traceback" in cli("inspect", "nowhere", "--debug").err


def test_a_bug_exits_70_with_the_traceback_in_a_file(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a canary")

    monkeypatch.setattr(api, "inspect", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    outcome = cli("inspect", "adapter")
    assert outcome.code == 70
    assert "Traceback" not in outcome.err
    (found,) = tmp_path.glob("loratool-bug-*")
    assert str(found) in outcome.err
    text = found.read_text()
    assert "Traceback" in text
    assert "a canary" in text
    assert "inspect adapter" in text


def test_help_and_version_succeed_and_no_command_is_a_usage_error(cli: Cli) -> None:
    assert cli("--help").code == cli("-h").code == cli("merge", "-h").code == 0
    assert cli("--version").out.split() == ["loratool,", "version", loratool.__version__]
    assert cli().code == 2
    assert cli("merge").code == 2
    assert cli("no-such-verb").code == 2


@pytest.mark.parametrize("command", [("arch", "list"), ("arch", "show", "bert"), ("formats",), ("plugins",)])
def test_lists_are_tables_or_json(cli: Cli, command: tuple[str, ...]) -> None:
    rows = json.loads(cli(*command, "--json").out)
    assert rows
    table = cli(*command).out
    first = next(iter(rows[0].values())) or rows[0]["layer"]
    assert str(first)[:10] in table


def test_the_module_runs_as_the_command_does(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter")
    done = run_cli("inspect", "adapter", cwd=tmp_path)
    assert done.returncode == 0
    assert "peft" in done.stdout


@pytest.mark.parametrize("style", ["-v", "--json"])
def test_a_reader_that_goes_away_is_no_error(tmp_path: Path, style: str) -> None:
    write_adapter(
        tmp_path / "adapter", factors(shapes={f"model.layers.{n}.self_attn.q_proj": (16, 16) for n in range(2000)})
    )
    command = [sys.executable, "-m", "loratool", "compare", "adapter", "adapter", style]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert done.returncode in (141, -signal.SIGPIPE)
    assert done.stderr == ""
