"""TensorRef -> torch.Tensor by positioned reads, and a tensor's bytes for positioned writes.

No mmap: pages of a mapped file count as this process's memory, fault one by one, and a file that shrinks kills the
process. File descriptors are kept open for the run and shared by threads (pread has no position).
"""

from __future__ import annotations

import threading
from math import prod
from types import TracebackType

import torch

from loratool import dtypes
from loratool.algebra import quantisation
from loratool.encodings import Transposed4Bit
from loratool.errors import InputError, StorageError
from loratool.storage.descriptor import Descriptor, reader
from loratool.storage.ranges import Ranges
from loratool.tensors import Inline, TensorRef, View


class Loader:
    """Reads references onto one device. Use as a context manager; callable as the `load` of plan.Unit."""

    KEPT = 256 << 20  # bytes of tensors that stay in memory while columns of them are wanted one after another

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self._files: dict[str, Descriptor | Ranges] = {}
        self._closed = False
        self._kept: dict[object, torch.Tensor] = {}
        self._lock = threading.Lock()

    def __call__(self, ref: TensorRef, into: torch.Tensor | None = None) -> torch.Tensor:
        """Read a tensor in its stored dtype and shape, into the contiguous CPU tensor `into` where one is given.

        For a GPU it is read into pinned memory, and copied while the caller goes on: torch uses that memory again only
        when the copy is done. `into` would be used again at once, so it stays as it is.
        """
        if self.device.type == "cpu":
            return self._in_memory(ref, into)
        return self._in_memory(ref).to(self.device, non_blocking=True)

    def _in_memory(self, ref: TensorRef, into: torch.Tensor | None = None) -> torch.Tensor:
        """Read a tensor into main memory. What is rearranged is rearranged there, and may be shared by all workers."""
        if ref.view is not None:
            return self._rearranged(ref, ref.view, into)
        dtype = getattr(torch, dtypes.torch_name(ref.dtype))
        pinned = self.device.type == "cuda"
        tensor = torch.empty(ref.shape, dtype=dtype, pin_memory=pinned) if into is None else into
        if ref.nbytes:
            view = as_bytes(tensor)
            at = 0
            for piece in ref.pieces:
                if isinstance(piece, Inline):
                    view[at : at + piece.nbytes] = piece.data
                else:
                    self._read(piece.path, piece.offset, view[at : at + piece.nbytes])
                at += piece.nbytes
        return tensor

    def _rearranged(self, ref: TensorRef, view: View, into: torch.Tensor | None) -> torch.Tensor:
        """Read what a view is of, and arrange it."""
        match view.kind:
            case "quantised":
                result = self._decoded(ref, view)
            case "joined":
                result = torch.cat([self._in_memory(part) for part in view.of])
            case "woven":
                result = torch.stack([self._in_memory(part) for part in view.of], dim=-1).flatten(1)
            case "padded":
                inner, before = self._in_memory(view.of[0]), len(view.ranges[0])
                result = torch.nn.functional.pad(inner, (before, ref.shape[1] - inner.shape[1] - before))
            case "rows":
                whole = self._whole(view.of[0])
                result = torch.cat([whole[r.start : r.stop : r.step] for r in view.ranges])
            case "scaled":
                result = _scaled(self._in_memory(view.of[0]), view)
            case "transposed":
                result = self._whole(view.of[0]).T
            case _:
                whole = self._whole(view.of[0])
                result = torch.cat([whole[:, r.start : r.stop : r.step] for r in view.ranges], dim=1)
        result = result.reshape(ref.shape)
        return result.contiguous() if into is None else into.copy_(result)

    def _decoded(self, ref: TensorRef, view: View) -> torch.Tensor:
        """Read codes and scales, and decode them. Of a transposed matrix every tile needs all rows: they are kept."""
        assert view.encoding
        again = isinstance(view.encoding, Transposed4Bit)
        stored = [self._whole(part) if again else self._in_memory(part) for part in view.of]
        dtype = getattr(torch, dtypes.torch_name(ref.dtype))
        return quantisation.decode(view.encoding, stored, prod(ref.shape), dtype)

    def _whole(self, ref: TensorRef) -> torch.Tensor:
        """Read a tensor and keep it for a while: the experts of a stack are columns of one."""
        key = (ref.pieces, ref.shape, ref.dtype) if ref.view is None and ref.nbytes <= self.KEPT else None
        with self._lock:
            found = self._kept.get(key) if key else None
        if found is None:
            found = self._in_memory(ref)
            if key:
                with self._lock:
                    while self._kept and sum(t.nbytes for t in self._kept.values()) + found.nbytes > self.KEPT:
                        self._kept.pop(next(iter(self._kept)))
                    self._kept[key] = found
        return found

    def _read(self, path: str, offset: int, view: memoryview) -> None:
        with self._lock:
            if self._closed:
                raise StorageError("the run that wanted this file has ended", where=path)
            if path not in self._files:
                self._files[path] = reader(path)
            file = self._files[path]
        file.read_into(view, offset)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._closed = True  # a worker that comes late must not open files that nobody will close
            self._files.clear()
            self._kept.clear()


def _scaled(inner: torch.Tensor, view: View) -> torch.Tensor:
    """Return a tensor times a factor, rounded once to its dtype; InputError where that has no such number."""
    result = (inner.to(torch.promote_types(inner.dtype, torch.float32)) * view.factor).to(inner.dtype)
    if not result.isfinite().all() and inner.isfinite().all():
        dtype = str(inner.dtype).removeprefix("torch.")
        hint = "loratool resize --energy 1 --dtype float32 folds the scalings in"
        raise InputError(f"times {view.factor:g} it is beyond {dtype}", where=view.of[0].name, hint=hint)
    return result


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the raw bytes of a tensor, copied from the device where there is one."""
    flat = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
    view: memoryview = flat.numpy().data
    return view
