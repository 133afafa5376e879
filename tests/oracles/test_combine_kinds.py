"""What PEFT merges of a combined adapter is the weighted sum of what it merges of each, for every kind and layer."""

import warnings

import peft
import pytest
import torch

import loratool

WEIGHTS = [0.7, -0.4]
LLAMA = ["q_proj", "v_proj", "down_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
CASES = {
    "linear and embedding": ("llama", {"target_modules": [*LLAMA, "embed_tokens"]}, {"target_modules": LLAMA, "r": 3}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_fc"]}, {"target_modules": ["c_attn", "c_proj"], "r": 3}),
    "convolutions": ("unet", {"target_modules": ["conv1", "to_q"]}, {"target_modules": ["conv1", "proj_in"], "r": 3}),
    "experts": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
        {"target_modules": ["q_proj", "o_proj"], "target_parameters": EXPERTS[1:], "r": 3},
    ),
    "LoHa": ("llama", {"target_modules": LLAMA, "peft_type": peft.LoHaConfig, "r": 2}, {"target_modules": LLAMA}),
    "LoKr": (
        "llama",
        {"target_modules": LLAMA, "peft_type": peft.LoKrConfig, "r": 2, "decompose_factor": 4},
        {"target_modules": LLAMA, "use_rslora": True},
    ),
    "AdaLoRA": (
        "llama",
        {"target_modules": LLAMA, "peft_type": peft.AdaLoraConfig, "init_r": 4, "target_r": 4, "total_step": 5},
        {"target_modules": ["q_proj", "k_proj"]},
    ),
}


WHOLE = {
    "modules to save": ("llama", {"target_modules": LLAMA, "modules_to_save": ["norm", "lm_head"]}),
    "trained tokens": ("llama", {"target_modules": LLAMA, "trainable_token_indices": [1, 5]}),
    "trained biases": ("bert", {"target_modules": ["query", "value"], "bias": "all"}),
    "biases of B": ("bert", {"target_modules": ["query", "value"], "lora_bias": True}),
}


def model(kind):
    from conftest import build

    if kind != "mixtral":
        return build(kind)
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()


def merged(live):
    """{name: weight} after PEFT's own merge."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        weights = live.merge_and_unload().state_dict()
    return {n: t.double().clone() for n, t in weights.items() if t.is_floating_point()}


def trained(kind, config, seed, folder):
    config = dict(config)
    which = config.pop("peft_type", peft.LoraConfig)
    if which is peft.LoraConfig:
        config = {"r": 4, "lora_alpha": 6, **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = peft.get_peft_model(model(kind), which(**config)).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            named = live.named_parameters()
            for value in (v for n, v in named if v.requires_grad or "trainable_tokens_delta" in n):
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))
        live.save_pretrained(folder)
    return merged(live)


def assert_sum(kind, configs, weights, folder):
    plain = {n: t.double() for n, t in model(kind).state_dict().items() if t.is_floating_point()}
    wanted = {n: torch.zeros_like(t) for n, t in plain.items()}
    for n, (config, weight) in enumerate(zip(configs, weights, strict=True)):
        alone = trained(kind, config, n + 1, folder / str(n))
        assert alone.keys() == plain.keys()
        for name in wanted:
            wanted[name] += weight * (alone[name] - plain[name])
    loratool.combine([folder / "0", folder / "1"], folder / "out", weights=weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = merged(peft.PeftModel.from_pretrained(model(kind), folder / "out"))
    changed = 0
    for name, delta in wanted.items():
        largest = float(delta.abs().max())
        changed += largest > 0
        # both sides were merged in fp32 on top of the base's weights
        torch.testing.assert_close(got[name] - plain[name], delta, rtol=0, atol=1e-5 * largest + 1e-6)
    assert changed >= 3


@pytest.mark.parametrize("case", CASES)
def test_peft_merges_the_weighted_sum(case, tmp_path):
    kind, *configs = CASES[case]
    assert_sum(kind, configs, WEIGHTS, tmp_path)


@pytest.mark.parametrize("case", WHOLE)
def test_what_was_trained_whole_is_a_mean(case, tmp_path):
    kind, config = WHOLE[case]
    assert_sum(kind, [config, config | {"r": 3}], [0.25, 0.75], tmp_path)
