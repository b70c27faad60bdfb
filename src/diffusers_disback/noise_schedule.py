"""What a timestep means: alpha(t), sigma(t), and how a network's output becomes x0."""

from diffusers import DDPMScheduler, SchedulerMixin
from torch import Tensor


PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class NoiseSchedule:
    """Tables of alpha and sigma by diffusers timestep, and the prediction type.

    `x_t = alpha(t) * x0 + sigma(t) * noise`, variance preserving. Tables and results are float32.

    Args:
        alpha (`Tensor`): `[T]`.
        sigma (`Tensor`): `[T]`.
        prediction_type (`str`): What the network predicts; one of `PREDICTION_TYPES`.
    """

    def __init__(self, alpha: Tensor, sigma: Tensor, prediction_type: str):
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type={prediction_type!r} is none of {', '.join(PREDICTION_TYPES)}.")
        self.alpha = alpha.float()
        self.sigma = sigma.float()
        self.prediction_type = prediction_type

    @classmethod
    def from_scheduler(cls, scheduler: SchedulerMixin) -> "NoiseSchedule":
        """The schedule that a diffusers scheduler's config describes, whatever its class.

        Raises:
            ValueError: If the scheduler is not one of the variance-preserving ones, with betas.
        """
        if "beta_schedule" not in scheduler.config:
            raise ValueError(
                f"{type(scheduler).__name__} has no beta schedule. Supported are teachers with a variance-preserving "
                "schedule (DDPM, DDIM, PNDM, Euler, DPM-Solver, ...)."
            )
        # The same operations in the same order as DDIMScheduler's, so that a deployed student agrees bit for bit.
        alphas_cumprod = ddpm_scheduler(scheduler).alphas_cumprod
        prediction_type = scheduler.config.get("prediction_type", "epsilon")
        return cls(alphas_cumprod**0.5, (1 - alphas_cumprod) ** 0.5, prediction_type)

    @property
    def num_timesteps(self) -> int:
        return len(self.alpha)

    def check_timestep(self, timestep: int) -> None:
        """Raises a `ValueError` if the timestep is outside the schedule, or x0 cannot be had there."""
        if not 0 <= timestep < self.num_timesteps:
            raise ValueError(
                f"timestep={timestep} is outside the teacher's schedule (0..{self.num_timesteps - 1}); SDXL recipes "
                "use 399."
            )
        if self.prediction_type == "epsilon" and self.alpha[timestep] == 0:
            raise ValueError(
                f"timestep={timestep} has zero signal, and from a prediction of the noise there x0 cannot be had. "
                f"Use a smaller timestep, such as {timestep - 1}."
            )

    def diffuse(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, given x0 and the noise.

        Args:
            x0 (`Tensor`): `[B, ...]`.
            noise (`Tensor`): Standard normal, shape of `x0`.
            t (`Tensor`): Integer diffusers timesteps, `[B]`.
        """
        alpha, sigma = self._at(t, x0)
        return alpha * x0 + sigma * noise

    def x0_of_output(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x0 | x_t], from the network's output at `x_t`, `[B, ...]`."""
        alpha, sigma = self._at(t, x_t)
        match self.prediction_type:
            case "sample":
                return output
            case "epsilon":
                return (x_t - sigma * output) / alpha
            case "v_prediction":
                return alpha * x_t - sigma * output

    def score_of_x0(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The gradient of log p(x_t), from E[x0 | x_t] by Tweedie's formula: `(alpha * x0 - x_t) / sigma**2`."""
        alpha, sigma = self._at(t, x_t)
        return (alpha * x0 - x_t) / sigma**2

    def regression_target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network's output should be, given x0 and the noise, `[B, ...]`."""
        alpha, sigma = self._at(t, x0)
        match self.prediction_type:
            case "sample":
                return x0
            case "epsilon":
                return noise
            case "v_prediction":
                return alpha * noise - sigma * x0

    def _at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.alpha.device != like.device:
            self.alpha, self.sigma = self.alpha.to(like.device), self.sigma.to(like.device)
        shape = (-1,) + (1,) * (like.ndim - 1)
        return self.alpha[t].view(shape), self.sigma[t].view(shape)


def ddpm_scheduler(scheduler: SchedulerMixin) -> DDPMScheduler:
    """The training-time form of a scheduler: its betas after any rescaling to zero terminal SNR, one per timestep."""
    return DDPMScheduler.from_config(scheduler.config)
