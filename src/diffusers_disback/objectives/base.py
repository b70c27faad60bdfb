"""What an objective is."""

from abc import ABC, abstractmethod

from torch import Tensor

from ..models.batch import Batch
from ..models.score_model import ScoreModel


class Objective(ABC):
    """Two losses. Noise levels and noise are drawn inside, from `batch`; hyperparameters live in the constructor.

    Attributes:
        differentiates_scores (`bool`): Whether the gradient of the generator's loss passes through both scores: the planner
            counts their graphs.
    """

    differentiates_scores = False

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
        """Denoising score matching on detached samples, at all noise levels (DisBack, Eqs. 5 and 7).

        Args:
            x0 (`Tensor`): Samples without a graph, `[B, C, H, W]`.
            batch (`Batch`): What they were made of, and the source of randomness.
            fake_score (`ScoreModel`): The model to fit.
        """
        t = batch.draw_timesteps(0, fake_score.schedule.num_timesteps - 1)
        return fake_score.denoising_loss(x0.detach(), batch.draw_noise(), t, batch.condition)
