"""Files of image tools: real lists of keys there and back, strength on every route, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool
from loratool.api import open_adapter
from loratool.cli.main import main
from loratool.errors import AmbiguityError, InputError, LoratoolError, MismatchError
from loratool.tensors import inline_scalar

FIXTURES = Path(__file__).parents[2] / "../shared/fixtures/invokeai"
ROUTES = {
    "anima_lora_kohya_format": ("anima", "kohya", 11),
    "anima_lora_peft_format": ("anima", "comfy", 6),
    "flux_lora_diffusers_format": ("flux", "diffusers", 494),
    "flux_lora_diffusers_no_proj_mlp_format": ("flux", "diffusers", 342),
    "flux_lora_kohya_format": ("flux", "kohya", 304),
    "flux_lora_xlabs_format": ("flux", "xlabs", 12),
    "qwen_image_lora_diffusers_format": ("qwen-image", "diffusers", 3),
}
TARGETS = ("kohya", "comfy", "diffusers", "onetrainer", "onetrainer-legacy", "lycoris", "peft")
NARROW = 16  # widths are divided by it, which nothing depends on


def random_tensors(file):
    """The file's keys with random bytes; alpha is 8; ranks as they are, widths narrower."""
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for name, shape in json.loads((FIXTURES / f"{file}.json").read_text()).items():
        small = [n // NARROW if n >= 48 * NARROW else n for n in shape]
        tensors[name] = torch.randn(small, generator=generator).bfloat16() if shape else torch.tensor(8.0)
    return tensors


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="needs the shared fixtures")
@pytest.mark.parametrize("file", ROUTES)
def test_a_real_list_of_keys_goes_to_every_format_and_back(file, tmp_path):
    family, own, count = ROUTES[file]
    tensors = random_tensors(file)
    source = tmp_path / "source.safetensors"
    save_file(tensors, source)
    adapter = open_adapter(source, arch=family).require_sound()
    assert (adapter.origin.format, len(adapter.origin.modules), adapter.unmapped) == (own, count, ())
    factors = {n: t for n, t in tensors.items() if t.dim()}
    for to in TARGETS if count < 300 else ("comfy", "diffusers") if own == "kohya" else ("kohya",):
        there, back = (tmp_path / (n if to == "peft" else f"{n}.safetensors") for n in (to, "back"))
        back = back.with_suffix(".safetensors")
        report = loratool.convert(source, there, to=to, arch=family)
        assert report.totals["modules"] == count
        loratool.convert(there, back, to=own, arch=family, force=True)
        again = load_file(back)
        if family == "qwen-image":  # its source has no first element; ours has
            again = {n.removeprefix("transformer."): t for n, t in again.items()}
            again = {n.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t for n, t in again.items()}
        assert {n for n in again if not n.endswith(".alpha")} == factors.keys()
        assert [n for n, t in factors.items() if not torch.equal(again[n], t)] == []
        if own == "kohya":
            assert {n: float(t) for n, t in again.items() if n.endswith(".alpha")} == {
                n: 8.0 for n in tensors if n.endswith(".alpha")
            }


Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
K = Q.removesuffix("q") + "k"


