"""Weights in full, ties, heads, vocabularies where adapters meet: sums of maps of the original weight, or refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_files import HIDDEN, Q0, VOCAB, factors, run_main, tensors_of_llama, write_adapter, write_base

import loratool
from loratool.errors import LoratoolError, MismatchError

HEAD, EMBED = "lm_head", "model.embed_tokens"
WRAP = "base_model.model."


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora(module: str, out: int, into: int, seed: int = 5) -> dict[str, torch.Tensor]:
    return factors(seed, shapes={module: (out, into)})


def delta(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    a, b = (tensors[f"{WRAP}{module}.lora_{x}.weight"].double() for x in "AB")
    return 2 * b @ a


def tied_base(folder: Path) -> Path:
    tensors = {n: t for n, t in tensors_of_llama().items() if n != f"{HEAD}.weight"}
    return write_base(folder, tensors, tie_word_embeddings=True)


def out_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_trained_tokens_are_for_both_of_two_tied_weights_also_where_one_gets_a_delta(tmp_path: Path):
    base = tied_base(tmp_path / "base")
    rows = numbers(1, 2, HIDDEN)
    own = lora(HEAD, VOCAB, HIDDEN)
    tensors = {**own, f"{WRAP}{EMBED}.token_adapter.trainable_tokens_delta": rows}
    adapter = write_adapter(tmp_path / "adapter", tensors, trainable_token_indices=[3, 7])
    loratool.merge(base, [adapter], tmp_path / "out")
    embed = tensors_of_llama()[f"{EMBED}.weight"].double()
    embed[[3, 7]] = rows.double()
    merged = out_of(tmp_path / "out")
    assert torch.equal(merged[f"{EMBED}.weight"].double(), embed)
    assert torch.allclose(merged[f"{HEAD}.weight"].double(), embed + delta(own, HEAD), atol=1e-6)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_trained_tokens_alone_leave_weights_tied(tmp_path: Path):
    base = tied_base(tmp_path / "base")
    tensors = {f"{WRAP}{EMBED}.token_adapter.trainable_tokens_delta": numbers(1, 2, HIDDEN), **factors()}
    adapter = write_adapter(tmp_path / "adapter", tensors, trainable_token_indices=[3, 7])
    loratool.merge(base, [adapter], tmp_path / "out")
    assert f"{HEAD}.weight" not in out_of(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.5), (0.5, 0.5)])
def test_two_adapters_that_bring_one_weight_in_full_are_refused_whatever_their_weights(tmp_path: Path, weights: Any):
    base = write_base(tmp_path / "base")
    adapters = [
        write_adapter(
            tmp_path / f"a{n}",
            {**factors(), f"{WRAP}{HEAD}.weight": numbers(n, VOCAB, HIDDEN)},
            modules_to_save=[HEAD],
        )
        for n in (1, 10)
    ]
    with pytest.raises(MismatchError, match="in full"):
        loratool.merge(base, adapters, tmp_path / "out", weights=weights)
    assert not (tmp_path / "out").exists()


def test_a_weight_in_full_and_deltas_of_the_original_weight_add_up(tmp_path: Path):
    """DoRA's dW is one of the original W, whether or not another adapter replaces it."""
    base = write_base(tmp_path / "base")
    full = numbers(3, HIDDEN, HIDDEN)
    first = write_adapter(tmp_path / "full", {**factors(2), f"{WRAP}model.layers.1.self_attn.o_proj.weight": full},
                          modules_to_save=["layers.1.self_attn.o_proj"])  # fmt: skip
    module = "model.layers.1.self_attn.o_proj"
    dora = lora(module, HIDDEN, HIDDEN) | {f"{WRAP}{module}.lora_magnitude_vector": 1 + numbers(4, HIDDEN).abs()}
    second = write_adapter(tmp_path / "dora", dora, use_dora=True)
    loratool.merge(base, [first, second], tmp_path / "out")
    W = tensors_of_llama()[f"{module}.weight"].double()
    moved = W + delta(dora, module)
    magnitude = dora[f"{WRAP}{module}.lora_magnitude_vector"].double()
    change = moved * (magnitude / moved.norm(dim=1))[:, None] - W
    merged = out_of(tmp_path / "out")[f"{module}.weight"].double()
    assert torch.allclose(merged, full.double() + change, atol=1e-5)


def test_what_a_folder_is_called_decides_nothing(tmp_path: Path):
    """Tokens from `a1` and a full embedding from `a10` contradict each other like those of any other two folders."""
    base = write_base(tmp_path / "base")
    tokens = {**factors(), f"{WRAP}{EMBED}.token_adapter.trainable_tokens_delta": numbers(1, 1, HIDDEN)}
    one = write_adapter(tmp_path / "a1", tokens, trainable_token_indices=[3])
    full = {**factors(), f"{WRAP}{EMBED}.weight": numbers(2, VOCAB, HIDDEN)}
    two = write_adapter(tmp_path / "a10", full, modules_to_save=["embed_tokens"])
    with pytest.raises(MismatchError, match="another adapter brings this weight in full"):
        loratool.merge(base, [one, two], tmp_path / "out")


