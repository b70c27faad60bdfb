"""A model repository on the Hub. What is written to it can be repeated: a repetition changes nothing."""

import errno
import hashlib
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from .files import inside, read_json


logger = logging.getLogger(__name__)
T = TypeVar("T")
Files = dict[str, Path | bytes]  # path in the repository -> file on disk, or content

# Seconds before each new attempt at what failed for a reason that may pass. The client's own retries come on top.
WAITS = (2, 10, 60, 300)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class HubError(ValueError):
    """What the Hub did not do, and what to do about it.

    Args:
        message (`str`): In words for the user.
        passes (`bool`): Whether the same may succeed later, unchanged.
        wait (`float`): Seconds that the Hub asked to wait before.
        kind (`str`): The same for errors of the same reason, whatever their words.
    """

    def __init__(self, message: str, passes: bool = False, wait: float = 0.0, kind: str = ""):
        super().__init__(message)
        self.passes = passes
        self.wait = wait
        self.kind = kind or message


def is_repo_id(name: str | Path) -> bool:
    """Whether a name is a repository's and no folder's: `user/repo`. An existing folder, `./a/b` and `/a/b` are not."""
    name = str(name)
    return _REPO_ID.fullmatch(name) is not None and ".." not in name and not os.path.isdir(name)


def is_licence(name: str) -> bool:
    """Whether a file at the root of a model holds the text of its licence."""
    return name.upper().startswith(("LICENSE", "LICENCE"))


def write_files(files: Files, folder: Path) -> None:
    """Writes files into a folder; others in it stay.

    Raises:
        ValueError: If a file's place is not in the folder; then none is written.
    """
    places = {path: inside(folder, path, f"what is written to {folder}") for path in files}
    for path, content in files.items():
        places[path].parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            places[path].write_bytes(content)
        else:
            shutil.copyfile(content, places[path])


