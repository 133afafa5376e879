"""The 24 traps of merging PEFT adapters, one test each.

Where PEFT (0.21.2) is wrong itself, the test has both numbers, PEFT's and the right one, and asserts PEFT's deviation:
it fails when PEFT changes, so that we hear of it. What is right is said by a live model before it is merged, or by
fp64 arithmetic of a few lines.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import adapt
from safetensors.torch import save_file
from tiny_files import refusal, snapshot, write_json
from traps import (
    LIVE,
    Q0,
    V0,
    config_of,
    delta_of,
    heard,
    logits,
    merged_by_peft,
    opened,
    read,
    rewritten,
    share,
    state,
)

import loratool

Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """PEFT says a lot about what it is given here; what it says is part of a few tests only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_trap_01_half_precision_is_rounded_once(saved: Make, adapter_folder: Make, tmp_path: Path) -> None:
    model, base = saved("llama", dtype=torch.bfloat16, hidden_size=128)
    before = state(model)
    live, adapter = adapter_folder(model, target_modules=["q_proj"], r=4)
    delta = delta_of(live, Q0)
    exact = before[f"{Q0}.weight"].double() + delta
    right = exact.to(torch.bfloat16)

    def wrong(weights: dict[str, torch.Tensor]) -> float:
        return float((weights[f"{Q0}.weight"] != right).float().mean())

    safe = state(copy.deepcopy(live).merge_and_unload(safe_merge=True))
    plain = state(live.merge_and_unload())
    report = loratool.merge(base, [adapter], tmp_path / "out")
    assert wrong(safe) > 0.1  # "safe" rounds the update first, and then the sum: 27 % of the weights are not the best
    assert wrong(plain) < 0.001
    assert wrong(read(tmp_path / "out")) <= wrong(plain) + 1e-4
    lost = float((right.double() - exact).norm() / delta.norm())
    row = next(row for row in report.rows if row["module"] == Q0)
    assert row["rounding"] == pytest.approx(lost, rel=1e-3)


def test_trap_02_the_rank_is_that_of_the_tensors(saved: Make, adapter_folder: Make, tiny: Make, tmp_path: Path) -> None:
    model, base = saved("llama")
    before = state(model)
    live, adapter = adapter_folder(model, target_modules=["q_proj"], r=4, lora_alpha=6)
    wrong = rewritten(adapter, tmp_path / "wrong", r=16)
    said = refusal(base, [wrong], tmp_path / "out")
    assert "the config says rank 16, the tensors have rank 4" in said
    assert Q0 in said
    silent = rewritten(adapter, tmp_path / "silent", r=None)
    with pytest.raises(RuntimeError, match="size mismatch"):  # PEFT makes 8 of nothing
        peft.PeftModel.from_pretrained(tiny("llama"), silent)
    loratool.merge(base, [silent], tmp_path / "out")
    right = before[f"{Q0}.weight"].double() + delta_of(live, Q0)
    torch.testing.assert_close(read(tmp_path / "out")[f"{Q0}.weight"].double(), right, rtol=0, atol=1e-7)


def test_trap_03_patterns_lose_their_order_when_they_are_saved(
    saved: Make, adapter_folder: Make, tiny: Make, tmp_path: Path
) -> None:
    model, base = saved("llama")
    overlap = {"v_proj": 3, "layers.0.self_attn.v_proj": 2}  # in training the first of the two is meant, for all layers
    live, ranks = adapter_folder(model, target_modules=["q_proj", "v_proj"], r=4, lora_alpha=4, rank_pattern=overlap)
    assert list(config_of(ranks)["rank_pattern"]) == ["layers.0.self_attn.v_proj", "v_proj"]
    with pytest.raises(RuntimeError, match="size mismatch"):  # PEFT cannot read what it has written
        peft.PeftModel.from_pretrained(tiny("llama"), ranks)
    loratool.merge(base, [ranks], tmp_path / "by-rank")  # the tensors say which rank was meant
    torch.testing.assert_close(
        read(tmp_path / "by-rank")[f"{V0}.weight"].double(),
        tiny("llama").state_dict()[f"{V0}.weight"].double() + delta_of(live, V0),
        rtol=0,
        atol=1e-7,
    )
    loratool.convert(ranks, tmp_path / "anchored", to="peft", exclude=["layers.1.self_attn.q_proj"])
    patterns = config_of(tmp_path / "anchored")["rank_pattern"]
    assert all(key.startswith("^model\\.layers\\.") for key in patterns)
    assert len(set(patterns.values())) == 1

    overlap = {"v_proj": 4, "layers.0.self_attn.v_proj": 16}
    live, alphas = adapter_folder(tiny("llama"), folder="alphas", target_modules=["v_proj"], r=4, alpha_pattern=overlap)
    again = peft.PeftModel.from_pretrained(tiny("llama"), alphas)
    assert float(delta_of(again, V0).norm() / delta_of(live, V0).norm()) == pytest.approx(4)  # PEFT; 1 is right
    report = loratool.merge(base, [alphas], tmp_path / "by-alpha")  # no file says what was meant: it is said
    assert [f.where for f in report.findings if "several keys of alpha_pattern" in f.what] == [V0]


