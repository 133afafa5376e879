"""Foreign text on its way to a terminal: whatever a file is called inside, no control character arrives."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_files import HIDDEN, environment, factors, peft_config, run_main, write_adapter, write_base, write_json

from loratool.cli.render import clean, table

EVIL = [
    "\x1b]0;owned\x07",
    "\x1b[2J\x1b[H",
    "\x1b]8;;http://evil\x1b\\click\x1b]8;;\x1b\\",
    "\x9b31m",
    "\u202egnp.exe",
    "\u2066\u200b\ufeff",
    "\r\x08\x08\x00",
    "[bold red]markup[/]",
    "\u2028\u2029",
]
EVERY = "".join(EVIL)
_FORBIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def forbidden(text: str) -> set[str]:
    return {c for c in text if c != "\n" and unicodedata.category(c) in _FORBIDDEN}


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capfdbinary: pytest.CaptureFixture[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line; return its exit code and everything it printed."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str]:
        capfdbinary.readouterr()
        code = run_main(*arguments)
        out, err = capfdbinary.readouterr()
        return code, (out + err).decode()

    return call


def evil_adapter(folder: Path, where: str) -> None:
    tensors: dict[str, Any] = factors()
    config: dict[str, Any] = {}
    if where == "module":
        tensors = factors(shapes={f"model.layers.{EVERY}.q_proj": (HIDDEN, HIDDEN)})
    elif where == "stray tensor":
        tensors[f"stray{EVERY}"] = torch.zeros(1)
    elif where == "metadata":
        told = {EVERY: EVERY, "ss_sd_model_name": EVERY, "modelspec.title": EVERY, "ss_training_comment": EVERY}
        told["ss_tag_frequency"] = json.dumps({EVERY: {EVERY: 3}})
        told["loratool.history"] = json.dumps([{"by": EVERY, "verb": EVERY, "sources": [{"name": EVERY}]}])
        save_file(tensors, folder.with_suffix(".safetensors"), told)
    elif where == "base model":
        config = {"base_model_name_or_path": EVERY}
    elif where == "config field":
        config = {EVERY: EVERY}
    elif where == "config value":
        config = {"init_lora_weights": f"pissa{EVERY}", "use_dora": EVERY, "peft_type": EVERY}
    elif where == "pattern":
        config = {"alpha_pattern": {EVERY: -1, f"[{EVERY}": 3}}
    write_adapter(folder, tensors, **config)


PLACES = ["module", "stray tensor", "metadata", "base model", "config field", "config value", "pattern"]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("debug", [False, True])
def test_nothing_foreign_reaches_the_terminal_raw(tmp_path: Path, run: Run, where: str, debug: bool) -> None:
    write_base(tmp_path / "base")
    evil_adapter(tmp_path / "adapter", where)
    adapter = "adapter.safetensors" if where == "metadata" else "adapter"
    more = ("--debug",) if debug else ()
    seen = ""
    for command in (
        ("inspect", adapter),
        ("inspect", adapter, "-v"),
        ("inspect", adapter, "--json"),
        ("merge", "base", adapter, "-o", "out"),
        ("merge", adapter, "-o", "out"),
        ("resize", adapter, "--rank", "1", "-o", "small"),
        ("compare", adapter, adapter),
        ("convert", adapter, "--to", "kohya", "-o", "k.safetensors"),
    ):
        code, text = run(*command, *more)
        assert code != 70, text
        assert forbidden(text) == set(), command
        seen += text
    assert "\\u001b" in seen or "\\x1b" in seen  # it was shown, in a form that a terminal does not obey


@pytest.mark.parametrize("where", ["model type", "shard", "tensor", "architecture"])
def test_nothing_of_a_hostile_base_reaches_the_terminal_raw(tmp_path: Path, run: Run, where: str) -> None:
    write_adapter(tmp_path / "adapter")
    base = write_base(tmp_path / "base", {"x.weight": torch.zeros(2, 2)} if where == "model type" else None)
    if where == "model type":
        write_json(base / "config.json", {"model_type": EVERY})
    elif where == "shard":
        write_json(base / "model.safetensors.index.json", {"weight_map": {EVERY: f"../{EVERY}"}})
    elif where == "tensor":
        write_json(base / "model.safetensors.index.json", {"weight_map": {EVERY: "model.safetensors"}})
    else:
        write_json(base / "config.json", {"model_type": "strange", "architectures": [EVERY], "_class_name": EVERY})
    code, text = run("merge", "base", "adapter", "-o", "out", "--debug")
    assert code == (0 if where == "architecture" else 3), text
    assert forbidden(text) == set()


def test_a_terminal_gets_only_our_own_styles(tmp_path: Path) -> None:
    evil_adapter(tmp_path / "adapter", "stray tensor")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "loratool", "inspect", "adapter"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(TERM="xterm"), stdout=theirs, stderr=theirs)
    os.close(theirs)
    data = b""
    while select.select([ours], [], [], 60)[0]:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
        data += chunk
    process.wait(60)
    os.close(ours)
    assert b"stray" in data
    assert b"\x1b[" in data  # it is styled ...
    for piece in data.split(b"\x1b")[1:]:
        assert piece[:1] == b"["  # ... and every escape is a colour
        assert piece[1:].lstrip(b"0123456789;")[:1] == b"m", piece


def test_an_emoji_code_in_a_name_stays_text(tmp_path: Path, run: Run) -> None:
    write_adapter(tmp_path / "adapter", base_model_name_or_path="org/:smile:model")
    assert "org/:smile:model" in run("inspect", "adapter")[1]


def test_very_long_names_are_cut(tmp_path: Path, run: Run) -> None:
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter", {**factors(), "x" * 100_000: torch.zeros(1)})
    code, text = run("merge", "base", "adapter", "-o", "out")
    assert code == 3
    assert len(text) < 2000


def test_the_report_of_a_strange_adapter_is_valid_json(tmp_path: Path, run: Run) -> None:
    folder = write_adapter(tmp_path / "adapter")
    write_json(folder / "adapter_config.json", {**peft_config(), "x": EVERY, "base_model_name_or_path": EVERY})
    _, text = run("inspect", "adapter", "--json", "--report", "report.json")
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["totals"]["base_model"] == EVERY
    assert text.count("\n{\n") + text.startswith("{\n") == 1


@given(st.text() | st.text(st.sampled_from(EVERY)))
def test_cleaned_text_has_no_control_character_and_keeps_the_rest(text: str) -> None:
    cleaned = clean(text)
    assert not forbidden(cleaned + "\n")
    assert "\n" not in cleaned
    if not forbidden(text) and "\n" not in text and len(text) < 500:
        assert cleaned == text


def test_a_narrow_table_loses_what_is_the_same_in_all_rows_first_and_says_what_it_was(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from rich.console import Console

    rows = [
        {"module": f"model.layers.{n}.self_attn.q_proj", "kind": "linear", "of": [64, 32 + n], "rank": 4, "alpha": 16.0,
         "parameters": 512 + n, "nf4_error": 0.1 + n, "loftq_error": 0.2 + n}
        for n in range(3)
    ]  # fmt: skip
    for width in (200, 90, 80, 70):
        table(Console(width=width, soft_wrap=True), rows)
        shown = capsys.readouterr().out
        lines = shown.splitlines()
        assert max(map(len, lines)) <= width
        head = next(line for line in lines if "module" in line)
        assert {"rank", "loftq"} <= set(head.split())
        told = " ".join(shown.split())
        for name, value in (("kind", "linear"), ("rank", "4"), ("alpha", "16")):
            assert (f" {name} " in head) != (f'"{name}" ({value} in all)' in told)
        assert ("too narrow" in told) is (width < 200)


def test_a_narrow_terminal_shows_numbers_beside_fused_weights(run: Run, tmp_path: Path) -> None:
    """A file of Flux, whose modules have long names: no line is longer than the terminal, and no column gets lost."""
    shapes = {"double_blocks_{}_img_attn_qkv": 3, "single_blocks_{}_linear1": 7, "double_blocks_{}_txt_mlp_0": 4}
    tensors = {}
    for name, rows in shapes.items():
        for n in range(3):
            tensors[f"lora_unet_{name.format(n)}.lora_down.weight"] = torch.ones(2, 8)
            tensors[f"lora_unet_{name.format(n)}.lora_up.weight"] = torch.ones(8 * rows, 2)
    save_file(tensors, tmp_path / "flux.safetensors")
    command = [sys.executable, "-m", "loratool", "inspect", "flux.safetensors", "--arch", "flux"]
    master, terminal = pty.openpty()
    settings = {**environment(), "COLUMNS": "80", "LINES": "24"}
    done = subprocess.Popen(command, cwd=tmp_path, stdin=terminal, stdout=terminal, stderr=terminal, env=settings)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal is gone when the program is
        while piece := os.read(master, 65536):
            shown += piece
    os.close(master)
    assert done.wait(60) == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown.decode()).splitlines()
    assert max(map(len, lines)) <= 80
    head = next(line for line in lines if "module" in line)
    assert {"module", "count", "rank", "alpha"} <= set(head.split())
    parts = next(n for n, line in enumerate(lines) if line.strip() == "(attn.to_q|attn.to_k|attn.to_v|proj_mlp)")
    assert lines[parts - 1].split() == ["transformer:single_transformer_blocks.*.", "3", "2", "2"]
