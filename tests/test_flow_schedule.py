"""Flow matching against closed forms, and its schedulers against diffusers' own."""

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from diffusers_disback import FlowSchedule, OneStepGenerator, ScoreModel
from diffusers_disback.models.flow_schedule import (
    flow_many_step_scheduler,
    flow_one_step_scheduler,
    flow_scheduler,
)
from diffusers_disback.models.generator import is_one_step_scheduler
from diffusers_disback.models.noise_schedule import FLOW, predicted_by, with_overrides


T = 1000
DPM = {"use_flow_sigmas": True, "prediction_type": FLOW, "flow_shift": 3.0}


def euler(**config):
    return FlowMatchEulerDiscreteScheduler(**config)


# A scheduler, and the s of its shift, u -> s u / (1 + (s - 1) u); of an exponential one at mu = 0.9, s = exp(mu).
SHIFTS = {
    "none": (euler(), 1.0),
    "static": (euler(shift=3.0), 3.0),
    "of an odd number": (euler(shift=1.73), 1.73),
    "by size": (euler(use_dynamic_shifting=True, shift=3.0), math.exp(0.9)),
    "by size, linear": (euler(use_dynamic_shifting=True, time_shift_type="linear"), 0.9),
    "of DPM-Solver": (DPMSolverMultistepScheduler(**DPM), 3.0),
    "of UniPC": (UniPCMultistepScheduler(**DPM), 3.0),
    "with another spacing of steps": (euler(shift=3.0, use_karras_sigmas=True, shift_terminal=0.1), 3.0),
}


@pytest.mark.parametrize("name", SHIFTS)
def test_noise_levels_are_shifted_positions(name):
    scheduler, s = SHIFTS[name]
    schedule = FlowSchedule.of(scheduler, mu=0.9)
    u = torch.arange(1, T + 1, dtype=torch.float64) / T
    expected = s * u / (1 + (s - 1) * u)
    assert torch.allclose(schedule.sigma.double(), expected, atol=1e-6)
    assert schedule.sigma[0] == pytest.approx(s / (T + s - 1), rel=1e-5) and schedule.sigma[-1] == pytest.approx(1)
    assert torch.equal(schedule.alpha, 1 - schedule.sigma) and schedule.prediction_type == FLOW
    assert torch.allclose(schedule.time_of(torch.arange(T)), 1000 * schedule.sigma)
    assert (schedule.sigma.diff() > 0).all()
    scaled = FlowSchedule.of(scheduler, mu=0.9, timestep_scale=0.25)
    assert torch.allclose(scaled.time_of(torch.tensor([0, T - 1])), 250 * schedule.sigma[[0, T - 1]])


def test_both_ends():
    """At the last timestep x_t is the noise, and x0 is x_t less the velocity; at the first it is all but x0."""
    schedule = FlowSchedule.of(euler(shift=3.0))
    x0, noise = torch.randn(8, 4, 2, 2), torch.randn(8, 4, 2, 2)
    last, first = torch.full((8,), T - 1), torch.zeros(8, dtype=torch.long)
    assert torch.equal(schedule.diffuse(x0, noise, last), noise)
    assert torch.equal(schedule.x0_of_output(noise - x0, noise, last), noise - (noise - x0))
    assert (schedule.diffuse(x0, noise, first) - x0).abs().max() < 0.02
    for t in (first, last):
        x_t = schedule.diffuse(x0, noise, t)
        assert torch.allclose(schedule.x0_of_output(schedule.regression_target(x0, noise, t), x_t, t), x0, atol=1e-6)
        sigma = schedule.sigma[t].view(-1, 1, 1, 1)
        score = schedule.score_of_x0(x0, x_t, t)
        assert ((score + noise / sigma).abs() * sigma).max() < 1e-3


@pytest.mark.parametrize("name", SHIFTS)
def test_a_students_scheduler_is_the_generator_and_several_steps_begin_at_fresh_noise(name):
    scheduler, _ = SHIFTS[name]
    schedule = FlowSchedule.of(scheduler, mu=0.9)

    def call(network, x_t, t, condition):
        return x_t.sin() * (t / 1000).view(-1, 1, 1, 1)

    noise = torch.randn(2, 4, 2, 2)
    x0 = OneStepGenerator(ScoreModel(torch.nn.Linear(1, 1), schedule, call), T - 1)(noise, {})
    student = flow_one_step_scheduler(scheduler, T - 1)
    shift = {"mu": 0.9} if student.config.use_dynamic_shifting else {}
    student.set_timesteps(1, **shift)
    (t,) = student.timesteps
    assert torch.equal(student.step(call(None, noise, t.expand(2), {}), t, noise).prev_sample, x0)
    assert is_one_step_scheduler(student) and not is_one_step_scheduler(scheduler)
    assert not is_one_step_scheduler(flow_many_step_scheduler(student)), "a teacher's"
    student.set_timesteps(2, **shift)
    t, sigma = student.timesteps[0], student.sigmas[1]
    state = torch.Generator().manual_seed(3)
    again = student.step(call(None, noise, t.expand(2), {}), t, noise, generator=state).prev_sample
    fresh = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(again, (1 - sigma) * x0 + sigma * fresh, atol=1e-5)


@pytest.mark.parametrize("name", ["static", "of DPM-Solver", "with another spacing of steps"])
def test_a_teacher_keeps_its_own_sampler(name):
    scheduler = SHIFTS[name][0]
    sampler = flow_many_step_scheduler(scheduler)
    scheduler.set_timesteps(8)
    sampler.set_timesteps(8)
    assert type(sampler) is type(scheduler) and torch.equal(sampler.sigmas, scheduler.sigmas)
    noisy = DPMSolverMultistepScheduler(**DPM, algorithm_type="sde-dpmsolver++")
    assert flow_many_step_scheduler(noisy).config.algorithm_type == "dpmsolver++"
    assert not flow_many_step_scheduler(euler(stochastic_sampling=True)).config.stochastic_sampling


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: DPMSolverMultistepScheduler(),
            "use_flow_sigmas=False and prediction_type='epsilon': it is none of flow",
        ),
        (lambda: DPMSolverMultistepScheduler(**{**DPM, "prediction_type": "epsilon"}), "prediction_type='epsilon'"),
        (lambda: euler(invert_sigmas=True), "has invert_sigmas=True"),
        (lambda: euler(use_dynamic_shifting=True), "has use_dynamic_shifting=True: its noise levels depend on"),
    ],
)
def test_what_is_no_schedule_of_flow_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        FlowSchedule.of(make())


def test_what_a_scheduler_of_flow_predicts_is_known():
    assert predicted_by({"_class_name": "FlowMatchEulerDiscreteScheduler"}) == FLOW
    assert predicted_by({"_class_name": "DPMSolverMultistepScheduler", **DPM}) == FLOW
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no prediction_type that could be said"):
        with_overrides(euler(), "epsilon", False)
    with pytest.raises(ValueError, match="has no beta schedule"):
        with_overrides(euler(), None, True)
    for timestep in (0, 998, 1000):
        with pytest.raises(ValueError, match=f"conditioning_timestep={timestep}: .* begins at pure noise; pass 999"):
            flow_one_step_scheduler(euler(), timestep)
    assert flow_scheduler(euler(shift=2.0)).config.shift == 2.0
