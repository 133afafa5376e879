"""Embeddings and heads: tied or not, trained in part, in full or by tokens, and of another size than in the base.

The oracle is what the live adapter answers: PEFT's own merge adds to both of two tied weights, or twice to one.
"""

import pytest
import torch
from parity import ALONE, adapted, assert_rounded_once, quiet, save_adapter
from peft import LoraConfig, TrainableTokensConfig

import loratool
from loratool.errors import MismatchError

EMBED, HEAD, BOTH = {"target_modules": ["embed_tokens"]}, {"target_modules": ["lm_head"]}, ["embed_tokens", "lm_head"]
Q, C = {"target_modules": ["q_proj"]}, {"target_modules": ["c_attn"]}
DORA, SHARED = {"use_dora": True}, {"ensure_weight_tying": True}
# model, settings of the adapter, whether the merged model is still tied, whether PEFT's merge answers like the adapter
TIED = {
    "embedding": ("llama", EMBED, False, False),
    "head": ("llama", HEAD, False, False),
    "both, each its own": ("llama", {"target_modules": BOTH}, False, False),
    "embedding, shared": ("llama", EMBED | SHARED, True, False),
    "head, shared": ("llama", HEAD | SHARED, True, False),
    "both, shared": ("llama", {"target_modules": BOTH} | SHARED, True, False),
    "embedding in dora": ("llama", EMBED | DORA, False, False),
    "both in dora, shared": ("llama", {"target_modules": BOTH} | DORA | SHARED, False, False),
    "embedding in full": ("llama", Q | {"modules_to_save": ["embed_tokens"]}, False, True),
    "head in full": ("llama", Q | {"modules_to_save": ["lm_head"]}, False, True),
    "both in full": ("llama", Q | {"modules_to_save": BOTH}, False, True),
    "in full, shared": ("llama", Q | {"modules_to_save": ["embed_tokens"]} | SHARED, True, True),
    "tokens": ("llama", Q | {"trainable_token_indices": [21, 10]}, True, True),
    "the same tokens of both": ("llama", Q | {"trainable_token_indices": {m: [21, 10] for m in BOTH}}, True, True),
    "other tokens of both": (
        "llama",
        Q | {"trainable_token_indices": {"embed_tokens": [21, 10], "lm_head": [5, 3, 1]}},
        False,
        False,
    ),
    "tokens of the head": ("llama", Q | {"trainable_token_indices": {"lm_head": [5, 3]}}, False, True),
    "gpt2 embedding": ("gpt2", {"target_modules": ["wte", "c_attn"]}, False, False),
    "gpt2 embedding, not shared for all that": ("gpt2", {"target_modules": ["wte"]} | SHARED, False, False),
    "gpt2 embedding in full": ("gpt2", C | {"modules_to_save": ["wte"]}, False, True),
    "gpt2 head in full": ("gpt2", C | {"modules_to_save": ["lm_head"]}, False, True),
    "gpt2 tokens": ("gpt2", C | {"trainable_token_indices": {"wte": [21]}}, True, True),
}


def answers_alike(kind, folder, live, run_model, cls) -> object:
    with quiet():
        merged = cls.from_pretrained(folder, dtype="auto").eval()
    torch.testing.assert_close(run_model(kind, merged), run_model(kind, live), rtol=1e-4, atol=1e-5)
    return merged


@pytest.mark.parametrize("case", TIED)
def test_tied_weights_stay_one_where_they_can_and_become_two_where_they_must(case, saved, run_model, tmp_path):
    kind, settings, stays, peft_agrees = TIED[case]
    model, base = saved(kind, tie_word_embeddings=True)
    live = adapted(model, LoraConfig(**settings))
    adapter = save_adapter(live, tmp_path / "adapter")
    loratool.merge(base, [adapter], tmp_path / "out", resources=ALONE)
    merged = answers_alike(kind, tmp_path / "out", live, run_model, type(model))
    assert merged.config.tie_word_embeddings is stays
    head, embedding = merged.get_output_embeddings().weight, merged.get_input_embeddings().weight
    assert (head.data_ptr() == embedding.data_ptr()) is stays
    wanted = run_model(kind, live)
    with quiet():
        theirs = live.merge_and_unload()
    apart = float((run_model(kind, theirs) - wanted).abs().max())
    assert (apart < 1e-5) is peft_agrees
    assert peft_agrees or apart > 1e-3


