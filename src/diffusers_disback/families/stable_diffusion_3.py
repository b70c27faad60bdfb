"""Stable Diffusion 3 and 3.5: a transformer on text and image at once, and up to three text encoders."""

from dataclasses import replace
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor, nn

from ..models.batch import Condition
from ..models.flow_schedule import FlowSchedule
from ..pipelines.one_step_stable_diffusion_3 import DisBackOneStepStableDiffusion3Pipeline
from .flow import FlowFamily
from .text import TOKENS


TOKENS_OF_T5 = 256  # of a prompt, by default of the stock pipeline
_SHIFT = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")  # as calculate_shift takes them


class StableDiffusion3(FlowFamily):
    """Stable Diffusion 3, 3.5 and their fine-tunes (arXiv 2403.03206). The condition is `encoder_hidden_states` and
    `pooled_projections`. A pipeline without T5, which is `text_encoder_3`, has zeros in the place of its states.
    """

    pipeline_classes = ("StableDiffusion3Pipeline",)
    encoding = "StableDiffusion3"
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    needed = (*FlowFamily.needed, "text_encoder_2", "tokenizer_2")
    most_tokens = {"tokenizer_3": TOKENS_OF_T5}
    may_be_absent = ("text_encoder_3", "tokenizer_3")
    agree_in = ("in_channels", "out_channels", "joint_attention_dim", "pooled_projection_dim", "patch_size")
    usage = replace(
        FlowFamily.usage,
        network_class="SD3Transformer2DModel",
        own_pipeline="DisBackOneStepStableDiffusion3Pipeline",
    )
    # diffusers' script for a LoRA of Stable Diffusion 3 by DreamBooth: the attention on both streams
    lora_target_modules = [
        *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v"),
    ]

    def check(self) -> None:
        super().check()
        network, encoders = self.network.config, [self.pipeline.text_encoder, self.pipeline.text_encoder_2]
        for encoder in encoders:
            if type(encoder).__name__ != "CLIPTextModelWithProjection":
                raise ValueError(
                    f"A text encoder of the teacher is a {type(encoder).__name__}, which makes no pooled embedding; the first two "
                    "of Stable Diffusion 3 are CLIPTextModelWithProjection."
                )
        pooled = sum(encoder.config.projection_dim for encoder in encoders)
        if network.pooled_projection_dim != pooled:
            raise ValueError(
                f"The teacher's transformer takes a pooled embedding of width {network.pooled_projection_dim}, but its text "
                f"encoders make {pooled}: they belong to different models."
            )
        t5, width = self.pipeline.text_encoder_3, sum(encoder.config.hidden_size for encoder in encoders)
        made = max(width, network.joint_attention_dim) if t5 is None else t5.config.d_model
        if network.joint_attention_dim != made or width > made:
            raise ValueError(
                f"The teacher's transformer takes text embeddings of width {network.joint_attention_dim}, but its text encoders "
                f"make {width}{'' if t5 is None else f' and {made}'}: they belong to different models."
            )
        if t5 is not None and self.pipeline.tokenizer_3 is None:
            raise ValueError("The teacher's pipeline has a text_encoder_3, but no tokenizer_3.")

    def noise_schedule(self) -> FlowSchedule:
        scheduler, mu = self.pipeline.scheduler, None
        if scheduler.config.get("use_dynamic_shifting"):
            patches = (self.latent_shape(self.size)[-1] // self.network.config.patch_size) ** 2
            mu = calculate_shift(patches, *(scheduler.config[name] for name in _SHIFT))
        return FlowSchedule.of(scheduler, mu)

    def resolution(self, resolution: int | None = None) -> int:
        """As of `ModelFamily`.

        Raises:
            ValueError: If patches do not divide it, or there are no positions for so many.
        """
        resolution, config = super().resolution(resolution), self.network.config
        patch = self.stride * config.patch_size
        if resolution % patch or resolution // patch > config.pos_embed_max_size:
            raise ValueError(
                f"--resolution {resolution}: this transformer has patches of {patch} x {patch} pixels, and positions for "
                f"{config.pos_embed_max_size} of them in a row."
            )
        return resolution

    def stock_encode_prompt(self, prompts: list[str], guided: bool) -> tuple[Tensor, ...]:
        return self.pipeline.encode_prompt(
            *(prompts, prompts, prompts),
            device=self.text_encoders[0].device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
        )

    @torch.no_grad()
    def encode(self, prompts: list[str], resolution: int | None = None) -> Condition:
        embeds, _, pooled, _ = self.encode_prompt(prompts)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    @classmethod
    def example_condition(cls, config: Any, batch: int) -> Condition:
        tokens = TOKENS + TOKENS_OF_T5
        return {
            "encoder_hidden_states": torch.empty(batch, tokens, config.joint_attention_dim, device="meta"),
            "pooled_projections": torch.empty(batch, config.pooled_projection_dim, device="meta"),
        }

    def one_step(self, network: nn.Module, timestep: int) -> DisBackOneStepStableDiffusion3Pipeline:
        self.check_network(network.config, "The student's network")
        own = {"transformer": network, "scheduler": self.one_step_scheduler(timestep)}
        return DisBackOneStepStableDiffusion3Pipeline(**{**self.pipeline.components, **own})
