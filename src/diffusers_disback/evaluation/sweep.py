"""Which timestep to ask a student at: the teacher, asked once at each of a range."""

from pathlib import Path
from typing import Any

from ..families import ModelFamily
from . import Evaluation
from .drift import DriftEvaluator
from .plots import image_grid


def timestep_sweep(
    family: ModelFamily,
    timesteps: list[int],
    evaluation: Evaluation,
    guidance_scale: float,
    num_inference_steps: int,
    file: Path,
) -> dict[int, dict[str, float]]:
    """Measures what a teacher's copy draws as a one-step student, before any training, at each timestep.

    Args:
        family (`ModelFamily`): The teacher, all of it on the device that is to draw.
        timesteps (`list[int]`): Of the teacher's schedule.
        evaluation (`Evaluation`): Prompts, noise and how many images at once.
        guidance_scale (`float`): Of the teacher's many-step images, from which drift is measured.
        num_inference_steps (`int`): Of their sampler (DDIM).
        file (`Path`): PNG with up to six prompts as rows, and a column for each timestep.

    Returns:
        `dict[int, dict[str, float]]`: By timestep, the drift of mean, standard deviation and saturation, and `total`, the
        sum of their magnitudes. 0 is best.

    Raises:
        ValueError: If a timestep is outside the schedule, or has no signal and the network predicts the noise.
    """
    arguments: dict[str, Any] = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    reference, _ = evaluation.sample(family, family.sampler(), **arguments)
    drift = DriftEvaluator()
    drift.prepare(reference, evaluation.prompts)
    columns, measures = {f"teacher\n{num_inference_steps} steps": reference}, {}
    for t in timesteps:
        images, _ = evaluation.sample(family, family.undecorated(family.one_step(family.network, t)))
        columns[f"t={t}"] = images
        measures[t] = drift(images, evaluation.prompts)
        measures[t]["total"] = sum(abs(value) for value in measures[t].values())
    rows = {prompt: evaluation.prompts.index(prompt) for prompt in list(dict.fromkeys(evaluation.prompts))[:6]}
    grid = {prompt: [images[row] for images in columns.values()] for prompt, row in rows.items()}
    image_grid(grid, list(columns), file)
    return measures


def recommended(measures: dict[int, dict[str, float]]) -> int:
    """The timestep whose images drift least from the teacher's, by `total`."""
    return min(measures, key=lambda t: measures[t]["total"])
