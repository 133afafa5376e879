"""Which rows of a fused weight are q, k and v: shown on live models, by what a change of those rows does to attention.

The models know nothing of loratool's layouts. Weights are random (norms and biases too), in double precision.
"""

from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
from zoo import Tiny, build, record, tiny

from loratool.detection import fits, matrices
from loratool.plugins import load
from loratool.storage import checkpoint

LENGTH, CHANGED = 7, 3  # tokens in the input, and the position of the one whose q, k or v is changed
OFF = -1e4  # silu, gelu and sigmoid of it are exactly zero in double precision


class Case(NamedTuple):
    """A model, its fused modules by the end of their names, and the modules whose input is what they lead to."""

    one: Tiny
    fused: str
    reads: str

    def __str__(self) -> str:
        return f"{self.one}:{self.fused}"


_GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "pad_token_id": 0}
_IDS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_MORE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_SIZES = {**_IDS, **_MORE, "max_position_embeddings": 64}
_FALCON = {n: v for n, v in _SIZES.items() if n != "intermediate_size"}
_NEW = {"new_decoder_architecture": True, "num_kv_heads": 2}
_BIGCODE = {**_IDS, **_GPT2}
_GATED = {
    **_SIZES,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_NEXT = {**_GATED, "num_experts": 0}
_QWEN_NEXT = tiny("qwen3-next", "Qwen3NextForCausalLM", "Qwen3NextConfig", **_NEXT)
_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
_QWEN_5 = tiny("qwen3-5", "Qwen3_5ForConditionalGeneration", "Qwen3_5Config", text_config=_GATED, vision_config=_VISION)
_MODERN = tiny("modernbert", "ModernBertForMaskedLM", "ModernBertConfig", **_SIZES, cls_token_id=1, sep_token_id=2)
_PHI3 = tiny("phi3", "Phi3ForCausalLM", "Phi3Config", **_SIZES, num_key_value_heads=2)

ATTENTION = [
    Case(
        tiny("bloom", "BloomForCausalLM", "BloomConfig", **_IDS, hidden_size=32, n_layer=2, n_head=4),
        "self_attention.query_key_value",
        "self_attention.dense",
    ),
    Case(
        tiny("gpt-neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", **_SIZES),
        "attention.query_key_value",
        "attention.dense",
    ),
    *(
        Case(
            tiny("falcon", "FalconForCausalLM", "FalconConfig", **_FALCON, **flags),
            "self_attention.query_key_value",
            "self_attention.dense",
        )
        for flags in ({"multi_query": True}, {"multi_query": False, "bias": True}, _NEW, {**_NEW, "num_kv_heads": 1})
    ),
    Case(
        tiny("mpt", "MptForCausalLM", "MptConfig", vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=16),
        "attn.Wqkv",
        "attn.out_proj",
    ),
    Case(tiny("gpt2", "GPT2LMHeadModel", "GPT2Config", **_IDS | _GPT2), "attn.c_attn", "attn.c_proj"),
    *(
        Case(
            tiny("gpt-bigcode", "GPTBigCodeForCausalLM", "GPTBigCodeConfig", **_BIGCODE, multi_query=multi_query),
            "attn.c_attn",
            "attn.c_proj",
        )
        for multi_query in (True, False)
    ),
    Case(
        tiny("codegen", "CodeGenForCausalLM", "CodeGenConfig", **_IDS | _GPT2 | {"n_head": 8, "rotary_dim": 4}),
        "attn.qkv_proj",
        "attn.out_proj",
    ),
    Case(_PHI3, "self_attn.qkv_proj", "self_attn.o_proj"),
    Case(
        tiny("phi3", "Phi3ForCausalLM", "Phi3Config", **_SIZES, head_dim=6),
        "self_attn.qkv_proj",
        "self_attn.o_proj",
    ),
    Case(
        tiny("persimmon", "PersimmonForCausalLM", "PersimmonConfig", **_SIZES),
        "self_attn.query_key_value",
        "self_attn.dense",
    ),
    Case(_MODERN, "attn.Wqkv", "attn.Wo"),
    Case(
        tiny(
            "deberta",
            "DebertaForMaskedLM",
            "DebertaConfig",
            **_SIZES,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
        ),
        "attention.self.in_proj",
        "attention.output.dense",
    ),
]
LINEAR_ATTENTION = [
    Case(_QWEN_NEXT, "linear_attn.in_proj_qkvz", "linear_attn.out_proj"),
    Case(_QWEN_5, "linear_attn.in_proj_qkv", "linear_attn.out_proj"),
]
GATED_QUERIES = [
    Case(_QWEN_NEXT, "self_attn.q_proj", "self_attn.o_proj"),
    Case(_QWEN_5, "self_attn.q_proj", "self_attn.o_proj"),
]
#: gated MLPs: which part goes through the activation
ACTIVATED = [
    (Case(_PHI3, "mlp.gate_up_proj", "mlp.down_proj"), "gate", "up"),
    (
        Case(
            tiny("glm", "GlmForCausalLM", "GlmConfig", **_SIZES, num_key_value_heads=2, head_dim=8),
            "mlp.gate_up_proj",
            "mlp.down_proj",
        ),
        "gate",
        "up",
    ),
    (Case(_MODERN, "mlp.Wi", "mlp.Wo"), "act", "gate"),
]
_OSS = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2}
GPT_OSS = tiny("gpt-oss", "GptOssForCausalLM", "GptOssConfig", **_OSS)
CROSS = tiny("gpt2", "GPT2LMHeadModel", "GPT2Config", **_IDS | _GPT2, add_cross_attention=True)


