"""Pushes a run to the Hub and pulls it: the student with its card, and the path."""

import glob
import os
from pathlib import Path
from typing import Any

from ...evaluation.report import read_report
from ...families import usage_of
from ...models.card import CARD
from ...models.pipeline_folder import INDEX, components_of, files_of, licences_of, read_index
from ...models.reference import LocalModel, ModelReference
from ...path.manifest import MANIFEST
from ...path.path import DegradationPath
from ...path.sharing import check_is_ours, check_teacher_may_be_shared
from ...training.config import that_count, without_rates
from ...training.run_folder import RunFolder
from ...training.settings_file import SETTINGS
from ...training.validation import STATUS
from ..cards import student_card
from ..files import inside, read_text, to_bytes, write_text
from ..markdown import python
from ..published import REPORT, component_of, published, published_files, published_report
from ..repository import Files, Repository, is_repo_id
from .student import IMAGES, LORA, check_student_is_whole


# What a run's folder holds and no push sends: the path's own folders, which are read from its branches, and what says what
# a run on this machine did.
_OWN = ("path", "settings", SETTINGS, "prompts.txt", "checkpoints", "logs", "conditions", "best", "evaluation", STATUS)


def write_model_card(folder: Path, report: dict[str, Any]) -> None:
    """Writes `README.md` of a student's folder; its snippets name the folder until it is pushed.

    Args:
        folder (`Path`): With the run's images.
        report (`dict`): The content of `report.json`.
    """
    write_text(folder / CARD, _card(folder, report, folder.as_posix()))


def path_of_run(
    folder: str | Path, teacher: ModelReference | LocalModel | None = None, cache_dir: str | None = None
) -> DegradationPath | None:
    """The path that a run recorded or went along; `None` if it went along none, left it empty, or went along one on the Hub.

    Args:
        folder (`str` or `Path`): Of the run, or of a path.
        teacher (`ModelReference` or `LocalModel`, *optional*): Where the teacher lies on this machine.
        cache_dir (`str`, *optional*): Where the teacher is downloaded to.

    Raises:
        ValueError: If it went along another path than the one that is there.
    """
    folder, report = Path(folder), _report_to_push(Path(folder))
    settings = own = RunFolder(folder).settings()  # of a run on this machine; a report may be anybody's
    is_student, origin = "student" in report, report.get("path")
    places = [folder, inside(folder, "path", str(folder))]
    if is_student and (origin is None or "repo_id" in origin):
        return None
    elsewhere = settings.get("degradation_path")
    if isinstance(elsewhere, str) and elsewhere and not is_repo_id(elsewhere):
        places.append(Path(elsewhere))
    for place in places:
        if not (place / MANIFEST).is_file():
            continue
        path = DegradationPath.from_pretrained(place, teacher=teacher, cache_dir=cache_dir)
        if path.complete and not path.nodes:  # left empty
            return None
        if not is_student and place == folder and not settings:  # the path's own folder, which may lie in the run's
            own = RunFolder(Path(os.path.abspath(folder)).parent).settings()
        if is_student and origin is not None:
            is_the_runs = path.manifest["id"] == origin["id"]
        else:
            is_the_runs = _is_recorded_by(path, own)
        path.teacher_was_told |= is_the_runs and _has_its_teacher(path, own)
        if is_the_runs or (not is_student and place in places[:2]):
            return path
    if not is_student:
        return None
    raise ValueError(
        f"The path that the student of {folder} went along is not at {' or '.join(map(str, places[1:]))}. Push from the "
        "folder in which the run was started, or put the path there."
    )


def _is_recorded_by(path: DegradationPath, settings: dict[str, Any]) -> bool:
    """Whether a path that lies elsewhere was recorded under a run's settings: else others could name it."""
    recording = without_rates(path.manifest["recording"])
    return bool(recording) and all(name in settings and settings[name] == recording[name] for name in recording)


def _has_its_teacher(path: DegradationPath, settings: dict[str, Any]) -> bool:
    """Whether a run's settings name every place that a path's teacher is put together from."""
    names = ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "single_file_config")
    teacher = path.teacher
    return [settings.get(name) for name in names] == [teacher.name_or_path, teacher.vae, teacher.single_file_config]


