"""A Hugging Face Hub in one process: enough of its protocol for `huggingface_hub` to download, log in and upload.

Two HTTP servers on 127.0.0.1: the Hub itself, and the "CDN" that large files are redirected to (another port is another
origin, so a client that would leak its token to the CDN is caught). Repositories live in memory. Faults are put on a
list and used up one request at a time, so a test says exactly what breaks and can count what the client did about it.

    with HubServer() as hub:
        hub.add_repo("org/name", {"config.json": b"{}"})
        hub.fail("GET", r"/resolve/.*model.safetensors", Fault(drop_after=1000))
"""

from __future__ import annotations

import base64
import json
import re
import socket
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

from hub_repos import Repo, git_oid, is_lfs, preupload, sha256, tree_entry


@dataclass
class Fault:
    """What goes wrong with the next `times` matching requests.

    Exactly one of `status` (answer with it), `drop_after` (close the connection in good order after that many bytes of
    the body) and `reset_after` (the same with a TCP reset).
    """

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    drop_after: int | None = None
    reset_after: int | None = None
    times: int = 1


@dataclass(frozen=True)
class Request:
    """One request as the server saw it."""

    method: str
    path: str
    headers: Mapping[str, str]
    origin: str


class HubServer:
    """The server, its repositories, its users, its faults and its log."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens: dict[str, str] = {"hf_good": "alice"}
        self.expired: set[str] = {"hf_expired"}
        self.blobs: dict[str, bytes] = {}
        self.log: list[Request] = []
        self.bytes_sent = 0
        self.lock = threading.RLock()
        self._faults: list[tuple[str, re.Pattern[str], Fault]] = []
        self._servers = [self._serve("hub"), self._serve("cdn")]
        self.url = f"http://127.0.0.1:{self._servers[0].server_port}"
        self.cdn_url = f"http://127.0.0.1:{self._servers[1].server_port}"

    def _serve(self, origin: str) -> ThreadingHTTPServer:
        handler = type("BoundHandler", (_Handler,), {"hub": self, "origin": origin})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add_repo(self, repo_id: str, files: Mapping[str, bytes], *, branch: str = "main") -> str:
        """Create the repository if need be and put `files` on a branch; returns the commit's id."""
        repo = self.repos.setdefault(repo_id, Repo())
        for path, content in files.items():
            if is_lfs(path):
                self.blobs[sha256(content)] = content
        return repo.commit(branch, dict(files), "initial")

    def fail(self, method: str, path: str, fault: Fault) -> None:
        """Let requests whose method equals and whose path matches (`re.search`) go wrong, `fault.times` times."""
        self._faults.append((method, re.compile(path), fault))

    def take_fault(self, method: str, path: str) -> Fault | None:
        """The fault this request must suffer, used up by one."""
        with self.lock:
            for wanted, pattern, fault in self._faults:
                if wanted == method and fault.times > 0 and pattern.search(path):
                    fault.times -= 1
                    return fault
        return None

    def seen(self, method: str, path: str) -> list[Request]:
        """Requests so far whose method equals and whose path matches."""
        with self.lock:
            return [r for r in self.log if r.method == method and re.search(path, r.path)]


