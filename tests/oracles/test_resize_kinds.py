"""resize and convert of every kind that has factors, against PEFT's own modules and dense fp64 SVDs."""

import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_peft_loads_ours import load_in_peft

import loratool
from loratool.errors import InputError, LoratoolError

TARGETS = ["q_proj", "v_proj", "down_proj"]
KINDS = {
    "lora": peft.LoraConfig(r=6, lora_alpha=9, target_modules=TARGETS),
    "rslora": peft.LoraConfig(r=6, lora_alpha=9, target_modules=TARGETS, use_rslora=True),
    "dora": peft.LoraConfig(r=6, lora_alpha=9, target_modules=TARGETS, use_dora=True),
    "adalora": peft.AdaLoraConfig(init_r=6, target_r=4, lora_alpha=9, target_modules=TARGETS, total_step=10),
    "loha": peft.LoHaConfig(r=2, alpha=3, target_modules=TARGETS),
    "lokr": peft.LoKrConfig(r=2, alpha=3, target_modules=TARGETS, decompose_both=True, decompose_factor=4),
    "lokr whole": peft.LoKrConfig(r=64, alpha=3, target_modules=TARGETS),
    "lora_bias": peft.LoraConfig(r=6, lora_alpha=9, target_modules=["query", "value"], lora_bias=True),
    "bias": peft.LoraConfig(r=6, lora_alpha=9, target_modules=["query", "value"], bias="all"),
    "saved": peft.LoraConfig(r=6, lora_alpha=9, target_modules=TARGETS, modules_to_save=["norm", "lm_head"]),
    "tokens": peft.LoraConfig(r=6, lora_alpha=9, target_modules=TARGETS, trainable_token_indices=[1, 5]),
}
CONV = {
    "lora": peft.LoraConfig(r=3, lora_alpha=4, target_modules=["conv1", "to_q", "proj_in"]),
    "loha": peft.LoHaConfig(r=2, alpha=3, target_modules=["conv1", "to_q"], use_effective_conv2d=True),
    "lokr": peft.LoKrConfig(r=2, alpha=3, target_modules=["conv1", "to_q"], use_effective_conv2d=True),
}


