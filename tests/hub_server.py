"""A Hub on this machine: what the real client and diffusers ask of huggingface.co, over loopback, in memory.

It knows repositories with branches, pull requests and LFS, private and gated ones, and makes the errors that the client
knows by their headers. `HubServer.fault` breaks any chosen request.
"""

import base64
import hashlib
import json
import re
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


LARGE = (".safetensors", ".bin", ".png")
LICENCES = {
    *("apache-2.0", "mit", "openrail", "creativeml-openrail-m", "openrail++", "bigscience-openrail-m", "other"),
    *("cc", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"),
    *("bsd-2-clause", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "unlicense", "wtfpl", "unknown"),
}
RELATIONS = {"finetune", "adapter", "merge", "quantized"}
PIPELINE_TAGS = {
    *("text-to-image", "image-to-image", "unconditional-image-generation", "text-to-video", "image-to-video"),
    *("image-to-text", "text-to-3d", "image-to-3d", "text-generation", "text-classification", "feature-extraction"),
    *("image-classification", "image-segmentation", "zero-shot-image-classification", "image-feature-extraction"),
    *("automatic-speech-recognition", "text-to-speech", "text-to-audio", "translation", "summarization", "other"),
}


@dataclass
class Request:
    """One request, as it came and as it was answered."""

    number: int
    method: str
    path: str
    status: int | None = None

    @property
    def changes(self) -> bool:
        return self.method != "GET" and self.method != "HEAD"


@dataclass
class Fault:
    """What befalls a request: a wait, and then a lost connection, another answer, or (by default) the usual one."""

    seconds: float = 0.0
    lost: str | None = None  # "before" or "after" it was served
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = field(default_factory=lambda: {"error": "a fault"})

    @classmethod
    def drop(cls, after: bool = False) -> "Fault":
        return cls(lost="after" if after else "before")


@dataclass
class Commit:
    """A tree, path -> SHA-256 of the content, on top of its parents."""

    oid: str
    tree: dict[str, str]
    message: str
    history: list[str]


@dataclass
class Repo:
    """A model repository."""

    owner: str
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def resolve(self, revision: str) -> Commit:
        refs = {**self.branches, **self.pull_requests}
        oid = refs.get(revision, revision)
        if oid not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[oid]

    def add(self, tree: dict[str, str], message: str, parent: Commit | None) -> Commit:
        history = [*parent.history, parent.oid] if parent else []
        text = json.dumps([sorted(tree.items()), message, history, len(self.commits)])
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), dict(tree), message, history)
        self.commits[commit.oid] = commit
        return commit


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(
        self, status: int, code: str | None = None, message: str = "", body: Any = None, headers: dict[str, str] = {}
    ):
        super().__init__(message)
        self.status = status
        self.body = body or {"error": message}
        line = " ".join(message.split()).encode("ascii", "replace").decode()
        self.headers = {**headers, "X-Error-Message": line, **({"X-Error-Code": code} if code else {})}


