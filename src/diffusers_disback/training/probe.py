"""Measures how far score models are from each other on the student's samples, by band of noise; not in the hot loop."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.conditions import Batches, ConditionSource, batch_of
from ..families import ModelFamily
from ..models.batch import Condition
from ..models.generator import OneStepGenerator
from ..models.score_model import ScoreModel
from .config import TrainingConfig


BANDS = 4
SAMPLES = 32
_STAGE = 3  # of the samples' seeds: neither stage trains on them


@dataclass
class ProbeBatch:
    """A slice of the student's samples, each noised within one band of the schedule, on which score models are compared.

    Args:
        x_t, regression_target (`Tensor`): Noisy samples, and the regression target of a network's output, `[B, C, H, W]`.
        t, band (`Tensor`): Timesteps, and the bands that they are in, `[B]`.
        condition, negative (`Condition`): Of the prompts, and of the empty one.
    """

    x_t: Tensor
    t: Tensor
    condition: Condition
    negative: Condition
    regression_target: Tensor
    band: Tensor


class MismatchProbe:
    """Prompts, noise and timesteps that are the same at every measure of a run: a function of its seed.

    Args:
        config (`TrainingConfig`): Seed, resolution and the samples per forward pass.
        family (`ModelFamily`): The teacher.
        data (`ConditionSource`): What samples are conditioned on.
        device (`torch.device`): Where networks are evaluated.
    """

    def __init__(self, config: TrainingConfig, family: ModelFamily, data: ConditionSource, device: torch.device):
        self.schedule = family.schedule
        self.data = data
        self.device = device
        size = min(config.train_batch_size, SAMPLES)
        shape = family.latent_shape(config.resolution)
        self.batches = Batches(len(data), shape, config.seed, _STAGE, size, SAMPLES // size)

    @torch.no_grad()
    def sample(self, generator: OneStepGenerator) -> list[ProbeBatch]:
        """Samples the generator and noises what it gives, band after band; bands rise with the noise."""
        probe_batches, last, first = [], self.schedule.num_timesteps, 0
        for draw in self.batches[0]:
            batch = batch_of(draw, self.data, self.device)
            x0 = generator(batch.noise, batch.condition)
            band = torch.arange(first, first + len(x0), device=self.device) % BANDS
            first += len(x0)
            # band: [B], 0..BANDS - 1; t: [B], within its band
            t, noise = band * last // BANDS + batch.draw_timesteps(0, last // BANDS - 1), batch.draw_noise()
            regression_target = self.schedule.regression_target(x0, noise, t)
            x_t = self.schedule.diffuse(x0, noise, t)
            probe_batches.append(ProbeBatch(x_t, t, batch.condition, batch.negative, regression_target, band))
        return probe_batches


@torch.no_grad()
def predictions(model: ScoreModel, batches: list[ProbeBatch], guidance_scale: float = 1.0) -> list[Tensor]:
    """Returns the network's outputs, `[B, C, H, W]` for each probe batch: its own, whatever the model's guidance is, or with
    the guidance that it is trained with."""
    model = ScoreModel(model.network, model.schedule, model.call, guidance_scale)
    return [model.guided(batch.x_t, batch.t, batch.condition, batch.negative) for batch in batches]


def denoising_losses(batches: list[ProbeBatch], outputs: list[Tensor]) -> list[float]:
    """Returns the denoising loss of a network's outputs in each band."""
    return _by_band(batches, outputs, [batch.regression_target for batch in batches])


def mismatches(batches: list[ProbeBatch], one: list[Tensor], two: list[Tensor]) -> list[float]:
    """Returns the mismatch of two networks in each band: the mean square of their outputs' difference.

    Where `one` is the best denoiser of these samples, it is by how much the loss of `two` is larger than it has to be.
    """
    return _by_band(batches, one, two)


def mean(bands: list[float]) -> float:
    """Averages over the bands."""
    return sum(bands) / len(bands)


def by_name(name: str, bands: list[float]) -> dict[str, float]:
    """Names a measure of each band for a tracker: the mean, and one number for each band, rounded."""
    return {name: float(f"{mean(bands):.6g}")} | {
        f"{name}_band_{band}": float(f"{value:.6g}") for band, value in enumerate(bands)
    }


def compare(
    batches: list[ProbeBatch], fake_score: list[Tensor], target: list[Tensor], teacher: list[Tensor]
) -> dict[str, float]:
    """Returns the three denoising losses and both mismatches of three networks' outputs, as `by_name` names them."""
    measures: dict[str, float] = {}
    for name, outputs in (("fake_score", fake_score), ("target", target), ("teacher", teacher)):
        measures |= by_name(f"{name}_denoising_loss", denoising_losses(batches, outputs))
    measures |= by_name("student_to_target", mismatches(batches, fake_score, target))
    return measures | by_name("target_to_teacher", mismatches(batches, target, teacher))


def _by_band(batches: list[ProbeBatch], one: list[Tensor], two: list[Tensor]) -> list[float]:
    bands = torch.cat([batch.band for batch in batches])
    pairs = zip(one, two, strict=True)
    squares = torch.cat([(first - second).square().flatten(1).mean(1) for first, second in pairs])
    return [squares[bands == band].mean().item() for band in range(BANDS)]
