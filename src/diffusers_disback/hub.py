"""What leaves the house: the student's folder in a form that others load, its card, and a run's repository on the Hub."""

import json
import os
from pathlib import Path
from typing import Any

from .adapters import Lora, save_lora
from .cards import student_card
from .evaluation.report import REPORT, read_report
from .files import read_text, to_bytes, write_json
from .manifest import MANIFEST
from .markdown import python
from .model_reference import ModelReference
from .path import DegradationPath
from .pipeline import DisBackOneStepPipeline
from .published import clean_configs, published, published_files, published_report
from .repository import Files, HubError, Repository, is_licence, is_repo_id, write_files
from .run_folder import FREE_SETTINGS, RunFolder
from .sharing import check_empty, check_main, check_teacher_may_be_shared


INDEX = "model_index.json"
LORA = "lora"
_PICTURES = ("samples.png", "convergence.png", "path.png")


def check_teacher_files(teacher: ModelReference, cache_dir: str | None = None) -> None:
    """Sees, before anything is trained, that what a student or a node takes over of its teacher can be read.

    Raises:
        ValueError: If a file of it is missing, or a config is no JSON.
    """
    published_files(teacher.component_files("float32", cache_dir))


def save_student(
    pipeline: DisBackOneStepPipeline,
    teacher: ModelReference,
    folder: str | Path,
    cache_dir: str | None = None,
    lora: Lora | None = None,
) -> None:
    """Writes the student's pipeline: its own UNet and scheduler, and the teacher's files as they are.

    The teacher's text encoder, tokenizer and autoencoder are copied, never saved anew: what transformers 5 writes,
    older versions take for random weights without an error.

    Args:
        pipeline (`DisBackOneStepPipeline`): The student's.
        teacher (`ModelReference`): Where the teacher's files lie.
        folder (`str` or `Path`): Other files in it stay.
        cache_dir (`str`, *optional*): Where downloads are kept.
        lora (`Lora`, *optional*): The adapter that was trained, if one was, and its config. It is written to `lora/`, with
            the one-step scheduler beside it.
    """
    folder = Path(folder)
    if lora is not None:
        save_lora(*lora, folder / LORA)
        pipeline.scheduler.save_pretrained(folder / LORA / "scheduler")
    pipeline.unet.save_pretrained(folder / "unet")
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    theirs = json.loads((teacher.folder(cache_dir) / INDEX).read_text())
    # Text encoders may have left memory; their files are the teacher's.
    released = [name for name in ("text_encoder", "text_encoder_2") if name in theirs]
    components = {name for name, component in pipeline.components.items() if component is not None or name in released}
    dtype = str(pipeline.unet.dtype).split(".")[-1]
    wanted = {}
    for path, content in teacher.component_files(dtype, cache_dir).items():
        component, *rest = path.split("/")
        if component != INDEX and component != "scheduler" and (not rest or component in components):
            wanted[path] = content
    write_files(published_files(wanted), folder)
    pipeline.save_config(folder)
    index = json.loads((folder / INDEX).read_text())
    write_json(folder / INDEX, {**index, **{name: theirs[name] for name in released if name in index}})
    for written in (folder, folder / "unet", folder / "scheduler", folder / LORA / "scheduler"):
        clean_configs(written)


def write_model_card(folder: Path, report: dict[str, Any]) -> None:
    """Writes `README.md` of a student's folder; its snippets name the folder until it is pushed.

    Args:
        folder (`Path`): With the run's pictures.
        report (`dict`): The content of `report.json`.
    """
    (folder / "README.md").write_text(_card(folder, report, folder.as_posix()))


