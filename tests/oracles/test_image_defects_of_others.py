"""What other converters lose or get wrong without a word, one test each: ours keeps it. Numbers are in docs/formats.md.

Files are written key by key; what is expected is written out, row by row, from the definitions of the formats.
"""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import loratool
from loratool.api import open_adapter
from loratool.errors import InputError

H, R = 16, 4  # width of the model, rank


def factors(stem, out, inside=H, *, rank=R, alpha=None, names=("lora_down", "lora_up"), seed=0):
    generator = torch.Generator().manual_seed(seed + len(stem))
    down, up = torch.randn(rank, inside, generator=generator), torch.randn(out, rank, generator=generator)
    found = {f"{stem}.{names[0]}.weight": down, f"{stem}.{names[1]}.weight": up}
    return found | ({} if alpha is None else {f"{stem}.alpha": torch.tensor(float(alpha))})


AB = ("lora_A", "lora_B")


@pytest.fixture
def converted(tmp_path):
    """`converted(tensors, "flux")`: the tensors of the file for diffusers, and the scaling of every module."""

    def convert(tensors, family, to="diffusers"):
        save_file(tensors, tmp_path / "in.safetensors")
        out = tmp_path / "out.safetensors"
        report = loratool.convert(tmp_path / "in.safetensors", out, to=to, arch=family, force=True)
        assert not [f for f in report.findings if f.what.startswith("dropped")]
        adapter = open_adapter(out, arch=family).require_sound()
        return load_file(out), {t.path: getattr(d, "inner", d).scaling for t, (d,) in adapter.deltas.items()}

    return convert


def update(tensors, module, start="transformer."):
    return tensors[f"{start}{module}.lora_B.weight"] @ tensors[f"{start}{module}.lora_A.weight"]


def product(tensors, stem, names=("lora_down", "lora_up")):
    return tensors[f"{stem}.{names[1]}.weight"] @ tensors[f"{stem}.{names[0]}.weight"]


def halves_swapped(matrix):
    one, two = matrix.chunk(2)
    return torch.cat([two, one])


def modules(tensors):
    return {name.rpartition(".lora_")[0] for name in tensors if ".lora_A." in name}


OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    **{f"{n}_in_in_layer": f"time_text_embed.{m}_embedder.linear_1" for n, m in
       (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))},
    "final_layer_linear": "proj_out",
}  # fmt: skip


def test_1_what_lies_outside_the_blocks_of_flux_is_loaded_too(converted):
    tensors = {k: v for name in OUTSIDE for k, v in factors(f"lora_unet_{name}", H).items()}
    ours, _ = converted(tensors, "flux")
    assert modules(ours) == {f"transformer.{path}" for path in OUTSIDE.values()}
    for name, path in OUTSIDE.items():
        assert torch.equal(update(ours, path), product(tensors, f"lora_unet_{name}"))


def test_2_the_alpha_of_the_last_layer_counts(converted):
    tensors = factors("lora_unet_final_layer_linear", H, alpha=R / 2)
    tensors |= factors("lora_unet_final_layer_adaLN_modulation_1", 2 * H, alpha=R / 2)
    _, scalings = converted(tensors, "flux")
    assert scalings == {"proj_out": 0.5, "norm_out.linear": 0.5}


@pytest.mark.parametrize(
    ("number", "family", "stem", "names"),
    [
        (3, "flux", "final_layer.adaLN_modulation.1", AB),
        (3, "flux", "lora_unet_final_layer_adaLN_modulation_1", ("lora_down", "lora_up")),
        (4, "hunyuan-video", "diffusion_model.final_layer.adaLN_modulation.1", AB),
        (6, "flux2", "diffusion_model.final_layer.adaLN_modulation.1", AB),
        (7, "flux2", "lora_unet_final_layer_adaLN_modulation_1", ("lora_down", "lora_up")),
    ],
)
def test_3_4_6_the_halves_of_the_last_modulation_are_swapped_in_the_outputs_alone(
    number, family, stem, names, converted
):
    tensors = factors(stem, 2 * H, names=names)
    beside = "double_blocks.0.img_attn.proj" if names is AB else "lora_unet_double_blocks_0_img_attn_proj"
    start = "diffusion_model." if stem.startswith("diffusion_model.") else ""
    tensors |= factors(start + beside, H, names=names)
    ours, _ = converted(tensors, family)
    assert torch.equal(ours["transformer.norm_out.linear.lora_A.weight"], tensors[f"{stem}.{names[0]}.weight"])
    assert torch.equal(update(ours, "norm_out.linear"), halves_swapped(product(tensors, stem, names)))


def test_5_the_refiner_s_fused_attention_is_cut_by_its_rows(converted):
    stem = "diffusion_model.txt_in.individual_token_refiner.blocks.0.self_attn_qkv"
    tensors = factors(stem, 3 * H, names=AB)
    ours, _ = converted(tensors, "hunyuan-video")
    start = "context_embedder.token_refiner.refiner_blocks.0.attn"
    found = torch.cat([update(ours, f"{start}.{part}") for part in ("to_q", "to_k", "to_v")])
    torch.testing.assert_close(found, product(tensors, stem, AB))
    assert {t.shape for n, t in ours.items() if "lora_A" in n} == {(R, H)}