def pair(module, *, rank=4, out=8, inside=8, alpha=None, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = {
        f"{module}.lora_down.weight": torch.randn(rank, inside, generator=generator).to(dtype),
        f"{module}.lora_up.weight": torch.randn(out, rank, generator=generator).to(dtype),
    }
    return found | ({} if alpha is None else {f"{module}.alpha": alpha})


@pytest.fixture
def write(tmp_path):
    """Save tensors, and return the path."""

    def save(tensors, **metadata):
        save_file(tensors, tmp_path / "in.safetensors", metadata or None)
        return tmp_path / "in.safetensors"

    return save


def scaling(path):
    (deltas,) = open_adapter(path, arch="stable-diffusion").require_sound().deltas.values()
    return deltas[0].scaling


ALPHAS = {
    "absent": (None, 1.0),
    "zero": (torch.tensor(0.0), 1.0),
    "negative": (torch.tensor(-2.0), -0.5),
    "int64": (torch.tensor(2), 0.5),
    "bf16": (torch.tensor(3, dtype=torch.bfloat16), 0.75),
    "not the rank": (torch.tensor(1.3), float(torch.tensor(1.3)) / 4),
}


@pytest.mark.parametrize("case", ALPHAS)
def test_the_strength_survives_every_route(case, write, tmp_path):
    alpha, wanted = ALPHAS[case]
    path = write(pair(Q, alpha=alpha))
    for n, to in enumerate(("comfy", "diffusers", "onetrainer-legacy", "peft", "lycoris", "kohya")):
        out = tmp_path / (f"{n}" if to == "peft" else f"{n}.safetensors")
        loratool.convert(path, out, to=to, arch="stable-diffusion")
        assert abs(scaling(out)) == abs(wanted), to  # configs hold no negative alpha: the sign goes into `up`
        path = out
    up = scaling(path) * load_file(path)[f"{Q}.lora_up.weight"].double()
    assert torch.equal(up, wanted * pair(Q)[f"{Q}.lora_up.weight"].double())


@pytest.mark.parametrize(("alpha", "word"), [(1.0, "power of two"), (-2.0, "power of two"), (3.0, "rounds")])
def test_folding_is_exact_by_powers_of_two_and_told_otherwise(alpha, word, write, tmp_path):
    tensors = pair(Q, alpha=torch.tensor(alpha), dtype=torch.bfloat16)
    path = write(tensors)
    report = loratool.convert(path, tmp_path / "o.safetensors", to="ai-toolkit", arch="stable-diffusion", verify=True)
    assert any(word in f.what for f in report.findings)
    ours = load_file(tmp_path / "o.safetensors")
    stem = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    assert ours.keys() == {f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"}
    exact = tensors[f"{Q}.lora_up.weight"].double() * alpha / 4
    product = ours[f"{stem}.lora_B.weight"].double() @ ours[f"{stem}.lora_A.weight"].double()
    assert torch.equal(product, exact.bfloat16().double() @ tensors[f"{Q}.lora_down.weight"].double())
    if word == "rounds":
        assert 0 < report.totals["largest_relative_error"] < 2**-8
    else:
        assert "largest_relative_error" not in report.totals


@pytest.mark.parametrize(("scales", "exact"), [((1, 2, 4), True), ((1, 3, 3), False)])
def test_parts_of_different_strength_are_joined(scales, exact, write, tmp_path):
    stems = [f"transformer.transformer_blocks.0.attn.to_{n}" for n in "qkv"]
    flat = [s.replace("transformer.", "lora_transformer_", 1).replace(".", "_") for s in stems]
    tensors = {}
    for n, name in enumerate(flat):
        tensors |= pair(name, alpha=torch.tensor(float(scales[n])), dtype=torch.bfloat16, seed=n)
    path = write(tensors)
    report = loratool.convert(path, tmp_path / "k.safetensors", to="kohya", arch="flux", verify=True)
    assert any("different strengths" in f.what for f in report.findings) == (not exact)
    ours = load_file(tmp_path / "k.safetensors")
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    scale = ours[f"{stem}.alpha"].double() / len(ours[f"{stem}.lora_down.weight"])
    found = scale * ours[f"{stem}.lora_up.weight"].double() @ ours[f"{stem}.lora_down.weight"].double()
    wanted = torch.cat([
        scales[n] / 4 * tensors[f"{name}.lora_up.weight"].double() @ tensors[f"{name}.lora_down.weight"].double()
        for n, name in enumerate(flat)
    ])  # fmt: skip
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12 if exact else 0.02 * float(wanted.abs().max()))
    assert ("largest_relative_error" in report.totals) == (not exact)


def test_split_qkv_keeps_the_strength_that_readers_apply_and_says_so(write, tmp_path):
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    up = torch.block_diag(*(torch.randn(8, 2) for _ in range(3)))
    tensors = {f"{stem}.lora_down.weight": torch.randn(6, 8), f"{stem}.lora_up.weight": up,
               f"{stem}.alpha": torch.tensor(1.0)}  # fmt: skip
    path = write(tensors, ss_network_args=json.dumps({"split_qkv": "True"}))
    report = loratool.convert(path, tmp_path / "d.safetensors", to="diffusers", arch="flux", verify=True)
    assert any("split_qkv" in f.what for f in report.findings)
    ours = load_file(tmp_path / "d.safetensors")
    for n, name in enumerate("qkv"):
        part = f"transformer.transformer_blocks.0.attn.to_{name}"
        assert torch.equal(ours[f"{part}.lora_A.weight"], tensors[f"{stem}.lora_down.weight"][2 * n : 2 * n + 2])
        assert torch.equal(ours[f"{part}.lora_B.weight"], up[8 * n : 8 * n + 8, 2 * n : 2 * n + 2])
    found = {d[0].scaling for d in open_adapter(tmp_path / "d.safetensors", arch="flux").deltas.values()}
    assert found == {1.0 / 6}  # of rank 2, alpha 1/3: not the 1/2 of training


STRANGE = {
    "two families": ({**pair(Q), **pair("lora_unet_double_blocks_0_img_attn_proj")}, "family has no such module"),
    "half a pair": ({k: v for k, v in (pair(Q) | pair(K)).items() if k != f"{K}.lora_up.weight"}, f"{K}: half a pair"),
    "another rank": (pair(Q) | {f"{Q}.lora_up.weight": torch.ones(8, 3)}, f"{Q}: the factors have different ranks"),
    "impossible shapes": (pair(Q) | {f"{Q}.lora_up.weight": torch.ones(8)}, f"{Q}: the factors have no matching"),
    "a strange key": (pair(Q) | {f"{Q}.surprise": torch.ones(2)}, f"{Q}.surprise"),
    "a strange module": (pair(Q) | pair("lora_unet_nothing"), "lora_unet_nothing"),
    "an alpha that is no number": (pair(Q, alpha=torch.tensor(float("nan"))), f"{Q}.alpha"),
    "an infinite alpha": (pair(Q, alpha=torch.tensor(float("inf"))), f"{Q}.alpha"),
    "an alpha alone": (pair(Q) | {f"{K}.alpha": torch.tensor(1.0)}, f"{K}: an alpha without factors"),
}


@pytest.mark.parametrize("case", STRANGE)
@pytest.mark.parametrize("to", ["comfy", "peft"])
def test_what_is_wrong_with_a_file_is_listed_and_nothing_is_written(case, to, write, tmp_path, capsys):
    tensors, told = STRANGE[case]
    out = tmp_path / ("o" if to == "peft" else "o.safetensors")
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(write(tensors)), "-o", str(out), "--to", to])
    assert ended.value.code == 3
    assert told in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


