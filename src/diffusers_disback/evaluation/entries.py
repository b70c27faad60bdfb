"""What a comparison compares: students, pipelines in many steps or few, and folders of images."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import LCMScheduler, SchedulerMixin
from torch import Tensor

from ..data.images import open_image, read_image
from ..data.prompts import caption_of
from ..families import FAMILIES, ModelFamily, family_class, load_family
from ..families.other import OtherPipeline, embeds_guidance, is_text_to_image
from ..hub.files import inside, parse_json, read_text
from ..hub.repository import HubError
from ..models.casting import inference_copy
from ..models.generator import is_one_step_scheduler
from ..models.noise_schedule import ddpm_scheduler, scheduler_of
from ..models.pipeline_folder import INDEX
from ..models.reference import LocalModel, ModelReference
from ..models.weights import fingerprint
from . import Evaluation
from .report import TEACHER_STEPS
from .sampling import Sampled, sample_batches


METADATA = "metadata.jsonl"
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_SYNTAX = re.compile(r"(?P<name>[^,]+?)(?:@(?P<steps>[^@,/]*))?(?P<settings>(?:,[^,]*)*)")
_OF_REFERENCE = ("revision", "variant", "lora", "vae", "prediction_type", "single_file_config")
_NULL_LABEL = "null_class_label"
_KEYS = ("guidance", "scheduler", *_OF_REFERENCE, _NULL_LABEL)
_SCHEDULERS = ("own", "ddim", "lcm")
_MOST_STEPS = 1000
# Of models that are distilled into few steps: DDIM would not be what they were trained for, and guidance is built in.
_OF_FEW_STEPS = ("LCMScheduler", "TCDScheduler")
FEW_STEPS = 4


@dataclass(frozen=True)
class Entry:
    """A model of a comparison, as its user names it: `MODEL`, `MODEL@STEPS` or `MODEL@STEPS,guidance=4`.

    Args:
        text (`str`): All of it.
        reference (`ModelReference`): The model; or a folder of images.
        steps (`int`, *optional*): Of its sampler.
        guidance (`float`, *optional*): The scale.
        scheduler (`str`, *optional*): `own`, as its folder has it; `ddim`, as training measures teachers; or `lcm`, for LoRAs
            of latent consistency models.
    """

    text: str
    reference: ModelReference
    steps: int | None = None
    guidance: float | None = None
    scheduler: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Entry":
        """Reads an entry. What is a folder or a file as it stands is one, whatever characters its name has.

        Raises:
            ValueError: If it is written otherwise.
        """
        if text and Path(text).exists():
            return cls(text, ModelReference(text))
        match = _SYNTAX.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} names no model. {_usage()}")
        settings: dict[str, str] = {}
        for setting in match["settings"].split(",")[1:]:
            key, equals, value = setting.partition("=")
            if key not in _KEYS or not equals or not value or key in settings:
                raise ValueError(f"{text!r}: {setting!r} is no setting, or given twice. {_usage()}")
            settings[key] = value
        scheduler = settings.get("scheduler")
        if scheduler not in (None, *_SCHEDULERS):
            raise ValueError(f"{text!r}: scheduler={scheduler} is none of {', '.join(_SCHEDULERS)}.")
        steps = match["steps"]
        if steps is not None and not (re.fullmatch("[0-9]{1,4}", steps) and 1 <= int(steps) <= _MOST_STEPS):
            raise ValueError(f"{text!r}: {steps!r} is no number of steps (1 to {_MOST_STEPS}). {_usage()}")
        chosen: Any = {key: settings[key] for key in _OF_REFERENCE if key in settings}
        if (label := settings.get(_NULL_LABEL)) is not None:
            if not re.fullmatch("[0-9]{1,9}", label):
                raise ValueError(f"{text!r}: {_NULL_LABEL}={label} is no class label.")
            chosen[_NULL_LABEL] = int(label)
        return cls(
            text,
            ModelReference(match["name"], **chosen),
            None if steps is None else int(steps),
            _scale(settings["guidance"], text) if "guidance" in settings else None,
            scheduler,
        )

    @property
    def is_folder_of_images(self) -> bool:
        """Whether it names a folder without a pipeline."""
        folder = Path(self.reference.name_or_path)
        return folder.is_dir() and not (folder / INDEX).exists() and bool(_images_in(folder))

    def find(self, cache_dir: str | None = None) -> "PipelineEntry | ImageFolder":
        """Finds or downloads the model's files, and checks them; nothing is loaded.

        Raises:
            ValueError: If there is no such model, or it is none that is sampled from prompts.
        """
        if self.is_folder_of_images:
            return ImageFolder(self)
        name = self.reference.name_or_path
        try:
            found = PipelineEntry(self, self.reference.resolve(_network_name, cache_dir))
        except HubError as error:
            raise ValueError(
                f"The model {name!r} cannot be loaded: it is neither a folder with a diffusers pipeline in safetensors, nor "
                f"such a model on the Hub{self.reference.said}, nor a folder of images. {error}"
            ) from error
        if (config := found.model.scheduler_config()) and _has_family(found.model):
            self.check_takes(scheduler_of(config, f"The scheduler's config of {name!r}"))
        return found

    def check_takes(self, scheduler: SchedulerMixin) -> None:
        """Raises a `ValueError` if the entry says of a one-step student how it is sampled."""
        said = self.steps not in (None, 1) or self.guidance not in (None, 1.0) or self.scheduler not in (None, "own")
        if said and is_one_step_scheduler(scheduler):
            raise ValueError(
                f"{self.text!r} is a one-step student, which has its steps, its guidance and its scheduler built in: "
                f"name it without them, as {self.reference.name_or_path}."
            )


@dataclass(frozen=True)
class HowSampled:
    """How entries are sampled that do not say it themselves.

    Args:
        device (`torch.device`): Where.
        dtype (`torch.dtype`): Of denoisers.
        steps (`int`): Of pipelines in many steps.
        guidance (`float`): Of them.
        size (`int`, *optional*): The images' side in pixels; by default each model's own.
        state (`PartialState`, *optional*): This process among those that share the sampling.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    steps: int = TEACHER_STEPS
    guidance: float = 7.5
    size: int | None = None
    state: PartialState | None = None


