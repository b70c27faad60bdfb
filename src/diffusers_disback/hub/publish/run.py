"""Saves a student in a form that others load, with its card, and pushes and pulls a run."""

import glob
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from ...evaluation.report import REPORT, read_report
from ...models.adapters import Lora, save_lora
from ...models.components import check_whole
from ...models.pipeline_folder import INDEX, components_of, files_of, licences_of, read_index
from ...models.reference import LocalModel, ModelReference
from ...path.manifest import MANIFEST
from ...path.path import DegradationPath
from ...path.sharing import check_empty, check_main, check_teacher_may_be_shared
from ...pipelines.one_step import DisBackOneStepPipeline
from ...training.run_folder import FREE_SETTINGS, RATES, RunFolder
from ...training.signals import signal_handler
from ..cards import student_card
from ..files import inside, read_json, read_text, to_bytes, write_json, write_text, writing
from ..markdown import python
from ..published import clean_configs, published, published_files, published_report
from ..repository import Files, HubError, Repository, is_repo_id, write_files


logger = logging.getLogger(__name__)
LORA = "lora"
_PICTURES = ("samples.png", "convergence.png", "path.png")
_CARD = "README.md"
_DRAFT = "student.draft"
# What a run's folder holds and no push sends: the path's own folders, which are read from its branches, and what says what
# a run on this machine did.
_OWN = ("path", "settings", "checkpoints", "logs", "conditions")


def check_teacher_files(teacher: LocalModel) -> None:
    """Checks, before anything is trained, that what a student or a node takes over of its teacher can be read.

    Raises:
        ValueError: If a config is no JSON.
    """
    published_files(teacher.files)


def save_student(
    pipeline: DisBackOneStepPipeline, teacher: LocalModel, folder: str | Path, lora: Lora | None = None
) -> None:
    """Writes the student's pipeline into its folder, whole or not at all: `model_index.json` is there when all else is.

    Args:
        pipeline, teacher, folder, lora: As of `write_student`.

    Raises:
        OSError: If it cannot be written, as on a full disk. What the folder held is as it was.
        ValueError: If a file that is taken over of the teacher was written to since the teacher was resolved.
    """
    folder, changed = Path(folder), teacher.changed_files()
    if changed:
        raise ValueError(
            f"{changed[0]} of {teacher.name_or_path} was written to since the run began, so the student would be put beside "
            "another one than it was trained with. Its training is not lost: put the file back, and pass "
            "--resume_from_checkpoint latest."
        )
    draft = folder / _DRAFT
    shutil.rmtree(draft, ignore_errors=True)  # of a run that was cut off
    try:
        draft.mkdir(parents=True)
        with writing(draft):
            write_student(pipeline, teacher, draft, lora)
        for file in draft.rglob("*"):
            if file.is_file():
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
        with signal_handler().held():
            (folder / INDEX).unlink(missing_ok=True)
            for item in sorted(draft.iterdir(), key=lambda item: item.name == INDEX):
                there = folder / item.name
                if there.is_dir():
                    os.replace(there, draft / f"{item.name}.before")
                os.replace(item, there)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_student(
    pipeline: DisBackOneStepPipeline, teacher: LocalModel, folder: str | Path, lora: Lora | None = None
) -> None:
    """Writes the student's pipeline: its own UNet and scheduler, and the teacher's files as they are.

    The teacher's text encoder, tokenizer and autoencoder are copied, never saved anew: what transformers 5 writes,
    older versions take for random weights without an error.

    Args:
        pipeline (`DisBackOneStepPipeline`): The student's.
        teacher (`LocalModel`): Of which files go along.
        folder (`str` or `Path`): Other files in it stay.
        lora (`Lora`, *optional*): The adapter that was trained, if one was, and its config. It is written to `lora/`, with
            the one-step scheduler beside it.

    Raises:
        ValueError: If a component of the teacher is not whole, so that the student would not load.
    """
    folder = Path(folder)
    if lora is not None:
        save_lora(*lora, folder / LORA)
        pipeline.scheduler.save_pretrained(folder / LORA / "scheduler")
    pipeline.unet.save_pretrained(folder / "unet")
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    theirs = teacher.index
    # Text encoders may have left memory; their files are the teacher's.
    released = [name for name in ("text_encoder", "text_encoder_2") if name in theirs]
    components = {name for name, component in pipeline.components.items() if component is not None or name in released}
    dtype = str(pipeline.unet.dtype).split(".")[-1]
    wanted = {}
    for path, content in teacher.component_files(dtype).items():
        component, *rest = path.split("/")
        if component != INDEX and component != "scheduler" and (not rest or component in components):
            wanted[path] = content
    write_files(published_files(wanted), folder)
    pipeline.save_config(folder)
    index = read_json(folder / INDEX)
    write_json(folder / INDEX, {**index, **{name: theirs[name] for name in released if name in index}})
    for written in (folder, folder / "unet", folder / "scheduler", folder / LORA / "scheduler"):
        clean_configs(written)
    check_whole(
        {file.relative_to(folder).as_posix(): file for file in folder.glob("*/*")} | {INDEX: folder / INDEX},
        f"{folder}",
    )


