"""A resized kohya file has its full strength in diffusers, which applies one alpha to all modules of a file."""

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader
from peft import PeftModel
from safetensors.torch import load_file

import loratool


def test_ranks_that_differ_by_module_reach_diffusers_at_full_strength(tiny, adapter_folder, run_model, tmp_path):
    live, folder = adapter_folder(tiny("unet"), target_modules=["to_q", "to_k", "ff.net.2"], r=4, lora_alpha=6)
    with torch.no_grad():  # spectra that differ between modules, so that one energy gives different ranks
        for n, (_, down) in enumerate(p for p in live.named_parameters() if "lora_A" in p[0]):
            down.mul_(torch.logspace(0, -(n % 4), 4)[:, None])
    live.save_pretrained(folder)
    loratool.resize(folder, tmp_path / "peft", energy=0.97)
    loratool.convert(tmp_path / "peft", tmp_path / "k.safetensors", to="kohya", arch="stable-diffusion")
    tensors = load_file(tmp_path / "k.safetensors")
    assert len({t.shape[0] for n, t in tensors.items() if "lora_down" in n}) > 1
    wanted = run_model("unet", PeftModel.from_pretrained(tiny("unet"), tmp_path / "peft").eval())
    unet = tiny("unet")
    state, alphas = Loader.lora_state_dict(tmp_path, weight_name="k.safetensors", local_files_only=True)
    Loader.load_lora_into_unet(state, alphas, unet)
    torch.testing.assert_close(run_model("unet", unet), wanted, rtol=1e-5, atol=1e-6)


def test_alphas_that_diffusers_would_ignore_are_announced(tiny, adapter_folder, tmp_path):
    _, folder = adapter_folder(
        tiny("unet"), target_modules=["to_q", "to_k"], r=4, lora_alpha=4, alpha_pattern={"to_k": 2}
    )
    report = loratool.convert(folder, tmp_path / "k.safetensors", to="kohya", arch="stable-diffusion")
    assert any("diffusers" in f.what for f in report.findings)
