"""Which tensors of a file hold the same bytes: a file has what is one tensor in memory as often as it is named."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256

from loratool.storage.descriptor import Descriptor, reader
from loratool.storage.ranges import Ranges
from loratool.tensors import Span, TensorRef

_CHUNK = 1 << 20


def first_alike(refs: Iterable[TensorRef]) -> list[TensorRef]:
    """Return for each tensor the first of them that has its shape, dtype and bytes; views are taken as they are."""
    seen: dict[object, TensorRef] = {}
    files: dict[str, Descriptor | Ranges] = {}
    return [ref if ref.view else seen.setdefault((ref.shape, ref.dtype, _digest(ref, files)), ref) for ref in refs]


def _digest(ref: TensorRef, files: dict[str, Descriptor | Ranges]) -> bytes:
    digest = sha256()
    for piece in ref.pieces:
        if isinstance(piece, Span):
            if piece.path not in files:
                files[piece.path] = reader(piece.path)
            for at in range(0, piece.nbytes, _CHUNK):
                part = memoryview(bytearray(min(_CHUNK, piece.nbytes - at)))
                files[piece.path].read_into(part, piece.offset + at)
                digest.update(part)
        else:
            digest.update(piece.data)
    return digest.digest()
