import pytest
import tiny
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)

from diffusers_disback.families import family_of, to_pipeline
from diffusers_disback.models.generator import many_step_scheduler, one_step_scheduler
from diffusers_disback.models.noise_schedule import (
    FLOW,
    PREDICTION_TYPES,
    NoiseSchedule,
    ddpm_scheduler,
    scheduler_of,
    with_overrides,
)


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


def test_flow_is_on_straight_lines_and_no_scheduler_gives_it():
    sigma = torch.arange(1, T + 1) / T
    schedule = NoiseSchedule(1 - sigma, sigma, FLOW)
    x0, noise, t = torch.randn(8, 4, 2, 2), torch.randn(8, 4, 2, 2), torch.randint(T, (8,))
    x_t = schedule.diffuse(x0, noise, t)
    velocity = schedule.regression_target(x0, noise, t)
    assert torch.equal(velocity, noise - x0)
    assert torch.allclose(schedule.x0_of_output(velocity, x_t, t), x0, atol=1e-5)
    score = schedule.score_of_x0(x0, x_t, t)
    assert torch.allclose(score, -noise / sigma[t].view(-1, 1, 1, 1), rtol=1e-3, atol=1e-3)
    schedule.check_timestep(T - 1)  # where there is no signal, and none is needed
    with pytest.raises(ValueError, match="of straight lines, but alpha is not 1 - sigma"):
        NoiseSchedule((1 - sigma**2) ** 0.5, sigma, FLOW)
    with pytest.raises(ValueError, match="prediction_type='flow' is none of epsilon, v_prediction, sample, flow_pred"):
        NoiseSchedule(1 - sigma, sigma, "flow")
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no beta schedule"):
        one_step_scheduler(FlowMatchEulerDiscreteScheduler(), T - 1)


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


def euler(**config):
    return EulerDiscreteScheduler.from_config(tiny.scheduler().config, **config)


# What is no variance-preserving schedule with betas, integer timesteps and a known prediction.
FOREIGN = {
    "FlowMatchEulerDiscreteScheduler has no beta schedule": FlowMatchEulerDiscreteScheduler,
    "EDMEulerScheduler has no beta schedule": EDMEulerScheduler,
    "EulerDiscreteScheduler has timestep_type='continuous': its times are no steps": lambda: euler(
        timestep_type="continuous", sigma_min=0.002, sigma_max=120.0
    ),
    "has use_flow_sigmas=True: its times are no steps": lambda: DPMSolverMultistepScheduler.from_config(
        tiny.scheduler().config, use_flow_sigmas=True, prediction_type="flow_prediction"
    ),
    "has prediction_type='flow_prediction', which is none of": lambda: tiny.scheduler("flow_prediction"),
    "CogVideoXDDIMScheduler makes other noise levels": lambda: CogVideoXDDIMScheduler.from_config(
        tiny.scheduler().config, snr_shift_scale=3.0
    ),
}


@pytest.mark.parametrize("use", ["schedule", "ddpm", "one step", "pipeline", "many steps", "zero snr", "family"])
def test_schedules_that_are_no_teachers_are_refused_by_all(use):
    pipe = tiny.pipeline()
    for message, make in FOREIGN.items():
        pipe.scheduler = make()
        calls = {
            "schedule": lambda: NoiseSchedule.from_scheduler(pipe.scheduler),
            "ddpm": lambda: ddpm_scheduler(pipe.scheduler),
            "one step": lambda: one_step_scheduler(pipe.scheduler, 399),
            "pipeline": lambda: to_pipeline(pipe.unet, 399, pipe),
            "many steps": lambda: many_step_scheduler(pipe.scheduler),
            "zero snr": lambda: with_overrides(pipe.scheduler, None, True),
            "family": lambda: family_of(pipe),
        }
        with pytest.raises(ValueError, match=message):
            calls[use]()


def test_samplers_of_the_same_schedule_are_taken():
    """What concerns a sampler alone changes nothing."""
    expected = NoiseSchedule.from_scheduler(tiny.scheduler())
    for scheduler in (
        *(euler(**{name: True}) for name in ("use_karras_sigmas", "use_exponential_sigmas", "rescale_betas_zero_snr")),
        euler(timestep_spacing="trailing", interpolation_type="log_linear", final_sigmas_type="sigma_min"),
        DDIMScheduler.from_config(tiny.scheduler().config, clip_sample=True, thresholding=True),
        DPMSolverMultistepScheduler.from_config(tiny.scheduler().config, use_lu_lambdas=True, euler_at_final=True),
        LCMScheduler.from_config(tiny.scheduler().config),
    ):
        schedule = NoiseSchedule.from_scheduler(scheduler)
        if not scheduler.config.get("rescale_betas_zero_snr"):
            assert torch.equal(schedule.alpha, expected.alpha), type(scheduler).__name__
    pipe = tiny.pipeline()
    pipe.scheduler = DDIMScheduler.from_config(tiny.scheduler().config, clip_sample=True, thresholding=True)
    drawn = family_of(pipe).sampler().scheduler.config
    assert not drawn.clip_sample and not drawn.thresholding, "latents are not confined to [-1, 1]"


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler])
def test_a_rescale_to_zero_terminal_snr_is_diffusers_own(scheduler_class):
    expected = NoiseSchedule.from_scheduler(tiny.scheduler("v_prediction", rescale_betas_zero_snr=True))
    plain = scheduler_class.from_config(tiny.scheduler().config)
    made = with_overrides(plain, "v_prediction", True)
    schedule = NoiseSchedule.from_scheduler(made)
    assert torch.equal(schedule.alpha, expected.alpha) and schedule.alpha[-1] == 0
    assert schedule.prediction_type == "v_prediction" and made.config.timestep_spacing == "trailing"
    assert type(made) is (DDIMScheduler if scheduler_class is PNDMScheduler else scheduler_class)
    assert not made.config.get("clip_sample") and with_overrides(plain, None, False) is plain
    stock = scheduler_of({**made.config, "_class_name": type(made).__name__}, "it")
    assert torch.equal(stock.alphas_cumprod, made.alphas_cumprod) and type(stock) is type(made)
    for config in ({}, {"_class_name": "UNet2DConditionModel"}, {"_class_name": "Nothing"}, {"_class_name": 3}):
        with pytest.raises(ValueError, match="which is no scheduler of diffusers"):
            scheduler_of(config, "it")


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="beta_schedule='other', which is not supported"):
        scheduler = tiny.scheduler()
        scheduler.register_to_config(beta_schedule="other")
        NoiseSchedule.from_scheduler(scheduler)
    with pytest.raises(ValueError, match="prediction_type='noise' is none of"):
        NoiseSchedule(torch.ones(3), torch.ones(3), "noise")
