"""Mixtures of experts: both forms on disk, adapters of transformers 4, and which rows of a fused weight are whose."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from zoo import build, tiny
from zoo_experts import DBRX, GATED, GPT_OSS, HYBRID, LATENT, LOCAL, QWEN3_VL_MOE, ROUTED, SHARED, SIZES, SPARSE

from loratool.operations.matching import places
from loratool.plugins import load
from loratool.storage import checkpoint
from loratool.storage.load import Loader

TWO_FORMS = {
    "mixtral": ("Mixtral", LOCAL),
    "phimoe": ("Phimoe", LOCAL),
    "minimax": ("MiniMaxM2", LOCAL),
    "qwen3-moe": ("Qwen3Moe", {**SPARSE, "mlp_only_layers": [0]}),
    "qwen2-moe": ("Qwen2Moe", {**SHARED, "mlp_only_layers": [0]}),
    "qwen3-next": ("Qwen3Next", {**SHARED, **GATED}),
    "qwen3-5-moe-text": ("Qwen3_5Moe", {**SHARED, **GATED}),
    "olmoe": ("Olmoe", {**SIZES, "num_experts": 4, "num_experts_per_tok": 2}),
    "glm4-moe": ("Glm4Moe", ROUTED),
    "deepseek-v2": ("DeepseekV2", LATENT),
    "deepseek-v3": ("DeepseekV3", LATENT),
    "granitemoe": ("GraniteMoeHybrid", HYBRID),
}


@pytest.fixture(scope="module")
def plugins():
    return load()


def causal(family, start, settings):
    config = f"{start}TextConfig" if start.startswith(("Qwen3_5", "Llama4")) else f"{start}Config"
    return build(tiny(family, f"{start}ForCausalLM", config, **settings))


def contents(architecture, folder):
    """The canonical matrices that a saved model holds, with their values in (out, in)."""
    held = places(checkpoint.open_base(str(folder)), architecture)
    with Loader() as read:
        return {t.path: read(p.ref).T if p.transposed else read(p.ref) for t, p in held.items()}


@pytest.mark.parametrize("family", TWO_FORMS)
def test_files_with_one_matrix_an_expert_and_files_with_stacks_mean_the_same(family, plugins, tmp_path):
    model = causal(family, *TWO_FORMS[family])
    model.save_pretrained(tmp_path / "original")
    model.save_pretrained(tmp_path / "memory", save_original_format=False)
    names = [set(tensors(tmp_path / form)) for form in ("original", "memory")]
    assert names[0] != names[1]
    original, memory = (contents(plugins.architecture(family), tmp_path / form) for form in ("original", "memory"))
    assert set(original) == set(memory)
    assert all(torch.equal(original[path], memory[path]) for path in original)


def tensors(folder: Path):
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def test_stacks_in_the_released_order_and_in_transformers_order_mean_the_same(plugins, tmp_path):
    model = build(tiny("qwen3-vl-moe", "Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeConfig", **QWEN3_VL_MOE))
    saved, released = tmp_path / "saved", tmp_path / "released"
    model.save_pretrained(saved)
    model.config.save_pretrained(released)
    flipped = {n: t.transpose(1, 2).contiguous() if ".experts." in n else t for n, t in tensors(saved).items()}
    save_file(flipped, released / "model.safetensors", {"format": "pt"})
    again = type(model).from_pretrained(released).state_dict()  # the oracle: transformers takes both for one model
    assert all(torch.equal(again[n], t) for n, t in model.state_dict().items())
    architecture = plugins.architecture("qwen3-vl-moe")
    mine, theirs = contents(architecture, saved), contents(architecture, released)
    assert {p: t.shape for p, t in mine.items()} == {p: t.shape for p, t in theirs.items()}
    assert all(torch.equal(mine[p], theirs[p]) for p in mine)
    assert mine["model.language_model.layers.1.mlp.experts.gate_up_proj[3]"].shape == (24, 32)


M, LM = "model.layers.1", "language_model.model.layers.1"
VL = "model.language_model.layers.1"
T = "transformer.blocks.1"
#: what an adapter calls a module, and the names on disk that it means; written by hand
SPELLINGS = [
    # as PEFT wrote them under transformers 4
    ("mixtral", f"{M}.block_sparse_moe.experts.3.w1", f"{M}.block_sparse_moe.experts.3.w1"),
    ("mixtral", f"{M}.block_sparse_moe.gate", f"{M}.block_sparse_moe.gate"),
    ("phimoe", f"{M}.block_sparse_moe.experts.3.w2", f"{M}.block_sparse_moe.experts.3.w2"),
    ("phimoe", f"{M}.block_sparse_moe.gate", f"{M}.block_sparse_moe.gate"),
    ("minimax", f"{M}.block_sparse_moe.experts.10.w3", f"{M}.block_sparse_moe.experts.10.w3"),
    ("qwen2-moe", f"{M}.mlp.experts.59.gate_proj", f"{M}.mlp.experts.59.gate_proj"),
    ("qwen2-moe", f"{M}.mlp.shared_expert.down_proj", f"{M}.mlp.shared_expert.down_proj"),
    ("qwen2-moe", f"{M}.mlp.shared_expert_gate", f"{M}.mlp.shared_expert_gate"),
    ("qwen2-moe", f"{M}.mlp.gate", f"{M}.mlp.gate"),
    ("qwen2-moe", f"{M}.mlp.up_proj", f"{M}.mlp.up_proj"),
    ("qwen3-moe", f"{M}.mlp.experts.3.down_proj", f"{M}.mlp.experts.3.down_proj"),
    ("qwen3-moe", f"{M}.mlp.gate", f"{M}.mlp.gate"),
    ("qwen3-moe", f"{M}.mlp.gate_proj", f"{M}.mlp.gate_proj"),
    ("qwen3-next", f"{M}.mlp.shared_expert.gate_proj", f"{M}.mlp.shared_expert.gate_proj"),
    ("qwen3-next", f"{M}.linear_attn.in_proj_qkvz", f"{M}.linear_attn.in_proj_qkvz"),
    ("olmoe", f"{M}.mlp.experts.63.up_proj", f"{M}.mlp.experts.63.up_proj"),
    ("glm4-moe", f"{M}.mlp.experts.3.gate_proj", f"{M}.mlp.experts.3.gate_proj"),
    ("glm4-moe", f"{M}.mlp.shared_experts.gate_proj", f"{M}.mlp.shared_experts.gate_proj"),
    ("glm4-moe", f"{M}.mlp.gate_proj", f"{M}.mlp.gate_proj"),
    ("deepseek-v2", f"{M}.self_attn.q_proj", f"{M}.self_attn.q_proj"),
    ("deepseek-v3", f"{M}.mlp.experts.255.up_proj", f"{M}.mlp.experts.255.up_proj"),
    ("deepseek-v3", f"{M}.mlp.shared_experts.up_proj", f"{M}.mlp.shared_experts.up_proj"),
    ("deepseek-v3", f"{M}.mlp.down_proj", f"{M}.mlp.down_proj"),
    ("deepseek-v3", f"{M}.self_attn.kv_a_proj_with_mqa", f"{M}.self_attn.kv_a_proj_with_mqa"),
    ("granitemoe", f"{M}.block_sparse_moe.router.layer", f"{M}.block_sparse_moe.router.layer"),
    ("granitemoe", f"{M}.block_sparse_moe.input_linear", f"{M}.block_sparse_moe.input_linear[{{e}}]"),
    ("llama4", f"{LM}.feed_forward.shared_expert.up_proj", f"{LM}.feed_forward.shared_expert.up_proj"),
    ("llama4", f"{M}.self_attn.q_proj", f"{LM}.self_attn.q_proj"),
    # as transformers 5 calls them in memory
    ("mixtral", f"{M}.mlp.gate", f"{M}.block_sparse_moe.gate"),
    ("mixtral", f"{M}.mlp.experts.down_proj", f"{M}.block_sparse_moe.experts.{{e}}.w2"),
    (
        "mixtral",
        f"{M}.mlp.experts.gate_up_proj",
        f"{M}.block_sparse_moe.experts.{{e}}.w1+{M}.block_sparse_moe.experts.{{e}}.w3",
    ),
    ("phimoe", f"{M}.mlp.router", f"{M}.block_sparse_moe.gate"),
    ("deepseek-v3", f"{M}.mlp.experts.down_proj", f"{M}.mlp.experts.{{e}}.down_proj"),
    (
        "qwen3-5-moe",
        f"{VL}.mlp.experts.gate_up_proj",
        f"{VL}.mlp.experts.{{e}}.gate_proj+{VL}.mlp.experts.{{e}}.up_proj",
    ),
    ("granitemoe", f"{M}.block_sparse_moe.router", f"{M}.block_sparse_moe.router.layer"),
    (
        "granitemoe",
        f"{M}.block_sparse_moe.experts.gate_up_proj",
        f"{M}.block_sparse_moe.input_linear[{{e}}]",
    ),
    # as the text model alone calls them
    ("qwen3-5", f"{M}.self_attn.q_proj", f"{VL}.self_attn.q_proj"),
    ("qwen3-5", "model.embed_tokens", "model.language_model.embed_tokens"),
    ("qwen3-5-moe", f"{M}.mlp.experts.down_proj", f"{VL}.mlp.experts.{{e}}.down_proj"),
    ("qwen3-5-moe", f"{M}.mlp.experts.3.gate_proj", f"{VL}.mlp.experts.3.gate_proj"),
    # one expert of a stack
    ("qwen3-vl-moe", f"{VL}.mlp.experts.3.gate_proj", f"{VL}.mlp.experts.gate_up_proj[3][gate]"),
    ("qwen3-vl-moe", f"{VL}.mlp.experts.3.up_proj", f"{VL}.mlp.experts.gate_up_proj[3][up]"),
    ("qwen3-vl-moe", f"{VL}.mlp.experts.3.down_proj", f"{VL}.mlp.experts.down_proj[3]"),
    ("gpt-oss", f"{M}.mlp.experts.31.up_proj", f"{M}.mlp.experts.gate_up_proj[31][up]"),
    ("llama4", f"{M}.feed_forward.experts.2.gate_proj", f"{LM}.feed_forward.experts.gate_up_proj[2][gate]"),
    ("granitemoe", f"{M}.block_sparse_moe.experts.3.up_proj", f"{M}.block_sparse_moe.input_linear[3][up]"),
    ("granitemoe", f"{M}.block_sparse_moe.experts.3.down_proj", f"{M}.block_sparse_moe.output_linear[3]"),
    ("dbrx", f"{T}.ffn.experts.mlp.w1[3]", f"{T}.ffn.experts.mlp.w1[3]"),
]


@pytest.mark.parametrize(("family", "name", "meant"), SPELLINGS, ids=lambda text: text)
def test_a_module_name_means_a_name_on_disk(family, name, meant, plugins):
    known = plugins.architecture(family).find(name)
    assert known is not None
    assert known.path == meant


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("mixtral", f"{M}.block_sparse_moe.experts.w1"),
        ("qwen3-moe", f"{M}.mlp.shared_expert.gate_proj"),
        ("olmoe", f"{M}.mlp.experts.3.w1"),
        ("gpt-oss", f"{M}.mlp.experts.gate_up_proj[3][q]"),
        ("dbrx", f"{T}.ffn.experts.mlp.w2[3]"),  # its rows are inputs: no expert of it is a layer of its own
    ],
)
def test_a_name_of_another_family_means_nothing(family, name, plugins):
    assert plugins.architecture(family).find(name) is None


# -- which rows are whose: of the model's own forward pass ---------------------------------------------------------

ATTENTION = "model.layers.0.self_attn"
FULL = "model.layers.1.self_attn"
RECURRENT = "model.layers.0.linear_attn"
MAMBA = "model.layers.0.mamba"
NORM_ATTENTION = "transformer.blocks.0.norm_attn_norm.attn"
MINIMAX = {**LOCAL, "head_dim": 10, "block_size": 8, "layer_types": ["linear_attention", "full_attention"]}
#: family, model, a fused weight, a part without which nothing reaches `after`, and what one row of it reaches there
FACTORS = [
    ("minimax", "MiniMax", MINIMAX, f"{ATTENTION}.qkv_proj", "v", f"{ATTENTION}.out_proj", 1),
    ("deepseek-v2", "DeepseekV2", LATENT, f"{ATTENTION}.kv_b_proj", "v", f"{ATTENTION}.o_proj", 1),
    ("deepseek-v3", "DeepseekV3", LATENT, f"{ATTENTION}.kv_b_proj", "v", f"{ATTENTION}.o_proj", 1),
    ("deepseek-v3", "DeepseekV3", LATENT, f"{ATTENTION}.kv_a_proj_with_mqa", "latent", f"{ATTENTION}.o_proj", 32),
    ("qwen3-next", "Qwen3Next", {**SHARED, **GATED}, f"{RECURRENT}.in_proj_qkvz", "v", f"{RECURRENT}.out_proj", 1),
    ("qwen3-next", "Qwen3Next", {**SHARED, **GATED}, f"{RECURRENT}.in_proj_qkvz", "z", f"{RECURRENT}.out_proj", 1),
    ("qwen3-5-text", "Qwen3_5", {**SIZES, **GATED}, f"{RECURRENT}.in_proj_qkv", "v", f"{RECURRENT}.out_proj", 1),
    ("granitemoe", "GraniteMoeHybrid", HYBRID, f"{MAMBA}.in_proj", "z", f"{MAMBA}.out_proj", 1),
    ("dbrx", "Dbrx", DBRX, f"{NORM_ATTENTION}.Wqkv", "v", f"{NORM_ATTENTION}.out_proj", 2),  # two queries a value
]


def passing(model, path):
    """What reaches a module in a forward pass, and what leaves it, on tokens of which none is padding."""
    seen = []
    hook = model.get_submodule(path).register_forward_hook(lambda _, args, out: seen.append((args[0].clone(), out)))
    with torch.no_grad():
        model(torch.arange(3, 11)[None])
    hook.remove()
    return seen[-1]


def inputs_of(model, path):
    return passing(model, path)[0]


def rows_of(architecture, path, part, out, model):
    ranges = architecture.layout(path, "", out, model.config.to_dict())[f"{path}[{part}]"]
    return torch.tensor([row for r in ranges for row in r])


@pytest.mark.parametrize("case", FACTORS, ids=[f"{f[0]}-{f[3]}[{f[4]}]" for f in FACTORS])
def test_without_the_rows_of_a_factor_nothing_comes_out(case, plugins):
    family, start, settings, path, part, after, reached = case
    model = causal(family, start, settings)
    weight = model.get_submodule(path).weight.data
    rows = rows_of(plugins.architecture(family), path, part, len(weight), model)
    weight[rows[1:]] = 0
    assert inputs_of(model, after).any(dim=(0, 1)).sum() == reached
    weight[rows[:1]] = 0
    assert not inputs_of(model, after).any()


@pytest.mark.parametrize(
    ("family", "start", "settings"),
    [
        ("qwen3-next", "Qwen3Next", {**SHARED, **GATED}),
        ("qwen3-5-text", "Qwen3_5", {**SIZES, **GATED}),
        ("qwen3-5-moe-text", "Qwen3_5Moe", {**SHARED, **GATED}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_queries_do_not_matter_to_the_first_token_and_gates_do(family, start, settings, plugins):
    results = {}
    for part in ("q", "gate", ""):
        model = causal(family, start, settings)
        weight = model.get_submodule(f"{FULL}.q_proj").weight.data
        if part:
            weight[rows_of(plugins.architecture(family), f"{FULL}.q_proj", part, len(weight), model)] = 0
        results[part] = inputs_of(model, f"{FULL}.o_proj")[0]
    assert torch.equal(results["q"][0], results[""][0])  # it attends to itself alone
    assert not torch.allclose(results["q"][1:], results[""][1:])
    assert not torch.allclose(results["gate"][0], results[""][0])


GLUS = [
    ("llama4", "Llama4", {**LOCAL, "head_dim": 8, "moe_layers": [0, 1]}, "model.layers.0.feed_forward.experts"),
    ("granitemoe", "GraniteMoe", LOCAL, "model.layers.0.block_sparse_moe.experts"),
]


def columns_and_stack(architecture, path, part, model):
    """The output features of a part, and the stack with those last; its orientation is that of the model."""
    stack = model.get_submodule(path).gate_up_proj.data
    stack = stack if stack.shape[2] == 80 else stack.transpose(1, 2)
    canonical = architecture.find(f"{path}.gate_up_proj").at(2).path
    return rows_of(architecture, canonical, part, stack.shape[2], model), stack


@pytest.mark.parametrize(("family", "start", "settings", "path"), GLUS, ids=[g[0] for g in GLUS])
def test_experts_are_linear_in_up_and_not_in_gate(family, start, settings, path, plugins):
    flipped = {}
    for part in ("gate", "up", ""):
        model = causal(family, start, settings)
        if part:
            columns, stack = columns_and_stack(plugins.architecture(family), path, part, model)
            stack[:, :, columns] *= -1
        flipped[part] = passing(model, path)[1]
    assert flipped[""].any()
    assert torch.allclose(flipped["up"], -flipped[""], rtol=1e-5, atol=0)
    assert not torch.allclose(flipped["gate"], -flipped[""], rtol=1e-5, atol=0)


def test_a_shared_mlp_is_linear_in_up_and_not_in_gate(plugins):
    path, flipped = "model.layers.0.shared_mlp", {}
    for part in ("gate", "up", ""):
        model = causal("granitemoe", "GraniteMoeShared", {**LOCAL, "shared_intermediate_size": 20})
        weight = model.get_submodule(f"{path}.input_linear").weight.data
        if part:
            weight[rows_of(plugins.architecture("granitemoe"), f"{path}.input_linear", part, len(weight), model)] *= -1
        flipped[part] = passing(model, path)[1]
    assert torch.allclose(flipped["up"], -flipped[""], rtol=1e-5, atol=0)
    assert not torch.allclose(flipped["gate"], -flipped[""], rtol=1e-5, atol=0)


def test_gpt_oss_experts_need_the_gate_and_not_up(plugins):
    path = "model.layers.0.mlp.experts"
    left = {}
    for part in ("gate", "up"):
        model = causal("gpt-oss", "GptOss", GPT_OSS)
        model.get_submodule(path).down_proj_bias.data.zero_()
        columns, stack = columns_and_stack(plugins.architecture("gpt-oss"), path, part, model)
        model.get_submodule(path).gate_up_proj_bias.data[:, columns] = 0
        stack[:, :, columns] = 0
        left[part] = passing(model, path)[1]
    assert not left["gate"].any()  # (up + 1) * gate * sigmoid(gate)
    assert left["up"].any()
