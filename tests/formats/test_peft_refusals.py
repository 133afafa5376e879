"""What loratool does not carry is refused by name, and inspect still shows the adapter."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import InputError

Q = ["q_proj", "v_proj"]


def lora(**config):
    return peft.LoraConfig(**{"target_modules": Q, "r": 4, **config})


# what PEFT itself writes; and the tensor or field that the refusal must name
MADE_BY_PEFT = {
    "dora": (lambda: lora(use_dora=True), ["use_dora", "lora_magnitude_vector"]),
    "modules_to_save": (lambda: lora(modules_to_save=["lm_head"]), ["modules_to_save", "lm_head.weight"]),
    "bias all": (lambda: lora(bias="all"), ["adapter_config.json: bias"]),
    "bias lora_only": (lambda: lora(bias="lora_only"), ["adapter_config.json: bias"]),
    "lora_bias": (lambda: lora(lora_bias=True), ["lora_bias", "lora_B.bias"]),
    "trainable tokens": (
        lambda: lora(trainable_token_indices={"embed_tokens": [1, 2]}),
        ["trainable_token_indices", "trainable_tokens_delta"],
    ),
    "pissa": (lambda: lora(init_lora_weights="pissa"), ["init_lora_weights", "pissa"]),
    "pissa_niter": (lambda: lora(init_lora_weights="pissa_niter_4"), ["init_lora_weights", "pissa_niter_4"]),
    "olora": (lambda: lora(init_lora_weights="olora"), ["init_lora_weights", "olora"]),
    "layer_replication": (lambda: lora(layer_replication=[(0, 2), (1, 2)]), ["layer_replication"]),
    "adalora": (lambda: peft.AdaLoraConfig(target_modules=Q, total_step=10, tinit=1, tfinal=1), ["ADALORA", "lora_E"]),
    "loha": (lambda: peft.LoHaConfig(target_modules=Q, r=2), ["LOHA", "hada_"]),
    "lokr": (lambda: peft.LoKrConfig(target_modules=Q, r=2), ["LOKR", "lokr_"]),
    "ia3": (lambda: peft.IA3Config(target_modules=Q, feedforward_modules=[]), ["IA3", "ia3_l"]),
    "oft": (lambda: peft.OFTConfig(target_modules=Q, oft_block_size=4), ["OFT", "oft_R"]),
    "vera": (lambda: peft.VeraConfig(target_modules=["q_proj"], r=4), ["VERA", "vera_"]),
    "prompt tuning": (
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        ["PROMPT_TUNING", "prompt_embeddings"],
    ),
}


def errors(folder):
    return [f"{f.where}: {f.what}" for f in loratool.inspect(folder).findings if f.level == "error"]


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but")  # llama has no biases: PEFT cannot merge it
@pytest.mark.filterwarnings("ignore:.*have invalid shape.*lora_B.bias")  # and PEFT suspects its own bias vectors
@pytest.mark.parametrize("name", MADE_BY_PEFT)
def test_what_peft_makes_and_we_do_not_carry_is_refused_by_name(name, saved, tmp_path):
    config, needles = MADE_BY_PEFT[name]
    model, base = saved("llama")
    torch.manual_seed(5)
    peft.get_peft_model(model, config()).save_pretrained(tmp_path / "adapter")
    found = errors(tmp_path / "adapter")
    for needle in needles:
        assert any(needle in text for text in found), (needle, found)
    with pytest.raises(InputError) as caught:
        loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out")
    assert any(needle in str(caught.value) for needle in needles)
    assert not (tmp_path / "out").exists()
    for verb, options in (("resize", {"rank": 2}), ("convert", {"to": "peft"})):
        with pytest.raises(InputError):
            getattr(loratool, verb)(tmp_path / "adapter", tmp_path / "out", **options)


# fields that need special hardware, training data or a special model to be set by PEFT: the config is what is read
FIELDS = {
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "kasa_config": {"beta": 1e-4},
    "arrow_config": {"top_k": 3},
    "alora_invocation_tokens": [1, 2],
    "megatron_config": {"tensor_model_parallel_size": 2},
    "a_field_from_the_future": {"mode": "twisted"},
    "another_one": "on",
}


@pytest.mark.parametrize("field", FIELDS)
def test_config_fields_that_change_the_mathematics_are_refused_by_name(field, saved, adapter_folder, tmp_path):
    model, base = saved("llama")
    _, folder = adapter_folder(model, target_modules=Q, r=4)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: FIELDS[field]}))
    assert any(field in text for text in errors(folder))
    with pytest.raises(InputError, match=field):
        loratool.merge(base, [folder], tmp_path / "out")


def test_every_field_of_peft_at_its_default_is_accepted(saved, adapter_folder, tmp_path):
    model, base = saved("llama")
    _, folder = adapter_folder(model, target_modules=Q, r=4)
    path = folder / "adapter_config.json"
    written = json.loads(path.read_text())
    fields = {k: v for k, v in vars(peft.LoraConfig()).items() if isinstance(v, (str, int, float, bool, type(None)))}
    path.write_text(json.dumps({**fields, **written}))
    assert errors(folder) == []
    loratool.merge(base, [folder], tmp_path / "out")


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal"])
def test_starts_that_leave_the_base_alone_are_accepted(start, saved, tmp_path):
    model, base = saved("llama")
    live = peft.get_peft_model(model, lora(init_lora_weights=start))
    with torch.no_grad():
        for name, value in live.named_parameters():
            if "lora_" in name:
                value.add_(0.1)
    live.save_pretrained(tmp_path / "adapter")
    loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out")


@pytest.mark.parametrize(
    "extra",
    ["base_model.model.model.norm.weight", "base_model.model.model.layers.0.self_attn.q_proj.bias", "optimizer.step"],
)
def test_a_tensor_that_is_no_factor_is_never_skipped(extra, saved, adapter_folder, tmp_path):
    model, base = saved("llama")
    _, folder = adapter_folder(model, target_modules=Q, r=4)
    path = folder / "adapter_model.safetensors"
    save_file({**load_file(path), extra: torch.ones(32)}, path)
    assert any(extra in text for text in errors(folder))
    with pytest.raises(InputError, match=extra.replace(".", r"\.")):
        loratool.merge(base, [folder], tmp_path / "out")


def test_an_adapter_with_nothing_in_it_is_an_error(adapter_folder, tiny):
    _, folder = adapter_folder(tiny("llama"), target_modules=Q, r=4)
    save_file({}, folder / "adapter_model.safetensors")
    assert any("no lora_A" in text for text in errors(folder))
