"""What a source or a target on the Hugging Face Hub is called: `org/name@rev`, `hf://org/name@rev/path`, a web address.

Only words; nothing here looks at a disk or a network. A revision is a branch, a tag, a commit or `refs/pr/N`.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

from loratool.errors import UsageError

_PART = r"(?!-|\.)(?!.*(?:--|\.\.))[\w.-]{1,96}(?<![.-])"
_SHORT = re.compile(rf"(?P<name>{_PART}/{_PART})(?:@(?P<revision>[^@\s]{{1,200}}))?", re.ASCII)
_REPO = re.compile(rf"{_PART}(?:/{_PART})?", re.ASCII)
_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".json", ".py")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubName(NamedTuple):
    """A repository, a revision ("" for the default branch), and a path inside ("" for all of it)."""

    repo: str
    revision: str = ""
    path: str = ""

    def __str__(self) -> str:
        if not self.path:
            return f"{self.repo}@{self.revision}" if self.revision else self.repo
        plain = self.revision.startswith(("refs/pr/", "refs/convert/"))
        revision = self.revision if plain else quote(self.revision, safe="")
        return f"hf://{self.repo}{f'@{revision}' if revision else ''}/{self.path}"

    @property
    def is_commit(self) -> bool:
        """Whether the revision is a commit, which never means anything else."""
        return _COMMIT.fullmatch(self.revision) is not None


def is_address(text: str) -> bool:
    """Whether a text can only be meant as something on the Hub or the web."""
    return text.startswith(("hf://", "http://", "https://"))


def parse(text: str) -> HubName | None:
    """Return what a text names on the Hub, or None where it can only be a path; UsageError for a broken address."""
    if text.startswith("hf://"):
        return _of_uri(text)
    if is_address(text):
        return _of_address(text)
    match = _SHORT.fullmatch(text)
    if match is None or match["name"].endswith(_FILES):
        return None
    return HubName(match["name"], match["revision"] or "")


def _of_uri(text: str) -> HubName:
    """`hf://[models/]org/name[@rev][/path]`; a slash in a revision is written %2F, or it is refs/pr/N."""
    rest = text.removeprefix("hf://").strip("/").removeprefix("models/")
    for kind in ("datasets/", "spaces/", "buckets/"):
        if rest.startswith(kind):
            raise UsageError(f"this is one of the Hub's {kind[:-1]}", where=text, hint="models are hf://org/name")
    before, at, after = rest.partition("@")
    if at:
        pull = re.match(r"refs/(?:pr|convert)/[^/]+", after)
        revision = pull[0] if pull else after.partition("/")[0]
        name, path = before, after[len(revision) :].strip("/")
    else:
        parts = rest.split("/")
        name, path, revision = "/".join(parts[:2]), "/".join(parts[2:]), ""
    return _checked(text, name, unquote(revision), unquote(path))


def _of_address(text: str) -> HubName:
    """The page of a model, of one of its folders or files, or the address that a file is fetched from."""
    parts = urlsplit(text)
    if parts.username or parts.password:
        raise UsageError("an address must hold no name or token", hint="HF_TOKEN, hf auth login or --token-file")
    if parts.query not in ("", "download=true"):  # a token, perhaps: it is not shown
        raise UsageError("an address must hold no query", where=parts.path, hint="leave out what is behind the ?")
    home = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if parts.netloc not in ("huggingface.co", "www.huggingface.co", "hf.co", home.netloc):
        what = f"{parts.netloc} is not the Hub: only models on {home.netloc} are opened by their address"
        raise UsageError(what, hint="download the file, and name its path; another Hub: HF_ENDPOINT")
    words = [unquote(word) for word in parts.path.strip("/").split("/")]
    if words[0] in ("datasets", "spaces", "models", "api", "docs", ""):
        raise UsageError("this is no page of a model", where=parts.path or "/", hint="https://huggingface.co/ORG/NAME")
    kind = next((n for n in (1, 2) if len(words) > n and words[n] in ("tree", "blob", "resolve", "raw")), 0)
    if not kind:
        return _checked(parts.path, "/".join(words[:2]), "", "")
    rest = words[kind + 1 :]
    pulled = rest[:2] in (["refs", "pr"], ["refs", "convert"])
    revision, path = ("/".join(rest[:3]), rest[3:]) if pulled else (rest[0] if rest else "", rest[1:])
    return _checked(parts.path, "/".join(words[:kind]), revision, "/".join(path))


def _checked(text: str, name: str, revision: str, path: str) -> HubName:
    if not _REPO.fullmatch(name):
        raise UsageError(
            f"{name!r} is no name of a repository", where=text, hint="hf://org/name, hf://org/name@rev/path"
        )
    if "@" in text and not revision and text.startswith("hf://"):
        raise UsageError("there is no revision behind the @", where=text)
    if any(part in ("", ".", "..") for part in path.split("/")) and path:
        raise UsageError(f"{path!r} is no path in a repository", where=text)
    return HubName(name, revision, path)
