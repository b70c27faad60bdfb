"""Which path a run records, or backtracks along."""

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..families import ModelFamily
from ..models.weights import fingerprint
from ..path.manifest import MANIFEST
from ..path.path import DegradationPath
from .config import (
    DegradationConfig,
    DisBackConfig,
    TrainingConfig,
    changed,
    target_schedule,
    that_count,
    without_rates,
)
from .defaults import with_defaults
from .run_folder import RunFolder
from .settings.fields import values


def open_path(
    config: DisBackConfig,
    teacher: ModelFamily,
    generator: torch.nn.Module,
    state: PartialState,
    inputs: dict[str, str] | None = None,
) -> DegradationPath | None:
    """The path to record or to go back along; `None` if there is to be none, or was left empty.

    Args:
        config (`DisBackConfig`): All settings.
        teacher (`ModelFamily`): The teacher.
        generator (`nn.Module`): The initial generator's network.
        state (`PartialState`): This process.
        inputs (`dict[str, str]`, *optional*): Of `check_inputs`, which has hashed both already.

    Raises:
        ValueError: If the path that is there is of another teacher, another start or another recording, is damaged, or
            has too many nodes for the steps of stage 2.
        HubError: If it is on the Hub, and the Hub does not give it.
    """
    config = with_defaults(config, teacher)
    folder, resume = config.path_folder, config.resume_from_checkpoint
    start = {
        "name_or_path": config.generator_model_name_or_path,
        "sha256": inputs["start"] if inputs else fingerprint(generator),
        "conditioning_timestep": config.conditioning_timestep,
    }
    recording = that_count(values(config, TrainingConfig) | values(config, DegradationConfig))
    own = inputs["teacher"] if inputs else fingerprint(teacher.network)
    if config.path_is_shared:
        return _open_shared(config, own, start, teacher, state)
    recorded = (folder / MANIFEST).exists()
    state.wait_for_everyone()  # all have looked before one writes
    if not recorded and config.stage != "backtrack":
        if config.num_path_nodes == 0:
            return None
        return DegradationPath.create(folder, teacher.local_model, own, start, recording)
    path = DegradationPath.from_pretrained(folder, teacher=teacher.model)
    path.check(own, start, teacher.network_name)
    if path.complete:
        if state.is_main_process:
            path.verify()
        if config.stage != "record":
            target_schedule(config, len(path))
        if not path.nodes:
            state.print(f"The path in {folder} was left empty: the start is near the teacher.")
            return None
        state.print(f"The path in {folder} is complete: its {len(path)} nodes are used as they are.")
    else:
        ours = RunFolder(config.output_dir).settings_file("degradation").exists()
        if (
            config.stage == "backtrack"
            or not resume
            or not ours
            or not _same_recording(path.manifest["recording"], recording)
        ):
            raise ValueError(
                f"The path in {folder} is unfinished: {len(path)} nodes are recorded. Finish it with the command that "
                "began it and --resume_from_checkpoint latest."
            )
    return path


def _same_recording(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two recordings have the same settings, learning rates apart."""
    return not changed(one, without_rates(other)) and not changed(other, without_rates(one))


def _open_shared(
    config: DisBackConfig, teacher_sha256: str, start: dict[str, Any], teacher: ModelFamily, state: PartialState
) -> DegradationPath:
    """Opens a path on the Hub, to be replayed."""

    def read(revision: str | None) -> DegradationPath:
        return DegradationPath.from_pretrained(
            str(config.degradation_path),
            revision,
            teacher.model,
            config.cache_dir,
            config.hub_token,
            config.path_disk_budget_gb if state.is_local_main_process else None,
        )

    path = read(config.degradation_path_revision) if state.is_main_process else None
    (commit,) = broadcast_object_list([path.commit if path is not None else None])  # a branch may move meanwhile
    path = read(commit) if path is None else path
    path.check(teacher_sha256, start, teacher.network_name)
    if not path.complete:
        raise ValueError(
            f"The path of {path.where} is unfinished: {len(path)} nodes are published. Its owner has to finish it."
        )
    target_schedule(config, len(path))
    state.print(f"The path of {path.where} is replayed: {len(path)} nodes, downloaded as they are needed.")
    return path