def test_two_adapters_with_the_same_resized_vocabulary_go_together(tmp_path: Path):
    base = write_base(tmp_path / "base")
    grown = numbers(6, VOCAB + 2, HIDDEN)
    adapters, expected = [], grown.double()
    for n in (1, 2):
        a, b = numbers(n, 4, VOCAB + 2) * 0.1, numbers(n + 10, HIDDEN, 4) * 0.1
        name = f"{WRAP}{EMBED}"
        tensors = {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b, f"{name}.base_layer.weight": grown}
        tensors[f"{WRAP}{HEAD}.weight"] = numbers(8, VOCAB + 2, HIDDEN)
        if n == 2:
            del tensors[f"{WRAP}{HEAD}.weight"]
        adapters.append(write_adapter(tmp_path / f"a{n}", tensors, target_modules=["embed_tokens"]))
        expected = expected + 2 * (b.double() @ a.double()).T
    loratool.merge(base, adapters, tmp_path / "out")
    assert torch.allclose(out_of(tmp_path / "out")[f"{EMBED}.weight"].double(), expected, atol=1e-5)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == VOCAB + 2


def test_an_initial_adapter_is_taken_back_also_where_modules_are_left_out(tmp_path: Path):
    base = write_base(tmp_path / "base")
    trained = write_adapter(tmp_path / "trained", factors(2), init_lora_weights="pissa")
    write_adapter(tmp_path / "initial", factors(1), init_lora_weights="pissa")
    with pytest.raises(MismatchError, match="changed the base model"):
        loratool.merge(base, [trained], tmp_path / "out")
    loratool.merge(base, [trained], tmp_path / "out", init_adapter=tmp_path / "initial", exclude=["down_proj"])
    merged, one, two = out_of(tmp_path / "out"), factors(2), factors(1)
    for module in (Q0, "model.layers.1.self_attn.k_proj"):
        exact = tensors_of_llama()[f"{module}.weight"].double() + delta(one, module) - delta(two, module)
        assert torch.allclose(merged[f"{module}.weight"].double(), exact, atol=1e-6)
    assert torch.equal(
        merged["model.layers.1.mlp.down_proj.weight"], tensors_of_llama()["model.layers.1.mlp.down_proj.weight"]
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_replication", [1, 2]),
        ("layer_replication", "abc"),
        ("layer_replication", [[0, 2.5]]),
        ("layer_replication", [[0, 10**12]]),
        ("layer_replication", [[2, 1]]),
        ("modules_to_save", 5),
        ("target_parameters", 5),
        ("target_parameters", [5]),
        ("feedforward_modules", 5),
        ("trainable_token_indices", {"embed_tokens": ["x"]}),
    ],
)
def test_malformed_fields_are_refused_by_name_and_never_crash(tmp_path: Path, capsys: Any, field: str, value: object):
    base = write_base(tmp_path / "base")
    tensors = {**factors(), f"{WRAP}{EMBED}.token_adapter.trainable_tokens_delta": numbers(1, 1, HIDDEN)}
    adapter = write_adapter(tmp_path / "adapter", tensors, **{"trainable_token_indices": [1], field: value})
    assert run_main("merge", base, adapter, "-o", tmp_path / "out") == 3
    assert field in capsys.readouterr().err
    assert run_main("inspect", adapter) == 0
    assert not (tmp_path / "out").exists()


def test_a_head_of_two_labels_says_so_where_the_base_had_others(tmp_path: Path):
    base = write_base(tmp_path / "base", id2label={"0": "a", "1": "b", "2": "c"}, label2id={"a": 0, "b": 1, "c": 2})
    tensors = {**factors(), f"{WRAP}score.weight": numbers(1, 2, HIDDEN)}
    adapter = write_adapter(tmp_path / "adapter", tensors, task_type="SEQ_CLS", modules_to_save=["classifier", "score"])
    loratool.merge(base, [adapter], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(config["id2label"]) == 2
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert torch.equal(out_of(tmp_path / "out")["score.weight"], tensors[f"{WRAP}score.weight"])


def test_factors_of_other_than_floating_point_numbers_are_refused(tmp_path: Path):
    base = write_base(tmp_path / "base")
    tensors = {**factors(), f"{WRAP}{HEAD}.weight": torch.ones(VOCAB, HIDDEN, dtype=torch.int64)}
    adapter = write_adapter(tmp_path / "adapter", tensors, modules_to_save=[HEAD])
    with pytest.raises(LoratoolError, match="I64"):
        loratool.merge(base, [adapter], tmp_path / "out")
