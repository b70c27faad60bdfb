"""The one-step generator, and the stock schedulers that make pipelines run it, and the teacher."""

import torch
from diffusers import DDIMScheduler, SchedulerMixin
from torch import Tensor

from .batch import Condition
from .noise_schedule import (
    EDM_SCHEDULERS,
    FLOW_MATCHING,
    RESCALED_EDM_SCHEDULER,
    NoiseSchedule,
    ddpm_scheduler,
)
from .score_model import ScoreModel


class OneStepGenerator:
    """A score model asked once: noise goes in as if it were `x_t` at one fixed timestep, x0 comes out.

    Args:
        model (`ScoreModel`): The student's network; `teacher.copy()` is the usual start.
        timestep (`int`): The conditioning timestep.

    Raises:
        ValueError: If the timestep is outside the schedule, or has zero signal and the network predicts the noise.
    """

    def __init__(self, model: ScoreModel, timestep: int):
        model.schedule.check_timestep(timestep)
        self.model = model
        self.timestep = timestep

    def __call__(self, noise: Tensor, condition: Condition) -> Tensor:
        """x0, `[B, C, H, W]`, of standard normal noise of the same shape."""
        t = torch.full((len(noise),), self.timestep, device=noise.device)
        return self.model.denoise(self.model.schedule.start(noise, self.timestep), t, condition)


def one_step_scheduler(scheduler: SchedulerMixin, timestep: int) -> DDIMScheduler:
    """A stock scheduler whose only step is the generator: its schedule is the teacher's, cut off after `timestep`.

    With `num_inference_steps=1` and no guidance, a stock pipeline then computes exactly what the generator does.

    Args:
        scheduler (`SchedulerMixin`): The teacher's.
        timestep (`int`): The conditioning timestep.

    Raises:
        ValueError: If the scheduler has no betas or predicts what is not known, the timestep is outside its schedule, or
            there is no signal there and the network predicts the noise.
    """
    NoiseSchedule.from_scheduler(scheduler).check_timestep(timestep)
    # Betas are taken after a rescale to zero terminal SNR, which is therefore not asked for again.
    betas = ddpm_scheduler(scheduler).betas[: timestep + 1].tolist()
    return DDIMScheduler(
        num_train_timesteps=timestep + 1,
        trained_betas=betas,
        prediction_type=scheduler.config.get("prediction_type", "epsilon"),
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
        steps_offset=1,
    )


def is_one_step_scheduler(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler is one that `one_step_scheduler`, `edm_one_step_scheduler`, `rescaled_edm_one_step_scheduler` or
    `flow_one_step_scheduler` makes: its model is a student."""
    config, name = scheduler.config, type(scheduler).__name__
    if name in FLOW_MATCHING:
        return bool(config.get("stochastic_sampling"))
    if name in EDM_SCHEDULERS:
        return config.get("num_train_timesteps") == 1
    if name == RESCALED_EDM_SCHEDULER:
        return config.get("num_train_timesteps") == 2 and config.get("sigma_min") == 0
    ends = config.get("timestep_spacing") == "trailing" and config.get("set_alpha_to_one") is True
    return ends and config.get("trained_betas") is not None


def check_many_steps(scheduler: SchedulerMixin, name: str) -> None:
    """Raises a `ValueError` if what is taken as a teacher is a one-step student.

    Args:
        scheduler (`SchedulerMixin`): Its own.
        name (`str`): What it is called.
    """
    if is_one_step_scheduler(scheduler):
        raise ValueError(
            f"{name} is a one-step student, which is no teacher: its schedule ends where it is asked. To go on from it, name "
            f"its teacher by --pretrained_model_name_or_path, and {name} by --generator_model_name_or_path."
        )


def many_step_scheduler(scheduler: SchedulerMixin) -> DDIMScheduler:
    """A deterministic sampler of many steps. Samples may lie beyond [-1, 1], so it does not clip, whatever the config says.

    Args:
        scheduler (`SchedulerMixin`): The teacher's.

    Raises:
        ValueError: If the scheduler has no betas, or predicts what is not known.
    """
    NoiseSchedule.from_scheduler(scheduler)
    return DDIMScheduler.from_config(
        scheduler.config,
        clip_sample=False,
        thresholding=False,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
    )
