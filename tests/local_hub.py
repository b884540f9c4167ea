"""A local stand-in for the Hugging Face Hub: what the real client asks, answered from memory.

Tests that push and load must need no network, no account and no clean-up. `LocalHub` serves the part of the Hub's HTTP
interface that `huggingface_hub` uses for that, on two free ports of 127.0.0.1 and with the standard library only. It
keeps repositories as commits on branches, knows its users by token, answers with the Hub's status and error codes, and
logs every request. `LocalHub.inject` makes chosen requests fail.

>>> with LocalHub() as hub:
...     hub.create_repo("tester/tiny", files={"config.json": b"{}"})
...     sorted(hub.files("tester/tiny"))
['.gitattributes', 'config.json']

As on the Hub:

* a missing repository and a hidden one look the same (`RepoNotFound`: 401 without a token, 404 with one);
* a commit is applied whole or not at all, and refused (412) when its `parentCommit` is no longer the head;
* large file storage (LFS) is another origin, to which the client must not send its token. It is a second port here,
  for the client follows a redirect within one origin and then misses the headers that stood on it.

Not here: Xet storage (the client needs `HF_HUB_DISABLE_XET=1`), multipart uploads, `.gitignore` on the server,
discussions, search and listings. A request without a route is answered 501 and names the route.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from types import TracebackType
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

USER = "tester"
TOKEN = "hf_token_of_tester"
SIGNATURE = "0123456789abcdef"

LFS_SUFFIXES = (
    ".arrow", ".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".npy", ".npz", ".onnx", ".parquet", ".pickle", ".pkl",
    ".pt", ".pth", ".safetensors", ".tar", ".tflite", ".zip",
)  # fmt: skip
LFS_FROM_BYTES = 10_000_000
"""Files of these suffixes, and any file of this size, go to large file storage."""

Access = Literal["read", "contribute", "write"]
"""What a request wants of a repository; "contribute" is to open a pull request: any signed-in reader may."""


# ------------------------------------------------------------------------------------- what the Hub holds


@dataclass(frozen=True)
class Account:
    """A user, known to the Hub by a token; `role` is that token's ("read" or "write")."""

    name: str
    role: Literal["read", "write"] = "write"
    organizations: tuple[str, ...] = ()

    def owns(self, namespace: str) -> bool:
        """Whether repositories under `namespace` are this user's or one of their organizations'."""
        return namespace == self.name or namespace in self.organizations


@dataclass(frozen=True)
class StoredFile:
    """One file of one commit: its bytes, and whether they lie in git or in large file storage."""

    content: bytes
    is_lfs: bool = False

    @property
    def lfs_pointer(self) -> bytes:
        """What git holds in place of a file in large file storage (git-lfs specification v1)."""
        oid = hashlib.sha256(self.content).hexdigest()
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(self.content)}\n".encode()

    @property
    def git_oid(self) -> str:
        """The SHA-1 under which git stores the file, or its pointer."""
        blob = self.lfs_pointer if self.is_lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        """What the client compares its own copy with: the SHA-256 of an LFS file, the git id of any other."""
        return hashlib.sha256(self.content).hexdigest() if self.is_lfs else self.git_oid


Files = Mapping[str, StoredFile]


@dataclass(frozen=True)
class Commit:
    """One commit: the whole tree it leaves behind, and the commit it was made on (None for the first)."""

    oid: str
    parent: str | None
    title: str
    description: str
    author: str
    date: str
    files: Files = field(repr=False)


