"""SHA-256 of safetensors files and of parts of them, read in pieces.

Image tools know a file by three: that of the whole file (stable-diffusion-webui, Civitai), that of the data behind the
header, which does not change when the metadata does, and an old one of 64 KiB from the second MiB on (sd-scripts,
train_util.precalculate_safetensors_hashes, after sd-webui-additional-networks).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from loratool.errors import StorageError
from loratool.plan import Digest
from loratool.storage import safetensors
from loratool.storage.descriptor import Descriptor, reader
from loratool.storage.ranges import Ranges
from loratool.tensors import TensorInfo

_PIECE = 4 << 20


def fields_of(
    file: Descriptor | Ranges,
    start: int,
    infos: Sequence[TensorInfo],
    metadata: Mapping[str, str],
    digests: Iterable[Digest],
) -> dict[str, str]:
    """Return what the digests of an open file are, whose data begins at `start`."""
    found = {}
    for digest in digests:
        state = sha256()
        if digest.window is None:
            _add(state, file, start, file.size)
        else:
            low, high = digest.window
            header = safetensors.make_header(infos, {k: v for k, v in metadata.items() if k.startswith(digest.prefix)})
            state.update(header[low:high])
            shift = start - len(header)
            _add(state, file, max(low + shift, start), high + shift)
        found[digest.field] = state.hexdigest()[: digest.digits]
    return found


def of_file(path: Path, digests: Iterable[Digest]) -> tuple[str, dict[str, str]]:
    """Return the SHA-256 of a safetensors file, and what its digests should be."""
    header = safetensors.read_header(path)
    file, state = reader(str(path)), sha256()
    try:
        _add(state, file, 0, file.size)
        infos = [ref.info for ref in header.tensors]
        return state.hexdigest(), fields_of(file, len(header.raw), infos, header.metadata, digests)
    except OSError as problem:
        raise StorageError(f"cannot be read: {problem.strerror}", where=path) from None


def _add(state: Any, file: Descriptor | Ranges, start: int, stop: int) -> None:
    """Feed bytes of a file to a hash; a file that ends before is fed as far as it goes."""
    buffer = memoryview(bytearray(_PIECE))
    for at in range(start, min(stop, file.size), _PIECE):
        piece = buffer[: min(stop, file.size) - at]
        file.read_into(piece, at)
        state.update(piece)