def trained(model, config, folder):
    """A PeftModel whose trainable values are random, and the folder that PEFT saved it to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        live = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in live.named_parameters():
            if value.requires_grad or "trainable_tokens_delta" in name:
                step = 0.15 * torch.randn(value.shape, generator=generator)
                value.copy_(value + step if "modules_to_save" in name or "magnitude" in name else step)
    live.save_pretrained(folder)
    return live


def unchecked(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, folder).eval()


def updates(live):
    """What each adapted module adds to its weight, in fp64, as PEFT computes it."""
    found = {}
    for name, module in live.get_base_model().named_modules():
        if hasattr(module, "get_delta_weight"):
            found[name] = module.get_delta_weight("default").detach().double().flatten(1)
    return found


@pytest.mark.filterwarnings("ignore:Adapter 'default'.*lora_B.bias")  # PEFT takes its own bias for a broken factor
@pytest.mark.parametrize("verb", ["resize", "convert"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_truncation_peft_computes_the_same(kind, verb, tiny, run_model, tmp_path):
    model = "bert" if "bias" in kind else "llama"
    live = trained(tiny(model), KINDS[kind], tmp_path / "adapter")
    wanted, plain = run_model(model, live), run_model(model, tiny(model))
    if verb == "resize":
        loratool.resize(tmp_path / "adapter", tmp_path / "out", energy=1.0)
    else:
        loratool.convert(tmp_path / "adapter", tmp_path / "out", to="peft")
    load = unchecked if kind == "lora_bias" else load_in_peft
    again = load(tiny(model), tmp_path / "out")
    effect = float((wanted - plain).abs().max())
    assert effect > 1e-4
    assert float((run_model(model, again) - wanted).abs().max()) < max(2e-4 * effect, 1e-6)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    if verb == "resize":
        scalings = {m.scaling["default"] for m in again.get_base_model().modules() if hasattr(m, "lora_A")}
        assert scalings == {1.0}


@pytest.mark.parametrize("model", ["llama", "unet"])
@pytest.mark.parametrize("kind", ["lora", "adalora", "loha", "lokr", "lokr whole"])
@pytest.mark.parametrize("rank", [1, 3])
def test_truncation_is_the_best_there_is(kind, model, rank, tiny, tmp_path):
    config = (KINDS if model == "llama" else CONV).get(kind)
    if config is None:
        pytest.skip("PEFT has no such convolution")
    live = trained(tiny(model), config, tmp_path / "adapter")
    wanted = updates(live)
    report = loratool.resize(tmp_path / "adapter", tmp_path / "out", rank=rank)
    got = updates(load_in_peft(tiny(model), tmp_path / "out"))
    assert got.keys() == wanted.keys()
    assert len(report.rows) == len(wanted)
    for name, delta in wanted.items():
        sigma = torch.linalg.svdvals(delta)
        best = float(sigma[rank:].norm() / sigma.norm())
        error = float((got[name] - delta).norm() / sigma.norm())
        row = next(r for r in report.rows if r["module"].endswith(name))
        assert error <= best + 1e-6
        assert row["error"] == pytest.approx(error, abs=1e-6)
        assert row["rank"] <= rank
        assert row["sigma"][:3] == pytest.approx(sigma[: len(row["sigma"][:3])].tolist(), rel=1e-4)


def test_dora_keeps_the_strength_of_every_output(tiny, tmp_path):
    live = trained(tiny("llama"), KINDS["dora"], tmp_path / "adapter")
    loratool.resize(tmp_path / "adapter", tmp_path / "out", rank=1)
    again = load_in_peft(tiny("llama"), tmp_path / "out")
    for before, after in zip(live.merge_and_unload().modules(), again.merge_and_unload().modules(), strict=True):
        if isinstance(before, torch.nn.Linear):
            torch.testing.assert_close(before.weight.norm(dim=1), after.weight.norm(dim=1))


def test_a_pissa_adapter_less_its_beginning_fits_the_original_base(tiny, run_model, tmp_path):
    model = tiny("llama")
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS, init_lora_weights="pissa")
    live = peft.get_peft_model(model, config).eval()
    live.peft_config["default"].init_lora_weights = True  # as PEFT's examples save the beginning
    live.save_pretrained(tmp_path / "initial")
    live.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, value in live.named_parameters():
            if "lora_" in name:
                value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
    live.save_pretrained(tmp_path / "adapter")
    wanted = run_model("llama", live)
    for verb, options in (("convert", {"to": "peft"}), ("resize", {"energy": 1.0})):
        with pytest.raises(LoratoolError, match="pissa"):
            getattr(loratool, verb)(tmp_path / "adapter", tmp_path / "refused", **options)
        out = tmp_path / verb
        getattr(loratool, verb)(tmp_path / "adapter", out, init_adapter=tmp_path / "initial", **options)
        again = load_in_peft(tiny("llama"), out)
        torch.testing.assert_close(run_model("llama", again), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
        peft.OFTConfig(target_modules=TARGETS, oft_block_size=8),
        peft.BOFTConfig(target_modules=TARGETS, boft_block_size=4),
        peft.VeraConfig(target_modules=["q_proj"], r=4),
    ],
    ids=["ia3", "oft", "boft", "vera"],
)
@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor:UserWarning")
def test_kinds_that_have_no_factors_of_their_own_are_refused_with_the_way_out(config, tiny, tmp_path):
    trained(tiny("llama"), config, tmp_path / "adapter")
    for verb, options in (("resize", {"rank": 2}), ("convert", {"to": "peft"})):
        with pytest.raises(InputError, match=config.peft_type.value.lower()) as refusal:
            getattr(loratool, verb)(tmp_path / "adapter", tmp_path / "out", **options)
        assert "extract" in refusal.value.hint
    assert not (tmp_path / "out").exists()


def test_dropped_modules_are_left_out(tiny, tmp_path):
    trained(tiny("llama"), KINDS["saved"], tmp_path / "adapter")
    loratool.resize(tmp_path / "adapter", tmp_path / "out", rank=2, drop=["down_proj", "lm_head"])
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert not [n for n in names if "down_proj" in n or "lm_head" in n]
    assert [n for n in names if n.endswith("model.norm.weight")]
    load_in_peft(tiny("llama"), tmp_path / "out")


def test_up_sizing_changes_no_rank_and_says_so(tiny, tmp_path):
    trained(tiny("llama"), KINDS["lora"], tmp_path / "adapter")
    report = loratool.resize(tmp_path / "adapter", tmp_path / "out", rank=16)
    assert {row["rank"] for row in report.rows} == {6}
    assert any("nothing gets smaller" in f.what for f in report.findings)


@pytest.mark.parametrize("pad", [7, "engine"])
@pytest.mark.parametrize("model", ["llama", "unet"])
def test_padding_gives_every_module_one_rank_and_changes_nothing(model, pad, tiny, run_model, tmp_path):
    trained(tiny(model), (KINDS if model == "llama" else CONV)["lora"], tmp_path / "adapter")
    loratool.resize(tmp_path / "adapter", tmp_path / "plain", energy=0.9)
    report = loratool.resize(tmp_path / "adapter", tmp_path / "padded", energy=0.9, pad_rank=pad)
    one, two = (load_in_peft(tiny(model), tmp_path / f) for f in ("plain", "padded"))
    torch.testing.assert_close(run_model(model, two), run_model(model, one), rtol=1e-5, atol=1e-6)
    modules = [m for m in two.get_base_model().modules() if hasattr(m, "lora_A")]
    rank = 8 if pad == "engine" else pad
    assert {m.r["default"] for m in modules} == {rank}
    assert {m.scaling["default"] for m in modules} == {1.0}
    assert report.totals["padded_to"] == rank
    assert json.loads((tmp_path / "padded" / "adapter_config.json").read_text())["rank_pattern"] == {}


@pytest.mark.parametrize("transpose", [False, True], ids=["tall", "wide"])
def test_a_dense_diff_becomes_the_best_low_rank_update_there_is(transpose, tmp_path):
    """LyCORIS' `full` files (`.diff`): Eckart-Young by numpy in fp64; a norm's `.diff` stays as it is."""
    conv, norm = "lora_unet_mid_block_resnets_0_conv1", "norm1"
    attention = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    shape = (24, 40) if transpose else (40, 24)
    tensors = {
        f"{attention}.diff": torch.randn(*shape),
        f"{conv}.diff": torch.randn(16, 8, 3, 3),
        f"lora_unet_mid_block_resnets_0_{norm}.w_norm": torch.randn(8),
    }
    save_file(tensors, tmp_path / "full.safetensors")
    loratool.resize(tmp_path / "full.safetensors", tmp_path / "small.safetensors", rank=5, arch="stable-diffusion")
    small = load_file(tmp_path / "small.safetensors")
    assert {n for n in small if n.endswith("norm")} == {f"lora_unet_mid_block_resnets_0_{norm}.w_norm"}
    for module in (attention, conv):
        whole = tensors[f"{module}.diff"].double().flatten(1)
        up, down = (small[f"{module}.lora_{side}.weight"].double().flatten(1) for side in ("up", "down"))
        scale = float(small[f"{module}.alpha"]) / 5 if f"{module}.alpha" in small else 1.0
        best = torch.linalg.svdvals(whole)[5:].square().sum().sqrt()
        assert down.shape[0] == 5
        torch.testing.assert_close((whole - scale * up @ down).norm(), best, rtol=1e-6, atol=0)
    assert small[f"{conv}.lora_down.weight"].shape == (5, 8, 3, 3)