def write_model_card(folder: Path, report: dict[str, Any]) -> None:
    """Writes `README.md` of a student's folder; its snippets name the folder until it is pushed.

    Args:
        folder (`Path`): With the run's pictures.
        report (`dict`): The content of `report.json`.
    """
    write_text(folder / _CARD, _card(folder, report, folder.as_posix()))


def results(folder: Path) -> dict[str, int]:
    """The files that a run leaves for others, `path/` apart, and their sizes; `report.json`, which lists them, is the last."""
    files = [folder / name for name in (INDEX, "pipeline.py", _CARD, *_PICTURES)]
    if (folder / INDEX).is_file():
        for name in components_of(read_index(folder, str(folder))):
            files += sorted((folder / name).glob("*"))
        files += sorted((folder / LORA).rglob("*.*"))
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files if file.is_file()}


def missing_results(folder: Path, report: dict[str, Any]) -> list[str]:
    """What of a run's results is not there, or not whole, by its report. Texts and pictures may have been changed since."""
    basics = [INDEX, _CARD, "unet/config.json"] if "student" in report else []
    told = report.get("files") or dict.fromkeys(basics)  # older versions did not list them
    missing = []
    for name, size in told.items():
        file = inside(folder, name, f"{REPORT} of {folder}")
        there = file.stat().st_size if file.is_file() else 0
        if there == 0 != size or (name.endswith(".safetensors") and there != size):
            missing.append(name)
    return missing


def check_student_is_whole(folder: Path, report: dict[str, Any]) -> None:
    """Checks, before a run is pushed, that a student that was asked for is there, with all that belongs to it. A picture
    that is missing is told, and pushed without.

    Raises:
        ValueError: With what is missing, and how to make it.
    """
    settings = RunFolder(folder).settings()
    if "student" not in report and settings.get("stage") not in ("all", "backtrack"):
        return
    remedy = (
        "Nothing was pushed. Run the command that began the run, with --resume_from_checkpoint latest, and push again"
    )
    has_path = (folder / "path" / MANIFEST).is_file()
    remedy += f"; or push the path alone: diffusers-disback push {folder / 'path'}." if has_path else "."
    done = report.get("stages", {}).get("backtracking", {}).get("steps")
    if "student" not in report or done != settings.get("max_train_steps", done):
        raise ValueError(f"{folder} holds no finished student: its run was cut off. {remedy}")
    missing = missing_results(folder, report)
    without = [name for name in missing if name in _PICTURES]
    if missing != without:
        raise ValueError(f"The student of {folder} is not whole: it has no {', '.join(missing)}. {remedy}")
    if without:
        logger.warning(f"{folder} has no {', '.join(without)}: it is pushed without.")


def path_of_run(
    folder: str | Path, teacher: ModelReference | LocalModel | None = None, cache_dir: str | None = None
) -> DegradationPath | None:
    """The path that a run recorded or went along; `None` if it went along none, or along one on the Hub.

    Args:
        folder (`str` or `Path`): Of the run, or of a path.
        teacher (`ModelReference` or `LocalModel`, *optional*): Where the teacher lies on this machine.
        cache_dir (`str`, *optional*): Where the teacher is downloaded to.

    Raises:
        ValueError: If it went along another path than the one that is there.
    """
    folder, report = Path(folder), _report_to_push(Path(folder))
    settings = RunFolder(folder).settings()  # of a run on this machine; a report may be anybody's
    elsewhere = settings.get("degradation_path")
    places = [folder, inside(folder, "path", str(folder))]
    if isinstance(elsewhere, str) and elsewhere and not is_repo_id(elsewhere):
        places.append(Path(elsewhere))
    found = [place for place in places if (place / MANIFEST).is_file()]
    if "student" not in report:
        for place in found:
            path = DegradationPath.from_pretrained(place, teacher=teacher, cache_dir=cache_dir)
            # The path's own folder may lie in the run's.
            inner = place == folder and not settings
            own = RunFolder(Path(os.path.abspath(folder)).parent).settings() if inner else settings
            recorded = _is_recorded_by(path, own)
            path.teacher_was_told |= recorded and _has_its_teacher(path, own)
            if recorded or place in places[:2]:
                return path
        return None
    if report["path"] is None or "repo_id" in report["path"]:
        return None
    for place in found:
        path = DegradationPath.from_pretrained(place, teacher=teacher, cache_dir=cache_dir)
        if path.manifest["id"] == report["path"]["id"]:
            path.teacher_was_told |= _has_its_teacher(path, settings)  # which it recorded, or went along
            return path
    raise ValueError(
        f"The path that the student of {folder} went along is not at {' or '.join(map(str, places[1:]))}. Push from the "
        "folder in which the run was started, or put the path there."
    )


