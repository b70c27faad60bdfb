"""The adversarial term: a discriminator of noisy real and noisy generated samples (DMD2, arXiv 2405.14867, section 4.3).

Both losses are the non-saturating ones (Goodfellow et al., arXiv 1406.2661, section 3). The logit that minimises the
discriminator's is `log p_real(x_t) / p_fake(x_t)`, which is what an f-divergence weights samples by.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..models.batch import Batch
from ..models.score_model import ScoreModel
from ..models.timestep_sampling import TimestepSampling


def generator_loss(x0: Tensor, batch: Batch, fake_score: ScoreModel, timesteps: TimestepSampling) -> Tensor:
    """`E softplus(-logit)` of noisy samples, a scalar.

    Args:
        x0 (`Tensor`): The generator's samples, with their graph, `[B, C, H, W]`.
        batch (`Batch`): What they were made of, and the source of randomness.
        fake_score (`ScoreModel`): With a discriminator; the gradient passes through both, which are frozen.
        timesteps (`TimestepSampling`): The noise levels.
    """
    t = timesteps.draw(batch, fake_score.schedule.num_timesteps)  # [B]
    x_t = fake_score.schedule.diffuse(x0, batch.draw_noise(), t)  # [B, C, H, W]
    return softplus(-fake_score.logits(x_t, t, batch.condition)).mean()


def discriminator_loss(x0: Tensor, batch: Batch, fake_score: ScoreModel, timesteps: TimestepSampling) -> Tensor:
    """`E softplus(-logit)` of noisy real samples, plus `E softplus(logit)` of noisy generated ones, a scalar.

    A real sample and the generated one of its row have the same condition and timestep, and noise of their own.

    Args:
        x0 (`Tensor`): The generator's samples; their graph is not followed, `[B, C, H, W]`.
        batch (`Batch`): What they were made of, with real samples, and the source of randomness.
        fake_score (`ScoreModel`): With a discriminator; the gradient passes into both.
        timesteps (`TimestepSampling`): The noise levels.

    Raises:
        ValueError: If the batch has no real samples.
    """
    if batch.real is None:
        raise ValueError("A discriminator learns from real samples, of which the batch has none.")
    t = timesteps.draw(batch, fake_score.schedule.num_timesteps)  # [B]
    noise = torch.cat([batch.draw_noise(), batch.draw_noise()])  # [2 B, C, H, W], first the real half, as below
    samples, both_t = torch.cat([batch.real, x0.detach()]), torch.cat([t, t])
    condition = {key: torch.cat([value, value]) for key, value in batch.condition.items()}
    logits = fake_score.logits(fake_score.schedule.diffuse(samples, noise, both_t), both_t, condition)
    real, fake = logits.chunk(2)
    return softplus(-real).mean() + softplus(fake).mean()