def test_trap_04_rank_stabilised_and_fractional_strengths(
    saved: Make, adapter_folder: Make, tiny: Make, tmp_path: Path
) -> None:
    model, base = saved("llama")
    before = state(model)
    live, adapter = adapter_folder(model, target_modules=["v_proj"], r=8, lora_alpha=6.5, use_rslora=True)
    right = delta_of(live, V0)
    assert live.get_submodule(LIVE + V0).scaling["default"] == pytest.approx(6.5 / 8**0.5)
    loratool.merge(base, [adapter], tmp_path / "out")
    got = read(tmp_path / "out")[f"{V0}.weight"].double() - before[f"{V0}.weight"].double()
    assert share(got, right) < 1e-6
    for kind in ("cat", "svd"):  # PEFT's combined adapter keeps use_rslora, and is too strong by the root of its rank
        live.add_weighted_adapter(["default"], [1.0], kind, combination_type=kind)
        assert float(delta_of(live, V0, kind).norm() / right.norm()) == pytest.approx(8**0.5, rel=1e-4)  # 1 is right
    loratool.resize(adapter, tmp_path / "resized", rank=8)
    again = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "resized")
    assert share(delta_of(again, V0), right) < 1e-5
    written = config_of(tmp_path / "resized")
    assert (written["lora_alpha"], written["use_rslora"]) == (written["r"], False)


def test_trap_05_conv1d_is_known_by_the_base_and_not_by_the_flag(
    saved: Make, adapter_folder: Make, tmp_path: Path
) -> None:
    model, base = saved("gpt2")
    live, adapter = adapter_folder(model, target_modules=["c_attn", "c_fc"], r=4)
    right = state(live.merge_and_unload())
    assert config_of(adapter)["fan_in_fan_out"] is True
    results = []
    for flag in (True, False, None):
        loratool.merge(base, [rewritten(adapter, tmp_path / f"{flag}", fan_in_fan_out=flag)], tmp_path / f"out{flag}")
        results.append(read(tmp_path / f"out{flag}"))
    for name in ("transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_fc.weight"):
        assert results[0][name].shape[0] != results[0][name].shape[1]
        for got in results:
            torch.testing.assert_close(got[name], right[name], rtol=0, atol=1e-6)


def test_trap_06_embeddings_and_a_resized_vocabulary(saved: Make, adapter_folder: Make, tmp_path: Path) -> None:
    model, base = saved("llama")
    model.resize_token_embeddings(70)
    live, adapter = adapter_folder(model, target_modules=["q_proj", "embed_tokens", "lm_head"], r=4)
    (adapter / "tokenizer.json").write_text("{}")
    names = read(adapter).keys()
    assert {n.rpartition("embed_tokens.")[2] for n in names if "embed" in n} == {
        "base_layer.weight",
        "lora_embedding_A",
        "lora_embedding_B",
    }
    loratool.merge(base, [adapter], tmp_path / "out")
    merged = opened(tmp_path / "out")
    assert merged.config.vocab_size == 70
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    torch.testing.assert_close(logits(merged, 1, 69, 64, 3), logits(live, 1, 69, 64, 3), rtol=0, atol=2e-6)


