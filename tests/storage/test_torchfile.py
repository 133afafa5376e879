"""Pickled tensors: never executed, never larger in memory than on disk, and only when asked for."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_files import factors

from loratool.errors import FormatError, UnsupportedError
from loratool.storage import torchfile
from loratool.storage.checkpoint import open_adapter
from loratool.storage.load import Loader
from loratool.tensors import Span, TensorRef


class Payload:
    """Unpickling this runs a command that leaves a file behind."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.canary}'",)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def test_the_payload_would_work_on_a_careless_reader(tmp_path: Path, canary: Path) -> None:
    pickle.loads(pickle.dumps({"a": Payload(canary)}))
    assert canary.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_executed(tmp_path: Path, canary: Path, zipped: bool) -> None:
    path = tmp_path / "adapter_model.bin"
    torch.save({"a": Payload(canary)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(FormatError):
        open_adapter(str(path))  # without --allow-pickle it is not even opened
    with pytest.raises(FormatError):
        open_adapter(str(path), allow_pickle=True)
    assert not canary.exists()


def test_the_refusal_says_how_to_go_on(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.bin"
    torch.save(factors(), path)
    with pytest.raises(FormatError) as caught:
        open_adapter(str(path))
    assert "--allow-pickle" in caught.value.hint


def test_a_plain_state_dict_reads_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.bin"
    tensors = {
        "a": torch.randn(3, 4),
        "view": torch.randn(6, 6).T[1:3],
        "half": torch.randn(5).bfloat16(),
        "scalar": torch.tensor(8.0),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "complex": torch.randn(2, dtype=torch.complex64),
        "eight bits": torch.randn(5).to(torch.float8_e4m3fn),
        "empty": torch.zeros(0, 5),
        "truth": torch.tensor([True, False]),
    }
    torch.save(tensors, path)
    read = open_adapter(str(path), allow_pickle=True).tensors
    with Loader() as load:
        for name, tensor in tensors.items():
            assert same(load(read[name]), tensor.detach())


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether shape, dtype and every bit agree."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    left, right = (t.clone(memory_format=torch.contiguous_format).flatten() for t in (one, other))
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def opened(path: Path, content: Any) -> dict[str, TensorRef]:
    torch.save(content, path)
    return torchfile.read(path)


def rezipped(path: Path, change: Callable[[str, bytes], bytes | None], kind: int = zipfile.ZIP_STORED) -> None:
    """Write an archive anew, with other records and with no room between them."""
    with zipfile.ZipFile(path) as source:
        records = [(name, change(name, source.read(name))) for name in source.namelist()]
    with zipfile.ZipFile(path, "w", kind) as target:
        for name, data in records:
            if data is not None:
                target.writestr(name, data)


def test_only_the_place_of_a_tensor_is_known_until_it_is_loaded(tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.bin", {"a": torch.randn(30, 4), "b": torch.randn(7)}
    for name, ref in opened(path, tensors).items():
        (span,) = ref.pieces
        assert isinstance(span, Span)
        data = path.read_bytes()[span.offset : span.offset + span.nbytes]
        assert data == tensors[name].numpy().tobytes()


def test_tied_tensors_keep_both_names_over_the_same_bytes(tmp_path: Path) -> None:
    tied = torch.randn(10, 4)
    read = opened(tmp_path / "a.bin", {"embed": tied, "other": torch.randn(3), "head": tied, "slice": tied[2:5]})
    assert list(read) == ["embed", "other", "head", "slice"]
    assert read["embed"].pieces == read["head"].pieces
    with Loader() as load:
        assert torch.equal(load(read["head"]), tied)
        assert torch.equal(load(read["slice"]), tied[2:5])


WHOLE = torch.arange(12 * 10.0).reshape(12, 10)
CUBE = torch.arange(4 * 6 * 5.0).reshape(4, 6, 5)
VIEWS = {
    "rows": WHOLE[3:7],
    "one row": WHOLE[4],
    "one row as a matrix": WHOLE[4:5],
    "every third row": WHOLE[::3],
    "columns": WHOLE[:, 2:5],
    "every other column": WHOLE[:, 1::2],
    "a corner": WHOLE[8:, 7:],
    "one column": WHOLE[:, 3],
    "one column as a matrix": WHOLE[:, 9:],
    "transposed": WHOLE.T,
    "columns, transposed": WHOLE[:, 2:5].T,
    "rows of the transposed": WHOLE.T[1:3],
    "columns of the transposed": WHOLE.T[:, 4:],
    "the diagonal": WHOLE.diagonal(),
    "a band that is no slice": WHOLE.as_strided((5, 5), (11, 1)),
    "overlapping rows": WHOLE.as_strided((5, 5), (3, 1)),
    "a row over and over": WHOLE[0].expand(8, 10),
    "permuted": CUBE.permute(2, 0, 1),
    "inner transposed": CUBE.transpose(1, 2),
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "half of it": torch.randn(6, 6).bfloat16().T[1:],
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_reads_as_torch_reads_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.bin"
    ref = opened(path, {"a": VIEWS[name]})["a"]
    expected = torch.load(path, weights_only=True)["a"]
    with Loader() as load:
        assert same(load(ref), expected)
        assert same(load(ref.rows(0, 1)), expected[:1])
        if expected.dim() == 2:
            assert same(load(ref.transposed()), expected.T)
            assert same(
                load(ref.columns([range(expected.shape[1] // 2 + 1)])), expected[:, : expected.shape[1] // 2 + 1]
            )


def test_what_needs_too_much_rearranging_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchfile, "_VIEW_CAP", 64)
    monkeypatch.setattr(torchfile, "_GATHER_CAP", 64)
    for n, tensor in enumerate((torch.zeros(8, 4).T, torch.zeros(8, 8)[:, 1:3], torch.zeros(3, 4, 5).permute(2, 0, 1))):
        with pytest.raises(UnsupportedError, match=r"'odd'.*strides") as caught:
            opened(tmp_path / f"{n}.bin", {"plain": torch.zeros(100, 100), "odd": tensor})
        assert "contiguous()" in caught.value.hint
    small = {f"t{n}": torch.randn(2, 2, 2).permute(2, 0, 1) for n in range(3)}  # 32 bytes each
    with pytest.raises(UnsupportedError, match="'t2'"):
        opened(tmp_path / "sum.bin", small)


@pytest.mark.parametrize(
    "lazy", [torch.randn(2, dtype=torch.complex64).conj(), torch.randn(2, dtype=torch.complex64).conj().imag]
)
def test_what_torch_has_yet_to_compute_is_refused_by_name(tmp_path: Path, lazy: torch.Tensor) -> None:
    with pytest.raises(UnsupportedError, match="'lazy'") as caught:
        opened(tmp_path / "a.bin", {"lazy": lazy})
    assert "resolve" in caught.value.hint


def test_an_archive_that_another_tool_wrote_reads_the_same(tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.bin", {"a": torch.randn(30, 4), "b": torch.randn(7)}
    torch.save(tensors, path)
    rezipped(path, lambda _, data: data)
    read = torchfile.read(path)  # torch's own shortcut to the offsets goes wrong here
    with Loader() as load:
        assert all(torch.equal(load(read[name]), tensor) for name, tensor in tensors.items())


def test_an_archive_of_an_old_torch_reads_the_same(tmp_path: Path) -> None:
    path, tensor = tmp_path / "a.bin", torch.randn(30, 4)
    torch.save({"a": tensor}, path)
    rezipped(path, lambda name, data: data if name.endswith(("data.pkl", "/version", "data/0")) else None)
    with Loader() as load:
        assert torch.equal(load(torchfile.read(path)["a"]), tensor)


def test_an_archive_without_checksums_reads_the_same(tmp_path: Path) -> None:
    path, tensor, kept = tmp_path / "a.bin", torch.randn(30, 4), torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(compute_crc32=False)
    try:
        torch.save({"a": tensor}, path)
    finally:
        torch.serialization.set_crc32_options(kept)
    with Loader() as load:
        assert torch.equal(load(torchfile.read(path)["a"]), tensor)


def test_a_torch_that_knows_no_offsets_on_the_meta_device_reads_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchfile, "_meta_knows_offsets", lambda: False)
    tensors = {
        "a": torch.randn(3, 4),
        "t": torch.randn(5, 3).T,
        "s": torch.tensor(2.0),
        "p": torch.nn.Parameter(torch.ones(2)),
    }
    read = opened(tmp_path / "a.bin", tensors)
    with Loader() as load:
        assert all(torch.equal(load(read[name]), tensor) for name, tensor in tensors.items())


def test_a_save_from_a_gpu_reads_without_one(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    torch.save({"a": torch.arange(4.0)}, path)
    rezipped(path, lambda _, data: data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"))
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(path, weights_only=True)
    with Loader() as load:
        assert torch.equal(load(torchfile.read(path)["a"]), torch.arange(4.0))


def test_a_deflated_archive_is_refused_before_it_inflates(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.bin"
    torch.save({"a": torch.zeros(1000)}, path)
    rezipped(path, lambda _, data: data, zipfile.ZIP_DEFLATED)
    assert torch.load(path, weights_only=True)["a"].shape == (1000,)  # torch itself inflates it
    with pytest.raises(FormatError, match="compressed"):
        torchfile.read(path)


def test_a_tensor_that_claims_more_than_it_stores_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.bin"
    torch.save({"a": torch.zeros(1).expand(10**12)}, path)
    with pytest.raises(FormatError, match="claim"):
        torchfile.read(path)
    torch.save({"a": torch.zeros(1000), "b": torch.zeros(1).expand(1000)}, path)  # small enough for the sum
    with pytest.raises(FormatError, match="'b' claims"):
        torchfile.read(path)


def test_many_views_of_one_storage_are_refused(tmp_path: Path) -> None:
    path, shared = tmp_path / "adapter_model.bin", torch.zeros(100_000)
    torch.save({f"t{n}": shared[:] for n in range(1000)}, path)
    with pytest.raises(FormatError, match="claim"):
        torchfile.read(path)


def test_the_four_names_of_a_tied_matrix_are_not_too_many(tmp_path: Path) -> None:
    shared = torch.zeros(1000, 100)
    names = ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
    assert len(opened(tmp_path / "a.bin", {f"{name}.weight": shared for name in names})) == 4


def test_the_refusal_of_code_names_what_it_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"asks for posix\.system"):
        opened(tmp_path / "a.bin", {"a": Payload(tmp_path)})


@pytest.mark.parametrize("record", [b"", b"1234", bytes(39)])
def test_a_record_that_is_shorter_than_its_tensor_is_refused(tmp_path: Path, record: bytes) -> None:
    path = tmp_path / "a.bin"
    torch.save({"a": torch.zeros(10)}, path)
    rezipped(path, lambda name, data: record if name.endswith("data/0") else data)
    with pytest.raises(FormatError, match="'a' claims"):
        torchfile.read(path)


def test_a_view_that_reaches_beyond_its_record_is_refused(tmp_path: Path) -> None:
    path, whole = tmp_path / "a.bin", torch.zeros(10)
    torch.save({"a": whole[6:]}, path)
    rezipped(path, lambda name, data: data[:24] if name.endswith("data/0") else data)
    with pytest.raises(FormatError, match="'a' reaches beyond"):
        torchfile.read(path)


def test_a_storage_that_is_no_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    torch.save({"a": torch.zeros(10)}, path)
    rezipped(path, lambda name, data: None if name.endswith("data/0") else data)
    with pytest.raises(FormatError):
        torchfile.read(path)
    torch.save({"a": torch.zeros(10)}, path)
    rezipped(
        path,
        lambda name, data: data.replace(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x00.") if name.endswith("pkl") else data,
    )
    with pytest.raises(FormatError):
        torchfile.read(path)


def test_records_that_lie_beyond_the_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    torch.save({"a": torch.zeros(100)}, path)
    whole = bytearray(path.read_bytes())
    at = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"data/0"))  # its entry in the directory
    for offset in (len(whole), len(whole) - 10, 2**31, 1):
        whole[at + 42 : at + 46] = offset.to_bytes(4, "little")
        path.write_bytes(whole)
        with pytest.raises(FormatError):
            torchfile.read(path)


def test_another_byte_order_is_refused_before_torch_sees_it(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    torch.save({"a": torch.zeros(100)}, path)
    rezipped(path, lambda name, data: b"big" if name.endswith("byteorder") else data)
    with pytest.raises(FormatError, match="byte order"):  # torch 2.13 itself crashes on the meta device
        torchfile.read(path)


def test_two_records_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    torch.save({"a": torch.zeros(4)}, path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a/data/0", torch.ones(4).numpy().tobytes())
    with pytest.raises(FormatError, match="one name"):
        torchfile.read(path)


def test_a_giant_pickle_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchfile, "PICKLE_CAP", 100)
    with pytest.raises(FormatError, match="cap"):
        opened(tmp_path / "a.bin", factors())


def test_a_training_state_is_told_from_weights(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="'state_dict' is a dict") as caught:
        opened(tmp_path / "a.ckpt", {"state_dict": {"a": torch.zeros(2)}, "epoch": 3})
    assert "weights alone" in caught.value.hint


def test_a_name_that_no_header_can_hold_is_refused(tmp_path: Path) -> None:
    for name in ("x" * 5000, 7, None):
        with pytest.raises(FormatError, match="name"):
            opened(tmp_path / "a.bin", {name: torch.zeros(2)})


@pytest.mark.parametrize(
    "content",
    [
        {"a": "text"},
        {"a": [torch.zeros(2)]},
        {"a": {"b": torch.zeros(2)}},
        {1: torch.zeros(2)},
        {"a": torch.zeros(2, dtype=torch.complex128)},
        {"a": torch.zeros(2, device="meta")},
        {"a": torch.zeros(2, 2).to_sparse()},
        [torch.zeros(2)],
        torch.zeros(2),
    ],
    ids=lambda c: str(c)[:40],
)
def test_what_is_no_dict_of_dense_tensors_is_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "adapter_model.bin"
    torch.save(content, path)
    with pytest.raises(FormatError):
        torchfile.read(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}.", b"x" * 1000])
def test_what_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "adapter_model.bin"
    path.write_bytes(content)
    with pytest.raises(FormatError):
        torchfile.read(path)


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.bin"
    torch.save(factors(), path)
    whole = path.read_bytes()
    for cut in range(0, len(whole), len(whole) // 17):
        path.write_bytes(whole[:cut])
        with pytest.raises(FormatError):
            torchfile.read(path)