@pytest.mark.parametrize("case", ["a strange key", "a strange module"])
def test_drop_unmapped_goes_on_and_says_what_it_dropped(case, write, tmp_path):
    tensors, told = STRANGE[case]
    report = loratool.convert(
        write(tensors), tmp_path / "o.safetensors", to="comfy", arch="stable-diffusion", drop_unmapped=True
    )
    assert any(told in f.where + f.what for f in report.findings)
    assert len(load_file(tmp_path / "o.safetensors")) == 3


@pytest.mark.parametrize(
    ("tensors", "to", "told"),
    [
        (pair(Q) | {f"{K}.diff_b": torch.ones(8)}, "diffusers", "bias"),
        (pair(Q) | {f"{K}.dora_scale": torch.ones(8, 1), **pair(K)}, "diffusers", "plain update beside DoRA"),
        (pair("lora_unet_single_blocks_0_linear2"), "xlabs", "xlabs has no name for it"),
        ({f"{Q}.oft_blocks": torch.zeros(2, 4, 4), f"{Q}.alpha": torch.tensor(0.0)}, "ai-toolkit", "oft"),
    ],
    ids=["bias", "mixed DoRA", "xlabs", "oft"],
)
def test_a_format_that_cannot_carry_a_part_says_so_before_it_writes(tensors, to, told, write, tmp_path):
    family = "flux" if to == "xlabs" else "stable-diffusion"
    with pytest.raises(InputError, match=told):
        loratool.convert(write(tensors), tmp_path / "o.safetensors", to=to, arch=family)
    assert not (tmp_path / "o.safetensors").exists()


def test_a_dry_run_says_what_will_be_refused_although_it_looks_at_no_numbers(write, tmp_path):
    tensors = pair("lora_unet_double_blocks_0_img_attn_proj")
    for n in range(20):  # xlabs has no name for these, nor for their four parts
        tensors |= pair(f"lora_unet_single_blocks_{n}_linear1", out=56)
    path, out = write(tensors), tmp_path / "o.safetensors"
    told = loratool.convert(path, out, to="xlabs", arch="flux", dry_run=True).findings
    assert any("cannot hold 80 parts" in f.what and "--drop-unmapped" in f.hint for f in told)
    told = loratool.convert(path, out, to="xlabs", arch="flux", dry_run=True, drop_unmapped=True).findings
    assert sum(f.what.startswith("dropped") for f in told) == 80
    assert loratool.convert(path, out, to="diffusers", arch="flux", dry_run=True).findings == []
    with pytest.raises(InputError, match=r"cannot hold 80 parts[\s\S]*and 78 more"):
        loratool.convert(path, out, to="xlabs", arch="flux")
    told = loratool.convert(path, out, to="xlabs", arch="flux", drop_unmapped=True).findings
    assert sum(f.what.startswith("dropped") for f in told) == 80
    assert len(load_file(out)) == 2