@pytest.fixture(scope="module")
def plugins():
    return load()


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def model_of(one: Tiny) -> Any:
    """The model with random weights; none of them, norms and biases too, is zero or one."""
    model = build(one).double()
    numbers = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=numbers, dtype=torch.float64), alpha=0.3)
    return model


def parts_of(case: Case, model: Any, plugins: Any) -> dict[str, dict[str, list[int]]]:
    """The rows that loratool says are q, k and v, of each fused module by its name in the model."""
    architecture = plugins.architecture(case.one.family)
    found: dict[str, dict[str, list[int]]] = {}
    for name, module in model.named_modules():
        if name.endswith(case.fused):
            known = architecture.find(name)
            out = module.weight.shape[1 if known.layer.transposed else 0]
            layout = architecture.layout(known.path, known.component, out, record(case.one).config)
            assert layout, f"{known.path} is not fused"
            found[name] = {p.rpartition("[")[2][:-1]: [n for r in rows for n in r] for p, rows in layout.items()}
    assert found
    return found


def run(case: Case, model: Any, **more: Any) -> dict[str, torch.Tensor]:
    """What the modules that read the attention's output are given, by their names."""
    seen: dict[str, torch.Tensor] = {}
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name.endswith(case.reads):
                hooks.enter_context(
                    module.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0]}))
                )
        model(input_ids=torch.arange(3, 3 + LENGTH)[None], **more)
    assert seen
    return {name: value.clone() for name, value in seen.items()}


def zero(model: Any, name: str, rows: list[int]) -> None:
    """Make zero what these rows of a fused layer add, its bias too."""
    module = model.get_submodule(name)
    if "Conv1D" in type(module).__name__:
        module.weight[:, rows] = 0
    else:
        module.weight[rows] = 0
    if module.bias is not None:
        module.bias[rows] = 0


def run_without(case: Case, chosen: dict[str, list[int]], part: str = "", **more: Any) -> dict[str, torch.Tensor]:
    """Run the model with these rows zero in every layer."""
    model = model_of(case.one)
    for name, rows in chosen.items():
        zero(model, name, rows)
        if case.one.family == "deberta" and part != "k":  # its biases are parameters of their own; k has none
            model.get_submodule(name.rpartition(".")[0]).get_parameter(f"{part}_bias").zero_()
    return run(case, model, **more)


