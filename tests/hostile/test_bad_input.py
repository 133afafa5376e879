"""Bad input, through the command line: the right exit code, one readable message, and nothing written."""

from __future__ import annotations

import json
import math
import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_files import (
    DOWN1,
    HIDDEN,
    K1,
    Q0,
    environment,
    factors,
    peft_config,
    run_main,
    snapshot,
    tensors_of_llama,
    write_adapter,
    write_base,
    write_json,
    write_sharded,
)

from loratool.errors import LockedError, MismatchError, PluginError, StorageError, UsageError

USAGE, INPUT, STORAGE, PLUGIN = (e.exit_code for e in (UsageError, MismatchError, StorageError, PluginError))
assert LockedError.exit_code == 6
PREFIX = "base_model.model."


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def flat(self) -> str:
        return re.sub(r"\s+", " ", self.err)


@pytest.fixture
def cli(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Run the command line in the temporary folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        code = run_main(*arguments)
        return Outcome(code, *capfd.readouterr())

    return run


@pytest.fixture
def refused(cli: Callable[..., Outcome], tmp_path: Path) -> Callable[..., Outcome]:
    """Run a command that must be refused: one message with a hint, no traceback, every file as it was."""

    def run(code: int, *arguments: object, says: tuple[str, ...] = (), hint: bool = True) -> Outcome:
        before = snapshot(tmp_path)
        folders = sorted(p for p in tmp_path.rglob("*") if p.is_dir())
        outcome = cli(*arguments)
        assert outcome.code == code, outcome
        assert outcome.out == "", outcome
        assert "Traceback" not in outcome.err
        assert len(re.findall("^[Ee]rror:", outcome.err, re.MULTILINE)) == 1, outcome.err
        assert not hint or "\ntry: " in outcome.err or "Try " in outcome.err, outcome.err
        assert len(outcome.err) < 3000
        for text in says:
            assert text in outcome.flat, outcome.err
        assert snapshot(tmp_path) == before
        assert sorted(p for p in tmp_path.rglob("*") if p.is_dir()) == folders
        return outcome

    return run


@pytest.fixture
def base(tmp_path: Path) -> str:
    write_base(tmp_path / "base")
    return "base"


Refused = Callable[..., Outcome]
Cli = Callable[..., Outcome]


def changed(**changes: Any) -> dict[str, Any]:
    """The factors with some tensors replaced (or left out: None); `q0_A` is down of the first q_proj."""
    names = {"q0": Q0, "k1": K1, "down1": DOWN1}
    tensors: dict[str, Any] = factors()
    for key, value in changes.items():
        module, _, half = key.rpartition("_")
        tensors[f"{PREFIX}{names[module]}.lora_{half}.weight"] = value
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


VERBS = {
    "merge": ("merge", "base", "adapter", "-o", "out"),
    "resize": ("resize", "adapter", "-o", "out", "--rank", "2"),
    "convert": ("convert", "adapter", "-o", "out.safetensors", "--to", "kohya"),
    "compare": ("compare", "adapter", "adapter"),
}
every_verb = pytest.mark.parametrize("verb", VERBS)


# -- names and shapes ----------------------------------------------------------------------------------------------


@every_verb
@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (changed(q0_A=None), ("half a pair", "lora_A", Q0)),
        (changed(k1_B=None), ("half a pair", "lora_B", K1)),
        (changed(q0_B=torch.zeros(HIDDEN, 3)), ("different ranks", Q0, "[4, 16]", "[16, 3]")),
        (changed(q0_A=torch.zeros(0, HIDDEN), q0_B=torch.zeros(HIDDEN, 0)), ("rank 0", Q0, "[0, 16]")),
        (changed(q0_A=torch.zeros(HIDDEN), q0_B=torch.zeros(HIDDEN)), ("dimensions", Q0, "[16]")),
        (changed(q0_A=torch.tensor(1.0)), ("dimensions", Q0)),
        (changed(q0_A=torch.zeros(4, HIDDEN, 1, 1)), ("dimensions", Q0)),
        (changed(q0_A=torch.zeros(4, HIDDEN, dtype=torch.int8)), ("no floating-point", "I8", Q0)),
        (changed(q0_A=torch.zeros(4, HIDDEN, dtype=torch.complex64)), ("no floating-point", "C64", Q0)),
        ({**factors(), "extra.weight": torch.zeros(2)}, ("extra.weight", "the config says nothing of")),
        ({**factors(), f"{PREFIX}{Q0}.lora_magnitude_vector": torch.zeros(16)}, ("DoRA magnitude", Q0)),
        ({**factors(), f"{PREFIX}{Q0}.lora_B.bias": torch.zeros(16)}, ("bias on lora_B", Q0)),
        ({**factors(), f"{PREFIX}score.weight": torch.zeros(2, 16)}, ("modules_to_save", "score")),
        ({**factors(), f"{Q0}.lora_A.weight": torch.zeros(4, 16)}, ("some start with base_model.model.",)),
        ({**factors(), f"{PREFIX}{K1}.lora_A.other.weight": torch.zeros(4, 16)}, ("several adapters in one file",)),
    ],
    ids=range(15),
)
@pytest.mark.usefixtures("base")
def test_an_adapter_with_a_broken_tensor_is_refused_by_every_verb(
    tmp_path: Path, refused: Refused, verb: str, tensors: dict[str, Any], says: tuple[str, ...]
) -> None:
    write_adapter(tmp_path / "adapter", tensors)
    refused(INPUT, *VERBS[verb], says=("adapter", *says), hint=False)


