"""Measures of pictures. An evaluator sees pictures and prompts, never a trainer."""

import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from .distance import FrechetDistance
from .drift import DriftEvaluator


class Evaluator(Protocol):
    """Pictures and prompts -> named measures."""

    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """Measures `pictures` (`Tensor`), RGB in 0..255, `[N, 3, H, W]` uint8, drawn for `prompts`."""


EVALUATORS: dict[str, type[Evaluator]] = {
    "distance": FrechetDistance,
    "drift": DriftEvaluator,
}


class Evaluation:
    """Draws the same prompts from the same noise with any pipeline, and measures what comes.

    Args:
        prompts (`list[str]`): One picture each.
        seed (`int`): Of the noise.
        batch_size (`int`): Pictures drawn at once.
        name (`str`): Of these prompts, as a card calls them.
        type (`str`): The same as an identifier.

    Attributes:
        evaluators (`list[Evaluator]`): What measures the pictures.
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
            drawn = pipeline(prompts, generator=generator, output_type="pt", **arguments).images
            pictures.append((drawn.float().clamp(0, 1) * 255).round().to("cpu", torch.uint8))
        return torch.cat(pictures), (time.monotonic() - started) / len(self.prompts)

    def measure(self, pictures: Tensor) -> dict[str, float]:
        """All evaluators' measures of what `draw` drew."""
        return {name: value for e in self.evaluators for name, value in e(pictures, self.prompts).items()}


__all__ = ["EVALUATORS", "DriftEvaluator", "Evaluation", "Evaluator", "FrechetDistance"]
