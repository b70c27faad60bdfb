"""The distribution of the timesteps at which networks are trained."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .batch import Batch


@dataclass(frozen=True)
class TimestepSampling:
    """A distribution over a share of the schedule, which counts from the clean end: 0 is timestep 0, 1 is the last one.

    A number in 0..1 is drawn, uniform, logit-normal or by mode (Stable Diffusion 3, arXiv 2403.03206, section 3.1, and
    `diffusers.training_utils.compute_density_for_timestep_sampling`), shifted towards noise by `u -> s u / (1 + (s - 1) u)` (its section 5.3.2), and mapped linearly to the range.

    Args:
        kind (`str`): `uniform`, `logit_normal` or `mode`.
        min_noise, max_noise (`float`): The range, as shares of the schedule. DMD2, DisBack and SiD-LSG: 0.02 to 0.98.
        logit_mean, logit_std (`float`): Of the normal whose sigmoid is drawn.
        shift (`float`): s; 1 shifts nothing. Timesteps of a schedule that has a shift of its own are not to be shifted again.
        mode_scale (`float`): Of mode: above 0 it draws more of the middle, below of the ends; from -1 to 2 / (pi - 2).

    Raises:
        ValueError: If they are no range of shares, or a scale is not above 0.
    """

    kind: Literal["uniform", "logit_normal", "mode"] = "uniform"
    min_noise: float = 0.02
    max_noise: float = 0.98
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 1.0
    mode_scale: float = 1.29

    def __post_init__(self) -> None:
        if not 0 <= self.min_noise <= self.max_noise <= 1 or self.min_noise == 1:
            raise ValueError(f"Timesteps cannot be drawn from {self.min_noise} to {self.max_noise} of the schedule.")
        if self.logit_std <= 0 or self.shift <= 0:
            raise ValueError(f"logit_std={self.logit_std} and shift={self.shift} have to be above 0.")
        if not -1 <= self.mode_scale <= 2 / (math.pi - 2):
            raise ValueError(
                f"mode_scale={self.mode_scale} has to be in -1 .. 2 / (pi - 2) = 1.75: numbers leave 0..1."
            )

    def everywhere(self) -> "TimestepSampling":
        """The same distribution over the whole schedule."""
        return replace(self, min_noise=0.0, max_noise=1.0)

    def draw(self, batch: Batch, num_timesteps: int) -> Tensor:
        """Integer timesteps, `[B]`, each of its sample's own generator."""
        low, high = int(self.min_noise * num_timesteps), min(int(self.max_noise * num_timesteps), num_timesteps - 1)
        if self.kind == "uniform" and self.shift == 1:
            return batch.draw_timesteps(low, high)
        u = batch.draw_uniform()  # [B], in 0..1
        if self.kind == "logit_normal":
            normal = torch.special.ndtri(u.double()).float()
            u = torch.sigmoid(self.logit_mean + self.logit_std * normal)
        if self.kind == "mode":
            u = 1 - u - self.mode_scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
        u = self.shift * u / (1 + (self.shift - 1) * u)
        return (low + (u * (high - low + 1)).long()).clamp(low, high)