def path_of_run(folder: str | Path, teacher: ModelReference | None = None) -> DegradationPath | None:
    """The path that a run recorded or went along; `None` if it went along none, or along one on the Hub.

    Args:
        folder (`str` or `Path`): Of the run, or of a path.
        teacher (`ModelReference`, *optional*): Where the teacher lies on this machine.

    Raises:
        ValueError: If it went along another path than the one that is there.
    """
    folder, report = Path(folder), read_report(Path(folder))
    settings = RunFolder(folder).settings() or report.get("settings", {})
    elsewhere = settings.get("degradation_path")
    places = [folder, folder / "path", *([Path(elsewhere)] if elsewhere and not is_repo_id(elsewhere) else [])]
    found = [place for place in places if (place / MANIFEST).is_file()]
    if "student" not in report:
        return DegradationPath.from_pretrained(found[0], teacher=teacher) if found else None
    if report["path"] is None or "repo_id" in report["path"]:
        return None
    for place in found:
        path = DegradationPath.from_pretrained(place, teacher=teacher)
        if path.manifest["id"] == report["path"]["id"]:
            return path
    raise ValueError(
        f"The path that the student of {folder} went along is not at {' or '.join(map(str, places[1:]))}. Push from the "
        "folder in which the run was started, or put the path there."
    )


def push_run(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    teacher: ModelReference | None = None,
) -> str:
    """Pushes what a run left: a branch for each node of its path, and on `main` the student, or the path's own card.

    Checkpoints, optimiser states and logs are not part of it. It can be repeated: what is there already is not sent
    again, and what is not this run's is not overwritten.

    Args:
        folder (`str` or `Path`): Of the run, or of a path.
        repo_id (`str`): `user/name`. It is made if it is not there.
        private (`bool`, *optional*): Of a new repository.
        create_pr (`bool`): Propose what goes to `main` as a pull request.
        commit_message (`str`, *optional*): Of the commit to `main`.
        token (`str`, *optional*): By default that of `hf auth login`. It is never written anywhere.
        cache_dir (`str`, *optional*): Where the teacher was downloaded to.
        teacher (`ModelReference`, *optional*): Where the teacher lies on this machine; by default where the run says.

    Returns:
        `str`: The repository's full id.

    Raises:
        ValueError: If there is nothing to push, or the path is not where it was.
        HubError: If the repository holds something else, or the Hub fails for good.
    """
    folder, path = Path(folder), path_of_run(folder, teacher)
    report = read_report(folder)
    if "student" not in report or not (folder / "README.md").is_file():
        if path is None:
            raise ValueError(
                f"{folder} holds neither a finished student nor a degradation path: nothing can be pushed."
            )
        return path.push_to_hub(repo_id, private, create_pr, commit_message, token, cache_dir)
    repository = Repository(repo_id, token)
    repository.create(private)

    def check(head: str) -> None:
        check_student(repository, head, report, None if path is None else path.manifest)

    check(repository.head())
    files = published_files(student_files(folder, repository.repo_id))
    files[REPORT] = to_bytes(published_report(report))
    if path is None:
        settings = RunFolder(folder).settings() or report["settings"]
        teacher = teacher or ModelReference(
            settings["pretrained_model_name_or_path"], vae=settings.get("pretrained_vae_model_name_or_path")
        )
        check_teacher_may_be_shared(teacher, repository)  # as the path does of its own
    else:
        files[MANIFEST] = to_bytes(path.push_nodes(repository, cache_dir, claim=not create_pr))
    message = commit_message or "Add the one-step student"
    repository.commit(files, message, exact=("unet/",), check=check, create_pr=create_pr)
    return repository.repo_id


def student_files(folder: Path, repo_id: str) -> Files:
    """What belongs to a student's pipeline and its report, and nothing else of a run's folder."""
    index = json.loads((folder / INDEX).read_text())
    names = [INDEX, "pipeline.py", REPORT, *_PICTURES]
    files: Files = {name: folder / name for name in names if (folder / name).is_file()}
    files |= {file.name: file for file in folder.iterdir() if is_licence(file.name)}
    for name, kind in index.items():
        if isinstance(kind, list) and kind[0] is not None:
            files |= {f"{name}/{file.name}": file for file in sorted((folder / name).iterdir())}
    for file in sorted((folder / LORA).rglob("*.*")):
        files[file.relative_to(folder).as_posix()] = file
    return {**files, "README.md": _card_for(folder, repo_id)}


