"""Several adapters on one model: each dW is taken of the original weight and they add up, whatever the order.

PEFT merges one after another. Where a dW does not depend on the weight that is the same; where it does (DoRA, IA3, OFT,
BOFT) PEFT's result is another one, and with DoRA it depends on the order.
"""

import copy
import itertools

import pytest
import torch
from parity import (
    adapted,
    assert_rounded_once,
    build,
    changed,
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
    PeftModel,
    TrainableTokensConfig,
    VeraConfig,
)

from loratool.api import Applied
from loratool.errors import MismatchError

ZERO, ONE = {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}
TOKENS = [{"trainable_token_indices": {"emb": [0, 1, 2]}}, {"trainable_token_indices": {"emb": [3, 29, 5, 6]}}]
BLOCKS = {"r": 0, "oft_block_size": 5}
# model, config class, settings of each adapter; "adds" where dW does not depend on the weight
ADDS = {
    "lora, same": ("mlp", LoraConfig, [ZERO, ZERO]),
    "lora, different": ("mlp", LoraConfig, [ZERO, ONE]),
    "lora, other ranks and scales": (
        "mlp",
        LoraConfig,
        [{**ZERO, "r": 2, "lora_alpha": 7}, {"target_modules": ["lin0", "lin1"], "r": 5, "use_rslora": True}],
    ),
    "lora of convolutions": (
        "conv2d",
        LoraConfig,
        [{"target_modules": ["conv2d", "lin0"]}, {"target_modules": ["conv2d"]}],
    ),
    "lora of embeddings": (
        "embedding",
        LoraConfig,
        [{"target_modules": ["emb"]}, {"target_modules": ["emb", "conv1d"]}],
    ),
    "lora and tokens, same": ("embedding", LoraConfig, [ZERO | TOKENS[0], ZERO | TOKENS[1]]),
    "lora and tokens, different": (
        "embedding",
        LoraConfig,
        [ZERO | TOKENS[0], {"target_modules": ["conv1d"]} | TOKENS[1]],
    ),
    "parameters, same": (
        "parameters",
        LoraConfig,
        [{"target_parameters": ["lin0.weight"]}, {"target_parameters": ["lin0.weight"]}],
    ),
    "lora_bias": ("mlp", LoraConfig, [{**ZERO, "lora_bias": True}, {**ZERO, "lora_bias": True, "lora_alpha": 3}]),
    "adalora, same": (
        "mlp",
        AdaLoraConfig,
        [{**ZERO, "total_step": 1}, {**ZERO, "total_step": 1, "inference_mode": True}],
    ),
    "adalora, different": (
        "mlp",
        AdaLoraConfig,
        [{**ZERO, "total_step": 1}, {**ONE, "total_step": 1, "inference_mode": True}],
    ),
    "loha, same": ("mlp", LoHaConfig, [ZERO, {**ZERO, "alpha": 4}]),
    "loha, different": ("mlp", LoHaConfig, [ZERO, ONE]),
    "lokr, same": ("mlp", LoKrConfig, [{**ZERO, "r": 2}, {**ZERO, "r": 2}]),
    "lokr, different": ("mlp", LoKrConfig, [ZERO, ONE]),
    "vera, same": ("mlp", VeraConfig, [{**ZERO, "r": 4}, {**ZERO, "r": 4}]),
    "ia3, different": (
        "mlp",
        IA3Config,
        [{**ZERO, "feedforward_modules": ["lin0"]}, {**ONE, "feedforward_modules": []}],
    ),
    "oft, different": ("mlp", OFTConfig, [ZERO | BLOCKS, ONE | BLOCKS]),
    "boft, different": ("mlp", BOFTConfig, [{**ZERO, "boft_block_size": 2}, {**ONE, "boft_block_size": 2}]),
    "dora, different": ("mlp", LoraConfig, [{**ZERO, "use_dora": True}, {**ONE, "use_dora": True}]),
    "tokens": (
        "embedding",
        TrainableTokensConfig,
        [{"target_modules": ["emb"], "token_indices": [0, 1]}, {"target_modules": ["emb"], "token_indices": [2, 9]}],
    ),
}
APART = {  # PEFT wants the same target parameters of all
    "parameters, different": (
        "parameters",
        LoraConfig,
        [{"target_parameters": ["lin0.weight"]}, {"target_parameters": ["lin1.weight"], "r": 3}],
    ),
}
MULTIPLIES = {
    "ia3, same": (
        "mlp",
        IA3Config,
        [{**ZERO, "feedforward_modules": ["lin0"]}, {**ZERO, "feedforward_modules": ["lin0"]}],
    ),
    "ia3, inputs and outputs": (
        "mlp",
        IA3Config,
        [{**ONE, "feedforward_modules": []}, {**ONE, "feedforward_modules": ["lin1"]}],
    ),
    "oft, same": ("mlp", OFTConfig, [ZERO | BLOCKS, ZERO | BLOCKS]),
    "boft, same": ("mlp", BOFTConfig, [{**ZERO, "boft_block_size": 2}, {**ZERO, "boft_block_size": 2}]),
    "dora, same": ("mlp", LoraConfig, [{**ZERO, "use_dora": True}, {**ZERO, "use_dora": True, "lora_alpha": 20}]),
    "dora of a convolution": ("conv2d", LoraConfig, [{"target_modules": ["conv2d"], "use_dora": True}] * 2),
    "dora of an embedding": ("embedding", LoraConfig, [{"target_modules": ["emb"], "use_dora": True}] * 2),
}


