"""Adapters that are more than their config: ranks allocated in training, bases changed before it, old files."""

import copy
import json
from pathlib import Path

import pytest
import torch
from parity import (
    adapted,
    assert_merges_alike,
    assert_rounded_once,
    build,
    inputs,
    merge,
    merged_by_peft,
    quiet,
    save_adapter,
    save_plain,
    stirred,
)
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.boft.layer import BOFTLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import loratool
from loratool.errors import MismatchError

BOTH = {"target_modules": ["lin0", "lin1"]}


def doubles(model) -> dict[str, torch.Tensor]:
    return {n: t.double() for n, t in model.state_dict().items()}


# -- AdaLoRA ------------------------------------------------------------------------------------------------------


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {n.removeprefix("base_model.model."): tuple(t.shape) for n, t in tensors.items()}


@pytest.mark.parametrize("steps", [2, 3, 10])
def test_adalora_before_during_and_after_its_rank_allocation(steps, tmp_path):
    model = build("mlp")
    base = save_plain(model, tmp_path / "base")
    config = AdaLoraConfig(**BOTH, init_r=6, target_r=2, tinit=2, tfinal=3, deltaT=1, total_step=10, lora_alpha=9)
    live = adapted(model, config).train()
    optimizer = torch.optim.SGD([p for p in live.parameters() if p.requires_grad], lr=0.05)
    x = inputs("mlp").float()
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        live(x).square().mean().backward()
        optimizer.step()
        live.base_model.update_and_allocate(step)
    live.eval()
    adapter = save_adapter(live, tmp_path / "adapter")
    ranks = {n: s[0] for n, s in shapes(adapter).items() if n.endswith("lora_E")}
    assert sum(ranks.values()) == {2: 12, 3: 8, 10: 4}[steps]
    exact = merged_by_peft(live)
    got = assert_merges_alike(base, [adapter], exact, tmp_path)
    again = build("mlp")
    again.load_state_dict(got)
    with torch.no_grad():
        torch.testing.assert_close(again(x), live(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kept", [{"lin0": [0, 2, 3], "lin1": []}, {"lin0": [1], "lin1": [0, 1, 2, 3]}])
def test_a_module_that_adalora_left_without_a_rank_stays_as_it_is(kept, tmp_path):
    model = build("mlp")
    base = save_plain(model, tmp_path / "base")
    live = adapted(model, AdaLoraConfig(**BOTH, init_r=4, total_step=10, lora_alpha=2))
    pattern = {}
    for name, indices in kept.items():
        mask = torch.tensor([n in indices for n in range(4)])
        layer = getattr(live.base_model.model, name)
        with torch.no_grad():
            layer.lora_E["default"][~mask] = 0
        pattern[f"{name}.lora_E.default"] = mask.tolist()
    exact = merged_by_peft(live)
    live.peft_config["default"].rank_pattern = pattern
    adapter = save_adapter(live, tmp_path / "adapter")
    assert {n: s[0] for n, s in shapes(adapter).items() if n.endswith("lora_E")} == {
        f"{n}.lora_E": len(indices) for n, indices in kept.items()
    }
    assert_merges_alike(base, [adapter], exact, tmp_path)


def test_an_adalora_of_ranks_zero_only_changes_nothing(tmp_path):
    base = save_plain(build("mlp"), tmp_path / "base")
    live = adapted(build("mlp"), AdaLoraConfig(target_modules=["lin0"], init_r=4, total_step=10))
    live.peft_config["default"].rank_pattern = {"lin0.lora_E.default": [False] * 4}
    adapter = save_adapter(live, tmp_path / "adapter")
    with pytest.raises(MismatchError, match="no module is left"):
        merge(base, [adapter], tmp_path / "out")


# -- BOFT ---------------------------------------------------------------------------------------------------------


def butterfly(raw: torch.Tensor) -> torch.Tensor:
    """The rotation that BOFT trains with `factors` of them: P_i C_i P_i^T, the first applied first, by PEFT's order."""
    factors, blocks, size, _ = raw.shape
    total = torch.eye(blocks * size, dtype=torch.float64)
    for n in range(factors):
        order = BOFTLayer.block_butterfly_perm(None, blocks * size, blocks >> n, size // 2, factors - 1)
        P = torch.eye(blocks * size, dtype=torch.float64)[order]
        Q = (raw[n] - raw[n].transpose(1, 2)) / 2
        eye = torch.eye(size, dtype=torch.float64)
        C = torch.block_diag(*((eye - q) @ torch.linalg.inv(eye + q) for q in Q))
        total = P @ C @ P.T @ total
    return total


BUTTERFLIES = {
    "linear, one factor": ("wide", "lin1", (1, 8, 4)),
    "linear, two factors": ("wide", "lin1", (2, 8, 4)),
    "linear, three factors": ("wide", "lin1", (3, 16, 2)),
    "linear, four factors": ("wide", "lin1", (4, 16, 2)),
    "linear, large blocks": ("wide", "lin1", (2, 2, 16)),
    "convolution, two factors": ("conv2d-wide", "conv2d", (2, 36, 2)),
    "convolution, three factors": ("conv2d-wide", "conv2d", (3, 12, 6)),
}


@pytest.mark.parametrize("case", BUTTERFLIES)
def test_boft_with_several_butterfly_factors(case, tmp_path):
    """PEFT runs more than one factor with its CUDA extension only; its own permutations make the reference."""
    kind, module, (factors, blocks, size) = BUTTERFLIES[case]
    base = save_plain(build(kind), tmp_path / "base")
    exact = doubles(build(kind))
    weight = exact[f"{module}.weight"]
    generator = torch.Generator().manual_seed(2)
    R = torch.randn(factors, blocks, size, size, generator=generator) * 0.3
    scale = 1 + torch.randn(weight.shape[0], generator=generator) * 0.1
    (tmp_path / "adapter").mkdir()
    column = scale[:, None] if module == "lin1" else scale[None]
    tensors = {f"base_model.model.{module}.boft_R": R, f"base_model.model.{module}.boft_s": column}
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "adapter/adapter_model.safetensors")
    config = {"boft_block_size": size, "boft_block_num": 0, "boft_n_butterfly_factor": factors, "bias": "none"}
    config |= {"peft_type": "BOFT", "target_modules": [module]}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    turned = (butterfly(R.double()) @ weight.flatten(1).T).T * scale.double()[:, None]
    exact[f"{module}.weight"] = turned.reshape(weight.shape)
    assert_merges_alike(base, [tmp_path / "adapter"], exact, tmp_path)


# -- bases that were changed before training ----------------------------------------------------------------------

STARTS = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa by iteration": {"init_lora_weights": "pissa_niter_4"},
    "pissa rslora": {"init_lora_weights": "pissa", "use_rslora": True, "lora_alpha": 3},
    "pissa patterns": {"init_lora_weights": "pissa", "rank_pattern": {"lin1": 2}, "alpha_pattern": {"lin0": 5}},
    "olora": {"init_lora_weights": "olora"},
    "corda": {"init_lora_weights": "corda"},
    "lora-ga": {"init_lora_weights": "lora_ga", "lora_alpha": 2},
}


def started(model, place, r=4, **settings):
    """A live adapter whose start changed the base, the folder of its start, and then of what training made of it.

    PEFT starts CorDA from activations, LoRA-GA from gradients and LoftQ on a GPU; any product taken off the base stands
    for theirs, and sixteenths for LoftQ's quantised base.
    """
    start = settings["init_lora_weights"]
    measured = start in ("corda", "lora_ga", "loftq")
    config = LoraConfig(**BOTH, r=r, **settings | ({"init_lora_weights": False} if measured else {}))
    with quiet():
        live = get_peft_model(model, config).eval()
    for layer in (live.base_model.model.lin0, live.base_model.model.lin1) if measured else ():
        rest = layer.get_base_layer().weight.data - layer.get_delta_weight("default").detach()
        layer.get_base_layer().weight.data = (rest * 16).round() / 16 if start == "loftq" else rest
    live.peft_config["default"].init_lora_weights = start
    initial = save_adapter(live, place / "initial")
    return stirred(live), initial, save_adapter(live, place / "adapter")


def reference(before, initial, adapter, live):
    """W + s (B A - B0 A0) in fp64, of the tensors in the files and the scalings of the live model."""
    exact = dict(before)
    old, new = (load_file(f / "adapter_model.safetensors") for f in (initial, adapter))
    for module in ("lin0", "lin1"):
        name = f"base_model.model.{module}.lora_"
        products = [t[f"{name}B.weight"].double() @ t[f"{name}A.weight"].double() for t in (new, old)]
        scaling = getattr(live.base_model.model, module).scaling["default"]
        exact[f"{module}.weight"] = before[f"{module}.weight"] + scaling * (products[0] - products[1])
    return exact


@pytest.mark.parametrize("case", STARTS)
def test_an_adapter_of_a_changed_base_is_merged_by_way_of_its_start(case, tmp_path):
    base = save_plain(build("mlp"), tmp_path / "base")
    before = doubles(build("mlp"))
    live, initial, adapter = started(build("mlp"), tmp_path, **STARTS[case])
    with pytest.raises(MismatchError, match="changed the base model before training") as refusal:
        merge(base, [adapter], tmp_path / "refused")
    assert "--init-adapter" in refusal.value.hint
    exact = reference(before, initial, adapter, live)
    got = assert_merges_alike(base, [adapter], exact, tmp_path, init_adapter=initial)
    theirs = merged_by_peft(live)  # of the changed base, which was rounded to fp32
    for name, value in exact.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-6)
    again = build("mlp")
    again.load_state_dict(got)
    x = inputs("mlp").float()
    with torch.no_grad():
        torch.testing.assert_close(again(x), live(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["pissa", "olora", "corda"])
def test_what_peft_converts_from_such_a_start_merges_into_the_same_weights(case, tmp_path):
    base = save_plain(build("mlp"), tmp_path / "base")
    live, initial, adapter = started(build("mlp"), tmp_path, **STARTS[case])
    exact = reference(doubles(build("mlp")), initial, adapter, live)
    with quiet():
        config = json.loads((initial / "adapter_config.json").read_text())  # as PEFT's guide has the start saved
        (initial / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": True}))
        live.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(initial))
    assert json.loads((tmp_path / "plain/adapter_config.json").read_text())["r"] == 8
    got = merge(base, [tmp_path / "plain"], tmp_path / "out", compute_dtype="float64")
    assert_rounded_once(got, exact)


def test_a_loftq_adapter_is_relative_to_its_start_and_the_quantisation_is_named(tmp_path):
    """The live base is quantised; what the training did to it is s (B A - B0 A0), and that is all we take over."""
    base = save_plain(build("mlp"), tmp_path / "base")
    live, initial, adapter = started(build("mlp"), tmp_path, init_lora_weights="loftq")
    exact = reference(doubles(build("mlp")), initial, adapter, live)
    report = loratool.merge(base, [adapter], tmp_path / "out", init_adapter=initial, compute_dtype="float64")
    assert_rounded_once(load_file(tmp_path / "out/model.safetensors"), exact)
    assert any("quantised" in f.what for f in report.findings if f.level == "warning")
    theirs = merged_by_peft(live)
    assert max(float((theirs[n] - exact[n]).abs().max()) for n in exact) > 1e-3


def test_a_start_is_taken_back_of_every_adapter_that_has_one_and_of_no_other(tmp_path):
    base = save_plain(build("mlp"), tmp_path / "base")
    before = doubles(build("mlp"))
    live, initial, adapter = started(build("mlp"), tmp_path, init_lora_weights="pissa")
    plain = adapted(build("mlp"), LoraConfig(**BOTH), seed=5)
    other = save_adapter(plain, tmp_path / "plain")
    one, two = reference(before, initial, adapter, live), merged_by_peft(plain)
    exact = {n: w + 0.5 * (one[n] - w) - 2 * (two[n] - w) for n, w in before.items()}
    applied = [loratool.api.Applied(adapter, 0.5, init_adapter=initial), loratool.api.Applied(other, -2.0)]
    assert_rounded_once(merge(base, applied, tmp_path / "out", compute_dtype="float64"), exact)
    with pytest.raises(MismatchError, match="nothing to take back"):
        merge(base, [other], tmp_path / "refused", init_adapter=initial)


def test_peft_changes_the_base_once_more_when_it_loads_such_an_adapter(tmp_path):
    live, _, adapter = started(build("mlp"), tmp_path, init_lora_weights="pissa_niter_4")
    with quiet():
        again = PeftModel.from_pretrained(build("mlp"), adapter).merge_and_unload().state_dict()
    drift = max(float((again[n].double() - t).abs().max()) for n, t in merged_by_peft(live).items())
    assert drift > 1e-9  # a new random decomposition; the start alone says what was taken off


# -- PEFT 0.1 and 0.2 ---------------------------------------------------------------------------------------------

ENABLED = [[True, False, True], [True, True, True], [False, True, False], [True, False], [False, False, True, True]]


class Merged(nn.Module):
    """PEFT 0.2's MergedLinear: a down for each enabled part, a grouped convolution as up, zeros elsewhere."""

    def __init__(self, down: torch.Tensor, up: torch.Tensor, enabled: list[bool], out: int, scaling: float) -> None:
        super().__init__()
        self.down, self.up, self.enabled, self.out, self.scaling = down, up, enabled, out, scaling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        within = nn.functional.conv1d((x @ self.down.T).T[None], self.up, groups=sum(self.enabled))[0].T
        result = x.new_zeros(len(x), self.out)
        places = torch.tensor(self.enabled).repeat_interleave(self.out // len(self.enabled))
        result[:, places] = within
        return self.scaling * result


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("enabled", ENABLED, ids=str)
def test_grouped_adapters_of_peft_0_1_and_0_2(enabled, transposed, tmp_path):
    out, inp, rank, on = 24, 10, 3, sum(enabled)
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(out, inp) if transposed else nn.Linear(inp, out))
    base = save_plain(model, tmp_path / "base")
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(rank * on, inp, generator=generator)
    B = torch.randn(out // len(enabled) * on, rank, 1, generator=generator)
    (tmp_path / "adapter").mkdir()
    tensors = {"base_model.model.0.lora_A.weight": A, "base_model.model.0.lora_B.weight": B}
    save_file(tensors, tmp_path / "adapter/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "enable_lora": enabled, "fan_in_fan_out": transposed}
    config |= {"merge_weights": False, "bias": "none", "modules_to_save": None, "target_modules": ["0"]}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    delta = Merged(A.double(), B.double(), enabled, out, 8 / rank)(torch.eye(inp, dtype=torch.float64))  # (in, out)
    exact = doubles(copy.deepcopy(model))
    exact["0.weight"] += delta if transposed else delta.T
    assert_merges_alike(base, [tmp_path / "adapter"], exact, tmp_path)
