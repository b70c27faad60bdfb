"""The noise levels and the preconditioning of EDM (Karras et al., 2022, arXiv 2206.00364), as a noise schedule."""

import torch
from diffusers import EDMDPMSolverMultistepScheduler, SchedulerMixin
from torch import Tensor

from .noise_schedule import EDM, EDM_SCHEDULERS, NoiseSchedule


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

    def time_of(self, t: Tensor) -> Tensor:
        if self.times.device != t.device:
            self.times = self.times.to(t.device)
        return self.times[t]

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
