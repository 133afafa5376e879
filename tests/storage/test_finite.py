"""NaN and infinity are refused wherever factors are copied as bytes: by torch's word for every pattern of bits."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_files import snapshot

import loratool
from loratool.errors import InputError
from loratool.plan import Input, TensorFile
from loratool.storage import finite, safetensors

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def patterns(dtype):
    """All patterns of the sixteen highest bits (eight of a byte), and the lowest bit: sign, exponent and edges."""
    width = 8 * dtype.itemsize
    high = torch.arange(256 if width == 8 else 1 << 16, dtype=torch.int64) << max(width - 16, 0)
    bits = torch.cat([high, high | 1, high | ((1 << max(width - 16, 0)) - 1)]).to(WORDS[dtype.itemsize])
    return bits.view(dtype)


def require(path, tensors):
    save_file(tensors, path)
    refs = safetensors.read_header(path).tensors
    inputs = [Input("source", {ref.name: ref for ref in refs})]
    finite.require([TensorFile("out", tuple(ref.renamed(f"new {ref.name}") for ref in refs), finite=True)], inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_torch_calls_finite_passes_and_nothing_else(dtype, tmp_path):
    values = patterns(dtype)
    sound = values.float().isfinite() if dtype.itemsize == 1 else values.isfinite()
    assert 0 < int(sound.sum()) < len(sound)
    require(tmp_path / "sound.safetensors", {"all": values[sound].contiguous()})
    wrong = values[~sound].contiguous()
    for n in range(0, len(wrong), max(1, len(wrong) // 60)):
        row = torch.zeros(5, dtype=torch.float32).to(dtype)
        row[n % 5 : n % 5 + 1] = wrong[n : n + 1]
        with pytest.raises(InputError, match=r"sick.*1 tensor") as caught:
            require(tmp_path / "wrong.safetensors", {"sick": row, "well": torch.ones(3, dtype=torch.int64)})
        assert "new" not in str(caught.value)


def test_the_last_number_of_a_large_tensor_counts(tmp_path):
    values = torch.zeros((finite._PANEL // 2) * 3 + 7, dtype=torch.float16)
    require(tmp_path / "a.safetensors", {"a": values})
    values[-1] = float("nan")
    with pytest.raises(InputError, match="a: NaN"):
        require(tmp_path / "a.safetensors", {"a": values})


@pytest.mark.parametrize("to", ["kohya", "comfy", "diffusers", "peft", "ai-toolkit"])
@pytest.mark.parametrize("part", ["lora_down.weight", "lora_up.weight", "dora_scale"])
def test_convert_names_the_tensor_and_writes_nothing(part, to, tmp_path):
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{module}.lora_down.weight": torch.randn(4, 320).half(),
        f"{module}.lora_up.weight": torch.randn(320, 4).half(),
        f"{module}.alpha": torch.tensor(2.0),
    }
    if part == "dora_scale":
        tensors[f"{module}.dora_scale"] = torch.rand(320, 1)
        if to == "ai-toolkit":
            pytest.skip("a format without DoRA")
    source = tmp_path / "style.safetensors"
    save_file(tensors, source, {"ss_base_model_version": "sd_v1"})
    out = tmp_path / ("out" if to == "peft" else "out.safetensors")
    loratool.convert(source, out, to=to)
    tensors[f"{module}.{part}"].view(-1)[-1] = float("-inf")
    save_file(tensors, source, {"ss_base_model_version": "sd_v1"})
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=f"{module}.{part}: NaN or infinity in 1 tensor"):
        loratool.convert(source, out, to=to, force=True)
    assert snapshot(tmp_path) == before


def test_a_file_that_was_refused_converts_once_it_is_mended(tmp_path):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    sick = {name.format("A"): torch.full((2, 8), float("nan")), name.format("B"): torch.ones(8, 2)}
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(sick, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"q_proj\.lora_A\.weight"):
        loratool.convert(folder, tmp_path / "new.safetensors", to="kohya", arch="llama")
    save_file({n: t.nan_to_num(1) for n, t in sick.items()}, folder / "adapter_model.safetensors")
    loratool.convert(folder, tmp_path / "new.safetensors", to="kohya", arch="llama")
    assert all(t.isfinite().all() for t in load_file(tmp_path / "new.safetensors").values())