@dataclass
class Repo:
    """One repository. `heads` maps branches ("main") and pull requests ("refs/pr/1") to commit ids."""

    repo_type: str
    repo_id: str
    private: bool
    gated: bool = False
    consented: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    lfs_objects: dict[str, bytes] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        """The user or organization the repository belongs to."""
        return self.repo_id.split("/")[0]

    @property
    def web_path(self) -> str:
        """The path of its page: "user/name" for a model, "datasets/user/name" for a dataset."""
        return self.repo_id if self.repo_type == "model" else f"{self.repo_type}s/{self.repo_id}"

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a pull request, a tag or a commit id names."""
        oid = self.heads.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[oid]

    def history(self, revision: str) -> list[Commit]:
        """The commits up to `revision`, newest first."""
        newest_first = [self.at(revision)]
        while (parent := newest_first[-1].parent) is not None:
            newest_first.append(self.commits[parent])
        return newest_first

    def add_commit(
        self, head: str, files: Files, *, parent: str | None, title: str, description: str = "", author: str
    ) -> Commit:
        """Make a commit on `parent` and let `head` point at it."""
        tree = sorted(f"{path} {file.git_oid}" for path, file in files.items())
        identity = [self.repo_type, self.repo_id, str(parent), title, str(len(self.commits)), *tree]
        oid = hashlib.sha1("\n".join(identity).encode()).hexdigest()
        commit = Commit(oid, parent, title, description, author, _now(), dict(files))
        self.commits[oid] = commit
        self.heads[head] = oid
        return commit


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def _goes_to_lfs(path: str, size_bytes: int) -> bool:
    return path.endswith(LFS_SUFFIXES) or size_bytes >= LFS_FROM_BYTES


def apply_operations(
    files: Files, operations: Iterable[Mapping[str, Any]], lfs_objects: Mapping[str, bytes]
) -> dict[str, StoredFile]:
    """The tree after a commit's operations.

    Args:
        files: The tree before; left as it is.
        operations: The lines of a commit after its header, `{"key": kind, "value": {...}}`.
        lfs_objects: What has been uploaded to the repository's large file storage, by SHA-256.

    Raises:
        HubError: A path is not allowed, a file to delete is not there, or an LFS file was not uploaded before.
    """
    result = dict(files)
    for operation in operations:
        kind, value = operation["key"], operation["value"]
        path = value["path"]
        if not path or {"..", ".git", ""} & set(path.rstrip("/").split("/")):
            raise HubError(400, "", f"Invalid path in repo: {path!r}")
        if kind == "file":
            result[path] = StoredFile(base64.b64decode(value["content"]))
        elif kind == "lfsFile":
            if value["oid"] not in lfs_objects:
                raise HubError(400, "", f"LFS pointer pointed to a file that does not exist: {path}")
            result[path] = StoredFile(lfs_objects[value["oid"]], is_lfs=True)
        elif kind == "deletedFile":
            if result.pop(path, None) is None:
                raise HubError(404, "EntryNotFound", f"A file with this name doesn't exist: {path}")
        elif kind == "deletedFolder":
            folder = path.rstrip("/") + "/"
            kept = {name: file for name, file in result.items() if not name.startswith(folder)}
            if len(kept) == len(result):
                raise HubError(404, "EntryNotFound", f"A folder with this name doesn't exist: {path}")
            result = kept
        else:
            raise HubError(400, "", f"Unknown commit operation: {kind}")
    return result


# --------------------------------------------------------------------------------- requests and answers


@dataclass(frozen=True)
class Request:
    """One request as it came in; `path` is still percent-encoded, for a revision may hold an encoded slash."""

    method: str
    path: str
    query: str
    headers: Message
    body: bytes

    @property
    def token(self) -> str | None:
        """The bearer token, or None where the request has no Authorization header."""
        header = self.headers.get("Authorization")
        return None if header is None else header.removeprefix("Bearer ").strip()

    def flag(self, name: str) -> bool:
        """Whether the query switches `name` on."""
        return parse_qs(self.query).get(name, ["0"])[-1].lower() in {"1", "true"}

    def json(self) -> dict[str, Any]:
        """The body as a JSON object; an empty body is an empty one."""
        return self.json_lines()[0] if self.body.strip() else {}

    def json_lines(self) -> list[dict[str, Any]]:
        """The body as one JSON object a line."""
        try:
            return [json.loads(line) for line in self.body.splitlines() if line.strip()]
        except ValueError as error:
            raise HubError(400, "", f"Invalid JSON in the request: {error}") from error

    def form(self) -> dict[str, list[str]]:
        """The body as form fields, each with all its values."""
        return parse_qs(self.body.decode())


@dataclass(frozen=True)
class Answer:
    """One answer; `body` may be anything that JSON can hold, or the bytes themselves."""

    status: int = 200
    body: Any = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def content(self) -> bytes:
        """The bytes of the body."""
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()

    @property
    def content_type(self) -> str:
        """Follows from the kind of body."""
        return "application/octet-stream" if isinstance(self.body, bytes) else "application/json; charset=utf-8"


class HubError(Exception):
    """A request that the Hub refuses: its status, its `X-Error-Code` ("" for none) and its message."""

    def __init__(self, status: int, code: str, message: str, **body: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.body = status, code, message, body

    def answer(self, headers: Mapping[str, str] | None = None) -> Answer:
        """The answer that says so, in the body and in the headers (a HEAD request has only these)."""
        error_headers = {"X-Error-Message": self.message, **(headers or {})}
        if self.code:
            error_headers["X-Error-Code"] = self.code
        return Answer(self.status, {"error": self.message, **self.body}, error_headers)


def answer_range(content: bytes, range_header: str | None, headers: Mapping[str, str]) -> Answer:
    """The bytes that a `Range` header asks for, as 206; all of them as 200 where there is no such header.

    >>> answer_range(b"abcdef", "bytes=1-2", {}).body, answer_range(b"abcdef", "bytes=-2", {}).body
    (b'bc', b'ef')
    """
    headers = {"Accept-Ranges": "bytes", **headers}
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", (range_header or "").replace(" ", ""), re.IGNORECASE)
    if match is None or match.groups() == ("", ""):
        return Answer(200, content, headers)
    first, last = match.groups()
    start = int(first) if first else max(0, len(content) - int(last))
    stop = min(len(content), int(last) + 1) if first and last else len(content)
    if start >= stop:
        return Answer(416, b"", {**headers, "Content-Range": f"bytes */{len(content)}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
    return Answer(206, content[start:stop], headers)


# ----------------------------------------------------------------------------- entries and cards as JSON


def _file_entry(path: str, file: StoredFile) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(file.content), "oid": file.git_oid}
    if file.is_lfs:
        entry["lfs"] = {"oid": file.etag, "size": len(file.content), "pointerSize": len(file.lfs_pointer)}
    return entry


def _folders(files: Files) -> set[str]:
    return {str(parent) for path in files for parent in Path(path).parents} - {"."}


def _folder_entry(path: str, files: Files) -> dict[str, Any]:
    inside = sorted(f"{name} {file.git_oid}" for name, file in files.items() if name.startswith(f"{path}/"))
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1("\n".join(inside).encode()).hexdigest()}


def _entry(path: str, files: Files) -> dict[str, Any]:
    return _file_entry(path, files[path]) if path in files else _folder_entry(path, files)


def _sibling(path: str, file: StoredFile, *, with_metadata: bool) -> dict[str, Any]:
    if not with_metadata:
        return {"rfilename": path}
    sibling: dict[str, Any] = {"rfilename": path, "size": len(file.content), "blobId": file.git_oid}
    if file.is_lfs:
        sibling["lfs"] = {"sha256": file.etag, "size": len(file.content), "pointerSize": len(file.lfs_pointer)}
    return sibling


def _front_matter(card: str) -> str | None:
    """The metadata block of a card, or None where it has none."""
    match = re.match(r"---\r?\n(.*?)\r?\n---\s*(\n|$)", card, re.DOTALL)
    return None if match is None else match.group(1)


def _card_scalar(card: str, key: str) -> str | None:
    match = re.search(rf"^{key}:[ \t]*(\S.*?)\s*$", _front_matter(card) or "", re.MULTILINE)
    return None if match is None else match.group(1).strip("'\"")


# ------------------------------------------------------------------------------------------- the routes


class HubApi:
    """The Hub's state and one method a route. Knows nothing of sockets: a `Request` in, an `Answer` out.

    Args:
        accounts: The users by token.
        url: Where the interface is served, for the links in its answers.
        storage_url: Where large file storage is served; another origin than `url`.
    """

    def __init__(self, accounts: dict[str, Account], *, url: str, storage_url: str) -> None:
        self.accounts = accounts
        self.repos: dict[tuple[str, str], Repo] = {}
        self.url = url
        self.storage_url = storage_url

    def dispatch(self, request: Request) -> Answer:
        """Find the route of a request, check what its sender may do, and answer; a refusal is an answer too."""
        try:
            account = self._account(request)
            for route in ROUTES:
                match = re.fullmatch(route.pattern, request.path)
                # A HEAD is a GET whose body stays unsent.
                if match and route.method == ("GET" if request.method == "HEAD" else request.method):
                    groups = {name: unquote(text) for name, text in match.groupdict().items() if text is not None}
                    return self._call(route, request, account, groups)
            raise HubError(501, "", f"LocalHub has no route for {request.method} {request.path}")
        except HubError as error:
            return error.answer()

    def _account(self, request: Request) -> Account | None:
        if request.token is None:
            return None
        if request.token not in self.accounts:
            raise HubError(401, "", "Invalid credentials in Authorization header")
        return self.accounts[request.token]

    def _call(self, route: Route, request: Request, account: Account | None, groups: dict[str, str]) -> Answer:
        if route.access is None:
            return route.handler(self, request, account, **groups)
        opens_pull_request = route.access == "write" and request.flag("create_pr")
        access: Access = "contribute" if opens_pull_request else route.access
        repo_type = groups.pop("kind", "models").removesuffix("s")
        repo = self.find_repo(repo_type, groups.pop("repo"), account, access)
        return route.handler(self, request, account, repo, **groups)

    def find_repo(self, repo_type: str, repo_id: str, account: Account | None, access: Access) -> Repo:
        """The repository, if `account` may do that to it.

        Raises:
            HubError: 401 or 404 where it is missing or hidden, 401 or 403 where it is there but closed to `access`.
        """
        repo = self.repos.get((repo_type, repo_id))
        is_owner = account is not None and account.owns(repo_id.split("/")[0])
        if repo is None or (repo.private and not is_owner):
            raise HubError(401 if account is None else 404, "RepoNotFound", "Repository not found")
        if access == "read":
            return repo
        if account is None:
            # The Hub sends no code here; the client infers it from an address that begins with https://huggingface.co.
            raise HubError(401, "RepoNotFound", "Invalid username or password.")
        if account.role == "read":
            raise HubError(403, "", "Forbidden: you must use a write token to upload to a repository.")
        if access == "write" and not is_owner:
            raise HubError(403, "", "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo

    def new_repo(self, repo_type: str, repo_id: str, *, private: bool, files: Mapping[str, bytes]) -> Repo:
        """Make a repository with one commit, that holds `files` and what git needs to know of LFS."""
        tracked = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        repo = Repo(repo_type, repo_id, private)
        stored = {
            path: StoredFile(content, _goes_to_lfs(path, len(content)))
            for path, content in {".gitattributes": tracked.encode(), **files}.items()
        }
        repo.lfs_objects.update({file.etag: file.content for file in stored.values() if file.is_lfs})
        repo.add_commit("main", stored, parent=None, title="initial commit", author=repo.namespace)
        self.repos[repo_type, repo_id] = repo
        return repo

    # -- users, cards, and repositories as a whole

    def _whoami(self, request: Request, account: Account | None) -> Answer:
        if account is None:
            raise HubError(401, "", "Invalid username or password.")
        organizations = [{"type": "org", "id": name, "name": name} for name in account.organizations]
        access_token = {"displayName": "local", "role": account.role}
        return Answer(
            body={
                "type": "user",
                "id": account.name,
                "name": account.name,
                "fullname": account.name,
                "orgs": organizations,
                "auth": {"type": "access_token", "accessToken": access_token},
            }
        )

    def _agent_harnesses(self, request: Request, account: Account | None) -> Answer:
        return Answer(body={"standardEnvVars": [], "harnesses": {}})

    def _validate_card(self, request: Request, account: Account | None) -> Answer:
        """Sees only whether there is a metadata block: the standard library cannot read YAML."""
        card = request.json()["content"]
        if _front_matter(card) is not None:
            return Answer(body={"errors": [], "warnings": []})
        if card.startswith("---"):
            message = "Invalid YAML: the metadata block is not closed with ---"
            return Answer(400, {"error": message, "errors": [{"message": message}], "warnings": []})
        warning = "empty or missing yaml metadata in repo card"
        return Answer(body={"errors": [], "warnings": [{"message": warning}]})

    def _create_repo(self, request: Request, account: Account | None) -> Answer:
        if account is None:
            raise HubError(401, "", "Invalid username or password.")
        wanted = request.json()
        repo_type, namespace = wanted.get("type") or "model", wanted.get("organization") or account.name
        if not account.owns(namespace) or account.role == "read":
            raise HubError(
                403, "", f"You don't have the rights to create a {repo_type} under the namespace {namespace!r}"
            )
        if not re.fullmatch(r"[\w.-]{1,96}", wanted["name"], re.ASCII):
            raise HubError(400, "", f"Invalid repo name: {wanted['name']!r}")
        repo_id = f"{namespace}/{wanted['name']}"
        if (existing := self.repos.get((repo_type, repo_id))) is not None:
            message = f"You already created this {repo_type} repo: {repo_id}"
            raise HubError(409, "", message, url=f"{self.url}/{existing.web_path}", name=repo_id)
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        repo = self.new_repo(repo_type, repo_id, private=private, files={})
        return Answer(body={"url": f"{self.url}/{repo.web_path}", "name": repo_id, "id": repo_id})

    def _delete_repo(self, request: Request, account: Account | None) -> Answer:
        wanted = request.json()
        namespace = wanted.get("organization") or (account.name if account else "")
        repo = self.find_repo(wanted.get("type") or "model", f"{namespace}/{wanted['name']}", account, "write")
        del self.repos[repo.repo_type, repo.repo_id]
        return Answer()

    def _check_access(self, request: Request, account: Account | None, repo: Repo) -> Answer:
        return Answer(body={})

    def _update_settings(self, request: Request, account: Account | None, repo: Repo) -> Answer:
        settings = request.json()
        if "visibility" in settings:
            repo.private = settings["visibility"] == "private"
        elif "private" in settings:
            repo.private = bool(settings["private"])
        return Answer(body={"private": repo.private})

    def _repo_info(self, request: Request, account: Account | None, repo: Repo, revision: str = "main") -> Answer:
        commit = repo.at(revision)
        with_metadata = request.flag("blobs")
        card = commit.files["README.md"].content.decode() if "README.md" in commit.files else ""
        body = {
            "_id": repo.repo_id,
            "id": repo.repo_id,
            "author": repo.namespace,
            "sha": commit.oid,
            "createdAt": repo.history(commit.oid)[-1].date,
            "lastModified": commit.date,
            "private": repo.private,
            "gated": "auto" if repo.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "pipeline_tag": _card_scalar(card, "pipeline_tag"),
            "library_name": _card_scalar(card, "library_name"),
            "siblings": [
                _sibling(path, file, with_metadata=with_metadata) for path, file in sorted(commit.files.items())
            ],
        }
        return Answer(body=body, headers={"X-Repo-Commit": commit.oid})

    # -- listings

    def _list_tree(
        self, request: Request, account: Account | None, repo: Repo, revision: str, path: str = ""
    ) -> Answer:
        commit = repo.at(revision)
        folders = _folders(commit.files)
        if path and path not in folders:
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision!r}")
        prefix = f"{path}/" if path else ""
        below = [name for name in {*commit.files, *folders} if name.startswith(prefix)]
        if not request.flag("recursive"):
            below = [name for name in below if "/" not in name.removeprefix(prefix)]
        entries = [_entry(name, commit.files) for name in sorted(below)]
        return Answer(body=entries, headers={"X-Repo-Commit": commit.oid})

    def _paths_info(self, request: Request, account: Account | None, repo: Repo, revision: str) -> Answer:
        is_json = request.headers.get_content_type() == "application/json"
        paths = request.json()["paths"] if is_json else request.form().get("paths", [])
        files = repo.at(revision).files
        known = {*files, *_folders(files)}
        return Answer(body=[_entry(path, files) for path in paths if path in known])

    def _list_commits(self, request: Request, account: Account | None, repo: Repo, revision: str) -> Answer:
        return Answer(
            body=[
                {
                    "id": commit.oid,
                    "title": commit.title,
                    "message": commit.description,
                    "date": commit.date,
                    "authors": [{"user": commit.author}],
                }
                for commit in repo.history(revision)
            ]
        )

    def _list_refs(self, request: Request, account: Account | None, repo: Repo) -> Answer:
        pulls = {name: oid for name, oid in repo.heads.items() if name.startswith("refs/pr/")}
        branches = {name: oid for name, oid in repo.heads.items() if name not in pulls}

        def listed(refs: Mapping[str, str], prefix: str) -> list[dict[str, str]]:
            return [{"name": name, "ref": prefix + name, "targetCommit": oid} for name, oid in refs.items()]

        body = {"branches": listed(branches, "refs/heads/"), "tags": listed(repo.tags, "refs/tags/"), "converts": []}
        if request.flag("include_prs"):
            body["pullRequests"] = listed(pulls, "")
        return Answer(body=body)

    # -- branches and tags

    def _create_branch(self, request: Request, account: Account | None, repo: Repo, name: str) -> Answer:
        if name in repo.heads:
            raise HubError(409, "", f"Reference already exists: refs/heads/{name}")
        repo.heads[name] = repo.at(request.json().get("startingPoint", "main")).oid
        return Answer(body={})

    def _delete_branch(self, request: Request, account: Account | None, repo: Repo, name: str) -> Answer:
        if name == "main":
            raise HubError(403, "", "Cannot delete the main branch")
        if repo.heads.pop(name, None) is None:
            raise HubError(404, "RevisionNotFound", f"Reference does not exist: refs/heads/{name}")
        return Answer()

    def _create_tag(self, request: Request, account: Account | None, repo: Repo, revision: str) -> Answer:
        name = request.json()["tag"]
        if name in repo.tags:
            raise HubError(409, "", f"Tag reference exists already: refs/tags/{name}")
        repo.tags[name] = repo.at(revision).oid
        return Answer(body={})

    def _delete_tag(self, request: Request, account: Account | None, repo: Repo, name: str) -> Answer:
        if repo.tags.pop(name, None) is None:
            raise HubError(404, "RevisionNotFound", f"Tag reference does not exist: refs/tags/{name}")
        return Answer()

    # -- uploads

    def _preupload(self, request: Request, account: Account | None, repo: Repo, revision: str) -> Answer:
        commit = repo.at(revision)
        modes = []
        for wanted in request.json()["files"]:
            present = commit.files.get(wanted["path"])
            mode = "lfs" if _goes_to_lfs(wanted["path"], wanted["size"]) else "regular"
            oid = None if present is None else present.etag
            modes.append({"path": wanted["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Answer(body={"commitOid": commit.oid, "files": modes})

    def _lfs_batch(self, request: Request, account: Account | None, repo: Repo) -> Answer:
        verify = {"href": f"{self.url}/{repo.web_path}.git/info/lfs/objects/verify"}
        objects = []
        for wanted in request.json()["objects"]:
            known: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in repo.lfs_objects:
                known["actions"] = {"upload": {"href": self._storage_link(repo, wanted["oid"])}, "verify": verify}
            objects.append(known)
        return Answer(body={"transfer": "basic", "objects": objects})

    def _lfs_verify(self, request: Request, account: Account | None, repo: Repo) -> Answer:
        wanted = request.json()
        if len(repo.lfs_objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise HubError(404, "", f"No LFS object {wanted['oid']} of {wanted['size']} bytes")
        return Answer(body={})

    def _commit(self, request: Request, account: Account | None, repo: Repo, revision: str) -> Answer:
        head = repo.at(revision)
        lines = request.json_lines()
        if not lines or lines[0].get("key") != "header":
            raise HubError(400, "", "A commit starts with a header line")
        header = lines[0]["value"]
        if header.get("parentCommit", head.oid) != head.oid:
            raise HubError(412, "", "A commit has happened since. Please refresh and try again.")
        files = apply_operations(head.files, lines[1:], repo.lfs_objects)
        target, pull_request = revision, None
        if request.flag("create_pr"):
            number = 1 + sum(name.startswith("refs/pr/") for name in repo.heads)
            target, pull_request = f"refs/pr/{number}", f"{self.url}/{repo.web_path}/discussions/{number}"
        elif revision not in repo.heads:
            raise HubError(400, "", f"Cannot commit to {revision!r}: it is not a branch")
        commit = repo.add_commit(
            target,
            files,
            parent=head.oid,
            title=header["summary"],
            description=header.get("description", ""),
            author="" if account is None else account.name,
        )
        body = {
            "success": True,
            "commitOid": commit.oid,
            "commitUrl": f"{self.url}/{repo.web_path}/commit/{commit.oid}",
            "hookOutput": "",
        }
        return Answer(body=body if pull_request is None else {**body, "pullRequestUrl": pull_request})

    # -- downloads

    def _resolve(self, request: Request, account: Account | None, repo: Repo, revision: str, path: str) -> Answer:
        name = None if account is None else account.name
        if repo.gated and name not in {repo.namespace, *repo.consented}:
            status = 401 if account is None else 403
            raise HubError(status, "GatedRepo", f"Access to model {repo.repo_id} is restricted.")
        commit = repo.at(revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            return HubError(404, "EntryNotFound", "Entry not found").answer(headers)
        file = commit.files[path]
        if not file.is_lfs:
            return answer_range(file.content, request.headers.get("Range"), {**headers, "ETag": f'"{file.etag}"'})
        headers["X-Linked-Etag"] = f'"{file.etag}"'
        headers["X-Linked-Size"] = str(len(file.content))
        headers["Location"] = self._storage_link(repo, file.etag)
        return Answer(302, headers=headers)

    def _storage_link(self, repo: Repo, oid: str) -> str:
        """Like a signed link of the Hub's storage: who has it needs no token."""
        return f"{self.storage_url}/storage/{repo.repo_type}s/{repo.repo_id}/{oid}?X-Amz-Signature={SIGNATURE}"

    def _stored_objects(self, kind: str, repo: str) -> dict[str, bytes]:
        stored = self.repos.get((kind.removesuffix("s"), repo))
        return {} if stored is None else stored.lfs_objects

    def _get_object(self, request: Request, account: Account | None, kind: str, repo: str, oid: str) -> Answer:
        objects = self._stored_objects(kind, repo)
        if oid not in objects:
            raise HubError(404, "", f"No LFS object {oid}")
        return answer_range(objects[oid], request.headers.get("Range"), {"ETag": f'"{oid}"'})

    def _put_object(self, request: Request, account: Account | None, kind: str, repo: str, oid: str) -> Answer:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, "", f"The uploaded bytes are not those of {oid}")
        self._stored_objects(kind, repo)[oid] = request.body
        return Answer(headers={"ETag": f'"{oid}"'})


