"""kohya files: read by its rules, and exact on the way from PEFT and back."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import loratool
from loratool.api import open_adapter
from loratool.errors import AmbiguityError, InputError, UsageError

TARGETS = {
    "llama": ["q_proj", "k_proj", "down_proj", "lm_head"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bert": ["query", "dense", "classifier", "word_embeddings"],
    "distilbert": ["q_lin", "lin2"],
    "unet": ["to_q", "to_out.0", "proj_in", "conv1", "conv_shortcut", "time_emb_proj", "ff.net.0.proj", "ff.net.2"],
    "clip": ["q_proj", "out_proj", "fc1"],
}
UNET_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
UNET_CONV = "lora_unet_down_blocks_0_resnets_0_conv1"


def pair(module, rank=2, out=16, inside=16, *, kernel=(), dtype=torch.float32):
    generator = torch.Generator().manual_seed(len(module) + rank)
    ones = (1,) * len(kernel)
    return {
        f"{module}.lora_down.weight": torch.randn(rank, inside, *kernel, generator=generator).to(dtype),
        f"{module}.lora_up.weight": torch.randn(out, rank, *ones, generator=generator).to(dtype),
    }


def by_module(adapter):
    return {t.path: d for t, (d,) in adapter.deltas.items()}


def scalings(folder):
    return {str(t): d.scaling for t, (d,) in open_adapter(folder).require_sound().deltas.items()}


@pytest.fixture
def write(tmp_path):
    """Save tensors as a kohya file, and return its path."""

    def save(tensors, name="k.safetensors", **metadata):
        save_file(tensors, tmp_path / name, metadata or None)
        return tmp_path / name

    return save


@pytest.mark.parametrize(("alpha", "scaling"), [(None, 1.0), (0.0, 1.0), (4.0, 1.0), (1.0, 0.25), (6.0, 1.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-d", "1-d"])
def test_alpha_over_rank_is_the_scaling_and_an_absent_alpha_means_one(alpha, scaling, dtype, shape, write):
    tensors = pair(UNET_Q, rank=4)
    if alpha is not None:
        tensors[UNET_Q + ".alpha"] = torch.tensor(alpha, dtype=dtype).reshape(shape)
    (delta,) = by_module(open_adapter(write(tensors)).require_sound()).values()
    assert delta.rank == 4
    assert delta.scaling == scaling


def test_integer_alphas_count(write):
    tensors = {**pair(UNET_Q, rank=4), UNET_Q + ".alpha": torch.tensor(2, dtype=torch.int64)}
    (delta,) = by_module(open_adapter(write(tensors)).require_sound()).values()
    assert delta.scaling == 0.5


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_impossible_alpha_is_an_error(alpha, write):
    path = write({**pair(UNET_Q), UNET_Q + ".alpha": torch.tensor(alpha)})
    with pytest.raises(InputError, match="alpha"):
        loratool.resize(path, path.with_name("o.safetensors"), rank=1)


def test_an_alpha_of_several_numbers_is_refused(write):
    path = write({**pair(UNET_Q), UNET_Q + ".alpha": torch.ones(3)})
    with pytest.raises(InputError, match=r"to_q\.alpha"):
        loratool.resize(path, path.with_name("o.safetensors"), rank=1)


def test_every_module_has_its_own_rank_and_alpha(write):
    tensors = {
        **pair(UNET_Q, rank=2), UNET_Q + ".alpha": torch.tensor(1.0),
        **pair(UNET_CONV, rank=5, kernel=(3, 3)), UNET_CONV + ".alpha": torch.tensor(10.0),
        **pair("lora_te_text_model_encoder_layers_11_self_attn_q_proj", rank=3),
    }  # fmt: skip
    adapter = open_adapter(write(tensors)).require_sound()
    assert {str(t): (d.rank, d.scaling) for t, (d,) in adapter.deltas.items()} == {
        "unet:down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (2, 0.5),
        "unet:down_blocks.0.resnets.0.conv1": (5, 2.0),
        "text_encoder:text_model.encoder.layers.11.self_attn.q_proj": (3, 1.0),
    }


@pytest.mark.parametrize("half", ["lora_down", "lora_up"])
def test_half_a_pair_is_named(half, write):
    tensors = pair(UNET_Q) | pair(UNET_CONV, kernel=(3, 3))
    del tensors[f"{UNET_Q}.{half}.weight"]
    path = write(tensors)
    with pytest.raises(InputError, match=f"{UNET_Q}: half a pair: {half}"):
        loratool.resize(path, path.with_name("o.safetensors"), rank=1)
    assert any(half in f.what for f in loratool.inspect(path).findings if f.level == "error")


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ((3, 16), (16, 2)),
        ((2, 16), (16, 2, 1, 1)),
        ((2, 16, 3, 3), (16, 2)),
        ((2, 16, 3, 3), (16, 2, 3, 3)),
        ((0, 16), (16, 0)),
        ((2, 0), (16, 2)),
        ((2,), (16,)),
    ],
)
def test_factors_that_do_not_make_an_update_are_refused(down, up, write):
    path = write({UNET_Q + ".lora_down.weight": torch.ones(down), UNET_Q + ".lora_up.weight": torch.ones(up)})
    assert [f.where for f in loratool.inspect(path).findings if f.level == "error"] == [UNET_Q]
    with pytest.raises(InputError, match=UNET_Q):
        loratool.convert(path, path.with_name("out"), to="peft")


@pytest.mark.parametrize(
    ("name", "shape", "where"),
    [
        (UNET_Q + ".dora_scale", (15, 1), UNET_Q),
        (UNET_Q + ".lora_mid.weight", (2, 2, 3, 3), UNET_Q),
        (UNET_Q + ".hada_w1_a", (16, 2), UNET_Q),
        (UNET_Q + ".lokr_w1", (4, 4), UNET_Q),
        (UNET_Q + ".oft_blocks", (4, 4, 4), UNET_Q),
        (UNET_Q + ".diff", (16, 16), UNET_Q),
        (UNET_Q + ".diff_b", (15,), UNET_Q),
        (UNET_Q + ".surprise", (1,), UNET_Q + ".surprise"),
        (UNET_CONV + ".alpha", (), UNET_CONV),
        ("a_tensor_without_a_part", (3,), "a_tensor_without_a_part"),
        ("lora_unet_an_unknown_module.lora_down.weight", (2, 3), "lora_unet_an_unknown_module"),
    ],
)
def test_tensors_that_are_not_understood_are_refused_by_name(name, shape, where, write):
    path = write({**pair(UNET_Q), name: torch.ones(shape)})
    with pytest.raises(InputError, match=where.replace(".", r"\.")):
        loratool.convert(path, path.with_name("out"), to="peft")
    assert any(where in f.where for f in loratool.inspect(path).findings if f.level == "error")
    assert not path.with_name("out").exists()


def test_unknown_modules_are_listed_and_known_ones_still_shown(write):
    path = write(pair(UNET_Q) | pair("lora_unet_down_blocks_0_attentions_0_no_such_layer"))
    report = loratool.inspect(path)
    assert report.totals["families"] == ["stable-diffusion"]
    assert len(report.rows) == 1
    errors = [f for f in report.findings if f.level == "error"]
    assert [f.where for f in errors] == ["lora_unet_down_blocks_0_attentions_0_no_such_layer"]
    with pytest.raises(InputError, match="no_such_layer"):
        loratool.convert(path, path.with_name("out"), to="peft")


@pytest.mark.parametrize("number", ["00", "01", "-1", "x"])
def test_a_flat_name_counts_only_if_flattening_gives_it_back(number, write):
    path = write(pair(UNET_Q.replace("down_blocks_0", f"down_blocks_{number}")))
    assert [f.level for f in loratool.inspect(path).findings] == ["error"]


def test_two_prefixes_are_two_components_and_never_mixed(write):
    path = write(pair(UNET_Q.replace("lora_unet", "lora_te")))
    assert any(f.level == "error" for f in loratool.inspect(path).findings)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_factors_keep_their_dtype_and_bytes(dtype, write, tmp_path):
    tensors = pair(UNET_Q, rank=3, dtype=dtype) | pair(UNET_CONV, rank=2, kernel=(3, 3), dtype=dtype)
    tensors |= {m + ".alpha": torch.tensor(a, dtype=dtype) for m, a in ((UNET_Q, 1.5), (UNET_CONV, 2.0))}
    path = write(tensors)
    loratool.convert(path, tmp_path / "peft", to="peft")
    loratool.convert(tmp_path / "peft", tmp_path / "again.safetensors", to="kohya", arch="stable-diffusion")
    again = load_file(tmp_path / "again.safetensors")
    assert set(again) == set(tensors)
    for name, tensor in tensors.items():
        if name.endswith(".alpha"):
            assert float(again[name]) == float(tensor)
        else:
            assert again[name].dtype == dtype
            assert torch.equal(again[name], tensor)


# a PEFT folder does not say which Stable Diffusion it is of, and kohya's names depend on it
FAMILIES = {"clip": "stable-diffusion", "unet": "stable-diffusion"}


def test_a_text_encoder_of_unknown_family_is_not_guessed(tiny, adapter_folder, tmp_path):
    _, folder = adapter_folder(tiny("clip"), target_modules=["q_proj"], r=2)
    with pytest.raises(AmbiguityError, match="flux and stable-diffusion"):
        loratool.convert(folder, tmp_path / "k.safetensors", to="kohya")
    assert loratool.inspect(folder).totals["modules"] == 2  # what does not depend on it works


@pytest.mark.parametrize("kind", TARGETS)
def test_peft_to_kohya_and_back_is_exact(kind, tiny, adapter_folder, tmp_path):
    live, folder = adapter_folder(tiny(kind), target_modules=TARGETS[kind], r=5, lora_alpha=7)
    drop = {"drop_unmapped": True} if kind == "llama" else {}  # PEFT saved the base's lm_head along: kohya holds none
    family = FAMILIES.get(kind, "")
    loratool.convert(folder, tmp_path / "k.safetensors", to="kohya", arch=family, **drop)
    loratool.convert(tmp_path / "k.safetensors", tmp_path / "back", to="peft", arch=family)
    before = load_file(folder / "adapter_model.safetensors")
    before = {n: t for n, t in before.items() if "base_layer" not in n}
    after = load_file(tmp_path / "back/adapter_model.safetensors")
    assert set(after) == set(before)
    assert all(torch.equal(after[n], before[n]) for n in before)
    wanted = {m.scaling["default"] for m in live.modules() if hasattr(m, "lora_A")}
    assert set(scalings(tmp_path / "back").values()) == wanted


def test_a_loss_is_refused_until_it_is_agreed_to(tiny, adapter_folder, tmp_path):
    _, folder = adapter_folder(tiny("llama"), target_modules=["embed_tokens"], r=2)
    with pytest.raises(InputError, match="embed_tokens"):
        loratool.convert(folder, tmp_path / "k.safetensors", to="kohya")
    assert not (tmp_path / "k.safetensors").exists()
    report = loratool.convert(folder, tmp_path / "k.safetensors", to="kohya", drop_unmapped=True)
    assert any("embed_tokens" in f.where + f.what for f in report.findings)


def test_both_components_convert_to_peft_one_by_one(write, tmp_path):
    path = write(pair(UNET_Q) | pair("lora_te_text_model_encoder_layers_0_mlp_fc1"))
    with pytest.raises(UsageError, match=r"text_encoder.*unet"):
        loratool.convert(path, tmp_path / "out", to="peft")
    loratool.convert(path, tmp_path / "te", to="peft", target=["text_encoder:**"])
    (name, *_) = sorted(load_file(tmp_path / "te/adapter_model.safetensors"))
    # CLIPTextModel has no text_model. in memory (transformers 5), where PEFT counts from
    assert name == "base_model.model.encoder.layers.0.mlp.fc1.lora_A.weight"


def test_training_metadata_survives_and_dim_and_alpha_are_brought_up_to_date(write, tmp_path):
    told = {
        "ss_sd_model_name": "sd15.safetensors",
        "ss_network_dim": "4",
        "ss_network_alpha": "4",
        "modelspec.title": "x",
    }
    path = write({**pair(UNET_Q, rank=4), UNET_Q + ".alpha": torch.tensor(4.0)}, **told)
    loratool.resize(path, tmp_path / "small.safetensors", rank=2)
    with safe_open(tmp_path / "small.safetensors", "pt") as opened:
        metadata = opened.metadata()
        alpha = float(opened.get_tensor(UNET_Q + ".alpha"))
    assert metadata["ss_network_dim"] == "2"
    assert metadata["ss_network_alpha"] == f"{alpha:g}"
    assert alpha == 2  # scale 1
    assert metadata["ss_sd_model_name"] == told["ss_sd_model_name"]
    assert metadata["modelspec.title"] == "x"


def test_resizing_a_kohya_file_keeps_the_update(write, tmp_path):
    tensors = pair(UNET_CONV, rank=6, kernel=(3, 3))
    tensors[UNET_CONV + ".lora_up.weight"][:, 3:] = 0
    tensors[UNET_CONV + ".alpha"] = torch.tensor(2.0)
    path = write(tensors)
    loratool.resize(path, tmp_path / "small.safetensors", rank=3)
    small = load_file(tmp_path / "small.safetensors")

    def update(t):
        up, down = t[UNET_CONV + ".lora_up.weight"].double(), t[UNET_CONV + ".lora_down.weight"].double()
        return float(t[UNET_CONV + ".alpha"]) / down.shape[0] * up.flatten(1) @ down.flatten(1)

    assert small[UNET_CONV + ".lora_down.weight"].shape == (3, 16, 3, 3)
    torch.testing.assert_close(update(small), update(tensors), rtol=0, atol=1e-5)


def test_what_does_not_belong_into_a_file_is_an_error(tmp_path):
    mixed = pair(UNET_Q) | {f"base_model.model.x.lora_{f}.weight": torch.ones(2, 2) for f in "AB"}
    save_file(mixed, tmp_path / "mixed.safetensors")
    report = loratool.inspect(tmp_path / "mixed.safetensors")
    assert report.totals["format"] == "kohya"
    assert [f.where for f in report.findings if f.level == "error"] == ["base_model.model.x"]


BLOCKS = st.sampled_from(["down_blocks_{}_attentions_{}", "up_blocks_{}_attentions_{}", "mid_block_attentions_{}"])
LEAVES = st.sampled_from(["attn1_to_q", "attn2_to_k", "attn1_to_out_0", "ff_net_0_proj", "ff_net_2"])
NAMES = st.builds(
    lambda block, i, j, k, leaf: f"lora_unet_{block.format(i, j)}_transformer_blocks_{k}_{leaf}",
    BLOCKS, st.integers(0, 12), st.integers(0, 12), st.integers(0, 12), LEAVES,
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    modules=st.dictionaries(
        NAMES,
        st.tuples(
            st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.sampled_from([None, 0.0, 0.5, 3.0, 1 / 3])
        ),
        min_size=1,
        max_size=5,
    ),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_any_kohya_file_comes_back_from_peft_bit_for_bit(tmp_path_factory, modules, dtype):
    place = tmp_path_factory.mktemp("kohya")
    tensors = {}
    for module, (rank, out, inside, alpha) in modules.items():
        tensors |= pair(module, rank, out, inside, dtype=dtype)
        if alpha is not None:
            tensors[module + ".alpha"] = torch.tensor(alpha)
    save_file(tensors, place / "k.safetensors")
    loratool.convert(place / "k.safetensors", place / "peft", to="peft")
    loratool.convert(place / "peft", place / "again.safetensors", to="kohya", arch="stable-diffusion")
    again = load_file(place / "again.safetensors")
    for module, (rank, _, _, alpha) in modules.items():
        for part in ("lora_down.weight", "lora_up.weight"):
            assert torch.equal(again[f"{module}.{part}"], tensors[f"{module}.{part}"])
        wanted = torch.tensor(alpha) if alpha else torch.tensor(float(rank))
        assert again.get(module + ".alpha", torch.tensor(float(rank))) == wanted  # to the last bit of float32
    assert len(again) in (2 * len(modules), 3 * len(modules))  # all alphas or, where each is its rank, none
    config = json.loads((place / "peft/adapter_config.json").read_text())
    assert config["use_rslora"] is False


def test_alphas_are_written_as_0d_float32(tiny, adapter_folder, tmp_path):
    _, folder = adapter_folder(tiny("unet"), target_modules=["to_q"], r=3, lora_alpha=5)
    loratool.convert(folder, tmp_path / "k.safetensors", to="kohya", arch="stable-diffusion")
    raw = (tmp_path / "k.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    alphas = {n: e for n, e in header.items() if n.endswith(".alpha")}
    assert alphas
    for entry in alphas.values():
        start, stop = entry["data_offsets"]
        assert (entry["dtype"], entry["shape"]) == ("F32", [])
        assert struct.unpack("<f", raw[8 + length + start : 8 + length + stop]) == (5.0,)
