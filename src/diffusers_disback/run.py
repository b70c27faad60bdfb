"""What a run needs besides its two stages: whose results are here, which path, and what is written at the end."""

import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from .backtracking import BacktrackingConfig, BacktrackingTrainer, guidance_of_node, target_schedule
from .branches import HubNodes
from .condition_cache import ConditionCache, choose_cache
from .config import TrainingConfig
from .data import CAPACITY, PromptData, PromptFile, dataset_prompts, spool_captions
from .degradation import DegradationConfig
from .evaluation import Evaluation
from .evaluation.report import Report, read_report, summary, versions
from .families import ModelFamily
from .hub import write_model_card
from .manifest import MANIFEST
from .model_reference import ModelReference, fingerprint
from .path import DegradationPath
from .published import published, published_command
from .repository import HubError
from .run_folder import FREE_SETTINGS, RunFolder, flat
from .upload import repository_of


Configs = tuple[TrainingConfig, DegradationConfig, BacktrackingConfig]


def check_settings(configs: Configs) -> None:
    """What can be seen before anything is loaded: step counts that do not fit, and results that are another run's.

    Raises:
        ValueError: With what, where and what to do instead.
    """
    training, degradation, backtracking = configs
    folder, resume = RunFolder(training.output_dir), training.resume_from_checkpoint
    stages = {"degradation": degradation, "backtracking": backtracking}
    if training.stage != "all":
        stages.pop("backtracking" if training.stage == "record" else "degradation")
    for name, own in stages.items():
        folder.check(name, flat(training, own), resume)
        folder.checkpoint_to_resume(name, resume)
    if training.stage == "record" and degradation.num_path_nodes == 0:
        raise ValueError("--stage record with --num_path_nodes 0 has nothing to do.")
    if training.push_to_hub:
        repository_of(training)
    if training.path_is_shared and training.stage == "record":
        raise ValueError(
            f"--stage record writes a path into a folder. Write ./{training.degradation_path} if that is meant; push it "
            "with --push_to_hub."
        )
    if training.stage == "all" and not training.path_is_shared and not (training.path_folder / MANIFEST).exists():
        target_schedule(backtracking, degradation.num_path_nodes)


def is_finished(configs: Configs) -> bool:
    """Whether a run has written the report of all the steps that are asked for."""
    training, degradation, backtracking = configs
    stages = read_report(Path(training.output_dir)).get("stages", {})
    if training.stage == "record":
        return "degradation" in stages
    return stages.get("backtracking", {}).get("steps") == backtracking.max_train_steps


def open_path(
    configs: Configs, teacher: ModelFamily, generator: torch.nn.Module, state: PartialState
) -> DegradationPath | None:
    """The path to record or to go back along; `None` if there is to be none.

    Raises:
        ValueError: If the path that is there is of another teacher, another start or another recording, is damaged, or
            has too many nodes for the steps of stage 2.
        HubError: If it is on the Hub, and the Hub does not give it.
    """
    training, degradation, backtracking = configs
    folder, resume = training.path_folder, training.resume_from_checkpoint
    start = {
        "name_or_path": training.generator_model_name_or_path,
        "sha256": fingerprint(generator),
        "conditioning_timestep": training.conditioning_timestep,
    }
    recording = {k: v for k, v in flat(training, degradation).items() if k not in FREE_SETTINGS}
    own = fingerprint(teacher.network)
    if training.path_is_shared:
        return _open_shared(configs, own, start, teacher.reference, state)
    recorded = (folder / MANIFEST).exists()
    state.wait_for_everyone()  # all have looked before one writes
    if not recorded and training.stage != "backtrack":
        if degradation.num_path_nodes == 0:
            return None
        return DegradationPath.create(folder, teacher.reference, own, start, recording, training.cache_dir)
    path = DegradationPath.from_pretrained(folder, teacher=teacher.reference)
    path.check(own, start)
    if path.complete:
        if state.is_main_process:
            path.verify()
        if training.stage != "record":
            target_schedule(backtracking, len(path))
        state.print(f"The path in {folder} is complete: its {len(path)} nodes are used as they are.")
    else:
        ours = RunFolder(training.output_dir).settings_file("degradation").exists()
        if training.stage == "backtrack" or not resume or not ours or path.manifest["recording"] != recording:
            raise ValueError(
                f"The path in {folder} is unfinished: {len(path)} nodes are recorded. Finish it with the command that "
                "began it and --resume_from_checkpoint latest."
            )
    return path