NO_FACTORS = {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}


@every_verb
@pytest.mark.parametrize("dtype", NO_FACTORS, ids=str)
@pytest.mark.parametrize("form", ["peft", "kohya"])
@pytest.mark.usefixtures("base")
def test_factors_that_are_no_numbers_to_compute_with_are_refused_by_every_verb(
    tmp_path: Path, refused: Refused, verb: str, dtype: torch.dtype, form: str
) -> None:
    down, up = torch.ones(4, HIDDEN).to(dtype), torch.ones(HIDDEN, 4).to(dtype)
    command = VERBS[verb]
    if form == "peft":
        write_adapter(tmp_path / "adapter", changed(q0_A=down, q0_B=up))
    else:
        name = "lora_te_model_layers_0_self_attn_q_proj"
        save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "a.safetensors")
        command = tuple("a.safetensors" if word == "adapter" else word for word in command)
    refused(INPUT, *command, says=("no floating-point", f"down {NO_FACTORS[dtype]}", "q_proj"), hint=False)


def test_a_module_that_the_base_lacks_is_named_with_the_bases_path(tmp_path: Path, base: str, refused: Refused) -> None:
    module = "model.layers.7.self_attn.q_proj"
    write_adapter(tmp_path / "adapter", factors(shapes={module: (HIDDEN, HIDDEN)}))
    refused(INPUT, *VERBS["merge"], says=("base:", module, "no such module"))


def test_shapes_that_do_not_fit_are_shown_side_by_side(tmp_path: Path, base: str, refused: Refused) -> None:
    write_adapter(
        tmp_path / "adapter", factors(shapes={Q0: (HIDDEN, 32), K1: (9, HIDDEN)}), base_model_name_or_path="org/seven-b"
    )
    says = (Q0, "[16, 16]", "[16, 32]", K1, "[8, 16]", "[9, 16]", "(2 modules)", "org/seven-b")
    refused(INPUT, *VERBS["merge"], says=says)


def test_an_adapter_of_another_family_is_refused(tmp_path: Path, base: str, refused: Refused) -> None:
    write_adapter(tmp_path / "adapter", factors(shapes={"bert.encoder.layer.0.attention.self.query": (16, 16)}))
    refused(INPUT, *VERBS["merge"], says=("bert.encoder.layer.0.attention.self.query", "no such module"))


def test_a_kohya_adapter_of_another_family_is_refused(tmp_path: Path, base: str, refused: Refused) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file(
        {f"{name}.lora_down.weight": torch.ones(2, 16), f"{name}.lora_up.weight": torch.ones(16, 2)},
        tmp_path / "style.safetensors",
    )
    refused(INPUT, "merge", "base", "style.safetensors", "-o", "out", says=("style.safetensors", name, "llama"))


