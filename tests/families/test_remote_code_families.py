"""Families whose models are remote code: names and configs as published, and layouts against the models' own reshapes.

No class can be built here. So names and shapes come from remote_shapes.py, and a layout is checked with a few lines of
torch that cut a projection's output as the modeling file does; the output holds row numbers, so what is cut says which
rows of the weight it came from.
"""

import pytest
import torch
from remote_shapes import SAMPLES, Sample
from safetensors.torch import load_file
from tiny_files import run_main, write_adapter, write_base
from zoo import record, tiny

from loratool.detection import family_of, fits, matrices
from loratool.layers import Excluded, Linear
from loratool.patterns import flatten, selects
from loratool.plugins import load
from loratool.storage import checkpoint
from loratool.tensors import TensorRef, TensorSource

LABELS = [one.label for one in SAMPLES]
FAMILIES = sorted({one.family for one in SAMPLES})
LLAMA_LIKE = ("internlm", "internlm3", "xverse", "yi")
DEFAULT_TARGETS = {
    "baichuan": ["W_pack"], "baichuan2": ["W_pack"], "chatglm": ["query_key_value"], "chatglm2": ["query_key_value"],
    "internlm": ["q_proj", "v_proj"], "internlm2": ["wqkv"], "internlm3": ["q_proj", "v_proj"],
    "xverse": ["q_proj", "v_proj"], "yi": ["q_proj", "v_proj"], "phi-old": ["Wqkv"], "phi-msft": ["Wqkv"],
    "phi3small": ["query_key_value"], "qwen": ["c_attn"],
}  # fmt: skip


@pytest.fixture(scope="module")
def plugins():
    return load()


def base(one: Sample, config=None):
    """The headers of a checkpoint: nothing of it is read."""
    tensors = {f"{path}.weight": TensorRef(f"{path}.weight", shape, "F16") for path, shape in one.shapes.items()}
    return TensorSource("base", tensors, {}, config)


# -- names


@pytest.mark.parametrize("one", SAMPLES, ids=LABELS)
def test_every_weight_is_a_layer_or_excluded_by_its_own_name(one: Sample, plugins):
    architecture = plugins.architecture(one.family)
    for path in one.shapes:
        known = architecture.find(path)
        assert known is not None, path
        assert known.parts == (path,)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_pattern_occurs_in_a_published_structure(family: str, plugins):
    architecture = plugins.architecture(family)
    paths = {path for one in SAMPLES if one.family == family for path in one.shapes}
    inherited = {s for s, _ in plugins.architecture(architecture.like).skeletons()} if architecture.like else set()
    mine = [s for s, _ in architecture.skeletons() if s not in inherited]
    assert [s.text for s in mine if not any(s.match(path) is not None for path in paths)] == []


@pytest.mark.parametrize("one", SAMPLES, ids=LABELS)
def test_only_normalised_heads_and_prefix_encoders_carry_no_adapter(one: Sample, plugins):
    architecture = plugins.architecture(one.family)
    excluded = {path for path in one.shapes if isinstance(architecture.find(path).layer, Excluded)}
    heads = {"lm_head"} if one.family == "baichuan2" else set()
    assert excluded == heads | {path for path in one.shapes if "prefix_encoder" in path}


@pytest.mark.parametrize("one", SAMPLES, ids=LABELS)
def test_no_weight_is_stored_transposed_but_embeddings(one: Sample, plugins):
    """c_attn and c_proj are Conv1D in GPT-2 and Linear in Qwen."""
    architecture = plugins.architecture(one.family)
    vocabulary = {"embed_tokens", "tok_embeddings", "word_embeddings", "wte"}
    for path in one.shapes:
        layer = architecture.find(path).layer
        assert layer.transposed == (path.rpartition(".")[2] in vocabulary), path
        assert layer.transposed or isinstance(layer, (Linear, Excluded))


