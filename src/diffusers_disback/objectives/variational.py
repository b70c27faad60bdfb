"""Variational score distillation: the generator descends the integral KL divergence to the target."""

from abc import abstractmethod

import torch
from torch import Tensor

from ..models.batch import Batch
from ..models.score_model import ScoreModel
from .base import Objective


class VariationalScoreDistillation(Objective):
    """The gradient of DisBack, Eq. 8: `E w(t) (s_fake(x_t, t) - s_target(x_t, t)) dx_t/dG`.

    With `s = (alpha * x0 - x_t) / sigma**2`, the difference of scores is `alpha / sigma**2` times that of the denoised
    samples; a weighting is stated for the latter. The loss is a mean over batch and dimensions.

    Args:
        min_noise, max_noise (`float`): The share of the schedule at which the generator asks; DMD2 and DisBack ask
            at 2 % to 98 % of it.

    Raises:
        ValueError: If they are no range of shares.
    """

    def __init__(self, min_noise: float = 0.02, max_noise: float = 0.98):
        if not 0 <= min_noise <= max_noise <= 1 or min_noise == 1:
            raise ValueError(f"Noise cannot be drawn from {min_noise} to {max_noise} of the schedule.")
        self.min_noise = min_noise
        self.max_noise = max_noise

    @abstractmethod
    def weight(self, x0: Tensor, x0_target: Tensor) -> Tensor:
        """The weight of `x0_fake - x0_target`, broadcastable to `[B, C, H, W]`."""

    def generator_loss(self, x0: Tensor, batch: Batch, target: ScoreModel, fake_score: ScoreModel) -> Tensor:
        last = target.schedule.num_timesteps
        t = batch.draw_timesteps(int(self.min_noise * last), min(int(self.max_noise * last), last - 1))
        with torch.no_grad():
            x_t = target.schedule.diffuse(x0, batch.draw_noise(), t)  # [B, C, H, W], as all below
            x0_target = target.denoise(x_t, t, batch.condition, batch.negative)
            x0_fake = fake_score.denoise(x_t, t, batch.condition)
            direction = self.weight(x0, x0_target) * (x0_fake - x0_target)
        # The gradient of this with respect to x0 is direction / numel.
        return 0.5 * torch.nn.functional.mse_loss(x0, x0.detach() - direction)


class DiffInstruct(VariationalScoreDistillation):
    """Weight 1 on the denoised samples (Diff-Instruct, arXiv 2305.18455)."""

    def weight(self, x0: Tensor, x0_target: Tensor) -> Tensor:
        return torch.ones((), device=x0.device)


class DistributionMatching(VariationalScoreDistillation):
    """One over the mean absolute error of the target's denoised sample (DMD, arXiv 2311.18828, Eq. 8), per sample.

    The error is bounded from below by 1e-6, far under that of any sample with noise, so that the weight is finite.
    """

    def weight(self, x0: Tensor, x0_target: Tensor) -> Tensor:
        error = (x0 - x0_target).abs().mean(dim=tuple(range(1, x0.ndim)), keepdim=True)
        return 1 / error.clamp_min(1e-6)