@dataclass
class PipelineEntry:
    """A pipeline: a student, a teacher in many steps, or any other that diffusers samples from prompts.

    Args:
        entry (`Entry`): As its user names it.
        model (`LocalModel`): Its files.
        settings (`dict`): How it was sampled; after `sample`.
    """

    entry: Entry
    model: LocalModel
    settings: dict[str, Any] = field(default_factory=dict)

    def sample(self, evaluation: Evaluation, how: HowSampled, seeds: Sequence[int]) -> list[Sampled]:
        """Loads it, and samples the evaluation's prompts, once for each seed of the noise.

        Raises:
            ValueError: If it cannot be loaded, or sampled as its user says.
        """
        self.settings = {"pipeline_class": self.model.index["_class_name"], "commit": self.model.commit}
        if _has_family(self.model):
            return self._sample_family(evaluation, how, seeds)
        return self._sample_other(evaluation, how, seeds)

    def _sample_family(self, evaluation: Evaluation, how: HowSampled, seeds: Sequence[int]) -> list[Sampled]:
        """By its family, as training measures teachers and students: the denoiser in the precision, all else in float32."""
        family = load_family(self.model)
        scheduler, arguments = self._sampler(family, how)
        pipeline = family.undecorated(family.assemble(family.network, scheduler))
        self._tell(scheduler, family.network, **arguments)
        family.to(how.device)
        own = Evaluation(evaluation.prompts, evaluation.seed, evaluation.batch_size)  # which keeps what it encoded
        own.size = how.size
        own.encode(family)
        with inference_copy(family.network, how.device, how.dtype) as network:
            pipeline.register_modules(**{family.network_name: network})
            return [
                own.timed_sample(family, pipeline, how.state, warm_up=True, seed=seed, **arguments) for seed in seeds
            ]

    def _sampler(self, family: ModelFamily, how: HowSampled) -> tuple[SchedulerMixin, dict[str, Any]]:
        """The scheduler, and the steps and the guidance."""
        entry, own = self.entry, family.pipeline.scheduler
        if is_one_step_scheduler(own):
            return own, {"num_inference_steps": 1, "guidance_scale": 1.0}
        scheduler = own
        if entry.scheduler == "lcm":
            ddpm_scheduler(own)  # or its betas would be LCM's defaults
            scheduler = LCMScheduler.from_config(own.config)
        few = type(scheduler).__name__ in _OF_FEW_STEPS and entry.scheduler != "ddim"
        if not few and entry.scheduler != "own":
            scheduler = family.many_step_scheduler()
        steps, guidance = (FEW_STEPS, 1.0) if few else (how.steps, how.guidance)
        return scheduler, {
            "num_inference_steps": steps if entry.steps is None else entry.steps,
            "guidance_scale": guidance if entry.guidance is None else entry.guidance,
        }

    def _sample_other(self, evaluation: Evaluation, how: HowSampled, seeds: Sequence[int]) -> list[Sampled]:
        """By its pipeline's own call, with its own scheduler and defaults."""
        if self.entry.scheduler not in (None, "own"):
            raise ValueError(f"{self.entry.text!r}: a {self.settings['pipeline_class']} keeps its own scheduler.")
        other = OtherPipeline(self.model, how.device, how.dtype)
        given = {"num_inference_steps": self.entry.steps, "guidance_scale": self.entry.guidance}
        arguments = {name: value for name, value in given.items() if value is not None}
        self._tell(other.pipeline.scheduler, other.denoiser, **given)

        def sample(prompts: list[str], noise: Tensor) -> Tensor:
            return other.sample(prompts, noise, how.size, **arguments)

        shape = other.latent_shape(how.size)
        common = (shape, sample, how.device, how.state)
        return [
            sample_batches(evaluation.prompts, evaluation.batch_size, seed, *common, warm_up=True) for seed in seeds
        ]

    def _tell(self, scheduler: SchedulerMixin, network: torch.nn.Module, **arguments: Any) -> None:
        self.settings |= {"scheduler": type(scheduler).__name__, **arguments, "sha256": fingerprint(network)}