def test_renamed_keys_are_not_a_silent_no_op(tmp_path: Path, base: str, refused: Refused) -> None:
    write_adapter(tmp_path / "adapter", {name.replace("self_attn", "attention"): t for name, t in factors().items()})
    refused(INPUT, *VERBS["merge"], says=("attention.q_proj", "no such module"))


def test_a_pattern_that_selects_nothing_is_named(tmp_path: Path, base: str, refused: Refused) -> None:
    write_adapter(tmp_path / "adapter")
    refused(INPUT, *VERBS["merge"], "--target", "query", says=("'query'", "no module matches"))
    refused(INPUT, *VERBS["merge"], "--exclude", "*", says=("no module is left",))
    refused(USAGE, *VERBS["merge"], "--target", "q_proj)(", says=("malformed",))


@every_verb
@pytest.mark.parametrize("index", ["²", "٣", "9" * 5000, "-1", "007", "1e3", "0x1", "", "١٢"])
def test_a_strange_layer_number_is_a_name_like_any_other(
    tmp_path: Path, base: str, cli: Cli, verb: str, index: str
) -> None:
    write_adapter(tmp_path / "adapter", factors(shapes={f"model.layers.{index}.self_attn.q_proj": (HIDDEN, HIDDEN)}))
    outcome = cli(*VERBS[verb])
    assert outcome.code in (0, USAGE, INPUT)
    if verb in ("merge", "convert"):
        assert outcome.code == INPUT


# -- numbers -------------------------------------------------------------------------------------------------------


def spoiled(tensor: torch.Tensor, value: float) -> torch.Tensor:
    copy = tensor.clone()
    copy.view(-1)[-1] = value
    return copy


@every_verb
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("half", ["A", "B"])
@pytest.mark.usefixtures("base")
def test_factors_that_are_not_finite_are_refused(
    tmp_path: Path, refused: Refused, verb: str, value: float, half: str
) -> None:
    if verb == "convert":  # moves bytes and does not look at them
        verb = "merge"
    name = f"{PREFIX}{K1}.lora_{half}.weight"
    write_adapter(tmp_path / "adapter", changed(**{f"k1_{half}": spoiled(factors()[name], value)}))
    refused(INPUT, *VERBS[verb], says=(K1, "NaN or infinity"), hint=False)


def test_a_base_weight_that_is_not_finite_is_refused_where_it_would_be_merged(tmp_path: Path, refused: Refused) -> None:
    tensors = tensors_of_llama()
    write_base(tmp_path / "base", {**tensors, f"{Q0}.weight": spoiled(tensors[f"{Q0}.weight"], math.nan)})
    write_adapter(tmp_path / "adapter")
    refused(INPUT, *VERBS["merge"], says=(f"{Q0}.weight", "NaN"), hint=False)


def test_a_merged_value_beyond_half_precision_is_refused_with_the_way_out(tmp_path: Path, refused: Refused) -> None:
    write_base(tmp_path / "base", tensors_of_llama(dtype=torch.float16))
    write_adapter(tmp_path / "adapter", changed(k1_B=torch.full((8, 4), 6e4)), lora_alpha=64)
    refused(INPUT, *VERBS["merge"], says=(K1, "overflow float16", "--dtype bfloat16"), hint=False)


def test_an_adapter_that_changes_nothing_is_refused_unless_asked(
    tmp_path: Path, base: str, refused: Refused, cli: Cli
) -> None:
    zero = {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in factors().items()}
    write_adapter(tmp_path / "adapter", zero)
    refused(INPUT, *VERBS["merge"], says=("every update is zero", "--allow-noop"))
    assert cli(*VERBS["merge"], "--allow-noop").code == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "base" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf", "1e999"])
def test_a_weight_that_is_no_number_is_refused(tmp_path: Path, base: str, refused: Refused, weight: str) -> None:
    write_adapter(tmp_path / "adapter")
    refused(USAGE, *VERBS["merge"], f"--weight={weight}", says=("weights",))
    refused(USAGE, "merge", "base", f"adapter:{weight}", "-o", "out", says=("weights",))


def test_weights_must_be_as_many_as_adapters_and_given_once(tmp_path: Path, base: str, refused: Refused) -> None:
    write_adapter(tmp_path / "adapter")
    refused(USAGE, *VERBS["merge"], "-w", 1, "-w", 2, says=("1 adapters and 2 weights",))
    refused(USAGE, "merge", "base", "adapter:0.5", "-w", "1", "-o", "out", says=("not both",), hint=False)
    refused(USAGE, "merge", "base:0.5", "adapter", "-o", "out", says=("a base has no weight",), hint=False)


