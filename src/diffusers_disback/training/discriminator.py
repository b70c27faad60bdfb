"""The discriminator in stage 2: its head is trained by one loss with the fake score, and judges the generator's samples."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..data.conditions import ConditionSource, Draw, batch_of
from ..data.images import RealImages
from ..families import ModelFamily
from ..models.batch import Batch
from ..models.discriminator import Discriminator, DiscriminatorHead, bottleneck_features
from ..models.score_model import ScoreModel
from ..objectives import adversarial
from .config import TrainingConfig
from .learner import Learner


class DiscriminatorLearner(Learner):
    """Trains a discriminator's head, whose features are those of the fake score's bottleneck.

    Args:
        fake_score (`Learner`): Whose network's bottleneck it looks at; it is trained as well.
        family (`ModelFamily`): That says where the bottleneck is.
        data (`ConditionSource`): What samples are conditioned on; the network is asked once, for the features' width.
        updates (`int`): How many there will be, for the learning rate's schedule.
        config (`TrainingConfig`): Weights, optimisation and precision.
    """

    def __init__(
        self, fake_score: Learner, family: ModelFamily, data: ConditionSource, updates: int, config: TrainingConfig
    ):
        self.fake_score = fake_score
        self.bottleneck = family.bottleneck(fake_score.unwrapped())
        self.losses: dict[str, list[Tensor]] = {}
        noise = torch.zeros(1, *family.latent_shape(config.resolution))
        probe = batch_of(Draw(noise, [0], [False], []), data, fake_score.accelerator.device)
        t = torch.zeros(1, dtype=torch.long, device=probe.noise.device)
        with torch.no_grad():
            model = fake_score.score_model(family)
            features = bottleneck_features(model, self.bottleneck, probe.noise, t, probe.condition)
        head = DiscriminatorHead(features.shape[-1], config.seed)
        rate = config.discriminator_learning_rate
        rate = config.fake_score_learning_rate if rate is None else rate
        self._begin("discriminator", head, list(head.parameters()), rate, updates, config)
        self.network, self.optimizer, self.lr_schedule = self.accelerator.prepare(
            head, self.optimizer, self.lr_schedule
        )
        self._average(None)

    def generator_loss(self, x0: Tensor, batch: Batch, fake_score: ScoreModel) -> Tensor:
        """The adversarial term with its weight, a scalar; 0 where the objective alone asks for the discriminator.

        Args:
            x0 (`Tensor`): The generator's samples, with their graph, `[B, C, H, W]`.
            batch (`Batch`): What they were made of.
            fake_score (`ScoreModel`): Of `frozen`.
        """
        if not self.config.adversarial_weight:
            return torch.zeros((), device=x0.device)
        loss = adversarial.generator_loss(x0, batch, fake_score, self.config.timestep_sampling_law)
        self.losses.setdefault("adversarial_loss", []).append(loss.detach())
        return self.config.adversarial_weight * loss

    def update(self, x0: Tensor, batch: Batch, fake_score: ScoreModel) -> None:
        """Updates the head, and leaves the loss's gradient in the fake score, for its own update to take.

        To be called under the fake score's `accumulate`, before its backward pass: processes exchange all of its gradient
        there.

        Args:
            x0 (`Tensor`): The generator's samples, detached, `[B, C, H, W]`.
            batch (`Batch`): What they were made of, with real samples.
            fake_score (`ScoreModel`): As it is trained.
        """
        fake_score.discriminator = Discriminator(self.network, self.bottleneck)
        with self.accumulate(), self.fake_score.accelerator.no_sync(self.fake_score.network):
            loss = adversarial.discriminator_loss(x0, batch, fake_score, self.config.timestep_sampling_law)
            self.backward_and_step(self.config.discriminator_weight * loss)
        self.losses.setdefault("discriminator_loss", []).append(loss.detach())

    def take_losses(self) -> dict[str, Tensor]:
        """The mean of each loss since they were taken last, without its weight."""
        losses, self.losses = self.losses, {}
        return {name: torch.stack(values).mean() for name, values in losses.items()}


def discriminator_of(
    config: TrainingConfig,
    fake_score: Learner,
    family: ModelFamily,
    data: ConditionSource,
    updates: int,
    images: RealImages | None,
) -> DiscriminatorLearner | None:
    """The discriminator, if the settings ask for one; the arguments are those of `DiscriminatorLearner`.

    Raises:
        ValueError: If they do, and there are no images.
    """
    if not config.has_discriminator:
        return None
    if images is None:
        raise ValueError("A discriminator learns from real images, but the trainer was given none: pass images.")
    return DiscriminatorLearner(fake_score, family, data, updates, config)


@contextmanager
def frozen(
    fake_score: Learner, family: ModelFamily, discriminator: DiscriminatorLearner | None
) -> Iterator[ScoreModel]:
    """The fake score, with its discriminator if there is one, in another network's loss; see `Learner.frozen`."""
    with fake_score.frozen(family) as model:
        if discriminator is None:
            yield model
            return
        with discriminator.without_gradients():
            model.discriminator = Discriminator(discriminator.unwrapped(), discriminator.bottleneck)
            yield model