@pytest.mark.parametrize("family", FAMILIES)
def test_default_targets_are_the_attention_of_every_layer(family: str, plugins):
    architecture = plugins.architecture(family)
    assert sorted(architecture.default_targets) == DEFAULT_TARGETS[family]
    for one in (s for s in SAMPLES if s.family == family):
        chosen = [p for p in one.shapes if any(selects(t, p) for t in architecture.default_targets)]
        assert len(chosen) == 2 * len(DEFAULT_TARGETS[family])
        assert {architecture.find(p).layer.group for p in chosen} == {"attention"}


@pytest.mark.parametrize("one", SAMPLES, ids=LABELS)
def test_flat_names_come_back_to_one_layer_each(one: Sample, plugins):
    architecture = plugins.architecture(one.family)
    for path in one.shapes:
        found = architecture.unflatten(f"{architecture.kohya_prefix('')}_{flatten(path)}")
        assert [k.path for k in found] == [path]


# -- detection


@pytest.mark.parametrize("one", SAMPLES, ids=LABELS)
def test_a_published_config_fits_one_family(one: Sample, plugins):
    assert [a.name for a in plugins.architectures() if a.match.fits(one.config)] == [one.family]
    family = family_of(base(one, one.config), plugins)
    assert (family.architecture.name, family.by) == (one.family, f"model_type {one.config['model_type']}")


@pytest.mark.parametrize("one", SAMPLES, ids=LABELS)
def test_names_and_shapes_fit_the_family(one: Sample, plugins):
    assert fits(plugins.architecture(one.family), matrices(base(one).tensors))


@pytest.mark.parametrize("one", [s for s in SAMPLES if s.family not in LLAMA_LIKE], ids=lambda s: s.label)
def test_without_a_config_the_names_give_the_family(one: Sample, plugins):
    assert family_of(base(one), plugins).architecture.name == one.family


@pytest.mark.parametrize("one", [s for s in SAMPLES if s.family in LLAMA_LIKE], ids=lambda s: s.label)
def test_llama_s_names_are_read_as_llama_reads_them(one: Sample, plugins):
    mine, llama = plugins.architecture(one.family), plugins.architecture("llama")
    for path in one.shapes:
        known, same = mine.find(path), llama.find(path)
        assert (known.parts, known.role, known.layer) == (same.parts, same.role, same.layer)


@pytest.mark.parametrize("family", ["internlm", "internlm3"])
def test_a_vocabulary_of_another_size_is_not_taken_for_internlm_s(family: str, plugins):
    one = next(s for s in SAMPLES if s.family == family)
    llama = one._replace(config=one.config | {"vocab_size": 32000})
    assert not fits(plugins.architecture(family), matrices(base(llama).tensors))


@pytest.mark.parametrize("family", ["baichuan", "baichuan2", "chatglm", "chatglm2"])
def test_two_families_of_one_model_type_do_not_explain_each_other(family: str, plugins):
    other = {"baichuan": "baichuan2", "baichuan2": "baichuan", "chatglm": "chatglm2", "chatglm2": "chatglm"}[family]
    for one in (s for s in SAMPLES if s.family == family):
        assert not plugins.architecture(other).match.fits(one.config)
        assert not fits(plugins.architecture(other), matrices(base(one).tensors))


def test_internlm3_as_transformers_builds_it(plugins):
    settings = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    live = record(tiny("internlm3", "LlamaForCausalLM", "InternLM3Config", **settings, **heads))
    assert live.config["model_type"] == "internlm3"
    assert family_of(checkpoint.open_base(str(live.folder)), plugins).architecture.name == "internlm3"
    assert plugins.architecture("internlm3").explains(n.removesuffix(".weight") for n, s in live.disk.items() if s[1:])


# -- which rows are whose


def by_head(y, c, dim):
    """[heads, 3, dim]: ChatGLM-6B, and ChatGLM2 without multi-query attention."""
    return y.view(1, 1, c["num_attention_heads"], 3 * dim).split(dim, dim=-1)


def by_group(y, c):
    """[key-value heads, (queries of the group, k, v), dim]: InternLM2 and Phi-3-small."""
    dim, groups = c["hidden_size"] // c["num_attention_heads"], c["num_attention_heads"] // c["num_key_value_heads"]
    y = y.view(1, 1, -1, groups + 2, dim)
    return y[..., :groups, :], y[..., -2, :], y[..., -1, :]


