"""The output folder of a run: what it holds, whose it is, and its checkpoints."""

import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..hub.files import read_json, write_json
from ..models.pipeline_folder import INDEX
from .checkpoint import damage, is_sealed, seal
from .config import changed, without_rates
from .lock import locked
from .processes import decided_by_main
from .signals import Interrupted


INPUTS = {
    "prompts": "the prompts (of the file or data set)",
    "teacher": "the teacher's UNet (or the LoRA that is fused into it)",
    "text_encoders": "the teacher's text encoders or tokenizers",
    "scheduler": "the teacher's scheduler",
    "autoencoder": "the autoencoder (the teacher's, or the one in its place)",
    "start": "the student's start",
    "images": "the images",
}
_INPUTS = "inputs"  # among the settings that are written down: hashes of what they name
_RESULTS = {"degradation": ("path/path.json",), "backtracking": (INDEX, "README.md")}
_CHECKPOINT = re.compile(r"checkpoint-([0-9]{6,})")
_LEFTOVER = re.compile(r"(draft|discarded)-[0-9]{6,}")


class RunFolder:
    """Everything that a run leaves. Results of another run are never overwritten.

    Args:
        folder (`str` or `Path`): `--output_dir`.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def check(self, stage: str, settings: dict[str, Any], resume: str | None) -> None:
        """Sees that a stage may write here: nothing of it is here yet, or it is this run's and is to be resumed.

        Raises:
            ValueError: If the folder holds results and no resumption was asked for, or those of other settings.
        """
        file = self.settings_file(stage)
        results = [name for name in _RESULTS[stage] if (self.folder / name).exists()]
        if results and not file.exists():
            raise ValueError(
                f"{self.folder} holds {' and '.join(results)}, which this library did not put there. Choose another "
                "--output_dir."
            )
        if file.exists() and not resume:
            results.append(str(file.relative_to(self.folder)))
            raise ValueError(
                f"{self.folder} holds a run's results already ({', '.join(results)}). Pass --resume_from_checkpoint "
                "latest to resume with that run, or choose another --output_dir."
            )
        if file.exists():
            others = changed(read_json(file), without_rates(settings))
            if others:
                what = "; ".join(f"{name} was {was!r}, is {is_!r}" for name, (was, is_) in others.items())
                raise ValueError(
                    f"{self.folder} holds the {stage} of a run with other settings: {what}. Choose another "
                    "--output_dir, or resume with the same settings."
                )

    def check_inputs(self, stage: str, inputs: dict[str, str]) -> None:
        """Sees that what a stage is made from is what it began with, if it was begun here.

        Args:
            stage (`str`): Its name.
            inputs (`dict[str, str]`): One of `INPUTS` -> a hash of its content, whatever its name.

        Raises:
            ValueError: With what has changed.
        """
        file = self.settings_file(stage)
        before = read_json(file).get(_INPUTS, {}) if file.exists() else {}
        others = [INPUTS[name] for name, hash_ in inputs.items() if before.get(name, hash_) != hash_]
        if others:
            raise ValueError(
                f"{self.folder} holds the {stage} of a run with other inputs: {' and '.join(others)} changed since it began, "
                "though the names are the same. Put back what was there, or choose another --output_dir."
            )

    def claim(self, stage: str, settings: dict[str, Any], inputs: dict[str, str] | None = None) -> None:
        """Writes down a stage's settings, and hashes of its inputs, on the main process."""
        self.settings_file(stage).parent.mkdir(parents=True, exist_ok=True)
        write_json(self.settings_file(stage), settings if inputs is None else {**settings, _INPUTS: inputs})

    def settings_file(self, stage: str) -> Path:
        """Marks a stage as begun here. Outside of `checkpoints`, which may be thrown away when a run is finished."""
        return self.folder / "settings" / f"{stage}.json"

    def settings(self) -> dict[str, Any]:
        """What was written down of the stages that were begun here."""
        files = [self.settings_file(stage) for stage in _RESULTS]
        found = {k: v for file in files if file.is_file() for k, v in read_json(file).items()}
        return {name: value for name, value in found.items() if name != _INPUTS}

    def stage_folder(self, stage: str) -> Path:
        return self.folder / "checkpoints" / stage

    def checkpoints(self, stage: str) -> list[Path]:
        """A stage's checkpoints, whole or damaged, oldest first. What has another name is the user's own."""
        folder = self.stage_folder(stage)
        found = (
            [f for f in folder.iterdir() if _CHECKPOINT.fullmatch(f.name) and f.is_dir()] if folder.is_dir() else []
        )
        return sorted(found, key=_step_of)

    def check_named_checkpoint(self, resume: str | None) -> None:
        """Raises a `ValueError` if `--resume_from_checkpoint` names a folder that is no checkpoint of this run."""
        if resume in (None, "latest"):
            return
        folder = Path(resume)
        looks_right = any((folder / name).exists() for name in ("stage.json", "files.json"))
        if not looks_right or folder.resolve().parent.parent != self.stage_folder("").resolve():
            existing = [str(f) for stage in _RESULTS for f in self.checkpoints(stage)]
            raise ValueError(f"{resume} is no checkpoint of this run. It has {', '.join(existing) or 'none'}.")

    def checkpoint_to_resume(self, stage: str, resume: str | None) -> Path | None:
        """The checkpoint that `--resume_from_checkpoint` means for this stage, if there is one; all of its files are as
        they were written. `latest` is the newest of which that is true; if it is not the newest, that is told.

        Raises:
            ValueError: If it names a folder that is no checkpoint, or is damaged; if every checkpoint is.
        """
        if resume is None:
            return None
        self.check_named_checkpoint(resume)
        if resume != "latest":
            folder = Path(resume)
            if folder.resolve().parent.name != stage:
                return None
            problem = damage(folder)
            if problem is not None:
                raise ValueError(
                    f"{folder} is damaged: {problem}. Put the file back, or pass --resume_from_checkpoint latest, which "
                    "takes the newest checkpoint that is whole."
                )
            return _told_if_unsealed(folder)
        problems: list[str] = []
        for folder in reversed(self.checkpoints(stage)):
            problem = damage(folder)
            if problem is None:
                for message in problems:
                    print(f"{stage}: {message}; {folder.name} is taken instead.", file=sys.stderr)
                return _told_if_unsealed(folder)
            problems.append(f"{folder} is damaged: {problem}")
        if problems:
            raise ValueError(
                f"None of the {stage} checkpoints is whole. {'. '.join(problems)}. Put the files back, or begin this stage "
                f"anew: remove {self.stage_folder(stage)}."
            )
        return None

    def intact(self) -> str:
        """What a run that is cut off can be resumed from, in words."""
        for stage in reversed(_RESULTS):
            whole = [folder for folder in self.checkpoints(stage) if damage(folder, sizes_only=True) is None]
            if whole:
                return f"The last checkpoint, {whole[-1]}, is whole: resume with --resume_from_checkpoint latest."
        return "There was no checkpoint yet; with --resume_from_checkpoint latest the same command begins again."

    def draft_of_checkpoint(self, stage: str, step: int) -> Path:
        """Where a checkpoint is written before it counts; `finish_checkpoint` gives it its name."""
        return self.stage_folder(stage) / f"draft-{step:06d}"

    def clear_drafts(self, stage: str) -> None:
        """Removes what runs that were cut off have left of checkpoints. On the main process."""
        folder = self.stage_folder(stage)
        for left in [f for f in folder.iterdir() if _LEFTOVER.fullmatch(f.name)] if folder.is_dir() else []:
            remove(left)

    def finish_checkpoint(self, stage: str, step: int, state: dict[str, Any], limit: int | None) -> None:
        """Makes a written draft a checkpoint, and forgets the oldest ones beyond the limit. On the main process.

        Raises:
            OSError: If what was written is not what is there. No other checkpoint was touched then.
        """
        draft, folder = self.draft_of_checkpoint(stage, step), self.stage_folder(stage) / f"checkpoint-{step:06d}"
        seal(draft, state)
        self._discard(folder)
        os.replace(draft, folder)
        problem = damage(folder, sizes_only=True)
        if problem is not None:
            raise OSError(errno.EIO, f"The checkpoint was written, but {problem}", str(folder))
        if limit is not None:
            self._forget(stage, step, limit)

    def _forget(self, stage: str, step: int, limit: int) -> None:
        """Removes checkpoints older than the newest ones up to a step. Damaged ones do not count; later ones, of a run
        that was resumed before its end, stay until this one comes to them."""
        whole = 0
        for folder in reversed([f for f in self.checkpoints(stage) if _step_of(f) <= step]):
            if whole == limit:
                self._discard(folder)
            elif damage(folder, sizes_only=True) is None:
                whole += 1

    def _discard(self, folder: Path) -> None:
        """Removes a checkpoint: first its name, so that one that is half removed is none."""
        discarded = folder.with_name(f"discarded-{_step_of(folder):06d}")
        remove(discarded)
        if folder.exists():
            os.replace(folder, discarded)
            remove(discarded)


def _step_of(checkpoint: Path) -> int:
    """After which step it was saved, by its name."""
    return int(checkpoint.name.split("-")[1])


def remove(folder: Path) -> None:
    """Removes a folder, if it is there; of a link to one, the link."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def _told_if_unsealed(folder: Path) -> Path:
    if not is_sealed(folder):
        print(f"{folder} was written by an older version, without hashes: it is taken unchecked.", file=sys.stderr)
    return folder


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Keeps an output folder for this run, in all of its processes. A signal, and an error of the disk that is of this
    folder, are told with what is intact.

    Raises:
        ValueError: If another run writes to it.
    """
    lock = ExitStack()
    with lock:
        decided_by_main(lambda: lock.enter_context(locked(folder)))
        try:
            yield
        except (OSError, Interrupted) as problem:
            if isinstance(problem, Interrupted) or _is_in(folder, problem.filename):
                problem.add_note(RunFolder(folder).intact())
            raise


def _is_in(folder: Path, place: Any) -> bool:
    """Whether what an error of the disk names lies in a folder."""
    return isinstance(place, (str, Path)) and Path(place).resolve().is_relative_to(folder.resolve())