# -- config --------------------------------------------------------------------------------------------------------


@every_verb
@pytest.mark.parametrize(
    ("alpha", "says"),
    [
        ("0", "must be positive"),
        ("-8", "must be positive"),
        ("-0.0", "must be positive"),
        ("null", "unknown"),
        ('"8"', "unknown"),
        ("true", "unknown"),
        ("[8]", "unknown"),
        ("1" + "0" * 400, "unknown"),
        ("1e300", "unknown"),
        ("NaN", "not valid JSON"),
        ("Infinity", "not valid JSON"),
        ("1e999", "not valid JSON"),
    ],
)
@pytest.mark.usefixtures("base")
def test_an_alpha_that_is_no_strength_is_refused(
    tmp_path: Path, refused: Refused, verb: str, alpha: str, says: str
) -> None:
    folder = write_adapter(tmp_path / "adapter")
    text = json.dumps(peft_config()).replace('"lora_alpha": 8', f'"lora_alpha": {alpha}')
    (folder / "adapter_config.json").write_text(text)
    refused(INPUT, *VERBS[verb], says=("adapter", says), hint=False)


@pytest.mark.parametrize("alpha", ["nan", "inf", "-8", "0"])
def test_an_alpha_on_the_command_line_is_judged_as_well(
    tmp_path: Path, base: str, refused: Refused, alpha: str
) -> None:
    folder = write_adapter(tmp_path / "adapter")
    (folder / "adapter_config.json").unlink()
    refused(INPUT, *VERBS["merge"], f"--alpha={alpha}", says=("lora_alpha",), hint=False)


def test_a_missing_alpha_is_never_guessed(tmp_path: Path, base: str, refused: Refused, cli: Cli) -> None:
    folder = write_adapter(tmp_path / "adapter", lora_alpha=None)
    refused(INPUT, *VERBS["merge"], says=("lora_alpha", "--alpha"))
    (folder / "adapter_config.json").unlink()
    refused(INPUT, *VERBS["merge"], says=("no config", "--alpha"))
    assert cli(*VERBS["merge"], "--alpha", "8").code == 0


def test_a_rank_in_the_config_that_contradicts_the_tensors_is_refused(
    tmp_path: Path, base: str, refused: Refused
) -> None:
    write_adapter(tmp_path / "adapter", r=16)
    refused(INPUT, *VERBS["merge"], says=("the config says rank 16, the tensors have rank 4", Q0), hint=False)


@pytest.mark.parametrize(
    "content",
    [
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_alpha": 800}',
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {"a": 1, "a": 2}}',
    ],
)
def test_a_key_that_occurs_twice_in_the_config_is_refused(
    tmp_path: Path, base: str, refused: Refused, content: str
) -> None:
    folder = write_adapter(tmp_path / "adapter")
    (folder / "adapter_config.json").write_text(content)
    refused(INPUT, *VERBS["merge"], says=("adapter_config.json", "duplicate key"), hint=False)


def test_a_key_that_occurs_twice_in_an_embedded_config_is_refused(tmp_path: Path, base: str, refused: Refused) -> None:
    text = '{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_alpha": 800}'
    save_file(factors(), tmp_path / "a.safetensors", {"lora_adapter_metadata": text})
    refused(INPUT, "merge", "base", "a.safetensors", "-o", "out", says=("lora_adapter_metadata",), hint=False)