def of_baichuan(y, c):
    return y.unflatten(-1, (3, c["hidden_size"])).unsqueeze(0).transpose(0, -2).squeeze(-2)


def of_chatglm(y, c):
    return by_head(y, c, c["hidden_size"] // c["num_attention_heads"])


def of_chatglm2(y, c):
    dim = c["kv_channels"]
    if not c["multi_query_attention"]:
        return by_head(y, c, dim)
    groups = c["multi_query_group_num"] * dim
    return y.split([c["num_attention_heads"] * dim, groups, groups], dim=-1)


def of_phi(y, c):
    heads, dim = c["n_head"], c["n_embd"] // c["n_head"]
    groups = c.get("n_head_kv") or heads
    if groups == heads:
        return y.view(1, 1, 3, heads, dim).unbind(dim=2)
    q, kv = y[..., : heads * dim], y[..., heads * dim :]
    return q, *kv.view(1, 1, 2, groups, dim).unbind(dim=2)


def of_qwen(y, c):
    return y.split(c["hidden_size"], dim=2)


RESHAPES = {
    "self_attn.W_pack": of_baichuan,
    "attention.query_key_value": of_chatglm,
    "self_attention.query_key_value": of_chatglm2,
    "mlp.dense_h_to_4h": lambda y, _: y.chunk(2, dim=-1),  # swiglu: silu of the first half times the second
    "attention.wqkv": by_group,
    "mixer.Wqkv": of_phi,
    "self_attn.query_key_value": by_group,
    "attn.c_attn": of_qwen,
}
FUSED = [(one, p) for one in SAMPLES for p in one.shapes if ".1." in p for e in RESHAPES if p.endswith("." + e)]
FUSED = [(one, p) for one, p in FUSED if not (one.family == "chatglm" and "mlp" in p)]  # a plain MLP


def cuts(one: Sample, path: str) -> list[list[int]]:
    """The rows of a weight that the model's reshape of its output takes as q, k, v (gate, up), in its order."""
    reshape = next(f for end, f in RESHAPES.items() if path.endswith("." + end))
    weight = torch.arange(one.shapes[path][0], dtype=torch.float64).unsqueeze(1)
    projected = torch.nn.functional.linear(torch.ones(1, 1, 1, dtype=torch.float64), weight)
    return [part.flatten().long().tolist() for part in reshape(projected, one.config)]


@pytest.mark.parametrize(("one", "path"), FUSED, ids=lambda v: v.label if isinstance(v, Sample) else v)
def test_the_rows_of_a_part_are_those_that_the_model_cuts_out(one: Sample, path: str, plugins):
    out = one.shapes[path][0]
    cut = cuts(one, path)
    names = ["gate", "up"] if "mlp" in path else ["q", "k", "v"]
    architecture = plugins.architecture(one.family)
    layout = architecture.layout(path, "", out, one.config)
    listed = {name: [row for rows in ranges for row in rows] for name, ranges in layout.items()}
    assert listed == {f"{path}[{name}]": rows for name, rows in zip(names, cut, strict=True)}
    assert sorted(row for rows in listed.values() for row in rows) == list(range(out))
    assert all(architecture.find(part).role == name for part, name in zip(listed, names, strict=True))


@pytest.mark.parametrize("one", SAMPLES, ids=LABELS)
def test_what_no_reshape_divides_has_no_parts(one: Sample, plugins):
    architecture = plugins.architecture(one.family)
    divided = {p for p in one.shapes if architecture.layout(p, "", one.shapes[p][0], one.config)}
    attention = {
        p for p in one.shapes if p.rpartition(".")[2] in ("W_pack", "query_key_value", "wqkv", "Wqkv", "c_attn")
    }
    gate = {"chatglm2": ".dense_h_to_4h", "phi3small": ".up_proj"}.get(one.family, "no such layer")
    gates = {p for p in one.shapes if p.endswith(gate)}
    assert divided == attention | gates


def test_phi3small_s_gate_is_in_even_rows_as_its_gegelu_takes_it(plugins):
    architecture = plugins.architecture("phi3small")
    one = next(s for s in SAMPLES if s.family == "phi3small")
    path = next(p for p in one.shapes if p.endswith(".up_proj"))
    rows = torch.arange(one.shapes[path][0])
    gelu_half, linear_half = rows[..., ::2], rows[..., 1::2]  # modeling_phi3_small.py: gegelu
    found = architecture.layout(path, "", len(rows), one.config)
    assert [n for r in found[f"{path}[gate]"] for n in r] == gelu_half.tolist()
    assert [n for r in found[f"{path}[up]"] for n in r] == linear_half.tolist()


# -- other spellings

LLAMA = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
SPELLINGS = {
    "baichuan": ["self_attn.W_pack[q]", "self_attn.W_pack[k]", "self_attn.W_pack[v]", "self_attn.o_proj", *LLAMA[4:]],
    "chatglm2": [
        *(f"self_attention.query_key_value[{n}]" for n in "qkv"), "self_attention.dense",
        "mlp.dense_h_to_4h[gate]", "mlp.dense_h_to_4h[up]", "mlp.dense_4h_to_h",
    ],
    "internlm2": [
        *(f"attention.wqkv[{n}]" for n in "qkv"), "attention.wo",
        "feed_forward.w1", "feed_forward.w3", "feed_forward.w2",
    ],
    "phi3small": [*(f"self_attn.query_key_value[{n}]" for n in "qkv"), "self_attn.dense"],
    "qwen": [*(f"attn.c_attn[{n}]" for n in "qkv"), "attn.c_proj", "mlp.w2", "mlp.w1", "mlp.c_proj"],
}  # fmt: skip
SPELLINGS["baichuan2"] = SPELLINGS["baichuan"]
BLOCKS = {"chatglm2": "transformer.encoder.layers", "qwen": "transformer.h"}
OUTSIDE = {
    "chatglm2": ("transformer.embedding.word_embeddings", "transformer.output_layer"),
    "internlm2": ("model.tok_embeddings", "output"),
    "qwen": ("transformer.wte", "lm_head"),
    "phi-msft": ("transformer.embd.wte", "lm_head.linear"),
}


@pytest.mark.parametrize("family", sorted(SPELLINGS))
def test_llama_s_names_stand_for_the_parts_of_the_family_s_weights(family: str, plugins):
    architecture = plugins.architecture(family)
    for llama, mine in zip(LLAMA, SPELLINGS[family], strict=False):
        known = architecture.find(f"model.layers.17.{llama}")
        assert known.parts == (f"{BLOCKS.get(family, 'model.layers')}.17.{mine}",)
        assert known.role == llama.rpartition(".")[2].removesuffix("_proj")


@pytest.mark.parametrize("family", sorted(OUTSIDE))
def test_llama_s_embedding_and_head_stand_for_the_family_s(family: str, plugins):
    architecture = plugins.architecture(family)
    assert tuple(architecture.find(n).path for n in ("model.embed_tokens", "lm_head")) == OUTSIDE[family]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("self_attn.q_proj", "mixer.Wqkv[q]"),
        ("self_attn.v_proj", "mixer.Wqkv[v]"),
        ("self_attn.dense", "mixer.out_proj"),
        ("mlp.fc1", "mlp.fc1"),
    ],
)
def test_phi_s_names_in_transformers_stand_for_those_of_phi_msft(name: str, meant: str, plugins):
    assert plugins.architecture("phi-msft").find(f"model.layers.3.{name}").path == f"transformer.h.3.{meant}"


