"""Adapters of every image family go from format to format and come back with the bytes that they had."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from zoo import every, record

import loratool
from loratool.layers import Excluded
from loratool.patterns import flatten
from loratool.plugins import load

MAIN = ("unet", "transformer")
FIRST = {z.family: z for z in reversed(every()) if z.component in MAIN}
DEEP = ("stable-diffusion-3.5-large",)  # what stable-diffusion-3 is, 38 blocks of it


def source(one):
    """What OneTrainer's older format has for a model: canonical names, flat; ranks and alphas differ by block."""
    architecture = load().architecture(one.family)
    tensors, generator = {}, torch.Generator().manual_seed(1)
    for name, shape in record(one).memory.items():
        path = name.removesuffix(".weight")
        known = architecture.find(path, one.component) if len(shape) > 1 and path != name else None
        if known is None or isinstance(known.layer, Excluded) or known.layer.kind == "embedding":
            continue
        block = int(next(iter(re.findall(r"\d+", path)), 0))
        rank, module = 2 + block % 2, f"lora_transformer_{flatten(path)}"
        tensors[f"{module}.lora_down.weight"] = torch.randn(rank, *shape[1:], generator=generator).bfloat16()
        up = torch.randn(shape[0], rank, *(1,) * (len(shape) - 2), generator=generator)
        tensors[f"{module}.lora_up.weight"] = up.bfloat16()
        tensors[f"{module}.alpha"] = torch.tensor(1.0 + block % 3)
    return tensors


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    assert [n for n, t in wanted.items() if not torch.equal(found[n], t)] == []


@pytest.mark.parametrize("family", sorted(FIRST.keys() - set(DEEP)))
def test_a_family_s_adapter_goes_through_every_format_bit_by_bit(family, tmp_path):
    one = FIRST[family]
    tensors = source(one)
    save_file(tensors, tmp_path / "0.safetensors")
    before = tmp_path / "0.safetensors"
    places = {}
    for to in ("kohya", "comfy", "diffusers", "lycoris"):
        places[to] = tmp_path / f"{to}.safetensors"
        report = loratool.convert(before, places[to], to=to, arch=family)
        assert not [f for f in report.findings if f.what.startswith("dropped")]
        before = places[to]
    again = {n.replace("lycoris_", "lora_transformer_", 1): t for n, t in load_file(before).items()}
    assert_same(again, tensors)
    loratool.convert(before, tmp_path / "kohya again.safetensors", to="kohya", arch=family)
    # with one `down` a part, they are joined in the order of the weight's rows whoever joins them
    assert_same(load_file(tmp_path / "kohya again.safetensors"), load_file(places["kohya"]))


@pytest.mark.parametrize("one", [z for z in every() if "WanAnimate" in z.cls], ids=str)
def test_a_fused_weight_of_a_video_model_is_joined_and_cut(one, tmp_path):
    tensors = source(one)
    save_file(tensors, tmp_path / "0.safetensors")
    loratool.convert(tmp_path / "0.safetensors", tmp_path / "c.safetensors", to="comfy", arch="wan")
    assert any(".linear1_kv." in name for name in load_file(tmp_path / "c.safetensors"))
    loratool.convert(tmp_path / "c.safetensors", tmp_path / "d.safetensors", to="onetrainer-legacy", arch="wan")
    assert_same(load_file(tmp_path / "d.safetensors"), tensors)


@pytest.mark.parametrize("family", ["flux", "stable-diffusion-3", "wan", "z-image"])
def test_a_peft_folder_is_on_the_way_too(family, tmp_path):
    tensors = source(FIRST[family])
    save_file(tensors, tmp_path / "0.safetensors")
    loratool.convert(tmp_path / "0.safetensors", tmp_path / "peft", to="peft", arch=family)
    loratool.convert(tmp_path / "peft", tmp_path / "1.safetensors", to="onetrainer-legacy", arch=family)
    assert_same(load_file(tmp_path / "1.safetensors"), tensors)