def test_an_embedded_config_is_judged_without_assertions_too(tmp_path: Path, base: str) -> None:
    save_file(factors(), tmp_path / "a.safetensors", {"lora_adapter_metadata": "[1]"})
    command = [sys.executable, "-O", "-m", "loratool", "merge", "base", "a.safetensors", "-o", "out"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == INPUT, ended.stderr
    assert "lora_adapter_metadata" in ended.stderr


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    "pattern",
    [
        "([a-z_.0-9]+)+!",
        "(?:[a-z_.0-9]|[a-z])*[A-Z]",
        "(.*)*(.*)*(.*)*x",
        "(" * 1500 + ")" * 1500,
        "(?=(a+))a*b\\1",
        "[",
        "(?P<n>a)(?P<n>b)",
        "a{99999999999}",
        "(?R)",
        "\\p{Nonsense}",
    ],
)
def test_an_evil_pattern_ends_quickly_and_readably(
    tmp_path: Path, base: str, cli: Cli, field: str, pattern: str
) -> None:
    shapes = {f"model.layers.{n}.self_attn.q_proj": (HIDDEN, HIDDEN) for n in range(30)}
    write_adapter(tmp_path / "adapter", factors(shapes=shapes), **{field: {pattern: 4}})
    cli("formats")
    start = time.process_time()
    outcome = cli(*VERBS["compare"])
    assert time.process_time() - start < 2
    assert outcome.code in (0, INPUT)
    assert "Traceback" not in outcome.err


def test_many_slow_patterns_share_one_second(tmp_path: Path, base: str, refused: Refused) -> None:
    slow = {f"(?:[a-z_.0-9]|[a-z])*[A-Z]{n}": 4 for n in range(30)}
    write_adapter(tmp_path / "adapter", alpha_pattern=slow)
    start = time.process_time()
    refused(INPUT, *VERBS["compare"], says=("alpha_pattern", "takes forever"), hint=False)
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("bias", "some"),
        ("peft_type", "LOHA"),
        ("init_lora_weights", "pissa"),
        ("a_field_of_the_future", 1),
        ("rank_pattern", [1]),
        ("rank_pattern", {"q_proj": -1}),
        ("alpha_pattern", {"q_proj": "8"}),
        ("peft_type", ["LORA"]),
        ("peft_type", None),
    ],
)
def test_a_config_that_changes_the_mathematics_is_refused(
    tmp_path: Path, base: str, refused: Refused, field: str, value: object
) -> None:
    folder = write_adapter(tmp_path / "adapter")
    write_json(folder / "adapter_config.json", {**peft_config(), field: value})
    refused(INPUT, *VERBS["merge"], says=(field if field != "peft_type" else "peft",), hint=False)


@pytest.mark.parametrize("which", ["all", "lora_only"])
def test_biases_that_were_trained_and_are_not_there_are_missed(tmp_path: Path, refused: Refused, which: str) -> None:
    write_base(tmp_path / "base", {**tensors_of_llama(), f"{Q0}.bias": torch.ones(HIDDEN)})
    write_adapter(tmp_path / "adapter", bias=which)
    refused(INPUT, *VERBS["merge"], says=("adapter", f"{Q0}.bias", "missing", "adapter_config.json"))


# -- files ---------------------------------------------------------------------------------------------------------


@every_verb
def test_a_truncated_adapter_is_refused(tmp_path: Path, base: str, refused: Refused, verb: str) -> None:
    weights = write_adapter(tmp_path / "adapter") / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 5, 8, 100, len(whole) - 1):
        weights.write_bytes(whole[:size])
        refused(INPUT, *VERBS[verb], says=("adapter_model.safetensors",), hint=False)


def test_a_truncated_base_is_refused(tmp_path: Path, base: str, refused: Refused) -> None:
    write_adapter(tmp_path / "adapter")
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    refused(INPUT, *VERBS["merge"], says=("model.safetensors", "cut off", "fetch it again"))


