"""A path on its way to the Hub: a claim on `main`, and a branch for each node. Every part of it can be repeated."""

import re
from typing import Any

from ..hub.files import printable, read_text, to_bytes
from ..hub.published import published_files, published_manifest
from ..hub.repository import Files, HubError, Repository, is_file, is_licence
from ..models.reference import ModelReference
from ..models.single_file import repo_of
from .manifest import MANIFEST, check_manifest, identity
from .storage import Nodes, node_files


def push_nodes(
    manifest: dict[str, Any], folders: Nodes, teacher_files: Files, repository: Repository, claim: bool = True
) -> dict[str, Any]:
    """Claims a repository for a path, and makes a branch of each node, as far as there is none of it yet.

    Args:
        manifest (`dict`): Of the path.
        folders (`Nodes`): Where its nodes lie.
        teacher_files (`Files`): What makes a pipeline of a node.
        repository (`Repository`): It exists.
        claim (`bool`): Write to `main` whose it is, before anything else.

    Returns:
        `dict`: The manifest as it is published, with the `branch` and `commit` of each node.

    Raises:
        HubError: If `main` or a branch of a node's name holds something else, or the Hub fails for good.
    """

    manifest = published_manifest(manifest)

    def check(head: str) -> None:
        check_main(repository, head, manifest)

    head = repository.head()
    if claim and MANIFEST not in repository.tree(head):
        empty = {**manifest, "complete": False, "nodes": []}
        repository.commit({MANIFEST: to_bytes(empty)}, "Begin a path", check=check)
    else:
        check(head)
    pushed = []
    branches = repository.branches()
    for node in manifest["nodes"]:
        commit = branches.get(node["name"])
        if commit is None or not _is_whole(repository, node, commit):
            files = published_files({**teacher_files, **node_files(folders.fetch(node))})
            commit = _push_node(repository, node, manifest["id"], files)
        pushed.append({**node, "branch": node["name"], "commit": commit})
    return {**manifest, "nodes": pushed}


def _push_node(repository: Repository, node: dict[str, Any], path_id: str, files: Files) -> str:
    """Makes a node's branch hold it, and nothing else."""

    def check(head: str) -> None:
        # What a push that was cut off leaves is at a commit of main. A node of this recording that main does not list was
        # pushed and then recorded anew, by a run that was resumed from before it. Nothing is lost by writing over either.
        there = repository.read_json("node.json", head)
        if isinstance(there, dict) and there.get("path") == path_id and not _is_listed(repository, node, head):
            return
        if there is None and head in repository.history():
            return
        raise HubError(
            f"The branch {node['name']} of {repository.repo_id} holds something else than this path's node. Nothing "
            f"was overwritten: push to another repository, or delete the branch "
            f"(`hf repos branch delete {repository.repo_id} {node['name']}`)."
        )

    repository.create_branch(node["name"])
    return repository.commit(files, f"Add node {node['name']}", branch=node["name"], exact=("",), check=check)


def _is_whole(repository: Repository, node: dict[str, Any], commit: str) -> bool:
    """Whether a commit holds a node's weights. What others added beside them is theirs."""
    tree = repository.tree(commit)
    return "node.json" in tree and all(
        is_file(tree.get(f"unet/{name}"), sha256) for name, sha256 in node["files"].items()
    )


def _is_listed(repository: Repository, node: dict[str, Any], commit: str) -> bool:
    """Whether `main` pins a branch at this commit, or says that the path is complete."""
    head = repository.head()
    if MANIFEST not in repository.tree(head):
        return False
    listed = _manifest_of(repository, head)
    return listed["complete"] or any(other["commit"] == commit for other in listed["nodes"])


def check_main(repository: Repository, commit: str, manifest: dict[str, Any]) -> None:
    """Sees that a repository's `main` is empty, or holds this path.

    Raises:
        HubError: With what differs.
    """
    if MANIFEST not in repository.tree(commit):
        check_empty(repository, commit)
        return
    there = _manifest_of(repository, commit)
    theirs, ours = identity(there), identity(manifest)
    changed = [name for name in theirs | ours if theirs.get(name) != ours.get(name)]
    if changed:
        what = "; ".join(
            f"its {printable(name)} is {printable(theirs.get(name))}, this one's is {ours.get(name)}"
            for name in changed
        )
        raise HubError(
            f"{repository.repo_id} holds another degradation path: {what}. Nothing was overwritten: push to another "
            "repository."
        )


def _manifest_of(repository: Repository, commit: str) -> dict[str, Any]:
    """The manifest that a repository holds at a commit.

    Raises:
        HubError: If it is not as the format says.
    """
    there = repository.read_json(MANIFEST, commit)
    try:
        check_manifest(there, repository.repo_id, pinned=True)
    except ValueError as error:
        raise HubError(f"{error} Nothing was overwritten: push to another repository.") from error
    return there


def check_empty(repository: Repository, commit: str) -> None:
    """Sees that nothing is lost by writing to a commit: it holds at most a licence, and a card without a text.

    Raises:
        HubError: With what it holds.
    """
    foreign = [
        path
        for path in sorted(repository.tree(commit))
        if not (path.startswith(".git") or is_licence(path) or path == "README.md")
    ]
    if "README.md" in repository.tree(commit):
        text = read_text(repository.file("README.md", commit), f"README.md of {repository.repo_id}")
        foreign += ["README.md"] if re.sub(r"\A\s*---\n.*?\n---\s*", "", text, flags=re.DOTALL).strip() else []
    if foreign:
        raise HubError(
            f"{repository.repo_id} holds {', '.join(map(printable, foreign[:3]))}, which this run did not put there. Nothing was "
            "overwritten: push to another repository."
        )


def check_teacher_may_be_shared(teacher: ModelReference, repository: Repository) -> None:
    """Sees that a private teacher's text encoder and autoencoder, which go along, do not become public.

    Raises:
        HubError: If they would, or the Hub fails for good.
    """
    for name in filter(None, (teacher.name_or_path, teacher.vae)):
        repo_id = repo_of(name)
        if repo_id is None:
            continue
        if Repository(repo_id, repository.token).is_private() and not repository.is_private():
            raise HubError(
                f"{name} is private, but {repository.repo_id}, which its text encoder and autoencoder would be copied to, "
                "is public. Push to a private repository."
            )
