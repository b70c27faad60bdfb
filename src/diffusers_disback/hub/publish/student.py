"""Saves a student in a form that others load, whole or not at all, and checks that it is whole."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from ...models.adapters import LORA, Lora
from ...models.card import CARD
from ...models.components import check_whole
from ...models.lora_layouts import save_layouts
from ...models.pipeline_folder import INDEX, WITHOUT_A_ROLE, components_of, read_index
from ...models.reference import LocalModel
from ...path.manifest import MANIFEST
from ...training.run_folder import RunFolder
from ...training.signals import signal_handler
from ..files import inside, read_json, write_json, writing
from ..published import REPORT, clean_configs, component_of, published_files
from ..repository import Files, write_files


logger = logging.getLogger(__name__)
IMAGES = ("samples.png", "convergence.png", "path.png")
_DRAFT = "student.draft"


def check_teacher_files(teacher: LocalModel) -> None:
    """Checks, before anything is trained, that what a student or a node takes over of its teacher can be read.

    Raises:
        ValueError: If a config is no JSON.
    """
    published_files(teacher.files)


def save_student(
    pipeline: DiffusionPipeline, teacher: LocalModel, folder: str | Path, lora: Lora | None = None
) -> None:
    """Writes the student's pipeline into its folder, whole or not at all: `model_index.json` is there when all else is.

    Args:
        pipeline (`DiffusionPipeline`): The student's.
        teacher (`LocalModel`): Of which files go along.
        folder (`str` or `Path`): Other files in it stay.
        lora (`Lora`, *optional*): The adapter that was trained, if one was, and its config. It is written to `lora/` (a UNet's
            for other programs, too), with the one-step scheduler beside it.

    Raises:
        OSError: If it cannot be written, as on a full disk. What the folder held is as it was.
        ValueError: If a file that is taken over of the teacher was written to since the teacher was resolved, or a component
            of it is not whole.
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
            _write_student(pipeline, teacher, draft, lora)
        for file in draft.rglob("*"):
            if file.is_file():
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
        with signal_handler().held():
            (folder / INDEX).unlink(missing_ok=True)
            for item in sorted(draft.iterdir(), key=lambda item: item.name == INDEX):
                existing = folder / item.name
                if existing.is_dir():
                    os.replace(existing, draft / f"{item.name}.before")
                os.replace(item, existing)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_student(pipeline: DiffusionPipeline, teacher: LocalModel, folder: Path, lora: Lora | None) -> None:
    """Writes the student's pipeline: its own denoiser and scheduler, and the teacher's files as they are.

    The teacher's text encoder, tokenizer and autoencoder are copied, never saved anew: what transformers 5 writes,
    older versions take for random weights without an error.
    """
    network = pipeline.components[teacher.network_name]
    if lora is not None:
        save_layouts(lora, network, folder / LORA, teacher.network_name)
        pipeline.scheduler.save_pretrained(folder / LORA / "scheduler")
    network.save_pretrained(folder / teacher.network_name)
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    theirs = teacher.index
    # Encoders may have left memory; their files are the teacher's.
    own, needed = pipeline.components, components_of(theirs).keys() - set(WITHOUT_A_ROLE)
    released = [name for name in own if own[name] is None and name in needed]
    components = {name for name in own if own[name] is not None or name in released}
    dtype = str(network.dtype).split(".")[-1]
    wanted = {}
    for path, content in teacher.component_files(dtype).items():
        component, *rest = path.split("/")
        if component != INDEX and component != "scheduler" and (not rest or component in components):
            wanted[path] = content
    write_files(published_files(wanted), folder)
    pipeline.save_config(folder)
    index = read_json(folder / INDEX)
    write_json(folder / INDEX, {**index, **{name: theirs[name] for name in released if name in index}})
    for written in (folder, folder / teacher.network_name, folder / "scheduler", folder / LORA / "scheduler"):
        clean_configs(written)
    written_files: Files = {file.relative_to(folder).as_posix(): file for file in folder.glob("*/*")}
    check_whole({**written_files, INDEX: folder / INDEX}, f"{folder}")


def results(folder: Path) -> dict[str, int]:
    """The files that a run leaves for others, `path/` apart, and their sizes; `report.json`, which lists them, is the last."""
    files = [folder / name for name in (INDEX, "pipeline.py", CARD, *IMAGES)]
    if (folder / INDEX).is_file():
        for name in components_of(read_index(folder, str(folder))):
            files += sorted((folder / name).glob("*"))
        files += sorted((folder / LORA).rglob("*.*"))
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files if file.is_file()}


def has_ended(report: dict[str, Any], max_train_steps: int) -> bool:
    """Whether a report is of a student of all the steps that are asked for, or of one whose training ended early."""
    done = report.get("stages", {}).get("backtracking", {}).get("steps")
    stopped = "early_stopping" in report and report["early_stopping"]["step"] == done
    return done == max_train_steps or (stopped and done <= max_train_steps)


def missing_results(folder: Path, report: dict[str, Any]) -> list[str]:
    """What of a run's results is not there, or not whole, by its report. Texts and images may have been changed since."""
    basics = [INDEX, CARD, f"{component_of(report)}/config.json"] if "student" in report else []
    sizes = report.get("files") or dict.fromkeys(basics)  # older versions did not list them
    missing = []
    for name, size in sizes.items():
        file = inside(folder, name, f"{REPORT} of {folder}")
        actual = file.stat().st_size if file.is_file() else 0
        if actual == 0 != size or (name.endswith(".safetensors") and actual != size):
            missing.append(name)
    return missing


def check_student_is_whole(folder: Path, report: dict[str, Any]) -> None:
    """Checks, before a run is pushed, that a student that was asked for is there, with all that belongs to it. A image
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
    steps = settings.get("max_train_steps")
    if "student" not in report or (steps is not None and not has_ended(report, steps)):
        raise ValueError(f"{folder} holds no finished student: its run was cut off. {remedy}")
    missing = missing_results(folder, report)
    without = [name for name in missing if name in IMAGES]
    if missing != without:
        raise ValueError(f"The student of {folder} is not whole: it has no {', '.join(missing)}. {remedy}")
    if without:
        logger.warning(f"{folder} has no {', '.join(without)}: it is pushed without.")
