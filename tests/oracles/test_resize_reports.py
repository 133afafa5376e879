"""What resize reports is what a dense fp64 computation of the written files finds."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool

NAMES = [f"base_model.model.model.layers.{n}.self_attn.q_proj" for n in range(2)]


@pytest.fixture
def adapter(tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "adapter"
    folder.mkdir()
    tensors = {}
    for name in NAMES:
        tensors[f"{name}.lora_A.weight"] = torch.randn(8, 48) * torch.logspace(0, -2, 8)[:, None]
        tensors[f"{name}.lora_B.weight"] = torch.randn(64, 8)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 12}))
    return folder


def dense(folder, name: str) -> torch.Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    down, up = tensors[f"{name}.lora_A.weight"].double(), tensors[f"{name}.lora_B.weight"].double()
    path = name.removeprefix("base_model.model.")
    alpha = next(
        (v for k, v in config.get("alpha_pattern", {}).items() if path in k.replace("\\", "")), config["lora_alpha"]
    )
    return alpha / down.shape[0] * up @ down


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rule", [{"rank": 3}, {"rank": 8}, {"energy": 0.9}], ids=str)
def test_the_reported_error_is_that_of_the_written_factors(adapter, tmp_path, dtype, rule):
    report = loratool.resize(adapter, tmp_path / "out", dtype=dtype, **rule)
    squares = {"lost": 0.0, "all": 0.0}
    for name, row in zip(NAMES, report.rows, strict=True):
        before, after = dense(adapter, name), dense(tmp_path / "out", name)
        error = float((after - before).norm() / before.norm())
        assert row["error"] == pytest.approx(error, rel=1e-3, abs=3e-7)
        squares["lost"] += float((after - before).square().sum())
        squares["all"] += float(before.square().sum())
    assert report.totals["error"] == pytest.approx((squares["lost"] / squares["all"]) ** 0.5, rel=1e-3, abs=3e-7)


def test_auto_warns_of_what_a_flat_spectrum_loses(adapter, tmp_path):
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    for n, name in enumerate(NAMES):  # orthonormal factors: a bend that means nothing, at the first value
        sigma = torch.tensor([1.3, 1.001, 1.0, 0.999, 0.998, 0.997, 0.996, 0.995]) if n else torch.logspace(0, -4, 8)
        up, _ = torch.linalg.qr(tensors[f"{name}.lora_B.weight"])
        down, _ = torch.linalg.qr(tensors[f"{name}.lora_A.weight"].T)
        tensors |= {f"{name}.lora_A.weight": (down * sigma).T.contiguous(), f"{name}.lora_B.weight": up.contiguous()}
    save_file(tensors, weights)
    report = loratool.resize(adapter, tmp_path / "out", rank="auto")
    warning, whole = [f for f in report.findings if f.where == "--rank auto"]
    assert whole.level == "info"
    assert f"1 of 2 modules keep all of their rank, such as {report.rows[0]['module']}" in whole.what
    kept = dense(tmp_path / "out", NAMES[1])
    lost = 1 - float(kept.square().sum() / dense(adapter, NAMES[1]).square().sum())
    assert lost > 0.5
    assert warning.level == "warning"
    assert f"1 of 2 modules lose more than 10% of their energy, {report.rows[1]['module']} {lost:.0%}" in warning.what
    assert "--energy" in warning.hint
    assert not [f for f in loratool.resize(adapter, tmp_path / "e", energy=0.9).findings if "flat" in f.what]


def test_a_head_beside_layers_is_not_said_to_be_missing(tiny, adapter_folder, tmp_path):
    _, folder = adapter_folder(tiny("llama"), target_modules=["q_proj", "lm_head"], r=4)
    report = loratool.resize(folder, tmp_path / "out", rank=2)
    assert any(row["module"] == "lm_head" for row in report.rows)
    assert not report.findings
