"""A Hugging Face Hub for tests: on loopback, in memory, from the standard library, for the real huggingface_hub.

    from loratool.testing.hub import Hub

    with Hub() as hub:
        hub.create("me/adapter", {"README.md": b"# hi"})
        subprocess.run([...], env={**os.environ, **hub.environment(tmp_path)})
        assert hub.files("me/adapter")["README.md"] == b"# hi"

It keeps repositories with their commits, branches and pull requests, stores large files by LFS or (with `xet`, a
folder) by the xet protocol, answers ranges, checks tokens and digests, and fails on demand: `hub.fail(...)`. Every
request is in `hub.requests`. `loratool.testing.fixtures` has it as a pytest fixture. Only model repositories, and
of the Hub's endpoints those that reading, committing and pull requests need.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha1, sha256
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

TOKEN = "hf_loratool_test_write"
READ_TOKEN = "hf_loratool_test_read"
_LARGE = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".model", ".zip", ".npz")


@dataclass(frozen=True)
class File:
    """A file of a commit: its bytes, and whether they are stored apart (LFS) rather than in git."""

    data: bytes
    large: bool

    @cached_property
    def oid(self) -> str:
        """The SHA-256 of a large file, git's SHA-1 of another."""
        return (
            sha256(self.data).hexdigest() if self.large else sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()
        )


class Commit(NamedTuple):
    """A state of a repository: all its files by path, and what was said of it."""

    oid: str
    files: Mapping[str, File]
    message: str = ""
    parent: str = ""


