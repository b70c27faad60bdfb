"""What a run is made from: its prompts, their conditions, and hashes by which other inputs are told."""

import hashlib
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..data.cache import ConditionCache, choose_cache, digest
from ..data.captions import dataset_prompts, image_files, spool_captions
from ..data.conditions import CAPACITY, ConditionSource, PromptConditions
from ..data.images import RealImages, digest_of_images
from ..data.prompts import PromptFile
from ..data.truncation import truncation
from ..families import ModelFamily, family_of_index, network_name_of
from ..hub.files import writing
from ..models.weights import fingerprint
from .checks import stages_of
from .config import DisBackConfig
from .run_folder import RunFolder


_OF_THE_SCHEDULE = {
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
    *("prediction_type", "shift", "use_dynamic_shifting"),
}
_OF_EDM = {"sigma_min", "sigma_max", "sigma_data", "sigma_schedule", "rho"}


def check_inputs(
    config: DisBackConfig,
    teacher: ModelFamily,
    generator: torch.nn.Module,
    prompts: Sequence[str],
    images: Sequence[Path] = (),
) -> dict[str, str]:
    """Hashes of what a run is made from, for its stages to write down. Names alone do not tell: what lies under them may be
    another model, or other prompts, when the run is resumed.

    Raises:
        ValueError: If a stage was begun here with other inputs.
    """
    scheduler = teacher.pipeline.scheduler.config
    names = _OF_THE_SCHEDULE | (_OF_EDM if "sigma_data" in scheduler else set())
    schedule = {name: value for name, value in scheduler.items() if name in names}
    inputs = {
        "prompts": digest(prompts),
        "teacher": fingerprint(teacher.network),
        **teacher.inputs(config.resolution),
        "scheduler": _sha256(json.dumps(schedule, sort_keys=True)),
    }
    if config.train_data_dir is not None and images:
        inputs["images"] = digest_of_images(images, Path(config.train_data_dir).absolute())
    own_start = config.generator_model_name_or_path is not None
    inputs["start"] = fingerprint(generator) if own_start else inputs["teacher"]
    for stage in stages_of(config):
        RunFolder(config.output_dir).check_inputs(stage, inputs)
    return inputs


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def load_prompts(config: DisBackConfig) -> Sequence[str]:
    """The prompts that the settings name: a file, a data set, or an image folder; none, for a teacher that takes none.

    Raises:
        ValueError: If they name none and the teacher takes prompts, or it cannot be read.
    """
    if config.prompts_file is not None:
        return PromptFile(config.prompts_file, config.max_train_samples)
    if config.dataset_name is None and (config.train_data_dir is None or config.has_discriminator):
        if config.pretrained_model_name_or_path is not None:
            teacher = config.teacher.resolve_configs(network_name_of, config.cache_dir)
            if not family_of_index(teacher.index).takes_prompts:
                return []
        if config.train_data_dir is None:
            raise ValueError("There are no prompts: pass --prompts_file, --dataset_name or --train_data_dir.")
    where: dict[str, Any] = {"dataset_name": config.dataset_name, "train_data_dir": config.train_data_dir}
    where |= {"config_name": config.dataset_config_name, "split": config.dataset_split}
    if config.dataset_streaming:
        file = Path(config.output_dir, "captions.txt")
        with PartialState().main_process_first():
            spool_captions(file, config.caption_column, max_samples=config.max_train_samples, **where)
        return PromptFile(file)
    return dataset_prompts(
        config.caption_column, cache_dir=config.cache_dir, max_samples=config.max_train_samples, **where
    )


def load_image_files(config: DisBackConfig, prompts: Sequence[str]) -> list[Path]:
    """The real images' files, of the prompts' rows if there are prompts; none if no discriminator is asked for.

    Raises:
        ValueError: If the folder holds no images, or one is missing or lies elsewhere.
    """
    if not config.has_discriminator or config.train_data_dir is None:
        return []
    return image_files(
        config.train_data_dir, prompts, config.cache_dir, config.max_train_samples, config.dataset_split
    )


def real_images(
    config: DisBackConfig, teacher: ModelFamily, conditions: ConditionSource, files: list[Path], state: PartialState
) -> RealImages | None:
    """The real images, as samples of the teacher's denoiser; `None` if no discriminator is asked for.

    Args:
        config (`DisBackConfig`): The settings.
        teacher (`ModelFamily`): That encodes them.
        conditions (`ConditionSource`): Of the same rows; or a single one.
        files (`list[Path]`): Of `load_image_files`.
        state (`PartialState`): This process among the others.

    Raises:
        ValueError: If the teacher has conditions that say nothing of images, or an image cannot be read.
    """
    if not config.has_discriminator:
        return None
    if not teacher.takes_prompts and len(conditions) != 1:
        raise ValueError(
            f"{config.discriminator_setting} needs a discriminator, which is for teachers with prompts, or without conditions: the "
            f"teacher has {len(conditions)} class labels, and which of them an image has is not read. Take another objective, with "
            "--adversarial_weight 0."
        )
    size, shows = teacher.resolution(config.resolution), state.is_main_process
    return RealImages(files, teacher.encode_images, size, len(conditions), state.device, show_progress=shows)


