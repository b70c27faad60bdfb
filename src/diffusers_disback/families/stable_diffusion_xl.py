"""SDXL: two text encoders, a pooled embedding, and a network that is told the picture's size and crop."""

import torch
from torch import Tensor, nn

from ..data.truncation import told_once
from ..models.batch import Condition
from .stable_diffusion import ModelFamily


class StableDiffusionXL(ModelFamily):
    """SDXL base and its fine-tunes. The condition is `encoder_hidden_states`, `text_embeds` and `time_ids`."""

    pipeline_classes = ("StableDiffusionXLPipeline",)
    addition_embed_types = ("text_time",)  # the pooled embedding, and the picture's size
    needed = (*ModelFamily.needed, "text_encoder_2", "tokenizer_2")

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

    def call(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
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
        device = self.pipeline.text_encoder.device
        with told_once():
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        if self.pipeline.config.force_zeros_for_empty_prompt:  # as the stock pipeline does for the negative prompt
            empty = torch.tensor([prompt == "" for prompt in prompts], device=embeds.device)
            embeds, pooled = embeds.masked_fill(empty[:, None, None], 0), pooled.masked_fill(empty[:, None], 0)
        side = float(self.resolution(resolution))
        # The original size, the crop's top left corner and the target size: an uncropped square picture.
        time_ids = torch.tensor([[side, side, 0, 0, side, side]] * len(prompts), device=embeds.device)
        return {"encoder_hidden_states": embeds, "text_embeds": pooled, "time_ids": time_ids}
