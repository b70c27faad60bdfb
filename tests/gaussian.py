"""Score models of Gaussians, in closed form."""

import torch
from torch import Tensor, nn

from diffusers_disback.models.batch import Batch
from diffusers_disback.models.noise_schedule import NoiseSchedule
from diffusers_disback.models.score_model import ScoreModel


class GaussianDenoiser(nn.Module):
    """E[x0 | x_t] of x0 ~ N(mean, std**2), told in any prediction type; `mean` is `[C, 1, 1]` and may be trained."""

    def __init__(self, schedule: NoiseSchedule, mean: Tensor, std: float):
        super().__init__()
        self.schedule = schedule
        self.mean = nn.Parameter(mean.clone())
        self.std = std

    def forward(self, x_t: Tensor, timestep: Tensor, return_dict: bool = False, shift: Tensor | None = None):
        mean = self.mean if shift is None else self.mean + shift.view(-1, 1, 1, 1)
        alpha, sigma = (table[timestep].view(-1, 1, 1, 1) for table in (self.schedule.alpha, self.schedule.sigma))
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        x0 = mean + gain * (x_t - alpha * mean)
        noise = (x_t - alpha * x0) / sigma
        match self.schedule.prediction_type:
            case "sample":
                return (x0,)
            case "epsilon":
                return (noise,)
            case "v_prediction":
                return (alpha * noise - sigma * x0,)


def gaussian(schedule: NoiseSchedule, mean: float, std: float, channels: int = 2) -> ScoreModel:
    return ScoreModel(GaussianDenoiser(schedule, torch.full((channels, 1, 1), mean), std), schedule)


def batch(size: int, seed: int, shape=(2, 4, 4)) -> Batch:
    generators = [torch.Generator().manual_seed(1000 * seed + j) for j in range(size)]
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    return Batch(noise, {}, {}, generators)