class _Answer(Exception):
    """Ends a request early with a status, as the Hub words it."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    origin: str
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes; Nagle would cost 40 ms a request

    def log_message(self, format: str, *args: Any) -> None:
        """Silence: the log is a list, not stderr."""

    # -- the frame around every request ------------------------------------------------------------------------------

    def _handle(self) -> None:
        method, body = self.command, self._body()
        path = unquote(urlsplit(self.path).path)
        headers = {k.lower(): v for k, v in self.headers.items()}
        with self.hub.lock:
            self.hub.log.append(Request(method, path, headers, self.origin))
        self.fault = self.hub.take_fault(method, path)
        try:
            if self.fault is not None and self.fault.status is not None:
                return self._json({"error": "injected"}, self.fault.status, self.fault.headers)
            self._route(method, path, body)
        except _Answer as answer:
            self._json({"error": str(answer)}, answer.status, answer.headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _route(self, method: str, path: str, body: bytes) -> None:
        for verb, pattern, name in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method in verb:
                arguments = match.groupdict()
                if repo_id := arguments.pop("repo", None):
                    arguments["repo"] = self._repo(repo_id, write=method == "POST")
                    self.repo_id = repo_id
                getattr(self, name)(body, **arguments)
                return
        raise _Answer(404, f"no such page: {path}")

    def _json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, body: bytes, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._write(body)

    def _write(self, body: bytes) -> None:
        fault = self.fault
        cut = None if fault is None else fault.drop_after if fault.reset_after is None else fault.reset_after
        sent = body if cut is None else body[:cut]
        self.wfile.write(sent)
        self.wfile.flush()
        with self.hub.lock:
            self.hub.bytes_sent += len(sent)
        if cut is None:
            return
        self.close_connection = True
        if fault is not None and fault.reset_after is not None:  # linger 0: close() sends RST instead of FIN
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    # -- who may do what ---------------------------------------------------------------------------------------------

    def _user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token in self.hub.expired or (token and token not in self.hub.tokens):
            raise _Answer(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def _repo(self, repo_id: str, *, write: bool) -> Repo:
        user, repo = self._user(), self.hub.repos.get(repo_id)
        if repo is None or (repo.private and user is None):
            status = 401 if user is None else 404
            raise _Answer(status, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise _Answer(401, "Invalid username or password.")
        if write and repo_id.split("/")[0] != user:
            raise _Answer(403, "You don't have the rights to write to this repository")
        return repo

    def _files(self, repo: Repo, revision: str) -> tuple[str, dict[str, bytes]]:
        sha = repo.find(revision)
        if sha is None:
            raise _Answer(404, "Revision not found", "RevisionNotFound")
        return sha, repo.commits[sha]

    # -- pages -------------------------------------------------------------------------------------------------------

    def page_whoami(self, body: bytes) -> None:
        user = self._user()
        if user is None:
            raise _Answer(401, "Invalid username or password.")
        self._json({"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token"}})

    def page_info(self, body: bytes, repo: Repo, revision: str = "main") -> None:
        sha, files = self._files(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        facts: dict[str, Any] = {
            "id": self.repo_id,
            "modelId": self.repo_id,
            "sha": sha,
            "private": repo.private,
            "tags": [],
        }
        self._json({**facts, "siblings": siblings})

    def page_tree(self, body: bytes, repo: Repo, revision: str, folder: str | None = None) -> None:
        _, files = self._files(repo, revision)
        inside = {path: content for path, content in files.items() if path.startswith(f"{folder}/" if folder else "")}
        if folder and not inside:
            raise _Answer(404, "Entry not found", "EntryNotFound")
        entries = [tree_entry(path, content) for path, content in sorted(inside.items())]
        folders = {"/".join(path.split("/")[:depth]) for path in inside for depth in range(1, path.count("/") + 1)}
        entries += [{"type": "directory", "path": path, "size": 0, "oid": git_oid(path.encode())} for path in folders]
        if "recursive=false" in self.path.lower():
            entries = [e for e in entries if e["path"].rpartition("/")[0] == (folder or "")]
        self._json(entries)

    def page_file(self, body: bytes, repo: Repo, revision: str, path: str) -> None:
        sha, files = self._files(repo, revision)
        if repo.gated and self._user() is None:
            raise _Answer(401, "Access to this model is restricted.", "GatedRepo")
        if path not in files:
            raise _Answer(404, "Entry not found", "EntryNotFound")
        content = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{git_oid(content)}"', "Accept-Ranges": "bytes"}
        if not is_lfs(path):
            return self._ranged(content, headers)
        oid = sha256(content)
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        self._send(b"", 302, {**headers, **linked, "Location": f"{self.hub.cdn_url}/cdn/{oid}/{path}"})

    def page_cdn(self, body: bytes, oid: str, path: str) -> None:
        if self.headers.get("Authorization"):
            raise _Answer(400, "a token was sent to the CDN")
        self._ranged(self.hub.blobs[oid], {"ETag": f'"{oid}"'})

    def _ranged(self, content: bytes, headers: Mapping[str, str]) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if match is None:
            return self._send(content, 200, headers)
        start, stop = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
        ranged = {**headers, "Content-Range": f"bytes {start}-{stop}/{len(content)}"}
        self._send(content[start : stop + 1], 206, ranged)

    def page_create(self, body: bytes) -> None:
        user, wanted = self._user(), json.loads(body)
        if user is None:
            raise _Answer(401, "Invalid username or password.")
        owner = wanted.get("organization") or user
        if owner != user:
            raise _Answer(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        repo_id = f"{owner}/{wanted['name']}"
        fresh = repo_id not in self.hub.repos
        if fresh:
            self.hub.repos[repo_id] = Repo(private=wanted.get("visibility") == "private")
            self.hub.repos[repo_id].commit("main", {".gitattributes": b""}, "initial commit")
        self._json({"url": f"{self.hub.url}/{repo_id}"}, 200 if fresh else 409)

    def page_branch(self, body: bytes, repo: Repo, revision: str) -> None:
        fresh = revision not in repo.branches
        if fresh:
            repo.branches[revision] = repo.branches["main"]
        self._json({}, 201 if fresh else 409)

    def page_yaml(self, body: bytes) -> None:
        self._json({"errors": [], "warnings": []})

    def page_preupload(self, body: bytes, repo: Repo, revision: str) -> None:
        _, files = self._files(repo, revision)
        answers = [{**preupload(f["path"], files), "shouldIgnore": False} for f in json.loads(body)["files"]]
        self._json({"files": answers})

    def page_batch(self, body: bytes, repo: Repo) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            href = {"href": f"{self.hub.cdn_url}/lfs/{wanted['oid']}"}
            known = wanted["oid"] in self.hub.blobs
            objects.append(wanted if known else {**wanted, "actions": {"upload": href}})
        self._json({"transfer": "basic", "objects": objects})

    def page_put(self, body: bytes, oid: str) -> None:
        if sha256(body) != oid:
            raise _Answer(400, "the content is not what was announced")
        self.hub.blobs[oid] = body
        self._json({})

    def page_commit(self, body: bytes, repo: Repo, revision: str) -> None:
        _, files = self._files(repo, revision)
        files, message = dict(files), ""
        for line in body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(revision, files, message)
        self._json({"commitUrl": f"{self.hub.url}/{self.repo_id}/commit/{sha}", "commitOid": sha})


_REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"
_KIND = r"(?:models|datasets)"
_REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"
_ROUTES = (
    (("GET",), r"/api/whoami-v2", "page_whoami"),
    (("POST",), r"/api/repos/create", "page_create"),
    (("POST",), r"/api/validate-yaml", "page_yaml"),
    (("GET",), rf"/api/{_KIND}/{_REPO}/revision/{_REVISION}", "page_info"),
    (("GET",), rf"/api/{_KIND}/{_REPO}/tree/{_REVISION}(?:/(?P<folder>.+))?", "page_tree"),
    (("POST",), rf"/api/{_KIND}/{_REPO}/preupload/{_REVISION}", "page_preupload"),
    (("POST",), rf"/api/{_KIND}/{_REPO}/branch/{_REVISION}", "page_branch"),
    (("POST",), rf"/api/{_KIND}/{_REPO}/commit/{_REVISION}", "page_commit"),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", "page_batch"),
    (("GET",), rf"/api/{_KIND}/{_REPO}", "page_info"),
    (("PUT",), r"/lfs/(?P<oid>[0-9a-f]{64})", "page_put"),
    (("GET", "HEAD"), r"/cdn/(?P<oid>[0-9a-f]{64})/(?P<path>.+)", "page_cdn"),
    (("GET", "HEAD"), rf"/(?:datasets/)?{_REPO}/resolve/{_REVISION}/(?P<path>.+)", "page_file"),
)
