"""Adapters out of live models and onto them, against PEFT: its own deltas, its own files, its own merge."""

import json
import subprocess
import sys
import warnings
from dataclasses import replace

import peft
import pytest
import torch
from conftest import adapt, answer, build
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

import loratool
from loratool.api import Applied, open_adapter
from loratool.errors import MismatchError, UsageError

LLAMA = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "lora_alpha": 6}
CASES = {
    "linear": ("llama", LLAMA),
    "rslora and patterns": (
        "llama",
        {**LLAMA, "use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 5}},
    ),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "r": 3, "fan_in_fan_out": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "r": 4}),
    "convolution": ("unet", {"target_modules": ["to_q", "conv1", "proj_in"], "r": 4}),
    "head": ("bert", {"target_modules": ["query", "dense"], "r": 4, "task_type": "SEQ_CLS"}),
    "dora": ("llama", {**LLAMA, "use_dora": True}),
    "lora bias": ("bert", {"target_modules": ["query", "dense"], "r": 4, "lora_bias": True}),
    "modules to save": ("llama", {**LLAMA, "modules_to_save": ["lm_head"]}),
    "trainable tokens": ("llama", {**LLAMA, "trainable_token_indices": [1, 5]}),
}


def deltas(live, name="default"):
    """What PEFT itself would add to each weight."""
    layers = {n: m for n, m in live.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    return {n: m.get_delta_weight(name).detach() for n, m in layers.items() if name in m.scaling}


def unequal(one, two):
    assert one.keys() == two.keys()
    assert one
    return [name for name in one if not torch.equal(one[name], two[name])]


def trained(kind, config):
    """A live model whose adapter is random in all of its parts."""
    live = adapt(build(kind), **config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in live.named_parameters():
            if any(part in name for part in ("magnitude", "lora_B.default.bias", "modules_to_save", "tokens_delta")):
                value.mul_(1 + 0.1 * torch.rand(value.shape, generator=generator)).add_(0.01)
    return live


@pytest.mark.parametrize("case", CASES)
def test_a_round_trip_gives_the_same_deltas_and_the_same_output(case):
    kind, config = CASES[case]
    live = trained(kind, config)
    adapter = loratool.from_peft(live)
    assert not adapter.findings
    back = loratool.to_peft(adapter, build(kind))
    assert type(back) is type(live)
    assert not unequal(deltas(live), deltas(back))
    assert torch.equal(answer(kind, live), answer(kind, back))
    assert not torch.equal(answer(kind, back), answer(kind, build(kind)))


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 9 LoRA tensor")  # PEFT takes the biases for torn factors
@pytest.mark.parametrize("case", CASES)
def test_a_live_adapter_is_what_its_file_would_be(case, adapter_folder):
    kind, config = CASES[case]
    live, folder = adapter_folder(build(kind), **config)
    from_file, from_live = open_adapter(folder), loratool.from_peft(live)
    assert from_file.deltas.keys() == from_live.deltas.keys()
    assert from_file.base_model == from_live.base_model
    saved = load_file(folder / "adapter_model.safetensors")
    assert saved.keys() == from_live.tensors.keys()
    for name, ref in from_live.tensors.items():
        assert b"".join(piece.data for piece in ref.pieces) == saved[name].numpy().tobytes(), name
    config = json.loads((folder / "adapter_config.json").read_text())
    ours = dict(from_live.origin.config)
    for one in (config, ours):  # a set in any order; and the class, which PEFT adds while saving
        one["target_modules"] = sorted(one["target_modules"])
        one.pop("auto_mapping")
    assert ours == config


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "unet", "clip"])
def test_a_live_adapter_merges_like_its_file_and_like_peft(kind, saved, adapter_folder, tmp_path):
    targets = {"llama": LLAMA, "gpt2": {"target_modules": ["c_attn"], "fan_in_fan_out": True}}
    config = targets.get(kind, {"target_modules": ["query", "to_q", "q_proj"]})
    model, base = saved(kind)
    live, folder = adapter_folder(model, **config)
    adapter = loratool.from_peft(live)
    loratool.merge(base, [folder], tmp_path / "file")
    report = loratool.merge(base, [adapter], tmp_path / "live")
    merged = live.merge_and_unload().state_dict()
    (one,), (two,) = (list((tmp_path / name).glob("*.safetensors")) for name in ("file", "live"))
    assert one.read_bytes() == two.read_bytes()
    for name, value in load_file(two).items():
        known = merged.get(name, merged.get(f"transformer.{name}"))
        torch.testing.assert_close(value, known, rtol=0, atol=1e-6)
    assert report.sources["adapter 1"] == f"adapter 'default' of a live {type(model).__name__}"


