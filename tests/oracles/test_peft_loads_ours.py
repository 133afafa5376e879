"""PEFT loads what resize, convert and extract write, without a warning, and computes the same."""

import warnings

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import loratool

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SMALL = {
    "llama": LLAMA,
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gpt2-bare": ["c_attn"],
    "bert": ["query", "key", "value", "dense"],
    "bert-bare": ["query", "dense"],
    "distilbert": ["q_lin", "v_lin", "lin1"],
    "unet": ["to_q", "to_out.0", "proj_in", "conv1", "conv2", "time_emb_proj", "ff.net.2"],
    "clip": ["q_proj", "fc1"],
}


def load_in_peft(model, folder):
    """The live model: every warning is an error, so keys that PEFT misses or ignores fail here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # PEFT itself asks transformers for an attribute by its old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return peft.PeftModel.from_pretrained(model, folder).eval()


def adapted(live):
    return {n: m for n, m in live.get_base_model().named_modules() if hasattr(m, "lora_A")}


def scalings(live):
    return {n: m.scaling["default"] for n, m in adapted(live).items()}


def ranks(live):
    return {n: m.r["default"] for n, m in adapted(live).items()}


def with_low_rank_factors(folder, rank):
    """Make every factor pair of a saved adapter of rank `rank` or lower, so that resizing to that rank is lossless."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in [n for n in tensors if "lora_B" in n]:
        tensors[name][:, rank:] = 0
    save_file(tensors, path)


@pytest.mark.parametrize("kind", SMALL)
def test_a_resized_adapter_of_enough_rank_answers_like_the_original(kind, tiny, adapter_folder, run_model, tmp_path):
    _, folder = adapter_folder(tiny(kind), target_modules=SMALL[kind], r=6, lora_alpha=9)
    with_low_rank_factors(folder, 3)
    wanted = run_model(kind, load_in_peft(tiny(kind), folder))
    effect = float((wanted - run_model(kind, tiny(kind))).abs().max())
    loratool.resize(folder, tmp_path / "small", rank=3)
    live = load_in_peft(tiny(kind), tmp_path / "small")
    assert set(ranks(live).values()) == {3}
    assert set(scalings(live).values()) == {1.0}
    assert effect > 0
    assert float((run_model(kind, live) - wanted).abs().max()) < 1e-4 * effect


@pytest.mark.parametrize("kind", ["llama", "bert", "unet"])
def test_peft_gives_every_module_its_own_rank_after_resizing_by_energy(kind, tiny, adapter_folder, run_model, tmp_path):
    _, folder = adapter_folder(tiny(kind), target_modules=SMALL[kind], r=6)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    true_ranks = {}
    for n, name in enumerate(sorted(m for m in tensors if "lora_B" in m)):
        module = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
        keep = min(1 + n % 5, tensors[name].shape[0])  # conv_out and the like have few rows
        tensors[name][:, keep:] = 0
        true_ranks[module] = keep
    save_file(tensors, path)
    wanted = run_model(kind, load_in_peft(tiny(kind), folder))
    loratool.resize(folder, tmp_path / "small", energy=1.0 - 1e-12)
    live = load_in_peft(tiny(kind), tmp_path / "small")
    assert ranks(live) == true_ranks
    assert len(set(true_ranks.values())) > 2
    assert set(scalings(live).values()) == {1.0}
    torch.testing.assert_close(run_model(kind, live), wanted, rtol=1e-4, atol=1e-5)


# a kohya file does not say that a model was bare (BertModel, GPT2Model): names come back as in the model with a head
@pytest.mark.parametrize("kind", [k for k in SMALL if not k.endswith("-bare")])
def test_an_adapter_back_from_kohya_answers_like_the_original(kind, tiny, adapter_folder, run_model, tmp_path):
    live, folder = adapter_folder(tiny(kind), target_modules=SMALL[kind], r=4, lora_alpha=6)
    family = {"clip": "stable-diffusion", "unet": "stable-diffusion", "gpt2": "gpt2"}.get(
        kind, ""
    )  # names that several families share
    loratool.convert(folder, tmp_path / "k.safetensors", to="kohya", arch=family)
    loratool.convert(tmp_path / "k.safetensors", tmp_path / "back", to="peft", arch=family)
    again = load_in_peft(tiny(kind), tmp_path / "back")
    assert scalings(again) == scalings(live)
    assert torch.equal(run_model(kind, again), run_model(kind, live))