def _is_recorded_by(path: DegradationPath, settings: dict[str, Any]) -> bool:
    """Whether a path that lies elsewhere was recorded under a run's settings: else others could name it."""
    recording = {name: value for name, value in path.manifest["recording"].items() if name not in RATES}
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

    def check(head: str) -> None:
        check_student(repository, head, report, None if path is None else path.manifest)

    check(repository.head())
    files = published_files(student_files(folder, repository.repo_id))
    files[REPORT] = to_bytes(published_report(report))
    if path is None:
        settings = RunFolder(folder).settings() or report["settings"]
        said = ModelReference(
            settings["pretrained_model_name_or_path"], vae=settings.get("pretrained_vae_model_name_or_path")
        )
        reference = teacher.reference if isinstance(teacher, LocalModel) else teacher
        check_teacher_may_be_shared(reference or said, repository)  # as the path does of its own
    else:
        files[MANIFEST] = to_bytes(path.push_nodes(repository, claim=not create_pr))
    message = commit_message or "Add the one-step student"
    repository.commit(files, message, exact=("unet/",), check=check, create_pr=create_pr)
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
    own = {name: inside(folder, name, what) for name in (INDEX, "pipeline.py", REPORT, *_PICTURES)}
    files: Files = {name: file for name, file in own.items() if file.is_file()}
    files |= licences_of(folder, what)
    folders = [folder / name for name in components_of(read_index(folder, what))]
    folders += [place for place in (folder / LORA, folder / LORA / "scheduler") if place.exists()]
    for place in folders:
        files |= {file.relative_to(folder).as_posix(): file for file in files_of(place, what, folder)}
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
    if theirs is not None and isinstance(theirs.get("settings"), dict) and "student" in theirs:
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
    path = report.get("path")
    return {**settings, "path": path.get("id") if isinstance(path, dict) else None}


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
    draft = folder.with_name(folder.name + ".draft")  # if broken off, it is gone on with
    place = Path("path") if INDEX in tree else Path()
    if MANIFEST in tree and not (draft / place / MANIFEST).exists():
        shared = DegradationPath.from_pretrained(repo_id, head, cache_dir=cache_dir, token=token)
        shared.save_pretrained(draft / place)
    repository.download_to(draft, [glob.escape(path) for path in tree if _is_taken(path)], head)
    report = read_report(draft)
    if "student" in report and _is_own_card(draft, report, repo_id):
        write_text(draft / _CARD, _card(draft, report, folder.as_posix()))
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
    return student_card(report, name, where, (folder / "path.png").exists())


def _is_own_card(folder: Path, report: dict[str, Any], where: str) -> bool:
    """Whether a README is what this library writes of the report beside it; of another's report it writes none."""
    try:
        return read_text(folder / "README.md") == _card(folder, report, where)
    except ValueError:
        return False


def _card_for(folder: Path, repo_id: str) -> bytes:
    """The card as the repository's; as it is on disk, if its owner has written in it, but for the folder's name."""
    report, there = read_report(folder), read_text(inside(folder, _CARD, str(folder)))
    known = (RunFolder(folder).settings(), report["settings"])
    own = {folder.as_posix(), *(Path(settings["output_dir"]).as_posix() for settings in known if settings)}
    if there in {_card(folder, report, place) for place in own}:
        return _card(folder, report, repo_id).encode()
    for place in own:
        if published(place) != place:
            there = there.replace(python(place), python(repo_id))
    return there.encode()
