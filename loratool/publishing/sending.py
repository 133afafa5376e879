"""Sending files to a repository on the Hub: all in one commit on top of the state that was looked at, or nothing.

Blobs go first and the commit last, so a branch has the old state or the new one whatever breaks. What is there already
is not sent again: running the same command again goes on where it was.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from hashlib import sha1, sha256
from pathlib import Path
from typing import Any, NamedTuple

from loratool.adapter import Finding
from loratool.errors import HubError, StorageError, UsageError
from loratool.plan import RECORD, Report
from loratool.settings import Publishing
from loratool.storage import hub, location, runs
from loratool.storage.checkpoint import is_inside
from loratool.storage.descriptor import Descriptor
from loratool.storage.hub_names import HubName, parse

_PIECE = 4 << 20
_WEIGHTS = (".safetensors", ".bin")
#: What loratool keeps about a run; its paths are nobody's business.
PRIVATE = (RECORD,)


class Target(NamedTuple):
    """A repository as it is: its name with branch and path, and its files at the commit; none where it is not there."""

    name: HubName
    listing: hub.Listing | None

    @property
    def files(self) -> Mapping[str, hub.RemoteFile]:
        """The files that are there, by path."""
        return self.listing.files if self.listing else {}

    def text(self, path: str) -> str:
        """Return a text file that is there; empty where it is not."""
        if self.listing is None or not self.files.get(path) or not self.files[path].size:
            return ""
        if self.files[path].size > _PIECE:
            raise HubError(f"{path} of {self.files[path].size:,} bytes is no text", where=self.name)
        name = self.name._replace(revision=self.listing.commit, path=path)
        try:
            return hub.read(name, 0, self.files[path].size).decode("utf-8")
        except UnicodeDecodeError:
            raise HubError(
                f"{path} is not UTF-8", where=self.name, hint="save it as UTF-8 there, or remove it"
            ) from None


def target(repo: str, publishing: Publishing) -> Target:
    """Look at the repository that a name means; UsageError where it is no name, HubError where it cannot be asked."""
    name = parse(repo)
    if name is None:
        raise UsageError(f"{repo!r} is no name of a repository", hint="loratool push PATH org/name")
    if publishing.revision:
        name = name._replace(revision=publishing.revision)
    if "/" not in name.repo:
        raise UsageError("whose is it to be?", where=name, hint=f"a repository is called org/name: ORG/{name.repo}")
    if name.is_commit:
        raise UsageError("a commit cannot be written to", where=name, hint="name a branch, or leave it out for main")
    location.warn_of_open_endpoint()
    if hub.is_offline():
        raise HubError("HF_HUB_OFFLINE is set", where=name, hint="run it again with HF_HUB_OFFLINE=0")
    if not (publishing.dry_run or hub.has_token()):
        raise HubError("without a token nothing can be sent", where=name, hint=hub.LOGIN)
    try:
        listing = hub.listing(name, writing=True)
        if publishing.private and listing.private is False:
            hint = f"leave it out; {hub.shown_endpoint()}/{name.repo}/settings makes it private"
            raise HubError("--private is for a new repository: this one is there, and public", where=name, hint=hint)
        return Target(name, listing)
    except HubError as problem:
        if problem.missing != "repository" or not hub.has_token():
            raise
    if name.revision not in ("", "main"):
        what = f"there is no repository that is called so, and a new one has no branch {name.revision!r}"
        raise HubError(what, where=name.repo, hint="leave the branch out: a new repository has main alone")
    return Target(name, None)


def command(path: Path, to: Target, publishing: Publishing) -> str:
    """Return the command that sends a path to where it was to go."""
    flags = {"--private": publishing.private, "--create-pr": publishing.create_pr}
    given = {"--message": publishing.message, "--license": publishing.licence}
    options = [word for option, text in given.items() if text for word in (option, text)]
    words = ["loratool", "push", str(path), str(to.name), *(flag for flag, on in flags.items() if on), *options]
    return hub.without_tokens(shlex.join(words))


def files_in(paths: Sequence[str]) -> tuple[dict[str, Path], list[Finding]]:
    """Return the files to send by their path in the repository, and findings on those that stay here."""
    files: dict[str, Path] = {}
    left: list[str] = []
    for text in paths:
        root = Path(text)
        if not root.exists():
            raise StorageError("no such file or folder", where=text, hint="push sends local files")
        within = (p for p in root.rglob("*") if p.is_file() or p.is_symlink())
        for path in sorted(within) if root.is_dir() else [root]:
            inside = path.relative_to(root if root.is_dir() else root.parent).as_posix()
            hidden = any(part.startswith(".") for part in Path(inside).parts)
            if hidden or runs.is_state(path.name) or path.name in PRIVATE:
                left.append(inside)
            elif not path.is_file():
                raise UsageError("this is a link to no file", where=path, hint="push what it names, or remove the link")
            elif root.is_dir() and not is_inside(path, root):
                raise UsageError("this is a link that leads out of the folder", where=path, hint="push what it names")
            elif files.setdefault(inside, path) != path:
                raise UsageError(f"two of the files would be called {inside!r}", where=text, hint="push them apart")
    if not files:
        raise StorageError("there are no files to send", where=", ".join(paths))
    what = f"not sent: {', '.join(left[:8])}{f' and {len(left) - 8} more' if len(left) > 8 else ''}"
    return files, [Finding("info", paths[0], what)] if left else []


def as_named(to: Target, files: dict[str, Path]) -> tuple[Target, dict[str, Path]]:
    """Return target and files; where one file is sent to the address of a file: its folder, and the name there."""
    folder, _, name = to.name.path.rpartition("/")
    if not name.endswith(_WEIGHTS):
        return to, files
    if len(files) != 1:
        raise UsageError("this is the address of one file", where=to.name, hint=f"hf://{to.name.repo}/FOLDER")
    only = next(iter(files))
    if Path(only).suffix != Path(name).suffix:
        raise UsageError(f"{only} would be called {name}, which is another format", where=to.name, hint="convert it")
    return to._replace(name=to.name._replace(path=folder)), dict(zip([name], files.values(), strict=True))


def send(
    to: Target, files: Mapping[str, Path | bytes], publishing: Publishing, report: Report, verb: str = "push"
) -> Report:
    """Send files, or with a dry run say what would be sent; `report` gets rows, totals and findings."""
    start = f"{to.name.path}/" if to.name.path else ""
    placed = {start + name: content for name, content in files.items()}
    states = {name: _state(name, content, to.files) for name, content in placed.items()}
    report.rows = [{"file": n, "bytes": _size(c), "state": states[n]} for n, c in placed.items()]
    changed = {name: placed[name] for name, state in states.items() if state != "same"}
    new = {name for name, state in states.items() if state in ("new", "changed")}
    report.out = f"hf://{to.name}".replace("hf://hf://", "hf://")
    report.totals |= {
        "repository": "there" if to.listing else "will be created" if publishing.dry_run else "created",
        "files": len(placed),
        "unchanged": len(placed) - len(changed),
        "bytes": sum(_size(placed[name]) for name in placed),
        "bytes_to_send": sum(_size(placed[name]) for name in new),
    }
    stale = [n for n in to.files if n.endswith(_WEIGHTS) and n.startswith(start) and n not in placed]
    if stale:
        report.findings.append(Finding("info", str(to.name), f"stays on the Hub as it is: {', '.join(stale[:8])}"))
    if publishing.dry_run:
        report.dry_run = True
    elif not changed and to.listing:
        report.totals |= {"commit": to.listing.commit, "result": "nothing to do: everything is there"}
    else:
        report.totals |= _committed(to, changed, publishing, verb)
        location.forget()
    return report


def replaces_weights(to: Target, files: Mapping[str, Path]) -> bool:
    """Return whether weights that are on the Hub would become others."""
    placed = {f"{to.name.path}/{name}" if to.name.path else name: path for name, path in files.items()}
    there = {name: path for name, path in placed.items() if name.endswith(_WEIGHTS) and name in to.files}
    return any(_state(name, path, to.files) != "same" for name, path in there.items())


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _state(name: str, content: Path | bytes, there: Mapping[str, hub.RemoteFile]) -> str:
    """Return whether a file is new, changed, the same, or its bytes are there under another name."""
    size, remote = _size(content), there.get(name)
    alike = [file for file in there.values() if file.size == size]
    if not alike:
        return "changed" if remote else "new"
    digest, blob = _digests(content)
    if remote and remote.size == size and (remote.sha256 == digest or (not remote.sha256 and remote.blob == blob)):
        return "same"
    if any(file.sha256 == digest for file in alike):
        return "bytes are there"
    return "changed" if remote else "new"


def _digests(content: Path | bytes) -> tuple[str, str]:
    """Return SHA-256 and git's id of a file."""
    whole, blob = sha256(), sha1(b"blob %d\0" % _size(content))
    for piece in _pieces(content):
        whole.update(piece)
        blob.update(piece)
    return whole.hexdigest(), blob.hexdigest()


