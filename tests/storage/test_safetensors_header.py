"""Our header reader and writer against the safetensors library, on good files and on structured nonsense."""

from __future__ import annotations

import json
import struct
import time
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from loratool.errors import FormatError, LoratoolError, StorageError
from loratool.storage import safetensors as ours
from loratool.storage.load import Loader
from loratool.tensors import TensorInfo

SIZES = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F64": 8, "C64": 8}
quick = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def file_of(header: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: object, shape: object, offsets: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
names = text | st.sampled_from(["a", "b", "weight", "__metadata__", "x.y", "", "\x00", "é", "\ud800"])


@st.composite
def entries(draw: st.DrawFn) -> tuple[list[tuple[str, Any]], int]:
    """Well-formed entries that tile the data, in any order of the header."""
    made: list[tuple[str, Any]] = []
    at = 0
    for name in draw(st.lists(names, max_size=4, unique=True)):
        dtype = draw(st.sampled_from(sorted(SIZES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        end = at + prod(shape) * SIZES[dtype]
        made.append((name, entry(dtype, shape, [at, end])))
        at = end
    return draw(st.permutations(made)), at


WILD: list[Any] = [
    -1,
    0,
    1,
    2**31,
    2**32,
    2**40,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    1.0,
    1e300,
    True,
    None,
    "",
    "12",
    {},
    [],
    [-1],
]
WILD += [[2**40, 2**40, 0], [0, 2**62, 2**62], [1] * 70, [2.0], ["1"], [[1]], [None], [0, 4, 8], {"a": 1}, "\ud800"]
WILD += ["F4", "f32", "FLOAT", "F8_E8M0", "I128", "F6_E2M3", "BF16 "]
metadata = st.sampled_from([{"a": "b"}, {"a": 1}, {"a": None}, [], None, "x", {"a": {}}, {"": "\ud800"}])


class Draft:
    """A header in the making: one text an entry, and the sizes that the file claims."""

    def __init__(self, made: list[tuple[str, Any]], size: int) -> None:
        self.made, self.size = made, size
        self.texts = [f"{json.dumps(name)}:{json.dumps(value)}" for name, value in made]
        self.start = ""
        self.length: int | None = None


def other_size(draw: st.DrawFn, d: Draft) -> None:
    d.size = max(0, d.size + draw(st.sampled_from([-8, -1, 1, 8, 100])))


def other_length(draw: st.DrawFn, d: Draft) -> None:
    d.length = draw(st.sampled_from([0, 1, 7, 8, 2**20, 16 * 2**20 + 1, 2**63, 2**64 - 1]))


def wild_field(draw: st.DrawFn, d: Draft) -> None:
    for name, value in d.made[:1]:
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "extra"]))
        d.texts[0] = f"{json.dumps(name)}:{json.dumps({**value, field: draw(st.sampled_from(WILD))})}"


def moved(draw: st.DrawFn, d: Draft) -> None:
    for name, value in d.made[-1:]:
        offsets = [o + draw(st.sampled_from([-4, -1, 0, 1, 4])) for o in value["data_offsets"]]
        d.texts[-1] = f"{json.dumps(name)}:{json.dumps({**value, 'data_offsets': offsets})}"


def twice(draw: st.DrawFn, d: Draft) -> None:
    d.texts += d.texts[:1]


def with_metadata(draw: st.DrawFn, d: Draft) -> None:
    d.texts.append('"__metadata__":' + json.dumps(draw(metadata)))


def wild_entry(draw: st.DrawFn, d: Draft) -> None:
    value = draw(st.sampled_from(["null", "[]", '"x"', "NaN", "-0", "1e999", "{}"]))
    d.texts.append(f"{json.dumps(draw(names))}:{value}")


def deep(draw: st.DrawFn, d: Draft) -> None:
    depth = draw(st.sampled_from([5, 130, 2000, 100_000]))
    d.texts.append('"deep":' + "[" * depth + "]" * depth)


def other_start(draw: st.DrawFn, d: Draft) -> None:
    d.start = draw(st.sampled_from([" ", "\n", "\ufeff", "[", "x"]))


def other_spelling(draw: st.DrawFn, d: Draft) -> None:
    zero = draw(st.sampled_from(["[-0,", "[00,", "[0.0,", "[0e0,", "[+0,"]))
    d.texts = [line.replace("[0,", zero) for line in d.texts]


def broken(draw: st.DrawFn, d: Draft) -> None:
    d.texts.append(draw(st.sampled_from(["", '"a"', '"a":', "1:2", "\x00"])))


FAULTS = [other_size, other_length, wild_field, moved, twice, with_metadata, wild_entry, deep, other_start]
FAULTS += [other_spelling, broken]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A file with up to three things wrong; sometimes none."""
    d = Draft(*draw(entries()))
    for fault in draw(st.lists(st.sampled_from(FAULTS), max_size=3, unique=True)):
        fault(draw, d)
    header = d.start + "{" + ",".join(d.texts) + "}" + draw(st.sampled_from(["", "    ", "\n", "\t", "\x00"]))
    encoding = "utf-16" if draw(st.integers(0, 30)) == 0 else "utf-8"
    whole = file_of(header.encode(encoding, "surrogatepass"), bytes(d.size), d.length)
    return whole[: draw(st.integers(0, len(whole)))] if draw(st.integers(0, 15)) == 0 else whole


def listing(content: bytes) -> dict[str, tuple[list[int], str]]:
    """What the library says of a file."""
    return {name: (list(info["shape"]), info["dtype"]) for name, info in safetensors.deserialize(content)}


@settings(quick, max_examples=1500)
@given(mutated())
def test_a_damaged_header_is_refused_or_means_what_the_library_says(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    try:
        header = ours.read_header(path)
    except LoratoolError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert {t.name: (list(t.shape), t.dtype) for t in header.tensors} == listing(content)
    assert not refusal or str(path) in refusal


@quick
@given(entries(), st.binary(max_size=3))
def test_every_well_formed_header_is_read(tmp_path: Path, made: tuple[list[tuple[str, Any]], int], pad: bytes) -> None:
    # half a surrogate pair is no text, and one name is reserved
    good = {n: e for n, e in made[0] if n not in ("__metadata__", "\ud800")}
    at, tiled = 0, {}
    for name, value in good.items():
        nbytes = value["data_offsets"][1] - value["data_offsets"][0]
        tiled[name] = {**value, "data_offsets": [at, at + nbytes]}
        at += nbytes
    whole = file_of(json.dumps(tiled) + " " * len(pad), bytes(at))
    path = tmp_path / "x.safetensors"
    path.write_bytes(whole)
    header = ours.read_header(path)
    assert {t.name: (list(t.shape), t.dtype) for t in header.tensors} == listing(whole)
    assert whole.startswith(header.raw)


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ({"a": entry("F32", [2], [0, 8]), "b": entry("F32", [1], [12, 16])}, 16, "hole"),
        ({"a": entry("F32", [2], [0, 8]), "b": entry("F32", [2], [4, 12])}, 12, "overlaps"),
        ({"a": entry("F32", [2], [4, 12])}, 12, "hole"),
        ({"a": entry("F32", [2], [0, 8])}, 9, "trailing"),
        ({"a": entry("F32", [2], [0, 8])}, 7, "cut off"),
        ({"a": entry("F32", [3], [0, 8])}, 8, "does not take"),
        ({"a": entry("F31", [2], [0, 8])}, 8, "unknown dtype"),
        ({"a": entry("F32", [-2], [0, 8])}, 8, "impossible numbers"),
        ({"a": entry("F32", [2**64], [0, 8])}, 8, "impossible numbers"),
        ({"a": entry("F32", [2**40, 2**40, 0], [0, 0])}, 0, "impossible shape"),
        ({"a": entry("F32", "", [0, 4])}, 4, "malformed"),
        ({"__metadata__": {"a": 1}}, 0, "strings"),
    ],
)
def test_the_message_says_what_is_wrong_with_a_header(
    tmp_path: Path, header: dict[str, object], data: int, says: str
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of(json.dumps(header), bytes(data)))
    with pytest.raises(FormatError, match=says):
        ours.read_header(path)


@pytest.mark.parametrize(
    "header",
    [
        '{"a":{"dtype":"F32","shape":[],"data_offsets":[-0,4]}}',
        '{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4.0]}}',
        '{"a":{"dtype":"F32","shape":"","data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},}',
        '{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
        '{"\\ud800":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}',
        '[{"dtype":"F32","shape":[],"data_offsets":[0,4]}]',
    ],
)
def test_what_the_library_cannot_parse_is_refused_although_python_can(tmp_path: Path, header: str) -> None:
    content = file_of(header, bytes(4))
    with pytest.raises(safetensors.SafetensorError):
        listing(content)
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError):
        ours.read_header(path)


def test_a_header_that_begins_with_a_space_is_refused_as_the_format_page_says(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of(' {"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}', bytes(4)))
    with pytest.raises(FormatError, match="not a safetensors file"):
        ours.read_header(path)


def test_a_duplicate_name_is_refused_although_the_library_takes_the_last(tmp_path: Path) -> None:
    one, two = json.dumps(entry("F32", [1], [0, 4])), json.dumps(entry("I32", [1], [0, 4]))
    content = file_of(f'{{"a":{one},"a":{two}}}', struct.pack("<f", 1.0))
    assert listing(content) == {"a": ([1], "I32")}
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match="duplicate key 'a'"):
        ours.read_header(path)


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 99 << 20) + b"{")
    with path.open("r+b") as file:
        file.truncate(100 << 20)  # sparse
    with pytest.raises(FormatError, match="beyond the cap"):
        ours.read_header(path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"<html><head></head></html>", "web page"),
        (b'{"model_type": "llama"}', "this is JSON"),
        (b'{\n  "model_type": "llama"\n}', "this is JSON"),
    ],
)
def test_what_often_lies_in_place_of_weights_is_named(content: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=told):
        ours.read_header(path)


def test_a_file_that_cannot_be_opened_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be read"):
        ours.read_header(tmp_path)


NUMPY = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "U8": np.uint8, "BOOL": np.bool_, "F64": np.float64}
infos = st.lists(
    st.builds(
        TensorInfo,
        text.filter(lambda n: n != "__metadata__"),
        st.lists(st.integers(0, 4), max_size=3).map(tuple),
        st.sampled_from(sorted(NUMPY)),
    ),
    max_size=5,
    unique_by=lambda info: info.name,
)


@quick
@given(infos, st.dictionaries(text, text, max_size=4))
def test_the_library_reads_every_header_that_is_made(made: list[TensorInfo], metadata: dict[str, str]) -> None:
    header = ours.make_header(made, metadata)
    assert len(header) % 8 == 0  # the data starts aligned
    data = b"".join(bytes(info.nbytes) for info in made)
    assert listing(header + data) == {i.name: (list(i.shape), i.dtype) for i in made}
    if metadata:
        told = json.loads(header[8:])["__metadata__"]
        assert told == metadata
    again = ours.make_header(made, dict(reversed(metadata.items())))
    assert again == header


def test_offsets_say_where_the_library_finds_each_tensor(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6, dtype=torch.int64), "a": torch.arange(5, dtype=torch.uint8), "c": torch.randn(3, 2)}
    save_file(tensors, tmp_path / "x.safetensors", {"k": "v"})
    header = ours.read_header(tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    places = ours.offsets(header.raw, [t.info for t in header.tensors])
    for name, tensor in tensors.items():
        data = tensor.numpy().tobytes()
        assert content[places[name] : places[name] + len(data)] == data
    assert header.metadata == {"k": "v"}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    "dtype",
    ["float32", "float16", "bfloat16", "float64", "int8", "uint8", "bool", "int64", "float8_e4m3fn", "float8_e5m2"],
)
def test_tensors_load_bit_for_bit_as_the_library_loads_them(tmp_path: Path, dtype: str) -> None:
    source = torch.randint(0, 2, (7, 5, 2)).to(getattr(torch, dtype))
    save_file({"scalar": source[0, 0, 0].clone(), "t": source, "empty": source[:0].clone()}, tmp_path / "x.safetensors")
    expected = load_file(tmp_path / "x.safetensors")
    with Loader() as load:
        for ref in ours.read_header(tmp_path / "x.safetensors").tensors:
            mine = load(ref)
            assert mine.dtype == expected[ref.name].dtype
            assert mine.shape == expected[ref.name].shape
            assert raw(mine) == raw(expected[ref.name])
        ref = next(r for r in ours.read_header(tmp_path / "x.safetensors").tensors if r.name == "t")
        rows = load(ref.rows(2, 6))
        assert raw(rows) == raw(source[2:6])


def test_a_file_that_shrinks_while_it_is_read_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"t": torch.randn(1000)}, path)
    ref = ours.read_header(path).tensors[0]
    with path.open("r+b") as file:
        file.truncate(2000)
    with Loader() as load, pytest.raises(StorageError, match="was it changed"):
        load(ref)


@pytest.mark.parametrize("size", [1, 0, 2**63 - 1], ids=["one", "zero", "huge"])
def test_a_tensor_of_very_many_dimensions_is_refused_shortly_and_at_once(tmp_path: Path, size: int) -> None:
    made = {"a": entry("F32", [size] * 40_000, [0, 4 if size == 1 else 0])}
    (tmp_path / "x").write_bytes(file_of(json.dumps(made), bytes(4 if size == 1 else 0)))
    start = time.process_time()
    with pytest.raises(FormatError, match="'a' has 40,000 dimensions") as caught:
        ours.read_header(tmp_path / "x")
    assert time.process_time() - start < 1
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize("count", [0, 1, 5, 16])
def test_as_many_dimensions_as_weights_have_are_read(tmp_path: Path, count: int) -> None:
    save_file({"a": torch.zeros([1] * count)}, tmp_path / "x")
    assert ours.read_header(tmp_path / "x").tensors[0].shape == (1,) * count


@pytest.mark.parametrize("name", ["x" * 4097, "é" * 2049], ids=["ASCII", "bytes count"])
def test_a_very_long_tensor_name_is_refused_shortly(tmp_path: Path, name: str) -> None:
    save_file({name: torch.zeros(1)}, tmp_path / "x")
    with pytest.raises(FormatError, match="longer than 4,096 bytes") as caught:
        ours.read_header(tmp_path / "x")
    assert len(str(caught.value)) < 300 + len(str(tmp_path))
    save_file({name[: 4096 // len(name[0].encode())]: torch.zeros(1)}, tmp_path / "x")
    assert len(ours.read_header(tmp_path / "x").tensors) == 1


def test_an_unknown_dtype_is_quoted_in_short(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(file_of(json.dumps({"a": entry("F" * 100_000, [], [0, 0])})))
    with pytest.raises(FormatError, match="unknown dtype") as caught:
        ours.read_header(tmp_path / "x")
    assert len(str(caught.value)) < 300 + len(str(tmp_path))
