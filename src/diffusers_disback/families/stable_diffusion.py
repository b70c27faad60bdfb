"""Stable Diffusion 1.x and 2.x: a text encoder, a UNet, latents of an 8x autoencoder."""

from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import nn

from ..hub.cards import STABLE_DIFFUSION
from ..models.batch import Condition
from ..pipelines.one_step import DisBackOneStepPipeline
from .checks import check_schedule
from .text import TOKENS, TextFamily


# What a UNet is not given besides latents, timestep and condition, and the value of its config with which it needs none.
_NOT_GIVEN = {
    "time_cond_proj_dim": (
        None,
        "it embeds the guidance scale, as latent consistency models do: it was distilled into few steps already. Take "
        "the model that it was made of",
    ),
    "class_embed_type": (None, "it is conditioned on classes, or on another noise level, as upscalers are"),
    "num_class_embeds": (None, "it is conditioned on classes"),
    "encoder_hid_dim_type": (None, "it projects its conditions, among them images, by itself"),
    "attention_type": ("default", "it takes boxes or other groundings"),
}


class StableDiffusion(TextFamily):
    """Stable Diffusion 1.x, 2.x and their fine-tunes. The condition is `encoder_hidden_states`."""

    pipeline_classes = ("StableDiffusionPipeline",)
    addition_embed_types: tuple[str | None, ...] = (None, "text")  # which the text encoder's states feed
    encoding = "ModelFamily"  # as caches and runs of before know it
    agree_in = (
        *("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type", "addition_time_embed_dim"),
        "projection_class_embeddings_input_dim",
    )
    usage = STABLE_DIFFUSION
    conditioning_timestep = 625  # SiD-LSG, arXiv 2406.01561, for SD 1.5 and 2.1-base without images: t_init = 625

    def check(self) -> None:
        unet, vae = self.pipeline.unet.config, self.pipeline.vae.config
        if unet.in_channels != vae.latent_channels:
            raise ValueError(
                f"The teacher's UNet takes {unet.in_channels} channels, but its autoencoder makes "
                f"{vae.latent_channels}: it is a model for inpainting, depth or editing, not for text-to-image, or the "
                "autoencoder is another model's."
            )
        super().check()
        width = sum(encoder.config.hidden_size for encoder in self.text_encoders)
        if unet.cross_attention_dim != width:
            raise ValueError(
                f"The teacher's UNet takes text embeddings of width {unet.cross_attention_dim}, but its "
                f"{'text encoder makes' if len(self.text_encoders) == 1 else 'text encoders make'} {width}: they belong "
                "to different models."
            )
        if unet.addition_embed_type not in self.addition_embed_types:
            raise ValueError(
                f"The teacher is a {type(self.pipeline).__name__}, whose UNet is given "
                f"{' or '.join(map(repr, self.addition_embed_types))} besides the text's states, but its addition_embed_type "
                f"is {unet.addition_embed_type!r}: it is of another family."
            )

    @classmethod
    def check_network(cls, config: Any, what: str) -> None:
        for key, (usual, meaning) in _NOT_GIVEN.items():
            if config.get(key, usual) != usual:
                raise ValueError(f"{what} has {key}={config[key]!r}: {meaning}. It is not supported.")
        if config["out_channels"] != config["in_channels"]:
            raise ValueError(
                f"{what} takes {config['in_channels']} channels and gives {config['out_channels']} (out_channels): it is a model "
                "for inpainting, depth or editing, or it predicts a variance, too. It is not supported."
            )

    @torch.no_grad()
    def encode(self, prompts: list[str], resolution: int | None = None) -> Condition:
        prompt_embeds, _ = self.encode_prompt(prompts)
        return {"encoder_hidden_states": prompt_embeds}

    @classmethod
    def example_condition(cls, config: Any, batch: int) -> Condition:
        return {"encoder_hidden_states": torch.empty(batch, TOKENS, config.cross_attention_dim, device="meta")}

    def assemble(self, network: nn.Module, scheduler: SchedulerMixin) -> DiffusionPipeline:
        parts = {**self.pipeline.components, "unet": network, "scheduler": scheduler, "safety_checker": None}
        return type(self.pipeline)(**parts, requires_safety_checker=False)

    def one_step(self, network: nn.Module, timestep: int) -> DisBackOneStepPipeline:
        self.check_network(network.config, "The student's network")
        own = {"unet": network, "scheduler": self.one_step_scheduler(timestep)}
        components = {**self.pipeline.components, **own}
        accepted = DisBackOneStepPipeline.component_names()
        settings = self._settings_of_one_step()
        return DisBackOneStepPipeline(
            **{name: components[name] for name in accepted if name in components}, **settings
        )

    def _settings_of_one_step(self) -> dict[str, Any]:
        return {}

    def check_schedule(self) -> str | None:
        return check_schedule(self, self.text_encoders[0].device, self.encode([""]))