def _pieces(content: Path | bytes) -> Any:
    if isinstance(content, bytes):
        yield content
        return
    file, at = Descriptor(content, os.O_RDONLY), 0
    while piece := os.pread(file.number, _PIECE, at):
        yield piece
        at += len(piece)


def _committed(to: Target, changed: Mapping[str, Path | bytes], publishing: Publishing, verb: str) -> dict[str, Any]:
    """Create the repository where it is missing, and make one commit; return what came of it."""
    from huggingface_hub import CommitOperationAdd

    api, name = hub.api(), to.name._replace(path="")
    card = changed.get("README.md")
    if to.listing is None and isinstance(card, bytes):
        hub.check_card(name._replace(path="README.md"), card.decode())  # before anything is made
    with hub.problems(name, writing=True):
        parent = to.listing.commit if to.listing else None
        if parent is None:
            api.create_repo(name.repo, private=publishing.private or None, exist_ok=True)
            parent = hub.listing(name._replace(revision="")).commit
        operations = [
            CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
            for path, content in changed.items()
        ]
        try:
            done = api.create_commit(
                name.repo,
                operations,
                commit_message=hub.without_tokens(publishing.message) or f"Upload with loratool {verb}",
                revision=name.revision or None,
                parent_commit=parent,
                create_pr=publishing.create_pr,
            )
        except Exception as problem:
            if publishing.create_pr or hub.was_answered(problem) or not (found := _arrived(name, changed)):
                raise
            return {"commit": found, "result": "the answer was lost; the commit is there"}
    told = {"commit": done.oid, "address": str(done.commit_url)}
    return {**told, "pull_request": str(done.pr_url)} if publishing.create_pr else told


def _arrived(name: HubName, changed: Mapping[str, Path | bytes]) -> str:
    """Return the commit that holds all that was sent, after a connection broke while the answer was awaited."""
    try:
        now = hub.listing(name)
    except HubError:
        return ""
    return now.commit if all(_state(path, content, now.files) == "same" for path, content in changed.items()) else ""
