"""The output folder of a run: what it holds, whose it is, and its checkpoints."""

import os
import shutil
from pathlib import Path
from typing import Any

from .files import read_json, write_json


# A resumed run may change these and still be the same run.
FREE_SETTINGS = {
    *("output_dir", "resume_from_checkpoint", "stage", "degradation_path", "cache_dir", "max_train_steps"),
    *("checkpointing_steps", "checkpoints_total_limit", "mixed_precision", "allow_tf32", "gradient_checkpointing"),
    *("offload_idle_role", "offload_ema", "enable_xformers_memory_efficient_attention", "channels_last", "compile"),
    *("dataloader_num_workers", "report_to", "logging_dir", "logging_steps", "tracker_project_name"),
    *("validation_prompts", "num_validation_images", "validation_steps"),
    *("push_to_hub", "hub_model_id", "hub_private_repo"),
    *("degradation_path_revision", "path_disk_budget_gb"),
}
_RESULTS = {"degradation": ("path/path.json",), "backtracking": ("model_index.json", "README.md")}


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
                "latest to go on with that run, or choose another --output_dir."
            )
        if file.exists():
            before = read_json(file)
            changed = {
                name: (before.get(name), value)
                for name, value in settings.items()
                if name not in FREE_SETTINGS and before.get(name) != value
            }
            if changed:
                what = "; ".join(f"{name} was {was!r}, is {is_!r}" for name, (was, is_) in changed.items())
                raise ValueError(
                    f"{self.folder} holds the {stage} of a run with other settings: {what}. Choose another "
                    "--output_dir, or resume with the same settings."
                )

    def claim(self, stage: str, settings: dict[str, Any]) -> None:
        """Writes down a stage's settings, on the main process."""
        self.settings_file(stage).parent.mkdir(parents=True, exist_ok=True)
        write_json(self.settings_file(stage), settings)

    def settings_file(self, stage: str) -> Path:
        """Marks a stage as begun here. Outside of `checkpoints`, which may be thrown away when a run is finished."""
        return self.folder / "settings" / f"{stage}.json"

    def settings(self) -> dict[str, Any]:
        """What was written down of the stages that were begun here."""
        files = [self.settings_file(stage) for stage in _RESULTS]
        return {k: v for file in files if file.is_file() for k, v in read_json(file).items()}

    def stage_folder(self, stage: str) -> Path:
        return self.folder / "checkpoints" / stage

    def checkpoints(self, stage: str) -> list[Path]:
        """A stage's whole checkpoints, oldest first."""
        found = self.stage_folder(stage).glob("checkpoint-*")
        return sorted((f for f in found if (f / "stage.json").exists()), key=lambda f: int(f.name.split("-")[1]))

    def checkpoint_to_resume(self, stage: str, resume: str | None) -> Path | None:
        """The checkpoint that `--resume_from_checkpoint` means for this stage, if there is one.

        Raises:
            ValueError: If it names a folder that is no checkpoint.
        """
        if resume is None:
            return None
        if resume == "latest":
            return (self.checkpoints(stage) or [None])[-1]
        folder = Path(resume)
        if (
            not (folder / "stage.json").exists()
            or folder.resolve().parents[1] != self.stage_folder(stage).resolve().parent
        ):
            raise ValueError(
                f"{resume} is no checkpoint of this run. It has "
                f"{', '.join(str(f) for f in self.checkpoints(stage)) or 'none'}."
            )
        return folder if folder.resolve().parent.name == stage else None

    def draft_of_checkpoint(self, stage: str, step: int) -> Path:
        """Where a checkpoint is written before it counts; `finish_checkpoint` gives it its name."""
        return self.stage_folder(stage) / f"draft-{step:06d}"

    def finish_checkpoint(self, stage: str, step: int, state: dict[str, Any], limit: int | None) -> None:
        """Makes a written draft a checkpoint, and forgets the oldest ones beyond the limit. On the main process."""
        draft, folder = self.draft_of_checkpoint(stage, step), self.stage_folder(stage) / f"checkpoint-{step:06d}"
        write_json(draft / "stage.json", state)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(draft, folder)
        for old in self.checkpoints(stage)[:-limit] if limit else []:
            shutil.rmtree(old)


def flat(*configs: Any) -> dict[str, Any]:
    """The fields of dataclasses in one dictionary, for others to read: without the token."""
    return {name: value for config in configs for name, value in vars(config).items() if name != "hub_token"}
