"""Variational score distillation: the generator descends the integral KL divergence to the target."""

from abc import abstractmethod

import torch
from torch import Tensor

from ..models.batch import Batch, Condition
from ..models.score_model import ScoreModel
from .base import Objective, inverse_error


class VariationalScoreDistillation(Objective):
    """The gradient of DisBack, Eq. 8: `E w(t) (s_fake(x_t, t) - s_target(x_t, t)) dx_t/dG`.

    With `s = (alpha * x0 - x_t) / sigma**2`, the difference of scores is `alpha / sigma**2` times that of the denoised
    samples; a weighting is stated for the latter. The loss is a mean over batch and dimensions.
    """

    @abstractmethod
    def weight(self, x0: Tensor, x0_target: Tensor) -> Tensor:
        """The weight of `x0_fake - x0_target`, broadcastable to `[B, C, H, W]`."""

    def density_weight(self, fake_score: ScoreModel, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """A further weight by where a noisy sample lies, broadcastable to `[B, C, H, W]`."""
        return torch.ones((), device=x_t.device)

    def generator_loss(self, x0: Tensor, batch: Batch, target: ScoreModel, fake_score: ScoreModel) -> Tensor:
        t = self.timesteps.draw(batch, target.schedule.num_timesteps)
        with torch.no_grad():
            x_t = target.schedule.diffuse(x0, batch.draw_noise(), t)  # [B, C, H, W], as all below
            x0_target = target.denoise(x_t, t, batch.condition, batch.negative)
            x0_fake = fake_score.denoise(x_t, t, batch.condition, batch.negative)
            direction = self.weight(x0, x0_target) * (x0_fake - x0_target)
            direction = self.density_weight(fake_score, x_t, t, batch.condition) * direction
        # The gradient of this with respect to x0 is direction / numel.
        return 0.5 * torch.nn.functional.mse_loss(x0, x0.detach() - direction)


class DiffInstruct(VariationalScoreDistillation):
    """Weight 1 on the denoised samples (Diff-Instruct, arXiv 2305.18455)."""

    def weight(self, x0: Tensor, x0_target: Tensor) -> Tensor:
        return torch.ones((), device=x0.device)


class DistributionMatching(VariationalScoreDistillation):
    """One over the mean absolute error of the target's denoised sample (DMD, arXiv 2311.18828, Eq. 8), per sample."""

    def weight(self, x0: Tensor, x0_target: Tensor) -> Tensor:
        return inverse_error(x0, x0_target)
