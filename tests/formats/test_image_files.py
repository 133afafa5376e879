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
from loratool.errors import AmbiguityError, InputError, LoratoolError
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
    assert torch.equal(ours[f"{stem}.lora_B.weight"], exact.to(torch.bfloat16))
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
