"""A Hub on the loopback interface: enough of its HTTP protocol for the real `huggingface_hub` client."""

import base64
import hashlib
import json
import os
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import transformers.utils.hub
import yaml
from huggingface_hub import constants, hf_api

OWNER_TOKEN, READER_TOKEN = "hf_owner", "hf_reader"
_USERS = {OWNER_TOKEN: "me", READER_TOKEN: "you"}
_REPO = r"(?P<repo>[^/]+/[^/]+)"
_MODEL_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class File:
    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        """As git has it: of an LFS file, the hash of its content; of any other, that of its blob."""
        if self.is_lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit("main", {}, "initial commit")

    def commit(self, branch: str, files: dict[str, File], message: str) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {message} {sorted(files)} {id(self)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)

    @property
    def files(self) -> dict[str, bytes]:
        """Content of each file on the main branch."""
        return {name: file.content for name, file in self.commits[self.branches["main"]].items()}


class Hub(ThreadingHTTPServer):
    """What the server knows, for tests to look at and to change."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.conflict_next_commit = False


@contextmanager
def running_hub():
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None: ...

    def do_GET(self) -> None:
        self._route()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _route(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        if token is not None and token not in _USERS:
            return self._error(401, None, "Invalid credentials in Authorization header")
        self.user = _USERS.get(token)
        for methods, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods:
                return self._answer(answer, **match.groupdict())
        return self._error(404, None, "Sorry, we can't find the page you are looking for.")

    def _answer(self, answer, repo: str | None = None, **parts: str) -> None:
        if repo is None:
            return answer(self, **parts)
        held = self.server.repos.get(repo)
        if held is None or (held.private and self.user != repo.split("/")[0]):
            # As the Hub does: who may not see a repository is not told whether there is one.
            return self._error(401 if self.user is None else 404, "RepoNotFound", "Repository not found")
        changes = self.command in ("POST", "PUT") and not parts.get("ignored")
        if changes and self.user != repo.split("/")[0]:
            return self._error(403, None, "You don't have the required permissions")
        self.repo_id = repo
        if "revision" not in parts:
            return answer(self, held, **parts)
        sha = held.resolve(parts["revision"] or "main")
        if sha is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {parts['revision']}")
        return answer(self, held, sha, **parts)

    # ------------------------------------------------------------------------------------------------ answers

    def _send(self, status: int, content: bytes = b"", **headers: object) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), Content_Type="application/json")

    def _error(self, status: int, code: str | None, message: str, **headers: object) -> None:
        headers |= {"X_Error_Message": message, "Content_Type": "application/json"}
        headers |= {} if code is None else {"X_Error_Code": code}
        self._send(status, json.dumps({"error": message}).encode(), **headers)

    def home(self) -> None:
        self._send(200)

    def whoami(self) -> None:
        if self.user is None:
            return self._error(401, None, "Invalid username or password.")
        return self._json({"name": self.user, "type": "user", "orgs": [], "auth": {"type": "access_token"}})

    def create(self) -> None:
        asked = json.loads(self.body)
        if self.user is None:
            return self._error(401, None, "Invalid username or password.")
        name = f"{asked['organization'] or self.user}/{asked['name']}"
        url = f"{self.server.endpoint}/{name}"
        if name.split("/")[0] != self.user:
            return self._error(403, None, "You don't have the rights to create a model under this namespace")
        if name in self.server.repos:
            return self._json({"error": "You already created this model repo", "url": url}, 409)
        self.server.repos[name] = Repo(private=asked.get("visibility") == "private")
        return self._json({"url": url, "name": name})

    def validate(self) -> None:
        errors = [{"message": message} for message in card_errors(json.loads(self.body)["content"])]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def info(self, repo: Repo, sha: str, revision: str | None) -> None:
        files = [{"rfilename": name} for name in repo.commits[sha]]
        facts = {"id": self.repo_id, "modelId": self.repo_id, "sha": sha, "siblings": files, "tags": []}
        self._json(facts | {"private": repo.private, "gated": "manual" if repo.gated else False})

    def tree(self, repo: Repo, sha: str, revision: str) -> None:
        rows = []
        for name, file in repo.commits[sha].items():
            row = {"type": "file", "path": name, "size": len(file.content), "oid": file.oid}
            lfs = {"oid": file.oid, "size": len(file.content), "pointerSize": 130}
            rows.append(row | ({"lfs": lfs} if file.is_lfs else {}))
        self._json(rows)

    def branch(self, repo: Repo, branch: str) -> None:
        if branch in repo.branches:
            return self._error(409, None, "Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        return self._json({})

    def preupload(self, repo: Repo, sha: str, revision: str) -> None:
        files = []
        for asked in json.loads(self.body)["files"]:
            held = repo.commits[sha].get(asked["path"])
            binary = b"\0" in base64.b64decode(asked["sample"]) or asked["size"] > 10_000_000
            mode = "lfs" if binary or asked["path"].endswith(".safetensors") else "regular"
            oid = None if held is None else held.oid
            files.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": files})

    def lfs_batch(self, repo: Repo) -> None:
        objects = []
        for asked in json.loads(self.body)["objects"]:
            place = f"{self.server.endpoint}/lfs/%s/{asked['oid']}"
            links = {action: {"href": place % action} for action in ("upload", "verify")}
            objects.append(asked | ({} if asked["oid"] in self.server.objects else {"actions": links}))
        self._json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._error(400, None, "The content does not have this hash")
        self.server.objects[oid] = self.body
        return self._send(200)

    def lfs_verify(self, oid: str) -> None:
        whole = len(self.server.objects.get(oid, b"")) == json.loads(self.body)["size"]
        self._send(200 if whole else 404)

    def commit(self, repo: Repo, sha: str, revision: str) -> None:
        header, *changes = [json.loads(line) for line in self.body.splitlines()]
        parent = header["value"].get("parentCommit", sha)
        if parent != sha or self.server.conflict_next_commit:
            self.server.conflict_next_commit = False
            return self._error(412, None, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[sha])
        for change in changes:
            kind, value = change["key"], change["value"]
            if kind == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif kind == "lfsFile":
                files[value["path"]] = File(self.server.objects[value["oid"]], True)
            elif kind == "deletedFile":
                del files[value["path"]]
        commit = repo.commit(revision, files, header["value"]["summary"])
        url = f"{self.server.endpoint}/{self.repo_id}/commit/{commit}"
        return self._json({"success": True, "commitOid": commit, "commitUrl": url})

    def file(self, repo: Repo, sha: str, revision: str, name: str) -> None:
        if repo.gated and self.user != self.repo_id.split("/")[0]:
            message = f"Access to model {self.repo_id} is restricted."
            return self._error(401 if self.user is None else 403, "GatedRepo", message)
        held = repo.commits[sha].get(name)
        if held is None:
            return self._error(404, "EntryNotFound", "Entry not found", X_Repo_Commit=sha)
        headers = {"ETag": f'"{held.oid}"', "X_Repo_Commit": sha}
        if held.is_lfs:
            headers |= {"X_Linked_Etag": f'"{held.oid}"', "X_Linked_Size": len(held.content)}
        return self._send(200, held.content, **headers)


_ROUTES = [
    (("GET", "HEAD"), "/", _Handler.home),
    (("GET",), "/api/whoami-v2", _Handler.whoami),
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.validate),
    (("POST",), f"/api/models/{_REPO}/preupload/(?P<revision>.+)", _Handler.preupload),
    (("POST",), f"/api/models/{_REPO}/commit/(?P<revision>.+)", _Handler.commit),
    (("POST",), f"/api/models/{_REPO}/branch/(?P<branch>.+)", _Handler.branch),
    (("POST",), f"/{_REPO}.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (("PUT",), "/lfs/upload/(?P<oid>.+)", _Handler.lfs_upload),
    (("POST",), "/lfs/verify/(?P<oid>.+)", _Handler.lfs_verify),
    (("GET",), f"/api/models/{_REPO}/tree/(?P<revision>[^/]+)", _Handler.tree),
    (("GET",), f"/api/models/{_REPO}(?:/revision/(?P<revision>.+))?", _Handler.info),
    (("GET", "HEAD"), f"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", _Handler.file),
]


def card_errors(content: str) -> list[str]:
    """What the Hub would refuse of a card's metadata, as far as this package writes any."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        return [f"The metadata is not YAML: {error}"]
    if not isinstance(data, dict):
        return ["The metadata is not a mapping"]
    errors = []
    bases = data.get("base_model", [])
    for base in [bases] if isinstance(bases, str) else bases:
        if not _MODEL_ID.fullmatch(base):
            errors.append(f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.')
    for name, kind in (("tags", list), ("library_name", str), ("pipeline_tag", str), ("license", str)):
        if name in data and not isinstance(data[name], kind):
            errors.append(f'"{name}" must be a {kind.__name__}')
    for index, entry in enumerate(data.get("model-index", [])):
        where = f'"model-index[{index}]'
        errors += [] if isinstance(entry.get("name"), str) else [f'{where}.name" is required']
        for row, result in enumerate(entry.get("results", [])):
            required = [("task", "type"), ("dataset", "type"), ("dataset", "name")]
            missing = [f"{part}.{name}" for part, name in required if not result.get(part, {}).get(name)]
            errors += [f'{where}.results[{row}].{name}" is required' for name in missing]
            for metric in result.get("metrics", [{}]):
                if not metric.get("type") or metric.get("value") is None:
                    errors.append(f'{where}.results[{row}].metrics" need a type and a value')
    return errors


def use_hub(monkeypatch, hub: Hub, home: Path, token: str | None = OWNER_TOKEN) -> None:
    """Turn the client of this process to a hub, a cache of its own and a token, as its variables would at the start."""
    settings = {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # made anew, for this endpoint
    log_in(monkeypatch, token)


def log_in(monkeypatch, token: str | None) -> None:
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)


def environment(hub: Hub, home: Path, token: str | None = OWNER_TOKEN) -> dict[str, str]:
    """The variables of a process that uses a hub."""
    given = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return os.environ | given | ({} if token is None else {"HF_TOKEN": token})
