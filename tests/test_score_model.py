import pytest
import tiny
import torch
from gaussian import gaussian

from diffusers_disback.models.noise_schedule import PREDICTION_TYPES, NoiseSchedule
from diffusers_disback.models.score_model import ScoreModel


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_score_of_a_gaussian(prediction_type):
    schedule = NoiseSchedule.from_scheduler(tiny.scheduler(prediction_type))
    mean, std, t = 0.7, 0.5, torch.tensor([20, 300, 700, 980])
    x_t = torch.randn(4, 2, 4, 4)
    alpha, sigma = schedule.alpha[t].view(-1, 1, 1, 1), schedule.sigma[t].view(-1, 1, 1, 1)
    expected = (alpha * mean - x_t) / (alpha**2 * std**2 + sigma**2)
    score = gaussian(schedule, mean, std).score(x_t, t, {})
    assert torch.allclose(score, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_denoising_loss_is_smallest_at_the_right_mean(prediction_type):
    schedule = NoiseSchedule.from_scheduler(tiny.scheduler(prediction_type))
    generator = torch.Generator().manual_seed(0)
    x0 = 0.7 + 0.5 * torch.randn(512, 2, 4, 4, generator=generator)
    noise = torch.randn(x0.shape, generator=generator)
    t = torch.randint(1000, (512,), generator=generator)
    losses = [gaussian(schedule, mean, 0.5).denoising_loss(x0, noise, t, {}) for mean in (0.2, 0.7, 1.2)]
    assert losses[1] < min(losses[0], losses[2])


def test_guidance_is_extrapolation_from_the_empty_prompt():
    schedule = NoiseSchedule.from_scheduler(tiny.scheduler())
    model = gaussian(schedule, 0.0, 1.0)
    x_t, t = torch.randn(3, 2, 4, 4), torch.tensor([100, 500, 900])
    with_, without = {"shift": torch.tensor([1.0, 2.0, 3.0])}, {"shift": torch.zeros(3)}
    conditional, unconditional = model.denoise(x_t, t, with_), model.denoise(x_t, t, without)
    model.guidance_scale = 3.0
    guided = model.denoise(x_t, t, with_, without)
    assert torch.allclose(guided, unconditional + 3 * (conditional - unconditional), atol=1e-4)
    with pytest.raises(ValueError, match="guidance_scale=3.0 needs the condition of the empty prompt"):
        model.denoise(x_t, t, with_)


def test_half_precision_stays_inside_the_network():
    schedule = NoiseSchedule.from_scheduler(tiny.scheduler())
    model = ScoreModel(tiny.unet().to(torch.bfloat16), schedule)
    condition = {"encoder_hidden_states": torch.randn(2, 16, tiny.WIDTH)}
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    assert model.denoise(x_t, t, condition).dtype == torch.float32
    assert model.denoising_loss(x_t, torch.randn_like(x_t), t, condition).dtype == torch.float32


def test_a_copy_has_weights_of_its_own():
    model = ScoreModel(tiny.unet(), NoiseSchedule.from_scheduler(tiny.scheduler()), guidance_scale=4.0)
    other = model.copy()
    assert other.guidance_scale == 1.0
    next(other.network.parameters()).data.add_(1)
    assert not torch.equal(next(model.network.parameters()), next(other.network.parameters()))
