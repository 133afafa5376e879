"""Adapters of every kind on tiny transformers and diffusers models: ours from files, PEFT's in memory."""

import copy
import json
from typing import Any

import pytest
import torch
from parity import ALONE, adapted, assert_rounded_once, changed, merged_by_peft, quiet, save_adapter
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    TrainableTokensConfig,
    VeraConfig,
)

import loratool

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LLAMA = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
BIASED = {"attention_bias": True, "mlp_bias": True}
GPT2 = ["c_attn", "c_proj", "c_fc"]
BERT = ["query", "value", "dense"]
UNET = ["to_q", "to_v", "to_out.0", "ff.net.0.proj", "conv1", "conv_shortcut", "proj_in", "conv_in"]

# model, what is changed in its config, the adapter's class and settings
CASES: dict[str, tuple[str, dict[str, Any], Any, dict[str, Any]]] = {
    "llama lora": ("llama", {}, LoraConfig, {"target_modules": [*LLAMA, "lm_head", "embed_tokens"], "r": 3}),
    "llama all-linear": ("llama", {}, LoraConfig, {"target_modules": "all-linear", "exclude_modules": ["o_proj"]}),
    "llama some layers": ("llama", {}, LoraConfig, {"target_modules": LLAMA, "layers_to_transform": [1], "r": 3}),
    "llama rslora patterns": (
        "llama",
        {},
        LoraConfig,
        {
            "target_modules": LLAMA,
            "use_rslora": True,
            "lora_alpha": 5,
            "rank_pattern": {"k_proj": 2, r"layers\.1\.mlp\.\w+": 3},
            "alpha_pattern": {"o_proj": 2.5, "^model.layers.0.mlp.up_proj": 9},
        },
    ),
    "llama dora": ("llama", {}, LoraConfig, {"target_modules": [*LLAMA, "lm_head", "embed_tokens"], "use_dora": True}),
    "llama bias all": ("llama", BIASED, LoraConfig, {"target_modules": ["q_proj"], "bias": "all"}),
    "llama bias lora_only": (
        "llama",
        BIASED,
        LoraConfig,
        {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"},
    ),
    "llama lora_bias": ("llama", BIASED, LoraConfig, {"target_modules": LLAMA, "lora_bias": True, "lora_alpha": 32}),
    "llama modules_to_save": (
        "llama",
        {},
        LoraConfig,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"]},
    ),
    "llama tokens beside": (
        "llama",
        {},
        LoraConfig,
        {"target_modules": ["v_proj"], "trainable_token_indices": [0, 63, 5]},
    ),
    "llama tokens of both": (
        "llama",
        {},
        LoraConfig,
        {"target_modules": ["v_proj"], "trainable_token_indices": {"embed_tokens": [4, 3], "lm_head": [60, 1, 2]}},
    ),
    "llama tokens of a tie": (
        "llama",
        {"tie_word_embeddings": True},
        LoraConfig,
        {"target_modules": ["v_proj"], "trainable_token_indices": [7, 3]},
    ),
    "llama only tokens": ("llama", {}, TrainableTokensConfig, {"token_indices": [21, 9, 10]}),
    "llama only tokens of a tie": (
        "llama",
        {"tie_word_embeddings": True},
        TrainableTokensConfig,
        {"token_indices": [1, 9]},
    ),
    "llama adalora": ("llama", {}, AdaLoraConfig, {"target_modules": LLAMA, "total_step": 9, "init_r": 4}),
    "llama loha": ("llama", {}, LoHaConfig, {"target_modules": LLAMA, "r": 4}),
    "llama lokr": ("llama", {}, LoKrConfig, {"target_modules": LLAMA, "r": 2, "decompose_both": True}),
    "llama vera": ("llama", {}, VeraConfig, {"target_modules": LLAMA, "r": 4}),
    "llama oft": ("llama", {}, OFTConfig, {"target_modules": LLAMA, "r": 0, "oft_block_size": 8}),
    "llama boft": ("llama", {}, BOFTConfig, {"target_modules": ATTENTION, "boft_block_size": 4}),
    "llama ia3": ("llama", {}, IA3Config, {}),
    "llama ia3 with biases": (
        "llama",
        BIASED,
        IA3Config,
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "gpt2 lora": ("gpt2", {}, LoraConfig, {"target_modules": [*GPT2, "wpe"], "r": 3}),
    "gpt2 dora": ("gpt2", {}, LoraConfig, {"target_modules": [*GPT2, "wpe"], "use_dora": True}),
    "gpt2 lora_bias": ("gpt2", {}, LoraConfig, {"target_modules": GPT2, "lora_bias": True, "lora_alpha": 3}),
    "gpt2 bias all": ("gpt2", {}, LoraConfig, {"target_modules": GPT2, "bias": "all"}),
    "gpt2 adalora": ("gpt2", {}, AdaLoraConfig, {"target_modules": GPT2, "total_step": 9}),
    "gpt2 vera": ("gpt2", {}, VeraConfig, {"target_modules": GPT2, "r": 4}),
    "gpt2 ia3": ("gpt2", {}, IA3Config, {"target_modules": GPT2, "feedforward_modules": ["c_fc"]}),
    "gpt2 tokens": ("gpt2", {}, LoraConfig, {"target_modules": GPT2, "trainable_token_indices": {"wte": [3, 2]}}),
    "gpt2 norms": ("gpt2", {}, LoraConfig, {"target_modules": ["c_attn"], "modules_to_save": ["ln_1"]}),
    "bert lora": ("bert", {}, LoraConfig, {"target_modules": BERT, "task_type": "SEQ_CLS"}),
    "bert dora": ("bert", {}, LoraConfig, {"target_modules": [*BERT, "word_embeddings"], "use_dora": True}),
    "bert bias all": (
        "bert",
        {},
        LoraConfig,
        {"target_modules": BERT, "bias": "all", "modules_to_save": ["classifier"]},
    ),
    "bert ia3": ("bert", {}, IA3Config, {"task_type": "SEQ_CLS"}),
    "bert adalora": ("bert", {}, AdaLoraConfig, {"target_modules": BERT, "total_step": 9, "task_type": "SEQ_CLS"}),
    "bert oft": ("bert", {}, OFTConfig, {"target_modules": BERT, "r": 2, "oft_block_size": 0}),
    "distilbert lora": (
        "distilbert",
        {},
        LoraConfig,
        {"target_modules": ["q_lin", "lin1"], "modules_to_save": ["pre_classifier", "classifier"]},
    ),
    "clip lora": ("clip", {}, LoraConfig, {"target_modules": ["q_proj", "fc1", "token_embedding"], "use_dora": True}),
    "unet lora": ("unet", {}, LoraConfig, {"target_modules": UNET, "r": 3, "lora_alpha": 5}),
    "unet dora": ("unet", {}, LoraConfig, {"target_modules": UNET, "use_dora": True}),
    "unet lora_bias": ("unet", {}, LoraConfig, {"target_modules": ["conv1", "proj_in", "to_out.0"], "lora_bias": True}),
    "unet loha": ("unet", {}, LoHaConfig, {"target_modules": UNET, "r": 2}),
    "unet loha with cores": ("unet", {}, LoHaConfig, {"target_modules": UNET, "r": 2, "use_effective_conv2d": True}),
    "unet lokr": ("unet", {}, LoKrConfig, {"target_modules": UNET, "r": 1}),
    "unet lokr with cores": (
        "unet",
        {},
        LoKrConfig,
        {"target_modules": UNET, "r": 1, "use_effective_conv2d": True, "decompose_both": True},
    ),
    "unet oft": ("unet", {}, OFTConfig, {"target_modules": ["to_q", "to_out.0"], "r": 0, "oft_block_size": 4}),
    "unet boft": ("unet", {}, BOFTConfig, {"target_modules": ["conv1", "to_q"], "boft_block_size": 4}),
}


def loaded(model, folder):
    if hasattr(model, "load_config"):  # diffusers
        return type(model).from_pretrained(folder).eval()
    return type(model).from_pretrained(folder, dtype="auto").eval()


def assert_merged(live, model, before, base, adapter) -> Any:
    """Merge, load the result as the library does, and compare every parameter with PEFT's fp64 merge."""
    exact = merged_by_peft(live)
    assert changed(before, exact)
    loratool.merge(base, [adapter], base.parent / "out", compute_dtype="float64", resources=ALONE)
    merged = loaded(model, base.parent / "out")
    assert_rounded_once(merged.state_dict(), exact)
    return merged


@pytest.mark.parametrize("case", CASES)
def test_merged_models_hold_peft_s_weights_and_answer_like_the_live_adapter(case, saved, run_model, tmp_path):
    kind, changes, config, settings = CASES[case]
    model, base = saved(kind, **changes)
    before = copy.deepcopy(model.state_dict())
    plain = run_model(kind, model)
    with quiet():
        live = adapted(model, config(**settings))
    adapter = save_adapter(live, tmp_path / "adapter")
    merged = assert_merged(live, model, before, base, adapter)
    wanted = run_model(kind, live)
    effect = float((wanted - plain).abs().max())
    assert effect > 1e-4
    assert float((run_model(kind, merged) - wanted).abs().max()) < 1e-5 + 1e-4 * effect


def t5(**changes):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, **changes)).eval()