def test_an_index_that_points_outside_its_folder_is_refused(tmp_path: Path, refused: Refused) -> None:
    base = write_sharded(tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    save_file({"x": torch.zeros(1)}, tmp_path / "secret.safetensors")
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"]["x"] = "../secret.safetensors"
    write_json(base / "model.safetensors.index.json", index)
    refused(INPUT, *VERBS["merge"], says=("outside its folder", "../secret.safetensors"), hint=False)


def test_a_pickle_adapter_is_refused_with_the_way_out(tmp_path: Path, base: str, refused: Refused, cli: Cli) -> None:
    folder = write_adapter(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(factors(), folder / "adapter_model.bin")
    refused(INPUT, *VERBS["merge"], says=("adapter_model.bin", "run code", "--allow-pickle"))
    assert cli(*VERBS["merge"], "--allow-pickle").code == 0


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_quantised_base_is_refused(tmp_path: Path, refused: Refused, dtype: torch.dtype) -> None:
    tensors = tensors_of_llama()
    write_base(tmp_path / "base", {**tensors, f"{Q0}.weight": torch.ones(HIDDEN, HIDDEN).to(dtype)})
    write_adapter(tmp_path / "adapter")
    refused(INPUT, *VERBS["merge"], says=("base", Q0, "quantised"))
    write_base(tmp_path / "tuned")
    refused(INPUT, "extract", "tuned", "--base", "base", "--rank", 2, "-o", "out", says=(Q0, "quantised"), hint=False)


def test_tied_weights_of_which_one_changes_are_untied(tmp_path: Path, cli: Cli) -> None:
    tensors = {"transformer.wte.weight": torch.ones(40, 16), "transformer.h.0.attn.c_attn.weight": torch.ones(16, 48)}
    write_base(
        tmp_path / "base", tensors, model_type="gpt2", architectures=["GPT2LMHeadModel"], tie_word_embeddings=None
    )
    name = f"{PREFIX}transformer.wte.lora_embedding_"
    write_adapter(tmp_path / "adapter", {f"{name}A": torch.ones(4, 40), f"{name}B": torch.ones(16, 4)})
    outcome = cli(*VERBS["merge"])
    assert outcome.code == 0
    assert all(text in outcome.out + outcome.err for text in ("transformer.wte", "lm_head", "tie_word_embeddings"))
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged["lm_head.weight"], tensors["transformer.wte.weight"])
    assert torch.equal(merged["transformer.wte.weight"], tensors["transformer.wte.weight"] + 8)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_tied_weights_that_no_model_can_have_apart_are_refused(tmp_path: Path, refused: Refused) -> None:
    weight = "model.encoder.layers.0.self_attn.q_proj.weight"
    tensors = {"model.shared.weight": torch.ones(40, 16), weight: torch.ones(16, 16)}
    classes = ["BartForConditionalGeneration"]
    write_base(tmp_path / "base", tensors, model_type="bart", architectures=classes, tie_word_embeddings=True)
    name = f"{PREFIX}model.shared.lora_embedding_"
    write_adapter(tmp_path / "adapter", {f"{name}A": torch.ones(4, 40), f"{name}B": torch.ones(16, 4)})
    refused(INPUT, *VERBS["merge"], says=("model.shared", "without that tie"))


@pytest.mark.parametrize("verb", ["merge", "resize", "convert"])
def test_an_output_that_exists_is_refused_and_kept(tmp_path: Path, base: str, refused: Refused, verb: str) -> None:
    write_adapter(tmp_path / "adapter")
    out = tmp_path / VERBS[verb][VERBS[verb].index("-o") + 1]
    if out.suffix:
        save_file({"old": torch.zeros(1)}, out)
    else:
        write_base(out)
    refused(STORAGE, *VERBS[verb], says=(out.name, "exists", "--force"))


@pytest.mark.parametrize("out", ["base", "adapter", "base/merged", "."])
def test_an_output_over_or_inside_an_input_is_refused(tmp_path: Path, base: str, refused: Refused, out: str) -> None:
    write_adapter(tmp_path / "adapter")
    for force in ((), ("--force",)):
        refused(USAGE, "merge", "base", "adapter", "-o", out, *force, says=("input", "choose another -o"))


def test_missing_files_are_named(tmp_path: Path, base: str, refused: Refused) -> None:
    write_adapter(tmp_path / "adapter")
    refused(STORAGE, "merge", "base", "nowhere", "-o", "out", says=("nowhere", "no such file"))
    refused(STORAGE, "merge", "nowhere", "adapter", "-o", "out", says=("nowhere", "no such file"))
    refused(STORAGE, "inspect", "nowhere", says=("nowhere", "no such file"))
    (tmp_path / "empty").mkdir()
    refused(STORAGE, "inspect", "empty", says=("empty", "no weights", "*.safetensors"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_a_storage_error(tmp_path: Path, base: str, refused: Refused) -> None:
    weights = write_adapter(tmp_path / "adapter") / "adapter_model.safetensors"
    weights.chmod(0)
    outcome = refused(STORAGE, "inspect", weights, says=("adapter_model.safetensors", "Permission denied"), hint=False)
    weights.chmod(0o600)
    assert outcome.code == STORAGE


def test_a_file_that_is_no_adapter_is_said_to_be_none(tmp_path: Path, base: str, refused: Refused) -> None:
    refused(INPUT, "inspect", "base", says=("no adapter in a format", "loratool formats"))
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<I", 3) + bytes(100))
    refused(INPUT, "inspect", "x.gguf", says=("x.gguf", "not a safetensors file"), hint=False)


def test_a_pipeline_or_a_model_given_as_an_adapter_is_told_what_makes_one(
    tmp_path: Path, base: str, refused: Refused
) -> None:
    (tmp_path / "pipeline/unet").mkdir(parents=True)
    write_json(tmp_path / "pipeline/model_index.json", {"unet": ["diffusers", "UNet2DConditionModel"]})
    write_json(tmp_path / "pipeline/unet/config.json", {"_class_name": "UNet2DConditionModel"})
    save_file({"conv_in.weight": torch.ones(4, 4, 3, 3)}, tmp_path / "pipeline/unet/model.safetensors")
    for model in ("pipeline", "base"):
        says = ("this is a model", f"loratool extract {model} --base BASE")
        refused(INPUT, "convert", model, "-o", "new.safetensors", "--to", "kohya", says=says)
        refused(INPUT, "resize", model, "-o", "new.safetensors", "--rank", 2, says=says)


@pytest.mark.parametrize("alpha", [math.nan, math.inf])
def test_a_kohya_alpha_that_is_no_strength_is_refused(
    tmp_path: Path, base: str, refused: Refused, alpha: float
) -> None:
    name = "lora_te_model_layers_0_self_attn_q_proj"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 16), f"{name}.lora_up.weight": torch.ones(16, 2)}
    save_file({**tensors, f"{name}.alpha": torch.tensor(alpha)}, tmp_path / "a.safetensors")
    refused(
        INPUT, "merge", "base", "a.safetensors", "-o", "out", says=(f"{name}.alpha", "must be a number"), hint=False
    )


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
def test_a_kohya_alpha_of_a_strange_dtype_is_refused(
    tmp_path: Path, base: str, refused: Refused, dtype: torch.dtype
) -> None:
    name = "lora_te_model_layers_0_self_attn_q_proj"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 16), f"{name}.lora_up.weight": torch.ones(16, 2)}
    save_file({**tensors, f"{name}.alpha": torch.tensor(1.0).to(dtype)}, tmp_path / "a.safetensors")
    refused(
        INPUT, "merge", "base", "a.safetensors", "-o", "out", says=(f"{name}.alpha", "cannot be decoded"), hint=False
    )


