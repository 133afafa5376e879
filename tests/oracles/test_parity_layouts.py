"""Every kind of update where the weight lies otherwise than PEFT has it: in tiles, in halves, fused, split, in bf16."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from parity import (
    State,
    adapted,
    assert_rounded_once,
    changed,
    half_ulp,
    merge,
    merged_by_peft,
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
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from loratool.errors import MismatchError
from loratool.operations import panels

# -- tall weights, cut into panels and tiles ----------------------------------------------------------------------

TALL: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(20, 150),
    "conv1D": lambda: Conv1D(14, 150),  # stored (150, 14): tiles hold some inputs of all outputs
    "embedding": lambda: nn.Embedding(150, 20),
    "conv2d": lambda: nn.Conv2d(4, 150, 3),
}
KINDS: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "lora": (LoraConfig, {"r": 3}, ("linear", "conv1D", "embedding", "conv2d")),
    "dora": (LoraConfig, {"r": 3, "use_dora": True}, ("linear", "conv1D", "embedding", "conv2d")),
    "modules_to_save": (
        LoraConfig,
        {"modules_to_save": ["0"], "target_modules": ["1"]},
        ("linear", "conv1D", "embedding"),
    ),
    "tokens": (TrainableTokensConfig, {"token_indices": [149, 0, 64, 63, 100]}, ("embedding", "linear")),
    "adalora": (AdaLoraConfig, {"total_step": 9}, ("linear", "conv1D")),
    "loha": (LoHaConfig, {"r": 4}, ("linear", "conv2d")),
    "loha with cores": (LoHaConfig, {"r": 4, "use_effective_conv2d": True}, ("conv2d",)),
    "lokr": (LoKrConfig, {"r": 2}, ("linear", "conv2d")),
    "lokr with cores": (LoKrConfig, {"r": 2, "use_effective_conv2d": True}, ("conv2d",)),
    "vera": (VeraConfig, {"r": 4}, ("linear", "conv1D")),
    "oft": (OFTConfig, {"r": 0, "oft_block_size": 4}, ("linear", "conv2d")),
    "boft": (BOFTConfig, {"boft_block_size": 4}, ("linear", "conv2d")),
    "ia3 of inputs": (IA3Config, {"feedforward_modules": ["0"]}, ("linear", "conv1D", "conv2d")),
    "ia3 of outputs": (IA3Config, {"feedforward_modules": []}, ("linear", "conv1D", "conv2d")),
}
PAIRS = [(kind, layer) for kind, (_, _, layers) in KINDS.items() for layer in layers]


def tall(layer: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(TALL[layer](), nn.Linear(3, 2))  # the second is for configs that must have a target


@pytest.mark.parametrize(("kind", "layer"), PAIRS)
def test_tiles_and_panels_make_one_weight(kind, layer, tmp_path, monkeypatch):
    config, settings, _ = KINDS[kind]
    base = save_plain(tall(layer), tmp_path / "base")
    before = {n: t.clone() for n, t in tall(layer).state_dict().items()}
    live = adapted(tall(layer), config(**{"target_modules": ["0"]} | settings))
    adapter = save_adapter(live, tmp_path / "adapter")
    exact = merged_by_peft(live)
    assert "0.weight" in changed(before, exact)
    whole = merge(base, [adapter], tmp_path / "whole", compute_dtype="float64")
    assert_rounded_once(whole, exact)
    monkeypatch.setattr(panels, "TILE", 1)  # 64 rows a tile, the least there is
    assert_rounded_once(merge(base, [adapter], tmp_path / "tiles", compute_dtype="float64"), exact)
    monkeypatch.setattr(panels, "PANEL", 1)
    assert_rounded_once(merge(base, [adapter], tmp_path / "panels", compute_dtype="float64"), exact)
    assert_rounded_once(merge(base, [adapter], tmp_path / "fp32"), exact, noise=2**-21)


# -- 16-bit bases -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("kind", "layer"), PAIRS)
def test_a_base_of_16_bits_is_rounded_once(kind, layer, dtype, tmp_path):
    config, settings, _ = KINDS[kind]
    base = save_plain(tall(layer).to(dtype), tmp_path / "base")
    live = adapted(tall(layer).to(dtype), config(**{"target_modules": ["0"]} | settings))
    adapter = save_adapter(live, tmp_path / "adapter")
    exact = merged_by_peft(live)
    assert_rounded_once(merge(base, [adapter], tmp_path / "fp64", compute_dtype="float64"), exact, dtype)
    assert_rounded_once(merge(base, [adapter], tmp_path / "fp32"), exact, dtype, noise=2**-20)


def test_peft_s_safe_merge_rounds_twice(tmp_path):
    """It rounds the update to bf16 before it adds it: so are 3 % of the elements not the nearest to W + s B A."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96)).bfloat16()
    base = save_plain(model, tmp_path / "base")
    live = adapted(model, LoraConfig(target_modules=["0"]), size=0.02)
    adapter = save_adapter(live, tmp_path / "adapter")
    exact = merged_by_peft(live)["0.weight"]
    got = merge(base, [adapter], tmp_path / "out")["0.weight"]
    theirs = live.merge_and_unload(safe_merge=True)[0].weight.detach()
    assert float((got != exact.to(torch.bfloat16)).double().mean()) < 1e-3
    wrong = (theirs.double() - exact).abs() > half_ulp(exact, torch.bfloat16) * (1 + 2**-8)
    assert float(wrong.double().mean()) > 0.01