def push_run(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    teacher: ModelReference | LocalModel | None = None,
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
        teacher (`ModelReference` or `LocalModel`, *optional*): Where the teacher lies on this machine; by default where
            the run says.

    Returns:
        `str`: The repository's full id.

    Raises:
        ValueError: If there is nothing to push, the run's student is not finished, or the path is not where it was.
        HubError: If the repository holds something else, or the Hub fails for good.
    """
    folder, report = Path(folder), _report_to_push(Path(folder))
    check_student_is_whole(folder, report)
    path = path_of_run(folder, teacher, cache_dir)
    if "student" not in report:
        if path is None:
            raise ValueError(
                f"{folder} holds neither a finished student nor a degradation path: nothing can be pushed."
            )
        return path.push_to_hub(repo_id, private, create_pr, commit_message, token)
    if path is not None:
        path.check_teachers_place()
    repository = Repository(repo_id, token)
    repository.create(private)
    student = that_count(published(report["settings"]))
    student["path"] = None if report["path"] is None else report["path"]["id"]

    def check(head: str) -> None:
        check_is_ours(repository, head, None if path is None else path.manifest, student)

    check(repository.head())
    files = published_files(student_files(folder, repository.repo_id))
    files[REPORT] = to_bytes(published_report(report))
    if path is None:
        settings = RunFolder(folder).settings() or report["settings"]
        declared = ModelReference(
            settings["pretrained_model_name_or_path"], vae=settings.get("pretrained_vae_model_name_or_path")
        )
        reference = teacher.reference if isinstance(teacher, LocalModel) else teacher
        check_teacher_may_be_shared(reference or declared, repository)  # as the path does of its own
    else:
        files[MANIFEST] = to_bytes(path.push_nodes(repository, claim=not create_pr))
    message = commit_message or "Add the one-step student"
    repository.commit(files, message, exact=(f"{component_of(report)}/",), check=check, create_pr=create_pr)
    return repository.repo_id


def _report_to_push(folder: Path) -> dict[str, Any]:
    try:
        return read_report(folder)
    except ValueError as error:
        raise ValueError(
            f"{folder / REPORT} is damaged ({error}). Nothing was pushed. Run the command that began the run, with "
            "--resume_from_checkpoint latest, which makes it anew, and push again."
        ) from error


def student_files(folder: Path, repo_id: str) -> Files:
    """What belongs to a student's pipeline and its report, and nothing else of a run's folder."""
    what = str(folder)
    own = {name: inside(folder, name, what) for name in (INDEX, "pipeline.py", REPORT, *IMAGES)}
    files: Files = {name: file for name, file in own.items() if file.is_file()}
    files |= licences_of(folder, what)
    folders = [folder / name for name in components_of(read_index(folder, what))]
    folders += [place for place in (folder / LORA, folder / LORA / "scheduler") if place.exists()]
    for place in folders:
        files |= {file.relative_to(folder).as_posix(): file for file in files_of(place, what, folder)}
    return {**files, CARD: _card_for(folder, repo_id)}


def pull(
    repo_id: str,
    folder: str | Path,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
) -> DegradationPath | None:
    """Writes a pushed run into a folder: the student, if there is one, with its path in `path/`; or the path alone.

    What a run keeps to itself, such as its settings and checkpoints, is not taken from a repository that has it.

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
    draft = folder.with_name(folder.name + ".draft")  # if broken off, it is resumed
    place = Path("path") if INDEX in tree else Path()
    if MANIFEST in tree and not (draft / place / MANIFEST).exists():
        shared = DegradationPath.from_pretrained(repo_id, head, cache_dir=cache_dir, token=token)
        shared.save_pretrained(draft / place)
    repository.download_to(draft, [glob.escape(path) for path in tree if _is_taken(path)], head)
    report = read_report(draft)
    if "student" in report and _is_own_card(draft, report, repo_id):
        write_text(draft / CARD, _card(draft, report, folder.as_posix()))
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        folder.rmdir()
    os.replace(draft, folder)
    return DegradationPath.from_pretrained(folder / place) if MANIFEST in tree else None


def _is_taken(path: str) -> bool:
    """Whether a file of a pushed run is written where it is pulled to."""
    top = path.split("/")[0]
    return path != MANIFEST and not top.startswith((".", "degradation-")) and top not in _OWN


def _card(folder: Path, report: dict[str, Any], where: str) -> str:
    """A student's card, for the folder or repository that it is read in."""
    name = where.split("/")[-1] if is_repo_id(where) else Path(where).resolve().name
    index = read_index(folder, where) if (folder / INDEX).is_file() else None
    usage = usage_of(report.get("pipeline_class"), index=index)
    return student_card(report, name, where, (folder / "path.png").exists(), usage)


def _is_own_card(folder: Path, report: dict[str, Any], where: str) -> bool:
    """Whether a README is what this library writes of the report beside it; of another's report it writes none."""
    try:
        return read_text(folder / CARD) == _card(folder, report, where)
    except ValueError:
        return False


def _card_for(folder: Path, repo_id: str) -> bytes:
    """The card as the repository's; as it is on disk, if its owner has written in it, but for the folder's name."""
    report, card = read_report(folder), read_text(inside(folder, CARD, str(folder)))
    known = (RunFolder(folder).settings(), report["settings"])
    own = {folder.as_posix(), *(Path(settings["output_dir"]).as_posix() for settings in known if settings)}
    if card in {_card(folder, report, place) for place in own}:
        return _card(folder, report, repo_id).encode()
    for place in own:
        if published(place) != place:
            card = card.replace(python(place), python(repo_id))
    return card.encode()