def test_modules_that_were_dropped_are_not_counted_as_converted(write, tmp_path):
    tensors = pair("lora_unet_double_blocks_0_img_attn_proj") | pair("lora_unet_double_blocks_0_txt_attn_proj")
    for n in range(20):
        tensors |= pair(f"lora_unet_single_blocks_{n}_linear1", out=56)
    out = tmp_path / "o.safetensors"
    report = loratool.convert(write(tensors), out, to="xlabs", arch="flux", drop_unmapped=True)
    assert report.totals["modules"] == len(report.rows) == len(load_file(out)) // 2 == 2
    assert all("single" not in row["module"] for row in report.rows)
    tensors = pair(Q) | {f"{Q}.diff_b": torch.ones(8)}  # the weight of the module stays, its bias goes
    report = loratool.convert(
        write(tensors), out, to="diffusers", arch="stable-diffusion", drop_unmapped=True, force=True
    )
    assert [row["module"].endswith("to_q") for row in report.rows] == [True]


def test_many_findings_that_say_the_same_are_one_line(write, tmp_path, capsys):
    tensors = pair("lora_unet_double_blocks_0_img_attn_proj")
    for n in range(60):
        tensors |= pair(f"lora_unet_nowhere_{n}_to_q") | {f"strange.{n}.thing": torch.ones(3)}
    path, out = str(write(tensors)), str(tmp_path / "o.safetensors")
    said = {}
    for verb in (
        ["inspect", path],
        ["inspect", path, "-v"],
        ["convert", path, "-o", out, "--to", "comfy"],
        ["convert", path, "-o", out, "--to", "comfy", "--drop-unmapped"],
    ):
        with pytest.raises(SystemExit):
            main([*verb, "--arch", "flux"])
        said[" ".join([verb[0], verb[-1]])] = capsys.readouterr().err
    lines = {verb: [n for n in text.splitlines() if "nowhere" in n or "strange" in n] for verb, text in said.items()}
    assert {verb: len(each) for verb, each in lines.items()} == {
        f"inspect {path}": 2, "inspect -v": 120, "convert comfy": 2, "convert --drop-unmapped": 2,
    }  # fmt: skip
    assert all("and 58 more" in line for verb in lines if verb != "inspect -v" for line in lines[verb])
    assert "120 parts of this adapter cannot be used" in said["convert comfy"]


def test_a_file_in_which_nothing_would_be_left_is_not_written(write, tmp_path):
    path, out = write(pair("lora_unet_single_blocks_0_linear2")), tmp_path / "o.safetensors"
    with pytest.raises(InputError, match="nothing would be left"):
        loratool.convert(path, out, to="xlabs", arch="flux", drop_unmapped=True)
    assert not out.exists()


def test_a_unet_is_called_unet_by_an_older_onetrainer(write, tmp_path):
    """OneTrainer wraps a UNet as lora_unet, a transformer as lora_transformer, both with diffusers' names."""
    for family, source, expected in (
        ("stable-diffusion-xl", "unet.mid_block.attentions.0.proj_in", "lora_unet_mid_block_attentions_0_proj_in"),
        ("flux", "transformer.proj_out", "lora_transformer_proj_out"),
    ):
        path, out = write(pair(source)), tmp_path / f"{family}.safetensors"
        loratool.convert(path, out, to="onetrainer-legacy", arch=family)
        assert {name.split(".")[0] for name in load_file(out)} == {expected}
        assert [str(t).replace(":", ".") for t in open_adapter(out, arch=family).targets] == [source]


def test_verify_does_not_take_its_own_output_for_a_repository(write, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write(pair(Q, alpha=torch.tensor(2.0)))
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(path), "-o", "org/name", "--to", "peft", "--arch", "stable-diffusion", "--verify"])
    assert ended.value.code == 0
    assert "Hub" not in capsys.readouterr().err