def test_live_adapters_and_files_are_merged_together_each_with_its_weight(saved, adapter_folder, tmp_path):
    _, base = saved("llama")
    one, first = adapter_folder(build("llama"), seed=1, folder="one", **LLAMA)
    two, second = adapter_folder(build("llama"), seed=2, folder="two", **LLAMA)
    loratool.merge(base, [first, second], tmp_path / "files", weights=[0.5, -2])
    loratool.merge(base, [loratool.from_peft(one), second], tmp_path / "mixed", weights=[0.5, -2])
    loratool.merge(base, [Applied(loratool.from_peft(two), -2.0), Applied(first, 0.5)], tmp_path / "applied")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("files", "mixed", "applied")]
    assert files[0] == files[1] == files[2]


def test_an_opened_file_is_merged_like_its_path_and_is_not_overwritten(saved, adapter_folder, tmp_path):
    _, base = saved("llama")
    _, folder = adapter_folder(build("llama"), **LLAMA)
    loratool.merge(base, [folder], tmp_path / "path")
    loratool.merge(base, [open_adapter(folder)], tmp_path / "opened")
    assert (tmp_path / "path/model.safetensors").read_bytes() == (tmp_path / "opened/model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="overwrite or enter an input"):
        loratool.merge(base, [open_adapter(folder)], folder, force=True)
    for n, alone in enumerate([folder, str(folder), open_adapter(folder), Applied(folder)]):  # without a list
        loratool.merge(base, alone, tmp_path / f"merged {n}")
        assert (tmp_path / f"merged {n}/model.safetensors").read_bytes() == (
            tmp_path / "path/model.safetensors"
        ).read_bytes()
        loratool.combine(alone, tmp_path / f"combined {n}")
        assert not unequal(
            *(load_file(at / "adapter_model.safetensors") for at in (folder, tmp_path / f"combined {n}"))
        )
    for wrong in (None, 7, {folder: 0.5}):
        with pytest.raises(UsageError, match="a path or a list of paths"):
            loratool.merge(base, wrong, tmp_path / "out")


def test_what_was_changed_since_it_was_read_is_not_read_again(saved, tmp_path):
    _, base = saved("llama")
    adapter = loratool.from_peft(adapt(build("llama"), **LLAMA))
    doubled = {t: tuple(replace(d, scaling=2 * d.scaling) for d in ds) for t, ds in adapter.deltas.items()}
    loratool.merge(base, [replace(adapter, deltas=doubled, families=())], tmp_path / "changed")
    loratool.merge(base, [adapter], tmp_path / "weighted", weights=[2])
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("changed", "weighted"))
    assert not unequal(one, two)


def test_experts_that_no_name_tells_apart_are_read_for_the_base(tmp_path):
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.MixtralConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, pad_token_id=0
    )
    model = transformers.MixtralForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    live = adapt(model, target_modules=["q_proj"], target_parameters=parameters, r=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live.save_pretrained(tmp_path / "adapter")
    adapter = loratool.from_peft(live)
    loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "file")
    loratool.merge(tmp_path / "base", [adapter], tmp_path / "live")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("file", "live"))
    assert not unequal(one, two)
    again = transformers.MixtralForCausalLM(config).eval()
    weights = {n.replace(".base_layer", ""): t for n, t in live.get_base_model().state_dict().items()}
    again.load_state_dict({n: t for n, t in weights.items() if "lora_" not in n})
    back = loratool.to_peft(adapter, again)
    torch.testing.assert_close(answer("llama", back), answer("llama", live), rtol=0, atol=1e-5)


def test_pissa_goes_back_to_the_original_base_through_the_adapter_that_it_started_from(saved, tmp_path):
    model, base = saved("llama")
    live = peft.get_peft_model(model, peft.LoraConfig(**LLAMA, init_lora_weights="pissa")).eval()
    initial = loratool.from_peft(live)
    with torch.no_grad():
        for name, value in live.named_parameters():
            if "lora_" in name:
                value.add_(0.05)
    tuned = loratool.from_peft(live)
    with pytest.raises(MismatchError, match="pissa changed the base"):
        loratool.merge(base, [tuned], tmp_path / "out")
    with pytest.raises(MismatchError, match="pissa changed the base"):
        loratool.to_peft(tuned, build("llama"))
    loratool.merge(base, [tuned], tmp_path / "out", init_adapter=initial)
    merged, wanted = load_file(tmp_path / "out" / "model.safetensors"), live.merge_and_unload().state_dict()
    for name, value in merged.items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=2e-6)


def test_a_model_that_transformers_gave_an_adapter_is_live_too(adapter_folder):
    live = adapt(build("llama"), **LLAMA)
    model = build("llama")
    model.add_adapter(peft.LoraConfig(**LLAMA), "mine")
    state = peft.get_peft_model_state_dict(live)
    peft.set_peft_model_state_dict(model, {n.removeprefix("base_model.model."): t for n, t in state.items()}, "mine")
    adapter = loratool.from_peft(model, "mine")
    assert adapter.deltas.keys() == loratool.from_peft(live).deltas.keys()
    back = loratool.to_peft(adapter, build("llama"), "mine")
    assert not unequal(deltas(live), deltas(back, "mine"))
    with pytest.raises(UsageError, match="no PeftModel manages"):
        loratool.to_peft(adapter, model, "second")


