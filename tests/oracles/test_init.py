"""PEFT trains what init makes: the modules, names, shapes, distributions and strengths are PEFT's own.

The oracle is get_peft_model with a LoraConfig written by hand, PEFT's own defaults, or its `all-linear`.
"""

import json
import math
import re
import warnings
from pathlib import Path

import peft
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from tiny_files import run_main, snapshot

import loratool
from loratool.errors import InputError, LoratoolError, MismatchError, UnsupportedError, UsageError

MOE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
STACK = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
UNET = ["to_q", "to_k", "to_v", "to_out.0"]


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**MOE, num_local_experts=4)).eval()


def gpt_oss():
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    return GptOssForCausalLM(GptOssConfig(**MOE, num_local_experts=4, head_dim=8)).eval()


@pytest.fixture
def model(tiny):
    def make(kind, **overrides):
        return {"mixtral": mixtral, "gpt-oss": gpt_oss}.get(kind, lambda: tiny(kind, **overrides))()

    return make


@pytest.fixture
def base(model, tmp_path):
    def make(kind, dtype=torch.float32, **overrides):
        model(kind, **overrides).to(dtype).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return make


def trainable(model, folder):
    """The live model for training: every warning is an error, so keys that PEFT misses or ignores fail here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # PEFT itself asks transformers for an attribute by its old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return peft.PeftModel.from_pretrained(model, folder, is_trainable=True)


def by_peft(model, **config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(**config))


def tensors(folder: Path):
    return load_file(folder / "adapter_model.safetensors")


def shapes_of(live):
    return {n: tuple(t.shape) for n, t in get_peft_model_state_dict(live, save_embedding_layers=False).items()}


def shapes_in(folder):
    return {n: tuple(t.shape) for n, t in tensors(folder).items()}


def of_each(live, field):
    return {n: getattr(m, field)["default"] for n, m in live.get_base_model().named_modules() if hasattr(m, "lora_A")}


CASES = {
    "llama default": ("llama", {}, {"target_modules": ["q_proj", "v_proj"]}),
    "llama all-linear": ("llama", {"preset": "all-linear"}, {"target_modules": "all-linear"}),
    "llama mlp": ("llama-bare", {"preset": "mlp"}, {"target_modules": LLAMA[4:]}),
    "gpt2 default": ("gpt2", {}, {"target_modules": ["c_attn"]}),
    "gpt2 all-linear": ("gpt2", {"preset": "all-linear"}, {"target_modules": "all-linear"}),
    "gpt2 bare": ("gpt2-bare", {"preset": "all-linear"}, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "bert default": ("bert", {}, {"target_modules": ["query", "value"]}),
    "bert bare": (
        "bert-bare",
        {"preset": "attention"},
        {"target_modules": r".*attention\.(self\.(query|key|value)|output\.dense)"},
    ),
    "distilbert": ("distilbert", {}, {"target_modules": ["q_lin", "v_lin"]}),
    "unet": ("unet", {"preset": "attention"}, {"target_modules": UNET}),
    "unet convolutions": (
        "unet",
        {"target": ["conv1", "conv2", "to_q"]},
        {"target_modules": ["conv1", "conv2", "to_q"]},
    ),
    "embedding": ("llama", {"target": ["embed_tokens", "q_proj"]}, {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": ("llama", {"target": ["lm_head"]}, {"target_modules": ["lm_head"]}),
    "mixtral experts": ("mixtral", {"preset": "mlp"}, {"target_modules": [], "target_parameters": STACK}),
    "mixtral down": ("mixtral", {"target": ["w2"]}, {"target_modules": [], "target_parameters": STACK[1:]}),
    "router": ("mixtral", {"target": ["gate"]}, {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}),
    "gpt-oss": ("gpt-oss", {"preset": "all-linear"}, {"target_modules": LLAMA[:4], "target_parameters": STACK}),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_trains_it_without_a_word_and_its_modules_are_those_of_peft(case, base, model, run_model, tmp_path):
    kind, asked, config = CASES[case]
    loratool.init(base(kind), tmp_path / "new", rank=4, alpha=6, **asked)
    live = trainable(model(kind), tmp_path / "new")
    theirs = by_peft(model(kind), r=4, lora_alpha=6, **config)
    assert shapes_in(tmp_path / "new") == shapes_of(theirs) == shapes_of(live)
    assert of_each(live, "scaling") == of_each(theirs, "scaling")
    assert {n for n, p in live.named_parameters() if p.requires_grad} == {
        n for n, p in theirs.named_parameters() if p.requires_grad
    }
    torch.testing.assert_close(run_model(kind, live.eval()), run_model(kind, model(kind)), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_the_default_is_what_peft_would_choose(kind, base, model, tmp_path):
    loratool.init(base(kind), tmp_path / "new")
    assert shapes_in(tmp_path / "new") == shapes_of(by_peft(model(kind), r=8))


def test_ranks_and_alphas_by_pattern(base, model, tmp_path):
    loratool.init(
        base("llama"),
        tmp_path / "new",
        preset="all-linear",
        rank=4,
        alpha=8,
        rank_for={"q_proj": 6, "layers.{0-0}.**": 2, "mlp.up_proj": 5},
        alpha_for={"layers.{1-1}.mlp.**": 3},
        exclude="k_proj",
    )
    live = trainable(model("llama"), tmp_path / "new")
    found = of_each(live, "r")
    assert {n: r for n, r in found.items() if "layers.0" in n} == {
        f"model.layers.0.{part}": 5 if part == "mlp.up_proj" else 2
        for part in (
            "self_attn.q_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    }
    assert found["model.layers.1.self_attn.q_proj"] == 6
    assert found["model.layers.1.mlp.up_proj"] == 5
    assert found["model.layers.1.self_attn.v_proj"] == 4
    assert not any("k_proj" in n for n in found)
    alphas = of_each(live, "lora_alpha")
    assert {n for n, a in alphas.items() if a == 3} == {n for n in alphas if "layers.1.mlp" in n}
    assert {a for n, a in alphas.items() if "layers.1.mlp" not in n} == {8}


def test_a_stack_of_experts_has_one_rank_by_the_names_on_disk(base, model, tmp_path):
    loratool.init(base("mixtral"), tmp_path / "new", preset="mlp", rank=2, rank_for={"w2": 3}, alpha_for={"w2": 5})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of patterns for parameters, though it heeds them
        live = peft.PeftModel.from_pretrained(model("mixtral"), tmp_path / "new", is_trainable=True)
    config = {"target_modules": [], "target_parameters": STACK, "rank_pattern": {"experts.down_proj": 3}, "r": 2}
    theirs = by_peft(model("mixtral"), **config, lora_alpha=16, alpha_pattern={"experts.down_proj": 5})
    assert shapes_of(live) == shapes_of(theirs)
    assert of_each(live, "scaling") == of_each(theirs, "scaling")


def test_rslora_is_told_to_peft(base, model, tmp_path):
    loratool.init(base("llama"), tmp_path / "new", rank=4, alpha=8, rslora=True)
    assert set(of_each(trainable(model("llama"), tmp_path / "new"), "scaling").values()) == {4.0}


# -- What the factors are ---------------------------------------------------------------------------------------------

WIDE = {"hidden_size": 256, "vocab_size": 4096}


@pytest.mark.parametrize("start", ["kaiming", "gaussian"])
def test_the_distributions_are_those_of_peft(start, base, model, tmp_path):
    asked = {"target": ["q_proj", "embed_tokens"], "rank": 32, "init": start}
    loratool.init(base("llama", **WIDE), tmp_path / "new", **asked)
    config = {"init_lora_weights": True if start == "kaiming" else start, "target_modules": asked["target"], "r": 32}
    theirs = get_peft_model_state_dict(by_peft(model("llama", **WIDE), **config), save_embedding_layers=False)
    ours = tensors(tmp_path / "new")
    assert len(ours) == 6
    for name, tensor in ours.items():
        one, other = tensor.double(), theirs[name].double()
        assert one.dtype == other.dtype
        assert bool(one.any()) == bool(other.any()), name
        if one.any():
            assert abs(float(one.mean())) < 5 * float(other.std()) / math.sqrt(one.numel())
            assert float(one.std()) == pytest.approx(float(other.std()), rel=0.03)
            largest = (float(one.abs().max()), float(other.abs().max()))
            assert largest[0] == pytest.approx(
                largest[1], rel=0.01 if start == "kaiming" and "emb" not in name else 0.4
            )
    kinds = {name: t for name, t in ours.items() if "q_proj.lora_A" in name}
    width = 1 / math.sqrt(256) if start == "kaiming" else math.inf
    assert all(float(t.abs().max()) <= width for t in kinds.values())
    first, second = kinds.values()
    assert not torch.equal(first, second)


def test_the_bound_of_a_convolution_counts_its_kernel(base, model, tmp_path):
    loratool.init(base("unet"), tmp_path / "new", target="conv2", rank=16)
    for name, tensor in tensors(tmp_path / "new").items():
        if "lora_A" in name:
            bound = 1 / math.sqrt(tensor[0].numel())
            assert 0.9 * bound < float(tensor.abs().max()) <= bound


def test_the_seed_decides_and_the_number_of_workers_does_not(base, tmp_path):
    folder = base("llama")
    for name, seed, workers in (("a", 1, 1), ("b", 1, 3), ("c", 2, 1)):
        resources = loratool.engine.Resources(workers=workers)
        loratool.init(folder, tmp_path / name, seed=seed, resources=resources, dtype="bfloat16")
    a, b, c = (tensors(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not any(torch.equal(a[n], c[n]) for n in a if "lora_A" in n)
    assert {t.dtype for t in a.values()} == {torch.bfloat16}


# -- Like another adapter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "unet", "mixtral"])
def test_it_has_the_shape_of_another_adapter(kind, base, model, adapter_folder, tmp_path):
    config = {
        "llama": {
            "target_modules": LLAMA, "layers_to_transform": [1], "use_rslora": True, "rank_pattern": {"q_proj": 3},
            "alpha_pattern": {"v_proj": 5},
        },
        "gpt2": {"target_modules": ["c_attn", "c_fc", "wte"], "rank_pattern": {"c_attn": 3}},
        "unet": {"target_modules": ["to_q", "conv1"], "alpha_pattern": {"to_q": 5}},
        "mixtral": {"target_modules": ["q_proj"], "target_parameters": STACK, "rank_pattern": {"q_proj": 3}},
    }[kind]  # fmt: skip
    _, other = adapter_folder(model(kind), r=4, lora_alpha=6, **config)
    loratool.init(base(kind), tmp_path / "new", like=other)
    theirs = peft.PeftModel.from_pretrained(model(kind), other)
    assert shapes_in(tmp_path / "new") == shapes_of(theirs)
    live = trainable(model(kind), tmp_path / "new")
    assert {n: pytest.approx(s, rel=1e-9) for n, s in of_each(live, "scaling").items()} == of_each(theirs, "scaling")


def test_it_has_the_shape_of_a_kohya_file(base, model, adapter_folder, tmp_path):
    _, other = adapter_folder(model("unet"), r=4, lora_alpha=6, target_modules=["to_q", "conv1"])
    loratool.convert(other, tmp_path / "kohya.safetensors", to="kohya", base=base("unet"))
    loratool.init(tmp_path / "base", tmp_path / "new", like=tmp_path / "kohya.safetensors")
    assert shapes_in(tmp_path / "new") == shapes_in(other)


def test_it_has_the_ranks_that_adalora_left(base, model, tmp_path):
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    live = peft.get_peft_model(model("llama"), config)
    left = {"layers.0.self_attn.q_proj": 3, "layers.1.self_attn.v_proj": 0}
    config.rank_pattern = {
        name.replace(".default", "").removeprefix("base_model.model."): [
            n < next((r for m, r in left.items() if m in name), 2) for n in range(4)
        ]
        for name, _ in live.named_parameters()
        if "lora_E" in name
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a rank of 0
        live.save_pretrained(tmp_path / "adalora")
    loratool.init(base("llama"), tmp_path / "new", like=tmp_path / "adalora")
    downs = {name.removeprefix("base_model.model.model."): t.shape[0] for name, t in tensors(tmp_path / "new").items()
             if "lora_A" in name}  # fmt: skip
    assert downs == {
        f"layers.{i}.self_attn.{m}.lora_A.weight": left.get(f"layers.{i}.self_attn.{m}", 2)
        for i, m in [(0, "q_proj"), (0, "v_proj"), (1, "q_proj")]  # nothing is left of the fourth
    }
    scalings = of_each(trainable(model("llama"), tmp_path / "new"), "scaling")
    assert (
        list(scalings.values()) == [pytest.approx(6 / 4, rel=1e-5)] * 3
    )  # alpha over the rank that training began with


def test_an_adapter_of_another_kind_is_named(base, model, tmp_path):
    live = peft.get_peft_model(model("llama"), peft.LoHaConfig(r=4, target_modules=["q_proj"]))
    live.save_pretrained(tmp_path / "loha")
    with pytest.raises(UnsupportedError, match=r"--like takes ranks and alphas of LoRA, and this is loha") as refusal:
        loratool.init(base("llama"), tmp_path / "new", like=tmp_path / "loha")
    assert "--rank-for" in refusal.value.hint
    assert not (tmp_path / "new").exists()


def test_an_adapter_of_other_layers_is_named(base, model, adapter_folder, tmp_path):
    _, other = adapter_folder(model("llama", num_hidden_layers=3), target_modules=["q_proj"])
    with pytest.raises(MismatchError, match=r"the model has no model\.layers\.2\.self_attn\.q_proj"):
        loratool.init(base("llama"), tmp_path / "new", like=other)


# -- PiSSA ------------------------------------------------------------------------------------------------------------


def step(live, n=3):
    """Train for a few steps; every factor moves."""
    optimizer = torch.optim.SGD([p for p in live.parameters() if p.requires_grad], lr=0.5)
    generator = torch.Generator().manual_seed(3)
    for _ in range(n):
        ids = torch.randint(3, 64, (2, 9), generator=generator)
        live(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return live


def pissa(folder, tmp_path, **options):
    return loratool.init(folder, tmp_path / "new", init="pissa", residual=tmp_path / "rest", rank=4, alpha=6, **options)


@pytest.mark.parametrize(
    "case",
    [("llama", {"preset": "all-linear"}), ("gpt2", {"preset": "all-linear"}), ("llama", {"rslora": True})],
)
def test_pissa_is_that_of_peft_and_trains_without_changing_the_base_again(case, base, model, run_model, tmp_path):
    kind, more = case
    pissa(base(kind), tmp_path, **more)
    modules = {"llama": LLAMA if "preset" in more else ["q_proj", "v_proj"], "gpt2": ["c_attn", "c_proj", "c_fc"]}[kind]
    settings = {"target_modules": modules, "init_lora_weights": "pissa", "use_rslora": more.get("rslora", False)}
    theirs = by_peft(model(kind), r=4, lora_alpha=6, **settings)
    ours, wanted = tensors(tmp_path / "new"), get_peft_model_state_dict(theirs)
    assert ours.keys() == wanted.keys()
    for name in (n for n in ours if "lora_A" in n):
        one, other = ours[name].double(), wanted[name].detach().double()
        signs = torch.sign((one * other).sum(1, keepdim=True))
        torch.testing.assert_close(one * signs, other, rtol=1e-3, atol=1e-4)
        up = name.replace("lora_A", "lora_B")
        torch.testing.assert_close(ours[up] * signs.T.float(), wanted[up].detach(), rtol=1e-3, atol=1e-4)
    rest = type(model(kind)).from_pretrained(tmp_path / "rest")
    live = trainable(rest, tmp_path / "new").eval()
    for (name, module), (_, other) in zip(live.named_modules(), theirs.named_modules(), strict=True):
        if hasattr(module, "lora_A"):
            torch.testing.assert_close(module.base_layer.weight, other.base_layer.weight, rtol=0, atol=1e-5, msg=name)
    plain = run_model(kind, model(kind))
    torch.testing.assert_close(run_model(kind, live), plain, rtol=1e-4, atol=1e-5)
    assert float((run_model(kind, type(rest).from_pretrained(tmp_path / "rest").eval()) - plain).abs().max()) > 1e-2


@pytest.fixture
def trained(base, tmp_path):
    """An adapter that PEFT trained from PiSSA's start on the residual, the live model, and the original base."""
    folder = base("llama")
    pissa(folder, tmp_path, preset="attention")
    from transformers import LlamaForCausalLM

    live = step(trainable(LlamaForCausalLM.from_pretrained(tmp_path / "rest"), tmp_path / "new"))
    live.save_pretrained(tmp_path / "trained")
    assert json.loads((tmp_path / "trained/adapter_config.json").read_text())["init_lora_weights"] is True
    return folder, live.eval()