def _open_shared(
    configs: Configs, teacher_sha256: str, start: dict[str, Any], reference: ModelReference, state: PartialState
) -> DegradationPath:
    """A path on the Hub, to be gone along."""
    training, _, backtracking = configs

    def read(revision: str | None) -> DegradationPath:
        return DegradationPath.from_pretrained(
            training.degradation_path,
            revision,
            reference,
            training.cache_dir,
            training.hub_token,
            training.path_disk_budget_gb if state.is_local_main_process else None,
        )

    path = read(training.degradation_path_revision) if state.is_main_process else None
    (commit,) = broadcast_object_list([None if path is None else path.folders.commit])  # a branch may move meanwhile
    path = read(commit) if path is None else path
    path.check(teacher_sha256, start)
    if not path.complete:
        raise ValueError(
            f"The path of {path.where} is unfinished: {len(path)} nodes are published. Its owner has to finish it."
        )
    target_schedule(backtracking, len(path))
    state.print(f"The path of {path.where} is replayed: {len(path)} nodes, downloaded as they are needed.")
    return path


def load_prompts(config: TrainingConfig) -> Sequence[str]:
    """The prompts that the settings name: a file, a data set, or an image folder.

    Raises:
        ValueError: If they name none, or it cannot be read.
    """
    if config.prompts_file is not None:
        return PromptFile(config.prompts_file, config.max_train_samples)
    if config.dataset_name is None and config.train_data_dir is None:
        raise ValueError("There are no prompts: pass --prompts_file, --dataset_name or --train_data_dir.")
    where = {"dataset_name": config.dataset_name, "train_data_dir": config.train_data_dir}
    where |= {"config_name": config.dataset_config_name, "split": config.dataset_split}
    if config.dataset_streaming:
        file = Path(config.output_dir, "captions.txt")
        with PartialState().main_process_first():
            spool_captions(file, config.caption_column, max_samples=config.max_train_samples, **where)
        return PromptFile(file)
    return dataset_prompts(
        config.caption_column, cache_dir=config.cache_dir, max_samples=config.max_train_samples, **where
    )


def prompt_data(
    training: TrainingConfig, teacher: ModelFamily, prompts: Sequence[str], state: PartialState
) -> PromptData:
    """Prompts and the way to their conditions, as `--cache_conditions` says. Tells what was decided."""
    encode = partial(teacher.encode, resolution=training.resolution)
    folder = Path(training.cache_dir or training.output_dir, "conditions")
    cache = ConditionCache(folder, prompts, encode, partial(teacher.encoder_id, training.resolution))
    on_disk, why = choose_cache(cache, training.cache_conditions, CAPACITY)
    state.print(why, file=sys.stderr)
    if not on_disk:
        return PromptData(prompts, encode, capacity=0 if training.cache_conditions == "off" else CAPACITY)
    with state.main_process_first():
        cache.build(show_progress=state.is_main_process)
    return PromptData(prompts, encode, cache=cache)