SPLIT = [
    (one, path)
    for one, path in FUSED
    if one.label.startswith("small") and one.family not in ("baichuan2", "chatglm", "phi-old") and "mlp" not in path
]


@pytest.mark.parametrize(("one", "path"), SPLIT, ids=lambda v: v.label if isinstance(v, Sample) else v)
def test_an_adapter_of_split_projections_is_merged_into_the_rows_that_the_model_reads(one: Sample, path: str, tmp_path):
    torch.manual_seed(0)
    weights = {f"{p}.weight": torch.randn(shape) for p, shape in one.shapes.items()}
    expected = weights[f"{path}.weight"].double()
    adapter = {}
    for name, rows in zip("qkv", cuts(one, path), strict=True):
        down, up = torch.randn(4, one.shapes[path][1]), torch.randn(len(rows), 4)
        module = f"base_model.model.model.layers.1.self_attn.{name}_proj"
        adapter |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
        expected[rows] += 2 * up.double() @ down.double()
    base_folder = write_base(tmp_path / "base", weights, **one.config)
    adapter_folder = write_adapter(tmp_path / "adapter", adapter, target_modules=["q_proj", "k_proj", "v_proj"])
    assert run_main("merge", base_folder, adapter_folder, "-o", tmp_path / "out") == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(merged.pop(f"{path}.weight").double(), expected, rtol=0, atol=1e-5)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in merged.items())
    assert len(merged) == len(weights) - 1