def in_background(function: Callable[..., T], *arguments: Any) -> "Future[T]":
    """Calls a function in a thread that does not keep the process alive."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:  # it is raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


class Repository:
    """A model repository, by its id. No method overwrites a commit that it has not seen.

    Args:
        repo_id (`str`): `user/name`; a bare name is completed by `create`.
        token (`str`, *optional*): By default that of `hf auth login` or `HF_TOKEN`. It is never written anywhere.
        patient (`bool`): Try again, after minutes at last, what may succeed later.
    """

    def __init__(self, repo_id: str, token: str | None = None, patient: bool = True):
        from huggingface_hub import HfApi
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise HubError(f"{repo_id!r} is no name of a repository. {error}") from error
        self.repo_id = repo_id
        self.token = token
        self.patient = patient
        self.api = HfApi(token=token)
        self._trees: dict[str, dict[str, Any]] = {}  # of commits, which do not change

    @property
    def url(self) -> str:
        """Its page."""
        return f"{self.api.endpoint}/{self.repo_id}"

    def create(self, private: bool | None = None) -> None:
        """Makes the repository if it is not there.

        Args:
            private (`bool`, *optional*): Of a new one; by default as the account has it.
        """
        self.repo_id = self._try(
            lambda: self.api.create_repo(self.repo_id, private=private, exist_ok=True, repo_type="model").repo_id
        )
        if private and not self.is_private():
            raise HubError(
                f"{self.repo_id} is there and is public, but a private one was asked for. Make it private in its "
                "settings, or push to another repository."
            )

    def branches(self) -> dict[str, str]:
        """The head commit of every branch."""
        refs = self._try(lambda: self.api.list_repo_refs(self.repo_id))
        return {branch.name: branch.target_commit for branch in refs.branches}

    def pull_requests(self) -> list[str]:
        """The head commit of every pull request."""
        refs = self._try(lambda: self.api.list_repo_refs(self.repo_id, include_pull_requests=True))
        return [pull_request.target_commit for pull_request in refs.pull_requests or []]

    def head(self, revision: str | None = None) -> str:
        """The commit that a branch or tag means now."""
        return self._try(lambda: self.api.model_info(self.repo_id, revision=revision).sha)

    def is_private(self) -> bool:
        """Whether others cannot see it."""
        return self._try(lambda: bool(self.api.model_info(self.repo_id).private))

    def history(self, branch: str = "main") -> set[str]:
        """All commits of a branch."""
        commits = self._try(lambda: self.api.list_repo_commits(self.repo_id, revision=branch))
        return {commit.commit_id for commit in commits}

    def tree(self, commit: str) -> dict[str, Any]:
        """Every file of a commit, by path, with its `blob_id` and, if it is large, `lfs.sha256`."""
        if commit not in self._trees:
            entries = self._try(lambda: list(self.api.list_repo_tree(self.repo_id, recursive=True, revision=commit)))
            self._trees[commit] = {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}
        return self._trees[commit]

    def file(self, path: str, revision: str | None = None, cache_dir: str | None = None) -> Path | None:
        """One file, downloaded into the cache, or found there if the Hub cannot be asked; `None` if there is none.

        Its folder's name is the commit.
        """
        from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import RemoteEntryNotFoundError

        def attempt() -> Path | None:
            try:
                return Path(
                    hf_hub_download(self.repo_id, path, revision=revision, cache_dir=cache_dir, token=self.token)
                )
            except RemoteEntryNotFoundError:
                return None

        try:
            return self._try(attempt)
        except HubError as error:
            cached = try_to_load_from_cache(self.repo_id, path, cache_dir, revision)
            if cached is _CACHED_NO_EXIST and _COMMIT.fullmatch(
                revision or ""
            ):  # as the Hub said before, and for good
                return None
            if not (error.passes or error.kind == "cache") or not isinstance(cached, str):
                raise
            logger.warning(f"{error} {path} is taken from the cache.")
            return Path(cached)

    def read_json(self, path: str, commit: str) -> Any:
        """The content of a JSON file at a commit; `None` if there is none, or it is no JSON object."""
        file = self.file(path, commit) if path in self.tree(commit) else None
        try:
            return file and read_json(file)
        except ValueError:
            return None

    def download(self, patterns: list[str], revision: str | None = None, cache_dir: str | None = None) -> Path:
        """The folder in the cache with the files of a revision that match; if the Hub cannot be asked, with those that
        are there."""
        from huggingface_hub import snapshot_download

        def attempt(local: bool) -> Path:
            return Path(
                snapshot_download(
                    self.repo_id,
                    revision=revision,
                    allow_patterns=patterns,
                    cache_dir=cache_dir,
                    token=self.token,
                    local_files_only=local,
                )
            )

        try:
            return self._try(lambda: attempt(local=False))
        except HubError as error:
            if not (error.passes or error.kind == "cache"):
                raise
            try:
                found = attempt(local=True)
            except OSError:  # nothing of it is in the cache
                raise error from None
            if error.kind == "cache":
                logger.warning(f"{error} What is there already is taken.")
            return found

    def download_to(self, folder: Path, patterns: list[str], revision: str) -> None:
        """Writes the files of a commit that match into a folder, past the cache.

        Raises:
            ValueError: If the commit holds a file whose name leads out of the folder; then nothing is downloaded.
        """
        from huggingface_hub import snapshot_download

        for path in self.tree(revision):
            inside(folder, path, f"the repository {self.repo_id}")
        self._try(
            lambda: snapshot_download(
                self.repo_id, revision=revision, allow_patterns=patterns, local_dir=folder, token=self.token
            )
        )
        shutil.rmtree(folder / ".cache")  # the client's notes

    def create_branch(self, name: str) -> None:
        """Makes a branch at main's head, unless there is one of this name."""
        self._try(lambda: self.api.create_branch(self.repo_id, branch=name, exist_ok=True))

    def commit(
        self,
        files: Files,
        message: str,
        branch: str = "main",
        exact: tuple[str, ...] = (),
        check: Callable[[str], None] | None = None,
        create_pr: bool = False,
    ) -> str:
        """Makes a branch hold files, in one commit, and in none if it holds them already. Returns its head.

        Args:
            files (`Files`): What it has to hold.
            message (`str`): Of the commit.
            branch (`str`): It has to exist.
            exact (`tuple[str, ...]`): Folders, such as `"unet/"` or `""` for all, that are to hold nothing else.
            check (`Callable`, *optional*): Asked with the head before anything is written; raises to forbid it. What it
                saw is what is written to: a commit that others make in between is seen by a new attempt.
            create_pr (`bool`): Propose the commit as a pull request instead.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        def attempt() -> str:
            head = self.head(branch)
            if check is not None:
                check(head)
            there = self.tree(head)
            operations = [
                CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
                for path, content in files.items()
                if path not in there or not _is_same(there[path], content)
            ]
            operations += [
                CommitOperationDelete(path, is_folder=False)
                for path in there
                if exact and path.startswith(exact) and path not in files and path != ".gitattributes"
            ]
            if not operations:
                return head
            if create_pr:
                for proposed in self.pull_requests():
                    tree = self.tree(proposed)
                    if all(path in tree and _is_same(tree[path], content) for path, content in files.items()):
                        return proposed
            info = self.api.create_commit(
                self.repo_id,
                operations,
                commit_message=message,
                revision=branch,
                parent_commit=head,
                create_pr=create_pr,
            )
            return info.oid

        return self._try(attempt)

    def _try(self, action: Callable[[], T]) -> T:
        """Does it, again and again while the reason for a failure may pass.

        Raises:
            HubError: In the end, or at once for a reason that does not pass.
        """
        from huggingface_hub.errors import HTTPError

        for wait in (*(WAITS if self.patient else ()), None):
            try:
                return action()
            except HubError:
                raise  # of an action within this one, which has had its attempts
            except (HTTPError, OSError, RuntimeError) as error:
                problem = explain(error, self.repo_id)
                if not problem.passes or wait is None:
                    raise problem from error
                wait = max(wait, problem.wait)
                logger.warning(f"{problem} Trying again in {wait:.0f} s.")
                time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")


def explain(error: Exception, repo_id: str) -> HubError:
    """An error of the Hub's client in words that tell what to do."""
    from huggingface_hub import constants, errors

    # The client tells of a failed upload by a RuntimeError, caused by the error that says why.
    uploading = type(error) is RuntimeError
    error = error.__cause__ if uploading and isinstance(error.__cause__, Exception) else error
    said = _own_words(error)
    if isinstance(error, errors.OfflineModeIsEnabled) or isinstance(error.__cause__, errors.OfflineModeIsEnabled):
        message = f"What is asked of {repo_id} is not in the cache, and HF_HUB_OFFLINE forbids to ask the Hub."
        return HubError(message, kind="offline")
    if isinstance(error, errors.GatedRepoError):
        return HubError(
            f"{repo_id} is gated: accept its conditions at {constants.ENDPOINT}/{repo_id}, and log in with `hf auth "
            "login` as who accepted them."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{repo_id} has no such branch, tag or commit. {said}")
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if status == 401 or "Authentication" in type(error).__name__:
        return HubError(
            f"The Hub knows no {repo_id} for this token: the name is wrong, the repository is private, or the token "
            f"has expired or is missing. Log in with `hf auth login`, or pass a token. {said}",
            kind="401",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(
            f"{repo_id} is no model on the Hub that this token may see: check its name, or log in with `hf auth login`."
        )
    if status == 412:
        return HubError(f"{repo_id} was changed by somebody else at the same time. {said}", passes=True, kind="412")
    if status in (402, 413) or (status and re.search(r"quota|storage limit|too large", said, re.IGNORECASE)):
        return HubError(f"The Hub does not take more into {repo_id}: a quota or limit of the account. {said}")
    if status == 403 and not uploading:  # an upload's address, which goes to the storage, may just have expired
        return HubError(
            f"This token has no right to do this with {repo_id}: it belongs to somebody else, or the token is for "
            f"reading. {said}"
        )
    if status in (403, 408, 429) or (status is not None and status >= 500):
        wait = error.response.headers.get("Retry-After", "")
        seconds = min(float(wait), 600.0) if wait.isdigit() else 0.0
        message = f"The Hub cannot serve {repo_id} now (status {status}). {said}"
        return HubError(message, passes=True, wait=seconds, kind=f"status {status}")
    if status is not None:
        return HubError(f"The Hub refused {repo_id} (status {status}). {said}", kind=f"status {status}")
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return HubError(f"There is no space left on this machine's disk. {said}", kind="disk")
    if getattr(error, "errno", None) in (errno.EROFS, errno.EACCES, errno.EPERM):
        return HubError(
            f"For {repo_id}, {error.filename} cannot be written to or read ({error.strerror}). If it is in the Hub's cache, "
            "pass another with --cache_dir.",
            kind="cache",
        )
    is_local = isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError))
    if is_local and not isinstance(error, errors.LocalEntryNotFoundError):
        return HubError(f"What {repo_id} is asked for, or given, is not there. {said}")
    return HubError(f"The Hub cannot be reached for {repo_id}. {said}", passes=True, kind="unreachable")


