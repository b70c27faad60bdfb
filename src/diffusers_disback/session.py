"""What a run needs besides its two stages: whose results are here, which path, and what is written at the end."""

import hashlib
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import broadcast_object_list

from .backtracking import BacktrackingConfig, BacktrackingTrainer, guidance_of_node, target_schedule
from .data.cache import ConditionCache, choose_cache, digest
from .data.conditions import CAPACITY, ConditionSource, PromptConditions
from .data.prompts import PromptFile, dataset_prompts, spool_captions
from .data.truncation import truncation
from .degradation import DegradationConfig
from .evaluation import Evaluation, check_evaluators
from .evaluation.report import Report, read_report, summary, versions
from .families import ModelFamily
from .hub.files import write_json, writing, written_whole
from .hub.publish.background import repository_of
from .hub.publish.run import write_model_card
from .hub.publish.student import missing_results, results
from .hub.published import REPORT, published, published_command
from .hub.repository import HubError
from .models.pipeline_folder import INDEX
from .models.weights import fingerprint
from .path.manifest import MANIFEST
from .path.path import DegradationPath
from .path.storage import HubNodes
from .training.config import TrainingConfig, changed, that_count, without_rates
from .training.lock import locked
from .training.processes import decided_by_main
from .training.run_folder import RunFolder
from .training.settings.fields import values
from .training.signals import Interrupted


Configs = tuple[TrainingConfig, DegradationConfig, BacktrackingConfig]
_OF_THE_SCHEDULE = {
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
    *("prediction_type", "shift", "use_dynamic_shifting"),
}


def check_settings(configs: Configs) -> None:
    """What can be seen before anything is loaded: step counts that do not fit, results that are another run's, folders that
    are files, a tracker that is not installed, an evaluator that is not known.

    Raises:
        ValueError: With what, where and what to do instead.
    """
    training, degradation, backtracking = configs
    folder, resume = RunFolder(training.output_dir), training.resume_from_checkpoint
    for name in ("output_dir", "cache_dir", "degradation_path"):
        if getattr(training, name) is not None and not (name == "degradation_path" and training.path_is_shared):
            check_folder(name, getattr(training, name))
    check_tracker(training.report_to)
    check_evaluators(training.evaluators)
    for name, own in _stages(configs).items():
        folder.check(name, values(training, TrainingConfig) | own, resume)
    folder.check_named_checkpoint(resume)
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


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Keeps an output folder for this run, in all of its processes. What is intact is noted on a signal, and on an error of
    the disk that is of this folder.

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


def _stages(configs: Configs) -> dict[str, dict[str, Any]]:
    """The stages that are asked for, with their own settings."""
    training, degradation, backtracking = configs
    stages = {
        "degradation": values(degradation, DegradationConfig),
        "backtracking": values(backtracking, BacktrackingConfig),
    }
    if training.stage != "all":
        stages.pop("backtracking" if training.stage == "record" else "degradation")
    return stages