class HubServer:
    """Serves on a free port of 127.0.0.1, from a thread.

    Attributes:
        repos (`dict[str, Repo]`): By `user/name`.
        requests (`list[Request]`): All since the last `clear`.
        fault (`Callable`, *optional*): Asked with each request before it is served.
    """

    def __init__(self):
        self.lock = threading.RLock()
        self.clear()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def clear(self) -> None:
        with self.lock:
            self.repos: dict[str, Repo] = {}
            self.blobs: dict[str, bytes] = {}
            self.tokens: dict[str, str] = {}
            self.requests: list[Request] = []
            self.fault: Callable[[Request], Fault | None] | None = None

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add_user(self, name: str) -> str:
        """Returns a token of theirs."""
        token = f"hf_{name}_{len(self.tokens)}_secret"
        self.tokens[token] = name
        return token

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The content of a revision."""
        return {path: self.blobs[key] for path, key in self.repos[repo_id].resolve(revision).tree.items()}

    def snapshot(self, repo_id: str) -> dict[str, dict[str, str]]:
        """Every branch, with the SHA-256 of its files."""
        repo = self.repos[repo_id]
        return {branch: dict(repo.commits[oid].tree) for branch, oid in repo.branches.items()}

    def keep(self, content: bytes) -> str:
        key = hashlib.sha256(content).hexdigest()
        self.blobs[key] = content
        return key


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for an acknowledgement
    hub: HubServer

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _serve(self) -> None:
        self.body = self._read()
        url = urlsplit(self.path)
        self.query = parse_qs(url.query, keep_blank_values=True)
        with self.hub.lock:
            request = Request(len(self.hub.requests), self.command, url.path)
            self.hub.requests.append(request)
        fault = (self.hub.fault and self.hub.fault(request)) or Fault()
        time.sleep(fault.seconds)
        if fault.lost == "before":
            return self._hang_up()
        if fault.status is not None:
            request.status = fault.status
            return self._answer(fault.status, fault.body, fault.headers)
        try:
            with self.hub.lock:
                status, content, headers = self._route(url.path)
        except Refusal as refusal:
            status, content, headers = refusal.status, refusal.body, refusal.headers
        except Exception as error:
            # Not a lost connection, which tests would take for a fault, nor 500, which the client tries again.
            traceback.print_exc()
            status, content, headers = 501, {"error": repr(error)}, {"X-Error-Message": "This server's own error"}
        request.status = status
        if fault.lost == "after":
            return self._hang_up()
        self._answer(status, content, headers)

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    def _answer(self, status: int, content: Any, headers: dict[str, str]) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # Who asks ----------------------------------------------------------------------------------------------------

    def _user(self) -> str | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given not in self.hub.tokens:
            raise Refusal(401, None, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(given)

    def _repo(self, name: str, write: bool = False) -> Repo:
        repo, user = self.hub.repos.get(name), self._user()
        if repo is None or (repo.private and user != repo.owner):
            raise Refusal(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and user != repo.owner and not (user and self._proposes()):
            raise Refusal(403 if user else 401, None, "You don't have the rights to write to this repository")
        return repo

    # What is asked -----------------------------------------------------------------------------------------------

    def _route(self, path: str) -> tuple[int, Any, dict[str, str]]:
        # The path is matched before it is unquoted: a slash in a branch's name comes as %2F.
        for (method, pattern), function in ROUTES.items():
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                answer = function(self, *(unquote(part) if part else part for part in match.groups()))
                return answer if isinstance(answer, tuple) else (200, answer, {})
        raise Refusal(404, None, f"{self.command} {path} is not served here")

    def create_repo(self) -> Any:
        wanted, user = json.loads(self.body), self._user()
        owner = wanted.get("organization") or user
        name = f"{'spaces/' * (wanted.get('type') == 'space')}{owner}/{wanted['name']}"
        if user is None:
            raise Refusal(401, None, "Invalid username or password.")
        if owner != user:
            raise Refusal(403, None, f"You don't have the rights to create a model under the namespace {owner!r}")
        body = {
            "url": f"{self.hub.url}/{name}",
            "name": name.removeprefix("spaces/"),
            "id": name.removeprefix("spaces/"),
        }
        if name in self.hub.repos:
            raise Refusal(409, None, "You already created this model repo", body)
        private = wanted.get("private") or wanted.get("visibility") == "private"
        repo = self.hub.repos[name] = Repo(user, private=bool(private))
        repo.branches["main"] = repo.add({".gitattributes": self.hub.keep(b"*.png lfs\n")}, "initial commit", None).oid
        return body

    def branch(self, name: str, branch: str) -> Any:
        repo = self._repo(name, write=True)
        if self.command == "DELETE":
            if repo.branches.pop(branch, None) is None:
                raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {branch}")
            return {}
        if branch in repo.branches:
            raise Refusal(409, None, f"Reference already exists: refs/heads/{branch}")
        start = json.loads(self.body or b"{}").get("startingPoint") or "main"
        repo.branches[branch] = repo.resolve(start).oid
        return {}

    def preupload(self, name: str, revision: str) -> Any:
        tree, files = self._repo(name, write=True).resolve(revision).tree, []
        for file in json.loads(self.body)["files"]:
            path, mode = file["path"], "lfs" if _is_large(file["path"], file["size"]) else "regular"
            entry = self._entry(path, tree[path]) if path in tree else {}
            oid = entry["lfs"]["oid"] if "lfs" in entry else entry.get("oid")  # what the client compares its own with
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def lfs_batch(self, name: str) -> Any:
        self._repo(name)
        if self._user() is None:
            raise Refusal(401, None, "Invalid username or password.")
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            known = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.blobs:
                address = f"{self.hub.url}/{name}/lfs"
                known["actions"] = {
                    "upload": {"href": f"{address}/upload/{wanted['oid']}"},
                    "verify": {"href": f"{address}/verify"},
                }
            objects.append(known)
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, name: str, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, None, "The content does not match its hash")
        self.hub.keep(self.body)
        return {}

    def lfs_verify(self, name: str) -> Any:
        if json.loads(self.body)["oid"] not in self.hub.blobs:
            raise Refusal(404, None, "The object was not uploaded")
        return {}

    def _proposes(self) -> bool:
        return self.query.get("create_pr") == ["1"]

    def commit(self, name: str, revision: str) -> Any:
        repo = self._repo(name, write=True)
        parent = repo.resolve(revision)
        refs = repo.pull_requests if revision in repo.pull_requests else repo.branches
        if revision not in refs:
            raise Refusal(400, None, f"{revision} is not a branch")
        header, *operations = map(json.loads, self.body.splitlines())
        if header["value"].get("parentCommit") not in (None, parent.oid):
            raise Refusal(412, None, "A commit has happened since. Please refresh and try again.")
        tree = dict(parent.tree)
        for operation in operations:
            value = operation["value"]
            match operation["key"]:
                case "file":
                    tree[value["path"]] = self.hub.keep(base64.b64decode(value["content"]))
                case "lfsFile":
                    if value["oid"] not in self.hub.blobs:
                        raise Refusal(400, None, f"LFS pointer of {value['path']} points to nothing")
                    tree[value["path"]] = value["oid"]
                case "deletedFile":
                    if tree.pop(value["path"], None) is None:
                        raise Refusal(404, "EntryNotFound", f"{value['path']} does not exist")
        commit = repo.add(tree, header["value"]["summary"], parent)
        answer = {"success": True, "commitOid": commit.oid, "commitUrl": f"{self.hub.url}/{name}/commit/{commit.oid}"}
        if self._proposes():
            number = len(repo.pull_requests) + 1
            repo.pull_requests[f"refs/pr/{number}"] = commit.oid
            return {**answer, "pullRequestUrl": f"{self.hub.url}/{name}/discussions/{number}"}
        refs[revision] = commit.oid
        return answer

    def refs(self, name: str) -> Any:
        branches = self._repo(name).branches.items()
        listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in branches]
        return {"branches": listed, "converts": [], "tags": []}

    def _entry(self, path: str, key: str) -> dict[str, Any]:
        """A file with its id in git, which is that of its content or, if it is large, of the pointer to it."""
        content, lfs = self.hub.blobs[key], {}
        size = len(content)
        if _is_large(path, size):
            content = f"version https://git-lfs.github.com/spec/v1\noid sha256:{key}\nsize {size}\n".encode()
            lfs = {"lfs": {"oid": key, "size": size, "pointerSize": len(content)}}
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"type": "file", "path": path, "size": size, "oid": oid, **lfs}

    def tree(self, name: str, revision: str) -> Any:
        tree = self._repo(name).resolve(revision).tree
        folders = {"/".join(path.split("/")[:depth]) for path in tree for depth in range(1, path.count("/") + 1)}
        entries = [self._entry(path, key) for path, key in sorted(tree.items())]
        return entries + [_folder(path) for path in sorted(folders)]

    def info(self, name: str, revision: str | None = None) -> Any:
        repo = self._repo(name)
        commit = repo.resolve(revision or "main")
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.tree)]
        card = self.hub.blobs[commit.tree["README.md"]].decode() if "README.md" in commit.tree else ""
        data = {} if card_errors(card) else card_data(card)
        answer = {
            "_id": "0",
            "id": name,
            "modelId": name,
            "sha": commit.oid,
            "private": repo.private,
            "cardData": data,
        }
        answer |= {"tags": data.get("tags", []), "pipeline_tag": data.get("pipeline_tag"), "siblings": siblings}
        return {**answer, "gated": "auto" if repo.gated else False, "downloads": 0, "likes": 0}

    def commits(self, name: str, revision: str) -> Any:
        repo = self._repo(name)
        commit = repo.resolve(revision)
        return [
            {
                "id": oid,
                "title": repo.commits[oid].message,
                "message": "",
                "authors": [{"user": repo.owner}],
                "date": "2026-01-01T00:00:00.000Z",
            }
            for oid in [commit.oid, *reversed(commit.history)]
        ]

    def resolve(self, name: str, revision: str, path: str) -> Any:
        repo = self._repo(name)
        if repo.gated and self._user() != repo.owner:
            raise Refusal(403, "GatedRepo", f"Access to model {name} is restricted.")
        commit = repo.resolve(revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.tree:
            raise Refusal(404, "EntryNotFound", "Entry not found", headers=headers)
        key = commit.tree[path]
        entry = self._entry(path, key)
        if "lfs" not in entry:
            return self._content(self.hub.blobs[key], {**headers, "ETag": f'"{entry["oid"]}"'})
        headers |= {"ETag": f'"{key}"', "X-Linked-Etag": f'"{key}"', "X-Linked-Size": str(entry["size"])}
        return self._content(self.hub.blobs[key], headers)

    def _content(self, content: bytes, headers: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        headers = {**headers, "Content-Type": "application/octet-stream"}
        if self.command == "HEAD":
            headers["Content-Length"] = str(len(content))
        return 200, content, headers

    def validate(self) -> Any:
        errors = card_errors(json.loads(self.body)["content"])
        body = {"errors": [{"message": message} for message in errors], "warnings": []}
        if errors:
            raise Refusal(400, None, "; ".join(errors), body)
        return body


def _folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}


def _is_large(path: str, size: int) -> bool:
    return size > 10 * 2**20 or (size > 0 and path.endswith(LARGE))


def card_data(card: str) -> Any:
    """The metadata above a model card, of whatever kind they are."""
    import yaml

    block = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", card, re.DOTALL)
    return yaml.safe_load(block[1]) if block else {}


def card_errors(card: str) -> list[str]:
    """What the Hub is known to refuse in a model card's metadata."""
    import yaml

    try:
        data = card_data(card)
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"]
    if not isinstance(data, dict):
        return ['"metadata" must be an object']
    errors = []

    def check(good: bool, message: str) -> None:
        if not good:
            errors.append(message)

    licences, tags, bases = data.get("license", []), data.get("tags", []), data.get("base_model", [])
    licences = licences if isinstance(licences, list) else [licences]
    check(all(str(licence) in LICENCES for licence in licences), '"license" must be one of the known licences')
    check("other" not in licences or _is_text(data.get("license_name")), '"license_name" is required')
    check(isinstance(tags, list) and all(map(_is_text, tags)), '"tags" must be an array of strings')
    for base in bases if isinstance(bases, list) else [bases]:
        good = isinstance(base, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", base)
        check(bool(good), f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.')
    relation, task = str(data.get("base_model_relation", "finetune")), str(data.get("pipeline_tag", "other"))
    check(relation in RELATIONS, f'"base_model_relation" must be one of {", ".join(sorted(RELATIONS))}')
    check(task in PIPELINE_TAGS, f'"pipeline_tag" with value "{task}" is not valid')
    index = data.get("model-index", [])
    check(isinstance(index, list), '"model-index" must be an array')
    for number, entry in enumerate(index if isinstance(index, list) else []):
        errors += [f'"model-index[{number}].{where}" is missing or not valid' for where in _bad_places(entry)]
    return errors


def _bad_places(entry: Any) -> list[str]:
    """Where an entry of a card's model-index has not what it should."""
    if not isinstance(entry, dict):
        return ["name"]
    bad = [] if _is_text(entry.get("name")) else ["name"]
    results = entry.get("results")
    if not isinstance(results, list):
        return [*bad, "results"]
    for i, result in enumerate(results):
        texts = dict.fromkeys(("task.type", "dataset.type", "dataset.name"), result)
        for place, value in texts.items():
            for key in place.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            bad += [] if _is_text(value) else [f"results[{i}].{place}"]
        metrics = result.get("metrics") if isinstance(result, dict) else None
        bad += [] if isinstance(metrics, list) and metrics else [f"results[{i}].metrics"]
        for j, metric in enumerate(metrics if isinstance(metrics, list) else []):
            metric = metric if isinstance(metric, dict) else {}
            value = metric.get("value")
            is_value = isinstance(value, (int, float, str)) and not isinstance(value, bool)
            bad += [] if _is_text(metric.get("type")) else [f"results[{i}].metrics[{j}].type"]
            bad += [] if is_value else [f"results[{i}].metrics[{j}].value"]
    return bad


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


_ID, _PART = r"([^/]+/[^/]+)", r"([^/]+)"
_API = rf"/api/models/{_ID}"
_SPACE_API = r"/api/(spaces/[^/]+/[^/]+)"
ROUTES: dict[tuple[tuple[str, ...], str], Callable[..., Any]] = {
    (("POST",), "/api/repos/create"): _Handler.create_repo,
    (("POST",), rf"{_SPACE_API}/preupload/{_PART}"): _Handler.preupload,
    (("POST",), rf"{_SPACE_API}/commit/{_PART}"): _Handler.commit,
    (("GET",), rf"{_SPACE_API}(?:/revision/{_PART})?"): _Handler.info,
    (("POST",), "/api/validate-yaml"): _Handler.validate,
    (("POST", "DELETE"), rf"{_API}/branch/{_PART}"): _Handler.branch,
    (("POST",), rf"{_API}/preupload/{_PART}"): _Handler.preupload,
    (("POST",), rf"{_API}/commit/{_PART}"): _Handler.commit,
    (("GET",), rf"{_API}/refs"): _Handler.refs,
    (("GET",), rf"{_API}/tree/{_PART}"): _Handler.tree,
    (("GET",), rf"{_API}/commits/{_PART}"): _Handler.commits,
    (("GET",), rf"{_API}(?:/revision/{_PART})?"): _Handler.info,
    (("POST",), rf"/{_ID}\.git/info/lfs/objects/batch"): _Handler.lfs_batch,
    (("PUT",), rf"/{_ID}/lfs/upload/{_PART}"): _Handler.lfs_upload,
    (("POST",), rf"/{_ID}/lfs/verify"): _Handler.lfs_verify,
    (("GET", "HEAD"), rf"/{_ID}/resolve/{_PART}/(.+)"): _Handler.resolve,
}