class Route(NamedTuple):
    """Which method of `HubApi` answers which requests.

    `pattern` matches the whole path; its groups become arguments. With an `access`, the groups `kind` and `repo` become
    the repository, once the sender is seen to have that access.
    """

    method: str
    pattern: str
    handler: Callable[..., Answer]
    access: Access | None = None


_KIND = "models|datasets|spaces"
_NAME = "[^/]+(?:/[^/]+)?"
_REPO = f"/api/(?P<kind>{_KIND})/(?P<repo>{_NAME})"
_PAGE = f"/(?:(?P<kind>datasets|spaces)/)?(?P<repo>{_NAME})"
_OBJECT = f"/storage/(?P<kind>{_KIND})/(?P<repo>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{{64}})"
_REVISION = "(?P<revision>[^/]+)"
_REF = "(?P<name>[^/]+)"

ROUTES = (
    Route("GET", "/api/whoami-v2", HubApi._whoami),
    Route("GET", "/api/agent-harnesses", HubApi._agent_harnesses),
    Route("POST", "/api/validate-yaml", HubApi._validate_card),
    Route("POST", "/api/repos/create", HubApi._create_repo),
    Route("DELETE", "/api/repos/delete", HubApi._delete_repo),
    Route("GET", f"{_REPO}/auth-check", HubApi._check_access, "read"),
    Route("GET", f"{_REPO}/auth-check/write", HubApi._check_access, "write"),
    Route("PUT", f"{_REPO}/settings", HubApi._update_settings, "write"),
    Route("GET", f"{_REPO}/revision/{_REVISION}", HubApi._repo_info, "read"),
    Route("GET", f"{_REPO}/tree/{_REVISION}(?:/(?P<path>.+))?", HubApi._list_tree, "read"),
    Route("POST", f"{_REPO}/paths-info/{_REVISION}", HubApi._paths_info, "read"),
    Route("GET", f"{_REPO}/commits/{_REVISION}", HubApi._list_commits, "read"),
    Route("GET", f"{_REPO}/refs", HubApi._list_refs, "read"),
    Route("POST", f"{_REPO}/branch/{_REF}", HubApi._create_branch, "write"),
    Route("DELETE", f"{_REPO}/branch/{_REF}", HubApi._delete_branch, "write"),
    Route("POST", f"{_REPO}/tag/{_REVISION}", HubApi._create_tag, "write"),
    Route("DELETE", f"{_REPO}/tag/{_REF}", HubApi._delete_tag, "write"),
    Route("POST", f"{_REPO}/preupload/{_REVISION}", HubApi._preupload, "write"),
    Route("POST", f"{_REPO}/commit/{_REVISION}", HubApi._commit, "write"),
    Route("GET", _REPO, HubApi._repo_info, "read"),
    Route("POST", rf"{_PAGE}\.git/info/lfs/objects/batch", HubApi._lfs_batch, "contribute"),
    Route("POST", rf"{_PAGE}\.git/info/lfs/objects/verify", HubApi._lfs_verify, "contribute"),
    Route("GET", f"{_PAGE}/resolve/{_REVISION}/(?P<path>.+)", HubApi._resolve, "read"),
    Route("GET", _OBJECT, HubApi._get_object),
    Route("PUT", _OBJECT, HubApi._put_object),
)
"""Every request that is understood. The first that matches answers, so a bare repository comes after its parts."""