def test_a_shared_update_counts_once_where_peft_adds_it_twice(saved, tmp_path):
    model, base = saved("llama", tie_word_embeddings=True)
    weight = model.model.embed_tokens.weight.detach().double().clone()
    live = adapted(model, LoraConfig(target_modules=BOTH, r=4, lora_alpha=8, **SHARED))
    adapter = save_adapter(live, tmp_path / "adapter")
    layer = live.base_model.model.model.embed_tokens
    A, B = (getattr(layer, f"lora_embedding_{f}")["default"].detach().double() for f in "AB")
    delta = 2 * (B @ A).T
    loratool.merge(base, [adapter], tmp_path / "out", compute_dtype="float64", resources=ALONE)
    merged = type(model).from_pretrained(tmp_path / "out")
    assert_rounded_once({"w": merged.lm_head.weight}, {"w": weight + delta})
    with quiet():
        theirs = live.double().merge_and_unload().model.embed_tokens.weight
    torch.testing.assert_close(theirs, weight + 2 * delta, rtol=0, atol=1e-12)


def test_values_that_a_tie_contradicts_are_refused(saved, tmp_path):
    """A file that says it shares an update, and has two."""
    from safetensors.torch import load_file, save_file

    model, base = saved("llama", tie_word_embeddings=True)
    adapter = save_adapter(adapted(model, LoraConfig(**EMBED, **SHARED)), tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.lora_A.weight"] += 1
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(MismatchError, match="lm_head"):
        loratool.merge(base, [adapter], tmp_path / "out", resources=ALONE)


RESIZED = {
    "not trained": (70, Q, {}),
    "shrunk": (60, Q, {}),
    "in lora": (70, {"target_modules": ["q_proj", *BOTH]}, {}),
    "in dora": (70, {"target_modules": BOTH} | DORA, {}),
    "in full": (70, Q | {"modules_to_save": BOTH}, {}),
    "in full, shrunk": (60, Q | {"modules_to_save": BOTH}, {}),
    "tokens": (70, Q | {"trainable_token_indices": [66, 3, 69]}, {}),
    "tied": (70, Q, {"tie_word_embeddings": True}),
    "tied, in lora": (70, EMBED, {"tie_word_embeddings": True}),
    "tied, in full": (70, Q | {"modules_to_save": ["embed_tokens"]}, {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("case", RESIZED)
def test_a_resized_vocabulary_comes_with_the_adapter(case, saved, run_model, tmp_path):
    rows, settings, changes = RESIZED[case]
    model, base = saved("llama", **changes)
    with quiet():
        model.resize_token_embeddings(rows)
        live = adapted(model, LoraConfig(**settings))
        live.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out", resources=ALONE)
    merged = answers_alike("llama", tmp_path / "out", live, run_model, type(model))
    assert merged.config.vocab_size == rows
    assert merged.get_input_embeddings().weight.shape[0] == rows


def test_a_resized_head_that_peft_did_not_save_is_missed(saved, tmp_path):
    """Where an embedding is a target, PEFT saves along no other one, resized or not."""
    model, base = saved("llama")
    with quiet():
        model.resize_token_embeddings(70)
        live = adapted(model, LoraConfig(**EMBED))
        live.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with pytest.raises(MismatchError, match=r"embed_tokens.weight has 70 rows, lm_head.weight has 64"):
        loratool.merge(base, [tmp_path / "adapter"], tmp_path / "out", resources=ALONE)


def test_only_tokens_of_a_tied_model_leave_it_tied(saved, run_model, tmp_path):
    model, base = saved("llama", tie_word_embeddings=True)
    live = adapted(model, TrainableTokensConfig(token_indices=[21, 9]))
    adapter = save_adapter(live, tmp_path / "adapter")
    loratool.merge(base, [adapter], tmp_path / "out", resources=ALONE)
    merged = answers_alike("llama", tmp_path / "out", live, run_model, type(model))
    assert merged.config.tie_word_embeddings
