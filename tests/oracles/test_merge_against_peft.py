"""What merge writes, loaded by transformers and diffusers, against the live PEFT model and an fp64 reference."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

import loratool

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
UNET = [
    "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2",
    "conv_shortcut", "time_emb_proj", "conv_in", "conv_out", "linear_1", "linear_2", "downsamplers.0.conv",
    "upsamplers.0.conv",
]  # fmt: skip
CASES = {
    "llama": ("llama", {"target_modules": [*LLAMA, "lm_head"], "r": 4, "lora_alpha": 6}),
    "llama-bare": ("llama-bare", {"target_modules": LLAMA, "r": 4}),
    "llama-embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "r": 3, "lora_alpha": 9}),
    "llama-rslora": ("llama", {"target_modules": LLAMA, "r": 8, "lora_alpha": 5, "use_rslora": True}),
    "llama-patterns": (
        "llama",
        {
            "target_modules": LLAMA,
            "r": 4,
            "lora_alpha": 4,
            "rank_pattern": {"k_proj": 2, r"layers\.1\.mlp\.\w+_proj": 7, "^model.layers.0.self_attn.o_proj": 1},
            "alpha_pattern": {"v_proj": 1.5, r"layers.0.mlp.(gate|up)_proj": 20},
        },
    ),
    "mistral": ("mistral", {"target_modules": LLAMA, "r": 4}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc", "wpe"], "r": 5, "lora_alpha": 3}),
    "gpt2-bare": ("gpt2-bare", {"target_modules": ["c_attn", "c_proj", "c_fc", "wte"], "r": 5}),
    "bert": ("bert", {"target_modules": ["query", "key", "value", "dense", "classifier", "word_embeddings"], "r": 4}),
    "bert-bare": ("bert-bare", {"target_modules": ["query", "dense"], "r": 4}),
    "distilbert": ("distilbert", {"target_modules": ["q_lin", "out_lin", "lin1", "lin2", "pre_classifier"], "r": 4}),
    "distilbert-bare": ("distilbert-bare", {"target_modules": ["v_lin", "position_embeddings"], "r": 4}),
    "unet": ("unet", {"target_modules": UNET, "r": 4, "lora_alpha": 3}),
    "clip": ("clip", {"target_modules": ["q_proj", "k_proj", "out_proj", "fc1", "fc2", "token_embedding"], "r": 4}),
}


def updates(live):
    """The fp64 update of every adapted weight, and the same with absolute values, by the name in memory."""
    exact, bound = {}, {}
    for name, module in live.get_base_model().named_modules():
        if not hasattr(module, "lora_A") or "default" not in module.scaling:
            continue
        layer = module.get_base_layer()
        if isinstance(layer, torch.nn.Embedding):
            A, B = module.lora_embedding_A["default"], module.lora_embedding_B["default"]
        else:
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
        A, B = A.detach().double().flatten(1), B.detach().double().flatten(1)
        products = [module.scaling["default"] * (B @ A), module.scaling["default"] * (B.abs() @ A.abs())]
        if isinstance(layer, (Conv1D, torch.nn.Embedding)):
            products = [p.T for p in products]
        exact[name + ".weight"], bound[name + ".weight"] = (p.reshape(layer.weight.shape) for p in products)
    return exact, bound


def half_ulp(exact, dtype):
    digits = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}[dtype]
    _, exponent = torch.frexp(exact)
    lowest = -14 + 1 if dtype is torch.float16 else -126 + 1
    return torch.ldexp(torch.ones_like(exact), exponent.clamp(min=lowest) - digits) / 2


def assert_rounded_once(got, weight, update, bound, dtype):
    """|got - (W + dW)| is at most half an ulp of the output, plus what fp32 accumulation may cost."""
    exact = weight.double() + update
    noise = 2.0**-22 * (weight.double().abs() + bound)
    error = (got.double() - exact).abs()
    assert got.dtype == dtype
    assert bool((error <= half_ulp(exact, dtype) + noise).all())


def load(model, folder, dtype):
    if type(model).__name__.startswith("UNet"):  # diffusers knows no "auto"
        return type(model).from_pretrained(folder, torch_dtype=dtype).eval()
    return type(model).from_pretrained(folder, dtype="auto").eval()


@pytest.mark.parametrize("case", CASES)
def test_merged_fp32_models_load_and_answer_like_the_live_adapter(case, saved, adapter_folder, run_model, tmp_path):
    kind, config = CASES[case]
    model, base = saved(kind)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    plain = run_model(kind, model)
    live, adapter = adapter_folder(model, **config)
    wanted = run_model(kind, live)
    effect = float((wanted - plain).abs().max())
    loratool.merge(base, [adapter], tmp_path / "merged")
    merged = load(model, tmp_path / "merged", torch.float32)
    assert effect > 0
    assert float((run_model(kind, merged) - wanted).abs().max()) < 1e-4 * effect
    exact, bound = updates(live)
    state = merged.state_dict()
    theirs = live.merge_and_unload().state_dict()
    assert exact
    assert set(exact) <= set(state)
    for name, weight in before.items():
        if name in exact:
            assert_rounded_once(state[name], weight, exact[name], bound[name], torch.float32)
            torch.testing.assert_close(state[name], theirs[name], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(state[name], weight), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["llama", "llama-embeddings", "gpt2", "bert", "unet", "clip"])
def test_half_precision_bases_are_rounded_once(case, dtype, saved, adapter_folder, tmp_path):
    kind, config = CASES[case]
    model, base = saved(kind, dtype=dtype)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    live, adapter = adapter_folder(model, **config)
    loratool.merge(base, [adapter], tmp_path / "merged")
    merged = load(model, tmp_path / "merged", dtype)
    state = merged.state_dict()
    exact, bound = updates(live)
    assert exact
    theirs = live.merge_and_unload().state_dict()
    for name, weight in before.items():
        if name not in exact:
            assert torch.equal(state[name], weight), name
            continue
        assert_rounded_once(state[name], weight, exact[name], bound[name], dtype)
        # PEFT rounds the update, and then the sum: it is within one more rounding of each
        slack = half_ulp(exact[name], dtype) * 2 + half_ulp(weight.double() + exact[name], dtype) * 4
        assert bool(((state[name].double() - theirs[name].double()).abs() <= slack + 1e-7).all())


@pytest.mark.parametrize("adapter_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_adapters_are_used_at_their_stored_values(adapter_dtype, saved, adapter_folder, tmp_path):
    from safetensors.torch import save_file

    model, base = saved("llama")
    _, adapter = adapter_folder(model, target_modules=["q_proj"], r=4, lora_alpha=8)
    factors = {n: t.to(adapter_dtype) for n, t in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(factors, adapter / "adapter_model.safetensors")
    loratool.merge(base, [adapter], tmp_path / "merged")
    weights, merged = load_file(base / "model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    for layer in range(2):
        module = f"model.layers.{layer}.self_attn.q_proj"
        A, B = (factors[f"base_model.model.{module}.lora_{f}.weight"].double() for f in "AB")
        name = module + ".weight"
        assert_rounded_once(merged[name], weights[name], 2 * B @ A, 2 * B.abs() @ A.abs(), torch.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_the_output_dtype_can_be_chosen_and_transformers_loads_it(dtype, stored, saved, adapter_folder, tmp_path):
    model, base = saved("gpt2", dtype=stored)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    live, adapter = adapter_folder(model, target_modules=["c_attn"], r=4)
    loratool.merge(base, [adapter], tmp_path / "merged", dtype=dtype)
    wanted = getattr(torch, dtype)
    merged = type(model).from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == wanted
    exact, bound = updates(live)
    for name, value in merged.state_dict().items():
        if name in exact:
            assert_rounded_once(value, before[name], exact[name], bound[name], wanted)
        else:
            assert torch.equal(value, before[name].to(wanted)), name
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert {config.get("dtype"), config.get("torch_dtype")} <= {dtype, None}


def three_adapters(tiny, adapter_folder):
    configs = [
        {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 7},
        {"target_modules": ["q_proj", "down_proj"], "r": 2, "use_rslora": True},
        {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 3},
    ]
    lives, folders = [], []
    for n, config in enumerate(configs):
        live, folder = adapter_folder(tiny("llama"), seed=n + 1, folder=f"adapter-{n}", **config)
        lives.append(live)
        folders.append(folder)
    return lives, folders


def test_several_adapters_in_any_order_give_identical_files(tiny, saved, adapter_folder, tmp_path):
    _, base = saved("llama")
    _, folders = three_adapters(tiny, adapter_folder)
    pairs = list(zip(folders, [0.7, -0.4, 1.3], strict=True))
    results = set()
    for n, order in enumerate(itertools.permutations(pairs)):
        loratool.merge(base, [f for f, _ in order], tmp_path / f"m{n}", weights=[w for _, w in order])
        results.add((tmp_path / f"m{n}" / "model.safetensors").read_bytes())
    assert len(results) == 1


def test_several_adapters_add_up_with_their_weights(tiny, saved, adapter_folder, tmp_path):
    model, base = saved("llama")
    lives, folders = three_adapters(tiny, adapter_folder)
    weights = [0.7, -0.4, 1.3]
    loratool.merge(base, folders, tmp_path / "merged", weights=weights)
    merged = load_file(tmp_path / "merged/model.safetensors")
    tables = [updates(live) for live in lives]
    touched = set().union(*(exact for exact, _ in tables))
    assert len(touched) == 6
    for name, weight in model.state_dict().items():
        update = sum((w * e[name] for w, (e, _) in zip(weights, tables, strict=True) if name in e), torch.zeros(1))
        bound = sum((abs(w) * b[name] for w, (_, b) in zip(weights, tables, strict=True) if name in b), torch.zeros(1))
        assert_rounded_once(merged[name], weight, update.double(), 2 * bound, torch.float32)


def test_merging_by_target_changes_only_what_was_selected(saved, adapter_folder, tmp_path):
    model, base = saved("llama")
    live, adapter = adapter_folder(model, target_modules=["q_proj", "v_proj"], r=4)
    loratool.merge(base, [adapter], tmp_path / "merged", target=["model.layers.{i}.self_attn.*"], exclude=["v_proj"])
    old, new = load_file(base / "model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    changed = {n for n in old if not torch.equal(old[n], new[n])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    exact, bound = updates(live)
    for name in changed:
        assert_rounded_once(new[name], old[name], exact[name], bound[name], torch.float32)


def test_a_checkpoint_saved_without_its_prefix_takes_an_adapter_that_has_it(saved, adapter_folder, tmp_path):
    # the gpt2 files on the Hub omit the leading "transformer."
    from safetensors.torch import save_file

    model, base = saved("gpt2")
    live, adapter = adapter_folder(model, target_modules=["c_attn"], r=4)
    weights = load_file(base / "model.safetensors")
    save_file({n.removeprefix("transformer."): t for n, t in weights.items()}, base / "model.safetensors")
    loratool.merge(base, [adapter], tmp_path / "merged")
    merged = load_file(tmp_path / "merged/model.safetensors")
    exact, bound = updates(live)
    assert len(exact) == 2
    for name, update in exact.items():
        assert_rounded_once(
            merged[name.removeprefix("transformer.")], weights[name], update, bound[name], torch.float32
        )


def test_a_model_saved_in_shards_keeps_them(saved, adapter_folder, run_model, tmp_path):
    model, _ = saved("llama")
    base = tmp_path / "sharded"
    model.save_pretrained(base, max_shard_size="20KB")
    shards = sorted(p.name for p in base.glob("*.safetensors"))
    assert len(shards) > 2
    live, adapter = adapter_folder(model, target_modules=LLAMA, r=4)
    loratool.merge(base, [adapter], tmp_path / "merged")
    assert sorted(p.name for p in Path(tmp_path / "merged").glob("*.safetensors")) == shards
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(run_model("llama", merged), run_model("llama", live), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["llama-embeddings", "gpt2", "unet", "clip"])
def test_weights_cut_into_many_panels_and_tiles_are_whole(case, saved, adapter_folder, tmp_path, monkeypatch):
    from loratool.engine import Resources
    from loratool.operations import panels

    monkeypatch.setattr(panels, "PANEL", 1)  # 64 rows a panel, the least there is
    monkeypatch.setattr(panels, "TILE", 1)
    kind, config = CASES[case]
    wide = {
        "llama": {"vocab_size": 200, "intermediate_size": 150},
        "gpt2": {"n_embd": 100},
        "clip": {"vocab_size": 200},
    }
    model, base = saved(kind, **wide.get(kind, {"block_out_channels": (80, 144)}))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    live, adapter = adapter_folder(model, **config)
    loratool.merge(base, [adapter], tmp_path / "merged", resources=Resources(workers=1))
    loratool.merge(base, [adapter], tmp_path / "again", resources=Resources(workers=3))
    (one,), (two,) = (list((tmp_path / f).glob("*.safetensors")) for f in ("merged", "again"))
    assert one.read_bytes() == two.read_bytes()
    exact, bound = updates(live)
    assert max(t.shape[0] for n, t in before.items() if n in exact) > 128
    for name, value in load(model, tmp_path / "merged", torch.float32).state_dict().items():
        if name in exact:
            assert_rounded_once(value, before[name], exact[name], bound[name], torch.float32)
        else:
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("linear", itertools.product([False, True], repeat=2), ids=str)
def test_a_1x1_convolution_and_a_linear_layer_take_each_others_adapters(linear, tiny, saved, adapter_folder, tmp_path):
    linear_base, linear_adapter = linear
    # proj_in and proj_out are convolutions in SD 1 and linear in SD 2, and trainers mix their files
    model, base = saved("unet", use_linear_projection=linear_base)
    trained = tiny("unet", use_linear_projection=linear_adapter)
    live, adapter = adapter_folder(trained, target_modules=["proj_in", "proj_out", "to_q"], r=4)
    loratool.convert(adapter, tmp_path / "k.safetensors", to="kohya", arch="stable-diffusion")
    exact, bound = updates(live)
    assert len(exact) > 6
    for n, source in enumerate((adapter, tmp_path / "k.safetensors")):
        loratool.merge(base, [source], tmp_path / f"merged-{n}")
        state = load(model, tmp_path / f"merged-{n}", torch.float32).state_dict()
        for name, weight in model.state_dict().items():
            if name in exact:
                update, noise = exact[name].reshape(weight.shape), bound[name].reshape(weight.shape)
                assert_rounded_once(state[name], weight, update, noise, torch.float32)
            else:
                assert torch.equal(state[name], weight), name