def test_one_of_several_adapters_is_taken_and_put_beside_others():
    live = adapt(build("llama"), **LLAMA)
    live.add_adapter("second", peft.LoraConfig(target_modules=["k_proj"], r=2, init_lora_weights=False))
    adapter = loratool.from_peft(live, "second")
    assert {t.parts[0].rpartition(".")[2] for t in adapter.deltas} == {"k_proj"}
    other = adapt(build("llama"), seed=3, **LLAMA)
    before = deltas(other)
    both = loratool.to_peft(adapter, other, "new")
    assert both is other
    assert other.active_adapters == ["default"]
    assert not unequal(deltas(live, "second"), deltas(both, "new"))
    assert not unequal(before, deltas(both))
    with pytest.raises(UsageError, match="has an adapter 'new' already"):
        loratool.to_peft(adapter, other, "new")


def test_an_adapter_of_another_format_goes_onto_a_live_model(adapter_folder, tmp_path):
    live, folder = adapter_folder(build("llama"), **LLAMA)
    loratool.convert(folder, tmp_path / "k.safetensors", to="kohya")
    back = loratool.to_peft(open_adapter(tmp_path / "k.safetensors"), build("llama"))
    assert not unequal(deltas(live), deltas(back))


def test_numbers_are_copied_and_the_factors_are_trained_only_on_request():
    live = adapt(build("llama"), **LLAMA)
    adapter, before = loratool.from_peft(live), deltas(live)
    with torch.no_grad():
        for value in live.parameters():
            value.zero_()
    back = loratool.to_peft(adapter, build("llama"))
    assert not unequal(before, deltas(back))
    assert not any(value.requires_grad for value in back.parameters())
    assert not back.training
    again = loratool.to_peft(adapter, build("llama"), is_trainable=True)
    assert [n for n, v in again.named_parameters() if v.requires_grad] == [
        n for n, _ in again.named_parameters() if "lora_" in n
    ]


def test_half_precision_survives_the_round_trip():
    live = adapt(build("llama").to(torch.bfloat16), **LLAMA)
    for module in live.modules():
        if isinstance(module, LoraLayer):
            module.to(torch.bfloat16)
    adapter = loratool.from_peft(live)
    assert {ref.dtype for ref in adapter.tensors.values()} == {"BF16"}
    back = loratool.to_peft(adapter, build("llama").to(torch.bfloat16))  # PEFT holds adapters in fp32
    one, two = (peft.get_peft_model_state_dict(m) for m in (live, back))
    assert not unequal({n: t.float() for n, t in one.items()}, {n: t.float() for n, t in two.items()})


@pytest.mark.parametrize("live_already", [False, True])
@pytest.mark.parametrize("other", ["sizes", "layers", "family"])
def test_a_model_that_the_adapter_does_not_fit_stays_as_it_was(other, live_already):
    adapter = loratool.from_peft(adapt(build("llama"), **LLAMA))
    model = {
        "sizes": lambda: build("llama", hidden_size=64),
        "layers": lambda: build("llama", num_hidden_layers=1),
        "family": lambda: build("gpt2"),
    }[other]()
    kept = build("gpt2") if other == "family" else None
    if live_already:
        targets = {"target_modules": ["c_attn"], "fan_in_fan_out": True} if kept else LLAMA
        model = adapt(model, seed=4, **targets)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(MismatchError, match="onto"):
        loratool.to_peft(adapter, model, "new")
    assert not unequal(before, model.state_dict())
    if not live_already:
        assert not any(isinstance(m, LoraLayer) for m in model.modules())


def test_a_tensor_that_nothing_takes_is_named(adapter_folder):
    live = adapt(build("llama"), **{**LLAMA, "use_dora": True})
    adapter = loratool.from_peft(live)
    short = {n: ref for n, ref in adapter.tensors.items() if "layers.1" not in n}
    cut = {t: ds for t, ds in adapter.deltas.items() if "layers.1" not in t.parts[0]}
    config = {**adapter.origin.config, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    less = replace(adapter, tensors=short, deltas=cut, origin=replace(adapter.origin, config=config))
    with pytest.raises(MismatchError, match=r"the adapter has no .*layers\.1.*lora_A"):
        loratool.to_peft(less, build("llama"))
    with pytest.raises(MismatchError, match=r"the model has no place for .*layers\.1"):
        loratool.to_peft(adapter, build("llama", num_hidden_layers=1))


def test_a_model_without_that_adapter_says_which_it_has():
    with pytest.raises(UsageError, match=r"no adapter 'default'; it has none"):
        loratool.from_peft(build("llama"))
    with pytest.raises(UsageError, match=r"no adapter 'x'; it has 'default'"):
        loratool.from_peft(adapt(build("llama"), **LLAMA), "x")


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    model = build("llama")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match="need PEFT") as caught:
        loratool.from_peft(model)
    assert caught.value.hint == "pip install peft"


def test_the_module_itself_is_light():
    code = "import sys, loratool.live; sys.exit(bool({'torch', 'peft', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
