"""Pickled tensors (`adapter_model.bin`), only behind --allow-pickle: weights_only, under caps, never a fallback.

The caps answer two measured attacks: a deflated archive that inflates a thousandfold, and a stride-0 tensor that
claims terabytes over a few bytes of storage.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from loratool import dtypes
from loratool.errors import FormatError
from loratool.tensors import Inline, TensorRef


def read(path: Path) -> dict[str, TensorRef]:
    """Read a state dict of plain tensors into memory; it is as large as the file."""
    _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler's errors have no common base
        raise FormatError(
            f"not a plain state dict: {str(error).splitlines()[0][:200]}", where=path, hint="save it as safetensors"
        ) from None
    if not isinstance(content, dict):
        raise FormatError(f"expected a dict of tensors, found a {type(content).__name__}", where=path)
    tensors = (value for value in content.values() if isinstance(value, torch.Tensor))
    if sum(t.numel() * t.element_size() for t in tensors) > 2 * path.stat().st_size:  # many views of one storage
        raise FormatError("the tensors claim more elements than the file stores", where=path)
    return {name: _inline(path, name, value) for name, value in content.items()}


def _check_archive(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        raise FormatError("not a torch archive (torch.save writes a zip since 1.6)", where=path)
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(e.compress_type != zipfile.ZIP_STORED for e in entries):
            raise FormatError("a compressed archive is refused: torch never writes one", where=path)
        if sum(e.file_size for e in entries) > path.stat().st_size:
            raise FormatError("the archive claims more bytes than the file has", where=path)


def _inline(path: Path, name: object, value: Any) -> TensorRef:
    if not isinstance(name, str):
        raise FormatError(f"the name {name!r} is not a string", where=path)
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or value.device.type != "cpu":
        raise FormatError(f"{name!r} is not a dense tensor", where=path)
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        raise FormatError(f"{name!r} claims more elements than it stores", where=path)
    try:
        dtype = dtypes.from_torch_name(str(value.dtype).removeprefix("torch."))
    except KeyError:
        raise FormatError(f"{name!r} has a dtype unknown to safetensors: {value.dtype}", where=path) from None
    data = value.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return TensorRef(name, tuple(value.shape), dtype, (Inline(data),))
