"""Every configuration of PEFT's custom-model tests, of the types that merge knows: ours from files, PEFT's in memory.

The models are plain torch modules without a config, so that no family helps: names and shapes are all there is.
"""

import pytest
import torch
from parity import (
    adapted,
    assert_merges_alike,
    assert_rounded_once,
    build,
    changed,
    inputs,
    merge,
    merged_by_peft,
    quiet,
    save_adapter,
    save_plain,
)
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    TrainableTokensConfig,
    VeraConfig,
)
from peft.tuners.lora import MontecloraConfig
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, VeloraConfig

from loratool.errors import InputError, LoratoolError

ZERO = ["lin0"]
BOTH = ["lin0", "lin1"]
CONV2D, CONV2D_LIN = ["conv2d"], ["conv2d", "lin0"]
CONV3D, CONV3D_LIN = ["conv3d"], ["conv3d", "lin0"]

LORA = {
    "a name": ("mlp", {"target_modules": "lin0"}),
    "one": ("mlp", {"target_modules": ZERO}),
    "the other": ("mlp", {"target_modules": ["lin1"]}),
    "both": ("mlp", {"target_modules": BOTH}),
    "modules_to_save": ("mlp", {"target_modules": ZERO, "modules_to_save": ["lin1"]}),
    "alpha and dropout": ("mlp", {"target_modules": ZERO, "lora_alpha": 4, "lora_dropout": 0.1}),
    "rslora": ("mlp", {"target_modules": BOTH, "use_rslora": True, "lora_alpha": 5}),
    "patterns": (
        "mlp",
        {"target_modules": BOTH, "rank_pattern": {"lin1": 3, ".*0": 5}, "alpha_pattern": {"^lin0": 2.5}},
    ),
    "rslora and patterns": (
        "embedding",
        {"target_modules": ["emb", "conv1d", "lin0"], "use_rslora": True, "rank_pattern": {"conv1d": 2, "emb": 3}},
    ),
    "bias all": ("mlp", {"target_modules": ZERO, "bias": "all"}),
    "bias lora_only": ("mlp", {"target_modules": ["lin1"], "bias": "lora_only"}),
    "bias of a convolution": ("conv2d", {"target_modules": CONV2D, "bias": "lora_only"}),
    "lora_bias": ("mlp", {"target_modules": BOTH, "lora_bias": True, "lora_alpha": 32}),
    "lora_bias and rslora": ("mlp", {"target_modules": BOTH, "lora_bias": True, "use_rslora": True, "r": 3}),
    "lora_bias 2d": ("conv2d", {"target_modules": CONV2D, "lora_bias": True, "lora_alpha": 32}),
    "lora_bias 3d": ("conv3d", {"target_modules": CONV3D, "lora_bias": True, "lora_alpha": 32}),
    "dora": ("mlp", {"target_modules": ZERO, "use_dora": True}),
    "dora both": ("mlp", {"target_modules": BOTH, "use_dora": True}),
    "dora alpha": ("mlp", {"target_modules": "lin1", "use_dora": True, "lora_alpha": 32}),
    "dora rslora patterns": (
        "mlp",
        {"target_modules": BOTH, "use_dora": True, "use_rslora": True, "rank_pattern": {"lin1": 2}},
    ),
    "dora modules_to_save bias": (
        "mlp",
        {"target_modules": ZERO, "use_dora": True, "modules_to_save": ["lin1"], "bias": "lora_only"},
    ),
    "conv1D": ("embedding", {"target_modules": ["conv1d"]}),
    "embedding": ("embedding", {"target_modules": ["emb"]}),
    "embedding and conv1D": ("embedding", {"target_modules": ["emb", "conv1d"]}),
    "dora conv1D": ("embedding", {"target_modules": ["conv1d"], "use_dora": True}),
    "dora embedding": ("embedding", {"target_modules": ["emb"], "use_dora": True}),
    "dora embedding and conv1D": ("embedding", {"target_modules": ["emb", "conv1d"], "use_dora": True}),
    "tokens beside": ("embedding", {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [0, 10]}}),
    "tokens out of order": ("embedding", {"target_modules": ["lin0"], "trainable_token_indices": {"emb": [29, 3]}}),
    "conv1d": ("conv1d", {"target_modules": ["conv1d"]}),
    "dora conv1d": ("conv1d", {"target_modules": ["conv1d"], "use_dora": True}),
    "conv1d of one": ("conv1d-1", {"target_modules": ["conv1d", "lin0"]}),
    "dora conv1d of one": ("conv1d-1", {"target_modules": ["conv1d"], "use_dora": True}),
    "conv2d": ("conv2d", {"target_modules": CONV2D}),
    "conv2d and linear": ("conv2d", {"target_modules": CONV2D_LIN, "use_rslora": True}),
    "dora conv2d": ("conv2d", {"target_modules": CONV2D, "use_dora": True}),
    "dora conv2d and linear": ("conv2d", {"target_modules": CONV2D_LIN, "use_dora": True}),
    "conv2d of one": ("conv2d-1", {"target_modules": CONV2D_LIN}),
    "dora conv2d of one": ("conv2d-1", {"target_modules": CONV2D, "use_dora": True}),
    "conv3d": ("conv3d", {"target_modules": CONV3D}),
    "conv3d and linear": ("conv3d", {"target_modules": CONV3D_LIN}),
    "dora conv3d": ("conv3d", {"target_modules": CONV3D, "use_dora": True}),
    "dora conv3d and linear": ("conv3d", {"target_modules": CONV3D_LIN, "use_dora": True}),
    "attention": ("attention", {"target_modules": ["mha"]}),
    "attention and linear": ("attention", {"target_modules": ["mha", "lin0"], "lora_alpha": 3}),
    "attention with patterns": (
        "attention",
        {"target_modules": ["mha", "lin0"], "rank_pattern": {"mha": 3, "out_proj": 5}, "alpha_pattern": {"mha": 32}},
    ),
    "parameter": ("parameters", {"target_parameters": ["lin0.weight"]}),
    "parameters": ("parameters", {"target_parameters": ["lin0.weight", "lin1.weight"], "lora_alpha": 3}),
    "parameter and module": ("mlp", {"target_modules": ZERO, "target_parameters": ["lin1.weight"]}),
    "mica": ("mlp", {"target_modules": ZERO, "init_lora_weights": "mica", "r": 4}),
    "orthogonal": ("mlp", {"target_modules": BOTH, "init_lora_weights": "orthogonal", "r": 4}),
    "velora": ("mlp", {"target_modules": ZERO, "velora_config": VeloraConfig(num_groups=2, init_type="random")}),
    "montecLoRA": ("mlp", {"target_modules": ZERO, "monteclora_config": MontecloraConfig(num_samples=2)}),
}
IA3 = {
    "outputs": ("mlp", ZERO, []),
    "inputs": ("mlp", ZERO, ZERO),
    "inputs by an expression": ("mlp", "lin0", "lin0"),
    "outputs of the last": ("mlp", ["lin1"], []),
    "inputs of the last": ("mlp", ["lin1"], ["lin1"]),
    "outputs of both": ("mlp", BOTH, []),
    "inputs of both": ("mlp", BOTH, BOTH),
    "one of each": ("mlp", BOTH, ["lin1"]),
    "conv1D inputs": ("embedding", ["conv1d"], ["conv1d"]),
    "conv1D outputs": ("embedding", ["conv1d"], []),
    "conv1D and linear": ("embedding", ["conv1d", "lin0"], ["conv1d", "lin0"]),
    "conv2d outputs": ("conv2d", CONV2D, []),
    "conv2d inputs": ("conv2d", CONV2D, CONV2D),
    "conv2d and linear outputs": ("conv2d", CONV2D_LIN, []),
    "conv2d inputs, linear outputs": ("conv2d", CONV2D_LIN, CONV2D),
    "conv2d and linear inputs": ("conv2d", CONV2D_LIN, CONV2D_LIN),
    "conv3d outputs": ("conv3d", CONV3D, []),
    "conv3d inputs": ("conv3d", CONV3D, CONV3D),
    "conv3d and linear outputs": ("conv3d", CONV3D_LIN, []),
    "conv3d inputs, linear outputs": ("conv3d", CONV3D_LIN, CONV3D),
    "conv3d and linear inputs": ("conv3d", CONV3D_LIN, CONV3D_LIN),
}
LOHA = {
    "a name": ("mlp", {"target_modules": "lin0"}),
    "both": ("mlp", {"target_modules": BOTH, "alpha": 4, "module_dropout": 0.1, "rank_dropout": 0.5}),
    "modules_to_save": ("mlp", {"target_modules": ZERO, "modules_to_save": ["lin1"]}),
    "patterns": ("mlp", {"target_modules": BOTH, "rank_pattern": {"lin1": 2}, "alpha_pattern": {"lin0": 3}}),
    "conv2d": ("conv2d", {"target_modules": CONV2D_LIN}),
    "conv2d with cores": ("conv2d", {"target_modules": CONV2D_LIN, "use_effective_conv2d": True}),
    "conv2d of one": ("conv2d-1", {"target_modules": CONV2D, "use_effective_conv2d": True}),
    "conv2d in groups": ("conv2d-groups", {"target_modules": CONV2D}),
    "conv1d": ("conv1d", {"target_modules": ["conv1d"], "r": 2}),
    "conv1d flat": ("conv1d-wide", {"target_modules": ["conv1d"], "r": 2, "use_effective_conv2d": False}),
    "conv1d with cores": ("conv1d-wide", {"target_modules": ["conv1d"], "r": 2, "use_effective_conv2d": True}),
    "conv1d in groups": ("conv1d-groups", {"target_modules": ["conv1d"], "r": 4}),
}
LOKR = {
    **{
        f"both={both} factor={factor}": (
            "mlp",
            {"r": 1, "alpha": 3, "decompose_both": both, "decompose_factor": factor},
        )
        for both in (False, True)
        for factor in (-1, 2, 4, 5)
    },
    "whole": ("mlp", {"r": 8}),
    "lycoris init": ("mlp", {"r": 2, "init_weights": "lycoris"}),
    "patterns": ("mlp", {"r": 2, "rank_pattern": {"lin1": 1}, "alpha_pattern": {"lin0": 5}}),
    "modules_to_save": ("mlp", {"target_modules": ZERO, "modules_to_save": ["lin1"], "rank_dropout_scale": True}),
    **{
        f"conv2d cores={cores} both={both} factor={factor}": (
            "conv2d-wide",
            {
                "target_modules": CONV2D_LIN,
                "r": 1,
                "use_effective_conv2d": cores,
                "decompose_both": both,
                "decompose_factor": factor,
            },
        )
        for cores in (False, True)
        for both in (False, True)
        for factor in (-1, 4)
    },
    "conv2d whole": ("conv2d", {"target_modules": CONV2D}),
    "conv2d of one": ("conv2d-1", {"target_modules": CONV2D, "use_effective_conv2d": True}),
    "conv2d in groups": ("conv2d-groups", {"target_modules": CONV2D}),
    "conv1d whole": ("conv1d", {"target_modules": ["conv1d"]}),
    "conv1d flat": ("conv1d-wide", {"target_modules": ["conv1d"], "r": 2}),
    "conv1d with cores": ("conv1d-wide", {"target_modules": ["conv1d"], "r": 2, "use_effective_conv2d": True}),
    "conv1d in groups": ("conv1d-groups", {"target_modules": ["conv1d"], "r": 4}),
}
EXACTLY = {"use_cayley_neumann": False}
OFT = {
    "a name": ("mlp", {"r": 2, "oft_block_size": 0, "target_modules": "lin0", **EXACTLY}),
    "modules_to_save": ("mlp", {"r": 2, "oft_block_size": 0, "modules_to_save": ["lin1"], **EXACTLY}),
    "dropout": ("mlp", {"r": 2, "oft_block_size": 0, "module_dropout": 0.1, **EXACTLY}),
    "shared": ("mlp", {"r": 2, "oft_block_size": 0, "block_share": True, **EXACTLY}),
    "shared by a series": ("mlp", {"r": 5, "oft_block_size": 0, "block_share": True}),
    "pairs by a series": ("mlp", {"r": 0, "oft_block_size": 2}),
    "pairs": ("mlp", {"r": 0, "oft_block_size": 2, **EXACTLY}),
    "both": ("mlp", {"r": 0, "oft_block_size": 5, "target_modules": BOTH}),
    **{f"{n} terms": ("mlp", {"r": 0, "oft_block_size": 5, "num_cayley_neumann_terms": n}) for n in range(2, 8)},
    "conv2d": ("conv2d-patch", {"r": 5, "oft_block_size": 0, "target_modules": CONV2D}),
    "conv2d exactly": ("conv2d-patch", {"r": 5, "oft_block_size": 0, "target_modules": CONV2D, **EXACTLY}),
    "conv2d shared": ("conv2d-patch", {"r": 5, "oft_block_size": 0, "target_modules": CONV2D, "block_share": True}),
    "conv2d of one and linear": ("conv2d-1", {"r": 0, "oft_block_size": 5, "target_modules": CONV2D_LIN}),
}
BOFT = {
    "pairs": ("mlp", {"boft_block_size": 2}),
    "modules_to_save": ("mlp", {"boft_block_size": 2, "modules_to_save": ["lin0"]}),
    "dropout": ("mlp", {"boft_block_size": 2, "boft_dropout": 0.1}),
    "two blocks": ("mlp", {"boft_block_size": 0, "boft_block_num": 2, "boft_n_butterfly_factor": 1}),
    "bias": ("mlp", {"boft_block_size": 5, "bias": "all"}),
    "conv2d": ("conv2d", {"target_modules": CONV2D, "boft_block_size": 45}),
    "conv2d one block": ("conv2d", {"target_modules": CONV2D, "boft_block_size": 0, "boft_block_num": 1}),
    "conv2d pairs": ("conv2d-wide", {"target_modules": CONV2D, "boft_block_size": 2}),
}
VERA = {
    "a name": ("mlp", {"target_modules": "lin0", "r": 4}),
    "the other": ("mlp", {"target_modules": ["lin1"], "r": 4}),
    "both": ("mlp", {"target_modules": BOTH, "r": 4}),
    "modules_to_save": ("mlp", {"target_modules": ZERO, "modules_to_save": ["lin1"], "r": 4}),
    "conv1D": ("embedding", {"target_modules": ["conv1d"], "r": 4}),
    "bias": ("mlp", {"target_modules": BOTH, "bias": "vera_only", "r": 4}),
}
ADALORA = {
    "one": ("mlp", {"target_modules": ZERO, "orth_reg_weight": 0}),
    "both": ("mlp", {"target_modules": BOTH, "init_r": 4, "lora_alpha": 8}),
    "conv1D": ("embedding", {"target_modules": ["conv1d"]}),
    "modules_to_save": ("mlp", {"target_modules": ZERO, "modules_to_save": ["lin1"], "bias": "all"}),
    "alpha 0 is the first rank": ("mlp", {"target_modules": ZERO, "lora_alpha": 0, "init_r": 3}),
}
TOKENS = {"own type": ("embedding", {"target_modules": ["emb"], "token_indices": [3, 0, 1]})}


