"""Torch archives (`pytorch_model.bin`, `adapter_model.bin`), only behind --allow-pickle: their headers, so to speak.

torch.save writes a zip that is not compressed: a pickle says what the tensors are, and each storage is a record. Only
the pickle is read, so a file of any size opens in a moment; a tensor becomes the span of bytes that it is.
Source of the layout: the note on serialisation semantics in PyTorch's documentation.

The archive is untrusted, and one reader looks at it: the zip's directory and the pickle are read here, under caps, and
torch is given an archive that was made here, of the pickle and of empty records that only stand for places. It
unpickles with weights_only, on a device without memory, and there is never a fallback. (Given the file, torch 2.13
takes the pickle's word for where each record lies, and crashes on a byte order that is not the machine's.) The other
caps answer measured attacks: a deflated archive that inflates a thousandfold, and tensors that claim terabytes over a
few bytes.
"""

from __future__ import annotations

import os
import re
import struct
import zipfile
from functools import cache
from io import BytesIO
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from loratool import dtypes
from loratool.errors import FormatError, UnsupportedError
from loratool.storage.safetensors import DIMENSION_CAP, NAME_CAP, TENSOR_CAP
from loratool.tensors import Inline, Span, TensorRef

PICKLE_CAP = 64 << 20  # bytes; 200,000 tensors take about 50 MB
#: How often the bytes of a file may be claimed: an encoder-decoder gives one matrix four names.
_CLAIMS = 4
_VIEW_CAP = 256 << 20  # bytes that a rearranged tensor is made from: all of them are read for any part of it
_GATHER_CAP = 256 << 20  # bytes of a file's tensors that are read on opening, for want of another way
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip record: signature, ..., length of the name, of the extra field
_CUT_OFF = "the file is damaged or its download was cut off: fetch it again"
_AS_SAFETENSORS = "save it as safetensors"


class Archive(NamedTuple):
    """Where the parts of an archive lie: the pickle, its byte order if it says one, and the storages by their key."""

    pickle: Span
    byteorder: Span | None
    storages: dict[str, Span]


def read(path: Path) -> dict[str, TensorRef]:
    """Read what a state dict holds, in its order; the data stays where it is.

    FormatError where it is damaged, hostile or something else; UnsupportedError names a tensor that is saved as a view
    too large and too odd to read in parts.
    """
    archive = _open(path)
    skeleton, places = _skeleton(archive)
    try:
        content = _unpickled(skeleton)
    except Exception as error:  # the unpickler's errors have no common base
        raise FormatError(f"not a plain state dict: {_why(error)}", where=path, hint=_AS_SAFETENSORS) from None
    if not isinstance(content, dict):
        raise FormatError(f"expected a dict of tensors, found a {type(content).__name__}", where=path)
    if len(content) > TENSOR_CAP:
        raise FormatError(f"{len(content):,} tensors are beyond the cap of {TENSOR_CAP:,}", where=path)
    tensors = [value for value in content.values() if isinstance(value, torch.Tensor)]
    if sum(t.numel() * t.element_size() for t in tensors) > _CLAIMS * path.stat().st_size:  # many views of one storage
        raise FormatError("the tensors claim more elements than the file stores", where=path)
    refs: dict[str, TensorRef] = {}
    room = _GATHER_CAP
    for name, value in content.items():
        ref = _ref(path, name, value, places, room)
        room -= sum(piece.nbytes for piece in ref.pieces if isinstance(piece, Inline))
        refs[ref.name] = ref
    return refs


# -- the zip -----------------------------------------------------------------------------------------------------------


def _open(path: Path) -> Archive:
    """Read the directory of a zip; FormatError where it is not what torch.save writes."""
    entries = _entries(path)
    size = path.stat().st_size
    names = [entry.filename for entry in entries]
    if len(set(names)) != len(names):
        raise FormatError("the archive holds two records of one name", where=path)
    if any(e.compress_type != zipfile.ZIP_STORED or e.flag_bits & 1 for e in entries):
        raise FormatError("a compressed or encrypted archive is refused: torch never writes one", where=path)
    if sum(e.file_size for e in entries) > size:
        raise FormatError("the archive claims more bytes than the file has", where=path)
    pickles = [name for name in names if re.fullmatch(r"[^/]*/data\.pkl", name)]
    if len(pickles) != 1:
        raise FormatError("not a torch archive: it has no data.pkl", where=path)
    spans = _spans(path, entries, size)
    pickle, folder = spans[pickles[0]], pickles[0].removesuffix("data.pkl")
    if pickle.nbytes > PICKLE_CAP:
        raise FormatError(f"a pickle of {pickle.nbytes:,} bytes is beyond the cap of {PICKLE_CAP:,}", where=path)
    storages = {name.removeprefix(f"{folder}data/"): span for name, span in spans.items()}
    storages = {key: span for key, span in storages.items() if key.isascii() and key.isdecimal()}
    archive = Archive(pickle, spans.get(f"{folder}byteorder"), storages)
    if archive.byteorder and _bytes(archive.byteorder) != b"little":
        raise FormatError("it was written on a machine of another byte order", where=path, hint=_AS_SAFETENSORS)
    return archive