def condition_source(
    config: DisBackConfig,
    teacher: ModelFamily,
    prompts: Sequence[str],
    state: PartialState,
    inputs: dict[str, str],
) -> ConditionSource:
    """What the teacher's samples are conditioned on: prompts, encoded as `--cache_conditions` says, or what it knows of
    itself. Tells what was decided.

    Args:
        config (`DisBackConfig`): The settings.
        teacher (`ModelFamily`): With its encoders.
        prompts (`Sequence[str]`): All of the run's.
        state (`PartialState`): This process among the others.
        inputs (`dict[str, str]`): Of `check_inputs`, which hashed what conditions depend on.

    Raises:
        ValueError: If prompts are given to a teacher that takes none.
    """
    if not teacher.takes_prompts:
        source = teacher.conditions(resolution=config.resolution)
        _check_no_prompts(config, teacher, source)
        _check_unguided(config, source)
        return source
    encode = partial(teacher.encode, resolution=config.resolution)
    folder = Path(config.cache_dir or config.output_dir, "conditions")
    cache = ConditionCache(folder, prompts, encode, lambda: inputs["text_encoders"])
    on_disk, why = choose_cache(cache, config.cache_conditions, CAPACITY)
    state.print(why, file=sys.stderr)
    if state.is_main_process:
        for texts, what in ((prompts, "prompts"), (config.validation_prompts, "validation prompts")):
            if message := truncation(teacher.tokenizers, texts, what):
                print(message, file=sys.stderr)
    if not on_disk:
        return PromptConditions(prompts, encode, capacity=0 if config.cache_conditions == "off" else CAPACITY)
    with state.main_process_first(), writing(folder):
        cache.build(show_progress=state.is_main_process)
    return PromptConditions(prompts, encode, cache=cache)


def _check_no_prompts(config: DisBackConfig, teacher: ModelFamily, source: ConditionSource) -> None:
    """Raises a `ValueError` if the settings name prompts, which the teacher does not take, or labels that it does not have."""
    names = ("prompts_file", "dataset_name", "train_data_dir")
    given = [f"--{name}" for name in names if getattr(config, name)]
    if config.has_discriminator:
        given.remove("--train_data_dir")  # whose images are meant
    if given:
        raise ValueError(
            f"The teacher is a {type(teacher.pipeline).__name__}, which takes no prompts; leave {' and '.join(given)} out."
        )
    file, own = config.evaluation_prompts_file, set(source.captions)
    asked = {
        "validation_prompts": config.validation_prompts,
        "evaluation_prompts_file": [] if file is None else list(PromptFile(file)),
    }
    for name, captions in asked.items():
        if unknown := [caption for caption in captions if caption not in own]:
            known = ", ".join(source.captions[:3]) + (f" .. {source.captions[-1]}" if len(source.captions) > 3 else "")
            raise ValueError(
                f"--{name} has {unknown[0]!r}, but the teacher is a {type(teacher.pipeline).__name__}, which takes no prompts: its "
                f"samples are called {known}."
            )


def _check_unguided(config: DisBackConfig, source: ConditionSource) -> None:
    """Raises a `ValueError` if guidance is asked for where there are labels, but none for no class."""
    if source.empty or not source.condition([0], [False]):
        return
    names = ("guidance_scale", "fake_score_guidance_scale", "fake_score_training_guidance_scale")
    for name in names:
        if getattr(config, name) not in (None, 1):
            raise ValueError(
                f"--{name} is {getattr(config, name):g}, but no class label of the teacher stands for no class: nothing can be "
                f"guided away from. Pass --{name} 1; or, if it was trained with such a label, say which by --null_class_label."
            )


def evaluation_prompts(
    config: DisBackConfig, prompts: Sequence[str], shown: Sequence[str], file: Sequence[str] | None = None
) -> list[str]:
    """What evaluators measure, a prompt for each image: those of a file or some of the run's, if that is asked for, or else
    those that are shown, several times each.

    Args:
        config (`DisBackConfig`): The settings.
        prompts (`Sequence[str]`): All of the run's.
        shown (`Sequence[str]`): Of `validation_prompts`.
        file (`Sequence[str]`, *optional*): The lines of `--evaluation_prompts_file`.
    """
    if file is None and config.num_evaluation_prompts is None:
        return [prompt for prompt in shown for _ in range(config.num_validation_images)]
    every = prompts if file is None else file
    number = config.num_evaluation_prompts or len(every)
    return [every[place * len(every) // number] for place in range(number)]


def validation_prompts(config: DisBackConfig, prompts: Sequence[str]) -> list[str]:
    """The prompts of the sample images: those asked for, or six from all over the data."""
    last = len(prompts) - 1
    return list(dict.fromkeys(config.validation_prompts or [prompts[i * last // 5] for i in range(6)]))