def trained(kind, config, settings, place):
    """A base, its tensors in fp64, the folders of the adapters, and the fp64 dW of each by PEFT's own merge of it."""
    base = save_plain(build(kind), place / "base")
    before = {n: t.double() for n, t in build(kind).state_dict().items()}
    folders, deltas = [], []
    for n, setting in enumerate(settings):
        live = adapted(build(kind), config(**setting), seed=n + 1)
        folders.append(save_adapter(live, place / f"adapter-{n}"))
        exact = merged_by_peft(live)
        deltas.append({name: exact[name] - before[name] for name in before})
    return base, before, folders, deltas


def summed(before, deltas, weights):
    return {n: w + sum(s * d[n] for s, d in zip(weights, deltas, strict=True)) for n, w in before.items()}


def merged_in_turn(kind, folders):
    """PEFT's merge of several adapters that are active at once, in fp64."""
    with quiet():
        live = PeftModel.from_pretrained(build(kind), folders[0], adapter_name="0")
        for n, folder in enumerate(folders[1:], 1):
            live.load_adapter(folder, str(n))
        names = [str(n) for n in range(len(folders))]
        return copy.deepcopy(live).double().merge_and_unload(adapter_names=names).state_dict()


@pytest.mark.parametrize("case", ADDS)
def test_adapters_add_up_as_in_peft(case, tmp_path):
    kind, config, settings = ADDS[case]
    base, before, folders, deltas = trained(kind, config, settings, tmp_path)
    exact = summed(before, deltas, [1, 1])
    got = merge(base, folders, tmp_path / "out", compute_dtype="float64")
    assert_rounded_once(got, exact)
    theirs = merged_in_turn(kind, folders)
    for name, value in exact.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("case", [*ADDS, *APART, *MULTIPLIES])
def test_weights_multiply_each_update_and_the_order_never_matters(case, tmp_path):
    kind, config, settings = (ADDS | APART | MULTIPLIES)[case]
    base, before, folders, deltas = trained(kind, config, settings, tmp_path)
    weights = [0.7, -0.4]
    got = merge(base, folders, tmp_path / "out", weights=weights, compute_dtype="float64")
    assert_rounded_once(got, summed(before, deltas, weights))
    merge(base, folders, tmp_path / "one-way", weights=weights)
    merge(base, folders[::-1], tmp_path / "the-other", weights=weights[::-1])
    one, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one-way", "the-other"))
    assert one == other


@pytest.mark.parametrize("case", [c for c in MULTIPLIES if c != "ia3, inputs and outputs"])  # PEFT has no such model
def test_updates_of_the_weight_itself_add_up_where_peft_applies_one_to_the_other_s_result(case, tmp_path):
    kind, config, settings = MULTIPLIES[case]
    base, before, folders, deltas = trained(kind, config, settings, tmp_path)
    exact = summed(before, deltas, [1, 1])
    assert_rounded_once(merge(base, folders, tmp_path / "out", compute_dtype="float64"), exact)
    theirs = merged_in_turn(kind, folders)
    assert max(float((theirs[n] - exact[n]).abs().max()) for n in exact) > 1e-3


