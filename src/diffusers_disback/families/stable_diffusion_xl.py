"""SDXL: two text encoders, a pooled embedding, and a network that is told the image's size and crop."""

from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from ..models.batch import Condition
from .stable_diffusion import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """SDXL base and its fine-tunes. The condition is `encoder_hidden_states`, `text_embeds` and `time_ids`."""

    pipeline_classes = ("StableDiffusionXLPipeline",)
    addition_embed_types = ("text_time",)  # the pooled embedding, and the image's size
    encoding = "StableDiffusionXL"
    encoders = (*StableDiffusion.encoders, "text_encoder_2")
    needed = (*StableDiffusion.needed, "text_encoder_2", "tokenizer_2")
    usage = replace(StableDiffusion.usage, bare="bare_xl.md")
    conditioning_timestep = 399  # DMD2, arXiv 2405.14867, for one step: "conditioned at timestep 399"

    def check(self) -> None:
        super().check()
        network = self.network.config
        kind = type(self.pipeline.text_encoder_2).__name__
        if kind != "CLIPTextModelWithProjection":
            raise ValueError(
                f"The teacher's second text encoder is a {kind}, which makes no pooled embedding; SDXL's is a "
                "CLIPTextModelWithProjection."
            )
        pooled = self.pipeline.text_encoder_2.config.projection_dim
        wanted = network.projection_class_embeddings_input_dim - 6 * network.addition_time_embed_dim
        if pooled != wanted:
            raise ValueError(
                f"The teacher's UNet takes a pooled embedding of width {wanted}, but its second text encoder makes "
                f"{pooled}: they belong to different models (a refiner is none that draws alone)."
            )

    @staticmethod
    def call(network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        added = {name: condition[name] for name in ("text_embeds", "time_ids")}
        return network(
            x_t,
            timestep=t,
            encoder_hidden_states=condition["encoder_hidden_states"],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    @torch.no_grad()
    def encode(self, prompts: list[str], resolution: int | None = None) -> Condition:
        embeds, _, pooled, _ = self.encode_prompt(prompts)
        if self.pipeline.config.force_zeros_for_empty_prompt:  # as the stock pipeline does for the negative prompt
            empty = torch.tensor([prompt == "" for prompt in prompts], device=embeds.device)
            embeds, pooled = embeds.masked_fill(empty[:, None, None], 0), pooled.masked_fill(empty[:, None], 0)
        side = float(self.resolution(resolution))
        # The original size, the crop's top left corner and the target size: an uncropped square image.
        time_ids = torch.tensor([[side, side, 0, 0, side, side]] * len(prompts), device=embeds.device)
        return {"encoder_hidden_states": embeds, "text_embeds": pooled, "time_ids": time_ids}

    @classmethod
    def example_condition(cls, config: Any, batch: int) -> Condition:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {
            **super().example_condition(config, batch),
            "text_embeds": torch.empty(batch, pooled, device="meta"),
            "time_ids": torch.empty(batch, 6, device="meta"),
        }

    def assemble(self, network: nn.Module, scheduler: SchedulerMixin) -> DiffusionPipeline:
        parts = {**self.pipeline.components, "unet": network, "scheduler": scheduler}
        zeros = self.pipeline.config.force_zeros_for_empty_prompt
        return type(self.pipeline)(**parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False)

    def _settings_of_one_step(self) -> dict[str, Any]:
        zeros = self.pipeline.config.force_zeros_for_empty_prompt
        return {"force_zeros_for_empty_prompt": zeros, "add_watermarker": self.pipeline.watermark is not None}
