"""A small Hub on loopback: the HTTP routes that huggingface_hub uses to read and to write model repositories.

It keeps repositories in memory, with commits, branches, pull requests, large files by git-lfs, renamed and gated
repositories, tokens, range requests and ETags. ``requests`` lists what was asked; ``faults`` make it fail.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Headers = dict[str, str]


def is_large(name: str) -> bool:
    """Whether a file is kept by git-lfs."""
    return name.endswith((".safetensors", ".bin"))


@dataclass
class Repository:
    """A model repository: files by commit, commits by branch or tag."""

    is_private: bool = False
    is_gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    requests: dict[str, str] = field(default_factory=dict)
    messages: list[tuple[str, str]] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main", message: tuple[str, str] = ("", "")) -> str:
        """A commit that holds exactly these files."""
        text = json.dumps([len(self.commits), branch, *message, sorted(files)])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def find(self, revision: str) -> str | None:
        """The commit of a branch, a tag, a pull request or a hash."""
        known = {**self.requests, **self.tags, **self.branches}
        return known.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """What a revision holds."""
        return self.commits[self.find(revision) or ""]


@dataclass
class Fault:
    """What is done to requests whose line matches: an answer of another status, or a body that is cut."""

    pattern: str
    status: int = 0
    headers: Headers = field(default_factory=dict)
    cut: int | None = None
    times: int = 1000


@dataclass
class FakeHub:
    """The state of the Hub.

    Args:
        tokens: what each token may: names of gated or private repositories, ``"write"``.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, set[str]] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    endpoint: str = ""

    def add(self, name: str, folder: Path, **given: Any) -> Repository:
        """A repository with the files of a folder."""
        repository = self.repositories.setdefault(name, Repository(**given))
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        repository.commit({path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})
        return repository

    def fetched(self) -> set[str]:
        """Names of the files whose content was sent."""
        asked = (re.fullmatch(r"GET /.+?/resolve/[^/]+/(.+)", line) for line in self.requests)
        return {unquote(found[1]) for found in asked if found}