@contextmanager
def changed(model: Any, name: str, rows: list[int], value: float, positions: slice = slice(None)) -> Any:
    """Set these features of what a layer returns, at some positions."""

    def hook(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, positions, rows] = value
        return output

    with model.get_submodule(name).register_forward_hook(hook):
        yield


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention_vanishes_without_the_rows_of_v_and_not_without_those_of_q_or_k(case, plugins):
    parts = parts_of(case, model_of(case.one), plugins)
    assert len(parts) == 2
    without = {p: run_without(case, {n: rows[p] for n, rows in parts.items()}, p) for p in ("q", "k", "v")}
    assert all((output == 0).all() for output in without["v"].values())
    for part in "qk":
        assert all((output != 0).all() for output in without[part].values())


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_q_of_a_token_matters_to_that_token_alone_and_k_and_v_to_others(case, plugins):
    model = model_of(case.one)
    as_it_is = run(case, model)
    for (name, parts), reads in zip(parts_of(case, model, plugins).items(), as_it_is, strict=True):
        for part, rows in parts.items():
            with changed(model, name, rows, 3.0, slice(CHANGED, CHANGED + 1)):
                difference = (run(case, model)[reads] - as_it_is[reads])[0].abs().amax(1)
            others = torch.cat([difference[:CHANGED], difference[CHANGED + 1 :]])
            assert difference[CHANGED] > 1e-6
            assert (others.max() < 1e-12) if part == "q" else (others.max() > 1e-6), (name, part)


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention_does_not_vanish_without_equally_many_rows_elsewhere(case, plugins):
    parts = parts_of(case, model_of(case.one), plugins)
    ours = next(iter(parts.values()))
    out, size = sum(map(len, ours.values())), len(ours["v"])
    blocks = [range(start, start + size) for start in (0, size, out - size)]
    for groups in (n for n in (2, 4, 8) if out % n == size % n == 0):  # the first and the last rows of each group
        height, width = out // groups, size // groups
        for offset in (0, width, height - width):
            blocks.append(
                [row for n in range(groups) for row in range(n * height + offset, n * height + offset + width)]
            )
    others = [list(rows) for rows in blocks if sorted(rows) != sorted(ours["v"])]
    assert len(others) > 1
    for rows in others:
        outputs = run_without(case, dict.fromkeys(parts, rows), "v")
        assert not any((value == 0).all() for value in outputs.values())


