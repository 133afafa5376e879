"""--relative-to: updates measured against the weights of a base, against fp64 references of a few lines."""

import itertools
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_files import run_cli

import loratool
from loratool.errors import InputError, LoratoolError, MismatchError, UsageError

NAMES = [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"]
SCALES = (1.0, 8.0, 0.3)  # of the base's weights: an update of one size is much for one and little for another


@pytest.fixture
def pair(tmp_path):
    """A base whose weights differ in size, and an adapter of rank 6 for it."""
    generator = torch.Generator().manual_seed(4)
    base, factors = tmp_path / "base", {}
    base.mkdir()
    weights = {f"{n}.weight": s * torch.randn(24, 16, generator=generator) for n, s in zip(NAMES, SCALES, strict=True)}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 1}))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for n, name in enumerate(NAMES):
        decay = torch.logspace(0, -2 - n / 2, 6)
        factors[f"base_model.model.{name}.lora_A.weight"] = decay[:, None] * torch.randn(6, 16, generator=generator)
        factors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(24, 6, generator=generator)
    save_file(factors, adapter / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 6, "lora_alpha": 12, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return base, adapter


def reference(base, adapter):
    """By module: the singular values of the update, and the norm of the weight, both in fp64."""
    weights, factors = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    found = {}
    for name in NAMES:
        up, down = (factors[f"base_model.model.{name}.lora_{f}.weight"].double() for f in "BA")
        norm = float(weights[f"{name}.weight"].double().norm())
        found[name] = torch.linalg.svdvals(2 * up @ down)[:6].tolist(), norm
    return found


def ranks(report):
    return {row["module"]: row["rank"] for row in report.rows}


def lost(sigma, rank):
    return math.sqrt(sum(s * s for s in sigma[rank:]))


@pytest.mark.parametrize("limit", [0.02, 0.1, 0.4])
def test_an_error_is_relative_to_the_weight(limit, pair, tmp_path):
    base, adapter = pair
    report = loratool.resize(adapter, tmp_path / "out", error=limit, relative_to=base)
    for name, (sigma, norm) in reference(base, adapter).items():
        wanted = next(k for k in range(1, 7) if lost(sigma, k) <= limit * norm or k == 6)
        assert ranks(report)[name] == wanted
        row = next(r for r in report.rows if r["module"] == name)
        assert row["error_of_base"] == pytest.approx(lost(sigma, wanted) / norm, abs=1e-6)
        assert row["error"] == pytest.approx(lost(sigma, wanted) / lost(sigma, 0), abs=1e-6)


@pytest.mark.parametrize("threshold", [-1.2, -0.5, 0.2])
def test_a_ratio_is_the_threshold_of_the_published_recipe(threshold, pair, tmp_path):
    base, adapter = pair
    ratio = 10**-threshold
    if ratio < 1:
        with pytest.raises(UsageError):
            loratool.resize(adapter, tmp_path / "out", ratio=ratio, relative_to=base)
        return
    report = loratool.resize(adapter, tmp_path / "out", ratio=ratio, relative_to=base)
    for name, (sigma, norm) in reference(base, adapter).items():  # fro_ckpt=1: log10 sigma - log10 |W| >= thr
        scores = [math.log10(s) - math.log10(norm) for s in sigma]
        assert ranks(report)[name] == max(1, sum(score >= threshold for score in scores))


def test_a_budget_makes_the_error_least_that_is_relative_to_the_weights(pair, tmp_path):
    base, adapter = pair
    plain = loratool.resize(adapter, tmp_path / "plain", budget=3300)
    report = loratool.resize(adapter, tmp_path / "out", budget=3300, relative_to=base)
    assert ranks(report) != ranks(plain)
    assert report.totals["file_bytes"] <= 3300
    known = reference(base, adapter)

    def weighted(chosen):
        return sum((lost(sigma, k) / norm) ** 2 for k, (sigma, norm) in zip(chosen, known.values(), strict=True))

    got = [ranks(report)[name] for name in NAMES]
    best = min(weighted(c) for c in itertools.product(range(1, 7), repeat=3) if sum(c) <= sum(got))
    assert weighted(got) == pytest.approx(best, rel=1e-6)
    assert report.totals["weighted_error"] == pytest.approx(math.sqrt(weighted(got) / weighted([0, 0, 0])), rel=1e-5)


def test_the_curve_is_of_the_weighted_error(pair, tmp_path):
    base, adapter = pair
    report = loratool.resize(adapter, tmp_path / "out", rank=6, curve=True, relative_to=base)
    known = reference(base, adapter).values()
    whole = sum((lost(sigma, 0) / norm) ** 2 for sigma, norm in known)
    first = sum((lost(sigma, 1) / norm) ** 2 for sigma, norm in known)
    assert report.totals["curve"][0]["error"] == pytest.approx(math.sqrt(first / whole), rel=1e-4)


@pytest.mark.parametrize("rule", [{"rank": 2}, {"energy": 0.9}, {"cumulative": 0.9}, {"sv_ratio": 5.0}], ids=str)
def test_where_a_base_changes_nothing_that_is_said(rule, pair, tmp_path):
    base, adapter = pair
    with pytest.raises(UsageError, match="changes none"):
        loratool.resize(adapter, tmp_path / "out", relative_to=base, **rule)
    both = loratool.resize(adapter, tmp_path / "both", relative_to=base, error=0.001, **rule)
    alone = loratool.resize(adapter, tmp_path / "alone", **rule)
    assert all(ranks(both)[name] <= ranks(alone)[name] for name in NAMES)


def test_extract_measures_against_the_base_too(pair, tmp_path):
    base, adapter = pair
    loratool.merge(base, [adapter], tmp_path / "tuned")
    for rule in ({"error": 0.1}, {"ratio": 5.0}, {"budget": 3600}):
        report = loratool.extract(tmp_path / "tuned", base, tmp_path / f"e{rule}", relative_to=base, **rule)
        resized = loratool.resize(adapter, tmp_path / f"r{rule}", relative_to=base, **rule)
        assert ranks(report) == ranks(resized)
        assert report.totals["weighted_error"] == pytest.approx(resized.totals["weighted_error"], rel=1e-3, abs=1e-5)


def test_a_base_that_does_not_fit_is_refused_by_name(pair, tmp_path):
    base, adapter = pair
    weights = load_file(base / "model.safetensors")
    first, second, third = (f"{name}.weight" for name in NAMES)
    cases = (
        ({second: weights[second], third: weights[third]}, MismatchError, NAMES[0]),
        ({**weights, first: weights[first][:8].clone()}, MismatchError, "elements"),
        ({**weights, first: weights[first] * 0}, InputError, "zero"),
        ({**weights, first: weights[first] * float("nan")}, InputError, "not finite"),
    )
    for tensors, error, told in cases:
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
        with pytest.raises(error, match=told):
            loratool.resize(adapter, tmp_path / "out", error=0.1, relative_to=base)
        assert not (tmp_path / "out").exists()


def test_the_output_may_not_be_the_base(pair):
    base, adapter = pair
    with pytest.raises(LoratoolError):
        loratool.resize(adapter, base, error=0.1, relative_to=base, force=True)
    assert (base / "config.json").exists()


def test_the_command_line_takes_it(pair, tmp_path):
    base, adapter = pair
    outcome = run_cli("resize", adapter, "-o", tmp_path / "out", "--budget", "4KB", "--relative-to", base, "--json")
    assert outcome.returncode == 0, outcome.stderr
    assert "weighted_error" in json.loads(outcome.stdout)["totals"]