@dataclass
class Repo:
    """A repository: its commits, and what branches, tags and pull requests (`refs/pr/N`) point to.

    `gated`: everyone sees its list of files, and none but `readers` (tokens) their content.
    """

    commits: dict[str, Commit]
    refs: dict[str, str]
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)

    def at(self, revision: str) -> Commit | None:
        """Return the commit of a branch, tag, pull request or commit id; None where there is none."""
        return self.commits.get(self.refs.get(revision, revision))

    def add(self, ref: str, files: Mapping[str, File], message: str, parent: str) -> Commit:
        """Let a reference point to a new commit."""
        told = repr([(path, file.oid) for path, file in sorted(files.items())]) + message + parent
        oid = sha1(f"{len(self.commits)} {told}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, dict(files), message, parent)
        self.refs[ref] = oid
        return self.commits[oid]


class Request(NamedTuple):
    """A request that arrived: method, path with query, the answer's status (0: none), the body's bytes sent."""

    method: str
    path: str
    status: int
    sent: int


@dataclass
class Fault:
    """What goes wrong with requests that match `pattern` (a regular expression on "METHOD path").

    With a `status` that answer is given instead. Without, the connection is dropped: before the request does anything,
    or, with `lost`, after it took effect; or, with `cut`, after so many bytes of the answer's body.
    """

    pattern: str = ""
    status: int = 0
    times: int = 1
    skip: int = 0
    lost: bool = False
    cut: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def strikes(self, request: str) -> bool:
        """Whether it is this request's turn."""
        if not self.times or not re.search(self.pattern, request):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        return True


class Hub:
    """The server. A context manager: it listens on a free port of 127.0.0.1 until it is left.

    `xet` is a folder, empty at first: with one large files go by the xet protocol, which keeps them there.
    """

    def __init__(self, *, xet: Path | None = None) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.xet = xet
        self.tokens = {TOKEN: "write", READ_TOKEN: "read"}
        self.foreign: set[str] = set()  # namespaces that no token may write to, except by pull requests
        self.lock = threading.RLock()
        self._servers: list[ThreadingHTTPServer] = []
        self._threads: list[threading.Thread] = []

    # -- life ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Hub:
        from loratool.testing.hub_server import handler

        for _ in range(2):  # the Hub, and the store of large files, which is another place to a careful client
            server = ThreadingHTTPServer(("127.0.0.1", 0), handler(self))
            server.daemon_threads = True
            thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
            thread.start()
            self._servers.append(server)
            self._threads.append(thread)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()
        self._servers, self._threads = [], []

    @property
    def url(self) -> str:
        """The address, for HF_ENDPOINT."""
        return self._address("127.0.0.1", 0)

    @property
    def store(self) -> str:
        """The address where large files are fetched from and sent to; no token may go there.

        Another host by name: huggingface_hub before 2.0 does not tell hosts apart by their ports.
        """
        return self._address("localhost", 1)

    def _address(self, host: str, index: int) -> str:
        assert self._servers, "the Hub is not running: use it as a context manager"
        return f"http://{host}:{self._servers[index].server_address[1]}"

    def environment(self, home: Path | str, token: str | None = TOKEN) -> dict[str, str]:
        """Return environment variables that point a new process to this Hub; caches go under `home`.

        huggingface_hub reads them when it is imported: set them before. An empty HF_TOKEN counts as none.
        """
        home = Path(home)
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_TOKEN": token or "",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "0" if self.xet else "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    # -- content ------------------------------------------------------------------------------------------------

    def create(
        self,
        name: str,
        files: Mapping[str, bytes | str] | Path | None = None,
        *,
        private: bool = False,
        gated: bool = False,
        readers: set[str] | None = None,
    ) -> str:
        """Create a repository with one commit of `files` (by path, or those of a folder); return the commit's id."""
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in sorted(files.rglob("*")) if p.is_file()}
        with self.lock:
            repo = Repo({}, {}, private, gated, readers or set())
            self.repos[name] = repo
            first = {"": b""} if files is None else files
            stored = {path: self.stored(path, data) for path, data in first.items() if path}
            return repo.add("main", stored, "initial commit", "").oid

    def commit(self, name: str, files: Mapping[str, bytes | str], ref: str = "main", message: str = "more") -> str:
        """Add a commit with these files to a branch; a new branch starts from main. Return the commit's id."""
        with self.lock:
            repo = self.repos[name]
            before = repo.at(ref) or repo.at("main")
            assert before is not None
            new = {path: self.stored(path, data) for path, data in files.items()}
            return repo.add(ref, {**before.files, **new}, message, before.oid).oid

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """Return the files of a repository by path."""
        commit = self.repos[name].at(revision)
        assert commit is not None, f"{name} has no revision {revision}"
        return {path: file.data for path, file in commit.files.items()}

    def head(self, name: str, revision: str = "main") -> str:
        """Return the commit id that a branch points to."""
        return self.repos[name].refs[revision]

    def stored(self, path: str, data: bytes | str) -> File:
        """Return a file as the Hub keeps it: binaries and what is large as LFS."""
        content = data.encode() if isinstance(data, str) else data
        return File(content, self.is_large(path, len(content), content[:512]))

    @staticmethod
    def is_large(path: str, size: int, sample: bytes) -> bool:
        """Whether a file goes to LFS: by its name, its size, or because it is no text."""
        return size > 0 and (path.endswith(_LARGE) or size > 10 << 20 or b"\0" in sample)

    # -- faults -------------------------------------------------------------------------------------------------

    def fail(
        self,
        pattern: str = "",
        status: int = 0,
        *,
        times: int = 1,
        skip: int = 0,
        lost: bool = False,
        cut: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Fault:
        """Let requests fail: see Fault. `times` of them, after `skip` that match and pass."""
        fault = Fault(pattern, status, times, skip, lost, cut, headers or {})
        self.faults.append(fault)
        return fault

    def fault_for(self, request: str) -> Fault | None:
        """Return what is to go wrong with a request, if anything is."""
        with self.lock:
            return next((fault for fault in self.faults if fault.strikes(request)), None)

    @contextmanager
    def counted(self) -> Iterator[list[Request]]:
        """Collect the requests that arrive inside the block."""
        before, during = len(self.requests), list[Request]()
        yield during
        during += self.requests[before:]
