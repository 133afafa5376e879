"""Pickled tensors: never executed, never larger in memory than on disk, and only when asked for."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_files import factors

from loratool.errors import FormatError
from loratool.storage import torchfile
from loratool.storage.checkpoint import open_adapter
from loratool.storage.load import Loader


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
        "conjugate": torch.randn(2, dtype=torch.complex64).conj(),
    }
    torch.save(tensors, path)
    read = open_adapter(str(path), allow_pickle=True).tensors
    with Loader() as load:
        for name, tensor in tensors.items():
            assert torch.equal(load(read[name]), tensor.detach().resolve_conj())


def test_a_deflated_archive_is_refused_before_it_inflates(tmp_path: Path) -> None:
    plain, path = tmp_path / "plain", tmp_path / "adapter_model.bin"
    torch.save({"a": torch.zeros(1000)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
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
