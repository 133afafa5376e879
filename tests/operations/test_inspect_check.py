"""inspect --check: every defect is found in the module that has it, and a good adapter has none."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_files import (
    HIDDEN,
    Q0,
    VOCAB,
    factors,
    peft_config,
    tensors_of_llama,
    write_adapter,
    write_base,
    write_json,
    write_sharded,
)

import loratool
from loratool.adapter import Finding
from loratool.engine import Resources
from loratool.errors import FormatError, InputError, MismatchError, UsageError
from loratool.plan import Report

Q = "model.layers.{}.self_attn.q_proj"
LAYERS = 8
A, B = "base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"


def deep(layers: int = LAYERS) -> dict[str, torch.Tensor]:
    return factors(shapes={Q.format(n): (24, HIDDEN) for n in range(layers)})


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., Report]:
    """Write an adapter with these tensors, and check it."""

    def run(tensors: dict[str, Any], **config: Any) -> Report:
        write_adapter(tmp_path / "adapter", {n: t.contiguous() for n, t in tensors.items()}, **config)
        return loratool.inspect(tmp_path / "adapter", check=True)

    return run


def found(report: Report, level: str) -> list[Finding]:
    return [f for f in report.findings if f.level == level]


def defects(report: Report) -> dict[str, list[str]]:
    return {row["module"]: row["defects"] for row in report.rows if "defects" in row}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_sound_adapter_has_no_defects_and_its_norms_are_right(check: Callable[..., Report], dtype: Any) -> None:
    tensors = {n: t.to(dtype) for n, t in deep().items()}
    report = check(tensors)
    assert not report.findings
    assert report.totals["check"] == "no defects"
    for n, row in enumerate(report.rows):
        delta = 2.0 * tensors[B.format(Q.format(n))].double() @ tensors[A.format(Q.format(n))].double()
        assert row["norm"] == pytest.approx(float(delta.norm()), rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("half", [A, B])
def test_numbers_that_are_none_are_counted_in_their_module(
    check: Callable[..., Report], value: float, half: str
) -> None:
    tensors = deep()
    tensors[half.format(Q.format(3))][1, 2:4] = value
    report = check(tensors)
    (error,) = found(report, "error")
    word = "NaN" if math.isnan(value) else "infinite"
    assert error.where == Q.format(3)
    assert (
        f"{'down' if half is A else 'up'} has 2 {word} among its {tensors[half.format(Q.format(3))].numel()}"
        in error.what
    )
    assert error.hint
    assert defects(report) == {Q.format(3): [word]}
    assert "norm" not in report.rows[3]


def test_a_spectrum_of_what_is_not_finite_does_not_hide_the_findings(tmp_path: Path) -> None:
    tensors = deep()
    tensors[A.format(Q.format(3))][0, 0] = math.nan
    write_adapter(tmp_path / "adapter", tensors)
    report = loratool.inspect(tmp_path / "adapter", check=True, spectrum=True)
    assert [f.where for f in found(report, "error")] == [Q.format(3)]
    assert ["sigma" in row for row in report.rows] == [n != 3 for n in range(LAYERS)]
    for row in report.rows:
        assert "sigma" not in row or row["norm"] == pytest.approx(math.sqrt(sum(s * s for s in row["sigma"])), rel=1e-5)


def test_what_was_never_trained_is_counted(check: Callable[..., Report]) -> None:
    tensors = deep()
    for n in (1, 4, 5):
        tensors[B.format(Q.format(n))].zero_()
    report = check(tensors)
    (warning,) = found(report, "warning")
    assert "up factors of 3 of 8 modules are all zero (never trained)" in warning.what
    assert all(Q.format(n) in warning.what for n in (1, 4, 5))
    assert defects(report) == {Q.format(n): ["up is zero"] for n in (1, 4, 5)}
    assert not found(report, "error")


def test_a_down_factor_of_zeros_is_no_start_of_a_training(check: Callable[..., Report]) -> None:
    tensors = deep()
    tensors[A.format(Q.format(2))].zero_()
    (warning,) = found(check(tensors), "warning")
    assert "down factors of 1 of 8" in warning.what
    assert "never trained" not in warning.what


@pytest.mark.parametrize("half", [A, B])
def test_an_adapter_that_does_nothing_is_an_error(check: Callable[..., Report], half: str) -> None:
    tensors = {n: t * 0 if n.endswith(half[-13:]) else t for n, t in deep().items()}
    (error,) = found(check(tensors), "error")
    assert "does nothing: the updates of all 8 modules are zero" in error.what
    assert error.where.endswith("adapter")


def test_an_untrained_embedding_starts_with_a_down_of_zeros(check: Callable[..., Report]) -> None:
    name = "base_model.model.model.embed_tokens.lora_embedding_"
    tensors = deep() | {f"{name}A": torch.zeros(4, VOCAB), f"{name}B": torch.randn(HIDDEN, 4)}
    (warning,) = found(check(tensors), "warning")
    assert "down factors of 1 of 9 modules are all zero (never trained)" in warning.what


def test_other_kinds_that_do_nothing_are_seen_too(tmp_path: Path) -> None:
    for kind, tensors, config in (
        ("IA3", {"ia3_l": torch.ones(24, 1)}, {"feedforward_modules": []}),
        ("OFT", {"oft_R.weight": torch.zeros(2, 28)}, {"oft_block_size": 8}),
        ("VERA", {"vera_lambda_b": torch.zeros(24), "vera_lambda_d": torch.ones(4) * 0.1}, {"save_projection": True}),
        ("LOHA", {"hada_w1_a": torch.randn(24, 4), "hada_w1_b": torch.randn(4, HIDDEN),
                  "hada_w2_a": torch.zeros(24, 4), "hada_w2_b": torch.randn(4, HIDDEN)}, {"alpha": 4}),
    ):  # fmt: skip
        named = {f"base_model.model.{Q.format(n)}.{part}": t.clone() for n in range(2) for part, t in tensors.items()}
        if kind == "VERA":
            named |= {"base_model.vera_A": torch.randn(4, HIDDEN), "base_model.vera_B": torch.randn(24, 4)}
        folder = tmp_path / kind
        folder.mkdir()
        save_file(named, folder / "adapter_model.safetensors")
        write_json(folder / "adapter_config.json", {"peft_type": kind, "r": 4, "target_modules": ["q_proj"], **config})
        report = loratool.inspect(folder, check=True)
        assert [f.what for f in found(report, "error")] == [
            "this adapter does nothing: the updates of all 2 modules are zero"
        ], kind
        moved = {n: t + (0.1 if "vera_" not in n or "lambda_b" in n else 0) for n, t in named.items()}
        save_file(moved, folder / "adapter_model.safetensors")
        assert not found(loratool.inspect(folder, check=True), "error"), kind


def test_dora_without_updates_may_still_do_something(check: Callable[..., Report]) -> None:
    tensors = {n: t * 0 if "lora_B" in n else t for n, t in deep().items()}
    for n in range(LAYERS):
        tensors[f"base_model.model.{Q.format(n)}.lora_magnitude_vector"] = torch.rand(24)
    report = check(tensors, use_dora=True)
    assert not found(report, "error")
    assert "8 of 8" in found(report, "warning")[0].what


def test_numbers_beyond_fp16_are_named(check: Callable[..., Report]) -> None:
    tensors = deep()
    tensors[B.format(Q.format(2))][0, 0] = -70_000
    report = check(tensors)
    assert "beyond fp16" in defects(report)[Q.format(2)]
    assert any("65,504" in f.what and f.where == Q.format(2) for f in found(report, "warning"))


def test_an_outlier_is_named_with_its_measure(check: Callable[..., Report]) -> None:
    tensors = deep()
    tensors[B.format(Q.format(5))] *= 1000
    report = check(tensors)
    (warning,) = found(report, "warning")
    assert warning.where == Q.format(5)
    assert "median of its 8 siblings" in warning.what
    assert defects(report) == {Q.format(5): ["outlier"]}


def test_norms_that_all_differ_have_no_outlier_and_few_siblings_no_median(tmp_path: Path) -> None:
    tensors = deep(12)
    for n in range(12):  # each three times the one before: no layer stands out
        tensors[B.format(Q.format(n))] *= 3.0**n
    write_adapter(tmp_path / "spread", tensors)
    assert not [f for f in loratool.inspect(tmp_path / "spread", check=True).findings if "median" in f.what]
    few = deep(4)
    few[B.format(Q.format(0))] *= 1000
    write_adapter(tmp_path / "few", few)
    assert not loratool.inspect(tmp_path / "few", check=True).findings


def test_copies_are_named_together(check: Callable[..., Report]) -> None:
    tensors = deep()
    for half in (A, B):
        tensors[half.format(Q.format(6))] = tensors[half.format(Q.format(1))].clone()
    report = check(tensors)
    (warning,) = found(report, "warning")
    assert warning.where == f"{Q.format(1)}, {Q.format(6)}"
    assert "byte for byte" in warning.what
    assert defects(report) == {Q.format(n): ["copy"] for n in (1, 6)}


def test_one_factor_in_common_is_a_remark_and_in_one_layer_none(check: Callable[..., Report], tmp_path: Path) -> None:
    k, v = "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"
    tensors = factors(shapes={k: (8, HIDDEN), v: (8, HIDDEN), Q.format(1): (24, HIDDEN)})
    tensors[A.format(v)] = tensors[A.format(k)].clone()  # as from a fused weight
    assert not check(tensors).findings
    tensors[A.format(Q.format(1))] = tensors[A.format(k)].clone()
    write_adapter(tmp_path / "other", tensors)
    report = loratool.inspect(tmp_path / "other", check=True)
    assert [f.level for f in report.findings] == ["info"]
    assert "one factor in common" in report.findings[0].what


def test_experts_of_one_stack_are_no_copies_and_each_is_checked(check: Callable[..., Report]) -> None:
    owner = "base_model.model.model.layers.0.mlp.experts"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{owner}.base_layer.lora_A.weight": torch.randn(4 * 2, 32, generator=generator),
        f"{owner}.base_layer.lora_B.weight": torch.randn(40, 2 * 4, generator=generator),
        f"{owner}.lora_A.weight": torch.randn(4 * 2, 20, generator=generator),
        f"{owner}.lora_B.weight": torch.randn(32, 2 * 4, generator=generator),
    }
    tensors[f"{owner}.lora_B.weight"][3, 2] = math.nan  # column 2: expert 2
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    settings = {"target_parameters": parameters, "r": 2, "peft_version": "0.21.2", "target_modules": []}
    report = check(tensors, **settings)
    assert [f.where for f in found(report, "error")] == [f.where for f in report.findings if "NaN" in f.what]
    (error,) = found(report, "error")
    assert ".2." in error.where
    assert "copy" not in str(defects(report))


def test_constants_and_garbage_are_named(check: Callable[..., Report]) -> None:
    tensors = deep()
    tensors[A.format(Q.format(0))].fill_(0.02)
    tensors[B.format(Q.format(1))] = torch.arange(24 * 4, dtype=torch.int32).view(24, 4).view(torch.float32).clone()
    told = defects(check(tensors))
    assert told[Q.format(0)] == ["constant"]
    assert "garbage" in told[Q.format(1)]
    assert set(told) == {Q.format(0), Q.format(1)}


def test_what_fp16_can_hardly_hold_is_named(check: Callable[..., Report]) -> None:
    tensors = {n: (t * (1e-5 if "layers.4" in n and "lora_B" in n else 1)).half() for n, t in deep().items()}
    told = defects(check(tensors))
    assert "lost in fp16" in told[Q.format(4)]
    assert set(told) == {Q.format(4)}


def test_a_tensor_outside_of_the_modules_is_read_too(check: Callable[..., Report]) -> None:
    tensors = deep()
    del tensors[A.format(Q.format(7))]  # half a pair
    tensors[B.format(Q.format(7))][0, 0] = math.nan
    report = check(tensors)
    assert {f.where for f in found(report, "error")} >= {B.format(Q.format(7))}


def shares(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What rank 0 of two has of each."""
    return {n: t[: len(t) // 2] for n, t in tensors.items()}


TORN = {
    "cut to 1/2 of their rows": shares,
    "empty": lambda tensors: {n: t[:0] for n, t in tensors.items()},
    "flattened to one dimension": lambda tensors: {n: t.flatten() for n, t in tensors.items()},
}


@pytest.mark.parametrize("sign", TORN)
def test_what_sharded_training_leaves_shows_in_the_header(tmp_path: Path, sign: str) -> None:
    write_adapter(tmp_path / "adapter", {n: t.contiguous() for n, t in TORN[sign](deep()).items()})
    for report in (loratool.inspect(tmp_path / "adapter"), loratool.inspect(tmp_path / "adapter", check=True)):
        (told,) = [f for f in report.findings if "gathering" in f.what]
        assert f"8 modules are {sign}" in told.what
        assert "zero_to_fp32" in told.hint
        assert len(found(report, "error")) == 8


def test_one_torn_module_among_good_ones_is_named(tmp_path: Path) -> None:
    tensors = deep()
    for half in (A, B):
        tensors[half.format(Q.format(2))] = torch.empty(0)
    write_adapter(tmp_path / "adapter", tensors)
    report = loratool.inspect(tmp_path / "adapter")
    assert [f.where for f in found(report, "error")] == [f"base_model.model.{Q.format(2)}"]
    assert any("tensors of 1 module are empty" in f.what for f in report.findings)


def test_an_update_of_a_fraction_of_its_siblings_shape_is_suspected(check: Callable[..., Report]) -> None:
    tensors = deep()
    tensors[B.format(Q.format(3))] = tensors[B.format(Q.format(3))][:6]
    report = check(tensors)
    (warning,) = found(report, "warning")
    assert warning.where == Q.format(3)
    assert "1/4 of the [24, 16] of its siblings" in warning.what


def test_layers_of_other_widths_are_not_suspected(tmp_path: Path) -> None:
    widths = {f"lora_unet_{b}": w for b, w in zip("abcdefgh", (32, 32, 64, 64, 128, 128, 64, 32), strict=True)}
    shapes = {Q.format(n): (w, HIDDEN) for n, w in enumerate(widths.values())}
    write_adapter(tmp_path / "adapter", factors(shapes=shapes))
    assert not loratool.inspect(tmp_path / "adapter", check=True).findings


@pytest.mark.parametrize("workers", [1, 3])
def test_large_tensors_are_read_in_tiles(tmp_path: Path, workers: int) -> None:
    head = torch.randn(70_000, HIDDEN)  # 4.5 MB
    head[-1, -1] = math.inf
    tensors = deep(2) | {"base_model.model.lm_head.weight": head}
    write_adapter(tmp_path / "adapter", tensors, modules_to_save=["lm_head"])
    resources = Resources(workers=workers, memory=1 << 20)
    report = loratool.inspect(tmp_path / "adapter", check=True, resources=resources)
    (error,) = found(report, "error")
    assert error.where == "lm_head"
    assert "1 infinite among its 1,120,000" in error.what


# -- a merged model and its base -------------------------------------------------------------------------------------


def changed(report: Report) -> set[str]:
    return {row["module"] for row in report.rows if row["changed"]}


@pytest.mark.parametrize("shards", [(0, 0), (2, 0), (0, 3), (3, 2)])
def test_a_model_equal_to_its_base_is_an_error_however_both_are_sharded(
    tmp_path: Path, shards: tuple[int, int]
) -> None:
    for name, count in zip(("model", "base"), shards, strict=True):
        _ = write_sharded(tmp_path / name, shards=count) if count else write_base(tmp_path / name)
    report = loratool.inspect(tmp_path / "model", check=True, base=tmp_path / "base")
    (error,) = found(report, "error")
    assert "equal to its base: the merge changed nothing (0 of 17 tensors differ)" in error.what
    assert report.totals["changed"] == 0
    assert {row["module"] for row in report.rows} == set(tensors_of_llama())
    assert not changed(report)


def test_a_merge_shows_which_tensors_it_changed(tmp_path: Path) -> None:
    base = write_sharded(tmp_path / "base")
    loratool.merge(base, [write_adapter(tmp_path / "adapter")], tmp_path / "merged")
    report = loratool.inspect(tmp_path / "merged", check=True, base=base)
    assert not found(report, "error")
    assert changed(report) == {
        f"{Q0}.weight", "model.layers.1.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight"
    }  # fmt: skip
    assert any("3 of 17 tensors differ" in f.what for f in report.findings)


def test_one_bit_in_the_last_number_is_a_difference(tmp_path: Path) -> None:
    tensors = tensors_of_llama()
    tensors["model.norm.weight"].view(torch.int32)[-1] ^= 1
    write_base(tmp_path / "model", tensors)
    report = loratool.inspect(tmp_path / "model", check=True, base=write_base(tmp_path / "base"))
    assert changed(report) == {"model.norm.weight"}


@pytest.mark.parametrize(("model", "base"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_the_base_in_another_dtype_is_still_the_base(tmp_path: Path, model: torch.dtype, base: torch.dtype) -> None:
    values = {n: t.to(torch.bfloat16) for n, t in tensors_of_llama().items()}
    write_base(tmp_path / "model", {n: t.to(model) for n, t in values.items()})
    write_base(tmp_path / "base", {n: t.to(base) for n, t in values.items()})
    report = loratool.inspect(tmp_path / "model", check=True, base=tmp_path / "base")
    assert len(found(report, "error")) == 1


def test_other_names_and_prefixes_of_the_same_tensors_are_paired(tmp_path: Path) -> None:
    bare = {n.removeprefix("model."): t for n, t in tensors_of_llama().items() if n != "lm_head.weight"}
    write_base(tmp_path / "model", bare, architectures=["LlamaModel"])
    report = loratool.inspect(tmp_path / "model", check=True, base=write_base(tmp_path / "base"))
    assert report.totals["tensors"] == 16
    assert not changed(report)
    assert [f.level for f in report.findings if "only in" in f.what] == ["info"]
    assert [f.level for f in report.findings if "0 of 16" in f.what] == ["warning"]  # the head may be what changed


def test_fused_and_split_weights_are_compared_where_they_lie(tmp_path: Path) -> None:
    split = {
        f"model.layers.0.mlp.experts.{e}.{part}.weight": torch.randn(*shape)
        for e in range(3)
        for part, shape in (("gate_proj", (20, 32)), ("up_proj", (20, 32)), ("down_proj", (32, 20)))
    }
    stacked = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.stack(
            [
                torch.cat([split[f"model.layers.0.mlp.experts.{e}.{p}_proj.weight"] for p in ("gate", "up")])
                for e in range(3)
            ]
        ),
        "model.layers.0.mlp.experts.down_proj": torch.stack(
            [split[f"model.layers.0.mlp.experts.{e}.down_proj.weight"] for e in range(3)]
        ),
    }
    common = {"model.embed_tokens.weight": torch.randn(40, 32), "model.layers.0.mlp.gate.weight": torch.randn(3, 32)}
    config = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
    write_base(tmp_path / "base", common | split, **config)
    write_base(tmp_path / "model", common | stacked, **config)
    report = loratool.inspect(tmp_path / "model", check=True, base=tmp_path / "base")
    assert len(found(report, "error")) == 1, report.findings
    assert report.totals["tensors"] == 2 + 9
    stacked["model.layers.0.mlp.experts.down_proj"][1] += 1
    save_file(common | stacked, tmp_path / "model" / "model.safetensors")
    report = loratool.inspect(tmp_path / "model", check=True, base=tmp_path / "base")
    assert len(changed(report)) == 1
    assert "experts.1.down_proj" in changed(report).pop()


def test_another_shape_is_a_change(tmp_path: Path) -> None:
    tensors = tensors_of_llama()
    tensors["lm_head.weight"] = torch.cat([tensors["lm_head.weight"], torch.zeros(2, HIDDEN)])
    write_base(tmp_path / "model", tensors)
    report = loratool.inspect(tmp_path / "model", check=True, base=write_base(tmp_path / "base"))
    assert changed(report) == {"lm_head.weight"}


def test_models_and_adapters_are_told_apart(tmp_path: Path) -> None:
    base, adapter = write_sharded(tmp_path / "base"), write_adapter(tmp_path / "adapter")
    for settings in ({}, {"check": True}, {"spectrum": True}):
        with pytest.raises(FormatError, match=r"a model \(llama, 17 tensors\)") as caught:
            loratool.inspect(base, **settings)
        assert f"arch show {base}" in caught.value.hint
        assert "--base" in caught.value.hint
    with pytest.raises(UsageError, match="this is an adapter"):
        loratool.inspect(adapter, check=True, base=base)
    with pytest.raises(InputError, match="this is an adapter, and a model is needed"):
        loratool.inspect(base, check=True, base=adapter)
    write_base(tmp_path / "other", {"x.weight": torch.ones(2, 2)})
    with pytest.raises(MismatchError, match="no tensor in common"):
        loratool.inspect(tmp_path / "other", check=True, base=base)


def test_a_strange_file_is_not_called_a_model(tmp_path: Path) -> None:
    save_file({"whatever": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match="no adapter in a format"):
        loratool.inspect(tmp_path / "x.safetensors")
    (tmp_path / "folder").mkdir()
    write_json(tmp_path / "folder" / "adapter_config.json", peft_config())
    (tmp_path / "folder" / "adapter_model.safetensors").write_bytes(json.dumps({}).encode())
    with pytest.raises(FormatError, match="adapter_model"):
        loratool.inspect(tmp_path / "folder", check=True)
