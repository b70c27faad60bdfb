"""How far score models are from each other on the student's samples, by band of noise. Never asked in the hot loop."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.prompts import PromptBatches, PromptData
from ..families import ModelFamily
from ..models.batch import Condition
from ..models.generator import OneStepGenerator
from ..models.score_model import ScoreModel
from .config import TrainingConfig


BANDS = 4
SAMPLES = 32
_STAGE = 3  # of the samples' seeds: neither stage trains on them


@dataclass
class Question:
    """What score models are asked: a slice of the student's samples, each noised within one band of the schedule.

    Args:
        x_t, wanted (`Tensor`): Noisy samples, and what a network's output should be, `[B, C, H, W]`.
        t, band (`Tensor`): Timesteps, and the bands that they are in, `[B]`.
        condition (`Condition`): Of the prompts.
    """

    x_t: Tensor
    t: Tensor
    condition: Condition
    wanted: Tensor
    band: Tensor


class MismatchProbe:
    """Prompts, noise and timesteps that are the same at every measure of a run: a function of its seed.

    Args:
        config (`TrainingConfig`): Seed, resolution and the samples per forward pass.
        family (`ModelFamily`): The teacher.
        data (`PromptData`): Prompts and their conditions.
        device (`torch.device`): Where networks are asked.
    """

    def __init__(self, config: TrainingConfig, family: ModelFamily, data: PromptData, device: torch.device):
        self.schedule = family.schedule
        self.data = data
        self.device = device
        size = min(config.train_batch_size, SAMPLES)
        shape = family.latent_shape(config.resolution)
        self.batches = PromptBatches(data.prompts, shape, config.seed, _STAGE, size, SAMPLES // size)

    @torch.no_grad()
    def questions(self, generator: OneStepGenerator) -> list[Question]:
        """The generator's present samples, the bands in turn; bands rise with the noise."""
        asked, last, first = [], self.schedule.num_timesteps, 0
        for draw in self.batches[0]:
            batch = self.data.batch(draw, self.device)
            x0 = generator(batch.noise, batch.condition)
            band = torch.arange(first, first + len(x0), device=self.device) % BANDS
            first += len(x0)
            t, noise = band * last // BANDS + batch.draw_timesteps(0, last // BANDS - 1), batch.draw_noise()
            wanted = self.schedule.regression_target(x0, noise, t)
            asked.append(Question(self.schedule.diffuse(x0, noise, t), t, batch.condition, wanted, band))
        return asked


@torch.no_grad()
def answers(model: ScoreModel, questions: list[Question]) -> list[Tensor]:
    """The network's own outputs, unguided, one for each question."""
    return [model.predict(question.x_t, question.t, question.condition) for question in questions]


def denoising_losses(questions: list[Question], given: list[Tensor]) -> list[float]:
    """The denoising loss of answers in each band."""
    return _by_band(questions, given, [question.wanted for question in questions])


def gaps(questions: list[Question], one: list[Tensor], two: list[Tensor]) -> list[float]:
    """The mismatch of two networks in each band: the mean square of their outputs' difference.

    Where `one` is the best denoiser of these samples, it is by how much the loss of `two` is larger than it has to be.
    """
    return _by_band(questions, one, two)


def mean(bands: list[float]) -> float:
    """Over the bands."""
    return sum(bands) / len(bands)


def by_name(name: str, bands: list[float]) -> dict[str, float]:
    """A measure of each band as a tracker takes it: the mean, and one number for each band, rounded."""
    return {name: float(f"{mean(bands):.6g}")} | {
        f"{name}_band_{band}": float(f"{value:.6g}") for band, value in enumerate(bands)
    }


def compare(
    questions: list[Question], fake_score: list[Tensor], target: list[Tensor], teacher: list[Tensor]
) -> dict[str, float]:
    """The three denoising losses and both gaps, from three networks' answers, as `by_name` names them."""
    measures = {}
    for name, given in (("fake_score", fake_score), ("target", target), ("teacher", teacher)):
        measures |= by_name(f"{name}_denoising_loss", denoising_losses(questions, given))
    measures |= by_name("student_to_target", gaps(questions, fake_score, target))
    return measures | by_name("target_to_teacher", gaps(questions, target, teacher))


def _by_band(questions: list[Question], one: list[Tensor], two: list[Tensor]) -> list[float]:
    bands = torch.cat([question.band for question in questions])
    pairs = zip(one, two, strict=True)
    squares = torch.cat([(first - second).square().flatten(1).mean(1) for first, second in pairs])
    return [squares[bands == band].mean().item() for band in range(BANDS)]