# ------------------------------------------------------------------------------- faults, log and server


@dataclass(frozen=True)
class LoggedRequest:
    """One request and its answer; `status` is None where the connection was closed without one."""

    method: str
    path: str
    query: str
    status: int | None
    authorized: bool
    """Whether it had an Authorization header (the token itself is not kept)."""
    size_bytes: int = 0
    """Of its body."""


@dataclass
class Fault:
    """A failure to come, made by `LocalHub.inject`; `remaining` counts down to 0."""

    method: str
    path_pattern: str
    status: int
    remaining: int
    drop: bool
    carry_out: bool
    headers: Mapping[str, str]
    skip: int
    hang_s: float

    def strikes(self, request: Request) -> bool:
        """Whether it is this request's turn to fail; counts down those that are let pass."""
        is_method = self.method in {request.method, "*"}
        if self.remaining < 1 or not is_method or not re.search(self.path_pattern, unquote(request.path)):
            return False
        self.skip -= 1
        return self.skip < 0

    def answer(self) -> Answer | None:
        """What the failing request gets; None closes its connection."""
        return None if self.drop else HubError(self.status, "", HTTPStatus(self.status).phrase).answer(self.headers)


class LocalHub:
    """A Hub of one's own, served from this process from `start` to `stop` (or within a `with`).

    Args:
        users: Token to user name; one user, `USER` with `TOKEN`, unless told otherwise.

    Attributes:
        requests: Every request so far, in the order in which they were answered.
        crashes: Exceptions of the stand-in itself. A test that finds any here has found a defect of this file.
    """

    def __init__(self, users: Mapping[str, str] | None = None) -> None:
        self.accounts = {token: Account(name) for token, name in (users or {TOKEN: USER}).items()}
        self.requests: list[LoggedRequest] = []
        self.crashes: list[BaseException] = []
        self._faults: list[Fault] = []
        self._servers: list[_Server] = []
        self._api = HubApi(self.accounts, url="", storage_url="")
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._home: tempfile.TemporaryDirectory[str] | None = None

    # -- life

    def start(self) -> LocalHub:
        """Serve on two free ports: the Hub's interface and its storage."""
        if self._servers:
            raise RuntimeError(f"this hub is already served at {self.url}; stop it first")
        self._stopping.clear()
        self._home = tempfile.TemporaryDirectory(prefix="local_hub_client_", ignore_cleanup_errors=True)
        self._servers = [_Server(self), _Server(self)]
        self._api.url, self._api.storage_url = (server.url for server in self._servers)
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def stop(self) -> None:
        """Close the ports and every open connection; what was pushed can still be read with `files`."""
        self._stopping.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()
            server.close_connections()
        self._servers = []
        if self._home is not None:
            self._home.cleanup()
            self._home = None

    def __enter__(self) -> LocalHub:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where the Hub is, for `HF_ENDPOINT` or `HfApi(endpoint=...)`."""
        return self._api.url

    @property
    def client_home(self) -> Path:
        """A folder for a client's caches (`HF_HOME`), there from `start` to `stop`."""
        if self._home is None:
            raise RuntimeError("this hub is not being served; call start() first")
        return Path(self._home.name)

    # -- what a test prepares

    def add_user(
        self,
        name: str,
        *,
        token: str | None = None,
        role: Literal["read", "write"] = "write",
        organizations: Iterable[str] = (),
    ) -> str:
        """Make a user and return the token, made up from the name unless given."""
        token = token or f"hf_token_of_{name}"
        self.accounts[token] = Account(name, role, tuple(organizations))
        return token

    def create_repo(
        self,
        repo_id: str,
        *,
        repo_type: str = "model",
        private: bool = False,
        gated: bool = False,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Make a repository without a request; `files` are in its first commit.

        The files of a gated one are for its owner, and for those who `consent`.
        """
        with self._lock:
            if (repo_type, repo_id) in self._api.repos:
                raise ValueError(f"there is a {repo_type} {repo_id} already; choose another id")
            self._api.new_repo(repo_type, repo_id, private=private, files=files or {}).gated = gated

    def consent(self, repo_id: str, user: str, *, repo_type: str = "model") -> None:
        """Give a user access to the files of a gated repository."""
        with self._lock:
            self._repo(repo_type, repo_id).consented.add(user)

    def overwrite(self, repo_id: str, path: str, content: bytes | None, *, revision: str = "main") -> None:
        """Commit another content of one file of a model without a request, or its removal."""
        with self._lock:
            repo = self._repo("model", repo_id)
            head = repo.at(revision)
            files = {name: file for name, file in head.files.items() if name != path}
            if content is not None:
                files[path] = StoredFile(content, _goes_to_lfs(path, len(content)))
                if files[path].is_lfs:
                    repo.lfs_objects[files[path].etag] = content
            repo.add_commit(revision, files, parent=head.oid, title=f"Change {path}", author=repo.namespace)

    def inject(
        self,
        method: str,
        path_pattern: str,
        *,
        status: int = 503,
        times: int = 2,
        drop: bool = False,
        carry_out: bool = False,
        headers: Mapping[str, str] | None = None,
        skip: int = 0,
        hang_s: float = 0,
    ) -> Fault:
        """Let the next matching requests fail. Faults are looked at in the order in which they were injected.

        Args:
            method: "GET", "POST", ...; "*" is any.
            path_pattern: A regular expression, searched in the decoded path (without the query).
            status: The status of the answer, in [400, 599].
            times: How many requests fail.
            drop: Close the connection instead of answering.
            carry_out: Do what was asked before failing, as when only the answer gets lost on its way.
            headers: More headers for the answer, such as `Retry-After`.
            skip: How many matching requests pass before.
            hang_s: Seconds to wait before failing, at most until the hub is stopped.

        Raises:
            ValueError: `status` or `times` is out of range.
        """
        if not 400 <= status <= 599 or times < 1:
            raise ValueError(f"status must be in [400, 599] and times at least 1, not {status} and {times}")
        fault = Fault(method, path_pattern, status, times, drop, carry_out, headers or {}, skip, hang_s)
        with self._lock:
            self._faults.append(fault)
        return fault

    def heal(self) -> None:
        """Forget all faults that have not struck yet."""
        with self._lock:
            self._faults.clear()

    # -- what a test looks at

    def files(self, repo_id: str, revision: str = "main", *, repo_type: str = "model") -> dict[str, bytes]:
        """What a revision holds: path to bytes, LFS files included."""
        with self._lock:
            files = self._repo(repo_type, repo_id).at(revision).files
            return {path: file.content for path, file in files.items()}

    def commits(self, repo_id: str, revision: str = "main", *, repo_type: str = "model") -> list[Commit]:
        """The commits up to a revision, newest first; the last one is the one that made the repository."""
        with self._lock:
            return self._repo(repo_type, repo_id).history(revision)

    def is_private(self, repo_id: str, *, repo_type: str = "model") -> bool:
        """Whether only its owner sees the repository."""
        with self._lock:
            return self._repo(repo_type, repo_id).private

    def repo_ids(self, *, repo_type: str = "model") -> list[str]:
        """The repositories there are, sorted."""
        with self._lock:
            return sorted(repo_id for kind, repo_id in self._api.repos if kind == repo_type)

    def requests_to(self, method: str, path_pattern: str) -> list[LoggedRequest]:
        """The logged requests of a method ("*" is any) in whose path the regular expression is found."""
        with self._lock:
            return [
                logged
                for logged in self.requests
                if method in {logged.method, "*"} and re.search(path_pattern, logged.path)
            ]

    def heads(self, repo_id: str, *, repo_type: str = "model") -> dict[str, str]:
        """Branches and pull requests, each with its newest commit; empty where there is no such repository."""
        with self._lock:
            repo = self._api.repos.get((repo_type, repo_id))
            return {} if repo is None else dict(repo.heads)

    def _repo(self, repo_type: str, repo_id: str) -> Repo:
        repo = self._api.repos.get((repo_type, repo_id))
        if repo is None:
            raise KeyError(f"no {repo_type} {repo_id}; there are {self.repo_ids(repo_type=repo_type)}")
        return repo

    # -- what the server calls

    def answer(self, request: Request) -> Answer | None:
        """Answer a request, or fail it if a fault strikes; None is to close the connection."""
        with self._lock:
            fault = next((fault for fault in self._faults if fault.strikes(request)), None)
            answer = self._api.dispatch(request) if fault is None or fault.carry_out else None
            if fault is not None:
                fault.remaining -= 1
                answer = fault.answer()
            status = None if answer is None else answer.status
            authorized, path = request.token is not None, unquote(request.path)
            logged = LoggedRequest(request.method, path, request.query, status, authorized, len(request.body))
            self.requests.append(logged)
        if fault is not None and fault.hang_s:
            self._stopping.wait(fault.hang_s)
        return answer


class _Server(ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128  # the client downloads with many threads, and five in the queue is the default

    def __init__(self, hub: LocalHub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._connections: set[socket.socket] = set()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        for connection in list(self._connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # the client was faster

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, ConnectionError):
            self.hub.crashes.append(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: together they would wait 40 ms for an ACK
    server: _Server
    _request_numbers = itertools.count(1)

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        request = Request(self.command, parts.path, parts.query, self.headers, self._read_body())
        answer = self.server.hub.answer(request)
        if answer is None:
            self.close_connection = True
        else:
            self._write(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            continue  # trailers
        return b"".join(chunks)

    def _write(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, text in answer.headers.items():
            self.send_header(name, text)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.content)))
        self.send_header("X-Request-Id", f"local-{next(self._request_numbers)}")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.content)

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent: `LocalHub.requests` is the log."""
