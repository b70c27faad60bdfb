"""A path on its way to the Hub: a claim on `main`, and a branch for each node. Every part of it can be repeated."""

import re
from typing import Any

from ..hub.files import printable, read_text, to_bytes
from ..hub.published import REPORT, component_of, published, published_files, published_manifest
from ..hub.repository import Files, HubError, Repository, is_licence
from ..models.card import CARD
from ..models.pipeline_folder import INDEX
from ..models.reference import ModelReference
from ..models.single_file import repo_of
from .manifest import MANIFEST, check_manifest, identity
from .storage import Nodes, node_files


_REMEDY = "Nothing was overwritten: push to another repository."


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
        check_is_ours(repository, head, manifest)

    head = repository.head()
    if claim and MANIFEST not in repository.tree(head):
        empty = {**manifest, "complete": False, "nodes": []}
        repository.commit({MANIFEST: to_bytes(empty)}, "Begin a path", check=check)
    else:
        check(head)
    pushed, denoiser = [], component_of(manifest)
    branches = repository.branches()
    for node in manifest["nodes"]:
        commit = branches.get(node["name"])
        if commit is None or not _is_whole(repository, node, denoiser, commit):
            files = published_files({**teacher_files, **node_files(folders.fetch(node), denoiser)})
            commit = _push_node(repository, node, manifest["id"], files)
        pushed.append({**node, "branch": node["name"], "commit": commit})
    return {**manifest, "nodes": pushed}


def _push_node(repository: Repository, node: dict[str, Any], path_id: str, files: Files) -> str:
    """Makes a node's branch hold it, and nothing else."""

    def check(head: str) -> None:
        # What a push that was cut off leaves is at a commit of main. A node of this recording that main does not list was
        # pushed and then recorded anew, by a run that was resumed from before it. Nothing is lost by writing over either.
        before = repository.read_json("node.json", head)
        if before is None and head in repository.history():
            return
        if before is not None and before.get("path") == path_id and not _is_published(repository, head):
            return
        raise HubError(
            f"The branch {node['name']} of {repository.repo_id} holds something else than this path's node. Nothing "
            f"was overwritten: push to another repository, or delete the branch "
            f"(`hf repos branch delete {repository.repo_id} {node['name']}`)."
        )

    repository.create_branch(node["name"])
    return repository.commit(files, f"Add node {node['name']}", branch=node["name"], exact=("",), check=check)


def _is_whole(repository: Repository, node: dict[str, Any], denoiser: str, commit: str) -> bool:
    """Whether a commit holds a node's weights. What others added beside them is theirs."""
    tree = repository.tree(commit)
    weights = {name: tree.get(f"{denoiser}/{name}") for name in node["files"]}
    hashes = {name: entry.lfs.sha256 for name, entry in weights.items() if entry is not None and entry.lfs is not None}
    return "node.json" in tree and hashes == node["files"]


def _is_published(repository: Repository, commit: str) -> bool:
    """Whether `main` pins a branch at this commit, or says that the path is complete."""
    head = repository.head()
    if MANIFEST not in repository.tree(head):
        return False
    listed = _manifest_of(repository, head)
    return listed["complete"] or any(node["commit"] == commit for node in listed["nodes"])


def check_is_ours(
    repository: Repository, commit: str, manifest: dict[str, Any] | None, student: dict[str, Any] | None = None
) -> None:
    """Checks that nothing of others is lost by writing to a repository: it is empty, but for a licence and a card without
    a text, or holds this run's path or student.

    Args:
        repository (`Repository`): To write to.
        commit (`str`): Of its `main`.
        manifest (`dict`, *optional*): Of the run's own path.
        student (`dict`, *optional*): What makes a student another run's, if one is to be written: settings, as they are
            published, and `path`, the id of its path.

    Raises:
        HubError: With what it holds.
    """
    tree, foreign = repository.tree(commit), []
    report = None if student is None else repository.read_json(REPORT, commit)
    if student is not None and report and "student" in report and isinstance(report.get("settings"), dict):
        settings, path = published(report["settings"]), report.get("path")
        theirs = {**settings, "path": path.get("id") if isinstance(path, dict) else None}
        _compare(repository, "the student of another run", {name: theirs.get(name) for name in student}, student)
    elif MANIFEST in tree:
        foreign = [INDEX] if student is not None and INDEX in tree else []
    else:
        foreign = [path for path in sorted(tree) if not (path.startswith(".git") or is_licence(path))]
        card = repository.file(CARD, commit) if CARD in tree else None
        if card is not None:
            text = read_text(card, f"{CARD} of {repository.repo_id}")
            has_text = re.sub(r"\A\s*---\n.*?\n---\s*", "", text, flags=re.DOTALL).strip()
            foreign = [path for path in foreign if path != CARD or has_text]
    if foreign:
        names = ", ".join(map(printable, foreign[:3]))
        raise HubError(f"{repository.repo_id} holds {names}, which this run did not put there. {_REMEDY}")
    if MANIFEST in tree:
        own = {} if manifest is None else identity(manifest)
        _compare(repository, "another degradation path", identity(_manifest_of(repository, commit)), own)


def _compare(repository: Repository, what: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises a `HubError` with the differences, if what a repository holds is another's."""
    differences = [
        f"its {printable(name)} is {printable(theirs.get(name))}, this one's is {printable(ours.get(name))}"
        for name in theirs | ours
        if theirs.get(name) != ours.get(name)
    ]
    if differences:
        raise HubError(f"{repository.repo_id} holds {what}: {'; '.join(differences)}. {_REMEDY}")


def _manifest_of(repository: Repository, commit: str) -> dict[str, Any]:
    """The manifest that a repository holds at a commit.

    Raises:
        HubError: If it is not as the format says.
    """
    manifest = repository.read_json(MANIFEST, commit)
    try:
        check_manifest(manifest, repository.repo_id, pinned=True)
    except ValueError as error:
        raise HubError(f"{error} {_REMEDY}") from error
    return manifest


def check_teacher_may_be_shared(teacher: ModelReference, repository: Repository) -> None:
    """Checks that a private teacher's text encoder and autoencoder, which go along, do not become public.

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