T5 = {
    "lora": LoraConfig(target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"),
    "dora": LoraConfig(target_modules=["q", "k", "v", "o", "wi", "wo"], use_dora=True),
    "ia3": IA3Config(target_modules=["k", "v", "wo"], feedforward_modules=["wo"]),
    "adalora": AdaLoraConfig(target_modules=["q", "v"], total_step=9),
    "norms": LoraConfig(target_modules=["q"], modules_to_save=["final_layer_norm", "layer_norm"]),
}


def t5_answer(model):
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        return model(input_ids=ids, decoder_input_ids=ids[:, :5]).logits


@pytest.mark.parametrize("case", T5)
def test_encoder_decoder_models(case, tmp_path):
    model = t5()
    base = tmp_path / "base"
    model.save_pretrained(base)
    before, plain = copy.deepcopy(model.state_dict()), t5_answer(model)
    live = adapted(model, T5[case])
    adapter = save_adapter(live, tmp_path / "adapter")
    merged = assert_merged(live, model, before, base, adapter)
    wanted = t5_answer(live)
    effect = float((wanted - plain).abs().max())
    assert effect > 1e-3
    assert float((t5_answer(merged) - wanted).abs().max()) < 1e-4 * effect + 1e-5


SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "num_local_experts": 4,
}  # fmt: skip
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
MIXTURES = {
    "mixtral": ("Mixtral", {}, {"target_parameters": EXPERTS, "target_modules": ["q_proj"]}),
    "mixtral, one parameter": ("Mixtral", {}, {"target_parameters": EXPERTS[1:], "target_modules": []}),
    "mixtral, rslora and patterns": (
        "Mixtral",
        {},
        {
            "target_parameters": EXPERTS,
            "target_modules": ["v_proj"],
            "use_rslora": True,
            "rank_pattern": {"experts.down_proj": 3, "v_proj": 2},
        },
    ),
    "gpt-oss": ("GptOss", {"head_dim": 8}, {"target_parameters": EXPERTS, "target_modules": ["q_proj", "o_proj"]}),
    "gpt-oss with biases": ("GptOss", {"head_dim": 8}, {"target_modules": ["q_proj"], "bias": "lora_only"}),
}