def test_the_columns_of_k_and_v_in_gpt2s_cross_attention(plugins):
    case = Case(CROSS, "crossattention.c_attn", "crossattention.c_proj")
    parts = parts_of(case, model_of(CROSS), plugins)
    states = torch.randn(1, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    without = {
        p: run_without(case, {n: rows[p] for n, rows in parts.items()}, encoder_hidden_states=states) for p in "kv"
    }
    assert all((output == 0).all() for output in without["v"].values())
    assert all((output != 0).all() for output in without["k"].values())


def recurrence(case: Case, model: Any, monkeypatch: Any) -> dict[str, torch.Tensor]:
    """What the delta rule is given (query, key, value, g, beta), the gate of the norm behind it, and its result."""
    modeling = import_module(type(model).__module__)
    rule, seen = modeling.torch_chunk_gated_delta_rule, {}

    def listening(query: Any, key: Any, value: Any, **more: Any) -> Any:
        seen.update(query=query, key=key, value=value, g=more["g"], beta=more["beta"])
        return rule(query, key, value, **more)

    norm = next(m for n, m in model.named_modules() if n.endswith("linear_attn.norm"))
    with monkeypatch.context() as patch, norm.register_forward_pre_hook(lambda _, i: seen.update(core=i[0], z=i[1])):
        patch.setattr(modeling, "torch_chunk_gated_delta_rule", listening)
        (seen["output"],) = run(case, model).values()
    return {name: value.clone() for name, value in seen.items()}


@pytest.mark.parametrize("case", LINEAR_ATTENTION, ids=str)
def test_linear_attention_is_given_no_query_key_value_or_gate_without_their_rows(case, plugins, monkeypatch):
    """In the delta rule the output vanishes without any of q, k and v, and behind its gated norm without z.

    So the vanishing output does not tell them apart; which argument of the recurrence or of the norm is zero does.
    """
    argument = {"q": "query", "k": "key", "v": "value", "z": "z"}
    for part in next(iter(parts_of(case, model_of(case.one), plugins).values())):
        model = model_of(case.one)
        for name, parts in parts_of(case, model, plugins).items():
            zero(model, name, parts[part])
        seen = recurrence(case, model, monkeypatch)
        assert {n for n in argument.values() if (seen[n] == 0).all()} == {argument[part]}
        assert all((seen[n] != 0).all() for n in argument.values() if n != argument[part])
        assert (seen["output"] == 0).all()
        assert (seen["core"] == 0).all() == (part != "z")


def test_beta_and_decay_of_linear_attention_come_from_their_rows(plugins, monkeypatch):
    """Without b beta is one half everywhere; without a the decay g is the same for all tokens."""
    case = Case(_QWEN_NEXT, "linear_attn.in_proj_ba", "linear_attn.out_proj")
    for part in "ba":
        model = model_of(case.one)
        for name, parts in parts_of(case, model, plugins).items():
            zero(model, name, parts[part])
        seen = recurrence(case, model, monkeypatch)
        assert (seen["beta"] == 0.5).all() == (part == "b")
        assert (seen["g"] == seen["g"][:, :1]).all() == (part == "a")


@pytest.mark.parametrize("case", GATED_QUERIES, ids=str)
def test_a_closed_gate_of_gated_queries_closes_attention_and_q_does_not(case, plugins):
    model = model_of(case.one)
    for name, parts in parts_of(case, model, plugins).items():
        with changed(model, name, parts["gate"], OFF):
            assert all((output == 0).all() for output in run(case, model).values())
        with changed(model, name, parts["q"], OFF):
            assert all((output != 0).all() for output in run(case, model).values())


@pytest.mark.parametrize(("case", "activated", "other"), ACTIVATED, ids=str)
def test_the_activated_part_of_a_gated_mlp_is_the_one_that_a_large_negative_number_turns_off(
    case, activated, other, plugins
):
    model = model_of(case.one)
    for name, parts in parts_of(case, model, plugins).items():
        reads = name.replace(case.fused, case.reads)
        assert set(parts) == {activated, other}
        with changed(model, name, parts[activated], OFF):
            assert (run(case, model)[reads] == 0).all()
        with changed(model, name, parts[other], OFF):
            assert (run(case, model)[reads] != 0).any()


def test_even_columns_of_gpt_oss_experts_are_gates(plugins):
    """Its experts compute (up + 1) * glu(gate): gate 0 turns an expert off, up 0 does not, up -1 does."""
    architecture = plugins.architecture("gpt-oss")

    def outputs(part: str, weight: float, bias: float) -> torch.Tensor:
        model = model_of(GPT_OSS).float()  # there is no grouped matrix product in double precision
        seen: list[torch.Tensor] = []
        for layer, block in enumerate(model.model.layers):
            experts = block.mlp.experts
            for expert in range(len(experts.gate_up_proj)):
                path = f"model.layers.{layer}.mlp.experts.gate_up_proj[{expert}]"
                out = experts.gate_up_proj.shape[2]
                rows = architecture.layout(path, "", out, record(GPT_OSS).config)[f"{path}[{part}]"]
                columns = [n for r in rows for n in r]
                experts.gate_up_proj[expert][:, columns] = weight
                experts.gate_up_proj_bias[expert][columns] = bias
            experts.down_proj_bias.zero_()
            experts.register_forward_hook(lambda _, __, output: seen.append(output))
        model(input_ids=torch.arange(3, 3 + LENGTH)[None])
        assert len(seen) == 2
        return torch.stack(seen)

    assert (outputs("gate", 0, 0) == 0).all()
    assert (outputs("up", 0, 0) != 0).all()
    assert (outputs("up", 0, -1) == 0).all()
    assert (outputs("gate", 0, -1) != 0).all()


@pytest.mark.parametrize(
    ("one", "older"),
    [
        (ATTENTION[2].one, {"model_type": "RefinedWebModel", "n_head": 4, "hidden_size": 32, "multi_query": True}),
        (ATTENTION[3].one, {"model_type": "RefinedWebModel", "n_head": 4, "hidden_size": 32, "multi_query": False}),
        (ATTENTION[4].one, {"model_type": "RefinedWeb", "n_head": 4, "n_head_kv": 2, "hidden_size": 32}),
    ],
    ids=["7B", "RW-1B", "40B"],
)
def test_older_falcon_configs_mean_the_layouts_that_were_shown(one, older, plugins):
    falcon = plugins.architecture("falcon")
    path = "transformer.h.0.self_attention.query_key_value"
    (out, _) = record(one).disk[f"{path}.weight"]
    assert falcon.match.fits(older)
    assert falcon.layout(path, "", out, older) == falcon.layout(path, "", out, record(one).config) != {}


@pytest.mark.parametrize(
    ("family", "cls", "config"),
    [("gpt2", "GPT2LMHeadModel", "GPT2Config"), ("gpt-bigcode", "GPTBigCodeForCausalLM", "GPTBigCodeConfig")],
)
@pytest.mark.parametrize("settings", [{}, {"multi_query": False}, {"n_inner": 32}], ids=str)
def test_gpt2_and_starcoder_files_are_told_apart_by_shapes(family, cls, config, settings, plugins):
    one = tiny(family, cls, config, **_IDS | _GPT2 | settings)
    weights = matrices(checkpoint.open_base(str(record(one).folder)).tensors)
    assert [n for n in ("gpt2", "gpt-bigcode") if fits(plugins.architecture(n), weights)] == [family]
