"""EDM's preconditioning (Karras et al., 2022, Table 1) against double precision, diffusers' schedulers, and at both ends."""

import pytest
import tiny
import torch
from diffusers import CMStochasticIterativeScheduler, DDPMScheduler, EDMDPMSolverMultistepScheduler, EDMEulerScheduler

from diffusers_disback import OneStepGenerator
from diffusers_disback.families import family_of
from diffusers_disback.models.edm_schedule import (
    EdmSchedule,
    RescaledEdmSchedule,
    edm_one_step_scheduler,
    rescaled_edm_one_step_scheduler,
)
from diffusers_disback.models.generator import is_one_step_scheduler


DATA = 0.5
ENDS = [0, 499, 999]


@pytest.fixture(params=[EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def scheduler(request):
    return request.param()


@pytest.fixture
def schedule():
    return EdmSchedule.from_scheduler(EDMEulerScheduler())


def drawn(schedule, t, count=4096):
    """x0 of the data's deviation, noise, x_t and timesteps, all of one."""
    generator = torch.Generator().manual_seed(t)
    x0, noise = DATA * torch.randn(count, 1, generator=generator), torch.randn(count, 1, generator=generator)
    times = torch.full((count,), t)
    return x0, noise, schedule.diffuse(x0, noise, times), times


def test_levels_are_the_schedulers_own(scheduler):
    schedule = EdmSchedule.from_scheduler(scheduler)
    assert schedule.num_timesteps == 1000 and (schedule.alpha == 1).all() and (schedule.sigma.diff() > 0).all()
    assert schedule.sigma[[0, -1]].tolist() == pytest.approx([0.002, 80.0], rel=1e-5)
    scheduler.set_timesteps(1000)
    assert torch.equal(schedule.sigma.flip(0), scheduler.sigmas[:-1])
    assert torch.equal(schedule.times.flip(0), scheduler.timesteps)


@pytest.mark.parametrize("t", ENDS)
def test_inputs_and_outputs_are_those_of_the_paper(schedule, scheduler, t):
    """c_in, c_noise, c_skip and c_out, and what follows of them: input and target of variance 1."""
    x0, noise, x_t, times = drawn(schedule, t)
    sigma = schedule.sigma[t]
    given, target = schedule.input_of(x_t, times), schedule.regression_target(x0, noise, times)
    assert torch.equal(given, scheduler.precondition_inputs(x_t, sigma))
    assert torch.equal(schedule.time_of(times[:1]), scheduler.precondition_noise(sigma)[None])
    assert torch.equal(schedule.x0_of_output(target, x_t, times), scheduler.precondition_outputs(x_t, target, sigma))
    assert given.std().item() == pytest.approx(1, abs=0.05) and target.std().item() == pytest.approx(1, abs=0.05)
    assert torch.allclose(schedule.x0_of_output(target, x_t, times), x0, atol=1e-6 * max(1, sigma.item()))
    exact, s = [tensor.double() for tensor in (x0, noise)], sigma.double()
    skip, out = DATA**2 / (s**2 + DATA**2), s * DATA / (s**2 + DATA**2) ** 0.5
    assert torch.allclose((exact[0] - skip * (exact[0] + s * exact[1])) / out, target.double(), atol=1e-5)
    score = schedule.score_of_x0(x0, x_t, times)
    assert torch.allclose(score, -noise / sigma, rtol=1e-3, atol=1e-3 / sigma.item())


def test_the_network_predicts_the_noise_at_one_end_and_the_image_at_the_other(schedule):
    x0, noise, _, low = drawn(schedule, 0)
    assert torch.allclose(schedule.regression_target(x0, noise, low), -noise, atol=0.02)
    x0, noise, _, high = drawn(schedule, 999)
    assert torch.allclose(schedule.regression_target(x0, noise, high), x0 / DATA, atol=0.03)


@pytest.mark.parametrize("t", ENDS)
def test_the_error_of_the_output_is_edms_loss(schedule, t):
    """lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 of the error of x0 (Table 1)."""
    x0, noise, x_t, times = drawn(schedule, t, 64)
    other = schedule.regression_target(x0, noise, times) + 0.1 * torch.randn(64, 1)
    sigma = schedule.sigma[t].item()
    weight = (sigma**2 + DATA**2) / (sigma * DATA) ** 2
    ours = (other - schedule.regression_target(x0, noise, times)).square().mean().item()
    theirs = weight * (schedule.x0_of_output(other, x_t, times).double() - x0).square().mean().item()
    assert theirs == pytest.approx(ours, rel=5e-3)


def test_a_one_step_scheduler_is_exact_at_every_level(schedule):
    x_t, output = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    for t in [*range(0, 1000, 37), 999]:
        made, times = edm_one_step_scheduler(schedule, t), torch.tensor([t])
        made.set_timesteps(1)
        assert is_one_step_scheduler(made) and not is_one_step_scheduler(EDMDPMSolverMultistepScheduler())
        assert torch.equal(made.sigmas[:1], schedule.sigma[times]) and torch.equal(
            made.timesteps, schedule.time_of(times)
        )
        started = schedule.start(x_t, t)
        assert torch.equal(started, x_t * made.init_noise_sigma)
        assert torch.equal(made.scale_model_input(started, made.timesteps[0]), schedule.input_of(started, times))
        stepped = made.step(output, made.timesteps[0], started, return_dict=False)[0]
        assert torch.equal(stepped, schedule.x0_of_output(output, started, times))


def test_a_rescaled_time_is_the_stock_schedulers_at_every_level(schedule):
    """And what it makes of noise and of outputs, bit for bit; the levels are EDM's."""
    rescaled = RescaledEdmSchedule.from_scheduler(CMStochasticIterativeScheduler(1000, sigma_min=0.0))
    assert torch.equal(rescaled.sigma, schedule.sigma)
    assert torch.allclose(rescaled.times, 1000 * schedule.times, rtol=1e-6, atol=1e-4)
    x_t, output = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    for t in range(1000):
        made, times = rescaled_edm_one_step_scheduler(rescaled, t), torch.tensor([t])
        made.set_timesteps(1)
        assert is_one_step_scheduler(made) and not is_one_step_scheduler(CMStochasticIterativeScheduler(2))
        assert torch.equal(made.timesteps.float(), rescaled.time_of(times))
        started = rescaled.start(x_t, t)
        assert torch.equal(started, x_t * made.init_noise_sigma)
        assert torch.equal(made.scale_model_input(started, made.timesteps[0]), rescaled.input_of(started, times))
        stepped = made.step(output, made.timesteps[0], started, return_dict=False)[0]
        assert torch.equal(stepped, rescaled.x0_of_output(output, started, times))


@pytest.mark.parametrize("t", [0, 499, 999])
def test_euler_gives_the_generator_up_to_rounding(t):
    """Within four units in the last place of x_t, from which it subtracts what it adds again."""
    pipe = tiny.edm()
    family = family_of(pipe)
    noise, schedule = torch.randn(2, 3, 16, 16), family.schedule
    with torch.no_grad():
        x0 = OneStepGenerator(family.score_model(), t)(noise, {})
        level = schedule.sigma[t].item()
        euler = EDMEulerScheduler(sigma_max=level, sigma_min=min(level, 0.002))
        euler.set_timesteps(1)
        x_t = noise * euler.init_noise_sigma
        output = pipe.unet(euler.scale_model_input(x_t, euler.timesteps[0]), euler.timesteps[0]).sample
        stepped = euler.step(output, euler.timesteps[0], x_t, return_dict=False)[0]
    assert (stepped - x0).abs().max() <= 4 * torch.finfo(torch.float32).eps * x_t.abs().max()


def test_what_is_no_scheduler_of_edm_is_refused(schedule):
    with pytest.raises(ValueError, match="DDPMScheduler is none of EDMEulerScheduler, EDMDPMSolver"):
        EdmSchedule.from_scheduler(DDPMScheduler())
    with pytest.raises(ValueError, match="EDMEulerScheduler is no CMStochasticIterativeScheduler"):
        RescaledEdmSchedule.from_scheduler(EDMEulerScheduler())
    with pytest.raises(ValueError, match="has prediction_type='v_prediction'"):
        EdmSchedule.from_scheduler(EDMEulerScheduler(prediction_type="v_prediction"))
    with pytest.raises(ValueError, match=r"timestep=1000 is outside the teacher's schedule \(0..999\)"):
        edm_one_step_scheduler(schedule, 1000)