@pytest.mark.parametrize("case", MIXTURES)
def test_parameters_of_experts(case, run_model, tmp_path):
    import transformers

    name, changes, settings = MIXTURES[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | changes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    base = tmp_path / "base"
    model.save_pretrained(base)
    before, plain = copy.deepcopy(model.state_dict()), run_model("mixture", model)
    with quiet():
        live = adapted(model, LoraConfig(r=4, lora_alpha=6, **settings))
    adapter = save_adapter(live, tmp_path / "adapter")
    wanted = run_model("mixture", live)
    merged = assert_merged(live, model, before, base, adapter)
    effect = float((wanted - plain).abs().max())
    assert effect > 1e-3
    assert float((run_model("mixture", merged) - wanted).abs().max()) < 1e-4 * effect + 1e-5


HEADS = {
    "llama": ("score", "LlamaForSequenceClassification", ["q_proj", "v_proj"]),
    "gpt2": ("score", "GPT2ForSequenceClassification", ["c_attn"]),
    "bert": ("classifier", "BertForSequenceClassification", ["query", "value"]),
}


@pytest.mark.parametrize("labels", [2, 5])
@pytest.mark.parametrize("kind", HEADS)
def test_a_head_that_the_base_has_not_comes_with_the_adapter(kind, labels, saved, run_model, tmp_path):
    import transformers

    head, name, targets = HEADS[kind]
    _, base = saved(kind, cls="BertForPreTraining") if kind == "bert" else saved(kind)
    cls = getattr(transformers, name)
    with quiet():
        model = cls.from_pretrained(base, num_labels=labels).eval()
    before = copy.deepcopy(model.state_dict())
    live = adapted(model, LoraConfig(target_modules=targets, task_type="SEQ_CLS"))
    adapter = save_adapter(live, tmp_path / "adapter")
    exact = merged_by_peft(live)
    assert {n for n in changed(before, exact) if head in n}
    loratool.merge(base, [adapter], tmp_path / "out", compute_dtype="float64", resources=ALONE)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == [name]
    with quiet():  # of the language model's head, which stays in the file
        merged = cls.from_pretrained(tmp_path / "out").eval()
    assert merged.config.num_labels == labels
    assert_rounded_once(merged.state_dict(), exact)
    torch.testing.assert_close(run_model(kind, merged), run_model(kind, live), rtol=1e-4, atol=1e-5)


def test_a_classifier_that_the_base_has_is_replaced(saved, run_model, tmp_path):
    model, base = saved("bert")
    before = copy.deepcopy(model.state_dict())
    live = adapted(model, LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    adapter = save_adapter(live, tmp_path / "adapter")
    merged = assert_merged(live, model, before, base, adapter)
    assert torch.equal(merged.classifier.weight, live.base_model.model.classifier.modules_to_save["default"].weight)


REPLICATED = {
    "lora": {"target_modules": ["q_proj", "down_proj"]},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
}


@pytest.mark.parametrize("case", REPLICATED)
def test_repeated_layers_are_written_out_where_peft_adds_every_update_to_the_shared_weight(
    case, saved, run_model, tmp_path
):
    """The expected model is the stack with weights of its own, each with the update of its own place in the stack."""
    order = [0, 1, 0, 1, 1]
    model, base = saved("llama")
    before = copy.deepcopy(model.state_dict())
    live = adapted(model, LoraConfig(layer_replication=[[0, 2], [0, 2], [1, 2]], **REPLICATED[case]))
    adapter = save_adapter(live, tmp_path / "adapter")
    wanted = run_model("llama", live)
    out = tmp_path / "out"
    loratool.merge(base, [adapter], out, compute_dtype="float64", resources=ALONE)
    merged = loaded(model, out)
    assert merged.config.num_hidden_layers == len(order)
    torch.testing.assert_close(run_model("llama", merged), wanted, rtol=1e-4, atol=1e-5)
    state = merged.state_dict()
    for new, old in enumerate(order):
        for part in ("self_attn.k_proj", "mlp.up_proj", "input_layernorm"):
            assert torch.equal(state[f"model.layers.{new}.{part}.weight"], before[f"model.layers.{old}.{part}.weight"])
    with quiet(), torch.no_grad():
        theirs = live.merge_and_unload()
        assert float((run_model("llama", theirs) - wanted).abs().max()) > 1e-3
