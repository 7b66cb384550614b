"""A model hub on this machine: the part of its HTTP API that uploading and downloading files of models uses.

As of huggingface_hub 2.4: `create_repo`, `model_info`, `preupload_lfs_files` and `create_commit` without Xet, and
`hf_hub_download`. Large files come from, and go to, another origin than the API, as on the real one.
"""

import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

READ_SETTINGS = "import importlib, huggingface_hub.constants as hub; importlib.reload(hub)\n"
"""Code for a forked process, whose client has read its environment before."""
TOKEN, READ_ONLY = "hf_secretsecretsecretsecret", "hf_readonlyreadonlyreadonly"
Files = dict[str, bytes]
Fault = Callable[["Handler", str], bool]
"""Takes a request and its path; True if it has dealt with the request."""


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


@dataclass
class Repository:
    """private; and its commits, the newest last, each with all files."""

    private: bool
    commits: dict[str, Files]

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> Files:
        return self.commits[self.head]

    def commit(self, files: Files) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[oid] = files
        return oid


@dataclass
class Seen:
    """A request, the host it was sent to, and its authorization."""

    line: str
    host: str
    authorization: str | None


@dataclass
class State:
    """What the hub holds, what it was asked, and what goes wrong: asked before anything else."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: Files = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    fault: Fault = lambda handler, path: False

    def add(self, name: str, *, private: bool = True, **files: bytes) -> Repository:
        """A repository; `__` stands for the dot in the names of its files."""
        made = self.repositories[name] = Repository(private, {})
        made.commit({".gitattributes": b""} | {key.replace("__", "."): value for key, value in files.items()})
        return made

    def lines(self, method: str) -> list[str]:
        return [seen.line for seen in self.seen if seen.line.startswith(method)]


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: "Hub"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    @property
    def state(self) -> State:
        return self.server.state

    def _answer(self) -> None:
        self.body = self._read()
        path = self.path.partition("?")[0]
        self.state.seen.append(Seen(f"{self.command} {path}", self.headers["Host"], self.headers["Authorization"]))
        if not self.state.fault(self, path):
            self.respond(path)

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send(self, status: int, content: Any = b"", **headers: str) -> None:
        """Answer. headers: `_` stands for the hyphen."""
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(raw)), "Content-Type": "application/json"} | named).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def drop(self) -> None:
        """Close the connection without an answer."""
        self.close_connection = True
        self.connection.shutdown(2)

    def respond(self, path: str) -> None:
        """Answer as a hub does."""
        parts = path.strip("/").split("/")
        if parts[0] in ("lfs", "cdn"):
            self._large(parts[1])
            return
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        if token not in ("", TOKEN, READ_ONLY):
            self.send(
                401, {"error": "Invalid credentials"}, X_Error_Message="Invalid credentials in Authorization header"
            )
        elif self.command == "POST" and token != TOKEN:
            self.send(403 if token else 401, {"error": "You need a token with write access"})
        elif path == "/api/repos/create":
            self._create(json.loads(self.body))
        elif path == "/api/validate-yaml":
            bad = "base_model: [" in json.loads(self.body)["content"]
            self.send(400 if bad else 200, {"errors": [{"message": "unclosed list"}] if bad else [], "warnings": []})
        elif parts[:2] == ["api", "models"]:
            self._model("/".join(parts[2:4]), parts[4:], token)
        elif parts[1].endswith(".git"):
            self._batch(json.loads(self.body)["objects"])
        elif parts[2:3] == ["resolve"]:
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]), token)
        else:
            self.send(404, {"error": "no such page"})

    def _found(self, name: str, token: str) -> Repository | None:
        found = self.state.repositories.get(name)
        if found is None or (found.private and not token):
            self.send(404 if token else 401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        return found

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if not name.startswith("me/"):
            self.send(403, {"error": f"You don't have the rights to create a model under the namespace {name}"})
        elif name in self.state.repositories:
            self.send(409, {"error": "You already created this model repo"})
        else:
            self.state.add(name, private=asked["visibility"] == "private")
            self.send(200, {"url": f"{self.server.url}/{name}"})

    def _model(self, name: str, rest: list[str], token: str) -> None:
        if (found := self._found(name, token)) is None:
            return
        if rest in ([], ["revision", "main"]):
            siblings = [{"rfilename": file} for file in found.files]
            self.send(200, {"id": name, "private": found.private, "sha": found.head, "siblings": siblings})
        elif rest[0] == "preupload":
            files = json.loads(self.body)["files"]
            self.send(200, {"files": [self._mode(found, file["path"]) for file in files]})
        elif rest[0] == "commit":
            self._commit(name, found, [json.loads(line) for line in self.body.splitlines()])
        else:
            self.send(404, {"error": f"no {rest[0]} here"})

    def _mode(self, found: Repository, name: str) -> dict[str, Any]:
        mode = {"path": name, "uploadMode": "lfs" if is_large(name) else "regular", "shouldIgnore": False}
        if (old := found.files.get(name)) is not None:
            mode["oid"] = hashlib.sha256(old).hexdigest() if is_large(name) else git_oid(old)
        return mode

    def _batch(self, objects: list[dict[str, Any]]) -> None:
        for one in objects:
            if one["oid"] not in self.state.objects:
                href = f"http://localhost:{self.server.server_port}/lfs/{one['oid']}"
                one["actions"] = {"upload": {"href": href, "header": {}}}
        self.send(200, {"transfer": "basic", "objects": objects})

    def _large(self, oid: str) -> None:
        if self.command == "PUT":
            good = hashlib.sha256(self.body).hexdigest() == oid
            self.state.objects |= {oid: self.body} if good else {}
            self.send(200 if good else 400)
        else:
            self.send(200, self.state.objects[oid], Content_Type="application/octet-stream")

    def _commit(self, name: str, found: Repository, lines: list[dict[str, Any]]) -> None:
        files, missing = dict(found.files), []
        for line in lines:
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit") not in (None, found.head):
                self.send(412, {"error": "A commit has happened since. Please refresh and try again."})
                return
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                missing += [] if value["oid"] in self.state.objects else [value["oid"]]
                files[value["path"]] = self.state.objects.get(value["oid"], b"")
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        if missing:
            self.send(400, {"error": "a file was not uploaded"})
            return
        oid = found.commit(files)
        self.send(200, {"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid})

    def _resolve(self, name: str, revision: str, file: str, token: str) -> None:
        if (found := self._found(name, token)) is None:
            return
        files = found.files if revision == "main" else found.commits.get(revision)
        if files is None or file not in files:
            code = "RevisionNotFound" if files is None else "EntryNotFound"
            self.send(404, b"", X_Error_Code=code, X_Repo_Commit=found.head)
            return
        content, commit = files[file], found.head if revision == "main" else revision
        if not is_large(file):
            self.send(200, content, ETag=f'"{git_oid(content)}"', X_Repo_Commit=commit, Content_Type="text/plain")
            return
        oid = hashlib.sha256(content).hexdigest()
        self.state.objects.setdefault(oid, content)
        place = f"http://localhost:{self.server.server_port}/cdn/{oid}"
        linked = {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        self.send(302, Location=place, ETag=f'"{oid}"', X_Repo_Commit=commit, **linked)


class Hub(ThreadingHTTPServer):
    """The server. state: replaced for each test."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.state = State()
        self.url = f"http://127.0.0.1:{self.server_port}"
