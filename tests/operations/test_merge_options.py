"""Weights by adapter, pattern and layer range; dtypes of sums and outputs; what rounding lost; verification."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_files import DOWN1, K1, Q0, factors, run_main, tensors_of_llama, write_adapter, write_base

import loratool
from loratool.errors import InputError, LoratoolError, MismatchError, UsageError

SCALING = 2.0  # alpha 8 over rank 4


def update(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    a, b = (tensors[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
    return SCALING * b @ a


def merged(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_is(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    """Compare with `expected` updates in fp64, within one fp32 rounding of a sum; the rest is the base's."""
    for name, weight in tensors_of_llama().items():
        exact = weight.double() + expected.get(name.removesuffix(".weight"), 0)
        assert torch.allclose(merged(folder)[name].double(), exact, rtol=1e-6, atol=1e-7), name


def test_scales_multiply_the_weights_of_the_modules_that_a_pattern_selects(tmp_path: Path):
    base, adapter = write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter")
    scales = {"layers.{1-5}.**": 0.5, "down_proj": 3.0}
    loratool.merge(base, [adapter], tmp_path / "out", weights=[0.8], scales=scales)
    own = factors()
    assert_is(tmp_path / "out", {Q0: 0.8 * update(own, Q0), K1: 0.4 * update(own, K1), DOWN1: 1.2 * update(own, DOWN1)})


def test_a_weight_for_one_part_of_a_fused_layer_leaves_the_other_rows_alone(tmp_path: Path):
    name, generator = "double_blocks.0.img_attn.qkv", torch.Generator().manual_seed(1)
    base, adapter, stem = (
        tmp_path / "base.safetensors",
        tmp_path / "one.safetensors",
        f"lora_unet_{name.replace('.', '_')}",
    )
    down, up = torch.randn(4, 16, generator=generator), torch.randn(48, 4, generator=generator)
    save_file({f"{name}.weight": torch.zeros(48, 16)}, base)
    lora = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(4.0)}
    save_file(lora, adapter)
    loratool.merge(base, [adapter], tmp_path / "out.safetensors", scales={"to_k": 0.5}, arch="flux")
    expected = torch.cat([up[:16] @ down, 0.5 * up[16:32] @ down, up[32:] @ down])
    torch.testing.assert_close(load_file(tmp_path / "out.safetensors")[f"{name}.weight"], expected)


def test_an_adapter_config_gives_each_adapter_its_weight_and_modules(tmp_path: Path):
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "one")
    write_adapter(tmp_path / "two", factors(2))
    entries = [
        {"path": "one", "weight": 0.5, "exclude": ["k_proj"]},
        {"path": "two", "target": "k_proj", "scales": {"layers.1.**": -1}},
    ]
    (tmp_path / "uses.json").write_text(json.dumps({"adapters": entries}))
    arguments = ("merge", tmp_path / "base", "--adapter-config", tmp_path / "uses.json", "-o", tmp_path / "out", "-q")
    assert run_main(*arguments) == 0
    one, two = factors(), factors(2)
    expected = {Q0: 0.5 * update(one, Q0), DOWN1: 0.5 * update(one, DOWN1), K1: -update(two, K1)}
    assert_is(tmp_path / "out", expected)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([], "object"),
        ({"adapters": []}, "list"),
        ({"adapters": [{"weight": 1}]}, "without a path"),
        ({"adapters": [{"path": "one", "wieght": 1}]}, "wieght"),
        ({"adapters": [{"path": "one", "weight": "x"}]}, "no numbers"),
        ({"adapters": [{"path": "one", "target": [1]}]}, "patterns"),
        ({"adapters": [{"path": "one", "scales": {"nothing": 2}}]}, "nothing"),
    ],
)
def test_a_malformed_adapter_config_is_refused_by_name(tmp_path: Path, capsys: Any, content: object, says: str):
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "one")
    (tmp_path / "uses.json").write_text(json.dumps(content))
    arguments = ("merge", tmp_path / "base", "--adapter-config", tmp_path / "uses.json", "-o", tmp_path / "out")
    assert run_main(*arguments) in (2, 3)
    assert says in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_scale_that_selects_nothing_or_is_no_number_is_refused(tmp_path: Path):
    base, adapter = write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter")
    with pytest.raises(MismatchError, match="'v_proj'"):
        loratool.merge(base, [adapter], tmp_path / "out", scales={"v_proj": 2.0})
    with pytest.raises(UsageError, match="not all numbers"):
        loratool.merge(base, [adapter], tmp_path / "out", scales={"q_proj": float("nan")})
    assert run_main("merge", base, adapter, "-o", tmp_path / "out", "--scale", "q_proj") == 2