@pytest.mark.parametrize("target", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"], "tying"], ids=str)
def test_trap_07_tied_weights_are_untied_or_changed_once(
    target: Any, saved: Make, adapter_folder: Make, tmp_path: Path
) -> None:
    tying = target == "tying"
    names = ["embed_tokens", "lm_head"] if tying else target
    model, base = saved("llama", tie_word_embeddings=True)
    embedding = model.get_input_embeddings().weight.detach().clone()
    live, adapter = adapter_folder(model, target_modules=names, r=4, ensure_weight_tying=tying)
    right = logits(live)
    layers = {n: live.get_submodule(LIVE + n) for n in ("model.embed_tokens", "lm_head")}
    deltas = [m.get_delta_weight("default").detach() for m in layers.values() if hasattr(m, "get_delta_weight")]
    plain = live.merge_and_unload()
    moved = plain.get_input_embeddings().weight.detach() - embedding
    assert plain.get_output_embeddings().weight.data_ptr() == plain.get_input_embeddings().weight.data_ptr()
    if tying:  # PEFT adds the one update twice; once is right
        assert float(moved.norm() / deltas[0].norm()) == pytest.approx(2, rel=1e-5)
    else:  # PEFT adds all updates to both
        torch.testing.assert_close(moved, sum(deltas), rtol=0, atol=1e-6)
    assert float((logits(plain) - right).abs().max()) > 0.1  # PEFT's merged model answers otherwise than before
    loratool.merge(base, [adapter], tmp_path / "out")
    merged = opened(tmp_path / "out")
    torch.testing.assert_close(logits(merged), right, rtol=0, atol=2e-6)
    assert merged.config.tie_word_embeddings is tying
    assert ("lm_head.weight" in read(tmp_path / "out")) is not tying


def test_trap_08_two_heads_are_a_choice(saved: Make, tiny: Make, adapter_folder: Make, tmp_path: Path) -> None:
    _, base = saved("bert")
    folders = []
    for n in (1, 2):
        live = adapt(tiny("bert"), n, target_modules=["query"], r=4, task_type="SEQ_CLS")
        with torch.no_grad():
            live.get_submodule(LIVE + "classifier").modules_to_save["default"].weight.fill_(float(n))
        live.save_pretrained(tmp_path / f"a{n}")
        folders.append(tmp_path / f"a{n}")
    both = peft.PeftModel.from_pretrained(tiny("bert"), folders[0], adapter_name="one")
    both.load_adapter(folders[1], adapter_name="two")
    theirs = state(both.merge_and_unload(adapter_names=["one", "two"]))
    assert set(theirs["classifier.weight"].flatten().tolist()) == {1.0}  # PEFT loses the other head without a word
    assert "classifier" in refusal(base, folders, tmp_path / "out")
    chosen = [loratool.api.Applied(folders[0], exclude=["classifier"]), folders[1]]
    loratool.merge(base, chosen, tmp_path / "out")
    got = read(tmp_path / "out")
    assert set(got["classifier.weight"].flatten().tolist()) == {2.0}
    name = "bert.encoder.layer.0.attention.self.query.weight"
    torch.testing.assert_close(got[name], theirs[name], rtol=0, atol=1e-6)


def test_trap_09_trained_tokens_take_the_place_of_rows(saved: Make, tiny: Make, tmp_path: Path) -> None:
    model, base = saved("llama")
    before = state(model)["model.embed_tokens.weight"]
    lives = {}
    for n, rows in enumerate(([3, 5], [5, 7], [8])):
        live = adapt(tiny("llama"), n, target_modules=["q_proj"], r=4, trainable_token_indices=rows)
        with torch.no_grad():
            live.get_submodule(f"{LIVE}model.embed_tokens").token_adapter.trainable_tokens_delta["default"].add_(n + 1)
        live.save_pretrained(tmp_path / f"a{n}")
        lives[n] = live
    said = refusal(base, [tmp_path / "a0", tmp_path / "a1"], tmp_path / "out")
    assert "the same tokens" in said
    assert "model.embed_tokens" in said
    loratool.merge(base, [tmp_path / "a0", tmp_path / "a2"], tmp_path / "out")
    got = read(tmp_path / "out")["model.embed_tokens.weight"]
    right = before.clone()
    right[[3, 5]] += 1
    right[8] += 3
    torch.testing.assert_close(got, right, rtol=0, atol=1e-6)
    both = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "a0", adapter_name="one")
    both.load_adapter(tmp_path / "a2", adapter_name="two")
    theirs = state(both.merge_and_unload(adapter_names=["one", "two"]))["model.embed_tokens.weight"]
    torch.testing.assert_close(got, theirs, rtol=0, atol=1e-6)