def test_mixed_ranks_and_alphas_survive_kohya(tiny, adapter_folder, run_model, tmp_path):
    patterns = {
        "rank_pattern": {"k_proj": 2, r"layers\.1\.mlp\.\w+_proj": 7},
        "alpha_pattern": {"v_proj": 1.5, r"layers.0.mlp.(gate|up)_proj": 20},
    }
    live, folder = adapter_folder(tiny("llama"), target_modules=LLAMA, r=4, lora_alpha=5, **patterns)
    loratool.convert(folder, tmp_path / "k.safetensors", to="kohya")
    loratool.convert(tmp_path / "k.safetensors", tmp_path / "back", to="peft")
    again = load_in_peft(tiny("llama"), tmp_path / "back")
    assert ranks(again) == ranks(live)
    assert scalings(again) == scalings(live)
    assert torch.equal(run_model("llama", again), run_model("llama", live))


@pytest.mark.parametrize("kind", ["llama", "unet", "gpt2"])
def test_everything_written_is_read_by_the_safetensors_library(kind, saved, adapter_folder, tmp_path):
    model, base = saved(kind)
    _, folder = adapter_folder(model, target_modules=SMALL[kind], r=4)
    loratool.merge(base, [folder], tmp_path / "merged")
    loratool.resize(folder, tmp_path / "resized", rank=2)
    loratool.resize(folder, tmp_path / "resized.safetensors", rank=2)
    arch = "stable-diffusion" if kind == "unet" else ""  # without attn2.to_k it might be one for XL
    loratool.convert(folder, tmp_path / "kohya.safetensors", to="kohya", arch=arch)
    loratool.extract(tmp_path / "merged", base, tmp_path / "extracted", rank=4)
    files = [*tmp_path.glob("*.safetensors")]
    files += [p for f in ("merged", "resized", "extracted") for p in (tmp_path / f).glob("*.safetensors")]
    assert len(files) == 5
    for path in files:
        with safe_open(path, "pt") as opened:
            assert opened.metadata()
            for name in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                assert bool(torch.isfinite(opened.get_tensor(name)).all())


def tuned_pair(kind, saved, targets, rank, tmp_path):
    """A base folder, a tuned folder, and the exact updates between them, by name in memory."""
    model, base = saved(kind)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    generator = torch.Generator().manual_seed(5)
    deltas = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and name.removesuffix(".weight").endswith(tuple(targets)):
                rows, columns = weight.shape[0], weight[0].numel()
                update = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
                weight.add_(0.05 * update.reshape(weight.shape))
                deltas[name] = weight - before[name]
    assert deltas
    model.save_pretrained(tmp_path / "tuned")
    return model, base, tmp_path / "tuned", deltas


EXTRACTED = {
    "llama": ["q_proj", "down_proj", "embed_tokens", "lm_head"],
    "gpt2": ["c_attn", "c_fc", "wpe"],
    "bert": ["query", "dense", "word_embeddings"],
    "bert-bare": ["query", "dense"],
    "gpt2-bare": ["c_attn", "c_fc"],
    "distilbert": ["q_lin", "lin1"],
    "unet": ["to_q", "proj_in", "conv1", "conv_in", "conv_shortcut", "linear_1"],
    "clip": ["q_proj", "fc1", "token_embedding"],
}


@pytest.mark.parametrize("kind", EXTRACTED)
def test_a_low_rank_fine_tune_is_extracted_whole(kind, saved, tiny, run_model, tmp_path):
    model, base, tuned, deltas = tuned_pair(kind, saved, EXTRACTED[kind], 3, tmp_path)
    report = loratool.extract(tuned, base, tmp_path / "adapter", rank=3)
    assert report.totals["changed"] == len(deltas)
    assert report.totals["error"] < 1e-5
    live = load_in_peft(tiny(kind), tmp_path / "adapter")
    merged = live.merge_and_unload().state_dict()
    original = tiny(kind).state_dict()
    for name, delta in deltas.items():
        got = merged[name].double() - original[name].double()
        assert float((got - delta.double()).norm() / delta.double().norm()) < 1e-5, name
    live = load_in_peft(tiny(kind), tmp_path / "adapter")
    torch.testing.assert_close(run_model(kind, live), run_model(kind, model), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "unet"])
