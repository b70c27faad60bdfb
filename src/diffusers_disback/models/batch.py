"""What a training step is given: noise, conditions, and a source of random numbers for each sample."""

from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


NO_LABEL = "sample"
"""What samples of a teacher without conditions are called, where others have a prompt or a label."""

Condition = dict[str, Tensor]
"""Keyword arguments of a network, batch first."""


@dataclass
class Batch:
    """A slice of a global batch. Every sample draws from its own generator, so its draws do not depend on the slicing.

    Args:
        noise (`Tensor`): The generator's input, standard normal, `[B, C, H, W]`.
        condition (`Condition`): Of the prompts, batch first.
        negative (`Condition`): Of the empty prompt, batch first.
        generators (`list[torch.Generator]`): One per sample, on the CPU.
        real (`Tensor`, *optional*): Real samples of the same conditions, for a discriminator, `[B, C, H, W]`.
    """

    noise: Tensor
    condition: Condition
    negative: Condition
    generators: list[torch.Generator]
    real: Tensor | None = None

    def draw_timesteps(self, low: int, high: int) -> Tensor:
        """Integer timesteps, uniform on `low..high`, both included, `[B]`."""
        drawn = [torch.randint(low, high + 1, (), generator=generator) for generator in self.generators]
        return to_device(torch.stack(drawn), self.noise.device)

    def draw_uniform(self) -> Tensor:
        """Numbers, uniform in 0..1 without its ends, `[B]`."""
        drawn = [torch.rand((), generator=generator, dtype=torch.float64) for generator in self.generators]
        return to_device(torch.stack(drawn).clamp(1e-7, 1 - 1e-7).float(), self.noise.device)

    def draw_noise(self) -> Tensor:
        """Fresh standard normal noise, shape of `noise`."""
        drawn = randn_tensor(tuple(self.noise.shape), generator=self.generators, device=torch.device("cpu"))
        return to_device(drawn, self.noise.device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of CPU memory on a device, without waiting for what the device has still to do."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