def test_trap_10_biases_are_taken_over_or_added_to(
    saved: Make, adapter_folder: Make, tiny: Make, tmp_path: Path
) -> None:
    _, base = saved("bert")
    for kind in ("all", "lora_only"):
        live = adapt(tiny("bert"), target_modules=["query"], r=4, bias=kind)
        with torch.no_grad():
            for name, value in live.named_parameters():
                if name.endswith(".bias") and value.requires_grad:
                    value.add_(0.5)
        live.save_pretrained(tmp_path / kind)
        right = state(live.merge_and_unload())
        loratool.merge(base, [tmp_path / kind], tmp_path / f"out-{kind}")
        got = read(tmp_path / f"out-{kind}")
        for name in got:
            torch.testing.assert_close(got[name], right[name], rtol=0, atol=1e-6, msg=name)
        lost = {n: t for n, t in read(tmp_path / kind).items() if not n.endswith("query.base_layer.bias")}
        lost = rewritten(tmp_path / kind, tmp_path / f"{kind}-lost", lost)
        assert "layer.0.attention.self.query.bias" in refusal(base, [lost], tmp_path / "none")
    live = adapt(tiny("bert"), target_modules=["query"], r=4, lora_alpha=12, lora_bias=True)
    with torch.no_grad():
        for name, value in live.named_parameters():
            if name.endswith("lora_B.default.bias"):
                value.fill_(0.25)
    live.save_pretrained(tmp_path / "of-b")
    loratool.merge(base, [tmp_path / "of-b"], tmp_path / "out")
    name = "bert.encoder.layer.0.attention.self.query.bias"
    moved = read(tmp_path / "out")[name] - read(base)[name]
    torch.testing.assert_close(moved, torch.full_like(moved, 12 / 4 * 0.25), rtol=0, atol=1e-6)
    _, llama = saved("llama")  # has no biases
    live, adapter = adapter_folder(tiny("llama"), target_modules=["q_proj"], r=4, lora_bias=True)
    with pytest.raises(RuntimeError, match="no bias"):
        live.merge_and_unload()
    assert f"{Q0}.bias" in refusal(llama, [adapter], tmp_path / "none")


def test_trap_11_several_dora_adapters_have_no_order(saved: Make, tiny: Make, tmp_path: Path) -> None:
    _, base = saved("llama")
    W = tiny("llama").state_dict()[f"{Q0}.weight"].double()
    right, folders = W.clone(), {}
    for n in (1, 2):
        live = adapt(tiny("llama"), n, target_modules=["q_proj"], r=4, use_dora=True)
        layer = live.get_submodule(LIVE + Q0)
        with torch.no_grad():
            m = layer.lora_magnitude_vector["default"].weight
            m.mul_(1 + torch.rand(m.shape, generator=torch.Generator().manual_seed(n)))
        moved = W + delta_of(live, Q0)
        right += (m.double() / moved.norm(dim=1))[:, None] * moved - W  # each on the base as it was
        live.save_pretrained(tmp_path / f"a{n}")
        folders[n] = tmp_path / f"a{n}"
    theirs, ours = {}, set()
    for one, two in ((1, 2), (2, 1)):
        live = peft.PeftModel.from_pretrained(tiny("llama"), folders[one], adapter_name="first")
        live.load_adapter(folders[two], adapter_name="second")
        theirs[one] = state(live.merge_and_unload(adapter_names=["first", "second"]))[f"{Q0}.weight"].double()
        loratool.merge(base, [folders[one], folders[two]], tmp_path / f"out{one}")
        ours.add((tmp_path / f"out{one}" / "model.safetensors").read_bytes())
    size = (right - W).norm()
    assert float((theirs[1] - theirs[2]).norm() / size) > 0.1  # PEFT applies one to the result of the other: 0.35
    assert float((theirs[1] - right).norm() / size) > 0.1  # 0.27
    assert len(ours) == 1
    assert share(read(tmp_path / "out1")[f"{Q0}.weight"] - W, right - W) < 1e-6


def test_trap_12_starts_that_changed_the_base(saved: Make, tiny: Make, tmp_path: Path) -> None:
    _, base = saved("llama")
    W = tiny("llama").state_dict()[f"{Q0}.weight"]
    torch.manual_seed(0)
    settings = peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights="pissa")
    live = peft.get_peft_model(tiny("llama"), settings)
    live.save_pretrained(tmp_path / "first")
    with torch.no_grad():
        for name, value in live.named_parameters():
            if "lora_" in name:
                value.add_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    live.save_pretrained(tmp_path / "trained")
    right = state(copy.deepcopy(live).merge_and_unload())[f"{Q0}.weight"] - W
    said = refusal(base, [tmp_path / "trained"], tmp_path / "out")
    assert "pissa changed the base model" in said
    assert "--init-adapter" in said
    loratool.merge(base, [tmp_path / "trained"], tmp_path / "out", init_adapter=tmp_path / "first")
    assert share(read(tmp_path / "out")[f"{Q0}.weight"] - W, right) < 1e-6

    gradients = rewritten(tmp_path / "trained", tmp_path / "lora-ga", init_lora_weights="lora_ga")
    theirs = merged_by_peft(tiny("llama"), gradients)[f"{Q0}.weight"] - W
    assert share(theirs, right) > 0.3  # PEFT puts a LoRA-GA adapter on the base as it is: 67 % off; 0 is right
    assert "lora_ga" in refusal(base, [gradients], tmp_path / "none")
    again = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "trained")
    layer = again.get_submodule(LIVE + Q0).base_layer.weight
    before = layer.detach().clone()
    again.add_weighted_adapter(["default"], [1.0], "both", combination_type="cat")
    assert float((layer - before).abs().max()) > 0.01  # PEFT subtracts once more from the base when it combines; 0


