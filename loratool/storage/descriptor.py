"""An open file that threads share: its number is given back when the last of them has let go of it.

A run that is interrupted does not wait for its workers. Were the number closed under a worker, the kernel could hand it
to the next file that anybody opens, and the worker would read or write there.
"""

from __future__ import annotations

import os
from pathlib import Path

from loratool.storage import location


class Descriptor:
    """Opens a file. Whoever uses `number` holds the object meanwhile; the last to drop it closes the file."""

    def __init__(self, path: str | Path, flags: int, mode: int = 0o600) -> None:
        self.number = -1  # for __del__, where opening fails
        location.fetch([str(path)])
        self.number = os.open(path, flags, mode)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)
