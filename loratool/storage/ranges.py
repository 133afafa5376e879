"""A file on the Hub that is read where it lies, in pieces, and kept nowhere: what `--stream` reads weights with.

The Hub answers with the address where the bytes of a large file are, signed for a while. It is asked once a file, and
again when that address is no longer accepted, so that a checkpoint costs the Hub a request a shard, not one a piece. A
connection that breaks is taken up at the byte where it broke. Every address names a commit, what the Hub says of it is
held against the file's SHA-256, and every answer against the range that was asked for; the bytes themselves cannot be
held against a SHA-256 where only parts of a file are read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from importlib import import_module
from typing import Any

from loratool.errors import HubError
from loratool.storage import hub
from loratool.storage.hub_names import HubName

_PIECE = 8 << 20  # bytes of a request: enough for the way to and fro not to matter
_AT_ONCE = 8  # requests
WINDOW = 64 << 20  # bytes that keep them all busy
_BLOCK = 4 << 20  # bytes that are fetched together for small tensors, which lie side by side
_FAILURES = 15  # in a row, without a byte arriving: five minutes
_OVER = (400, 401, 403, 404, 410)  # what a store says of an address whose time is over
_REFUSALS = 3  # in a row: of addresses that have only just been given

#: One of all files, and only where there is one.
_pool: list[ThreadPoolExecutor] = []
_lock = threading.Lock()


class Ranges:
    """A file in a repository, at a commit; threads may share it."""

    def __init__(self, name: HubName, file: hub.RemoteFile) -> None:
        self.name, self.size, self.sha256 = name, file.size, file.sha256
        self._address = ""
        self._lock = threading.Lock()
        self._fetching = [threading.Lock() for _ in range(_AT_ONCE)]  # of blocks

    def read_into(self, view: memoryview, offset: int, arrived: Callable[[int], object] = lambda nbytes: None) -> None:
        """Fill `view` with the bytes from `offset` on; `arrived` is told how many came, by several threads."""
        if offset + len(view) > self.size:
            raise HubError(f"the file has {self.size:,} bytes", where=self.name)
        if len(view) < _BLOCK:
            self._copy_blocks(view, offset)
            arrived(len(view))
            return
        left = threading.Event()
        starts = range(0, len(view), _PIECE)
        asked = [_workers().submit(self._fill, view[n : n + _PIECE], offset + n, arrived, left) for n in starts]
        try:
            for one in asked:
                one.result()
        except BaseException:
            left.set()
            for one in asked:
                one.cancel()
            wait(asked)  # none writes into a view that its owner has back
            raise

    def _copy_blocks(self, view: memoryview, offset: int) -> None:
        """Fill a small view from the one or two blocks that it lies in, which are kept for its neighbours."""
        done = 0
        while done < len(view):
            number, start = divmod(offset + done, _BLOCK)
            with self._fetching[number % _AT_ONCE]:  # two threads do not ask for the same one
                part = _block(self, number)[start : start + len(view) - done]
            view[done : done + len(part)] = part
            done += len(part)

    def block(self, number: int) -> bytes:
        """Return the bytes of one block; the last one is shorter."""
        data = bytearray(min(_BLOCK, self.size - number * _BLOCK))
        self._fill(memoryview(data), number * _BLOCK, lambda nbytes: None, threading.Event())
        return bytes(data)

    def _fill(self, view: memoryview, offset: int, arrived: Callable[[int], object], left: threading.Event) -> None:
        """Fill a piece, however often the connection breaks, if bytes arrive in between; unless the caller has left."""
        done = failures = 0
        while done < len(view) and not left.is_set():
            before, address = done, ""
            try:
                with hub.problems(self.name):
                    address = self._where()
                    for chunk in self._answer(address, offset + done, offset + len(view)):
                        view[done : done + len(chunk)] = chunk
                        done += len(chunk)
                        arrived(len(chunk))
                        if left.is_set():
                            return
            except HubError as problem:
                failures = failures + 1 if done == before else 0
                over = bool(address) and problem.status in _OVER and not hub.is_own(address)
                if over and failures > _REFUSALS:
                    what = f"the store of its large files refuses ({problem.status})"
                    raise HubError(what, where=self.name, hint="does a proxy or a firewall keep it away?") from None
                busy = problem.status in (408, 429) or problem.status >= 500
                if failures > _FAILURES or not (over or busy or problem.missing == "connection"):
                    raise
                if over or failures:
                    self._forget(address)
                if failures:
                    _pause(left, min(2.0**failures / 4, 30))

    def _answer(self, address: str, start: int, stop: int) -> Iterator[bytes]:
        """Ask for a range, and yield what arrives of it."""
        utils: Any = import_module("huggingface_hub.utils")
        headers = hub.headers(address) | {"Range": f"bytes={start}-{stop - 1}"}
        with utils.http_stream_backoff("GET", address, headers=headers, timeout=30, retry_on_exceptions=()) as answer:
            utils.hf_raise_for_status(answer)
            told = answer.headers.get("Content-Range", "")
            if answer.status_code != 206 or told not in [f"bytes {start}-{stop - 1}/{n}" for n in (self.size, "*")]:
                raise HubError("the Hub does not send parts of this file", where=self.name, hint="without --stream")
            for chunk in answer.iter_bytes():
                if len(chunk) > stop - start:
                    raise HubError("the Hub sends more than was asked for", where=self.name, hint="run it again")
                yield chunk
                start += len(chunk)
        if start < stop:
            raise ConnectionError("it ended early")

    def _where(self) -> str:
        """Return the address of the bytes."""
        with self._lock:
            if not self._address:
                self._address = self._asked(hub.address_of(self.name))
            return self._address

    def _forget(self, address: str) -> None:
        """Ask for the address again: its time may be over."""
        with self._lock:
            if self._address == address:
                self._address = ""

    def _asked(self, own: str) -> str:
        """Ask the Hub where the bytes are."""
        from huggingface_hub import get_hf_file_metadata

        told = get_hf_file_metadata(own, token=hub.token(), endpoint=hub.endpoint())
        etag = told.etag or ""  # a SHA-256 at the Hub; a mirror may have words of its own
        if told.size not in (None, self.size) or (self.sha256 and len(etag) == 64 and etag != self.sha256):
            raise HubError("this is another file than it was", where=self.name, hint="run it again")
        return told.location


_block = lru_cache(16)(Ranges.block)  # of all files


def _workers() -> ThreadPoolExecutor:
    with _lock:
        if not _pool:
            _pool.append(ThreadPoolExecutor(_AT_ONCE, "loratool-hub"))
        return _pool[0]


def _pause(left: threading.Event, seconds: float) -> None:
    left.wait(seconds)


def bar(title: str, nbytes: int) -> Any:
    """Return a progress bar as downloads have it, a context manager with `update(bytes)`."""
    utils: Any = import_module("huggingface_hub.utils")
    name = "huggingface_hub.http_get"
    return utils.tqdm(total=nbytes, desc=title[:40], unit="B", unit_scale=True, name=name, disable=not hub.shows_bars)
