"""JSON files: read strictly and under caps (bytes), written as the Hugging Face libraries write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loratool.errors import FormatError, StorageError
from loratool.storage import remote
from loratool.strictjson import parse

CONFIG_CAP = 10 << 20
INDEX_CAP = 64 << 20


def read(path: Path, cap: int = CONFIG_CAP) -> dict[str, Any]:
    """Read and parse a JSON file of at most `cap` bytes."""
    try:
        if remote.size(path) > cap:
            raise FormatError(f"{remote.size(path):,} bytes is beyond the cap of {cap:,}", where=path)
        remote.fetch_small(path)
        return parse(path.read_bytes(), path)
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror}", where=path) from None


def dump(content: object) -> bytes:
    """Serialise as the Hugging Face libraries do: indented, fields sorted, one newline at the end.

    Only the fields of the outermost object: in rank_pattern and alpha_pattern the first key that matches wins.
    """
    if isinstance(content, dict):
        content = dict(sorted(content.items()))
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()
