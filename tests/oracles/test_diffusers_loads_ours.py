"""diffusers' own loader reads our kohya files and PEFT single files into a UNet and a text encoder."""

import pytest
import torch

import loratool

diffusers_loaders = pytest.importorskip("diffusers.loaders")
Loader = diffusers_loaders.StableDiffusionLoraLoaderMixin

UNET = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
CONVOLUTIONS = ["proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv"]


CASES = {
    "linear": (UNET, {"to_k": 2}),
    "projections": ([*UNET, "proj_in", "proj_out"], {"to_k": 2, "proj_out": 3}),
    "convolutions": (CONVOLUTIONS, {"conv2": 6}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_kohya_unet_file_gives_equal_images_in_diffusers(case, tiny, adapter_folder, run_model, tmp_path):
    targets, ranks = CASES[case]
    live, folder = adapter_folder(tiny("unet"), target_modules=targets, r=4, lora_alpha=3, rank_pattern=ranks)
    loratool.convert(folder, tmp_path / "k.safetensors", to="kohya", arch="stable-diffusion")
    state, alphas = Loader.lora_state_dict(tmp_path, weight_name="k.safetensors", local_files_only=True)
    unet = tiny("unet")
    plain = run_model("unet", unet)
    Loader.load_lora_into_unet(state, alphas, unet)
    assert not torch.allclose(run_model("unet", unet), plain, atol=1e-4)
    torch.testing.assert_close(run_model("unet", unet), run_model("unet", live), rtol=1e-5, atol=1e-6)


def test_a_kohya_text_encoder_file_gives_equal_states_in_diffusers(tiny, adapter_folder, run_model, tmp_path):
    live, folder = adapter_folder(
        tiny("clip"), target_modules=["q_proj", "v_proj", "out_proj", "fc1"], r=4, lora_alpha=3
    )
    loratool.convert(folder, tmp_path / "k.safetensors", to="kohya", arch="stable-diffusion")
    state, alphas = Loader.lora_state_dict(tmp_path, weight_name="k.safetensors", local_files_only=True)
    encoder = tiny("clip")
    Loader.load_lora_into_text_encoder(state, alphas, encoder, prefix="text_encoder")
    torch.testing.assert_close(run_model("clip", encoder), run_model("clip", live), rtol=1e-5, atol=1e-6)
