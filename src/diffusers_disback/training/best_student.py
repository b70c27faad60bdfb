"""The best student so far, beside the last: a folder that is whole or not there, and that a checkpoint keeps with it."""

import os
import shutil
from pathlib import Path
from typing import Any

from ..families import ModelFamily
from ..hub.files import link_or_copy, read_json, write_json, writing
from ..hub.published import clean_configs
from .checkpoint import damage_of, files_of
from .learner import Learner
from .run_folder import remove


BEST = "best"
BEST_FILE = "best.json"


class BestStudent:
    """`best/` in a run's output folder: the denoiser as the final student's is written (of an adapter, the LoRA), the one-step
    scheduler, and `best.json`, which says at which step it was and what it measured, and seals the files.

    It is written aside and renamed, so that weights and `best.json` are of one student. Each checkpoint holds it as it was
    then, as hard links where the disk has them, and a run that is resumed begins with that one: what was written after the
    checkpoint is written again when the run gets there.

    Args:
        output_dir (`str` or `Path`): Of the run.
        family (`ModelFamily`): The teacher.
        timestep (`int`): At which the student is evaluated.
    """

    def __init__(self, output_dir: str | Path, family: ModelFamily, timestep: int):
        self.folder = Path(output_dir, BEST)
        self.family = family
        self.timestep = timestep

    def check_place(self) -> None:
        """Raises a `ValueError` if something else is there."""
        if self.folder.exists() and not (self.folder / BEST_FILE).is_file():
            raise ValueError(
                f"{self.folder} is where the best student is kept, but it has no {BEST_FILE}: this library did not write it, or "
                "it is damaged. Move or remove it, or choose another --output_dir."
            )

    def write(self, student: Learner, row: dict[str, Any]) -> None:
        """Writes the student, as it would be deployed now, in the place of the one before.

        Args:
            student (`Learner`): In training.
            row (`dict`): Step, metric and value, for `best.json`.

        Raises:
            OSError: If it cannot be written. The one before is as it was then.
        """
        draft = self._draft()
        try:
            with writing(draft), student.deployed():
                student.save_deployed(draft, self.family.network_name)
                self.family.one_step_scheduler(self.timestep).save_pretrained(draft / "scheduler")
                for folder in (draft / self.family.network_name, draft / "scheduler"):
                    clean_configs(folder)
                write_json(draft / BEST_FILE, {"format_version": 1, **row, "files": files_of(draft)})
            self._put(draft)
        except OSError:
            shutil.rmtree(draft, ignore_errors=True)  # of a full disk it may be the larger part
            raise

    def add_to(self, checkpoint: Path) -> None:
        """Puts it into a checkpoint that is written, if there is one."""
        if self.folder.exists():
            shutil.copytree(self.folder, checkpoint / BEST, copy_function=link_or_copy)

    def restore(self, checkpoint: Path | None) -> None:
        """Puts that of a checkpoint in its place, or none, if the checkpoint has none. The checkpoint's files were looked at."""
        draft, there = self._draft(), checkpoint is not None and (checkpoint / BEST).exists()
        if checkpoint is None or not there:
            remove(self.folder)
        elif self._damage() is not None or read_json(checkpoint / BEST / BEST_FILE) != read_json(
            self.folder / BEST_FILE
        ):
            shutil.copytree(checkpoint / BEST, draft, copy_function=link_or_copy)
            self._put(draft)

    def load_into(self, student: Learner) -> None:
        """Makes it the student, after training.

        Raises:
            ValueError: If its files are not as they were written.
        """
        problem = self._damage()
        if problem is not None:
            raise ValueError(
                f"The best student in {self.folder} cannot be taken: {problem}. Pass --resume_from_checkpoint latest: it is "
                "restored from the last checkpoint then, and the rest of the run repeated."
            )
        student.load_deployed(self.folder, self.family.network_name)

    def _damage(self) -> str | None:
        """What is wrong with the folder, in words; `None` if it is whole."""
        if not (self.folder / BEST_FILE).is_file():
            return f"{BEST_FILE} is missing"
        return damage_of(self.folder, lambda: read_json(self.folder / BEST_FILE).get("files"), BEST_FILE)

    def _draft(self) -> Path:
        """An empty name to write at, after what runs that were cut off have left was removed."""
        draft = self.folder.with_name(f"{BEST}.draft")
        for left in (draft, self._discarded):
            remove(left)
        return draft

    @property
    def _discarded(self) -> Path:
        return self.folder.with_name(f"{BEST}.discarded.draft")

    def _put(self, draft: Path) -> None:
        """Gives a written folder its name. If that fails, the one before has it."""
        had_one = self.folder.exists()
        if had_one:
            os.replace(self.folder, self._discarded)
        try:
            os.replace(draft, self.folder)
        except OSError:
            if had_one:
                os.replace(self._discarded, self.folder)
            raise
        remove(self._discarded)
