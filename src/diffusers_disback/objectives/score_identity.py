"""Score identity distillation: the generator descends a Fisher divergence to the target, estimated by score identities."""

from torch import Tensor

from ..models.batch import Batch
from ..models.score_model import ScoreModel
from .base import Objective, inverse_error


class ScoreIdentityDistillation(Objective):
    """The loss of SiD, arXiv 2404.04057, Eq. 23, on denoised samples `f = E[x0 | x_t]` of target and fake score:

    `w (1 - alpha) |f_target - f_fake|**2 + w (f_target - f_fake) (f_fake - x0)`,

    with one over the mean absolute error of the target's denoised sample as `w`, without a gradient (its Eq. 24). The gradient
    passes through `x_t` and both scores. The loss is a mean over batch and dimensions, and may be negative.

    Args:
        alpha (`float`): Weighs the two estimates of the divergence; 1 for text to image (SiD-LSG, arXiv 2406.01561), 1.2
            for CIFAR-10 (SiD).
    """

    differentiates_scores = True

    def __init__(self, alpha: float = 1.0):
        self.alpha = alpha

    def generator_loss(self, x0: Tensor, batch: Batch, target: ScoreModel, fake_score: ScoreModel) -> Tensor:
        t = self.timesteps.draw(batch, target.schedule.num_timesteps)
        x_t = target.schedule.diffuse(x0, batch.draw_noise(), t)  # [B, C, H, W], as all below
        x0_target = target.denoise(x_t, t, batch.condition, batch.negative)
        x0_fake = fake_score.denoise(x_t, t, batch.condition, batch.negative)
        difference = x0_target - x0_fake
        weight = inverse_error(x0, x0_target)
        return (weight * difference * (x0_fake - x0 + (1 - self.alpha) * difference)).mean()
