"""Mixtures of experts: whatever way an adapter and a base spell, split or stack the experts, the merge is exact.

The oracle is B @ A in fp64 on the tensors of the file, or PEFT's own merge in memory.
"""

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import LoratoolError, MismatchError

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
MOE = {"moe_intermediate_size": 20, "num_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    "moe_intermediate_size": 20, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
MLA = {"q_lora_rank": 12, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5}
# the table of what PEFT 0.21 with transformers 5 loses without a word: adapters of the transformers 4 era
LOST = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3Moe", MOE),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2Moe", MOE | {"shared_expert_intermediate_size": 24}),
    "glm4_moe": ("Glm4Moe", DEEPSEEK),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK | MLA),
    "qwen3_moe_mixed": ("Qwen3Moe", MOE | {"mlp_only_layers": [0]}),
}


def model(name, settings):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | settings)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def write_adapter(folder: Path, factors: dict[str, tuple[torch.Tensor, torch.Tensor]], **config) -> None:
    """Write an adapter as PEFT did under transformers 4: one pair of factors a module."""
    folder.mkdir()
    named = {}
    for module, (down, up) in factors.items():
        named[f"base_model.model.{module}.lora_A.weight"] = down.clone()
        named[f"base_model.model.{module}.lora_B.weight"] = up
    save_file(named, folder / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": sorted(factors), **config}
    (folder / "adapter_config.json").write_text(json.dumps(content))


def pairs_for(weights: dict[str, torch.Tensor], rank: int = 3) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Random factors for every matrix of a file but the embedding and the head."""
    generator = torch.Generator().manual_seed(3)
    return {
        name.removesuffix(".weight"): (
            torch.randn(rank, w.shape[1], generator=generator) * 0.1,
            torch.randn(w.shape[0], rank, generator=generator) * 0.1,
        )
        for name, w in weights.items()
        if w.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name
    }


def assert_exact(out: Path, weights, factors, scaling=5 / 3):
    merged = tensors(out)
    assert merged.keys() == weights.keys()
    for name, weight in weights.items():
        wanted = weight.double()
        if name.removesuffix(".weight") in factors:
            down, up = factors[name.removesuffix(".weight")]
            wanted = wanted + scaling * up.double() @ down.double()
            assert not torch.equal(merged[name], weight), name
        torch.testing.assert_close(merged[name].double(), wanted, rtol=0, atol=2e-7)


@pytest.mark.parametrize("case", LOST)
def test_an_adapter_of_single_experts_merges_whole(case, tmp_path):
    model(*LOST[case]).save_pretrained(tmp_path / "base")
    weights = tensors(tmp_path / "base")
    factors = pairs_for(weights)
    kinds = {".experts.", "self_attn."} | (
        {"shared_expert"} if case in ("qwen2_moe", "glm4_moe", "deepseek_v3") else set()
    )
    assert all(any(kind in name for name in factors) for kind in kinds)
    write_adapter(tmp_path / "adapter", factors)
    loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert_exact(tmp_path / "out", weights, factors)


@pytest.mark.parametrize("case", LOST)
def test_it_merges_into_a_file_that_has_the_experts_stacked(case, tmp_path):
    live = model(*LOST[case])
    live.save_pretrained(tmp_path / "base")
    live.save_pretrained(tmp_path / "stacked", save_original_format=False)
    assert any(t.ndim == 3 for t in tensors(tmp_path / "stacked").values())
    factors = pairs_for(tensors(tmp_path / "base"))
    write_adapter(tmp_path / "adapter", factors)
    loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    loratool.merge(tmp_path / "stacked", [tmp_path / "adapter"], tmp_path / "out-stacked")
    name, settings = LOST[case]
    wanted = type(live).from_pretrained(tmp_path / "out").state_dict()
    found = type(live).from_pretrained(tmp_path / "out-stacked").state_dict()
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key
    assert name in type(live).__name__
    assert settings


def trained(live, rank=2, **config):
    """A PeftModel whose factors are all random, on the stacked parameters of the experts."""
    parameters = [n for n, p in live.named_parameters() if p.ndim == 3 and n.rpartition(".")[2].endswith("_proj")]
    assert parameters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(
            live,
            peft.LoraConfig(target_modules=["q_proj"], target_parameters=parameters, r=rank, lora_alpha=3, **config),
        )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    return adapted


STACKED = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3Moe", MOE),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK | MLA),
    "gpt_oss": (
        "GptOss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "layer_types": ["full_attention"] * 2},
    ),
    "granitemoe": ("GraniteMoe", {"num_local_experts": 4}),
}


@pytest.mark.parametrize("case", STACKED)
def test_an_adapter_of_stacked_parameters_merges_as_in_memory(case, tmp_path):
    live = model(*STACKED[case])
    live.save_pretrained(tmp_path / "base")
    adapted = trained(live)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "wanted")
    loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    wanted, base, merged = (tensors(tmp_path / n) for n in ("wanted", "base", "out"))
    assert merged.keys() == wanted.keys()
    changed = [n for n in base if not torch.equal(wanted[n], base[n])]
    assert any("expert" in n or "moe" in n for n in changed)
    for name, value in wanted.items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=5e-7)


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("version", ["0.17.1", "0.18.0", None])
def test_factors_in_the_order_of_peft_0_17_and_0_18_are_read_as_such(case, version, tmp_path):
    live = model(*STACKED[case])
    live.save_pretrained(tmp_path / "base")
    # PEFT before 0.19 took (experts, out, in) for (experts, in, out): A is (E r, out), B is (in, r E)
    old, wanted = {}, {n: t.clone() for n, t in live.state_dict().items()}
    generator = torch.Generator().manual_seed(5)
    for owner in [n for n, m in live.named_modules() if n.endswith("mlp.experts")]:
        for nest, parameter in ((".base_layer", "gate_up_proj"), ("", "down_proj")):
            experts, first, second = wanted[f"{owner}.{parameter}"].shape
            down = torch.randn(experts * 2, first, generator=generator) * 0.1
            up = torch.randn(second, 2 * experts, generator=generator) * 0.1
            old[f"{owner}{nest}"] = down, up
            delta = torch.einsum(
                "ore,eri->eio", up.double().reshape(second, 2, experts), down.double().reshape(experts, 2, first)
            )
            wanted[f"{owner}.{parameter}"] = (wanted[f"{owner}.{parameter}"].double() + 2.5 * delta).float()
    config = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": []}
    if version:
        config["peft_version"] = version
    write_adapter(tmp_path / "adapter", old, r=2, **config)
    loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    merged = type(live).from_pretrained(tmp_path / "out").state_dict()
    for name, value in wanted.items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=5e-7)


@pytest.mark.parametrize("case", STACKED)
def test_a_fine_tune_of_experts_is_extracted_and_loads_in_peft(case, tmp_path):
    live = model(*STACKED[case])
    live.save_pretrained(tmp_path / "base")
    adapted = trained(live)
    adapted.merge_and_unload().save_pretrained(tmp_path / "tuned")
    loratool.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "adapter", rank=4)
    loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "again")
    wanted, found = tensors(tmp_path / "tuned"), tensors(tmp_path / "again")
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-6)


@pytest.mark.parametrize("case", STACKED)
def test_a_resized_stack_is_read_by_peft(case, tmp_path):
    live = model(*STACKED[case])
    live.save_pretrained(tmp_path / "base")
    adapted = trained(live, rank=3)
    adapted.save_pretrained(tmp_path / "adapter")
    wanted = {n: t.clone() for n, t in adapted.merge_and_unload().state_dict().items()}
    loratool.resize(tmp_path / "adapter", tmp_path / "resized", energy=1.0)  # all of it: other factors, one product
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(model(*STACKED[case]), tmp_path / "resized").merge_and_unload()
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("case", ["gpt_oss", "mixtral"])
def test_only_the_experts_that_changed_are_extracted_and_the_others_stay(case, tmp_path):
    live = model(*STACKED[case])
    live.save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        stack = next(p for n, p in live.named_parameters() if n.endswith("experts.down_proj"))
        stack[2] += torch.randn(stack.shape[1], 2, generator=generator) @ torch.randn(
            2, stack.shape[2], generator=generator
        )
    live.save_pretrained(tmp_path / "tuned")
    report = loratool.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "adapter", rank=2)
    assert report.totals["changed"] == 1
    loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "again")
    wanted, found = tensors(tmp_path / "tuned"), tensors(tmp_path / "again")
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", ["gpt_oss", "mixtral"])
def test_an_adapter_for_fewer_experts_than_the_base_has_is_refused(case, tmp_path):
    trained(model(*STACKED[case])).save_pretrained(tmp_path / "adapter")
    name, settings = STACKED[case]
    model(name, settings | {"num_local_experts": 6}).save_pretrained(tmp_path / "base")
    with pytest.raises(MismatchError, match="the adapter has 4 experts, the base has more"):
        loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["gpt_oss", "mixtral"])
def test_a_resized_part_of_a_stack_leaves_the_other_experts_alone(case, tmp_path):
    live = model(*STACKED[case])
    live.save_pretrained(tmp_path / "base")
    trained(live, rank=3).save_pretrained(tmp_path / "adapter")
    pattern = "down_proj[1]" if case == "gpt_oss" else "experts.1.w2"
    family = case.replace("_", "-")  # a stack in memory has one name in many families, its experts have several
    loratool.resize(tmp_path / "adapter", tmp_path / "one", rank=3, target=[pattern], arch=family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(model(*STACKED[case]), tmp_path / "one").merge_and_unload().state_dict()
        whole = peft.PeftModel.from_pretrained(model(*STACKED[case]), tmp_path / "adapter").merge_and_unload()
    base = model(*STACKED[case]).state_dict()
    for name, value in whole.state_dict().items():
        wanted = base[name].clone()
        if name.endswith("experts.down_proj"):
            wanted[1] = value[1]
        torch.testing.assert_close(again[name], wanted, rtol=0, atol=2e-6)


def test_experts_of_different_alphas_keep_them_in_their_own_spelling_and_are_refused_as_a_stack(tmp_path):
    live = model(*STACKED["gpt_oss"])
    live.save_pretrained(tmp_path / "base")
    factors = {f"model.layers.0.mlp.experts.{e}.down_proj": (torch.randn(2, 48), torch.randn(32, 2)) for e in range(4)}
    pattern = {"alpha_pattern": {r"^model\.layers\.0\.mlp\.experts\.1\.down_proj": 20}}
    write_adapter(tmp_path / "adapter", factors, r=2, **pattern)
    loratool.convert(tmp_path / "adapter", tmp_path / "same", to="peft", arch="gpt-oss")
    for name in ("adapter", "same"):
        loratool.merge(tmp_path / "base", [tmp_path / name], tmp_path / f"out-{name}")
    assert all(torch.equal(t, tensors(tmp_path / "out-same")[n]) for n, t in tensors(tmp_path / "out-adapter").items())
    with pytest.raises(LoratoolError, match="has no name for it"):
        loratool.convert(tmp_path / "adapter", tmp_path / "k.safetensors", to="kohya", arch="gpt-oss")


def test_a_split_and_a_fused_spelling_of_one_update_are_equal(tmp_path):
    torch.manual_seed(1)
    down, ups = torch.randn(3, 32), [torch.randn(32, 3) for _ in range(3)]
    attention = "model.layers.0.self_attn"
    write_adapter(tmp_path / "fused", {f"{attention}.W_pack": (down, torch.cat(ups))})
    write_adapter(tmp_path / "split", {f"{attention}.{n}_proj": (down, up) for n, up in zip("qkv", ups, strict=True)})
    report = loratool.compare(tmp_path / "fused", tmp_path / "split", arch="baichuan")
    assert report.totals["distance"] < 1e-6
    write_adapter(tmp_path / "other", {f"{attention}.{n}_proj": (down, up) for n, up in zip("qvk", ups, strict=True)})
    assert loratool.compare(tmp_path / "fused", tmp_path / "other", arch="baichuan").totals["distance"] > 0.1


#: all experts of a layer in one 2-D parameter: slabs of rows
DBRX = {
    "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 12, "moe_num_experts": 4},
    "max_seq_len": 64,
}
OTHERS = {"phimoe": ("Phimoe", {"num_local_experts": 4}), "dbrx": ("Dbrx", DBRX)}


@pytest.mark.parametrize("case", [*LOST, "gpt_oss", "granitemoe", *OTHERS])
def test_what_is_extracted_has_its_whole_effect_in_peft(case, tmp_path):
    """Every matrix of the model changes by rank 2; PEFT applies the extracted adapter to the base in memory."""
    spec = (LOST | STACKED | OTHERS)[case]
    live = model(*spec)
    live.save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, p in live.named_parameters():
            if p.ndim > 1 and "embed_tokens" not in name and "lm_head" not in name and "bias" not in name:
                left = torch.randn(*p.shape[:-1], 2, generator=generator)
                p.add_(0.1 * left @ torch.randn(*p.shape[:-2], 2, p.shape[-1], generator=generator))
    live.save_pretrained(tmp_path / "tuned")
    loratool.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "adapter", rank=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.PeftModel.from_pretrained(model(*spec), tmp_path / "adapter").merge_and_unload()
    found = adapted.state_dict()
    for name, value in live.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=5e-6)


def old_stack(folder: Path, live, square: bool, **config):
    """Write an adapter in the order of PEFT 0.18, and return its update of down_proj in the first layer, (out, in)."""
    generator = torch.Generator().manual_seed(5)
    shapes = {n.rpartition(".")[2]: p.shape for n, p in live.named_parameters() if p.ndim == 3}
    experts, out, inner = shapes["down_proj"]
    assert square == (out == inner)
    down, up = torch.randn(experts * 2, out, generator=generator), torch.randn(inner, 2 * experts, generator=generator)
    names = {"target_parameters": ["experts.down_proj"], "target_modules": []}
    write_adapter(folder, {"model.layers.0.mlp.experts": (down, up)}, r=2, **names, **config)
    delta = torch.einsum("ore,eri->eio", up.double().reshape(inner, 2, experts), down.double().reshape(experts, 2, out))
    return 2.5 * delta


@pytest.mark.parametrize("square", [True, False])
def test_an_old_stack_of_an_unknown_family_is_not_resized_in_the_wrong_order(square, tmp_path):
    live = model("Qwen3Moe", MOE | {"moe_intermediate_size": 32 if square else 20})
    live.save_pretrained(tmp_path / "base")
    delta = old_stack(tmp_path / "adapter", live, square, peft_version="0.18.0")
    with pytest.raises(MismatchError, match=r"before PEFT 0\.19 or after"):  # other families hold (experts, in, out)
        loratool.resize(tmp_path / "adapter", tmp_path / "guessed", rank=2)
    loratool.resize(tmp_path / "adapter", tmp_path / "resized", rank=2, arch="qwen3-moe")
    loratool.merge(tmp_path / "base", [tmp_path / "resized"], tmp_path / "out")
    merged, base = tensors(tmp_path / "out"), tensors(tmp_path / "base")
    for e in range(4):
        name = f"model.layers.0.mlp.experts.{e}.down_proj.weight"
        torch.testing.assert_close(merged[name].double(), base[name].double() + delta[e], rtol=0, atol=1e-5)


def test_half_of_an_expert_s_matrix_can_be_left_out(tmp_path):
    live = model(*STACKED["qwen3_moe"])
    live.save_pretrained(tmp_path / "base")
    trained(live).save_pretrained(tmp_path / "adapter")
    base = tensors(tmp_path / "base")
    loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "whole")
    report = loratool.merge(
        tmp_path / "base", [tmp_path / "adapter"], tmp_path / "half", target=["experts.{e}.gate_proj"]
    )
    whole, half = tensors(tmp_path / "whole"), tensors(tmp_path / "half")
    for name, weight in base.items():
        wanted = whole[name] if name.endswith("gate_proj.weight") else weight
        assert torch.equal(half[name], wanted), name
    fates = report.ledger[str(tmp_path / "adapter")]
    assert fates["computed in part"] == 4  # both factors of gate_up_proj in both layers; the rest was left out
    assert sum(fates.values()) == len(load_file(tmp_path / "adapter/adapter_model.safetensors"))


def test_an_adapter_whose_alphas_differ_converts_to_its_own_format_unchanged(tmp_path):
    factors = {f"model.layers.0.mlp.experts.{e}.down_proj": (torch.randn(2, 48), torch.randn(32, 2)) for e in range(4)}
    write_adapter(tmp_path / "adapter", factors, r=2)
    loratool.convert(tmp_path / "adapter", tmp_path / "same", to="peft")
    before, after = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("adapter", "same"))
    assert before.keys() == after.keys()
    assert json.loads((tmp_path / "same/adapter_config.json").read_text()).get("target_parameters") is None
