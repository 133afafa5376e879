"""The traps of merging that tools for language models fall into, one test each, named for the trap.

Of the 24, these are not of merging: 2, and what 3, 6 and 20 say of extracting (issue 5); 15, how rows of q and k lie in
GGUF and Meta's files, and 16 and 24, what serving engines accept (issues 7 and 9). 23, a cache that goes stale, cannot
be: there is none, and what an interrupted run left is resumed for the same plan only (operations/test_interruptions).

The oracles are fp64 arithmetic on the tensors of the files, live models of transformers, and PEFT in memory.
"""

from __future__ import annotations

import json
import re
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import adapt
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_files import (
    DOWN1,
    HIDDEN,
    K1,
    factors,
    refusal,
    snapshot,
    tensors_of_llama,
    write_adapter,
    write_base,
    write_sharded,
)
from tiny_files import Q0 as FIRST
from traps import LIVE, Q0, V0, delta_of, logits, merged_by_peft, opened, read, rewritten, share, state

import loratool
from loratool.engine import Resources
from loratool.storage.load import Loader
from loratool.tensors import TensorRef

Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def pair(out: int, into: int, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Down and up."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, into, generator=generator) * 0.1, torch.randn(out, rank, generator=generator) * 0.1


def update(folder: Path, module: str, scaling: float) -> torch.Tensor:
    A, B = (read(folder)[f"{LIVE}{module}.lora_{f}.weight"].double() for f in "AB")
    return scaling * B @ A


def close(got: torch.Tensor, right: torch.Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(got.double(), right.double(), rtol=0, atol=atol)


def test_trap_01_the_scale_is_of_file_and_config_and_never_guessed(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    W = tensors_of_llama()
    down, up = pair(16, 16, 4, 1)
    kohya = {"lora_te_model_layers_0_self_attn_q_proj.lora_down.weight": down}
    kohya["lora_te_model_layers_0_self_attn_q_proj.lora_up.weight"] = up
    save_file(kohya, tmp_path / "kohya.safetensors")
    loratool.merge(base, [tmp_path / "kohya.safetensors"], tmp_path / "of-kohya")
    close(read(tmp_path / "of-kohya")[f"{FIRST}.weight"], W[f"{FIRST}.weight"].double() + up.double() @ down.double())
    fields: dict[str, Any] = {"alpha_pattern": {"k_proj": 1}, "rank_pattern": {r"^model\.layers\.1\.mlp\.down_proj": 4}}
    one = write_adapter(tmp_path / "one", lora_alpha=12, r=4, use_rslora=True, **fields)
    loratool.merge(base, [one], tmp_path / "out")
    for module, scaling in ((FIRST, 12 / 2), (K1, 1 / 2), (DOWN1, 12 / 2)):
        right = W[f"{module}.weight"].double() + update(one, module, scaling)
        close(read(tmp_path / "out")[f"{module}.weight"], right)
    conflict = write_adapter(tmp_path / "conflict", rank_pattern={"k_proj": 8})
    assert K1 in refusal(base, [conflict], tmp_path / "none")


def test_trap_03_sums_are_in_fp32_and_rounded_once(saved: Make, tiny: Make, tmp_path: Path) -> None:
    model, base = saved("llama", dtype=torch.bfloat16, hidden_size=128)
    W = state(model)[f"{Q0}.weight"].double()
    exact, plain = W.clone(), model
    for n in range(4):
        live = adapt(tiny("llama", hidden_size=128), n, target_modules=["q_proj"], r=4, lora_alpha=1)
        exact += delta_of(live, Q0)
        live.save_pretrained(tmp_path / f"a{n}")
        plain = peft.PeftModel.from_pretrained(plain, tmp_path / f"a{n}").merge_and_unload()  # as LLaMA-Factory does
    right = exact.to(torch.bfloat16)
    one_after_another = float((state(plain)[f"{Q0}.weight"] != right).double().mean())
    loratool.merge(base, [tmp_path / f"a{n}" for n in range(4)], tmp_path / "out")
    together = float((read(tmp_path / "out")[f"{Q0}.weight"] != right).double().mean())
    assert one_after_another > 0.2  # of the weights are not the nearest; 0 is right
    assert together < 0.001


def test_trap_04_conv1d_is_transposed_and_says_so(saved: Make, tiny: Make, tmp_path: Path) -> None:
    _, base = saved("gpt2")
    module = "transformer.h.1.mlp.c_proj"
    down, up = pair(32, 128, 4, 2)
    tensors = {f"{LIVE}{module}.lora_A.weight": down, f"{LIVE}{module}.lora_B.weight": up}
    lying = write_adapter(tmp_path / "lying", tensors, fan_in_fan_out=False)
    loratool.merge(base, [lying], tmp_path / "out")
    W = read(base)[f"{module}.weight"].double()
    assert W.shape == (128, 32)
    right = W + 2 * (up.double() @ down.double()).T
    close(read(tmp_path / "out")[f"{module}.weight"], right)
    loratool.resize(lying, tmp_path / "resized", rank=4)
    close(merged_by_peft(tiny("gpt2"), tmp_path / "resized")[f"{module}.weight"], right)


def test_trap_05_factors_of_an_embedding_are_transposed(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    W = tensors_of_llama()["model.embed_tokens.weight"].double()
    down, up = pair(W.shape[1], W.shape[0], 4, 3)  # A (r, vocabulary), B (dim, r)
    name = f"{LIVE}model.embed_tokens.lora_embedding_"
    adapter = write_adapter(tmp_path / "adapter", {f"{name}A": down, f"{name}B": up})
    loratool.merge(base, [adapter], tmp_path / "out")
    close(read(tmp_path / "out")["model.embed_tokens.weight"], W + 2 * (up.double() @ down.double()).T)


@pytest.mark.parametrize("side", ["lm_head", "embed_tokens"])
def test_trap_06_one_of_two_tied_weights_trained_in_full(side: str, saved: Make, tiny: Make, tmp_path: Path) -> None:
    _, base = saved("llama", tie_word_embeddings=True)
    live = adapt(tiny("llama", tie_word_embeddings=True), target_modules=["q_proj"], r=4, modules_to_save=[side])
    module = live.get_submodule(LIVE + ("lm_head" if side == "lm_head" else "model.embed_tokens"))
    with torch.no_grad():
        new = torch.randn(64, 32, generator=torch.Generator().manual_seed(9))
        module.modules_to_save["default"].weight = torch.nn.Parameter(new)
    live.save_pretrained(tmp_path / "adapter")
    right = logits(live)
    loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out")
    merged = opened(tmp_path / "out")
    assert merged.config.tie_word_embeddings is False
    assert merged.get_output_embeddings().weight.data_ptr() != merged.get_input_embeddings().weight.data_ptr()
    close(logits(merged), right, 1e-5)


def test_trap_07_a_vocabulary_that_grew(saved: Make, adapter_folder: Make, tmp_path: Path) -> None:
    model, base = saved("llama")
    (base / "tokenizer.json").write_text('"of the base"')
    model.resize_token_embeddings(67)
    live, adapter = adapter_folder(model, target_modules=["q_proj"], r=4, modules_to_save=["embed_tokens", "lm_head"])
    (adapter / "tokenizer.json").write_text('"of the adapter"')
    loratool.merge(base, [adapter], tmp_path / "out")
    merged = opened(tmp_path / "out")
    assert merged.config.vocab_size == 67
    assert merged.get_input_embeddings().weight.shape == merged.get_output_embeddings().weight.shape == (67, 32)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '"of the adapter"'
    close(logits(merged, 1, 66, 3), logits(live, 1, 66, 3), 1e-5)
    half = {n: t for n, t in read(adapter).items() if "lm_head" not in n}  # the head would stay at 64 rows
    lost = rewritten(adapter, tmp_path / "half", half)
    assert "lm_head" in refusal(base, [lost], tmp_path / "none")


PHI3 = {"hidden_size": 16, "intermediate_size": 10, "num_attention_heads": 4, "num_key_value_heads": 2}
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
SPLIT = {f"{ATTENTION}.q_proj": 16, f"{ATTENTION}.k_proj": 8, f"{ATTENTION}.v_proj": 8}
SPLIT |= {f"{MLP}.gate_proj": 10, f"{MLP}.up_proj": 10}
FUSED = {f"{ATTENTION}.qkv_proj": 32, f"{MLP}.gate_up_proj": 20}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("fused_base", [True, False], ids=["into the fused", "into the split"])
def test_trap_08_fused_and_split_names_meet(fused_base: bool, dora: bool, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    weights = {f"{m}.weight": torch.randn(n, 16, generator=generator) * 0.1 for m, n in FUSED.items()}
    right, tensors = {}, {}
    modules = SPLIT if fused_base else FUSED
    parts = dict(zip(SPLIT, [w for m in FUSED for w in _apart(weights[f"{m}.weight"])], strict=True))
    for n, (module, out) in enumerate(modules.items()):
        down, up = pair(out, 16, 2, n)
        tensors |= {f"{LIVE}{module}.lora_A.weight": down, f"{LIVE}{module}.lora_B.weight": up}
        W = (parts[module] if fused_base else weights[f"{module}.weight"]).double()
        right[module] = W + 2 * up.double() @ down.double()
        if dora:
            magnitude = torch.rand(out, generator=generator) + 0.5
            tensors[f"{LIVE}{module}.lora_magnitude_vector"] = magnitude
            right[module] *= (magnitude.double() / right[module].norm(dim=1))[:, None]
    stored = weights if fused_base else {f"{m}.weight": w.contiguous() for m, w in parts.items()}
    base = write_base(tmp_path / "base", stored, model_type="phi3", architectures=["Phi3ForCausalLM"], **PHI3)
    adapter = write_adapter(tmp_path / "adapter", tensors, r=2, lora_alpha=4, use_dora=dora)
    loratool.merge(base, [adapter], tmp_path / "out")
    got = read(tmp_path / "out")
    wanted = right
    if fused_base:
        whole = [torch.cat([right[m] for m in SPLIT if m.startswith(prefix)]) for prefix in (ATTENTION, MLP)]
        wanted = dict(zip(FUSED, whole, strict=True))
    else:
        wanted = dict(zip(SPLIT, [w for m in FUSED for w in _apart(right[m])], strict=True))
    for module, weight in wanted.items():
        close(got[f"{module}.weight"], weight)


def _apart(fused: torch.Tensor) -> list[torch.Tensor]:
    return list(fused.split([16, 8, 8] if len(fused) == 32 else [10, 10]))


MOE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
MOE |= {"vocab_size": 32, "num_experts_per_tok": 2, "pad_token_id": 0}
SQUARE = {  # so that no shape says which side is the input
    "gpt-oss, (experts, in, out)": ("GptOss", {**MOE, "intermediate_size": 16, "num_local_experts": 3}),
    "qwen3-moe, (experts, out, in)": ("Qwen3Moe", {**MOE, "moe_intermediate_size": 16, "num_experts": 3}),
}


@pytest.mark.parametrize("case", SQUARE)
def test_trap_09_the_orientation_of_experts_is_not_guessed_from_sizes(case: str, tmp_path: Path) -> None:
    kind, sizes = SQUARE[case]
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes)).eval()
    model.save_pretrained(tmp_path / "base", max_shard_size="4KB")  # experts lie across shards
    before = state(model)
    live = adapt(model, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"], r=2)
    live.save_pretrained(tmp_path / "adapter")
    right = state(live.merge_and_unload())
    loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    got = state(type(model).from_pretrained(tmp_path / "out"))
    name = "model.layers.0.mlp.experts.down_proj"
    assert got[name].shape == (3, 16, 16)
    assert share(right[name], before[name]) > 0.01
    for key in (name, f"{Q0}.weight"):
        close(got[key], right[key])


def test_trap_10_a_match_is_whole_or_none(saved: Make, adapter_folder: Make, tmp_path: Path) -> None:
    model, base = saved("llama")
    _, adapter = adapter_folder(model, target_modules=["q_proj", "v_proj"], r=4)
    tensors = read(adapter)
    nothing = {n.replace("model.layers", "decoder.blocks"): t for n, t in tensors.items()}
    partly = {n.replace("layers.1.self_attn.v_proj", "layers.1.self_attn.w_proj"): t for n, t in tensors.items()}
    over = {**tensors, f"{LIVE}model.layers.0.self_attn.rotary.scale": torch.ones(3)}
    for case, kept, named in (
        ("nothing", nothing, "decoder.blocks.0.self_attn.q_proj"),
        ("partly", partly, "model.layers.1.self_attn.w_proj"),
        ("left over", over, "model.layers.0.self_attn.rotary.scale"),
    ):
        assert named in refusal(base, [rewritten(adapter, tmp_path / case, kept)], tmp_path / "out")


def test_trap_11_what_is_quantised_is_decoded_or_refused_by_name(tmp_path: Path) -> None:
    weights = tensors_of_llama(dtype=torch.bfloat16)
    codes, scale = {}, torch.tensor([0.5], dtype=torch.bfloat16)
    for name, weight in weights.items():
        if "_proj" in name:
            codes |= {name: (weight.float() / 0.5).to(torch.float8_e4m3fn), f"{name}_scale": scale.clone()}
        else:
            codes[name] = weight
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}}}
    settings = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}
    base = write_base(tmp_path / "base", codes, quantization_config=settings)
    adapter = write_adapter(tmp_path / "adapter")
    loratool.merge(base, [adapter], tmp_path / "out", dtype="float32")
    right = codes[f"{FIRST}.weight"].double() * 0.5 + update(adapter, FIRST, 2)
    got = read(tmp_path / "out")
    close(got[f"{FIRST}.weight"], right)
    assert got.keys() == weights.keys()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    packed = {**weights, f"{FIRST}.qweight": torch.ones(2, HIDDEN, dtype=torch.int32)}
    packed |= {f"{FIRST}.scales": torch.ones(1, HIDDEN), f"{FIRST}.qzeros": torch.ones(1, 2, dtype=torch.int32)}
    del packed[f"{FIRST}.weight"]
    for method in ("gptq", "awq"):
        other = write_base(tmp_path / method, packed, quantization_config={"quant_method": method, "bits": 4})
        assert method in refusal(other, [adapter], tmp_path / "none").lower()