def test_what_was_trained_merges_into_the_residual_and_by_way_of_its_start_into_the_original(
    trained, run_model, tmp_path
):
    folder, live = trained
    loratool.merge(tmp_path / "rest", [tmp_path / "trained"], tmp_path / "one")
    start = tmp_path / "new/initial"
    loratool.merge(folder, [tmp_path / "trained"], tmp_path / "two", init_adapter=start)
    loratool.convert(tmp_path / "trained", tmp_path / "plain", to="peft", init_adapter=start)
    loratool.merge(folder, [tmp_path / "plain"], tmp_path / "three")
    one, two, three = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two", "three"))
    wanted = {n.removeprefix("base_model.model."): p for n, p in live.merge_and_unload().named_parameters()}
    before = load_file(folder / "model.safetensors")
    assert any(not torch.allclose(before[n], wanted[n], atol=1e-3) for n in before)
    for name in before:
        for found in (one, two, three):
            torch.testing.assert_close(found[name], wanted[name].detach(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("verb", ["merge", "resize", "convert", "combine"])
def test_without_its_start_it_is_not_taken_for_an_adapter_of_the_original(verb, trained, tmp_path):
    folder, adapter, out = trained[0], tmp_path / "trained", tmp_path / "out.safetensors"
    calls = {
        "merge": lambda: loratool.merge(folder, [adapter], out),
        "resize": lambda: loratool.resize(adapter, out, rank=2),
        "convert": lambda: loratool.convert(adapter, out, to="kohya"),
        "combine": lambda: loratool.combine([adapter, adapter], out),
    }
    with pytest.raises(MismatchError, match="pissa changed the base model before training") as refusal:
        calls[verb]()
    assert "--init-adapter" in refusal.value.hint
    assert not out.exists()


def test_what_was_already_made_relative_to_the_original_is_not_changed_again(trained, tmp_path):
    loratool.convert(tmp_path / "trained", tmp_path / "plain", to="peft", init_adapter=tmp_path / "new/initial")
    with pytest.raises(MismatchError, match="nothing to take back"):
        loratool.merge(trained[0], [tmp_path / "plain"], tmp_path / "out", init_adapter=tmp_path / "new/initial")


def test_the_residual_of_a_model_in_16_bits_is_rounded_as_peft_rounds_it(base, model, tmp_path):
    report = pissa(base("llama", torch.bfloat16), tmp_path)
    assert report.totals["residual_rounding"] > 0
    theirs = by_peft(
        model("llama").to(torch.bfloat16),
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights="pissa",
    )
    rest = load_file(tmp_path / "rest/model.safetensors")
    wanted = {
        n.removeprefix("base_model.model.").replace(".base_layer", ""): t
        for n, t in theirs.state_dict().items()
        if "lora_" not in n
    }
    assert rest.keys() == wanted.keys()
    for name, tensor in rest.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.float(), wanted[name].float(), rtol=2**-7, atol=1e-5)


def test_a_weight_that_does_not_fit_in_memory_is_factorised_in_panels(base, tmp_path):
    folder = base("llama", **WIDE)
    few = loratool.engine.Resources(memory=1 << 20)
    pissa(folder, tmp_path)
    loratool.init(folder, tmp_path / "n", init="pissa", residual=tmp_path / "r", rank=4, alpha=6, resources=few)
    one, other = tensors(tmp_path / "new"), tensors(tmp_path / "n")
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-5)