def _entries(path: Path) -> list[zipfile.ZipInfo]:
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    if not is_zip:
        raise FormatError(
            "not a torch archive (torch.save writes a zip since 1.6)",
            where=path,
            hint="torch.load(path, weights_only=True) and torch.save rewrite an old one",
        )
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except Exception:  # zipfile meets damage with more than BadZipFile: struct.error, ValueError, NotImplementedError
        raise FormatError("the archive has no directory, or a broken one", where=path, hint=_CUT_OFF) from None


def _spans(path: Path, entries: list[zipfile.ZipInfo], size: int) -> dict[str, Span]:
    """Return where the data of each record lies: behind its local header, whose length only that header knows."""
    spans = {}
    with path.open("rb") as file:
        for entry in entries:
            header = os.pread(file.fileno(), _LOCAL_HEADER.size, max(entry.header_offset, 0))
            if len(header) < _LOCAL_HEADER.size or entry.header_offset < 0:
                raise FormatError(f"the record {entry.filename[:80]!r} lies beyond the file", where=path, hint=_CUT_OFF)
            signature, name, extra = _LOCAL_HEADER.unpack(header)
            start = entry.header_offset + _LOCAL_HEADER.size + name + extra
            if signature != b"PK\x03\x04" or start + entry.file_size > size:
                raise FormatError(f"the record {entry.filename[:80]!r} lies beyond the file", where=path, hint=_CUT_OFF)
            spans[entry.filename] = Span(str(path), start, entry.file_size)
    return spans


def _bytes(span: Span) -> bytes:
    with Path(span.path).open("rb") as file:
        return os.pread(file.fileno(), span.nbytes, span.offset)


# -- the pickle --------------------------------------------------------------------------------------------------------


def _skeleton(archive: Archive) -> tuple[bytes, dict[int, Span]]:
    """Return an archive of the pickle and of empty records, and the span that the offset of each stands for."""
    file, places = BytesIO(), {}
    with zipfile.ZipFile(file, "w") as skeleton:
        for name, data in (("data.pkl", _bytes(archive.pickle)), ("version", b"3\n")):
            skeleton.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
        for key, span in archive.storages.items():
            skeleton.writestr(zipfile.ZipInfo(f"archive/data/{key}"), b"")
            places[file.tell()] = span  # an empty record ends where its data begins
    return file.getvalue(), places


def _unpickled(skeleton: bytes) -> object:
    """Unpickle tensors without data: their storages know at which offset of the archive theirs would be."""
    if _meta_knows_offsets():
        return torch.load(BytesIO(skeleton), map_location="meta", weights_only=True)
    from torch._subclasses.fake_tensor import FakeTensorMode  # seconds to import

    with FakeTensorMode():
        return torch.load(BytesIO(skeleton), map_location="cpu", weights_only=True)


@cache
def _meta_knows_offsets() -> bool:
    """Whether torch notes offsets on the meta device, as new releases do; older ones only under FakeTensorMode."""
    file = BytesIO()
    torch.save(torch.zeros(1), file)
    file.seek(0)
    loaded: torch.Tensor = torch.load(file, map_location="meta", weights_only=True)
    return loaded.untyped_storage()._checkpoint_offset is not None


def _why(error: Exception) -> str:
    """Say why the unpickler refused, without the advice to load it unsafely."""
    wanted = re.search(r"GLOBAL (\S+)", str(error))
    if wanted:
        return f"it asks for {wanted[1][:80]}, which is no tensor"
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


# -- tensors -----------------------------------------------------------------------------------------------------------


