"""combine: exact sums in fp64, whatever the ranks, formats and modules; what is carried beside factors; refusals."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_files import DOWN1, HIDDEN, K1, Q0, SHAPES, factors, run_main, snapshot, write_adapter, write_json

import loratool
from loratool.errors import InputError, LoratoolError, MismatchError, UsageError

V0 = "model.layers.0.self_attn.v_proj"


def updates(folder: Path, scaling: Any = None) -> dict[str, torch.Tensor]:
    """{module: scaling * B @ A} in fp64, by the rules of PEFT's config: a fp64 reference of a few lines."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name in (n for n in tensors if n.endswith("lora_A.weight")):
        module = name.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
        A, B = tensors[name].double(), tensors[name.replace("lora_A", "lora_B")].double()
        escaped = "^" + module.replace(".", "\\.")
        alpha = config.get("alpha_pattern", {}).get(escaped, config["lora_alpha"])
        rank = A.shape[0]
        assert config.get("rank_pattern", {}).get(escaped, config["r"]) == rank
        found[module] = alpha / (rank**0.5 if config.get("use_rslora") else rank) * B @ A
    return found


def weighted_sum(folders: list[Path], weights: list[float]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for module, delta in updates(folder).items():
            total[module] = total.get(module, torch.zeros_like(delta)) + weight * delta
    return total


def best(delta: torch.Tensor, rank: int) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def assert_equal(folder: Path, wanted: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    got = updates(folder)
    assert got.keys() == wanted.keys()
    for module, delta in wanted.items():
        assert float((got[module] - delta).norm()) <= tolerance * float(delta.norm()), module


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Adapters of different ranks, scalings and modules; one rsLoRA, one with patterns."""
    escaped = "^" + K1.replace(".", "\\.")
    mixed = {**factors(2, 6, {Q0: SHAPES[Q0], V0: (8, HIDDEN)}), **factors(3, 3, {K1: SHAPES[K1]})}
    return [
        write_adapter(tmp_path / "one", factors(1)),
        write_adapter(tmp_path / "two", mixed, r=6, rank_pattern={escaped: 3}, alpha_pattern={escaped: 5}),
        write_adapter(tmp_path / "three", factors(4, 5, {DOWN1: SHAPES[DOWN1]}), r=5, use_rslora=True),
    ]


WEIGHTS = [0.7, -0.4, 1.3]


def test_cat_is_the_weighted_sum(three: list[Path], tmp_path: Path) -> None:
    report = loratool.combine(three, tmp_path / "out", weights=WEIGHTS)
    assert_equal(tmp_path / "out", weighted_sum(three, WEIGHTS))
    assert report.totals["modules"] == 4
    assert report.totals["common"] == 3
    assert {row["module"]: row["ranks"] for row in report.rows}[Q0] == [4, 6]
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["use_rslora"] is False
    assert config["lora_alpha"] == config["r"]


@pytest.mark.parametrize("method", ["svd", "linear"])
def test_a_smaller_rank_is_the_best_of_the_weighted_sum(three: list[Path], tmp_path: Path, method: str) -> None:
    loratool.combine(three, tmp_path / "out", weights=WEIGHTS, method=method)
    ranks = {Q0: 6, K1: 4, V0: 6, DOWN1: 5}  # the largest that an adapter has there
    wanted = {m: best(delta, ranks[m]) for m, delta in weighted_sum(three, WEIGHTS).items()}
    assert_equal(tmp_path / "out", wanted)


def test_rank_rules_are_those_of_resize(three: list[Path], tmp_path: Path) -> None:
    report = loratool.combine(three, tmp_path / "out", weights=WEIGHTS, energy=0.9, max_rank=5)
    total = weighted_sum(three, WEIGHTS)
    for row in report.rows:
        squares = torch.linalg.svdvals(total[row["module"]]).square()
        kept = squares.cumsum(0) / squares.sum()
        assert row["rank"] == min(5, int((kept < 0.9).sum()) + 1)
        assert row["retained"] == pytest.approx(float(kept[row["rank"] - 1]), abs=1e-6)
    budget = sum(p.stat().st_size for p in (tmp_path / "out").glob("adapter_*")) - 500
    loratool.combine(three, tmp_path / "small", weights=WEIGHTS, budget=budget)
    assert sum(p.stat().st_size for p in (tmp_path / "small").glob("adapter_*")) <= budget


def test_a_sum_of_one_subspace_needs_no_more_rank(tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "one", factors(1))
    tensors = factors(1)
    generator = torch.Generator().manual_seed(5)
    for name in (n for n in tensors if "lora_B" in n):
        tensors[name] = torch.randn(tensors[name].shape, generator=generator)
    two = write_adapter(tmp_path / "two", tensors)  # other outputs, of the same inputs
    report = loratool.combine([one, two], tmp_path / "out")
    assert {row["rank"] for row in report.rows} == {4}
    assert_equal(tmp_path / "out", weighted_sum([one, two], [1, 1]))


@pytest.mark.parametrize("method", ["cat", "svd", "linear", "average", "ema"])
def test_one_adapter_with_weight_1_comes_out_as_it_is(tmp_path: Path, method: str) -> None:
    one = write_adapter(tmp_path / "one", factors(1), use_rslora=True, task_type="CAUSAL_LM")
    loratool.combine([one], tmp_path / "out", method=method)
    before, after = (load_file(f / "adapter_model.safetensors") for f in (one, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(before[n].numpy().tobytes() == after[n].numpy().tobytes() for n in before)
    config = json.loads((one / "adapter_config.json").read_text())
    assert config.items() <= json.loads((tmp_path / "out/adapter_config.json").read_text()).items()


@pytest.mark.parametrize("method", ["cat", "svd", "average", "knots", "ties_svd", "dare_linear_svd", "dare_ties_svd"])
def test_the_order_of_the_adapters_changes_no_bit(three: list[Path], tmp_path: Path, method: str) -> None:
    weights = [0.7, 0.4, 1.3]
    results = set()
    for n, order in enumerate(itertools.permutations(range(3))):
        out = tmp_path / f"out-{n}"
        loratool.combine([three[i] for i in order], out, weights=[weights[i] for i in order], method=method, rank=4)
        results.add((out / "adapter_model.safetensors").read_bytes() + (out / "adapter_config.json").read_bytes())
    assert len(results) == 1


def test_ranks_above_the_size_of_the_weight(tmp_path: Path) -> None:
    folders = [write_adapter(tmp_path / str(s), factors(s, 7, {K1: (8, HIDDEN)}), r=7) for s in (1, 2)]
    report = loratool.combine(folders, tmp_path / "out", weights=[1, 0.5])
    assert report.rows[0]["rank"] == 8
    assert_equal(tmp_path / "out", weighted_sum(folders, [1, 0.5]))


def test_half_precision_is_rounded_once_and_its_error_is_told(tmp_path: Path) -> None:
    halves = [{n: t.bfloat16() for n, t in factors(s).items()} for s in (1, 2)]
    folders = [write_adapter(tmp_path / f"h{n}", tensors, lora_alpha=4) for n, tensors in enumerate(halves)]
    report = loratool.combine(folders, tmp_path / "exact", weights=[0.5, -2])  # powers of two
    assert report.totals["error"] < 1e-12
    assert_equal(tmp_path / "exact", weighted_sum(folders, [0.5, -2]), 1e-12)
    report = loratool.combine(folders, tmp_path / "rounded", weights=[0.7, 0.4])
    got, wanted = updates(tmp_path / "rounded"), weighted_sum(folders, [0.7, 0.4])
    error = sum(float((got[m] - wanted[m]).square().sum()) for m in wanted) ** 0.5
    assert report.totals["error"] == pytest.approx(
        error / sum(float(w.square().sum()) for w in wanted.values()) ** 0.5, rel=1e-3
    )
    mixed = write_adapter(tmp_path / "f32", factors(3))
    loratool.combine([folders[0], mixed], tmp_path / "mixed")
    assert_equal(tmp_path / "mixed", weighted_sum([folders[0], mixed], [1, 1]))


def test_weights_by_pattern_and_normalised(three: list[Path], tmp_path: Path) -> None:
    scales = {"layers.{0-0}.**": 0.5}
    loratool.combine(three[:2], tmp_path / "out", weights=[3, 1], scales=scales, normalize=True)
    wanted = weighted_sum(three[:2], [0.75, 0.25])
    for module in (Q0, V0):
        wanted[module] *= 0.5
    assert_equal(tmp_path / "out", wanted)
    content = {"adapters": [{"path": "one", "weight": 2, "scales": {"q_proj": 0.25}}, {"path": "two"}]}
    file = write_json(tmp_path / "adapters.json", content)
    assert run_main("combine", "--adapter-config", file, "-o", tmp_path / "by-file", "-q") == 0
    wanted = weighted_sum(three[:2], [2, 1])
    wanted[Q0] = 0.5 * updates(three[0])[Q0] + updates(three[1])[Q0]
    assert_equal(tmp_path / "by-file", wanted)


def test_a_module_of_weight_zero_is_left_out_and_said(three: list[Path], tmp_path: Path) -> None:
    report = loratool.combine(three[:2], tmp_path / "out", scales={"k_proj": 0})
    wanted = weighted_sum(three[:2], [1, 1])
    del wanted[K1]
    assert_equal(tmp_path / "out", wanted)
    assert any("weight 0" in f.what for f in report.findings)


def test_a_pattern_for_all_has_to_match_in_one_adapter(three: list[Path], tmp_path: Path) -> None:
    loratool.combine(three[:2], tmp_path / "out", scales={"v_proj": 0.5}, exclude=["down_proj"])  # each is in one alone
    wanted = weighted_sum(three[:2], [1, 1])
    wanted[V0] *= 0.5
    del wanted[DOWN1]
    assert_equal(tmp_path / "out", wanted)


# ---- methods against dense references in fp64


def test_slerp_keeps_to_the_arc(tmp_path: Path) -> None:
    folders = [write_adapter(tmp_path / str(s), factors(s)) for s in (1, 2)]
    loratool.combine(folders, tmp_path / "out", weights=[0.25, 0.75], method="slerp", rank=8)
    one, two = map(updates, folders)
    wanted = {}
    for module in one:
        a, b = one[module], two[module]
        angle = torch.acos((a * b).sum() / a.norm() / b.norm())
        wanted[module] = (torch.sin(0.25 * angle) * a + torch.sin(0.75 * angle) * b) / torch.sin(angle)
    assert_equal(tmp_path / "out", wanted)


def test_knots_is_ties_in_the_basis_of_the_stacked_deltas(tmp_path: Path) -> None:
    from loratool.combining import Pair
    from loratool.methods.knots import knots, stacked_svd

    generator = torch.Generator().manual_seed(1)
    pairs = [
        Pair(w, n, s, torch.randn(20, r, generator=generator), torch.randn(r, 30, generator=generator))
        for n, (w, s, r) in enumerate([(0.7, 2.0, 4), (1.5, 0.5, 6), (-0.4, 1.0, 3)])
    ]
    deltas = [p.scaling * p.up.double() @ p.down.double() for p in pairs]
    U, S, Vh = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)
    left, sigma, rights = stacked_svd(pairs)
    torch.testing.assert_close(sigma, S[:13], rtol=1e-6, atol=0)
    assert S[13] < 1e-6 * S[0]
    for right, delta in zip(rights, deltas, strict=True):
        torch.testing.assert_close(left * sigma @ right, delta, rtol=1e-6, atol=1e-8)
    # merge the V of the dense SVD; its singular vectors agree with ours but for signs, which nothing below depends on
    kept = []
    for V in torch.split(Vh[:13], 30, dim=1):
        floor = V.abs().flatten().sort(descending=True).values[int(0.3 * V.numel()) - 1]
        kept.append(torch.where(V.abs() >= floor, V, 0))
    stacked = torch.stack(kept)
    agrees = stacked.sign() == torch.where(stacked.sum(0) >= 0, 1, -1)
    weights = torch.tensor([p.weight for p in pairs], dtype=torch.float64)[:, None, None]
    merged = (weights * stacked * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    up, down = knots(pairs, density=0.3)
    torch.testing.assert_close(up @ down, U[:, :13] * S[:13] @ merged, rtol=1e-4, atol=1e-6)


def test_the_post_hoc_average_has_the_profile_of_the_paper(tmp_path: Path) -> None:
    """Karras et al. 2024: the profile is t^gamma, and sigma_rel is the standard deviation of its density on [0, 1]."""
    from loratool.methods.ema import exponent_of

    for sigma in (0.05, 0.1, 0.2):
        gamma = exponent_of(sigma)
        t = torch.linspace(0, 1, 2_000_001, dtype=torch.float64)
        density = t**gamma / (t**gamma).sum()
        mean = (density * t).sum()
        assert float(((density * t * t).sum() - mean**2).sqrt()) == pytest.approx(sigma, rel=1e-3)
    steps = [100, 200, 400]
    folders = [write_adapter(tmp_path / f"checkpoint-{n}", factors(n)) for n in steps]
    loratool.combine(folders[::-1], tmp_path / "out", method="ema", options={"gamma": 2}, rank=12)
    wanted = weighted_sum(folders, [0.25**3, 0.5**3 - 0.25**3, 1 - 0.5**3])  # integrals of 3 t^2
    assert_equal(tmp_path / "out", wanted)


# ---- beside factors

HEAD = "base_model.model.lm_head.weight"


def with_head(path: Path, seed: int, head: torch.Tensor) -> Path:
    return write_adapter(path, {**factors(seed), HEAD: head}, modules_to_save=["lm_head"])


def test_modules_to_save_are_a_mean_where_the_weights_add_up_to_1(tmp_path: Path) -> None:
    heads = [torch.randn(40, 16, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    folders = [with_head(tmp_path / str(n), n, head) for n, head in enumerate(heads, start=1)]
    loratool.combine(folders, tmp_path / "out", weights=[3, 1], normalize=True)
    got = load_file(tmp_path / "out/adapter_model.safetensors")[HEAD]
    torch.testing.assert_close(got, 0.75 * heads[0] + 0.25 * heads[1])
    with pytest.raises(InputError, match="add up to 1") as caught:
        loratool.combine(folders, tmp_path / "no")
    assert "--normalize" in caught.value.hint
    assert not (tmp_path / "no").exists()


def test_a_module_that_all_saved_alike_is_kept(tmp_path: Path) -> None:
    head = torch.randn(40, 16)
    folders = [with_head(tmp_path / str(n), n, head) for n in (1, 2)]
    report = loratool.combine(folders, tmp_path / "out", weights=[0.7, 0.4])
    assert torch.equal(load_file(tmp_path / "out/adapter_model.safetensors")[HEAD], head)
    assert any("the same in all adapters" in f.what for f in report.findings)


def test_a_module_that_one_adapter_saved_needs_weight_1(tmp_path: Path) -> None:
    head = torch.randn(40, 16)
    folders = [with_head(tmp_path / "1", 1, head), write_adapter(tmp_path / "2", factors(2))]
    loratool.combine(folders, tmp_path / "out", weights=[1, 0.4])
    assert torch.equal(load_file(tmp_path / "out/adapter_model.safetensors")[HEAD], head)
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["modules_to_save"] == ["lm_head"]
    with pytest.raises(InputError, match="takes the place of the base's"):
        loratool.combine(folders, tmp_path / "no", weights=[0.7, 0.4])


def test_biases_of_the_update_add_up(tmp_path: Path) -> None:
    name = f"base_model.model.{Q0}.lora_B.bias"
    shapes = {Q0: SHAPES[Q0]}
    bias = torch.randn(HIDDEN)
    one = write_adapter(tmp_path / "1", {**factors(1, shapes=shapes), name: bias}, lora_bias=True)
    two = write_adapter(tmp_path / "2", {**factors(2, shapes=shapes), name: 2 * bias}, lora_bias=True, lora_alpha=4)
    plain = write_adapter(tmp_path / "3", factors(3))
    loratool.combine([one, two, plain], tmp_path / "out", weights=[0.5, 0.25, 1])
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    torch.testing.assert_close(tensors[name], (0.5 * 2 + 0.25 * 2) * bias)  # scalings 2 and 1
    assert not tensors[f"base_model.model.{K1}.lora_B.bias"].any()
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["lora_bias"] is True


def test_dora_is_carried_alone_and_refused_in_a_sum(tmp_path: Path) -> None:
    def dora(path: Path, seed: int, modules: dict[str, tuple[int, int]]) -> Path:
        magnitudes = {f"base_model.model.{m}.lora_magnitude_vector": torch.rand(s[0]) + 1 for m, s in modules.items()}
        return write_adapter(path, {**factors(seed, shapes=modules), **magnitudes}, use_dora=True)

    one, two = dora(tmp_path / "1", 1, {Q0: SHAPES[Q0]}), dora(tmp_path / "2", 2, {K1: SHAPES[K1]})
    loratool.combine([one, two], tmp_path / "out", allow_disjoint=True)
    before, after = load_file(one / "adapter_model.safetensors"), load_file(tmp_path / "out/adapter_model.safetensors")
    name = f"base_model.model.{Q0}.lora_magnitude_vector"
    assert torch.equal(before[name], after[name])
    assert_equal(tmp_path / "out", weighted_sum([one, two], [1, 1]))
    for folders, weights in (([one, one], [1, 1]), ([one, two], [0.5, 1])):
        with pytest.raises(MismatchError, match="DoRA's update depends") as caught:
            loratool.combine(folders, tmp_path / "no", weights=weights, allow_disjoint=True)
        assert "extract" in caught.value.hint


# ---- refusals

BAD: dict[str, tuple[list[Any], type[LoratoolError], str]] = {
    "all weights zero": (["-w", 0, "-w", 0], InputError, "all weights are zero"),
    "an unknown method": (["--method", "tis"], UsageError, "ties"),
    "an unknown option": (["--method", "ties", "-O", "densty=0.5"], UsageError, "density"),
    "an option of a method that has none": (["-O", "density=0.5"], UsageError, "none"),
    "a number out of bounds": (["--method", "ties_svd", "-O", "density=1.5"], UsageError, "above 0 to 1"),
    "no number": (["--method", "ties_svd", "-O", "density=much"], UsageError, "number"),
    "a word that is no choice": (["--method", "ties_svd", "-O", "sign=mean"], UsageError, "total or frequency"),
    "too few weights": (["-w", 0.5], UsageError, "2 adapters and 1 weights"),
    "weights that cancel": (["-w", 1, "-w", -1, "--normalize"], UsageError, "add up to zero"),
    "a pattern of nothing": (["--scale", "nothing=0.5"], MismatchError, "no module matches"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_meant_is_refused(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments, error, told = BAD[case]
    folders = [write_adapter(tmp_path / str(s), factors(s)) for s in (1, 2)]
    before = snapshot(tmp_path)
    assert run_main("combine", *folders, "-o", tmp_path / "out", *arguments) == error.exit_code
    assert told in " ".join(capfd.readouterr().err.split())
    assert snapshot(tmp_path) == before


def refused(tmp_path: Path, folders: list[Path], match: str, **options: Any) -> str:
    before = snapshot(tmp_path)
    with pytest.raises(LoratoolError, match=match) as caught:
        loratool.combine(folders, tmp_path / "out", **options)
    assert caught.value.exit_code == 3
    assert snapshot(tmp_path) == before
    return caught.value.hint


def test_adapters_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    llama = write_adapter(tmp_path / "llama", factors(1), base_model_name_or_path="org/llama-7b")
    other = write_adapter(tmp_path / "other", factors(2), base_model_name_or_path="org/llama-13b")
    copy = write_adapter(tmp_path / "copy", factors(3), base_model_name_or_path="/models/Llama-7B")
    assert "--allow-different-bases" in refused(tmp_path, [llama, other], "different base models")
    loratool.combine([llama, other], tmp_path / "anyway", allow_different_bases=True)
    loratool.combine([llama, copy], tmp_path / "same")
    bert = write_adapter(tmp_path / "bert", factors(4, 2, {"bert.encoder.layer.0.attention.self.query": (16, 16)}), r=2)
    assert "--arch" in refused(tmp_path, [llama, bert], "different families")
    apart = write_adapter(tmp_path / "apart", factors(5, 4, {V0: (8, HIDDEN)}))
    assert "--allow-disjoint" in refused(tmp_path, [llama, apart], "no module in common")
    loratool.combine([llama, apart], tmp_path / "disjoint", allow_disjoint=True)
    assert_equal(tmp_path / "disjoint", weighted_sum([llama, apart], [1, 1]))
    wide = write_adapter(tmp_path / "wide", factors(6, 4, {Q0: (32, 32)}))
    refused(tmp_path, [llama, wide], r"\[16, 16\]")
    opposite = write_adapter(tmp_path / "opposite", factors(1))
    refused(tmp_path, [llama, opposite], "cancel each other", weights=[1, -1])


def test_slerp_is_for_two_and_goes_by_t_or_by_weights(three: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="slerp is for 2 adapters"):
        loratool.combine(three, tmp_path / "out", method="slerp")
    with pytest.raises(UsageError, match=r"t=0\.5 and between weights"):
        loratool.combine(three[:2], tmp_path / "out", weights=[0.7, 0.4], method="slerp", options={"t": 0.5})
    assert not (tmp_path / "out").exists()


def test_formats_meet_and_one_has_to_be_chosen(tmp_path: Path) -> None:
    bert = {"bert.encoder.layer.0.attention.self.query": (24, 24)}
    folder = write_adapter(tmp_path / "peft", factors(1, shapes=bert))
    tensors = {}
    for name, tensor in factors(2, shapes=bert).items():
        flat = "lora_te_" + name.removeprefix("base_model.model.").rpartition(".lora_")[0].replace(".", "_")
        tensors[f"{flat}.{'lora_down' if 'lora_A' in name else 'lora_up'}.weight"] = tensor
        tensors[f"{flat}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "kohya.safetensors")
    with pytest.raises(UsageError, match="formats kohya and peft"):
        loratool.combine([folder, tmp_path / "kohya.safetensors"], tmp_path / "out")
    loratool.combine([folder, tmp_path / "kohya.safetensors"], tmp_path / "out", weights=[1, 0.5], to="peft")
    (delta,) = updates(folder).values()
    up, down = (next(t for n, t in tensors.items() if part in n).double() for part in ("lora_up", "lora_down"))
    (got,) = updates(tmp_path / "out").values()
    torch.testing.assert_close(got, delta + 0.5 * (2 / 4) * up @ down, rtol=1e-6, atol=1e-9)


def test_a_dry_run_writes_nothing_and_says_what_it_would(three: list[Path], tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    report = loratool.combine(three, tmp_path / "out", method="ties_svd", dry_run=True)
    assert report.dry_run
    assert {row["rank_at_most"] for row in report.rows} == {4, 5, 6}
    assert any("whole update" in f.what for f in report.findings)
    assert snapshot(tmp_path) == before
