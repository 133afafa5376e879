"""sshs_model_hash and sshs_legacy_hash are what the tools compute of our files, from their tensors and ss_ fields."""

import json
import subprocess
import sys
from hashlib import sha256

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

import loratool
from loratool.plan import Digest
from loratool.storage import digests, safetensors

STYLES = ("kohya", "onetrainer", "onetrainer-legacy", "lycoris")
WINDOW = slice(0x100000, 0x110000)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def opened(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def tools_hashes(tensors, metadata):
    """The formulas of sd-scripts (library/train_util.py), of the bytes that the safetensors library makes."""
    content = save(tensors, {name: value for name, value in metadata.items() if name.startswith("ss_")})
    data = content[8 + int.from_bytes(content[:8], "little") :]
    return {
        "sshs_model_hash": sha256(data).hexdigest(),
        "sshs_legacy_hash": sha256(content[WINDOW]).hexdigest()[:8],
    }


def hashes(metadata):
    return {name: value for name, value in metadata.items() if name.startswith("sshs_")}


@pytest.fixture(scope="module")
def style(tmp_path_factory):
    """A file of more than a MiB, in all the dtypes that weights have: the order of the data depends on them."""
    tensors = {}
    for n in range(24):
        module, dtype = f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_{n}_attn1_to_q", DTYPES[n % 4]
        tensors[f"{module}.lora_down.weight"] = torch.randn(8, 1600).to(dtype)
        tensors[f"{module}.lora_up.weight"] = torch.randn(1600, 8).to(dtype)
        tensors[f"{module}.alpha"] = torch.tensor(4.0).to(DTYPES[n % 3])
    path = tmp_path_factory.mktemp("hashes") / "style.safetensors"
    told = {"ss_base_model_version": "sd_v1", "ss_output_name": 'é "\\\n\x01\x7f\u2028😀', "modelspec.title": "x" * 99}
    save_file(tensors, path, {**told, "sshs_model_hash": "0" * 64, "sshs_legacy_hash": "stale"})
    return path


@pytest.mark.parametrize("to", STYLES)
def test_a_converted_file_has_the_hashes_of_the_tools(to, style, tmp_path):
    loratool.convert(style, tmp_path / "new.safetensors", to=to)
    tensors, metadata = opened(tmp_path / "new.safetensors")
    assert hashes(metadata) == tools_hashes(tensors, metadata)
    assert metadata["sshs_legacy_hash"] != sha256(b"").hexdigest()[:8]  # what files below a MiB have
    assert metadata["ss_output_name"] == opened(style)[1]["ss_output_name"]


@pytest.mark.parametrize("to", STYLES)
def test_a_file_without_hashes_gets_none(to, style, tmp_path):
    tensors, metadata = opened(style)
    save_file(tensors, tmp_path / "plain.safetensors", {n: v for n, v in metadata.items() if n not in hashes(metadata)})
    loratool.convert(tmp_path / "plain.safetensors", tmp_path / "new.safetensors", to=to)
    assert not hashes(opened(tmp_path / "new.safetensors")[1])
    loratool.combine([style, tmp_path / "plain.safetensors"], tmp_path / "both.safetensors")  # one of them had some
    assert hashes(opened(tmp_path / "both.safetensors")[1]) == tools_hashes(*opened(tmp_path / "both.safetensors"))


def test_files_whose_ranks_are_known_late_have_them_too(style, tmp_path):
    loratool.resize(style, tmp_path / "small.safetensors", rank=5)
    loratool.combine([style, tmp_path / "small.safetensors"], tmp_path / "both.safetensors")
    loratool.convert(style, tmp_path / "stripped.safetensors", to="kohya", strip_metadata=True)
    for name in ("small", "both", "stripped"):
        tensors, metadata = opened(tmp_path / f"{name}.safetensors")
        assert hashes(metadata) == tools_hashes(tensors, metadata), name


def test_the_hash_of_the_data_does_not_change_with_metadata_nor_names_of_equal_order(style, tmp_path):
    loratool.convert(style, tmp_path / "a.safetensors", to="kohya")
    loratool.convert(style, tmp_path / "b.safetensors", to="kohya", strip_metadata=True)
    told = [opened(tmp_path / f"{name}.safetensors")[1] for name in "ab"]
    assert told[0]["sshs_model_hash"] == told[1]["sshs_model_hash"]
    assert told[0] != told[1]


names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None)
@given(
    tensors=st.dictionaries(
        names.filter(lambda n: n != "__metadata__"), st.sampled_from(DTYPES), min_size=1, max_size=4
    ),
    value=st.text(st.characters(codec="utf-8"), max_size=30),
    pad=st.sampled_from([0, 0xFFFFF, 0x10FFFF]),  # up to headers that end in the window, and behind it
)
def test_any_window_is_that_of_the_library_s_file(tensors, value, pad, tmp_path_factory):
    tensors = {name: torch.full((300, 300), n, dtype=dtype) for n, (name, dtype) in enumerate(tensors.items())}
    kept = {"ss_x": value + "y" * pad}  # one field: of several the library chooses the order by chance
    path = tmp_path_factory.mktemp("any") / "file.safetensors"
    save_file(tensors, path, {**kept, "other": "z" * 77})
    fields = (Digest("sshs_model_hash"), Digest("sshs_legacy_hash", 8, (0x100000, 0x110000), "ss_"))
    whole, found = digests.of_file(path, fields)
    assert whole == sha256(path.read_bytes()).hexdigest()
    assert found == tools_hashes(tensors, kept)


