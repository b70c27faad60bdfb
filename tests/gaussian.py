"""Score models of Gaussians, in closed form."""

import torch
from torch import Tensor, nn

from diffusers_disback.models.batch import Batch
from diffusers_disback.models.noise_schedule import EDM, FLOW, NoiseSchedule
from diffusers_disback.models.score_model import ScoreModel


class GaussianDenoiser(nn.Module):
    """E[x0 | x_t] of pixels that are each N(mean, factor factor^T) over C channels, in any prediction type.

    `mean` is `[C, 1, 1]` and `factor` is `[C, C]`; both may be trained.
    """

    def __init__(self, schedule: NoiseSchedule, mean: Tensor, std: float):
        super().__init__()
        self.schedule = schedule
        self.mean = nn.Parameter(mean.clone())
        self.factor = nn.Parameter(std * torch.eye(len(mean)))

    def tables(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(table[t].view(-1, 1, 1, 1) for table in (self.schedule.alpha, self.schedule.sigma))

    def covariance(self, t: Tensor) -> Tensor:
        """Of x_t, `[B, C, C]`."""
        alpha, sigma = (table.view(-1, 1, 1) for table in self.tables(t))
        return alpha**2 * self.factor @ self.factor.mT + sigma**2 * torch.eye(len(self.factor))

    def forward(self, x_t: Tensor, timestep: Tensor, return_dict: bool = False, shift: Tensor | None = None):
        mean = self.mean if shift is None else self.mean + shift.view(-1, 1, 1, 1)
        if self.schedule.prediction_type == EDM:  # which network is given c_in x_t and c_noise
            timestep = (self.schedule.times - timestep[:, None]).abs().argmin(dim=1)
            x_t = x_t / self.schedule.input_of(torch.ones_like(x_t), timestep)
        alpha, sigma = self.tables(timestep)
        gain = alpha.view(-1, 1, 1) * torch.linalg.solve(self.covariance(timestep), self.factor @ self.factor.mT)
        x0 = mean + torch.einsum("bji,bjhw->bihw", gain, x_t - alpha * mean)
        noise = (x_t - alpha * x0) / sigma
        outputs = {"sample": x0, "epsilon": noise, "v_prediction": alpha * noise - sigma * x0, FLOW: noise - x0}
        if self.schedule.prediction_type == EDM:
            return (self.schedule.regression_target(x0, noise, timestep),)
        return (outputs[self.schedule.prediction_type],)

    def log_density(self, x_t: Tensor, t: Tensor) -> Tensor:
        """log p(x_t) without its constant, `[B]`."""
        covariance, centred = self.covariance(t), (x_t - self.tables(t)[0] * self.mean).flatten(2)  # [B, C, H W]
        squares = (centred * torch.linalg.solve(covariance, centred)).sum((1, 2))
        return -0.5 * (squares + centred.shape[2] * torch.logdet(covariance))


def gaussian(schedule: NoiseSchedule, mean: float, std: float, channels: int = 2) -> ScoreModel:
    return ScoreModel(GaussianDenoiser(schedule, torch.full((channels, 1, 1), mean), std), schedule)


def best_discriminator(target: ScoreModel):
    """The logit of a discriminator that knows both densities."""

    def logits(fake_score: ScoreModel, x_t: Tensor, t: Tensor, condition) -> Tensor:
        return target.network.log_density(x_t, t) - fake_score.network.log_density(x_t, t)

    return logits


def batch(size: int, seed: int, shape=(2, 4, 4)) -> Batch:
    generators = [torch.Generator().manual_seed(1000 * seed + j) for j in range(size)]
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    return Batch(noise, {}, {}, generators)


class OneGenerator(Batch):
    """A batch that draws all of its samples from one generator: fast, where a loop makes many."""

    def __init__(self, size: int, generator: torch.Generator, shape=(2, 4, 4)):
        super().__init__(torch.randn(size, *shape, generator=generator), {}, {}, [generator])

    def draw_timesteps(self, low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (len(self.noise),), generator=self.generators[0])

    def draw_uniform(self) -> Tensor:
        return torch.rand(len(self.noise), generator=self.generators[0])

    def draw_noise(self) -> Tensor:
        return torch.randn(self.noise.shape, generator=self.generators[0])
