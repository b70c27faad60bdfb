"""A model repository on the Hub. What is written to it can be repeated: a repetition changes nothing."""

import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from .errors import HubError, explain
from .files import inside, read_json


logger = logging.getLogger(__name__)
T = TypeVar("T")
Files = dict[str, Path | bytes]  # path in the repository -> file on disk, or content

WAITS = (5, 60)  # seconds before a new attempt at a commit, the one request of a push that the client does not repeat
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


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
    """

    def __init__(self, repo_id: str, token: str | None = None):
        from huggingface_hub import HfApi
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise HubError(f"{repo_id!r} is no name of a repository. {error}") from error
        self.repo_id = repo_id
        self.token = token
        self.api = HfApi(token=token)
        self._trees: dict[str, dict[str, Any]] = {}  # of commits, which do not change

    @property
    def url(self) -> str:
        """The address of its page."""
        return f"{self.api.endpoint}/{self.repo_id}"

    def _call(self, method: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
        """Calls a method of the client with the repository's id. Raises a `HubError` if it fails."""
        from huggingface_hub.errors import HTTPError

        try:
            return method(self.repo_id, *arguments, **keywords)
        except (HTTPError, OSError, RuntimeError) as error:
            raise explain(error, self.repo_id) from error

    def create(self, private: bool | None = None) -> None:
        """Makes the repository if it is not there.

        Args:
            private (`bool`, *optional*): Of a new one; by default as the account has it.
        """
        self.repo_id = self._call(self.api.create_repo, private=private, exist_ok=True, repo_type="model").repo_id
        if private and not self.is_private():
            raise HubError(
                f"{self.repo_id} is there and is public, but a private one was asked for. Make it private in its "
                "settings, or push to another repository."
            )

    def branches(self) -> dict[str, str]:
        """The head commit of every branch."""
        return {branch.name: branch.target_commit for branch in self._call(self.api.list_repo_refs).branches}

    def head(self, revision: str | None = None) -> str:
        """The commit that a branch or tag means now."""
        commit = self._call(self.api.model_info, revision=revision).sha
        if commit is None:
            raise HubError(f"The Hub names no commit of {self.repo_id} at {revision or 'main'}.")
        return commit

    def is_private(self) -> bool:
        """Whether others cannot see it."""
        return bool(self._call(self.api.model_info).private)

    def history(self, branch: str = "main") -> set[str]:
        """All commits of a branch."""
        return {commit.commit_id for commit in self._call(self.api.list_repo_commits, revision=branch)}

    def tree(self, commit: str) -> dict[str, Any]:
        """Every file of a commit, by path, with its `blob_id` and, if it is large, `lfs.sha256`."""
        if commit not in self._trees:
            entries = self._call(lambda name: list(self.api.list_repo_tree(name, recursive=True, revision=commit)))
            self._trees[commit] = {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}
        return self._trees[commit]

    def _download(self, method: Callable[..., str], *arguments: Any, **keywords: Any) -> Path:
        """Calls a method that downloads; if the Hub cannot be asked, or the cache not written to, takes what is there."""
        try:
            return Path(self._call(method, *arguments, **keywords))
        except HubError as error:
            if error.kind not in ("unreachable", "cache"):
                raise
            try:
                found = method(self.repo_id, *arguments, **keywords, local_files_only=True)
            except OSError:  # nothing of it is in the cache
                raise error from None
            logger.warning(f"{error} What is in the cache is taken.")
            return Path(found)

    def file(self, path: str, revision: str | None = None, cache_dir: str | None = None) -> Path | None:
        """One file, downloaded into the cache, or found there if the Hub cannot be asked; `None` if there is none.

        Its folder's name is the commit.
        """
        from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
        from huggingface_hub.errors import RemoteEntryNotFoundError

        try:
            return self._download(self.api.hf_hub_download, path, revision=revision, cache_dir=cache_dir)
        except HubError as error:
            is_known = try_to_load_from_cache(self.repo_id, path, cache_dir, revision) is _CACHED_NO_EXIST
            if isinstance(error.__cause__, RemoteEntryNotFoundError) or (
                is_known and _COMMIT.fullmatch(revision or "")
            ):
                return None  # as the Hub says, or has said before of a commit, which does not change
            raise

    def header(self, path: str, commit: str) -> dict[str, tuple[str, list[int]]]:
        """The precision and the shape of every tensor of a safetensors file, of which nothing else is downloaded.

        Raises:
            HubError: If it is none.
        """
        from huggingface_hub.errors import SafetensorsParsingError

        try:
            tensors = self._call(self.api.parse_safetensors_file_metadata, path, revision=commit).tensors
        except (SafetensorsParsingError, AttributeError, TypeError, ValueError, RecursionError) as error:
            if isinstance(error, HubError):
                raise
            raise HubError(f"{path} of {self.repo_id} is no safetensors file.") from error
        for tensor in tensors.values():
            sound = isinstance(tensor.shape, list) and all(
                type(side) is int and 0 <= side < 2**48 for side in tensor.shape
            )
            if not sound or not isinstance(tensor.dtype, str):
                raise HubError(f"The header of {path} of {self.repo_id} is none of a safetensors file.")
        return {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}

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
        wanted = {"revision": revision, "allow_patterns": patterns, "cache_dir": cache_dir}
        return self._download(self.api.snapshot_download, **wanted)

    def download_to(self, folder: Path, patterns: list[str], revision: str) -> None:
        """Writes the files of a commit that match into a folder, past the cache.

        Raises:
            ValueError: If the commit holds a file whose name leads out of the folder; then nothing is downloaded.
        """
        for path in self.tree(revision):
            inside(folder, path, f"the repository {self.repo_id}")
        self._call(self.api.snapshot_download, revision=revision, allow_patterns=patterns, local_dir=folder)
        shutil.rmtree(folder / ".cache")  # the client's notes

    def create_branch(self, name: str) -> None:
        """Makes a branch at main's head, unless there is one of this name."""
        self._call(self.api.create_branch, branch=name, exist_ok=True)

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
            check (`Callable`, *optional*): Called with the head before anything is written; raises to forbid it. What it
                saw is what is written to: a commit that others make in between is seen by a new attempt.
            create_pr (`bool`): Propose the commit as a pull request instead.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        def attempt() -> str:
            head = self.head(branch)
            if check is not None:
                check(head)
            operations: list[Any] = [
                CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
                for path, content in files.items()
            ]
            operations += [
                CommitOperationDelete(path, is_folder=False)
                for path in self.tree(head)
                if exact and path.startswith(exact) and path not in files and path != ".gitattributes"
            ]
            keywords = {"commit_message": message, "revision": branch, "parent_commit": head, "create_pr": create_pr}
            return self._call(self.api.create_commit, operations, **keywords).oid

        for wait in (*WAITS, None):
            try:
                return attempt()
            except HubError as error:  # `changed` by somebody else, or by this commit, if its answer was lost
                if error.kind not in ("changed", "unreachable") or create_pr or wait is None:
                    raise
                logger.warning(f"{error} Trying again in {wait:.0f} s.")
                time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")
