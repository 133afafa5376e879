"""Embeddings through every verb, as PEFT and transformers see them; weights that two layers share."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool
from loratool.errors import InputError, LoratoolError, MismatchError


def delta(model, name: str) -> torch.Tensor:
    """The update that a live PEFT model applies to a module, in PEFT's own arithmetic."""
    module = dict(model.named_modules())[name]
    return module.get_delta_weight("default")


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_resized_embedding_is_an_embedding_to_peft(tiny, adapter_folder, tmp_path, family):
    from peft import PeftModel

    target = {"llama": "embed_tokens", "gpt2": "wpe", "bert": "position_embeddings"}[family]
    live, folder = adapter_folder(tiny(family), target_modules=[target], r=4)
    name = next(n for n, m in live.named_modules() if n.endswith(target) and hasattr(m, "lora_embedding_A"))
    wanted = delta(live, name).clone()
    loratool.resize(folder, tmp_path / "resized", rank=4)
    base = live.unload()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = PeftModel.from_pretrained(base, tmp_path / "resized")
    torch.testing.assert_close(delta(again, name), wanted, atol=1e-6, rtol=1e-5)


def gpt2_pair(tiny, tmp_path):
    """A tiny GPT-2, whose head is its embedding, and a fine-tune that moved everything two-dimensional."""
    base = tiny("gpt2")
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.add_(0.02 * torch.randn_like(parameter))
    base.save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned", tmp_path / "base"


def test_a_tied_embedding_is_never_extracted_as_if_it_were_alone(tiny, tmp_path):
    tuned, base = gpt2_pair(tiny, tmp_path)
    with pytest.raises(InputError, match=r"transformer\.wte\.weight"):
        loratool.extract(tuned, base, tmp_path / "out", rank=4)
    report = loratool.extract(tuned, base, tmp_path / "out", rank=32, rest="skip")
    assert report.totals["skipped_tensors"] == ["transformer.wte.weight"]
    assert report.totals["left_out"] > 0.01
    merged = loratool.merge(base, [tmp_path / "out"], tmp_path / "merged")
    assert all("wte" not in row["tensor"] for row in merged.rows)


def llama_files(folder, **config):
    folder.mkdir()
    torch.manual_seed(0)
    tensors = {"model.layers.0.self_attn.q_proj.weight": torch.randn(8, 8, dtype=torch.float64)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return folder, tensors


def peft_files(folder, up, down, alpha=2.0):
    folder.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    save_file({f"{name}A.weight": down, f"{name}B.weight": up}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": alpha}))
    return folder


def test_fp64_factors_keep_fp64_through_merge_resize_and_compare(tmp_path):
    base, tensors = llama_files(tmp_path / "base")
    torch.manual_seed(1)
    up, down = torch.randn(8, 2, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    adapter = peft_files(tmp_path / "adapter", up, down, alpha=3.0)
    loratool.merge(base, [adapter], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    expected = tensors["model.layers.0.self_attn.q_proj.weight"] + 1.5 * up @ down
    torch.testing.assert_close(merged, expected, rtol=1e-14, atol=1e-14)
    loratool.resize(adapter, tmp_path / "resized", rank=2)
    assert loratool.compare(adapter, tmp_path / "resized").totals["distance"] < 1e-14
    nudged = peft_files(tmp_path / "nudged", up * (1 + 1e-10), down, alpha=3.0)
    totals = loratool.compare(adapter, nudged).totals
    assert not totals["equal"]
    assert totals["distance"] == pytest.approx(1e-10, rel=1e-3)


def test_two_names_for_one_layer_are_refused(tmp_path):
    base, tensors = llama_files(tmp_path / "base")
    tensors["layers.0.self_attn.q_proj.weight"] = torch.zeros(8, 8)
    save_file(tensors, base / "model.safetensors")
    adapter = peft_files(tmp_path / "adapter", torch.ones(8, 2), torch.ones(2, 8))
    with pytest.raises(MismatchError, match="same layer"):
        loratool.merge(base, [adapter], tmp_path / "out")


def test_mixed_factors_are_resized_into_the_wider_dtype(tmp_path):
    adapter = peft_files(tmp_path / "adapter", torch.randn(8, 2), torch.randn(2, 8).bfloat16())
    loratool.resize(adapter, tmp_path / "out", rank=1)
    dtypes = {t.dtype for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()}
    assert dtypes == {torch.float32}


def test_an_adapter_for_another_base_of_the_same_shapes_is_merged_with_a_warning(tmp_path):
    base, _ = llama_files(tmp_path / "base")
    adapter = peft_files(tmp_path / "adapter", torch.randn(8, 2), torch.randn(2, 8))
    config = json.loads((adapter / "adapter_config.json").read_text())
    for named, warned in (("org/another", True), ("org/base", False), (str(base), False)):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": named}))
        report = loratool.merge(base, [adapter], tmp_path / "out", dry_run=True)
        assert any(named in f.what for f in report.findings) is warned


@pytest.mark.parametrize("adapters", [7, {"adapter": 0.5}], ids=["a number", "a dict"])
def test_merge_takes_a_list_of_adapters_and_nothing_that_looks_like_one(tmp_path, adapters):
    with pytest.raises(LoratoolError, match="list of paths"):
        loratool.merge("base", adapters, tmp_path / "out")


def test_an_unknown_keyword_fails_before_anything_is_opened(tmp_path):
    with pytest.raises(TypeError, match="arhc"):
        loratool.resize(tmp_path / "none", tmp_path / "out", rank=1, arhc="llama")


def test_an_extraction_that_keeps_the_dtype_has_the_tuned_weights_dtype(tmp_path):
    base, tensors = llama_files(tmp_path / "base")
    tuned, _ = llama_files(tmp_path / "tuned")
    save_file({n: (t + 0.1).bfloat16() for n, t in tensors.items()}, tuned / "model.safetensors")
    for dtype, wanted in (("keep", torch.bfloat16), ("float32", torch.float32)):
        loratool.extract(tuned, base, tmp_path / dtype, rank=2, dtype=dtype)
        factors = load_file(tmp_path / dtype / "adapter_model.safetensors").values()
        assert {t.dtype for t in factors} == {wanted}


def test_digests_of_the_source_file_do_not_travel(tmp_path):
    adapter = peft_files(tmp_path / "adapter", torch.ones(8, 2), torch.ones(2, 8))
    weights = adapter / "adapter_model.safetensors"
    save_file(load_file(weights), weights, {"format": "pt", "sshs_model_hash": "old", "ss_steps": "7"})
    from safetensors import safe_open

    for to, out in (("peft", tmp_path / "out"), ("kohya", tmp_path / "out.safetensors")):
        loratool.convert(adapter, out, to=to)
        with safe_open(out / "adapter_model.safetensors" if out.is_dir() else out, "pt") as file:
            metadata = file.metadata()
        assert metadata["ss_steps"] == "7"
        assert metadata.get("sshs_model_hash") != "old"  # image tools' files have one of their own
