"""Flow matching: noise levels on straight lines, and the schedulers of its teachers and students."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor

from .noise_schedule import FLOW, FLOW_MATCHING, NoiseSchedule


class FlowSchedule(NoiseSchedule):
    """Rectified flow (arXiv 2209.03003; Stable Diffusion 3, arXiv 2403.03206, Eq. 13): `x_t = (1 - sigma) x0 + sigma noise`, of
    which the network predicts `noise - x0`. Timestep t of T has the noise level (t + 1) / T, shifted.

    Args:
        sigma (`Tensor`): By timestep, `[T]`.
        times (`Tensor`): What the network is given by timestep, `[T]`.
    """

    def __init__(self, sigma: Tensor, times: Tensor):
        super().__init__(1 - sigma, sigma, FLOW)
        self.times = times.float()

    @classmethod
    def of(cls, scheduler: SchedulerMixin, mu: float | None = None, timestep_scale: float = 1.0) -> "FlowSchedule":
        """The schedule that a scheduler of flow matching describes.

        Args:
            scheduler (`SchedulerMixin`): The teacher's.
            mu (`float`, *optional*): The shift at images of a size, where the config says `use_dynamic_shifting`.
            timestep_scale (`float`): By which the network's times are scaled, besides the scheduler's own.

        Raises:
            ValueError: If it is none, or its shift depends on images' sizes and there is none.
        """
        flow = flow_scheduler(scheduler)
        number = flow.config.num_train_timesteps
        if flow.config.use_dynamic_shifting:
            if mu is None:
                raise ValueError(
                    "The teacher's scheduler has use_dynamic_shifting=True: its noise levels depend on images' sizes, but its "
                    "pipeline tells it of none. Set use_dynamic_shifting to false and shift to a number in its "
                    "scheduler_config.json."
                )
            sigma = flow.time_shift(mu, 1.0, torch.arange(1, number + 1) / number)
        else:
            mu, sigma = None, flow.sigmas.flip(0)
        flow.set_timesteps(1, mu=mu)
        sigma[-1] = flow.sigmas[0]  # 1, as the student's scheduler rounds it
        return cls(sigma, sigma * number * timestep_scale)


def flow_scheduler(scheduler: SchedulerMixin, **changes: Any) -> FlowMatchEulerDiscreteScheduler:
    """The plain form of a scheduler of flow matching: Euler's steps at its own shift.

    Args:
        scheduler (`SchedulerMixin`): One of flow matching, or another whose config says `use_flow_sigmas`.
        **changes: Of its config.

    Raises:
        ValueError: If it is none, or its noise levels do not go from 1 to 0.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if config.get("invert_sigmas"):
        raise ValueError(f"{name} has invert_sigmas=True: its images are at sigma 1, which is not supported.")
    if name in FLOW_MATCHING:
        plain = {"shift_terminal": None, "stochastic_sampling": False, **_PLAIN_SIGMAS, **changes}
        return FlowMatchEulerDiscreteScheduler.from_config(config, **plain)
    if not config.get("use_flow_sigmas") or config.get("prediction_type") != FLOW:
        raise ValueError(
            f"{name} has use_flow_sigmas={config.get('use_flow_sigmas')} and prediction_type={config.get('prediction_type')!r}: "
            f"it is none of flow matching. Supported are {', '.join(FLOW_MATCHING)} and schedulers with use_flow_sigmas and "
            f"prediction_type={FLOW!r}."
        )
    if config.get("use_dynamic_shifting"):
        raise ValueError(f"{name} has use_dynamic_shifting=True, by which no stock pipeline of its kind calls it.")
    given = {"num_train_timesteps": config["num_train_timesteps"], "shift": config["flow_shift"]}
    return FlowMatchEulerDiscreteScheduler(**given, **changes)


def flow_one_step_scheduler(scheduler: SchedulerMixin, timestep: int) -> FlowMatchEulerDiscreteScheduler:
    """A stock scheduler whose only step is the generator, from pure noise. Of several steps each one begins at fresh noise on
    its x0, as of consistency models (`stochastic_sampling`).

    Args:
        scheduler (`SchedulerMixin`): The teacher's.
        timestep (`int`): The conditioning timestep.

    Raises:
        ValueError: If it is none of flow matching, or the timestep is not the last one.
    """
    last = scheduler.config["num_train_timesteps"] - 1
    if timestep != last:
        raise ValueError(
            f"conditioning_timestep={timestep}: with a scheduler of flow matching the stock pipeline begins at pure noise; pass "
            f"{last}."
        )
    return flow_scheduler(scheduler, stochastic_sampling=True)


def flow_many_step_scheduler(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The teacher's own scheduler, as a deterministic sampler."""
    flow_scheduler(scheduler)
    scheduler_class: Any = type(scheduler)
    if scheduler_class.__name__ in FLOW_MATCHING:
        return scheduler_class.from_config(scheduler.config, stochastic_sampling=False)
    kind = str(scheduler.config.get("algorithm_type", "")).removeprefix("sde-")
    return scheduler_class.from_config(scheduler.config, **({"algorithm_type": kind} if kind else {}))


_PLAIN_SIGMAS = dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), False)
