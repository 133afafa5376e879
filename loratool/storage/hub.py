"""Requests to the Hugging Face Hub, through huggingface_hub, which is imported when the first one is made.

What goes wrong leaves as a HubError that says what to do. The token is huggingface_hub's (HF_TOKEN, hf auth login) or
that of a file; it is in no message: each is searched for it, and foreign tracebacks are not chained.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import escape
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlsplit

from loratool.errors import HubError, LoratoolError, StorageError, UsageError
from loratool.storage.hub_names import HubName

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_SMALL = 1 << 20  # bytes of a config
_TOKEN = 8  # characters: what is shorter is no token, and may be a word of a card
_RETRIES = 2  # of a question; huggingface_hub has its own number for what it sends
LOGIN = "log in: HF_TOKEN, hf auth login, or --token-file FILE"
_AGAIN = "run it again: what has arrived is not sent again"
_token: list[str] = []

_hidden: list[Any] = []  # huggingface_hub.utils, while its progress bars are hidden by us

#: Whether transfers show progress bars.
shows_bars = True


class RemoteFile(NamedTuple):
    """A file in a repository: its size in bytes, its SHA-256 where it is stored apart (LFS, xet), and git's id."""

    size: int
    sha256: str = ""
    blob: str = ""


class Listing(NamedTuple):
    """A repository at a commit: its files by path, and whether others cannot see it, where the Hub says so."""

    commit: str
    files: Mapping[str, RemoteFile]
    private: bool | None = None


def use_token_of(file: Path) -> None:
    """Use the token in a file for all requests of this process."""
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as problem:
        raise StorageError(f"the token cannot be read: {type(problem).__name__}", where=file) from None
    if not re.fullmatch(r"[!-~]{1,400}", text):
        raise UsageError("this is not a file with one token", where=file)
    _token[:] = [text]


@contextmanager
def without_bars() -> Iterator[None]:
    """Show no progress bars of transfers inside the block."""
    global shows_bars  # noqa: PLW0603
    shows_bars = False
    try:
        yield
    finally:
        shows_bars = True
        while _hidden:
            _hidden.pop().enable_progress_bars()


def _hide_bars() -> None:
    """Let huggingface_hub show no progress bars, where we show none and nobody has decided that already."""
    if shows_bars:
        return
    from huggingface_hub import constants

    utils: Any = import_module("huggingface_hub.utils")
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not utils.are_progress_bars_disabled():
        utils.disable_progress_bars()
        _hidden.append(utils)


def token() -> str | None:
    """Return the token of --token-file, or None: huggingface_hub finds its own."""
    return _token[0] if _token else None