# -- square weights of unknown families ---------------------------------------------------------------------------


def square(layer: Callable[[int, int], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(layer(12, 12))


@pytest.mark.parametrize("layer", [nn.Linear, Conv1D], ids=["linear", "conv1D"])
@pytest.mark.parametrize("kind", ["lora", "dora", "adalora", "vera", "ia3 of inputs", "ia3 of outputs"])
def test_a_square_weight_that_nothing_shows_the_order_of_is_refused(kind, layer, tmp_path):
    config, settings, _ = KINDS[kind]
    base = save_plain(square(layer), tmp_path / "base")
    live = adapted(square(layer), config(**{"target_modules": ["0"]} | settings))
    adapter = save_adapter(live, tmp_path / "adapter")
    with pytest.raises(MismatchError, match="square"):
        merge(base, [adapter], tmp_path / "out")


@pytest.mark.parametrize("kind", ["loha", "lokr", "boft", "oft", "oft, shared"])
def test_kinds_that_are_on_linear_layers_only_show_it(kind, tmp_path):
    config, settings, _ = KINDS[kind.removesuffix(", shared")]
    settings = settings | ({"block_share": True} if "shared" in kind else {})
    base = save_plain(square(nn.Linear), tmp_path / "base")
    live = adapted(square(nn.Linear), config(target_modules=["0"], **settings))
    adapter = save_adapter(live, tmp_path / "adapter")
    got = merge(base, [adapter], tmp_path / "out", compute_dtype="float64")
    assert_rounded_once(got, merged_by_peft(live))


# -- fused weights ------------------------------------------------------------------------------------------------

IN = 8
LAYER = "model.layers.0"


def heads(groups: int, queries: int, dim: int) -> Callable[[torch.Tensor], Sequence[torch.Tensor]]:
    """[groups, (queries, k, v), dim], as modeling_internlm2 has it."""

    def parts(w: torch.Tensor) -> Sequence[torch.Tensor]:
        grouped = w.view(groups, queries + 2, dim, *w.shape[1:])
        return grouped[:, :-2], grouped[:, -2], grouped[:, -1]

    return parts


GROUPED = {"hidden_size": 12, "num_attention_heads": 4, "num_key_value_heads": 2}
QKV = tuple(f"{LAYER}.self_attn.{part}_proj" for part in "qkv")
# the family, its config, the fused module and its rows, the parts' names, and views of them in the fused rows
FUSED: dict[str, Any] = {
    "equal": ("baichuan", {"model_type": "baichuan", "vocab_size": 8}, f"{LAYER}.self_attn.W_pack", 24, QKV,
              lambda w: w.chunk(3)),
    "unequal": ("phi3", {"model_type": "phi3", **GROUPED}, f"{LAYER}.self_attn.qkv_proj", 24, QKV,
                lambda w: (w[:12], w[12:18], w[18:])),
    "interleaved": ("internlm2", {"model_type": "internlm2", **GROUPED}, f"{LAYER}.attention.wqkv", 24, QKV,
                    heads(2, 2, 3)),
}  # fmt: skip
SPLITTABLE = {
    "lora": (LoraConfig, {"r": 3}),
    "lora_bias": (LoraConfig, {"r": 3, "lora_bias": True}),
    "trained biases": (LoraConfig, {"r": 3, "bias": "lora_only"}),
    "dora": (LoraConfig, {"r": 3, "use_dora": True}),
    "adalora": (AdaLoraConfig, {"total_step": 9}),
    "loha": (LoHaConfig, {"r": 4}),
    "lokr": (LoKrConfig, {"r": 1, "decompose_both": True}),
    "vera": (VeraConfig, {"r": 4}),
    "oft": (OFTConfig, {"r": 0, "oft_block_size": 4}),
    "boft": (BOFTConfig, {"boft_block_size": 4}),
    "ia3 of inputs": (IA3Config, True),
    "ia3 of outputs": (IA3Config, False),
}


def nested(layers: dict[str, nn.Module]) -> nn.Module:
    """A module that has these layers at these paths."""
    root = nn.Module()
    for path, layer in layers.items():
        at = root
        *above, leaf = path.split(".")
        for name in above:
            if name not in dict(at.named_children()):
                at.add_module(name, nn.Module())
            at = getattr(at, name)
        at.add_module(leaf, layer)
    return root


def configured(kind: str, targets: Sequence[str]) -> Any:
    config, settings = SPLITTABLE[kind]
    if isinstance(settings, bool):
        settings = {"feedforward_modules": list(targets) if settings else []}
    return config(target_modules=list(targets), **settings)


def fused_and_split(case: str) -> tuple[State, dict[str, State], Any]:
    """A fused weight with its bias, the same apart, and what puts the parts together."""
    _, _, module, out, names, parts = FUSED[case]
    generator = torch.Generator().manual_seed(4)
    whole = {
        f"{module}.weight": torch.randn(out, IN, generator=generator),
        f"{module}.bias": torch.randn(out, generator=generator),
    }
    apart: dict[str, State] = {name: {} for name in names}
    for tensor, value in whole.items():
        leaf = tensor.rpartition(".")[2]
        for name, part in zip(names, parts(value), strict=True):
            apart[name][f"{name}.{leaf}"] = part.reshape(-1, *value.shape[1:]).clone()

    def together(tensors: State) -> State:
        result = {n: t.double().clone() for n, t in whole.items()}
        for tensor, value in result.items():
            leaf = tensor.rpartition(".")[2]
            for name, part in zip(names, parts(value), strict=True):
                part.copy_(tensors[f"{name}.{leaf}"].double().view_as(part))
        return result

    return whole, apart, together


def write(folder, tensors: State, config: dict[str, Any]):
    folder.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def linear(state: State, name: str) -> nn.Linear:
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


@pytest.mark.parametrize("case", FUSED)
@pytest.mark.parametrize("kind", SPLITTABLE)
def test_adapters_of_the_parts_merge_into_the_fused_weight(kind, case, tmp_path):
    family, config, _, _, names, _ = FUSED[case]
    whole, apart, together = fused_and_split(case)
    live = adapted(nested({n: linear(apart[n], n) for n in names}), configured(kind, names))
    adapter = save_adapter(live, tmp_path / "adapter")
    exact = together(merged_by_peft(live))
    assert changed(whole, exact)
    base = write(tmp_path / "base", whole, config)
    assert_rounded_once(merge(base, [adapter], tmp_path / "out", arch=family, compute_dtype="float64"), exact)


@pytest.mark.parametrize("case", FUSED)
@pytest.mark.parametrize("kind", SPLITTABLE)
def test_an_adapter_of_the_fused_weight_merges_into_its_parts(kind, case, tmp_path):
    family, config, module, _, names, parts = FUSED[case]
    whole, apart, _ = fused_and_split(case)
    live = adapted(nested({module: linear(whole, module)}), configured(kind, [module]))
    adapter = save_adapter(live, tmp_path / "adapter")
    merged = merged_by_peft(live)
    exact = {
        f"{name}.{leaf}": part.reshape(-1, *merged[f"{module}.{leaf}"].shape[1:])
        for leaf in ("weight", "bias")
        for name, part in zip(names, parts(merged[f"{module}.{leaf}"]), strict=True)
    }
    base = write(tmp_path / "base", {n: t for part in apart.values() for n, t in part.items()}, config)
    assert_rounded_once(merge(base, [adapter], tmp_path / "out", arch=family, compute_dtype="float64"), exact)