def test_trap_13_experts_from_before_and_after_the_swap(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"vocab_size": 32, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)).eval()
    plain = copy.deepcopy(model)
    model.save_pretrained(tmp_path / "base")
    live = adapt(model, target_modules=[], target_parameters=["mlp.experts.down_proj"], r=2, lora_alpha=6)
    live.save_pretrained(tmp_path / "new")
    A, B = (read(tmp_path / "new")[f"{LIVE}model.layers.0.mlp.experts.lora_{f}.weight"].double() for f in "AB")
    A, B = A.view(3, 2, 24), B.view(24, 2, 3)  # experts x rank x in, and out x rank x experts
    old = rewritten(tmp_path / "new", tmp_path / "old", peft_version="0.18.1")
    silent = rewritten(tmp_path / "new", tmp_path / "silent", peft_version=None)
    theirs = merged_by_peft(plain, old)["model.layers.0.mlp.experts.down_proj"]
    assert "before PEFT 0.19 or after" in refusal(tmp_path / "base", [silent], tmp_path / "none")
    for folder in (tmp_path / "new", old):
        loratool.merge(tmp_path / "base", [folder], tmp_path / f"out-{folder.name}")
    for e in range(3):
        name = f"model.layers.0.block_sparse_moe.experts.{e}.w2.weight"
        W = read(tmp_path / "base")[name].double()
        right = 6 / 2 * B[:, :, e] @ A[e]
        assert share(read(tmp_path / "out-new")[name] - W, right) < 1e-5
        assert share(read(tmp_path / "out-old")[name] - W, right.T) < 1e-5
        assert share(theirs[e] - W, right.T) > 1  # PEFT reads old square experts the new way, without a word: 143 %


def test_trap_14_repeated_layers_are_layers_of_their_own(saved: Make, adapter_folder: Make, tmp_path: Path) -> None:
    model, base = saved("llama")
    before = state(model)
    live, adapter = adapter_folder(model, target_modules=["q_proj"], r=4, layer_replication=[[0, 2], [1, 2]])
    right, answers = [delta_of(live, Q0.replace("0", str(n))) for n in range(3)], logits(live)
    theirs = state(live.merge_and_unload())
    second = Q0.replace("0", "1")
    both = theirs[f"{second}.weight"] - before[f"{second}.weight"]
    assert share(both, right[1]) > 0.5  # PEFT adds the updates of layers 1 and 2 to the one weight that they share
    torch.testing.assert_close(both.double(), right[1] + right[2], rtol=0, atol=1e-6)
    loratool.merge(base, [adapter], tmp_path / "out")
    got = read(tmp_path / "out")
    for n, source in enumerate((0, 1, 1)):
        W = before[f"{Q0.replace('0', str(source))}.weight"].double()
        assert share(got[f"{Q0.replace('0', str(n))}.weight"] - W, right[n]) < 1e-6
    torch.testing.assert_close(logits(opened(tmp_path / "out")), answers, rtol=0, atol=2e-6)


def test_trap_15_a_quantised_base_is_not_quantised_again(saved: Make, tiny: Make, tmp_path: Path) -> None:
    from bitsandbytes import functional

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    _, plain = saved("llama", **sizes)
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantised = transformers.AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=settings, device_map="cpu", dtype=torch.float32
    )
    quantised.save_pretrained(tmp_path / "base")

    def numbers(layer: Any) -> torch.Tensor:
        return functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()

    W = numbers(quantised.get_submodule(Q0))
    assert share(W, tiny("llama", **sizes).state_dict()[f"{Q0}.weight"]) < 0.2
    live = adapt(tiny("llama", **sizes), target_modules=["q_proj"], r=4, lora_alpha=0.1)
    live.save_pretrained(tmp_path / "adapter")
    right = delta_of(live, Q0)
    theirs = peft.PeftModel.from_pretrained(quantised, tmp_path / "adapter").merge_and_unload()
    moved = numbers(theirs.get_submodule(Q0)) - W
    assert share(moved, right) > 0.5  # PEFT quantises the sum, and a small update is lost in it; 0 is right
    loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", dtype="float32")
    got = read(tmp_path / "out")[f"{Q0}.weight"]
    assert share(got - W, right) < 1e-5
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


