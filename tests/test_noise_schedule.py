import pytest
import tiny
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler

from diffusers_disback.noise_schedule import PREDICTION_TYPES, NoiseSchedule


T = 1000


@pytest.fixture(params=PREDICTION_TYPES)
def prediction_type(request):
    return request.param


def test_tables_are_the_schedulers_own():
    scheduler = tiny.scheduler()
    schedule = NoiseSchedule.from_scheduler(scheduler)
    assert torch.equal(schedule.alpha, scheduler.alphas_cumprod**0.5)
    assert torch.equal(schedule.sigma, (1 - scheduler.alphas_cumprod) ** 0.5)
    assert schedule.num_timesteps == T


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler])
def test_any_variance_preserving_scheduler_gives_the_same_schedule(scheduler_class):
    expected = NoiseSchedule.from_scheduler(tiny.scheduler("v_prediction"))
    schedule = NoiseSchedule.from_scheduler(scheduler_class.from_config(tiny.scheduler("v_prediction").config))
    assert torch.equal(schedule.alpha, expected.alpha)
    assert schedule.prediction_type == "v_prediction"


def test_noising_and_targets_are_diffusers_own(prediction_type):
    scheduler = tiny.scheduler(prediction_type)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    x0, noise, t = torch.randn(8, 4, 2, 2), torch.randn(8, 4, 2, 2), torch.randint(T, (8,))
    assert torch.allclose(schedule.diffuse(x0, noise, t), scheduler.add_noise(x0, noise, t), atol=1e-6)
    velocity = scheduler.get_velocity(x0, noise, t)
    expected = {"epsilon": noise, "sample": x0, "v_prediction": velocity}[prediction_type]
    assert torch.allclose(schedule.regression_target(x0, noise, t), expected, atol=1e-6)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("timestep", [0, 1, 500, T - 2, T - 1])
def test_the_right_output_gives_x0_at_both_ends(prediction_type, timestep, zero_snr):
    if zero_snr and prediction_type == "epsilon":
        pytest.skip("refused where alpha is 0; see below")
    schedule = NoiseSchedule.from_scheduler(tiny.scheduler(prediction_type, rescale_betas_zero_snr=zero_snr))
    x0, noise, t = torch.randn(16, 4, 2, 2), torch.randn(16, 4, 2, 2), torch.full((16,), timestep)
    x_t = schedule.diffuse(x0, noise, t)
    output = schedule.regression_target(x0, noise, t)
    recovered = schedule.x0_of_output(output, x_t, t)
    assert (recovered - x0).abs().max() < 1e-4
    score = schedule.score_of_x0(x0, x_t, t)
    assert (score + noise / schedule.sigma[timestep]).abs().max() < 1e-2 * score.abs().max()


def test_timesteps_outside_the_schedule_are_refused():
    schedule = NoiseSchedule.from_scheduler(tiny.scheduler())
    schedule.check_timestep(0)
    schedule.check_timestep(T - 1)
    for timestep in (-1, T):
        with pytest.raises(ValueError, match=rf"timestep={timestep} is outside .* \(0\.\.999\)"):
            schedule.check_timestep(timestep)


def test_noise_prediction_without_signal_is_refused():
    schedule = NoiseSchedule.from_scheduler(tiny.scheduler("epsilon", rescale_betas_zero_snr=True))
    with pytest.raises(ValueError, match="zero signal"):
        schedule.check_timestep(T - 1)
    NoiseSchedule.from_scheduler(tiny.scheduler("v_prediction", rescale_betas_zero_snr=True)).check_timestep(T - 1)


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no beta schedule"):
        NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="prediction_type='noise' is none of"):
        NoiseSchedule(torch.ones(3), torch.ones(3), "noise")
