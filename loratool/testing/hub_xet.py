"""Large files that come and go by the xet protocol: hf_xet keeps them in a local folder, by a hash of its own.

A commit names a file by its SHA-256 alone. The shards that hf_xet wrote say which xet hash belongs to it: they start
with a header of 48 bytes; of each file there is its hash (32 bytes), flags and a count (4 bytes each, 48 in all), so
many segments of 48 bytes, as many again where bit 31 of the flags says so (their verification), and, by bit 30, its
SHA-256 in 48 bytes more. Hashes are four little-endian words (xet-core, the format of MDB shards).
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loratool.testing.hub import Hub

_BLOCK = 48
_VERIFIED, _DIGESTED = 1 << 31, 1 << 30
_LATE = 1 << 33  # when the token ends, in seconds since 1970


def _spelled(raw: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


def _files(shard: bytes) -> Iterator[tuple[str, str]]:
    """Yield (xet hash, SHA-256) of the files that a shard describes."""
    at = _BLOCK
    while at + _BLOCK <= len(shard) and shard[at : at + 32] != b"\xff" * 32:
        flags, count = struct.unpack_from("<2I", shard, at + 32)
        end = at + _BLOCK * (1 + count * (2 if flags & _VERIFIED else 1))
        if flags & _DIGESTED:
            yield _spelled(shard[at : at + 32]), _spelled(shard[end : end + 32])
            end += _BLOCK
        at = end


def content_of(hub: Hub, oid: str) -> bytes | None:
    """Return the bytes that were uploaded by xet under this SHA-256; None where there are none."""
    assert hub.xet is not None
    xet_hash = _known(hub.xet).get(oid)
    if xet_hash is None:
        return None
    from hf_xet import XetFileInfo, XetSession

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "file")
        with XetSession().new_file_download_group(
            endpoint=_address(hub.xet), token="xet", token_expiry_unix_secs=_LATE
        ) as group:
            group.start_download_file(XetFileInfo(xet_hash), str(target))
        return target.read_bytes()


def hash_of(hub: Hub, oid: str, data: bytes) -> str:
    """Return the xet hash of a file with this SHA-256; its bytes go to the folder if they are not there yet."""
    assert hub.xet is not None
    if oid not in _known(hub.xet):
        from hf_xet import XetSession

        with XetSession().new_upload_commit(
            endpoint=_address(hub.xet), token="xet", token_expiry_unix_secs=_LATE
        ) as commit:
            commit.start_upload_bytes(data, sha256=oid)
    return _known(hub.xet)[oid]


def _known(store: Path) -> dict[str, str]:
    """Return the xet hashes of all files that are in the folder, by SHA-256."""
    shards = [shard.read_bytes() for shard in store.rglob("shards/*.mdb")]
    return {digest: xet_hash for shard in shards for xet_hash, digest in _files(shard)}


def _address(store: Path) -> str:
    return f"local://{store}"
