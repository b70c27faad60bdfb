"""A network, what its timesteps mean, and the way to call it."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .batch import Condition
from .noise_schedule import NoiseSchedule


def call_network(network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """A diffusers denoiser's output, `[B, C, H, W]`."""
    return network(x_t, timestep=t, return_dict=False, **condition)[0]


UNSCALED = NoiseSchedule(torch.ones(1), torch.ones(1), "sample")
"""Of a score model that passes inputs and timesteps on as they are, for samplers."""


class ScoreModel:
    """Asks a network for x0, for the score, and for its denoising loss.

    Not a module: it wraps the *prepared* network, so every call passes the wrapper's `forward`. The same class serves
    teacher, target, fake score and generator.

    Args:
        network (`nn.Module`): A diffusers denoiser, possibly wrapped for distributed training.
        schedule (`NoiseSchedule`): What its timesteps and its output mean.
        call (`Callable`): `(network, x_t, t, condition) -> output`, of what the schedule makes of `x_t` and `t` for it.
        guidance_scale (`float`): Classifier-free guidance of `denoise`; 1 means none, 0 the unconditional branch alone.

    Attributes:
        discriminator (`Callable`, *optional*): `(score_model, x_t, t, condition) -> logits`; see `logits`.
    """

    discriminator: "Callable[[ScoreModel, Tensor, Tensor, Condition], Tensor] | None" = None

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        call: Callable[[nn.Module, Tensor, Tensor, Condition], Tensor] = call_network,
        guidance_scale: float = 1.0,
    ):
        self.network = network
        self.schedule = schedule
        self.call = call
        self.guidance_scale = guidance_scale

    def copy(self) -> "ScoreModel":
        """The same model with weights of its own, unguided."""
        return ScoreModel(copy.deepcopy(self.network), self.schedule, self.call)

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's own output in float32, `[B, C, H, W]`; the network computes in its own precision."""
        dtype = next(self.network.parameters()).dtype
        condition = {key: value.to(dtype) if value.is_floating_point() else value for key, value in condition.items()}
        given = self.schedule.input_of(x_t, t).to(dtype)
        return self.call(self.network, given, self.schedule.time_of(t), condition).float()

    def denoise(self, x_t: Tensor, t: Tensor, condition: Condition, negative: Condition | None = None) -> Tensor:
        """E[x0 | x_t], guided away from `negative` by `guidance_scale`.

        Args:
            x_t (`Tensor`): Noisy latents, `[B, C, H, W]`.
            t (`Tensor`): Integer diffusers timesteps, `[B]`.
            condition (`Condition`): Keyword arguments of the network, batch first.
            negative (`Condition`, *optional*): Those of the empty prompt; needed if `guidance_scale` is not 1.

        Returns:
            `Tensor`: `[B, C, H, W]`, float32.
        """
        return self.schedule.x0_of_output(self.guided(x_t, t, condition, negative), x_t, t)

    def guided(self, x_t: Tensor, t: Tensor, condition: Condition, negative: Condition | None = None) -> Tensor:
        """The network's output, guided, `[B, C, H, W]`. Arguments as of `denoise`. Without a condition nothing guides."""
        if self.guidance_scale == 1 or not condition:
            return self.predict(x_t, t, condition)
        if not negative:
            raise ValueError(
                f"guidance_scale={self.guidance_scale} needs the condition of the empty prompt, or of no class; where there "
                "is none, pass 1."
            )
        if self.guidance_scale == 0:
            return self.predict(x_t, t, negative)
        both = {key: torch.cat([negative[key], condition[key]]) for key in condition}
        # [2 B, C, H, W], first the unconditional half
        without, with_ = self.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        # Classifier-free guidance (Ho and Salimans, 2022, Eq. 6), in diffusers' convention: 1 means none.
        return without + self.guidance_scale * (with_ - without)

    def score(self, x_t: Tensor, t: Tensor, condition: Condition, negative: Condition | None = None) -> Tensor:
        """The gradient of log p(x_t | condition), `[B, C, H, W]`. Arguments as of `denoise`."""
        return self.schedule.score_of_x0(self.denoise(x_t, t, condition, negative), x_t, t)

    def logits(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """log p_target(x_t) / p_fake(x_t) as a discriminator on the network's features estimates it, `[B]`. Unguided.

        Raises:
            ValueError: If there is no discriminator.
        """
        if self.discriminator is None:
            raise ValueError(
                "There is no discriminator: pass --adversarial_weight, and real images in --train_data_dir."
            )
        return self.discriminator(self, x_t, t, condition)

    def denoising_loss(
        self, x0: Tensor, noise: Tensor, t: Tensor, condition: Condition, negative: Condition | None = None
    ) -> Tensor:
        """Denoising score matching on `x0` (DisBack, Eqs. 5 and 7), a scalar.

        The mean squared error of the network's output, unweighted: the loss that latent diffusion teachers were trained with.
        With guidance it is that of the guided output, and both of its branches are trained.
        """
        x_t = self.schedule.diffuse(x0, noise, t)  # [B, C, H, W]
        output = self.guided(x_t, t, condition, negative)
        return nn.functional.mse_loss(output, self.schedule.regression_target(x0, noise, t))