# -- What is refused --------------------------------------------------------------------------------------------------

REFUSED = {
    "a part of a stack": ("mixtral", {"target": ["experts.0.w1"]}, UnsupportedError, "as a whole"),
    "no such module": ("llama", {"target": ["query"]}, MismatchError, "no module matches 'query'"),
    "no such module to leave out": ("llama", {"exclude": ["query"]}, MismatchError, "no module matches 'query'"),
    "a rank for nothing": ("llama", {"rank_for": {"up": 4}}, MismatchError, "no module matches 'up'"),
    "nothing left": ("llama", {"exclude": ["**"]}, MismatchError, "no module is left"),
    "rank 0": ("llama", {"rank": 0}, UsageError, "a rank of 0"),
    "alpha nan": ("llama", {"alpha": math.nan}, UsageError, "an alpha of nan"),
    "like and a rank": ("llama", {"like": "x", "rank": 4}, UsageError, "--like goes without"),
    "a file": ("llama", {"out": "new.safetensors"}, UsageError, "a folder"),
    "no residual": ("llama", {"init": "pissa"}, UsageError, "out of the base"),
    "residual of nothing": ("llama", {"residual": "rest"}, UsageError, "leaves the base as it is"),
    "a residual inside": ("llama", {"init": "pissa", "residual": "new/rest"}, UsageError, "neither in the other"),
    "pissa of experts": (
        "mixtral", {"init": "pissa", "residual": "rest", "preset": "mlp"}, UnsupportedError, "linear layers: model"
    ),
    "pissa above full rank": (
        "llama", {"init": "pissa", "residual": "rest", "rank": 20}, UnsupportedError, "smaller side of: .*v_proj"
    ),
    "not of the preset": ("llama", {"rank_for": {"k_proj": 4}}, MismatchError, "chosen: .* default is q_proj, v_proj"),
    "nothing to leave out": ("llama", {"exclude": ["lm_head"]}, MismatchError, "chosen: .* default is q_proj, v_proj"),
    "preset and more": (
        "llama", {"preset": "attention", "target": ["up_proj"]}, MismatchError, "preset attention is .*k_proj"
    ),
    "not of the target": (
        "llama", {"target": ["q_proj"], "alpha_for": {"k_proj": 4}}, MismatchError, "'k_proj' .* these are q_proj"
    ),
    "another start": ("llama", {"init": "zeros"}, UsageError, "'zeros' is no start"),
}  # fmt: skip