def _targeting(default, settings):
    return {"target_modules": default} | settings


CASES = {
    **{f"lora: {n}": (m, LoraConfig, s) for n, (m, s) in LORA.items()},
    **{f"ia3: {n}": (m, IA3Config, {"target_modules": t, "feedforward_modules": f}) for n, (m, t, f) in IA3.items()},
    "ia3: modules_to_save": (
        "mlp",
        IA3Config,
        {"target_modules": ZERO, "feedforward_modules": ZERO, "modules_to_save": ["lin1"]},
    ),
    "ia3: conv1D and modules_to_save": (
        "embedding",
        IA3Config,
        {"target_modules": ["conv1d"], "feedforward_modules": ["conv1d"], "modules_to_save": ["lin0"]},
    ),
    **{f"loha: {n}": (m, LoHaConfig, s) for n, (m, s) in LOHA.items()},
    **{f"lokr: {n}": (m, LoKrConfig, _targeting(BOTH, s)) for n, (m, s) in LOKR.items()},
    **{f"oft: {n}": (m, OFTConfig, _targeting(ZERO, s)) for n, (m, s) in OFT.items()},
    **{f"boft: {n}": (m, BOFTConfig, _targeting(["lin1"], s)) for n, (m, s) in BOFT.items()},
    **{f"vera: {n}": (m, VeraConfig, s) for n, (m, s) in VERA.items()},
    **{f"adalora: {n}": (m, AdaLoraConfig, {"total_step": 1} | s) for n, (m, s) in ADALORA.items()},
    **{f"tokens: {n}": (m, TrainableTokensConfig, s) for n, (m, s) in TOKENS.items()},
}


