import pytest
import tiny
import torch
from diffusers import DDIMScheduler

from diffusers_disback.families import family_of, to_pipeline
from diffusers_disback.models.generator import OneStepGenerator, one_step_scheduler
from diffusers_disback.models.noise_schedule import PREDICTION_TYPES


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("timestep", [249, 399, 999])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_one_step_scheduler_is_the_generator_bit_for_bit(prediction_type, timestep, zero_snr):
    if zero_snr and prediction_type == "epsilon" and timestep == 999:
        pytest.skip("refused: no signal there")
    pipe = tiny.pipeline(prediction_type)
    pipe.scheduler = tiny.scheduler(prediction_type, rescale_betas_zero_snr=zero_snr)
    family = family_of(pipe)
    generator = OneStepGenerator(family.score_model(), timestep)
    scheduler = one_step_scheduler(pipe.scheduler, timestep)
    noise, condition = torch.randn(2, 4, 8, 8), family.encode(tiny.PROMPTS[:2])
    with torch.no_grad():
        expected = generator(noise, condition)
        scheduler.set_timesteps(1)
        (t,) = scheduler.timesteps
        assert t == timestep
        output = pipe.unet(noise, t, **condition).sample
        assert torch.equal(scheduler.step(output, t, noise).prev_sample, expected)


def test_a_timestep_outside_the_schedule_is_refused():
    with pytest.raises(ValueError, match="timestep=1000 is outside"):
        OneStepGenerator(family_of(tiny.pipeline()).score_model(), 1000)
    pipe = tiny.pipeline()
    for timestep, message in (
        (-1, "is outside"),
        (1000, "is outside"),
        (399.5, "no whole number"),
        (None, "no whole"),
    ):
        with pytest.raises(ValueError, match=message):
            one_step_scheduler(pipe.scheduler, timestep)
        with pytest.raises(ValueError, match=message):
            to_pipeline(pipe.unet, timestep, pipe)
    with pytest.raises(ValueError, match="timestep=999 has zero signal"):
        one_step_scheduler(tiny.scheduler(rescale_betas_zero_snr=True), 999)


def test_the_pipeline_shares_the_teachers_components():
    pipe = tiny.pipeline()
    student = to_pipeline(tiny.unet(seed=1), 399, pipe)
    assert student.vae is pipe.vae and student.text_encoder is pipe.text_encoder
    assert isinstance(student.scheduler, DDIMScheduler) and student.conditioning_timestep == 399
    assert isinstance(pipe.scheduler, type(tiny.scheduler())), "the teacher keeps its own scheduler"