def test_trap_12_dora_norms_are_over_inputs_after_the_scale(saved: Make, tiny: Make, tmp_path: Path) -> None:
    _, base = saved("gpt2")  # Conv1D: inputs are the first axis of the file
    live = adapt(tiny("gpt2"), target_modules=["c_attn", "wte"], r=4, lora_alpha=6, use_dora=True)
    with torch.no_grad():
        for name, value in live.named_parameters():
            if "magnitude" in name:
                value.mul_(1 + torch.rand(value.shape, generator=torch.Generator().manual_seed(1)))
    live.save_pretrained(tmp_path / "adapter")
    tensors, W = read(tmp_path / "adapter"), read(base)
    name = "transformer.h.0.attn.c_attn"
    A, B = (tensors[f"{LIVE}{name}.lora_{f}.weight"].double() for f in "AB")
    moved = W[f"{name}.weight"].double().T + 6 / 4 * B @ A  # (out, in)
    right = (tensors[f"{LIVE}{name}.lora_magnitude_vector"].double() / moved.norm(dim=1))[:, None] * moved
    loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out")
    close(read(tmp_path / "out")[f"{name}.weight"], right.T)
    table = W["transformer.wte.weight"].double()
    A, B = (tensors[f"{LIVE}transformer.wte.lora_embedding_{f}"].double() for f in "AB")
    moved = table + 6 / 4 * (B @ A).T  # (entries, dim): a norm a dimension, over the entries
    right = tensors[f"{LIVE}transformer.wte.lora_magnitude_vector"].double() / moved.norm(dim=0) * moved
    close(read(tmp_path / "out")["transformer.wte.weight"], right)