def test_7_the_modulations_and_the_guidance_of_flux2_are_kept(converted):
    names = {
        "double_stream_modulation_img_lin": "double_stream_modulation_img.linear",
        "single_stream_modulation_lin": "single_stream_modulation.linear",
        "guidance_in_in_layer": "time_guidance_embed.guidance_embedder.linear_1",
        "time_in_out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    }
    tensors = {k: v for name in names for k, v in factors(f"lora_unet_{name}", 6 * H, alpha=2).items()}
    ours, scalings = converted(tensors, "flux2")
    assert scalings == dict.fromkeys(names.values(), 0.5)
    for name, path in names.items():
        assert torch.equal(update(ours, path), product(tensors, f"lora_unet_{name}"))


def test_8_modules_of_a_mixture_of_spellings_stay_apart(converted):
    paths = ("attn.to_q", "ff.net.0.proj", "ff.net.2", "norm1.linear", "ff_context.net.2")
    names = {f"lora_transformer_transformer_blocks_0_{p.replace('.', '_')}": f"transformer_blocks.0.{p}" for p in paths}
    names["lora_transformer_single_transformer_blocks_0_proj_mlp"] = "single_transformer_blocks.0.proj_mlp"
    tensors = {k: v for n, name in enumerate(names) for k, v in factors(name, H, seed=n).items()}
    ours, _ = converted(tensors, "flux")
    assert modules(ours) == {f"transformer.{path}" for path in names.values()}
    for name, path in names.items():
        assert torch.equal(update(ours, path), product(tensors, name))


SD = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def test_9_dora_is_dora_for_diffusers_or_refused(converted, tmp_path):
    tensors = factors(SD, 2 * H) | {f"{SD}.dora_scale": torch.rand(2 * H, 1)}
    ours, _ = converted(tensors, "stable-diffusion")
    (name,) = [n for n in ours if "lora_magnitude_vector" in n]
    assert torch.equal(ours[name], tensors[f"{SD}.dora_scale"].flatten())
    with safe_open(tmp_path / "out.safetensors", "pt") as opened:
        assert '"unet.use_dora": true' in opened.metadata()["lora_adapter_metadata"]
    tensors[f"{SD}.dora_scale"] = torch.rand(1, H)  # an entry an input, which PEFT has not
    with pytest.raises(InputError, match=r"cannot hold dora|dora of inputs"):
        converted(tensors, "stable-diffusion")


def test_10_files_of_original_names_with_a_and_b_are_converted(converted):
    tensors = factors("diffusion_model.double_blocks.0.img_attn.qkv", 3 * H, names=AB)
    tensors |= factors("diffusion_model.single_blocks.0.linear1", 7 * H, names=AB)
    ours, _ = converted(tensors, "flux")
    block, single = "transformer_blocks.0.attn.", "single_transformer_blocks.0."
    found = torch.cat([update(ours, block + part) for part in ("to_q", "to_k", "to_v")])
    torch.testing.assert_close(found, product(tensors, "diffusion_model.double_blocks.0.img_attn.qkv", AB))
    found = torch.cat([update(ours, single + part) for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")])
    torch.testing.assert_close(found, product(tensors, "diffusion_model.single_blocks.0.linear1", AB))


def test_11_plain_peft_files_of_flux_are_converted(converted, tmp_path):
    stem = "base_model.model.transformer_blocks.0.attn.to_q"
    tensors = factors(stem, H, names=AB)
    save_file(tensors, tmp_path / "p.safetensors")
    loratool.convert(tmp_path / "p.safetensors", tmp_path / "o.safetensors", to="diffusers", arch="flux", alpha=R)
    assert torch.equal(update(load_file(tmp_path / "o.safetensors"), "transformer_blocks.0.attn.to_q"),
                       product(tensors, stem, AB))  # fmt: skip


@pytest.mark.parametrize(
    ("family", "stem", "parts"),
    [
        ("stable-diffusion-3", "lora_unet_joint_blocks_0_x_block_attn_qkv",
         [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]),
        ("stable-diffusion-3", "lora_unet_joint_blocks_0_context_block_attn_qkv",
         [f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"]),
        ("z-image", "diffusion_model.layers.0.attention.qkv", [f"layers.0.attention.to_{x}" for x in "qkv"]),
    ],
)  # fmt: skip
def test_12_fused_attention_of_other_families_is_cut(family, stem, parts, converted):
    names = AB if "." in stem else ("lora_down", "lora_up")
    tensors = factors(stem, 3 * H, names=names, alpha=2)
    ours, scalings = converted(tensors, family)
    torch.testing.assert_close(torch.cat([update(ours, part) for part in parts]), product(tensors, stem, names))
    assert scalings == dict.fromkeys(parts, 0.5)


@pytest.mark.parametrize("spelling", ["label_emb_0_0", "add_embedding_linear_1"])
def test_12_both_spellings_of_sdxl_are_read_in_full(spelling, converted):
    stem = f"lora_unet_{spelling}"
    tensors = factors(stem, H) | factors("lora_te2_text_model_encoder_layers_0_mlp_fc1", H)
    ours, _ = converted(tensors, "stable-diffusion-xl")
    assert modules(ours) == {"unet.add_embedding.linear_1", "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"}
    assert torch.equal(update(ours, "add_embedding.linear_1", "unet."), product(tensors, stem))


def test_diffusers_own_converter_to_kohya_loses_alpha_and_ours_does_not(tmp_path):
    """The one converter of diffusers (0.42) away from its own format writes alpha = rank whatever it was."""
    from diffusers.utils import convert_state_dict_to_kohya

    stem = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    theirs = convert_state_dict_to_kohya(factors(stem, H, names=AB))
    assert {float(t) for n, t in theirs.items() if n.endswith(".alpha")} == {float(R)}
    metadata = {"lora_adapter_metadata": f'{{"unet.r": {R}, "unet.lora_alpha": {R // 2}}}'}
    save_file(factors(stem, H, names=AB), tmp_path / "d.safetensors", metadata)
    loratool.convert(tmp_path / "d.safetensors", tmp_path / "k.safetensors", to="kohya", arch="stable-diffusion")
    assert float(load_file(tmp_path / "k.safetensors")[f"{SD}.alpha"]) == R / 2