@pytest.mark.parametrize("start", ["olora", "eva", "lora-ga", "lora_ga", "corda"])
def test_a_start_that_peft_makes_is_said_to_be_one(start, base, tmp_path, capfd):
    assert run_main("init", base("llama"), "-o", tmp_path / "new", "--init", start) == 2
    assert f"PEFT makes {start}" in capfd.readouterr().err
    assert run_main("init", tmp_path / "base", "-o", tmp_path / "new", "--init", "zeros") == 2
    assert "PEFT" not in capfd.readouterr().err


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_by_name_and_nothing_is_written(case, base, tmp_path, monkeypatch):
    kind, asked, error, words = REFUSED[case]
    folder = base(kind)
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    options = {"out": "new", **asked}
    with pytest.raises(error, match=words):
        loratool.init(folder, **options)
    assert snapshot(tmp_path) == before


HINTS = {
    "full rank": ({"init": "pissa", "residual": "rest", "rank": 20}, "--rank 16 or less, or --rank-for v_proj=16"),
    "one folder": ({"init": "pissa", "residual": "new"}, "-o new --residual new-base"),
    "not chosen": ({"exclude": ["lm_head"]}, "--preset or --target"),
}


@pytest.mark.parametrize("case", HINTS)
def test_a_refusal_says_what_to_type(case, base, tmp_path, monkeypatch):
    asked, words = HINTS[case]
    folder = base("llama")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoratoolError) as refusal:
        loratool.init(folder, "new", **asked)
    assert re.search(words, refusal.value.hint), refusal.value.hint
    if case == "full rank":
        assert loratool.init(folder, "new", **{**asked, "rank": 16}).totals["ranks"] == [16]