def check_student(
    repository: Repository, commit: str, report: dict[str, Any], manifest: dict[str, Any] | None
) -> None:
    """Sees that a repository's `main` holds nothing, or this run's path, or this run's student.

    Raises:
        HubError: With what differs.
    """
    tree = repository.tree(commit)
    theirs = repository.read_json(REPORT, commit)
    if isinstance(theirs, dict) and "settings" in theirs and "student" in theirs:
        was, is_ = _settings_that_count(theirs), _settings_that_count(report)
        changed = [f"{name} was {was.get(name)!r}, is {is_[name]!r}" for name in is_ if was.get(name) != is_[name]]
        if changed:
            raise HubError(
                f"{repository.repo_id} holds the student of another run: {'; '.join(changed)}. Nothing was overwritten: "
                "push to another repository."
            )
    elif MANIFEST not in tree:
        check_empty(repository, commit)
    elif INDEX in tree:
        raise HubError(
            f"{repository.repo_id} holds a pipeline that is not this run's. Nothing was overwritten: push to another "
            "repository."
        )
    if MANIFEST in tree:
        if manifest is None:
            raise HubError(
                f"{repository.repo_id} holds a degradation path, but this run has none of its own. Nothing was "
                "overwritten: push to another repository."
            )
        check_main(repository, commit, manifest)


def _settings_that_count(report: dict[str, Any]) -> dict[str, Any]:
    """What makes a student another run's: its settings, as they are published, and its path."""
    settings = {name: value for name, value in published(report["settings"]).items() if name not in FREE_SETTINGS}
    return {**settings, "path": (report.get("path") or {}).get("id")}


def pull(
    repo_id: str,
    folder: str | Path,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
) -> DegradationPath | None:
    """Writes a pushed run into a folder: the student, if there is one, with its path in `path/`; or the path alone.

    Args:
        repo_id (`str`): On the Hub.
        folder (`str` or `Path`): New, or empty.
        revision (`str`, *optional*): Branch, tag or commit of `main`.
        token (`str`, *optional*): By default that of `hf auth login`.
        cache_dir (`str`, *optional*): Where `path.json` is kept; weights go past it.

    Returns:
        `DegradationPath` or `None`: The path, as it lies in the folder now.

    Raises:
        ValueError: If the folder holds something.
        HubError: If the Hub does not give it.
    """
    folder, repository = Path(folder), Repository(repo_id, token)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; nothing was written. Choose another folder.")
    head = repository.head(revision)
    tree = repository.tree(head)
    if INDEX not in tree and MANIFEST not in tree:
        raise ValueError(f"{repo_id} holds neither a pipeline nor a degradation path at {revision or 'main'}.")
    draft = folder.with_name(folder.name + ".draft")  # if broken off, it is gone on with
    place = Path("path") if INDEX in tree else Path()
    if MANIFEST in tree and not (draft / place / MANIFEST).exists():
        shared = DegradationPath.from_pretrained(repo_id, head, cache_dir=cache_dir, token=token)
        shared.save_pretrained(draft / place)
    repository.download_to(draft, [path for path in tree if path not in (MANIFEST, ".gitattributes")], head)
    report = read_report(draft)
    if "student" in report and _is_own_card(draft, report, repo_id):
        (draft / "README.md").write_text(_card(draft, report, folder.as_posix()))
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        folder.rmdir()
    os.replace(draft, folder)
    return DegradationPath.from_pretrained(folder / place) if MANIFEST in tree else None


def _card(folder: Path, report: dict[str, Any], where: str) -> str:
    """A student's card, for the folder or repository that it is read in."""
    name = where.split("/")[-1] if is_repo_id(where) else Path(where).resolve().name
    return student_card(report, name, where, (folder / "path.png").exists())


def _is_own_card(folder: Path, report: dict[str, Any], where: str) -> bool:
    """Whether a README is what this library writes of the report beside it; of another's report it writes none."""
    try:
        return read_text(folder / "README.md") == _card(folder, report, where)
    except ValueError:
        return False


def _card_for(folder: Path, repo_id: str) -> bytes:
    """The card as the repository's; as it is on disk, if its owner has written in it, but for the folder's name."""
    report, there = read_report(folder), (folder / "README.md").read_text()
    known = (RunFolder(folder).settings(), report["settings"])
    own = {folder.as_posix(), *(Path(settings["output_dir"]).as_posix() for settings in known if settings)}
    if there in {_card(folder, report, place) for place in own}:
        return _card(folder, report, repo_id).encode()
    for place in own:
        if published(place) != place:
            there = there.replace(python(place), python(repo_id))
    return there.encode()