def endpoint() -> str:
    """Return the address of the Hub."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def shown_endpoint() -> str:
    """Return the address of the Hub as messages may have it: less a name and a password in it."""
    return re.sub(r"(?<=://)[^/@]*@", "", endpoint())


def is_open() -> bool:
    """Whether what is sent to the Hub, tokens included, can be read on the way: neither https nor this machine."""
    parts = urlsplit(endpoint())
    return parts.scheme != "https" and parts.hostname not in ("127.0.0.1", "localhost", "::1")


def is_offline() -> bool:
    """Whether the user forbade requests (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def api() -> HfApi:
    """Return huggingface_hub's client."""
    from huggingface_hub import HfApi

    from loratool import __version__

    return HfApi(endpoint=endpoint(), token=token(), library_name="loratool", library_version=__version__)


def listing(name: HubName, *, writing: bool = False) -> Listing:
    """Return the commit that a revision means now, and the files there: one request.

    `writing`: errors speak to somebody who wants to send something there.
    """
    path = f"{endpoint()}/api/models/{name.repo}/revision/{quote(name.revision or 'main', safe='')}"
    with problems(name, writing=writing):
        told = json.loads(_get(f"{path}?blobs=true").content)
        files = {f["rfilename"]: _remote_file(f) for f in told["siblings"]}
        return Listing(str(told["sha"]), files, told.get("private"))


def _remote_file(told: Mapping[str, Any]) -> RemoteFile:
    return RemoteFile(int(told["size"]), (told.get("lfs") or {}).get("sha256", ""), told.get("blobId") or "")


def has_token() -> bool:
    """Whether requests say who is asking."""
    from huggingface_hub import get_token

    return bool(token() or get_token())


def was_answered(problem: Exception) -> bool:
    """Whether the Hub itself said no, rather than the connection broke."""
    return getattr(problem, "response", None) is not None


def read(name: HubName, start: int, stop: int) -> bytes:
    """Return the bytes of a file from `start` to `stop`: one request, and perhaps its redirection."""
    with problems(name):
        answer = _get(address_of(name), {"Range": f"bytes={start}-{stop - 1}"})
        data: bytes = answer.content if answer.status_code == 206 else answer.content[start:stop]
    if len(data) != stop - start:
        raise HubError(f"the Hub sent {len(data):,} bytes of {stop - start:,}", where=name, hint="run it again")
    return data


def read_small(name: HubName) -> bytes:
    """Return a config of which nothing is known but its name, or the beginning of what is no config.

    One request, which is not repeated.
    """
    once: dict[str, Any] = {"retry_on_exceptions": (), "retry_on_status_codes": ()}
    with problems(name):
        told = _asked("GET", address_of(name), {"Range": f"bytes=0-{_SMALL - 1}"}, **once)
        return bytes(told.content[:_SMALL])


class _Scrubbing(logging.Filter):
    """Keeps tokens, passwords and signatures out of what huggingface_hub logs of the requests that it repeats."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = _scrubbed(record.getMessage()), ()
        return True


def _scrub_logs() -> None:
    """Let huggingface_hub's log of its requests be as our own messages are."""
    for module in ("utils._http", "file_download"):
        log = logging.getLogger(f"huggingface_hub.{module}")
        if not any(isinstance(one, _Scrubbing) for one in log.filters):
            log.addFilter(_Scrubbing())


def check_card(name: HubName, text: str) -> None:
    """Ask the Hub whether it will take a model card: HubError where it says no."""
    try:
        with problems(name, writing=True):
            _asked("POST", f"{endpoint()}/api/validate-yaml", json={"content": text, "repoType": "model"})
    except HubError as problem:
        if problem.status == 400:
            problem.hint = "correct the metadata of README.md, and run it again; nothing was sent"
        raise


def _get(address: str, more: Mapping[str, str] | None = None) -> Any:
    return _asked("GET", address, more)


def _asked(method: str, address: str, more: Mapping[str, str] | None = None, **how: Any) -> Any:
    utils: Any = import_module("huggingface_hub.utils")
    asked = {**headers(address), **(more or {})}
    answer = utils.http_backoff(method, address, headers=asked, timeout=30, max_retries=_RETRIES, **how)
    utils.hf_raise_for_status(answer)
    return answer


def address_of(name: HubName) -> str:
    """Return the address at which the Hub tells of a file of a commit, or of where its bytes are."""
    return f"{endpoint()}/{name.repo}/resolve/{quote(name.revision, safe='')}/{quote(name.path)}"


def is_own(address: str) -> bool:
    """Whether an address is the Hub's own, rather than that of a store of large files."""
    one, other = urlsplit(address), urlsplit(endpoint())
    return (one.scheme, one.hostname, one.port) == (other.scheme, other.hostname, other.port)


def headers(address: str) -> dict[str, str]:
    """Return the headers of a request; the token goes to the Hub alone."""
    from loratool import __version__

    utils: Any = import_module("huggingface_hub.utils")
    who = token() if is_own(address) else False
    told = utils.build_hf_headers(token=who, library_name="loratool", library_version=__version__)
    return {**told, "Accept-Encoding": "identity"}


def download(name: HubName, paths: Sequence[str]) -> Path:
    """Fetch files of a commit into huggingface_hub's cache, with its progress bars; return the snapshot's folder."""
    import huggingface_hub

    common: dict[str, Any] = {"revision": name.revision, "endpoint": endpoint(), "token": token()}
    common |= {"library_name": "loratool"}
    with problems(name):
        if len(paths) == 1:
            file = huggingface_hub.hf_hub_download(name.repo, paths[0], **common)
            return Path(file.removesuffix(paths[0]))
        patterns = [escape(path) for path in paths]
        return Path(huggingface_hub.snapshot_download(name.repo, allow_patterns=patterns, **common))


def is_cached(name: HubName) -> bool:
    """Whether huggingface_hub's cache has a file of a commit."""
    import huggingface_hub

    return isinstance(huggingface_hub.try_to_load_from_cache(name.repo, name.path, revision=name.revision), str)


def own_folder(name: HubName) -> Path:
    """Return the folder where loratool notes what it was told of a repository."""
    from huggingface_hub import constants

    host = re.sub(r"[^\w.-]", "_", shown_endpoint().partition("://")[2])
    return Path(constants.HF_HOME, "loratool", host, name.repo.replace("/", "--"))


def note_commit(name: HubName, commit: str) -> None:
    """Note what a branch meant, for the time without a connection."""
    if not name.is_commit:
        ref = own_folder(name) / "refs" / quote(name.revision or "main", safe="")
        ref.parent.mkdir(parents=True, exist_ok=True)
        staged = ref.with_name(f".{ref.name}.{os.getpid()}")
        staged.write_text(commit)
        staged.replace(ref)


def cached(name: HubName) -> tuple[str, Path] | None:
    """Return the commit and the folder that huggingface_hub's cache has for a revision, as it was seen last."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE, f"models--{name.repo.replace('/', '--')}")
    revision = quote(name.revision or "main", safe="")
    refs = [own_folder(name) / "refs" / revision, folder / "refs" / revision.replace("%2F", "/")]
    noted = [name.revision] if name.is_commit else [ref.read_text().strip() for ref in refs if ref.is_file()]
    for commit in noted:
        snapshot = folder / "snapshots" / commit
        if re.fullmatch(r"[0-9a-f]{40}", commit) and snapshot.is_dir():
            return commit, snapshot
    return None


@contextmanager
def problems(name: HubName, *, writing: bool = False) -> Iterator[None]:
    """Turn what huggingface_hub raises about a repository into a HubError."""
    _scrub_logs()
    _hide_bars()
    try:
        yield
    except LoratoolError:
        raise
    except Exception as problem:
        error = _explained(problem, name, writing=writing)
        if error is None:
            raise
        raise error from None


def _explained(problem: Exception, name: HubName, *, writing: bool) -> LoratoolError | None:
    """Return what an exception of huggingface_hub, of its HTTP library or of hf_xet means; None for anything else."""
    from huggingface_hub import errors

    causes = [problem]
    while (cause := causes[-1].__cause__) is not None and len(causes) < 8 and isinstance(cause, Exception):
        causes.append(cause)
    offline = next((c for c in causes if isinstance(c, errors.OfflineModeIsEnabled)), None)
    if offline:
        return HubError("HF_HUB_OFFLINE forbids requests", where=name, hint="HF_HUB_OFFLINE=0, or name a local path")
    answered = next((c for c in causes if isinstance(c, errors.HfHubHTTPError) and c.response is not None), None)
    if answered is not None:
        return _of_answer(answered, name, writing=writing)
    told = _scrubbed(str(causes[-1]) or type(causes[-1]).__name__)
    if isinstance(problem, (errors.HFValidationError, json.JSONDecodeError, KeyError, TypeError)):
        return HubError(f"the Hub's answer, or the name, is not understood: {told}", where=name)
    if isinstance(problem, RuntimeError) and "has been closed" in str(problem):  # by a run that lost its connection
        return HubError("the connection was closed meanwhile", where=name, hint="run it again", missing="connection")
    foreign = any(type(c).__module__.partition(".")[0].startswith(("httpx", "requests", "hf_xet")) for c in causes)
    if foreign or isinstance(problem, (errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)):
        hint = _AGAIN if writing else "is there a connection? What is in the cache opens with HF_HUB_OFFLINE=1"
        what = f"the connection to {shown_endpoint()} failed: {told}"
        return HubError(what, where=name, hint=hint, missing="connection")
    if isinstance(problem, (ValueError, RuntimeError)) and not isinstance(problem, OSError):
        return HubError(f"the transfer failed: {told}", where=name, hint=_AGAIN if writing else "run it again")
    return None


def _of_answer(problem: Any, name: HubName, *, writing: bool) -> HubError:
    """Return what an error answer of the Hub means."""
    from huggingface_hub import errors, get_token

    status = problem.response.status_code
    told = _scrubbed(getattr(problem, "server_message", None) or "")
    if isinstance(problem, errors.GatedRepoError):
        what, hint = (
            "access to this model is restricted",
            f"ask for it on {shown_endpoint()}/{name.repo}, then {LOGIN}",
        )
    elif isinstance(problem, errors.RevisionNotFoundError):
        what = f"there is no revision {name.revision or 'main'!r}"
        hint = f"{shown_endpoint()}/{name.repo} lists the branches"
    elif isinstance(problem, errors.EntryNotFoundError):
        what, hint = f"there is no file {name.path!r}" if name.path else "there is no such file", ""
    elif status == 401 and (token() or get_token()) and not isinstance(problem, errors.RepositoryNotFoundError):
        what, hint = "the Hub does not accept this token", LOGIN
    elif isinstance(problem, errors.RepositoryNotFoundError) or status in (401, 404):
        what = "no local path and no repository on the Hub is called so, or it is private"
        what, hint = ("the Hub wants to know who is asking" if writing and status == 401 else what), LOGIN
    elif status == 403:
        what = f"the Hub refuses{f': {told}' if told else ''}"
        hint = "a token that may write there; or --create-pr, which proposes the change" if writing else LOGIN
    elif status in (409, 412):
        what = f"somebody changed the repository meanwhile{f': {told}' if told else ''}"
        hint = "look at what changed, then run it again; or --create-pr, which leaves the branch as it is"
    elif status == 429:
        what, hint = "too many requests: the Hub asks to wait", "wait some minutes; a token (HF_TOKEN) raises the limit"
    elif status >= 500:
        what, hint = f"the Hub has a problem of its own ({status})", _AGAIN if writing else "try again later"
    else:
        what, hint = f"the Hub refuses ({status}){f': {told}' if told else ''}", ""
    missing = "repository" if isinstance(problem, errors.RepositoryNotFoundError) and status == 404 else ""
    missing = "revision" if isinstance(problem, errors.RevisionNotFoundError) else missing
    return HubError(what, where=name, hint=hint, missing=missing, status=status)


def _scrubbed(text: str) -> str:
    """Return foreign text on one line without the token, and without what signs an address."""
    text = re.sub(r"\?[^\s'\"]*", "", " ".join(text.split()))
    text = re.sub(r"(?<=://)[^/\s@]*@", "", text)
    return without_tokens(text)[:300]


def without_tokens(text: str) -> str:
    """Return a text with stars for the token in it."""
    from huggingface_hub import get_token

    for secret in {token(), get_token()} - {None}:
        if len(str(secret)) >= _TOKEN:
            text = text.replace(str(secret), "***")
    return text