# -- the command line ----------------------------------------------------------------------------------------------


def test_swapped_arguments_get_the_right_command(tmp_path: Path, base: str, refused: Refused, cli: Cli) -> None:
    write_adapter(tmp_path / "adapter")
    command = "loratool merge base adapter -o out"
    outcome = refused(USAGE, "merge", "adapter", "base", "-o", "out", says=("the base comes first", command))
    assert cli(*command.split()[1:]).code == 0
    assert outcome.code == USAGE


def test_swapped_arguments_keep_their_weights_in_the_right_command(tmp_path: Path, base: str, refused: Refused) -> None:
    write_adapter(tmp_path / "adapter")
    refused(USAGE, "merge", "adapter:0.5", "base", "-o", "out", says=("loratool merge base adapter:0.5 -o out",))


def test_adapters_alone_need_a_base(tmp_path: Path, base: str, refused: Refused) -> None:
    write_adapter(tmp_path / "adapter")
    write_adapter(tmp_path / "other")
    refused(
        USAGE, "merge", "adapter", "other", "-o", "out", says=("all of these are adapters", "merge BASE adapter other")
    )
    refused(USAGE, "merge", "base", "-o", "out", says=("base is a base model", "merge base ADAPTER"))
    refused(USAGE, "merge", "adapter", "-o", "out", says=("names no base model", "merge BASE adapter"))


def test_a_base_that_is_not_here_is_named(tmp_path: Path, refused: Refused) -> None:
    write_adapter(tmp_path / "adapter", base_model_name_or_path="org/model")
    says = ("base: org/model (named by the adapter)", "HF_HUB_OFFLINE")  # which the tests set
    refused(4, "merge", "adapter", "-o", "out", says=says)


