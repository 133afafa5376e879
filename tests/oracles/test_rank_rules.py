"""Rank rules in resize: what each means by hand, what they refuse, budgets, curves, through Python and command line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_files import run_main

import loratool
from loratool.errors import InputError, MismatchError, UsageError

SIGMA = [8.0, 4.0, 2.0, 1.0, 0.5, 0.25]
NAMES = [f"model.layers.{n}.self_attn.{p}" for n in range(2) for p in ("q_proj", "v_proj")]


def orthonormal(rows, columns, seed):
    return torch.linalg.qr(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).double())[
        0
    ].contiguous()


@pytest.fixture
def adapter(tmp_path):
    """Modules with the spectrum SIGMA, that of the second layer a hundredth of it; alpha / r is 2."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    tensors = {}
    for n, name in enumerate(NAMES):
        sigma = torch.tensor(SIGMA, dtype=torch.float64) / (100 if ".1." in name else 1)
        tensors[f"base_model.model.{name}.lora_A.weight"] = (
            (sigma[:, None] * orthonormal(48, 6, n).T / 2).float().contiguous()
        )
        tensors[f"base_model.model.{name}.lora_B.weight"] = orthonormal(64, 6, n + 50).float()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 6, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


# squares: 64 16 4 1 .25 .0625, sum 85.3125; sums: 8 12 14 15 15.5 15.75
BY_HAND = [
    ({"rank": 4}, 4),
    ({"energy": 0.75}, 1),  # 64 / 85.31 = 0.7502
    ({"energy": 0.76}, 2),
    ({"energy": 0.99}, 4),  # 84 / 85.31 = 0.9846
    ({"error": 0.5}, 1),  # sqrt(21.31 / 85.31) = 0.4998
    ({"error": 0.1}, 4),  # sqrt(.3125 / 85.31) = 0.0605; of three 0.124
    ({"cumulative": 0.75}, 2),  # 12 / 15.75 = 0.762
    ({"ratio": 4.01}, 3),
    ({"ratio": 3.9}, 2),
    ({"sv_ratio": 3.99}, 3),  # above 8 / 4 there are two, and one more
    ({"sv_ratio": 1}, 2),  # never below two
    ({"sv_fro": 0.97}, 4),  # sqrt(80 / 85.31) = 0.968, sqrt(84 / 85.31) = 0.992: three, and one more
    ({"sv_cumulative": 0.75}, 3),  # two keep it, and one more
    ({"energy": 1.0, "max_rank": 2}, 2),
    ({"rank": 5, "ratio": 4.01, "energy": 0.99}, 3),
    ({"rank": 1, "rank_for": {"q_proj": 5}}, {"q_proj": 5, "v_proj": 1}),
    ({"rank": 1, "rank_for": {"q_proj": 5}, "max_rank": 3}, {"q_proj": 3, "v_proj": 1}),
    ({"energy": 0.5, "rank_for": {"self_attn.*": 3, "layers.1.**": 2}}, {"layers.0": 3, "layers.1": 2}),
]


