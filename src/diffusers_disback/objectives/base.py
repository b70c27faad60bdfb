"""What an objective is."""

from abc import ABC, abstractmethod

from torch import Tensor

from ..models.batch import Batch
from ..models.score_model import ScoreModel
from ..models.timestep_sampling import TimestepSampling


class Objective(ABC):
    """Two losses. Timesteps and noise are drawn inside, from `batch`; hyperparameters live in the constructor.

    Attributes:
        differentiates_scores (`bool`): Whether the gradient of the generator's loss passes through both scores: the planner
            counts their graphs.
        needs_discriminator (`bool`): Whether it asks the fake score for logits, which a discriminator's head gives.
        timesteps (`TimestepSampling`): At which the generator is trained; the fake score is trained at those of the same
            distribution over the whole schedule.
    """

    differentiates_scores = False
    needs_discriminator: bool = False
    timesteps = TimestepSampling()

    @abstractmethod
    def generator_loss(self, x0: Tensor, batch: Batch, target: ScoreModel, fake_score: ScoreModel) -> Tensor:
        """A scalar whose gradient with respect to the generator moves its samples towards the target.

        Args:
            x0 (`Tensor`): The generator's samples, with their graph, `[B, C, H, W]`.
            batch (`Batch`): What they were made of, and the source of randomness.
            target (`ScoreModel`): The node that the generator is being pulled to; frozen, possibly guided.
            fake_score (`ScoreModel`): The score model of the generator's samples; gets no gradient here.
        """

    def fake_score_loss(self, x0: Tensor, batch: Batch, fake_score: ScoreModel) -> Tensor:
        """Denoising score matching on detached samples, at all noise levels (DisBack, Eqs. 5 and 7), with the fake score's
        guidance, if it has any (SiD-LSG, arXiv 2406.01561).

        Args:
            x0 (`Tensor`): Samples without a graph, `[B, C, H, W]`.
            batch (`Batch`): What they were made of, and the source of randomness.
            fake_score (`ScoreModel`): The model to fit.
        """
        t = self.timesteps.everywhere().draw(batch, fake_score.schedule.num_timesteps)
        return fake_score.denoising_loss(x0.detach(), batch.draw_noise(), t, batch.condition, batch.negative)


def inverse_error(x0: Tensor, x0_target: Tensor) -> Tensor:
    """One over the mean absolute error of a denoised sample, for each sample, `[B, 1, 1, 1]`, without a gradient.

    The error is bounded from below by 1e-6, far under that of any sample with noise, so that the weight is finite.
    """
    error = (x0 - x0_target).detach().abs().mean(dim=tuple(range(1, x0.ndim)), keepdim=True)
    return 1 / error.clamp_min(1e-6)
