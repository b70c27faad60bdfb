"""Measures of pictures. An evaluator sees pictures and prompts, never a trainer."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..data.truncation import told_once
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
        prompts (`list[str]`): One picture each.
        seed (`int`): Of the noise.
        batch_size (`int`): Pictures drawn at once.
        name (`str`): Of these prompts, as a card calls them.
        type (`str`): The same as an identifier.

    Attributes:
        evaluators (`list[Evaluator]`): What measures the pictures; `add` adds registered ones.
        size (`int`, *optional*): The pictures' side in pixels; by default the pipeline's own.
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
        self._encoded: dict[str, Tensor] = {}  # the arguments of a pipeline's call, a row for each distinct prompt
        self._negative: dict[str, Tensor] = {}

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

    @torch.no_grad()
    @told_once()
    def encode(self, pipeline: DiffusionPipeline) -> None:
        """Encodes the prompts once, so that pipelines without text encoders can draw them.

        Args:
            pipeline (`DiffusionPipeline`): A stock one, with its text encoders.
        """
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        distinct, rows = list(dict.fromkeys(self.prompts)), []
        for first in range(0, len(distinct), self.batch_size):
            encoded = pipeline.encode_prompt(
                distinct[first : first + self.batch_size],
                device=pipeline.text_encoder.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
            )
            rows.append([tensor.cpu() for tensor in encoded])
        table = dict(zip(names, (torch.cat(column) for column in zip(*rows, strict=True)), strict=False))
        self._negative = {name: table.pop(name) for name in list(table) if name.startswith("negative")}
        self._encoded = table

    def _arguments(self, prompts: list[str], guided: bool) -> dict[str, Any]:
        """What a pipeline is called with to draw prompts."""
        if not self._encoded:
            return {"prompt": prompts}
        distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(self.prompts))}
        rows = [distinct[prompt] for prompt in prompts]
        table = self._encoded | (self._negative if guided else {})
        return {name: tensor[rows] for name, tensor in table.items()}

    @told_once()
    def draw(self, pipeline: DiffusionPipeline, **arguments: Any) -> tuple[Tensor, float]:
        """Pictures, `[N, 3, H, W]` uint8 on the CPU, and the seconds that one took.

        Args:
            pipeline (`DiffusionPipeline`): Teacher or student.
            arguments: Of the pipeline's call, such as `num_inference_steps`.
        """
        generator = torch.Generator().manual_seed(self.seed)
        pictures, started = [], time.monotonic()
        for first in range(0, len(self.prompts), self.batch_size):
            prompts = self.prompts[first : first + self.batch_size]
            said = self._arguments(prompts, arguments.get("guidance_scale", 1) > 1)
            said = {name: v.to(pipeline.device) if torch.is_tensor(v) else v for name, v in said.items()}
            stride = pipeline.vae_scale_factor
            side = self.size or pipeline.unet.config.sample_size * stride
            shape = (len(prompts), pipeline.unet.config.in_channels, side // stride, side // stride)
            # The same noise in any precision.
            latents = randn_tensor(shape, generator=generator, device=pipeline.device, dtype=torch.float32)
            size = {"height": side, "width": side}
            drawn = pipeline(**said, **size, latents=latents, output_type="pt", **arguments).images
            pictures.append((drawn.float().clamp(0, 1) * 255).round().to("cpu", torch.uint8))
        return torch.cat(pictures), (time.monotonic() - started) / len(self.prompts)

    def measure(self, pictures: Tensor) -> dict[str, float]:
        """All evaluators' measures of what `draw` drew.

        Raises:
            ValueError: If an evaluator does not return what it says that it measures.
        """
        measures: dict[str, float] = {}
        for evaluator in self.evaluators:
            values = evaluator(pictures, self.prompts)
            if values.keys() != evaluator.metrics.keys():
                raise ValueError(
                    f"{type(evaluator).__name__} measures {', '.join(values)}, but its metrics are "
                    f"{', '.join(evaluator.metrics)}."
                )
            measures |= values
        return measures


__all__ = ["EVALUATORS", "DriftEvaluator", "Evaluation", "Evaluator", "FrechetDistance", "Metric", "check_evaluators"]
