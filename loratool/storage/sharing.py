"""Which tensors of a file hold the same bytes: a file has what is one tensor in memory as often as it is named."""

from __future__ import annotations

import os
from collections.abc import Iterable
from hashlib import sha256

from loratool.storage.descriptor import Descriptor
from loratool.tensors import Span, TensorRef

_CHUNK = 1 << 20


def first_alike(refs: Iterable[TensorRef]) -> list[TensorRef]:
    """Return for each tensor the first of them that has its shape, dtype and bytes; views are taken as they are."""
    seen: dict[object, TensorRef] = {}
    files: dict[str, Descriptor] = {}
    return [ref if ref.view else seen.setdefault((ref.shape, ref.dtype, _digest(ref, files)), ref) for ref in refs]


def _digest(ref: TensorRef, files: dict[str, Descriptor]) -> bytes:
    digest = sha256()
    for piece in ref.pieces:
        if isinstance(piece, Span):
            if piece.path not in files:
                files[piece.path] = Descriptor(piece.path, os.O_RDONLY)
            for at in range(piece.offset, piece.offset + piece.nbytes, _CHUNK):
                digest.update(os.pread(files[piece.path].number, min(_CHUNK, piece.offset + piece.nbytes - at), at))
        else:
            digest.update(piece.data)
    return digest.digest()
