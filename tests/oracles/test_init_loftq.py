"""LoftQ's start: nf4 of the base and the factors that make up for it, against bitsandbytes, PEFT's SVD and fp64."""

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from bitsandbytes import functional
from peft.utils.loftq_utils import _low_rank_decomposition
from safetensors.torch import load_file
from tiny_files import run_main, snapshot

import loratool
import loratool.initialising
from loratool.errors import InputError, LoratoolError, MismatchError, UnsupportedError, UsageError

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
WIDE = {"hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 1}
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 4, 6
SCALING = ALPHA / RANK


@pytest.fixture
def base(tiny, tmp_path):
    def make(kind="llama", dtype=torch.bfloat16, **overrides):
        sizes = {**SIZES, **overrides} if kind == "llama" else overrides
        tiny(kind, **sizes).to(dtype).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return make


def loftq(folder, tmp_path, out="new", rest="rest", **options):
    asked = {"preset": "all-linear", "rank": RANK, "alpha": ALPHA, **options}
    return loratool.init(folder, tmp_path / out, init="loftq", residual=tmp_path / rest, **asked)


def model_in(folder):
    return load_file(folder / "model.safetensors")


def factors(folder, name):
    """A and B of the module of a base's tensor, in fp64."""
    held = load_file(folder / "adapter_model.safetensors")
    start = f"base_model.model.{name.removesuffix('.weight')}.lora_"
    return held[f"{start}A.weight"].double(), held[f"{start}B.weight"].double()


def adapted(tensors):
    return [n for n in tensors if n.removesuffix(".weight").endswith(LLAMA)]


def nf4(weight):
    """What bitsandbytes makes of a weight; in one row, as its CPU kernel takes wrong scales for some widths."""
    codes, state = functional.quantize_4bit(weight.reshape(1, -1), quant_type="nf4", blocksize=64)
    return functional.dequantize_4bit(codes, state).reshape(weight.shape)


def by_the_paper(weight, rank, iterations):
    """Algorithm 1 of LoftQ, in fp64 but for bitsandbytes' quantiser: Q in the weight's dtype, and the best B A."""
    W, update = weight.double(), 0.0
    for _ in range(iterations):
        Q = nf4((W - update).to(weight.dtype))
        parts = _low_rank_decomposition(W - Q.double(), rank)
        update = parts["L"] @ parts["R"]
    return Q, update


def trainable(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return peft.PeftModel.from_pretrained(model, folder, is_trainable=True)


def logits(model):
    ids = torch.arange(3, 15).view(2, 6)
    return model(input_ids=ids).logits.detach()


# -- What is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("iterations", [1, 3])
def test_the_base_is_nf4_of_the_weights_and_the_factors_the_best_for_what_that_loses(dtype, iterations, base, tmp_path):
    report = loftq(base(dtype=dtype), tmp_path, loftq_iterations=iterations)
    before, rest = model_in(tmp_path / "base"), model_in(tmp_path / "rest")
    rows = {row["module"]: row for row in report.rows}
    assert len(rows) == len(adapted(before)) == 14
    squares = torch.zeros(3, dtype=torch.float64)
    for name, weight in before.items():
        if name not in adapted(before):
            assert torch.equal(rest[name], weight)
            continue
        A, B = factors(tmp_path / "new", name)
        W, Q = weight.double(), rest[name].double()
        wanted, update = by_the_paper(weight, RANK, iterations)
        assert rest[name].dtype == dtype
        if iterations == 1:
            assert torch.equal(rest[name], wanted)
            torch.testing.assert_close(SCALING * B @ A, update, rtol=1e-4, atol=1e-6)
        else:  # what lies between two codes may fall to either side
            assert float(torch.isclose(rest[name], wanted, rtol=0.01).double().mean()) > 0.999
        best = torch.linalg.svdvals(W - Q)[RANK:].norm()
        left = (W - Q - SCALING * B @ A).norm()
        assert left <= 1.0001 * best
        row = rows[name.removesuffix(".weight")]
        assert row["nf4_error"] == pytest.approx(float((W - nf4(weight).double()).norm() / W.norm()), rel=1e-5)
        assert row["loftq_error"] == pytest.approx(float(left / W.norm()), rel=1e-5)
        assert row["loftq_error"] < row["nf4_error"]
        squares += torch.stack([W.norm(), (W - nf4(weight).double()).norm(), left]) ** 2
    whole, plain, left = squares.tolist()
    assert report.totals["nf4_error"] == pytest.approx((plain / whole) ** 0.5, rel=1e-5)
    assert report.totals["loftq_error"] == pytest.approx((left / whole) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_loaded_in_4_bits_is_the_residual_base_bit_for_bit(dtype, base, tmp_path):
    loftq(base(dtype=dtype), tmp_path, loftq_iterations=2)
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    live = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "rest", quantization_config=settings, device_map="cpu", dtype=dtype
    )
    rest = model_in(tmp_path / "rest")
    for name in adapted(rest):
        weight = live.get_parameter(name)
        assert torch.equal(functional.dequantize_4bit(weight.data, weight.quant_state), rest[name]), name


def test_more_iterations_lose_less(base, tmp_path):
    folder = base(**WIDE)
    once = loftq(folder, tmp_path, "one", "rest-one")
    often = loftq(folder, tmp_path, "five", "rest-five", loftq_iterations=5)
    for one, five in zip(once.rows, often.rows, strict=True):
        assert five["loftq_error"] < one["loftq_error"]
        assert five["nf4_error"] == one["nf4_error"]


def test_rslora_and_factors_of_16_bits_are_measured_as_they_are(base, tmp_path):
    report = loftq(base(), tmp_path, rslora=True, dtype="bfloat16")
    before, rest = model_in(tmp_path / "base"), model_in(tmp_path / "rest")
    for row in report.rows:
        name = f"{row['module']}.weight"
        A, B = factors(tmp_path / "new", name)
        left = before[name].double() - rest[name].double() - ALPHA / RANK**0.5 * B @ A
        assert row["loftq_error"] == pytest.approx(float(left.norm() / before[name].double().norm()), rel=1e-5)


def test_the_bytes_are_the_same_for_any_number_of_workers_and_streamed_they_are_as_good(base, tmp_path):
    folder = base(**WIDE)
    made = {}
    for name, resources in {
        "a": loratool.engine.Resources(workers=1),
        "b": loratool.engine.Resources(workers=2),
        "c": loratool.engine.Resources(memory=1 << 20),
    }.items():
        made[name] = loftq(folder, tmp_path, name, f"rest-{name}", loftq_iterations=2, resources=resources)
    for file in ("adapter_model.safetensors", "initial/adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    read = {name: model_in(tmp_path / f"rest-{name}") for name in made}
    for name, weight in read["a"].items():
        assert torch.equal(weight, read["b"][name])
        assert float(torch.isclose(weight, read["c"][name], rtol=0.01).double().mean()) > 0.999
    for one, other in zip(made["a"].rows, made["c"].rows, strict=True):
        assert other["loftq_error"] == pytest.approx(one["loftq_error"], rel=1e-3)


def test_many_panels_keep_the_blocks(base, tmp_path, monkeypatch):
    from loratool.operations import panels, starts

    folder = base(**WIDE)
    monkeypatch.setattr(panels, "TILE", 1 << 14)
    monkeypatch.setattr(starts, "PANEL", 1 << 15)
    few = loratool.engine.Resources(memory=1 << 20)
    loftq(folder, tmp_path, resources=few)
    before, rest = model_in(folder), model_in(tmp_path / "rest")
    for name in adapted(before):
        assert torch.equal(rest[name], nf4(before[name])), name
        A, B = factors(tmp_path / "new", name)
        _, update = by_the_paper(before[name], RANK, 1)
        left = (before[name].double() - rest[name].double() - SCALING * B @ A).norm()
        assert left <= 1.01 * (before[name].double() - rest[name].double() - update).norm()


# -- Training and the ways back ---------------------------------------------------------------------------------------


@pytest.fixture
def trained(base, tmp_path):
    """What PEFT trained from LoftQ's start on the residual base, live, and saved."""
    loftq(base(dtype=torch.float32), tmp_path, loftq_iterations=2)
    live = trainable(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "rest"), tmp_path / "new")
    optimizer = torch.optim.SGD([p for p in live.parameters() if p.requires_grad], lr=0.5)
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(3))
    for _ in range(3):
        live(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    live.save_pretrained(tmp_path / "trained")
    return live.eval()


def test_peft_loads_it_without_a_word_and_computes_with_q_and_the_factors(base, tiny, tmp_path):
    folder = base(dtype=torch.float32)
    loftq(folder, tmp_path)
    config = json.loads((tmp_path / "new/adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert config["base_model_name_or_path"] == str(tmp_path / "rest")
    live = trainable(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "rest"), tmp_path / "new").eval()
    wanted = tiny("llama", **SIZES)
    state = wanted.state_dict()
    for name, weight in model_in(folder).items():
        if name in adapted(state):
            A, B = factors(tmp_path / "new", name)
            state[name] = (nf4(weight).double() + SCALING * B @ A).float()
    wanted.load_state_dict(state)
    torch.testing.assert_close(logits(live), logits(wanted), rtol=1e-4, atol=2e-6)


def test_merged_into_the_residual_it_is_what_was_trained_and_into_the_original_what_was_learnt(trained, tmp_path):
    before, rest = model_in(tmp_path / "base"), model_in(tmp_path / "rest")
    loratool.merge(tmp_path / "rest", [tmp_path / "trained"], tmp_path / "one")
    start = tmp_path / "new/initial"
    report = loratool.merge(tmp_path / "base", [tmp_path / "trained"], tmp_path / "two", init_adapter=start)
    assert any("LoftQ also quantised the base" in f.what for f in report.findings)
    loratool.convert(tmp_path / "trained", tmp_path / "plain", to="peft", init_adapter=start)
    loratool.merge(tmp_path / "base", [tmp_path / "plain"], tmp_path / "three")
    one, two, three = (model_in(tmp_path / n) for n in ("one", "two", "three"))
    whole = {n.removeprefix("base_model.model."): p.detach() for n, p in trained.merge_and_unload().named_parameters()}
    for name, weight in before.items():
        torch.testing.assert_close(one[name], whole[name], rtol=0, atol=2e-6)
        learnt = torch.zeros(1, dtype=torch.float64)
        if name in adapted(before):
            (A, B), (A0, B0) = factors(tmp_path / "trained", name), factors(start, name)
            learnt = SCALING * (B @ A - B0 @ A0)
            assert learnt.norm() > 1e-4 * weight.norm()
            assert torch.equal(A0, factors(tmp_path / "new", name)[0])
            # the two ways differ by what quantisation lost and the start did not make up for
            left = weight.double() - rest[name].double() - SCALING * B0 @ A0
            torch.testing.assert_close(two[name].double() - one[name].double(), left, rtol=0, atol=2e-6)
        for found in (two, three):
            torch.testing.assert_close(found[name].double(), weight.double() + learnt, rtol=0, atol=2e-6)


def test_without_its_start_it_is_not_taken_for_an_adapter_of_the_original(trained, tmp_path):
    with pytest.raises(MismatchError, match="loftq changed the base model before training") as refusal:
        loratool.merge(tmp_path / "base", [tmp_path / "trained"], tmp_path / "out")
    assert "--init-adapter" in refusal.value.hint


# -- What is refused, and what stays when something fails -----------------------------------------------------------

REFUSED = {
    "no residual": ("llama", {"residual": ""}, UsageError, "LoftQ takes the adapter's start out of the base"),
    "no iterations": ("llama", {"loftq_iterations": 0}, UsageError, "0 iterations of LoftQ"),
    "iterations of pissa": ("llama", {"init": "pissa", "loftq_iterations": 2}, UsageError, "pissa has no iterations"),
    "on the hub": ("llama", {"out": "hf://me/new"}, UsageError, "LoftQ's two outputs belong together"),
    "an embedding": ("llama", {"target": "embed_tokens"}, UnsupportedError, "linear layers: model.embed_tokens"),
    "above full rank": ("llama", {"rank": 40, "target": "v_proj"}, UnsupportedError, r"smaller side of: .*v_proj"),
    "weights that lie the other way": ("gpt2", {"target": "c_attn"}, UnsupportedError, r"not so lie those of.*c_attn"),
    "convolutions": ("unet", {"target": "conv1"}, UnsupportedError, r"LoftQ is for linear layers.*conv1"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_by_name_and_nothing_is_written(case, base, tmp_path, monkeypatch):
    kind, asked, error, words = REFUSED[case]
    folder = base(kind)
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(error, match=words):
        loratool.init(folder, **{"out": "new", "init": "loftq", "residual": "rest", **asked})
    assert snapshot(tmp_path) == before


def test_a_quantised_base_is_refused(base, tmp_path):
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    live = transformers.AutoModelForCausalLM.from_pretrained(
        base(), quantization_config=settings, device_map="cpu", dtype=torch.bfloat16
    )
    live.save_pretrained(tmp_path / "four")
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="LoftQ starts from the weights themselves, and these are quantised"):
        loftq(tmp_path / "four", tmp_path)
    assert snapshot(tmp_path) == before


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_written(base, tmp_path):
    folder = base()
    tensors = model_in(folder)
    name = adapted(tensors)[3]
    tensors[name][3, 5] = float("nan")
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    before = snapshot(tmp_path)
    with pytest.raises(InputError) as refusal:
        loftq(folder, tmp_path)
    assert name in str(refusal.value)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("start", ["pissa", "loftq"])
@pytest.mark.parametrize("where", ["rest", "new"])
def test_what_fails_under_force_leaves_the_old_adapter_and_nothing_half(start, where, base, tmp_path, monkeypatch):
    """The residual cannot be published, or after it the adapter."""
    from loratool.storage import writer

    asked = {"init": start, "residual": tmp_path / "rest"}
    folder = base()
    loratool.init(folder, tmp_path / "new", rank=2)
    before = snapshot(tmp_path)
    real = writer.target.publish

    def failing(source: Path, out: Path, force: bool) -> None:
        if out.name == where:
            raise OSError(28, "No space left on device")
        real(source, out, force)

    monkeypatch.setattr(writer.target, "publish", failing)
    with pytest.raises(LoratoolError, match="No space left"):
        loratool.init(folder, tmp_path / "new", rank=3, force=True, **asked)
    assert snapshot(tmp_path) == before
    monkeypatch.undo()
    loratool.init(folder, tmp_path / "new", rank=3, force=True, **asked)
    assert json.loads((tmp_path / "new/adapter_config.json").read_text())["r"] == 3
    assert {p.name for p in tmp_path.iterdir()} == {"base", "new", "rest"}


def test_the_command_says_what_it_made(base, tmp_path, capsys):
    arguments = ("-o", tmp_path / "new", "--init", "loftq", "--residual", tmp_path / "rest", "--loftq-iterations", "2")
    assert run_main("init", base(), *arguments, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert 0 < told["totals"]["loftq_error"] < told["totals"]["nf4_error"]
    assert all(row["loftq_error"] < row["nf4_error"] for row in told["rows"])
    start = json.loads((tmp_path / "new/initial/adapter_config.json").read_text())
    assert start["init_lora_weights"] == "loftq"
    assert start["loftq_config"] == {"loftq_bits": 4, "loftq_iter": 2}
    assert start["base_model_name_or_path"] == str(tmp_path / "base")
    assert json.loads((tmp_path / "rest/loratool.report.json").read_text())["totals"]["init"] == "loftq"