def check_folder(name: str, place: str) -> None:
    """Raises a `ValueError` unless a setting's folder is one, or can be made."""
    there = next(folder for folder in (Path(place), *Path(place).absolute().parents) if os.path.lexists(folder))
    if not there.is_dir():
        raise ValueError(
            f"--{name} {place} is no folder and cannot be made: {there} is {'a file' if there.is_file() else 'none'}. "
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


def is_finished(configs: Configs) -> bool:
    """Whether all that a run leaves of the steps that are asked for is there. What is damaged or missing is told: it is
    made anew from the last checkpoint; if that was thrown away, a student that is whole is not trained again for it."""
    training, _, backtracking = configs
    folder, state = Path(training.output_dir), PartialState()
    try:
        report = read_report(folder)
    except ValueError as error:
        state.print(f"{folder / REPORT} is damaged and is made anew ({error}).", file=sys.stderr)
        return False
    stages = report.get("stages", {})
    if training.stage == "record":
        done = "degradation" in stages and _nodes_are_there(training.path_folder)
        remakes = done and (training.path_folder / MANIFEST).exists()
    else:
        done = stages.get("backtracking", {}).get("steps") == backtracking.max_train_steps
        checkpoints = RunFolder(folder).checkpoints("backtracking")
        remakes = bool(checkpoints) and checkpoints[-1].name == f"checkpoint-{backtracking.max_train_steps:06d}"
    missing = missing_results(folder, report) if done else []
    if not missing:
        return done
    keeps = not remakes and not any(name == INDEX or name.endswith(".safetensors") for name in missing)
    what = f"{folder} has no {', '.join(missing)}"
    state.print(
        f"{what}. The last checkpoint, from which it could be made, is gone, too; the student is whole."
        if keeps
        else f"{what}: made anew from the last checkpoint.",
        file=sys.stderr,
    )
    return keeps


def _nodes_are_there(folder: Path) -> bool:
    """Whether a folder holds a complete path, every file of which is there."""
    if not (folder / MANIFEST).is_file():
        return False
    path = DegradationPath.from_pretrained(folder)
    files = [folder / node["name"] / path.denoiser / name for node in path.nodes for name in node["files"]]
    return path.complete and all(file.is_file() for file in files)


def check_inputs(
    configs: Configs, teacher: ModelFamily, generator: torch.nn.Module, prompts: Sequence[str]
) -> dict[str, str]:
    """Hashes of what a run is made from, for its stages to write down. Names alone do not tell: what lies under them may be
    another model, or other prompts, when the run is resumed.

    Raises:
        ValueError: If a stage was begun here with other inputs.
    """
    training, _, _ = configs
    schedule = {name: value for name, value in teacher.pipeline.scheduler.config.items() if name in _OF_THE_SCHEDULE}
    inputs = {
        "prompts": digest(prompts),
        "teacher": fingerprint(teacher.network),
        **teacher.inputs(training.resolution),
        "scheduler": _sha256(json.dumps(schedule, sort_keys=True)),
    }
    own_start = training.generator_model_name_or_path is not None
    inputs["start"] = fingerprint(generator) if own_start else inputs["teacher"]
    for stage in _stages(configs):
        RunFolder(training.output_dir).check_inputs(stage, inputs)
    return inputs


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def open_path(
    configs: Configs,
    teacher: ModelFamily,
    generator: torch.nn.Module,
    state: PartialState,
    inputs: dict[str, str] | None = None,
) -> DegradationPath | None:
    """The path to record or to go back along; `None` if there is to be none.

    Args:
        configs (`Configs`): All settings.
        teacher (`ModelFamily`): The teacher.
        generator (`nn.Module`): The initial generator's network.
        state (`PartialState`): This process.
        inputs (`dict[str, str]`, *optional*): Of `check_inputs`, which has hashed both already.

    Raises:
        ValueError: If the path that is there is of another teacher, another start or another recording, is damaged, or
            has too many nodes for the steps of stage 2.
        HubError: If it is on the Hub, and the Hub does not give it.
    """
    training, degradation, backtracking = configs
    folder, resume = training.path_folder, training.resume_from_checkpoint
    start = {
        "name_or_path": training.generator_model_name_or_path,
        "sha256": inputs["start"] if inputs else fingerprint(generator),
        "conditioning_timestep": training.conditioning_timestep,
    }
    recording = that_count(values(training, TrainingConfig) | values(degradation, DegradationConfig))
    own = inputs["teacher"] if inputs else fingerprint(teacher.network)
    if training.path_is_shared:
        return _open_shared(configs, own, start, teacher, state)
    recorded = (folder / MANIFEST).exists()
    state.wait_for_everyone()  # all have looked before one writes
    if not recorded and training.stage != "backtrack":
        if degradation.num_path_nodes == 0:
            return None
        return DegradationPath.create(folder, teacher.model, own, start, recording)
    path = DegradationPath.from_pretrained(folder, teacher=teacher.model)
    path.check(own, start, teacher.network_name)
    if path.complete:
        if state.is_main_process:
            path.verify()
        if training.stage != "record":
            target_schedule(backtracking, len(path))
        state.print(f"The path in {folder} is complete: its {len(path)} nodes are used as they are.")
    else:
        ours = RunFolder(training.output_dir).settings_file("degradation").exists()
        if (
            training.stage == "backtrack"
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
    configs: Configs, teacher_sha256: str, start: dict[str, Any], teacher: ModelFamily, state: PartialState
) -> DegradationPath:
    """Opens a path on the Hub, to be replayed."""
    training, _, backtracking = configs

    def read(revision: str | None) -> DegradationPath:
        return DegradationPath.from_pretrained(
            training.degradation_path,
            revision,
            teacher.model,
            training.cache_dir,
            training.hub_token,
            training.path_disk_budget_gb if state.is_local_main_process else None,
        )

    path = read(training.degradation_path_revision) if state.is_main_process else None
    (commit,) = broadcast_object_list([None if path is None else path.folders.commit])  # a branch may move meanwhile
    path = read(commit) if path is None else path
    path.check(teacher_sha256, start, teacher.network_name)
    if not path.complete:
        raise ValueError(
            f"The path of {path.where} is unfinished: {len(path)} nodes are published. Its owner has to finish it."
        )
    target_schedule(backtracking, len(path))
    state.print(f"The path of {path.where} is replayed: {len(path)} nodes, downloaded as they are needed.")
    return path


def load_prompts(config: TrainingConfig) -> Sequence[str]:
    """The prompts that the settings name: a file, a data set, or an image folder; none, for a teacher that takes none.

    Raises:
        ValueError: If they name none and the teacher takes prompts, or it cannot be read.
    """
    if config.prompts_file is not None:
        return PromptFile(config.prompts_file, config.max_train_samples)
    if config.dataset_name is None and config.train_data_dir is None:
        teacher = config.teacher
        if teacher.name_or_path is not None and not family_class_of(teacher, config.cache_dir).takes_prompts:
            return []
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


def condition_source(
    training: TrainingConfig,
    teacher: ModelFamily,
    prompts: Sequence[str],
    state: PartialState,
    inputs: dict[str, str],
) -> ConditionSource:
    """What the teacher's samples are conditioned on: prompts, encoded as `--cache_conditions` says, or what it knows of
    itself. Tells what was decided.

    Args:
        training (`TrainingConfig`): The settings.
        teacher (`ModelFamily`): With its encoders.
        prompts (`Sequence[str]`): All of the run's.
        state (`PartialState`): This process among the others.
        inputs (`dict[str, str]`): Of `check_inputs`, which hashed what conditions depend on.

    Raises:
        ValueError: If prompts are given to a teacher that takes none.
    """
    if not teacher.takes_prompts:
        _check_no_prompts(training, teacher)
        return teacher.conditions(resolution=training.resolution)
    encode = partial(teacher.encode, resolution=training.resolution)
    folder = Path(training.cache_dir or training.output_dir, "conditions")
    cache = ConditionCache(folder, prompts, encode, lambda: inputs["text_encoders"])
    on_disk, why = choose_cache(cache, training.cache_conditions, CAPACITY)
    state.print(why, file=sys.stderr)
    if state.is_main_process:
        for texts, what in ((prompts, "prompts"), (training.validation_prompts, "validation prompts")):
            told = truncation(teacher.tokenizers, texts, what)
            if told:
                print(told, file=sys.stderr)
    if not on_disk:
        return PromptConditions(prompts, encode, capacity=0 if training.cache_conditions == "off" else CAPACITY)
    with state.main_process_first(), writing(folder):
        cache.build(show_progress=state.is_main_process)
    return PromptConditions(prompts, encode, cache=cache)


def _check_no_prompts(training: TrainingConfig, teacher: ModelFamily) -> None:
    """Raises a `ValueError` if the settings name prompts, which the teacher does not take."""
    names = ("prompts_file", "dataset_name", "train_data_dir", "validation_prompts")
    given = [f"--{name}" for name in names if getattr(training, name)]
    if given:
        raise ValueError(
            f"The teacher is a {type(teacher.pipeline).__name__}, which takes no prompts; leave {' and '.join(given)} out."
        )


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
                with written_whole(path.folder / "path.png") as draft:
                    shutil.copyfile(folder / "path.png", draft)
    content = {
        "teacher_card": teacher_card,
        "stages": stages,
        "path": None if path is None else _origin(path),
        "pipeline_class": type(family.pipeline).__name__,
        "component": family.network_name,
        "resolution": family.resolution(training.resolution),
        "seed": training.seed,
        "versions": versions(),
        "machine": {"device": device_name(state.device), "num_processes": state.num_processes},
        "settings": published({name: value for config in configs for name, value in values(config).items()}),
    }
    if trainer is not None:
        precision = trainer.accelerator.mixed_precision
        stages["backtracking"] = trainer.summary()
        if trainer.student.lora is not None:
            config = trainer.student.lora[1]
            content["lora"] = {"rank": config.r, "alpha": config.lora_alpha, "folder": "lora"}
        if trainer.rate_changes:
            content["rate_changes"] = trainer.rate_changes
        content |= {"curve": trainer.curve, "switches": trainer.switches, "waits": trainer.waits}
        content["measures"] = [asdict(measure) for measure in trainer.measures]
        content["machine"]["mixed_precision"] = precision
        report.write_convergence(trainer.curve, trainer.switches, folder / "convergence.png")
        launch = ["accelerate", "launch", "--num_processes", str(state.num_processes), "--mixed_precision", precision]
        content["command"] = shlex.join([*launch, script, *published_command(without_token(arguments))])
    written = report.content(**content)
    if trainer is not None:
        write_model_card(folder, written)
    # The last, with the names of all others: what it does not name, or is not there, is not finished.
    write_json(folder / REPORT, {**written, "files": results(folder)})
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
