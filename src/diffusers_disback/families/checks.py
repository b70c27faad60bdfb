"""Whether a scheduler's config says of a denoiser what the denoiser itself shows: measured on a little noise."""

import torch
from torch import Tensor

from ..models.adapters import base_of
from ..models.batch import Condition
from ..models.noise_schedule import FLOW
from ..models.score_model import ScoreModel
from .base import ModelFamily


_NUMBERS = 2048  # that a teacher's betas are checked on, at least: eight small latents, or two large ones
_TOLERANCE = 0.08  # of its slope; see docs/teachers.md


@torch.no_grad()
def check_schedule(family: ModelFamily, device: torch.device, empty: Condition) -> str | None:
    """What speaks against the scheduler's config, if anything does: against its prediction type, or its betas.

    Args:
        family (`ModelFamily`): The teacher.
        device (`torch.device`): Where it is measured.
        empty (`Condition`): The negative one, one row.
    """
    model = _model_on(family, device)
    return _check_prediction_type(family, model, device, empty) or _check_betas(family, model, device, empty)


@torch.no_grad()
def check_prediction_type(family: ModelFamily, device: torch.device, condition: Condition) -> str | None:
    """What speaks against the prediction type of the scheduler's config, if anything does; `condition` has one row."""
    condition = {key: value.to(device) for key, value in condition.items()}
    return _check_prediction_type(family, _model_on(family, device), device, condition)


def _model_on(family: ModelFamily, device: torch.device) -> ScoreModel:
    """The teacher on a device: a half-precision copy on a GPU, where encoders may lie beside it."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return family.score_model(base_of(family.network, device, dtype))


def _check_prediction_type(
    family: ModelFamily, model: ScoreModel, device: torch.device, empty: Condition
) -> str | None:
    """At the highest noise level x_t is all but the noise itself. A network that predicts the noise gives it back; one
    that predicts v or x0 does not, since the image is hardly to be seen."""
    noise = _noise(family, 1, 0).to(device)
    t = torch.full((1,), family.schedule.num_timesteps - 1, device=device)
    output = model.predict(noise, t, empty)
    loss, declared = (output - noise).square().mean().item(), family.schedule.prediction_type
    if declared == FLOW:  # the noise, less a mean image
        if loss < 0.5:
            return None
        return (
            "The teacher is of flow matching, but at the highest noise level its output is not the noise less a mean image (mean squared "
            f"difference {loss:.2g}): its weights or its scheduler may be another model's."
        )
    if (declared == "epsilon") == (loss < 0.5):
        return None
    other = "v_prediction or sample" if declared == "epsilon" else "epsilon"
    return (
        f"The teacher's scheduler says prediction_type={declared!r}, but at the highest noise level its output is "
        f"{'not ' if declared == 'epsilon' else ''}the noise (mean squared difference {loss:.2g}). If its images are "
        f"wrong, try --prediction_type {other}."
    )


def _check_betas(family: ModelFamily, model: ScoreModel, device: torch.device, empty: Condition) -> str | None:
    """Where a network's timesteps stand for other noise levels than the config says, it finds more or less noise."""
    slope = slope_of_noise(family, model, device, empty)
    if abs(slope - 1) < _TOLERANCE:
        return None
    return (
        f"The teacher's scheduler says beta_schedule={family.pipeline.scheduler.config.beta_schedule!r}, but at middle "
        f"timesteps its network takes images of this schedule for {'less' if slope > 1 else 'more'} noisy than they "
        f"are (by a factor of {slope:.2f}): its betas, or its prediction type, may not be those that it was trained with. "
        "If its images are wrong, mend its scheduler_config.json, or try --prediction_type."
    )


@torch.no_grad()
def slope_of_noise(family: ModelFamily, model: ScoreModel, device: torch.device, empty: Condition) -> float:
    """That of added noise on found noise. What a network finds is an expectation, E[noise | x_t]: over images as it
    knows them the slope is 1. Its own images, sampled in four steps, are as it knows them."""
    schedule = family.schedule
    count = max(2, _NUMBERS // torch.Size(family.latent_shape()).numel())
    condition = {key: value.expand(count, *value.shape[1:]) for key, value in empty.items()}

    def at(share: float) -> Tensor:
        return torch.full((count,), round(share * schedule.num_timesteps) - 1, device=device)

    def sigma_noise(x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        return x_t - schedule.diffuse(x0, torch.zeros_like(x0), t)

    levels = [at(share) for share in (0.8, 0.6, 0.4, 0.2)]
    x_t = _noise(family, count, 1).to(device)
    for t, below in zip(levels, [*levels[1:], None], strict=True):
        x0 = model.denoise(x_t, t, condition)
        if below is not None:  # DDIM (Song et al., 2020, Eq. 12), without noise of its own
            sigma = schedule.diffuse(torch.zeros_like(x0), torch.ones_like(x0), t)
            x_t = schedule.diffuse(x0, sigma_noise(x_t, x0, t) / sigma, below)
    t = at(0.3)
    x_t = schedule.diffuse(x0, _noise(family, count, 2).to(device), t)
    added, found = sigma_noise(x_t, x0, t), sigma_noise(x_t, model.denoise(x_t, t, condition), t)
    return ((added * found).mean() / found.square().mean()).item()


def _noise(family: ModelFamily, count: int, seed: int) -> Tensor:
    """Standard normal, `[count, C, H, W]`, from a seed of its own."""
    return torch.randn(count, *family.latent_shape(), generator=torch.Generator().manual_seed(seed))
