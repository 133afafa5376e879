"""The safetensors header, read and written by us: strict, capped, in file order, without loading a byte of data.

Layout: 8 bytes little-endian header length, JSON header, data. Source: the format page of huggingface/safetensors.
Stricter than the library: duplicate names are refused, and the caps are lower (a 60 MB header takes the library 11 s).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from loratool import dtypes, strictjson
from loratool.errors import FormatError, StorageError
from loratool.storage import remote
from loratool.tensors import Span, TensorInfo, TensorRef

HEADER_CAP = 16 << 20
TENSOR_CAP = 200_000
DIMENSION_CAP = 16  # weights have five at most, and torch stops at 64
NAME_CAP = 4096  # bytes


class Header(NamedTuple):
    """A parsed header: its raw bytes (length prefix included), the tensors in file order, and the metadata."""

    raw: bytes
    tensors: tuple[TensorRef, ...]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read the header of a file; FormatError names what is wrong with it."""
    try:
        size = remote.size(path)
        prefix = remote.read(path, 0, 8)
        if len(prefix) < 8:
            raise FormatError(f"{size} bytes are too few for a safetensors file", where=path, hint=_DAMAGED)
        (length,) = struct.unpack("<Q", prefix)
        if length > HEADER_CAP:
            stands = next((what for start, what in _INSTEAD.items() if prefix.lower().startswith(start)), None)
            if stands:
                raise FormatError(f"{stands[0]}, and no safetensors file", where=path, hint=stands[1])
            raise FormatError(
                f"a header of {length:,} bytes is beyond the cap of {HEADER_CAP:,}: not a safetensors file?",
                where=path,
            )
        text = remote.read(path, 8, 8 + length)
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror}", where=path) from None
    if len(text) < length:
        raise FormatError(f"the file ends inside its header ({size:,} bytes)", where=path, hint=_DAMAGED)
    if not text.startswith(b"{"):  # the format page: the header must begin so
        raise FormatError("the header is not a JSON object: not a safetensors file?", where=path)
    entries = strictjson.parse(text, path)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError("__metadata__ must map strings to strings", where=path)
    if len(entries) > TENSOR_CAP:
        raise FormatError(f"{len(entries):,} tensors are beyond the cap of {TENSOR_CAP:,}", where=path)
    start = 8 + length
    refs = sorted((_entry(path, name, e, start) for name, e in entries.items()), key=_place)
    _check_coverage(path, refs, start, size)
    return Header(prefix + text, tuple(refs), metadata)


_PAGE = ("this is a web page", "the download was answered with it: fetch the file again, logged in if need be")
_JSON = ("this is JSON", "give the folder that it is in, or the file of weights")
_INSTEAD = {  # how files begin that lie where weights should
    b"version ": ("this is a pointer of Git LFS", "git lfs pull fetches the file itself"),
    b"<!doctyp": _PAGE,
    b"<html": _PAGE,
    **dict.fromkeys((b'{"', b"{ ", b"{\n", b"{\r", b"{\t"), _JSON),
}
_DAMAGED = "the file is damaged or its download was cut off: fetch it again"


def _entry(path: Path, name: str, entry: Any, start: int) -> TensorRef:
    if len(name.encode()) > NAME_CAP:
        raise FormatError(f"a tensor name is longer than {NAME_CAP:,} bytes: {name[:80]!r}...", where=path)
    try:
        dtype, sizes, (low, high) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if len(entry) != 3 or not isinstance(sizes, list) or not isinstance(entry["data_offsets"], list):
            raise ValueError
        shape, numbers = tuple(sizes), (*sizes, low, high)
    except (KeyError, TypeError, ValueError):
        raise FormatError(f"the header entry of {name!r} is malformed", where=path) from None
    if len(shape) > DIMENSION_CAP:  # before anything multiplies or prints them
        raise FormatError(f"{name!r} has {len(shape):,} dimensions, more than {DIMENSION_CAP}", where=path)
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
        raise FormatError(f"the header entry of {name!r} has impossible numbers", where=path)
    if prod(n for n in shape if n) >= 1 << 63:  # 0 x 2^40 x 2^40 has no bytes, and no torch tensor either
        raise FormatError(f"{name!r} has the impossible shape {list(shape)}", where=path)
    if not isinstance(dtype, str) or not dtypes.is_known(dtype):
        raise FormatError(f"{name!r} has the unknown dtype {str(dtype)[:40]!r}", where=path)
    if prod(shape) * dtypes.itemsize(dtype) != high - low:
        raise FormatError(f"{name!r}: shape {list(shape)} of {dtype} does not take {high - low} bytes", where=path)
    return TensorRef(name, shape, dtype, (Span(str(path), start + low, high - low),))


def _place(ref: TensorRef) -> tuple[int, int]:
    span = ref.pieces[0]
    assert isinstance(span, Span)
    return span.offset, span.nbytes


def _check_coverage(path: Path, refs: Sequence[TensorRef], start: int, size: int) -> None:
    at = start
    for ref in refs:
        offset, nbytes = _place(ref)
        if offset != at:
            raise FormatError(f"the data of {ref.name!r} overlaps or leaves a hole", where=path)
        at += nbytes
    if at != size:
        kind = "is cut off" if size < at else "has trailing bytes"
        raise FormatError(f"the file {kind}: {size:,} bytes, the header says {at:,}", where=path, hint=_DAMAGED)


def make_header(infos: Iterable[TensorInfo], metadata: Mapping[str, str] | None) -> bytes:
    """Serialise a header for tensors in the given order; metadata sorted, so that equal content is equal bytes."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(sorted(metadata.items()))}
    at = 0
    for info in infos:
        entries[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [at, at + info.nbytes]}
        at += info.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # data starts aligned, as the library writes it
    return struct.pack("<Q", len(text)) + text


def offsets(header: bytes, infos: Sequence[TensorInfo]) -> dict[str, int]:
    """Return where in the file each tensor's data starts."""
    places, at = {}, len(header)
    for info in infos:
        places[info.name] = at
        at += info.nbytes
    return places