def test_trap_13_spellings_of_what_was_trained_in_full(saved: Make, tiny: Make, tmp_path: Path) -> None:
    _, base = saved("bert")
    live = adapt(
        tiny("bert"), target_modules=["query"], r=4, modules_to_save=["classifier"], trainable_token_indices=[4, 2]
    )
    with torch.no_grad():
        for name, value in live.named_parameters():
            if value.requires_grad and "lora_" not in name:
                value.add_(0.5)
    live.save_pretrained(tmp_path / "adapter")
    tensors, results = read(tmp_path / "adapter"), set()
    right = state(live.merge_and_unload())
    spelled = {
        "PEFT's own": lambda n: n,
        "of a live model": lambda n: n.replace("classifier.", "classifier.modules_to_save.default."),
        "with the adapter's name": lambda n: re.sub(r"(lora_[AB]|tokens_delta)", r"\1.default", n),
        "twice the prefix": lambda n: LIVE + n,
        "no prefix": lambda n: n.removeprefix(LIVE),
    }
    for case, spell in spelled.items():
        found = {spell(n): t for n, t in tensors.items()}
        if case == "of a live model":
            found[f"{LIVE}classifier.original_module.weight"] = torch.full((2, 32), 7.0)
            found[f"{LIVE}classifier.original_module.bias"] = torch.full((2,), 7.0)
        loratool.merge(base, [rewritten(tmp_path / "adapter", tmp_path / case, found)], tmp_path / f"out {case}")
        results.add((tmp_path / f"out {case}" / "model.safetensors").read_bytes())
    assert len(results) == 1
    got = read(tmp_path / "out PEFT's own")
    for name in got:
        close(got[name], right[name])


