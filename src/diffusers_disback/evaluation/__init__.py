"""Measures of images. An evaluator sees images and prompts, never a trainer."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..data.truncation import told_once
from ..families import ModelFamily
from .base import Evaluator, Metric
from .distance import FrechetDistance
from .drift import DriftEvaluator


EVALUATORS: dict[str, type[Evaluator]] = {
    "distance": FrechetDistance,
    "drift": DriftEvaluator,
}


def check_evaluators(names: Sequence[str]) -> None:
    """Checks that names are in `EVALUATORS`, and that there is one.

    Raises:
        ValueError: With those that are not, and all that are known.
    """
    unknown = [name for name in names if name not in EVALUATORS]
    if unknown or not names:
        raise ValueError(f"--evaluators {' '.join(unknown)}: known evaluators are {', '.join(EVALUATORS)}.")


class Evaluation:
    """Draws the same prompts from the same noise with any pipeline, and measures what comes.

    Args:
        prompts (`list[str]`): One image each.
        seed (`int`): Of the noise.
        batch_size (`int`): Images drawn at once.
        name (`str`): Of these prompts, as a card calls them.
        type (`str`): The same as an identifier.

    Attributes:
        evaluators (`list[Evaluator]`): What measures the images; `add` adds registered ones.
        size (`int`, *optional*): The images' side in pixels; by default the pipeline's own.
        references (`dict`): Measures to set beside those of pipelines, by name, such as the `floor` of a distance.
    """

    def __init__(
        self,
        prompts: list[str],
        seed: int = 0,
        batch_size: int = 50,
        name: str = "Prompts of the run",
        type: str = "prompts",
    ):
        self.prompts = prompts
        self.name = name
        self.type = type
        self.seed = seed
        self.batch_size = batch_size
        self.evaluators: list[Evaluator] = []
        self.references: dict[str, dict[str, float]] = {}
        self.size: int | None = None
        self._encoded: dict[str, Tensor] = {}  # what a family samples from, a row for each distinct prompt
        self._places: dict[str, int] = {}
        self._family: ModelFamily | None = None

    def add(self, names: Sequence[str]) -> None:
        """Adds evaluators of `EVALUATORS`.

        Raises:
            ValueError: If a name is unknown.
        """
        check_evaluators(names)
        self.evaluators += [EVALUATORS[name]() for name in names]

    @property
    def metrics(self) -> dict[str, Metric]:
        """All evaluators' metrics, by name.

        Raises:
            ValueError: If two evaluators measure under one name.
        """
        metrics: dict[str, Metric] = {}
        for evaluator in self.evaluators:
            if twice := metrics.keys() & evaluator.metrics.keys():
                raise ValueError(f"Two evaluators measure {', '.join(sorted(twice))}. Leave one of them out.")
            metrics |= evaluator.metrics
        return metrics

    def prepare(self, teacher_images: Tensor) -> None:
        """Gives all evaluators the teacher's images of the prompts."""
        for evaluator in self.evaluators:
            evaluator.prepare(teacher_images, self.prompts)

    @told_once()
    def encode(self, family: ModelFamily) -> None:
        """Encodes the prompts once, so that pipelines without encoders can sample them.

        Args:
            family (`ModelFamily`): The teacher, with its encoders.
        """
        distinct = list(dict.fromkeys(self.prompts))
        slices = [distinct[first : first + self.batch_size] for first in range(0, len(distinct), self.batch_size)]
        parts = [family.arguments(prompts) for prompts in slices]
        self._encoded = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        self._places = {prompt: place for place, prompt in enumerate(distinct)}
        self._family = family

    def _given(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """What the family samples prompts from, a row each."""
        rows = [self._places[prompt] for prompt in prompts]
        return {name: tensor[rows].to(device) for name, tensor in self._encoded.items()}

    @told_once()
    def sample(self, family: ModelFamily, pipeline: DiffusionPipeline, **arguments: Any) -> tuple[Tensor, float]:
        """Images, `[N, 3, H, W]` uint8 on the CPU, and the seconds that one took.

        Args:
            family (`ModelFamily`): The teacher.
            pipeline (`DiffusionPipeline`): Its `sampler`, or a student's `one_step`.
            arguments: Of the family's `sample`, such as `num_inference_steps`.
        """
        if self._family is not family or not set(self.prompts) <= self._places.keys():
            self.encode(family)
        generator = torch.Generator().manual_seed(self.seed)
        images, started = [], time.monotonic()
        for first in range(0, len(self.prompts), self.batch_size):
            prompts = self.prompts[first : first + self.batch_size]
            shape = (len(prompts), *family.latent_shape(self.size))
            # The same noise in any precision.
            noise = randn_tensor(shape, generator=generator, device=pipeline.device, dtype=torch.float32)
            drawn = family.sample(pipeline, self._given(prompts, pipeline.device), noise, **arguments)
            images.append((drawn.float().clamp(0, 1) * 255).round().to("cpu", torch.uint8))
        return torch.cat(images), (time.monotonic() - started) / len(self.prompts)

    def measure(self, images: Tensor) -> dict[str, float]:
        """All evaluators' measures of what `sample` gave.

        Raises:
            ValueError: If an evaluator does not return what it says that it measures.
        """
        measures: dict[str, float] = {}
        for evaluator in self.evaluators:
            values = evaluator(images, self.prompts)
            if values.keys() != evaluator.metrics.keys():
                raise ValueError(
                    f"{type(evaluator).__name__} measures {', '.join(values)}, but its metrics are "
                    f"{', '.join(evaluator.metrics)}."
                )
            measures |= values
        return measures


__all__ = ["EVALUATORS", "DriftEvaluator", "Evaluation", "Evaluator", "FrechetDistance", "Metric", "check_evaluators"]
