"""The noise levels and the preconditioning of EDM (Karras et al., 2022, arXiv 2206.00364), as a noise schedule."""

import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    SchedulerMixin,
)
from torch import Tensor

from .noise_schedule import EDM, EDM_SCHEDULERS, RESCALED_EDM, RESCALED_EDM_SCHEDULER, NoiseSchedule


LOWEST_SIGMA = 0.002
"""EDM's sigma_min (Table 1), which is in no config of a network with a rescaled time: `sigma_min` is another thing there."""


class EdmSchedule(NoiseSchedule):
    """`x_t = x0 + sigma(t) * noise`, and a network F of which `x0 = c_skip x_t + c_out F(c_in x_t, c_noise)` (Table 1).

    The unweighted error of F is EDM's loss, whose weight is 1 / c_out**2 (Eq. 8).

    Args:
        sigma (`Tensor`): Noise levels, rising, `[T]`.
        sigma_data (`float`): The standard deviation of the data that the network was made for.
    """

    def __init__(self, sigma: Tensor, sigma_data: float):
        self.sigma = sigma.float()
        self.alpha = torch.ones_like(self.sigma)
        self.prediction_type = EDM
        self.sigma_data = sigma_data
        self.times = 0.25 * torch.log(self.sigma)  # c_noise

    @classmethod
    def from_scheduler(cls, scheduler: SchedulerMixin) -> "EdmSchedule":
        """The noise levels that a scheduler of EDM trains at: `num_train_timesteps` of its own spacing.

        Raises:
            ValueError: If it is none, or its networks predict something else.
        """
        config, name = scheduler.config, type(scheduler).__name__
        if name not in EDM_SCHEDULERS:
            raise ValueError(f"{name} is none of {', '.join(EDM_SCHEDULERS)}.")
        if config.prediction_type != "epsilon":
            raise ValueError(
                f"{name} has prediction_type={config.prediction_type!r}: supported is EDM's own preconditioning, which it calls "
                "'epsilon'."
            )
        made = type(scheduler).from_config(config)
        made.set_timesteps(config.num_train_timesteps)
        return cls(made.sigmas[:-1].flip(0), config.sigma_data)

    def input_of(self, x_t: Tensor, t: Tensor) -> Tensor:
        sigma = self._at(t, x_t)[1]
        return x_t * (1 / (sigma**2 + self.sigma_data**2) ** 0.5)  # c_in

    def start(self, noise: Tensor, timestep: int) -> Tensor:
        """As of `NoiseSchedule`: as diffusers' schedulers of EDM scale the first noise, for data of variance 1."""
        return noise * (self.sigma[timestep].item() ** 2 + 1) ** 0.5

    def x0_of_output(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        sigma = self._at(t, x_t)[1]
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total * x_t + sigma * self.sigma_data / total**0.5 * output  # c_skip, c_out

    def regression_target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """As of `NoiseSchedule`: (x0 - c_skip x_t) / c_out, without the differences of large numbers at either end."""
        sigma = self._at(t, x0)[1]
        return (sigma / self.sigma_data * x0 - self.sigma_data * noise) / (sigma**2 + self.sigma_data**2) ** 0.5


def edm_one_step_scheduler(schedule: EdmSchedule, timestep: int) -> EDMDPMSolverMultistepScheduler:
    """A stock scheduler whose only step is the generator: its highest noise level is that of the timestep, and its first step,
    to no noise at all, gives x0 exactly. (That of `EDMEulerScheduler` is right up to rounding.)

    Raises:
        ValueError: If the timestep is outside the schedule.
    """
    schedule.check_timestep(timestep)
    # With rho 1 the highest noise level is not rounded.
    return EDMDPMSolverMultistepScheduler(
        sigma_min=schedule.sigma[0].item(),
        sigma_max=schedule.sigma[timestep].item(),
        sigma_data=schedule.sigma_data,
        rho=1.0,
        num_train_timesteps=1,
        solver_order=1,
        final_sigmas_type="zero",
    )


def rescaled_time(sigma: Tensor) -> Tensor:
    """1000 ln(sigma) / 4 in float32, rounded once, as networks with stock `CMStochasticIterativeScheduler` are given it."""
    return (250 * torch.log(sigma.cpu().double() + 1e-44)).to(sigma.device, torch.float32)


class RescaledEdmSchedule(EdmSchedule):
    """As `EdmSchedule`, of a network whose time is 1000 c_noise: those that were published with Consistency Models (Song et al.,
    2023, arXiv 2303.01469). A generator of it takes `sigma * noise`, without the data's variance.

    Args:
        sigma, sigma_data: As of `EdmSchedule`.
    """

    def __init__(self, sigma: Tensor, sigma_data: float):
        super().__init__(sigma, sigma_data)
        self.prediction_type = RESCALED_EDM
        self.times = rescaled_time(self.sigma)

    @classmethod
    def from_scheduler(cls, scheduler: SchedulerMixin) -> "RescaledEdmSchedule":
        """The noise levels of EDM from `LOWEST_SIGMA` to a scheduler's `sigma_max`, spaced by its `rho`, `num_train_timesteps` of
        them.

        With `sigma_min` 0 the boundary condition of consistency models (Appendix C) is EDM's own preconditioning, and with
        any other it is that of a network that was distilled.

        Raises:
            ValueError: If it is no `CMStochasticIterativeScheduler`, or its `sigma_min` is not 0.
        """
        config, name = scheduler.config, type(scheduler).__name__
        if name != RESCALED_EDM_SCHEDULER:
            raise ValueError(f"{name} is no {RESCALED_EDM_SCHEDULER}.")
        if config.sigma_min != 0:
            raise ValueError(
                f"{name} has sigma_min={config.sigma_min}: that is a consistency model, which was distilled already, and whose output "
                "is no E[x0 | x_t]. Supported is sigma_min=0, EDM's own preconditioning, as `diffusers-disback convert-edm` writes it."
            )
        levels = rescaled_edm_many_step_scheduler(scheduler)
        levels.set_timesteps(config.num_train_timesteps)
        return cls(levels.sigmas[:-1].flip(0), config.sigma_data)

    def input_of(self, x_t: Tensor, t: Tensor) -> Tensor:
        """As of `NoiseSchedule`: c_in x_t, by the same operation as the stock scheduler's."""
        sigma = self._at(t, x_t)[1]
        return x_t / (sigma**2 + self.sigma_data**2) ** 0.5

    def start(self, noise: Tensor, timestep: int) -> Tensor:
        return noise * self.sigma[timestep].item()


def rescaled_edm_one_step_scheduler(schedule: RescaledEdmSchedule, timestep: int) -> CMStochasticIterativeScheduler:
    """A stock scheduler whose only step is the generator: its highest noise level is that of the timestep, and with `sigma_min` 0
    its first step gives x0 exactly.

    Raises:
        ValueError: If the timestep is outside the schedule.
    """
    schedule.check_timestep(timestep)
    # With rho 1 the highest noise level is not rounded; of a single timestep the scheduler would divide by zero.
    return CMStochasticIterativeScheduler(
        num_train_timesteps=2,
        sigma_min=0.0,
        sigma_max=schedule.sigma[timestep].item(),
        sigma_data=schedule.sigma_data,
        rho=1.0,
        clip_denoised=False,
    )


class RescaledEdmEulerScheduler(EDMEulerScheduler):
    """`EDMEulerScheduler` for networks whose time is 1000 c_noise, from `sigma_max * noise`. It is sampled with, and not saved."""

    @property
    def init_noise_sigma(self) -> float:
        return self.config.sigma_max

    def precondition_noise(self, sigma: Tensor) -> Tensor:
        return rescaled_time(sigma)


def rescaled_edm_many_step_scheduler(scheduler: SchedulerMixin) -> RescaledEdmEulerScheduler:
    """A deterministic sampler of many steps over the noise levels of a `CMStochasticIterativeScheduler`'s config."""
    config = scheduler.config
    return RescaledEdmEulerScheduler(
        sigma_min=min(LOWEST_SIGMA, config.sigma_max),
        **{key: config[key] for key in ("sigma_max", "sigma_data", "rho", "num_train_timesteps")},
    )
