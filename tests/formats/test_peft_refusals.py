"""What loratool does not carry is refused by name, and inspect still shows the adapter; what it carries it says so."""

import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import InputError

Q = ["q_proj", "v_proj"]


def lora(**config):
    return peft.LoraConfig(**{"target_modules": Q, "r": 4, **config})


# what PEFT itself writes and merge carries: the model, the config, the words of the report for it
CARRIED = {
    "dora": ("llama", lambda: lora(use_dora=True), "dora"),
    "modules_to_save": ("llama", lambda: lora(modules_to_save=["lm_head"]), "lora"),
    "bias all": ("bert", lambda: lora(target_modules=["query"], bias="all"), "lora"),
    "bias lora_only": ("bert", lambda: lora(target_modules=["query"], bias="lora_only"), "lora"),
    "bias all without biases": ("llama", lambda: lora(bias="all"), "lora"),
    "lora_bias": ("bert", lambda: lora(target_modules=["query"], lora_bias=True), "full"),
    "trainable tokens": ("llama", lambda: lora(trainable_token_indices={"embed_tokens": [1, 2]}), "tokens"),
    "tokens alone": ("llama", lambda: peft.TrainableTokensConfig(token_indices=[1, 2]), "tokens"),
    "layer_replication": ("llama", lambda: lora(layer_replication=[(0, 2), (1, 2)]), "lora"),
    "adalora": ("llama", lambda: peft.AdaLoraConfig(target_modules=Q, total_step=10, tinit=1, tfinal=1), "lora"),
    "loha": ("llama", lambda: peft.LoHaConfig(target_modules=Q, r=2), "loha"),
    "lokr": ("llama", lambda: peft.LoKrConfig(target_modules=Q, r=2), "lokr"),
    "ia3": ("llama", lambda: peft.IA3Config(target_modules=Q, feedforward_modules=[]), "ia3"),
    "oft": ("llama", lambda: peft.OFTConfig(target_modules=Q, oft_block_size=4), "oft"),
    "boft": ("llama", lambda: peft.BOFTConfig(target_modules=Q, boft_block_size=4), "boft"),
    "vera": ("llama", lambda: peft.VeraConfig(target_modules=["q_proj"], r=4, save_projection=True), "vera"),
}
# what PEFT itself writes and nobody can merge as it is; and what the refusal must name
REFUSED = {
    "pissa": (lambda: lora(init_lora_weights="pissa"), ["init_lora_weights", "pissa", "--init-adapter"]),
    "pissa_niter": (lambda: lora(init_lora_weights="pissa_niter_4"), ["pissa_niter_4", "--init-adapter"]),
    "olora": (lambda: lora(init_lora_weights="olora"), ["olora", "--init-adapter"]),
    "vera without its projections": (
        lambda: peft.VeraConfig(target_modules=["q_proj"], r=4, save_projection=False),
        ["save_projection=False", "q_proj"],
    ),
    "alora": (lambda: lora(alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM"), ["alora_invocation_tokens"]),
    "coft": (lambda: peft.OFTConfig(target_modules=Q, oft_block_size=4, coft=True), ["coft"]),
    "prompt tuning": (
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        ["PROMPT_TUNING", "peft_type"],
    ),
}


def errors(folder):
    return [f"{f.where}: {f.what} {f.hint}" for f in loratool.inspect(folder).findings if f.level == "error"]


def trained(model, config, folder):
    """A live model in which everything that is trained has moved, and its adapter."""
    torch.manual_seed(5)
    generator = torch.Generator().manual_seed(6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = peft.get_peft_model(model, config()).eval()
        with torch.no_grad():
            for value in (p for p in live.parameters() if p.requires_grad):
                value.add_(torch.randn(value.shape, generator=generator) * 0.05)
        live.save_pretrained(folder)
    return live


@pytest.mark.parametrize("name", CARRIED)
def test_what_peft_makes_and_we_carry_is_merged(name, saved, tmp_path):
    kind, config, said = CARRIED[name]
    model, base = saved(kind)
    live = trained(model, config, tmp_path / "adapter")
    assert errors(tmp_path / "adapter") == []
    report = loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out")
    assert any(said in row["kind"].split("+") for row in report.rows)
    assert report.totals["delta_norm"] > 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    if name == "layer_replication":  # PEFT adds up what the copies of a layer learnt: tests/oracles/test_peft_traps.py
        assert any("layers.2." in name for name in merged)
        return
    theirs = live.merge_and_unload().state_dict()
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_makes_and_we_do_not_carry_is_refused_by_name(name, saved, tmp_path):
    config, needles = REFUSED[name]
    model, base = saved("llama")
    trained(model, config, tmp_path / "adapter")
    loratool.inspect(tmp_path / "adapter")
    for verb, options in (("resize", {"rank": 2}), ("convert", {"to": "peft"})):
        with pytest.raises(InputError):
            getattr(loratool, verb)(tmp_path / "adapter", tmp_path / "out", **options)
    with pytest.raises(InputError) as caught:
        loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out")
    for needle in needles:
        assert needle in f"{caught.value} {caught.value.hint}"
    assert not (tmp_path / "out").exists()


TYPES = {"LORA", "ADALORA", "LOHA", "LOKR", "VERA", "OFT", "BOFT", "IA3", "TRAINABLE_TOKENS"}


@pytest.mark.parametrize("kind", sorted({t.value for t in peft.PeftType} - TYPES))
def test_all_other_types_of_peft_are_refused_by_name(kind, saved, adapter_folder, tmp_path):
    model, base = saved("llama")
    _, folder = adapter_folder(model, target_modules=Q, r=4)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": kind}))
    assert any(kind in text for text in errors(folder))
    with pytest.raises(InputError, match=kind):
        loratool.merge(base, [folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# fields that need special hardware, training data or a special model to be set by PEFT: the config is what is read
FIELDS = {
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "kasa_config": {"beta": 1e-4},
    "arrow_config": {"top_k": 3},
    "alora_invocation_tokens": [1, 2],
    "coft": True,
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


def test_tensor_parallel_training_with_megatron_leaves_a_plain_adapter(saved, adapter_folder, tmp_path):
    model, base = saved("llama")
    _, folder = adapter_folder(model, target_modules=Q, r=4)
    loratool.merge(base, [folder], tmp_path / "plain")
    path = folder / "adapter_config.json"
    fields = {"megatron_config": {"tensor_model_parallel_size": 2}, "megatron_core": "megatron.core"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    assert errors(folder) == []
    loratool.merge(base, [folder], tmp_path / "out")
    files = [tmp_path / place / "model.safetensors" for place in ("plain", "out")]
    assert files[0].read_bytes() == files[1].read_bytes()


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
