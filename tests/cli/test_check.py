"""`loratool inspect --check` on the command line: what is printed, and with which exit code."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tiny_files import (
    Q0,
    SHAPES,
    factors,
    run_main,
    snapshot,
    tensors_of_llama,
    write_adapter,
    write_base,
    write_sharded,
)


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    monkeypatch.chdir(tmp_path)
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "good")
    broken, untrained = factors(), factors()
    broken[f"base_model.model.{Q0}.lora_A.weight"][0, 0] = math.nan
    untrained[f"base_model.model.{Q0}.lora_B.weight"].zero_()
    write_adapter(tmp_path / "broken", broken)
    write_adapter(tmp_path / "untrained", untrained)
    write_adapter(tmp_path / "torn", {n: t[:1].contiguous() for n, t in factors().items()})

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        code = run_main(*arguments)
        return Outcome(code, *capfd.readouterr())

    return run


@pytest.mark.parametrize(
    ("adapter", "plain", "checked"), [("good", 0, 0), ("untrained", 0, 0), ("broken", 0, 3), ("torn", 0, 3)]
)
def test_only_a_check_that_finds_an_error_fails(
    cli: Callable[..., Outcome], adapter: str, plain: int, checked: int
) -> None:
    assert cli("inspect", adapter).code == plain
    for style in ((), ("--json",), ("-q",)):
        assert cli("inspect", adapter, "--check", *style).code == checked


def test_findings_go_to_stderr_and_defects_stand_beside_their_modules_first(cli: Callable[..., Outcome]) -> None:
    outcome = cli("inspect", "untrained", "--check")
    assert "warning: untrained: the up factors of 1 of 3 modules are all zero" in outcome.err
    rows = [line for line in outcome.out.splitlines() if "layers" in line]
    assert len(rows) == len(SHAPES)
    assert Q0 in rows[0]
    assert rows[0].rstrip().endswith("up is zero")
    assert re.search(r"^check +1 warning$", outcome.out, re.MULTILINE)
    assert re.search(r"^check +no defects$", cli("inspect", "good", "--check").out, re.MULTILINE)


def test_json_has_the_findings_the_norms_and_the_defects(cli: Callable[..., Outcome]) -> None:
    outcome = cli("inspect", "broken", "--check", "--json")
    report = json.loads(outcome.out, parse_constant=pytest.fail)
    (error,) = report["findings"]
    assert (error["level"], error["where"]) == ("error", Q0)
    assert error["hint"]
    assert {row["module"]: row.get("defects") for row in report["rows"]}[Q0] == ["NaN"]
    assert sum("norm" in row for row in report["rows"]) == len(SHAPES) - 1


def test_a_check_writes_nothing(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    cli("inspect", "broken", "--check")
    cli("inspect", "base", "--check", "--base", "base")
    assert snapshot(tmp_path) == before


def test_a_merged_model_is_compared_with_its_base(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    write_sharded(tmp_path / "same")
    outcome = cli("inspect", "same", "--check", "--base", "base")
    assert outcome.code == 3
    assert "error: same: this model is equal to its base: the merge changed nothing" in outcome.err
    assert "try: merge it again" in outcome.err
    assert re.search(r"model\.layers\.\*\.self_attn\.q_proj\.weight +2 .* no", outcome.out)
    tensors = tensors_of_llama()
    tensors[f"{Q0}.weight"] = tensors[f"{Q0}.weight"] + torch.ones(1)
    write_base(tmp_path / "merged", tensors)
    outcome = cli("inspect", "merged", "--check", "--base", "base")
    assert outcome.code == 0
    assert "1 of 17 tensors differ from the base" in outcome.err
    assert re.search(r"^changed +1$", outcome.out, re.MULTILINE)


@pytest.mark.parametrize("options", [(), ("--check",)])
def test_a_model_alone_is_said_to_be_one(cli: Callable[..., Outcome], options: tuple[str, ...]) -> None:
    outcome = cli("inspect", "base", *options)
    assert outcome.code == 3
    assert "base: this is a model (llama, 17 tensors)" in outcome.err
    assert "loratool arch show base" in outcome.err
    assert "loratool inspect base --check --base BASE" in outcome.err


def test_an_adapter_has_no_base_to_be_equal_to(cli: Callable[..., Outcome]) -> None:
    outcome = cli("inspect", "good", "--check", "--base", "base")
    assert outcome.code == 2
    assert "leave --base out" in outcome.err


def test_the_help_says_when_it_fails(cli: Callable[..., Outcome]) -> None:
    assert "exits with 3 where it finds an error" in " ".join(cli("inspect", "--help").out.split())