def test_the_order_of_adapters_does_not_change_a_byte_whatever_their_kinds(tmp_path: Path):
    base = write_base(tmp_path / "base")
    plain = write_adapter(tmp_path / "plain", factors(2))
    dora = factors(3)
    dora |= {f"base_model.model.{m}.lora_magnitude_vector": 1 + torch.rand(update(dora, m).shape[0]) for m in (Q0, K1)}
    dora |= {f"base_model.model.{DOWN1}.lora_magnitude_vector": 1 + torch.rand(update(dora, DOWN1).shape[0])}
    first = write_adapter(tmp_path / "dora", dora, use_dora=True)
    again = {n: t * 1.5 for n, t in dora.items()}
    second = write_adapter(tmp_path / "dora2", again, use_dora=True)
    outputs = []
    for n, order in enumerate(([0, 1, 2], [2, 1, 0], [1, 2, 0])):
        adapters, weights = [plain, first, second], [0.3, 0.7, -0.4]
        out = tmp_path / f"out{n}"
        loratool.merge(base, [adapters[i] for i in order], out, weights=[weights[i] for i in order])
        outputs.append((out / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1] == outputs[2]


def test_sums_in_float64_are_rounded_once(tmp_path: Path):
    """fp32 sums cannot see a delta below their own step; fp64 ones can, and the output rounds what they saw."""
    weight = torch.full((16, 16), 1.0)
    tensors = {**tensors_of_llama(), f"{Q0}.weight": weight}
    base = write_base(tmp_path / "base", tensors)
    small = {f"base_model.model.{Q0}.lora_{x}.weight": torch.full((16, 16), 2.0**-16) for x in "AB"}
    tiny = write_adapter(tmp_path / "tiny", small, r=16, lora_alpha=16)  # a delta of 2^-28, far below 2^-24
    factors_of_ones = {"A": torch.full((16, 16), -1.0), "B": torch.eye(16)}
    ones = {f"base_model.model.{Q0}.lora_{x}.weight": t for x, t in factors_of_ones.items()}
    opposite = write_adapter(tmp_path / "opposite", ones, r=16, lora_alpha=16)
    loratool.merge(base, [tiny, opposite], tmp_path / "out", compute_dtype="float64")
    assert torch.equal(merged(tmp_path / "out")[f"{Q0}.weight"], torch.full((16, 16), 2.0**-28))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_report_says_how_much_of_the_update_the_rounding_lost(tmp_path: Path, dtype: str):
    narrow = getattr(torch, dtype)
    tensors = tensors_of_llama(dtype=narrow)
    base = write_base(tmp_path / "base", tensors, torch_dtype=dtype)
    small = {n: t * 0.02 for n, t in factors().items()}
    report = loratool.merge(base, [write_adapter(tmp_path / "adapter", small)], tmp_path / "out")
    lost = moved = 0.0
    for module in (Q0, K1, DOWN1):
        weight, delta = tensors[f"{module}.weight"].double(), update(small, module)
        after = merged(tmp_path / "out")[f"{module}.weight"].double()
        error = float((after - weight - delta).norm() / delta.norm())
        row = next(r for r in report.rows if r["module"] == module)
        assert row["rounding"] == pytest.approx(error, rel=1e-3)
        lost, moved = lost + float((after - weight - delta).square().sum()), moved + float(delta.square().sum())
    assert report.totals["rounding"] == pytest.approx((lost / moved) ** 0.5, rel=1e-3)
    assert report.totals["rounding"] > 0.1  # and so it is said aloud
    assert any(f.level == "warning" and "lost" in f.what for f in report.findings)


def test_nothing_is_lost_where_nothing_is_rounded(tmp_path: Path):
    report = loratool.merge(write_base(tmp_path / "base"), [write_adapter(tmp_path / "adapter")], tmp_path / "out")
    assert report.totals["rounding"] == 0
    assert not [f for f in report.findings if f.where == "rounding"]


def test_an_overflow_is_refused_and_nothing_is_written(tmp_path: Path):
    base = write_base(tmp_path / "base")
    huge = {n: t * 1000 for n, t in factors().items()}
    with pytest.raises(InputError, match="overflow float16"):
        loratool.merge(base, [write_adapter(tmp_path / "adapter", huge)], tmp_path / "out", dtype="float16")
    assert {p.name for p in tmp_path.iterdir()} == {"base", "adapter"}


def test_verify_counts_what_it_looked_at_and_finds_a_damaged_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base, adapter = write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter")
    report = loratool.merge(base, [adapter], tmp_path / "out", verify=True)
    assert report.totals["verified_tensors"] == len(tensors_of_llama())
    assert 0 < report.totals["worst_rounding"] <= 1

    from loratool import engine

    publish = engine.execute

    def damaging(plan: Any, out: Path, *args: Any, **kwargs: Any) -> Any:
        done = publish(plan, out, *args, **kwargs)
        tensors = load_file(out / "model.safetensors")
        tensors[damaged] = tensors[damaged].clone()
        tensors[damaged].view(-1)[-1] += 0.01  # the last row is always looked at
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        return done

    monkeypatch.setattr(engine, "execute", damaging)
    for n, damaged in enumerate((f"{DOWN1}.weight", "model.norm.weight")):
        with pytest.raises(LoratoolError, match=damaged):
            loratool.merge(base, [adapter], tmp_path / f"damaged{n}", verify=True)


def test_an_adapter_config_without_a_base_asks_for_one(capsys: Any):
    assert run_main("merge", "--adapter-config", "uses.json", "-o", "out") == 2
    told = capsys.readouterr().err
    assert "which base model" in told
    assert "try: loratool merge BASE --adapter-config uses.json -o out" in told
    assert run_main("merge", "-o", "out") == 2
    assert "try: loratool merge BASE ADAPTER -o out" in capsys.readouterr().err


def test_a_quiet_verification_shows_no_bars_of_other_libraries(
    tmp_path: Path, saved: Any, adapter_folder: Any, capfd: Any
):
    from transformers.utils import logging

    model, base = saved("llama")
    _, adapter = adapter_folder(model, r=4, target_modules=["q_proj"])
    logging.enable_progress_bar()
    capfd.readouterr()
    assert run_main("merge", base, adapter, "-o", tmp_path / "out", "--verify", "-q") == 0
    heard = capfd.readouterr()
    assert "%|" not in heard.out + heard.err  # as tqdm draws them
    assert logging.is_progress_bar_enabled()


@pytest.mark.parametrize("chosen", ["qwen", "gpt2"])
def test_an_adapter_of_another_family_is_told_its_families(
    chosen: str, tmp_path: Path, saved: Any, adapter_folder: Any
):
    _, base = saved("llama")
    model, _ = saved("gpt2", n_embd=48)
    _, adapter = adapter_folder(model, r=4, target_modules=["c_attn"])
    with pytest.raises(MismatchError) as refusal:
        loratool.merge(base, [adapter], tmp_path / "out")
    assert "--arch" not in refusal.value.hint  # qwen knows all names of both, but not these sizes
    assert chosen in refusal.value.hint
    report = loratool.convert(adapter, tmp_path / "copy", to="peft")
    assert chosen in report.totals["families"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_verify_compares_logits_with_peft(kind: str, tmp_path: Path, saved: Any, adapter_folder: Any):
    model, base = saved(kind)
    modules = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"]}[kind]
    _, adapter = adapter_folder(model, r=4, target_modules=modules)
    report = loratool.merge(base, [adapter], tmp_path / "out", verify=True)
    assert report.totals["logits_difference"] < 1e-4
    report = loratool.merge(base, [adapter], tmp_path / "half", weights=[0.5], verify=True)
    assert any("not compared" in f.what for f in report.findings)