def test_a_file_that_two_families_spell_differently_is_not_guessed(write, tmp_path):
    path = write(pair("transformer.transformer_blocks.0.attn.to_q"))
    with pytest.raises(AmbiguityError, match="which comfy spells differently"):
        loratool.convert(path, tmp_path / "o.safetensors", to="comfy")


def test_verify_notices_a_result_that_is_another_update(write, tmp_path, monkeypatch):
    path = write(pair(Q, alpha=torch.tensor(2.0)))
    report = loratool.convert(path, tmp_path / "o.safetensors", to="comfy", arch="stable-diffusion", verify=True)
    assert report.totals["verified"] == "bit-exact"
    assert report.totals["verified_modules"] == 1
    wrong = lambda name, value: inline_scalar(name, 2 * value)  # noqa: E731
    monkeypatch.setattr("loratool.formats.image_writing.inline_scalar", wrong)
    with pytest.raises(LoratoolError, match="not the same update"):
        loratool.convert(path, tmp_path / "p.safetensors", to="comfy", arch="stable-diffusion", verify=True)


def test_verify_counts_what_was_dropped(write, tmp_path):
    path = write(pair(Q) | {f"{K}.diff_b": torch.ones(8)})
    report = loratool.convert(
        path, tmp_path / "o.safetensors", to="diffusers", arch="stable-diffusion", drop_unmapped=True, verify=True
    )
    assert (report.totals["verified"], report.totals["left_out_modules"]) == ("bit-exact", 1)


