"""An open file that threads share: its number is given back when the last of them has let go of it.

A run that is interrupted does not wait for its workers. Were the number closed under a worker, the kernel could hand it
to the next file that anybody opens, and the worker would read or write there.
"""

from __future__ import annotations

import os
from pathlib import Path

from loratool.errors import StorageError
from loratool.storage import remote
from loratool.storage.ranges import Ranges


class Descriptor:
    """Opens a file. Whoever uses `number` holds the object meanwhile; the last to drop it closes the file."""

    def __init__(self, path: str | Path, flags: int, mode: int = 0o600) -> None:
        self.path, self.number = str(path), -1  # for __del__, where opening fails
        remote.fetch_whole(Path(path))
        self.number = os.open(path, flags, mode)

    @property
    def size(self) -> int:
        """The size of the file in bytes."""
        return os.fstat(self.number).st_size

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes from `offset` on."""
        done = 0
        while done < len(view):
            got = os.preadv(self.number, [view[done:]], offset + done)
            if not got:
                what = f"the file ends at byte {offset + done:,}: was it changed?"
                raise StorageError(what, where=self.path)
            done += got

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


def reader(path: str) -> Descriptor | Ranges:
    """Open what is read at positions: a file, or one that a streaming run left on the Hub."""
    found = remote.ranges(path)  # first: the threads of a run do not know that it streams
    if found is None:
        remote.fetch([path])
        found = remote.ranges(path)
    return found or Descriptor(path, os.O_RDONLY)