def test_trap_14_adapters_of_another_base_or_another_scale(saved: Make, tiny: Make, tmp_path: Path) -> None:
    _, base = saved("llama")
    W = tiny("llama").state_dict()[f"{Q0}.weight"].double()
    for start in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"):
        other = write_adapter(
            tmp_path / start, factors(shapes={Q0: (32, 32)}), init_lora_weights=start, target_modules=[Q0]
        )
        said = refusal(base, [other], tmp_path / "out")
        assert start in said
        assert "--init-adapter" in said
    settings = peft.AdaLoraConfig(target_modules=["q_proj"], init_r=6, target_r=3, lora_alpha=5, total_step=9)
    live = peft.get_peft_model(tiny("llama"), settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in live.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    live.save_pretrained(tmp_path / "adalora")
    tensors = read(tmp_path / "adalora")
    A, B, E = (tensors[f"{LIVE}{Q0}.lora_{f}"].double() for f in "ABE")
    right = W + 5 / (6 + 1e-5) * B @ (A * E)
    close(merged_by_peft(tiny("llama"), tmp_path / "adalora")[f"{Q0}.weight"], right)
    loratool.merge(base, [tmp_path / "adalora"], tmp_path / "out")
    close(read(tmp_path / "out")[f"{Q0}.weight"], right)


def test_trap_17_the_output_is_whole_and_everything_goes_along(tmp_path: Path) -> None:
    base = write_sharded(tmp_path / "base", shards=3)
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        (base / name).write_text("{}")
    bad = factors()
    bad[f"{LIVE}{DOWN1}.lora_B.weight"][0, 0] = float("nan")
    refusal(base, [write_adapter(tmp_path / "bad", bad)], tmp_path / "out")
    loratool.merge(base, [write_adapter(tmp_path / "adapter")], tmp_path / "out")
    files = snapshot(tmp_path / "out")
    index = json.loads(files["model.safetensors.index.json"])
    tensors = read(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    for shard in sorted({*index["weight_map"].values()}):
        with safe_open(tmp_path / "out" / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        size = 8 + int.from_bytes(files[shard][:8], "little")
        assert files[shard][:size] == (base / shard).read_bytes()[:size]
    assert {"config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"} <= files.keys()


def test_trap_18_second_copies_of_the_weights_are_left_out(tmp_path: Path) -> None:
    base, adapter = write_sharded(tmp_path / "base"), write_adapter(tmp_path / "adapter")
    loratool.merge(base, [adapter], tmp_path / "plain")
    save_file({n: t + 1 for n, t in tensors_of_llama().items()}, base / "consolidated.safetensors")
    torch.save({n: t + 2 for n, t in tensors_of_llama().items()}, base / "pytorch_model.bin")
    save_file({"stray": torch.ones(2)}, base / "model-00003-of-00003.safetensors")  # of another split
    report = loratool.merge(base, [adapter], tmp_path / "out")
    kept, got = snapshot(tmp_path / "plain"), snapshot(tmp_path / "out")
    del kept["loratool.report.json"], got["loratool.report.json"]
    assert got == kept
    said = " ".join(f"{f.where} {f.what}" for f in report.findings)
    for name in ("consolidated.safetensors", "pytorch_model.bin", "model-00003-of-00003.safetensors"):
        assert name in said


def test_trap_19_nothing_untouched_is_decoded_and_tiles_are_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {**tensors_of_llama(), f"{FIRST}.weight": torch.ones(640, 16)}
    base = write_base(tmp_path / "base", tensors)
    adapter = write_adapter(tmp_path / "adapter", factors(shapes={FIRST: (640, 16)}))
    monkeypatch.setattr("loratool.operations.panels.TILE", 1)  # 64 rows, the least that a tile has
    rows: dict[str, int] = {}
    call = Loader.__call__

    def listening(self: Loader, ref: TensorRef, into: torch.Tensor | None = None) -> torch.Tensor:
        rows[ref.name] = max(rows.get(ref.name, 0), ref.shape[0])
        return call(self, ref, into)

    monkeypatch.setattr(Loader, "__call__", listening)
    loratool.merge(base, [adapter], tmp_path / "out", resources=Resources(workers=1))
    assert rows.keys() == {f"{FIRST}.weight", *load_file(adapter / "adapter_model.safetensors")}
    assert rows[f"{FIRST}.weight"] <= 64 + 15
    close(read(tmp_path / "out")[f"{FIRST}.weight"], torch.ones(640, 16).double() + update(adapter, FIRST, 2))


def test_trap_20_the_same_bytes_with_any_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratool.operations.panels.PANEL", 1)
    base = write_base(tmp_path / "base", {**tensors_of_llama(), f"{FIRST}.weight": torch.ones(640, 16)})
    shapes = {FIRST: (640, 16), K1: (8, 16)}
    adapters = [write_adapter(tmp_path / f"a{n}", factors(n, shapes=shapes)) for n in range(3)]
    results = set()
    for n, (workers, order) in enumerate([(1, [0, 1, 2]), (2, [2, 0, 1]), (3, [1, 2, 0])]):
        loratool.merge(base, [adapters[i] for i in order], tmp_path / f"out{n}", resources=Resources(workers=workers))
        results.add((tmp_path / f"out{n}" / "model.safetensors").read_bytes())
    assert len(results) == 1


def test_trap_21_local_paths_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("the network was asked")

    base = write_base(tmp_path / "base", _name_or_path="org/seven-b")
    adapter = write_adapter(tmp_path / "adapter", base_model_name_or_path="org/seven-b", revision="main")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    loratool.merge(base, [adapter], tmp_path / "out")


def test_trap_22_many_adapters_of_any_rank_on_any_modules(saved: Make, tiny: Make, tmp_path: Path) -> None:
    model, base = saved("llama")
    before = state(model)
    right = {m: before[f"{m}.weight"].double() for m in (Q0, V0)}
    folders, weights = [], []
    for n in range(9):  # ranks add up to 54; a value projection has 16 outputs
        targets = (["q_proj"], ["v_proj"], ["q_proj", "v_proj"])[n % 3]
        live = adapt(tiny("llama"), n, target_modules=targets, r=2 + n)
        for module in (m for m in right if m.rpartition(".")[2] in targets):
            right[module] += (n - 3.5) * delta_of(live, module)
        live.save_pretrained(tmp_path / f"a{n}")
        folders.append(tmp_path / f"a{n}")
        weights.append(n - 3.5)
    both = peft.PeftModel.from_pretrained(tiny("llama"), folders[0], adapter_name="0")
    both.load_adapter(folders[3], adapter_name="3")
    with pytest.raises(ValueError, match="same r value"):
        both.add_weighted_adapter(["0", "3"], [1.0, 1.0], "sum", combination_type="linear")
    loratool.merge(base, folders, tmp_path / "out", weights=weights)
    for module, weight in right.items():
        close(read(tmp_path / "out")[f"{module}.weight"], weight, 3e-6)