@pytest.mark.parametrize(("source", "to"), [("kohya", "comfy"), ("comfy", "kohya"), ("comfy", "lycoris")])
def test_a_pure_rename_does_not_load_torch(source, to, write, tmp_path):
    path = write(pair(Q, alpha=torch.tensor(2.0)))
    if source != "kohya":
        loratool.convert(path, tmp_path / "s.safetensors", to=source, arch="stable-diffusion")
        path = tmp_path / "s.safetensors"
    code = (
        "import sys, loratool; "
        f"loratool.convert({str(path)!r}, {str(tmp_path / 'o.safetensors')!r}, to={to!r}, arch='stable-diffusion'); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert len(load_file(tmp_path / "o.safetensors")) == 3


ATTENTION = "transformer.transformer_blocks.0.attn."
QKV = "diffusion_model.double_blocks.0.img_attn.qkv"


def seeded(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def update(tensors, module, names):
    """LyCORIS' rule in fp64, whatever is in the file: alpha / rank times the product; an absent alpha is the rank."""
    factors = [tensors[f"{module}.{name}"].double() for name in names]
    rank = factors[1].shape[0]
    scale = float(tensors.get(f"{module}.alpha", rank)) / rank
    products = [a @ b for a, b in zip(factors[::2], factors[1::2], strict=True)]
    return scale * (products[0] * products[1] if len(products) > 1 else products[0])


def test_alphas_stay_where_not_every_kind_can_do_without(write, tmp_path):
    hada, low = [f"hada_{n}" for n in ("w1_a", "w1_b", "w2_a", "w2_b")], ["lora_up.weight", "lora_down.weight"]
    tensors = {f"{K}.{name}": seeded(8, 4) if name.endswith("_a") else seeded(4, 8) for name in hada}
    tensors[f"{K}.alpha"] = torch.tensor(1.0)
    for module, rank in ((Q, 2), (Q.replace("to_q", "to_v"), 4)):  # of different alphas, each its rank
        tensors |= {f"{module}.lora_down.weight": seeded(rank, 8), f"{module}.lora_up.weight": seeded(8, rank)}
    loratool.convert(write(tensors), tmp_path / "o.safetensors", to="kohya", arch="stable-diffusion")
    found = load_file(tmp_path / "o.safetensors")
    assert torch.equal(update(found, K, hada), update(tensors, K, hada))
    assert torch.equal(update(found, Q, low), update(tensors, Q, low))


def test_biases_that_are_joined_keep_each_its_own_strength(write, tmp_path):
    tensors = {}
    for name, alpha in (("to_q", 4.0), ("to_k", 8.0), ("to_v", 2.0)):
        module = ATTENTION + name
        tensors |= {f"{module}.lora_A.weight": seeded(4, 8), f"{module}.lora_B.weight": seeded(8, 4)}
        tensors |= {f"{module}.lora_B.bias": torch.ones(8), f"{module}.alpha": torch.tensor(alpha)}
    loratool.convert(write(tensors), tmp_path / "o.safetensors", to="comfy", arch="flux")
    bias = load_file(tmp_path / "o.safetensors")[f"{QKV}.diff_b"]
    assert bias.tolist() == [1.0] * 8 + [2.0] * 8 + [0.5] * 8


def test_a_bias_that_is_missing_in_a_join_is_as_high_as_its_weight(write, tmp_path):
    start, high = "transformer.single_transformer_blocks.0.", {"attn.to_q": 8, "attn.to_k": 8, "attn.to_v": 8}
    tensors = {}
    for name, rows in {**high, "proj_mlp": 32}.items():
        tensors |= {f"{start}{name}.lora_A.weight": seeded(2, 8), f"{start}{name}.lora_B.weight": seeded(rows, 2)}
        tensors |= {f"{start}{name}.diff_b": torch.ones(rows)} if name != "attn.to_q" else {}
    loratool.convert(write(tensors), tmp_path / "o.safetensors", to="comfy", arch="flux")
    bias = load_file(tmp_path / "o.safetensors")["diffusion_model.single_blocks.0.linear1.diff_b"]
    assert bias.tolist() == [0.0] * 8 + [1.0] * 48


@pytest.mark.parametrize("second", ["alpha.weight", "alpha.default", "alpha.default.weight"])
def test_two_alphas_of_one_module_must_agree(second, write, tmp_path):
    out = tmp_path / "o.safetensors"
    path = write(pair(Q, alpha=torch.tensor(1.0)) | {f"{Q}.{second}": torch.tensor(3.0)})
    with pytest.raises(MismatchError) as caught:
        loratool.convert(path, out, to="comfy", arch="stable-diffusion")
    assert f"{Q}.alpha" in str(caught.value)
    assert f"{Q}.{second}" in str(caught.value)
    assert not out.exists()
    path = write(pair(Q, alpha=torch.tensor(3.0)) | {f"{Q}.{second}": torch.tensor(3.0)})
    loratool.convert(path, out, to="comfy", arch="stable-diffusion")
    assert [float(t) for n, t in load_file(out).items() if n.endswith("alpha")] == [3.0]


FUSED = {  # family: a module, the rows of its parts, whether the bias alone shows them
    "flux": ("single_blocks.{}.linear1", {"attn.to_q": 8, "attn.to_k": 8, "attn.to_v": 8, "proj_mlp": 32}, True),
    "chroma": ("double_blocks.{}.img_attn.qkv", {"attn.to_q": 8, "attn.to_k": 8, "attn.to_v": 8}, True),
    "lumina2": ("layers.{}.attention.qkv", {"attn.to_q": 8, "attn.to_k": 4, "attn.to_v": 4}, False),  # grouped heads
}


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside factors of another block"])
@pytest.mark.parametrize("family", FUSED)
def test_the_bias_alone_of_a_fused_weight_is_read_part_by_part(family, beside, write, tmp_path):
    module, heights, shown = FUSED[family]
    bias = torch.arange(sum(heights.values()), dtype=torch.float32)
    name, other = (f"lora_unet_{module.format(n).replace('.', '_')}" for n in (0, 1))
    path = write({f"{name}.diff_b": bias, **(pair(other, out=len(bias)) if beside else {})})
    adapter = open_adapter(path, arch=family)
    if not (shown or beside):
        assert [f.level for f in adapter.findings if "rows" in f.what] == ["error"]
        return
    read = {t.parts[0]: ds[0].shape[0] for t, ds in adapter.require_sound().deltas.items() if len(t.parts) == 1}
    assert {path.split(".0.")[1]: rows for path, rows in read.items()} == {f"{p}.bias": n for p, n in heights.items()}
    loratool.convert(path, tmp_path / "comfy.safetensors", to="comfy", arch=family)
    assert torch.equal(load_file(tmp_path / "comfy.safetensors")[f"diffusion_model.{module.format(0)}.diff_b"], bias)
    loratool.convert(tmp_path / "comfy.safetensors", tmp_path / "again.safetensors", to="kohya", arch=family)
    assert torch.equal(load_file(tmp_path / "again.safetensors")[f"{name}.diff_b"], bias)


@pytest.mark.parametrize("part", ["lora_B.bias", "diff", "lora_magnitude_vector.weight"])
def test_parts_of_different_dtypes_are_not_joined_by_their_bytes(part, write, tmp_path):
    tensors = {}
    for name, dtype in (("to_q", torch.float32), ("to_k", torch.float16), ("to_v", torch.float32)):
        module = ATTENTION + name
        if part != "diff":
            tensors |= {f"{module}.lora_A.weight": seeded(4, 8), f"{module}.lora_B.weight": seeded(8, 4)}
        tensors[f"{module}.{part}"] = seeded(8, 8, dtype=dtype) if part == "diff" else torch.ones(8, dtype=dtype)
    module = ATTENTION + "to_out.0"
    if part == "diff":
        tensors |= {f"{module}.lora_A.weight": seeded(4, 8), f"{module}.lora_B.weight": seeded(8, 4)}
    with pytest.raises(InputError, match="different dtypes"):
        loratool.convert(write(tensors), tmp_path / "o.safetensors", to="comfy", arch="flux")
    assert not (tmp_path / "o.safetensors").exists()


@pytest.mark.parametrize("to", ["ai-toolkit", "bfl"])
def test_the_strength_of_dora_is_folded_where_a_file_has_no_alpha(to, write, tmp_path):
    module = "lora_unet_double_blocks_0_img_attn_proj"
    tensors = {f"{module}.lora_down.weight": seeded(4, 8), f"{module}.lora_up.weight": seeded(8, 4)}
    tensors |= {f"{module}.alpha": torch.tensor(2.0), f"{module}.dora_scale": torch.ones(8, 1)}
    source = write(tensors)
    loratool.convert(source, tmp_path / "o.safetensors", to=to, arch="flux")
    found = load_file(tmp_path / "o.safetensors")
    down, up = (next(t for n, t in found.items() if n.endswith(f"lora_{end}.weight")) for end in "AB")
    assert not [n for n in found if n.endswith(".alpha")]
    wanted = update(tensors, module, ["lora_up.weight", "lora_down.weight"])
    assert torch.equal(up.double() @ down.double(), wanted)
    with pytest.raises(InputError, match="cannot hold dora"):
        loratool.convert(source, tmp_path / "x.safetensors", to="xlabs", arch="flux")


def test_folding_loses_little_in_half_precision_and_says_what_it_cannot_hold(write, tmp_path):
    module, names = ATTENTION + "to_q", ["lora_B.weight", "lora_A.weight"]
    small = {
        f"{module}.lora_A.weight": seeded(128, 64).half(),
        f"{module}.lora_B.weight": (seeded(64, 128) / 1e3).half(),
    }
    small[f"{module}.alpha"] = torch.tensor(0.5)
    loratool.convert(write(small), tmp_path / "o.safetensors", to="ai-toolkit", arch="flux")
    wanted, found = (update(t, module, names) for t in (small, load_file(tmp_path / "o.safetensors")))
    assert (found - wanted).norm() / wanted.norm() < 2.0**-10
    large = {
        f"{module}.lora_A.weight": torch.ones(2, 8).half(),
        f"{module}.lora_B.weight": torch.full((8, 2), 6e4).half(),
    }
    large[f"{module}.alpha"] = torch.tensor(4.0)
    with pytest.raises(InputError, match="beyond float16"):
        loratool.convert(write(large), tmp_path / "x.safetensors", to="ai-toolkit", arch="flux")
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(("hidden", "swapped"), [(1536, True), (2432, False)], ids=["medium", "3.5-large"])
def test_block_23_is_the_last_of_sd3_medium_alone(hidden, swapped, tmp_path):
    """Its norm has two chunks, (scale, shift) in diffusers and (shift, scale) in the original; any other block six."""
    name = "transformer_blocks.23.norm1_context.linear"
    up = torch.randn(2 * hidden if swapped else 6 * hidden, 2)
    tensors = {f"transformer.{name}.lora_A.weight": torch.randn(2, hidden), f"transformer.{name}.lora_B.weight": up}
    save_file(tensors, tmp_path / "one.safetensors")
    loratool.convert(tmp_path / "one.safetensors", tmp_path / "out.safetensors", to="comfy")
    written = load_file(tmp_path / "out.safetensors")
    (found,) = (
        t for n, t in written.items() if n.startswith("diffusion_model.joint_blocks.23") and t.shape == up.shape
    )
    assert torch.equal(found, torch.cat([up[hidden:], up[:hidden]]) if swapped else up)
