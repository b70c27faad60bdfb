"""What can be seen of a run's settings before anything is loaded."""

import os
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from ..path.manifest import MANIFEST
from .config import BacktrackingConfig, DegradationConfig, DisBackConfig, TrainingConfig, target_schedule
from .run_folder import RunFolder
from .settings.fields import values


def check_settings(config: DisBackConfig) -> None:
    """What can be seen before anything is loaded: step counts that do not fit, results that are another run's, folders that
    are files, a tracker that is not installed.

    Raises:
        ValueError: With what, where and what to do instead.
    """
    folder, resume = RunFolder(config.output_dir), config.resume_from_checkpoint
    for name in ("output_dir", "cache_dir", "degradation_path"):
        if getattr(config, name) is not None and not (name == "degradation_path" and config.path_is_shared):
            check_folder(name, getattr(config, name))
    check_tracker(config.report_to)
    for name, own in stages_of(config).items():
        folder.check(name, values(config, TrainingConfig) | own, resume)
    folder.check_named_checkpoint(resume)
    if config.stage == "record" and config.num_path_nodes == 0:
        raise ValueError("--stage record with --num_path_nodes 0 has nothing to do.")
    if config.path_is_shared and config.stage == "record":
        raise ValueError(
            f"--stage record writes a path into a folder. Write ./{config.degradation_path} if that is meant; push it "
            "with --push_to_hub."
        )
    if config.stage == "all" and not config.path_is_shared and not (config.path_folder / MANIFEST).exists():
        target_schedule(config, config.most_path_nodes)


def stages_of(config: DisBackConfig) -> dict[str, dict[str, Any]]:
    """The stages that are asked for, with their own settings."""
    stages = {
        "degradation": values(config, DegradationConfig),
        "backtracking": values(config, BacktrackingConfig),
    }
    if config.stage != "all":
        stages.pop("backtracking" if config.stage == "record" else "degradation")
    return stages


def check_folder(name: str, place: str) -> None:
    """Raises a `ValueError` unless a setting's folder is one, or can be made."""
    parent = next(folder for folder in (Path(place), *Path(place).absolute().parents) if os.path.lexists(folder))
    if not parent.is_dir():
        raise ValueError(
            f"--{name} {place} is no folder and cannot be made: {parent} is {'a file' if parent.is_file() else 'none'}. "
            "Name another."
        )


def check_tracker(name: str) -> None:
    """Raises a `ValueError` if accelerate does not know a tracker, or its package is not installed: it would be left out
    without a word."""
    known = [str(kind) for kind in LOGGER_TYPE_TO_CLASS]
    if name not in (*known, "all", "none"):
        raise ValueError(f"--report_to {name!r} is none of {', '.join([*known, 'all', 'none'])}.")
    if name in known and name not in map(str, get_available_trackers()):
        raise ValueError(
            f"--report_to {name} needs a package that is not installed: `pip install {name.replace('_', '-')}`; or pass "
            "--report_to none."
        )
