"""What a timestep means: alpha(t), sigma(t), and how a network's output becomes x0."""

import inspect
import operator
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, SchedulerMixin
from torch import Tensor


PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
FLOW = "flow_prediction"
FLOW_MATCHING = ("FlowMatchEulerDiscreteScheduler",)
EDM = "edm"
EDM_SCHEDULERS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
RESCALED_EDM = "edm_rescaled_time"
RESCALED_EDM_SCHEDULER = "CMStochasticIterativeScheduler"
# Of a scheduler that asks its network at other times than the integers of its betas, and the value with which it does not.
_OTHER_TIMES = {"timestep_type": "discrete", "use_flow_sigmas": False}


class NoiseSchedule:
    """Tables of alpha and sigma by diffusers timestep, and the prediction type.

    `x_t = alpha(t) * x0 + sigma(t) * noise`: variance preserving, or with `flow_prediction` on straight lines,
    `alpha = 1 - sigma`, where the network predicts `noise - x0`. Tables and results are float32.

    Args:
        alpha (`Tensor`): `[T]`.
        sigma (`Tensor`): `[T]`.
        prediction_type (`str`): What the network predicts; one of `PREDICTION_TYPES`, or `FLOW`.

    Attributes:
        times (`Tensor`, *optional*): What a network is given by timestep, `[T]`, where that is not the timestep itself.

    Raises:
        ValueError: If it is none of them, or tables of flow are not on straight lines.
    """

    times: Tensor | None = None

    def __init__(self, alpha: Tensor, sigma: Tensor, prediction_type: str):
        if prediction_type not in (*PREDICTION_TYPES, FLOW):
            raise ValueError(f"prediction_type={prediction_type!r} is none of {_listed()}, {FLOW}.")
        if prediction_type == FLOW and not torch.allclose(alpha + sigma, torch.ones_like(sigma), atol=1e-6):
            raise ValueError(f"prediction_type={prediction_type!r} is of straight lines, but alpha is not 1 - sigma.")
        self.alpha = alpha.float()
        self.sigma = sigma.float()
        self.prediction_type = prediction_type

    @classmethod
    def from_scheduler(cls, scheduler: SchedulerMixin) -> "NoiseSchedule":
        """The schedule that a diffusers scheduler's config describes, whatever its class.

        Raises:
            ValueError: If the scheduler is not one of the variance-preserving ones, with betas and integer timesteps.
        """
        # The same operations in the same order as DDIMScheduler's, so that a deployed student agrees bit for bit.
        alphas_cumprod = ddpm_scheduler(scheduler).alphas_cumprod
        prediction_type = scheduler.config.get("prediction_type", "epsilon")
        return cls(alphas_cumprod**0.5, (1 - alphas_cumprod) ** 0.5, prediction_type)

    @property
    def num_timesteps(self) -> int:
        return len(self.alpha)

    def check_timestep(self, timestep: int, name: str = "timestep", advice: str = "") -> None:
        """Raises a `ValueError`, with the name of the setting and what to use instead, if a timestep is outside the schedule, or has no
        x0. `ModelFamily.check_timestep` knows what to use."""
        try:
            operator.index(timestep)
        except TypeError:
            raise ValueError(f"timestep={timestep!r} is no whole number{advice}.") from None
        if not 0 <= timestep < self.num_timesteps:
            raise ValueError(
                f"{name}={timestep} is outside the teacher's schedule (0..{self.num_timesteps - 1}){advice}."
            )
        if self.prediction_type == "epsilon" and self.alpha[timestep] == 0:
            raise ValueError(
                f"{name}={timestep} has zero signal, and from a prediction of the noise there x0 cannot be had. "
                f"Use a smaller timestep, such as {timestep - 1}."
            )

    def input_of(self, x_t: Tensor, t: Tensor) -> Tensor:
        """What a network is given of `x_t`, `[B, ...]`, at integer timesteps of the schedule, `[B]`: `x_t` itself, unless it is
        preconditioned."""
        return x_t

    def time_of(self, t: Tensor) -> Tensor:
        """What a network is given of integer timesteps of the schedule, `[B]`."""
        if self.times is None:
            return t
        if self.times.device != t.device:
            self.times = self.times.to(t.device)
        return self.times[t]

    def start(self, noise: Tensor, timestep: int) -> Tensor:
        """What a one-step generator takes for `x_t`: standard normal noise, in the scale of the schedule's `x_t`."""
        return noise

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
        return x_t - sigma * output  # flow

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
        return noise - x0  # flow

    def _at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.alpha.device != like.device:
            self.alpha, self.sigma = self.alpha.to(like.device), self.sigma.to(like.device)
        shape = (-1,) + (1,) * (like.ndim - 1)
        return self.alpha[t].view(shape), self.sigma[t].view(shape)