def test_part_of_a_stack_is_refused_with_a_pattern_of_the_whole(base, tmp_path):
    folder = base("mixtral")
    with pytest.raises(UnsupportedError) as refusal:
        loratool.init(folder, tmp_path / "new", target="experts.*.w1")
    every, one = re.findall("'(.*?)'", refusal.value.hint)
    assert loratool.init(folder, tmp_path / "new", target=every).totals["modules"] == MOE["num_hidden_layers"]
    assert loratool.init(folder, tmp_path / "one", target=one).totals["modules"] == 1


def test_an_adapter_is_no_base_and_its_refusal_says_what_to_do(base, tmp_path, capsys):
    loratool.init(base("llama"), tmp_path / "new")
    with pytest.raises(InputError, match="this is an adapter") as refusal:
        loratool.init(tmp_path / "new", tmp_path / "other")
    assert f"loratool inspect {tmp_path / 'new'}" in refusal.value.hint
    assert run_main("init", tmp_path / "new", "-o", tmp_path / "other") == 3


@pytest.mark.parametrize(
    ("kind", "rank", "asked"),
    [
        ("llama", 20, {"preset": "all-linear"}),
        ("unet", 20, {"target": ["conv1", "conv2", "to_q"]}),
        ("mixtral", 33, {"preset": "mlp"}),
    ],
)
def test_ranks_above_the_full_one_of_a_weight_are_warned_of(kind, rank, asked, base, tmp_path):
    """The oracle is the rank of a random product of the factors themselves: more columns than it are for nothing."""
    report = loratool.init(base(kind), tmp_path / "new", rank=rank, **asked)
    below = set()
    generator = torch.Generator().manual_seed(0)
    for name, down in tensors(tmp_path / "new").items():
        if "lora_A" not in name:
            continue
        up = tensors(tmp_path / "new")[name.replace("lora_A", "lora_B")]
        copies = len(down) // rank
        one, other = (
            torch.randn(s, generator=generator).double()
            for s in (down[:rank].flatten(1).shape, up.flatten(1)[:, ::copies].shape)
        )
        if torch.linalg.matrix_rank(other @ one) < rank:
            below.add(name)
    warned = [f for f in report.findings if "is above" in f.what]
    assert all(f.level == "warning" and "--rank" in f.hint for f in warned)
    assert 0 < len(warned) == len(below)


