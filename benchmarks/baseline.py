"""The training step in plain PyTorch, written from the paper's equations in the manner of the published recipes.

It makes the same updates as ours: one of the generator, then k of the fake score. What published recipes do besides,
and what need not be done, is a list of wastes; each can be switched off alone.
"""

import copy
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Wastes:
    """What is done though it need not be.

    Args:
        text (`bool`): The prompts of every batch are encoded in the step.
        passes (`bool`): The teacher is asked with the prompt and with the empty one in two passes.
        forwards (`bool`): Target and fake score are given noises of their own, and the generator draws again for the
            fake score's first update.
        float64 (`bool`): x0 is computed in float64.
        float32 (`bool`): Networks compute in float32, and not in half of it.
    """

    text: bool = True
    passes: bool = True
    forwards: bool = True
    float64: bool = True
    float32: bool = True

    @classmethod
    def names(cls) -> list[str]:
        return [field.name for field in fields(cls)]

    @classmethod
    def without(cls, *names: str) -> "Wastes":
        return cls(**dict.fromkeys(names, False))


class Baseline:
    """Both stages of DisBack with DMD's weight, on three networks.

    Args:
        pipeline (`DiffusionPipeline`): The teacher's.
        prompts (`list[str]`): One for each sample of a batch, again in every step.
        wastes (`Wastes`): What is done though it need not be.
        fake_score_updates (`int`): k.
        guidance (`float`): Of the target.
        timestep (`int`): At which the generator is asked.
        half (`torch.dtype`): In which networks compute, if not in float32.
    """

    def __init__(
        self,
        pipeline: Any,
        prompts: list[str],
        wastes: Wastes,
        fake_score_updates: int = 5,
        guidance: float = 8.0,
        timestep: int = 399,
        half: torch.dtype = torch.bfloat16,
    ):
        self.pipeline, self.prompts, self.wastes = pipeline, prompts, wastes
        self.updates, self.guidance, self.timestep, self.half = fake_score_updates, guidance, timestep, half
        self.target = pipeline.unet.requires_grad_(False)
        self.device = self.target.device
        self.fake_score, self.generator = (copy.deepcopy(self.target).requires_grad_(True) for _ in range(2))
        self.optimizers = [self.optimizer(network) for network in (self.generator, self.fake_score)]
        alphas_cumprod = pipeline.scheduler.alphas_cumprod
        self.alpha, self.sigma = (
            table.to(self.device) for table in (alphas_cumprod**0.5, (1 - alphas_cumprod) ** 0.5)
        )
        self.shape = (len(prompts), 4, self.target.config.sample_size, self.target.config.sample_size)
        self.condition, self.empty = self.encode(prompts), self.encode([""] * len(prompts))

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(network.parameters(), lr=5e-7, betas=(0.9, 0.999), weight_decay=0.01)

    # What a network is given ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> dict[str, Any]:
        made = self.pipeline.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if len(made) == 2:
            return {"encoder_hidden_states": made[0]}
        side = 8.0 * self.shape[-1]
        sizes = torch.tensor([[side, side, 0, 0, side, side]] * len(prompts), device=self.device)
        return {"encoder_hidden_states": made[0], "added_cond_kwargs": {"text_embeds": made[2], "time_ids": sizes}}

    def take_batch(self) -> None:
        """A new batch of prompts."""
        if self.wastes.text:
            self.condition = self.encode(self.prompts)

    def ask(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: dict[str, Any]) -> Tensor:
        with torch.autocast(self.device.type, self.half, enabled=not self.wastes.float32):
            return network(x_t, t, return_dict=False, **condition)[0].float()

    def x0_of(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x0, from a prediction of the noise or of v."""
        alpha, sigma = (table[t].view(-1, 1, 1, 1) for table in (self.alpha, self.sigma))
        if self.wastes.float64:
            alpha, sigma, output, x_t = (each.double() for each in (alpha, sigma, output, x_t))
        if self.pipeline.scheduler.config.prediction_type == "v_prediction":
            return (alpha * x_t - sigma * output).float()
        return ((x_t - sigma * output) / alpha).float()

    def diffuse(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self.alpha[t].view(-1, 1, 1, 1) * x0 + self.sigma[t].view(-1, 1, 1, 1) * noise

    def noise(self) -> Tensor:
        return torch.randn(self.shape, device=self.device)

    def timesteps(self, low: int = 0, high: int = 1000) -> Tensor:
        return torch.randint(low, high, (len(self.prompts),), device=self.device)

    # Steps ---------------------------------------------------------------------------------------------------------

    def draw(self) -> Tensor:
        """x0 = G(z, c)."""
        noise = self.noise()
        t = torch.full((len(self.prompts),), self.timestep, device=self.device)
        return self.x0_of(self.ask(self.generator, noise, t, self.condition), noise, t)

    @torch.no_grad()
    def guided(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The target's x0, guided."""
        if self.wastes.passes:
            with_, without = (self.ask(self.target, x_t, t, each) for each in (self.condition, self.empty))
        else:
            both = joined(self.empty, self.condition)
            without, with_ = self.ask(self.target, torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return self.x0_of(without + self.guidance * (with_ - without), x_t, t)

    def update_generator(self) -> Tensor:
        """One update by DisBack, Eq. 8, with the weight of DMD, Eq. 8. Returns its samples."""
        self.take_batch()
        x0 = self.draw()
        with torch.no_grad():
            t = self.timesteps(20, 981)
            x_t = self.diffuse(x0, self.noise(), t)
            x0_target = self.guided(x_t, t)
            if self.wastes.forwards:
                x_t = self.diffuse(x0, self.noise(), t)
            x0_fake = self.x0_of(self.ask(self.fake_score, x_t, t, self.condition), x_t, t)
            weight = 1 / (x0 - x0_target).abs().mean(dim=(1, 2, 3), keepdim=True)
            direction = weight * (x0_fake - x0_target)
        self.descend(0, self.generator, 0.5 * nn.functional.mse_loss(x0, x0.detach() - direction))
        return x0.detach()

    def update_fake_score(self, x0: Tensor | None) -> None:
        """One update by DisBack, Eqs. 5 and 7, on given samples or on new ones."""
        if x0 is None:
            self.take_batch()
            with torch.no_grad():
                x0 = self.draw()
        t, noise = self.timesteps(), self.noise()
        output = self.ask(self.fake_score, self.diffuse(x0, noise, t), t, self.condition)
        goal = noise
        if self.pipeline.scheduler.config.prediction_type == "v_prediction":
            alpha, sigma = (table[t].view(-1, 1, 1, 1) for table in (self.alpha, self.sigma))
            goal = alpha * noise - sigma * x0
        self.descend(1, self.fake_score, nn.functional.mse_loss(output, goal))

    def descend(self, number: int, network: nn.Module, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        self.optimizers[number].step()
        self.optimizers[number].zero_grad(set_to_none=True)

    def stage_1(self) -> None:
        """One step of stage 1."""
        self.update_fake_score(None)

    def stage_2(self) -> None:
        """One step of stage 2."""
        x0 = self.update_generator()
        for number in range(self.updates):
            self.update_fake_score(x0 if number == 0 and not self.wastes.forwards else None)


def joined(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """Two conditions as one batch."""
    return {
        key: joined(value, two[key]) if isinstance(value, dict) else torch.cat([value, two[key]])
        for key, value in one.items()
    }