def ddpm_scheduler(scheduler: SchedulerMixin) -> DDPMScheduler:
    """The training-time form of a scheduler: its betas after any rescaling to zero terminal SNR, one per timestep.

    Raises:
        ValueError: If the scheduler is not one of the variance-preserving ones, with betas and integer timesteps, or
            predicts what none of `PREDICTION_TYPES` is.
    """
    name, config = type(scheduler).__name__, scheduler.config
    supported = (
        "Supported are teachers with a variance-preserving schedule (DDPM, DDIM, PNDM, Euler, DPM-Solver, ...) and integer "
        "timesteps."
    )
    if "beta_schedule" not in config:
        raise ValueError(f"{name} has no beta schedule. {supported}")
    for key, usual in _OTHER_TIMES.items():
        if config.get(key, usual) != usual:
            raise ValueError(f"{name} has {key}={config[key]!r}: its times are no steps of its betas. {supported}")
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"{name} has prediction_type={prediction_type!r}, which is none of {_listed()}.")
    try:
        made = DDPMScheduler.from_config(config)
    except NotImplementedError as error:
        raise ValueError(f"{name} has beta_schedule={config['beta_schedule']!r}, which is not supported.") from error
    own = getattr(scheduler, "alphas_cumprod", None)  # Euler has 2**-24 where a rescale to zero signal has 0
    if own is not None and not torch.allclose(own.to(made.alphas_cumprod), made.alphas_cumprod, atol=1e-6):
        raise ValueError(f"{name} makes other noise levels of its config's betas than DDPM does. {supported}")
    return made


def with_overrides(
    scheduler: SchedulerMixin, prediction_type: str | None, rescale_betas_zero_snr: bool
) -> SchedulerMixin:
    """A scheduler that takes for granted what its config does not say: itself, if that is nothing.

    One whose class knows no rescale to zero terminal SNR (PNDM, say) becomes a DDIM of the same betas. A rescale brings
    the timesteps of a sampler to the end of the schedule, without which the last one would not be asked (Lin et al.,
    2023, section 3.3).

    Args:
        scheduler (`SchedulerMixin`): The teacher's.
        prediction_type (`str`, *optional*): What its network predicts.
        rescale_betas_zero_snr (`bool`): Whether its betas end with zero signal, rescaled.

    Raises:
        ValueError: If the scheduler has no betas to rescale, no prediction type, or one that its networks do not heed.
    """
    scheduler_class: Any = type(scheduler)
    config = dict(scheduler.config)
    changes: dict[str, Any] = {}
    if prediction_type is not None:
        name = scheduler_class.__name__
        if "prediction_type" not in inspect.signature(scheduler_class.__init__).parameters:
            raise ValueError(
                f"{name} has no prediction_type that could be said otherwise; leave --prediction_type out."
            )
        if name in EDM_SCHEDULERS or config.get("use_flow_sigmas"):  # whose prediction_type says nothing
            own = predicted_by({**config, "_class_name": name})
            raise ValueError(
                f"{name} is of networks that predict {own}: leave --prediction_type {prediction_type} out."
            )
        changes["prediction_type"] = prediction_type
    if rescale_betas_zero_snr and not config.get("rescale_betas_zero_snr"):
        ddpm_scheduler(scheduler)
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if "rescale_betas_zero_snr" not in inspect.signature(scheduler_class.__init__).parameters:
            scheduler_class = diffusers.DDIMScheduler
            changes["clip_sample"] = config.get("clip_sample", False)
    return scheduler_class.from_config(config, **changes) if changes else scheduler


def predicted_by(config: dict[str, Any]) -> str:
    """What a `scheduler_config.json` says that its network predicts."""
    name = config.get("_class_name")
    if name == RESCALED_EDM_SCHEDULER:
        return RESCALED_EDM if config.get("sigma_min") == 0 else "consistency"
    if name in FLOW_MATCHING:
        return FLOW
    return EDM if name in EDM_SCHEDULERS else str(config.get("prediction_type", "epsilon"))


def scheduler_of(config: dict[str, Any], what: str) -> SchedulerMixin:
    """The scheduler of a `scheduler_config.json`.

    Args:
        config (`dict`): Its content.
        what (`str`): Whose it is, for messages.

    Raises:
        ValueError: If it names no scheduler of diffusers, or that does not take it.
    """
    made: Any = getattr(diffusers, str(config.get("_class_name")), None)
    is_scheduler = isinstance(made, type) and issubclass(made, SchedulerMixin)
    if not is_scheduler:
        raise ValueError(f"{what} is of class {config.get('_class_name')!r}, which is no scheduler of diffusers.")
    try:
        return made.from_config(config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{what} is none that diffusers makes a {made.__name__} of ({error}).") from error


def _listed() -> str:
    return ", ".join(PREDICTION_TYPES)