def test_a_rank_that_is_possible_is_not_warned_of(base, tmp_path):
    assert not loratool.init(base("llama"), tmp_path / "new", rank=8, preset="all-linear").findings


@pytest.mark.parametrize("start", ["kaiming", "pissa"])
def test_a_base_in_a_folder_is_named_so_that_it_is_found_from_anywhere(start, base, tmp_path, monkeypatch):
    folder = base("llama")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    more = {"init": "pissa", "residual": "rest"} if start == "pissa" else {}
    loratool.init("base", "new", **more)
    monkeypatch.chdir(tmp_path / "elsewhere")
    if start == "kaiming":
        assert run_main("merge", "../new", "-o", "merged", "--allow-noop") == 0
        assert snapshot(tmp_path / "elsewhere/merged")["model.safetensors"] == snapshot(folder)["model.safetensors"]
    else:
        assert run_main("merge", "../new", "-o", "merged") == 0
        told = json.loads((tmp_path / "new/initial/adapter_config.json").read_text())
        assert Path(told["base_model_name_or_path"]).samefile(folder)


def test_the_share_of_the_norm_of_all_weights(base, model, tmp_path):
    report = pissa(base("llama"), tmp_path)
    weights = [
        m.weight.detach().double() for n, m in model("llama").named_modules() if n.endswith(("q_proj", "v_proj"))
    ]
    kept = sum(float(torch.linalg.svdvals(w)[:4].square().sum()) for w in weights)
    wanted = math.sqrt(kept / sum(float(w.square().sum()) for w in weights))
    assert report.totals["share_of_norm"] == pytest.approx(wanted, rel=1e-5)