def test_glm_4_s_gate_up_proj_is_the_whole_weight(plugins):
    known = plugins.architecture("chatglm2").find("model.layers.3.mlp.gate_up_proj")
    assert (known.path, known.role) == ("transformer.encoder.layers.3.mlp.dense_h_to_4h", "gate_up")


def test_internlm2_s_question_answering_model_is_the_same_layers(plugins):
    known = plugins.architecture("internlm2").find("transformer.layers.3.attention.wqkv")
    assert known.path == "model.layers.3.attention.wqkv"


@pytest.mark.parametrize("one", SAMPLES, ids=LABELS)
def test_files_of_the_bare_model_omit_the_prefix(one: Sample, plugins):
    architecture = plugins.architecture(one.family)
    for prefix in architecture.prefixes.get("", ()):
        for path in (p for p in one.shapes if p.startswith(prefix)):
            assert architecture.find(path.removeprefix(prefix)).path == path


@pytest.mark.parametrize("family", ["chatglm", "chatglm2"])
def test_chatglm_s_published_class_name_does_not_take_the_prefix_away(family: str, plugins):
    """config.json says ChatGLMModel; what is loaded, and what PEFT wraps, is ChatGLMForConditionalGeneration."""
    one = next(s for s in SAMPLES if s.family == family)
    architecture, model_class = plugins.architecture(family), one.config["architectures"][0]
    for path in one.shapes:
        assert architecture.in_memory("", path, model_class) == path


@pytest.mark.parametrize("family", ["baichuan2", "internlm2", "qwen", "yi", "phi-msft", "phi3small"])
def test_the_bare_model_s_modules_have_no_prefix(family: str, plugins):
    one = next(s for s in SAMPLES if s.family == family)
    bare = {"qwen": "QWenModel", "phi-msft": "PhiModel", "phi3small": "Phi3SmallModel"}
    architecture, prefix = plugins.architecture(family), next(iter(plugins.architecture(family).prefixes[""]))
    model_class = bare.get(family, one.config["architectures"][0].replace("ForCausalLM", "Model"))
    for path in (p for p in one.shapes if p.startswith(prefix)):
        assert architecture.in_memory("", path, model_class) == path.removeprefix(prefix)
        assert architecture.in_memory("", path, one.config["architectures"][0]) == path


# -- a relative's base or adapter


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape) * 0.1


def named(family: str, path: str, out: int, inputs: int, folder):
    """An adapter on one weight, and its update."""
    down, up = noise(4, inputs), noise(out, 4)
    module = f"base_model.model.{path}"
    write_adapter(
        folder,
        {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up},
        target_modules=[path.rpartition(".")[2]],
    )
    return 2 * up.double() @ down.double()