class Handler(BaseHTTPRequestHandler):
    """Answers for one :class:`FakeHub`."""

    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *args: Any) -> None:
        """Keeps the terminal quiet."""

    def _serve(self) -> None:
        self.address = urlsplit(self.path)
        self.path_, self.query = unquote(self.address.path), parse_qs(self.address.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        line = f"{self.command} {self.path_}"
        self.hub.requests.append(line)
        self.fault = next((held for held in self.hub.faults if held.times and re.search(held.pattern, line)), None)
        if self.fault is not None:
            self.fault.times -= 1
            if self.fault.status:
                self._send(self.fault.status, b'{"error": "as was asked for"}', self.fault.headers)
                return
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            self._refuse(401, "", "Invalid credentials in Authorization header")
            return
        self.rights = self.hub.tokens.get(token, set())
        self.is_known = bool(token)
        for pattern, answer in ROUTES:
            found = re.fullmatch(pattern, line)
            if found:
                answer(self, *found.groups())
                return
        self._refuse(404, "", f"no such route: {line}")

    # names that http.server asks for
    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

    def _send(self, status: int, body: bytes = b"", headers: Headers | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault is not None and self.fault.cut is not None:
            self.wfile.write(body[: self.fault.cut])
            self.close_connection = True
            return
        self.wfile.write(body)

    def _json(self, answer: Any, status: int = 200, headers: Headers | None = None) -> None:
        self._send(status, json.dumps(answer).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._json({"error": message}, status, headers)

    def _repository(self, name: str) -> Repository | None:
        """A repository that may be seen; where there is none, the answer is sent."""
        if name in self.hub.renamed:
            self._send(307, headers={"Location": self.path.replace(name, self.hub.renamed[name])})
            return None
        found = self.hub.repositories.get(name)
        if found is None or (found.is_private and name not in self.rights):
            self._refuse(404 if self.is_known else 401, "RepoNotFound", "Repository not found")
            return None
        return found

    def _commit_of(self, repository: Repository, revision: str) -> str | None:
        sha = repository.find(revision)
        if sha is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def info(self, name: str, revision: str | None = None) -> None:
        """What a repository is, at a revision."""
        repository = self._repository(name)
        sha = self._commit_of(repository, revision or "main") if repository else None
        if repository and sha:
            siblings = [{"rfilename": path} for path in repository.commits[sha]]
            gated = "manual" if repository.is_gated else False
            facts = {"id": name, "modelId": name, "sha": sha, "private": repository.is_private, "gated": gated}
            self._json({**facts, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, name: str, revision: str) -> None:
        """The files of a commit."""
        repository = self._repository(name)
        sha = self._commit_of(repository, revision) if repository else None
        if repository and sha:
            listed = []
            for path, content in repository.commits[sha].items():
                entry: dict[str, Any] = {
                    "type": "file",
                    "path": path,
                    "size": len(content),
                    "oid": etag_of(path, content),
                }
                if is_large(path):
                    entry["lfs"] = {"oid": etag_of(path, content), "size": len(content), "pointerSize": 130}
                listed.append(entry)
            self._json(listed)

    def refs(self, name: str) -> None:
        """Branches and tags."""
        repository = self._repository(name)
        if repository:

            def listed(kind: str, held: dict[str, str]) -> list[dict[str, str]]:
                return [{"name": ref, "ref": f"refs/{kind}/{ref}", "targetCommit": sha} for ref, sha in held.items()]

            answer = {"branches": listed("heads", repository.branches), "tags": listed("tags", repository.tags)}
            self._json({**answer, "converts": []})

    def resolve(self, name: str, revision: str, path: str) -> None:
        """A file, or where its content lies."""
        repository = self._repository(name)
        sha = self._commit_of(repository, revision) if repository else None
        if not repository or not sha:
            return
        if repository.is_gated and name not in self.rights:
            self._refuse(403 if self.is_known else 401, "GatedRepo", f"Access to model {name} is restricted")
            return
        content = repository.commits[sha].get(path)
        if content is None:
            self._json({}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        etag = etag_of(path, content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if is_large(path) and self.command == "HEAD":
            linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
            self._send(200, headers={**headers, **linked, "Content-Length": str(len(content))})
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            stop = int(wanted[2]) + 1 if wanted[2] else len(content)
            part = f"bytes {wanted[1]}-{stop - 1}/{len(content)}"
            self._send(206, content[int(wanted[1]) : stop], {**headers, "Content-Range": part})
            return
        self._send(200, content, {**headers, "Content-Length": str(len(content))})

    def create(self) -> None:
        """Makes a repository."""
        asked = json.loads(self.body)
        if not self._may_write():
            return
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        address = {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name}
        if name in self.hub.repositories:
            self._json(address, 409, {"X-Error-Message": "You already created this model repo"})
            return
        is_private = asked.get("private") is True or asked.get("visibility") == "private"
        repository = self.hub.repositories[name] = Repository(is_private=is_private)
        repository.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, message=("initial commit", ""))
        self.rights.add(name)
        self._json(address)

    def branch(self, name: str, branch: str) -> None:
        """Makes a branch."""
        repository = self._repository(name)
        if repository and self._may_write():
            if branch in repository.branches:
                self._refuse(409, "", "Reference already exists")
                return
            repository.branches[branch] = repository.branches["main"]
            self._json({}, 201)

    def preupload(self, name: str, revision: str) -> None:
        """How each file is to come."""
        repository = self._repository(name)
        sha = self._commit_of(repository, revision) if repository else None
        if repository and sha and self._may_write():
            held = repository.commits[sha]
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                    "shouldIgnore": False,
                    "oid": etag_of(file["path"], held[file["path"]]) if file["path"] in held else None,
                }
                for file in json.loads(self.body)["files"]
            ]
            self._json({"files": files})

    def batch(self, name: str) -> None:
        """Where large files are to be sent."""
        if self._repository(name) and self._may_write():
            objects = []
            for wanted in json.loads(self.body)["objects"]:
                entry = {"oid": wanted["oid"], "size": wanted["size"]}
                if wanted["oid"] not in self.hub.large:
                    entry["actions"] = {"upload": {"href": f"{self.hub.endpoint}/large/{wanted['oid']}", "header": {}}}
                objects.append(entry)
            self._json({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        """A large file."""
        if hashlib.sha256(self.body).hexdigest() != oid:
            self._refuse(400, "", "hash mismatch")
            return
        self.hub.large[oid] = self.body
        self._send(200)

    def commit(self, name: str, revision: str) -> None:
        """A commit, or a pull request of one."""
        repository = self._repository(name)
        sha = self._commit_of(repository, revision) if repository else None
        if not repository or not sha or not self._may_write():
            return
        files, message = dict(repository.commits[sha]), ("", "")
        for line in self.body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                message = (value["summary"], value["description"])
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        is_request = self.query.get("create_pr") == ["1"]
        branch = f"refs/pr/{len(repository.requests) + 1}" if is_request else revision
        new = repository.commit(files, branch, message)
        if is_request:
            repository.requests[branch] = repository.branches.pop(branch)
        answer = {"success": True, "commitOid": new, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{new}"}
        if is_request:
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{name}/discussions/{len(repository.requests)}"
        self._json(answer)

    def yaml(self) -> None:
        """Whether the head of a card is sound."""
        asked = json.loads(self.body)
        errors = [] if asked["content"].startswith("---\n") else [{"message": "no metadata"}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _may_write(self) -> bool:
        if "write" not in self.rights:
            message = "you have read access, and need write access" if self.is_known else "log in first"
            self._refuse(403 if self.is_known else 401, "", message)
            return False
        return True


NAME = r"([\w.\-]+/[\w.\-]+)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    (rf"GET /api/models/{NAME}", Handler.info),
    (rf"GET /api/models/{NAME}/revision/(.+)", Handler.info),
    (rf"GET /api/models/{NAME}/tree/(.+)", Handler.tree),
    (rf"GET /api/models/{NAME}/refs", Handler.refs),
    (rf"(?:GET|HEAD) /{NAME}/resolve/((?:refs/pr/)?[^/]+)/(.+)", Handler.resolve),
    (r"POST /api/repos/create", Handler.create),
    (rf"POST /api/models/{NAME}/branch/(.+)", Handler.branch),
    (rf"POST /api/models/{NAME}/preupload/(.+)", Handler.preupload),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /large/(\w+)", Handler.put),
    (rf"POST /api/models/{NAME}/commit/(.+)", Handler.commit),
    (r"POST /api/validate-yaml", Handler.yaml),
]


def etag_of(path: str, content: bytes) -> str:
    """As git and git-lfs name it."""
    if is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serving() -> Iterator[FakeHub]:
    """A Hub that answers at ``endpoint`` while the block runs."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