def test_the_initial_adapter_of_another_is_refused_with_where_the_right_one_is(trained, tmp_path):
    loratool.init(trained[0], tmp_path / "n2", init="pissa", residual=tmp_path / "r2", rank=4, alpha=6, preset="mlp")
    with pytest.raises(MismatchError, match="other modules") as refusal:
        loratool.convert(tmp_path / "trained", tmp_path / "x", to="peft", init_adapter=tmp_path / "n2/initial")
    assert "initial" in refusal.value.hint


def test_convert_says_what_became_of_the_ranks(trained, tmp_path):
    report = loratool.convert(tmp_path / "trained", tmp_path / "x", to="peft", init_adapter=tmp_path / "new/initial")
    ranks = {len(t) for n, t in tensors(tmp_path / "x").items() if "lora_A" in n}
    assert ranks == {8}
    assert any("rank 4 became 8 in 8" in f.what for f in report.findings)


def test_a_residual_that_is_in_the_way_is_found_before_anything_is_written(base, tmp_path):
    folder = base("llama")
    (tmp_path / "rest").mkdir()
    (tmp_path / "rest/mine").write_text("mine")
    with pytest.raises(LoratoolError, match="exists"):
        pissa(folder, tmp_path)
    assert not (tmp_path / "new").exists()