def test_unknown_families_and_formats_list_what_exists(tmp_path: Path, base: str, refused: Refused) -> None:
    write_adapter(tmp_path / "adapter")
    families = ("llama", "arch list", "-p FILE")
    refused(USAGE, *VERBS["merge"], "--arch", "lama", says=("'lama'", *families))
    refused(USAGE, "arch", "show", "lama", says=("'lama'", *families))
    refused(USAGE, *VERBS["merge"], "--format", "peff", says=("'peff'", "kohya", "peft"))
    refused(USAGE, "convert", "adapter", "-o", "out", "--to", "peff", says=("'peff'", "kohya", "peft"))


def test_a_model_of_no_family_is_read_by_its_headers_and_what_is_not_there_refused(
    tmp_path: Path, refused: Refused
) -> None:
    write_base(tmp_path / "base", {"strange.weight": torch.ones(3, 4)}, model_type="strange")
    write_adapter(tmp_path / "adapter")
    refused(INPUT, *VERBS["merge"], says=("does not fit this base", "self_attn.q_proj"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--rank", "0"), "a rank of 0 is impossible"),
        (("--rank", "-3"), "a rank of -3 is impossible"),
        (("--energy", "2"), "--energy 2 is impossible"),
        (("--energy", "0"), "--energy 0 is impossible"),
        (("--energy", "nan"), "--energy nan is impossible"),
        ((), "no rank rule"),
        (("--rank", "x"), "a number, or auto"),
        (("--rank", "2", "--max-memory", "lots"), "a size such as"),
        (("--rank", "2", "--device", "banana"), "no device is called 'banana'"),
        (("--rank", "2", "--workers", "-1"), "-1"),
        (("--rank", "2", "--dtype", "int8"), "int8"),
        (("--rank", "2", "--no-such-option"), "--no-such-option"),
    ],
)
def test_an_impossible_option_is_a_usage_error(
    tmp_path: Path, refused: Refused, options: tuple[str, ...], says: str
) -> None:
    write_adapter(tmp_path / "adapter")
    refused(USAGE, "resize", "adapter", "-o", "out", *options, says=(says,), hint=False)


def test_kohya_is_one_file(tmp_path: Path, refused: Refused) -> None:
    write_adapter(tmp_path / "adapter")
    refused(USAGE, "convert", "adapter", "-o", "out", "--to", "kohya", says=("one file", "out.safetensors"))


BROKEN_PLUGINS = {
    "a syntax error": "def (",
    "an exception": "raise RuntimeError('boom')",
    "an exit": "import sys; sys.exit(0)",
    "an unknown hook": "from loratool import hookimpl\n@hookimpl\ndef register_architecture(): return []",
    "a hook that fails": "from loratool import hookimpl\n@hookimpl\ndef register_architectures(): raise ValueError",
    "a hook that returns no list": "from loratool import hookimpl\n@hookimpl\ndef register_architectures(): return 3",
    "an import that fails": "import no_such_module_anywhere",
}


@pytest.fixture
def forget_plugins() -> Any:
    from loratool.plugins import installed

    installed.cache_clear()
    yield
    installed.cache_clear()


@pytest.mark.usefixtures("forget_plugins")
@pytest.mark.parametrize("source", BROKEN_PLUGINS.values(), ids=BROKEN_PLUGINS.keys())
def test_a_plugin_file_that_fails_is_named(
    tmp_path: Path, base: str, refused: Refused, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # what Python keeps beside a file is not ours
    (tmp_path / "mine.py").write_text(source)
    write_adapter(tmp_path / "adapter")
    refused(PLUGIN, *VERBS["merge"], "-p", "mine.py", says=("mine.py",), hint=False)


@pytest.mark.usefixtures("forget_plugins")
def test_a_plugin_file_may_be_given_before_and_after_the_verb(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "mine.py").write_text("")
    assert cli("-p", "mine.py", "formats", "-p", "mine.py").code == 0


def test_a_plugin_file_that_is_missing_is_a_usage_error(tmp_path: Path, refused: Refused) -> None:
    refused(USAGE, "formats", "-p", "none.py", says=("none.py", "no such plugin file"), hint=False)