PHI = {"vocab_size": 48, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
GLM = {"num_key_value_heads": 2, "head_dim": 10, "pad_token_id": 0, "eos_token_id": 1}
#: an adapter of the older spelling, its fused weight; the model of transformers with q, k, v apart, its config's sizes
RELATIVES = {
    "phi-msft": ("transformer.h.1.mixer.Wqkv", ("phi", "Phi", PHI)),
    "phi-msft-grouped": ("transformer.h.1.mixer.Wqkv", ("phi", "Phi", PHI | {"num_key_value_heads": 2})),
    "chatglm2": ("transformer.encoder.layers.1.self_attention.query_key_value", ("glm", "Glm", PHI | GLM)),
    "qwen": ("transformer.h.1.attn.c_attn", ("qwen2", "Qwen2", PHI | {"num_key_value_heads": 4})),
}


@pytest.mark.parametrize("name", RELATIVES)
def test_a_fused_adapter_of_the_older_spelling_merges_into_todays_split_base(name: str, tmp_path, capsys):
    path, (found, stem, sizes) = RELATIVES[name]
    folder = record(tiny(found, f"{stem}ForCausalLM", f"{stem}Config", **sizes)).folder
    weights = load_file(folder / "model.safetensors")
    split = [f"model.layers.1.self_attn.{letter}_proj.weight" for letter in "qkv"]
    heights = [weights[n].shape[0] for n in split]
    delta = named(name, path, sum(heights), 24, tmp_path / "adapter")
    assert run_main("merge", folder, tmp_path / "adapter", "-o", tmp_path / "out") == 3
    family = name.removesuffix("-grouped")
    assert f"every weight of this base: --arch {family}" in " ".join(capsys.readouterr().err.split())
    assert run_main("merge", folder, tmp_path / "adapter", "-o", tmp_path / "out", "--arch", family) == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for tensor, rows in zip(split, delta.split(heights), strict=True):
        torch.testing.assert_close(merged.pop(tensor).double(), weights[tensor].double() + rows, rtol=0, atol=1e-6)
    assert all(torch.equal(tensor, weights[n]) for n, tensor in merged.items())


def test_weights_that_the_config_s_family_does_not_know_name_the_one_that_does(tmp_path, capsys):
    """phi-msft files whose config.json was rewritten to say phi."""
    one = next(s for s in SAMPLES if s.family == "phi-msft")
    weights = {f"{path}.weight": noise(*shape) for path, shape in one.shapes.items()}
    base_folder = write_base(tmp_path / "base", weights, **one.config | {"model_type": "phi"})
    hidden = one.shapes["transformer.h.1.mixer.Wqkv"][1]
    named("phi", "model.layers.1.self_attn.q_proj", hidden, hidden, tmp_path / "adapter")
    assert run_main("arch", "detect", base_folder) == 0
    assert "the phi family does not know" in (said := " ".join(capsys.readouterr().err.split()))
    assert "--arch phi-msft" in said
    assert run_main("merge", base_folder, tmp_path / "adapter", "-o", tmp_path / "out") == 3
    assert "--arch phi-msft" in capsys.readouterr().err
    assert run_main("merge", base_folder, tmp_path / "adapter", "-o", tmp_path / "out", "--arch", "phi-msft") == 0


def test_codegen_with_the_projections_of_gpt_j_is_gpt_j(plugins):
    """GPT-J with the rows that codegen's layout gives to q, k and v computes the same: so its names are aliases."""
    import transformers

    sizes = {"vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 8, "n_positions": 16, "rotary_dim": 4}
    torch.manual_seed(0)
    codegen = transformers.CodeGenForCausalLM(transformers.CodeGenConfig(**sizes)).eval()
    gptj = transformers.GPTJForCausalLM(transformers.GPTJConfig(**sizes)).eval()
    family, split = plugins.architecture("codegen"), {}
    for name, value in codegen.state_dict().items():
        path = name.removesuffix(".weight")
        if not path.endswith("qkv_proj"):
            split[name] = value
            continue
        for part, rows in family.layout(path, "", value.shape[0], {}).items():
            spelled = f"{path.removesuffix('qkv_proj')}{part[-2]}_proj"
            assert family.find(spelled).parts == (part,)
            split[f"{spelled}.weight"] = value[[row for run in rows for row in run]]
    gptj.load_state_dict(split)
    tokens = torch.arange(7)[None]
    torch.testing.assert_close(gptj(tokens).logits, codegen(tokens).logits)
