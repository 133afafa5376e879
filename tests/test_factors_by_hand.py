"""Adapters of LoRA layers written by hand, in the conventions that tutorials have, against torch and PEFT."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import loratool
from loratool.api import open_adapter
from loratool.errors import MismatchError, UsageError

SIZES = {"layers.0": (12, 20), "layers.1": (20, 20), "head": (20, 2)}  # in, out


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(*SIZES["layers.0"]), nn.Linear(*SIZES["layers.1"])])
        self.head = nn.Linear(*SIZES["head"])

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    net = Net()
    (tmp_path / "base").mkdir()
    save_file(net.state_dict(), tmp_path / "base/model.safetensors")
    return net


def factors(rank=2, sizes=SIZES):
    """(down, up) as the paper has them."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    return {name: (random(rank, into), random(out, rank)) for name, (into, out) in sizes.items()}


def turned(pairs):
    return {name: (down.T, up.T) for name, (down, up) in pairs.items()}


@pytest.mark.parametrize("spelled", [factors, lambda: turned(factors())], ids=["paper", "x @ A @ B"])
def test_peft_applies_them_as_the_layers_did(base, tmp_path, spelled):
    adapter = loratool.from_factors(spelled(), scaling=1.5)
    loratool.convert(adapter, tmp_path / "lora", to="peft")
    live = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "lora")).eval()
    x = torch.randn(5, 12)
    with torch.no_grad():
        expected = x
        for name in SIZES:
            layer, (down, up) = base.get_submodule(name), factors()[name]
            expected = layer(expected) + 1.5 * expected @ down.T @ up.T
            expected = expected if name == "head" else torch.tanh(expected)
        torch.testing.assert_close(live(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spelled", [factors, lambda: turned(factors())], ids=["paper", "x @ A @ B"])
def test_they_merge_into_the_base_without_a_file_between(base, tmp_path, spelled):
    adapter = loratool.from_factors(spelled(), scaling=0.3)
    loratool.merge(tmp_path / "base", [adapter], tmp_path / "merged")
    merged = load_file(tmp_path / "merged/model.safetensors")
    for name, (down, up) in factors().items():
        expected = base.get_submodule(name).weight.double() + 0.3 * up.double() @ down.double()
        torch.testing.assert_close(merged[f"{name}.weight"].double(), expected, rtol=1e-6, atol=1e-6)


def test_square_layers_have_the_rank_of_the_smaller_side():
    square = factors(3, {"a": (16, 16), "b": (16, 16)})
    for spelled in (square, turned(square)):
        adapter = loratool.from_factors(spelled, scaling=1.0)
        assert [delta.rank for (delta,) in adapter.deltas.values()] == [3, 3]


def test_shapes_that_do_not_tell_or_do_not_fit_are_refused():
    square = factors(3, {"a": (16, 16), "b": (16, 16)})
    mixed = {"a": square["a"], "b": turned(square)["b"]}
    whole = factors(16, {"a": (16, 16)})
    for unclear in (mixed, whole):
        with pytest.raises(UsageError, match="do not tell"):
            loratool.from_factors(unclear, scaling=1.0)
    plain = factors()
    with pytest.raises(UsageError, match="factors of"):
        loratool.from_factors(plain | {"layers.0": (plain["layers.0"][0], plain["head"][1][:, :1])}, scaling=1.0)
    with pytest.raises(UsageError, match="no factors"):
        loratool.from_factors({}, scaling=1.0)


def test_a_rank_of_zero_is_an_error_that_names_the_layer(tmp_path):
    nothing = {"head": (torch.zeros(0, 20), torch.zeros(2, 0))}  # classes // 4, of two classes
    adapter = loratool.from_factors(nothing, scaling=1.0)
    with pytest.raises(MismatchError, match=r"head.*rank 0"):
        loratool.convert(adapter, tmp_path / "lora", to="peft")


def test_an_adapter_in_memory_is_resized_as_one_in_a_file_is(base, tmp_path):
    adapter = loratool.from_factors(factors(4), scaling=2.0, base_model=str(tmp_path / "base"))
    loratool.convert(adapter, tmp_path / "lora", to="peft")
    loratool.resize(adapter, tmp_path / "one", rank=1)
    loratool.resize(tmp_path / "lora", tmp_path / "two", rank=1)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)
    assert loratool.merge(tmp_path / "base", [tmp_path / "one"], tmp_path / "merged").totals["modules"] == 3


@pytest.mark.parametrize("spelling", ["{}.lora_A", "{}.lora_A.weight"], ids=["loralib", "PEFT"])
@pytest.mark.parametrize("file", ["adapter/adapter_model.safetensors", "by_hand.safetensors"])
def test_parameters_called_lora_a_and_lora_b_are_read(base, tmp_path, spelling, file):
    state = {}
    for name, (down, up) in factors().items():
        state[spelling.format(name)] = down
        state[spelling.format(name).replace("lora_A", "lora_B")] = up
    (tmp_path / "adapter").mkdir()
    save_file(state, tmp_path / file)
    given = tmp_path / file.removesuffix("/adapter_model.safetensors")
    # a layer that multiplies by 3, whatever its rank: alpha is scaling * rank
    report = loratool.merge(tmp_path / "base", [given], tmp_path / "merged", alpha=3.0 * 2)
    assert not [f for f in report.findings if "no alpha" in f.what]
    merged = load_file(tmp_path / "merged/model.safetensors")
    for name, (down, up) in factors().items():
        expected = base.get_submodule(name).weight + 3.0 * up @ down
        torch.testing.assert_close(merged[f"{name}.weight"], expected, rtol=1e-5, atol=1e-5)


def test_a_strength_that_no_file_says_is_refused_or_told(base, tmp_path):
    state = {f"{n}.lora_{p}.weight": t for n, pair in factors().items() for p, t in zip("AB", pair, strict=True)}
    save_file({name: t for name, t in state.items() if not name.startswith("head")}, tmp_path / "dotted.safetensors")
    with pytest.raises(MismatchError, match="strength"):
        loratool.merge(tmp_path / "base", [tmp_path / "dotted.safetensors"], tmp_path / "merged")
    save_file(state, tmp_path / "flat.safetensors")  # "head", without a dot, is what image tools call modules
    findings = loratool.merge(tmp_path / "base", [tmp_path / "flat.safetensors"], tmp_path / "merged").findings
    assert [f.level for f in findings if "no alpha" in f.what] == ["warning"]


def test_a_file_whose_factors_lie_the_other_way_is_refused_and_told_what_takes_them(tmp_path):
    down, up = (t.contiguous() for t in turned(factors())["layers.0"])
    state = {"layers.0.lora_A.weight": down, "layers.0.lora_B.weight": up}
    save_file(state, tmp_path / "adapter_model.safetensors")
    errors = [f for f in open_adapter(tmp_path, alpha=4.0).findings if f.level == "error"]
    assert [f.where for f in errors] == ["layers.0"]
    assert "from_factors" in errors[0].hint


def test_training_on_does_not_change_an_adapter_that_was_taken(tmp_path):
    pairs = factors()
    adapter = loratool.from_factors(pairs, scaling=1.0)
    kept = pairs["head"][1].clone()
    pairs["head"][1].zero_()
    loratool.convert(adapter, tmp_path / "lora", to="peft")
    written = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert written["base_model.model.head.lora_B.weight"].equal(kept)