class ImageFolder:
    """Images that are there already, of any origin: in the order of `metadata.jsonl`, if there is one, whose lines have
    `file_name` and `text`, and else of their names.

    Args:
        entry (`Entry`): That names the folder.

    Raises:
        ValueError: If a name leads out of the folder, or the metadata cannot be read.
    """

    def __init__(self, entry: Entry):
        self.entry = entry
        self.settings: dict[str, Any] = {}
        folder = Path(entry.reference.name_or_path)
        if entry != Entry(entry.text, ModelReference(entry.reference.name_or_path)):
            raise ValueError(f"{entry.text!r} is a folder of images, which takes no steps and no settings.")
        self.texts: list[str] | None = None
        metadata = inside(folder, METADATA, str(folder))
        names = _images_in(folder)
        if metadata.is_file():
            lines = [line for line in read_text(metadata).split("\n") if line.strip()]
            rows = [parse_json(line, f"{metadata}, line {number}") for number, line in enumerate(lines, 1)]
            names = [row.get("file_name") for row in rows]
            self.texts = [
                caption_of(row.get("text"), f"{metadata}, line {number}") or "" for number, row in enumerate(rows, 1)
            ]
        self.files = [inside(folder, name, str(folder)) for name in names]
        if missing := [file for file in self.files if not file.is_file()]:
            raise ValueError(f"{metadata} names {missing[0].name}, which is not there.")

    def check(self, prompts: list[str], images_per_prompt: int) -> None:
        """Raises a `ValueError` unless there is an image of each prompt."""
        where = self.entry.text
        if len(self.files) != len(prompts):
            raise ValueError(
                f"{where} has {len(self.files)} images, but there are {len(prompts) // images_per_prompt} prompts of "
                f"{images_per_prompt} images each (--num_prompts, --num_images_per_prompt)."
            )
        for number, (text, prompt) in enumerate(zip(self.texts or prompts, prompts, strict=True), 1):
            if text != prompt:
                raise ValueError(
                    f"{where}/{METADATA}, line {number} has the text {text!r}, but the prompt there is {prompt!r}: the images "
                    "have to be in the order of the prompts, all of one prompt after another."
                )

    def sample(self, evaluation: Evaluation, how: HowSampled, seeds: Sequence[int]) -> list[Sampled]:
        """Reads the images, which are the same for each seed. None is resized unless a size is given, to which it is resized and
        cropped.

        Raises:
            ValueError: If one cannot be read, or they are of several sizes.
        """
        size = how.size
        images = [
            open_image(file) if size is None else ((read_image(file, size) + 1) * 127.5).round().to(torch.uint8)
            for file in self.files
        ]
        if len({image.shape for image in images}) > 1:
            sizes = " and ".join(sorted({f"{image.shape[2]} x {image.shape[1]}" for image in images})[:2])
            raise ValueError(
                f"The images in {self.entry.text} are of several sizes, {sizes} pixels: pass --resolution, to which they are "
                "resized and cropped."
            )
        return [Sampled(torch.stack(images), [], [])] * len(seeds)


def _images_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.suffix.lower() in _IMAGES)


def _has_family(model: LocalModel) -> bool:
    return model.index["_class_name"] in _classes_with_families() and not embeds_guidance(model)


def _classes_with_families() -> set[str]:
    return {name for family in FAMILIES.values() for name in family.pipeline_classes}


def _network_name(pipeline_class: str) -> str:
    """The denoiser's component of a class of pipelines, as far as files are found by it."""
    if pipeline_class in _classes_with_families():
        return family_class(pipeline_class).network_name
    if not is_text_to_image(pipeline_class):
        raise ValueError(f"A {pipeline_class} is no pipeline that diffusers samples from prompts alone.")
    return ModelFamily.network_name


def _scale(text: str, entry: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value < 1000:
        raise ValueError(f"{entry!r}: guidance={text} is no guidance scale (0 to 1000).")
    return value


def _usage() -> str:
    return f"Write MODEL, MODEL@STEPS, or MODEL@STEPS,guidance=4; settings are {', '.join(_KEYS)}."