def _own_words(error: Exception) -> str:
    """What the client said, without addresses: they name single requests, and may hold a right to upload."""
    said = getattr(error, "server_message", None)
    if said is None and not hasattr(error, "response"):
        said = re.sub(r"https?://\S+", "...", str(error))
    lines = (said or "").strip().splitlines()
    return f"({type(error).__name__}{': ' + lines[0] if lines else ''})"


def sha256_of(file: Path) -> str:
    """Of a file's content."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def known_sha256(file: Path) -> str:
    """Of a file's content, which is read once in a process, and again only if its size or time of change is another."""
    stat = file.stat()
    return _known_sha256(file.resolve(), stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=512)
def _known_sha256(file: Path, mtime_ns: int, size: int) -> str:
    return sha256_of(file)


def is_file(entry: Any | None, sha256: str) -> bool:
    """Whether a large file is in a repository's tree, and is the one with this hash."""
    return entry is not None and entry.lfs is not None and entry.lfs.sha256 == sha256


def _is_same(entry: Any, content: Path | bytes) -> bool:
    """Whether a file of a repository has this content, as far as hashes tell."""
    if isinstance(content, Path):
        stat = content.stat()
        if entry.size == stat.st_size and entry.lfs is not None:
            return known_sha256(content) == entry.lfs.sha256
        if entry.size != stat.st_size:
            return False
        content = content.read_bytes()
    if entry.lfs is not None:
        return hashlib.sha256(content).hexdigest() == entry.lfs.sha256
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == entry.blob_id
