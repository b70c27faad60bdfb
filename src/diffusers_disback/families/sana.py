"""SANA: linear attention on latents of a 32x autoencoder, with the states of one language model."""

import hashlib
import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..hub.cards import Usage
from ..models.batch import Condition
from ..models.flow_schedule import FlowSchedule
from ..pipelines.one_step_sana import DisBackOneStepSanaPipeline
from .flow import FlowFamily


TOKENS_OF_SANA = 300  # of a prompt, by default of the stock pipeline


class Sana(FlowFamily):
    """SANA, SANA 1.5 and their fine-tunes (arXiv 2410.10629). The condition is `encoder_hidden_states` and
    `encoder_attention_mask`.

    Prompts are encoded as the stock pipeline's call encodes them by default: after its `complex_human_instruction`, but for the
    empty one, which is its negative prompt.
    """

    pipeline_classes = ("SanaPipeline",)
    encoding = "Sana"
    encoded_as = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    call_settings = {"use_resolution_binning": False, "negative_prompt": None}  # whose embeddings are given
    most_tokens = {
        "tokenizer": TOKENS_OF_SANA - 1
    }  # with the first one: of the prompt proper the instruction takes one
    agree_in = ("in_channels", "out_channels", "caption_channels", "patch_size", "timestep_scale")
    lora_target_modules = ["to_k", "to_q", "to_v"]  # diffusers' script for a LoRA of SANA by DreamBooth
    usage = replace(
        FlowFamily.usage,
        network_class="SanaTransformer2DModel",
        own_pipeline="DisBackOneStepSanaPipeline",
        condition="{prompt}, use_resolution_binning=False",
        takes_size=True,
    )

    def check(self) -> None:
        super().check()
        takes, made = self.network.config.caption_channels, self.pipeline.text_encoder.config.hidden_size
        if takes != made:
            raise ValueError(
                f"The teacher's transformer takes text embeddings of width {takes}, but its text encoder makes {made}: they "
                "belong to different models."
            )

    @classmethod
    def check_network(cls, config: Any, what: str) -> None:
        super().check_network(config, what)
        if config.get("guidance_embeds"):
            raise ValueError(
                f"{what} has guidance_embeds=True: it embeds the guidance scale, as SANA-Sprint does, and was distilled into few "
                "steps already. Take the model that it was made of."
            )

    @classmethod
    def usage_with(cls, config: Any) -> Usage:
        side = 32 * config.sample_size
        return replace(cls.usage, condition=f"{cls.usage.condition}, height={side}, width={side}", takes_size=False)

    def noise_schedule(self) -> FlowSchedule:
        return FlowSchedule.of(self.pipeline.scheduler, timestep_scale=self.network.config.timestep_scale)

    def resolution(self, resolution: int | None = None) -> int:
        """As of `ModelFamily`.

        Raises:
            ValueError: If it is no multiple of 32, or not the teacher's own, and its positions are made for that one.
        """
        own, config = super().resolution(resolution), self.network.config
        if own % 32:
            raise ValueError(f"--resolution {own}: the stock pipeline's images have sides of multiples of 32 pixels.")
        if config.interpolation_scale is not None and own != super().resolution():
            raise ValueError(
                f"--resolution {own}: the positions of this transformer are made for {super().resolution()} pixels. Leave it out."
            )
        return own

    @property
    def instruction(self) -> list[str]:
        """What comes before each prompt, by default of the stock pipeline's call."""
        call = inspect.signature(type(self.pipeline).__call__)
        return call.parameters["complex_human_instruction"].default

    def encoder_id(self, resolution: int | None = None) -> str:
        before = hashlib.sha256("\n".join(self.instruction).encode()).hexdigest()
        return f"{super().encoder_id(resolution)} {before}"

    def stock_encode_prompt(self, prompts: list[str], guided: bool) -> tuple[Tensor, ...]:
        return self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=guided,
            device=self.text_encoders[0].device,
            complex_human_instruction=self.instruction,
        )

    @torch.no_grad()
    def encode(self, prompts: list[str], resolution: int | None = None) -> Condition:
        embeds, mask, *negative = self.encode_prompt(prompts, guided="" in prompts)
        if "" in prompts:
            empty = torch.tensor([prompt == "" for prompt in prompts], device=embeds.device)[:, None]
            embeds, mask = torch.where(empty[..., None], negative[0], embeds), torch.where(empty, negative[1], mask)
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    @classmethod
    def example_condition(cls, config: Any, batch: int) -> Condition:
        states = torch.empty(batch, TOKENS_OF_SANA, config.caption_channels, device="meta")
        mask = torch.empty(batch, TOKENS_OF_SANA, dtype=torch.long, device="meta")
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """As of `ModelFamily`: an `AutoencoderDC` gives one latent for each image."""
        vae = self.pipeline.vae.to(pixels.device)
        return vae.encode(pixels.to(vae.dtype)).latent.float() * vae.config.scaling_factor

    def one_step(self, network: nn.Module, timestep: int) -> DisBackOneStepSanaPipeline:
        self.check_network(network.config, "The student's network")
        own = {"transformer": network, "scheduler": self.one_step_scheduler(timestep)}
        return DisBackOneStepSanaPipeline(**{**self.pipeline.components, **own})
