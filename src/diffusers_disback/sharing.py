"""A path on its way to the Hub: a claim on `main`, and a branch for each node. Every part of it can be repeated."""

from typing import Any

from .branches import Nodes, node_files
from .manifest import MANIFEST, identity, to_bytes
from .repository import Files, HubError, Repository, is_file


def push_nodes(
    manifest: dict[str, Any], folders: Nodes, teacher_files: Files, repository: Repository
) -> dict[str, Any]:
    """Claims a repository for a path, and makes a branch of each node, as far as there is none of it yet.

    Args:
        manifest (`dict`): Of the path.
        folders (`Nodes`): Where its nodes lie.
        teacher_files (`Files`): What makes a pipeline of a node.
        repository (`Repository`): It exists.

    Returns:
        `dict`: The manifest, with the `branch` and `commit` of each node.

    Raises:
        HubError: If `main` or a branch of a node's name holds something else, or the Hub fails for good.
    """
    head = repository.head()
    check_main(repository, head, manifest)
    if MANIFEST not in repository.tree(head):
        claim = to_bytes({**manifest, "complete": False, "nodes": []})
        repository.commit({MANIFEST: claim}, "Begin a path", check=lambda head: check_main(repository, head, manifest))
    pushed = []
    branches = repository.branches()
    for node in manifest["nodes"]:
        name = node["name"]
        if name in branches:
            _check_branch(repository, node, branches[name])
        else:
            repository.create_branch(name)
        files = {**teacher_files, **node_files(folders.fetch(node))}
        commit = repository.commit(files, f"Add node {name}", branch=name, exact=("",))
        pushed.append({**node, "branch": name, "commit": commit})
    there = repository.read_json(MANIFEST, repository.head())
    if there is not None and there["complete"] and there["nodes"] == pushed:
        return there  # recorded twice: the first one's cost stands
    return {**manifest, "nodes": pushed}


def check_main(repository: Repository, commit: str, manifest: dict[str, Any]) -> None:
    """Sees that a repository's `main` is empty, or holds this path.

    Raises:
        HubError: With what differs.
    """
    tree = repository.tree(commit)
    if MANIFEST not in tree:
        foreign = sorted(path for path in tree if not path.startswith((".git", "README", "LICEN")))
        if foreign:
            raise HubError(
                f"{repository.repo_id} holds {', '.join(foreign[:3])}, which are no part of a degradation path. Nothing "
                "was overwritten: push to another repository."
            )
        return
    there, ours = identity(repository.read_json(MANIFEST, commit)), identity(manifest)
    changed = {name: (there.get(name), ours.get(name)) for name in there | ours if there.get(name) != ours.get(name)}
    if changed:
        what = "; ".join(f"its {name} is {was}, this one's is {is_}" for name, (was, is_) in changed.items())
        raise HubError(
            f"{repository.repo_id} holds another degradation path: {what}. Nothing was overwritten: push to another "
            "repository."
        )


def _check_branch(repository: Repository, node: dict[str, Any], head: str) -> None:
    """Sees that a branch holds a node, or nothing of its own yet."""
    tree = repository.tree(head)
    if all(is_file(tree.get(f"unet/{name}"), sha256) for name, sha256 in node["files"].items()):
        return
    # A push that was cut off leaves a branch at a commit of main: nothing is lost by writing to it.
    if "node.json" in tree or head not in repository.history():
        raise HubError(
            f"The branch {node['name']} of {repository.repo_id} holds something else than this path's node. Nothing "
            f"was overwritten: push to another repository, or delete the branch "
            f"(`hf repos branch delete {repository.repo_id} {node['name']}`)."
        )