@pytest.mark.parametrize(("rule", "rank"), BY_HAND, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_rules_mean_what_they_say(adapter, tmp_path, rule, rank):
    report = loratool.resize(adapter, tmp_path / "out", **rule)
    for row in report.rows:
        wanted = rank if isinstance(rank, int) else next(r for p, r in rank.items() if p in row["module"])
        assert row["rank"] == wanted, row["module"]
        kept = sum(s * s for s in SIGMA[:wanted]) / sum(s * s for s in SIGMA)
        assert row["retained"] == pytest.approx(kept, abs=1e-6)
        assert row["bytes"] == wanted * (48 + 64) * 4
        assert row["sigma"] == pytest.approx([s / (100 if ".1." in row["module"] else 1) for s in SIGMA], rel=1e-5)


def test_kohya_rules_look_at_the_factors_without_alpha(tmp_path):
    tensors = {
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": 1e-4
        * orthonormal(32, 2, 0).T.contiguous().float(),
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": 1e-3 * orthonormal(32, 2, 1).float(),
        "lora_unet_down_blocks_0_attentions_0_proj_in.alpha": torch.tensor(2e6),
    }
    save_file(tensors, tmp_path / "a.safetensors")  # sigma is 1e-7: "a zero matrix" to sd-scripts
    report = loratool.resize(tmp_path / "a.safetensors", tmp_path / "o.safetensors", sv_ratio=2.0)
    assert report.rows[0]["rank"] == 1


def test_auto_takes_what_stands_before_the_bend(tmp_path, adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, value in tensors.items():
        if "lora_A" in name:
            value[3:] *= 1e-4
    save_file(tensors, adapter / "adapter_model.safetensors")
    report = loratool.resize(adapter, tmp_path / "out", rank="auto")
    assert [row["rank"] for row in report.rows] == [3, 3, 3, 3]


NONSENSE = [
    {},
    {"rank": 0},
    {"rank": "some"},
    {"energy": 0.0},
    {"energy": 2.0},
    {"energy": float("nan")},
    {"error": 0.0},
    {"error": 1.5},
    {"ratio": 0.5},
    {"cumulative": -1.0},
    {"sv_ratio": 0.0},
    {"sv_fro": 1.1},
    {"sv_cumulative": 0.0},
    {"max_rank": 0},
    {"rank_for": {"q_proj": 0}},
    {"budget": 0},
    {"rank": 2, "pad_rank": 0},
    {"rank": 2, "pad_rank": "wide"},
    {"rank": 6, "pad_rank": 4},
    {"budget": 20_000, "pad_rank": 8},
]


@pytest.mark.parametrize("rule", NONSENSE, ids=str)
def test_nonsense_is_refused_with_a_hint_and_nothing_is_written(adapter, tmp_path, rule):
    with pytest.raises(UsageError) as refusal:
        loratool.resize(adapter, tmp_path / "out", **rule)
    assert refusal.value.hint
    assert not (tmp_path / "out").exists()
    if "pad_rank" not in rule:
        with pytest.raises(UsageError):
            loratool.extract(tmp_path, tmp_path, tmp_path / "out", **rule)


def test_a_pattern_that_selects_nothing_is_refused(adapter, tmp_path):
    with pytest.raises(MismatchError, match="rank-for"):
        loratool.resize(adapter, tmp_path / "out", rank=2, rank_for={"k_proj": 4})


@pytest.mark.parametrize("file", ["out", "out.safetensors"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("budget", [6_000, 8_000, 12_345, 100_000])
def test_a_budget_is_never_exceeded_and_used_up_to_one_rank(adapter, tmp_path, file, dtype, budget):
    report = loratool.resize(adapter, tmp_path / file, budget=budget, dtype=dtype)
    out = tmp_path / file
    files = [f for f in out.iterdir() if f.name != "loratool.report.json"] if out.is_dir() else [out]
    size = sum(f.stat().st_size for f in files)
    assert size == report.totals["file_bytes"] <= budget
    one_rank = (48 + 64) * (4 if dtype == "float32" else 2)
    assert budget - size < one_rank + 256 or {row["rank"] for row in report.rows} == {6}
    ranks = {row["module"]: row["rank"] for row in report.rows}
    assert all(ranks[n] >= ranks[n.replace(".0.", ".1.")] for n in ranks)  # where more is to be gained


def test_a_budget_below_one_rank_a_module_is_refused_with_the_smallest(adapter, tmp_path):
    with pytest.raises(InputError, match="less than one rank") as refusal:
        loratool.resize(adapter, tmp_path / "out", budget=3_000)
    assert not (tmp_path / "out").exists()
    smallest = int("".join(c for c in refusal.value.hint.partition(" bytes")[0] if c.isdecimal()))
    report = loratool.resize(adapter, tmp_path / "out", budget=smallest)
    assert [row["rank"] for row in report.rows] == [1, 1, 1, 1]


def test_the_ranks_of_a_budget_are_the_best_of_all(adapter, tmp_path):
    report = loratool.resize(adapter, tmp_path / "out", budget=8_000)
    used = sum(row["rank"] for row in report.rows)
    squares = sorted((s * s / (1e4 if low else 1) for s in SIGMA[1:] for low in (0, 0, 1, 1)), reverse=True)
    total = 2 * sum(s * s for s in SIGMA) * (1 + 1e-4)
    kept = 2 * SIGMA[0] ** 2 * (1 + 1e-4) + sum(squares[: used - 4])
    assert report.totals["retained"] == pytest.approx(kept / total, abs=1e-7)


def test_the_curve_is_the_same_from_resize_and_inspect_and_true(adapter, tmp_path):
    report = loratool.resize(adapter, tmp_path / "out", rank=2, curve=True)
    points = loratool.inspect(adapter, curve=True).totals["curve"]
    assert report.totals["curve"] == points
    assert [p["bytes"] for p in points] == [n * 112 * 4 for n in range(4, 25)]
    for point in points[::5]:
        overhead = 4_000
        done = loratool.resize(adapter, tmp_path / f"at {point['bytes']}", budget=point["bytes"] + overhead)
        assert done.totals["error"] <= point["error"] + 1e-6


def test_the_command_line_has_every_rule(adapter, tmp_path, capfd):
    def run(*options, code=0):
        out = tmp_path / "-".join(map(str, options)).replace("/", "")
        assert run_main("resize", adapter, "-o", out, "--json", *options) == code
        text = capfd.readouterr().out
        return [row["rank"] for row in json.loads(text)["rows"]] if not code else []

    assert run("--rank", "auto") == [6, 6, 6, 6]
    assert run("--energy", 0.76, "--max-rank", 4) == [2, 2, 2, 2]
    assert run("--error", 0.5, "--rank-for", "q_proj=3") == [3, 1, 3, 1]
    assert run("--sv-ratio", 4, "--ratio", 100) == [3, 3, 3, 3]
    assert run("--sv-fro", 0.97, "--sv-cumulative", 0.75) == [3, 3, 3, 3]
    assert run("--cumulative", 0.75, "--pad-rank", "engine") == [2, 2, 2, 2]
    assert max(run("--budget", "6KB")) > 1
    for options in (["--energy", 0], ["--energy", 2], ["--rank", 0], ["--rank", "x"], ["--rank-for", "q"], []):
        run(*options, code=2)
    run("--budget", "100B", code=3)


def test_tables_have_a_sparkline_and_the_curve_a_few_lines(adapter, tmp_path, capfd):
    assert run_main("resize", adapter, "-o", tmp_path / "out", "--rank", 3, "--curve") == 0
    text = capfd.readouterr().out
    assert "█▅▃▂▁▁" in text
    assert "error by size" in text
    assert len(text.splitlines()) < 45