def test_without_ss_fields_the_library_writes_an_empty_map(tmp_path):
    tensors = {"a": torch.randn(700, 700)}
    save_file(tensors, tmp_path / "file.safetensors")
    fields = (Digest("sshs_model_hash"), Digest("sshs_legacy_hash", 8, (0x100000, 0x110000), "ss_"))
    assert digests.of_file(tmp_path / "file.safetensors", fields)[1] == tools_hashes(tensors, {})


def test_the_data_lies_in_the_library_s_order():
    from loratool import TensorFile, TensorRef

    kinds = {
        "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "U16": torch.uint16, "I16": torch.int16,
        "F16": torch.float16, "BF16": torch.bfloat16, "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32,
        "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
    }  # fmt: skip
    content = save({f"{n}{name}": torch.zeros(2).to(kind) for name, kind in kinds.items() for n in "bé😀a"})
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    library = sorted(header, key=lambda name: header[name]["data_offsets"])
    ours = TensorFile.new("x", [TensorRef(f"{n}{name}", (2,), name) for name in kinds for n in "a😀éb"], {})
    assert [ref.name for ref in ours.tensors] == library


def test_a_file_is_hashed_without_torch(style, tmp_path):
    code = "import sys, loratool; loratool.convert(*sys.argv[1:], to='lycoris'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, style, tmp_path / "new.safetensors"], check=True)


def test_the_self_check_still_sees_a_whole_header(style, tmp_path):
    loratool.convert(style, tmp_path / "new.safetensors", to="lycoris")
    header = safetensors.read_header(tmp_path / "new.safetensors")
    assert len(header.raw) % 8 == 0
    assert "0" * 64 not in header.metadata.values()


def test_inspect_hashes_tells_files_apart_and_what_the_header_has_wrong(style, tmp_path):
    report = loratool.inspect(style, hashes=True)
    tensors, metadata = opened(style)
    assert report.totals["sha256"] == sha256(style.read_bytes()).hexdigest()
    assert {k: report.totals[k] for k in hashes(metadata)} == tools_hashes(tensors, metadata)
    assert report.totals["hashes_in_header"] == "wrong: sshs_model_hash, sshs_legacy_hash"
    assert {f.where for f in report.findings if f.level == "warning"} >= {"sshs_model_hash", "sshs_legacy_hash"}
    loratool.convert(style, tmp_path / "new.safetensors", to="kohya")
    assert loratool.inspect(tmp_path / "new.safetensors", hashes=True).totals["hashes_in_header"] == "right"
    assert "sha256" not in loratool.inspect(style).totals
