"""A path's nodes where they lie: folders, or branches on the Hub that are fetched as they are needed."""

import logging
from pathlib import Path
from typing import Any

from ..hub.files import inside
from ..hub.repository import Files, HubError, Repository, write_files
from ..models.pipeline_folder import files_of


logger = logging.getLogger(__name__)


class FolderNodes:
    """Nodes in a folder.

    Args:
        folder (`Path`): The path's.
        denoiser (`str`): The component that nodes are of, and their folder's name.
    """

    def __init__(self, folder: Path, denoiser: str):
        self.folder = folder
        self.denoiser = denoiser
        self.where = str(folder)
        self.downloaded: list[str] = []

    def fetch(self, node: dict[str, Any]) -> Path:
        """Returns the folder of a node."""
        return inside(self.folder, node["name"], f"path.json of {self.where}")

    def copy(self, node: dict[str, Any], folder: Path) -> None:
        """Writes a node's files into a new folder."""
        write_files(node_files(self.fetch(node), self.denoiser), folder)

    def release(self, node: dict[str, Any]) -> None:
        """Keeps it: what was recorded stays."""


class HubNodes:
    """Nodes in branches of a repository, at the commits that `path.json` pins, downloaded into the cache.

    Args:
        repository (`Repository`): On the Hub.
        commit (`str`): Of the `path.json` that lists them.
        nodes (`list[dict]`): Of `path.json`.
        denoiser (`str`): The component that nodes are of, and their folder's name.
        cache_dir (`str`, *optional*): Where downloads are kept.
        disk_budget_gb (`float`, *optional*): Of nodes that this object downloads. Beyond it those that are released are
            deleted, oldest first; nodes that were in the cache before are left alone.

    Raises:
        HubError: If a node's branch is gone.
        ValueError: If the budget does not hold two nodes, the target and the one that comes next.
    """

    def __init__(
        self,
        repository: Repository,
        commit: str,
        nodes: list[dict[str, Any]],
        denoiser: str,
        cache_dir: str | None = None,
        disk_budget_gb: float | None = None,
    ):
        self.repository = repository
        self.denoiser = denoiser
        self._patterns = [f"{denoiser}/*", "node.json"]
        self.commit = commit
        self.where = repository.repo_id
        self.cache_dir = cache_dir
        self.budget = None if disk_budget_gb is None else disk_budget_gb * 1e9
        sizes = sorted(node["bytes"] for node in nodes)
        if self.budget is not None and sum(sizes[-2:]) > self.budget:
            raise ValueError(
                f"A disk budget of {disk_budget_gb:g} GB does not hold two nodes of {self.where}, which take "
                f"{sum(sizes[-2:]) / 1e9:.3g} GB: the target and the one after it."
            )
        self._nodes = {node["name"]: node for node in nodes}
        self._released: list[dict[str, Any]] = []
        self._fetched: dict[str, dict[str, Any]] = {}
        self._kept = {node["name"] for node in nodes if self._is_cached(node)}
        self._compare(nodes)

    def fetch(self, node: dict[str, Any]) -> Path:
        """Returns the folder of a node, after a download if need be."""
        self._make_room(node)
        folder = self.repository.download(self._patterns, node["commit"], self.cache_dir)
        if node["name"] not in self._kept:
            self._fetched[node["name"]] = node
        return folder

    def copy(self, node: dict[str, Any], folder: Path) -> None:
        """Writes a node's files into a new folder."""
        self.repository.download_to(folder, self._patterns, node["commit"])

    def release(self, node: dict[str, Any]) -> None:
        """Marks a node as not needed any more."""
        self._released.append(node)

    @property
    def downloaded(self) -> list[str]:
        """The names of the nodes that were not in the cache before."""
        return list(self._fetched)

    @downloaded.setter
    def downloaded(self, names: list[str]) -> None:
        """Takes over what the same run downloaded before it was resumed."""
        self._kept -= set(names)
        self._fetched = {name: self._nodes[name] for name in names} | self._fetched

    def _make_room(self, node: dict[str, Any]) -> None:
        """Deletes released nodes from the cache, oldest first, until another one fits."""
        if self.budget is None or node["name"] in self._kept:
            return
        from huggingface_hub import scan_cache_dir

        def size() -> int:
            return sum(each["bytes"] for each in {**self._fetched, node["name"]: node}.values())

        while self._released and size() > self.budget:
            old = self._released.pop(0)
            if self._fetched.pop(old["name"], None) is None:
                continue
            try:
                scan_cache_dir(self.cache_dir).delete_revisions(old["commit"]).execute()
            except OSError as error:
                logger.warning(f"{old['name']} of {self.where} could not be deleted from the cache: {error}")

    def _is_cached(self, node: dict[str, Any]) -> bool:
        from huggingface_hub import try_to_load_from_cache

        name, commit = self.repository.repo_id, node["commit"]
        return all(
            isinstance(try_to_load_from_cache(name, f"{self.denoiser}/{file}", self.cache_dir, commit), str)
            for file in node["files"]
        )

    def _compare(self, nodes: list[dict[str, Any]]) -> None:
        """Checks that every branch is there, and tells of those that moved."""
        try:
            branches = self.repository.branches()
        except HubError as error:
            if error.kind not in ("unreachable", "offline"):
                raise
            logger.warning(f"{error} Whether the branches of {self.where} have moved is not known.")
            return
        for node in nodes:
            head = branches.get(node["branch"])
            if head is None:
                raise HubError(
                    f"{self.where} lists the node {node['branch']}, but the branch is gone. Ask its owner, or take an "
                    "older revision of the path."
                )
            if head != node["commit"]:
                logger.warning(
                    f"The branch {node['branch']} of {self.where} has moved from {node['commit'][:12]} to {head[:12]} "
                    "since the path was published. The published commit is used."
                )


Nodes = FolderNodes | HubNodes
"""The folders of a path's nodes, each with its denoiser's folder and `node.json`."""


def node_files(folder: Path, denoiser: str) -> Files:
    """The files of a node's folder, by their path in it.

    Args:
        folder (`Path`): Of the node.
        denoiser (`str`): The component that it is of.

    Raises:
        ValueError: If one is missing, or a link that leads out of the folder.
    """
    what = f"the node in {folder}"
    own = inside(folder, "node.json", what)
    if not own.is_file():
        raise ValueError(f"{what} has no node.json: it is not whole.")
    files = [own, *files_of(folder / denoiser, what, folder)]
    return {file.relative_to(folder).as_posix(): file for file in files}