def test_where_the_residual_cannot_be_written_the_adapter_goes_again(base, tmp_path, monkeypatch):
    import loratool.initialising

    folder = base("llama")
    real = loratool.initialising.finish

    def failing(plan, inputs, out, **running):
        if Path(out).name == "rest":
            raise InputError("no room")
        return real(plan, inputs, out, **running)

    monkeypatch.setattr(loratool.initialising, "finish", failing)
    with pytest.raises(InputError, match="no room"):
        pissa(folder, tmp_path)
    assert not (tmp_path / "new").exists()


def test_a_dry_run_writes_nothing(base, tmp_path):
    folder = base("llama")
    before = snapshot(tmp_path)
    report = pissa(folder, tmp_path, dry_run=True)
    assert report.dry_run
    assert report.totals["modules"] == 4
    assert snapshot(tmp_path) == before


def test_the_command_says_what_it_made(base, tmp_path, capsys):
    code = run_main("init", base("llama"), "-o", tmp_path / "new", "--rank-for", "q_proj=4", "--alpha", "32", "--json")
    told = json.loads(capsys.readouterr().out)
    assert code == 0
    assert told["totals"]["ranks"] == [4, 8]
    assert told["totals"]["target_modules"] == ["q_proj", "v_proj"]
    assert told["totals"]["parameters"] == sum(t.numel() for t in tensors(tmp_path / "new").values())