def test_several_dora_adapters_of_one_weight_are_a_sum_and_peft_s_result_depends_on_the_order(tmp_path):
    """Ours: W + sum of f_i(W) - W, where f_i(W) = m_i (W + d_i) / |W + d_i|. PEFT applies f_2 to what f_1 made of W."""
    settings = [{**ZERO, "use_dora": True, "lora_alpha": 8 * (n + 1)} for n in range(3)]
    base, before, folders, _ = trained("mlp", LoraConfig, settings, tmp_path)
    W = before["lin0.weight"]
    total = W.clone()
    for n, setting in enumerate(settings):
        live = adapted(build("mlp"), LoraConfig(**setting), seed=n + 1)
        layer = live.base_model.model.lin0
        A, B = (getattr(layer, f"lora_{f}")["default"].weight.detach().double() for f in "AB")
        moved = W + setting["lora_alpha"] / 8 * B @ A
        magnitude = layer.lora_magnitude_vector["default"].weight.detach().double()
        total += magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True) - W
    files = set()
    for n, order in enumerate(itertools.permutations(folders)):
        got = merge(base, list(order), tmp_path / f"out-{n}", compute_dtype="float64")
        assert_rounded_once(got, before | {"lin0.weight": total})
        files.add((tmp_path / f"out-{n}/model.safetensors").read_bytes())
    assert len(files) == 1
    theirs = [merged_in_turn("mlp", order)["lin0.weight"] for order in (folders, folders[::-1])]
    assert float((theirs[0] - theirs[1]).abs().max()) > 0.01
    assert all(float((t - total).abs().max()) > 0.01 for t in theirs)


def test_kinds_of_all_sorts_on_one_weight_add_up(tmp_path):
    kinds = {
        "lora": LoraConfig(**ZERO, lora_alpha=3),
        "dora": LoraConfig(**ZERO, use_dora=True),
        "loha": LoHaConfig(**ZERO),
        "lokr": LoKrConfig(**ZERO, r=2),
        "vera": VeraConfig(**ZERO, r=4),
        "oft": OFTConfig(**ZERO, **BLOCKS),
        "boft": BOFTConfig(**ZERO, boft_block_size=2),
        "ia3": IA3Config(**ZERO, feedforward_modules=["lin0"]),
        "adalora": AdaLoraConfig(**ZERO, total_step=1),
    }
    base = save_plain(build("mlp"), tmp_path / "base")
    before = {n: t.double() for n, t in build("mlp").state_dict().items()}
    folders, exact = [], dict(before)
    for n, (name, config) in enumerate(kinds.items()):
        live = adapted(build("mlp"), config, seed=n)
        folders.append(save_adapter(live, tmp_path / name))
        merged = merged_by_peft(live)
        assert changed(before, merged)
        exact = {tensor: value + merged[tensor] - before[tensor] for tensor, value in exact.items()}
    got = merge(base, folders, tmp_path / "out", compute_dtype="float64")
    assert_rounded_once(got, exact)
    merge(base, folders, tmp_path / "one-way")
    merge(base, folders[::-1], tmp_path / "the-other")
    one, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one-way", "the-other"))
    assert one == other


def test_each_adapter_has_modules_and_strengths_of_its_own(tmp_path):
    both = {"target_modules": ["lin0", "lin1"]}
    base, before, folders, deltas = trained("mlp", LoraConfig, [both, {**both, "use_dora": True}], tmp_path)
    applied = [
        Applied(folders[0], 0.5, exclude=["lin1"]),
        Applied(folders[1], 2.0, scales={"lin0": 0.25, "lin1": -1.0}),
    ]
    got = merge(base, applied, tmp_path / "out", weights=[3, 1], compute_dtype="float64")
    exact = dict(before)
    exact["lin0.weight"] = before["lin0.weight"] + 1.5 * deltas[0]["lin0.weight"] + 0.5 * deltas[1]["lin0.weight"]
    exact["lin1.weight"] = before["lin1.weight"] - 2 * deltas[1]["lin1.weight"]
    assert_rounded_once(got, exact)


def test_the_same_tokens_or_the_same_module_in_full_from_two_adapters_are_refused(tmp_path):
    tokens = [{"target_modules": ["emb"], "token_indices": rows} for rows in ([0, 1], [1, 2])]
    base, _, folders, _ = trained("embedding", TrainableTokensConfig, tokens, tmp_path)
    with pytest.raises(MismatchError, match="the same tokens"):
        merge(base, folders, tmp_path / "out")
    full = {**ZERO, "modules_to_save": ["lin1"]}
    (tmp_path / "full").mkdir()
    base, _, folders, _ = trained("mlp", LoraConfig, [full, full], tmp_path / "full")
    with pytest.raises(MismatchError, match="in full"):
        merge(base, folders, tmp_path / "out")
    (tmp_path / "rows").mkdir()
    own = {"target_modules": ["lin0"], "modules_to_save": ["emb"]}
    _, _, whole, _ = trained("embedding", LoraConfig, [own], tmp_path / "rows")
    base, _, folders, _ = trained("embedding", TrainableTokensConfig, tokens[:1], tmp_path / "full" / "base")
    with pytest.raises(MismatchError, match="in full"):
        merge(base, [*folders, *whole], tmp_path / "out")
