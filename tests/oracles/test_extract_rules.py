"""What extract keeps, leaves out and says: rank rules, the rest of a fine-tune, resized vocabularies, noise."""

import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from test_peft_loads_ours import load_in_peft

import loratool
from loratool.errors import InputError, LoratoolError, MismatchError, UsageError


def shifted(model, folder, pick, rank=3, size=0.05):
    """Add low-rank updates to the matrices that `pick` chooses and small steps to its vectors; save the model."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not pick(name):
                continue
            if weight.dim() == 1:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
                continue
            rows, columns = weight.shape[0], weight[0].numel()
            update = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
            weight.add_(size * update.reshape(weight.shape))
    model.save_pretrained(folder)
    return model, folder


def every_layer(name):
    return not any(word in name for word in ("embed", "wte", "wpe", "lm_head", "embeddings"))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt2-bare", "bert", "bert-bare", "distilbert", "clip"])
def test_saving_the_rest_gives_back_the_whole_fine_tune(kind, saved, tiny, run_model, tmp_path):
    model, base = saved(kind)
    plain = run_model(kind, model)
    tuned, folder = shifted(model, tmp_path / "tuned", every_layer)
    with pytest.raises(InputError, match="changed that are not extracted"):
        loratool.extract(folder, base, tmp_path / "refused", rank=3)
    report = loratool.extract(folder, base, tmp_path / "adapter", rank=3, rest="save")
    assert report.totals["saved_tensors"]
    assert report.totals["left_out"] == 0
    live = load_in_peft(tiny(kind), tmp_path / "adapter")
    wanted = run_model(kind, tuned)
    assert float((wanted - plain).abs().max()) > 1e-2
    torch.testing.assert_close(run_model(kind, live), wanted, rtol=1e-3, atol=1e-4)


def test_what_is_saved_is_merged_back(saved, run_model, tmp_path):
    import transformers

    model, base = saved("bert")
    tuned, folder = shifted(model, tmp_path / "tuned", every_layer)
    loratool.extract(folder, base, tmp_path / "adapter", rank=3, rest="save")
    loratool.merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(run_model("bert", merged), run_model("bert", tuned), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "unet"])
def test_one_changed_bias_is_merged_back_too(kind, saved, tiny, run_model, tmp_path):
    """A config has one word for all biases; one that says "all" of a file that has one bias would be torn."""
    first = {"gpt2": "h.0.attn.c_attn", "bert": "layer.0.attention.self.query", "unet": "mid_block.resnets.0.conv1"}
    leaves = ("c_attn.weight", "query.weight", "to_q.weight", "conv1.weight", f"{first[kind]}.bias")
    _, base = saved(kind)
    tuned, folder = shifted(tiny(kind), tmp_path / "tuned", lambda name: name.endswith(leaves))
    loratool.extract(folder, base, tmp_path / "adapter", rank=3, rest="save", to="peft")
    loratool.merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    merged = type(tuned).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(run_model(kind, merged), run_model(kind, tuned), rtol=1e-3, atol=1e-4)
    live = load_in_peft(tiny(kind), tmp_path / "adapter")
    torch.testing.assert_close(run_model(kind, live), run_model(kind, tuned), rtol=1e-3, atol=1e-4)
    report = loratool.resize(tmp_path / "adapter", tmp_path / "smaller", rank=2)
    assert not [f for f in report.findings if "missing" in f.what]


SOME = {
    "two matrices and a bias beside one": ("0.attention.self.query", "0.attention.self.value.weight"),
    "a bias elsewhere": ("0.attention.self.query.weight", "0.output.dense.bias"),
    "a norm's weight": ("0.attention.self.query", "0.attention.output.LayerNorm.weight"),
    "the pooler's bias": ("0.attention.self.query.weight", "pooler.dense.bias"),
}


@pytest.mark.parametrize("which", SOME)
def test_some_biases_of_some_layers_are_merged_back(which, saved, tiny, run_model, tmp_path):
    _, base = saved("bert")
    tuned, folder = shifted(tiny("bert"), tmp_path / "tuned", lambda name: any(part in name for part in SOME[which]))
    loratool.extract(folder, base, tmp_path / "adapter", rank=3, rest="save")
    loratool.merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    merged = type(tuned).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(run_model("bert", merged), run_model("bert", tuned), rtol=1e-3, atol=1e-4)
    live = load_in_peft(tiny("bert"), tmp_path / "adapter")
    torch.testing.assert_close(run_model("bert", live), run_model("bert", tuned), rtol=1e-3, atol=1e-4)


def test_parameters_that_are_no_modules_are_saved_alone_and_warned_of(tmp_path):
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
             "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "pad_token_id": 0}  # fmt: skip
    model = GptOssForCausalLM(GptOssConfig(**sizes)).eval()
    model.save_pretrained(tmp_path / "base")
    mine = ("q_proj.weight", "sinks", "experts.down_proj_bias")
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(mine[1:]):
                value.add_(0.5)
    shifted(model, tmp_path / "tuned", lambda name: name.endswith(mine[0]))
    report = loratool.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "adapter", rank=3, rest="save")
    (warning,) = [f.what for f in report.findings if f.level == "warning"]
    assert "PEFT passes over" in warning
    assert "self_attn.sinks" in warning
    assert len([n for n in load_file(tmp_path / "adapter/adapter_model.safetensors") if "experts" in n]) == 2
    loratool.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    wanted, found = (load_file(tmp_path / name / "model.safetensors") for name in ("tuned", "merged"))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_skipping_the_rest_says_how_much_that_is(saved, tmp_path):
    model, base = saved("gpt2")
    _, folder = shifted(model, tmp_path / "tuned", every_layer)
    report = loratool.extract(folder, base, tmp_path / "adapter", rank=3, rest="skip")
    before, after = (load_file(f / "model.safetensors") for f in (base, folder))
    squares = {n: float((after[n].double() - before[n].double()).square().sum()) for n in before}
    rest = sum(s for n, s in squares.items() if before[n].dim() == 1)
    assert report.totals["left_out"] == pytest.approx(rest / sum(squares.values()), rel=1e-6)
    assert set(report.totals["skipped_tensors"]) == {n for n, s in squares.items() if before[n].dim() == 1 and s}


@pytest.mark.parametrize("tied", [False, True])
def test_a_larger_vocabulary_is_kept_whole(tied, saved, tiny, run_model, tmp_path):
    model, base = saved("llama", tie_word_embeddings=tied)
    model.resize_token_embeddings(70)
    tuned, folder = shifted(model, tmp_path / "tuned", lambda n: "q_proj" in n)
    with pytest.raises(LoratoolError, match="70") as refusal:
        loratool.extract(folder, base, tmp_path / "refused", rank=3)
    assert "--rest save" in refusal.value.hint
    report = loratool.extract(folder, base, tmp_path / "adapter", rank=3, rest="save")
    size = model.model.embed_tokens.weight.numel() * 4
    assert any("vocabulary" in f.what and f"kept whole ({size:,} bytes)" in f.what for f in report.findings)
    assert report.totals["saved_bytes"] == (size if tied else 2 * size)
    fresh = tiny("llama", tie_word_embeddings=tied)
    fresh.resize_token_embeddings(70)
    live = load_in_peft(fresh, tmp_path / "adapter")
    torch.testing.assert_close(run_model("llama", live), run_model("llama", tuned), rtol=1e-3, atol=1e-4)


def untied(model):
    """Give a tied model a head of its own, as a fine-tune with tie_word_embeddings=False has."""
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return model


@pytest.fixture
def half_tied(saved, tiny, tmp_path):
    """Make a base and a fine-tune of it of which one has a tied head and the other has not."""

    def make(where, pick):
        if where == "base":
            model, base = saved("llama", tie_word_embeddings=True)
            return *shifted(untied(model), tmp_path / "tuned", pick), base
        model, base = saved("llama")
        tuned = tiny("llama", tie_word_embeddings=True)
        tuned.load_state_dict({n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}, strict=False)
        tuned.tie_weights()
        return *shifted(tuned, tmp_path / "tuned", pick), base

    return make


@pytest.mark.parametrize("changed", ["both", "the head", "the embedding"])
@pytest.mark.parametrize("where", ["base", "tuned model"])
def test_a_head_that_is_tied_in_one_model_only_is_saved_apart(  # noqa: PLR0917
    where, changed, half_tied, tiny, run_model, tmp_path
):
    words = {"both": ("lm_head", "embed"), "the head": ("lm_head",), "the embedding": ("embed",)}[changed]
    tuned, folder, base = half_tied(where, lambda n: "q_proj" in n or any(w in n for w in words))
    wanted = run_model("llama", tuned)
    report = loratool.extract(folder, base, tmp_path / "adapter", rank=3, rest="save")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert not config.get("ensure_weight_tying")
    assert sorted(config["modules_to_save"]) == ["embed_tokens", "lm_head"] or all(
        name.endswith(("embed_tokens", "lm_head")) for name in config["modules_to_save"]
    )
    assert report.totals["left_out"] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)  # and it is meant so
        plain = tiny("llama", tie_word_embeddings=where == "base")
        live = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    torch.testing.assert_close(run_model("llama", live), wanted, rtol=1e-3, atol=1e-4)
    loratool.merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    import transformers

    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(run_model("llama", merged), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["base", "tuned model"])
@pytest.mark.parametrize("rest", ["skip", "error"])
def test_a_head_that_is_tied_in_one_model_only_is_otherwise_a_layer_like_others(
    where, rest, half_tied, run_model, tmp_path
):
    tuned, folder, base = half_tied(where, lambda n: "q_proj" in n or "lm_head" in n)
    report = loratool.extract(folder, base, tmp_path / "adapter", rank=32, rest=rest)
    assert report.totals["left_out"] == 0  # not the whole head, of which the base has what the embedding has
    before, after = (load_file(f / "model.safetensors") for f in (base, folder))
    for side in (before, after):
        side.setdefault("lm_head.weight", side["model.embed_tokens.weight"])
    squares = sum(float((after[n].double() - before[n].double()).square().sum()) for n in before)
    assert report.totals["norm"] == pytest.approx(squares**0.5, rel=1e-5)
    loratool.merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    import transformers

    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(run_model("llama", merged), run_model("llama", tuned), rtol=1e-3, atol=1e-4)


def test_a_retrained_head_is_extracted_at_the_rank_or_kept_whole_if_excluded(saved, tiny, run_model, tmp_path):
    model, base = saved("llama")
    tuned, folder = shifted(model, tmp_path / "tuned", lambda n: "q_proj" in n or "lm_head" in n, rank=20)
    report = loratool.extract(folder, base, tmp_path / "low", rank=2, rest="save")
    assert next(r for r in report.rows if r["module"] == "lm_head")["rank"] == 2
    report = loratool.extract(folder, base, tmp_path / "whole", rank=20, rest="save", exclude="lm_head")
    size = model.lm_head.weight.numel() * 4
    assert report.totals["saved_bytes"] == size
    assert any(f"{size:,} bytes" in f.what and "lm_head" in f.what for f in report.findings)
    live = load_in_peft(tiny("llama"), tmp_path / "whole")
    torch.testing.assert_close(run_model("llama", live), run_model("llama", tuned), rtol=1e-3, atol=1e-4)
    stored = load_file(tmp_path / "whole/adapter_model.safetensors")
    assert torch.equal(stored["base_model.model.lm_head.weight"], model.lm_head.weight)


def test_a_tied_embedding_that_changed_is_saved_with_its_tie(saved, tiny, run_model, tmp_path):
    model, base = saved("gpt2")
    tuned, folder = shifted(model, tmp_path / "tuned", lambda n: "wte" in n or "c_fc.weight" in n)
    loratool.extract(folder, base, tmp_path / "adapter", rank=3, rest="save")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["ensure_weight_tying"] is True
    live = load_in_peft(tiny("gpt2"), tmp_path / "adapter")
    torch.testing.assert_close(run_model("gpt2", live), run_model("gpt2", tuned), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("quality", ["fast", "balanced", "exact"])
def test_a_known_low_rank_delta_comes_back_to_five_digits(quality, saved, tmp_path):
    _, base = saved("llama", hidden_size=256, intermediate_size=512)
    weights = load_file(base / "model.safetensors")
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned/config.json").write_text((base / "config.json").read_text())
    generator = torch.Generator().manual_seed(1)
    deltas = {}
    for name in [n for n in weights if "proj" in n]:
        m, n = weights[name].shape
        deltas[name] = torch.randn(m, 5, generator=generator) @ torch.randn(5, n, generator=generator) * 0.05
        weights[name] = weights[name] + deltas[name]
    from safetensors.torch import save_file

    save_file(weights, tmp_path / "tuned/model.safetensors", {"format": "pt"})
    for rule in ({"rank": 5}, {"rank": "auto"}, {"energy": 1 - 1e-9}):
        out = tmp_path / f"out {next(iter(rule.values()))}"
        report = loratool.extract(tmp_path / "tuned", base, out, quality=quality, **rule)
        factors = load_file(out / "adapter_model.safetensors")
        for name, delta in deltas.items():
            A, B = (factors[f"base_model.model.{name.removesuffix('.weight')}.lora_{f}.weight"].double() for f in "AB")
            assert A.shape[0] == 5
            assert float((B @ A - delta).norm() / delta.norm()) < 1e-5
        assert report.totals["error"] < 1e-5


def test_auto_stops_at_the_rounding_of_the_checkpoints(saved, tmp_path):
    model, base = saved("llama", dtype=torch.bfloat16, hidden_size=256, intermediate_size=512)
    _, folder = shifted(model, tmp_path / "tuned", lambda n: "proj" in n, rank=4, size=0.01)
    report = loratool.extract(folder, base, tmp_path / "out", rank="auto")
    for row in (r for r in report.rows if "rank" in r):
        assert row["rank"] == 4
        assert row["noise_floor"] == pytest.approx(row["error"], rel=0.6)  # what is left is rounding


def test_energy_and_error_rules_keep_what_they_promise(saved, tmp_path):
    _, base = saved("llama")
    model, _ = saved("llama", folder="again")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))
    model.save_pretrained(tmp_path / "tuned")
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "tuned"))
    for rule, check in (
        ({"energy": 0.7}, lambda s, k: (s[:k].square().sum() / s.square().sum(), 0.7)),
        ({"error": 0.4}, lambda s, k: (-s[k:].norm() / s.norm(), -0.4)),
        ({"cumulative": 0.6}, lambda s, k: (s[:k].sum() / s.sum(), 0.6)),
        ({"ratio": 3.0}, lambda s, k: (s[k - 1], s[0] / 3)),
    ):
        report = loratool.extract(tmp_path / "tuned", base, tmp_path / f"out {rule}", **rule)
        for row in (r for r in report.rows if "rank" in r):
            name = f"{row['module']}.weight"
            sigma = torch.linalg.svdvals(after[name].double() - before[name].double())
            got, wanted = check(sigma, row["rank"])
            assert got >= wanted - 1e-6
            if row["rank"] > 1 and "ratio" not in rule:  # and no rank more than needed
                got, wanted = check(sigma, row["rank"] - 1)
                assert got < wanted + 1e-6


def test_a_change_of_high_rank_is_warned_of_with_the_rank_that_would_do(saved, tmp_path):
    _, base = saved("llama")
    model, _ = saved("llama", folder="again")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(tmp_path / "tuned")
    report = loratool.extract(tmp_path / "tuned", base, tmp_path / "out", rank=1)
    (warning,) = [f for f in report.findings if f.level == "warning"]
    assert "not of low rank" in warning.what
    assert "would keep 90%" in warning.what


@pytest.mark.parametrize("kilobytes", [12, 30, 60])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_extraction_within_a_budget_uses_it_up(kilobytes, dtype, saved, tmp_path):
    model, base = saved("llama")
    _, folder = shifted(model, tmp_path / "tuned", lambda n: "proj" in n, rank=24)
    budget = kilobytes << 10
    report = loratool.extract(folder, base, tmp_path / "out", budget=budget, dtype=dtype)
    size = sum(f.stat().st_size for f in (tmp_path / "out").iterdir() if f.name != "loratool.report.json")
    assert size == report.totals["file_bytes"] <= budget
    largest = max(r["bytes"] // r["rank"] for r in report.rows if "rank" in r)
    everything = all(r["retained"] > 0.9999 for r in report.rows if "rank" in r)
    assert everything or budget - size < largest + 256


def test_nothing_to_extract_is_refused_unless_allowed(saved, tiny, run_model, tmp_path):
    model, base = saved("llama")
    with pytest.raises(InputError, match="nothing to extract"):
        loratool.extract(base, base, tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()
    loratool.extract(base, base, tmp_path / "out", rank=2, allow_noop=True)
    live = load_in_peft(tiny("llama"), tmp_path / "out")
    assert torch.equal(run_model("llama", live), run_model("llama", model))


def test_models_that_do_not_belong_together_and_impossible_ranks_are_refused(saved, tmp_path):
    _, base = saved("llama")
    _, other = saved("gpt2")
    _, wide = saved("llama", folder="wide", hidden_size=64)
    for tuned in (other, wide):
        with pytest.raises(MismatchError):
            loratool.extract(tuned, base, tmp_path / "out", rank=2)
    with pytest.raises(UsageError, match="smaller side of every weight"):
        loratool.extract(base, base, tmp_path / "out", rank=1000)
    model, _ = saved("llama", folder="third")
    _, tuned = shifted(model, tmp_path / "tuned", lambda n: "proj" in n)
    with pytest.raises(InputError, match="less than one rank"):
        loratool.extract(tuned, base, tmp_path / "out", budget=2000)
    assert not (tmp_path / "out").exists()


def mixtral():
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()


@pytest.mark.parametrize("rule", [{"rank": 3}, {"energy": 1 - 1e-10}, {"budget": 1 << 20}], ids=str)
def test_a_mixture_of_experts_comes_out_whole(rule, run_model, tmp_path):
    model = mixtral()
    model.save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 3 or "proj" in name:
                *stack, rows, columns = weight.shape
                up = torch.randn(*stack, rows, 3, generator=generator)
                weight.add_(0.05 * up @ torch.randn(*stack, 3, columns, generator=generator))
            elif "norm" in name:
                weight.add_(0.1)
    model.save_pretrained(tmp_path / "tuned")
    loratool.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rest="save", **rule)
    with warnings.catch_warnings():  # PEFT looks for the patterns of parameters among modules
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        live = peft.PeftModel.from_pretrained(mixtral(), tmp_path / "out").eval()
    wanted, plain = run_model("llama", model), run_model("llama", mixtral())
    assert float((run_model("llama", live) - wanted).abs().max()) < 1e-3 * float((wanted - plain).abs().max())


@pytest.mark.parametrize("kind", ["phi3", "gpt2"])
def test_the_parts_of_a_fused_weight_each_get_a_delta(kind, saved, tiny, run_model, tmp_path):
    """The best rank-3 update of every part, by an SVD of its rows, and written so that PEFT reads it."""

    def make():
        from transformers import Phi3Config, Phi3ForCausalLM

        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                 "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1}  # fmt: skip
        return Phi3ForCausalLM(Phi3Config(**sizes)).eval() if kind == "phi3" else tiny("gpt2")

    name, heights = {"phi3": ("qkv_proj", (32, 16, 16)), "gpt2": ("c_attn", (32, 32, 32))}[kind]
    make().save_pretrained(tmp_path / "base")
    shifted(make(), tmp_path / "tuned", lambda n: n.endswith(f"{name}.weight"), rank=32)
    report = loratool.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=3, split=True, target=name)
    assert len(report.rows) == 6
    loratool.merge(tmp_path / "base", tmp_path / "out", tmp_path / "merged")
    base, tuned, merged = (load_file(tmp_path / n / "model.safetensors") for n in ("base", "tuned", "merged"))
    for key in (k for k in base if k.endswith(f"{name}.weight")):
        change, found = (m[key].double() - base[key].double() for m in (tuned, merged))
        sides = [d.split(list(heights), dim=1 if kind == "gpt2" else 0) for d in (change, found)]
        for part, kept in zip(*sides, strict=True):
            best = torch.linalg.svdvals(part)[3:].square().sum().sqrt()
            assert float((part - kept).norm()) < 1.01 * float(best)
    live = load_in_peft(make(), tmp_path / "out")
    model = type(make()).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(run_model("gpt2", live), run_model("gpt2", model), rtol=1e-4, atol=1e-5)
    factors = load_file(tmp_path / "out/adapter_model.safetensors").values()
    assert report.totals["bytes"] == sum(f.numel() * f.element_size() for f in factors)
    report = loratool.extract(
        tmp_path / "tuned", tmp_path / "base", tmp_path / "small", budget=24_000, split=True, target=name
    )
    files = [p for p in (tmp_path / "small").iterdir() if p.name != "loratool.report.json"]
    assert 0.7 * 24_000 < sum(p.stat().st_size for p in files) <= 24_000


@pytest.mark.parametrize("given", ["folders", "a file of its own", "padded"])
def test_one_part_of_a_fused_weight_may_be_all_that_changed(given, tmp_path):
    """The others get zeros: k and v have other heights than q, and only the config beside a model knows them."""
    from transformers import Phi3Config, Phi3ForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1}  # fmt: skip
    model = Phi3ForCausalLM(Phi3Config(**sizes)).eval()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        weight = model.model.layers[1].self_attn.qkv_proj.weight
        weight[:32] += 0.1 * torch.randn(32, 2) @ torch.randn(2, 32)
    model.save_pretrained(tmp_path / "tuned")
    tuned = tmp_path / "tuned"
    if given == "a file of its own":
        tuned = tmp_path / "alone.safetensors"
        (tmp_path / "tuned/model.safetensors").rename(tuned)
    options = {"pad_rank": 8} if given == "padded" else {}
    loratool.extract(tuned, tmp_path / "base", tmp_path / "out", rank=2, split=True, arch="phi3", **options)
    loratool.merge(tmp_path / "base", tmp_path / "out", tmp_path / "merged")
    wanted = load_file(tuned if given == "a file of its own" else tuned / "model.safetensors")
    for name, value in load_file(tmp_path / "merged/model.safetensors").items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)
    ranks = {f.shape[0] for n, f in load_file(tmp_path / "out/adapter_model.safetensors").items() if "lora_A" in n}
    assert ranks == ({8} if given == "padded" else {2})


@pytest.mark.parametrize("split", [False, True])
def test_one_changed_expert_of_a_fused_stack_comes_back(split, tmp_path):
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
             "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "pad_token_id": 0}  # fmt: skip
    model = GptOssForCausalLM(GptOssConfig(**sizes)).eval()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.gate_up_proj[1] += 0.1 * torch.randn(32, 2) @ torch.randn(2, 96)
    model.save_pretrained(tmp_path / "tuned")
    loratool.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=2, split=split)
    loratool.merge(tmp_path / "base", tmp_path / "out", tmp_path / "merged")
    wanted, found = (load_file(tmp_path / name / "model.safetensors") for name in ("tuned", "merged"))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_a_budget_over_stacked_experts_counts_what_is_written(tmp_path):
    mixtral().save_pretrained(tmp_path / "base")
    model = mixtral()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(tmp_path / "tuned")
    report = loratool.extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rest="skip", budget=100_000)
    size = sum(f.stat().st_size for f in (tmp_path / "out").iterdir() if f.name != "loratool.report.json")
    assert 85_000 < size == report.totals["file_bytes"] <= 100_000


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_numbers_that_are_none_are_named(name, value, saved, tmp_path):
    _, base = saved("llama")
    model, _ = saved("llama", folder="again")
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[3] = value
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(InputError, match="NaN or infinity") as refusal:
        loratool.extract(tmp_path / "tuned", base, tmp_path / "out", rank=2, rest="save")
    assert name in str(refusal.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["kohya", "comfy", "lycoris"])
def test_norms_and_biases_are_differences_in_the_files_of_image_tools(to, saved, tmp_path):
    """LyCORIS' `.diff` and `.diff_b` are what is added to a weight and to a bias, in fp32 here."""
    model, base = saved("unet")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm1.weight", "norm2.bias", "conv1.bias")):
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "tuned")
    file = tmp_path / "a.safetensors"
    loratool.extract(
        tmp_path / "tuned", base, file, rank=2, rest="save", to=to, arch="stable-diffusion", allow_noop=True
    )
    written = {
        name: t for name, t in load_file(file).items() if name.endswith((".diff", ".diff_b", "w_norm", "b_norm"))
    }
    changed = [t - before[name] for name, t in model.state_dict().items() if not torch.equal(t, before[name])]
    assert len(written) == len(changed) > 10
    assert {tuple(t.flatten().tolist()) for t in written.values()} == {tuple(t.flatten().tolist()) for t in changed}
    loratool.merge(base, [file], tmp_path / "merged", arch="stable-diffusion")
    merged = load_file(tmp_path / "merged" / "diffusion_pytorch_model.safetensors")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-6)
