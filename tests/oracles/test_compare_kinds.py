"""compare of every kind of adapter that PEFT trains, against the updates that PEFT itself computes, densely in fp64."""

import itertools

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_resize_kinds import CONV, TARGETS, trained, updates

import loratool

KINDS = {
    "lora": peft.LoraConfig(r=6, lora_alpha=9, target_modules=TARGETS),
    "rslora": peft.LoraConfig(r=3, lora_alpha=9, target_modules=TARGETS, use_rslora=True),
    "adalora": peft.AdaLoraConfig(init_r=6, target_r=4, lora_alpha=9, target_modules=TARGETS, total_step=10),
    "loha": peft.LoHaConfig(r=2, alpha=3, target_modules=TARGETS),
    "lokr": peft.LoKrConfig(r=2, alpha=3, target_modules=TARGETS, decompose_both=True, decompose_factor=4),
    "lokr whole": peft.LoKrConfig(r=64, alpha=3, target_modules=TARGETS),
    "vera": peft.VeraConfig(r=8, target_modules=["q_proj", "v_proj"]),
}


def saved(model, config, folder, seed):
    """An adapter whose values are random and its own; its updates in fp64, by module."""
    return updates(written(model, config, folder, seed).double())


def written(model, config, folder, seed):
    """The same, as a PeftModel."""
    live = trained(model, config, folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in live.named_parameters():
            if value.requires_grad:
                step = 0.15 * torch.randn(value.shape, generator=generator)
                value.copy_(value + step if "modules_to_save" in name or "magnitude" in name else step)
    live.save_pretrained(folder)
    return live


def agrees(report, one, two, tolerance):
    """Whether a report on two adapters says what their dense updates say."""
    names = one.keys() | two.keys()
    assert len(report.rows) == len(names)
    for name in names:
        row = next(r for r in report.rows if r["module"].endswith(name))
        A, B = (d.get(name, torch.zeros(1).double()) for d in (one, two))
        assert row["norms"] == pytest.approx([float(A.norm()), float(B.norm())], rel=tolerance)
        if name in one and name in two:
            assert row["distance"] == pytest.approx(float((A - B).norm() / max(A.norm(), B.norm())), rel=tolerance)
            inner = float((A * B).sum() / A.norm() / B.norm())
            assert row["cosine"] == pytest.approx(inner, abs=tolerance)
    return True


@pytest.mark.parametrize(("first", "second"), [*itertools.combinations(KINDS, 2), *((k, k) for k in KINDS)])
def test_any_two_kinds_are_compared_as_peft_computes_them(first, second, tiny, tmp_path):
    one = saved(tiny("llama"), KINDS[first], tmp_path / "one", 1)
    two = saved(tiny("llama"), KINDS[second], tmp_path / "two", 2)
    report = loratool.compare(tmp_path / "one", tmp_path / "two")
    assert agrees(report, one, two, 1e-9)  # PEFT rounds alpha / r and VeRA's matrices to fp32 here and there
    assert not report.totals["equal"]
    again = loratool.compare(tmp_path / "one", tmp_path / "one")
    assert again.totals["equal"]
    assert again.totals["distance"] == 0


@pytest.mark.parametrize("kind", CONV)
def test_convolutions_are_compared_as_matrices(kind, tiny, tmp_path):
    one = saved(tiny("unet"), CONV["lora"], tmp_path / "one", 1)
    two = saved(tiny("unet"), CONV[kind], tmp_path / "two", 2)
    assert agrees(loratool.compare(tmp_path / "one", tmp_path / "two"), one, two, 1e-9)


def test_an_adapter_and_the_same_as_plain_lora_are_one_update(tiny, tmp_path):
    """What convert makes of AdaLoRA, LoHa and LoKr in fp32 is the same but for that rounding."""
    for kind in ("adalora", "loha", "lokr"):
        folder = tmp_path / kind
        saved(tiny("llama"), KINDS[kind], folder, 1)
        loratool.convert(folder, tmp_path / f"{kind}-lora", to="peft")
        report = loratool.compare(folder, tmp_path / f"{kind}-lora")
        assert 0 < report.totals["distance"] < 1e-6
        assert report.totals["cosine"] == pytest.approx(1)
        assert report.totals["overlap"] == pytest.approx(1, abs=1e-6)


def changed(folder, to, **factors):
    """The same adapter with the tensors whose names hold a word multiplied."""
    to.mkdir()
    (to / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    for word, factor in factors.items():
        assert any(word in name for name in tensors), word
        tensors = {n: t * factor if word in n else t for n, t in tensors.items()}
    save_file(tensors, to / "adapter_model.safetensors")


def test_dora_is_compared_by_its_low_rank_part_and_its_magnitudes(tiny, tmp_path):
    config = peft.LoraConfig(r=6, lora_alpha=9, target_modules=TARGETS, use_dora=True)
    saved(tiny("llama"), config, tmp_path / "a", 1)
    changed(tmp_path / "a", tmp_path / "b", magnitude=1.25)
    report = loratool.compare(tmp_path / "a", tmp_path / "b")
    assert report.totals["distance"] == 0
    assert not report.totals["equal"]
    for row in report.rows:
        assert row["magnitude_distance"] == pytest.approx(0.2)  # 0.25 of 1.25
        assert row["cosine"] == pytest.approx(1)
        assert not row["equal"]
    assert any(f.where.startswith("dora") and "magnitudes" in f.what for f in report.findings)
    assert loratool.compare(tmp_path / "a", tmp_path / "a").totals["equal"]


def test_dora_beside_lora_says_that_only_the_low_rank_parts_are_compared(tiny, tmp_path):
    config = peft.LoraConfig(r=6, lora_alpha=9, target_modules=TARGETS, use_dora=True)
    saved(tiny("llama"), config, tmp_path / "a", 1)
    saved(tiny("llama"), KINDS["lora"], tmp_path / "b", 1)
    report = loratool.compare(tmp_path / "a", tmp_path / "b")
    assert not report.totals["equal"]
    assert any(f.level == "warning" and "only the low-rank parts" in f.what for f in report.findings)
    assert report.ledger[str(tmp_path / "a")]["not compared"] == len(report.rows)


def test_whole_modules_and_tokens_are_compared_by_their_values_and_stay_out_of_the_totals(tiny, tmp_path):
    config = peft.LoraConfig(
        r=6, lora_alpha=9, target_modules=TARGETS, modules_to_save=["lm_head"], trainable_token_indices=[5, 1]
    )
    saved(tiny("llama"), config, tmp_path / "a", 1)
    changed(tmp_path / "a", tmp_path / "b", lm_head=2.0, token=4.0)
    report = loratool.compare(tmp_path / "a", tmp_path / "b")
    rows = {row["kind"]: row for row in report.rows}
    assert rows["replace"]["distance"] == pytest.approx(0.5)
    assert rows["tokens"]["distance"] == pytest.approx(0.75)
    assert rows["replace"]["cosine"] is rows["tokens"]["cosine"] is None
    assert rows["replace"]["verdict"] == rows["tokens"]["verdict"] == "different"
    assert rows["lora"]["verdict"] == "equal"
    assert report.totals["distance"] == 0
    assert not report.totals["equal"]
    assert loratool.compare(tmp_path / "a", tmp_path / "a").totals["equal"]
    without = loratool.compare(tmp_path / "a", tmp_path / "b", exclude=["lm_head", "embed_tokens"])
    assert without.totals["equal"]


def test_a_head_that_one_adapter_has_and_the_other_has_not_is_named(tiny, tmp_path):
    saved(tiny("llama"), KINDS["lora"], tmp_path / "a", 1)
    config = peft.LoraConfig(r=6, lora_alpha=9, target_modules=TARGETS, modules_to_save=["lm_head"])
    saved(tiny("llama"), config, tmp_path / "b", 1)
    report = loratool.compare(tmp_path / "a", tmp_path / "b")
    assert not report.totals["equal"]
    (finding,) = [f for f in report.findings if f.level == "warning"]
    assert "lm_head" in finding.what
    assert report.ledger[str(tmp_path / "b")]["not compared"] == 1
    (row,) = [r for r in report.rows if r["kind"] == "replace"]
    assert row["verdict"] == "one-sided"


@pytest.mark.filterwarnings("ignore:Adapter 'default'.*lora_B.bias")  # PEFT takes its own bias for a broken factor
def test_biases_of_lora_b_are_updates_like_others(tiny, tmp_path):
    config = peft.LoraConfig(r=6, lora_alpha=9, target_modules=["query"], lora_bias=True)
    saved(tiny("bert"), config, tmp_path / "a", 1)
    changed(tmp_path / "a", tmp_path / "b", **{"lora_B.bias": -2.0})
    report = loratool.compare(tmp_path / "a", tmp_path / "b")
    rows = [r for r in report.rows if r["kind"] == "full"]
    assert len(rows) == 2
    bias = next(
        t for n, t in load_file(tmp_path / "a" / "adapter_model.safetensors").items() if "layer.0" in n and "bias" in n
    )
    assert rows[0]["norms"] == pytest.approx([1.5 * float(bias.double().norm()), 3 * float(bias.double().norm())])
    assert all(r["distance"] == pytest.approx(1.5) and r["cosine"] == pytest.approx(-1) for r in rows)


@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension", "ignore:Setting boft_n")  # BOFT without CUDA
@pytest.mark.parametrize(
    ("config", "word", "neutral"),
    [
        (peft.OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj"]), "oft_R", 0.0),
        (peft.BOFTConfig(boft_block_size=8, target_modules=["q_proj"]), "boft_R", 0.0),
        (peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]), "ia3_l", 1.0),
    ],
)
def test_what_multiplies_the_weight_is_compared_by_its_parameters(config, word, neutral, tiny, tmp_path):
    saved_values = []
    for seed, name in enumerate("ab"):
        written(tiny("llama"), config, tmp_path / name, seed)
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        saved_values.append(
            torch.cat([t.double().flatten() - neutral for n, t in sorted(tensors.items()) if word in n])
        )
    report = loratool.compare(tmp_path / "a", tmp_path / "b")
    assert any("parameters" in f.what or "factors" in f.what for f in report.findings)
    if word != "boft_R":  # which has scales beside it
        A, B = saved_values
        assert report.totals["cosine"] == pytest.approx(float(A @ B / A.norm() / B.norm()))
        assert report.totals["distance"] == pytest.approx(float((A - B).norm() / max(A.norm(), B.norm())))
    assert not report.totals["equal"]
    assert loratool.compare(tmp_path / "a", tmp_path / "a").totals["equal"]


def test_kinds_that_have_nothing_in_common_are_named(tiny, tmp_path):
    saved(tiny("llama"), KINDS["lora"], tmp_path / "a", 1)
    config = peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    saved(tiny("llama"), config, tmp_path / "b", 1)
    report = loratool.compare(tmp_path / "a", tmp_path / "b")
    (finding,) = [f for f in report.findings if f.level == "warning"]
    assert finding.where == "ia3 beside lora"
    assert finding.what.startswith("not compared (4 modules")
    assert not report.totals["equal"]


def test_weights_that_are_stored_in_out_are_compared_the_right_way_round(tiny, tmp_path):
    """GPT-2's c_attn; PEFT gives its update as the weight is stored."""
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["c_attn"], fan_in_fan_out=True)
    one = saved(tiny("gpt2"), config, tmp_path / "a", 1)
    two = saved(tiny("gpt2"), config, tmp_path / "b", 2)
    turned = [{n: d.T for n, d in deltas.items()} for deltas in (one, two)]
    assert agrees(loratool.compare(tmp_path / "a", tmp_path / "b"), *turned, 1e-9)
