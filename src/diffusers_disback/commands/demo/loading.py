"""Finds what belongs to a student: its teacher and its path, where its run says that they are."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from ...evaluation.entries import Entry, ImageFolder
from ...evaluation.report_format import REPORT, read_report
from ...families import ModelFamily, load_family
from ...hub.errors import HubError
from ...hub.files import inside, printable
from ...hub.repository import Repository, is_repo_id
from ...models.generator import is_one_step_scheduler
from ...models.reference import LocalModel, ModelReference
from ...models.single_file import single_file_of
from ...path.manifest import MANIFEST
from ...path.path import DegradationPath
from ...training.config import DisBackConfig
from ...training.run_folder import RunFolder
from ...training.settings.groups import TEACHER_FLAGS
from .sampling import BOUNDS, MOST_CHARACTERS, Sampler


T = TypeVar("T")


def load(
    name: str,
    revision: str | None = None,
    teacher: str | None = None,
    student_only: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    cache_dir: str | None = None,
) -> tuple[Sampler, dict[str, Any]]:
    """A student with its teacher and its path, as far as they are known, and what of its report the page begins with: `prompt`,
    and the teacher's `steps` and `guidance`.

    Args:
        name (`str`): A folder, or a model on the Hub.
        revision (`str`, *optional*): On the Hub.
        teacher (`str`, *optional*): Where the teacher is, if not where the student's run says.
        student_only (`bool`): Load neither.
        device, dtype: As of `Sampler`.
        cache_dir (`str`, *optional*): Where downloads are kept.

    Raises:
        ValueError: If it is no one-step student, or something that it names cannot be loaded.
    """
    found = Entry(name, ModelReference(name, revision)).find(cache_dir)
    if isinstance(found, ImageFolder):
        raise ValueError(f"{name} is a folder of images; name a student's folder, or one on the Hub.")
    student = load_family(found.model)
    if not is_one_step_scheduler(student.pipeline.scheduler):
        raise ValueError(f"{name} is no one-step student: its scheduler is a teacher's, of many steps.")
    folder = _folder_with_report(found.model, cache_dir)
    report = read_report(folder)
    settings = _settings_of(report)
    if student_only:
        return Sampler(student, device=device, dtype=dtype), settings
    path = _unless_refused("the path", lambda: _path_of(found.model, folder, report, cache_dir))
    reference = _teacher_of(folder, report, path, teacher)
    if reference is None:
        return Sampler(student, device=device, dtype=dtype), settings
    if path is not None:
        path.teacher = reference

    def load_teacher() -> ModelFamily:
        return load_family(reference, cache_dir) if path is None else load_family(path.local_teacher())

    family = load_teacher() if teacher is not None else _unless_refused("the teacher", load_teacher)
    return Sampler(student, family, path if family is not None else None, device, dtype), settings


def _unless_refused(what: str, load: Callable[[], T]) -> T | None:
    """What is loaded; `None`, which is told, if it is on the Hub, but gated, private or gone."""
    try:
        return load()
    except ValueError as error:
        reason = error if isinstance(error, HubError) else error.__cause__
        if not isinstance(reason, HubError) or reason.kind not in ("gated", "unknown"):
            raise
        print(f"{error} The demo is without {what}.", file=sys.stderr)
        return None


def _folder_with_report(student: LocalModel, cache_dir: str | None) -> Path:
    """The folder in which `report.json` lies, if there is one."""
    if student.commit is None:
        return Path(student.name_or_path)
    report = Repository(student.name_or_path).file(REPORT, student.commit, cache_dir)
    return student.folder if report is None else report.parent


def _path_of(
    student: LocalModel, folder: Path, report: dict[str, Any], cache_dir: str | None
) -> DegradationPath | None:
    """The path that a student went along; `None` if there was none, or it does not lie beside the student any more."""
    origin = report.get("path")
    if origin is None:
        return None
    if "repo_id" in origin:
        path = DegradationPath.from_pretrained(origin["repo_id"], origin["commit"], cache_dir=cache_dir)
    elif student.commit is not None:
        path = DegradationPath.from_pretrained(student.name_or_path, student.commit, cache_dir=cache_dir)
    elif inside(folder, f"path/{MANIFEST}", str(folder)).is_file():
        path = DegradationPath.from_pretrained(folder / "path", cache_dir=cache_dir)
    else:
        print(f"{folder} holds no path: the demo is without.", file=sys.stderr)
        return None
    if path.manifest["id"] != origin["id"]:
        raise ValueError(
            f"The path in {path.where} is not the one that {student.name_or_path} went along; --student_only leaves it out."
        )
    return path if path.nodes else None


def _teacher_of(
    folder: Path, report: dict[str, Any], path: DegradationPath | None, place: str | None
) -> ModelReference | None:
    """The teacher, where the command line, the path or the run's settings say that it is; `None` if it is nowhere."""
    names = ("pretrained_model_name_or_path", "revision", *TEACHER_FLAGS.values())
    settings = RunFolder(folder).settings() or report.get("settings", {})  # a published report names no folders
    if path is not None:
        reference = path.teacher
    elif settings:
        reference = DisBackConfig(**{name: settings[name] for name in names if name in settings}).teacher
    elif place is not None:
        reference = ModelReference(place)
    else:
        return None
    if place is not None:
        return replace(reference, name_or_path=place, revision=None)
    name = reference.name_or_path
    if Path(name).exists() or is_repo_id(name) or single_file_of(name) is not None:
        return reference
    print(
        f"The teacher {printable(name)} is not on this machine: the demo is without. --pretrained_model_name_or_path says where it is.",
        file=sys.stderr,
    )
    return None


def _settings_of(report: dict[str, Any]) -> dict[str, Any]:
    """An example prompt, and how the teacher was measured; what is out of the demo's bounds is left out."""
    measured = report.get("teacher", {})
    found = {"steps": measured.get("num_inference_steps"), "guidance": measured.get("guidance_scale")}
    settings = {name: value for name, value in found.items() if value is not None and value in BOUNDS[name][0]}
    return {**settings, "prompt": report.get("example_prompt", "")[:MOST_CHARACTERS]}