def test_the_reported_error_of_an_extraction_is_that_of_the_best_approximation(kind, saved, tmp_path):
    targets = {"llama": ["q_proj"], "gpt2": ["c_fc"], "unet": ["conv1"]}[kind]
    _, base, tuned, deltas = tuned_pair(kind, saved, targets, 12, tmp_path)
    report = loratool.extract(tuned, base, tmp_path / "adapter", rank=4)
    rows = {row["module"]: row for row in report.rows if not row.get("unchanged")}
    assert len(rows) == len(deltas)
    for name, delta in deltas.items():
        sigma = torch.linalg.svdvals(delta.flatten(1).double())
        best = float(sigma[4:].norm() / sigma.norm())
        row = next(r for m, r in rows.items() if m.endswith(name.removesuffix(".weight")))
        assert row["error"] == pytest.approx(best, rel=1e-2)
        assert row["norm"] == pytest.approx(float(sigma.norm()), rel=1e-5)


def test_an_extraction_in_kohya_spelling_equals_the_one_in_peft_spelling(saved, tmp_path):
    _, base, tuned, deltas = tuned_pair("unet", saved, EXTRACTED["unet"], 3, tmp_path)
    loratool.extract(tuned, base, tmp_path / "adapter", rank=3)
    loratool.extract(tuned, base, tmp_path / "adapter.safetensors", rank=3, to="kohya")
    ours = load_file(tmp_path / "adapter/adapter_model.safetensors")
    theirs = load_file(tmp_path / "adapter.safetensors")
    assert len(theirs) == 3 * len(deltas)
    for name in deltas:
        path = name.removesuffix(".weight")
        flat = "lora_unet_" + path.replace(".", "_")
        assert torch.equal(theirs[flat + ".lora_down.weight"], ours[f"base_model.model.{path}.lora_A.weight"])
        assert torch.equal(theirs[flat + ".lora_up.weight"], ours[f"base_model.model.{path}.lora_B.weight"])
        assert float(theirs[flat + ".alpha"]) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rank", [3, 2])
def test_the_reported_error_is_that_of_the_factors_as_written(dtype, rank, saved, tmp_path):
    _, base, tuned, deltas = tuned_pair("llama", saved, ["q_proj", "down_proj"], 3, tmp_path)
    report = loratool.extract(tuned, base, tmp_path / "adapter", rank=rank, dtype=dtype)
    factors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert {t.dtype for t in factors.values()} == {getattr(torch, dtype)}
    rows = {row["module"]: row["error"] for row in report.rows if not row.get("unchanged")}
    for name, delta in deltas.items():
        module = name.removesuffix(".weight")
        A, B = (factors[f"base_model.model.{module}.lora_{f}.weight"].double() for f in "AB")
        measured = float((delta.double() - B @ A).norm() / delta.double().norm())
        assert rows[module] == pytest.approx(measured, rel=0.02, abs=1e-7)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "unet", "clip"])
def test_deltas_read_in_panels_give_the_same_adapter(kind, saved, tmp_path, monkeypatch):
    from loratool.engine import Resources
    from loratool.operations import extract

    _, base, tuned, deltas = tuned_pair(kind, saved, EXTRACTED[kind], 3, tmp_path)
    loratool.extract(tuned, base, tmp_path / "whole", rank=3)
    monkeypatch.setattr(extract, "PANEL", 1)
    monkeypatch.setattr(extract, "TILE", 1)
    report = loratool.extract(tuned, base, tmp_path / "panels", rank=3, resources=Resources(memory=1))
    assert report.totals["changed"] == len(deltas)
    assert report.totals["error"] < 1e-5
    one, two = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("whole", "panels"))
    assert set(one) == set(two)
    for name in [n for n in one if "_A" in n]:
        other = name.replace("_A", "_B")
        updates = [t[other].double().flatten(1) @ t[name].double().flatten(1) for t in (one, two)]
        assert float((updates[0] - updates[1]).norm()) < 1e-5 * float(updates[0].norm())