@pytest.mark.parametrize("case", CASES)
def test_merge_from_files_is_peft_s_merge_in_memory_rounded_once(case, tmp_path):
    kind, config, settings = CASES[case]
    model = build(kind)
    base = save_plain(model, tmp_path / "base")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    live = adapted(model, config(**settings))
    adapter = save_adapter(live, tmp_path / "adapter")
    exact = merged_by_peft(live)
    assert changed(before, exact)
    got = assert_merges_alike(base, [adapter], exact, tmp_path)
    x = inputs(kind)
    with torch.no_grad():
        plain = build(kind).double()(x)
        wanted = live.double()(x)
        again = build(kind)
        again.load_state_dict(got)
        answer = again.double()(x)
    effect = float((wanted - plain).abs().max())
    assert effect > 1e-4
    assert float((answer - wanted).abs().max()) < 1e-5 * max(effect, float(wanted.abs().max()))


REFUSED = {
    "kasa": ("mlp", LoraConfig, {"target_modules": ZERO, "kasa_config": KasaConfig(), "r": 4}, "kasa_config: KaSA"),
    "bdlora": (
        "mlp",
        LoraConfig,
        {"target_modules": BOTH, "use_bdlora": BdLoraConfig(target_modules_bd_a=["lin0"], match_strict=False)},
        "use_bdlora: block-diagonal",
    ),
    "constrained oft": ("mlp", OFTConfig, {"target_modules": ZERO, "r": 2, "oft_block_size": 0, "coft": True}, "coft"),
    "oft of an embedding": (
        "embedding",
        OFTConfig,
        {"target_modules": ["emb"], "r": 1, "oft_block_size": 0},
        "oft_embedding_R.weight: OFT on embeddings",
    ),
    "vera without its matrices": (
        "mlp",
        VeraConfig,
        {"target_modules": BOTH, "save_projection": False},
        "save_projection=False",
    ),
    "lora on a convolution in groups": ("conv2d-groups", LoraConfig, {"target_modules": CONV2D}, "in 2 groups"),
    "dora on a convolution in groups": (
        "conv2d-groups",
        LoraConfig,
        {"target_modules": CONV2D, "use_dora": True},
        "in 2 groups",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_place_in_a_weight_or_is_not_carried_is_refused_by_name(case, tmp_path):
    kind, config, settings, words = REFUSED[case]
    model = build(kind)
    base = save_plain(model, tmp_path / "base")
    with quiet():
        config = config(**settings)
    adapter = save_adapter(adapted(model, config), tmp_path / "adapter")
    with pytest.raises(LoratoolError, match=words):
        merge(base, [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_peft_refuses_to_merge_lora_on_a_convolution_in_groups_too():
    live = adapted(build("conv2d-groups"), LoraConfig(target_modules=CONV2D))
    with pytest.raises(NotImplementedError, match="groups"):
        live.merge_and_unload()


def test_a_neumann_series_of_one_term_is_no_rotation_at_all(tmp_path):
    model = build("mlp")
    base = save_plain(model, tmp_path / "base")
    live = adapted(model, OFTConfig(target_modules=ZERO, r=0, oft_block_size=5, num_cayley_neumann_terms=1))
    adapter = save_adapter(live, tmp_path / "adapter")
    with pytest.raises(InputError, match="change nothing"):
        merge(base, [adapter], tmp_path / "out")
    got = merge(base, [adapter], tmp_path / "same", allow_noop=True)
    assert_rounded_once(got, merged_by_peft(live))


def test_the_output_of_an_attention_has_its_update_twice_as_peft_trains_it(tmp_path):
    """PEFT 0.21.2 adds s B A of out_proj twice, in every forward pass and in its merge (its pull request 3774)."""
    model = build("attention")
    base = save_plain(model, tmp_path / "base")
    before = {n: t.double() for n, t in model.state_dict().items()}
    live = adapted(model, LoraConfig(target_modules=["mha"], r=2, lora_alpha=3))
    adapter = save_adapter(live, tmp_path / "adapter")
    output = live.base_model.model.mha.base_layer.out_proj
    once = 1.5 * (output.lora_B["default"].weight.double() @ output.lora_A["default"].weight.double())
    name = "mha.out_proj.weight"
    exact = before | {name: before[name] + 2 * once}
    exact["mha.in_proj_weight"] = (
        before["mha.in_proj_weight"] + live.base_model.model.mha.get_delta_weight("default").double()
    )
    torch.testing.assert_close(merged_by_peft(live)[name], exact[name], rtol=0, atol=1e-12)
    got = merge(base, [adapter], tmp_path / "out", compute_dtype="float64")
    assert_rounded_once({name: got[name]}, {name: exact[name]})
    # a PEFT that has mended this writes its version; there the update counts once
    later = save_adapter(live, tmp_path / "later", peft_version="0.22.0")
    got = merge(base, [later], tmp_path / "once", compute_dtype="float64")
    assert_rounded_once({name: got[name]}, {name: before[name] + once})


def test_peft_cannot_merge_a_3d_convolution_whose_kernel_begins_with_ones(tmp_path):
    """Its merge takes the shortcut for 1x1 convolutions and fails (its issue 3768); the update is plain."""
    model = build("conv3d-1")
    base = save_plain(model, tmp_path / "base")
    before = {n: t.double() for n, t in model.state_dict().items()}
    live = adapted(model, LoraConfig(target_modules=CONV3D, r=3, lora_alpha=6))
    adapter = save_adapter(live, tmp_path / "adapter")
    layer = live.base_model.model.conv3d
    up, down = layer.lora_B["default"].weight.double(), layer.lora_A["default"].weight.double()
    with pytest.raises(RuntimeError, match="dimension"):
        live.merge_and_unload()
    delta = 2 * (up.flatten(1) @ down.flatten(1)).reshape(layer.base_layer.weight.shape)
    exact = before | {"conv3d.weight": before["conv3d.weight"] + delta}
    got = assert_merges_alike(base, [adapter], exact, tmp_path)
    again = build("conv3d-1")
    again.load_state_dict(got)
    x = inputs("conv3d-1").float()
    with torch.no_grad():
        torch.testing.assert_close(again(x), live(x), rtol=1e-4, atol=1e-5)


def test_peft_runs_oft_on_a_convolution_otherwise_than_it_merges_it():
    """Where patches overlap, PEFT 0.21.2 adds the rotated inputs up; its merge, and ours, rotate the weight."""
    live = adapted(build("conv2d"), OFTConfig(target_modules=CONV2D, r=5, oft_block_size=0)).double()
    x = inputs("conv2d")
    with torch.no_grad():
        running = live(x)
        merged = live.merge_and_unload()(x)
    assert float((running - merged).abs().max()) > 0.1


def test_peft_cannot_run_lokr_of_rank_one_with_cores_on_a_1d_convolution(tmp_path):
    """Its product fails on a tensor that is not contiguous; the formula is that of rank two."""
    model = build("conv1d-wide")
    base = save_plain(model, tmp_path / "base")
    before = {n: t.double() for n, t in model.state_dict().items()}
    live = adapted(model, LoKrConfig(target_modules=["conv1d"], r=1, alpha=3, use_effective_conv2d=True))
    adapter = save_adapter(live, tmp_path / "adapter")
    with pytest.raises(RuntimeError, match="view size"):
        live.merge_and_unload()
    parts = {n.split(".")[-2]: p.detach().double() for n, p in live.named_parameters() if "lokr_" in n}
    w2 = torch.einsum("ijk,ip,jr->prk", parts["lokr_t2"].squeeze(3), parts["lokr_w2_a"], parts["lokr_w2_b"])
    delta = torch.einsum("ab,pqk->apbqk", parts["lokr_w1"], w2).reshape(16, 64, 2)
    exact = before | {"conv1d.weight": before["conv1d.weight"] + 3 * delta}
    assert_merges_alike(base, [adapter], exact, tmp_path)


@pytest.mark.parametrize("module", ["emb", "lin0"])
def test_trained_tokens_are_the_file_s_rows_to_the_bit(module, tmp_path):
    model = build("embedding")
    base = save_plain(model, tmp_path / "base")
    rows = [2, 0] if module == "lin0" else [7, 29, 0]
    if module == "lin0":  # a head without a bias, as PEFT takes it
        model.lin0.bias = None
        base = save_plain(model, tmp_path / "head")
    live = adapted(model, TrainableTokensConfig(target_modules=[module], token_indices=rows), size=0.37)
    adapter = save_adapter(live, tmp_path / "adapter")
    got = merge(base, [adapter], tmp_path / "out")
    trained = next(p for n, p in live.named_parameters() if "trainable_tokens_delta" in n)
    wanted = dict(build("embedding").state_dict())[f"{module}.weight"].clone()
    wanted[rows] = trained.detach()
    assert torch.equal(got[f"{module}.weight"], wanted)