class _Strided(NamedTuple):
    """A tensor as torch describes it: elements of a storage, from `start` on, `strides` apart."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    storage: Span

    @property
    def itemsize(self) -> int:
        return dtypes.itemsize(self.dtype)

    @property
    def reach(self) -> int:
        """Elements of the storage up to the last one that it uses."""
        steps = zip(self.shape, self.strides, strict=True)
        return self.start + 1 + sum((n - 1) * step for n, step in steps) if prod(self.shape) else 0

    @property
    def dense(self) -> bool:
        """Whether the elements lie one behind the other; the stride of a single one means nothing."""
        steps = [(n, step) for n, step in zip(self.shape, self.strides, strict=True) if n != 1]
        wanted = [prod(n for n, _ in steps[at + 1 :]) for at in range(len(steps))]
        return not prod(self.shape) or [step for _, step in steps] == wanted

    @property
    def turned(self) -> _Strided:
        """The transpose."""
        return self._replace(shape=self.shape[::-1], strides=self.strides[::-1])

    def span(self, start: int, count: int) -> Span:
        """Return the bytes of `count` elements of the storage."""
        return Span(self.storage.path, self.storage.offset + start * self.itemsize, count * self.itemsize)

    def block(self, start: int, shape: tuple[int, ...]) -> TensorRef:
        """Return elements of the storage that lie one behind the other."""
        return TensorRef(self.name, shape, self.dtype, (self.span(start, prod(shape)),))


def _ref(path: Path, name: object, value: object, places: dict[int, Span], room: int) -> TensorRef:
    """Return a reference to one tensor, or raise with its name; at most `room` bytes are read on the way."""
    if not isinstance(name, str):
        raise FormatError(f"the name {name!r:.80} is not a string", where=path)
    if len(name.encode(errors="surrogatepass")) > NAME_CAP:
        raise FormatError(f"a tensor name is longer than {NAME_CAP:,} bytes: {name[:80]!r}...", where=path)
    tensor = _strided(path, name, value, places)
    if len(tensor.shape) > DIMENSION_CAP:
        raise FormatError(f"{name!r} has {len(tensor.shape)} dimensions, more than {DIMENSION_CAP}", where=path)
    if prod(tensor.shape) * tensor.itemsize > tensor.storage.nbytes or min(tensor.strides, default=0) < 0:
        raise FormatError(f"{name!r} claims more elements than it stores", where=path)
    if tensor.reach * tensor.itemsize > tensor.storage.nbytes:
        raise FormatError(f"{name!r} reaches beyond what it stores", where=path)
    found = _placed(tensor, room)
    if found is None:
        raise UnsupportedError(
            f"{name!r} is saved as a view with the strides {list(tensor.strides)}, too large to rearrange",
            where=path,
            hint="save it as safetensors, or tensor.contiguous() before torch.save",
        )
    return found


def _strided(path: Path, name: str, value: object, places: dict[int, Span]) -> _Strided:
    """Describe a tensor, or raise where it is none that has its data in the archive."""
    if isinstance(value, dict):
        raise FormatError(
            f"{name!r} is a dict and not a tensor: a training state?", where=path, hint="save the weights alone"
        )
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        raise FormatError(f"{name!r} is not a dense tensor", where=path)
    offset = value.untyped_storage()._checkpoint_offset
    if offset is None or offset not in places:
        raise FormatError(f"{name!r} is not a dense tensor", where=path)
    if value.is_conj() or value.is_neg():
        raise UnsupportedError(
            f"{name!r} is a conjugate or negative that torch has yet to compute",
            where=path,
            hint="tensor.resolve_conj().resolve_neg() before torch.save",
        )
    try:
        dtype = dtypes.from_torch_name(str(value.dtype).removeprefix("torch."))
    except KeyError:
        raise FormatError(f"{name!r} has a dtype unknown to safetensors: {value.dtype}", where=path) from None
    return _Strided(name, dtype, tuple(value.shape), value.stride(), int(value.storage_offset()), places[offset])


def _placed(tensor: _Strided, room: int) -> TensorRef | None:
    """Return where a tensor's bytes lie: a span, a view of one, or a copy of a few; None where there is no good way."""
    if tensor.dense:
        return tensor.block(tensor.start if tensor.reach else 0, tensor.shape)
    if len(tensor.shape) == 2:
        if tensor.turned.dense:
            turned = tensor.block(tensor.start, tensor.turned.shape)
            return turned.transposed() if turned.nbytes <= _VIEW_CAP else None
        if found := _columns(tensor):
            return found
        if found := _columns(tensor.turned):
            return found.transposed()
    return _gathered(tensor) if (tensor.reach - tensor.start) * tensor.itemsize <= room else None


def _columns(tensor: _Strided) -> TensorRef | None:
    """Return a matrix as columns of the matrix that it was cut from, or None where it was not."""
    (rows, columns), (row, step) = tensor.shape, tensor.strides
    if not row:
        return None
    first = tensor.start % row
    wanted = range(first, first + (columns - 1) * step + 1, step or 1)
    whole = rows * row * tensor.itemsize
    inside = (tensor.start - first) * tensor.itemsize + whole <= tensor.storage.nbytes
    if not step or wanted[-1] >= row or not inside or whole > _VIEW_CAP:
        return None
    return tensor.block(tensor.start - first, (rows, row)).columns((wanted,))


def _gathered(tensor: _Strided) -> TensorRef:
    """Read a small tensor that lies in another order, such as a convolution saved with its channels last."""
    data = bytearray(_bytes(tensor.span(tensor.start, tensor.reach - tensor.start)))
    whole = torch.frombuffer(data, dtype=getattr(torch, dtypes.torch_name(tensor.dtype)))
    ordered = whole.as_strided(tensor.shape, tensor.strides).contiguous()
    inline = Inline(ordered.reshape(-1).view(torch.uint8).numpy().tobytes())
    return TensorRef(tensor.name, tensor.shape, tensor.dtype, (inline,))