def validation_prompts(training: TrainingConfig, prompts: Sequence[str]) -> list[str]:
    """The prompts of the sample pictures: those asked for, or six from all over the data."""
    last = len(prompts) - 1
    return list(dict.fromkeys(training.validation_prompts or [prompts[i * last // 5] for i in range(6)]))


def picture_evaluation(training: TrainingConfig, wanted: list[str]) -> Evaluation:
    """The evaluation of any teacher: some pictures of each validation prompt."""
    repeated = [prompt for prompt in wanted for _ in range(training.num_validation_images)]
    return Evaluation(repeated, batch_size=training.train_batch_size)


def write_results(
    report: Report,
    family: ModelFamily,
    path: DegradationPath | None,
    trainer: BacktrackingTrainer | None,
    configs: Configs,
    script: str,
    arguments: list[str],
    teacher_card: dict[str, Any],
) -> str:
    """Writes report, pictures and model card. Returns a summary.

    Args:
        report (`Report`): With what was measured.
        family (`ModelFamily`): The teacher.
        path (`DegradationPath`, *optional*): The complete path.
        trainer (`BacktrackingTrainer`, *optional*): Of stage 2, if it was run.
        configs (`Configs`): All settings.
        script (`str`): The training script.
        arguments (`list[str]`): Its command line.
        teacher_card (`dict`): What the teacher's card declares, as it was read before training.
    """
    training, _, backtracking = configs
    folder, state = Path(training.output_dir), PartialState()
    stages: dict[str, Any] = {}
    report.write_samples(folder / "samples.png")
    if path is not None:
        stages["degradation"] = path.manifest["cost"]
        if not (training.path_is_shared and training.path_disk_budget_gb):  # or it would be downloaded once more
            scales = [guidance_of_node(i, len(path), backtracking) for i in range(len(path) + 1)]
            try:
                report.write_path(path, scales, folder / "path.png")
            except HubError as error:  # nodes may have left the cache since
                print(f"path.png is not drawn. {error}")
            if training.stage == "record":
                shutil.copyfile(folder / "path.png", path.folder / "path.png")
    content = {
        "teacher_card": teacher_card,
        "stages": stages,
        "path": None if path is None else _origin(path),
        "pipeline_class": type(family.pipeline).__name__,
        "resolution": family.resolution(training.resolution),
        "seed": training.seed,
        "versions": versions(),
        "machine": {"device": device_name(state.device), "num_processes": state.num_processes},
        "settings": published(flat(*configs)),
    }
    if trainer is not None:
        precision = trainer.accelerator.mixed_precision
        stages["backtracking"] = trainer.summary()
        if trainer.student.lora is not None:
            config = trainer.student.lora[1]
            content["lora"] = {"rank": config.r, "alpha": config.lora_alpha, "folder": "lora"}
        content |= {"curve": trainer.curve, "switches": trainer.switches, "waits": trainer.waits}
        content["measures"] = [asdict(measure) for measure in trainer.measures]
        content["machine"]["mixed_precision"] = precision
        report.write_convergence(trainer.curve, trainer.switches, folder / "convergence.png")
        launch = ["accelerate", "launch", "--num_processes", str(state.num_processes), "--mixed_precision", precision]
        content["command"] = shlex.join([*launch, script, *published_command(without_token(arguments))])
    written = report.write(folder, **content)
    if trainer is not None:
        write_model_card(folder, written)
    return summary(folder)


def _origin(path: DegradationPath) -> dict[str, Any]:
    """Where a path came from, for the report."""
    origin = {"id": path.manifest["id"], "num_nodes": len(path), "nodes": path.nodes}
    if isinstance(path.folders, HubNodes):
        origin |= {"repo_id": path.where, "commit": path.folders.commit}
    return origin


def flag_of(argument: str) -> str:
    """The flag that an argument of a command line is or begins with, such as `--hub_token`: the parser takes dashes in it,
    and a value after `=`, too."""
    return re.sub(r"(?<=\w)-", "_", argument.split("=")[0])


def without_token(arguments: list[str]) -> list[str]:
    """A command line for others to read."""
    kept, skip = [], False
    for argument in arguments:
        is_token = flag_of(argument) == "--hub_token"
        if not skip and not is_token:
            kept.append(argument)
        skip = is_token and "=" not in argument
    return kept


def device_name(device: torch.device) -> str:
    """The GPU's name, or the number of threads on the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
