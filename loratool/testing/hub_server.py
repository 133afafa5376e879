"""What the test Hub answers: the endpoints that huggingface_hub calls to read, commit and open pull requests.

Observed of huggingface_hub 2.4 and the Hub's API pages; errors carry the Hub's own codes in X-Error-Code.
"""

from __future__ import annotations

import base64
import json
import re
import socket
import time
from collections.abc import Callable, Mapping
from hashlib import sha256
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from loratool.testing import hub_xet

if TYPE_CHECKING:
    from loratool.testing.hub import Commit, Fault, File, Hub, Repo

_ID = r"(?P<id>[\w.-]+(?:/[\w.-]+)?)"
_NAME = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_][\w.-]{0,94}[A-Za-z0-9_]|[A-Za-z0-9_]")


class Answer(NamedTuple):
    """An answer: status, body (of a HEAD only its length is told), headers."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = {}


class RefusedError(Exception):
    """An error answer."""

    def __init__(self, status: int, code: str = "", message: str = "", **headers: str) -> None:
        super().__init__(message)
        told = {"X-Error-Code": code, "X-Error-Message": message, **headers}
        body = json.dumps({"error": message}).encode()
        self.answer = Answer(status, body, {name: text for name, text in told.items() if text})


def _json(content: object, status: int = 200) -> Answer:
    return Answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    """Return the handler class of a Hub."""
    return type("Handler", (_Handler,), {"hub": hub})


class _Handler(BaseHTTPRequestHandler):
    """One connection. `self.path` is raw; routes see it unquoted where it is a revision or a file."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    timeout = 30
    body: bytes
    query: dict[str, list[str]]

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: requests are in `hub.requests`."""

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            self.body = self._chunks()
        fault = self.hub.fault_for(f"{self.command} {self.path}")
        if fault and not fault.lost and fault.cut is None:
            if not fault.status:
                return self._drop(Answer(0))
            return self._send(Answer(fault.status, b'{"error": "injected"}', fault.headers))
        try:
            answer = self._route()
        except RefusedError as refused:
            answer = refused.answer
        if fault and fault.lost:
            return self._drop(Answer(0))
        return self._send(answer, fault)

    do_GET = do_HEAD = do_POST = do_PUT = _answer  # noqa: N815 - http.server's names

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, answer: Answer, fault: Fault | None = None) -> None:
        body, headers = answer.body, dict(answer.headers)
        cut = fault.cut if fault and fault.cut is not None and fault.cut < len(body) else None
        sent = b"" if self.command == "HEAD" else body[:cut]
        self._note(answer.status, len(sent))
        self.send_response(answer.status)
        headers.setdefault("Content-Length", str(len(body)))
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(sent)
        if cut is not None:
            self._hang_up()

    def _drop(self, answer: Answer) -> None:
        self._note(answer.status, 0)
        self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def _note(self, status: int, sent: int) -> None:
        from loratool.testing.hub import Request

        with self.hub.lock:
            self.hub.requests.append(Request(self.command, self.path, status, sent))

    def _route(self) -> Answer:
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        methods = ("GET", "HEAD") if self.command == "HEAD" else (self.command,)
        for method, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, parts.path) if method in methods else None
            if match:
                with self.hub.lock:
                    return answer(self, **{name: unquote(text or "") for name, text in match.groupdict().items()})
        raise RefusedError(404, "", f"the test Hub has no {self.command} {parts.path}")

    # -- who may do what ----------------------------------------------------------------------------------------

    def _role(self) -> str:
        given = self.headers.get("Authorization", "")
        if not given:
            return ""
        role = self.hub.tokens.get(given.removeprefix("Bearer "), "")
        if not role:
            raise RefusedError(401, "", "Invalid credentials in Authorization header")
        return role

    def _repo(self, name: str) -> Repo:
        repo, role = self.hub.repos.get(name), self._role()
        if repo is None or (repo.private and not role):
            raise RefusedError(404 if role else 401, "RepoNotFound", "Repository not found")
        return repo

    def _at(self, repo: Repo, revision: str) -> Commit:
        commit = repo.at(revision or "main")
        if commit is None:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _writable(self, name: str, *, pull_request: bool = False) -> Repo:
        repo = self._repo(name)
        if not self._role():
            raise RefusedError(401, "", "Invalid username or password.")
        if self._role() != "write":
            raise RefusedError(403, "", "you must use a write token to create or change a repository")
        if not pull_request and self.query.get("create_pr") != ["1"] and name.partition("/")[0] in self.hub.foreign:
            raise RefusedError(403, "", "you have no right to write to this repository")
        return repo

    # -- reading ------------------------------------------------------------------------------------------------

    def whoami(self) -> Answer:
        if not self._role():
            raise RefusedError(401, "", "Invalid username or password.")
        return _json({"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": self._role()}}})

    def info(self, id: str, rev: str = "") -> Answer:
        repo = self._repo(id)
        commit = self._at(repo, rev)
        blobs = self.query.get("blobs") in (["True"], ["true"], ["1"])
        siblings = [_sibling(path, file, blobs=blobs) for path, file in sorted(commit.files.items())]
        told = {"id": id, "modelId": id, "sha": commit.oid, "private": repo.private, "gated": repo.gated and "auto"}
        return _json({**told, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})

    def tree(self, id: str, rev: str, path: str = "") -> Answer:
        commit = self._at(self._repo(id), rev)
        start = f"{path}/" if path else ""
        deep = self.query.get("recursive") in (["True"], ["true"], ["1"])
        entries = [_entry(p, f) for p, f in sorted(commit.files.items()) if p.startswith(start)]
        shown = [e for e in entries if deep or "/" not in e["path"][len(start) :]]
        folders = sorted({start + e["path"][len(start) :].partition("/")[0] for e in entries if e not in shown})
        return _json([*({"type": "directory", "path": p, "oid": "0" * 40, "size": 0} for p in folders), *shown])

    def paths_info(self, id: str, rev: str) -> Answer:
        commit = self._at(self._repo(id), rev)
        wanted = json.loads(self.body)["paths"] if self.body[:1] == b"{" else parse_qs(self.body.decode())["paths"]
        return _json([_entry(path, commit.files[path]) for path in wanted if path in commit.files])

    def resolve(self, id: str, rev: str, path: str) -> Answer:
        repo = self._repo(id)
        commit = self._at(repo, rev)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repo.gated and token not in repo.readers:
            raise RefusedError(403 if token else 401, "GatedRepo", "Access to this model is restricted")
        file = commit.files.get(path)
        if file is None:
            raise RefusedError(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit.oid})
        headers = {"ETag": f'"{file.oid}"', "X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if not file.large:
            return self._ranged(file.data, headers)
        linked = {"X-Linked-Size": str(len(file.data)), "X-Linked-Etag": f'"{file.oid}"'}
        if self.hub.xet:
            route = f"{self.hub.url}/api/models/{id}/xet-read-token/{commit.oid}"
            linked |= {"X-Xet-Hash": hub_xet.hash_of(self.hub, file.oid, file.data), "X-Xet-Refresh-Route": route}
        self.hub.blobs.setdefault(file.oid, file.data)
        return Answer(302, b"", {**headers, **linked, "Location": f"{self.hub.store}/cdn/{file.oid}?signature=x"})

    def cdn(self, oid: str) -> Answer:
        if "Authorization" in self.headers:  # a signed address: who sends a token there gives it away
            raise RefusedError(400, "", "Only one auth mechanism allowed")
        return self._ranged(self.hub.blobs[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _ranged(self, data: bytes, headers: Mapping[str, str]) -> Answer:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not match:
            return Answer(200, data, headers)
        start, stop = int(match[1]), min(int(match[2]) + 1 if match[2] else len(data), len(data))
        if start >= len(data):
            raise RefusedError(416, "", "Range not satisfiable", **{"Content-Range": f"bytes */{len(data)}"})
        return Answer(206, data[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})

    # -- writing ------------------------------------------------------------------------------------------------

    def create(self) -> Answer:
        asked = json.loads(self.body)
        owner, name = asked.get("organization") or "me", asked["name"]
        full = f"{owner}/{name}"
        if self._role() != "write":
            raise RefusedError(403 if self._role() else 401, "", "you must use a write token to create a repository")
        if not _NAME.fullmatch(name):
            raise RefusedError(400, "", f'"name" with value "{name}" is no valid repository name')
        if full in self.hub.repos:
            told = json.loads(_json({"error": "You already created this model repo", "url": self._url(full)}).body)
            return _json(told, 409)
        if owner in self.hub.foreign:
            raise RefusedError(403, "", f'You don\'t have the rights to create a model under the namespace "{owner}"')
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.hub.create(full, private=private)
        return _json({"url": self._url(full), "id": full, "name": full})

    def _url(self, name: str) -> str:
        return f"{self.hub.url}/{name}"

    def validate_yaml(self) -> Answer:
        text = json.loads(self.body)["content"]
        match = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", text, re.DOTALL)
        if not match:
            return _json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        try:
            import yaml

            content = yaml.safe_load(match[1])
        except ImportError:
            return _json({"errors": [], "warnings": []})
        except yaml.YAMLError as problem:
            return _json({"errors": [{"message": f"YAML: {problem}"}], "warnings": []}, 400)
        known = isinstance(content, dict) and all(isinstance(t, str) for t in content.get("tags") or [])
        errors = [] if known else [{"message": '"tags" must be a list of strings'}]
        return _json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, id: str, rev: str) -> Answer:
        commit = self._at(self._writable(id), rev)
        files = []
        for asked in json.loads(self.body)["files"]:
            there = commit.files.get(asked["path"])
            large = self.hub.is_large(asked["path"], asked["size"], base64.b64decode(asked.get("sample") or ""))
            mode = "lfs" if large else "regular"
            oid = there.oid if there else None
            files.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return _json({"files": files})

    def batch(self, id: str) -> Answer:
        self._repo(id)
        if self._role() != "write":
            raise RefusedError(403, "", "a write token is needed")
        objects = []
        for asked in json.loads(self.body)["objects"]:
            there = asked["oid"] in self.hub.blobs
            href = f"{self.hub.store}/lfs/{asked['oid']}?signature=x"
            verify = {"href": f"{self.hub.url}/{id}.git/info/lfs/verify"}
            objects.append({**asked, **({} if there else {"actions": {"upload": {"href": href}, "verify": verify}})})
        return _json({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> Answer:
        if "Authorization" in self.headers:
            raise RefusedError(400, "", "Only one auth mechanism allowed")
        if sha256(self.body).hexdigest() != oid:
            raise RefusedError(400, "", "the content does not have this SHA-256")
        self.hub.blobs[oid] = self.body
        return Answer(200, b"", {"ETag": f'"{oid}"'})

    def verify(self, id: str) -> Answer:
        self._repo(id)
        asked = json.loads(self.body)
        if len(self.hub.blobs.get(asked["oid"], b"")) != asked["size"]:
            raise RefusedError(404, "", "no such object")
        return _json({})

    def commit(self, id: str, rev: str) -> Answer:
        pull_request = self.query.get("create_pr") == ["1"]
        repo = self._writable(id, pull_request=pull_request)
        before = self._at(repo, rev)
        files, header = dict(before.files), dict[str, Any]()
        for line in filter(None, self.body.split(b"\n")):
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                header = value
            elif key == "file":
                files[value["path"]] = self.hub.stored(value["path"], base64.b64decode(value["content"]))
            elif key == "lfsFile":
                files[value["path"]] = self._stored_large(value)
            elif key == "deletedFile":
                files.pop(value["path"], None)
            elif key == "deletedFolder":
                files = {p: f for p, f in files.items() if not p.startswith(value["path"].rstrip("/") + "/")}
        parent = header.get("parentCommit")
        if parent and not pull_request and not before.oid.startswith(parent):
            raise RefusedError(412, "", "A commit has happened since. Please refresh and try again.")
        if parent and pull_request:
            before = self._at(repo, parent)
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
        ref = f"refs/pr/{number}" if pull_request else rev
        if not pull_request and rev not in repo.refs:
            raise RefusedError(404, "RevisionNotFound", f"{rev} is no branch")
        made = repo.add(ref, files, header.get("summary", ""), before.oid)
        told = {"success": True, "commitOid": made.oid, "commitUrl": f"{self._url(id)}/commit/{made.oid}"}
        return _json({**told, "pullRequestUrl": f"{self._url(id)}/discussions/{number}" if pull_request else None})

    def _stored_large(self, value: Mapping[str, Any]) -> File:
        from loratool.testing.hub import File

        data = self.hub.blobs.get(value["oid"])
        if data is None and self.hub.xet:
            data = hub_xet.content_of(self.hub, value["oid"])
        if data is None:
            raise RefusedError(400, "", f"the LFS object {value['oid']} was not uploaded")
        return File(data, True)

    def xet_token(self, kind: str, id: str, rev: str) -> Answer:
        if not self.hub.xet:
            raise RefusedError(404, "", "this Hub has no xet storage")
        if kind == "write":
            self._writable(id)
        else:
            self._at(self._repo(id), rev)
        expires, address = int(time.time()) + 3600, f"local://{self.hub.xet}"
        headers = {"X-Xet-Cas-Url": address, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expires)}
        told = _json({"accessToken": "xet", "exp": expires, "casUrl": address})
        return told._replace(headers={**told.headers, **headers})


def _sibling(path: str, file: File, *, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": path}
    told = {"rfilename": path, "size": len(file.data), "blobId": file.oid[:40]}
    lfs = {"sha256": file.oid, "size": len(file.data), "pointerSize": 130}
    return {**told, "lfs": lfs} if file.large else told


def _entry(path: str, file: File) -> dict[str, Any]:
    told = {"type": "file", "path": path, "size": len(file.data), "oid": file.oid[:40]}
    return {**told, "lfs": {"oid": file.oid, "size": len(file.data), "pointerSize": 130}} if file.large else told


_ROUTES: tuple[tuple[str, str, Callable[..., Answer]], ...] = (
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("GET", rf"/api/models/{_ID}/revision/(?P<rev>[^/]+)", _Handler.info),
    ("GET", rf"/api/models/{_ID}/tree/(?P<rev>[^/]+)(?:/(?P<path>.+))?", _Handler.tree),
    ("POST", rf"/api/models/{_ID}/paths-info/(?P<rev>[^/]+)", _Handler.paths_info),
    ("POST", rf"/api/models/{_ID}/preupload/(?P<rev>[^/]+)", _Handler.preupload),
    ("POST", rf"/api/models/{_ID}/commit/(?P<rev>[^/]+)", _Handler.commit),
    ("GET", rf"/api/models/{_ID}/xet-(?P<kind>read|write)-token/(?P<rev>[^/]+)", _Handler.xet_token),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", _Handler.batch),
    ("POST", rf"/{_ID}\.git/info/lfs/verify", _Handler.verify),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.put),
    ("GET", r"/cdn/(?P<oid>[0-9a-f]{64})", _Handler.cdn),
    ("GET", rf"/api/models/{_ID}", _Handler.info),
    ("GET", rf"/{_ID}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", _Handler.resolve),
)