class Convolutions(torch.nn.Module):
    """One of each kind; what it computes does not matter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = torch.nn.Conv1d(6, 8, 3)
        self.dilated = torch.nn.Conv2d(6, 8, 3, dilation=2)
        self.three = torch.nn.Conv3d(4, 6, 3)
        self.flat = torch.nn.Conv3d(4, 6, (1, 1, 3))
        self.grouped = torch.nn.Conv2d(6, 8, 3, groups=2)


@pytest.mark.parametrize("name", ["one", "dilated", "three", "flat", "grouped"])
def test_trap_16_convolutions(name: str, tmp_path: Path) -> None:
    model = Convolutions()
    (tmp_path / "base").mkdir()
    save_file(state(model), tmp_path / "base" / "model.safetensors")
    write_json(tmp_path / "base" / "config.json", {"model_type": "convolutions"})
    W = model.get_submodule(name).weight.detach().double()
    live = adapt(model, target_modules=[name], r=2, lora_alpha=3)
    live.save_pretrained(tmp_path / "adapter")
    if name == "grouped":  # the update is dense over the inputs: no weight in groups can hold it
        with pytest.raises(NotImplementedError):
            live.merge_and_unload()
        assert name in refusal(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
        return
    A, B = (read(tmp_path / "adapter")[f"{LIVE}{name}.lora_{f}.weight"].double() for f in "AB")
    right = W + 3 / 2 * torch.einsum("or,ri...->oi...", B.flatten(1), A)
    loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    torch.testing.assert_close(read(tmp_path / "out")[f"{name}.weight"].double(), right, rtol=0, atol=1e-7)
    if name == "flat":
        with pytest.raises(RuntimeError):  # PEFT takes a kernel of 1x1x3 for one of 1x1
            live.merge_and_unload()
        return
    theirs = state(live.merge_and_unload())[f"{name}.weight"]
    torch.testing.assert_close(theirs.double(), right, rtol=0, atol=1e-6)


def test_trap_17_unknown_missing_and_unused_keys(saved: Make, adapter_folder: Make, tiny: Make, tmp_path: Path) -> None:
    model, base = saved("llama")
    before = state(model)
    live, adapter = adapter_folder(model, target_modules=["q_proj", "v_proj"], r=4)
    tensors = read(adapter)
    modules = [f"model.layers.{n}.self_attn.{m}" for n in (0, 1) for m in ("q_proj", "v_proj")]
    right = {f"{module}.weight": before[f"{module}.weight"] + delta_of(live, module) for module in modules}
    true = sum(float(delta_of(live, module).norm() ** 2) for module in modules) ** 0.5
    one = next(iter(tensors))
    cases = {
        "unknown": {**tensors, f"{LIVE}{Q0}.lora_C.weight": torch.ones(4, 4)},
        "half a pair": {n: t for n, t in tensors.items() if n != one},
        "no second layer": {n: t for n, t in tensors.items() if "layers.1" not in n},
        "no values": {n: t for n, t in tensors.items() if "v_proj" not in n},
        "of a layer that is not there": {n.replace("layers.1", "layers.7"): t for n, t in tensors.items()},
    }
    named = {
        "unknown": "lora_C",
        "half a pair": one.removeprefix(LIVE).rpartition(".lora_")[0],
        "no second layer": "model.layers.1.self_attn.q_proj",
        "no values": V0,
        "of a layer that is not there": "model.layers.7.self_attn.q_proj",
    }
    for case, kept in cases.items():
        folder = rewritten(adapter, tmp_path / case, kept)
        theirs = merged_by_peft(tiny("llama"), folder)
        off = sum(float((theirs[n] - weight).norm() ** 2) for n, weight in right.items()) ** 0.5 / true
        if case == "unknown":
            assert off < 1e-5  # PEFT does not say that a key was not used
        else:
            assert 0.3 < off < 2  # PEFT merges a part, or takes a random half; 0 is right
        assert named[case] in refusal(base, [folder], tmp_path / "out"), case


SPELLINGS: dict[str, Callable[[str], str]] = {
    "PEFT's own": lambda n: n,
    "no prefix": lambda n: n.removeprefix(LIVE),
    "twice the prefix": lambda n: LIVE + n,
    "with the adapter's name": lambda n: n.replace(".weight", ".default.weight"),
    "of torch.compile": lambda n: n.replace(LIVE, f"{LIVE}_orig_mod."),
    "of FSDP": lambda n: n.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
    "of DDP": lambda n: "module." + n,
}


def test_trap_18_spellings_of_the_prefix(saved: Make, adapter_folder: Make, tiny: Make, tmp_path: Path) -> None:
    model, base = saved("llama")
    before = state(model)
    _, adapter = adapter_folder(model, target_modules=["q_proj"], r=4)
    results, unread = set(), set()
    for spelling, spell in SPELLINGS.items():
        folder = rewritten(adapter, tmp_path / spelling, {spell(n): t for n, t in read(adapter).items()})
        loratool.merge(base, [folder], tmp_path / f"out {spelling}")
        results.add((tmp_path / f"out {spelling}" / "model.safetensors").read_bytes())
        theirs = merged_by_peft(tiny("llama"), folder)
        if all(torch.equal(theirs[n], before[n]) for n in before):
            unread.add(spelling)  # PEFT's merged model is the base
    assert len(results) == 1
    assert unread == {*SPELLINGS} - {"PEFT's own", "with the adapter's name"}


def test_trap_19_tensors_that_are_empty_flat_or_not_finite(
    saved: Make, adapter_folder: Make, tiny: Make, tmp_path: Path
) -> None:
    _, base = saved("llama", dtype=torch.float16)
    _, adapter = adapter_folder(tiny("llama"), target_modules=["q_proj"], r=4)
    down, up = f"{LIVE}{Q0}.lora_A.weight", f"{LIVE}{Q0}.lora_B.weight"
    tensors = read(adapter)
    damaged = {
        "empty": (up, torch.zeros(0)),  # what sharded training saves
        "flat": (down, tensors[down].flatten()),
        "NaN": (up, tensors[up].masked_fill(torch.eye(32, 4, dtype=torch.bool), float("nan"))),
        "infinity": (down, tensors[down].masked_fill(torch.eye(4, 32, dtype=torch.bool), float("inf"))),
    }
    for what, (name, tensor) in damaged.items():
        folder = rewritten(adapter, tmp_path / what, {**tensors, name: tensor.contiguous()})
        said = refusal(base, [folder], tmp_path / "out")
        assert (name if what in ("NaN", "infinity") else Q0) in said
        if what in ("NaN", "infinity"):  # PEFT merges it, and the model answers NaN
            assert not merged_by_peft(tiny("llama"), folder)[f"{Q0}.weight"].isfinite().all()
    strong = rewritten(adapter, tmp_path / "strong", lora_alpha=1e7)
    theirs = merged_by_peft(tiny("llama").half(), strong)[f"{Q0}.weight"]
    assert not theirs.isfinite().all()  # PEFT overflows
    said = refusal(base, [strong], tmp_path / "out")
    assert "self_attn.q_proj.weight" in said
    assert "overflow float16" in said
    loratool.merge(base, [strong], tmp_path / "out", dtype="bfloat16")


def test_trap_20_what_depends_on_the_token_is_no_weight(
    saved: Make, adapter_folder: Make, tiny: Make, tmp_path: Path
) -> None:
    model, base = saved("llama")
    _, adapter = adapter_folder(model, target_modules=["q_proj"], r=4)
    live = adapt(tiny("llama"), target_modules=["q_proj"], r=4, alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM")
    live.save_pretrained(tmp_path / "activated")
    with pytest.raises(NotImplementedError):
        live.merge_and_unload()
    assert "invocation tokens" in refusal(base, [tmp_path / "activated"], tmp_path / "out")
    for field, value, reason in (
        ("arrow_config", {"top_k": 2}, "routes every token"),
        ("arrow_config", {}, "routes every token"),
        ("use_qalora", True, "groups of inputs"),
    ):
        folder = rewritten(adapter, tmp_path / f"{field}-{bool(value)}", **{field: value})
        said = refusal(base, [folder], tmp_path / "out")
        assert field in said
        assert reason in said


def test_trap_21_several_adapters_are_their_sum(saved: Make, tiny: Make, tmp_path: Path) -> None:
    model, base = saved("llama")
    W = state(model)
    live = adapt(model, 1, target_modules=["q_proj"], r=4)
    live.save_pretrained(tmp_path / "one")
    other = adapt(tiny("llama"), 2, target_modules=["q_proj"], r=4)
    other.save_pretrained(tmp_path / "two")
    third = adapt(tiny("llama"), 3, target_modules=["q_proj", "v_proj"], r=2)  # another rank, and more modules
    third.save_pretrained(tmp_path / "three")
    live.load_adapter(tmp_path / "two", adapter_name="two")
    live.load_adapter(tmp_path / "three", adapter_name="three")
    right = 0.7 * delta_of(live, Q0) + 0.4 * delta_of(other, Q0)
    live.add_weighted_adapter(["default", "two"], [0.7, 0.4], "linear", combination_type="linear")
    assert share(delta_of(live, Q0, "linear"), right) > 0.5  # PEFT: products of one's A with the other's B are in it
    drops = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        live.add_weighted_adapter(["default", "two"], [0.7, 0.4], f"d{seed}", "dare_linear", density=0.5)
        drops.append(delta_of(live, Q0, f"d{seed}"))
    assert share(drops[0], drops[1]) > 0.5  # and its dropping follows the global seed
    with pytest.raises(ValueError, match="same r value"):
        live.add_weighted_adapter(["default", "three"], [0.7, 0.4], "ranks", combination_type="linear")
    folders, weights = [tmp_path / "one", tmp_path / "two", tmp_path / "three"], [0.7, 0.4, -1.5]
    loratool.merge(base, folders, tmp_path / "out", weights=weights)
    loratool.merge(base, folders[::-1], tmp_path / "again", weights=weights[::-1])
    assert snapshot(tmp_path / "out")["model.safetensors"] == snapshot(tmp_path / "again")["model.safetensors"]
    got = read(tmp_path / "out")
    assert share(got[f"{Q0}.weight"] - W[f"{Q0}.weight"], right - 1.5 * delta_of(third, Q0)) < 1e-6
    assert share(got[f"{V0}.weight"] - W[f"{V0}.weight"], -1.5 * delta_of(third, V0)) < 1e-6


def test_trap_22_fields_that_nobody_knows(saved: Make, adapter_folder: Make, tiny: Make, tmp_path: Path) -> None:
    model, base = saved("llama")
    _, adapter = adapter_folder(model, target_modules=["q_proj"], r=4)
    for field, value in (("use_twist", True), ("twist_config", {"angle": 3}), ("kasa_config", {"beta": 1e-4})):
        folder = rewritten(adapter, tmp_path / field, **{field: value})
        assert field in refusal(base, [folder], tmp_path / "out")
    with heard() as said:
        theirs = merged_by_peft(tiny("llama"), tmp_path / "use_twist")
    assert any("use_twist" in text for text in said)  # PEFT warns,
    plain = merged_by_peft(tiny("llama"), adapter)
    assert torch.equal(theirs[f"{Q0}.weight"], plain[f"{Q0}.weight"])  # and merges as if it were not there
    loratool.merge(base, [rewritten(adapter, tmp_path / "off", use_twist=False)], tmp_path / "out")


class Opens:
    """A pickle that opens a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def test_trap_23_pickles_are_opened_on_request_and_run_nothing(
    saved: Make, adapter_folder: Make, tmp_path: Path
) -> None:
    model, base = saved("llama")
    _, adapter = adapter_folder(model, target_modules=["q_proj"], r=4)
    loratool.merge(base, [adapter], tmp_path / "safe")
    tensors = read(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    assert "--allow-pickle" in refusal(base, [adapter], tmp_path / "out")
    loratool.merge(base, [adapter], tmp_path / "out", allow_pickle=True)
    assert snapshot(tmp_path / "out")["model.safetensors"] == snapshot(tmp_path / "safe")["model.safetensors"]
    torch.save({**tensors, "x": Opens(tmp_path / "opened")}, adapter / "adapter_model.bin")
    assert "adapter_model.bin" in refusal(base, [adapter], tmp_path / "none", allow_pickle=True)
    assert not (tmp_path / "opened").exists()


def test_trap_24_another_base(saved: Make, adapter_folder: Make, tiny: Make, tmp_path: Path) -> None:
    model, base = saved("llama")
    model.config._name_or_path = "org/seven-b"
    model.name_or_path = "org/seven-b"
    live, adapter = adapter_folder(model, target_modules=["q_proj", "v_proj"], r=4)
    tiny("llama", hidden_size=48).save_pretrained(tmp_path / "wider")
    said = refusal(tmp_path / "wider", [adapter], tmp_path / "out")
    for text in (Q0, "[48, 48]", "[32, 32]", "org/seven-b"):
        assert text in said
    report = loratool.merge(base, [adapter], tmp_path / "out", verify=True)
    assert any("org/seven-b" in f.what for f in report.findings)
    torch.testing.assert_close(logits(opened(tmp_path / "out")), logits(live), rtol=0, atol=2e-6)
